"""`GET /api/stream`: server-sent events (WHATWG HTML §9.2), the WebSocket's frames for who has only HTTP.

The door's protocol hands the socket over once the request was let in (serve/door.py). From then on it is one
more connection of its user's session: no task, no timer of its own, bytes straight to the transport, bounded
as a gateway bounds its sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
from collections.abc import Mapping
from typing import Final, NamedTuple

from actors.attached import NEVER, AttachedSocket, Phase
from actors.gateway_handshake import Encoding, position_of
from carillon.client_frames import ClientVisibility, check_id, visibility
from carillon.errors import InvalidInputError, UnauthenticatedError
from carillon.tokens import ClientIdentity
from serve.connections import Connection, Connections, Position
from serve.http import Header
from serve.services import Services

TCP_NOTSENT_LOWAT: Final = 25
"""linux/tcp.h; the socket module names it from Python 3.12 on."""
STREAM_HEADERS: Final[tuple[Header, ...]] = (
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect what is to arrive now
)
BEAT: Final = b":\n\n"


class Opening(NamedTuple):
    """A request for a stream that may be served."""

    who: ClientIdentity
    device: str | None
    position: Position | None
    told: ClientVisibility | None


async def who_asks(
    services: Services, authorization: bytes | None, query: Mapping[str, str]
) -> ClientIdentity:
    """The user of a request whose credentials may be in its URL: header, `?token=` or `?ticket=`.

    Raises:
        UnauthenticatedError, TokenExpiredError: there are none, or they are not valid.
        StoreUnavailableError: Postgres does not answer.
    """
    if authorization is None and "token" in query:
        authorization = b"Bearer " + query["token"].encode()
    elif authorization is None and "ticket" in query:
        who = await services.tickets.redeem(query["ticket"], services.clock.now_ms())
        if who is None:
            raise UnauthenticatedError("the ticket is unknown, used or too old")
        return who
    return await services.auth.client(authorization)


def asked_device(query: Mapping[str, str]) -> tuple[str | None, ClientVisibility | None]:
    """`deviceId`, and `state` with `viewing`. Raises InvalidInputError."""
    device = check_id(query["deviceId"], "deviceId") if "deviceId" in query else None
    # `viewing` alone is refused, as in a frame: passed over it would silence nothing, and nobody would know.
    return device, visibility(query) if "state" in query or "viewing" in query else None


def asked_position(query: Mapping[str, str], last_event_id: bytes | None) -> Position | None:
    """Where a stream goes on: header Last-Event-ID, `lastEventId`, or `epoch`, `lastSeq` and `lastRev`.

    Raises:
        InvalidInputError: it is none.
    """
    text = last_event_id.decode("latin-1") if last_event_id else query.get("lastEventId")
    if not text:
        return position_of(query)
    parts = text.rsplit(":", 2)
    if len(parts) != 3:
        raise InvalidInputError(
            "expected Last-Event-ID to be epoch:seq:rev", "Last-Event-ID", "epoch:seq:rev", text[:40]
        )
    return position_of(dict(zip(("epoch", "lastSeq", "lastRev"), parts, strict=True)))


async def open_stream(
    services: Services, headers: Mapping[bytes, bytes], query: Mapping[str, str]
) -> Opening:
    """Check a request for a stream.

    Raises:
        CarillonError: with the code of the problem to answer.
    """
    connections = services.connections
    assert connections is not None
    connections.check_room()
    device, told = asked_device(query)
    position = asked_position(query, headers.get(b"last-event-id"))
    who = await who_asks(services, headers.get(b"authorization"), query)
    connections.check_room()  # it may have filled meanwhile
    return Opening(who, device, position, told)


class EventStream(AttachedSocket, Connection, asyncio.Protocol):
    """One stream.

    Args:
        chunked: False for HTTP/1.0, where the end of the connection is the end of the body.
    """

    __slots__ = ("_chunked", "_connections", "_ends_at")

    def __init__(self, connections: Connections, *, chunked: bool) -> None:
        super().__init__(connections)
        self._connections = connections
        self._chunked = chunked
        self._ends_at = NEVER
        self.encoding = Encoding.PLAIN

    def begin(self, transport: asyncio.Transport, head: bytes, opening: Opening) -> None:
        """Answer the request and attach."""
        limits = self._connections.limits
        bound_unsent(transport, limits.low_buffer_bytes, limits.pong_timeout_s)
        self.connect(transport)
        transport.write(head)
        # How long an EventSource waits before it comes back: not all of a lost replica's at once.
        retry_ms = round(self._connections.retry_s * random.uniform(500, 1500))  # noqa: S311
        self._write(b"retry: %d\n\n" % retry_ms)
        self.beat_due = self._connections.loop.time() + limits.heartbeat_s * random.uniform(0.5, 1.0)  # noqa: S311
        self._connections.admit(self, *opening)
        # No client answers a heart-beat here, and the kernel of a frozen one goes on acknowledging for it:
        # only by coming back does it show that it is there.
        self._ends_at = self._connections.loop.time() + self._connections.life_s * random.uniform(0.8, 1.0)  # noqa: S311
        self.expires_at = min(self.expires_at, self._ends_at)
        self.reschedule()

    # -- asyncio --------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """asyncio: whatever follows the request is nothing to us."""

    def eof_received(self) -> None:
        """asyncio: the client has left; the transport closes itself."""

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the socket is gone."""
        self._over()
        self.phase = Phase.GONE
        self._transport = None
        self._connections.gone(self)

    # -- writing --------------------------------------------------------------------------------------

    def write_live(self, framed: bytes) -> None:
        """See `Attached.write_live`."""
        super().write_live(self._chunk(self._event(framed)))

    def write_replay(self, framed: bytes, page_end: bool) -> None:
        """See `Attached.write_replay`."""
        super().write_replay(self._chunk(self._event(framed)), page_end)

    def _event(self, frame: bytes) -> bytes:
        # JSON has no line break outside of strings and escapes those inside: one data line always suffices.
        if self.epoch is None:
            return b"data: %b\n\n" % frame
        return b"id: %b:%d:%d\ndata: %b\n\n" % (self.epoch.encode(), self.seq, self.rev or 0, frame)

    def _chunk(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(self._chunk(data))

    # -- ending ---------------------------------------------------------------------------------------

    def close(self, code: int, reason: str) -> None:
        """Tell why, and end the stream; a client that does not read it is cut off. Idempotent."""
        if self.phase is not Phase.OPEN:
            return
        self._connections.count_close(code)
        self._over()
        told = json.dumps({"type": "CLOSE", "code": code, "reason": reason}, separators=(",", ":"))
        self._write(b"event: close\ndata: %b\n\n" % told.encode())
        if self._transport is not None:
            if self._chunked:
                self._transport.write(b"0\r\n\r\n")
            self._transport.close()

    def _over(self) -> None:
        if self.phase is Phase.OPEN:
            self.phase = Phase.CLOSING
            self.due = self._connections.loop.time() + self._connections.limits.close_timeout_s
            self._connections.ended(self)
            self.held = None

    def look(self, now: float) -> None:
        """The sweep found `due` to have passed."""
        if self.phase is not Phase.OPEN:
            if self._transport is not None:
                self._transport.abort()
        elif now >= self._ends_at:
            self.close(4212, "come back to show that you are there")
        elif now >= self.expires_at:
            self.close(4101, "the token has expired")
        elif self.lost(now):
            self.close(4202, "no shard could be reached")
        else:
            if now >= self.beat_due:
                self.beat_due = now + self._connections.limits.heartbeat_s - self._connections.tick_s
                super().write_live(self._chunk(BEAT))
            if self.phase is Phase.OPEN:
                self.reschedule()


def bound_unsent(transport: asyncio.Transport, low_bytes: int, timeout_s: float) -> None:
    """Let what a slow reader leaves wait in our buffer, where it is seen and bounded, not in megabytes of
    kernel memory; and let the kernel give up a peer that acknowledges nothing for `timeout_s`: no answer to
    a heart-beat of a stream would tell."""
    found = transport.get_extra_info("socket")
    if found is None or found.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(found.fileno())) as same:
        same.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, low_bytes)
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(timeout_s * 1000)))
