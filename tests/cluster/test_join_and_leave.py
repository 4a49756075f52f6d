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


@pytest.mark.timeout(240)
@pytest.mark.parametrize("fault", ["kill", pytest.param("stop", marks=pytest.mark.slow)])
async def test_nothing_acknowledged_is_lost_when_nodes_come_and_go(
    postgres_dsn: str, short_folder: Path, fault: str
) -> None:
    """Every acknowledged id is stored once under the seq told; seqs have no gap; a loss is seen in 5 s."""
    mark = uuid.uuid4().hex
    # Its own Ray folder: a `ray.init()` elsewhere on the machine must not find this cluster, nor we its.
    environ = {**os.environ, MARK: mark, "RAY_TMPDIR": str(short_folder), "PYTHONPATH": str(ROOT)}
    environ.pop("RAY_ADDRESS", None)
    if fault == "kill":  # Ray takes 14 s by default to miss a node; its own time-outs stay as they are
        environ["RAY_health_check_period_ms"] = "1000"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.cluster.three_nodes", postgres_dsn, str(short_folder / "run"), fault,
        cwd=ROOT, env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = await asyncio.wait_for(process.communicate(), 200)
        assert process.returncode == 0, err.decode()[-6000:] + logs_of(short_folder)
        await eventually(lambda: not marked(mark), timeout_s=15, what="no process is left")
    finally:
        for pid in marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    report = json.loads(out.decode().splitlines()[-1])
    acknowledged: dict[str, list] = report.pop("acknowledged")
    print(f"\n{len(acknowledged)} acknowledged; {json.dumps(report, indent=1)}")

    assert report["unanswered"] == [], "every event got a certain answer in the end"
    assert report["third_slots"] > 0
    assert report["noticed_s"] < 5.0
    connection = await asyncpg.connect(postgres_dsn)
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


def logs_of(folder: Path) -> str:
    """The ends of the actors' logs, for a failure."""
    texts = []
    for path in sorted(folder.rglob("worker-*.err")):
        with contextlib.suppress(OSError):
            text = path.read_text(errors="replace")
            if text:
                texts.append(f"\n--- {path.name}\n{text[-1500:]}")
    return "".join(texts)[-12000:]
