"""One connection of a session: where it stands, what it was written, what it said."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from carillon.effects import LoadChanges, LoadNotifications
    from carillon.session import Session


class Phase(Enum):
    """Where an attachment stands (carillon/session.py)."""

    WAITING = 1
    REPLAYING = 2
    LIVE = 3


class ReplayStart(NamedTuple):
    """Where a replay from the store began."""

    seq: int
    """The cursor's seq: rows up to here the client has, so their changes are sent as changes."""
    head_rev: int
    """The head's rev then: rows after `seq` are sent with their state, later changes of them as changes."""
    in_changes: bool
    """False while notifications are read, True while changes are."""


class Attachment:
    """One connection of the session.

    Attributes:
        peer: the shell's handle of the gateway; opaque here.
        conn: number of the connection at that gateway.
        cursor_seq, cursor_rev: everything up to here was written to this connection.
        acked_seq: cumulative acknowledgement of this connection; starts at its first cursor.
        acked_rev: the same for updates, of a connection that acknowledges by revisions.
        positioned: its position was told by the client or the gateway, and the store can complete it.
        written_before: up to here another attachment of this connection wrote: ids are not known here.
        updated_before: the same for updates, a revision.
        reported: it told its visibility at least once.
        poll: a long poll; see `Session.attach`.
        owes_since_ms: since when it has a delivery with a waiting push unacknowledged; 0: it has none.
        replay: while rows come from the store, where that replay began; else None.
        count_due: the unread count has changed without a rev since its WELCOME.
        loading: the request to the store that is on its way; else None. Any other answer is stale.
        wait_deadline: monotonic time at which a waiting attachment goes live; 0 once it left that phase.
    """

    __slots__ = (
        "acked_rev", "acked_seq", "attention", "attention_since_ms", "conn", "count_due", "cursor_rev",
        "cursor_seq", "device", "first_frame_seen", "legacy", "loading", "owes_since_ms", "peer", "phase",
        "poll", "positioned", "replay", "reported", "session", "session_id", "token_id", "updated_before",
        "viewing", "wait_deadline", "written_before",
    )  # fmt: skip

    def __init__(
        self, session: Session, peer: Any, conn: int, device: str, session_id: str, now_ms: int
    ) -> None:
        self.session = session
        self.peer = peer
        self.conn = conn
        self.device = device
        self.session_id = session_id
        self.token_id = b""  # set by the shell
        self.phase = Phase.WAITING
        self.cursor_seq = 0
        self.cursor_rev = 0
        self.acked_seq = self.acked_rev = 0
        self.replay: ReplayStart | None = None
        self.loading: LoadNotifications | LoadChanges | None = None
        self.first_frame_seen = False
        self.legacy = self.poll = self.count_due = False
        # A device that never tells counts as visible: unknown attention never silences (fail open).
        self.attention = "visible"
        self.reported = self.positioned = False
        self.owes_since_ms = 0
        self.written_before = self.updated_before = 0
        self.attention_since_ms = now_ms
        self.viewing: str | None = None
        self.wait_deadline = 0.0


class DeviceMemory:
    """What a session remembers of devices that come back again and again, between their connections.

    Args:
        most: devices of each kind; the one not heard of for longest is forgotten.

    Attributes:
        told: attention and `viewing` of devices that poll.
    """

    __slots__ = ("_most", "_positions", "told")

    def __init__(self, most: int) -> None:
        self._most = most
        self._positions: dict[str, tuple[int, int]] = {}
        self.told: dict[str, tuple[str, str | None]] = {}

    def tell(self, device: str, attention: str, viewing: str | None) -> None:
        """Where a device's user looks, until it tells again."""
        self._keep(self.told, device, (attention, viewing))

    def acknowledged(self, device: str, seq: int, rev: int) -> tuple[int, int]:
        """A device has everything up to `seq`, and updates up to `rev`; returns up to where it had said so
        before (0: never)."""
        if not device:
            return 0, 0
        known = self._positions.get(device, (0, 0))
        self._keep(self._positions, device, (max(known[0], seq), max(known[1], rev)))
        return known

    def _keep(self, known: dict[str, Any], device: str, value: Any) -> None:
        known.pop(device, None)
        if len(known) >= self._most:
            del known[next(iter(known))]
        known[device] = value
