"""The messages that actors exchange over links (docs/reference/links.md is the wire contract).

Each is a MessagePack array whose first element is the integer tag, followed by the fields in the order
written here. Fields are only ever appended, with a default; a tag is never reused.

Ids of notifications are 16 raw bytes here and UUID text at the edges. Times are milliseconds since the
Unix epoch. `slot` is `carillon.ids.slot_of(tenant, user)`.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Struct

# ---------------------------------------------------------------------------------------------------
# Values shared by several messages

PRIORITIES: Final = ("low", "normal", "high", "urgent")
"""Index = the number carried in messages and stored."""


class Address(Struct, array_like=True, frozen=True):
    """Where a member listens."""

    host: str
    port: int
    unix_path: str = ""
    """Socket path, usable by peers with the same `machine`; empty if there is none."""
    machine: str = ""
    """Identity of the machine (boot id): only peers with the same one can use `unix_path`."""


class Member(Struct, array_like=True, frozen=True):
    """One actor of the cluster."""

    kind: str
    """coordinator | router | shard | gateway | pool | ingress | other."""
    name: str
    """Unique and stable over restarts, e.g. "shard-<node>-0"."""
    node: str
    """Ray node id (hex) the actor runs on."""
    incarnation: str
    """New at each start of the process."""
    address: Address
    public: str = ""
    """What clients dial: a gateway's ws:// URL, an ingress replica's http:// URL; else empty."""
    labels: dict[str, str] = {}
    """A pool's {"provider": "fcm"}."""
    term: int = 0
    """A shard's fencing number, set by the coordinator; 0 for the others."""


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


# ---------------------------------------------------------------------------------------------------
# Publishing: ingress -> router -> shard


class Publish(Struct, array_like=True, tag=1):
    """Request. Ingress -> router, any slots; router -> shard, slots of that shard. Reply: `Outcomes`."""

    events: list[Event]


class Outcomes(Struct, array_like=True, tag=2):
    """Reply to `Publish`: one outcome per event, in the order of the events."""

    outcomes: list[Outcome]


# ---------------------------------------------------------------------------------------------------
# State changes and per-user writes: routed by `slot`, passed through by the router


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


class PlanReply(Struct, array_like=True, tag=39):
    """Reply to `PlanQuery`."""

    document: str
    """The plan and the rules behind it, as `POST /v1/events?dryRun=true` answers it (JSON)."""


class Done(Struct, array_like=True, tag=8):
    """Plain success."""

    count: int = 1


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


# ---------------------------------------------------------------------------------------------------
# Sockets: gateway -> shard, one-way, strictly in order per link


class Attach(Struct, array_like=True, tag=20):
    """A connection wants to be part of its user's session."""

    conn: int
    """Number of the connection at this gateway; never reused by one process."""
    tenant: str
    user: str
    slot: int
    device: str
    session_id: str
    epoch: str | None = None
    """Position from the URL, or (reattach) what this socket was last written; None if there is none."""
    last_seq: int = 0
    last_rev: int | None = None
    reattach: bool = False
    """True if the socket was attached before (its shard was lost or the slot moved): no WELCOME, replay
    from the position, then live."""
    ready: bool = False
    """With reattach: True if the connection had passed its first frame or resume wait."""
    legacy: bool = False
    """True if the client named no subprotocol (it gets NEW_NOTIFICATION for updates)."""
    token_issued_ms: int = 0
    """`iat` of the token, ms since the epoch, 0 if it has none: older than `streams.tokens_valid_from` means
    revoked (close 4001)."""
    attention: str | None = None
    """State of the connection's last VISIBILITY; None if it never sent one."""
    viewing: str | None = None
    """Likewise."""
    began_seq: int | None = None
    """With reattach: every cumulative ACK of this connection up to here is surely in the store. None: it has
    no position yet. Without reattach: set if the position acknowledges what it covers."""
    acked_seq: int = 0
    """With reattach: what this connection acknowledged cumulatively; beyond `began_seq` that may have been
    lost with the shard before."""
    token_id: bytes = b""
    """`carillon.tokens.token_id` of the token: one that was logged out is refused (close 4001)."""
    poll: bool = False
    """True for a long poll: what its device told of attention holds for the device's next poll, too."""


class Detach(Struct, array_like=True, tag=21):
    """The socket is gone."""

    conn: int
    clean: bool
    """True after a normal close (1000): short grace."""


class ClientReady(Struct, array_like=True, tag=22):
    """The first client frame came and was not RESUME: no backlog, live frames flow."""

    conn: int


class ClientResume(Struct, array_like=True, tag=23):
    """RESUME."""

    conn: int
    epoch: str
    last_seq: int
    last_rev: int | None = None
    ref: str | int | None = None


class ClientAck(Struct, array_like=True, tag=24):
    """ACK. `seq` is cumulative for this connection; `ids` single ones."""

    conn: int
    seq: int | None = None
    ids: list[bytes] = []
    ref: str | int | None = None


class ClientChange(Struct, array_like=True, tag=25):
    """MARK_READ, MARK_ALL_READ, MARK_SEEN, ARCHIVE, DISMISS, CLICK. Answered OK (after commit) if `ref`."""

    conn: int
    op: str
    """As in `Change.op`."""
    ids: list[bytes] = []
    up_to_seq: int | None = None
    action_id: str | None = None
    ref: str | int | None = None


class ClientVisibility(Struct, array_like=True, tag=26):
    """VISIBILITY."""

    conn: int
    state: str
    """focused | visible | hidden | idle."""
    viewing: str | None = None
    ref: str | int | None = None


class ClientWatch(Struct, array_like=True, tag=27):
    """WATCH_PRESENCE. The answer is a `WatchAnswer`."""

    conn: int
    users: list[str]
    """All that are to be watched from now on; none: nobody."""
    ref: str | int | None = None


class PresenceWatch(Struct, array_like=True, tag=29):
    """A gateway's clients watch users, or (`watch` False) no longer do. Answered with `PresenceTold`: the
    users' present state, then every change, until unwatched or until the link or the term ends."""

    tenant: str
    users: list[str]
    watch: bool = True


class SocketDrained(Struct, array_like=True, tag=28):
    """The write buffer of a connection that is replaying ran low: the next page may come."""

    conn: int


# Sockets: shard -> gateway, one-way, strictly in order per link


class Write(Struct, array_like=True):
    """One frame for some connections of this gateway."""

    conns: list[int]
    frame: bytes
    """Compact JSON text of the frame, UTF-8; the gateway transcodes for MessagePack connections."""
    seq: int = 0
    """The connection's last written seq after this frame; 0: unchanged."""
    rev: int = 0
    """Likewise the rev."""
    replay: bool = False
    """True for frames of a replay page: they do not count as live for 4208, and when the buffer has run
    low after a frame with `page_end` the gateway sends `SocketDrained`."""
    page_end: bool = False
    update: bool = False
    """True for NOTIFICATION_UPDATED: a legacy connection gets it as NEW_NOTIFICATION."""
    epoch: str = ""
    """Set on WELCOME: the epoch this connection's position belongs to."""


class Deliver(Struct, array_like=True, tag=30):
    """Frames to write, in order. Gateways drop those of an older term than they have seen of that shard."""

    shard: str
    term: int
    writes: list[Write]


class CloseSocket(Struct, array_like=True, tag=31):
    """Close connections with a code of protocol.md."""

    shard: str
    term: int
    conns: list[int]
    code: int
    reason: str


class WatchedUser(Struct, array_like=True):
    """What a watcher may know of a user."""

    user: str
    status: str
    """active | idle | offline."""
    last_seen_ms: int | None = None


class PresenceTold(Struct, array_like=True, tag=35):
    """Present state of users that this gateway watches. Gateways drop those of an older term."""

    shard: str
    term: int
    tenant: str
    users: list[WatchedUser]
    moved: list[str] = []
    """Not this shard's (any more): watch them at their owner."""


class ClientMode(Struct, array_like=True, tag=37):
    """SET_PRESENCE, gateway to shard. Answered OK (after commit) if `ref`."""

    conn: int
    mode: str
    """As in `PresenceMode`."""
    ref: str | int | None = None


class ClientTopic(Struct, array_like=True, tag=62):
    """SUBSCRIBE and UNSUBSCRIBE, gateway to shard. Answered OK (after commit) if `ref`."""

    conn: int
    topic: str
    subscribe: bool
    ref: str | int | None = None


class WatchAnswer(Struct, array_like=True, tag=36):
    """Answer to `ClientWatch`: whom the connection may watch, in place of those before."""

    conn: int
    users: list[str]
    refused: list[str] = []
    """Those it may not watch."""
    ref: str | int | None = None
    code: str = ""
    """Set: the request failed and changes nothing, unless it is for good (`temporary` False)."""
    message: str = ""
    temporary: bool = False


class AttachRefused(Struct, array_like=True, tag=32):
    """The shard does not own the slot (any more): refresh the map and attach at the owner."""

    conns: list[int]
    map_version: int


class DeviceTold(Struct, array_like=True, tag=34):
    """What a device said by HTTP (`DeviceAck`, `DeviceVisibility`): the holder of its connections remembers
    it for a later attachment."""

    conns: list[int]
    seq: int = 0
    state: str | None = None
    """None: unchanged, and so is `viewing`."""
    viewing: str | None = None


# ---------------------------------------------------------------------------------------------------
# Push: shard -> router -> pool; pool -> shard


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


# ---------------------------------------------------------------------------------------------------
# Membership: member <-> coordinator


class Join(Struct, array_like=True, tag=50):
    """Request, first message of a member on its link to the coordinator. Reply: `ClusterMap`."""

    member: Member


class Renew(Struct, array_like=True, tag=51):
    """One-way, every `cluster.lease_renew_s`: the lease, and the member's statistics."""

    name: str
    incarnation: str
    counters: dict[str, float] = {}
    """Growing since the process started, e.g. "events_accepted"."""
    gauges: dict[str, float] = {}
    histograms: dict[str, list[float]] = {}
    """Per name: counts per bucket of carillon.metrics.BUCKETS_MS, then the sum in ms."""


class ClusterMap(Struct, array_like=True, tag=52):
    """Reply to `Join` and pushed one-way at every change. A higher `version` replaces a lower one."""

    version: int
    owners: list[int]
    """1,024 entries: index into `shards` of each slot's owner, -1 while it has none."""
    shards: list[Member]
    """Every shard that owns or may own slots, with its term."""
    members: list[Member]
    """All other live members."""


class Leave(Struct, array_like=True, tag=53):
    """Request: graceful departure (drain); slots are moved first. Reply: `Done`."""

    name: str
    incarnation: str


class StatsQuery(Struct, array_like=True, tag=54):
    """Request to the coordinator. Reply: `StatsReply`."""


class MemberStats(Struct, array_like=True):
    """Latest statistics of one member, totals carried over its restarts."""

    member: Member
    age_s: float
    counters: dict[str, float]
    gauges: dict[str, float]
    histograms: dict[str, list[float]]


class StatsReply(Struct, array_like=True, tag=55):
    """Reply to `StatsQuery`."""

    version: int
    slots: dict[str, int]
    """Slots per shard name; "" counts the ownerless."""
    members: list[MemberStats]


# ---------------------------------------------------------------------------------------------------
# The link itself


class Failure(Struct, array_like=True, tag=90):
    """Reply to any request that failed; raised as `RemoteError` at the caller."""

    code: str
    message: str
    temporary: bool
    retry_after_s: float = 0.0


class Ping(Struct, array_like=True, tag=91):
    """One-way keep-alive of an idle link; receiving it is all it is for."""


type_union = (
    Publish | Outcomes | Change | ChangeResult | DevicePut | DeviceDelete | PreferencesPut | Done
    | PresenceQuery | PresenceReply | SessionsRevoke | Logout | Replay | ReplayResult | Attach | Detach
    | ClientReady | ClientResume | ClientAck | ClientChange | ClientVisibility | ClientWatch
    | SocketDrained | Deliver | CloseSocket | AttachRefused | Push | PushAccepted | PushOutcome
    | PushLeft | Join | Renew | ClusterMap | Leave | StatsQuery | StatsReply | Failure | Ping
    | DeviceAck | DeviceVisibility | DeviceTold | PresenceWatch | PresenceTold | WatchAnswer
    | PresenceMode | ClientMode
    | PlanQuery | PlanReply | Unsubscribe | Amend | Amended | DigestChange
    | ProfilePut | UserErase | ClientTopic
)  # fmt: skip
Message = type_union


class Envelope(Struct, array_like=True):
    """What a frame carries: `[request, body]`.

    `request` is 0 for a one-way message, n > 0 for request n of the sender, -n for the reply to request n
    of the receiver.
    """

    request: int
    body: Message


def make_envelope_decoder() -> msgspec.msgpack.Decoder[Any]:
    """A decoder of `Envelope` (one per process: it is not to be pickled)."""
    return msgspec.msgpack.Decoder(Envelope)
