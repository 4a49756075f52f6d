"""The slot map in Postgres: terms, moves and the fencing of coordinators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from carillon.errors import FencedError, StoreUnavailableError
from carillon.ids import SLOTS
from carillon.messages import Address, Member
from carillon.settings import PostgresSettings
from stores.postgres.cluster import ClusterStore
from stores.postgres.pool import UNAVAILABLE, open_pool
from tests.support import eventually


@pytest.fixture
async def store(postgres_dsn: str) -> AsyncIterator[ClusterStore]:
    settings = PostgresSettings(dsn=postgres_dsn)
    made = ClusterStore(await open_pool(settings, 3), settings, fence_wait_s=0.2)
    yield made
    await made.close()


async def term_of(store: ClusterStore, shard: str) -> int:
    return (await store.load()).shards[shard].term


async def test_a_new_database_has_no_owners(store: ClusterStore) -> None:
    """Nobody owns anything until the first shard joins."""
    stored = await store.load()
    assert stored.owners == [None] * SLOTS
    assert stored.shards == {}
    assert stored.members == []


async def test_each_incarnation_of_a_shard_gets_a_new_term(store: ClusterStore) -> None:
    """A restart begins a term; asking again for the same process does not."""
    epoch = await store.take_epoch()
    first = await store.register_shard(epoch, "s", "n", "i1")
    assert await store.register_shard(epoch, "s", "n", "i1") == first
    second = await store.register_shard(epoch, "s", "n", "i2")
    assert second == first + 1
    assert (await store.load()).shards["s"].incarnation == "i2"


async def test_a_move_changes_owners_and_bumps_only_the_losers(store: ClusterStore) -> None:
    """Losing a slot ends a term; gaining one does not, and a move to the present owner is none."""
    epoch = await store.take_epoch()
    for shard in "ab":
        await store.register_shard(epoch, shard, "n", "i")
    assert await store.move_slots(epoch, dict.fromkeys(range(SLOTS), "a")) == {}
    assert await store.move_slots(epoch, {0: "a", 1: "a"}) == {}
    assert await store.move_slots(epoch, {0: "b", 1: "a", 2: None}) == {"a": 2}
    stored = await store.load()
    assert stored.owners[:4] == ["b", "a", None, "a"]
    assert (stored.shards["a"].term, stored.shards["b"].term) == (2, 1)


async def test_an_older_coordinator_cannot_change_anything(store: ClusterStore) -> None:
    """After the next epoch was taken every write of the one before is refused."""
    old = await store.take_epoch()
    new = await store.take_epoch()
    assert new == old + 1
    for write in (
        store.register_shard(old, "s", "n", "i"),
        store.move_slots(old, {0: "s"}),
        store.save_members(old, []),
        store.forget_old_shards(old),
    ):
        with pytest.raises(FencedError, match="epoch"):
            await write
    assert (await store.load()).shards == {}
    assert await store.register_shard(new, "s", "n", "i") == 1


async def test_members_are_kept_with_the_present_terms(store: ClusterStore) -> None:
    """What one coordinator saved the next one loads; a shard's term is that of its row."""
    epoch = await store.take_epoch()
    await store.register_shard(epoch, "s", "n", "i")
    shard = Member("shard", "s", "n", "i", Address("h", 1, "/x", "m"), term=1)
    pool = Member("pool", "p", "n", "j", Address("h", 2), labels={"provider": "fcm"})
    await store.save_members(epoch, [shard, pool])
    await store.register_shard(epoch, "s", "n", "i2")
    saved_shard, saved_pool = (await store.load()).members
    assert saved_pool == pool
    assert (saved_shard.address, saved_shard.term) == (shard.address, 2)


async def holding(dsn: str, shard: str) -> tuple[asyncpg.Connection[Any], Any]:
    """A shard's write transaction that has checked its term and not yet committed."""
    connection = await asyncpg.connect(dsn)
    transaction = connection.transaction()
    await transaction.start()
    await connection.fetchval("select term from shards where shard = $1 for share", shard)
    return connection, transaction


async def test_a_move_waits_for_the_losers_write_in_flight(store: ClusterStore, postgres_dsn: str) -> None:
    """The new owner cannot begin before the old one's last commit."""
    epoch = await store.take_epoch()
    for shard in "ab":
        await store.register_shard(epoch, shard, "n", "i")
    await store.move_slots(epoch, {0: "a"})
    patient = ClusterStore(store.pool, PostgresSettings(dsn=postgres_dsn), fence_wait_s=60.0)
    connection, transaction = await holding(postgres_dsn, "a")
    move = asyncio.ensure_future(patient.move_slots(epoch, {0: "b"}))

    async def waits() -> bool:
        return await connection.fetchval(
            "select exists (select from pg_stat_activity where pg_backend_pid() = any(pg_blocking_pids(pid)))"
        )

    await eventually(waits, what="the move waits for the transaction")
    assert not move.done()
    await transaction.commit()
    assert await move == {"a": 2}
    await connection.close()


async def test_a_move_ends_a_transaction_that_stays_open(store: ClusterStore, postgres_dsn: str) -> None:
    """A stopped process cannot hold its slots for ever: its session is ended, its write never commits."""
    epoch = await store.take_epoch()
    for shard in "ab":
        await store.register_shard(epoch, shard, "n", "i")
    await store.move_slots(epoch, {0: "a"})
    connection, transaction = await holding(postgres_dsn, "a")
    assert await asyncio.wait_for(store.move_slots(epoch, {0: "b"}), 10) == {"a": 2}
    with pytest.raises((asyncpg.PostgresError, *UNAVAILABLE)):  # what the driver says depends on the moment
        await transaction.commit()
    connection.terminate()


async def test_rows_of_shards_are_forgotten_only_when_old_and_empty(store: ClusterStore) -> None:
    """A week without a term and without a slot; what is kept by name stays."""
    epoch = await store.take_epoch()
    for shard in ("owner", "kept", "old", "young"):
        await store.register_shard(epoch, shard, "n", "i")
    await store.move_slots(epoch, {0: "owner"})
    await store.pool.execute(
        "update shards set updated_at = now() - interval '8 days' where shard <> 'young'"
    )
    await store.forget_old_shards(epoch, ["kept"])
    assert set((await store.load()).shards) == {"owner", "kept", "young"}


async def test_a_database_that_is_gone_is_unavailable_and_not_an_error(store: ClusterStore) -> None:
    """Driver errors come out as StoreUnavailableError."""
    epoch = await store.take_epoch()
    await store.pool.close()
    with pytest.raises(StoreUnavailableError):
        await store.move_slots(epoch, {0: "a"})
