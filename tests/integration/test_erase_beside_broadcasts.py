"""Erasing a user who is on the list of a running broadcast: neither waits for the other for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from carillon.broadcasts import RUNNING, parse_recipients
from carillon.ids import Uuid7Source, slot_of
from stores.postgres.broadcasts import BroadcastStore, NewBroadcast
from stores.postgres.pool import open_pool
from stores.postgres.tenants import TenantStore
from stores.postgres.users import UserStore
from tests.actors.fakes import fast_settings
from tests.support import eventually

ids = Uuid7Source()
NOW_MS = 1_790_000_000_000


class Beside:
    """A tenant, a term of a shard, users, and chunks of broadcasts that a test writes by hand."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self.pool = pool
        self.users = UserStore(pool)
        self.broadcasts = BroadcastStore(pool)

    async def stream(self, user: str) -> int:
        return await self.pool.fetchval(
            "insert into streams (tenant, user_id, slot, epoch) values ('acme', $1, $2, 'e')"
            " returning stream_id",
            user,
            slot_of("acme", user),
        )

    async def broadcast(self, users: list[str]) -> bytes:
        raw = ids.next(NOW_MS)
        new = NewBroadcast(raw, parse_recipients(users), '{"type":"t","title":"x"}', RUNNING, NOW_MS)
        await self.broadcasts.add("acme", new, NOW_MS)
        return raw

    async def enter(self, connection: Any, broadcast: bytes) -> None:
        """The beginning of a chunk's transaction, as the shard does it."""
        await self.broadcasts.enter(connection, "shard-a", 1, broadcast, [], (bytes(16), b"\xff" * 16))

    async def append(self, connection: Any, streams: list[int]) -> None:
        """What a chunk does to streams, as far as locks go."""
        await connection.execute(
            "update streams set rev = rev + 1 where stream_id = any ($1::bigint[])", sorted(streams)
        )

    async def erase(self, user: str) -> None:
        assert await self.users.erase("shard-a", 1, "acme", user, slot_of("acme", user), NOW_MS, NOW_MS)

    async def waiting(self, many: int = 1) -> None:
        """Return when so many connections wait for a lock."""

        async def waits() -> bool:
            found = await self.pool.fetchval(
                "select count(*) from pg_stat_activity where datname = current_database()"
                " and wait_event_type = 'Lock'"
            )
            return found >= many

        await eventually(waits)

    async def named(self, user: str) -> int:
        return await self.pool.fetchval(
            "select count(*) from broadcasts where audience like $1", f'%"{user}"%'
        )


@pytest.fixture
async def beside(postgres_dsn: str) -> AsyncIterator[Beside]:
    pool = await open_pool(fast_settings(postgres={"dsn": postgres_dsn}).postgres, 12)
    await TenantStore(pool).create_tenant("acme")
    await pool.execute("insert into shards (shard, term, node, incarnation) values ('shard-a', 1, 'n', 'i')")
    yield Beside(pool)
    await pool.close()


async def test_a_chunk_and_an_erasure_take_turns(beside: Beside) -> None:
    """A chunk that has begun when the erasure comes writes to the user's stream, then the erasure goes on:
    nobody is ended by PostgreSQL for a deadlock."""
    stream = await beside.stream("ada")
    broadcast = await beside.broadcast(["ada", "bob"])
    async with beside.pool.acquire() as connection, connection.transaction():
        await beside.enter(connection, broadcast)
        erasure = asyncio.ensure_future(beside.erase("ada"))
        await beside.waiting()
        await beside.append(connection, [stream])
    await erasure
    assert await beside.named("ada") == 0
    assert await beside.named("bob") == 1
    assert await beside.pool.fetchval("select count(*) from streams where user_id = 'ada'") == 0


async def test_a_broadcast_that_comes_meanwhile(beside: Beside) -> None:
    """One that names the user after the erasure looked for lists, and before it holds the stream, is in none
    of them; its chunk, too, meets no deadlock, and the name is gone from it."""
    stream = await beside.stream("ada")
    async with beside.pool.acquire() as connection:
        event = connection.transaction()
        await event.start()
        await beside.append(connection, [stream])  # an event of the user is being stored
        erasure = asyncio.ensure_future(beside.erase("ada"))
        await beside.waiting()
        broadcast = await beside.broadcast(["ada", "bob"])
        await beside.pool.execute(
            "insert into schedules (tenant, schedule_id, slot, rule, event, single, due_at, next_at)"
            " values ('acme', gen_random_uuid(), 0, '{}', $1, false, now(), now())",
            '{"userIds":["ada","bob"]}',
        )
        async with beside.pool.acquire() as other, other.transaction():
            await beside.enter(other, broadcast)
            chunk = asyncio.ensure_future(beside.append(other, [stream]))
            await beside.waiting(2)
            await event.commit()  # the erasure is the first of the two who wait for the stream
            await chunk
    await erasure
    assert (await beside.named("ada"), await beside.named("bob")) == (0, 1)
    events = await beside.pool.fetch("select event from schedules")
    assert [row["event"] for row in events] == ['{"userIds": ["bob"]}']


async def test_many_at_once(beside: Beside) -> None:
    """Twelve users on the lists of eight broadcasts are erased while chunks of all of them are written."""
    names = [f"u{n}" for n in range(12)]
    streams = {name: await beside.stream(name) for name in names}
    made = [await beside.broadcast([*names[n:], *names[:n], "stays"]) for n in range(8)]

    async def chunks(broadcast: bytes, turn: int) -> None:
        for at in range(12):
            mine = [streams[names[(at + turn + more) % 12]] for more in range(4)]
            async with beside.pool.acquire() as connection, connection.transaction():
                await beside.enter(connection, broadcast)
                await beside.append(connection, mine)

    async with asyncio.timeout(30):
        await asyncio.gather(
            *(chunks(broadcast, turn) for turn, broadcast in enumerate(made)), *map(beside.erase, names)
        )
    assert [await beside.named(name) for name in names] == [0] * 12
    assert await beside.named("stays") == 8
    assert await beside.pool.fetchval("select count(*) from streams") == 0
