"""The rate limit of a tenant: shared by its keys, by all doors and by every way in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import redis.asyncio as aioredis

from carillon.errors import InvalidInputError, NotFoundError
from carillon.inbound import sign_standard
from cluster.cli import main
from serve.app import ServeDoor
from serve.ingress import Ingress
from tests.actors.fakes import actor_config
from tests.integration.ingress_world import World
from tests.support import eventually

EVENT = {"userId": "ada", "type": "t", "title": "Hello"}
SLOW = 0.02
"""Events per second: what is used up stays used up as long as a test takes."""


@pytest.fixture
async def world(postgres_dsn: str, redis_url: str) -> AsyncIterator[World]:
    made = await World(
        postgres_dsn,
        redis={"url": redis_url},
        ingress={"auth_cache_s": 0.05},
        inbound={"stream": "limited", "stream_retry_s": 0.05, "stream_block_s": 0.1},
    ).start()
    yield made
    await made.stop()


async def limited(world: World, rate: float | None, burst: int | None = None) -> None:
    """Set the limit of acme and wait until this replica has heard of it."""
    await world.tenants.limit_tenant("acme", rate, burst)
    world.ingress.app.services.auth._keys.clear()
    world.ingress.app.services.auth._tenant_cache.clear()


async def test_all_keys_and_doors_share_it(world: World) -> None:
    """Two keys, two replicas, the own door and Serve's route: together the burst, then 429 that says whose
    limit it is; other tenants do not notice, and who has no limit has none."""
    assert (await world.event(EVENT)).status_code == 202
    await limited(world, SLOW, 6)
    second = Ingress(actor_config("ingress", "ingress-b", world.coordinator, settings=world.settings))
    await second.start()
    try:
        assert world.ingress.app is not None
        key = await world.tenants.create_key("acme", "", ["events:write"])
        behind_serve = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=ServeDoor(world.ingress.app)), base_url="http://serve"
        )
        elsewhere = httpx.AsyncClient(base_url=second.url, trust_env=False)
        async with behind_serve, elsewhere:
            for http, headers, body in (
                (world.http, world.service(), EVENT),
                (world.http, world.service(key), [EVENT] * 2),
                (behind_serve, world.service(key), EVENT),
                (elsewhere, world.service(), {**EVENT, "userId": None, "userIds": ["a", "b"]}),
            ):
                answer = await http.post("/v1/events", json=body, headers=headers)
                assert answer.status_code == 202, answer.text
            assert len(world.router.events) == 7
            for http in (world.http, behind_serve, elsewhere):
                answer = await http.post("/v1/events", json=EVENT, headers=world.service(key))
                assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited")
                assert answer.json()["detail"] == (
                    "tenant acme, all its keys together, may send 0.02 a second, 6 at once"
                )
                assert answer.json()["temporary"] is True
                assert 1 <= int(answer.headers["retry-after"]) <= 51
        assert len(world.router.events) == 7
        # What is no event is none of its business.
        assert (await world.http.get("/v1/presence/ada", headers=world.service())).status_code == 200
        others = await world.http.post("/v1/events", json=EVENT, headers=world.service(world.other_key))
        assert others.status_code == 202
        await limited(world, None)
        assert (await world.event(EVENT)).status_code == 202
    finally:
        await second.stop()


async def test_every_way_in_counts(world: World) -> None:
    """A webhook, a broadcast, a schedule, a dry run: each takes its events, and is 429 then."""
    source = {"event": {"userId": "ada", "type": "t", "title": "{{ body.title }}"}}
    made = (await world.http.put("/v1/sources/shop", json=source, headers=world.service())).json()

    async def webhook() -> Any:
        raw, at_s = json.dumps({"title": "Hi"}).encode(), world.clock.now_ms() // 1000
        headers = {
            "webhook-id": "d", "webhook-timestamp": str(at_s),
            "webhook-signature": sign_standard(made["secret"], "d", at_s, raw),
        }  # fmt: skip
        return await world.http.post(made["path"], content=raw, headers=headers)

    async def post(path: str, body: Any) -> Any:
        return await world.http.post(path, json=body, headers=world.service())

    of_all = {"type": "t", "title": "Hello"}
    ways = {
        "webhook": (webhook, 1),
        "list": (lambda: post("/v1/broadcasts", {"audience": ["a", "b", "c"], "event": of_all}), 3),
        "all": (lambda: post("/v1/broadcasts", {"audience": "all", "event": of_all}), 1),
        "topic": (lambda: post("/v1/events", {**of_all, "topic": "goals"}), 1),
        "schedule": (lambda: post("/v1/schedules", {"cron": "0 9 * * *", "event": EVENT}), 1),
        "dry run": (lambda: post("/v1/events?dryRun=true", EVENT), 1),
    }
    for name, (call, events) in ways.items():
        await limited(world, SLOW, events)
        await aioredis_flush(world)
        first = await call()
        assert first.status_code in (200, 201, 202), (name, first.text)
        again = await call()
        assert (again.status_code, again.json()["code"]) == (429, "rate_limited"), (name, again.text)
        assert "tenant acme" in again.json()["detail"]


async def aioredis_flush(world: World) -> None:
    """Forget what of the limits was used up."""
    client = aioredis.Redis.from_url(world.settings.redis.url)
    await client.flushdb()
    await client.aclose()
    world.ingress.app.services.limits._keys.clear()


async def test_streams_wait(world: World) -> None:
    """An import and a Redis stream are held up instead of refused, and lose nothing."""
    await limited(world, 100.0, 10)
    lines = b"".join(json.dumps(EVENT | {"userId": f"u{n}"}).encode() + b"\n" for n in range(30))
    told = (await world.http.post("/v1/events/import", content=lines, headers=world.service())).json()
    assert (told["accepted"], told["failed"]) == (30, 0)
    client = aioredis.Redis.from_url(world.settings.redis.url)
    world.router.forget()
    for n in range(30):
        await client.xadd("limited", {"tenant": "acme", "event": json.dumps(EVENT | {"userId": f"s{n}"})})
    await eventually(lambda: len({event.user for event in world.router.events}) == 30)
    await client.aclose()


async def test_it_is_told_to_operators(world: World) -> None:
    """Metrics say how many events which limit turned away."""
    await limited(world, SLOW, 1)
    assert [(await world.event(EVENT)).status_code for _ in range(3)] == [202, 429, 429]
    counters = world.ingress.stats.counters
    assert counters['events_limited{limit="tenant",tenant="acme"}'] == 2


async def test_the_command_line(world: World, capsys: Any) -> None:
    """Set, shown, lifted and noted by commands; what makes no sense is refused."""

    async def run(*words: str) -> str:
        assert await asyncio.to_thread(main, ["tenant", "limit", *words, "--dsn", world.dsn]) == 0
        return capsys.readouterr().out

    assert await run("acme") == "acme: no limit\n"
    assert "50 events per second" in await run("acme", "--rate", "50", "--burst", "200")
    assert await run("acme") == "acme: 50/s, 200 at once; beyond it: refused\n"
    assert "no limit" in await run("acme", "--off")
    assert await run("acme") == "acme: no limit\n"
    assert await world.tenants.limits("acme") == {}
    assert [one.action for one in await world.tenants.audit("acme", 10)] == ["tenant.limit"] * 2
    with pytest.raises(InvalidInputError):
        await world.tenants.limit_tenant("acme", 0.0)
    for call in (world.tenants.limit_tenant("nobody", 1.0), world.tenants.limits("nobody")):
        with pytest.raises(NotFoundError):
            await call
