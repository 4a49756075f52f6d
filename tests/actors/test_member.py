"""Membership: joining, maps, leases, and life without a coordinator."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import stat
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from actors.config import ActorConfig
from actors.link import dial
from actors.member import (
    UNIX_PATH_LIMIT,
    Membership,
    RayCoordinatorResolver,
    advertised_host,
    socket_path,
)
from carillon.clock import ManualClock
from carillon.errors import LinkHandshakeError, UnavailableError
from carillon.messages import Address, ClusterMap, Done, StatsQuery
from carillon.metrics import Stats
from tests.actors.fakes import FakeCoordinator, actor_config, fast_settings
from tests.support import eventually


class Recorder:
    def __init__(self) -> None:
        self.messages: list[Any] = []

    def link_opened(self, link: Any) -> None:
        pass

    def link_closed(self, link: Any) -> None:
        pass

    def receive(self, link: Any, message: Any, request: int) -> None:
        self.messages.append(message)
        link.reply_nowait(request, message)

    def read_finished(self, link: Any) -> None:
        pass


@pytest.fixture
async def coordinator() -> AsyncIterator[FakeCoordinator]:
    fake = await FakeCoordinator.start()
    yield fake
    await fake.stop()


@pytest.fixture
async def member(coordinator: FakeCoordinator) -> AsyncIterator[Membership]:
    membership = Membership(actor_config("router", "router-1", coordinator), Recorder(), stats=Stats())
    await membership.start()
    yield membership
    await membership.close()


async def test_start_returns_with_a_map(coordinator: FakeCoordinator, member: Membership):
    """After `start` the member is in the map it holds, under the address it listens on."""
    assert [m.name for m in member.members("router")] == ["router-1"]
    found = member.members("router")[0]
    assert found == member.member
    link = await dial(
        found.address,
        Recorder(),
        coordinator.settings.link,
        "x",
        coordinator.secret,
        member.machine,
        "router-1",
    )
    assert await link.request(Done(3)) == Done(3)
    link.close()


async def test_both_doors_work(coordinator: FakeCoordinator, member: Membership):
    """The member answers on its Unix socket and on TCP."""
    address = member.member.address
    assert stat.S_ISSOCK(os.stat(address.unix_path).st_mode)
    for way in (dataclass_address(address, port=1), dataclass_address(address, unix_path="")):
        link = await dial(way, Recorder(), coordinator.settings.link, "x", coordinator.secret, member.machine)
        assert await link.request(Done(1)) == Done(1)
        link.close()


def dataclass_address(address: Address, **changes: Any) -> Address:
    fields = {
        "host": address.host,
        "port": address.port,
        "unix_path": address.unix_path,
        "machine": address.machine,
    }
    return Address(**{**fields, **changes})


async def test_maps_are_taken_in_order_of_version(coordinator: FakeCoordinator, member: Membership):
    """A pushed map replaces an older one, callbacks hear of each; an older one is ignored."""
    seen: list[int] = []
    member.on_map(lambda new: seen.append(new.version))
    first = member.map.version
    assert seen == [first], "called at once with the map that is there"
    coordinator.publish_map()
    coordinator.publish_map()
    await eventually(lambda: member.map.version == first + 2)
    member.map_pushed(ClusterMap(first, [], [], []))
    assert seen == [first, first + 1, first + 2]


async def test_a_callback_that_fails_harms_nobody(coordinator: FakeCoordinator, member: Membership):
    """The other callbacks still get the map."""
    seen: list[int] = []

    def broken(new: ClusterMap) -> None:
        raise RuntimeError("broken")

    member.on_map(broken)
    member.on_map(lambda new: seen.append(new.version))
    coordinator.publish_map()
    await eventually(lambda: len(seen) == 2)


async def test_renewals_carry_statistics(coordinator: FakeCoordinator, member: Membership):
    """What the member counts is at the coordinator within a renewal."""
    member.stats.count("events_accepted", 3)
    await eventually(lambda: "router-1" in coordinator.renewals)
    await eventually(lambda: coordinator.renewals["router-1"].counters.get("events_accepted") == 3)
    assert coordinator.renewals["router-1"].incarnation == member.incarnation
    reply = await member.ask_coordinator(StatsQuery())
    assert reply.members[0].counters == {"events_accepted": 3}


async def test_life_without_a_coordinator(coordinator: FakeCoordinator, member: Membership):
    """The member keeps its map while the coordinator is away, loses its lease, and joins again by itself."""
    before = member.map
    await eventually(lambda: member.lease_valid())
    await coordinator.stop()
    await eventually(lambda: member.coordinator_link() is None)
    with pytest.raises(UnavailableError):
        await member.ask_coordinator(StatsQuery())
    await eventually(lambda: not member.lease_valid())
    assert member.map is before
    await coordinator.listen(coordinator.address.port)
    await eventually(lambda: member.lease_valid())
    assert len(coordinator.joins) == 2
    assert coordinator.joins[0] == coordinator.joins[1], "the same process joins with the same incarnation"


async def test_lease_by_the_clock(coordinator: FakeCoordinator):
    """A process that stood still knows that its lease is over before it does anything else."""
    clock = ManualClock()
    settings = fast_settings(cluster={"lease_renew_s": 10.0, "lease_timeout_s": 30.0})
    config = actor_config("shard", "shard-a", coordinator, settings=settings)
    membership = Membership(config, Recorder(), stats=Stats(), clock=clock)
    assert not membership.lease_valid(), "no lease before joining"
    await membership.start()
    clock.advance(29.9)
    assert membership.lease_valid()
    clock.advance(0.2)
    assert not membership.lease_valid()
    await membership.close()


async def test_a_coordinator_with_an_older_table_is_believed(
    coordinator: FakeCoordinator, member: Membership
):
    """After a restore from a backup the version is lower; the coordinator decides, not our memory."""
    coordinator.version = 1000
    coordinator.publish_map()
    await eventually(lambda: member.map.version == 1001)
    await coordinator.stop()
    coordinator.version = 5
    await coordinator.listen(coordinator.address.port)
    await eventually(lambda: member.map.version == 6)


async def test_start_waits_for_the_coordinator():
    """A member may start before the coordinator: it serves as soon as that is there."""
    coordinator = await FakeCoordinator.start()
    port = coordinator.address.port
    await coordinator.stop()
    membership = Membership(actor_config("router", "router-1", coordinator), Recorder(), stats=Stats())
    starting = asyncio.ensure_future(membership.start())
    done, _ = await asyncio.wait((starting,), timeout=0.1)
    assert not done
    await coordinator.listen(port)
    await asyncio.wait_for(starting, 30)
    await membership.close()
    await coordinator.stop()


async def test_cancelled_start_leaves_nothing(coordinator: FakeCoordinator):
    """Cancelling `start` closes the listener and removes the socket."""
    await coordinator.stop()
    membership = Membership(actor_config("router", "router-2", coordinator), Recorder(), stats=Stats())
    starting = asyncio.ensure_future(membership.start())
    await eventually(lambda: membership.member.address.port)
    path = membership.member.address.unix_path
    assert os.path.exists(path)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not os.path.exists(path)


async def test_leaving(coordinator: FakeCoordinator, member: Membership):
    """`close(leave=True)` tells the coordinator first; the socket file goes."""
    path = member.member.address.unix_path
    await member.close(leave=True)
    assert coordinator.left == ["router-1"]
    assert not os.path.exists(path)


async def test_a_successor_keeps_its_socket(coordinator: FakeCoordinator, member: Membership):
    """When a new process of the same name has taken the path, the old one's end does not remove it."""
    other = Membership(actor_config("router", "router-1", coordinator), Recorder(), stats=Stats())
    await other.start()
    await member.close()
    assert os.path.exists(other.member.address.unix_path)
    await other.close()


async def test_wrong_secret_never_joins(coordinator: FakeCoordinator):
    """An actor of another cluster is refused at the handshake."""
    config = dataclasses.replace(actor_config("router", "r", coordinator), secret=b"of another cluster")
    membership = Membership(config, Recorder(), stats=Stats())
    starting = asyncio.ensure_future(membership.start())
    with pytest.raises(LinkHandshakeError):
        await dial(coordinator.address, Recorder(), coordinator.settings.link, "r", config.secret)
    assert not starting.done()
    starting.cancel()
    await asyncio.wait((starting,))
    assert coordinator.joins == []


def test_socket_paths_are_short_and_private(tmp_path: Path):
    """A deep runtime folder, or a long name, leads to a short path in a folder of ours alone."""
    with tempfile.TemporaryDirectory(prefix="c-") as runtime:
        assert socket_path(runtime, "shard-1") == f"{runtime}/run/shard-1.sock"
        assert stat.S_IMODE(os.stat(f"{runtime}/run").st_mode) == 0o700
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    one, two = socket_path(str(deep), "shard-1"), socket_path(str(deep), "shard-2")
    again, other = socket_path(str(deep), "shard-1"), socket_path(str(deep / "x"), "shard-1")
    assert one == again
    assert len({one, two, other}) == 3
    for path in (one, two, other):
        assert len(os.fsencode(path)) <= UNIX_PATH_LIMIT
        folder = os.stat(os.path.dirname(path))
        assert stat.S_IMODE(folder.st_mode) == 0o700
    os.chmod(os.path.dirname(one), 0o777)
    assert socket_path(str(deep), "shard-1") == "", "a folder that others may write is not used"
    os.rmdir(os.path.dirname(one))
    os.rmdir(os.path.dirname(other))


def test_config_does_not_show_the_secret():
    """A config in a log line or an exception does not give the secret away."""
    config = ActorConfig("router", "r", "local", fast_settings(), b"very secret")
    assert "very secret" not in f"{config!r} {config}"


# -- through Ray ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advertise", "bound", "shown"),
    [
        ("gateway.example.org", "0.0.0.0", "gateway.example.org"),
        ("gateway.example.org", "10.0.0.7", "gateway.example.org"),
        ("", "10.0.0.7", "10.0.0.7"),
        ("", "127.0.0.1", "127.0.0.1"),
        ("", "0.0.0.0", "127.0.0.1"),
        ("", "::", "127.0.0.1"),
    ],
)
def test_what_others_are_told_to_dial(advertise: str, bound: str, shown: str) -> None:
    """The setting wins, then the bound address; "any address" is never told to anybody."""
    cluster = fast_settings(cluster={"advertise_host": advertise}).cluster
    assert advertised_host(cluster, "local", bound) == shown


async def test_address_through_ray(ray_local: str):
    """The coordinator is found by its Ray name, dead handles are looked up anew, a missing one is None."""
    import ray

    class Teller:
        def __init__(self, port: int) -> None:
            self.port = port

        async def link_address(self) -> dict[str, Any]:
            return {"host": "127.0.0.1", "port": self.port}

    remote = ray.remote(num_cpus=0)(Teller)
    resolve = RayCoordinatorResolver(ray_local, 10.0)
    assert await resolve() is None
    first = remote.options(name="coordinator", namespace=ray_local).remote(1111)
    assert await resolve() == Address("127.0.0.1", 1111)
    ray.kill(first)
    second: list[Any] = []

    def restart() -> bool:
        try:
            second.append(remote.options(name="coordinator", namespace=ray_local).remote(2222))
        except ValueError:  # the name is free a moment after the death
            return False
        return True

    await eventually(restart)
    await eventually(lambda: resolved(resolve, 2222), 20)
    ray.kill(second[0])


async def resolved(resolve: RayCoordinatorResolver, port: int) -> bool:
    address = await resolve()
    return address is not None and address.port == port
