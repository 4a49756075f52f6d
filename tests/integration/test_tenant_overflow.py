"""Beyond the rate of a tenant, through the real door, router and shard: refused, in the feed alone, or told
together; urgent ones pass."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from carillon.clock import SystemClock, rfc3339
from carillon.settings import RedisSettings
from cluster.cli import main
from stores.postgres.pool import open_pool
from stores.postgres.tenants import TenantStore
from stores.redis.rate_limiter import RateLimiter
from tests.integration.client_world import ClientWorld
from tests.integration.test_explain import Service, rules

SLOW = 0.01
"""Events per second: what is used up stays used up as long as a test takes."""


class Limited(Service):
    """A service of a tenant whose limit a test sets."""

    async def limit(self, burst: int, overflow: str, collect_s: float = 3600.0) -> None:
        """So many events, then that."""
        pool = await open_pool(self.world.settings.postgres, 1)
        await TenantStore(pool).limit_tenant("acme", SLOW, burst, overflow, collect_s)
        await pool.close()
        app = self.world.ingresses[0].app
        assert app is not None
        app.services.auth._keys.clear()
        app.services.limits._keys.clear()

    async def post(self, body: Any, path: str = "/v1/events") -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.world.key}"}
        return await self.http.post(f"{self.world.url}{path}", json=body, headers=headers)

    async def send(self, *bodies: dict[str, Any], path: str = "/v1/events") -> list[dict[str, Any]]:
        """The results of a batch."""
        answer = await self.post(list(bodies), path)
        assert answer.status_code in (200, 202), answer.text
        return answer.json()["results"]

    async def feed(self, user: str = "ada") -> list[str]:
        """Ids in the user's feed, newest first."""
        told = await self.call("GET", f"/v1/users/{user}/notifications?limit=100")
        return [one["id"] for one in told["notifications"]]


@pytest.fixture
async def service(postgres_dsn: str) -> AsyncIterator[Limited]:
    async with ClientWorld(postgres_dsn) as world, httpx.AsyncClient(timeout=60) as http:
        made = Limited(world, http)
        await made.phone()
        yield made


def body(priority: str = "normal", user: str = "ada", **more: Any) -> dict[str, Any]:
    return Service.body(user, priority=priority, **more)


async def test_overflow_to_the_feed(service: Limited) -> None:
    """Of a batch the urgent ones are pushed, what is left of the rate is, too, and the rest is accepted for
    the feed alone, with a reason and a rule; a dry run says the same. Nothing of it is lost."""
    await service.limit(3, "feed")
    told = await service.send(*(body(p) for p in ("normal", "urgent", "low", "high", "urgent", "normal")))
    assert [(one["status"], one["channels"], one.get("reason")) for one in told] == [
        ("queued", ["in_app", "push"], None),
        ("queued", ["in_app", "push"], None),
        ("stored", ["in_app"], "tenant_limit"),
        ("stored", ["in_app"], "tenant_limit"),
        ("queued", ["in_app", "push"], None),
        ("stored", ["in_app"], "tenant_limit"),
    ]
    assert await service.feed() == [one["id"] for one in reversed(told)]
    why = await service.explain(told[2])
    assert rules(why) == [("tenant_limit", "tenant")]
    assert (why["deliveries"], why["channels"]) == ([], ["in_app"])
    assert why["words"] == "The tenant's rate is used up: what exceeds it goes to the feed."
    (dry,) = await service.send(body(), path="/v1/events?dryRun=true")
    assert (dry["status"], dry["reason"], rules(dry)) == ("stored", "tenant_limit", rules(why))
    (urgent,) = await service.send(body("critical"))
    assert rules(await service.explain(urgent))[0] == ("urgent_passes", "event")
    assert len(await service.feed()) == 7
    stats = service.world.ingresses[0].stats.counters
    assert stats['events_over_limit{became="feed",tenant="acme"}'] == 4
    assert stats['events_over_limit{became="passed",tenant="acme"}'] == 1


async def test_overflow_to_a_digest(service: Limited) -> None:
    """What is beyond the rate joins one digest of the user, whichever request and category it came with; who
    has nothing to be pushed to has it in the feed. Flushed, it is one push."""
    await service.limit(1, "digest")
    first, *more = await service.send(
        body(), body(category="news"), body("urgent"), body(category="chat"), body(user="bob")
    )
    (third,) = await service.send(body())
    assert [one["status"] for one in (first, *more, third)] == [
        # The urgent one is counted first: nothing is left for the others.
        "deferred", "deferred", "queued", "deferred", "stored", "deferred",
    ]  # fmt: skip
    (digest,) = (await service.call("GET", "/v1/users/ada/digests"))["digests"]
    assert (digest["frequency"], digest["category"], digest["count"]) == ("overflow", None, 4)
    why = await service.explain(third)
    assert rules(why)[:2] == [("tenant_limit", "tenant"), ("overflow", "tenant")]
    assert why["rules"][1]["until"] == digest["dueAt"]
    assert (await service.dry())["digest"]["digestId"] == digest["digestId"]
    assert (len(await service.feed()), len(await service.feed("bob"))) == (5, 1)
    flushed = await service.call("POST", f"/v1/users/ada/digests/{digest['digestId']}/flush")
    assert flushed["count"] == 4


async def test_refused_ones_beside_urgent_ones(service: Limited) -> None:
    """Without an overflow: of a batch the urgent ones are stored, each of the others is a 429 of its own;
    without an urgent one the whole batch is, and an urgent one alone is stored, however often."""
    await service.limit(1, "reject")
    await service.send(body(), body(), body())  # together: a debt of two
    refused = await service.post([body(), body("low")])
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
    assert int(refused.headers["retry-after"]) > 1
    for path in ("/v1/events?dryRun=true", "/v1/events"):
        told = await service.send(body(), body("urgent"), body("high"), body("critical"), path=path)
        assert ["error" in one for one in told] == [True, False, True, False]
        for one in (told[0]["error"], told[2]["error"]):
            assert (one["status"], one["code"], one["temporary"]) == (429, "rate_limited", True)
            assert "tenant acme" in one["detail"]
        assert [told[n]["status"] for n in (1, 3)] == ["queued", "queued"]
    single = await service.event(priority="urgent")
    assert rules(await service.explain(single))[0] == ("urgent_passes", "event")
    many = await service.post({**body("urgent"), "userId": None, "userIds": ["ada", "bob"]})
    assert [one["userId"] for one in many.json()["results"]] == ["ada", "bob"]
    assert len(await service.feed()) == 3 + 2 + 1 + 1
    # Sent again with a key each, what was refused is stored once there is room.
    await service.limit(10, "reject")
    keyed = [body(idempotencyKey=f"k{n}") for n in range(3)]
    assert all("id" in one for one in await service.send(*keyed))


async def test_what_is_for_later_waits_outside(service: Limited) -> None:
    """Beyond the rate, what is to be sent later is refused whatever the overflow, in a batch by itself;
    urgent it is kept; a schedule and a broadcast alike."""
    await service.limit(1, "feed")
    at = rfc3339(SystemClock().now_ms() + 3_600_000)
    told = await service.send(body(), body(scheduleAt=at), body("urgent", scheduleAt=at), body())
    assert [one.get("status", one.get("error", {}).get("code")) for one in told] == [
        "stored", "rate_limited", "deferred", "stored",
    ]  # fmt: skip
    assert (await service.post(body(scheduleAt=at))).status_code == 429
    for priority, status in (("normal", (429, 429)), ("urgent", (201, 202))):
        event = {"type": "t", "title": "Hello", "priority": priority}
        schedule = await service.post({"at": at, "event": {**event, "userId": "ada"}}, "/v1/schedules")
        broadcast = await service.post({"audience": ["ada", "bob"], "event": event}, "/v1/broadcasts")
        assert (schedule.status_code, broadcast.status_code) == status


async def test_users_and_tenants_rules_hold_beside_it(service: Limited) -> None:
    """What the tenant forces passes; what the user switched off is filed away as ever; a user's own quiet
    hours and the tenant's other limits are as they were for what is within the rate."""
    limit = {"user": {"count": 1, "windowS": 3600}, "overflow": "feed"}
    await service.call("PUT", "/v1/policy", {"forced": {"categories": {"security": True}}, "limits": limit})
    await service.prefer(types={"offer": False})
    await service.limit(2, "digest")
    told = await service.send(
        body(), body(), body(category="security"), body(type="offer"), body(type="other")
    )
    assert [(one["status"], one.get("reason")) for one in told] == [
        ("queued", None),
        ("stored", "rate_limit"),
        ("queued", None),
        ("suppressed", "preferences"),
        ("deferred", "tenant_limit"),
    ]
    assert ("forced_passes", "tenant") in rules(await service.explain(told[2]))


async def test_the_command_line(postgres_dsn: str, capsys: Any) -> None:
    """Set with a rate, kept when the rate changes, gone with the limit; shown; a wrong one is refused."""
    pool = await open_pool(ClientWorld(postgres_dsn).settings.postgres, 1)
    await TenantStore(pool).create_tenant("acme")

    async def run(*words: str, code: int = 0) -> str:
        assert (
            await asyncio.to_thread(main, ["tenant", "limit", "acme", *words, "--dsn", postgres_dsn]) == code
        )
        told = capsys.readouterr()
        return told.out + told.err

    await run("--rate", "50", "--overflow", "digest", "--collect", "300")
    assert await run() == "acme: 50/s, 50 at once; beyond it: a digest every 300 s\n"
    await run("--rate", "80")
    assert await run() == "acme: 80/s, 80 at once; beyond it: a digest every 300 s\n"
    await run("--rate", "80", "--overflow", "feed")
    assert await run() == "acme: 80/s, 80 at once; beyond it: the feed alone\n"
    assert "goes with --rate" in await run("--overflow", "feed", code=1)
    await run("--off")
    assert await TenantStore(pool).limits("acme") == {}
    await run("--rate", "5")
    assert await run() == "acme: 5/s, 5 at once; beyond it: refused\n"
    await pool.close()


async def test_replicas_share_what_is_left(redis_url: str) -> None:
    """Over two replicas, in Redis: all urgent ones pass, and of the others no more than the burst, each time
    as many as are left; a storm of urgent ones makes a debt of one burst."""
    replicas = [RateLimiter(RedisSettings(url=redis_url), 0.0, SystemClock()) for _ in range(2)]
    try:
        passed = 0
        for n in range(8):
            urgent, others, _ = await replicas[n % 2].admit("tenant:o", SLOW, 20, 1, 4, split=True)
            assert urgent == int(n < 4)
            passed += others
        assert passed == 16
        storm = await replicas[0].admit("tenant:o", 10.0, 20, 1000, 1, split=False)
        assert storm.others == 0
        assert 1.9 < storm.wait_s < 2.3
        assert (await replicas[1].admit("tenant:p", SLOW, 5, 0, 9, split=False)).others == 9
        assert (await replicas[0].admit("tenant:p", SLOW, 5, 2, 9, split=False))[:2] == (0, 0)
        assert (await replicas[0].admit("tenant:q", SLOW, 5, 2, 9, split=True))[:2] == (2, 3)
        assert (await replicas[1].take("tenant:q", SLOW, 5, 1)) > 1
        leased = RateLimiter(RedisSettings(url=redis_url), 10.0, SystemClock())
        for n in range(10):  # takes ahead what others then lack, and uses it for urgent ones, too
            assert (await leased.admit("tenant:r", 1.0, 11, n % 2, 1 - n % 2, split=True))[:2] == (
                n % 2, 1 - n % 2,
            )  # fmt: skip
        await leased.close()
    finally:
        for one in replicas:
            await one.close()
