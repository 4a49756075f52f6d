"""Pushes kept in their notification, in a real PostgreSQL: how they become rows, and who finds them."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from carillon.errors import FencedError
from carillon.ids import UserKey, Uuid7Source, least_uuid7, slot_of
from carillon.kept_push import KeptPush
from carillon.messages import Event
from carillon.settings import PostgresSettings
from stores.postgres import shard_kept
from stores.postgres.cluster import ClusterStore
from stores.postgres.feed import FeedReader
from stores.postgres.pool import open_pool
from stores.postgres.shard_rows import AppendRow, SignalRow
from stores.postgres.shard_store import ShardStore

NOW = 1_800_000_000_000
KEY = UserKey("t", "u")
SLOT = slot_of(*KEY)


class World:
    """Two shards, one user, the coordinator's store; shard-a owns the user's slot."""

    def __init__(self, dsn: str, pool: asyncpg.Pool) -> None:
        self.pool = pool
        settings = PostgresSettings(dsn=dsn)
        self.cluster = ClusterStore(pool, settings, fence_wait_s=0.2)
        self.stores = {name: ShardStore(settings, name) for name in ("shard-a", "shard-b", "shard-c")}
        self.terms: dict[str, int] = {}
        self.ids = Uuid7Source()
        self.stream = 0

    async def open(self) -> None:
        self.epoch = await self.cluster.take_epoch()
        for name, store in self.stores.items():
            await store.open()
            self.terms[name] = await self.cluster.register_shard(self.epoch, name, "n", "i")
        await self.move("shard-a")
        (user,) = await self.stores["shard-a"].load_users(self.terms["shard-a"], [(KEY, SLOT, "e1")])
        self.stream = user.stream_id

    async def move(self, owner: str) -> None:
        self.terms |= await self.cluster.move_slots(self.epoch, {SLOT: owner})

    async def append(self, shard: str = "shard-a", at_ms: int = NOW) -> KeptPush:
        """A notification that keeps its push."""
        raw = self.ids.next(at_ms)
        event = Event(raw, "t", "u", SLOT, "test", None, 1, '"title":"x"', at_ms)
        push = KeptPush(raw, self.stream, SLOT, ["push"], at_ms + 5000, at_ms + 60_000)
        row = AppendRow(event, self.stream, 0, kept=push.text())
        store = self.stores[shard]
        await store.append(self.terms[store.shard], {self.stream: 1}, [row], [], at_ms)
        return push

    async def mark(self, shard: str, at_ms: int) -> None:
        await self.stores[shard].mark_kept(self.terms[shard], least_uuid7(at_ms))

    async def adopt(self, shard: str, streams: list[int] | None = None) -> int:
        return await self.stores[shard].adopt_kept(self.terms[shard], [SLOT], NOW + 100, streams)

    async def rows(self) -> list[tuple[Any, ...]]:
        found = await self.pool.fetch(
            "select notification_id, channel, state, gate, round(extract(epoch from due_at) * 1000)::bigint,"
            " coalesce(shown_on, '{}') from deliveries order by id"
        )
        return [(r[0].bytes, *tuple(r)[1:]) for r in found]


@pytest.fixture
async def world(postgres_dsn: str) -> AsyncIterator[World]:
    pool = await open_pool(PostgresSettings(dsn=postgres_dsn), 3)
    made = World(postgres_dsn, pool)
    await made.open()
    try:
        yield made
    finally:
        for store in made.stores.values():
            await store.close()
        await pool.close()


async def test_the_next_owner_finds_what_was_kept(world: World) -> None:
    """Slots move: what the loser kept behind its mark becomes rows, once, with all that was known of it."""
    await world.mark("shard-a", NOW - 1000)
    kept, held, ended = [await world.append() for _ in range(3)]
    texts = [
        (held, held.follow("active", "phone", NOW)[1], True),
        (ended, ended.follow("silent", "", NOW)[1], True),
    ]
    await world.stores["shard-a"].acknowledge_kept(world.terms["shard-a"], texts, NOW)
    await world.move("shard-b")
    assert await world.adopt("shard-b") == 2
    assert await world.rows() == [
        (kept.notification, "push", "planned", None, NOW + 5000, []),
        (held.notification, "push", "planned", "held", NOW + 60_000, ["phone"]),
    ]
    assert await world.adopt("shard-b") == 0
    assert await world.pool.fetchval("select count(*) from slots where kept_from is not null") == 0


async def test_a_mark_outlives_an_owner_who_never_looked(world: World) -> None:
    """A to B to C: B dies before it has looked for what A kept, and C finds that."""
    await world.mark("shard-a", NOW - 1000)
    await world.append()
    await world.move("shard-b")
    await world.mark("shard-b", NOW + 50_000)
    await world.move("shard-c")
    assert await world.adopt("shard-c") == 1


async def test_the_same_shard_again_finds_its_own(world: World) -> None:
    """A process in place of one that died, under a new term, with the mark that it left."""
    await world.mark("shard-a", NOW - 1000)
    await world.append()
    world.terms["shard-a"] = await world.cluster.register_shard(world.epoch, "shard-a", "n", "another")
    assert await world.adopt("shard-a") == 1


async def test_only_what_is_asked_for_is_adopted(world: World) -> None:
    """By streams: others stay; and without a mark nothing was ever kept."""
    await world.append()
    assert await world.adopt("shard-a") == 0, "there is no mark"
    await world.mark("shard-a", NOW - 1000)
    assert await world.adopt("shard-a", [world.stream + 1]) == 0
    assert await world.adopt("shard-a", [world.stream]) == 1


async def test_pages_cover_everything(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """More notifications than one statement looks at: all of them are found."""
    monkeypatch.setattr(shard_kept, "PAGE", 2)
    monkeypatch.setattr(shard_kept, "_SQL", shard_kept.texts(2))
    await world.mark("shard-a", NOW - 1000)
    pushes = [await world.append(at_ms=NOW + n) for n in range(6)]
    assert await world.adopt("shard-a") == 6
    assert [row[0] for row in await world.rows()] == [push.notification for push in pushes]


async def test_what_is_written_twice_is_one_row(world: World) -> None:
    """An answer was lost and the statement is said again; the next owner looks, too."""
    await world.mark("shard-a", NOW - 1000)
    push = await world.append()
    store, term = world.stores["shard-a"], world.terms["shard-a"]
    assert await store.write_kept(term, [push], NOW) == 1
    assert await store.write_kept(term, [push], NOW) == 0
    assert await world.adopt("shard-a") == 0
    assert len(await world.rows()) == 1


async def test_a_term_that_is_over_writes_nothing(world: World) -> None:
    """Every statement about kept pushes is fenced."""
    await world.mark("shard-a", NOW - 1000)
    push = await world.append()
    old = world.terms["shard-a"]
    await world.move("shard-b")
    store = world.stores["shard-a"]
    for call in (
        store.acknowledge_kept(old, [(push, "-" + push.text(), True)], NOW),
        store.write_kept(old, [push], NOW),
        store.adopt_kept(old, [SLOT], NOW),
        store.mark_kept(old, least_uuid7(NOW + 9000)),
    ):
        with pytest.raises(FencedError):
            await call
    assert await world.rows() == []
    assert await world.adopt("shard-b") == 1


async def test_readers_tell_of_kept_pushes(world: World) -> None:
    """A notification that is read by id has its push, before and after the acknowledgement."""
    push = await world.append()
    feed = FeedReader(world.pool)
    found = await feed.notification("t", push.notification)
    assert found is not None
    assert [(d["channel"], d["state"], d["reason"]) for d in found.deliveries] == [("push", "planned", None)]
    text = push.follow("silent", "", NOW)[1]
    await world.stores["shard-a"].acknowledge_kept(world.terms["shard-a"], [(push, text, True)], NOW + 40)
    found = await feed.notification("t", push.notification)
    assert found is not None
    [told] = found.deliveries
    assert (told["state"], told["reason"], told["updated_ms"]) == ("cancelled", "acknowledged", NOW + 40)
    assert found.row.delivered_ms == NOW + 40
    raw = uuid.UUID(bytes=push.notification)
    assert await world.pool.fetchval("select kept from notifications where id = $1", raw) == text


async def test_acknowledgements_alone_wait_for_no_disk(world: World, postgres_dsn: str) -> None:
    """What they write is committed without waiting; whatever comes next on their connection waits again."""
    waits = postgres_dsn + ("&" if "?" in postgres_dsn else "?") + "synchronous_commit=local"
    store = ShardStore(PostgresSettings(dsn=waits, shard_pool_size=3), "shard-a")
    term = world.terms["shard-a"]
    await store.open()
    world.stores["again"] = store  # closed with the others
    push = await world.append()
    await world.pool.execute(
        "create table told (setting text);"
        "create function note() returns trigger language plpgsql as"
        " $$ begin insert into told select current_setting('synchronous_commit'); return new; end $$;"
        "create trigger noted after update on notifications for each statement execute function note();"
        "create trigger noted after update on streams for each statement execute function note()"
    )

    async def told() -> list[str]:
        return [r[0] for r in await world.pool.fetch("select setting from told")]

    await store.acknowledge_kept(term, [(push, "-" + push.text(), True)], NOW)
    await store.acknowledge(term, [SignalRow(world.stream, push.notification, "silent")], NOW)
    await store.save_last_seen(term, [(world.stream, NOW)])
    assert await told() == ["off"] * 3
    await world.append("again")
    assert await told() == ["off"] * 3 + ["local"]
    async with store.pool.acquire() as one, store.pool.acquire() as two:
        setting = "select current_setting('synchronous_commit')"
        assert {await one.fetchval(setting), await two.fetchval(setting)} == {"local"}
