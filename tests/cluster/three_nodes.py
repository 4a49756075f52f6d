"""Three Ray nodes on one machine, real actors, a load, a node that joins and a node that is lost.

Run in a process of its own (`python -m tests.cluster.three_nodes DSN FOLDER kill|stop|drain`): the test
session may be connected to another Ray. Prints one JSON line: what was measured and what was acknowledged.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from actors.link import Link, dial
from actors.names import COORDINATOR, gateway_name, router_name, shard_name
from actors.ray_shell import deploy, find_actor, undeploy
from carillon.clock import SystemClock, rfc3339
from carillon.errors import CarillonError
from carillon.ids import Uuid7Source, slot_of, uuid_text
from carillon.messages import Address, Event, Publish
from carillon.notification import encode_content
from carillon.settings import Settings
from cluster.maintenance import drain_node
from cluster.operator import RayControl

SECRET = b"cluster secret of this test"
TENANT = "acme"
USERS = [f"user-{index}" for index in range(60)]
NODE_ARGS: dict[str, Any] = {"num_cpus": 4, "object_store_memory": 80_000_000}
GIVE_UP_S = 120.0


class Load:
    """Publishers that retry as an ingress does: the same id, marked, until an answer is certain."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ids = Uuid7Source()
        self._clock = SystemClock()
        self._links: dict[str, Link] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self.acknowledged: dict[str, tuple[str, int]] = {}
        self.unanswered: list[str] = []
        self.retries: collections.Counter[str] = collections.Counter()
        self.slowest_s = 0.0

    def link_opened(self, link: Link) -> None: ...

    def link_closed(self, link: Link) -> None: ...

    def receive(self, link: Link, message: Any, request: int) -> None: ...

    def read_finished(self, link: Link) -> None: ...

    async def connect(self, routers: dict[str, Address]) -> None:
        """Have a link to each router that can be reached."""
        for name, address in routers.items():
            known = self._links.get(name)
            if known is None or known.closed:
                with contextlib.suppress(CarillonError):
                    self._links[name] = await dial(address, self, self._settings.link, "ingress-test", SECRET)

    def start(self, publishers: int) -> None:
        self._tasks = [asyncio.ensure_future(self._publish(number)) for number in range(publishers)]

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)
        for link in self._links.values():
            link.close()

    def _event(self) -> Event:
        user = random.choice(USERS)
        now_ms = self._clock.now_ms()
        content = encode_content({"type": "test", "title": "Hello", "createdAt": rfc3339(now_ms)})
        return Event(
            self._ids.next(now_ms), TENANT, user, slot_of(TENANT, user), "test", None, 1, content, now_ms
        )

    async def _publish(self, number: int) -> None:
        while not self._stopping:
            began = time.monotonic()
            left = [self._event() for _ in range(5)]
            while left and time.monotonic() - began < GIVE_UP_S:
                left = await self._try(left)
                if left:
                    await asyncio.sleep(random.uniform(0.02, 0.2))
            self.unanswered += [uuid_text(event.id) for event in left]
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            await asyncio.sleep(0.05)

    async def _try(self, events: list[Event]) -> list[Event]:
        """Publish; returns those to try again."""
        links = [link for link in self._links.values() if not link.closed]
        if not links:
            return events
        try:
            reply = await random.choice(links).request(Publish(events), 12.0)
        except CarillonError as exc:
            self.retries[exc.code] += len(events)
            for event in events:
                event.retry = True
            return events
        again: list[Event] = []
        for event, outcome in zip(events, reply.outcomes, strict=True):
            if outcome.status in ("failed", "moved"):
                self.retries[outcome.code or outcome.status] += 1
                event.retry = True
                again.append(event)
            else:
                assert outcome.id == event.id, (outcome, event)
                self.acknowledged[uuid_text(event.id)] = (event.user, outcome.seq)
        return again


class Watch:
    """The coordinator's status, again and again; keeps the load connected to all routers."""

    def __init__(self, settings: Settings, load: Load) -> None:
        self._handle = find_actor(COORDINATOR, settings.cluster.namespace)
        self._load = load
        self.status: dict[str, Any] = {}

    async def refresh(self) -> dict[str, Any]:
        assert self._handle is not None
        self.status = await self._handle.status.remote()
        routers: dict[str, Address] = {}
        for member in self.status["members"]:
            if member["kind"] == "router" and member["joined"]:
                host, _, port = member["address"].rpartition(":")
                routers[f"{member['name']}/{member['incarnation']}"] = Address(host, int(port))
        await self._load.connect(routers)
        return self.status

    async def until(self, check: Any, what: str, timeout_s: float = 180.0) -> float:
        """Seconds until `check(status)` holds."""
        began = time.monotonic()
        while not check(await self.refresh()):
            if time.monotonic() - began > timeout_s:
                raise AssertionError(f"not within {timeout_s} s: {what}; {json.dumps(self.status)[:3000]}")
            await asyncio.sleep(0.05)
        return time.monotonic() - began


def slots_of(status: dict[str, Any], node: str) -> int:
    return sum(m["slots"] for m in status["members"] if m["kind"] == "shard" and m["node"] == node)


def is_balanced(status: dict[str, Any], shards: int) -> bool:
    held = [m["slots"] for m in status["members"] if m["kind"] == "shard" and m["joined"]]
    return len(held) == shards and sum(held) == 1024 and max(held) - min(held) <= 1


def raylet_family(node: Any) -> list[int]:
    """The raylet of a node and every process under it."""
    raylet = node.all_processes["raylet"][0].process.pid
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    family, todo = [], [raylet]
    while todo:
        pid = todo.pop()
        family.append(pid)
        todo += children.get(pid, [])
    return family


def send_signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


async def run(cluster: Cluster, settings: Settings, fault: str) -> dict[str, Any]:
    """The story."""
    report: dict[str, Any] = {}
    per_node = settings.cluster.shards_per_node
    second = cluster.add_node(**NODE_ARGS)
    began = time.monotonic()
    await asyncio.to_thread(
        deploy, settings, SECRET, timeout_s=240, progress=lambda s: print(s, file=sys.stderr)
    )
    report["deploy_s"] = time.monotonic() - began
    load = Load(settings)
    watch = Watch(settings, load)
    await watch.until(lambda s: is_balanced(s, 2 * per_node), "two nodes share the slots")
    load.start(8)
    while len(load.acknowledged) < 200:
        await asyncio.sleep(0.05)

    # A node joins.
    third = await asyncio.to_thread(cluster.add_node, **NODE_ARGS)
    report["join_s"] = await watch.until(
        lambda s: is_balanced(s, 3 * per_node), "three nodes share the slots"
    )
    before_loss = len(load.acknowledged)
    await asyncio.sleep(2)

    if fault == "drain":
        await drain_a_node(watch, load, settings, second.node_id, report)
        report["acknowledged"] = {key: list(value) for key, value in load.acknowledged.items()}
        return report

    # A node is lost: killed, or stopped as a whole (no link is closed, and Ray notices much later).
    lost = second.node_id
    family = raylet_family(second)
    killed_at = time.monotonic()
    send_signal(family, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    report["processes"] = len(family)

    def is_noticed(status: dict[str, Any]) -> bool:
        return lost not in {info["node"] for info in status["nodes"]} or slots_of(status, lost) == 0

    await watch.until(is_noticed, "the loss is noticed")
    report["noticed_s"] = time.monotonic() - killed_at
    await watch.until(
        lambda s: is_balanced(s, 2 * per_node) and slots_of(s, lost) == 0, "the slots have moved"
    )
    report["moved_s"] = time.monotonic() - killed_at
    report["moves"] = watch.status["moves"]
    acknowledged = len(load.acknowledged)
    while len(load.acknowledged) < acknowledged + 200:
        await asyncio.sleep(0.05)
    if fault == "kill":
        # Once Ray knows too, the lost node's actors are ended for good: they would wait for it for ever.
        await watch.until(lambda s: lost not in {info["node"] for info in s["nodes"]}, "Ray notices")
        report["ray_noticed_s"] = time.monotonic() - killed_at
        namespace = settings.cluster.namespace
        names = [shard_name(lost, 0), router_name(lost), gateway_name(lost)]
        await watch.until(lambda _: not any(find_actor(n, namespace) for n in names), "its actors are ended")
    else:
        # It wakes up: its shards find their terms over, join again and get a share.
        send_signal(family, signal.SIGCONT)
        report["back_s"] = await watch.until(lambda s: is_balanced(s, 3 * per_node), "the node is back")
        await asyncio.sleep(2)
    await load.stop()
    await watch.refresh()
    report["third_slots"] = slots_of(watch.status, third.node_id)
    report["acknowledged_before_loss"] = before_loss
    report["acknowledged"] = {key: list(value) for key, value in load.acknowledged.items()}
    report["unanswered"] = load.unanswered
    report["retries"] = dict(load.retries)
    report["slowest_s"] = load.slowest_s
    if fault == "kill":
        cluster.remove_node(second, allow_graceful=False)  # what is left of its bookkeeping
    return report


async def drain_a_node(
    watch: Watch, load: Load, settings: Settings, node: str, report: dict[str, Any]
) -> None:
    """Leave the node as `python -m cluster drain` does, twice, and use it again."""
    namespace = settings.cluster.namespace
    control = RayControl(namespace)
    said: list[str] = []
    names = control.actors_of(node)
    report["before"] = names
    load.slowest_s = 0.0
    began = time.monotonic()
    await asyncio.to_thread(drain_node, control, node[:8], 120.0, said.append)
    report["drain_s"] = time.monotonic() - began
    await watch.until(lambda s: is_balanced(s, 2 * settings.cluster.shards_per_node), "the slots have moved")
    report["slots_left"] = slots_of(watch.status, node)
    acknowledged = len(load.acknowledged)
    while len(load.acknowledged) < acknowledged + 200:
        await asyncio.sleep(0.05)
    await asyncio.to_thread(drain_node, control, node[:8], 120.0, said.append)
    await asyncio.sleep(2 * settings.cluster.node_poll_s)  # the coordinator looks, and starts nothing there
    report["after"] = control.actors_of(node)
    report["missing"] = (await watch.refresh())["missing"]
    report["slowest_during_drain_s"] = load.slowest_s
    report["said"] = said
    control.return_to_node(node)
    per_node = settings.cluster.shards_per_node
    report["undone_s"] = await watch.until(lambda s: is_balanced(s, 3 * per_node), "the node is used again")
    await load.stop()
    report["unanswered"] = load.unanswered
    report["retries"] = dict(load.retries)


def main() -> None:
    """Bring up, run, take down."""
    dsn, folder, fault = sys.argv[1:4]
    settings = Settings().with_values(
        postgres={"dsn": dsn},
        cluster={"runtime_dir": folder, "namespace": "three-nodes"},
        gateway={"port": 0},  # three of them on one machine
    )
    cluster = Cluster(
        initialize_head=True,
        connect=False,
        head_node_args={**NODE_ARGS, "include_dashboard": False},
        shutdown_at_exit=False,  # its signal handler would need nodes to be added in the main thread
    )
    try:
        ray.init(address=cluster.address, namespace="three-nodes", log_to_driver=False)
        report = asyncio.run(run(cluster, settings, fault))
        began = time.monotonic()
        steps: list[str] = []
        undeploy(
            "three-nodes",
            timeout_s=60,
            progress=lambda step: steps.append(f"{time.monotonic() - began:.1f} {step}"),
        )
        report["undeploy"] = [*steps, f"{time.monotonic() - began:.1f} done"]
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
