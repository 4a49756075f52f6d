"""The replica's own door: uvicorn's HTTP protocol, with a short cut for `POST /v1/events`, and streams.

The hot route is one body in and one short answer out. ASGI makes of that two calls of `receive` and two of
`send`, five dictionaries, an event and a re-check of every header: two thirds of what the request costs
(docs/adr/0009). Here such a request goes from the parser to the handler and its answer to the transport in
one write. Whatever is not the plain case (another route, a query, a chunked body, Expect, a body beyond the
limit, an answer still under way on the connection) takes uvicorn's way, unchanged.

`GET /api/stream` is answered here alone: the socket of a stream leaves uvicorn (serve/stream.py).

uvicorn bounds neither the length of a head nor how long a request may take to arrive, and it knows no most of
connections: who can connect could fill memory and descriptors without a login. Here all three have a bound.

Held to uvicorn's behaviour by tests/integration/test_door.py, because it overrides callbacks of a class that
uvicorn does not document: its version is pinned in requirements.lock.
"""

from __future__ import annotations

import asyncio
import functools
from http import HTTPStatus
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.app import HOT_PATH, IngressApp
from serve.http import PATIENT, STREAM_PATH, Response
from serve.stream import EventStream

_HOT_URL: Final = HOT_PATH.encode()
_STREAM_URL: Final = STREAM_PATH.encode()
_STATUS: Final = {s.value: b"HTTP/1.1 %d %s\r\n" % (s.value, s.phrase.encode()) for s in HTTPStatus}


EARLY_BYTES: Final = 65_536
"""A body up to here is taken before its caller is known; a longer one of a stranger waits for the login."""
_TOO_LONG: Final = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n"


class _Nothing:
    """Stands where uvicorn expects the event that wakes an app waiting for its body."""

    def set(self) -> None:
        """Nobody waits."""


_NOBODY: Final = _Nothing()


class _HotRequest:
    """What `RequestResponseCycle` is for other requests: the members that the protocol looks at."""

    __slots__ = ("body", "disconnected", "headers", "keep_alive", "more_body", "response_complete")

    message_event = _NOBODY

    def __init__(self, headers: dict[bytes, bytes]) -> None:
        self.headers = headers
        self.body = b""
        self.disconnected = False
        self.keep_alive = True
        self.more_body = True
        self.response_complete = False


class _StreamRequest(_HotRequest):
    """A request for a stream; its socket leaves uvicorn once it is let in."""

    __slots__ = ("chunked", "query")

    def __init__(self, headers: dict[bytes, bytes], query: bytes, *, chunked: bool) -> None:
        super().__init__(headers)
        self.query = query
        self.chunked = chunked


class DoorProtocol(HttpToolsProtocol):
    """One connection."""

    cycle: Any
    parser: Any
    url: bytes

    def __init__(self, app: IngressApp, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ingress = app
        settings = app.services.settings.ingress
        self._limit = settings.max_request_bytes
        self._early = min(EARLY_BYTES, self._limit)
        self._max_head = settings.max_head_bytes
        self._most = settings.max_connections
        self._head_bytes = 0
        self._headed: Any = None  # the scope whose head is complete: while `scope` is another, a head arrives
        self._looked: Any = None  # what the caller was at when it was looked at, and since when
        self._since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: the socket is open."""
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > self._most:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """asyncio: bytes came."""
        scope = self.scope
        super().data_received(data)
        if self.scope is self._headed:
            return
        if self.scope is not scope:
            self._head_bytes = 0  # it began in these bytes, with perhaps a body before it
            return
        self._head_bytes += len(data)
        if self._head_bytes > self._max_head and not self.transport.is_closing():
            self.transport.write(_TOO_LONG)
            self.transport.close()

    def look(self, now: float, patience_s: float) -> None:
        """Cut off a caller that takes longer than `patience_s` to send its request or to take its answer.

        Args:
            now: monotonic time; called from time to time, costs nothing in between.
        """
        cycle = self.cycle
        if self.scope is not None and PATIENT in self.scope:
            return
        if cycle is not None and not (cycle.more_body or cycle.response_complete or self.flow.write_paused):
            self._looked = None  # it is our turn
            return
        at = (self.scope, cycle is not None and cycle.response_complete)
        if self._looked is None or self._looked[0] is not at[0] or self._looked[1] != at[1]:
            self._looked, self._since = at, now
        elif now - self._since > patience_s:
            self.transport.abort()

    def on_headers_complete(self) -> None:
        """httptools: the head is here. A plain hot request is kept from becoming an ASGI cycle."""
        self._headed = self.scope
        if self.url == _HOT_URL and self.parser.get_method() == b"POST":
            before = self.cycle
            headers = dict(self.headers)  # at C speed; of a header sent twice the last
            length = headers.get(b"content-length")
            if (
                (before is None or before.response_complete)
                and length is not None
                and length.isdigit()
                and (
                    (size := int(length[:18])) <= self._early
                    or (size <= self._limit and self._ingress.knows(headers))
                )
                and b"transfer-encoding" not in headers
                and not self.expect_100_continue
                and not self.parser.should_upgrade()
                and self.parser.get_http_version() == "1.1"
                and self.parser.should_keep_alive()
            ):
                self.cycle = _HotRequest(headers)
                return
        elif self.url.startswith(_STREAM_URL) and self._is_stream():
            return
        super().on_headers_complete()

    def _is_stream(self) -> bool:
        path, _, query = self.url.partition(b"?")
        before = self.cycle
        if (
            path != _STREAM_URL
            or self.parser.get_method() != b"GET"
            or self.parser.should_upgrade()
            or not (before is None or before.response_complete)
        ):
            return False
        chunked = self.parser.get_http_version() == "1.1"
        self.cycle = _StreamRequest(dict(self.headers), query, chunked=chunked)
        return True

    def on_body(self, body: bytes) -> None:
        """httptools: a part of the body."""
        cycle = self.cycle
        if type(cycle) is _StreamRequest:
            return  # a GET has none that means anything
        if type(cycle) is _HotRequest and cycle.more_body:
            # The length is known and bounded, and nobody would read slower: no flow control is needed.
            cycle.body = cycle.body + body if cycle.body else body
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """httptools: the request is here."""
        cycle = self.cycle
        if type(cycle) is _HotRequest and cycle.more_body:
            cycle.more_body = False
            task = self.loop.create_task(self._answer(cycle))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        elif type(cycle) is _StreamRequest and cycle.more_body:
            cycle.more_body = False
            task = self.loop.create_task(self._open_stream(cycle))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        else:
            super().on_message_complete()

    async def _open_stream(self, request: _StreamRequest) -> None:
        told, opening = await self._ingress.stream(request.headers, request.query)
        connections = self._ingress.services.connections
        if self.transport.is_closing():
            return
        if opening is None or connections is None:
            assert isinstance(told, Response)
            self.transport.write(head_of(told, close=True) + told.body)
            request.response_complete = True
            self.transport.close()
            return
        assert isinstance(told, list)
        if request.chunked:
            told.append((b"transfer-encoding", b"chunked"))
        stream = EventStream(connections, chunked=request.chunked)
        # From here on the socket is none of uvicorn's business, as with its own WebSockets.
        self.connections.discard(self)
        self.flow.resume_reading()
        self.transport.set_protocol(stream)
        stream.begin(self.transport, head_of(Response(headers=told), close=True), opening)

    async def _answer(self, request: _HotRequest) -> None:
        response = await self._ingress.hot(request.headers, request.body)
        if self.flow.write_paused and not self.transport.is_closing():
            await self.flow.drain()
        if self.transport.is_closing():
            request.response_complete = True
            return
        self.transport.write(head_of(response, close=not request.keep_alive) + response.body)
        request.response_complete = True
        if not request.keep_alive:
            self.transport.close()
        self.on_response_complete()


def head_of(response: Response, *, close: bool) -> bytes:
    """The head of an answer, up to and with the empty line.

    Every value was made by us or checked (`clean_request_id`): none can hold a line break.
    """
    lines = [_STATUS[response.status]]
    for name, value in response.headers:
        lines += (name, b": ", value, b"\r\n")
    if close:
        lines.append(b"connection: close\r\n")
    lines.append(b"\r\n")
    return b"".join(lines)


def protocol_of(app: IngressApp) -> Any:
    """What `uvicorn.Config(http=...)` takes: makes the protocol of a connection."""
    return functools.partial(DoorProtocol, app)
