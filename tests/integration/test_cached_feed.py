"""Feeds through Redis: never older than Postgres, and none the worse without Redis."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio as aioredis

from carillon.clock import SystemClock
from carillon.hot_feed import hot_count
from carillon.metrics import Stats
from carillon.notification import notification_json
from carillon.settings import PostgresSettings, RedisSettings
from stores.cached_feed import CachedFeed
from stores.postgres.feed import FeedFilter, FeedReader
from stores.postgres.pool import open_pool
from stores.redis.hot_feed import HotFeedStore
from tests.integration.ingress_world import World, store_notifications
from tests.support import eventually

CLOCK = SystemClock()
NOW = CLOCK.now_ms()
FEED = "carillon:feed:4:acme:ada"
COUNT = "carillon:count:4:acme:ada"


class Kit:
    """A cached feed, Redis as it is, and the truth beside it."""

    def __init__(self, pool: Any, url: str, **settings: Any) -> None:
        self.pool = pool
        self.stats = Stats()
        self.reader = FeedReader(pool)
        redis_settings = RedisSettings(url=url, **{"feed_from_reads": 1, **settings})
        self.feed = CachedFeed(self.reader, HotFeedStore(redis_settings, CLOCK), self.stats, redis_settings)
        self.redis = aioredis.Redis.from_url(url)

    async def seqs(self, limit: int = 20, cursor: str | None = None, status: str | None = None) -> list[int]:
        """The page's positions, after it was compared with Postgres."""
        chosen = FeedFilter(status)
        page = await self.feed.page("acme", "ada", NOW, limit=limit, cursor=cursor, chosen=chosen)
        rows, after = await self.reader.page("acme", "ada", NOW, limit=limit, cursor=cursor, chosen=chosen)
        assert page.notifications == [notification_json(row, '"ada"') for row in rows]
        assert page.cursor == after
        return [row.seq for row in rows]

    async def count(self) -> tuple[int, int]:
        """The count, after it was compared with Postgres."""
        counted = await self.feed.unread_count("acme", "ada", NOW)
        assert counted == await self.reader.unread_count("acme", "ada", NOW)
        return counted

    def read_from(self, kind: str) -> tuple[float, float]:
        """How often (Redis, Postgres) answered."""
        counters = self.stats.counters
        return counters[f'{kind}_reads{{from="redis"}}'], counters[f'{kind}_reads{{from="postgres"}}']

    async def written(self, *keys: str) -> None:
        """Wait until Redis holds the keys."""

        async def there() -> bool:
            return await self.redis.exists(*keys) == len(keys)

        await eventually(there)


@pytest.fixture
async def pool(postgres_dsn: str) -> AsyncIterator[Any]:
    opened = await open_pool(PostgresSettings(dsn=postgres_dsn), 3)
    yield opened
    await opened.close()


@pytest.fixture
async def kit(pool: Any, redis_url: str) -> AsyncIterator[Kit]:
    made = Kit(pool, redis_url)
    yield made
    await made.feed.close()
    await made.redis.aclose()


async def change(pool: Any, what: str, seq: int) -> None:
    """What the owner does in one transaction: a state of a row, and the stream's rev."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute(f"update notifications set {what} where seq = $1", seq)
        await connection.execute("update streams set rev = rev + 1, unread = unread - 1")


async def test_who_never_reads_costs_nothing(kit: Kit, postgres_dsn: str) -> None:
    """Storing writes nothing to Redis; the first read does, and the second is answered from there."""
    await store_notifications(postgres_dsn, "acme", "ada", 30)
    assert await kit.redis.keys("carillon:*") == []
    assert await kit.seqs() == list(range(30, 10, -1))
    assert await kit.count() == (30, 30)
    await kit.written(FEED, COUNT)
    assert await kit.seqs() == list(range(30, 10, -1))
    assert await kit.seqs(limit=7) == list(range(30, 23, -1))
    assert await kit.seqs(limit=7, status="unread") == list(range(30, 23, -1))
    assert await kit.count() == (30, 30)
    assert (kit.read_from("feed"), kit.read_from("count")) == ((3, 1), (1, 1))
    assert 0 < await kit.redis.pttl(FEED) <= 300_000


async def test_the_last_hundred(kit: Kit, postgres_dsn: str) -> None:
    """Pages that follow each other are put together up to a hundred; deeper ones are Postgres' business."""
    await store_notifications(postgres_dsn, "acme", "ada", 150)
    for _ in range(2):
        cursor = None
        for _ in range(6):
            page = await kit.feed.page("acme", "ada", NOW, limit=25, cursor=cursor)
            await eventually(lambda: kit.feed._hot._writer is None, what="the entry was written")
            await kit.seqs(limit=25, cursor=cursor)
            await eventually(lambda: kit.feed._hot._writer is None, what="the entry was written")
            cursor = page.cursor
        assert cursor is None
    assert await kit.seqs(limit=100) == list(range(150, 50, -1))
    # Of each page two reads a turn, the comparison not counted: the fifth and sixth are beyond the hundred.
    assert kit.read_from("feed") == (4 + 2 * 4 + 1, 4 + 2 * 2 * 2)


async def test_every_change_is_seen_at_once(kit: Kit, postgres_dsn: str) -> None:
    """A read after a commit shows it, although Redis was told nothing."""
    await store_notifications(postgres_dsn, "acme", "ada", 9)
    assert await kit.seqs() == list(range(9, 0, -1))
    await kit.count()
    await kit.written(FEED, COUNT)
    await change(kit.pool, "read_at = now()", 9)
    assert await kit.seqs(status="unread") == list(range(8, 0, -1))
    assert await kit.count() == (8, 10)
    await change(kit.pool, "archived_at = now()", 8)
    assert await kit.seqs() == [9, 7, 6, 5, 4, 3, 2, 1]
    await store_notifications(postgres_dsn, "acme", "ada", 1)
    assert (await kit.seqs())[0] == 10
    await kit.pool.execute("update streams set epoch = 'e2'")  # history restored: the same rev, another past
    await kit.pool.execute(
        "update notifications set content = replace(content, 'n10', 'other') where seq = 10"
    )
    assert (await kit.seqs())[0] == 10
    assert kit.read_from("feed")[0] == 0


async def test_acknowledgements_are_seen_without_a_rev(kit: Kit, postgres_dsn: str) -> None:
    """deliveredAt comes without a rev: a page of which a row was acknowledged since is read anew."""
    await store_notifications(postgres_dsn, "acme", "ada", 5)
    await kit.seqs()
    await kit.written(FEED)
    await kit.seqs()
    assert kit.read_from("feed") == (1, 1)
    await kit.pool.execute("update notifications set delivered_at = now() where seq = 3")
    await kit.seqs()
    assert kit.read_from("feed") == (1, 2)

    async def again() -> bool:
        await kit.seqs()
        return kit.read_from("feed")[0] == 2

    await eventually(again)
    await kit.seqs(limit=2)


async def test_expiry_is_seen_without_a_rev(kit: Kit, postgres_dsn: str) -> None:
    """What expires leaves page and count at its time, from Redis, too."""
    await store_notifications(postgres_dsn, "acme", "ada", 4)
    for seq, ms in ((1, NOW - 5000), (2, NOW + 5000)):
        await kit.pool.execute(
            "update notifications set expires_at = to_timestamp($2::float8) where seq = $1", seq, ms / 1000
        )
    assert await kit.seqs() == [4, 3, 2]
    assert await kit.count() == (3, 4)
    await kit.written(FEED, COUNT)
    for now_ms, expected in ((NOW, 3), (NOW + 6000, 2)):
        page = await kit.feed.page("acme", "ada", now_ms, limit=9)
        assert len(page.notifications) == expected
        assert await kit.feed.unread_count("acme", "ada", now_ms) == (expected, 4)
    assert kit.read_from("feed") == (2, 1)
    assert kit.read_from("count") == (1, 2)


@pytest.mark.parametrize("seed", range(4))
async def test_any_order_of_reads_and_changes(kit: Kit, postgres_dsn: str, seed: int) -> None:
    """Reads and changes at once, in any order: each read tells a state between its beginning and its end."""
    rng = random.Random(seed)
    await store_notifications(postgres_dsn, "acme", "ada", 40)
    states = ("read_at", "archived_at", "dismissed_at", "seen_at")

    async def changes() -> None:
        for _ in range(25):
            await change(kit.pool, f"{rng.choice(states)} = now()", rng.randrange(1, 41))
            if rng.random() < 0.3:
                await kit.pool.execute(
                    "update notifications set delivered_at = now() where seq = $1", rng.randrange(1, 41)
                )
            await asyncio.sleep(rng.random() * 0.004)

    async def reads() -> None:
        for _ in range(60):
            before = await kit.pool.fetchval("select rev from streams")
            _, rev = await kit.feed.unread_count("acme", "ada", NOW)
            after = await kit.pool.fetchval("select rev from streams")
            assert before <= rev <= after
            await kit.feed.page("acme", "ada", NOW, limit=rng.choice((5, 20)))
            await asyncio.sleep(rng.random() * 0.002)

    await asyncio.gather(changes(), reads(), reads())
    for limit in (5, 20, 100):
        for status in (None, "unread", "read"):
            await kit.seqs(limit, status=status)
    await kit.count()


@pytest.mark.parametrize("data", [b"", b"\x00garbage", b"\x95\x02\xa1e\x07\xc3\x90"])
async def test_garbage_in_redis(kit: Kit, postgres_dsn: str, data: bytes) -> None:
    """What is no entry is read from Postgres and written over."""
    await store_notifications(postgres_dsn, "acme", "ada", 3)
    await kit.redis.set(FEED, data)
    await kit.redis.set(COUNT, data)
    assert await kit.seqs() == [3, 2, 1]
    assert await kit.count() == (3, 3)

    async def replaced() -> bool:
        return await kit.redis.get(FEED) != data

    await eventually(replaced)


async def test_entries_are_bounded(pool: Any, redis_url: str, postgres_dsn: str) -> None:
    """A feed longer than the bound is not kept; with a life of 0 nothing is."""
    await store_notifications(postgres_dsn, "acme", "ada", 3)
    for settings in ({"feed_max_bytes": 100}, {"feed_ttl_s": 0.0}):
        kit = Kit(pool, redis_url, **settings)
        for _ in range(2):
            assert await kit.seqs() == [3, 2, 1]
        assert await kit.redis.exists(FEED) == 0
        assert kit.read_from("feed") == (0, 2)
        await kit.feed.close()
        await kit.redis.aclose()


async def test_a_lone_read_is_postgres_own(pool: Any, redis_url: str, postgres_dsn: str) -> None:
    """One at a time Postgres answers, and the entry is written once; many at once are answered from Redis."""
    await store_notifications(postgres_dsn, "acme", "ada", 3)
    kit = Kit(pool, redis_url, feed_from_reads=2)
    await kit.redis.config_resetstat()
    for _ in range(5):
        assert await kit.seqs() == [3, 2, 1]
        assert await kit.count() == (3, 3)
    await kit.written(FEED, COUNT)
    assert (kit.read_from("feed"), kit.read_from("count")) == ((0, 5), (0, 5))
    assert (await kit.redis.info("commandstats"))["cmdstat_set"]["calls"] == 2
    await asyncio.gather(*(kit.seqs() for _ in range(10)), *(kit.count() for _ in range(10)))
    assert kit.read_from("feed") == (9, 6)
    assert kit.read_from("count") == (10, 5)
    await kit.feed.close()
    await kit.redis.aclose()


async def test_redis_that_is_gone_costs_one_wait(pool: Any, postgres_dsn: str) -> None:
    """Refused or silent: the feed is read from Postgres, and Redis is not asked again for a while."""
    await store_notifications(postgres_dsn, "acme", "ada", 3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        for port in (1, silent.getsockname()[1]):
            kit = Kit(pool, f"redis://127.0.0.1:{port}/0", timeout_s=1.0)
            began = CLOCK.monotonic()
            for _ in range(20):
                await kit.seqs()
                await kit.count()
            assert CLOCK.monotonic() - began < 20  # a wait of each of the 40 reads would be 40 seconds
            assert kit.read_from("feed") == (0, 20)
            await kit.feed.close()
            await kit.redis.aclose()


class Hand:
    """A clock moved by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def now_ms(self) -> int:
        return round(self.now * 1000)


async def test_redis_that_hangs_is_asked_ever_less(pool: Any, redis_url: str, postgres_dsn: str) -> None:
    """After each wait in vain Redis is left alone twice as long, and used again once it answers."""
    clock = Hand()
    store = HotFeedStore(RedisSettings(url=redis_url, timeout_s=0.1), clock)
    other = aioredis.Redis.from_url(redis_url)
    await other.client_pause(4000, all=True)
    for pause_s in (0.2, 0.4, 0.8):
        assert await store.feed("acme", "ada") is None
        clock.now += pause_s - 0.01
        assert not store.available()
        clock.now += 0.02
        assert store.available()
    await other.ping()  # answered when the pause is over
    store.put_count_nowait("acme", "ada", hot_count("e", 1, 0, None), missed=True)

    async def there() -> bool:
        clock.now += 1.0
        return await store.count("acme", "ada") is not None

    await eventually(there)
    assert store._pause_s == 0
    await store.close()
    await other.aclose()


async def test_over_http(postgres_dsn: str, redis_url: str) -> None:
    """Users and services read through Redis; another user's entry is another key."""
    world = await World(postgres_dsn, redis={"url": redis_url, "feed_from_reads": 1}).start()
    try:
        await store_notifications(postgres_dsn, "acme", "ada", 3)
        await store_notifications(postgres_dsn, "acme", "a:ada", 1)

        async def reads(user: str) -> list[int]:
            mine = await world.http.get("/api/notifications", headers=world.client(user))
            theirs = await world.http.get(f"/v1/users/{user}/notifications", headers=world.service())
            assert mine.json() == theirs.json()
            return [note["seq"] for note in mine.json()["notifications"]]

        count = "/api/notifications/unread-count"

        async def from_redis() -> bool:
            assert await reads("ada") == [3, 2, 1]
            assert await reads("a:ada") == [1]
            assert (await world.http.get(count, headers=world.client())).json() == {"count": 3, "rev": 3}
            counters = world.ingress.stats.counters
            return counters['feed_reads{from="redis"}'] >= 4 and counters['count_reads{from="redis"}'] >= 1

        await eventually(from_redis)
        await world.pool.execute("update streams set rev = 4, unread = 2 where user_id = 'ada'")
        await world.pool.execute("update notifications set read_at = now() where seq = 3")
        assert (await world.http.get(count, headers=world.client())).json() == {"count": 2, "rev": 4}
        assert await reads("ada") == [3, 2, 1]
    finally:
        await world.stop()
