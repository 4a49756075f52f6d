"""What every client connection is to its user's shard: an attachment, a position, and what was said on it.

A gateway's WebSockets and the ingress' event streams and long polls differ in how frames leave; how they are
attached, attached again and told apart does not, and lives in actors/gateway_owners.py, which works on these.
"""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from actors.gateway_handshake import Encoding
from carillon.client_frames import ClientFrame
from carillon.messages import ClientChange, ClientResume
from carillon.settings import GatewaySettings

if TYPE_CHECKING:
    from actors.link import Link

NEVER: Final = float("inf")
PAUSED_HELD: Final = 2


class Phase(enum.IntEnum):
    """Where a connection stands; it only moves forward."""

    HANDSHAKE = 0
    AUTH = 1
    """WebSocket open, no token yet."""
    VERIFY = 2
    """The tenant's secret is being read."""
    OPEN = 3
    CLOSING = 4
    GONE = 5


class Shards(Protocol):
    """Where frames of clients go (`actors.gateway_owners.Owners`)."""

    def frame_received(self, conn: Any, frame: ClientFrame) -> None:
        """A well-formed frame came from an authenticated client."""
        ...

    def drained(self, conn: Any) -> None:
        """There is room for the next page of a replay."""
        ...


class Holder(Protocol):
    """Who holds client connections: a gateway, or an ingress replica."""

    limits: GatewaySettings
    loop: asyncio.AbstractEventLoop

    @property
    def owners(self) -> Shards:
        """Where frames go."""
        ...


class AckMemory:
    """Cumulative acknowledgements of a connection: what to tell a shard that may not know of the latest.

    A shard that dies takes those along that it had not written. Those older than `repeat_s` it surely had.
    """

    __slots__ = ("_known", "_mark", "_marked_at", "rev", "seq")

    def __init__(self, seq: int, now: float) -> None:
        self.seq = self._mark = self._known = seq
        self.rev = 0
        self._marked_at = now

    def reached(self, seq: int, now: float, repeat_s: float, rev: int | None = None) -> None:
        """An ACK for everything up to `seq`, with its `rev`."""
        if rev is not None and rev > self.rev:
            self.rev = rev
        if seq <= self.seq:
            return
        if now - self._marked_at > repeat_s:
            self._known, self._mark, self._marked_at = self._mark, self.seq, now
        self.seq = seq

    def known(self, now: float, repeat_s: float) -> int:
        """Up to here everything was acknowledged more than `repeat_s` ago."""
        if now - self._marked_at > 2 * repeat_s:
            self._known, self._mark, self._marked_at = self._mark, self.seq, now
        return self._known


class ChangeMemory:
    """Changes passed on to a shard that may die, or lose the user, with them: the next one is told again.

    Telling twice is harmless: states only grow, and read-all is told again with what the client had been
    written by then. Those with `id` are kept until they are answered, the others for `repeat_s`.
    """

    __slots__ = ("_sent",)

    def __init__(self) -> None:
        self._sent: list[tuple[float, ClientChange]] = []

    def passed_on(self, change: ClientChange, seq: int, now: float, repeat_s: float, most: int) -> None:
        """Remember a change.

        Args:
            seq: last seq that was written to the client.
            most: so many are remembered; beyond it the oldest is forgotten.
        """
        if change.op == "read_all" and change.up_to_seq is None:
            change = ClientChange(0, change.op, up_to_seq=seq, ref=change.ref)
        self._sent = [entry for entry in self._sent if entry[1].ref is not None or now - entry[0] < repeat_s]
        del self._sent[: max(0, len(self._sent) + 1 - most)]
        self._sent.append((now, change))

    def answered(self, frame: bytes) -> None:
        """A frame that moves no position was written: forget the change that it answers."""
        if self._sent and frame.startswith(_ANSWERS):
            ref = msgspec.json.decode(frame, type=_Answer).id
            for at, (_, change) in enumerate(self._sent):
                if ref is not None and change.ref == ref:
                    del self._sent[at]
                    return

    def again(self, now: float, repeat_s: float) -> list[ClientChange]:
        """What the next shard is to be told, in order."""
        return [change for at, change in self._sent if change.ref is not None or now - at < repeat_s]


class _Answer(msgspec.Struct):
    """OK or ERROR, as far as it matters here."""

    id: str | int | None = None


_ANSWERS: Final = (b'{"type":"OK"', b'{"type":"ERROR"')


class Attached:
    """One client connection as its holder keeps it attached.

    Attributes:
        number: of its present attachment; a new one for each, so that nothing sent to an earlier
            attachment can be taken for the present one's. 0 while it has none.
        link: to the shard that has the attachment; None while there is none.
        epoch, seq, rev: position: from the URL until WELCOME, then what was last written.
        welcomed: True once a WELCOME was written.
        ready: True once the first frame or a live frame passed.
        resume: RESUME that was passed on and not yet answered by its WELCOME.
        attention, viewing: of the last VISIBILITY; None while there was none.
        acks: what it acknowledged cumulatively; None until WELCOME, or until its position acknowledges.
        held: messages that wait for an attachment.
        changes: what its shard may not have done yet; None while it changed nothing.
        drain_wanted: True while `Owners.drained` is to be called once the buffer has run low.
        clean: it ended as agreed: short grace.
        poll: it ends with its answer, and its device comes back for more.
        due: loop time at which the sweep looks at it.
        beat_due: loop time of its next heart-beat.
    """

    __slots__ = (
        "_holder", "acks", "attached_at", "attention", "beat_due", "changes", "clean", "device",
        "drain_wanted", "due", "encoding", "epoch", "expires_at", "held", "issued_ms", "link", "number",
        "orphan_since", "phase", "poll", "ready", "resume", "rev", "seq", "session_id", "shard", "slot",
        "tenant", "term", "token_id", "user", "viewing", "welcomed",
    )  # fmt: skip

    def __init__(self, holder: Holder) -> None:
        self._holder = holder
        self.phase = Phase.OPEN
        self.encoding = Encoding.LEGACY
        self.tenant = self.user = self.device = self.session_id = self.shard = ""
        self.token_id = b""
        self.slot = self.issued_ms = self.number = self.term = self.seq = 0
        self.link: Link | None = None
        self.epoch: str | None = None
        self.rev: int | None = None
        self.welcomed = self.ready = self.clean = self.drain_wanted = self.poll = False
        self.resume: ClientResume | None = None
        self.attention: str | None = None
        self.viewing: str | None = None
        self.acks: AckMemory | None = None
        self.held: list[Any] | None = None
        self.changes: ChangeMemory | None = None
        self.attached_at = self.orphan_since = 0.0
        self.due = self.beat_due = self.expires_at = NEVER

    def reschedule(self) -> None:
        """Set `due` of an open connection."""
        self.due = min(self.beat_due, self.expires_at)
        if self.link is None:
            self.due = min(self.due, self.orphan_since + self._holder.limits.reattach_timeout_s)

    def lost(self, now: float) -> bool:
        """True once no shard could be reached for `gateway.reattach_timeout_s` (4202)."""
        return self.link is None and now >= self.orphan_since + self._holder.limits.reattach_timeout_s

    def _hold(self, message: Any) -> None:
        if self.held is None:
            self.held = []
        self.held.append(message)

    def hold(self, message: Any) -> None:
        """Keep a message for the shard until there is an attachment."""
        self._hold(message)

    def taken(self) -> None:
        """What was held has been handed over."""

    def sent_notification(self) -> None:
        """A notification was written."""

    def write_live(self, framed: bytes) -> None:
        """Write a live frame, encoded as `encoding` says; the position is the one after it."""
        raise NotImplementedError

    def write_replay(self, framed: bytes, page_end: bool) -> None:
        """Write a frame of a replay page; with `page_end` call `Owners.drained` when there is room."""
        raise NotImplementedError

    def close(self, code: int, reason: str) -> None:
        """End it with a close code of protocol.md."""
        raise NotImplementedError


class AttachedSocket(Attached):
    """One whose frames go straight to a socket, with a bound on what is unsent."""

    __slots__ = ("_live_bytes", "_transport", "_write_paused")

    def __init__(self, holder: Holder) -> None:
        super().__init__(holder)
        self._transport: asyncio.Transport | None = None
        self._write_paused = False
        self._live_bytes = 0

    def connect(self, transport: asyncio.Transport) -> None:
        """The socket is there."""
        self._transport = transport
        low = self._holder.limits.low_buffer_bytes
        transport.set_write_buffer_limits(high=low, low=low)

    def pause_writing(self) -> None:
        """asyncio: more than `low_buffer_bytes` are unsent."""
        self._write_paused = True

    def resume_writing(self) -> None:
        """asyncio: the buffer ran low; a replay may go on."""
        self._write_paused = False
        if self.drain_wanted:
            self.drain_wanted = False
            self._holder.owners.drained(self)

    def write_live(self, framed: bytes) -> None:
        """Write bytes that count against `max_buffer_bytes`; too many unsent end the connection (4208)."""
        transport = self._transport
        if transport is None:
            return
        unsent = transport.get_write_buffer_size()
        if unsent == 0:
            self._live_bytes = 0
        elif min(unsent, self._live_bytes) > self._holder.limits.max_buffer_bytes:
            # The buffer is first in, first out: what was written since the last replay frame is its tail.
            self.close(4208, "slow consumer")
            return
        self._live_bytes += len(framed)
        transport.write(framed)

    def write_replay(self, framed: bytes, page_end: bool) -> None:
        """Write a frame of a replay page; `Owners.drained` is called when there is room for the next page."""
        if self._transport is None:
            return
        self._live_bytes = 0
        self._transport.write(framed)
        if page_end:
            if self._write_paused:
                self.drain_wanted = True
            else:
                self._holder.owners.drained(self)
