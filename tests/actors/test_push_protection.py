"""What the pool does for apps and providers in trouble: their pushes wait, all others go on."""

from __future__ import annotations

import asyncio
import time

import pytest

from carillon.clock import ManualClock
from carillon.messages import PushJob
from carillon.testing.provider_server import Behaviour, Script
from tests.actors.test_push_pool import pool
from tests.push_kit import apns, fcm, job_of, script, target_of
from tests.support import eventually


def job_for(number: int, *apps: str, provider: str = "fcm") -> PushJob:
    """A job with one target per app."""
    targets = [target_of(f"token-{number}-{app}", provider, app_id=app) for app in apps]
    return job_of(number, provider, targets=targets)


async def app_status(pool_: object, app: str) -> dict[str, object]:
    """What the pool says of one app."""
    status = await pool_.status()  # type: ignore[attr-defined]
    return next(facts for facts in status["apps"] if facts["app"] == app)


async def test_an_open_breaker_stops_its_app_only() -> None:
    """Jobs of the refused app are handed back untried; the other app's go, in the same batch as well."""
    async with (
        apns(apns_topic="good") as (server, channel),
        pool(ManualClock(), channel=channel, provider="apns") as s,
    ):
        script(server, "token-1-bad", error="InvalidProviderToken")
        await s.router.push(job_for(1, "bad", provider="apns"))
        await s.told(1)
        assert (await s.pool.status())["breaker"] == "open"
        mixed = [job_for(n, "bad" if n % 2 else "good", provider="apns") for n in range(2, 12)]
        answer = await s.router.push(*mixed)
        assert (answer.accepted, answer.reason) == (9, "breaker open")  # the last is the router's to return
        outcomes = {o.delivery: o.results[0].outcome for o in await s.told(6)}
        assert outcomes == {1: "failed"} | dict.fromkeys(range(2, 12, 2), "sent")
        assert await s.left(4) == [("breaker open", [3, 5, 7, 9], [1] * 4)]
        assert server.requests == 6
        assert (await app_status(s.pool, "bad/production"))["state"] == "open"
        assert (await app_status(s.pool, "good/production"))["state"] == "closed"


async def test_a_job_of_two_apps_reaches_the_one_that_works() -> None:
    """The other target is reported as left: no attempt, to be tried again when its breaker lets it."""
    async with pool(ManualClock()) as s:
        s.channel.outcome, s.channel.status, s.channel.error = "failed", 401, "UNAUTHENTICATED"
        await s.router.push(job_for(1, "bad"))
        await s.told(1)
        s.channel.outcome, s.channel.status, s.channel.error = "sent", 200, ""
        assert (await s.router.push(job_for(2, "good", "bad"))).accepted == 1
        outcome = (await s.told(2))[1]
        found = {r.device: (r.outcome, r.error) for r in outcome.results}
        assert found == {
            "device-of-token-2-good": ("sent", ""),
            "device-of-token-2-bad": ("left", "breaker open"),
        }
        assert 4 < next(r for r in outcome.results if r.outcome == "left").retry_after_s <= 5
        assert [t.token for t in s.channel.jobs[1].targets] == ["token-2-good"]
        await eventually(lambda: s.pool.held == 0)


async def test_a_job_of_two_apps_is_reported_once() -> None:
    """Its parts travel separately and come back as one outcome."""
    async with pool() as s:
        await s.router.push(*(job_for(n, "one", "two") for n in range(1, 21)))
        outcomes = await s.told(20)
        assert {o.delivery for o in outcomes} == set(range(1, 21))
        assert all(len(o.results) == 2 for o in outcomes)
        assert len(s.channel.jobs) == 40
        await eventually(lambda: s.pool.held == 0)
        assert len(s.outcomes()) == 20


async def test_only_one_probe_at_a_time_until_it_succeeds() -> None:
    """While half open a pool takes one job; after the success all."""
    clock = ManualClock()
    async with pool(clock) as s:
        s.channel.outcome, s.channel.status, s.channel.error = "failed", 401, "UNAUTHENTICATED"
        await s.router.push(job_of(1))
        await s.told(1)
        clock.advance(5.1)
        s.channel.gate.clear()
        s.channel.outcome, s.channel.status, s.channel.error = "sent", 200, ""
        assert (await s.router.push(*(job_of(n) for n in range(2, 30)))).accepted == 1
        assert (await s.router.push(job_of(30))).accepted == 0
        await eventually(lambda: s.channel.now == 1)
        s.channel.gate.set()
        await s.told(2)
        assert (await s.router.push(*(job_of(n) for n in range(3, 30)))).accepted == 27
        await s.told(29)
        counters, gauges, _ = s.pool.stats.snapshot()
        labels = 'provider="fcm",app="main"'
        assert counters[f'breaker_changes{{{labels},to="opened"}}'] == 1
        assert counters[f'breaker_changes{{{labels},to="closed"}}'] == 1
        assert gauges[f"push_breaker{{{labels}}}"] == 0


async def test_a_rate_is_kept_and_what_is_over_it_waits() -> None:
    """50 a second with a burst of 5: 30 pushes take half a second, none is lost, the queue is bounded."""
    async with fcm() as (server, channel):
        settings = {"fcm_rate_per_s": 50.0, "rate_burst_s": 0.1, "max_queue": 30}
        async with pool(channel=channel, **settings) as s:
            began = time.monotonic()
            answer = await s.router.push(*(job_of(n) for n in range(1, 41)))
            assert (answer.accepted, answer.reason) == (30, "full")
            await s.told(30)
            assert time.monotonic() - began >= (30 - 5 - 1) / 50
            assert server.count == 30


async def test_retry_after_of_503_pauses_the_app() -> None:
    """No request for as long as the provider asked, then all go; the bound is a setting."""
    clock = ManualClock(round(time.time() * 1000))
    async with fcm(clock=clock) as (server, channel), pool(clock, channel=channel, max_pause_s=40.0) as s:
        script(server, "token-1", error="UNAVAILABLE", retry_after="20", times=1)
        await s.router.push(job_of(1))
        assert (await s.told(1))[0].results[0].retry_after_s == 20.0
        assert (await s.router.push(job_of(2))).reason == "paused"
        assert (await app_status(s.pool, "carillon-demo"))["state"] == "paused"
        clock.advance(19.9)
        assert (await s.router.push(job_of(2))).accepted == 0
        assert server.requests == 1
        clock.advance(0.2)
        script(server, "token-2", error="UNAVAILABLE", retry_after="3600", times=1)
        assert (await s.router.push(job_of(2))).accepted == 1
        await s.told(2)
        clock.advance(39.9)
        assert (await s.router.push(job_of(3))).accepted == 0
        clock.advance(0.2)
        assert (await s.router.push(job_of(3))).accepted == 1
        assert (await s.told(3))[2].results[0].outcome == "sent"


async def test_a_device_that_gets_too_many_pauses_nobody_else() -> None:
    """One 429 may be about its device; three in a row are about us."""
    clock = ManualClock(round(time.time() * 1000))
    async with apns(clock=clock) as (server, channel), pool(clock, channel=channel, provider="apns") as s:
        script(server, "hot", error="TooManyRequests", retry_after="60")
        for n in (1, 3):
            await s.router.push(job_of(n, "apns", tokens=("hot",)))
            await s.told(n)
            await s.router.push(job_of(n + 1, "apns"))
            assert (await s.told(n + 1))[n].results[0].outcome == "sent"
        for n in (5, 6, 7):
            assert (await s.router.push(job_of(n, "apns", tokens=("hot",)))).accepted == 1
            await s.told(n)
        assert (await s.router.push(job_of(8, "apns"))).reason == "paused"


async def test_concurrency_follows_what_the_provider_bears() -> None:
    """It starts low, grows while 50 ms answers come, and falls to the least when the provider hangs."""
    async with apns() as (server, channel):
        settings = {"timeout_s": 0.5, "breaker_failures": 1000}
        channel.settings = channel.settings.__class__(
            **{name: getattr(channel.settings, name) for name in channel.settings.__dataclass_fields__}
            | {"timeout_s": 0.5}
        )
        async with pool(channel=channel, provider="apns", **settings) as s:
            server.script(Script(delay_s=0.05))
            await s.router.push(*(job_of(n, "apns") for n in range(1, 1501)))
            await s.told(100)
            await eventually(lambda: next(iter(s.pool._lanes)).gate.limit.limit >= 80)
            await s.told(1500)
            server.script(Script(shares=[Behaviour(fault="silent", share=1.0)]))
            await s.router.push(*(job_of(n, "apns") for n in range(2001, 3001)))
            await eventually(lambda: next(iter(s.pool._lanes)).gate.limit.limit == 10, 20.0)
            sent = server.requests
            await asyncio.sleep(0.45)
            assert server.requests - sent <= 30, "a few at a time while it hangs"


async def test_five_thousand_dead_tokens_are_no_trouble_of_the_provider() -> None:
    """Through the pool: each is told to its shard, the breaker stays closed, the limit does not shrink."""
    async with apns() as (server, channel), pool(channel=channel, provider="apns") as s:
        server.script(Script(shares=[Behaviour(error="Unregistered", share=1.0)]))
        for first in range(1, 5001, 500):
            jobs = [job_of(n, "apns") for n in range(first, first + 500)]
            assert (await s.router.push(*jobs)).accepted == 500
        outcomes = await s.told(5000)
        assert {(r.outcome, r.status) for o in outcomes for r in o.results} == {("invalid_target", 410)}
        facts = await app_status(s.pool, "dev.carillon.demo/production")
        assert facts["state"] == "closed"
        assert server.requests == 5000


async def test_apps_come_and_go_within_a_bound() -> None:
    """Made-up app ids end in a bounded table, no gauge is left behind; odd characters stay out of labels."""
    async with pool(max_apps=5) as s:
        for n in range(1, 51):
            await s.router.push(job_for(n, f'app"{n}\n{{}}'))
            await s.told(n)
        await eventually(lambda: s.pool.held == 0)
        lanes = list(s.pool._lanes)
        assert len(lanes) <= 5
        s.pool._lanes.tick()
        names = [name for name in s.pool.stats.gauges if name.startswith("push_breaker")]
        assert len(names) == len(lanes)
        assert all(name.count('"') == 4 and "\n" not in name for name in names)


async def test_an_app_that_hangs_leaves_half_of_the_places_to_others() -> None:
    """Queue and senders: the second app's pushes go although the first has thousands."""
    async with pool(max_queue=100, sender_concurrency=40, concurrency_min=50) as s:
        hang = asyncio.Event()
        send = s.channel.send

        async def slow(jobs: list[PushJob]) -> object:
            if jobs[0].targets[0].app_id == "slow":
                await hang.wait()
            return await send(jobs)

        s.channel.send = slow  # type: ignore[method-assign]
        await s.router.push(job_for(1, "quick"))
        await s.told(1)
        taken = (await s.router.push(*(job_for(n, "slow") for n in range(1000, 1200)))).accepted
        assert taken == 50
        for n in range(2, 30):
            assert (await s.router.push(job_for(n, "quick"))).accepted == 1
            await s.told(n)
        hang.set()
        await s.told(29 + 50)


@pytest.mark.parametrize("kind", ["silent", "error"])
async def test_a_dead_fcm_does_not_touch_apns(kind: str) -> None:
    """FCM answers never, or 500 always: 500 pushes go through the APNs pool meanwhile."""
    async with fcm(timeout_s=120.0) as (dead, fcm_channel), apns() as (server, apns_channel):
        share = Behaviour(fault="silent", share=1.0) if kind == "silent" else Behaviour(status=500, share=1.0)
        dead.script(Script(shares=[share]))
        async with (
            pool(channel=fcm_channel, max_queue=2000, timeout_s=120.0) as f,
            pool(channel=apns_channel, provider="apns", max_queue=2000) as a,
        ):
            await f.router.push(*(job_of(n) for n in range(1, 1001)))
            await eventually(lambda: dead.requests >= 10)
            await a.router.push(*(job_of(n, "apns") for n in range(1, 501)))
            await a.told(500)
            assert server.count == 500
            if kind == "silent":
                assert f.outcomes() == [], "FCM was given up meanwhile: this proves nothing"
            else:
                await eventually(lambda: f.pool._lanes.state == "open")
                assert dead.requests < 200, "the breaker stopped it"
