"""Pushes that wait for an acknowledgement and are no rows of the outbox yet (docs/adr/0016-kept-pushes.md).

A push of a user who is there is written into its notification's row, and remembered here. An acknowledgement
ends it there, by the statement that sets deliveredAt. Whatever else concerns it makes it a row of the outbox
first: its time, a change by the user or the service, a merge. What a process that died remembered is found by
its successor: notifications behind a mark, which follows the oldest that waits, are looked through once.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

from carillon.attention import ACKNOWLEDGED, SILENT
from carillon.clock import Clock
from carillon.errors import FencedError
from carillon.ids import least_uuid7, uuid7_ms
from carillon.kept_push import ACKNOWLEDGED_MARK, KeptPush
from carillon.metrics import Stats
from carillon.settings import ShardSettings
from stores.postgres.shard_rows import SignalRow
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)

WRITTEN = 500
"""Kept pushes that become rows of the outbox by one statement."""


class KeptPushes:
    """Kept pushes of one shard.

    Attributes:
        debt: slots whose former owners may have kept pushes that were not looked for yet.
    """

    def __init__(
        self,
        store: ShardStore,
        clock: Clock,
        stats: Stats,
        settings: ShardSettings,
        *,
        term: Callable[[], int],
        owns: Callable[[int], bool],
    ) -> None:
        self._store = store
        self._clock = clock
        self._stats = stats
        self._settings = settings
        self._term = term
        self._owns = owns
        self._again: set[bytes] = set()  # of which a row of the outbox may exist
        self._rows: dict[bytes, KeptPush] = {}
        self._streams: dict[int, set[bytes]] = {}
        # As they were planned, mostly by rising time: no heap of what is ended in a second, as nearly all is.
        self._planned: deque[tuple[int, bytes]] = deque()
        self._unordered: list[tuple[int, bytes]] = []  # heap: due before one that was planned earlier
        self._due: list[tuple[int, bytes]] = []  # heap, of the others; in all three, what moved on is skipped
        self._mark: bytes | None = None
        self._marked_at = float("-inf")
        self._unsure: list[Sequence[KeptPush]] = []  # of batches that may or may not be committed
        self._lock = asyncio.Lock()  # what is written of one push is written in order
        self._adopting = asyncio.Lock()
        self.debt: set[int] = set()

    def __len__(self) -> int:
        return len(self._rows)

    # -- what is kept -----------------------------------------------------------------------------------

    def may_keep(self, notification: bytes, slot: int) -> bool:
        """Whether a push may be kept. Not what is older than the mark: nobody would look for it there."""
        mark = self._mark
        return (
            mark is not None
            and notification > mark
            and slot not in self.debt
            and len(self._unsure) <= 1  # that of the batch under way
            and len(self._rows) < self._settings.max_kept_pushes
        )

    def begin(self) -> list[KeptPush]:
        """A batch is planned: what is added to the answer holds the mark until it is `noted`, or `sure`."""
        pushes: list[KeptPush] = []
        self._unsure.append(pushes)
        return pushes

    def noted(self, pushes: Iterable[KeptPush]) -> None:
        """The batch that began last is committed, with these."""
        self._unsure.pop()
        planned = self._planned
        for push in pushes:
            raw = push.notification
            if push.slot in self.debt or not self._owns(push.slot):
                continue  # the map has changed meanwhile: who owns it looks for it
            self._rows[raw] = push
            stream = self._streams.get(push.stream_id)
            if stream is None:
                self._streams[push.stream_id] = {raw}
            else:
                stream.add(raw)
            if not planned or push.due_ms >= planned[-1][0]:
                planned.append((push.due_ms, raw))
            else:
                heapq.heappush(self._unordered, (push.due_ms, raw))

    def undone(self) -> None:
        """Nothing of the batch that began last was written."""
        self._unsure.pop()

    def sure(self) -> None:
        """Whatever was unsure has been looked at."""
        self._unsure.clear()

    def _forget(self, pushes: Iterable[KeptPush]) -> None:
        for push in pushes:
            self._again.discard(push.notification)
            if self._rows.pop(push.notification, None) is not None:
                stream = self._streams[push.stream_id]
                stream.discard(push.notification)
                if not stream:
                    del self._streams[push.stream_id]

    # -- what becomes of it -----------------------------------------------------------------------------

    async def acknowledge(self, told: Sequence[SignalRow], now_ms: int) -> tuple[list[SignalRow], int]:
        """Let kept pushes follow signals.

        Returns:
            (those that are about no kept push, how many others were acknowledged for the first time).

        Raises:
            FencedError, StoreUnavailableError: say it again.
        """
        await self.ready()
        if not self._rows:
            return list(told), 0
        async with self._lock:
            term = self._term()
            rest: list[SignalRow] = []
            texts: list[tuple[KeptPush, str, bool]] = []
            ended: list[KeptPush] = []
            due: list[KeptPush] = []
            first: list[KeptPush] = []
            again: list[KeptPush] = []
            furthest = now_ms + round(self._settings.kept_s * 1000)
            for row in told:
                push = self._rows.get(row.notification)
                if push is None or push.stream_id != row.stream_id:
                    rest.append(row)
                    continue
                if row.notification in self._again:
                    again.append(push)
                    rest.append(row)  # to the row, which is there then
                    continue
                if row.signal == SILENT and push.gate is None:  # as `follow` has it; most are so
                    texts.append((push, ACKNOWLEDGED_MARK + push.text(), True))
                    if not push.acknowledged:
                        first.append(push)
                    ended.append(push)
                    continue
                what, text = push.follow(row.signal, row.shown_on, now_ms)
                if push.gate is not None:  # before anything may fail: it is looked at when it is due
                    heapq.heappush(self._due, (push.due_ms, push.notification))
                if what == "write":
                    due.append(push)
                    continue
                acknowledged = row.signal in ACKNOWLEDGED
                texts.append((push, text, acknowledged))
                if acknowledged and not push.acknowledged:
                    first.append(push)
                if what == "end":
                    ended.append(push)
                elif push.due_ms > furthest:
                    due.append(push)  # it would hold the mark for too long
            await self._write(again)
            if texts:
                await self._store.acknowledge_kept(term, texts, now_ms)
            for push in first:
                push.acknowledged = True
            self._forget(ended)
            await self._write(due)
            return rest, len(first)

    def next_due_ms(self) -> int | None:
        """When the first is due of which nothing was heard. The others are found from time to time: at what
        is held the session looks first."""
        planned, unordered = self._planned, self._unordered
        while planned and not self._waits(*planned[0]):
            planned.popleft()
        while unordered and not self._waits(*unordered[0]):
            heapq.heappop(unordered)
        if planned and unordered:
            return min(planned[0][0], unordered[0][0])
        return planned[0][0] if planned else unordered[0][0] if unordered else None

    def came_due(self, now_ms: int) -> bool:
        """Whether, since the last look, any of which nothing was heard became due: `write_due` has it then,
        however often that fails."""
        found = False
        while (due_ms := self.next_due_ms()) is not None and due_ms <= now_ms:
            of_planned = self._planned and self._planned[0][0] == due_ms
            entry = self._planned.popleft() if of_planned else heapq.heappop(self._unordered)
            heapq.heappush(self._due, entry)
            found = True
        return found

    def _waits(self, due_ms: int, raw: bytes) -> bool:
        push = self._rows.get(raw)
        return push is not None and push.due_ms == due_ms

    async def write_due(self, now_ms: int) -> None:
        """Move to the outbox what is due. Raises as `acknowledge`."""
        await self.ready()
        self._stats.gauge("pushes_kept", len(self._rows))
        async with self._lock:
            due: dict[bytes, KeptPush] = {}
            self.came_due(now_ms)
            while self._due and self._due[0][0] <= now_ms:
                _, raw = heapq.heappop(self._due)
                push = self._rows.get(raw)
                if push is not None and push.due_ms <= now_ms:
                    due[raw] = push
            try:
                await self._write(list(due.values()))
            except BaseException:
                for raw in due:
                    heapq.heappush(self._due, (now_ms, raw))
                raise

    async def write(self, streams: Iterable[int]) -> None:
        """Move to the outbox all of these streams: more than an acknowledgement concerns them. Raises as
        `acknowledge`."""
        await self.ready()
        if self._rows:
            async with self._lock:
                ids = [raw for stream in streams for raw in self._streams.get(stream, ())]
                await self._write([self._rows[raw] for raw in ids])

    async def _write(self, pushes: Sequence[KeptPush]) -> None:
        term = self._term()
        for at in range(0, len(pushes), WRITTEN):
            some = pushes[at : at + WRITTEN]
            try:
                await self._store.write_kept(term, some, self._clock.now_ms())
            except FencedError:
                raise
            except BaseException:
                self._again.update(push.notification for push in some)
                raise
            self._forget(some)

    # -- what others kept -------------------------------------------------------------------------------

    def slots_lost(self, slots: Collection[int]) -> None:
        """Their next owner finds what is kept there."""
        self.debt.difference_update(slots)
        self._forget([push for push in self._rows.values() if push.slot in slots])

    def slots_came(self, slots: Iterable[int]) -> None:
        """What is kept there is to be looked for, before anything else is done about it."""
        came = set(slots)
        self._forget([push for push in self._rows.values() if push.slot in came])
        self.debt |= came

    async def ready(self) -> None:
        """Look for what former owners kept, if that was not done. Raises as `acknowledge`."""
        while self.debt:
            async with self._adopting:
                slots, term = sorted(self.debt), self._term()
                if slots:
                    made = await self._store.adopt_kept(term, slots, self._clock.now_ms())
                    if term != self._term():
                        continue  # slots may have been away and come back
                    self.debt.difference_update(slots)
                    if made:
                        log.info("%d pushes that were kept in %d slots are in the outbox", made, len(slots))

    async def look_for_unsure(self, streams: Collection[int]) -> None:
        """Look for what these keep and nobody here remembers, after a write that ended nobody knows how.
        Raises as `acknowledge`."""
        unsure = [push for pushes in self._unsure for push in pushes if push.stream_id in streams]
        if unsure:
            ids = sorted({push.stream_id for push in unsure})
            await self.write(ids)
            slots = sorted({push.slot for push in unsure})
            await self._store.adopt_kept(self._term(), slots, self._clock.now_ms(), ids)

    async def follow(self) -> None:
        """Let the mark follow the oldest that waits, from time to time. Raises as `acknowledge`."""
        at = self._clock.monotonic()
        if at < self._marked_at + self._settings.kept_mark_s:
            return
        await self.ready()
        oldest = self._clock.now_ms() - round(self._settings.kept_mark_s * 1000)
        waits = [push.notification for pushes in self._unsure for push in pushes]
        if self._rows:
            waits.append(min(self._rows))
        if waits:
            oldest = min(oldest, uuid7_ms(min(waits)))
        # First here: a batch that is planned from now on keeps nothing that is older.
        mark = least_uuid7(oldest)
        if self._mark is not None:
            self._mark = max(self._mark, mark)
            mark = self._mark
        await self._store.mark_kept(self._term(), mark)
        self._mark = mark
        self._marked_at = at
