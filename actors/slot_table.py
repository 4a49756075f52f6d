"""Who owns which slot: the coordinator's copy, and what it does about it in Postgres."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, Final

import asyncpg

from carillon.clock import Clock, rfc3339
from carillon.errors import StoreUnavailableError
from carillon.messages import Member
from carillon.placement import empty_owners, moved_slots
from carillon.settings import Settings
from stores.postgres.cluster import ClusterStore, StoredMap
from stores.postgres.migrate import ensure_partitions
from stores.postgres.pool import acquired, open_pool

log = logging.getLogger(__name__)

STORE_ERRORS: Final = (StoreUnavailableError, asyncpg.PostgresError)
"""Postgres does not answer, or refuses (read-only, not migrated): the map stays as it is, and a later try
follows. FencedError is another matter: it is final."""
STORE_CONNECTIONS: Final = 3
"""A move, the one that ends what it waits for, and one for the rest."""
KEPT_MOVES: Final = 20


class SlotTable:
    """Owners by slot, the coordinator's epoch, and the state of Postgres as far as it is known.

    Not concurrent: callers hold the coordinator's lock while they change owners or terms.
    """

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self.epoch = 0
        """This coordinator's number; 0 until Postgres gave it one."""
        self.owners: list[str | None] = empty_owners()
        """Owner of each slot by name, as last committed."""
        self.error = ""
        """What Postgres' last failure was; "" after a success."""
        self.must_reload = False
        """True after a failure: the commit may have happened although its answer was lost."""
        self.retry_at = 0.0
        """Monotonic time before which a failed change is not tried again."""
        self.moves: deque[dict[str, Any]] = deque(maxlen=KEPT_MOVES)
        """The last moves, JSON-able."""
        self._settings = settings
        self._clock = clock
        self._store: ClusterStore | None = None

    @property
    def store(self) -> ClusterStore:
        """The store; there is one once `open` has returned."""
        assert self._store is not None
        return self._store

    async def open(self) -> StoredMap:
        """Connect, take an epoch and load the map, however long Postgres takes."""
        settings = self._settings
        wait_s = settings.link.reconnect_min_s or 0.05
        while True:
            try:
                if self._store is None:
                    pool = await open_pool(settings.postgres, STORE_CONNECTIONS)
                    self._store = ClusterStore(pool, settings.postgres, settings.cluster.fence_wait_s)
                epoch = await self._store.take_epoch()
                stored = await self._store.load()
                break
            except STORE_ERRORS as exc:
                if self.error != str(exc):
                    log.warning("the coordinator waits for PostgreSQL: %s", exc)
                self.error = str(exc)
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, settings.link.reconnect_max_s)
        self.error = ""
        self.epoch = epoch
        self.owners = list(stored.owners)
        return stored

    async def close(self) -> None:
        """Close the connections."""
        store, self._store = self._store, None
        if store is not None:
            await store.close()

    def failed(self, exc: Exception) -> None:
        """Note trouble with Postgres; the next try comes a little later."""
        if self.error != str(exc):
            log.warning("the cluster map stays as it is: %s", exc)
        self.error = str(exc)
        self.must_reload = True
        self.retry_at = self._clock.monotonic() + self._settings.link.reconnect_max_s

    async def reload(self) -> tuple[bool, dict[str, int]]:
        """Read owners and terms again: (whether owners differ, the term of each shard).

        Raises:
            STORE_ERRORS: nothing is changed.
        """
        stored = await self.store.load()
        self.must_reload = False
        self.error = ""
        changed = self.owners != stored.owners
        self.owners = list(stored.owners)
        return changed, {name: row.term for name, row in stored.shards.items()}

    async def register(self, member: Member) -> int:
        """The term of a shard's process. Raises FencedError and STORE_ERRORS."""
        return await self.store.register_shard(self.epoch, member.name, member.node, member.incarnation)

    async def move(self, target: list[str | None], reason: str) -> dict[str, int] | None:
        """Carry out a new assignment.

        Returns:
            The new term of each shard that lost slots; None if nothing had to move.

        Raises:
            FencedError: a newer coordinator exists.
            STORE_ERRORS: `owners` is unchanged here; see `must_reload`.
        """
        moves = moved_slots(self.owners, target)
        if not moves:
            return None
        began = self._clock.monotonic()
        terms = await self.store.move_slots(self.epoch, moves)
        took_ms = (self._clock.monotonic() - began) * 1000
        self.owners = target
        self.error = ""
        self.moves.append(
            {
                "at": rfc3339(self._clock.now_ms()),
                "reason": reason,
                "slots": len(moves),
                "from": sorted(terms),
                "took_ms": round(took_ms, 1),
            }
        )
        log.info("moved %d slots in %.0f ms: %s", len(moves), took_ms, reason)
        return terms

    async def save_members(self, members: Sequence[Member]) -> None:
        """Keep the members of the newest map. Raises FencedError and STORE_ERRORS."""
        await self.store.save_members(self.epoch, members)

    async def save_draining(self, nodes: Collection[str]) -> None:
        """Keep which nodes are to be left. Raises FencedError and STORE_ERRORS."""
        await self.store.save_draining(self.epoch, nodes)

    async def maintain(self, shards: Collection[str]) -> None:
        """Partitions ahead of time, and away with rows of shards long gone (`shards` stay).

        Raises FencedError and STORE_ERRORS.
        """
        await self.store.forget_old_shards(self.epoch, shards)
        async with acquired(self.store.pool, self._settings.postgres.connect_timeout_s) as connection:
            await ensure_partitions(connection, self._clock.now_ms())
