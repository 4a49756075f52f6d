"""Lines of a stream that comes in pieces, in bounded memory. Pure."""

from __future__ import annotations

from typing import Final

TOO_LONG: Final = b""
"""Stands for a line that was too long; it is not kept. (Of blank lines nothing is told.)"""


class LineSplitter:
    """Cuts pieces of a stream into numbered lines.

    Args:
        longest: bytes of a line without its end; of a longer one nothing is kept but its number.

    Memory: at most `longest` bytes and one piece.
    """

    def __init__(self, longest: int) -> None:
        self.number = 0
        """Of the last line that ended, from 1."""
        self._longest = longest
        self._rest = b""
        self._skipping = False

    def feed(self, piece: bytes) -> list[tuple[int, bytes]]:
        """The lines that end in `piece`, with their numbers; blank ones are counted and left out."""
        *ended, rest = piece.split(b"\n")
        found: list[tuple[int, bytes]] = []
        for part in ended:
            self._end(self._rest + part if self._rest else part, found)
            self._rest = b""
        self._rest = rest if not self._rest else self._rest + rest
        if len(self._rest) > self._longest:
            self._skipping, self._rest = True, b""
        return found

    def finish(self) -> list[tuple[int, bytes]]:
        """The last line, if the stream ended without a line feed."""
        found: list[tuple[int, bytes]] = []
        if self._rest or self._skipping:
            self._end(self._rest, found)
            self._rest = b""
        return found

    def _end(self, line: bytes, found: list[tuple[int, bytes]]) -> None:
        self.number += 1
        line = line.strip(b" \t\r")
        if self._skipping or len(line) > self._longest:
            found.append((self.number, TOO_LONG))
        elif line:
            found.append((self.number, line))
        self._skipping = False
