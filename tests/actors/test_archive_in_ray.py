"""The archive's daily job where it lives: in the coordinator's actor, under Ray, on the system's clock."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from actors.config import ActorConfig
from actors.names import COORDINATOR
from actors.ray_shell import head_node, spawn_actor, undeploy
from carillon.clock import SystemClock
from carillon.retention import DAY_MS, Month, month_at
from tests.actors.plain_members import LonelyCoordinatorActor
from tests.integration.archive_world import ArchiveWorld
from tests.support import eventually

CHANGE = 0x4341_5252
"""The advisory lock of one step of the archive (stores/postgres/archive.py)."""
SECRET = b"cluster secret of this test"


@pytest.fixture
async def world(ray_local: str, postgres_dsn: str, tmp_path: Path) -> AsyncIterator[ArchiveWorld]:
    hour = (SystemClock().now_ms() // 3_600_000 + 12) % 24  # not while the test runs, wherever it is run
    made = ArchiveWorld(
        postgres_dsn, tmp_path, batch_rows=10, poll_s=0.05, pause_s=0.1, run_at=f"{hour:02d}:00"
    )
    made.clock = SystemClock()
    made.settings = made.settings.with_values(
        cluster={"namespace": f"archive-{uuid.uuid4().hex[:8]}", "runtime_dir": str(tmp_path)}
    )
    await made.open()
    await made.tenant("acme")
    yield made
    await asyncio.to_thread(undeploy, made.settings.cluster.namespace, timeout_s=60)
    await made.close()


def coordinator(world: ArchiveWorld) -> Any:
    config = ActorConfig("coordinator", COORDINATOR, head_node(), world.settings, SECRET)
    return spawn_actor(config, shell=LonelyCoordinatorActor)


async def ran(world: ArchiveWorld, **told: Any) -> None:
    """Note a run, as the job does."""
    await world.db.execute(
        "insert into cluster_state (key, value) values ('archive', $1::jsonb)"
        " on conflict (key) do update set value = excluded.value",
        json.dumps(told),
    )


async def last(world: ArchiveWorld) -> dict[str, Any]:
    text = await world.db.fetchval("select value::text from cluster_state where key = 'archive'")
    return {} if text is None else json.loads(text)


@pytest.mark.timeout(300)
async def test_the_coordinator_runs_it_daily(world: ArchiveWorld) -> None:
    """A run that is due is made and noted once; a user who is erased leaves the files soon after; and a run
    in the middle of which the coordinator is killed is finished by the one that Ray starts in its place."""
    now_ms = world.clock.now_ms()
    old = month_at(now_ms - 200 * DAY_MS)
    young = month_at(now_ms)
    mine = await world.add("acme", "ada", old, 15)
    bobs = await world.add("acme", "bob", old, 15)
    kept = await world.add("acme", "ada", young, 1)
    yesterday_ms = now_ms - 2 * DAY_MS
    await ran(world, beganMs=yesterday_ms, endedMs=yesterday_ms)
    handle = coordinator(world)

    async def ended() -> bool:
        told = await last(world)
        return told.get("endedMs", yesterday_ms) != yesterday_ms and "archived" in told

    await eventually(ended, timeout_s=120, what="the daily run")
    assert (await last(world))["archived"] == 30
    assert await world.stored() == set(kept)
    assert sorted(await world.archived()) == sorted([*mine, *bobs])
    first = await last(world)

    await world.db.execute("insert into archive_erasures (tenant, user_id) values ('acme', 'ada')")

    async def erased() -> bool:
        return not await world.db.fetchval("select count(*) from archive_erasures")

    await eventually(erased, timeout_s=60, what="the erasure")
    assert sorted(await world.archived()) == sorted(bobs)
    assert await world.findings() == []
    assert await last(world) == first, "there was no second run today"

    many: list[uuid.UUID] = []
    pid = await handle.pid.remote()
    while not await _stopped_in_the_middle(world, old, many):
        assert len(many) < 2000, "no run could be stopped in its middle"
    os.kill(pid, signal.SIGKILL)
    await world.db.execute("select pg_advisory_unlock($1)", CHANGE)
    await eventually(_restarted(handle, pid), timeout_s=120, what="another process")

    async def finished() -> bool:
        return (await last(world)).get("endedMs") is not None

    await eventually(finished, timeout_s=120, what="the end of the run")
    assert await world.stored() == set(kept)
    assert sorted(await world.archived()) == sorted([*bobs, *many])
    assert await world.findings() == []


async def _stopped_in_the_middle(world: ArchiveWorld, old: Month, many: list[uuid.UUID]) -> bool:
    """A run with much to do is made due, and stopped by the lock of its steps when some of it is done.

    False if it was through before that.
    """
    many += await world.add("acme", "cleo", old, 200)
    left = len(await world.stored())
    await ran(world, beganMs=world.clock.now_ms())

    async def begun() -> bool:
        return len(await world.stored()) < left

    await eventually(begun, timeout_s=60, what="the first step of the run")
    await world.db.execute("select pg_advisory_lock($1)", CHANGE)
    if (await last(world)).get("endedMs") is None and len(await world.stored()) > 1:
        return True
    await world.db.execute("select pg_advisory_unlock($1)", CHANGE)
    return False


def _restarted(handle: Any, pid: int) -> Any:
    async def check() -> bool:
        from ray import exceptions

        try:
            return await handle.pid.remote() != pid
        except exceptions.RayError:
            return False

    return check
