"""The directory: links to all shards, and requests that follow a slot."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from actors.directory import ShardDirectory
from actors.link import Link
from actors.member import Membership
from carillon.errors import LinkTimeoutError, NotFoundError, RemoteError, UnavailableError
from carillon.messages import Address, Change, Done, Member
from carillon.metrics import Stats
from tests.actors.fakes import FakeCoordinator, FakeShard, actor_config, fast_settings
from tests.support import eventually


class Recorder:
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.messages: list[Any] = []

    def link_opened(self, link: Link) -> None:
        self.events.append(("opened", link.peer))

    def link_closed(self, link: Link) -> None:
        self.events.append(("closed", link.peer))

    def receive(self, link: Link, message: Any, request: int) -> None:
        self.messages.append(message)

    def read_finished(self, link: Link) -> None:
        pass


class Cluster:
    """A coordinator, two shards, and a directory of a member without other duties."""

    coordinator: FakeCoordinator
    a: FakeShard
    b: FakeShard
    membership: Membership
    directory: ShardDirectory
    handler: Recorder

    def change(self, slot: int = 5) -> Change:
        return Change("t", "u", slot, "read")


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    c = Cluster()
    c.coordinator = await FakeCoordinator.start()
    c.a = await FakeShard.start(c.coordinator, "shard-a")
    c.b = await FakeShard.start(c.coordinator, "shard-b")
    c.coordinator.set_owner(range(512), "shard-a")
    c.coordinator.set_owner(range(512, 1024), "shard-b")
    c.handler = Recorder()
    c.membership = Membership(actor_config("router", "router-1", c.coordinator), Recorder(), stats=Stats())
    c.directory = ShardDirectory(c.membership, c.handler)
    await c.membership.start()
    await eventually(lambda: c.directory.link("shard-a") and c.directory.link("shard-b"))
    yield c
    await c.directory.close()
    await c.membership.close()
    await c.a.stop()
    await c.b.stop()
    await c.coordinator.stop()


async def test_requests_go_to_the_owner(cluster: Cluster):
    """Each slot's request reaches the shard of the map."""
    assert await cluster.directory.request(5, cluster.change(5), 30.0) == Done()
    assert await cluster.directory.request(600, cluster.change(600), 30.0) == Done()
    assert [m.slot for m, _ in cluster.a.received] == [5]
    assert [m.slot for m, _ in cluster.b.received] == [600]
    owner = cluster.directory.owner(600)
    assert owner is not None
    assert owner.name == "shard-b"
    assert cluster.directory.owner(5000) is None


async def test_a_request_follows_its_slot(cluster: Cluster):
    """A shard that answers `moved` is left for the new owner as soon as the map names it."""
    cluster.a.owned = set()
    waiting = asyncio.ensure_future(cluster.directory.request(5, cluster.change(), 30.0))
    await eventually(lambda: cluster.a.received)
    assert not waiting.done()
    cluster.coordinator.set_owner(5, "shard-b")
    assert await waiting == Done()
    assert len(cluster.b.received) == 1


async def test_a_shard_that_learns_late_of_its_slot(cluster: Cluster):
    """With no newer map at all the same shard is asked again, as it may be the one that is behind."""
    cluster.a.owned = set()
    waiting = asyncio.ensure_future(cluster.directory.request(5, cluster.change(), 30.0))
    await eventually(lambda: cluster.a.received)
    cluster.a.owned = None
    assert await waiting == Done()


async def test_a_slot_without_owner(cluster: Cluster):
    """The request waits for an owner, and says why when none comes in time."""
    cluster.coordinator.set_owner(5, None)
    await eventually(lambda: cluster.directory.owner(5) is None)
    started = time.monotonic()
    with pytest.raises(UnavailableError, match="the slot has no owner"):
        await cluster.directory.request(5, cluster.change(), 0.2)
    assert 0.15 < time.monotonic() - started < 30
    waiting = asyncio.ensure_future(cluster.directory.request(5, cluster.change(), 30.0))
    await asyncio.sleep(0)
    cluster.coordinator.set_owner(5, "shard-b")
    assert await waiting == Done()


async def test_a_lost_shard_that_comes_back(cluster: Cluster):
    """A request on the way when its shard dies is sent again to the next process of that name."""
    cluster.a.answer = lambda link, message, request: True  # takes it and never answers
    waiting = asyncio.ensure_future(cluster.directory.request(5, cluster.change(), 30.0))
    link = cluster.directory.link("shard-a")
    assert link is not None
    await eventually(lambda: link.in_flight())
    await cluster.a.stop()
    await eventually(lambda: cluster.directory.link("shard-a") is None)
    cluster.a = await FakeShard.start(cluster.coordinator, "shard-a")
    assert await waiting == Done()
    # At least once: a link dialled before the map names the new process is dropped when it does.
    assert 1 <= len(cluster.a.received) <= 2


async def test_a_replaced_shard_that_hangs(cluster: Cluster):
    """When the map names a new incarnation the old link is dropped although its process holds it open."""
    old = cluster.directory.link("shard-a")
    assert old is not None
    cluster.a.answer = lambda link, message, request: True
    waiting = asyncio.ensure_future(cluster.directory.request(5, cluster.change(), 30.0))
    await eventually(lambda: old.in_flight())
    successor = await FakeShard.start(cluster.coordinator, "shard-a")
    assert await waiting == Done()
    assert old.closed
    assert 1 <= len(successor.received) <= 2
    await successor.stop()


async def test_a_shard_that_is_back_is_dialled_at_once() -> None:
    """The map that names its new process ends the wait for the next try, however long that is."""
    c = await FakeCoordinator.start(fast_settings(link={"reconnect_min_s": 0.01, "reconnect_max_s": 0.01}))
    shard = await FakeShard.start(c, "shard-a")
    patient = c.settings.with_values(link={"reconnect_min_s": 100_000.0, "reconnect_max_s": 100_000.0})
    membership = Membership(
        actor_config("router", "router-1", c, settings=patient), Recorder(), stats=Stats()
    )
    directory = ShardDirectory(membership, None)
    await membership.start()
    await eventually(lambda: directory.link("shard-a"))
    await shard.stop()
    await eventually(lambda: directory.link("shard-a") is None)
    successor = await FakeShard.start(c, "shard-a")
    await eventually(lambda: directory.link("shard-a"))
    await directory.close()
    await membership.close()
    await successor.stop()
    await c.stop()


async def test_another_actor_at_a_shards_address(cluster: Cluster):
    """A stale address under which another actor listens now gives no link."""
    where = cluster.b.membership.member.address
    cluster.coordinator.add(Member("shard", "shard-c", "local", "i", where))
    cluster.coordinator.set_owner(7, "shard-c")
    await eventually(lambda: any(m.name == "shard-c" for m in cluster.directory.shards()))
    with pytest.raises(UnavailableError, match="no link to shard-c"):
        await cluster.directory.request(7, cluster.change(7), 0.3)
    assert cluster.b.received == []


async def test_other_failures_and_deadlines_are_the_callers(cluster: Cluster):
    """Only `moved` and `fenced` are tried again; an unanswered request is a LinkTimeoutError."""

    def answer(link: Link, message: Any, request: int) -> bool:
        if message.op == "read":
            link.fail_nowait(request, NotFoundError("no such notification"))
        return True

    cluster.a.answer = answer
    with pytest.raises(RemoteError) as caught:
        await cluster.directory.request(5, cluster.change(), 30.0)
    assert caught.value.code == "not_found"
    with pytest.raises(LinkTimeoutError):
        await cluster.directory.request(5, Change("t", "u", 5, "seen"), 0.1)


async def test_shards_that_leave_the_map(cluster: Cluster):
    """The link to a shard that is no longer in the map is closed; its handler hears of both ends."""
    cluster.coordinator.forget("shard-b")
    await eventually(lambda: ("closed", "shard-b") in cluster.handler.events)
    assert cluster.directory.link("shard-b") is None
    assert sorted(cluster.handler.events[:2]) == [("opened", "shard-a"), ("opened", "shard-b")]


async def test_shards_may_send_on_the_link(cluster: Cluster):
    """What a shard sends of its own accord comes to the handler."""
    await eventually(lambda: [link for link in cluster.a.links if link.peer == "router-1"])
    cluster.a.links[0].send_nowait(Done(42))
    await eventually(lambda: cluster.handler.messages == [Done(42)])


async def test_an_unreachable_address(cluster: Cluster):
    """A shard at a port where nobody listens is tried again without harm to the others."""
    cluster.coordinator.add(Member("shard", "shard-c", "local", "i", Address("127.0.0.1", 1)))
    await eventually(lambda: any(m.name == "shard-c" for m in cluster.directory.shards()))
    assert await cluster.directory.request(600, cluster.change(600), 30.0) == Done()
    assert cluster.directory.link("shard-c") is None
