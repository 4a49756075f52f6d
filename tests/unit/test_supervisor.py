"""When the supervisor asks for a spare process."""

from __future__ import annotations

from typing import Any

from actors.names import actor_name
from actors.supervisor import Supervisor
from carillon.clock import ManualClock
from carillon.placement import ActorSpec, NodeInfo
from carillon.settings import Settings


class Ray:
    """Two nodes, and a record of what was asked of them."""

    def __init__(self) -> None:
        self.started: list[ActorSpec] = []
        self.prepared: list[str] = []
        self.live = ["head", "second"]

    async def alive(self) -> tuple[list[NodeInfo], set[str]]:
        return [NodeInfo(node, "127.0.0.1", node == "head") for node in self.live], set()

    async def ensure(self, spec: ActorSpec) -> None:
        self.started.append(spec)

    async def remove(self, name: str) -> None: ...

    async def prepare(self, node: str) -> None:
        self.prepared.append(node)


class World:
    """A supervisor whose actors join when the test says so."""

    def __init__(self, **cluster: Any) -> None:
        self.ray = Ray()
        self.clock = ManualClock()
        self.there: set[str] = set()
        settings = Settings().with_values(
            cluster={"shards_per_node": 1, "spare_process": True, "spare_delay_s": 3.0, **cluster}
        )
        self.supervisor = Supervisor(self.ray, settings, self.clock, self.there.__contains__)

    async def after(self, seconds: float) -> list[str]:
        """The nodes that are prepared when this time has passed."""
        self.clock.advance(seconds)
        self.ray.prepared.clear()
        await self.supervisor.poll()
        await self.supervisor.reconcile()
        return self.ray.prepared

    def join(self, spec: ActorSpec) -> None:
        self.there.add(actor_name(spec))
        self.supervisor.joined(actor_name(spec), spec.node)

    async def complete(self) -> None:
        assert await self.after(0) == []
        for spec in self.ray.started:
            self.join(spec)


async def test_a_node_is_prepared_once_all_its_actors_are_there() -> None:
    """What starts at the same time would be held up by it, or take it."""
    world = World()
    await world.after(0)
    *first, last = [spec for spec in world.ray.started if spec.node == "second"]
    for spec in first:
        world.join(spec)
    assert await world.after(100) == [], "one is missing"
    world.join(last)
    assert await world.after(2.9) == [], "the last has just come"
    assert await world.after(0.2) == ["second"]
    assert await world.after(100) == [], "once is enough"


async def test_a_node_is_prepared_again_when_an_actor_has_come_back() -> None:
    """Its process was the spare one, or there was none."""
    world = World()
    await world.complete()
    assert sorted(await world.after(3.1)) == ["head", "second"]
    world.join(world.ray.started[0])
    assert await world.after(2.9) == []
    assert await world.after(0.2) == [world.ray.started[0].node]


async def test_a_node_that_is_left_is_not_prepared() -> None:
    """Nothing starts there any more."""
    world = World()
    await world.complete()
    world.supervisor.draining = {"second"}
    world.supervisor.want()
    assert await world.after(3.1) == ["head"]
    world.join(world.ray.started[0])
    world.ray.live = ["second"]
    assert await world.after(3.1) == [], "lost"


async def test_no_spare_process_is_kept_where_none_is_wanted() -> None:
    """`cluster.spare_process` off: its memory is worth more."""
    world = World(spare_process=False)
    await world.complete()
    assert await world.after(100) == []
