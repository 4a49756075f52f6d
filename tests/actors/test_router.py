"""The router: batches, outcomes in order, slots that move, bounds, presence, pushes."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import pytest

from actors.link import Link, dial
from actors.member import Membership
from actors.router import Router
from carillon.errors import FencedError, NotFoundError, RemoteError, StoreUnavailableError
from carillon.ids import slot_of
from carillon.messages import (
    Change,
    Done,
    Event,
    Outcome,
    Outcomes,
    PresenceQuery,
    Publish,
    Push,
    PushAccepted,
    PushJob,
    PushLeft,
)
from carillon.metrics import Stats
from tests.actors.fakes import FakeCoordinator, FakeShard, actor_config, fast_settings
from tests.support import eventually

_ids = iter(range(1, 1 << 60))


def event(user: str, slot: int | None = None) -> Event:
    slot = slot_of("t", user) if slot is None else slot
    return Event(next(_ids).to_bytes(16, "big"), "t", user, slot, "chat", None, 1, '"type":"chat"', 1700)


class Quiet:
    def link_opened(self, link: Link) -> None:
        pass

    def link_closed(self, link: Link) -> None:
        pass

    def receive(self, link: Link, message: Any, request: int) -> None:
        pass

    def read_finished(self, link: Link) -> None:
        pass


class FakePool(Quiet):
    """A pool that takes up to `room` jobs of each message."""

    def __init__(self, coordinator: FakeCoordinator, name: str, provider: str, room: int = 10_000) -> None:
        config = actor_config("pool", name, coordinator, labels={"provider": provider})
        self.membership = Membership(config, self, stats=Stats())
        self.room = room
        self.queued = 0
        self.silent = False
        self.jobs: list[PushJob] = []

    def receive(self, link: Link, message: Any, request: int) -> None:
        taken = message.jobs[: self.room]
        self.jobs += taken
        self.queued += len(taken)
        if not self.silent:
            reason = "" if len(taken) == len(message.jobs) else "breaker open"
            link.reply_nowait(request, PushAccepted(len(taken), self.queued, reason))


class Cluster:
    """A coordinator, two shards that share the slots evenly, a router, and an ingress' link to it."""

    coordinator: FakeCoordinator
    a: FakeShard
    b: FakeShard
    router: Router
    ingress: Link

    async def open(self, **sections: dict[str, Any]) -> None:
        self.coordinator = await FakeCoordinator.start(fast_settings(**sections))
        self.a = await FakeShard.start(self.coordinator, "shard-a")
        self.b = await FakeShard.start(self.coordinator, "shard-b")
        self.coordinator.set_owner(range(512), "shard-a")
        self.coordinator.set_owner(range(512, 1024), "shard-b")
        self.router = Router(actor_config("router", "router-1", self.coordinator))
        await self.router.start()
        await eventually(self.all_open)
        self.ingress = await self.dial()

    async def dial(self) -> Link:
        member = self.router.membership.member
        return await dial(
            member.address, Quiet(), self.coordinator.settings.link, "ingress", self.coordinator.secret,
            member.address.machine,
        )  # fmt: skip

    async def all_open(self) -> bool:
        shards = (await self.router.status())["shards"]
        return len(shards) >= 2 and all(shard["open"] for shard in shards.values())

    async def close(self) -> None:
        self.ingress.close()
        await self.router.stop()
        await self.a.stop()
        await self.b.stop()
        await self.coordinator.stop()

    def publishing(self, *events: Event) -> asyncio.Task[list[Outcome]]:
        return asyncio.ensure_future(self.publish(*events))

    async def publish(self, *events: Event) -> list[Outcome]:
        return (await self.ingress.request(Publish(list(events)))).outcomes


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    c = Cluster()
    await c.open()
    yield c
    await c.close()


# -- publishing -----------------------------------------------------------------------------------------


async def test_outcomes_come_in_the_order_of_the_events(cluster: Cluster):
    """A batch over both shards is answered as one, each outcome at its event's place."""
    events = [event(f"user-{n}") for n in range(200)]
    outcomes = await cluster.publish(*events)
    assert [o.id for o in outcomes] == [e.id for e in events]
    assert {o.status for o in outcomes} == {"delivered"}
    assert {e.slot < 512 for e in cluster.a.events} == {True}
    assert len(cluster.a.events) + len(cluster.b.events) == 200
    assert cluster.a.events != [], "both shards took part"
    assert cluster.b.events != []


async def test_requests_of_one_turn_share_a_message(cluster: Cluster):
    """Many small requests become few messages to a shard; each gets its own answer."""
    events = [event("u", 5) for _ in range(100)]
    answers = await asyncio.gather(*(cluster.publish(e) for e in events))
    assert [[o.id for o in answer] for answer in answers] == [[e.id] for e in events]
    assert [o.seq for answer in answers for o in answer] == list(range(1, 101)), (
        "order within the slot is kept"
    )
    assert len(cluster.a.batches) < 10
    assert sum(cluster.a.batches) == 100


async def test_large_batches_are_cut(cluster: Cluster):
    """A message to a shard has at most `router.max_batch` events, in order."""
    outcomes = await cluster.publish(*(event("u", 5) for _ in range(2500)))
    assert [o.seq for o in outcomes] == list(range(1, 2501))
    assert cluster.a.batches == [1000, 1000, 500]


async def test_events_too_long_for_one_frame_together(cluster: Cluster):
    """Events that exceed the frame limit only together are sent in parts."""
    big = '"type":"chat","body":"' + "x" * 30_000 + '"'
    events = [event("u", 5) for _ in range(400)]
    for e in events:
        e.content = big
    link = cluster.router._directory.link("shard-a")  # type: ignore[union-attr]
    assert link is not None
    link._max_frame_bytes = 1_000_000
    outcomes = await cluster.publish(*events)
    assert [o.seq for o in outcomes] == list(range(1, 401))
    assert len(cluster.a.batches) > 10


async def test_an_empty_batch(cluster: Cluster):
    """No events, no outcomes."""
    assert await cluster.publish() == []


async def test_an_event_with_an_impossible_slot(cluster: Cluster):
    """It fails alone."""
    outcomes = await cluster.publish(event("u", 5), event("u", 1024), event("u", -1), event("u", 5))
    assert [(o.status, o.code) for o in outcomes] == [
        ("delivered", None),
        ("failed", "invalid"),
        ("failed", "invalid"),
        ("delivered", None),
    ]


async def test_a_shards_failure_is_told_per_event(cluster: Cluster):
    """A shard without its store fails its events with code and Retry-After; the other shard's succeed."""

    def answer(link: Link, message: Any, request: int) -> bool:
        link.fail_nowait(request, StoreUnavailableError("no database", 2.5))
        return True

    cluster.a.answer = answer
    one, two = await cluster.publish(event("u", 5), event("v", 600))
    assert (one.status, one.code, one.retry_after_s) == ("failed", "store_unavailable", 2.5)
    assert two.status == "delivered"


async def test_an_answer_of_the_wrong_length_is_no_answer(cluster: Cluster):
    """Outcomes are never guessed to belong to events."""

    def answer(link: Link, message: Any, request: int) -> bool:
        link.reply_nowait(request, Outcomes([]))
        return True

    cluster.a.answer = answer
    (outcome,) = await cluster.publish(event("u", 5))
    assert (outcome.status, outcome.code) == ("failed", "internal")


# -- moves ----------------------------------------------------------------------------------------------


async def test_a_moved_slot_is_followed(cluster: Cluster):
    """`moved` never reaches the ingress: the event goes to the new owner when the map names it."""
    cluster.a.owned = set()
    asked = asyncio.ensure_future(cluster.publish(event("u", 5), event("v", 600)))
    await eventually(lambda: cluster.a.batches)
    cluster.coordinator.set_owner(5, "shard-b")
    one, two = await asked
    assert (one.status, two.status) == ("delivered", "delivered")
    assert [e.retry for e in cluster.b.events] == [False, False], "`moved` is not ambiguous"


async def test_order_within_a_slot_survives_its_move(cluster: Cluster):
    """Events sent before, during and after a move are stored in the order they were sent."""
    waiting: list[tuple[Link, Publish, int]] = []

    def slow(link: Link, message: Any, request: int) -> bool:
        waiting.append((link, message, request))
        return True

    cluster.a.answer = slow
    events = [event("u", 5) for _ in range(40)]
    asks = []
    for n, e in enumerate(events[:20]):
        asks.append(asyncio.ensure_future(cluster.publish(e)))
        if n % 5 == 4:  # in four batches that are on the way at once
            await eventually(lambda n=n: sum(len(m.events) for _, m, _ in waiting) == n + 1)
    assert len(waiting) >= 4
    cluster.coordinator.set_owner(5, "shard-b")
    await eventually(lambda: cluster.router.membership.map.version == cluster.coordinator.version)

    def moved(item: tuple[Link, Publish, int]) -> None:
        link, message, request = item
        link.reply_nowait(request, Outcomes([Outcome(e.id, status="moved") for e in message.events]))

    # The last batch comes back first, and new events arrive while the others are still on the way.
    moved(waiting[-1])
    await eventually(lambda: cluster.router._held)
    for e in events[20:]:
        asks.append(asyncio.ensure_future(cluster.publish(e)))
    await eventually(lambda: cluster.router._held_count == 20 + len(waiting[-1][1].events))
    assert cluster.b.events == [], "nothing overtakes what is still on the way"
    for item in waiting[:-1]:
        moved(item)
    outcomes = [outcome for (outcome,) in await asyncio.gather(*asks)]
    assert [e.id for e in cluster.b.events] == [e.id for e in events]
    assert [o.seq for o in outcomes] == list(range(1, 41))
    assert (await cluster.router.status())["held"] == 0


async def test_a_lost_shard_is_asked_again_with_the_retry_mark(cluster: Cluster):
    """Events on the way when the link broke may have been stored: the successor gets them marked."""
    taken: list[Event] = []

    def die(link: Link, message: Any, request: int) -> bool:
        taken.extend(message.events)
        return True

    cluster.a.answer = die
    asked = asyncio.ensure_future(cluster.publish(event("u", 5), event("u", 5)))
    await eventually(lambda: len(taken) == 2)
    await cluster.a.stop()
    await eventually(lambda: cluster.router._held)
    later = asyncio.ensure_future(cluster.publish(event("u", 5)))
    await eventually(lambda: cluster.router._held_count == 3)
    cluster.a = await FakeShard.start(cluster.coordinator, "shard-a")
    assert [o.seq for o in await asked] == [1, 2]
    assert [o.seq for o in await later] == [3]
    assert [e.retry for e in cluster.a.events] == [True, True, False], "only what was ambiguous is marked"


async def test_a_shard_that_is_behind_is_asked_again(cluster: Cluster):
    """Without any newer map, the owner that refused is tried again after a pause."""
    cluster.a.owned = set()
    asked = asyncio.ensure_future(cluster.publish(event("u", 5)))
    await eventually(lambda: len(cluster.a.batches) >= 2)
    cluster.a.owned = None
    assert (await asked)[0].status == "delivered"


async def test_a_fenced_shard_is_left(cluster: Cluster):
    """A whole batch refused as fenced is routed again like a moved one."""

    def fenced(link: Link, message: Any, request: int) -> bool:
        link.fail_nowait(request, FencedError("term is over"))
        return True

    cluster.a.answer = fenced
    asked = asyncio.ensure_future(cluster.publish(event("u", 5)))
    await eventually(lambda: cluster.router._held)
    cluster.coordinator.set_owner(range(1024), "shard-b")
    assert (await asked)[0].status == "delivered"


async def test_no_owner_until_the_deadline():
    """An event whose slot nobody owns is answered unavailable inside the ingress' deadline."""
    c = Cluster()
    await c.open(ingress={"request_timeout_s": 2.0})
    c.coordinator.set_owner(5, None)
    await eventually(lambda: c.router.membership.map.version == c.coordinator.version)
    async with asyncio.timeout(30):
        one, two = await c.publish(event("u", 5), event("v", 600))
    assert (one.status, one.code) == ("failed", "unavailable")
    assert one.retry_after_s > 0
    assert two.status == "delivered"
    status = await c.router.status()
    assert (status["held"], status["heldSlots"], status["asks"]) == (0, 0, 0)
    await c.close()


async def test_other_slots_go_on_while_one_waits(cluster: Cluster):
    """An ownerless slot holds up nobody else, not even other slots of the same shard."""
    cluster.coordinator.set_owner(5, None)
    await eventually(lambda: cluster.router.membership.map.version == cluster.coordinator.version)
    stuck = asyncio.ensure_future(cluster.publish(event("u", 5)))
    await eventually(lambda: cluster.router._held)
    for n in range(20):
        assert (await cluster.publish(event("v", 6)))[0].seq == n + 1
    assert not stuck.done()
    cluster.coordinator.set_owner(5, "shard-b")
    assert (await stuck)[0].status == "delivered"


async def test_every_event_is_stored_once_and_in_order_while_slots_move(cluster: Cluster):
    """Slots that move to and fro under load: each user's events are stored once, in the order sent."""
    users = [f"user-{n}" for n in range(20)]
    stop = False

    async def produce(user: str) -> list[bytes]:
        sent = []
        while not stop:
            batch = [event(user) for _ in range(3)]
            outcomes = await cluster.publish(*batch)
            assert [o.status for o in outcomes] == ["delivered"] * 3
            sent += [e.id for e in batch]
        return sent

    producers = [asyncio.ensure_future(produce(user)) for user in users]
    for turn in range(20):
        here, there = (cluster.a, cluster.b) if turn % 2 else (cluster.b, cluster.a)
        here.owned, there.owned = set(range(1024)), set()
        before = len(here.events)
        await eventually(lambda t=there: len(t.batches))
        cluster.coordinator.set_owner(range(1024), here.name)
        await eventually(lambda h=here, n=before: len(h.events) > n)
    stop = True
    sent = dict(zip(users, await asyncio.gather(*producers), strict=True))
    stored: dict[str, list[bytes]] = defaultdict(list)
    for e in cluster.a.events + cluster.b.events:
        stored[e.user].append(e.id)
    for user in users:
        assert sorted(stored[user]) == sorted(sent[user])
        for shard in (cluster.a, cluster.b):
            ids = [e.id for e in shard.events if e.user == user]
            assert ids == sorted(ids), "ids grow in the order sent"


# -- bounds ---------------------------------------------------------------------------------------------


async def test_a_full_lane_answers_busy():
    """Beyond `router.max_outstanding` events on the way, further ones are refused, the first are not."""
    c = Cluster()
    await c.open(router={"max_outstanding": 10})
    waiting: list[tuple[Link, Publish, int]] = []

    def slow(link: Link, message: Any, request: int) -> bool:
        waiting.append((link, message, request))
        return True

    c.a.answer = slow
    asked = c.publishing(*[event("u", 5) for _ in range(12)], event("v", 600))
    await eventually(lambda: waiting)
    (refused,) = await c.publish(event("u", 5))
    assert (refused.status, refused.code) == ("failed", "busy")
    assert refused.retry_after_s > 0
    for link, message, request in waiting:
        link.reply_nowait(request, c.a.publish(message))
    outcomes = await asked
    assert [o.status for o in outcomes] == ["delivered"] * 10 + ["failed"] * 2 + ["delivered"]
    c.a.answer = None
    assert (await c.publish(event("u", 5)))[0].status == "delivered", "there is room again"
    await c.close()


async def test_what_waited_goes_on_in_portions():
    """Events of many slots that waited for one owner are not sent, and answered, all at once."""
    c = Cluster()
    await c.open(router={"release_batch": 3, "release_pause_s": 0.2})
    c.coordinator.set_owner(range(8), None)
    await eventually(lambda: c.router.membership.map.version == c.coordinator.version)
    asked = [asyncio.ensure_future(c.publish(event(f"u{n}", n))) for n in range(8)]
    await eventually(lambda: c.router._held_count == 8)
    c.coordinator.set_owner(range(8), "shard-b")
    assert {o.status for (o,) in await asyncio.gather(*asked)} == {"delivered"}
    assert sum(c.b.batches) == 8
    assert max(c.b.batches) <= 3
    await c.close()


async def test_held_events_are_bounded():
    """Events for slots without owner do not pile up without limit."""
    c = Cluster()
    await c.open(router={"max_held": 3})
    c.coordinator.set_owner(5, None)
    await eventually(lambda: c.router.membership.map.version == c.coordinator.version)
    asked = c.publishing(*(event("u", 5) for _ in range(5)))
    await eventually(lambda: c.router._held_count == 3)
    c.coordinator.set_owner(5, "shard-b")
    assert [o.code for o in await asked] == [None, None, None, "busy", "busy"]
    await c.close()


async def test_an_ingress_that_left(cluster: Cluster):
    """Answers for a link that is gone are dropped, and the router goes on."""
    link = await cluster.dial()
    link.request_nowait(Publish([event("u", 5)]))
    link.close()
    await eventually(lambda: cluster.a.events)
    assert (await cluster.publish(event("u", 5)))[0].seq == 2


# -- other messages -------------------------------------------------------------------------------------


async def test_messages_with_a_slot_are_passed_on(cluster: Cluster):
    """Reply and failure of the owner come back as they are; a move is followed."""
    assert await cluster.ingress.request(Change("t", "u", 600, "read")) == Done()
    assert [m.slot for m, _ in cluster.b.received] == [600]

    def answer(link: Link, message: Any, request: int) -> bool:
        link.fail_nowait(request, NotFoundError("no such notification"))
        return True

    cluster.a.answer = answer
    with pytest.raises(RemoteError) as caught:
        await cluster.ingress.request(Change("t", "u", 5, "read"))
    assert (caught.value.code, caught.value.message) == ("not_found", "no such notification")
    cluster.a.answer, cluster.a.owned = None, set()
    asked = asyncio.ensure_future(cluster.ingress.request(Change("t", "u", 5, "read")))
    await eventually(lambda: cluster.a.received)
    cluster.coordinator.set_owner(5, "shard-b")
    assert await asked == Done()


async def test_what_a_router_does_not_know(cluster: Cluster):
    """A request that is not for routers fails at once."""
    with pytest.raises(RemoteError) as caught:
        await cluster.ingress.request(Done())
    assert caught.value.code == "invalid"


async def test_presence_is_asked_of_every_owner(cluster: Cluster):
    """Users come in the order asked, twice if asked twice, each from its own shard."""
    users = [f"user-{n}" for n in range(50)]
    for shard in (cluster.a, cluster.b):
        shard.presence = dict.fromkeys(users[:10], "active")
    asked = [*users, users[0]]
    reply = await cluster.ingress.request(PresenceQuery("t", asked))
    assert [u.user for u in reply.users] == asked
    assert [u.status for u in reply.users] == ["active"] * 10 + ["offline"] * 40 + ["active"]
    queries = [set(m.users) for shard in (cluster.a, cluster.b) for m, _ in shard.received]
    assert len(queries) == 2
    assert all(slot_of("t", user) < 512 for user in cluster.a.received[0][0].users)
    empty = await cluster.ingress.request(PresenceQuery("t", []))
    assert empty.users == []


async def test_presence_of_an_unreachable_shard_is_not_guessed():
    """No owner: unavailable, never "offline"."""
    c = Cluster()
    await c.open(ingress={"request_timeout_s": 0.3})
    c.coordinator.set_owner(slot_of("t", "u"), None)
    await eventually(lambda: c.router.membership.map.version == c.coordinator.version)
    with pytest.raises(RemoteError) as caught:
        await c.ingress.request(PresenceQuery("t", ["u"]))
    assert (caught.value.code, caught.value.temporary) == ("unavailable", True)
    await c.close()


# -- pushes ---------------------------------------------------------------------------------------------


def job(provider: str) -> PushJob:
    return PushJob(
        next(_ids), 1, "t", "u", 5, bytes(16), 1, "chat", "title", None, None, "key", 1, 0, None, [], provider
    )  # fmt: skip


@pytest.fixture
async def pools(cluster: Cluster) -> AsyncIterator[dict[str, FakePool]]:
    found = {
        "fcm-1": FakePool(cluster.coordinator, "fcm-1", "fcm"),
        "fcm-2": FakePool(cluster.coordinator, "fcm-2", "fcm"),
        "apns-1": FakePool(cluster.coordinator, "apns-1", "apns"),
    }
    for pool in found.values():
        await pool.membership.start()

    async def ready() -> bool:
        pools = (await cluster.router.status())["pools"]
        return len(pools) == 3 and all(pool["open"] for pool in pools.values())

    await eventually(ready)
    yield found
    for pool in found.values():
        await pool.membership.close()


async def push(cluster: Cluster, jobs: list[PushJob]) -> None:
    """A shard sends over the link that the router opened to it."""
    await eventually(lambda: cluster.a.links)
    next(link for link in cluster.a.links if link.peer == "router-1").send_nowait(Push(jobs))


async def test_jobs_go_to_pools_of_their_provider(cluster: Cluster, pools: dict[str, FakePool]):
    """A mixed message is split by provider."""
    jobs = [job("fcm"), job("apns"), job("fcm"), job("none such")]
    await push(cluster, jobs)
    await eventually(lambda: len(pools["fcm-1"].jobs + pools["fcm-2"].jobs) == 2 and pools["apns-1"].jobs)
    assert pools["apns-1"].jobs == [jobs[1]]
    assert cluster.router.stats.counters['pushes_left{provider="none such"}'] == 1


def handed_back(cluster: Cluster) -> list[PushLeft]:
    """What the shard that sent the jobs was told."""
    return [message for message, _ in cluster.a.received if type(message) is PushLeft]


async def test_jobs_that_no_pool_takes_are_handed_back_at_once(cluster: Cluster, pools: dict[str, FakePool]):
    """No pool, or a pool that takes a part: the shard is told which tries are off, and why."""
    lone = job("none such")
    await push(cluster, [lone])
    await eventually(lambda: handed_back(cluster))
    assert handed_back(cluster) == [PushLeft("none such", "no pool", [lone.delivery], [1])]
    for name in ("fcm-1", "fcm-2"):
        pools[name].room = 2
    some = [job("fcm") for _ in range(5)]
    some[4].attempt = 7
    await push(cluster, some)
    await eventually(lambda: len(handed_back(cluster)) == 2)
    left = PushLeft("fcm", "breaker open", [j.delivery for j in some[2:]], [1, 1, 7])
    assert handed_back(cluster)[1] == left


async def test_jobs_whose_fate_is_unknown_are_left_to_their_lease(
    cluster: Cluster, pools: dict[str, FakePool]
):
    """The pool died with the offer unanswered: it may have sent them, so nobody says they were not tried."""
    pools["apns-1"].silent = True
    await push(cluster, [job("apns")])
    await eventually(lambda: pools["apns-1"].jobs)
    await pools["apns-1"].membership.close()
    await eventually(lambda: cluster.router.stats.counters['pushes_left{provider="apns"}'] == 1)
    lone = job("none such")
    await push(cluster, [lone])
    await eventually(lambda: handed_back(cluster))
    assert [left.provider for left in handed_back(cluster)] == ["none such"]


async def test_unanswered_jobs_count_as_work(cluster: Cluster, pools: dict[str, FakePool]):
    """A pool that does not answer gets no more than its share."""
    pools["fcm-1"].silent = pools["fcm-2"].silent = True
    for n in range(20):
        await push(cluster, [job("fcm")])
        await eventually(lambda n=n: len(pools["fcm-1"].jobs + pools["fcm-2"].jobs) == n + 1)
    assert [len(pools[name].jobs) for name in ("fcm-1", "fcm-2")] == [10, 10]
    status = (await cluster.router.status())["pools"]
    assert [status[name]["offered"] for name in ("fcm-1", "fcm-2")] == [10, 10]


async def test_what_a_pool_said_it_holds_counts_as_work(cluster: Cluster, pools: dict[str, FakePool]):
    """A pool that answered with a long queue is passed over for one that did not."""
    pools["fcm-2"].queued = 4000
    sent = 0
    while not pools["fcm-2"].jobs:  # until it was asked once
        await push(cluster, [job("fcm")])
        sent += 1
        await eventually(lambda n=sent: len(pools["fcm-1"].jobs + pools["fcm-2"].jobs) == n)

    async def told() -> bool:
        return (await cluster.router.status())["pools"]["fcm-2"]["load"] > 1000

    await eventually(told)
    for n in range(5):
        await push(cluster, [job("fcm")])
        await eventually(lambda n=n: len(pools["fcm-1"].jobs) == sent + n)
    assert len(pools["fcm-2"].jobs) == 1


async def test_a_full_pool_delays_nothing(cluster: Cluster, pools: dict[str, FakePool]):
    """What a full pool does not take is left to the outbox; events go on."""
    for name in ("fcm-1", "fcm-2"):
        pools[name].room = 2
    await push(cluster, [job("fcm") for _ in range(10)])
    await eventually(lambda: cluster.router.stats.counters['pushes_left{provider="fcm"}'] == 8)
    pools["fcm-1"].silent = pools["fcm-2"].silent = True
    limit = cluster.router.config.settings.push.max_queue
    for _ in range(3):
        await push(cluster, [job("fcm")] * limit)
    await eventually(lambda: cluster.router.stats.counters['pushes_left{provider="fcm"}'] == 8 + limit)
    assert (await cluster.publish(event("u", 5)))[0].status == "delivered"


async def test_a_dead_pool_is_passed_over(cluster: Cluster, pools: dict[str, FakePool]):
    """Jobs go to the pool that lives."""
    await pools["fcm-1"].membership.close()

    async def gone() -> bool:  # until then a job may be lost with it: the outbox brings it back
        return not (await cluster.router.status())["pools"].get("fcm-1", {}).get("open")

    await eventually(gone)
    await push(cluster, [job("fcm")])
    await eventually(lambda: len(pools["fcm-2"].jobs) == 1)


# -- leaving --------------------------------------------------------------------------------------------


async def test_draining(cluster: Cluster):
    """What is on the way is answered, what is new is refused, and the coordinator hears of the departure."""
    waiting: list[tuple[Link, Publish, int]] = []

    def slow(link: Link, message: Any, request: int) -> bool:
        waiting.append((link, message, request))
        return True

    cluster.a.answer = slow
    asked = asyncio.ensure_future(cluster.publish(event("u", 5)))
    await eventually(lambda: waiting)
    draining = asyncio.ensure_future(cluster.router.drain())
    await eventually(lambda: cluster.router._draining)
    with pytest.raises(RemoteError) as caught:
        await cluster.publish(event("v", 600))
    assert (caught.value.code, caught.value.temporary) == ("unavailable", True)
    link, message, request = waiting[0]
    link.reply_nowait(request, cluster.a.publish(message))
    assert (await asked)[0].status == "delivered"
    await draining
    assert cluster.coordinator.left == ["router-1"]


async def test_stopping_with_events_on_the_way(cluster: Cluster):
    """`stop` leaves no timer or task that works on."""
    cluster.a.answer = lambda link, message, request: True
    asked = asyncio.ensure_future(cluster.publish(event("u", 5)))
    passed = asyncio.ensure_future(cluster.ingress.request(Change("t", "u", 5, "read")))
    await eventually(lambda: cluster.router._asks_open and cluster.router._tasks)
    await cluster.router.stop()
    results = await asyncio.gather(asked, passed, return_exceptions=True)
    assert all(isinstance(r, Exception) for r in results)
    assert cluster.router._hold_timer is None
    assert not cluster.router._tasks
