"""The queue of the background publisher: when a batch leaves, and what is in it. Pure.

Events of one user keep their order: while one is on its way, later ones of that user wait, so two requests in
flight never race. Events of different users overtake each other freely.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from carillon_client.core.delivery import BatchLimits, Item, item_bytes


class MicroBatcher:
    """Gathers items until a batch is worth sending.

    A batch may leave when there is a free flight and: it is full, or its oldest item waited `linger_s`, or a
    flush asks for everything.

    Args:
        linger_s: how long an item waits for company; 0: not at all.
        max_flights: requests at the same time.
    """

    def __init__(self, limits: BatchLimits, linger_s: float, max_flights: int) -> None:
        if linger_s < 0 or max_flights < 1:
            raise ValueError("expected linger_s >= 0 and max_flights >= 1")
        self._limits = limits
        self._linger_s = linger_s
        self._max_flights = max_flights
        self._ready: deque[tuple[float, Item]] = deque()
        self._ready_bytes = 0
        self._parked: dict[str, deque[tuple[float, Item]]] = {}
        self._busy: set[str] = set()
        self._flights = 0
        self._size = 0

    def __len__(self) -> int:
        """Items that have not been taken."""
        return self._size

    @property
    def flights(self) -> int:
        """Batches taken and not finished."""
        return self._flights

    def add(self, now: float, item: Item) -> None:
        """Queue an item. The bound is the caller's: it knows how to make its own callers wait."""
        self._size += 1
        if item.user in self._busy or item.user in self._parked:
            self._parked.setdefault(item.user, deque()).append((now, item))
        else:
            self._push(now, item)

    def _push(self, now: float, item: Item) -> None:
        self._ready.append((now, item))
        self._ready_bytes += item_bytes(item)

    def due_in_s(self, now: float, flush: bool = False) -> float | None:
        """Seconds until `take` will give something; 0: now; None: not before an `add` or a `finish`."""
        if not self._ready or self._flights >= self._max_flights:
            return None
        full = len(self._ready) >= self._limits.max_items or self._ready_bytes >= self._limits.max_bytes
        if flush or full:
            return 0.0
        return max(0.0, self._ready[0][0] + self._linger_s - now)

    def take(self, now: float, flush: bool = False) -> list[Item]:
        """The next batch, oldest first; empty if none is due. Every batch taken must be finished."""
        if self.due_in_s(now, flush) != 0.0:
            return []
        batch: list[Item] = []
        size = 2
        while self._ready and len(batch) < self._limits.max_items:
            item = self._ready[0][1]
            cost = item_bytes(item)
            if batch and size + cost > self._limits.max_bytes:
                break
            self._ready.popleft()
            self._ready_bytes -= cost
            batch.append(item)
            size += cost
        taken = {item.user for item in batch if item.user}
        # What was ready beyond the bound and belongs to a user who is now busy waits for the batch's end.
        if self._ready and any(item.user in taken for _, item in self._ready):
            left, self._ready, self._ready_bytes = self._ready, deque(), 0
            for since, item in left:
                if item.user in taken:
                    self._parked.setdefault(item.user, deque()).append((since, item))
                else:
                    self._push(since, item)
        self._busy |= taken
        self._size -= len(batch)
        self._flights += 1
        return batch

    def finish(self, batch: Sequence[Item]) -> None:
        """A batch that was taken is over: its users' next items may go."""
        self._flights -= 1
        freed: list[tuple[float, Item]] = []
        for user in {item.user for item in batch if item.user}:
            self._busy.discard(user)
            freed += self._parked.pop(user, ())
        if freed:
            # They have waited already: before what came later, oldest first.
            freed.sort(key=lambda entry: entry[0])
            self._ready.extendleft(reversed(freed))
            self._ready_bytes += sum(item_bytes(item) for _, item in freed)
