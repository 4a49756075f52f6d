"""API keys that rotate, end and are limited; who did what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from carillon.clock import SystemClock
from carillon.errors import InvalidInputError, NotFoundError
from carillon.events import ProblemError
from carillon.limits import key_limit, tenant_limit
from carillon.metrics import Stats
from carillon.settings import RedisSettings
from cluster.cli import main
from serve.limits import admit
from stores.postgres.pool import open_pool
from stores.postgres.tenants import TenantStore
from stores.redis.rate_limiter import RateLimiter
from tests.actors.fakes import fast_settings
from tests.integration.ingress_world import World
from tests.support import eventually

EVENT = {"userId": "ada", "type": "t", "title": "Hello"}


@pytest.fixture
async def store(postgres_dsn: str) -> AsyncIterator[TenantStore]:
    pool = await open_pool(fast_settings(postgres={"dsn": postgres_dsn}).postgres, 1)
    made = TenantStore(pool)
    await made.create_tenant("acme")
    yield made
    await pool.close()


class Hand:
    """A clock moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def now_ms(self) -> int:
        return round(self.now * 1000)


async def test_rotation(store: TenantStore) -> None:
    """A rotated key has a twin with its scopes and limit, ends after the overlap, and rotates once."""
    now_ms = SystemClock().now_ms()
    await store.create_key("acme", "mail", ["events:write"], rate_per_s=5, burst=7)
    (old,) = await store.list_keys("acme")
    await store.rotate_key("acme", old.key_id, now_ms, now_ms + 60_000)
    keys = {key.key_id: key for key in await store.list_keys("acme")}
    former = keys.pop(old.key_id)
    (new,) = keys.values()
    assert (new.scopes, new.name, new.rate_per_s, new.burst) == (old.scopes, "mail", 5.0, 7)
    assert former.rotated_to == new.key_id
    assert former.valid(now_ms + 59_000)
    assert not former.valid(now_ms + 60_001)
    for key_id in (old.key_id, "ffffffffffff"):
        with pytest.raises(NotFoundError):
            await store.rotate_key("acme", key_id, now_ms, now_ms)
    with pytest.raises(NotFoundError):
        await store.rotate_key("other", new.key_id, now_ms, now_ms)


@pytest.mark.parametrize(("rate", "burst"), [(0.0, None), (-1.0, None), (float("nan"), None), (1.0, 0)])
async def test_senseless_limits(store: TenantStore, rate: float, burst: int | None) -> None:
    """A limit that nothing can pass is refused."""
    with pytest.raises(InvalidInputError):
        await store.create_key("acme", "", ["admin"], rate_per_s=rate, burst=burst)


async def test_replicas_share_a_limit(redis_url: str) -> None:
    """Two replicas together let the burst pass, then nobody until the wait is over; a batch makes a debt."""
    clocks = Hand(), Hand()
    limiters = [RateLimiter(RedisSettings(url=redis_url), 0.0, clock) for clock in clocks]
    passed = 0
    for _ in range(10):
        for limiter in limiters:
            passed += not await limiter.take("a", 0.01, 6, 1)
    assert passed == 6
    assert 0 < await limiters[0].take("a", 0.01, 6, 1) <= 100
    assert not await limiters[0].take("b", 0.01, 6, 1000)
    assert await limiters[1].take("b", 0.01, 6, 1) > 90_000
    for limiter in limiters:
        await limiter.close()


async def test_what_is_taken_ahead_asks_nobody(redis_url: str) -> None:
    """A replica takes a part of the rate ahead, uses it without Redis, and forgets it after a second."""
    clock = Hand()
    limiter = RateLimiter(RedisSettings(url=redis_url), 0.05, clock)
    other = RateLimiter(RedisSettings(url=redis_url), 0.0, clock)
    assert not await limiter.take("a", 100.0, 100, 1)  # takes 5 more
    assert limiter._keys["a"].lease == 5
    for _ in range(5):
        assert not await limiter.take("a", 100.0, 100, 1)
    assert limiter._keys["a"].lease == 0
    assert not await limiter.take("a", 100.0, 100, 1)
    clock.now += 1.1
    assert not await limiter.take("a", 100.0, 100, 1)
    assert limiter._keys["a"].lease == 5
    await limiter.close()
    await other.close()


SLOW = 0.001
"""Per second: what passes is what is there, however long a test takes."""


async def left_in_redis(limiter: RateLimiter, key_id: str) -> int:
    """Tokens of a limit in Redis; a debt is negative."""
    return round(float(await limiter._redis.hget(f"carillon:rate:{key_id}", "tokens")))


@pytest.mark.parametrize("burst", [20, 40, 1000])
async def test_asks_at_once_lose_nothing(redis_url: str, burst: int) -> None:
    """What is in Redis, what was taken ahead and what passed are together the burst after any asks at once:
    urgent ones, batches that are split or not, and refused ones."""
    limiter = RateLimiter(RedisSettings(url=redis_url, timeout_s=5.0), 5 / SLOW, Hand())
    asks = [(0, 1, False), (0, 3, False), (0, 3, True), (1, 0, False), (1, 2, True), (0, 1, True)]
    used = refused = 0
    for at_once in (2, 6, 12, 12, 5):
        now = [asks[n % len(asks)] for n in range(at_once)]
        admitted = await asyncio.gather(
            *(limiter.admit("a", SLOW, burst, urgent, others, split=split) for urgent, others, split in now)
        )
        for (urgent, others, split), done in zip(now, admitted, strict=True):
            assert done.urgent <= urgent
            assert done.others in ((0, others) if not split else range(others + 1))
            used += urgent + done.others
            refused += others - done.others
        lease = limiter._keys["a"].lease
        assert lease >= 0
        left = await left_in_redis(limiter, "a")
        assert left > -burst  # a debt that is forgiven would be missing
        assert left + lease + used == burst
    assert bool(refused) == (burst < 50)
    await limiter.close()


async def test_a_refused_batch_leaves_what_was_taken_ahead(redis_url: str) -> None:
    """Batches larger than what was taken ahead, refused at once, leave all of it to smaller ones; urgent ones
    have it first."""
    limiter = RateLimiter(RedisSettings(url=redis_url, timeout_s=5.0), 5 / SLOW, Hand())
    assert not await limiter.take("a", SLOW, 6, 1)  # takes the other 5 ahead
    *waits, small = await asyncio.gather(*(limiter.take("a", SLOW, 6, size) for size in (6, 6, 6, 6, 1)))
    assert all(waits)
    left = 5 if small else 4
    assert limiter._keys["a"].lease == left
    urgent = await limiter.admit("a", SLOW, 6, left + 2, 1, split=False)
    assert (urgent.urgent, urgent.others) == (left, 0)
    assert limiter._keys["a"].lease == 0
    assert await left_in_redis(limiter, "a") == -2
    await limiter.close()


async def test_many_asks_at_once_do_not_mean_that_redis_is_away(redis_url: str) -> None:
    """More asks at once than connections wait for one another: all of them are counted in Redis."""
    limiter = RateLimiter(RedisSettings(url=redis_url, timeout_s=5.0), 0.0, Hand())
    waits = await asyncio.gather(*(limiter.take("a", SLOW, 60, 1) for _ in range(64)))
    assert limiter._retry_at == 0.0
    assert sum(not wait for wait in waits) == 60
    assert await left_in_redis(limiter, "a") == 0
    await limiter.close()


async def test_half_of_a_rate_is_never_refused(redis_url: str) -> None:
    """500 per second, 16 at once, pass a limit of 1,000 per second with 50 ms of it taken ahead."""
    clock = Hand()
    limiter = RateLimiter(RedisSettings(url=redis_url, timeout_s=5.0), 50 / SLOW, clock)
    refused = 0
    for _ in range(125):
        waits = await asyncio.gather(*(limiter.take("a", SLOW, 1000, 1) for _ in range(16)))
        refused += sum(map(bool, waits))
        # Redis' clock is not moved by hand: 32 ms of the rate come back instead.
        clock.now += 0.032
        await limiter.give_back("a", 32)
    assert refused == 0
    await limiter.close()


async def test_what_the_tenant_refuses_stays_the_keys(redis_url: str) -> None:
    """While its tenant's limit turns everything away a key's bucket does not drain: whoever asks next, at any
    replica, finds its burst, and no more than that."""
    clock = Hand()
    limiter = RateLimiter(RedisSettings(url=redis_url), 0.05, clock)
    services: Any = SimpleNamespace(limits=limiter, stats=Stats())
    (key,) = key_limit("acme", "drained", 0.01, 6)
    tenant = tenant_limit("acme", {"ratePerS": 0.01, "burst": 1})
    await admit(services, tenant, 1)
    for _ in range(8):
        with pytest.raises(ProblemError):
            await admit(services, (key, *tenant), 2)
        clock.now += 1.1
    other = RateLimiter(RedisSettings(url=redis_url), 0.0, Hand())
    passed = [not await other.take(key.bucket, key.rate_per_s, key.burst, 1) for _ in range(8)]
    assert passed == [True] * 6 + [False] * 2
    await limiter.close()
    await other.close()


async def test_without_redis_each_replica_keeps_the_rate() -> None:
    """Redis that does not answer is asked seldom, and the limit holds at this replica."""
    clock = Hand()
    limiter = RateLimiter(RedisSettings(url="redis://127.0.0.1:1/0", timeout_s=0.2), 0.0, clock)
    passed = [await limiter.take("a", 1.0, 3, 1) for _ in range(5)]
    assert passed[:3] == [0.0, 0.0, 0.0]
    assert all(wait == pytest.approx(1.0) for wait in passed[3:])
    clock.now += 1.0
    assert not await limiter.take("a", 1.0, 3, 1)
    await limiter.close()


async def test_the_api_limits(postgres_dsn: str, redis_url: str) -> None:
    """Events beyond a key's rate are 429 with Retry-After, every event of a batch counts, others are free."""
    world = await World(postgres_dsn, redis={"url": redis_url}, ingress={"auth_cache_s": 0.02}).start()
    try:
        limited = await world.tenants.create_key("acme", "", ["admin"], rate_per_s=0.02, burst=4)
        headers = world.service(limited)
        for count, status in ((1, 202), (3, 202), (1, 429)):
            answer = await world.http.post("/v1/events", json=[EVENT] * count, headers=headers)
            assert answer.status_code == status, answer.text
        assert answer.json()["code"] == "rate_limited"
        assert answer.json()["temporary"] is True
        assert 1 <= int(answer.headers["retry-after"]) <= 51
        assert len(world.router.events) == 4
        assert (await world.http.get("/v1/presence/ada", headers=headers)).status_code == 429
        assert (await world.event(EVENT)).status_code == 202
        key_id = limited.split("_")[1]
        await world.tenants.limit_key("acme", key_id, None)

        async def free() -> bool:
            return (await world.http.post("/v1/events", json=EVENT, headers=headers)).status_code == 202

        await eventually(free)
        now_ms = world.clock.now_ms()
        await world.tenants.rotate_key("acme", key_id, now_ms, now_ms)

        async def ended() -> bool:
            return (await world.http.post("/v1/events", json=EVENT, headers=headers)).status_code == 401

        await eventually(ended)
        revoked = await world.http.post("/v1/users/ada/sessions/revoke", headers=world.service())
        assert revoked.status_code == 200
        (noted,) = await world.tenants.audit("acme", 10)
        assert (noted.action, noted.target) == ("sessions.revoke", "ada")
        assert noted.actor == f"key:{world.key.split('_')[1]}"
    finally:
        await world.stop()


async def test_the_command_line(store: TenantStore, postgres_dsn: str, capsys: Any) -> None:
    """Keys are made, limited, rotated and revoked by commands, each of which is noted without a secret."""

    async def run(*words: str) -> str:
        assert await asyncio.to_thread(main, [*words, "--dsn", postgres_dsn]) == 0
        return capsys.readouterr().out

    key = (await run("key", "create", "acme", "--scope", "events:write", "--rate", "10")).strip()
    key_id = key.split("_")[1]
    assert "10/s, 10 at once" in await run("key", "list", "acme")
    await run("key", "limit", "acme", key_id, "--off")
    assert "/s" not in await run("key", "list", "acme")
    new = (await run("key", "rotate", "acme", key_id, "--overlap-s", "60")).split()[0]
    listed = await run("key", "list", "acme")
    assert f"replaced by {new.split('_')[1]}" in listed
    await run("key", "revoke", "acme", key_id)
    secret = (await run("tenant", "rotate-secret", "acme")).split()[2]
    told = await run("audit", "--tenant", "acme")
    actions = ["key.create", "key.limit", "key.rotate", "key.revoke", "tenant.rotate_secret"]
    assert [line.split("  ")[3] for line in told.splitlines()] == actions
    assert not any(hidden in told for hidden in (key, new, secret))
    assert await asyncio.to_thread(main, ["key", "rotate", "acme", key_id, "--dsn", postgres_dsn]) != 0
