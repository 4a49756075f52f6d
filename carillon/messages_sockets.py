"""Messages about sockets, both ways between gateway and shard."""

from __future__ import annotations

from msgspec import Struct

# ---------------------------------------------------------------------------------------------------
# Gateway -> shard, one-way, strictly in order per link


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
    acked_rev: int = 0
    """With reattach: the newest `rev` that an ACK with `seq` of this connection named; 0: none did. Of what
    is told again, updates after it are not acknowledged."""


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
    rev: int | None = None
    """The newest `rev` of any notification that this device shows; None: not told."""


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


class SocketDrained(Struct, array_like=True, tag=28):
    """The write buffer of a connection that is replaying ran low: the next page may come."""

    conn: int


# ---------------------------------------------------------------------------------------------------
# Shard -> gateway, one-way, strictly in order per link


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
    rev: int | None = None
    """With `seq`, as in `ClientAck`."""
