"""RFC 6455 by hand: frames as a client should never send them, and a reader that takes only what is right."""

from __future__ import annotations

import asyncio
import base64
import os
from dataclasses import dataclass, field

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
CONT = 0


def frame(
    payload: bytes,
    opcode: int = TEXT,
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bytes | None = b"\x12\x34\x56\x78",
    length: int | None = None,
    size_bytes: int | None = None,
) -> bytes:
    """One frame.

    Args:
        rsv: the three reserved bits (0-7).
        mask: None sends it unmasked.
        length: what the head says; None: the truth.
        size_bytes: 0, 2 or 8 bytes of extended length; None: as few as it takes.
    """
    told = len(payload) if length is None else length
    if size_bytes is None:
        size_bytes = 0 if told < 126 else 2 if told < 65_536 else 8
    head = bytearray(((0x80 if fin else 0) | rsv << 4 | opcode,))
    bit = 0 if mask is None else 0x80
    head.append(bit | (told if size_bytes == 0 else 126 if size_bytes == 2 else 127))
    if size_bytes:
        head += told.to_bytes(size_bytes, "big")
    if mask is None:
        return bytes(head) + payload
    masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
    return bytes(head) + mask + masked


def request(path: str, *headers: str, method: str = "GET", version: str = "HTTP/1.1") -> bytes:
    """An upgrade request with the headers it needs, and `headers` behind them."""
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        f"{method} {path} {version}", "Host: localhost", "Upgrade: websocket", "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", *headers,
    ]  # fmt: skip
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape")


@dataclass
class Heard:
    """What a server said on one connection.

    Attributes:
        status: of its HTTP answer; 0: it said nothing.
        messages: text and binary messages.
        pongs: payloads.
        code: of its close frame; None: it sent none.
        ended: it closed its side.
    """

    status: int = 0
    messages: list[bytes] = field(default_factory=list)
    pongs: list[bytes] = field(default_factory=list)
    pings: int = 0
    code: int | None = None
    ended: bool = False


class ServerError(AssertionError):
    """The server said what no server may say."""


class Reader:
    """Takes a server's bytes in any pieces; everything RFC 6455 asks of a server's frames is asked here."""

    def __init__(self) -> None:
        self.heard = Heard()
        self.closed = asyncio.Event()
        """A close frame came, or the end."""
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Take bytes. Raises ServerError."""
        self._buffer += data
        if not self.heard.status and not self._head():
            return
        if self.heard.status == 101:
            while self._frame():
                pass

    def _head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        line = bytes(self._buffer[: self._buffer.find(b"\r\n")])
        if not line.startswith(b"HTTP/1.1 ") or not line[9:12].isdigit():
            raise ServerError(f"not an answer: {line!r}")
        self.heard.status = int(line[9:12])
        del self._buffer[: end + 4]
        return True

    def _frame(self) -> bool:
        buffer = self._buffer
        if len(buffer) < 2:
            return False
        first, length, at = buffer[0], buffer[1], 2
        if length & 0x80:
            raise ServerError("a masked frame")
        if length > 125:
            size = 2 if length == 126 else 8
            if len(buffer) < 2 + size:
                return False
            length, at = int.from_bytes(buffer[2 : 2 + size], "big"), 2 + size
            if length < (126 if size == 2 else 65_536):
                raise ServerError("a length that is longer than it need be")
        if len(buffer) < at + length:
            return False
        payload = bytes(buffer[at : at + length])
        del buffer[: at + length]
        self._take(first, payload)
        return True

    def _take(self, first: int, payload: bytes) -> None:
        heard = self.heard
        if heard.code is not None:
            raise ServerError(f"a frame behind the close frame: {first:#x}")
        if first & 0x70 or not first & 0x80:
            raise ServerError(f"reserved bits or a fragment: {first:#x}")
        opcode = first & 0x0F
        if opcode == CLOSE:
            self.closed.set()
            if len(payload) < 2:
                heard.code = 1005
                return
            payload[2:].decode()
            heard.code = int.from_bytes(payload[:2], "big")
        elif opcode == PONG:
            heard.pongs.append(payload)
        elif opcode == PING:
            heard.pings += 1
        elif opcode in (TEXT, BINARY):
            if opcode == TEXT:
                payload.decode()
            heard.messages.append(payload)
        else:
            raise ServerError(f"opcode {opcode}")
