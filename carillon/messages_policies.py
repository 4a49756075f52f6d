"""Messages about policies of tenants: a changed one is told to every shard."""

from __future__ import annotations

from msgspec import Struct


class PolicyRead(Struct, array_like=True, tag=63):
    """Request: a tenant's policy was changed (and committed): read it again.

    A router passes it to every shard of its map and replies `PolicyHeld`; a shard replies `Done` once
    whatever it decides from then on is decided by what was committed before the request.
    """

    tenant: str
    wait_ms: int = 2000
    """A router answers within this time, whoever is still missing then."""


class PolicyHeld(Struct, array_like=True, tag=64):
    """Reply of a router to `PolicyRead`."""

    shards: int
    """How many shards decide by it now."""
    missing: list[str] = []
    """Names of those that did not say so in time: they read it at their next look."""
