"""What a process that starts in another's place does to its machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from actors.quiet_start import import_quietly
from actors.ray_preload import MODULES
from actors.ray_shell import GatewayActor, RouterActor, ShardActor
from carillon.settings import Settings
from cluster.ray_env import ROOT, client_environment

NOTES_ITS_NICENESS = """
import os, threading
niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
"""


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


async def test_imports_step_back_and_nobody_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The importing thread is nicer; the thread that asked for it keeps the priority it had."""
    (tmp_path / "a_quiet_module.py").write_text(NOTES_ITS_NICENESS)
    monkeypatch.syspath_prepend(tmp_path)
    before = niceness()
    (module,) = await import_quietly(["a_quiet_module"], 13)
    assert module.niceness == max(before, 13)
    assert niceness() == before


async def test_it_never_asks_for_more_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is nicer already stays so: to become less nice would need a privilege."""
    (tmp_path / "another_quiet_module.py").write_text(NOTES_ITS_NICENESS)
    monkeypatch.syspath_prepend(tmp_path)
    (module,) = await import_quietly(["another_quiet_module"], 0)
    assert module.niceness == max(niceness(), 0)


async def test_a_failed_import_is_told() -> None:
    """What the import raises comes back to who asked for it."""
    with pytest.raises(ModuleNotFoundError, match="no_such_module_here"):
        await import_quietly(["os", "no_such_module_here"], 5)


def test_a_shard_imports_nothing_that_it_may_not_need() -> None:
    """Libraries of HTTP, tokens and Redis are slow to import, and its users wait meanwhile."""
    code = "import sys, actors.shard; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "asyncpg" in loaded
    assert not loaded & {"httpx", "jwt", "cryptography", "redis", "fsspec", "jinja2", "ray"}


def test_a_spare_process_imports_what_actors_need() -> None:
    """Nothing is left to import for a shard, a gateway or a router that starts in it."""
    settings = Settings().with_values(redis={"url": "redis://127.0.0.1:1/0"})
    needed = {"actors.ray_shell"}
    for shell in (ShardActor, GatewayActor, RouterActor):
        needed |= {shell.path.partition(":")[0], *shell.needs(settings)}
    assert set(MODULES) == needed


def test_bytecode_is_kept() -> None:
    """Whatever the shell says, processes of the cluster need not compile what others compiled before."""
    environment = {"PYTHONDONTWRITEBYTECODE": "1"} | client_environment(None, loopback=True)
    code = "import sys; print(sys.dont_write_bytecode)"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.strip() == "False"
