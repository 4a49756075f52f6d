"""One client socket: framing, buffers, limits. What frames mean is decided elsewhere.

A connection is an asyncio.Protocol around websockets' sans-I/O protocol. It has no task and, unless it is
being throttled, no timer of its own: the gateway's sweep looks at `due`. Ten thousand idle connections cost
memory only, so everything here has slots, and what the handshake needed is dropped when it is over.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from websockets.exceptions import InvalidState
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN as WS_OPEN
from websockets.protocol import Protocol, Side

from actors.attached import NEVER, PAUSED_HELD, AttachedSocket, Phase
from actors.gateway_handshake import (
    END_OF_HEAD,
    PING_FRAME,
    Encoding,
    binary_frame,
    close_reason,
    quiet,
    shake_hands,
    text_frame,
)
from actors.gateway_host import Host
from actors.gateway_rates import FrameRate
from carillon import server_frames
from carillon.client_frames import Auth, BadFrameError, ClientFrame, ClientPing, parse_binary, parse_text
from carillon.messages import ClientAck

SLICE_BYTES: Final = 4096
"""Input is parsed in pieces of this size: a throttled client's burst waits as bytes, not as objects."""
ACK_CREDIT_MAX: Final = 100_000

PAUSED_RATE: Final = 1
PAUSED_VERIFY: Final = 4


class Connection(AttachedSocket, asyncio.Protocol):
    """One client.

    Its attachment, position and write buffer: `actors.attached`.
    """

    __slots__ = (
        "_ack_credit", "_buffer", "_errors", "_host", "_partial", "_partial_text", "_paused", "_pinged",
        "_rate", "_ws", "path_user", "user_rate",
    )  # fmt: skip

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._host = host
        self._ws: Protocol | None = None
        self._buffer: bytes | bytearray | None = bytearray()  # handshake; later input that waits while paused
        self._partial: bytearray | None = None
        self._partial_text = self._pinged = False
        self._paused = self._ack_credit = 0
        self._rate = FrameRate(host.limits.frames_per_s)
        self.user_rate: FrameRate | None = None  # shared with the user's other connections
        self._errors: list[float] | None = None
        self.phase = Phase.HANDSHAKE
        self.path_user: str | None = None
        self.due = host.loop.time() + host.limits.handshake_timeout_s

    # -- asyncio --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: the socket is open."""
        self.connect(transport)  # type: ignore[arg-type]
        if not self._host.opened(self):
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the socket is gone."""
        self._over()
        self.phase = Phase.GONE
        self.due = NEVER
        self._transport = self._ws = self._buffer = self._partial = self.held = None
        self._host.gone(self)

    def eof_received(self) -> None:
        """asyncio: the peer will send no more; the transport closes itself once everything is written."""
        if self._ws is not None:
            self._ws.receive_eof()
            self._ws.data_to_send()  # nothing useful: the peer is gone
            self._over()

    def data_received(self, data: bytes) -> None:
        """asyncio: bytes came."""
        if self.phase is Phase.HANDSHAKE:
            self._handshake(data)
        elif self._paused:
            self._buffer = bytes(self._buffer) + data if self._buffer else data
        else:
            self._feed(data)

    # -- handshake ------------------------------------------------------------------------------------

    def _handshake(self, data: bytes) -> None:
        buffer = self._buffer
        assert isinstance(buffer, bytearray)
        seen = max(0, len(buffer) - 3)
        buffer += data
        end = buffer.find(END_OF_HEAD, seen)
        if end < 0:
            if len(buffer) > self._host.limits.max_handshake_bytes:
                self._answer_and_close(
                    b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n"
                )
            return
        end += len(END_OF_HEAD)
        shaken = shake_hands(bytes(buffer[:end]), self._host.origins, self._host.healthy())
        if not shaken.accepted:
            self._answer_and_close(shaken.answer)
            return
        rest = bytes(buffer[end:])
        self._buffer = None
        # A fresh protocol object: the one of the handshake would keep the request for the socket's life.
        self._ws = Protocol(
            Side.SERVER, state=WS_OPEN, max_size=self._host.limits.max_message_bytes, logger=quiet
        )
        self.encoding = shaken.encoding
        self.path_user = shaken.path_user
        self.phase = Phase.AUTH
        self.due = self._host.loop.time() + self._host.limits.auth_timeout_s
        self._write(shaken.answer)
        self._host.upgraded(self, shaken)
        if rest:
            self.data_received(rest)

    def _answer_and_close(self, answer: bytes) -> None:
        self._buffer = None
        self._closing()
        transport = self._transport
        if transport is None:
            return
        if answer:
            transport.write(answer)
        if answer and transport.can_write_eof():
            # As in `_flush`: closing now, with the rest of a long request unread, could destroy the answer.
            self._end_our_half()
        else:
            transport.close()

    # -- receiving ------------------------------------------------------------------------------------

    def _feed(self, data: bytes) -> None:
        ws = self._ws
        if ws is None or self.phase is Phase.GONE:
            return
        if self._pinged:
            self._alive()
        for at in range(0, len(data), SLICE_BYTES):
            if self._paused:
                self._buffer = data[at:]
                return
            ws.receive_data(data if len(data) <= SLICE_BYTES else data[at : at + SLICE_BYTES])
            for event in ws.events_received():
                if self.phase >= Phase.CLOSING:
                    break
                assert isinstance(event, Frame)
                self._take_frame(ws, event)
            self._flush(ws)
            if ws.state is not WS_OPEN and self.phase < Phase.CLOSING:
                if ws.close_sent is not None and ws.close_rcvd is None:
                    self._host.count_close(ws.close_sent.code)  # the protocol found a violation
                self._over()

    def _take_frame(self, ws: Protocol, frame: Frame) -> None:
        opcode = frame.opcode
        if opcode is Opcode.PONG or opcode is Opcode.CLOSE:
            return
        if opcode is Opcode.PING:
            self._spend()
            return
        if opcode is not Opcode.CONT:
            self._partial_text = opcode is Opcode.TEXT
            if frame.fin:
                self._take_message(ws, frame.data, self._partial_text)
            else:
                self._partial = bytearray(frame.data)
                self._spend()
            return
        partial = self._partial
        assert partial is not None
        partial += frame.data
        if frame.fin:
            self._partial = None
            self._take_message(ws, partial, self._partial_text)
        else:
            self._spend()

    def _take_message(self, ws: Protocol, data: Any, text: bool) -> None:
        if self.phase is Phase.VERIFY:
            # Came in one piece with AUTH; reading is paused, so there is no more than that piece.
            self._hold((bytes(data), text))
            return
        if text:
            try:
                str(data, "utf-8")
            except UnicodeDecodeError as exc:
                self._fail(ws, 1007, f"{exc.reason} at position {exc.start}")
                return
        try:
            if text is (self.encoding is Encoding.MSGPACK):
                wanted = "binary" if text else "text"
                raise BadFrameError(f"expected {wanted} messages on this subprotocol", expected=wanted)
            frame = parse_text(data, 0) if text else parse_binary(data, 0)
        except BadFrameError as exc:
            self._spend()
            self.complain(exc)
            return
        self._take(frame)

    def _take(self, frame: ClientFrame) -> None:
        if type(frame) is ClientAck and self._ack_credit > 0:
            self._ack_credit -= 1  # acknowledging what was sent is free
        else:
            self._spend()
        if type(frame) is Auth:
            self._host.authenticate(self, frame)  # the first one, or a newer token on an open connection
        elif self.phase is Phase.AUTH:
            self.send(server_frames.error("unauthenticated", "expected AUTH as the first frame", False))
            self.close(4001, "expected AUTH as the first frame")
        else:
            self._host.owners.frame_received(self, frame)
            if type(frame) is ClientPing:
                self.send(server_frames.pong(frame.ref))

    def complain(self, exc: BadFrameError) -> None:
        """Answer a bad frame; too many of them within a minute end the connection (4003)."""
        self.send(server_frames.error(exc.code, str(exc), exc.temporary, exc.ref))
        now = self._host.loop.time()
        recent = [at for at in self._errors or () if at > now - 60.0]
        recent.append(now)
        self._errors = recent
        if len(recent) >= self._host.limits.max_errors_per_minute:
            self.close(4003, "too many bad frames")

    def _fail(self, ws: Protocol, code: int, reason: str) -> None:
        ws.fail(code, close_reason(reason))
        self._host.count_close(code)
        self._over()

    # -- pausing --------------------------------------------------------------------------------------

    def _spend(self) -> None:
        """Take one frame out of the token buckets; an empty one stops reading until it is paid back."""
        now = self._host.loop.time()
        owed_s = self._rate.spend(now)
        if self.user_rate is not None:
            owed_s = max(owed_s, self.user_rate.spend(now))
        if owed_s and not self._paused & PAUSED_RATE:
            self.pause(PAUSED_RATE)
            self._host.loop.call_later(owed_s, self._repaid)

    def _repaid(self) -> None:
        now = self._host.loop.time()
        owed_s = self._rate.owed_s(now)
        if self.user_rate is not None:
            owed_s = max(owed_s, self.user_rate.owed_s(now))
        if owed_s and self.phase < Phase.CLOSING:
            self._host.loop.call_later(owed_s, self._repaid)
        else:
            self.unpause(PAUSED_RATE)

    def pause(self, why: int) -> None:
        """Stop reading for one more reason."""
        if not self._paused and self._transport is not None:
            self._transport.pause_reading()
        self._paused |= why

    def unpause(self, why: int) -> None:
        """Go on reading once the last reason is gone."""
        if not self._paused & why:
            return
        self._paused &= ~why
        if self._paused:
            return
        waiting, self._buffer = self._buffer, None
        if waiting:
            self._feed(bytes(waiting))
        if not self._paused and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def hold(self, message: Any) -> None:
        """Keep a message for the shard until there is an attachment; a full queue stops reading."""
        self._hold(message)
        assert self.held is not None
        if len(self.held) >= self._host.limits.max_held_frames:
            self.pause(PAUSED_HELD)

    def taken(self) -> None:
        """See `Attached.taken`."""
        self.unpause(PAUSED_HELD)

    def verified(self) -> None:
        """Take up what came while the token was being verified."""
        early, self.held = self.held, None
        for data, text in early or ():
            if self._ws is not None and self.phase is Phase.OPEN:
                self._take_message(self._ws, data, text)
        self.unpause(PAUSED_VERIFY)

    # -- sending --------------------------------------------------------------------------------------

    def send(self, frame: bytes) -> None:
        """Write a frame of the gateway's own, given as JSON, in the connection's encoding."""
        if Phase.AUTH <= self.phase <= Phase.OPEN:
            if self.encoding is Encoding.MSGPACK:
                self.write_live(binary_frame(server_frames.transcode(frame)))
            else:
                self.write_live(text_frame(frame))

    def sent_notification(self) -> None:
        """A notification was written: its acknowledgement is free."""
        if self._ack_credit < ACK_CREDIT_MAX:
            self._ack_credit += 1

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _flush(self, ws: Protocol) -> None:
        """Write what the protocol wants written: pongs, close frames, the end of the stream."""
        if not ws.writes:
            return
        for data in ws.data_to_send():
            if data:
                if data[0] & 0x0F == Opcode.CLOSE:
                    self._write(data)
                elif self.phase < Phase.CLOSING:
                    self.write_live(data)
                # else a pong: a peer that floods us with pings while we close must not fill our buffer
            elif self._transport is not None:
                if ws.close_rcvd is not None:
                    self._transport.close()  # both close frames are there
                elif self._transport.can_write_eof():
                    # Closing with input unread would reset the connection and could destroy our close frame
                    # on its way: end our half, and read on until the peer ends its own or `due` comes.
                    self._end_our_half()

    def _end_our_half(self) -> None:
        transport = self._transport
        if transport is not None:
            try:
                transport.write_eof()
            except OSError:
                # asyncio's own loop asks the kernel at once, and the peer has dropped the socket since. An
                # exception here would leave us open for frames that the transport takes no more.
                transport.abort()

    # -- ending ---------------------------------------------------------------------------------------

    def close(self, code: int, reason: str) -> None:
        """Start the closing handshake; the peer has `close_timeout_s` to finish it. Idempotent."""
        ws = self._ws
        if ws is None or not Phase.AUTH <= self.phase <= Phase.OPEN:
            return
        try:
            ws.send_close(code, close_reason(reason))
        except InvalidState:  # the peer was faster, within the same chunk of bytes
            return
        self._host.count_close(code)
        self._over()
        self._flush(ws)
        # The peer's close frame must be seen, whatever reading was paused for.
        self._buffer = None
        self._paused = 0
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        """Cut the socket off."""
        if self._transport is not None:
            self._transport.abort()

    def _over(self) -> None:
        """The WebSocket is not open any more: the session learns it now, not when the socket is gone."""
        if Phase.AUTH <= self.phase <= Phase.OPEN:
            ws = self._ws
            if ws is not None and ws.close_rcvd is not None:
                self.clean = ws.close_rcvd.code == 1000 and ws.close_rcvd_then_sent is True
            self._closing()
            self._host.ended(self)
            self.held = None

    def _closing(self) -> None:
        if self.phase is not Phase.GONE:
            self.phase = Phase.CLOSING
            self.due = self._host.loop.time() + self._host.limits.close_timeout_s

    # -- time -----------------------------------------------------------------------------------------

    def start_pings(self, first_s: float) -> None:
        """Begin the heart-beat, `first_s` from now (spread, so that a storm's pings do not come at once)."""
        self.beat_due = self._host.loop.time() + first_s
        self.reschedule()

    def _alive(self) -> None:
        self._pinged = False
        self.beat_due = self._host.loop.time() + self._host.limits.heartbeat_s - self._host.tick_s
        if self.phase is Phase.OPEN:
            self.reschedule()

    def look(self, now: float, stalled: bool = False) -> None:
        """The sweep found `due` to have passed.

        Args:
            now: the loop's time.
            stalled: this process stood still a moment ago; what peers said meanwhile may be unread yet.
        """
        limits = self._host.limits
        if self.phase is Phase.HANDSHAKE or self.phase >= Phase.CLOSING:
            self.abort()
            return
        if self.phase is Phase.AUTH:
            self.close(4001, f"no AUTH within {limits.auth_timeout_s:g} s")
            return
        if self.phase is Phase.VERIFY:
            self.close(4213, "the token could not be verified in time")
            return
        if now >= self.expires_at:
            self.close(4101, "the token has expired")
            return
        if self.lost(now):
            self.close(4202, "no shard could be reached")
            return
        if now >= self.beat_due:
            if self._pinged and not self._paused and not stalled:
                self.close(4212, "no pong")
                return
            # While we do not read we cannot see a pong: ask again instead of drawing conclusions.
            self._pinged = True
            self.beat_due = now + limits.pong_timeout_s - self._host.tick_s
            self.write_live(PING_FRAME)
        if self.phase is Phase.OPEN:
            self.reschedule()
