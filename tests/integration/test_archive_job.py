"""The archive's daily run, on a clock that the test moves."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from actors.archive_job import ArchiveJob
from carillon.errors import ArchiveError, BusyError
from tests.integration.archive_world import FEBRUARY, ArchiveWorld

HOUR = 3600.0


@pytest.fixture
async def world(postgres_dsn: str, tmp_path: Path) -> AsyncIterator[ArchiveWorld]:
    made = ArchiveWorld(postgres_dsn, tmp_path)
    await made.open()
    await made.tenant("acme")
    await made.add("acme", "ada", FEBRUARY, 2)
    yield made
    await made.close()


async def test_it_runs_once_a_day(world: ArchiveWorld) -> None:
    """From the first time of day after the first look, which is 04:00; catching up when nobody looked at
    03:00."""
    job = ArchiveJob(world.settings, world.clock)
    assert [await job.look(), await job.look()] == [False, False]
    world.clock.advance(22 * HOUR)
    assert not await job.look()
    world.clock.advance(6 * HOUR)
    assert [await job.look(), await job.look()] == [True, False]
    assert len(await world.archived()) == 2
    world.clock.advance(24 * HOUR)
    assert await job.look()


async def test_a_run_that_was_cut_off_is_taken_up(world: ArchiveWorld) -> None:
    """Its beginning is noted, its end is not: the next look does it, whoever looks."""
    job = ArchiveJob(world.settings, world.clock)
    await job.look()
    await world.db.execute(
        "update cluster_state set value = jsonb_set(value, '{endedMs}', 'null') where key = 'archive'"
    )
    assert await ArchiveJob(world.settings, world.clock).look()
    assert len(await world.archived()) == 2
    assert not await job.look()


async def test_it_leaves_a_run_by_hand_alone(world: ArchiveWorld) -> None:
    """While somebody runs it, a look does nothing and notes nothing."""
    job = ArchiveJob(world.settings, world.clock)
    await job.look()
    world.clock.advance(24 * HOUR)
    person = await world.archiver()
    async with person.store.running():
        with pytest.raises(BusyError):
            await job.look()
    await person.close()
    assert await job.look()


async def test_erasures_do_not_wait_for_the_night(world: ArchiveWorld) -> None:
    """They are carried out at the next look."""
    await world.run()
    await world.db.execute("insert into archive_erasures (tenant, user_id) values ('acme', 'ada')")
    assert not await ArchiveJob(world.settings, world.clock).look()
    assert not list(world.root.rglob("part-*"))
    assert await world.findings() == []


async def test_a_root_that_cannot_be_written_costs_nothing(
    world: ArchiveWorld, caplog: pytest.LogCaptureFixture
) -> None:
    """Told once; nothing has left the tables; the next day it is tried again."""
    settings = world.settings.with_values(archive={"root": "/proc/nothing"})
    job = ArchiveJob(settings, world.clock)
    await job.look()
    world.clock.advance(24 * HOUR)
    with pytest.raises(ArchiveError, match="cannot be written to /proc/nothing"):
        await job.look()
    with caplog.at_level(logging.WARNING):
        assert not await job.look(), "not before tomorrow"
    assert len(await world.stored()) == 2
    world.clock.advance(24 * HOUR)
    assert await ArchiveJob(world.settings, world.clock).look()
    assert len(await world.archived()) == 2
    assert await world.findings() == []
