"""The short run of `make test`: the whole system under faults of every group, judged by its history."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ray_env import ROOT
from tests.chaos.faults import FAULTS, chosen

KINDS = (
    "kill-shard", "stop-shard", "stop-gateway", "net-clients-half-open", "net-clients-to-server",
    "net-postgres-drop", "net-postgres-partition", "kill-postgres", "kill-valkey", "provider-hang",
    "provider-errors", "kill-pool", "power-loss",
)  # fmt: skip
"""Some of each group: tests/cluster/test_kill_actors.py kills the other actors, `make chaos` does all."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Kept if the test fails: the history is the evidence."""
    place = Path(tempfile.mkdtemp(prefix="chaos-report-"))
    yield place
    if (place / "report.json").exists() and json.loads((place / "report.json").read_text())["ok"]:
        shutil.rmtree(place)


@pytest.mark.timeout(960)
async def test_no_promise_is_broken_under_faults(folder: Path) -> None:
    """Every kind of fault is injected once under load, and the history breaks no guarantee."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.chaos", "run", "--short", "--seed", "20", "--duration", "1"),
        *("--faults", ",".join(KINDS), "--report", str(folder)),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), 900)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    said = out.decode()
    print(said)
    assert process.returncode == 0, f"the history is in {folder}:\n{said[-4000:]}"
    report = json.loads((folder / "report.json").read_text())
    assert {fault["name"] for fault in report["faults"]} == set(KINDS)
    assert [name for name, verdict in report["verdicts"].items() if not verdict["checked"]] == []
    assert report["counts"]["resumes"] > 20
    assert report["counts"]["acknowledgedEvents"] > 500


def test_faults_are_chosen_by_name_group_and_exception() -> None:
    """`--faults` takes names and groups, `-name` leaves one out, an unknown name is told."""
    assert [kind.name for kind in chosen("kill-shard,kill-gateway")] == ["kill-shard", "kill-gateway"]
    assert {kind.name for kind in chosen("all")} == set(FAULTS)
    assert {kind.name for kind in chosen("all,-stop,-power-loss")} == {
        name for name in FAULTS if not name.startswith(("stop-", "freeze-")) and name != "power-loss"
    }
    with pytest.raises(ValueError, match="unknown fault 'earthquake'"):
        chosen("earthquake")
