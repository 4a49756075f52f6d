"""A node joins and a node is killed, or stopped and continued, under load: nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.support import eventually

ROOT = Path(__file__).resolve().parents[2]
MARK = "CLUSTER_TEST_RUN"


def marked(mark: str) -> list[int]:
    """Processes that inherited the mark of this run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets have long names, and a path may have 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="c3-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


async def run_story(dsn: str, folder: Path, fault: str) -> dict[str, Any]:
    """Run tests/cluster/three_nodes.py; its report. Afterwards no process of it is left."""
    mark = uuid.uuid4().hex
    # Its own Ray folder: a `ray.init()` elsewhere on the machine must not find this cluster, nor we its.
    environ = {**os.environ, MARK: mark, "RAY_TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    environ.pop("RAY_ADDRESS", None)
    if fault == "kill":  # Ray takes 14 s by default to miss a node; its own time-outs stay as they are
        environ["RAY_health_check_period_ms"] = "1000"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.cluster.three_nodes", dsn, str(folder / "run"), fault,
        cwd=ROOT, env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = await asyncio.wait_for(process.communicate(), 200)
        assert process.returncode == 0, err.decode()[-6000:] + logs_of(folder)
        await eventually(lambda: not marked(mark), what="no process is left")
    finally:
        for pid in marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return json.loads(out.decode().splitlines()[-1])


async def judge(dsn: str, acknowledged: dict[str, list[Any]], report: dict[str, Any]) -> None:
    """Everything acknowledged is stored once, as told, without a gap in any seq."""
    print(f"\n{len(acknowledged)} acknowledged; {json.dumps(report, indent=1)}")
    assert report["unanswered"] == [], "every event got a certain answer in the end"
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(
            "select n.id::text, n.seq, s.user_id from notifications n join streams s using (stream_id)"
        )
        streams = await connection.fetch(
            "select s.seq, count(n.id) as n, count(distinct n.seq) as d,"
            " min(n.seq) as low, max(n.seq) as high"
            " from streams s join notifications n using (stream_id) group by s.stream_id"
        )
    finally:
        await connection.close()
    stored = {row["id"]: [row["user_id"], row["seq"]] for row in rows}
    assert len(stored) == len(rows), "an id is stored twice"
    lost = {key: value for key, value in acknowledged.items() if stored.get(key) != value}
    assert not lost, f"{len(lost)} acknowledged events are lost or elsewhere: {list(lost.items())[:3]}"
    for row in streams:
        assert row["low"] == 1
        assert row["seq"] == row["n"] == row["d"] == row["high"], "a gap in seq"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", ["kill", pytest.param("stop", marks=pytest.mark.slow)])
async def test_nothing_acknowledged_is_lost_when_nodes_come_and_go(
    postgres_dsn: str, short_folder: Path, fault: str
) -> None:
    """Every acknowledged id is stored once under the seq told; seqs have no gap; a loss is seen soon."""
    report = await run_story(postgres_dsn, short_folder, fault)
    await judge(postgres_dsn, report.pop("acknowledged"), report)
    assert report["third_slots"] > 0
    assert report["noticed_s"] < 30


@pytest.mark.timeout(900)
async def test_a_node_is_drained_under_load(postgres_dsn: str, short_folder: Path) -> None:
    """G11: slots first, then its actors end for good; again is no error; it can be undone; none lost."""
    report = await run_story(postgres_dsn, short_folder, "drain")
    await judge(postgres_dsn, report.pop("acknowledged"), report)
    assert len(report["before"]) == 4, "two shards, a router and a gateway"
    assert (report["after"], report["missing"], report["slots_left"]) == ([], [], 0)
    assert "slots have moved from node" in report["said"][0]
    assert "nothing is left to drain" in report["said"][-1]
    assert report["slowest_during_drain_s"] < 30, "an event waited for longer than a move of slots takes"


def logs_of(folder: Path) -> str:
    """The ends of the actors' logs, for a failure."""
    texts = []
    for path in sorted(folder.rglob("worker-*.err")):
        with contextlib.suppress(OSError):
            text = path.read_text(errors="replace")
            if text:
                texts.append(f"\n--- {path.name}\n{text[-1500:]}")
    return "".join(texts)[-12000:]
