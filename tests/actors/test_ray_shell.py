"""Actors under Ray: they come up by themselves, come back after kill -9, and end when told to."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import exceptions

from actors.config import ActorConfig
from actors.names import COORDINATOR
from actors.ray_shell import ActorShell, actor_names, find_actor, head_node, spawn_actor, undeploy
from carillon.ids import SLOTS
from carillon.settings import Settings
from tests.actors.plain_members import BrokenActor, LonelyCoordinatorActor, PlainActor
from tests.support import eventually

SECRET = b"cluster secret of this test"


class Deployed:
    """A coordinator and members in a namespace of their own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.node = head_node()

    def spawn(self, kind: str, name: str, shell: type[ActorShell]) -> Any:
        return spawn_actor(ActorConfig(kind, name, self.node, self.settings, SECRET), shell=shell)

    async def members(self) -> dict[str, dict[str, Any]]:
        handle = find_actor(COORDINATOR, self.settings.cluster.namespace)
        assert handle is not None
        try:
            status = await handle.status.remote()
        except exceptions.RayError:
            return {}
        return {member["name"]: member for member in status.get("members", [])}

    async def member(self, name: str) -> dict[str, Any]:
        return (await self.members()).get(name, {})


@pytest.fixture
async def deployed(ray_local: str, postgres_dsn: str, tmp_path: Path) -> AsyncIterator[Deployed]:
    settings = Settings().with_values(
        postgres={"dsn": postgres_dsn},
        cluster={
            "namespace": f"shell-{uuid.uuid4().hex[:8]}",
            "runtime_dir": str(tmp_path),
            "lease_renew_s": 0.25,
            "lease_timeout_s": 60.0,  # a busy machine restarts a process in 2-20 s
            "rebalance_delay_s": 0.1,
        },
    )
    made = Deployed(settings)
    made.spawn("coordinator", COORDINATOR, LonelyCoordinatorActor)
    yield made
    await asyncio.to_thread(undeploy, settings.cluster.namespace, timeout_s=60)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


async def test_a_killed_shard_is_back_within_its_lease_with_its_slots(deployed: Deployed) -> None:
    """kill -9: Ray restarts it in place, it joins by itself under a new term, and no slot moves."""
    first = deployed.spawn("shard", "shard-x-0", PlainActor)
    deployed.spawn("shard", "shard-x-1", PlainActor)
    await eventually(lambda: _owns(deployed, "shard-x-1", SLOTS // 2), timeout_s=120)
    before = await deployed.members()
    pid = await first.pid.remote()
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)

    async def is_back() -> bool:
        member = await deployed.member("shard-x-0")
        return member.get("joined", False) and member["incarnation"] != before["shard-x-0"]["incarnation"]

    await eventually(is_back, timeout_s=120, what="the shard is back")
    took_s = time.monotonic() - began
    print(f"\nrestart of a killed shard: {took_s:.2f} s")
    assert took_s < deployed.settings.cluster.lease_timeout_s
    after = await deployed.members()
    assert await first.pid.remote() != pid, "the same handle reaches the new process"
    assert after["shard-x-0"]["term"] == before["shard-x-0"]["term"] + 1
    assert {name: member["slots"] for name, member in after.items()} == {
        "shard-x-0": SLOTS // 2,
        "shard-x-1": SLOTS // 2,
    }
    assert after["shard-x-1"]["term"] == before["shard-x-1"]["term"], "nothing was taken from the other"


async def _owns(deployed: Deployed, name: str, slots: int) -> bool:
    return (await deployed.member(name)).get("slots") == slots


async def test_a_killed_coordinator_is_back_with_the_same_map(deployed: Deployed) -> None:
    """kill -9: a new epoch, the same owners and terms, and members join again by themselves."""
    deployed.spawn("shard", "shard-x-0", PlainActor)
    router = deployed.spawn("router", "router-x", PlainActor)
    await router.ready.remote()
    await eventually(lambda: _owns(deployed, "shard-x-0", SLOTS), timeout_s=120)
    handle = find_actor(COORDINATOR, deployed.settings.cluster.namespace)
    assert handle is not None
    before = await handle.status.remote()
    began = time.monotonic()
    os.kill(before["pid"], signal.SIGKILL)

    async def is_back() -> bool:
        members = await deployed.members()
        return len(members) == 2 and all(member["joined"] for member in members.values())

    await eventually(is_back, timeout_s=120, what="everybody has joined the new coordinator")
    print(f"\nrestart of a killed coordinator, members joined: {time.monotonic() - began:.2f} s")
    after = await handle.status.remote()
    assert after["epoch"] == before["epoch"] + 1
    assert after["moves"] == []
    for old, new in zip(before["members"], after["members"], strict=True):
        assert {k: old[k] for k in ("name", "term", "slots", "incarnation")} == {
            k: new[k] for k in ("name", "term", "slots", "incarnation")
        }


async def test_an_actor_that_cannot_start_is_restarted_and_says_why(deployed: Deployed) -> None:
    """ready() raises what start() raised; the process exits a while later and the next one tries."""
    handle = deployed.spawn("router", "router-broken", BrokenActor)
    with pytest.raises(exceptions.RayTaskError, match="the disk is full"):
        await handle.ready.remote()
    pid = await handle.pid.remote()

    async def is_another() -> bool:
        try:
            return await handle.pid.remote() != pid
        except exceptions.RayError:
            return False

    began = time.monotonic()
    await eventually(is_another, timeout_s=120, what="the next process")
    assert time.monotonic() - began > 1.0, "no tight loop"


async def test_undeploy_ends_every_actor_and_its_process(deployed: Deployed) -> None:
    """Afterwards no actor of the namespace is left, nor is any process; again it finds nothing."""
    handles = [deployed.spawn("router", f"router-{index}", PlainActor) for index in range(2)]
    await asyncio.gather(*[handle.ready.remote() for handle in handles])
    pids = await asyncio.gather(*[handle.pid.remote() for handle in handles])
    namespace = deployed.settings.cluster.namespace
    steps: list[str] = []
    assert await asyncio.to_thread(undeploy, namespace, timeout_s=60, progress=steps.append) == 3
    assert any("router" in step for step in steps)
    assert actor_names(namespace) == []
    await eventually(lambda: not any(is_running(pid) for pid in pids), what="the processes are gone")
    assert await asyncio.to_thread(undeploy, namespace) == 0


def test_no_actor_survives_the_tests_above(ray_local: str) -> None:
    """Every namespace of this module is empty."""
    found: Any = ray.util.list_named_actors(all_namespaces=True)
    assert [actor for actor in found if actor["namespace"].startswith("shell-")] == []
