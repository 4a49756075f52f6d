"""The push pool: what it takes, how it spreads it, how outcomes reach the owning shard."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from actors.link import Link, dial
from actors.push_pool import PushPool
from actors.push_sender import PushSender, RemoteSender, SenderConfig, Spawn, spawn_with_ray
from carillon.clock import Clock, ManualClock
from carillon.errors import RemoteError, UnavailableError
from carillon.messages import (
    Address,
    Done,
    Ping,
    Push,
    PushAccepted,
    PushJob,
    PushLeft,
    PushOutcome,
    PushResult,
    PushTarget,
)
from carillon.settings import PushSettings
from channels.ports import PushChannel
from tests.actors.fakes import FakeCoordinator, FakeShard, actor_config, fast_settings
from tests.push_kit import apns, fcm, job_of, script
from tests.support import eventually


class FakeChannel:
    """Answers when told to; every result can be set."""

    provider = "fcm"

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.jobs: list[PushJob] = []
        self.now = self.most = 0
        self.outcome = "sent"
        self.status = 200
        self.error = ""
        self.raises: Exception | None = None
        self.closed = False

    async def open(self) -> None:
        """Nothing to do."""

    def app_of(self, target: PushTarget) -> str:
        """The app that the target names."""
        return target.app_id or "main"

    async def close(self) -> None:
        """Note it."""
        self.closed = True

    async def send(self, jobs: list[PushJob]) -> list[list[PushResult]]:
        """Wait for the gate, then answer."""
        self.jobs += jobs
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.gate.wait()
            if self.raises is not None:
                raise self.raises
        finally:
            self.now -= 1
        return [
            [
                PushResult(t.device, self.outcome, "id", self.status, self.error, 0.0, 1, 2.0)
                for t in job.targets
            ]
            for job in jobs
        ]


class RouterEnd:
    """A router's end of the link to the pool."""

    def __init__(self) -> None:
        self.link: Link | None = None

    def link_opened(self, link: Link) -> None:
        """Nothing to do."""

    def link_closed(self, link: Link) -> None:
        """Nothing to do."""

    def receive(self, link: Link, message: Any, request: int) -> None:
        """Nothing comes."""

    def read_finished(self, link: Link) -> None:
        """Nothing to batch."""

    async def push(self, *jobs: PushJob) -> PushAccepted:
        """Offer jobs."""
        assert self.link is not None
        return await self.link.request(Push(list(jobs)))


class Setup:
    """A coordinator, a shard that owns everything, a pool and a router's link to it."""

    def __init__(self) -> None:
        self.channel = FakeChannel()
        self.router = RouterEnd()
        self.coordinator: FakeCoordinator
        self.shard: FakeShard
        self.pool: PushPool
        self.spawned: list[PushSender] = []
        self.remote_channels: list[FakeChannel] = []

    def outcomes(self) -> list[PushOutcome]:
        """What the shard was told."""
        return [message for message, _ in self.shard.received if type(message) is PushOutcome]

    async def told(self, count: int) -> list[PushOutcome]:
        """Wait until the shard was told of so many jobs."""
        await eventually(lambda: len(self.outcomes()) >= count, what=f"{count} outcomes")
        return self.outcomes()

    async def left(self, count: int) -> list[tuple[str, list[int], list[int]]]:
        """Wait until so many jobs were handed back: (reason, deliveries, attempts) of each message."""

        def told() -> list[PushLeft]:
            return [message for message, _ in self.shard.received if type(message) is PushLeft]

        await eventually(lambda: sum(len(m.deliveries) for m in told()) >= count, what=f"{count} left")
        assert all(m.provider == self.pool.provider for m in told())
        return [(m.reason, m.deliveries, m.attempts) for m in told()]

    async def spawn(self, config: SenderConfig) -> tuple[Address, Callable[[], Awaitable[None]]]:
        """Start a sender in this process, on a link as real as any."""
        channel = FakeChannel()
        channel.gate = self.channel.gate
        self.remote_channels.append(channel)
        sender = PushSender(config)
        self.spawned.append(sender)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("actors.push_sender.make_channel", lambda *_: channel)
            address = await sender.start()
        return address, sender.stop


@contextlib.asynccontextmanager
async def pool(
    clock: Clock | None = None,
    channel: Any = None,
    provider: str = "fcm",
    spawn: Spawn | None = None,
    **push: Any,
) -> AsyncIterator[Setup]:
    """Everything started; `push` are settings of the section."""
    setup = Setup()
    settings = fast_settings(push={"max_senders": 1, "timeout_s": 2.0} | push)
    setup.coordinator = await FakeCoordinator.start(settings)
    setup.shard = await FakeShard.start(setup.coordinator, "shard-a")
    setup.coordinator.spread()

    def make(provider: str, settings: PushSettings, clock: Clock) -> PushChannel:
        return channel or setup.channel

    config = actor_config("pool", "pool-1", setup.coordinator, labels={"provider": provider})
    setup.pool = PushPool(config, clock, make=make, spawn=spawn or setup.spawn)
    await setup.pool.start()
    address = setup.coordinator.joined["pool-1"].address
    setup.router.link = await dial(address, setup.router, settings.link, "router-1", config.secret)
    # Without it what is handed back has no way, and waits for its lease.
    await eventually(lambda: setup.pool._directory.link("shard-a"), what="the pool's link to the shard")
    try:
        yield setup
    finally:
        setup.channel.gate.set()
        setup.router.link.close()
        await setup.pool.stop()
        for sender in setup.spawned:
            await sender.stop()
        await setup.shard.stop()
        await setup.coordinator.stop()


async def test_a_job_is_sent_and_its_outcome_told_to_the_owner() -> None:
    """The whole way of one job; the pool joins with its provider as label."""
    async with pool() as s:
        assert s.coordinator.joined["pool-1"].labels == {"provider": "fcm"}
        assert await s.router.push(job_of(7, attempt=3)) == PushAccepted(1, 1)
        (outcome,) = await s.told(1)
        assert (outcome.delivery, outcome.attempt, outcome.slot) == (7, 3, 7)
        assert (outcome.tenant, outcome.user, outcome.provider) == ("acme", "ada", "fcm")
        assert outcome.notification == (7).to_bytes(16, "big")
        assert [r.outcome for r in outcome.results] == ["sent"]
        await eventually(lambda: s.pool.held == 0)


async def test_a_full_pool_takes_what_fits_from_the_first() -> None:
    """The rest stays in the outbox; later there is room again."""
    async with pool(max_queue=10, sender_concurrency=3) as s:
        s.channel.gate.clear()
        assert await s.router.push(*(job_of(n) for n in range(1, 8))) == PushAccepted(7, 7)
        assert await s.router.push(*(job_of(n) for n in range(8, 15))) == PushAccepted(3, 10, "full")
        assert await s.router.push(job_of(20)) == PushAccepted(0, 10, "full")
        s.channel.gate.set()
        outcomes = await s.told(10)
        assert {o.delivery for o in outcomes} == set(range(1, 11))
        await eventually(lambda: s.pool.held == 0)
        assert (await s.router.push(job_of(20))).accepted == 1


async def test_a_sender_has_no_more_in_flight_than_allowed() -> None:
    """The bound counts targets."""
    async with pool(sender_concurrency=4) as s:
        s.channel.gate.clear()
        await s.router.push(*(job_of(n, tokens=("a", "b")) for n in range(1, 11)))
        await eventually(lambda: s.channel.now == 2)
        s.channel.gate.set()
        await s.told(10)
        assert s.channel.most == 2


async def test_the_same_job_offered_twice_is_sent_once() -> None:
    """A router that missed our answer offers again while it is waiting or in flight."""
    async with pool(sender_concurrency=1) as s:
        s.channel.gate.clear()
        await s.router.push(job_of(1), job_of(2))
        await eventually(lambda: s.channel.now == 1)
        assert await s.router.push(job_of(1), job_of(2)) == PushAccepted(2, 2)
        s.channel.gate.set()
        await s.told(2)
        assert [job.delivery for job in s.channel.jobs] == [1, 2]


async def test_a_newer_claim_replaces_the_one_that_waits() -> None:
    """The lease ran out in the queue: the outcome names the attempt that the shard knows."""
    async with pool(sender_concurrency=1) as s:
        s.channel.gate.clear()
        await s.router.push(job_of(1), job_of(2))
        await s.router.push(job_of(2, attempt=2))
        s.channel.gate.set()
        outcomes = await s.told(2)
        assert sorted((o.delivery, o.attempt) for o in outcomes) == [(1, 1), (2, 2)]


async def test_a_job_that_waited_almost_its_lease_is_left_to_the_outbox() -> None:
    """Sending it now and again at the end of the lease would be twice."""
    clock = ManualClock()
    async with pool(clock, sender_concurrency=1) as s:
        s.channel.gate.clear()
        await s.router.push(job_of(1), job_of(2))
        await eventually(lambda: s.channel.now == 1)
        clock.advance(29.0)
        await s.router.push(job_of(3))
        s.channel.gate.set()
        await s.told(2)
        await eventually(lambda: s.pool.held == 0)
        assert [job.delivery for job in s.channel.jobs] == [1, 3]
        assert await s.left(1) == [("waited too long", [2], [1])]


async def test_outcomes_follow_a_slot_that_moves() -> None:
    """The old owner answers moved; the map changes; the new owner is told."""
    async with pool() as s:
        other = await FakeShard.start(s.coordinator, "shard-b")
        s.shard.owned = set()
        await s.router.push(job_of(7))
        await eventually(lambda: s.outcomes(), what="the old owner was asked")
        s.coordinator.set_owner(7, "shard-b")
        await eventually(lambda: [m for m, _ in other.received if type(m) is PushOutcome])
        await eventually(lambda: s.pool.held == 0)
        await other.stop()


async def test_an_outcome_is_told_again_while_the_shard_is_in_trouble() -> None:
    """A temporary failure, say of Postgres, is retried."""
    async with pool() as s:
        refusals = 3

        def answer(link: Link, message: Any, request: int) -> bool:
            nonlocal refusals
            if refusals > 0:
                refusals -= 1
                link.fail_nowait(request, UnavailableError("the store is away"))
                return True
            return False

        s.shard.answer = answer
        await s.router.push(job_of(1))
        await s.told(1)
        assert refusals == 0


async def test_an_outcome_nobody_takes_is_dropped_in_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """The place in the pool is free again; the outbox has the row."""
    async with pool(report_timeout_s=0.3) as s:
        s.coordinator.set_owner(range(1024), None)
        await s.router.push(job_of(1))
        await eventually(lambda: s.channel.jobs)
        await eventually(lambda: s.pool.held == 0)
        assert "outcome of delivery 1 is dropped" in caplog.text


async def test_a_final_refusal_of_the_shard_is_not_repeated(caplog: pytest.LogCaptureFixture) -> None:
    """The user was erased meanwhile, for instance."""
    async with pool() as s:

        def answer(link: Link, message: Any, request: int) -> bool:
            link.fail_nowait(request, RemoteError("not_found", "no such delivery"))
            return True

        s.shard.answer = answer
        await s.router.push(job_of(1))
        await eventually(lambda: "is dropped" in caplog.text)
        await eventually(lambda: s.pool.held == 0)


async def test_a_channel_that_raises_makes_the_try_unknown(caplog: pytest.LogCaptureFixture) -> None:
    """And the next job is sent."""
    async with pool() as s:
        s.channel.raises = RuntimeError("a defect")
        await s.router.push(job_of(1))
        (first,) = await s.told(1)
        assert [(r.outcome, r.error) for r in first.results] == [("unknown", "RuntimeError")]
        s.channel.raises = None
        await s.router.push(job_of(2))
        assert (await s.told(2))[1].results[0].outcome == "sent"


async def test_a_channel_that_hangs_makes_the_try_unknown() -> None:
    """The sender's own bound, beyond the channel's."""
    async with pool(timeout_s=0.1) as s:
        s.channel.gate.clear()
        await s.router.push(job_of(1))
        (outcome,) = await s.told(1)
        assert [(r.outcome, r.error) for r in outcome.results] == [("unknown", "timeout")]


async def test_refused_credentials_open_the_breaker_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """No more jobs are taken, those held go back; after the pause one probe goes; its success lets all go."""
    clock = ManualClock()
    async with pool(clock, sender_concurrency=1) as s:
        s.channel.outcome, s.channel.status, s.channel.error = "failed", 401, "THIRD_PARTY_AUTH_ERROR"
        await s.router.push(*(job_of(n) for n in range(1, 6)))
        await s.told(1)
        assert (await s.pool.status())["breaker"] == "open"
        assert "breaker of app main open for 5 s (401 THIRD_PARTY_AUTH_ERROR)" in caplog.text
        refused = await s.router.push(job_of(9))
        assert (refused.accepted, refused.reason) == (0, "breaker open")
        assert len(s.channel.jobs) == 1
        assert await s.left(4) == [("breaker open", [2, 3, 4, 5], [1, 1, 1, 1])]
        clock.advance(5.1)
        probe = await s.router.push(*(job_of(n) for n in range(2, 6)))
        assert (probe.accepted, probe.reason) == (1, "breaker open")
        await s.told(2)
        assert len(s.channel.jobs) == 2
        clock.advance(10.1)
        s.channel.outcome, s.channel.status, s.channel.error = "sent", 200, ""
        assert (await s.router.push(*(job_of(n) for n in range(3, 6)))).accepted == 1
        await s.told(3)
        assert (await s.router.push(*(job_of(n) for n in range(4, 6)))).accepted == 2
        await s.told(5)
        assert (await s.router.push(job_of(9))).accepted == 1


async def test_errors_about_targets_never_open_the_breaker() -> None:
    """A hundred dead tokens say nothing about the provider."""
    async with pool(breaker_failures=3) as s:
        s.channel.outcome, s.channel.status, s.channel.error = "invalid_target", 404, "UNREGISTERED"
        await s.router.push(*(job_of(n) for n in range(1, 101)))
        await s.told(100)
        assert (await s.pool.status())["breaker"] == "closed"


async def test_a_provider_that_does_not_answer_opens_the_breaker() -> None:
    """After so many in a row."""
    async with pool(ManualClock(), breaker_failures=3, sender_concurrency=1) as s:
        s.channel.outcome, s.channel.status, s.channel.error = "unknown", 0, "timeout"
        await s.router.push(*(job_of(n) for n in range(1, 11)))
        await s.told(3)
        assert (await s.pool.status())["breaker"] == "open"
        assert len(s.channel.jobs) == 3


async def test_statistics() -> None:
    """Sent and failed per provider, latency, and what is held."""
    async with pool() as s:
        await s.router.push(job_of(1, tokens=("a", "b")))
        await s.told(1)
        s.channel.outcome, s.channel.status = "failed", 500
        await s.router.push(job_of(2))
        await s.told(2)
        await eventually(lambda: s.pool.stats.gauges["pool_queue"] <= 1)
        counters, _, histograms = s.pool.stats.snapshot()
        assert counters['pushes_sent{provider="fcm"}'] == 2
        assert counters['pushes_failed{provider="fcm"}'] == 1
        assert sum(histograms["push_ms"][:-1]) == 3
        await eventually(lambda: "pool-1" in s.coordinator.renewals)


async def test_a_drained_pool_takes_nothing_and_finishes_what_it_has() -> None:
    """Then it leaves the cluster."""
    async with pool() as s:
        s.channel.gate.clear()
        await s.router.push(*(job_of(n) for n in range(1, 6)))
        drain = asyncio.create_task(s.pool.drain())
        await eventually(lambda: s.channel.now == 5)
        assert (await s.router.push(job_of(9))).accepted == 0
        assert not drain.done()
        s.channel.gate.set()
        await drain
        assert len(s.outcomes()) == 5
        await s.pool.stop()
        assert s.coordinator.left == ["pool-1"]
        assert s.channel.closed


async def test_what_waits_in_a_draining_pool_goes_back() -> None:
    """What is in flight is finished, the rest handed back at once, with its attempts."""
    async with pool(sender_concurrency=1) as s:
        s.channel.gate.clear()
        await s.router.push(job_of(1), job_of(2, attempt=3))
        await eventually(lambda: s.channel.now == 1)
        drain = asyncio.create_task(s.pool.drain())
        refused = None
        while refused is None or refused.reason != "draining":
            refused = await s.router.push(job_of(9))
        assert refused.accepted == 0
        assert await s.left(1) == [("draining", [2], [3])]
        assert not drain.done()
        s.channel.gate.set()
        await drain
        assert [outcome.delivery for outcome in await s.told(1)] == [1]


async def test_other_messages_are_refused() -> None:
    """With a sentence."""
    async with pool() as s:
        assert s.router.link is not None
        with pytest.raises(RemoteError, match="does not take Done"):
            await s.router.link.request(Done())
        s.router.link.send_nowait(Ping())
        assert (await s.router.push(job_of(1))).accepted == 1


async def test_more_senders_start_under_load_and_stop_when_idle() -> None:
    """The first sender is in the pool's process; a further one takes its share over a link."""
    async with pool(max_senders=2, sender_concurrency=5, scale_idle_s=0.2) as s:
        s.channel.gate.clear()
        await s.router.push(*(job_of(n) for n in range(1, 21)))
        await eventually(lambda: len(s.pool._senders) == 2)
        await eventually(lambda: s.remote_channels and s.remote_channels[0].now == 5)
        assert s.channel.now == 5
        s.channel.gate.set()
        outcomes = await s.told(20)
        assert {o.delivery for o in outcomes} == set(range(1, 21))
        assert len(outcomes) == 20
        await eventually(lambda: len(s.pool._senders) == 1)
        await eventually(lambda: s.remote_channels[0].closed)


async def test_no_more_senders_than_allowed_and_never_less_than_the_minimum() -> None:
    """min_senders are kept although idle; max_senders bounds the growth."""
    async with pool(min_senders=2, max_senders=3, sender_concurrency=2, scale_idle_s=0.1) as s:
        await eventually(lambda: len(s.pool._senders) == 2)
        s.channel.gate.clear()
        await s.router.push(*(job_of(n) for n in range(1, 41)))
        await eventually(lambda: len(s.pool._senders) == 3)
        s.channel.gate.set()
        await s.told(40)
        await eventually(lambda: len(s.pool._senders) == 2)
        assert len(s.spawned) == 2


async def test_jobs_of_a_lost_sender_are_unknown_and_another_one_starts() -> None:
    """Nobody knows what it had sent: they come again from the outbox with the same ids."""
    async with pool(max_senders=2, sender_concurrency=5, scale_idle_s=5.0) as s:
        s.channel.gate.clear()
        await s.router.push(*(job_of(n) for n in range(1, 31)))
        await eventually(lambda: s.remote_channels and s.remote_channels[0].now == 5)
        lost = {job.delivery for job in s.remote_channels[0].jobs}
        await s.spawned[0].stop()
        outcomes = await s.told(5)
        assert {o.delivery for o in outcomes} == lost
        assert {(r.outcome, r.error) for o in outcomes for r in o.results} == {("unknown", "sender lost")}
        await eventually(lambda: len(s.spawned) == 2)
        s.channel.gate.set()
        assert len(await s.told(30)) == 30


async def test_a_sender_that_cannot_start_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """The first one does the work."""

    async def broken(config: SenderConfig) -> Any:
        raise RuntimeError("no room on any node")

    async with pool(max_senders=2, sender_concurrency=2) as s:
        s.pool._spawn = broken
        s.channel.gate.clear()
        await s.router.push(*(job_of(n) for n in range(1, 11)))
        await eventually(lambda: "cannot start another sender" in caplog.text)
        s.channel.gate.set()
        await s.told(10)


async def test_a_pool_with_a_real_channel() -> None:
    """From a router's link to the provider and back to the shard, through firebase-admin."""
    async with fcm() as (server, channel), pool(channel=channel) as s:
        script(server, "token-3", error="UNREGISTERED")
        await s.router.push(*(job_of(n) for n in range(1, 6)))
        outcomes = {o.delivery: o.results[0].outcome for o in await s.told(5)}
        assert outcomes == {1: "sent", 2: "sent", 3: "invalid_target", 4: "sent", 5: "sent"}
        assert server.count == 4


async def test_senders_as_ray_actors(ray_local: str) -> None:
    """Under load a second sender is a Ray process of its own; both send; one that is lost is replaced."""
    async with apns() as (server, channel):
        values = {name: getattr(channel.settings, name) for name in PushSettings.__dataclass_fields__}
        push = values | {"max_senders": 2, "min_senders": 2, "sender_concurrency": 20, "timeout_s": 5.0}
        async with pool(channel=channel, provider="apns", spawn=spawn_with_ray, **push) as s:
            await eventually(lambda: len(s.pool._senders) == 2, 60.0)
            await s.router.push(*(job_of(n, "apns") for n in range(1, 201)))
            outcomes = await s.told(200)
            assert {o.results[0].outcome for o in outcomes} == {"sent"}
            assert server.count == 200
            assert len({push.connection for push in server.pushes}) >= 2
            sender = s.pool._senders[1]
            assert isinstance(sender, RemoteSender)
            assert sender._stop is not None
            await sender._stop()
            await eventually(lambda: sender not in s.pool._senders and len(s.pool._senders) == 2, 60.0)
