"""The lane of a shard's writer: batches that are appended when no single event waits.

Used for users of a broadcast who are connected: their notifications go the way of every event, for their
sessions hear of commits in order.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

from actors.shard_users import User, UserCache
from carillon.broadcasts import lane_turn
from carillon.clock import Clock
from carillon.errors import CarillonError
from carillon.ids import UserKey
from carillon.messages import Event, Outcome

E = TypeVar("E")
Guard = Callable[[Sequence[E], Any], Awaitable[None]]
"""Called with what is to be appended and the connection, first in the transaction; raising ends that."""


class LaneBatch(Generic[E]):
    """One batch that waits."""

    __slots__ = ("entries", "guard", "most_ms", "since")

    def __init__(self, entries: list[E], guard: Guard[E], since: float, most_ms: float) -> None:
        self.entries = entries
        self.guard = guard
        self.since = since
        self.most_ms = most_ms


class Lane(Generic[E]):
    """Batches that wait behind single events.

    Bound: its caller waits for each batch before it brings the next.

    Args:
        make: an entry of the writer for an event and what gets its outcome.
        wake: wakes the writer.
    """

    def __init__(
        self,
        users: UserCache,
        clock: Clock,
        make: Callable[[Event, Callable[[Outcome], None]], E],
        wake: Callable[[], None],
    ) -> None:
        self._users = users
        self._clock = clock
        self._make = make
        self._wake = wake
        self._batches: deque[LaneBatch[E]] = deque()

    def __len__(self) -> int:
        return len(self._batches)

    def take(self, queued: int) -> LaneBatch[E] | None:
        """The next batch, if it is its turn.

        Args:
            queued: single events that wait.
        """
        first = self._batches[0]
        waited_ms = (self._clock.monotonic() - first.since) * 1000
        return self._batches.popleft() if lane_turn(queued, waited_ms, first.most_ms) else None

    def drained(self) -> list[E]:
        """Everything that waits; the writer ends."""
        entries = [entry for batch in self._batches for entry in batch.entries]
        self._batches.clear()
        return entries

    async def write(self, events: Sequence[Event], guard: Guard[E], most_ms: float) -> list[Outcome]:
        """Append events when it is their turn; the outcome of each, after the commit.

        Args:
            most_ms: longest wait behind single events.
        """
        loop = asyncio.get_running_loop()
        outcomes: list[Any] = [None] * len(events)
        ended: asyncio.Future[None] = loop.create_future()
        left = len(events)

        def done(index: int, outcome: Outcome) -> None:
            nonlocal left
            outcomes[index] = outcome
            left -= 1
            if not left and not ended.done():
                ended.set_result(None)

        users = await asyncio.gather(*(self._load(event) for event in events))
        entries: list[E] = []
        for index, (event, user) in enumerate(zip(events, users, strict=True)):
            if isinstance(user, CarillonError):
                done(index, Outcome(event.id, status="failed", code=user.code, detail=str(user)))
                continue
            entry: Any = self._make(event, lambda outcome, index=index: done(index, outcome))
            entry.user = user  # its pin was taken with the load
            entries.append(entry)
        if entries:
            self._batches.append(LaneBatch(entries, guard, self._clock.monotonic(), most_ms))
            self._wake()
        await ended
        return outcomes

    def _load(self, event: Event) -> asyncio.Future[User | CarillonError]:
        found: asyncio.Future[User | CarillonError] = asyncio.get_running_loop().create_future()
        key = UserKey(event.tenant, event.user)

        def loaded(user: User | None, error: CarillonError | None) -> None:
            if found.done():
                return  # the shard stops
            if user is not None:
                user.pins += 1
            found.set_result(error if user is None else user)  # type: ignore[arg-type]

        known = self._users.ready(key)
        if known is not None:
            loaded(known, None)
        else:
            self._users.when_loaded(key, event.slot, loaded)
        return found
