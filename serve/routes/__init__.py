"""HTTP routes, one module per subject; `all_routes` is the one table."""

from __future__ import annotations

from serve.routing import Route


def all_routes() -> tuple[Route, ...]:
    """Every route, in the order of the documentation."""
    from serve.routes import (
        amend,
        broadcasts,
        client,
        dead_letters,
        demo,
        digests,
        event_import,
        events,
        explain,
        inbound,
        operations,
        policy,
        presence,
        profiles,
        schedules,
        segments,
        templates,
        topics,
        unsubscribe,
        users,
    )

    modules = (
        events,
        event_import,
        amend,
        explain,
        schedules,
        broadcasts,
        inbound,
        profiles,
        users,
        topics,
        digests,
        segments,
        presence,
        dead_letters,
        client,
        policy,
        templates,
        unsubscribe,
        operations,
        demo,
    )
    return tuple(route for module in modules for route in module.ROUTES)
