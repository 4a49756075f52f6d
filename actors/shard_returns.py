"""Rows whose push nobody took: back to the outbox at once, without using up a try.

A lease ends only after tens of seconds, and a row claimed again counts one more try: a provider's bad minute
would delay pushes and fill dead letters. Messages that are lost cost nothing but that: the lease still ends.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from carillon.clock import Clock
from carillon.errors import CarillonError, FencedError
from carillon.outbox import Pauses
from carillon.settings import PushSettings
from stores.postgres.shard_rows import ReleaseRow
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)


class Returns:
    """Releases claimed rows, many in one statement.

    Args:
        term: the shard's present term.
        released: called with the rows after the commit.
        fenced: called when the term turns out to be over.
    """

    def __init__(
        self,
        store: ShardStore,
        clock: Clock,
        settings: PushSettings,
        *,
        term: Callable[[], int],
        released: Callable[[list[ReleaseRow]], None],
        fenced: Callable[[], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._term = term
        self._released = released
        self._fenced = fenced
        self._pauses = Pauses(settings.left_pause_s, settings.left_pause_max_s, settings.left_per_s)
        self._rows: list[ReleaseRow] = []
        self._task: asyncio.Task[None] | None = None

    def due_ms(self, provider: str, count: int) -> list[int]:
        """When rows that are handed back now are due again."""
        return self._pauses.due_ms(provider, count, self._clock.now_ms(), random.random)

    def took(self, provider: str) -> None:
        """The provider takes pushes (again)."""
        self._pauses.took(provider)

    def add(self, rows: list[ReleaseRow]) -> None:
        """Release these rows, with all others that come in this turn of the loop."""
        self._rows += rows
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._release())

    async def _release(self) -> None:
        while self._rows:
            rows, self._rows = self._rows, []
            try:
                await self._store.release(self._term(), rows, self._clock.now_ms())
            except FencedError:
                self._fenced()
            except CarillonError as exc:
                log.info("%d pushes wait for their lease to end: %s", len(rows), exc)
            except Exception:
                log.exception("releasing %d rows failed", len(rows))
            else:
                self._released(rows)

    async def close(self) -> None:
        """Stop; what is not released has its lease."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
