"""A small HTTP/2 server over TLS: the ground that the local push providers stand on.

It speaks the protocol honestly (ALPN h2, flow control both ways, SETTINGS, PING) and can misbehave on
request the way providers do: late answers, RST_STREAM, GOAWAY, a window that is never replenished, a dropped
connection. Handlers are plain functions, so one core answers thousands of requests a second.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
from hpack import Encoder
from hyperframe.frame import GoAwayFrame

Fault = Literal["", "reset", "refuse", "goaway", "disconnect", "silent"]
"""How an answer goes wrong.

reset: RST_STREAM INTERNAL_ERROR. refuse: RST_STREAM REFUSED_STREAM (the request was not processed). goaway:
GOAWAY that names this stream as not processed; the other streams are still answered. disconnect: the
connection is dropped without a word. silent: no answer, ever.
"""

FAULTS: Final = ("", "reset", "refuse", "goaway", "disconnect", "silent")
_CONNECTION_WINDOW: Final = 16 * 1024 * 1024
_STREAM_WINDOW: Final = 65_535


@dataclass(slots=True)
class Request:
    """One request, complete with its body."""

    connection: Http2Connection
    stream: int
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Answer:
    """What to send back, when, and whether to break something instead."""

    status: int = 200
    headers: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    body: bytes = b""
    delay_s: float = 0.0
    fault: Fault = ""


class _PlainEncoder(Encoder):
    """Without Huffman coding, which would be the most expensive part of an answer."""

    def encode(self, headers: Any, huffman: bool = False) -> bytes:
        """See hpack."""
        return super().encode(headers, huffman=False)


Handler = Callable[[Request], Answer]


class Http2Server:
    """Listens with TLS and answers requests by calling `handle`.

    Args:
        handle: called on the event loop, must not block.
        tls: server side context; ALPN is set to h2 here.
        max_streams: SETTINGS_MAX_CONCURRENT_STREAMS told to clients.
    """

    def __init__(self, handle: Handler, tls: ssl.SSLContext, max_streams: int = 1000) -> None:
        tls.set_alpn_protocols(["h2"])
        self.handle = handle
        self.max_streams = max_streams
        self.connections: set[Http2Connection] = set()
        self.connections_made = 0
        self.most_open = 0
        """Most streams that were open at once on one connection."""
        self.stalled = False
        self._tls = tls
        self._server: asyncio.Server | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Listen; returns the bound port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Http2Connection(self), host, port, ssl=self._tls, backlog=256
        )
        return int(self._server.sockets[0].getsockname()[1])

    def stall(self, stalled: bool) -> None:
        """Close (or open again) the flow-control windows of what clients send: bodies wait meanwhile."""
        if stalled != self.stalled:
            self.stalled = stalled
            for connection in list(self.connections):
                connection.set_stream_window(0 if stalled else _STREAM_WINDOW)

    def goaway(self) -> None:
        """Tell every connection to go away, gracefully: streams it has opened are answered."""
        for connection in list(self.connections):
            connection.goaway(connection.last_stream)

    def disconnect(self) -> None:
        """Drop every connection."""
        for connection in list(self.connections):
            connection.abort()

    async def close(self) -> None:
        """Stop listening and drop all connections."""
        if self._server is not None:
            self._server.close()
            self.disconnect()
            await self._server.wait_closed()
            self._server = None
            await asyncio.sleep(0)  # lets aborted transports report their loss before the loop ends


class Http2Connection(asyncio.Protocol):
    """One client connection."""

    def __init__(self, server: Http2Server) -> None:
        self.number = 0
        """1 for the server's first connection."""
        self.last_stream = 0
        self.note: Any = None  # the provider's own state about this connection
        self.deaf = False
        """True: bytes are read and nothing is ever answered, as by a peer that vanished."""
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        config = h2.config.H2Configuration(
            client_side=False,
            header_encoding="utf-8",
            # The client under test is ours; what h2 checks again per header costs a third of the throughput.
            validate_inbound_headers=False,
            normalize_inbound_headers=False,
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        self._h2 = h2.connection.H2Connection(config=config)
        self._h2.encoder = _PlainEncoder()
        self._open: dict[int, tuple[dict[str, str], bytearray]] = {}
        self._answering: set[int] = set()
        self._unacknowledged = 0
        self._blocked: dict[int, bytes] = {}
        self._flush_scheduled = False
        self._last_served: int | None = None  # what our GOAWAY said

    # -- asyncio ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: TLS is up; send our SETTINGS."""
        self._transport = cast("asyncio.Transport", transport)
        self._server.connections.add(self)
        self._server.connections_made += 1
        self.number = self._server.connections_made
        # Replaced, not updated: h2 announces what is in force, and an update waits for its acknowledgement.
        self._h2.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: self._server.max_streams,
                h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0 if self._server.stalled else _STREAM_WINDOW,
                h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: 65_536,
            },
        )
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(_CONNECTION_WINDOW - _STREAM_WINDOW)
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the client is gone."""
        self._server.connections.discard(self)
        self._transport = None
        self._open.clear()
        self._blocked.clear()

    def data_received(self, data: bytes) -> None:
        """asyncio: bytes of frames."""
        if self.deaf:
            return
        try:
            events = self._h2.receive_data(data)
        except h2.exceptions.ProtocolError:
            self._flush()
            if self._transport is not None:
                self._transport.close()
            return
        for event in events:
            self._on_event(event)
        self._flush()

    def _on_event(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            if self._last_served is not None and event.stream_id > self._last_served:
                return  # we said that we would not process it
            headers = dict(cast("list[tuple[str, str]]", event.headers))
            self._open[event.stream_id] = (headers, bytearray())
            self.last_stream = max(self.last_stream, event.stream_id)
            self._answering.add(event.stream_id)
            self._server.most_open = max(self._server.most_open, len(self._answering))
        elif isinstance(event, h2.events.DataReceived):
            parts = self._open.get(event.stream_id)
            if parts is not None and event.data:
                parts[1].extend(event.data)
            if event.flow_controlled_length:
                self._consumed(event.flow_controlled_length)
        elif isinstance(event, h2.events.StreamEnded):
            parts = self._open.pop(event.stream_id, None)
            if parts is not None:
                self._serve(event.stream_id, parts[0], bytes(parts[1]))
        elif isinstance(event, h2.events.StreamReset):
            self._open.pop(event.stream_id, None)
            self._answering.discard(event.stream_id)
            self._blocked.pop(event.stream_id, None)
        elif isinstance(event, h2.events.WindowUpdated | h2.events.RemoteSettingsChanged):
            for stream, body in list(self._blocked.items()):
                del self._blocked[stream]
                self._send_body(stream, body)
        elif isinstance(event, h2.events.ConnectionTerminated) and self._transport is not None:
            self._transport.close()

    # -- flow control -------------------------------------------------------------------------------

    def _consumed(self, size: int) -> None:
        """Replenish the connection's window in large steps (streams end with one small body each)."""
        self._unacknowledged += size
        if not self._server.stalled and self._unacknowledged >= _CONNECTION_WINDOW // 4:
            self.release_window()

    @property
    def stream_window(self) -> int:
        """The window of new streams that the client has acknowledged."""
        return self._h2.local_settings.initial_window_size

    def set_stream_window(self, size: int) -> None:
        """Tell the client the window of its streams; 0 stops every body that is not sent yet."""
        if self._transport is not None:
            self._h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: size})
            self._schedule_flush()

    def release_window(self) -> None:
        """Give back everything received so far."""
        if self._unacknowledged and self._transport is not None:
            self._h2.increment_flow_control_window(self._unacknowledged)
            self._unacknowledged = 0
            self._schedule_flush()

    # -- answering ----------------------------------------------------------------------------------

    def _serve(self, stream: int, headers: dict[str, str], body: bytes) -> None:
        request = Request(self, stream, headers.get(":method", ""), headers.get(":path", ""), headers, body)
        answer = self._server.handle(request)
        if answer.fault == "silent":
            return
        if answer.fault == "goaway":
            self.goaway(stream - 1)  # at once: what is behind this stream must not be processed
        elif answer.delay_s > 0:
            self._loop.call_later(answer.delay_s, self._answer, stream, answer)
        else:
            self._answer(stream, answer)

    def _answer(self, stream: int, answer: Answer) -> None:
        self._answering.discard(stream)
        if self._transport is None:
            return
        try:
            if answer.fault == "reset":
                self._h2.reset_stream(stream, h2.errors.ErrorCodes.INTERNAL_ERROR)
            elif answer.fault == "refuse":
                self._h2.reset_stream(stream, h2.errors.ErrorCodes.REFUSED_STREAM)
            elif answer.fault == "disconnect":
                self.abort()
                return
            else:
                headers = [(":status", str(answer.status)), *answer.headers]
                self._h2.send_headers(stream, headers, end_stream=not answer.body)
                if answer.body:
                    self._send_body(stream, answer.body)
        except (h2.exceptions.StreamClosedError, h2.exceptions.ProtocolError):
            pass  # the client cancelled this stream meanwhile
        self._schedule_flush()

    def _send_body(self, stream: int, body: bytes) -> None:
        try:
            while body:
                room = min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size)
                if room <= 0:
                    # A client that never acknowledges DATA stalls here, as it does at the real provider.
                    self._blocked[stream] = body
                    return
                part, body = body[:room], body[room:]
                self._h2.send_data(stream, part, end_stream=not body)
        except h2.exceptions.ProtocolError:
            pass

    def goaway(self, last_stream: int) -> None:
        """Send GOAWAY: streams above `last_stream` are not processed, the others still are.

        Written as a raw frame because h2's own `close_connection` forbids answering open streams after it.
        """
        if self._transport is not None and self._last_served is None:
            self._last_served = last_stream
            for stream in [stream for stream in self._open if stream > last_stream]:
                del self._open[stream]
            self._flush()
            self._transport.write(GoAwayFrame(0, last_stream_id=max(last_stream, 0)).serialize())

    def abort(self) -> None:
        """Drop the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _schedule_flush(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        data = self._h2.data_to_send()
        if data and self._transport is not None:
            self._transport.write(data)
