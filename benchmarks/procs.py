"""CPU time and memory of the system's processes, read from /proc (Linux)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
_RAY_TITLE: Final = re.compile(r"^ray::(?P<name>[^.(\s\x00]+)")
_NAMED: Final = (
    # (what the command line contains, the group it is shown under)
    ("postgres", "postgres"),
    ("valkey-server", "valkey"),
    ("redis-server", "valkey"),
    ("haproxy", "haproxy"),
    ("gcs_server", "ray gcs_server"),
    ("raylet/raylet", "ray raylet"),
    ("ray/dashboard", "ray dashboard and agents"),
    ("runtime_env/agent", "ray dashboard and agents"),
    ("log_monitor", "ray log_monitor"),
    ("ray/_private/workers", "ray idle workers"),
    ("fcm_server", "test push servers"),
    ("apns_server", "test push servers"),
    ("-m cluster", "cluster driver"),
    ("-m carillon.testing", "test push servers"),
)


@dataclass(frozen=True)
class Process:
    """One process at one moment."""

    pid: int
    group: str
    cpu_s: float
    """User and system time since it started."""
    rss_bytes: int
    pss_bytes: int
    """Shared pages divided by their users: the sum over processes is what the machine really spends."""


def group_of(command: str) -> str | None:
    """The name under which a process is reported, or None if it is none of the system's.

    Args:
        command: its command line with spaces between the words. Ray sets the title of a worker to
            `ray::Class` or, while it runs a method, `ray::Class.method`; both count as the class.
    """
    title = _RAY_TITLE.match(command)
    if title:
        name = title["name"]
        return "ray idle workers" if name == "IDLE" else f"ray::{name}"
    for mark, group in _NAMED:
        if mark in command:
            return group
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except (OSError, ValueError):
        return ""


def _stat(pid: int) -> tuple[int, float, int] | None:
    """(parent, CPU seconds, resident bytes), or None if the process is gone."""
    text = _read(Path(f"/proc/{pid}/stat"))
    if not text:
        return None
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return (
        int(fields[1]),
        (int(fields[11]) + int(fields[12])) * _TICK_S,
        int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
    )


def descendants(roots: Iterable[int]) -> set[int]:
    """`roots` and every process below them."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := _stat(int(entry))) is not None:
            parents[int(entry)] = stat[0]
    found = set(roots)
    while True:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        if not more:
            return found
        found |= more


def snapshot(
    roots: Iterable[int] = (), *, exclude: Iterable[int] = (), memory: bool = False
) -> dict[int, Process]:
    """The system's processes now, by pid.

    Args:
        roots: only these and their descendants (the pid of `python -m cluster up`); empty means every process
            that looks like one of the system's, which mixes several systems if several run.
        exclude: the load generator's own pids; their descendants are left out too.
        memory: also read PSS, which costs the kernel a walk over the page tables of each process.
    """
    roots = list(roots)
    wanted = descendants(roots) if roots else None
    # A system that this load generator started is below it, and still the system.
    mine = descendants(exclude) - (wanted or set())
    found: dict[int, Process] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        pid = int(entry)
        if pid in mine or (wanted is not None and pid not in wanted):
            continue
        command = _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip()
        group = group_of(command)
        if group is None:
            if wanted is None or not command:
                continue
            group = "other"
        stat = _stat(pid)
        if stat is None:
            continue
        pss = 0
        if memory:
            mark = re.search(r"^Pss:\s+(\d+) kB", _read(Path(f"/proc/{pid}/smaps_rollup")), re.MULTILINE)
            pss = int(mark[1]) * 1024 if mark else 0
        found[pid] = Process(pid, group, stat[1], stat[2], pss)
    return found


def cpu_between(before: dict[int, Process], after: dict[int, Process]) -> dict[str, float]:
    """CPU seconds spent per group between two snapshots, largest first.

    A process that started in between counts from its start; one that ended in between is not counted.
    """
    spent: dict[str, float] = {}
    for pid, process in after.items():
        start = before[pid].cpu_s if pid in before and before[pid].cpu_s <= process.cpu_s else 0.0
        spent[process.group] = spent.get(process.group, 0.0) + process.cpu_s - start
    return dict(sorted(((g, s) for g, s in spent.items() if s > 0), key=lambda item: -item[1]))


def memory_of(processes: dict[int, Process], group_part: str) -> dict[str, float]:
    """Summed `{rss, pss}` in bytes of the groups whose name contains `group_part` (case ignored)."""
    chosen = [p for p in processes.values() if group_part.lower() in p.group.lower()]
    return {"rss": float(sum(p.rss_bytes for p in chosen)), "pss": float(sum(p.pss_bytes for p in chosen))}
