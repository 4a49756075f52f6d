"""What devices tell a shard of notifications: acknowledgements, and how the user's attention moves on.

Written in batches, at low priority, one statement each. The outbox in Postgres is the truth; what waits here
is lost with the process, and then a push comes that need not have come (guarantee G6).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice

from actors.shard_kept import KeptPushes
from actors.shard_users import User
from carillon.attention import ACTIVE, AWAY, RECEIVED, SILENT, STALE
from carillon.clock import Clock
from carillon.effects import Acknowledged, AcknowledgedRange, PushSignal
from carillon.errors import CarillonError, FencedError
from carillon.metrics import Stats
from carillon.settings import ShardSettings
from stores.postgres.shard_rows import SignalRow
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)

MAX_UNWRITTEN = 200_000
"""Acknowledgements, and as many pieces of ranges, kept while Postgres is away; beyond it the oldest are
dropped (their push may follow)."""
BATCH = 500
"""Written in one statement: what one costs per notification grows with them."""
RANGE = 1000
"""Notifications of a stream looked at for one piece of a range."""
RANGES = 200
"""Pieces asked for at a time."""

_STRENGTH = {STALE: -1, RECEIVED: 0, ACTIVE: 1, SILENT: 2}

_ALL = 2**63
"""Behind every rev."""

_WATCHED = frozenset((RECEIVED, STALE))
"""After these the push is watched as before."""


def combine(known: SignalRow, row: SignalRow) -> None:
    """Make one acknowledgement of two of one notification, into the first: the one that ends more counts.

    Where the two cannot be told by one row exactly, less is covered: a push comes that need not have come.
    """
    stronger = _STRENGTH[row.signal] - _STRENGTH[known.signal]
    if stronger > 0:
        known.signal, known.rev = row.signal, row.rev
    elif not stronger and known.rev != row.rev:
        # Of several devices each shows what the one behind does; a device alone shows what it told last.
        further = max if known.shown_on == row.shown_on else min
        covered = further(_ALL if rev is None else rev for rev in (known.rev, row.rev))
        known.rev = None if covered == _ALL else covered
    shown = known.shown_on.split("\n") if known.shown_on else []
    known.shown_on = "\n".join(dict.fromkeys([*shown, *filter(None, row.shown_on.split("\n"))]))


def _combined(known: SignalRow, row: SignalRow) -> bool:
    """Two acknowledgements are one row; where attention moves on between them, their order counts."""
    if known.signal not in _STRENGTH or row.signal not in _STRENGTH:
        return False
    combine(known, row)
    return True


class Acknowledgements:
    """Acknowledgements of one shard.

    Args:
        kept: pushes that are no rows of the outbox yet.
        fenced: called when the term turns out to be over.
    """

    def __init__(
        self,
        store: ShardStore,
        kept: KeptPushes,
        clock: Clock,
        stats: Stats,
        settings: ShardSettings,
        *,
        term: Callable[[], int],
        fenced: Callable[[], None],
    ) -> None:
        self._store = store
        self._kept = kept
        self._clock = clock
        self._stats = stats
        self._settings = settings
        self._term = term
        self._fenced = fenced
        self._told: dict[bytes, SignalRow] = {}  # in order of arrival
        self._after: dict[bytes, SignalRow] = {}  # the same notification once more: in the next statement
        self._ranges: deque[tuple[int, int, int, AcknowledgedRange]] = deque()
        self._last_seen: dict[int, int] = {}
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def on_change(self, settled: Callable[[Iterable[bytes]], None], due_now: Callable[[], None]) -> None:
        """Call `settled` with ids whose push need not be watched any more, `due_now` when one became due."""
        self._settled = settled
        self._due_now = due_now

    def start(self) -> None:
        """Begin writing, after `on_change`."""
        self._task = asyncio.get_running_loop().create_task(self._write_for_ever())

    async def close(self) -> None:
        """Write what can be written, stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            await self.write()
        except CarillonError as exc:
            log.info("acknowledgements were not written at the end: %s", exc)

    # -- what is told -----------------------------------------------------------------------------------

    def acknowledged(self, user: User, effect: Acknowledged) -> None:
        """A device has these notifications."""
        stream, signal, device, rev = user.stream_id, effect.signal, effect.device, effect.rev
        told = self._told
        for raw in effect.ids:
            row = SignalRow(stream, raw, signal, device, rev)
            if raw in told:
                self._put(row)
            else:
                told[raw] = row
        if signal not in _WATCHED:
            self._settled(effect.ids)
        self._bound()
        self._wake.set()

    def ranged(self, user: User, effect: AcknowledgedRange) -> None:
        """A device has everything of a range of the stream."""
        for after in range(effect.after_seq, effect.upto_seq, RANGE):
            upto = min(after + RANGE, effect.upto_seq)
            self._ranges.append((user.stream_id, after, upto, effect))
        self._bound()
        self._wake.set()

    def signalled(self, user: User, effect: PushSignal) -> None:
        """Attention moved on: waiting pushes follow."""
        for raw in effect.ids:
            self._put(SignalRow(user.stream_id, raw, effect.signal))
        self._bound()
        if effect.signal == AWAY:
            self._due_now()
        self._wake.set()

    def offline(self, user: User, last_seen_ms: int) -> None:
        """A user went offline: keep when it was last seen."""
        self._last_seen[user.stream_id] = last_seen_ms
        self._wake.set()

    def _put(self, row: SignalRow) -> None:
        """Behind what was told of the notification before: into its row, or in the next statement."""
        raw = row.notification
        known = self._told.get(raw)
        if known is None:
            self._told[raw] = row
        elif not _combined(known, row):
            later = self._after.get(raw)
            if later is None or not _combined(later, row):
                if later is not None:
                    _combined(known, later)  # there is room for one behind it
                self._after[raw] = row

    def _bound(self) -> None:
        told, after, ranges = self._told, self._after, self._ranges
        while len(told) > MAX_UNWRITTEN:
            del told[next(iter(told))]
        while len(after) > MAX_UNWRITTEN:
            del after[next(iter(after))]
        while len(ranges) > MAX_UNWRITTEN:
            ranges.popleft()

    # -- writing ----------------------------------------------------------------------------------------

    async def _write_for_ever(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(self._settings.ack_flush_s)
            self._wake.clear()
            try:
                await self.write()
            except FencedError:
                self._fenced()
                await asyncio.sleep(self._settings.ack_flush_s + 0.05)
                self._wake.set()
            except CarillonError as exc:
                log.info("acknowledgements wait: %s", exc)
                await asyncio.sleep(self._settings.sweep_s)
                self._wake.set()
            except Exception:
                log.exception("writing acknowledgements failed")
                await asyncio.sleep(self._settings.sweep_s)

    async def write(self) -> None:
        """Write everything that was told until now: before due pushes are claimed, for it may stop them.

        Raises:
            FencedError, StoreUnavailableError: what is not written is kept.
        """
        async with self._lock:
            while True:
                if self._ranges:  # before more of them: each is many acknowledgements
                    await self._next_ranges()
                await self._write_told()
                if not self._ranges:
                    break
            if self._last_seen:
                seen, self._last_seen = self._last_seen, {}
                try:
                    await self._store.save_last_seen(self._term(), list(seen.items()))
                except BaseException:
                    self._last_seen = seen | self._last_seen
                    raise

    async def _write_told(self) -> None:
        while self._told or self._after:
            if not self._told:
                self._told, self._after = self._after, {}
            batch = list(islice(self._told.values(), BATCH))
            if len(batch) == len(self._told):
                self._told = {}
            else:
                for row in batch:
                    del self._told[row.notification]
            try:
                now_ms = self._clock.now_ms()
                rest, new = await self._kept.acknowledge(batch, now_ms)
                if rest:
                    new += await self._store.acknowledge(self._term(), rest, now_ms)
            except BaseException:
                # In the order it was told: what came meanwhile is behind it.
                meanwhile, self._told = self._told, {row.notification: row for row in batch}
                for row in meanwhile.values():
                    self._put(row)
                raise
            self._stats.count("events_acknowledged", new)

    async def _next_ranges(self) -> None:
        pieces = [self._ranges.popleft() for _ in range(min(RANGES, len(self._ranges)))]
        try:
            await self._resolve(pieces)
        except BaseException:
            self._ranges.extendleft(reversed(pieces))
            raise

    async def _resolve(self, pieces: list[tuple[int, int, int, AcknowledgedRange]]) -> None:
        """Turn ranges into ids; idempotent, so that a failure repeats it."""
        found = await self._store.ids_between([(*piece[:3], piece[3].by_rev) for piece in pieces])
        by_stream: dict[int, list[tuple[int, int, int, AcknowledgedRange]]] = {}
        for piece in pieces:
            by_stream.setdefault(piece[0], []).append(piece)
        ids: list[bytes] = []
        for raw, stream, seq, rev in found:
            for _, after, upto, effect in by_stream[stream]:
                if not after < (rev if effect.by_rev else seq) <= upto:
                    continue
                signal, device = effect.signal, effect.device
                if effect.rev is not None and rev > effect.rev:
                    signal, device = STALE, ""
                self._put(SignalRow(stream, raw, signal, device, upto if effect.by_rev else effect.rev))
                if signal not in _WATCHED:
                    ids.append(raw)
        self._settled(ids)
