"""Messages that publish: ingress -> router -> shard."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

PRIORITIES: Final = ("low", "normal", "high", "urgent")
"""Index = the number carried in messages and stored."""


class Dedupe(Struct, array_like=True, frozen=True):
    """What an event asks of those like it (carillon/merging.py)."""

    merge: str = "drop"
    """drop | count | replace | accumulate."""
    key: str | None = None
    """None: those with the same type, title, body and target are alike."""
    window_ms: int = 0
    """0: `merge.dedupe_window_s`."""


class Event(Struct, array_like=True):
    """One notification for one recipient, as the ingress minted it."""

    id: bytes
    """UUIDv7, minted before the first try, the same over retries."""
    tenant: str
    user: str
    slot: int
    type: str
    category: str | None
    priority: int
    content: str
    """The members of the notification's JSON that no state change touches, without braces:
    `"type":..,"title":..,"body":..,...,"createdAt":..` (carillon/notification.py writes and reads it)."""
    created_ms: int
    expires_ms: int | None = None
    channels: list[str] | None = None
    """Channels the event asks for; None means the default plan (in-app, push if there is a target)."""
    collapse_key: str | None = None
    idempotency_key: str | None = None
    """Scoped already: "<route>:<key>", "#index" or "#userId" included."""
    body_hash: bytes | None = None
    """SHA-256 of the canonical body; set with `idempotency_key`."""
    retry: bool = False
    """True after an ambiguous failure: the shard looks first whether `id` exists."""
    fallback: list[str] | None = None
    """External channels to try, one after the other, when `channels` ended without success."""
    dedupe: Dedupe | None = None
    """None: only what the tenant's rule for its type asks for."""
    aggregate: bool | None = None
    """True: one notification for all of its type and target; False: not even if the tenant's rule says so."""
    over: int = 0
    """What becomes of it beyond its tenant's rate (carillon/limits.py): 0: it is within; n > 0: it joins a
    digest that collects for n ms; -1 (ALONE): the feed alone; -2 (PASSES): nothing, it is urgent."""


class Outcome(Struct, array_like=True):
    """What became of one event."""

    id: bytes
    """The event's own id; with `status` duplicate, merged or a replay: the id of the other one."""
    seq: int = 0
    status: str = "stored"
    """delivered|queued|stored|deferred|merged|duplicate|suppressed|failed|moved. The last is internal."""
    channels: list[str] = []
    """Channels planned, e.g. ["in_app", "push"]."""
    replayed: bool = False
    """True if an earlier request with the same idempotency key made it."""
    reason: str | None = None
    code: str | None = None
    """With status failed: the error's code (invalid, idempotency_conflict, in_progress, unavailable, ...)."""
    detail: str | None = None
    retry_after_s: float = 0.0


class Publish(Struct, array_like=True, tag=1):
    """Request. Ingress -> router, any slots; router -> shard, slots of that shard. Reply: `Outcomes`."""

    events: list[Event]


class Outcomes(Struct, array_like=True, tag=2):
    """Reply to `Publish`: one outcome per event, in the order of the events."""

    outcomes: list[Outcome]
