"""Messages that change or ask for what is kept of a user: routed by `slot`, passed through by the router."""

from __future__ import annotations

from msgspec import Struct

from carillon.messages_events import Event, Outcome


class Change(Struct, array_like=True, tag=3):
    """Request: a durable change of a user's notifications. Reply: `ChangeResult`, after the commit."""

    tenant: str
    user: str
    slot: int
    op: str
    """read | read_all | seen | archive | dismiss | click."""
    ids: list[bytes] = []
    up_to_seq: int | None = None
    action_id: str | None = None
    strict: bool = False
    """True for an id in a path: an unknown or foreign id is RemoteError not_found instead of ignored."""


class ChangeResult(Struct, array_like=True, tag=4):
    """What `Change` did."""

    changed: int
    """Rows that really changed."""
    rev: int
    unread: int


class Amend(Struct, array_like=True, tag=46):
    """Request: a service edits, retracts or cancels what it sent. Reply: `Amended`, after the commit.

    Fails with `not_found`; an edit also with `retracted`, `expired`, `version_conflict` or `invalid`.
    """

    tenant: str
    user: str
    slot: int
    op: str
    """edit | retract | cancel."""
    notification: bytes
    act: bytes
    """16 bytes, minted before the first try: a second one has no second effect."""
    actor: str
    """Who asked: "key:<key id>"."""
    patch: str = ""
    """Of an edit: the members that change, as JSON (`carillon.edits.Patch`)."""
    version: int | None = None
    """Of an edit: only if this is the present version."""


class Amended(Struct, array_like=True, tag=47):
    """Where the notification stands after `Amend`."""

    version: int
    """Of its content: 1 as it was sent."""
    retracted_ms: int | None = None
    cancelled_ms: int | None = None
    stopped: int = 0
    """Pushes that a cancellation stopped."""


class DevicePut(Struct, array_like=True, tag=5):
    """Request: register or replace a push target. Reply: `Done`. Re-registration by another user moves it."""

    tenant: str
    user: str
    slot: int
    device: str
    platform: str
    provider: str
    token_kind: str
    """token | fid | subscription."""
    token: str
    app_id: str = ""
    environment: str = "production"
    locale: str | None = None


class DeviceDelete(Struct, array_like=True, tag=6):
    """Request: forget a push target. Reply: `Done` (count 0 if there was none)."""

    tenant: str
    user: str
    slot: int
    device: str


class PreferencesPut(Struct, array_like=True, tag=7):
    """Request: replace the preferences document (validated JSON text). Reply: `Done` with the new version."""

    tenant: str
    user: str
    slot: int
    document: str
    version: int | None = None
    """The version that is replaced, 0 for none; another one by now: VersionError. None: whatever is there."""


class Unsubscribe(Struct, array_like=True, tag=45):
    """Request: switch something off in the user's preferences (carillon/unsubscribe.py). Reply: `Done`."""

    tenant: str
    user: str
    slot: int
    section: str
    name: str
    channel: str


class ProfilePut(Struct, array_like=True, tag=60):
    """Request: replace the user's profile (validated JSON text, carillon/profiles.py). Reply: `Done`."""

    tenant: str
    user: str
    slot: int
    document: str


class UserErase(Struct, array_like=True, tag=61):
    """Request: erase everything kept of a user and close its sockets with 4001. Reply: `Done`, when nothing
    is left; not_found if nothing was there."""

    tenant: str
    user: str
    slot: int


class DigestChange(Struct, array_like=True, tag=58):
    """Request: send an open digest now, or take one item out of it. Reply: `Done` with how many notifications
    that concerned, 0 if it was done before."""

    tenant: str
    user: str
    slot: int
    digest: bytes
    op: str
    """flush | remove."""
    notification: bytes = b""
    """The item to take out."""
    by_user: bool = False
    """The user asks, not a service: nothing that the user wants in general holds it."""


class PlanQuery(Struct, array_like=True, tag=38):
    """Request: what would become of an event? Nothing of it is stored. Reply: `PlanReply`."""

    tenant: str
    user: str
    slot: int
    event: Event
    at_ms: int = 0
    """When it would be sent; 0: now."""


class PlanReply(Struct, array_like=True, tag=39):
    """Reply to `PlanQuery`."""

    document: str
    """The plan and the rules behind it, as `POST /v1/events?dryRun=true` answers it (JSON)."""
    failed: Outcome | None = None
    """What the event would be answered, if it would fail."""
    replayed: bool = False
    """Its idempotency key stands for something already."""


class PresenceQuery(Struct, array_like=True, tag=9):
    """Request: presence of users of one tenant. Reply: `PresenceReply`, in the order asked."""

    tenant: str
    users: list[str]


class DevicePresence(Struct, array_like=True):
    """One attached device."""

    device: str
    attention: str
    """focused | visible | idle | hidden: the best of the device's connections."""
    since_ms: int
    connections: int = 1


class UserPresence(Struct, array_like=True):
    """Presence of one user."""

    user: str
    status: str
    """active | idle | offline, as others may see it."""
    devices: list[DevicePresence] = []
    last_seen_ms: int | None = None
    invisible: bool = False
    """The user wants to be seen as offline; `devices` tells all the same."""


class PresenceReply(Struct, array_like=True, tag=10):
    """Reply to `PresenceQuery`."""

    users: list[UserPresence]


class SessionsRevoke(Struct, array_like=True, tag=11):
    """Request: close all sockets of a user with 4001; tokens issued before now are invalid. Reply: `Done`."""

    tenant: str
    user: str
    slot: int


class Logout(Struct, array_like=True, tag=15):
    """Request: forget a device's push target, refuse a token from now on, close their sockets with 4001.
    Reply: `Done`."""

    tenant: str
    user: str
    slot: int
    device: str | None
    """None: only the token goes."""
    token_id: bytes
    token_expires_ms: int


class Replay(Struct, array_like=True, tag=12):
    """Request: dead letters of one slot are to be tried again. Reply: `ReplayResult`, after the commit."""

    tenant: str
    slot: int
    deliveries: list[int]
    asked_ms: int
    """When it was asked for: the same request told again has one effect."""


class ReplayResult(Struct, array_like=True, tag=13):
    """What `Replay` did; the others were no dead letters of the tenant (any more)."""

    replayed: int
    expired: int
    """Left dead: nobody wants them any more."""


class DeviceAck(Struct, array_like=True, tag=16):
    """Request: what a device acknowledges by HTTP. Reply: `Done`."""

    tenant: str
    user: str
    slot: int
    device: str | None
    """None: some device of the user."""
    seq: int | None = None
    """Cumulative: everything the device's connection was sent up to here."""
    ids: list[bytes] = []
    rev: int | None = None
    """As in `ClientAck`."""


class PresenceMode(Struct, array_like=True, tag=18):
    """Request: how a user wants to be seen. Reply: `Done`, after the commit."""

    tenant: str
    user: str
    slot: int
    mode: str
    """auto | invisible."""


class DeviceVisibility(Struct, array_like=True, tag=17):
    """Request: where a device's user looks, told by HTTP. Reply: `Done`; not_found if it is not connected."""

    tenant: str
    user: str
    slot: int
    device: str
    state: str
    viewing: str | None = None
