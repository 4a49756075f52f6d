"""The local providers as processes: what the demo and the benchmarks start."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from carillon.clock import SystemClock
from carillon.settings import PushSettings
from carillon.testing.provider_credentials import write_demo_credentials
from channels.ports import make_channel, provider_configured
from tests.push_kit import job_of
from tests.support import eventually

ROOT = Path(__file__).resolve().parents[2]


@contextlib.asynccontextmanager
async def server(provider: str, folder: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, Any]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        f"carillon.testing.{provider}_server",
        "--dir",
        str(folder),
        "--exit-with-parent",
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    try:
        yield process, json.loads(await process.stdout.readline())
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def call(url: str, method: str = "GET", body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, method=method)) as answer:
        return json.load(answer)


@pytest.mark.parametrize("provider", ["fcm", "apns"])
async def test_a_push_to_a_server_process_shows_at_its_control_port(provider: str, tmp_path: Path) -> None:
    """Ready line -> credentials -> push -> GET /received -> POST /script -> DELETE /received -> SIGTERM."""
    async with server(provider, tmp_path / "server") as (process, ready):
        values: dict[str, Any] = write_demo_credentials(
            tmp_path / "demo",
            ready if provider == "fcm" else None,
            ready if provider == "apns" else None,
        )
        settings = PushSettings(**values)
        assert provider_configured(settings, provider)
        assert {path.stat().st_mode & 0o077 for path in (tmp_path / "demo").iterdir()} == {0}
        channel = make_channel(provider, settings, SystemClock())
        await channel.open()
        ((result,),) = await channel.send([job_of(7, provider)])
        assert result.outcome == "sent"
        received = await asyncio.to_thread(call, ready["receivedUrl"])
        assert received["count"] == 1
        (push,) = received["pushes"]
        assert push["target"] == "token-7"
        assert push["notificationId"] == "00000000-0000-0000-0000-000000000007"
        assert push["collapseKey"] == "key-7"
        assert datetime.fromisoformat(push["receivedAt"]).tzinfo is not None
        assert push["payload"]

        error = {"fcm": "UNREGISTERED", "apns": "Unregistered"}[provider]
        body = {"targets": {"token-7": {"error": error}}}
        await asyncio.to_thread(call, ready["controlUrl"] + "/script", "POST", body)
        ((result,),) = await channel.send([job_of(7, provider)])
        assert result.outcome == "invalid_target"
        await asyncio.to_thread(call, ready["receivedUrl"], "DELETE")
        assert (await asyncio.to_thread(call, ready["receivedUrl"]))["count"] == 0
        await channel.close()
        process.terminate()
        assert await process.wait() == 0


async def test_a_script_with_a_mistake_is_refused(tmp_path: Path) -> None:
    """With a sentence, and nothing of it applies."""
    async with server("fcm", tmp_path) as (_, ready):
        for body in ({"targets": {"a": {"error": "NONSENSE"}}}, {"unknown": 1}, {"shares": [{"fault": "x"}]}):
            with pytest.raises(urllib.error.HTTPError, match="400") as caught:
                await asyncio.to_thread(call, ready["controlUrl"] + "/script", "POST", body)
            caught.value.close()


async def test_a_restarted_server_is_still_trusted(tmp_path: Path) -> None:
    """Certificates and keys are kept in its folder."""
    async with server("apns", tmp_path) as (_, first):
        kept = Path(first["caFile"]).read_bytes(), Path(first["keyFile"]).read_bytes()
    async with server("apns", tmp_path) as (_, second):
        assert (Path(second["caFile"]).read_bytes(), Path(second["keyFile"]).read_bytes()) == kept


async def test_a_server_ends_with_its_parent(tmp_path: Path) -> None:
    """--exit-with-parent: a killed demo leaves no servers behind."""
    program = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-m', 'carillon.testing.fcm_server', '--dir', sys.argv[1],"
        " '--exit-with-parent'], stdout=subprocess.PIPE)\n"
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path), stdout=subprocess.PIPE, cwd=ROOT
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    await parent.wait()

    def gone() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"

    await eventually(gone)
