"""`python -m cluster archive ...`, as a person runs it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from carillon.clock import SystemClock
from carillon.retention import month_at
from cluster.cli import main
from cluster.ray_env import ROOT
from tests.integration.archive_world import ArchiveWorld
from tests.support import eventually

OLD = month_at(SystemClock().now_ms()).plus(-5)


class Person:
    """Types commands, reads what they print."""

    def __init__(self, world: ArchiveWorld, capsys: pytest.CaptureFixture[str]) -> None:
        self._environ = {
            "CARILLON_POSTGRES_DSN": world.dsn,
            "CARILLON_ARCHIVE_ROOT": str(world.root),
            "CARILLON_ARCHIVE_PAUSE_S": "0",
        }
        self._capsys = capsys

    async def types(self, *words: str) -> tuple[int, str, str]:
        """(exit status, stdout, stderr)."""
        status = await asyncio.to_thread(main, ["archive", *words], self._environ)
        told = self._capsys.readouterr()
        return status, told.out, told.err


@pytest.fixture
async def world(postgres_dsn: str, tmp_path: Path) -> AsyncIterator[ArchiveWorld]:
    made = ArchiveWorld(postgres_dsn, tmp_path)
    await made.open()
    await made.tenant("acme")
    await made.month_partition(OLD)
    await made.add("acme", "ada", OLD, 2, title="Train to Graz")
    await made.add("acme", "bob", OLD, 1, type="chat", title="Hi")
    yield made
    await made.close()


async def test_from_run_to_restore(world: ArchiveWorld, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run, a run, and every look at what it left; then back again."""
    person = Person(world, capsys)
    status, out, _ = await person.types("run", "--dry-run")
    assert (status, out.splitlines()[0]) == (0, f"acme  {OLD}  3 notifications")
    assert "3 notifications would be archived" in out
    assert len(await world.stored()) == 3
    status, out, err = await person.types("run")
    name = f"notifications_{OLD.year:04d}_{OLD.month:02d}"
    assert (status, out) == (0, f"3 notifications archived, partitions written anew or dropped: {name}\n")
    assert f"acme {OLD}: 3 notifications archived" in err
    assert await person.types("run", "--quiet") == (0, "0 notifications archived\n", "")
    status, out, _ = await person.types("list")
    assert out.startswith(f"acme  {OLD}  3 notifications  1 parts  ")
    (part,) = json.loads((await person.types("list", "--json"))[1])
    assert (part["rows"], part["first_user"], part["last_user"]) == (3, "ada", "bob")
    status, out, _ = await person.types("search", "acme", "--text", "graz", "--limit", "1")
    assert (status, len(out.splitlines())) == (0, 1)
    assert out.endswith("  ada  t  push:sent  Train to Graz\n")
    status, out, _ = await person.types("search", "acme", "--type", "chat", "--json")
    found = json.loads(out)
    assert (found["user"], found["deliveries"][0]["tries"][0]["provider"]) == ("bob", "fcm")
    status, out, err = await person.types("search", "acme", "--user", "zoe")
    assert (status, out, err) == (0, "", "nothing was found\n")
    status, out, _ = await person.types("verify")
    assert (status, out) == (0, "1 parts with 3 notifications: no problems\n")
    status, out, _ = await person.types("restore", "acme", "--user", "ada", "--dry-run")
    assert (status, out) == (0, "2 notifications would be restored; nothing was changed\n")
    status, out, _ = await person.types("restore", "acme", "--user", "ada", "--quiet")
    assert (status, out) == (0, "2 notifications restored; they stay for 30 days at least\n")
    assert len(await world.stored()) == 2
    assert await person.types("erase", "acme", "bob") == (0, "1 archived notifications erased\n", "")
    assert await person.types("list") == (0, "", "nothing is archived\n")
    acts = await world.db.fetch("select action, target from audit order by id")
    assert [tuple(r) for r in acts] == [("archive.restore", "ada"), ("archive.erase", "bob")]


async def test_what_is_wrong_is_said_in_a_sentence(
    world: ArchiveWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 1 for what failed, 2 for what was typed wrong; never a traceback."""
    person = Person(world, capsys)
    for words, sentence, wanted in (
        (["restore", "acme"], "expected --month, --user or both", 2),
        (["list", "--month", "2026-3"], "--month: expected a month like 2026-03, got '2026-3'", 1),
        (["search", "acme", "--since", "yesterday"], "expected --since to be like 2026-03-01", 1),
        (["search", "acme", "--id", "7"], "expected --id to be a UUID, got '7'", 1),
        (["run", "--root", "nowhere://x"], "the archive's root 'nowhere://x' cannot be used", 1),
        (["run", "--dsn", "postgres://127.0.0.1:1/x"], "PostgreSQL does not answer", 1),
        (["run", "--root", "/proc/nothing"], "cannot be written to /proc/nothing", 1),
    ):
        status, _, err = await person.types(*words)
        assert (status, err.startswith("carillon: ")) == (wanted, True), err
        assert sentence in err
    assert len(await world.stored()) == 3
    assert (await person.types("run"))[0] == 0
    (data,) = world.root.rglob("*.zst")
    data.write_bytes(b"")
    status, out, _ = await person.types("verify", "--quiet")
    assert (status, out.splitlines()[-1]) == (1, "1 parts with 3 notifications: 1 problems")
    status, _, err = await person.types("restore", "acme", "--month", str(OLD))
    assert status == 1
    assert "is damaged" in err


async def test_a_run_is_killed_again_and_again(postgres_dsn: str, tmp_path: Path) -> None:
    """SIGKILL after ever more parts: each notification is in Postgres or in the archive, and the last run
    ends."""
    world = ArchiveWorld(postgres_dsn, tmp_path)
    await world.open()
    await world.tenant("acme")
    await world.month_partition(OLD)
    ids: set[Any] = set()
    for user in ("ada", "bob", "eve"):
        ids.update(await world.add("acme", user, OLD, 8, push=None))
    environ = os.environ | {
        "CARILLON_POSTGRES_DSN": postgres_dsn, "CARILLON_ARCHIVE_ROOT": str(world.root),
        "CARILLON_ARCHIVE_BATCH_ROWS": "1", "CARILLON_ARCHIVE_PAUSE_S": "0",
    }  # fmt: skip

    async def begun() -> int:
        return await world.db.fetchval("select count(*) from archive_parts")

    for more in (1, 4, 6):
        before = await begun()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cluster", "archive", "run", "--quiet", env=environ, cwd=ROOT
        )
        try:
            await eventually(lambda at=before + more, one=process: _reached(begun, at, one), 30.0)
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGKILL)
            await process.wait()
        stored, archived = await world.stored(), await world.archived()
        assert not stored & set(archived)
        assert stored | set(archived) == ids
    world.clock = SystemClock()
    report = await world.run()
    assert report.left == []
    assert sorted(await world.archived()) == sorted(ids)
    assert await world.findings() == []
    await world.close()


async def _reached(begun: Any, at: int, process: Any) -> bool:
    return process.returncode is not None or await begun() >= at
