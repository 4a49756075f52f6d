"""An HTTP/2 client for push providers: many small POSTs over few long-lived connections.

What sets it apart from a general client: it tells whether a failed request can have been processed
(`NotProcessedError` against `UnknownResultError`), one cancelled request does not touch its neighbours,
received DATA is acknowledged, GOAWAY moves only what the server has not processed, and the requests of one
turn of the event loop leave in one write. docs/adr/0006-apns-client.md has the reasons and the figures.

Source: RFC 9113, above all 6.8 (GOAWAY), 8.7 (requests that were not processed) and 5.2 (flow control).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import msgspec
from hpack import Encoder, NeverIndexedHeaderTuple

log = logging.getLogger(__name__)

Header = tuple[str, str]

_FRAME_HEADER: Final = 9
_GOAWAY: Final = 7
_WINDOW: Final = 4 * 1024 * 1024
_LAST_STREAM: Final = 2_000_000_000
"""Stream ids have 31 bits and are never used again: beyond this one a new connection takes over."""
_MAX_ANSWER_BYTES: Final = 64 * 1024


class Http2Error(Exception):
    """Base of this client's errors. Internal to channels: each channel maps them to outcomes."""


class NotProcessedError(Http2Error):
    """The server cannot have processed the request: another try is safe."""


class UnknownResultError(Http2Error):
    """The request was sent and its answer is lost: it may or may not have been processed."""


class AnswerTimeoutError(UnknownResultError):
    """No answer in time."""


class _PlainEncoder(Encoder):
    """Huffman coding saves a few bytes per header and costs more than all else of a request in Python."""

    def encode(self, headers: Any, huffman: bool = False) -> bytes:
        """See hpack."""
        return super().encode(headers, huffman=False)


@dataclass(slots=True)
class Http2Answer:
    """A complete answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, decoded. Raises msgspec.DecodeError."""
        return msgspec.json.decode(self.body)


@dataclass(frozen=True)
class Http2Limits:
    """Bounds of a pool."""

    connections: int = 2
    """Connections at most."""
    streams_before_next: int = 50
    """A further connection is opened when every open one carries this many requests."""
    max_streams: int = 500
    """Requests at once on one connection, if the server allows as many."""
    connect_timeout_s: float = 5.0
    ping_interval_s: float = 30.0
    """A connection that received nothing for so long is pinged."""
    ping_timeout_s: float = 10.0
    """A ping without answer for so long drops the connection."""
    redial_min_s: float = 0.1
    redial_max_s: float = 5.0
    retries: int = 3
    """Tries after the first, of requests that were not processed."""


def secret_header(name: str, value: str) -> Header:
    """A header that never enters the compression table: values that never repeat would flush it."""
    return cast("Header", NeverIndexedHeaderTuple(name, value))


@dataclass(slots=True, eq=False)
class _Exchange:
    """One request on its way."""

    headers: Sequence[Header]
    body: bytes
    answer: asyncio.Future[Http2Answer]
    started_at: float = 0.0
    status: int = 0
    answer_headers: dict[str, str] = field(default_factory=dict)
    received: bytearray = field(default_factory=bytearray)
    unsent: bytes = b""
    """What flow control has not let out yet; the request is incomplete, so it cannot have been processed."""


class _Connection(asyncio.Protocol):
    """One connection. Made by `Http2Pool`."""

    def __init__(self, pool: Http2Pool) -> None:
        self.usable = False
        """True while new requests may go out on it."""
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.exchanges: dict[int, _Exchange] = {}
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        config = h2.config.H2Configuration(
            client_side=True,
            header_encoding="utf-8",
            # We write valid headers and read four of them; checking each again costs throughput.
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
            validate_inbound_headers=False,
            normalize_inbound_headers=False,
        )
        self._h2 = h2.connection.H2Connection(config=config)
        self._h2.encoder = _PlainEncoder()
        self._settled = False  # the server's first SETTINGS came
        self._buffer = bytearray()
        self._unacknowledged = 0
        self._blocked: deque[int] = deque()
        self._flush_scheduled = False
        self.last_received = self._loop.time()
        self._pinged_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    # -- life cycle ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: TLS is up."""
        self._transport = cast("asyncio.Transport", transport)
        chosen = transport.get_extra_info("ssl_object")
        if chosen is not None and chosen.selected_alpn_protocol() != "h2":
            self._finish(NotProcessedError("the server does not speak HTTP/2 (ALPN)"))
            return
        # Replaced, not updated: h2 announces what is in force, and an update waits for its acknowledgement.
        self._h2.local_settings = h2.settings.Settings(
            client=True,
            initial_values={
                h2.settings.SettingCodes.ENABLE_PUSH: 0,
                h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: 65_536,
            },
        )
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(_WINDOW - 65_535)
        self._flush()
        self._timer = self._loop.call_later(self._pool.limits.ping_interval_s, self._tick)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the stream is gone."""
        self._transport = None
        self._finish(UnknownResultError(f"connection lost: {exc or 'end of stream'}"))

    def close(self) -> None:
        """Close now; requests in flight fail."""
        self._finish(UnknownResultError("connection closed here"))

    def retire(self) -> None:
        """No new requests; close once the ones in flight are answered."""
        if self.usable:
            self.usable = False
            self._pool.connection_retired()
        if not self.exchanges:
            self._finish(NotProcessedError("connection retired"))

    def _finish(self, error: Http2Error) -> None:
        self.usable = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.abort() if isinstance(error, UnknownResultError) else self._transport.close()
            self._transport = None
        if not self.opened.done():
            self.opened.set_exception(NotProcessedError(str(error)))
            self.opened.exception()
        exchanges, self.exchanges = self.exchanges, {}
        for exchange in exchanges.values():
            # A request whose body never left completely cannot have been processed.
            _fail(exchange, NotProcessedError(str(error)) if exchange.unsent else error)
        self._pool.connection_gone(self)

    def _tick(self) -> None:
        """Find out whether a silent connection still lives."""
        now = self._loop.time()
        limits = self._pool.limits
        if self._pinged_at is not None:
            if self.last_received < self._pinged_at:
                self._finish(UnknownResultError(f"no answer to a ping within {limits.ping_timeout_s} s"))
                return
            self._pinged_at = None
        if now - self.last_received >= limits.ping_interval_s:
            self.ping()
        else:
            self._timer = self._loop.call_later(limits.ping_interval_s, self._tick)

    def ping(self) -> None:
        """Ask for a sign of life; without one in `ping_timeout_s` the connection is dropped."""
        if self._pinged_at is not None or self._transport is None:
            return
        self._pinged_at = self._loop.time()
        self._h2.ping(b"carillon")
        self._flush()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._pool.limits.ping_timeout_s, self._tick)

    # -- sending ------------------------------------------------------------------------------------

    def room(self) -> int:
        """How many more requests may start now."""
        if not self.usable:
            return 0
        allowed = min(self._h2.remote_settings.max_concurrent_streams, self._pool.limits.max_streams)
        return allowed - len(self.exchanges)

    def start(self, exchange: _Exchange) -> int:
        """Send a request; returns its stream. `room()` must be positive."""
        stream = self._h2.get_next_available_stream_id()
        try:
            self._h2.send_headers(stream, exchange.headers, end_stream=not exchange.body)
        except h2.exceptions.ProtocolError as exc:
            self.retire()
            raise NotProcessedError(f"cannot open a stream: {exc}") from exc
        self.exchanges[stream] = exchange
        exchange.unsent = exchange.body
        exchange.started_at = self._loop.time()
        self._send_body(stream, exchange)
        if stream > _LAST_STREAM:
            self.retire()
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)
        return stream

    def _send_body(self, stream: int, exchange: _Exchange) -> None:
        while exchange.unsent:
            room = min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size)
            if room <= 0:
                self._blocked.append(stream)
                return
            part, rest = exchange.unsent[:room], exchange.unsent[room:]
            self._h2.send_data(stream, part, end_stream=not rest)
            exchange.unsent = rest

    def _unblock(self) -> None:
        waiting, self._blocked = self._blocked, deque()
        for stream in waiting:
            exchange = self.exchanges.get(stream)
            if exchange is not None:
                self._send_body(stream, exchange)

    def give_up(self, stream: int, exchange: _Exchange) -> None:
        """Cancel one request: RST_STREAM on its stream, nothing else is touched."""
        if self.exchanges.get(stream) is not exchange:
            return
        del self.exchanges[stream]
        if self._transport is not None:
            self._reset(stream, h2.errors.ErrorCodes.CANCEL)
            self._flush()
        self._done_one()

    def _reset(self, stream: int, code: h2.errors.ErrorCodes) -> None:
        with contextlib.suppress(h2.exceptions.ProtocolError):  # it ended meanwhile
            self._h2.reset_stream(stream, code)

    def _flush(self) -> None:
        self._flush_scheduled = False
        data = self._h2.data_to_send()
        if data and self._transport is not None:
            self._transport.write(data)

    # -- receiving ----------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """asyncio: bytes of frames."""
        self.last_received = self._loop.time()
        try:
            for chunk, last_stream in self._split_goaway(data):
                if chunk:
                    for event in self._h2.receive_data(chunk):
                        self._on_event(event)
                if last_stream is not None:
                    self._on_goaway(last_stream)
        except h2.exceptions.ProtocolError as exc:
            self._flush()
            self._finish(UnknownResultError(f"protocol error: {exc}"))
            return
        if self._unacknowledged >= _WINDOW // 4 and self._transport is not None:
            self._h2.increment_flow_control_window(self._unacknowledged)
            self._unacknowledged = 0
        self._flush()

    def _split_goaway(self, data: bytes) -> list[tuple[bytes, int | None]]:
        """Cut GOAWAY frames out of the bytes.

        h2 treats GOAWAY as the end of the connection and raises at every later frame, while RFC 9113 6.8 has
        the server go on answering the streams up to the one it names. Cutting at frame boundaries also keeps
        h2 from buffering partial frames.

        Returns:
            (whole frames, last stream id of the GOAWAY that follows them or None), in order.
        """
        buffer = self._buffer
        buffer += data
        parts: list[tuple[bytes, int | None]] = []
        begin = at = 0
        end = len(buffer)
        while end - at >= _FRAME_HEADER:
            size = _FRAME_HEADER + (buffer[at] << 16 | buffer[at + 1] << 8 | buffer[at + 2])
            if end - at < size:
                break
            if buffer[at + 3] == _GOAWAY and size >= _FRAME_HEADER + 8:
                last = int.from_bytes(buffer[at + 9 : at + 13], "big") & 0x7FFF_FFFF
                parts.append((bytes(buffer[begin:at]), last))
                begin = at + size
            at += size
        if at > begin:
            parts.append((bytes(buffer[begin:at]), None))
        del buffer[:at]
        if len(buffer) > _FRAME_HEADER + self._h2.max_inbound_frame_size:
            raise h2.exceptions.FrameTooLargeError("frame exceeds the limit")
        return parts

    def _on_event(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.ResponseReceived):
            exchange = self.exchanges.get(event.stream_id)
            if exchange is not None:
                headers = dict(cast("list[Header]", event.headers))
                exchange.status = int(headers.get(":status", "0"))
                exchange.answer_headers = headers
        elif isinstance(event, h2.events.DataReceived):
            self._unacknowledged += event.flow_controlled_length
            exchange = self.exchanges.get(event.stream_id)
            if exchange is not None and len(exchange.received) < _MAX_ANSWER_BYTES:
                exchange.received += event.data
                if len(exchange.received) > 32_768 and event.stream_ended is None:
                    # Answers of providers are a few hundred bytes; a larger one needs its stream's window.
                    self._h2.increment_flow_control_window(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            exchange = self.exchanges.pop(event.stream_id, None)
            if exchange is not None:
                if not exchange.answer.done():
                    exchange.answer.set_result(
                        Http2Answer(exchange.status, exchange.answer_headers, bytes(exchange.received))
                    )
                if exchange.unsent:  # answered before it was sent completely: tell the server not to wait
                    self._reset(event.stream_id, h2.errors.ErrorCodes.NO_ERROR)
                self._done_one()
        elif isinstance(event, h2.events.StreamReset):
            exchange = self.exchanges.pop(event.stream_id, None)
            if exchange is not None:
                text = f"stream reset by the server, code {event.error_code}"
                refused = event.error_code == h2.errors.ErrorCodes.REFUSED_STREAM
                _fail(exchange, NotProcessedError(text) if refused else UnknownResultError(text))
                self._done_one()
        elif isinstance(event, h2.events.WindowUpdated):
            self._unblock()
        elif isinstance(event, h2.events.RemoteSettingsChanged):
            if not self._settled:
                self._settled = True
                self.usable = True
                if not self.opened.done():
                    self.opened.set_result(None)
            self._unblock()
            self._pool.room_made()

    def _on_goaway(self, last_stream: int) -> None:
        """The server goes: streams above `last_stream` were not processed, the others are still answered."""
        if self.usable:
            self.usable = False
            self._pool.connection_retired()
        for stream in [stream for stream in self.exchanges if stream > last_stream]:
            _fail(self.exchanges.pop(stream), NotProcessedError("the server is going away"))
        if not self.exchanges:
            self._finish(NotProcessedError("the server is going away"))

    def _done_one(self) -> None:
        if self.usable:
            self._pool.room_made()
        elif not self.exchanges:
            self._finish(NotProcessedError("connection retired"))


def _fail(exchange: _Exchange, error: Http2Error) -> None:
    if not exchange.answer.done():
        exchange.answer.set_exception(error)
        exchange.answer.exception()  # a caller that went away does not log "never retrieved"


def _expire(turn: asyncio.Future[_Place]) -> None:
    if not turn.done():
        turn.set_exception(NotProcessedError("no connection had room in time"))


_Place = tuple[_Connection, int]
"""A connection and a stream on it."""


class Http2Pool:
    """A few connections to one server, the least loaded first.

    Requests beyond what the connections may carry wait in order. Memory is bounded by the callers: they
    bound how many requests they start.

    Args:
        host: name to dial and to verify.
        tls: client context; ALPN is set to h2 here.
    """

    def __init__(self, host: str, port: int, tls: ssl.SSLContext, limits: Http2Limits | None = None) -> None:
        tls.set_alpn_protocols(["h2"])
        self.limits = limits or Http2Limits()
        self.dials = 0
        """Connections dialled so far."""
        self._host = host
        self._port = port
        self._tls = tls
        self._connections: list[_Connection] = []
        self._waiting: deque[tuple[_Exchange, asyncio.Future[_Place]]] = deque()
        self._dialling: set[asyncio.Task[None]] = set()
        self._failures = 0
        self._next_dial_at = 0.0
        self._last_error = ""
        self._closed = False

    @property
    def authority(self) -> str:
        """Value of the :authority header."""
        return self._host if self._port == 443 else f"{self._host}:{self._port}"

    @property
    def outstanding(self) -> int:
        """Requests in flight."""
        return sum(len(connection.exchanges) for connection in self._connections)

    async def request(self, headers: Sequence[Header], body: bytes, timeout_s: float) -> Http2Answer:
        """Send one request and wait for its answer; retries what was certainly not processed.

        Args:
            headers: pseudo-headers first.
            timeout_s: for everything together: waiting, dialling, tries and the answer.

        Raises:
            NotProcessedError: it was not processed.
            AnswerTimeoutError: sent, and no answer in time.
            UnknownResultError: sent, and the connection or the stream was lost.

        Cancellation: resets this request's stream; others are not touched.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        tries = 0
        while True:
            try:
                return await self._try(headers, body, deadline)
            except NotProcessedError:
                tries += 1
                if tries > self.limits.retries or self._closed or loop.time() >= deadline:
                    raise
            # A refusal says "not now": a moment's pause, else the tries are used up within a millisecond.
            await asyncio.sleep(min(0.01 * 4 ** (tries - 1), max(deadline - loop.time(), 0.0)))

    async def _try(self, headers: Sequence[Header], body: bytes, deadline: float) -> Http2Answer:
        loop = asyncio.get_running_loop()
        exchange = _Exchange(headers, body, loop.create_future())
        connection = self._pick() if not self._waiting else None
        if connection is not None:
            stream = connection.start(exchange)
        else:
            connection, stream = await self._wait_for_room(exchange, deadline)
        timer = loop.call_at(deadline, self._late, connection, stream, exchange)
        try:
            return await exchange.answer
        except asyncio.CancelledError:
            connection.give_up(stream, exchange)
            raise
        finally:
            timer.cancel()

    def _late(self, connection: _Connection, stream: int, exchange: _Exchange) -> None:
        if exchange.unsent:
            # Flow control never let it out. The connection is of no use to others either: replace it.
            _fail(exchange, NotProcessedError("the server's flow control let nothing through in time"))
            connection.retire()
        else:
            _fail(exchange, AnswerTimeoutError("no answer in time"))
            if connection.last_received < exchange.started_at:
                connection.ping()  # silent since before this request: is anybody there?
        connection.give_up(stream, exchange)

    # -- choosing and dialling ----------------------------------------------------------------------

    def _pick(self) -> _Connection | None:
        """The least loaded connection with room, or None. Opens a further one when all are busy."""
        best: _Connection | None = None
        for connection in self._connections:
            if connection.room() > 0 and (best is None or len(connection.exchanges) < len(best.exchanges)):
                best = connection
        if best is None or len(best.exchanges) >= self.limits.streams_before_next:
            self._dial_if_allowed()
        return best

    async def _wait_for_room(self, exchange: _Exchange, deadline: float) -> _Place:
        """Queue up; returns where the request was started."""
        loop = asyncio.get_running_loop()
        if self._closed:
            raise NotProcessedError("the pool is closed")
        self._dial_if_allowed()
        if not self._dialling and not any(connection.usable for connection in self._connections):
            raise NotProcessedError(f"no connection: {self._last_error}")
        turn: asyncio.Future[_Place] = loop.create_future()
        self._waiting.append((exchange, turn))
        timer = loop.call_at(deadline, _expire, turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                connection, stream = turn.result()  # started in the same moment
                connection.give_up(stream, exchange)
            raise
        finally:
            timer.cancel()

    def _dial_if_allowed(self) -> None:
        usable = sum(1 for connection in self._connections if connection.usable)
        if self._closed or usable + len(self._dialling) >= self.limits.connections:
            return
        loop = asyncio.get_running_loop()
        if self._dialling and not usable:
            return  # the first one shows whether the server is there at all
        if loop.time() < self._next_dial_at:
            return
        task = loop.create_task(self._dial())
        self._dialling.add(task)
        task.add_done_callback(self._dialled)

    async def _dial(self) -> None:
        loop = asyncio.get_running_loop()
        self.dials += 1
        connection = _Connection(self)
        try:
            async with asyncio.timeout(self.limits.connect_timeout_s):
                await loop.create_connection(
                    lambda: connection,
                    self._host,
                    self._port,
                    ssl=self._tls,
                    ssl_handshake_timeout=self.limits.connect_timeout_s,
                )
                await connection.opened
        except (OSError, TimeoutError, Http2Error) as exc:
            connection.close()
            self._failures += 1
            pause_s = min(
                self.limits.redial_max_s, self.limits.redial_min_s * 2 ** min(self._failures - 1, 16)
            )
            self._next_dial_at = loop.time() + pause_s
            self._last_error = f"{type(exc).__name__}: {exc}"
            if self._failures in (1, 10, 100):
                log.warning("cannot reach %s: %s (try %d)", self.authority, self._last_error, self._failures)
            if not any(other.usable for other in self._connections):
                self._fail_waiting(NotProcessedError(f"cannot connect: {self._last_error}"))
            return
        except BaseException:
            connection.close()
            raise
        self._failures = 0
        self._next_dial_at = 0.0
        self._connections.append(connection)
        self.room_made()

    def _dialled(self, task: asyncio.Task[None]) -> None:
        self._dialling.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("dialling %s failed", self.authority, exc_info=task.exception())
        if self._waiting:
            self._dial_if_allowed()

    def _fail_waiting(self, error: NotProcessedError) -> None:
        waiting, self._waiting = self._waiting, deque()
        for _, turn in waiting:
            if not turn.done():
                turn.set_exception(error)

    def room_made(self) -> None:
        """A connection can take more requests: start those that wait, in order (called by connections)."""
        while self._waiting:
            exchange, turn = self._waiting[0]
            if turn.done():
                self._waiting.popleft()
                continue
            connection = self._pick()
            if connection is None:
                return
            self._waiting.popleft()
            try:
                turn.set_result((connection, connection.start(exchange)))
            except NotProcessedError as exc:
                turn.set_exception(exc)

    def connection_retired(self) -> None:
        """A connection takes no more requests (called by connections)."""
        if self._waiting:
            self._dial_if_allowed()

    def connection_gone(self, connection: _Connection) -> None:
        """A connection is closed (called by connections)."""
        if connection in self._connections:
            self._connections.remove(connection)
        if self._waiting:
            self._dial_if_allowed()

    async def close(self) -> None:
        """Close all connections; requests in flight fail."""
        self._closed = True
        self._fail_waiting(NotProcessedError("the pool is closed"))
        for task in list(self._dialling):
            task.cancel()
        await asyncio.gather(*self._dialling, return_exceptions=True)
        for connection in list(self._connections):
            connection.close()
        await asyncio.sleep(0)  # lets transports report their loss while the loop still runs


def client_tls(ca_file: str = "") -> ssl.SSLContext:
    """A verifying client context; with `ca_file` it trusts that CA only."""
    context = ssl.create_default_context(cafile=ca_file or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
