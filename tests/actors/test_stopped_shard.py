"""A shard's process is stopped beyond its lease and goes on: real processes, PostgreSQL and sockets."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from actors.config import ActorConfig
from actors.coordinator import Coordinator, coordinator_config
from actors.gateway import Gateway
from actors.router import Router
from carillon.ids import SLOTS, slot_of
from carillon.settings import Settings
from cluster.ray_env import ROOT
from tests.actors.fakes import fast_settings
from tests.actors.gateway_kit import SECRET as CLIENT_SECRET
from tests.actors.gateway_kit import read_keys
from tests.cluster.kill_load import DeviceClient
from tests.cluster.three_nodes import SECRET, TENANT, USERS, Load
from tests.support import eventually

LEASE_S = 1.2
SHARDS = ("shard-a", "shard-b")


class Cluster:
    """A coordinator, a router and a gateway in this process, two shards in processes of their own."""

    def __init__(self, settings: Settings, logs: Path) -> None:
        self.settings = settings
        self.logs = logs
        self.coordinator = Coordinator(coordinator_config(settings, SECRET), spawn=False)
        self.shards: dict[str, asyncio.subprocess.Process] = {}

    def config(self, kind: str, name: str) -> ActorConfig:
        """Of an actor that joins the coordinator."""
        address = self.coordinator.link_address()
        return ActorConfig(kind, name, "local", self.settings, SECRET, {}, address)

    async def start(self) -> None:
        await self.coordinator.start()
        for name in SHARDS:
            with (self.logs / name).open("wb") as log:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "tests.actors.plain_shard"),
                    cwd=ROOT,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                )
            self.shards[name] = process
            assert process.stdin is not None
            process.stdin.write(pickle.dumps(self.config("shard", name)))
            process.stdin.close()
        for process in self.shards.values():
            assert process.stdout is not None
            assert await asyncio.wait_for(process.stdout.readline(), 30) == b"ready\n"
        self.router = Router(self.config("router", "router-1"))
        await self.router.start()
        self.gateway = Gateway(self.config("gateway", "gateway-1"), read_keys=read_keys)
        await self.gateway.start()

    async def stop(self) -> None:
        await self.gateway.stop()
        await self.router.stop()
        for process in self.shards.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        await self.coordinator.stop()

    def held(self) -> Counter[str]:
        """Slots by shard."""
        return Counter(owner for owner in self.coordinator._table.owners if owner)


@pytest.fixture
async def cluster(postgres_dsn: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    settings = fast_settings(
        postgres={"dsn": postgres_dsn},
        cluster={
            "lease_renew_s": 0.1,
            "lease_timeout_s": LEASE_S,
            "rebalance_delay_s": 0.1,
            "fence_wait_s": 0.3,
        },
    )
    made = Cluster(settings, tmp_path)
    try:
        await made.start()
        yield made
    finally:
        await made.stop()


def balanced(cluster: Cluster) -> bool:
    return dict(cluster.held()) == dict.fromkeys(SHARDS, SLOTS // 2)


async def more(load: Load, owned: set[int], count: int) -> None:
    """Wait until so many more events for users of these slots were acknowledged."""

    def acknowledged() -> int:
        return sum(slot_of(TENANT, user) in owned for user, _ in load.acknowledged.values())

    wanted = acknowledged() + count
    await eventually(lambda: acknowledged() >= wanted, 20.0, "events of the moved slots are acknowledged")


@pytest.mark.timeout(90)
async def test_a_shard_that_was_stopped_beyond_its_lease_changes_nothing(
    cluster: Cluster, postgres_dsn: str, tmp_path: Path
) -> None:
    """G9: its slots move; what it finds to do when it goes on its term refuses; nothing lost or swapped."""
    await eventually(lambda: balanced(cluster), 20.0, "both shards own slots")
    dev: dict[str, Any] = {"tenant": TENANT, "clientSecret": CLIENT_SECRET, "wsUrl": cluster.gateway.url}
    devices = [DeviceClient(dev, user, f"{user}-device") for user in USERS[:20]]
    running = [asyncio.create_task(device.run()) for device in devices]
    load = Load(cluster.settings)
    try:
        await eventually(lambda: all(device.connected for device in devices), 20.0, "devices are connected")
        await load.connect({"router-1": cluster.router.membership.member.address})
        load.start(16)
        owned = {s for s, owner in enumerate(cluster.coordinator._table.owners) if owner == "shard-a"}
        await more(load, owned, 100)
        cluster.shards["shard-a"].send_signal(signal.SIGSTOP)
        await eventually(lambda: cluster.held() == {"shard-b": SLOTS}, 20.0, "the slots have moved")
        await more(load, owned, 100)
        cluster.shards["shard-a"].send_signal(signal.SIGCONT)
        await eventually(lambda: balanced(cluster), 20.0, "it has joined again, under a new term")
        await more(load, owned, 100)
        await load.stop()
        wanted = Counter(user for user, _ in load.acknowledged.values())
        await eventually(
            lambda: all(len(device.seen) == wanted[device.user] for device in devices),
            what="every device has every acknowledged event",
        )
    finally:
        cluster.shards["shard-a"].send_signal(signal.SIGCONT)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    assert load.unanswered == []
    log = (tmp_path / "shard-a").read_text()
    assert "is over; waiting for the new map" in log, "it had nothing to write: this proves nothing"
    connection = await asyncpg.connect(postgres_dsn)
    try:
        rows = await connection.fetch(
            "select n.id::text, n.seq, s.user_id, s.seq as head"
            " from notifications n join streams s using (stream_id) order by s.user_id, n.seq"
        )
    finally:
        await connection.close()
    stored = {row["id"]: (row["user_id"], row["seq"]) for row in rows}
    assert stored == load.acknowledged, "stored and acknowledged differ"
    for user in USERS:
        seqs = [row["seq"] for row in rows if row["user_id"] == user]
        assert seqs == list(range(1, len(seqs) + 1)), f"{user} has a gap"
    for device in devices:
        assert not device.broken
        (connection_,) = device.connections  # a lost shard costs no socket
        seqs = [seq for _, _, seq in connection_.receipts]
        assert seqs == list(range(1, len(seqs) + 1)), f"{device.name}: lost, repeated or out of order"
