"""Dead letters that are tried again: by the owner of their user, like every write.

A replay is a state that is set, not a step that is made: told twice, with the same time, it happens once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from actors.link import Link
from carillon.clock import Clock
from carillon.errors import CarillonError, FencedError, NotOwnerError, StoreUnavailableError
from carillon.messages import Replay, ReplayResult
from stores.postgres.shard_rows import ReplayRow
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)

BATCH = 1000
"""Dead letters of one statement."""


class Replays:
    """Puts dead rows back into the outbox, those of many requests in one statement.

    Args:
        term, owns: as in `Writer`.
        due_now: called after a commit: rows are due.
        fenced: called when the term turns out to be over.
    """

    def __init__(
        self,
        store: ShardStore,
        clock: Clock,
        *,
        term: Callable[[], int],
        owns: Callable[[int], bool],
        due_now: Callable[[], None],
        fenced: Callable[[], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._term = term
        self._owns = owns
        self._due_now = due_now
        self._fenced = fenced
        self._waiting: list[tuple[Link, int, Replay]] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, link: Link, request: int, message: Replay) -> None:
        """Take a request; it is answered after the commit."""
        self._waiting.append((link, request, message))
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while self._waiting:
            batch: list[tuple[Link, int, Replay]] = []
            size = 0
            while self._waiting and size < BATCH:
                entry = self._waiting.pop(0)
                if not self._owns(entry[2].slot):
                    entry[0].fail_nowait(entry[1], NotOwnerError(f"slot {entry[2].slot} is not here"))
                    continue
                batch.append(entry)
                size += len(entry[2].deliveries)
            if batch:
                await self._replay(batch)

    async def _replay(self, batch: list[tuple[Link, int, Replay]]) -> None:
        rows = [ReplayRow(d, m.tenant, m.slot, m.asked_ms) for _, _, m in batch for d in m.deliveries]
        try:
            done = await self._store.replay(self._term(), rows, self._clock.now_ms())
        except CarillonError as exc:
            told: CarillonError = exc
            if isinstance(exc, FencedError):
                self._fenced()
                told = NotOwnerError(str(exc))
        except Exception as exc:
            log.exception("replaying %d dead letters failed", len(rows))
            told = StoreUnavailableError(type(exc).__name__)
        else:
            for link, request, message in batch:
                found = [done[d] for d in dict.fromkeys(message.deliveries) if d in done]
                link.reply_nowait(request, ReplayResult(sum(found), len(found) - sum(found)))
            self._due_now()
            return
        for link, request, _ in batch:
            link.fail_nowait(request, told)

    async def close(self) -> None:
        """Stop; whoever waits is told by the link that closes."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
