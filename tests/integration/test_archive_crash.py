"""The archive's process ends between any two steps, or while everybody goes on: nothing is lost, nothing is
twice."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from carillon.settings import PostgresSettings
from stores.archiver import Archiver
from stores.postgres.feed import FeedReader
from stores.postgres.pool import open_pool
from tests.integration.archive_world import APRIL, FEBRUARY, MARCH, NOW, ArchiveWorld

Act = Callable[[Archiver], Awaitable[Any]]


class End(BaseException):
    """The process ends."""


async def cut_off(world: ArchiveWorld, act: Act, after: int) -> bool:
    """Carry out `act` and end its process after so many steps; False if it was done before that."""
    archiver = await world.archiver()
    left = after

    def count(_: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise End

    async def step(name: str) -> None:
        try:
            count(name)
        except End:
            archiver.store.terminate()  # whatever follows on the way out reaches nothing
            raise

    archiver.step = step
    archiver.files.step = count
    try:
        await act(archiver)
        return False
    except BaseException:
        if left >= 0:
            raise
        return True
    finally:
        archiver.store.terminate()
        await gone(world)


async def gone(world: ArchiveWorld) -> None:
    """Wait until Postgres has noticed that the archive's connection is over: its locks end then."""
    while await world.db.fetchval(
        "select count(*) from pg_stat_activity where application_name = 'carillon-archive'"
        " and datname = current_database()"
    ):
        await asyncio.sleep(0.002)


async def exactly_once(world: ArchiveWorld, all_ids: set[uuid.UUID]) -> set[uuid.UUID]:
    """Every notification is in Postgres or in the archive, and in one of them only. Returns the archived
    ones."""
    stored, archived = await world.stored(), await world.archived()
    assert len(archived) == len(set(archived)), "twice in the archive"
    assert not stored & set(archived), "in Postgres and in the archive"
    assert stored | set(archived) == all_ids, "lost"
    return set(archived)


@pytest.fixture
async def seeded(
    postgres_dsn: str, tmp_path: Path
) -> AsyncIterator[tuple[ArchiveWorld, set[uuid.UUID], set[uuid.UUID]]]:
    """A world with (all ids, those that are due)."""
    world = ArchiveWorld(postgres_dsn, tmp_path, batch_rows=3)
    await world.open()
    await world.tenant("acme")
    for month in (FEBRUARY, MARCH):
        await world.month_partition(month)
    due = {
        *await world.add("acme", "ada", FEBRUARY, 4, exposed=True),
        *await world.add("acme", "bob", FEBRUARY, 1),
    }
    kept = await world.add("acme", "ada", FEBRUARY, 1, read=False)
    kept += await world.add("acme", "bob", MARCH, 1)
    yield world, {*due, *kept}, due
    await world.close()


async def test_a_run_may_end_anywhere(seeded: Any) -> None:
    """After every single step of a run its process ends: each notification is in Postgres or in the archive,
    also before the next run, and the next run does what is left. What a run had done is put back for the
    next try."""
    world, everything, due = seeded
    before = await world.content()
    cuts = 0
    while await cut_off(world, lambda archiver: archiver.run(), cuts):
        await exactly_once(world, everything)
        report = await world.run()
        assert report.left == []
        assert await exactly_once(world, everything) == due
        assert await world.findings() == []
        restorer = await world.archiver()
        await restorer.restore("acme", FEBRUARY)
        await restorer.close()
        assert await world.content() == before
        await world.db.execute("delete from archive_passes")
        cuts += 1
    assert cuts > 20


async def test_restore_and_erasure_may_end_anywhere(seeded: Any) -> None:
    """The same for a restore of a user out of a part of several, and for an erasure of the other."""
    world, everything, _ = seeded
    await world.run("acme")
    cuts = 0
    while await cut_off(world, lambda archiver: archiver.restore("acme", FEBRUARY, "ada"), cuts):
        await exactly_once(world, everything)
        restorer = await world.archiver()
        await restorer.restore("acme", FEBRUARY, "ada")
        await restorer.close()
        assert len(await exactly_once(world, everything)) == 1
        assert await world.findings() == []
        await world.db.execute("delete from archive_passes")
        assert (await world.run("acme")).archived == 4
        cuts += 1
    assert cuts > 10
    await world.db.execute("delete from archive_passes")
    await world.run("acme")
    rows = await world.archived(user="ada")
    cuts = 0
    while await cut_off(world, lambda archiver: archiver.erase_user("acme", "bob"), cuts):
        await world.run("acme")
        assert await world.archived() == rows
        assert await world.findings() == []
        assert not await world.db.fetch("select from archive_erasures")
        # Once erased it cannot be archived again: another of his takes its place.
        made = await world.add("acme", "bob", FEBRUARY, 1)
        await world.db.execute("delete from archive_passes")
        await world.run("acme")
        assert sorted(await world.archived(user="bob")) == made
        cuts += 1
    assert cuts > 5


async def test_everybody_goes_on_meanwhile(postgres_dsn: str, tmp_path: Path) -> None:
    """While months are archived and their partitions exchanged: users append, read, and change old
    notifications. Nothing fails, nothing is lost, what changed meanwhile is archived as it is then or
    stays."""
    world = ArchiveWorld(postgres_dsn, tmp_path, batch_rows=20, lock_wait_s=10.0)
    await world.open()
    await world.tenant("acme")
    for month in (FEBRUARY, MARCH):
        await world.month_partition(month)
    users = [f"u{n}" for n in range(6)]
    everything: set[uuid.UUID] = set()
    touched: list[uuid.UUID] = []
    for user in users:
        for month in (FEBRUARY, MARCH):
            everything.update(await world.add("acme", user, month, 12, push=None))
            touched += await world.add("acme", user, month, 4, read=False, push=None)
    everything.update(touched)
    world.clock.advance(30 * 86_400)
    done = asyncio.Event()
    pool = await open_pool(PostgresSettings(dsn=postgres_dsn), 4)
    feed = FeedReader(pool)
    counts = {"appended": 0, "read": 0, "changed": 0}

    async def append(user: str) -> None:
        writer = ArchiveWorld(postgres_dsn, tmp_path)
        await writer.open()
        writer._counter = 1_000_000 + 10_000 * users.index(user)
        while not done.is_set():
            everything.update(await writer.add("acme", user, APRIL, 1, read=False, push=None))
            counts["appended"] += 1
        await writer.close()

    async def read() -> None:
        while not done.is_set():
            for user in users:
                rows, _ = await feed.page("acme", user, NOW, limit=100)
                assert len(rows) == len({row.seq for row in rows})
                counts["read"] += 1

    async def change() -> None:
        connection = await asyncpg.connect(postgres_dsn)
        for one in touched:  # what was kept is read now, also while it is copied
            await connection.execute(
                "update notifications set read_at = now(), changed = true where id = $1", one
            )
            counts["changed"] += 1
            await asyncio.sleep(0.01)
        await connection.close()

    tasks = [asyncio.create_task(work) for work in (append("u0"), append("u1"), read(), change())]
    try:
        for _ in range(4):
            report = await world.run()
            assert report.left == []
        await tasks[3]
        await world.run()
    finally:
        done.set()
        await asyncio.gather(*tasks)
        await pool.close()
    assert min(counts.values()) > 0
    archived = await exactly_once(world, everything)
    assert set(touched) <= archived
    assert not [name for name in await world.partitions() if "2026_02" in name or "2026_03" in name]
    assert await world.findings() == []
    await world.close()
