"""HTTP routes, one module per subject; `all_routes` is the one table."""

from __future__ import annotations

from serve.routing import Route


def all_routes() -> tuple[Route, ...]:
    """Every route, in the order of the documentation."""
    from serve.routes import (
        client,
        dead_letters,
        demo,
        events,
        explain,
        operations,
        policy,
        presence,
        templates,
        users,
    )

    return (
        *events.ROUTES, *explain.ROUTES, *users.ROUTES, *presence.ROUTES, *dead_letters.ROUTES,
        *client.ROUTES, *policy.ROUTES, *templates.ROUTES, *operations.ROUTES, *demo.ROUTES,
    )  # fmt: skip
