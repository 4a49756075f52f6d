"""The coordinator in-process: members that speak the link protocol, a real Postgres, no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from actors.coordinator import Coordinator, coordinator_config
from actors.link import Link, dial
from carillon.errors import ClusterError, LinkClosedError, LinkHandshakeError, RemoteError
from carillon.ids import SLOTS
from carillon.messages import Address, ClusterMap, Done, Join, Leave, Member, Renew, StatsQuery
from carillon.placement import EPOCH_STRIDE, ActorSpec, NodeInfo
from carillon.settings import Settings
from tests.support import eventually

SECRET = b"cluster secret of this test"
LEASE_S = 2.0


class FakeMember:
    """A member that joins, keeps every map it is sent, and renews until told to be silent."""

    def __init__(self, settings: Settings, kind: str, name: str, node: str = "local") -> None:
        self.settings = settings
        self.kind, self.name, self.node = kind, name, node
        self.incarnation = f"{name}-1"
        self.maps: list[ClusterMap] = []
        self.link: Link | None = None
        self.counters: dict[str, float] = {}
        self._renewals: asyncio.Task[None] | None = None

    def link_opened(self, link: Link) -> None: ...

    def link_closed(self, link: Link) -> None: ...

    def read_finished(self, link: Link) -> None: ...

    def receive(self, link: Link, message: Any, request: int) -> None:
        assert type(message) is ClusterMap
        self.maps.append(message)

    @property
    def map(self) -> ClusterMap:
        return self.maps[-1]

    @property
    def term(self) -> int:
        return next(shard.term for shard in self.map.shards if shard.name == self.name)

    @property
    def slots(self) -> int:
        return slots(self.map)[self.name]

    async def join(self, coordinator: Coordinator, incarnation: str | None = None) -> ClusterMap:
        self.fall_silent()  # a renewal on the new link before its Join would close it
        self.incarnation = incarnation or self.incarnation
        address = coordinator.link_address()
        assert address is not None
        self.link = await dial(address, self, self.settings.link, self.name, SECRET)
        member = Member(self.kind, self.name, self.node, self.incarnation, Address("127.0.0.1", 9))
        answer = await self.link.request(Join(member))
        self.maps.append(answer)
        self._renewals = asyncio.ensure_future(self._renew())
        return answer

    async def _renew(self) -> None:
        with contextlib.suppress(LinkClosedError):
            while True:
                assert self.link is not None
                self.link.send_nowait(Renew(self.name, self.incarnation, dict(self.counters)))
                await asyncio.sleep(self.settings.cluster.lease_renew_s)

    def fall_silent(self) -> None:
        """Stop renewing, link open: a stopped process or a cut cable."""
        if self._renewals is not None:
            self._renewals.cancel()

    def die(self) -> None:
        """Link closed, no renewals: a killed process."""
        self.fall_silent()
        if self.link is not None:
            self.link.close()


def slots(cluster_map: ClusterMap) -> Counter[str]:
    """Slots per shard name; "" counts the ownerless."""
    return Counter("" if at < 0 else cluster_map.shards[at].name for at in cluster_map.owners)


class Bench:
    """What a test needs: settings, coordinators and members, all ended at its end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.coordinators: list[Coordinator] = []
        self.members: list[FakeMember] = []

    async def coordinator(self, **options: Any) -> Coordinator:
        made = Coordinator(coordinator_config(self.settings, SECRET), **{"spawn": False, **options})
        self.coordinators.append(made)
        await made.start()
        return made

    def member(self, kind: str, name: str, node: str = "local") -> FakeMember:
        made = FakeMember(self.settings, kind, name, node)
        self.members.append(made)
        return made

    async def shards(self, coordinator: Coordinator, *names: str) -> list[FakeMember]:
        made = [self.member("shard", name) for name in names]
        for member in made:
            await member.join(coordinator)
        share = SLOTS // len(made)
        await eventually(lambda: all(m.slots in (share, share + 1) for m in made), what="slots are shared")
        return made


@pytest.fixture
async def bench(postgres_dsn: str) -> AsyncIterator[Bench]:
    settings = Settings().with_values(
        postgres={"dsn": postgres_dsn, "connect_timeout_s": 2.0},
        cluster={
            "lease_renew_s": 0.05,
            "lease_timeout_s": LEASE_S,
            "rebalance_delay_s": 0.1,
            "node_poll_s": 0.1,
            "fence_wait_s": 0.2,
            "spawn_retry_s": 0.5,
        },
        link={"reconnect_max_s": 0.2},
    )
    made = Bench(settings)
    yield made
    for member in made.members:
        member.die()
    for coordinator in made.coordinators:
        await coordinator.stop()


async def stays(check: Callable[[], bool] | Callable[[], Awaitable[bool]], seconds: float, what: str) -> None:
    """Assert that something holds all the time for a while."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        held = check()
        assert (await held) if asyncio.iscoroutine(held) else held, what
        await asyncio.sleep(0.02)


async def saved(coordinator: Coordinator, *names: str) -> None:
    """Wait until Postgres knows these members, under the terms and slots of the present map."""

    async def check() -> bool:
        stored = await coordinator._table.store.load()
        return not coordinator._dirty.is_set() and {member.name for member in stored.members} == set(names)

    await eventually(check, what=f"{', '.join(names)} are saved")


async def test_the_first_shard_owns_everything_at_once_and_the_second_gets_half_later(bench: Bench) -> None:
    """Ownerless slots are given in the answer to Join; a fair share follows after the delay, in one map."""
    coordinator = await bench.coordinator()
    first, second = bench.member("shard", "a"), bench.member("shard", "b")
    assert slots(await first.join(coordinator)) == {"a": SLOTS}
    assert (await second.join(coordinator)).owners == [0] * SLOTS
    await eventually(lambda: slots(second.map) == {"a": SLOTS // 2, "b": SLOTS // 2})
    await eventually(lambda: first.map.version == second.map.version)
    assert first.term == 2, "the loser's term is new"
    assert second.term == 1, "the winner's is not"


async def test_every_map_is_the_next_version_and_reaches_everyone(bench: Bench) -> None:
    """A member that stays connected sees each version of an epoch, without a gap."""
    coordinator = await bench.coordinator()
    watcher = bench.member("gateway", "g")
    await watcher.join(coordinator)
    await bench.shards(coordinator, "a", "b", "c")
    versions = [seen.version for seen in watcher.maps]
    assert versions == list(range(versions[0], versions[0] + len(versions)))
    assert [m.name for m in watcher.map.members] == ["g"]


async def test_a_killed_shard_that_is_back_within_its_lease_keeps_its_slots_in_a_new_term(
    bench: Bench,
) -> None:
    """A closed link is no loss; the next process takes the slots up under the next term."""
    coordinator = await bench.coordinator()
    first, second = await bench.shards(coordinator, "a", "b")
    owners, term = second.map.owners, first.term
    first.die()
    await stays(lambda: second.map.owners == owners, LEASE_S / 4, "slots moved within the lease")
    await first.join(coordinator, "a-2")
    assert first.term == term + 1
    await stays(lambda: second.map.owners == owners, LEASE_S * 1.3, "slots moved although the shard is back")


@pytest.mark.parametrize("how", ["die", "fall_silent"])
async def test_a_shard_whose_lease_lapses_loses_its_slots(bench: Bench, how: str) -> None:
    """Dead or stopped: the slots go to those who live, in one move, and its term is over."""
    coordinator = await bench.coordinator()
    first, second = await bench.shards(coordinator, "a", "b")
    term = first.term
    began = time.monotonic()
    getattr(first, how)()
    await eventually(lambda: slots(second.map) == {"b": SLOTS}, what="slots moved")
    assert time.monotonic() - began > LEASE_S / 2, "not before the lease is over"
    assert [m.name for m in second.map.shards] == ["b"]
    # It wakes up: its link was closed, it joins again as the same process and is told the new term.
    assert first.link is not None
    await eventually(lambda: first.link.closed)
    await first.join(coordinator)
    assert first.term > term
    await eventually(lambda: slots(second.map) == {"a": SLOTS // 2, "b": SLOTS // 2})


async def test_the_only_shard_keeps_its_slots_whatever_its_lease(bench: Bench) -> None:
    """Without another shard a lapsed lease moves nothing."""
    coordinator = await bench.coordinator()
    (only,) = await bench.shards(coordinator, "a")
    gateway = bench.member("gateway", "g")
    await gateway.join(coordinator)
    only.die()
    await stays(lambda: slots(gateway.map) == {"a": SLOTS}, LEASE_S * 1.5, "the slots were taken away")
    # As soon as somebody can take them they are moved.
    other = bench.member("shard", "b")
    await other.join(coordinator)
    await eventually(lambda: slots(other.map) == {"b": SLOTS})


async def test_a_stall_of_the_whole_machine_moves_nothing(bench: Bench) -> None:
    """The coordinator's own loop is held up for longer than a lease: everybody gets a fresh one."""
    coordinator = await bench.coordinator()
    first, second = await bench.shards(coordinator, "a", "b")
    version = first.map.version
    time.sleep(LEASE_S * 1.5)  # the loop that all three share
    await stays(lambda: second.map.version == version, 0.6, "the map changed after a stall")
    assert (await coordinator.status())["stalls"] >= 1
    first.fall_silent()
    await eventually(lambda: slots(second.map) == {"b": SLOTS}, what="leases count again afterwards")


async def test_a_silence_of_all_members_moves_nothing(bench: Bench) -> None:
    """All leases ending together say more about the network than about the members."""
    coordinator = await bench.coordinator()
    first, second = await bench.shards(coordinator, "a", "b")
    version = first.map.version
    for member in (first, second):
        member.fall_silent()
    for member in (first, second):
        assert member.link is not None
        await member.link.request(StatsQuery())  # answered behind its last renewal
    # Both leases from one moment on: renewals come up to an interval apart, and are read one after the other.
    now = coordinator._clock.monotonic()
    for member in (first, second):
        coordinator._leases.grant(member.name, now)
    await eventually(lambda: coordinator._stalls >= 1, what="the coordinator noticed")
    assert coordinator.map.version == version


async def test_a_lapsed_member_without_slots_leaves_the_map(bench: Bench) -> None:
    """Gateways, routers and pools are dropped when their lease is over, not when their link closes."""
    coordinator = await bench.coordinator()
    (shard,) = await bench.shards(coordinator, "a")
    gateway = bench.member("gateway", "g")
    await gateway.join(coordinator)
    gateway.die()
    await stays(lambda: len(shard.map.members) == 1, 0.3, "dropped with its link")
    await eventually(lambda: shard.map.members == [])


async def test_leave_moves_the_slots_before_it_is_answered(bench: Bench) -> None:
    """When Done arrives the leaver owns nothing, and it has seen the map that says so."""
    coordinator = await bench.coordinator()
    first, second = await bench.shards(coordinator, "a", "b")
    assert first.link is not None
    assert await first.link.request(Leave("a", "a-1")) == Done()
    assert first.slots == 0
    await eventually(lambda: [m.name for m in second.map.shards] == ["b"])
    assert slots(second.map) == {"b": SLOTS}


async def test_a_retired_coordinator_moves_nothing(bench: Bench) -> None:
    """On the way down slots stay where they are, however many shards leave."""
    coordinator = await bench.coordinator()
    first, second = await bench.shards(coordinator, "a", "b")
    await coordinator.drain()
    assert first.link is not None
    await first.link.request(Leave("a", "a-1"))
    await stays(lambda: slots(second.map)["b"] == SLOTS // 2, 0.5, "slots moved on the way down")


async def test_a_name_is_held_by_the_process_that_renews_it(bench: Bench) -> None:
    """A process that was thought dead cannot push out its successor."""
    coordinator = await bench.coordinator()
    for kind in ("shard", "router"):
        living, stale = bench.member(kind, f"{kind}-x"), bench.member(kind, f"{kind}-x")
        await living.join(coordinator)
        with pytest.raises(RemoteError, match="renews its lease"):
            await stale.join(coordinator, "older")
        living.die()
        await eventually(lambda name=living.name: not coordinator._roster.get(name).is_joined)
        await stale.join(coordinator, "newer")


async def test_a_join_on_a_new_link_of_the_same_process_keeps_its_term(bench: Bench) -> None:
    """A lost link is no restart."""
    coordinator = await bench.coordinator()
    (shard,) = await bench.shards(coordinator, "a")
    term = shard.term
    shard.die()
    await shard.join(coordinator)
    assert shard.term == term


async def test_a_restarted_coordinator_has_the_same_map_and_waits_one_lease(bench: Bench) -> None:
    """Nothing moves while members come back; who does not within a lease is lost as ever."""
    old = await bench.coordinator()
    first, second = await bench.shards(old, "a", "b")
    gateway = bench.member("gateway", "g")
    await gateway.join(old)
    await saved(old, "a", "b", "g")
    before = old.map
    await old.stop()

    new = await bench.coordinator()
    assert new.epoch == old.epoch + 1
    assert new.map.version // EPOCH_STRIDE == new.epoch
    assert (new.map.owners, new.map.shards) == (before.owners, before.shards)
    assert [m.name for m in new.map.members] == ["g"]
    terms = (first.term, second.term)
    await second.join(new)
    await stays(lambda: second.map.owners == before.owners, 0.4, "slots moved within the grace")
    await first.join(new)
    await gateway.join(new)
    assert (first.term, second.term) == terms
    await stays(lambda: second.map.owners == before.owners, LEASE_S, "slots moved although everybody is back")


async def test_a_coordinator_that_wakes_up_late_gives_way(bench: Bench) -> None:
    """Its first write is refused by Postgres; then it serves nobody, so that members find the new one."""
    old = await bench.coordinator()
    (shard,) = await bench.shards(old, "a")
    new = await bench.coordinator()
    late = bench.member("shard", "late")
    with pytest.raises((RemoteError, LinkClosedError, LinkHandshakeError)):
        await late.join(old)
    assert "epoch" in await asyncio.wait_for(old.terminated, 30)
    await eventually(lambda: shard.link is not None and shard.link.closed)
    assert slots(await shard.join(new)) == {"a": SLOTS}


async def test_without_postgres_the_last_map_is_served_and_nothing_moves(bench: Bench) -> None:
    """A lapsed lease becomes a move only once Postgres answers again; members without slots come and go."""
    coordinator = await bench.coordinator()
    first, second = await bench.shards(coordinator, "a", "b")
    store = coordinator._table.store
    real, store._pool = store._pool, _NoPool()
    first.die()
    gateway = bench.member("gateway", "g")
    assert slots(await gateway.join(coordinator)) == {"a": SLOTS // 2, "b": SLOTS // 2}
    with pytest.raises(RemoteError, match="PostgreSQL"):
        await bench.member("shard", "c").join(coordinator)
    await eventually(lambda: coordinator._table.error, what="the coordinator tried to move")
    await stays(lambda: slots(second.map)["a"] == SLOTS // 2, LEASE_S * 1.3, "slots moved without Postgres")
    assert (await coordinator.status())["postgres"] != "ok"
    store._pool = real
    await eventually(lambda: slots(second.map) == {"b": SLOTS}, what="the move once Postgres is back")
    assert (await coordinator.status())["postgres"] == "ok"


class _NoPool:
    """Every acquire fails like a server that is down."""

    def acquire(self, timeout: float) -> Any:
        raise ConnectionRefusedError("no server")

    async def close(self) -> None: ...


async def test_a_move_whose_answer_was_lost_is_found_out(bench: Bench) -> None:
    """The commit happened, the answer did not arrive: the map is read again and everybody is told."""
    coordinator = await bench.coordinator()
    first, second = await bench.shards(coordinator, "a", "b")
    store = coordinator._table.store
    real = store.move_slots
    calls = 0

    async def ambiguous(epoch: int, moves: Any) -> dict[str, int]:
        nonlocal calls
        calls += 1
        terms = await real(epoch, moves)
        if calls == 1:
            from carillon.errors import StoreUnavailableError

            raise StoreUnavailableError("connection lost in commit")
        return terms

    store.move_slots = ambiguous  # type: ignore[method-assign]
    third = bench.member("shard", "c")
    await third.join(coordinator)
    await eventually(lambda: calls and third.slots in (341, 342), what="the new map")
    stored = await store.load()
    for member in (first, second, third):
        await eventually(lambda m=member: m.map.version == coordinator.map.version)
        assert member.term == stored.shards[member.name].term
    names = [shard.name for shard in third.map.shards]
    assert [names[at] for at in third.map.owners] == stored.owners


async def test_counters_go_on_over_a_restart(bench: Bench) -> None:
    """Totals of a name never go back; its present process adds to those before it."""
    coordinator = await bench.coordinator()
    (shard,) = await bench.shards(coordinator, "a")

    async def total() -> float:
        assert shard.link is not None
        reply = await shard.link.request(StatsQuery())
        assert reply.slots == {"a": SLOTS}
        return reply.members[0].counters.get("events_accepted", 0)

    shard.counters["events_accepted"] = 5
    await eventually(lambda: _equals(total, 5))
    shard.die()
    shard.counters["events_accepted"] = 2
    await shard.join(coordinator, "a-2")
    await eventually(lambda: _equals(total, 7))


async def _equals(read: Callable[[], Awaitable[float]], value: float) -> bool:
    return await read() == value


class FakeNodes:
    """Ray's part: nodes that come and go, and a record of what was asked."""

    def __init__(self, *nodes: str) -> None:
        self.live = list(nodes)
        self.dead: set[str] = set()
        self.asked: list[ActorSpec] = []
        self.removed: list[str] = []
        self.prepared: list[str] = []

    async def alive(self) -> tuple[list[NodeInfo], set[str]]:
        return [NodeInfo(node, "127.0.0.1", node == "head") for node in self.live], set(self.dead)

    async def ensure(self, spec: ActorSpec) -> None:
        self.asked.append(spec)

    async def remove(self, name: str) -> None:
        self.removed.append(name)

    async def prepare(self, node: str) -> None:
        self.prepared.append(node)


async def test_each_node_gets_its_actors_and_a_dead_one_loses_them(bench: Bench) -> None:
    """A new node's actors are started; Ray's word that a node is dead moves its slots without a lease."""
    nodes = FakeNodes("head")
    bench.settings = bench.settings.with_values(cluster={"lease_timeout_s": 60.0, "shards_per_node": 1})
    coordinator = await bench.coordinator(spawn=True, nodes=nodes)
    await eventually(lambda: {(s.node, s.kind) for s in nodes.asked} == {("head", k) for k in KINDS})
    nodes.live.append("second")
    await eventually(lambda: len({(s.node, s.kind) for s in nodes.asked}) == 6)
    shard_head = bench.member("shard", "shard-head-0", "head")
    shard_second = bench.member("shard", "shard-second-0", "second")
    await shard_head.join(coordinator)
    await shard_second.join(coordinator)
    await eventually(lambda: shard_second.slots == SLOTS // 2)
    nodes.live.remove("second")
    nodes.dead.add("second")
    await eventually(lambda: slots(shard_head.map) == {"shard-head-0": SLOTS})
    await eventually(lambda: "shard-second-0" in nodes.removed)


KINDS = ("shard", "router", "gateway")


async def test_a_drained_node_gives_its_slots_away_and_is_left(bench: Bench) -> None:
    """Its slots are elsewhere when the answer comes, nothing is started there, and a successor knows it."""
    nodes = FakeNodes("head")
    nodes.live.append("second")
    bench.settings = bench.settings.with_values(cluster={"shards_per_node": 1})
    coordinator = await bench.coordinator(spawn=True, nodes=nodes)
    head, second = (
        bench.member("shard", "shard-head-0", "head"),
        bench.member("shard", "shard-second-0", "second"),
    )
    for member in (head, second):
        await member.join(coordinator)
    await eventually(lambda: second.slots == SLOTS // 2)
    answer = await coordinator.drain_node("sec")
    assert answer["node"] == "second"
    assert answer["slots"] == SLOTS // 2
    assert answer["members"] == [{"kind": "shard", "name": "shard-second-0"}]
    await eventually(lambda: slots(head.map) == {"shard-head-0": SLOTS})
    assert (await coordinator.drain_node("second"))["slots"] == 0, "again is no error and changes nothing"
    status = await coordinator.status()
    assert [node["draining"] for node in status["nodes"]] == [False, True]
    assert not [name for name in status["wanted"] if "second" in name]
    second.die()
    asked = len(nodes.asked)
    successor = await bench.coordinator(spawn=True, nodes=nodes)
    await head.join(successor)
    await second.join(successor, "another")
    await stays(lambda: slots(head.map) == {"shard-head-0": SLOTS}, 0.3, "slots went back")
    assert not [spec for spec in nodes.asked[asked:] if spec.node == "second"]
    assert await successor.undrain_node("second") == "second"
    await eventually(lambda: [spec for spec in nodes.asked[asked:] if spec.node == "second"])


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("third", "no live node 'third'; nodes: head, second"),
        ("", "no live node"),
        ("head", "is the head"),
        ("second", "no shard of another node"),
    ],
)
async def test_a_node_that_cannot_be_drained_is_a_sentence(bench: Bench, wanted: str, words: str) -> None:
    """Unknown, the head, or nobody to take over: nothing moves, and the sentence says why."""
    nodes = FakeNodes("head")
    nodes.live.append("second")
    coordinator = await bench.coordinator(spawn=True, nodes=nodes)
    shard = bench.member("shard", "shard-second-0", "second")
    await shard.join(coordinator)
    with pytest.raises(ClusterError, match=words):
        await coordinator.drain_node(wanted)
    await stays(lambda: shard.slots == SLOTS, 0.2, "slots moved")
    status = await coordinator.status()
    assert not [node for node in status["nodes"] if node["draining"]]


async def test_an_actor_that_does_not_join_is_looked_at_again(bench: Bench) -> None:
    """Starting is asked for once per retry interval, until it has joined."""
    nodes = FakeNodes("head")
    bench.settings = bench.settings.with_values(cluster={"shards_per_node": 1})
    coordinator = await bench.coordinator(spawn=True, nodes=nodes)
    router = bench.member("router", "router-head", "head")
    await router.join(coordinator)
    asked_router = sum(s.kind == "router" for s in nodes.asked)
    await eventually(lambda: sum(s.kind == "shard" for s in nodes.asked) >= 2)
    assert sum(s.kind == "router" for s in nodes.asked) == asked_router
    status = await coordinator.status()
    assert sorted(status["missing"]) == ["gateway-head-0", "shard-head-0"]


async def test_members_of_an_earlier_run_are_not_waited_for(bench: Bench) -> None:
    """Nodes that Ray does not know belong to a cluster that is gone: their slots are free at once."""
    old = await bench.coordinator(spawn=True, nodes=FakeNodes("head"))
    shard = bench.member("shard", "shard-head-0", "head")
    await shard.join(old)
    await saved(old, "shard-head-0")
    shard.die()
    await old.stop()
    new = await bench.coordinator(spawn=True, nodes=FakeNodes("other"))
    assert new.map.shards == []
    other = bench.member("shard", "shard-other-0", "other")
    assert slots(await other.join(new)) == {"shard-other-0": SLOTS}
