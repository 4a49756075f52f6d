"""One end of a link: framing, handshake, requests and replies (see actors/link.py for the whole)."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import struct
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

import msgspec

from carillon.errors import (
    BusyError,
    CarillonError,
    LinkClosedError,
    LinkError,
    LinkFrameError,
    LinkHandshakeError,
    LinkTimeoutError,
    RemoteError,
    UnavailableError,
)
from carillon.messages import Envelope, Failure, Message, Ping, make_envelope_decoder
from carillon.settings import LinkSettings

log = logging.getLogger(__name__)

MAGIC: Final = b"CRLN"
VERSION: Final = 1
MAX_NAME_BYTES: Final = 255
_LENGTH: Final = struct.Struct(">I")
_HELLO: Final = struct.Struct(">4sHH32s")  # magic, version, length of the name, nonce
_PROOF_BYTES: Final = 32
_SWEEP_GAP_S: Final = 0.01  # requests expire at most this late; bounds the cost of mixed deadlines
_HELLO_STAGE, _PROOF_STAGE, _OPEN_STAGE = 0, 1, 2

_encode_into: Final = msgspec.msgpack.Encoder().encode_into
_decode: Final = make_envelope_decoder().decode
_PING: Final = Ping()


class _Head(msgspec.Struct, array_like=True):
    """The part of an envelope that can be read although its body cannot."""

    request: int
    body: msgspec.Raw = msgspec.Raw()


_decode_head: Final = msgspec.msgpack.Decoder(_Head).decode


class LinkHandler(Protocol):
    """What an actor does with its links. All methods run on the event loop and must not block."""

    def link_opened(self, link: Link) -> None:
        """The handshake succeeded; `link.peer` is the peer's name."""
        ...

    def link_closed(self, link: Link) -> None:
        """The link is gone; its pending requests have failed already."""
        ...

    def receive(self, link: Link, message: Any, request: int) -> None:
        """Take one message, in order. `request` > 0: answer with `link.reply_nowait(request, ...)` or
        `link.fail_nowait(request, ...)`, now or later. An exception raised here is answered as a failure."""
        ...

    def read_finished(self, link: Link) -> None:
        """All messages of one chunk of bytes were handed over: the place to start a batch.

        Called after `link_closed` if a message of the chunk made the handler close the link."""
        ...


class Link(asyncio.Protocol):
    """One end of an open link. Made by `LinkServer` and `LinkClient`, not by hand."""

    def __init__(
        self,
        handler: LinkHandler,
        settings: LinkSettings,
        name: str,
        secret: bytes,
        *,
        dialled: bool,
        expected_peer: str = "",
        forget: Callable[[Link], None] | None = None,
    ) -> None:
        self.peer = ""
        self.closed = False
        self.undecodable = 0  # one-way messages dropped because they could not be read
        self.context: Any = None  # the handler's own note about this link
        self._handler = handler
        self._settings = settings
        self._max_frame_bytes = settings.max_frame_bytes
        self._max_outbound_bytes = settings.max_outbound_bytes
        self._name = name.encode()
        self._secret = secret
        self._dialled = dialled
        self._expected_peer = expected_peer
        self._forget = forget
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()  # the frame of which only a part has come
        self._need = 0  # bytes of `_buffer` before looking at it is worth while
        self._out = bytearray()  # frames of this turn of the loop
        self._backlog = 0  # bytes in the transport, as of the first message of this turn
        self._flush_scheduled = False
        self._next_request = 1
        self._pending: dict[int, tuple[asyncio.Future[Any], float, float]] = {}
        self._sweep_at = float("inf")
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._nonce = os.urandom(32)
        self._peer_name = b""
        self._peer_nonce = b""
        self._stage = _HELLO_STAGE
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._last_received = self._loop.time()
        self._sent_since_tick = False
        self._tick_due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    # -- life cycle ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: the stream is open; send our hello."""
        stream = cast("asyncio.Transport", transport)
        self._transport = stream
        if self.closed:  # closed between accept and now
            stream.abort()
            return
        stream.write(_HELLO.pack(MAGIC, VERSION, len(self._name), self._nonce) + self._name)
        self._timer = self._loop.call_later(self._settings.handshake_timeout_s, self._handshake_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the stream is gone; fail everything that waits for it."""
        self._finish(LinkClosedError(f"link to {self.peer or 'peer'} closed: {exc or 'end of stream'}"))
        if self._timer is not None:  # the linger timer of `close`
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Flush what is written and close. Pending requests fail with LinkClosedError.

        A peer that does not read what is left gets `dead_after_s` to do so.
        """
        if self.closed:
            return
        transport = self._transport
        if transport is not None:
            self._flush()
            transport.close()
        self._finish(LinkClosedError(f"link to {self.peer or 'peer'} closed here"))
        if transport is not None and transport.get_write_buffer_size():
            self._timer = self._loop.call_later(self._settings.dead_after_s, transport.abort)

    async def wait_closed(self) -> None:
        """Return once the link is gone."""
        if not self.closed:
            await asyncio.shield(self._gone)

    def abort(self, error: LinkError) -> None:
        """Drop the link at once; pending requests fail with `error`."""
        if self._transport is not None:
            self._transport.abort()
        self._finish(error)

    def _finish(self, error: LinkError) -> None:
        if self.closed:
            return
        self.closed = True
        was_open = self._stage == _OPEN_STAGE
        self._stage = _HELLO_STAGE  # nothing can be sent any more
        for timer in (self._timer, self._sweep_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._sweep_timer = None
        pending, self._pending = self._pending, {}
        for future, _, _ in pending.values():
            if not future.done():
                # One exception each: a shared one would collect the tracebacks of all who raise it.
                _fail(future, type(error)(*error.args))
        if not self.ready.done():
            _fail(self.ready, error if isinstance(error, LinkHandshakeError) else LinkClosedError(str(error)))
        self._out = bytearray()
        if not self._gone.done():
            self._gone.set_result(None)
        if self._forget is not None:
            self._forget(self)
        if was_open:
            try:
                self._handler.link_closed(self)
            except Exception:
                log.exception("handling the end of the link to %s failed", self.peer)

    def _handshake_late(self) -> None:
        self.abort(LinkHandshakeError(f"no handshake within {self._settings.handshake_timeout_s} s"))

    def _tick(self) -> None:
        """Keep-alive: ping a silent link, drop a dead one."""
        now, settings = self._loop.time(), self._settings
        # A tick that comes late says that this process stood still, not that the peer did: what it sent
        # meanwhile waits in the kernel and is read after this.
        late_s = now - self._tick_due
        if late_s > settings.heartbeat_s / 2:
            self._last_received += late_s
        quiet_s = now - self._last_received
        if quiet_s > settings.dead_after_s:
            self.abort(LinkClosedError(f"link to {self.peer}: nothing received for {quiet_s:.1f} s"))
            return
        if not self._sent_since_tick:
            self._enqueue(0, _PING, bounded=False)
        self._sent_since_tick = False
        self._schedule_tick()

    def _schedule_tick(self) -> None:
        self._tick_due = self._loop.time() + self._settings.heartbeat_s
        self._timer = self._loop.call_at(self._tick_due, self._tick)

    # -- sending ------------------------------------------------------------------------------------

    def send_nowait(self, message: Message) -> None:
        """Queue a one-way message.

        Raises:
            LinkClosedError: the link is gone.
            BusyError: the peer does not read and the outbound bound is reached.
            LinkFrameError: the message is longer than a frame may be, or cannot be encoded.
        """
        self._enqueue(0, message)

    async def request(self, message: Message, timeout_s: float | None = None) -> Any:
        """Send a request and wait for its reply.

        Cancellation: the peer still runs the request; it counts as in flight until its answer or deadline.

        Raises:
            RemoteError: the peer answered with a failure.
            LinkClosedError, LinkTimeoutError: no answer; it may or may not have run.
            LinkFrameError: the message cannot be sent (it did not run), or the answer cannot be read.
            BusyError: too many requests in flight or bytes waiting; it did not run.
        """
        return await self.request_nowait(message, timeout_s)

    def request_nowait(self, message: Message, timeout_s: float | None = None) -> asyncio.Future[Any]:
        """Like `request`, returning the future of the reply.

        Raises LinkClosedError, LinkFrameError or BusyError at once; the request did not run then.
        """
        pending = self._pending
        if len(pending) >= self._settings.max_in_flight:
            raise BusyError(f"{len(pending)} requests in flight to {self.peer}")
        number = self._next_request
        self._enqueue(number, message)
        self._next_request = number + 1
        loop = self._loop
        future: asyncio.Future[Any] = loop.create_future()
        timeout = self._settings.request_timeout_s if timeout_s is None else timeout_s
        deadline = loop.time() + timeout
        pending[number] = (future, deadline, timeout)
        # One timer for all requests: it runs at the nearest deadline. A timer each would leave as many
        # cancelled ones in the loop's heap as requests are made within a deadline.
        if deadline < self._sweep_at:
            self._arm_sweep(deadline)
        return future

    def _arm_sweep(self, at: float) -> None:
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        self._sweep_at = at
        self._sweep_timer = self._loop.call_at(at, self._sweep)

    def _sweep(self) -> None:
        """Fail the requests whose deadline has passed; come again at the next one."""
        now = self._loop.time()
        self._sweep_at, self._sweep_timer = float("inf"), None
        nearest = float("inf")
        late: list[int] = []
        for number, (_, deadline, _) in self._pending.items():
            if deadline <= now + 0.001:  # loops round their timers to a millisecond
                late.append(number)
            elif deadline < nearest:
                nearest = deadline
        for number in late:
            future, _, timeout_s = self._pending.pop(number)
            if not future.done():
                _fail(future, LinkTimeoutError(f"no answer from {self.peer} within {timeout_s:.3g} s"))
        if self._pending:
            self._arm_sweep(max(nearest, now + _SWEEP_GAP_S))

    def reply_nowait(self, request: int, message: Message) -> None:
        """Answer request number `request`. A link that is gone or a `request` of 0 is ignored.

        Replies are not refused for the outbound bound, as the requester could not tell that from a loss;
        at twice the bound the link is closed instead. A reply that cannot be sent becomes a failure.
        """
        if request <= 0 or self.closed:
            return
        try:
            self._enqueue(-request, message, bounded=False)
        except LinkFrameError as exc:
            log.error("answering %s: %s", self.peer, exc)
            self._enqueue(-request, Failure(exc.code, str(exc), False), bounded=False)
        if len(self._out) + self._backlog > 2 * self._max_outbound_bytes:
            self.abort(LinkClosedError(f"{self.peer} does not read its answers"))

    def fail_nowait(self, request: int, error: BaseException) -> None:
        """Answer request number `request` with an error (RemoteError at the caller)."""
        if isinstance(error, CarillonError):
            retry = error.retry_after_s if isinstance(error, UnavailableError | RemoteError) else 0.0
            text = error.message if isinstance(error, RemoteError) else str(error)  # passed on as it came
            failure = Failure(error.code, text, error.temporary, retry)
        else:
            failure = Failure("internal", f"{type(error).__name__}: {error}", False)
        self.reply_nowait(request, failure)

    def _enqueue(self, number: int, message: Message, *, bounded: bool = True) -> None:
        if self._stage != _OPEN_STAGE:
            raise LinkClosedError(f"link to {self.peer or 'peer'} is not open")
        out = self._out
        mark = len(out)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)
            self._backlog = self._transport.get_write_buffer_size()  # type: ignore[union-attr]
        try:
            _encode_into(Envelope(number, message), out, mark + 4)
        except (TypeError, ValueError, OverflowError, RecursionError) as exc:
            del out[mark:]
            raise LinkFrameError(f"cannot encode {type(message).__name__}: {exc}") from exc
        end = len(out)
        size = end - mark - 4
        if size > self._max_frame_bytes:
            del out[mark:]
            raise LinkFrameError(f"{type(message).__name__} of {size} bytes exceeds the frame limit")
        if bounded and end + self._backlog > self._max_outbound_bytes:
            del out[mark:]
            raise BusyError(f"{mark + self._backlog} bytes wait for {self.peer}")
        _LENGTH.pack_into(out, mark, size)

    def outbound_bytes(self) -> int:
        """Bytes queued here and in the transport, not yet taken by the kernel."""
        transport = self._transport
        return len(self._out) + (transport.get_write_buffer_size() if transport is not None else 0)

    def in_flight(self) -> int:
        """Requests without an answer."""
        return len(self._pending)

    def _flush(self) -> None:
        self._flush_scheduled = False
        out = self._out
        if out and not self.closed and self._transport is not None:
            self._out = bytearray()  # the transport keeps the old one until it is sent
            self._sent_since_tick = True
            self._transport.write(out)

    # -- receiving ----------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """asyncio: cut frames out of the stream and hand them on, in order."""
        self._last_received = self._loop.time()
        buffer = self._buffer
        if buffer or self._stage != _OPEN_STAGE:
            buffer += data
            if len(buffer) < self._need or (self._stage != _OPEN_STAGE and not self._handshake()):
                return
            data = bytes(buffer)
            buffer.clear()
            self._need = 0
        at, end = 0, len(data)
        pending, handler = self._pending, self._handler
        error: LinkFrameError | None = None
        while end - at >= 4:
            (size,) = _LENGTH.unpack_from(data, at)
            stop = at + 4 + size
            if stop > end:
                if size > self._max_frame_bytes:
                    error = LinkFrameError(f"frame of {size} bytes from {self.peer} exceeds the limit")
                else:
                    self._need = 4 + size
                break
            try:
                envelope = _decode(data[at + 4 : stop])
            except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
                error = self._undecodable(data[at + 4 : stop], exc)
                if error is not None:
                    break
                at = stop
                continue
            at = stop
            number, body = envelope.request, envelope.body
            if number < 0:
                entry = pending.pop(-number, None)
                if entry is not None and not entry[0].done():
                    if type(body) is Failure:
                        _fail(
                            entry[0], RemoteError(body.code, body.message, body.temporary, body.retry_after_s)
                        )
                    else:
                        entry[0].set_result(body)
            elif type(body) is not Ping:
                try:
                    handler.receive(self, body, number)
                except Exception as exc:
                    log.exception("handling %s from %s failed", type(body).__name__, self.peer)
                    self.fail_nowait(number, exc)
                if self.closed:
                    break
        if at < end and not self.closed:
            buffer += data[at:]
        if at:
            try:
                handler.read_finished(self)
            except Exception:
                log.exception("finishing a read from %s failed", self.peer)
        if error is not None:
            self.abort(error)

    def _undecodable(self, frame: bytes, exc: Exception) -> LinkFrameError | None:
        """Deal with a frame whose body is of no known form, e.g. a message of a newer version.

        The frame is well delimited, so only its message fails: a request is answered with a failure, an
        answer fails its request, a one-way message is dropped and counted.

        Returns:
            An error if not even the envelope can be read: the stream makes no sense any more.
        """
        try:
            number = _decode_head(frame).request
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return LinkFrameError(f"bad frame from {self.peer}: {exc}")
        text = f"cannot read a message from {self.peer}: {exc}"
        if number < 0:
            entry = self._pending.pop(-number, None)
            if entry is not None and not entry[0].done():
                _fail(entry[0], LinkFrameError(text))
        elif number > 0:
            self.reply_nowait(number, Failure(LinkFrameError.code, text, False))
        else:
            self.undecodable += 1
            if self.undecodable in (1, 10, 100) or self.undecodable % 1000 == 0:
                log.error("%s (%d dropped so far)", text, self.undecodable)
        return None

    # -- handshake ----------------------------------------------------------------------------------

    def _handshake(self) -> bool:
        """Advance the handshake with what is buffered; True once the link is open."""
        try:
            if self._stage == _HELLO_STAGE and not self._take_hello():
                return False
            if not self._take_proof():
                return False
        except LinkHandshakeError as exc:
            self.abort(exc)
            return False
        self._stage = _OPEN_STAGE
        if self._timer is not None:
            self._timer.cancel()
        self._schedule_tick()
        try:
            self._handler.link_opened(self)
        except Exception as exc:
            log.exception("opening the link to %s failed", self.peer)
            self.abort(LinkClosedError(f"opening the link failed: {exc}"))
        if self.closed:
            return False
        if not self.ready.done():
            self.ready.set_result(None)
        return True

    def _take_hello(self) -> bool:
        """Check the peer's hello and send our proof; False if more bytes are needed."""
        buffer = self._buffer
        if buffer[:4] != MAGIC[: len(buffer)]:
            raise LinkHandshakeError("not a Carillon link: wrong magic")
        if len(buffer) < 6:
            return False
        version = int.from_bytes(buffer[4:6], "big")
        if version != VERSION:
            raise LinkHandshakeError(f"expected link version {VERSION}, got {version}")
        if len(buffer) < _HELLO.size:
            return False
        _, _, length, nonce = _HELLO.unpack_from(buffer)
        if not 0 < length <= MAX_NAME_BYTES:
            raise LinkHandshakeError(f"expected a name of 1 to {MAX_NAME_BYTES} bytes, got {length}")
        end = _HELLO.size + length
        if len(buffer) < end:
            return False
        name = bytes(buffer[_HELLO.size : end])
        del buffer[:end]
        try:
            self.peer = name.decode()
        except UnicodeDecodeError:
            raise LinkHandshakeError("expected the peer's name to be UTF-8") from None
        if self._expected_peer and self.peer != self._expected_peer:
            # A port or socket path that another process got after the one we look for died.
            raise LinkHandshakeError(f"expected {self._expected_peer} here, found {self.peer}")
        self._peer_name, self._peer_nonce = name, nonce
        assert self._transport is not None
        self._transport.write(
            handshake_proof(
                self._secret,
                dialled=self._dialled,
                nonce=self._nonce,
                name=self._name,
                peer_nonce=nonce,
                peer_name=name,
            )
        )
        self._stage = _PROOF_STAGE
        return True

    def _take_proof(self) -> bool:
        """Check the peer's proof; False if more bytes are needed."""
        buffer = self._buffer
        if len(buffer) < _PROOF_BYTES:
            return False
        proof = bytes(buffer[:_PROOF_BYTES])
        del buffer[:_PROOF_BYTES]
        expected = handshake_proof(
            self._secret,
            dialled=not self._dialled,
            nonce=self._peer_nonce,
            name=self._peer_name,
            peer_nonce=self._nonce,
            peer_name=self._name,
        )
        if not hmac.compare_digest(proof, expected):
            raise LinkHandshakeError(f"{self.peer} does not know the cluster secret")
        return True


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    """Fail a future; if nobody awaits it (a caller that went away) that is not worth a log line."""
    future.set_exception(error)
    future.exception()


def handshake_proof(
    secret: bytes, *, dialled: bool, nonce: bytes, name: bytes, peer_nonce: bytes, peer_name: bytes
) -> bytes:
    """What one end sends to prove that it knows the secret (docs/reference/links.md).

    The role keeps an end's own proof from being sent back to it, the nonces keep an old one from passing,
    and lengths before the names keep two pairs of names from giving the same text.

    Args:
        secret: the cluster secret.
        dialled: True if the end that proves dialled, False if it listened.
        nonce: nonce of the end that proves; `name` likewise.
        peer_nonce: nonce of the end that checks; `peer_name` likewise.
    """
    text = b"".join(
        (
            MAGIC,
            VERSION.to_bytes(2, "big"),
            b"D" if dialled else b"L",
            peer_nonce,
            nonce,
            len(name).to_bytes(2, "big"),
            name,
            len(peer_name).to_bytes(2, "big"),
            peer_name,
        )
    )
    return hmac.new(secret, text, hashlib.sha256).digest()
