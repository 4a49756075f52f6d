"""Identifiers: UUIDv7 (RFC 9562 §5.7), slots, and the key of a session."""

from __future__ import annotations

import os
import zlib
from typing import Final, NamedTuple

SLOTS: Final = 1024
"""Number of slots. Fixed: it is part of the mapping of users to shards, on every node and for ever."""


class UserKey(NamedTuple):
    """Names a user. A pair, never a joined string: tenant "a:b" and user "c" is not "a" and "b:c"."""

    tenant: str
    user: str


def slot_of(tenant: str, user: str) -> int:
    """The slot (0..1023) in which the events, sockets and timers of a user meet."""
    return zlib.crc32(f"{tenant}:{user}".encode()) % SLOTS


class Uuid7Source:
    """Makes UUIDv7 ids as 16 raw bytes, strictly increasing within one process.

    The 12 bits after the version count ids of one millisecond (RFC 9562 §6.2 method 1); a burst that
    exhausts them borrows the next millisecond.
    """

    def __init__(self) -> None:
        self._last = 0  # (milliseconds << 12) | counter
        self._pool = b""
        self._at = 0

    def next(self, now_ms: int) -> bytes:
        """Return the next id for wall time `now_ms` (milliseconds since the epoch)."""
        stamp = now_ms << 12
        if stamp <= self._last:
            stamp = self._last + 1
        self._last = stamp
        if self._at >= len(self._pool):
            self._pool = os.urandom(2048)  # one system call for 256 ids
            self._at = 0
        rand = int.from_bytes(self._pool[self._at : self._at + 8], "big") & 0x3FFF_FFFF_FFFF_FFFF
        self._at += 8
        ms, counter = stamp >> 12, stamp & 0xFFF
        value = (ms << 80) | (0x7 << 76) | (counter << 64) | (0b10 << 62) | rand
        return value.to_bytes(16, "big")


def uuid_text(raw: bytes) -> str:
    """Canonical text ("018f...-....") of 16 raw bytes."""
    h = raw.hex()
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"


def parse_uuid(text: str) -> bytes | None:
    """The 16 raw bytes of a canonical UUID text of any version, or None if it is not one."""
    if len(text) != 36 or text[8] != "-" or text[13] != "-" or text[18] != "-" or text[23] != "-":
        return None
    digits = text.replace("-", "")
    if len(digits) != 32 or not digits.isascii() or not digits.isalnum():
        return None
    try:
        return bytes.fromhex(digits)
    except ValueError:
        return None


def uuid7_ms(raw: bytes) -> int:
    """The wall time in milliseconds that a UUIDv7 carries."""
    return int.from_bytes(raw[:6], "big")


def least_uuid7(now_ms: int) -> bytes:
    """What no UUIDv7 of wall time `now_ms` (milliseconds) or later is less than."""
    return max(0, now_ms).to_bytes(6, "big") + bytes(10)
