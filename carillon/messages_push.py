"""Messages about push: shard -> router -> pool; pool -> shard."""

from __future__ import annotations

from msgspec import Struct


class PushTarget(Struct, array_like=True):
    """One device to push to."""

    device: str
    provider: str
    token_kind: str
    token: str
    app_id: str
    environment: str
    registered_ms: int
    """For the 410 rule: a target registered after the provider's timestamp is kept."""
    platform: str = ""
    """ios | android | web; empty: not told."""


class PushJob(Struct, array_like=True):
    """One claimed outbox row for one provider, with its targets there."""

    delivery: int
    """Id of the outbox row (deliveries.id)."""
    attempt: int
    """1 for the first try."""
    tenant: str
    user: str
    slot: int
    notification: bytes
    seq: int
    type: str
    title: str
    body: str | None
    link: str | None
    collapse_key: str
    """Never empty: the event's, or the notification id. Cut to the provider's limit by the channel."""
    priority: int
    badge: int
    """-1: the user wants none."""
    expires_ms: int | None
    targets: list[PushTarget]
    provider: str = ""
    """All targets are of this provider."""
    withdraw: bool = False
    """True: silent; takes back what was pushed with this collapse key."""
    sound: str = "default"
    """As the user wants it: "" none, "default", or the name of a sound of the app."""
    digest: bytes = b""
    """The digest that this push tells; empty: none."""
    count: int = 1
    """For how many notifications it speaks."""
    notifications: list[bytes] = []
    """Of a digest: the newest of them, newest first."""
    vibration: bool | None = None
    """As the user wants it; None: nobody says, it is as the app has it."""


class Push(Struct, array_like=True, tag=40):
    """Shard -> router (one-way) and router -> pool (request; reply `PushAccepted`)."""

    jobs: list[PushJob]


class PushAccepted(Struct, array_like=True, tag=41):
    """How many of the jobs, from the first, the pool took; the rest stay in the outbox."""

    accepted: int
    queued: int
    """Jobs the pool now holds."""
    reason: str = ""
    """Why not all were taken: full | breaker open | paused | draining."""


class PushLeft(Struct, array_like=True, tag=43):
    """One-way, router or pool -> shard: jobs that nobody will try; their rows go back to the outbox."""

    provider: str
    reason: str
    """no pool | full | breaker open | paused | draining | waited too long."""
    deliveries: list[int]
    attempts: list[int]
    """The attempt of each of `deliveries`."""


LEFT = "left"
"""Outcome of a target that was not tried; it neither is an attempt nor uses one up."""


class PushResult(Struct, array_like=True):
    """One try at one target."""

    device: str
    outcome: str
    """sent | unknown | failed (retry may help) | dead (never retry) | invalid_target | disabled_target, or

    left: not tried, as the app of this target is held back while others of the same job were tried.
    """
    provider_id: str = ""
    """The provider's message id."""
    status: int = 0
    """HTTP status, 0 if there was no answer."""
    error: str = ""
    """The provider's code or the exception, short."""
    retry_after_s: float = 0.0
    started_ms: int = 0
    duration_ms: float = 0.0


class PushOutcome(Struct, array_like=True, tag=42):
    """Request, pool -> owning shard (by slot). Reply: `Done` after the commit."""

    delivery: int
    attempt: int
    tenant: str
    user: str
    slot: int
    notification: bytes
    provider: str
    results: list[PushResult]
