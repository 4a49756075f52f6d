"""The slot map in Postgres, and the fencing of shards and coordinators.

Three tables: `slots` (slot -> shard), `shards` (shard -> term) and `cluster_state` (epoch of the coordinator,
members of the last map). Every transaction here first reads the coordinator's epoch FOR SHARE and compares
it: a coordinator that was stopped and wakes up after another took over cannot change anything any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
import msgspec

from carillon.errors import FencedError
from carillon.ids import SLOTS
from carillon.messages import Member
from carillon.settings import PostgresSettings
from stores.postgres.named import load_queries
from stores.postgres.pool import UNAVAILABLE, acquired

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardRow:
    """One row of `shards`."""

    shard: str
    term: int
    node: str
    incarnation: str


@dataclass(frozen=True)
class StoredMap:
    """What a coordinator finds when it starts."""

    owners: list[str | None]
    """Owner of each of the 1,024 slots."""
    shards: dict[str, ShardRow]
    members: list[Member]
    """Members of the last map that was saved, shards included; terms are those of `shards`."""
    draining: frozenset[str] = frozenset()
    """Nodes that are to be left."""


class ClusterStore:
    """The coordinator's view of Postgres.

    Args:
        pool: at least two connections: while a move waits for a lock, the other ends who holds it.
        settings: `connect_timeout_s` bounds the wait for a free connection.
        fence_wait_s: how long a move waits for transactions of the losing shards before it ends their
            sessions. A stopped process may hold its transaction open for ever; what it had not committed was
            never acknowledged.
    """

    def __init__(self, pool: asyncpg.Pool, settings: PostgresSettings, fence_wait_s: float = 1.0) -> None:
        self._pool = pool
        self._timeout_s = settings.connect_timeout_s
        self._fence_wait_s = fence_wait_s
        self._sql = load_queries("cluster")

    @property
    def pool(self) -> asyncpg.Pool:
        """The pool given."""
        return self._pool

    async def close(self) -> None:
        """Close the pool; connections that do not close in time are dropped."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._pool.close()
        except (asyncpg.PostgresError, *UNAVAILABLE):
            self._pool.terminate()

    async def take_epoch(self) -> int:
        """Begin a new coordinator epoch; every older coordinator is fenced from here on.

        Raises:
            StoreUnavailableError: Postgres does not answer.
        """
        async with acquired(self._pool, self._timeout_s) as connection:
            epoch: Any = await connection.fetchval(self._sql["take_epoch"])
            return int(epoch)

    async def load(self) -> StoredMap:
        """Read the whole map. Raises StoreUnavailableError."""
        async with (
            acquired(self._pool, self._timeout_s) as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            owners: list[str | None] = [None] * SLOTS
            for row in await connection.fetch(self._sql["load_slots"]):
                if 0 <= row["slot"] < SLOTS:
                    owners[row["slot"]] = row["shard"]
            shards = {
                row["shard"]: ShardRow(**row) for row in await connection.fetch(self._sql["load_shards"])
            }
            text = await connection.fetchval(self._sql["load_members"])
            draining = await connection.fetchval(self._sql["load_draining"])
        members: list[Member] = []
        if text:
            try:
                members = msgspec.json.decode(text, type=list[Member])
            except msgspec.DecodeError as exc:  # written by another version: members join again anyway
                log.warning("the saved members cannot be read, going on without: %s", exc)
        terms = {name: row.term for name, row in shards.items()}
        members = [
            msgspec.structs.replace(member, term=terms.get(member.name, 0))
            for member in members
            if member.kind != "shard" or member.name in shards
        ]
        nodes = frozenset(msgspec.json.decode(draining, type=list[str])) if draining else frozenset[str]()
        return StoredMap(owners, shards, members, nodes)

    async def register_shard(self, epoch: int, shard: str, node: str, incarnation: str) -> int:
        """Give a shard's process its term: a new one for a new incarnation, the same for the same.

        Raises:
            FencedError: a newer coordinator exists.
            StoreUnavailableError: Postgres does not answer; nothing is changed, or the term is one higher.
        """
        async with self._transaction(epoch) as connection:
            term: Any = await connection.fetchval(self._sql["register_shard"], shard, node, incarnation)
            return int(term)

    async def move_slots(self, epoch: int, moves: Mapping[int, str | None]) -> dict[str, int]:
        """Give slots to new owners and begin a new term for every shard that loses one.

        Atomicity: one transaction. Terms and owners change together, after every write transaction of the
        losers has ended; those that begin later find the new term and abort.

        Args:
            epoch: this coordinator's.
            moves: new owner per slot; None makes it ownerless.

        Returns:
            The new term of each shard that lost slots.

        Raises:
            FencedError: a newer coordinator exists.
            StoreUnavailableError: Postgres does not answer. Like any lost commit, it may have happened:
                read the map again before the next move.
        """
        slots, owners = list(moves), list(moves.values())
        async with self._transaction(epoch) as connection:
            changing = await connection.fetch(self._sql["slots_to_move"], slots, owners)
            losers = sorted({row["loser"] for row in changing if row["loser"] is not None})
            terms: dict[str, int] = {}
            if losers:
                rows = await self._bump(connection, losers)
                terms = {row["shard"]: int(row["term"]) for row in rows}
            await connection.execute(self._sql["set_owners"], slots, owners)
            return terms

    async def save_members(self, epoch: int, members: Sequence[Member]) -> None:
        """Keep the members of the present map for the next coordinator. Raises like `register_shard`."""
        async with self._transaction(epoch) as connection:
            await connection.execute(self._sql["save_members"], msgspec.json.encode(members).decode())

    async def save_draining(self, epoch: int, nodes: Collection[str]) -> None:
        """Keep which nodes are to be left. Raises like `register_shard`."""
        async with self._transaction(epoch) as connection:
            await connection.execute(self._sql["save_draining"], msgspec.json.encode(sorted(nodes)).decode())

    async def forget_old_shards(self, epoch: int, keep: Collection[str] = ()) -> None:
        """Delete rows of shards that own nothing and have not begun a term for a week, but for `keep`."""
        async with self._transaction(epoch) as connection:
            await connection.execute(self._sql["forget_old_shards"], list(keep))
            await connection.execute(self._sql["forget_old_marks"])

    @contextlib.asynccontextmanager
    async def _transaction(self, epoch: int) -> AsyncIterator[asyncpg.Connection]:
        async with acquired(self._pool, self._timeout_s) as connection, connection.transaction():
            present = await connection.fetchval(self._sql["check_epoch"])
            if present != epoch:
                raise FencedError(f"coordinator epoch {epoch} is over: the present one is {present}")
            yield connection

    async def _bump(self, connection: asyncpg.Connection, losers: list[str]) -> list[Any]:
        """Bump the losers' terms, ending sessions that hold their rows for too long."""
        backend: Any = await connection.fetchval(self._sql["backend"])
        watch = asyncio.get_running_loop().create_task(self._end_blockers(backend))
        try:
            return await connection.fetch(self._sql["bump_terms"], losers)
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch

    async def _end_blockers(self, backend: int) -> None:
        while True:
            await asyncio.sleep(self._fence_wait_s)
            try:
                async with acquired(self._pool, self._timeout_s) as connection:
                    ended = await connection.fetchval(self._sql["end_blockers"], backend)
            except Exception as exc:  # the move fails or succeeds by itself
                log.warning("cannot end the transactions that a move of slots waits for: %s", exc)
                continue
            if ended:
                log.warning("a move of slots ended %d sessions that held a lost shard's row", ended)
