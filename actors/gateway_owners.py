"""Which shard serves which connection: attachments, what shards send, and what clients send to them.

An attachment is known to the shard by a number. Each attachment gets a new one, also when a connection is
attached again at the same shard: frames that were on their way to the earlier attachment name a number that
nobody has any more, so they can neither overtake nor repeat what the new attachment replays. That is what
keeps `seq` in order over every hand-over (guarantees G3, G4, G9).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from actors.attached import AckMemory, Attached, ChangeMemory, Holder, Phase
from actors.directory import ShardDirectory
from actors.gateway_handshake import Encoding, binary_frame, text_frame
from actors.gateway_watches import Watches
from actors.link import Link
from actors.member import Membership
from carillon import server_frames
from carillon.client_frames import ClientFrame, ClientPing
from carillon.errors import BusyError, CarillonError, LinkClosedError, LinkError
from carillon.messages import (
    Attach,
    AttachRefused,
    ClientAck,
    ClientChange,
    ClientReady,
    ClientResume,
    ClientVisibility,
    ClientWatch,
    CloseSocket,
    ClusterMap,
    Deliver,
    Detach,
    DeviceTold,
    PresenceTold,
    SocketDrained,
    WatchAnswer,
    Write,
)
from carillon.metrics import Stats


class Owners:
    """Keeps every authenticated connection attached at the owner of its slot.

    Args:
        host: a gateway, or an ingress replica.
        membership: gives the map.
        stats: counts writes and what was dropped.
    """

    def __init__(self, host: Holder, membership: Membership, stats: Stats) -> None:
        self._host = host
        self._ack_repeat_s = host.limits.ack_repeat_s
        self._stats = stats
        self._attached: dict[int, Attached] = {}
        self._waiting: dict[Attached, None] = {}
        self._next_number = 1
        self._terms: dict[str, int] = {}
        self._retry_scheduled = False
        self._closed = False
        self._directory = ShardDirectory(membership, self)
        presence = membership.config.settings.presence
        self.watches = Watches(self._directory, presence, write=self._write_each, ask=self._forward)
        self._directory.on_change(self._attach_waiting)
        # After the directory's own callback, so that it knows the new owners already.
        membership.on_map(self._map_changed)

    @property
    def attached(self) -> int:
        """Connections that have an attachment."""
        return len(self._attached)

    @property
    def waiting(self) -> int:
        """Connections that wait for one."""
        return len(self._waiting)

    async def close(self) -> None:
        """Close the links to the shards."""
        self._closed = True
        self.watches.close()
        await self._directory.close()

    # -- attaching ------------------------------------------------------------------------------------

    def attach(self, conn: Attached) -> None:
        """Attach a connection at its slot's owner, now or as soon as there is one.

        Ordering: what the connection's client sent before is handed over behind the attachment.
        """
        member = self._directory.owner(conn.slot)
        link = self._directory.link(member.name) if member is not None else None
        now = self._host.loop.time()
        if conn.orphan_since == 0.0:
            conn.orphan_since = now
        if member is None or link is None:
            self._wait(conn)
            return
        number = self._next_number
        try:
            link.send_nowait(
                Attach(
                    number,
                    conn.tenant,
                    conn.user,
                    conn.slot,
                    conn.device,
                    conn.session_id,
                    conn.epoch,
                    conn.seq,
                    conn.rev,
                    reattach=conn.welcomed,
                    # An unanswered RESUME is sent again: it must find the session still waiting for it.
                    ready=conn.ready and conn.resume is None,
                    legacy=conn.encoding is Encoding.LEGACY,
                    token_issued_ms=conn.issued_ms,
                    attention=conn.attention,
                    viewing=conn.viewing,
                    began_seq=None if conn.acks is None else conn.acks.known(now, self._ack_repeat_s),
                    acked_seq=0 if conn.acks is None else conn.acks.seq,
                    acked_rev=0 if conn.acks is None else conn.acks.rev,
                    token_id=conn.token_id,
                    poll=conn.poll,
                )
            )
        except (LinkError, BusyError) as exc:
            self._wait(conn)
            self._give_up(link, exc)
            return
        self._next_number = number + 1
        self._waiting.pop(conn, None)
        self._attached[number] = conn
        conn.number = number
        conn.link = link
        conn.shard = member.name
        conn.term = member.term
        conn.attached_at = now
        conn.drain_wanted = False  # that page belonged to the attachment before
        conn.reschedule()
        if conn.welcomed:
            if self.watches:
                self.watches.attached(conn, conn.held or ())
            self._hand_over(conn)

    def _wait(self, conn: Attached) -> None:
        self._waiting[conn] = None
        conn.reschedule()

    def detach(self, conn: Attached) -> None:
        """The connection's WebSocket ended."""
        self._waiting.pop(conn, None)
        if self.watches:
            self.watches.ended(conn)
        if conn.number:
            self._detach(conn, conn.clean)

    def _detach(self, conn: Attached, clean: bool) -> None:
        link = conn.link
        self._attached.pop(conn.number, None)
        if link is not None and not link.closed:
            try:
                link.send_nowait(Detach(conn.number, clean))
            except (LinkError, BusyError) as exc:
                self._give_up(link, exc)
        conn.number = 0
        conn.link = None

    def _give_up(self, link: Link, exc: CarillonError) -> None:
        """A shard does not take what we send. A message left out stays out; a lost link is made up for."""
        if not link.closed:
            link.abort(LinkClosedError(f"{link.peer} does not read: {exc}"))
        self._retry_later()

    def _orphan(self, conn: Attached) -> None:
        """Take the attachment away; the connection waits for the next one."""
        now = self._host.loop.time()
        if now - conn.attached_at > self._host.limits.reattach_timeout_s:
            conn.orphan_since = now  # it was well since; otherwise the refusals of one search add up
        self._detach(conn, False)
        self._wait(conn)

    def _map_changed(self, new: ClusterMap) -> None:
        """Move the connections whose slot has another owner or term."""
        if self._closed:
            return
        for conn in list(self._attached.values()):
            member = self._directory.owner(conn.slot)
            if member is None or member.name != conn.shard or member.term != conn.term:
                self._orphan(conn)
        self.watches.map_changed()
        self._attach_waiting()

    def _attach_waiting(self) -> None:
        self.watches.owners_changed()
        for conn in list(self._waiting):
            self.attach(conn)

    def _retry_later(self) -> None:
        if not self._retry_scheduled:
            self._retry_scheduled = True
            self._host.loop.call_later(self._host.limits.attach_retry_s, self._retry)

    def _retry(self) -> None:
        self._retry_scheduled = False
        if not self._closed:
            self._attach_waiting()

    # -- from clients ---------------------------------------------------------------------------------

    def frame_received(self, conn: Attached, frame: ClientFrame) -> None:
        """Pass a client's frame on; before the first that is not RESUME tell the session that it came."""
        if not conn.ready:
            conn.ready = True
            if type(frame) is ClientResume:
                # Kept apart until it is answered: a shard that is lost meanwhile leaves it to the next one.
                conn.resume = frame
                if conn.welcomed:
                    self._send(conn, frame)
                return
            self._forward(conn, ClientReady(0))
        kind = type(frame)
        if kind is ClientAck:
            if frame.seq is not None and conn.acks is not None:  # type: ignore[union-attr]
                reached = min(frame.seq, conn.seq)  # type: ignore[union-attr]
                conn.acks.reached(
                    reached,
                    self._host.loop.time(),
                    self._ack_repeat_s,
                    frame.rev,  # type: ignore[union-attr]
                )
        elif kind is ClientVisibility:
            conn.attention, conn.viewing = frame.state, frame.viewing  # type: ignore[union-attr]
        elif kind is ClientWatch:
            if not self.watches.asked(conn, frame):  # type: ignore[arg-type]
                return
        elif kind is ClientPing:
            return
        self._forward(conn, frame)

    def _forward(self, conn: Attached, message: Any) -> None:
        # Held until WELCOME: an attachment that is refused would take what follows it along.
        if not conn.welcomed or conn.held or not self._pass_on(conn, message):
            conn.hold(message)

    def _pass_on(self, conn: Attached, message: Any) -> bool:
        """Send a client's message for the first time."""
        if not self._send(conn, message):
            return False
        if type(message) is ClientChange:
            if conn.changes is None:
                conn.changes = ChangeMemory()
            conn.changes.passed_on(
                message,
                conn.seq,
                self._host.loop.time(),
                self._ack_repeat_s,
                self._host.limits.max_held_frames,
            )
        return True

    def _send(self, conn: Attached, message: Any) -> bool:
        link = conn.link
        if link is None:
            return False
        message.conn = conn.number
        try:
            link.send_nowait(message)
        except (LinkError, BusyError) as exc:
            self._give_up(link, exc)
            return False
        return True

    def _hand_over(self, conn: Attached) -> None:
        """Send what waited for the attachment, in the order it came."""
        if conn.resume is not None and not self._send(conn, conn.resume):
            return
        if conn.changes is not None:
            for change in conn.changes.again(self._host.loop.time(), self._ack_repeat_s):
                if not self._send(conn, change):
                    return
        held, conn.held = conn.held, None
        for at, message in enumerate(held or ()):
            if not self._pass_on(conn, message):
                conn.held = held[at:] if held else None
                return
        conn.taken()

    def drained(self, conn: Attached) -> None:
        """Ask for the next page of a replay."""
        self._send(conn, SocketDrained(0))

    # -- from shards (LinkHandler) --------------------------------------------------------------------

    def link_opened(self, link: Link) -> None:
        """The directory tells by `on_change`, once it knows the link."""

    def link_closed(self, link: Link) -> None:
        """A shard is gone, or its link: its connections are attached again, there or elsewhere."""
        if self._closed:
            return
        for conn in [conn for conn in self._attached.values() if conn.link is link]:
            self._orphan(conn)
        self.watches.link_closed(link)
        self._retry_later()

    def read_finished(self, link: Link) -> None:
        """Frames were written as they came; the transports batch."""

    def receive(self, link: Link, message: Any, request: int) -> None:
        """Take what a shard sent."""
        if type(message) is Deliver:
            if self._current(message.shard, message.term):
                for write in message.writes:
                    self._write(link, write)
        elif type(message) is CloseSocket:
            if self._current(message.shard, message.term):
                for conn in self._mine(link, message.conns):
                    conn.close(message.code, message.reason)
        elif type(message) is AttachRefused:
            for conn in self._mine(link, message.conns):
                self._orphan(conn)
            self._retry_later()
        elif type(message) is DeviceTold:
            for conn in self._mine(link, message.conns):
                if message.state is not None:
                    conn.attention, conn.viewing = message.state, message.viewing
                if conn.acks is not None:
                    conn.acks.reached(
                        min(message.seq, conn.seq), self._host.loop.time(), self._ack_repeat_s, message.rev
                    )
        elif type(message) is PresenceTold:
            if self._current(message.shard, message.term):
                self.watches.told(link, message)
        elif type(message) is WatchAnswer:
            for conn in self._mine(link, (message.conn,)):
                self.watches.answered(conn, message)
        else:
            kind = type(message).__name__
            link.fail_nowait(request, CarillonError(f"a holder of connections does not take {kind}"))

    def _current(self, shard: str, term: int) -> bool:
        """False for what an earlier life of a shard sent. Terms of the map do not count here: a shard may
        hear of its new one later than we do, and answers attachments all the same."""
        if term < self._terms.get(shard, 0):
            self._stats.count("gateway_stale_frames")
            return False
        self._terms[shard] = term
        return True

    def _mine(self, link: Link, numbers: Iterable[int]) -> list[Attached]:
        found = [self._attached.get(number) for number in numbers]
        return [conn for conn in found if conn is not None and conn.link is link]

    def _write(self, link: Link, write: Write) -> None:
        """Frame once per encoding, write to all."""
        attached = self._attached
        seq, rev, epoch = write.seq, write.rev, write.epoch
        moves = seq or rev or epoch
        framed: list[bytes | None] = [None, None, None, None]
        written = 0
        for number in write.conns:
            conn = attached.get(number)
            if conn is None or conn.link is not link or conn.phase is not Phase.OPEN:
                continue
            encoding = conn.encoding
            if encoding is Encoding.LEGACY and not write.update:
                encoding = Encoding.JSON
            data = framed[encoding]
            if data is None:
                data = framed[encoding] = _encode(write.frame, encoding)
            # The position first: a stream writes it beside the frame. Who cannot take the frame ends.
            if epoch:
                # A WELCOME sets it absolutely, 0 included: a client may resume from the beginning.
                conn.epoch, conn.seq, conn.rev = epoch, seq, rev
            else:
                if seq:
                    conn.seq = seq
                if rev:
                    conn.rev = rev
            if seq:
                conn.sent_notification()
            if write.replay:
                conn.write_replay(data, write.page_end)
            else:
                conn.write_live(data)
                if conn.phase is not Phase.OPEN:
                    continue  # that was too much for it
            written += 1
            if epoch:
                self._welcomed(conn)
            else:
                conn.ready = True
                if not moves and conn.changes is not None:
                    conn.changes.answered(write.frame)
        self._stats.count("frames_written", written)

    def _write_each(self, conns: Iterable[Attached], frame: bytes) -> None:
        """Write a frame that moves no position to open connections."""
        framed: list[bytes | None] = [None, None, None, None]
        for conn in conns:
            if conn.phase is Phase.OPEN:
                encoding = conn.encoding
                data = framed[encoding]
                if data is None:
                    data = framed[encoding] = _encode(frame, encoding)
                conn.write_live(data)

    def _welcomed(self, conn: Attached) -> None:
        conn.acks = AckMemory(conn.seq, self._host.loop.time())
        if conn.welcomed:
            conn.resume = None  # this is its answer
        else:
            conn.welcomed = True
            self._hand_over(conn)


def _encode(frame: bytes, encoding: Encoding) -> bytes:
    """A frame as it goes on the wire; LEGACY is asked for only for updates."""
    if encoding is Encoding.JSON:
        return text_frame(frame)
    if encoding is Encoding.MSGPACK:
        return binary_frame(server_frames.transcode(frame))
    return frame if encoding is Encoding.PLAIN else text_frame(server_frames.as_new_notification(frame))
