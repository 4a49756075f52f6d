"""What was received and what of it is done: the position that is safe to store.

Items are done in any order (manual acknowledgement); the position follows the done ones from the front, so it
never passes one that is not. Whoever resumes from it gets everything that was not done, and perhaps some that
was.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from carillon_client.models import Position


@dataclass(eq=False)
class Entry:
    """One received item. `seq`, `rev` or `reset` say where the position goes once it is done."""

    seq: int | None = None
    rev: int | None = None
    reset: Position | None = None
    done: bool = False


class Ledger:
    """Keeps the order of what was received. Memory: the entries since the oldest one not done."""

    def __init__(self, position: Position | None) -> None:
        self._entries: deque[Entry] = deque()
        self._position = position

    @property
    def position(self) -> Position | None:
        """The position that is safe to store; None before the first WELCOME of a subscriber without one."""
        return self._position

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> Entry:
        """Something was received; a `done` one only moves the position."""
        self._entries.append(entry)
        self._advance()
        return entry

    def done(self, entry: Entry) -> None:
        """Something was processed. Twice is once."""
        entry.done = True
        self._advance()

    def _advance(self) -> None:
        while self._entries and self._entries[0].done:
            entry = self._entries.popleft()
            if entry.reset is not None:
                self._position = entry.reset
            elif self._position is not None:
                self._position = moved(self._position, entry.seq, entry.rev)


def moved(position: Position, seq: int | None, rev: int | None) -> Position:
    """The position after a notification's `seq` or a change's `rev`; it never goes back."""
    if seq is not None and seq > position.last_seq:
        position = _replace(position, seq, position.last_rev)
    if rev is not None and rev > (position.last_rev or 0):
        position = _replace(position, position.last_seq, rev)
    return position


def _replace(position: Position, seq: int, rev: int | None) -> Position:
    return Position(epoch=position.epoch, last_seq=seq, last_rev=rev)
