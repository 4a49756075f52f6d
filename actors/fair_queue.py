"""A queue that is fair to tenants: whoever sends much waits behind itself, nobody else does.

While what waits is of one tenant, this is a deque and one comparison more. As soon as a second one has
something waiting, each has a line of its own and a batch takes from all of them in turns, so that an event
waits for about one batch of others, however long another tenant's line is. Within a line, hence for a user,
order is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Lines by tenant. Not bounded: its owner asks how long it is."""

    __slots__ = ("_lines", "line", "rest", "tenant")

    def __init__(self) -> None:
        self.tenant = ""
        self.line: deque[T] = deque()
        """Of `tenant`: whoever has another entry of it may append it here."""
        self.rest = 0
        """Entries in other lines."""
        self._lines: dict[str, deque[T]] = {}  # while several wait: all lines, in the order of their turns

    def __len__(self) -> int:
        return len(self.line) + self.rest

    def waiting(self, tenant: str) -> int:
        """How many entries of a tenant wait."""
        if tenant == self.tenant:
            return len(self.line)
        line = self._lines.get(tenant)
        return 0 if line is None else len(line)

    def append(self, tenant: str, entry: T) -> None:
        """Queue at the end of the tenant's line."""
        if tenant == self.tenant:
            self.line.append(entry)
        elif not self.line:
            self.tenant = tenant
            self.line.append(entry)
        else:
            self._lines.setdefault(self.tenant, self.line)
            self._lines.setdefault(tenant, deque()).append(entry)
            self.rest += 1

    def take(self, most: int) -> list[T]:
        """The next batch: for each tenant its share, and what others leave of theirs."""
        lines = self._lines
        if not lines:
            line = self.line
            return [line.popleft() for _ in range(min(len(line), most))]
        taken: list[T] = []
        while lines and len(taken) < most:
            share = max(1, (most - len(taken)) // len(lines))
            for tenant in list(lines):
                count = min(share, most - len(taken))
                if not count:
                    break
                line = lines.pop(tenant)
                taken += [line.popleft() for _ in range(min(count, len(line)))]
                if line:
                    lines[tenant] = line  # behind those that had no turn yet
        self._settle()
        return taken

    def _settle(self) -> None:
        """Choose whose line is at hand, and count the others; a single one needs no turns."""
        lines = self._lines
        if self.tenant not in lines:
            self.tenant, self.line = next(iter(lines.items()), ("", deque[T]()))
        if len(lines) < 2:
            lines.clear()
        self.rest = sum(map(len, lines.values())) - len(self.line) if lines else 0

    def drained(self) -> Iterator[T]:
        """Take everything."""
        while batch := self.take(1000):
            yield from batch
