"""Unread counts follow time: what expires leaves the count of those who are connected, and their replays.

Of each user only the next moment is known at which something unread expires; when it has come, the writer
counts anew, in turn with the user's changes. Users without a session wait until somebody comes.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable

from actors.shard_changes import AGAIN_MS, ChangeEntry
from actors.shard_users import User
from carillon.clock import Clock
from carillon.errors import CarillonError

MOST_S = 3600.0
"""Longest wait of the timer: the wall clock may be set meanwhile."""


class Expiry:
    """The moments at which something expires.

    Args:
        submit: gives a change to the writer.
    """

    def __init__(self, clock: Clock, submit: Callable[[ChangeEntry], None]) -> None:
        self._clock = clock
        self._submit = submit
        self._heap: list[tuple[int, int, User]] = []
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_ms = 0

    def watch(self, user: User, at_ms: int) -> None:
        """Something of a user expires at `at_ms`."""
        if user.next_expiry_ms is None or at_ms < user.next_expiry_ms:
            user.next_expiry_ms = at_ms
        if user.session is not None:
            self.attached(user)

    def attached(self, user: User) -> None:
        """Somebody of the user is there: be awake when the next one expires."""
        at_ms = user.next_expiry_ms
        if at_ms is None or (user.wakes_ms and user.wakes_ms <= at_ms):
            return
        user.wakes_ms = at_ms
        heapq.heappush(self._heap, (at_ms, next(self._order), user))
        self._arm()

    def count(self, user: User, then: Callable[[], None]) -> None:
        """Count anew, and then call `then`, whether that worked or not."""

        def done(answer: object) -> None:
            if isinstance(answer, CarillonError):
                user.next_expiry_ms = self._clock.now_ms() + AGAIN_MS
                if user.session is not None:
                    self.attached(user)
            then()

        self._submit(ChangeEntry(user, "expire", [], None, False, done))

    def _arm(self) -> None:
        if not self._heap:
            return
        at_ms = self._heap[0][0]
        if self._timer is not None:
            if self._wakes_ms <= at_ms:
                return
            self._timer.cancel()
        self._wakes_ms = at_ms
        wait_s = min(max(0.0, (at_ms - self._clock.now_ms()) / 1000), MOST_S)
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now_ms = self._clock.now_ms()
        while self._heap and self._heap[0][0] <= now_ms:
            at_ms, _, user = heapq.heappop(self._heap)
            if user.wakes_ms != at_ms:
                continue  # an earlier moment came in between, and this one will be found again
            user.wakes_ms = 0
            if user.session is not None:
                self.count(user, _nothing)
        self._arm()

    def close(self) -> None:
        """Stop."""
        if self._timer is not None:
            self._timer.cancel()
        self._heap.clear()


def _nothing() -> None:
    """Nobody waits."""
