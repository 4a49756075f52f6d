"""The writer of a shard: one loop, one connection, one batch in flight.

Events and state changes of all users of the shard are written here and nowhere else, so that the order of
commits is the order in which sessions hear of them. While a batch commits the next one gathers: throughput
grows with load without a timer (group commit).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections import Counter, deque
from collections.abc import Callable, Container, Sequence

from actors.fair_queue import FairQueue
from actors.shard_amendments import AMENDMENTS, Amendments
from actors.shard_changes import ChangeEntry, Changes, finish
from actors.shard_drafting import Drafter
from actors.shard_entries import Entry, answered, unread_after
from actors.shard_kept import KeptPushes
from actors.shard_lane import Guard, Lane
from actors.shard_merges import Merges, MergingBatch
from actors.shard_planning import Planner
from actors.shard_preview import Previews
from actors.shard_repeats import Repeats
from actors.shard_suspects import Suspects
from actors.shard_users import User, UserCache
from carillon.attention import DEFERRED
from carillon.clock import Clock
from carillon.errors import CarillonError, FencedError, UnavailableError
from carillon.ids import UserKey
from carillon.kept_push import KeptPush
from carillon.merging import Decision
from carillon.messages import Event, Outcome
from carillon.metrics import Stats
from carillon.plan import Reach
from carillon.policy import TenantPolicy
from carillon.session import Effect
from carillon.settings import MergeSettings, ShardSettings
from stores.postgres.shard_rows import KeysTakenError, OutboxRow, PoisonError, StreamsErasedError
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)

HEAL_PAUSE_S = 0.5
"""Pause between looks at streams whose last write may or may not have been committed."""


class Writer:
    """Appends events and applies changes.

    Args:
        term, owns: as in `Sessions`.
        run: carries out session effects.
        reach: tells how a user is found now, and the wall time at which grace ends.
        policy: gives a tenant's policy.
        kept: pushes that are no rows of the outbox yet: made here, and ended here by changes.
        planned: called with what was committed with a push: (user, entry, outbox row or what is kept).
        withdrawn: called when pushes are to be taken back, or to replace others.
        stopped: called with what is not to be pushed any more, and why.
        expires: called with users of whom something expires, and when.
        erased: called with users who turn out to have been erased.
        fenced: called when the term turns out to be over.
    """

    def __init__(
        self,
        store: ShardStore,
        users: UserCache,
        clock: Clock,
        stats: Stats,
        settings: ShardSettings,
        merging: MergeSettings,
        *,
        term: Callable[[], int],
        owns: Callable[[int], bool],
        run: Callable[[User, list[Effect]], None],
        reach: Callable[[User], tuple[Reach, int]],
        policy: Callable[[str], TenantPolicy],
        kept: KeptPushes,
        planned: Callable[[User, Event, int, OutboxRow | KeptPush, int], None],
        withdrawn: Callable[[], None],
        stopped: Callable[[bytes, str], None],
        expires: Callable[[User, int], None],
        erased: Callable[[User], None],
        fenced: Callable[[], None],
    ) -> None:
        self._expires = expires
        self._changes_of_users = Changes(
            store, clock, term=term, run=run, withdrawn=withdrawn, expires=expires
        )
        self._amendments = Amendments(
            store, clock, settings, self._changes_of_users,
            term=term, run=run, due_now=withdrawn, stopped=stopped, expires=expires,
        )  # fmt: skip
        self._store = store
        self._users = users
        self._clock = clock
        self._stats = stats
        self._settings = settings
        self._term = term
        self._owns = owns
        self._run_effects = run
        self._kept = kept
        merges = Merges(store, merging, policy, term)
        self._planner = Planner(clock, settings, merges, reach=reach, policy=policy)
        self._drafter = Drafter(store, self._planner, merges, kept)
        self._repeats = Repeats(
            store, merges, self._planner, clock, settings, done=self._done, fail=self._fail
        )
        self.previews = Previews(store, clock, settings, merges, self._repeats, reach=reach, policy=policy)
        self._suspects = Suspects(
            store, kept, term=term, owns=owns, run=run, expires=expires, erased=self._forget_erased
        )
        self._planned = planned
        self._was_erased = erased
        self._fenced = fenced
        self._queue: FairQueue[Entry] = FairQueue()
        self._least_bound = min(settings.tenant_queue, settings.max_queue)  # below it there is room for all
        self._parked = 0
        self._parked_of: Counter[str] = Counter()  # by tenant
        self._changes: deque[ChangeEntry] = deque()
        self._wake = asyncio.Event()
        self.lane: Lane[Entry] = Lane(users, clock, Entry, self._wake.set)
        self._guard: Guard[Entry] | None = None
        self.single_at = 0.0  # monotonic; when single events were appended last
        self._appending = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin writing."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop; whatever waits is answered as unavailable (it was not acknowledged)."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        stopped = UnavailableError("the shard stops")
        for entry in self._queue.drained():
            self._fail(entry, stopped)
        while self._changes:
            self._changes.popleft().done(stopped)
        for entry in self.lane.drained():
            self._fail(entry, stopped)

    async def settled(self) -> None:
        """Wait for the batch in flight: whatever was planned before now is in the store, or never will be."""
        async with self._appending:
            pass

    def queued(self) -> int:
        """Events waiting, those whose user is being loaded included."""
        return len(self._queue) + self._parked

    # -- taking work ------------------------------------------------------------------------------------

    def submit(self, event: Event, done: Callable[[Outcome], None]) -> None:
        """Queue one event; `done` gets its outcome, never before the commit.

        Ordering: events of one user are appended in the order submitted.
        """
        if not self._owns(event.slot):
            done(Outcome(event.id, status="moved"))
            return
        tenant = event.tenant
        queue = self._queue
        waiting = len(queue.line) + queue.rest + self._parked
        if waiting >= self._least_bound and (full := self._full_for(tenant)):
            done(Outcome(event.id, status="failed", code="busy", detail=full, retry_after_s=1.0))
            return
        entry = Entry(event, done)
        if event.idempotency_key is not None and not self._repeats.claim(entry):
            return
        key = UserKey(event.tenant, event.user)
        user = self._users.ready(key)
        if user is not None:
            entry.user = user
            user.pins += 1
            if tenant == queue.tenant:
                queue.line.append(entry)
            else:
                queue.append(tenant, entry)
            self._wake.set()
            return
        self._parked += 1
        self._parked_of[tenant] += 1

        def loaded(found: User | None, error: CarillonError | None) -> None:
            self._parked -= 1
            self._parked_of[tenant] -= 1
            if not self._parked:
                self._parked_of.clear()
            if found is None:
                assert error is not None
                self._fail(entry, error)
                return
            entry.user = found
            found.pins += 1
            self._queue.append(tenant, entry)
            self._wake.set()

        self._users.when_loaded(key, event.slot, loaded)

    def _full_for(self, tenant: str) -> str:
        """Why there is no room for another event of a tenant; "" if there is."""
        if self._queue.waiting(tenant) + self._parked_of[tenant] >= self._settings.tenant_queue:
            return "the tenant's share of the append queue is full"
        return "the append queue is full" if self.queued() >= self._settings.max_queue else ""

    def submit_change(self, change: ChangeEntry) -> None:
        """Queue one state change. Ordering: changes of one user are applied in the order submitted."""
        change.user.pins += 1
        self._changes.append(change)
        self._wake.set()

    # -- the loop ---------------------------------------------------------------------------------------

    async def _run(self) -> None:
        queue, changes, lane = self._queue, self._changes, self.lane
        while True:
            self._wake.clear()
            while queue or changes or lane:
                if self._suspects:
                    await self._suspects.heal()
                if queue:
                    await self._batch(queue.take(self._settings.max_batch))
                if changes:
                    await self._change_round()
                if lane and (behind := lane.take(len(queue))) is not None:
                    self._guard = behind.guard
                    try:
                        await self._batch(behind.entries)
                    finally:
                        self._guard = None
                self._stats.gauge("append_queue", self.queued())
            if not self._suspects:
                await self._wake.wait()
                continue
            await self._suspects.heal()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), HEAL_PAUSE_S if self._suspects else None)

    async def _batch(self, batch: list[Entry]) -> None:
        try:
            async with self._appending:
                await self._append(batch)
        except asyncio.CancelledError:
            for entry in batch:
                self._fail(entry, UnavailableError("the shard stops"))
            raise
        except Exception as exc:
            log.exception("a batch of %d events failed", len(batch))
            self._suspects.add(entry.user for entry in batch)
            for entry in batch:
                self._fail(entry, UnavailableError(f"append failed: {type(exc).__name__}"))

    def suspect(self, user: User) -> None:
        """Somebody else's write about this user may have been committed: look before going on."""
        self._suspects.add((user,))
        self._wake.set()

    # -- events -----------------------------------------------------------------------------------------

    async def _append(self, batch: list[Entry]) -> None:
        started = self._clock.monotonic()
        if self._guard is None:
            self.single_at = started
        # Read in the turn of the ownership check: if slots are given away while this batch waits for
        # Postgres, the old term is what makes it abort.
        term = self._term()
        try:
            batch = self._owned(batch)
            if any(entry.event.retry for entry in batch):
                batch = await self._repeats.without_known(batch)
            while batch:
                keyed = [entry.event for entry in batch if entry.event.idempotency_key is not None]
                try:
                    await self._append_planned(term, batch, keyed)
                except KeysTakenError:
                    batch = await self._repeats.without_taken(batch)
                    continue
                except StreamsErasedError as exc:
                    batch = self._without_erased(batch, exc.streams)
                    continue
                break
        except PoisonError as exc:
            await self._bisect(batch, exc)
        except FencedError:
            self._fenced()
            for entry in batch:
                self._done(entry, Outcome(entry.event.id, status="moved"))
        except CarillonError as exc:
            self._suspects.add(entry.user for entry in batch)
            for entry in batch:
                self._fail(entry, exc)
        self._stats.observe_ms("append_ms", (self._clock.monotonic() - started) * 1000)

    def _owned(self, batch: list[Entry]) -> list[Entry]:
        kept = []
        for entry in batch:
            if self._owns(entry.event.slot):
                kept.append(entry)
            else:
                self._done(entry, Outcome(entry.event.id, status="moved"))
        return kept

    def _without_erased(self, batch: list[Entry], streams: Container[int]) -> list[Entry]:
        rest: list[Entry] = []
        for entry in batch:
            assert entry.user is not None
            if entry.user.stream_id in streams:
                self._erased(entry)
            else:
                rest.append(entry)
        return rest

    def _erased(self, entry: Entry) -> None:
        """The user was erased since it was loaded: loaded anew, the event's next try finds another stream."""
        assert entry.user is not None
        self._forget_erased(entry.user)
        self._fail(entry, UnavailableError("the user was erased while the event was on its way"))

    def _forget_erased(self, user: User) -> None:
        """No event will ever reach a session of the old stream: it ends."""
        if self._users.peek(user.key) is user:
            self._users.forget(user.key)
        self._was_erased(user)

    async def _append_planned(self, term: int, batch: list[Entry], keyed: Sequence[Event]) -> None:
        kept = self._kept.begin()
        try:
            await self._append_kept(term, batch, keyed, kept)
        except (FencedError, KeysTakenError, PoisonError, StreamsErasedError):
            self._kept.undone()
            raise

    async def _append_kept(
        self, term: int, batch: list[Entry], keyed: Sequence[Event], kept: list[KeptPush]
    ) -> None:
        """Append; `kept` gets what is kept of it."""
        now_ms = self._clock.now_ms()
        draft = await self._drafter.draft(batch, kept, now_ms)
        rows, merging = draft.rows, draft.merging
        changed = {} if merging is None else merging.writes.counts()
        heads = await self._store.append(
            term, draft.counts, rows, draft.outbox, now_ms, keyed, self._repeats.since_ms() if keyed else 0,
            None if self._guard is None else functools.partial(self._guard, batch),
            None if merging is None else merging.writes,
        )  # fmt: skip
        committed_ms = self._clock.now_ms()
        seqs: dict[bytes, int] = {}
        later = unread_after(rows) if draft.archived else None
        for index, (entry, row) in enumerate(zip(draft.own, rows, strict=True)):
            head = heads.get(row.stream_id)
            if head is None:
                # The stream was erased since it was loaded; its next event makes a new one.
                self._erased(entry)
                continue
            seqs[entry.event.id] = head[0] - row.back
            unread = head[2] - (row.back if later is None else later[index])
            entry.event = row.event
            rev = head[1] - row.back - (changed.get(row.stream_id, 0) if changed else 0)
            self._committed(entry, head[0] - row.back, rev, unread, committed_ms)
        whole = len(seqs) == len(rows)
        self._kept.noted(kept if whole else [push for push in kept if push.notification in seqs])
        for user, entry, push in draft.pushes:
            if whole or entry.event.id in seqs:
                self._planned(user, entry.event, seqs[entry.event.id], push, 0)
        if merging is not None:
            self._merged(merging, draft.merged, heads, seqs)

    def _merged(
        self,
        merging: MergingBatch,
        merged: Sequence[tuple[Entry, Decision]],
        heads: dict[int, tuple[int, int, int]],
        seqs: dict[bytes, int],
    ) -> None:
        """What was merged is committed: tell of it, and answer."""
        merging.committed(heads, self._run_effects, self._planned, self._expires)
        for entry, decision in merged:
            assert entry.plan is not None
            outcome = merging.outcome(decision, entry.plan, seqs, heads)
            if outcome is None:
                self._erased(entry)
            else:
                self._stats.count(f"events_{outcome.status}")
                self._done(entry, outcome)

    def _committed(self, entry: Entry, seq: int, rev: int, unread: int, now_ms: int) -> None:
        user, event, decided = entry.user, entry.event, entry.plan
        assert user is not None
        assert decided is not None
        user.seq, user.rev, user.unread = seq, rev, unread
        status = decided.status
        session = user.session
        ended = event.expires_ms is not None and self._ends(user, event.expires_ms, now_ms, decided.archived)
        hidden = decided.archived or ended
        if session is not None:
            try:
                if hidden:
                    effects = session.pass_over(seq, rev, user.shown_unread())
                else:
                    effects = session.deliver(
                        event.id, seq, rev, user.shown_unread(), event.content,
                        silent=decided.silent, expires_ms=event.expires_ms,
                    )  # fmt: skip
            except ValueError:
                # Somebody else wrote to this stream (a term that was ours before): read on from the store.
                log.warning("gap in the stream of a user at seq %d: replaying from the store", seq)
                effects = session.heal(user.head())
            self._run_effects(user, effects)
            if session.live and not hidden:
                self._stats.count("events_delivered")
                self._stats.observe_ms("deliver_ms", max(0, now_ms - event.created_ms))
                if status == "stored":
                    status = "delivered"
        if ended:
            status = "stored"
        elif status == "delivered" and (session is None or not session.live):
            status = "queued" if decided.push_due_ms is not None else "stored"
            if decided.gate == DEFERRED:
                status = "deferred"
        if decided.priority is not None:
            event.priority = decided.priority  # for the push
        self._done(entry, Outcome(event.id, seq, status, list(decided.channels), reason=decided.reason))

    def _ends(self, user: User, expires_ms: int, now_ms: int, archived: bool) -> bool:
        """A notification that expires was committed; True: it has expired by now, and nobody is to see it."""
        if expires_ms > now_ms:
            self._expires(user, expires_ms)
            return False
        user.expired += not archived
        return True

    async def _bisect(self, batch: list[Entry], error: PoisonError) -> None:
        """Fail only the culprits: each half is a batch of its own."""
        if len(batch) > 1:
            middle = len(batch) // 2
            await self._append(batch[:middle])
            await self._append(batch[middle:])
            return
        entry = batch[0]
        assert entry.user is not None
        try:
            found = await self._repeats.stored(entry)
        except CarillonError as exc:
            self._fail(entry, exc)
            return
        if found is not None:
            self._done(entry, found)
            return
        log.warning("an event was refused by PostgreSQL: %s", error)
        self._done(entry, Outcome(entry.event.id, status="failed", code="invalid", detail=str(error)))

    def _fail(self, entry: Entry, error: CarillonError) -> None:
        retry_s = error.retry_after_s if isinstance(error, UnavailableError) else 0.0
        if isinstance(error, FencedError):
            self._done(entry, Outcome(entry.event.id, status="moved"))
            return
        self._done(
            entry,
            Outcome(
                entry.event.id, status="failed", code=error.code, detail=str(error), retry_after_s=retry_s
            ),
        )

    def _done(self, entry: Entry, outcome: Outcome) -> None:
        if entry.event.idempotency_key is not None:
            self._repeats.release(entry)
        if entry.user is not None:
            entry.user.pins -= 1
            entry.user = None
        done, entry.done = entry.done, answered
        done(outcome)
        for waiter in entry.waiters or ():
            waiter(outcome)
        entry.waiters = None

    # -- changes ----------------------------------------------------------------------------------------

    async def _change_round(self) -> None:
        """Apply the first waiting change of every user, one statement per operation."""
        by_op: dict[str, list[ChangeEntry]] = {}
        later: list[ChangeEntry] = []
        taken: set[int] = set()
        while self._changes and len(taken) < self._settings.max_batch:
            change = self._changes.popleft()
            if change.user.stream_id in taken:
                later.append(change)
                continue
            taken.add(change.user.stream_id)
            by_op.setdefault(change.op, []).append(change)
        self._changes.extendleft(reversed(later))
        for op, changes in by_op.items():
            try:
                if op != "expire":
                    await self._kept.write({c.user.stream_id for c in changes})
                owned = [c for c in changes if self._still_owned(c)]
                await (self._amendments if op in AMENDMENTS else self._changes_of_users).apply(op, owned)
            except CarillonError as exc:
                if isinstance(exc, FencedError):
                    self._fenced()
                else:
                    self._suspects.add(change.user for change in changes)
                finish(changes, exc)
            except asyncio.CancelledError:
                finish(changes, UnavailableError("the shard stops"))
                raise
            except Exception as exc:
                log.exception("%d changes (%s) failed", len(changes), op)
                finish(changes, UnavailableError(f"change failed: {type(exc).__name__}"))

    def _still_owned(self, change: ChangeEntry) -> bool:
        if self._owns(change.user.slot):
            return True
        finish([change], FencedError("the slot has moved"))
        return False
