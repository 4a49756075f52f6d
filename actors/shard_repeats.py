"""Events that were asked for before: by the same idempotency key, or by a retry of the ingress.

What the first try stored is the answer to all of them. A key is known from two sides: those that run here, in
memory, and those that stand for something, in the store, whose unique index has the last word.
"""

from __future__ import annotations

from collections.abc import Callable

from actors.shard_entries import Entry, answered
from actors.shard_merges import Merges
from actors.shard_planning import Planner
from actors.shard_users import User
from carillon.clock import Clock
from carillon.errors import CarillonError, NotFoundError
from carillon.messages import Event, Outcome
from carillon.settings import ShardSettings
from stores.postgres.shard_rows import StoredKey
from stores.postgres.shard_store import ShardStore


class Repeats:
    """Answers repeated events of one shard.

    Args:
        done, fail: end an entry with its outcome, or with an error.
    """

    def __init__(
        self,
        store: ShardStore,
        merges: Merges,
        planner: Planner,
        clock: Clock,
        settings: ShardSettings,
        *,
        done: Callable[[Entry, Outcome], None],
        fail: Callable[[Entry, CarillonError], None],
    ) -> None:
        self._store = store
        self._merges = merges
        self._planner = planner
        self._clock = clock
        self._ttl_ms = round(settings.idempotency_ttl_s * 1000)
        self._done = done
        self._fail = fail
        self._running: dict[tuple[str, str], Entry] = {}

    def claim(self, entry: Entry) -> bool:
        """Note that the event's idempotency key is running here; False if it is answered already."""
        event = entry.event
        assert event.idempotency_key is not None
        key = (event.tenant, event.idempotency_key)
        running = self._running.get(key)
        if running is None:
            self._running[key] = entry
            return True
        if running.event.id == event.id:  # our own retry: it shares the outcome of the first try
            running.share(entry)
        else:
            entry.done(_in_progress(event))
        return False

    def release(self, entry: Entry) -> None:
        """An entry with a key has ended: if the key was claimed for it, it runs here no more."""
        event = entry.event
        assert event.idempotency_key is not None
        key = (event.tenant, event.idempotency_key)
        if self._running.get(key) is entry:
            del self._running[key]

    def since_ms(self) -> int:
        """Keys that were used before this wall time stand for nothing any more."""
        return self._clock.now_ms() - self._ttl_ms

    async def without_known(self, batch: list[Entry]) -> list[Entry]:
        """Answer retries whose first try was stored after all; join those whose first try is in the batch."""
        first: dict[bytes, Entry] = {}
        kept: list[Entry] = []
        for entry in batch:
            twin = first.get(entry.event.id)
            if twin is not None:
                twin.share(entry)
                assert entry.user is not None
                entry.user.pins -= 1
                continue
            first[entry.event.id] = entry
            kept.append(entry)
        known = await self._store.find_ids([entry.event.id for entry in kept if entry.event.retry])
        merged = await self._merges.known(
            [e.event.id for e in kept if e.event.retry and e.event.id not in known]
        )
        rest = []
        for entry in kept:
            assert entry.user is not None
            found = known.get(entry.event.id) if entry.event.retry else None
            into = merged.get(entry.event.id)
            if into is not None:
                self._done(entry, into.outcome())
            elif found is None:
                rest.append(entry)
            elif found[1] != entry.user.stream_id:
                self._fail(entry, NotFoundError("this id belongs to another user"))
            else:
                self._done(entry, self._stored(entry, entry.event.id, found[0]))
        return rest

    async def foretold(self, user: User, event: Event) -> Outcome | None:
        """What an event would be answered for its idempotency key alone; None: the key stands for nothing.

        Not for the writer: nothing is claimed, nothing ends. Raises StoreUnavailableError.
        """
        assert event.idempotency_key is not None
        key = (event.tenant, event.idempotency_key)
        if key in self._running:
            return _in_progress(event)
        stored = (await self._store.find_keys([key], self.since_ms(), aside=True)).get(key)
        if stored is None:
            return None
        entry = Entry(event, answered)
        entry.user = user
        return self._answer(entry, stored)

    async def without_taken(self, batch: list[Entry]) -> list[Entry]:
        """Answer events whose idempotency key stands for something; the others go on."""
        known = await self._store.find_keys(
            [(e.event.tenant, e.event.idempotency_key) for e in batch if e.event.idempotency_key is not None],
            self.since_ms(),
        )
        rest = []
        for entry in batch:
            event = entry.event
            stored = known.get((event.tenant, event.idempotency_key or ""))
            if stored is None or event.idempotency_key is None:
                rest.append(entry)
            else:
                self._done(entry, self._answer(entry, stored))
        return rest

    def _answer(self, entry: Entry, stored: StoredKey) -> Outcome:
        """What an event is answered whose key stands for something."""
        event = entry.event
        if stored.body_hash != event.body_hash:
            detail = "this idempotency key was used with another body"
            return Outcome(event.id, status="failed", code="idempotency_conflict", detail=detail)
        if stored.merged is None:
            outcome = self._stored(entry, stored.notification, stored.seq or 0)
        else:
            outcome = stored.merged.outcome()
        # Our own retry of the request that made it is no replay to the caller.
        outcome.replayed = stored.notification != event.id
        return outcome

    async def stored(self, entry: Entry) -> Outcome | None:
        """What an event became that may have been stored; None if it was not. Raises as the store does."""
        raw = entry.event.id
        assert entry.user is not None
        known = await self._store.find_ids([raw])
        merged = await self._merges.known([raw])
        if raw in known and known[raw][1] == entry.user.stream_id:
            return self._stored(entry, raw, known[raw][0])
        return merged[raw].outcome() if raw in merged else None

    def _stored(self, entry: Entry, notification: bytes, seq: int) -> Outcome:
        present = self._planner.plan(entry, self._clock.now_ms())
        return Outcome(notification, seq, present.status, list(present.channels))


def _in_progress(event: Event) -> Outcome:
    detail = "the first request with this idempotency key is still running"
    return Outcome(event.id, status="failed", code="in_progress", detail=detail, retry_after_s=1.0)
