"""A lean HTTP/1.1 client and WebSocket receiver: raw asyncio protocols, bytes in, bytes out.

The load generator shares its cores with the system it measures, so what it spends per event is measured as
if it were the system's. A general client (httpx, websockets) costs 10 to 100 times more per event than this.
Only what Carillon sends is understood; anything else is an error, never a guess.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import ssl
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlsplit

from benchmarks.ledger import Device

now = time.perf_counter
"""Monotonic seconds. CLOCK_MONOTONIC on Linux, hence comparable between processes of one machine."""


class Door(NamedTuple):
    """Where an HTTP or WebSocket server listens."""

    host: str
    port: int
    path: str
    tls: ssl.SSLContext | None = None

    @classmethod
    def of(cls, url: str, ca_file: str | None = None) -> Door:
        """Parse a URL; https and wss trust `ca_file` (None: the system's)."""
        parts = urlsplit(url)
        secure = parts.scheme in {"https", "wss"}
        context = ssl.create_default_context(cafile=ca_file) if secure else None
        port = parts.port or (443 if secure else 80)
        return cls(parts.hostname or "127.0.0.1", port, parts.path.rstrip("/"), context)


class Response(NamedTuple):
    """An answer and when its last byte was read (monotonic seconds)."""

    status: int
    body: bytes
    at: float
    headers: bytes = b""

    def json(self) -> Any:
        """The decoded body."""
        return json.loads(self.body)


def http_request(door: Door, method: str, path: str, body: bytes = b"", bearer: str = "") -> bytes:
    """The bytes of one request; build them before the clock starts."""
    lines = [f"{method} {door.path}{path} HTTP/1.1", f"Host: {door.host}:{door.port}"]
    if bearer:
        lines.append(f"Authorization: Bearer {bearer}")
    if body:
        lines.append("Content-Type: application/json")
    if body or method in {"POST", "PUT", "PATCH"}:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class HttpConnection(asyncio.Protocol):
    """One keep-alive connection, one request at a time; dials again by itself when it was closed."""

    def __init__(self, door: Door, timeout_s: float = 20.0) -> None:
        self.door = door
        self.timeout_s = timeout_s
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Response] | None = None
        self._buffer = b""

    async def request(self, data: bytes) -> Response:
        """Send prebuilt bytes and wait for the answer.

        Raises:
            ConnectionError: the connection was lost before the whole answer; the request may have run.
            TimeoutError: no answer within `timeout_s`; likewise, and the connection is dropped.
        """
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            await loop.create_connection(lambda: self, self.door.host, self.door.port, ssl=self.door.tls)
        assert self._transport is not None
        self._answer = loop.create_future()
        self._buffer = b""
        timer = loop.call_later(self.timeout_s, self._expire)
        self._transport.write(data)
        try:
            return await self._answer
        finally:
            timer.cancel()
            self._answer = None

    def close(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.abort()

    def _expire(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(TimeoutError(f"no answer within {self.timeout_s} s"))
            self.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._buffer:
            data = self._buffer + data
        response = parse_response(data)
        if response is None:
            self._buffer = data
            return
        self._buffer = b""
        if b"\r\nconnection: close" in response.headers and self._transport is not None:
            self._transport.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(response)


def parse_response(data: bytes) -> Response | None:
    """Parse one whole HTTP/1.1 response; None if more bytes are needed.

    Raises:
        ConnectionError: the bytes are no response of a known length.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    headers = data[:end].lower()
    status = int(data[9:12])
    mark = headers.find(b"\r\ncontent-length:")
    if mark >= 0:
        stop = headers.find(b"\r\n", mark + 17)
        length = int(headers[mark + 17 : stop if stop >= 0 else end])
        if len(data) < end + 4 + length:
            return None
        return Response(status, data[end + 4 : end + 4 + length], now(), headers)
    if b"\r\ntransfer-encoding: chunked" in headers:
        body = _unchunk(data, end + 4)
        return None if body is None else Response(status, body, now(), headers)
    if status in {204, 304}:
        return Response(status, b"", now(), headers)
    raise ConnectionError("expected Content-Length or chunked in the response")


def _unchunk(data: bytes, at: int) -> bytes | None:
    parts: list[bytes] = []
    while True:
        stop = data.find(b"\r\n", at)
        if stop < 0:
            return None
        size = int(data[at:stop].split(b";")[0], 16)
        if len(data) < stop + 2 + size + 2:
            return None
        if size == 0:
            return b"".join(parts)
        parts.append(data[stop + 2 : stop + 2 + size])
        at = stop + 2 + size + 2


async def get_json(door: Door, path: str, bearer: str = "") -> Any:
    """GET a JSON document on a connection of its own (set-up and checks, never the hot path).

    Raises:
        ConnectionError: no connection, or an answer other than 200.
    """
    connection = HttpConnection(door)
    try:
        response = await connection.request(http_request(door, "GET", path, bearer=bearer))
    finally:
        connection.close()
    if response.status != 200:
        raise ConnectionError(f"GET {path} answered {response.status}: {response.body[:200]!r}")
    return response.json()


# ---------------------------------------------------------------------------------------------------
# WebSocket

_NEW: Final = b'{"type":"NEW_NOTIFICATION","notification":{"id":"'
_SEQ: Final = b'","seq":'
_ID_AT: Final = len(_NEW)
_SEQ_AT: Final = _ID_AT + 36
_NUMBER_AT: Final = _SEQ_AT + len(_SEQ)


def masked_frame(opcode: int, payload: bytes) -> bytes:
    """A client frame (RFC 6455 §5.2) of at most 65,535 bytes, masked with zero.

    A mask of zero is valid for the receiver; its randomness protects caches from hostile pages, which a load
    generator is not, and zero costs no XOR.
    """
    if len(payload) < 126:
        return bytes((0x80 | opcode, 0x80 | len(payload))) + b"\0\0\0\0" + payload
    return bytes((0x80 | opcode, 0xFE)) + len(payload).to_bytes(2, "big") + b"\0\0\0\0" + payload


class Receiver(asyncio.Protocol):
    """One device of a user: connects, receives, acknowledges, and resumes like a client when it is closed.

    Args:
        door: the gateway.
        user: the user id; `device` collects the receipts.
        token: the user's JWT.
        device_id: `?deviceId=`.
        ack: False never acknowledges (as if the user's screen was gone).
        tells: it tells that its screen is looked at; False: nothing about that, ever.
    """

    def __init__(
        self, door: Door, user: str, token: str, device_id: str, ack: bool = True, tells: bool = True
    ) -> None:
        self.door = door
        self.device = Device(user)
        self.ack = ack
        self._first = b'{"type":"VISIBILITY","state":"focused"}' if tells else b'{"type":"PING"}'
        self.on_receipt: Callable[[float, bytes, int], None] | None = None
        """Called for each notification, after it was recorded."""
        self.on_lost: Callable[[Receiver], None] | None = None
        """Called when the connection is gone without `close()`."""
        self.welcome_at = 0.0
        """Monotonic seconds of this connection's WELCOME; 0 before it."""
        self.close_code = 0
        """1006 if the connection went away without a close frame."""
        self.reconnects = 0
        self.other_frames = 0
        self.errors: list[str] = []
        self._token = token
        self._device_id = device_id
        self._transport: asyncio.Transport | None = None
        self._welcome: asyncio.Future[None] | None = None
        self._open = False
        self._closing = False
        self._tail = b""
        self._seq = 0
        self._acked = 0
        self._epoch = ""

    async def connect(self, timeout_s: float = 30.0) -> None:
        """Dial and wait for WELCOME; a position from before is resumed.

        Raises:
            ConnectionError: refused, or closed before WELCOME (`close_code` tells how).
            TimeoutError: no WELCOME within `timeout_s`.
        """
        loop = asyncio.get_running_loop()
        self.welcome_at, self.close_code, self._open, self._tail = 0.0, 0, False, b""
        self._closing = False
        self._welcome = loop.create_future()
        try:
            async with asyncio.timeout(timeout_s):
                await loop.create_connection(lambda: self, self.door.host, self.door.port, ssl=self.door.tls)
                await self._welcome
        except TimeoutError:
            self._abort_transport()
            raise

    async def redial(self, rng: random.Random, deadline: float = math.inf) -> bool:
        """Dial until WELCOME, as protocol.md asks of a client: jittered back-off, position resumed.

        Returns:
            False if the close code says stop (4001 to 4101), or `deadline` (monotonic seconds) passed.
        """
        wait_s = 0.25
        while not 4001 <= self.close_code <= 4101 and now() < deadline:
            await asyncio.sleep(rng.uniform(0, wait_s))
            self.reconnects += 1
            try:
                await self.connect(timeout_s=max(0.1, min(30.0, deadline - now())))
            except (OSError, TimeoutError):
                wait_s = min(5.0, wait_s * 2)
                continue
            return True
        return False

    def close(self) -> None:
        """Close like a page that is left on purpose (1000)."""
        self._closing = True
        if self._transport is not None and not self._transport.is_closing():
            self.acknowledge()
            self._transport.write(masked_frame(8, b"\x03\xe8"))
            self._transport.close()

    def drop(self) -> None:
        """Lose the connection without a word; what happens next is `on_lost`'s business."""
        self._abort_transport()

    def acknowledge(self) -> None:
        """Send one cumulative ACK if something arrived since the last."""
        if self._seq > self._acked and self.ack and self._transport is not None:
            self._acked = self._seq
            self._transport.write(masked_frame(1, b'{"type":"ACK","seq":%d}' % self._seq))

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = transport  # type: ignore[assignment]
        query = f"deviceId={quote(self._device_id)}"
        if self._epoch:
            query += f"&epoch={quote(self._epoch)}&lastSeq={self._seq}"
        path = self.door.path or "/ws"
        self._transport.write(  # type: ignore[union-attr]
            f"GET {path}?{query} HTTP/1.1\r\nHost: {self.door.host}:{self.door.port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: Y2FyaWxsb24tYmVuY2gtMQ==\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: carillon.v1.json\r\n"
            f"Authorization: Bearer {self._token}\r\n\r\n".encode()
        )

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._transport = None
        self.close_code = self.close_code or 1006
        if self._welcome is not None and not self._welcome.done():
            why = f"; {self.errors[-1]}" if self.errors else ""
            self._welcome.set_exception(
                ConnectionResetError(f"closed with {self.close_code} before WELCOME{why}")
            )
        elif self.welcome_at and not self._closing and self.on_lost is not None:
            self.on_lost(self)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        at = now()
        if self._tail:
            data = self._tail + data
            self._tail = b""
        if not self._open:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._tail = data
                return
            if not data.startswith(b"HTTP/1.1 101"):
                self.errors.append(f"handshake: {data[:120]!r}")
                self._abort_transport()
                return
            self._open = True
            data = data[end + 4 :]
        offset, size = 0, len(data)
        while size - offset >= 2:
            length = data[offset + 1]
            start = offset + 2
            if length == 126:
                start += 2
                if size < start:
                    break
                length = int.from_bytes(data[offset + 2 : start], "big")
            elif length == 127:
                start += 8
                if size < start:
                    break
                length = int.from_bytes(data[offset + 2 : start], "big")
            elif length > 127:
                self.errors.append("the server sent a masked frame")
                self._abort_transport()
                return
            end = start + length
            if end > size:
                break
            first = data[offset]
            if first == 0x81:
                if data.startswith(_NEW, start) and data.startswith(_SEQ, start + _SEQ_AT):
                    number = start + _NUMBER_AT
                    self._receive(
                        at,
                        data[start + _ID_AT : start + _SEQ_AT],
                        int(data[number : data.index(b",", number)]),
                    )
                else:
                    self._text(at, data[start:end])
            else:
                self._control(first, data[start:end])
            offset = end
        if offset < size:
            self._tail = data[offset:]

    def _receive(self, at: float, notification: bytes, seq: int) -> None:
        self.device.receipts.append((at, notification, seq))
        if seq > self._seq:
            self._seq = seq
        if self.on_receipt is not None:
            self.on_receipt(at, notification, seq)

    def _text(self, at: float, payload: bytes) -> None:
        """Frames that are rare, or a NEW_NOTIFICATION whose keys come in another order."""
        frame = json.loads(payload)
        kind = frame.get("type")
        if kind == "NEW_NOTIFICATION":
            note = frame["notification"]
            self._receive(at, note["id"].encode(), note["seq"])
        elif kind == "WELCOME":
            resuming = bool(self._epoch)
            if not self.welcome_at:
                self.welcome_at = at
                if not resuming and self._transport is not None:
                    # Any first frame that is not RESUME ends the shard's wait for one.
                    self._transport.write(masked_frame(1, self._first))
                if self._welcome is not None and not self._welcome.done():
                    self._welcome.set_result(None)
            if frame.get("recovered") is False and resuming:
                self.errors.append("resume was answered recovered:false")
            self._epoch = frame.get("epoch") or self._epoch
        elif kind == "ERROR":
            self.errors.append(payload.decode()[:200])
        else:
            self.other_frames += 1

    def _control(self, first: int, payload: bytes) -> None:
        assert self._transport is not None
        if first == 0x89:
            self._transport.write(masked_frame(10, payload))
        elif first == 0x88:
            self.close_code = int.from_bytes(payload[:2], "big") if len(payload) >= 2 else 1005
            if not self._transport.is_closing():
                self._transport.write(masked_frame(8, payload[:2]))
                self._transport.close()
        elif first != 0x8A:
            self.errors.append(f"unexpected frame 0x{first:02x}")
            self._abort_transport()

    def _abort_transport(self) -> None:
        if self._transport is not None:
            self._transport.abort()
