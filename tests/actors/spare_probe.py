"""A Ray of its own, with one actor that is killed: what `test_ray_spare.py` runs. Prints one JSON line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import ray
from ray import exceptions

from actors.ray_shell import head_node
from actors.ray_spare import ensure_spare, idle_processes

DEADLINE_S = 60.0


class Plain:
    """Tells its process, and whether that has imported what a shard needs."""

    async def pid(self) -> int:
        return os.getpid()

    async def had(self) -> bool:
        return "actors.shard" in sys.modules


def processes() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def until_ready(node: str) -> None:
    """Wait until there is one."""
    deadline = time.monotonic() + DEADLINE_S
    while not idle_processes(node):
        assert time.monotonic() < deadline, "no spare process came up"
        time.sleep(0.1)


def until_imported(sibling: int) -> None:
    """Wait until another process of the same raylet has mapped the last library that is preloaded."""
    deadline = time.monotonic() + DEADLINE_S
    raylet = _parent(sibling)
    while not any(_parent(pid) == raylet and "cryptography" in _maps(pid) for pid in processes() - {sibling}):
        assert time.monotonic() < deadline, "the spare process imported nothing"
        time.sleep(0.1)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def killed(actor: object, pid: int) -> int:
    """Kill the actor's process; the pid of the next."""
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(exceptions.RayError):
            found = ray.get(actor.pid.remote(), timeout=5.0)  # type: ignore[attr-defined]
            if found != pid:
                return found
        time.sleep(0.05)
    raise TimeoutError("the actor did not come back")


def main() -> None:
    """Prepare, kill, prepare again."""
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    node = head_node()
    actor = ray.remote(Plain).options(num_cpus=0, max_restarts=-1).remote()
    pid = ray.get(actor.pid.remote())
    first = ensure_spare(node)
    until_ready(node)
    until_imported(pid)
    had = [ray.get(actor.had.remote())]
    there = ensure_spare(node)
    before = processes()
    taken = killed(actor, pid) in before
    had.append(ray.get(actor.had.remote()))
    again = ensure_spare(node)
    unknown = ensure_spare("0" * 56)
    found = {"first": first, "there": there, "taken": taken, "again": again, "unknown": unknown, "had": had}
    print(json.dumps(found))
    ray.shutdown()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
