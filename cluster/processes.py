"""Child processes that never outlive us, ports, and who is who in /proc (Linux).

Everything here ends processes by id, and only after comparing the start time that was recorded with the
id: the kernel reuses ids, so an id alone may name a stranger.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from carillon.clock import SystemClock
from carillon.errors import ClusterError

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# Looked up before any fork: between fork and exec a child of a threaded process must not take locks.
_LIBC = ctypes.CDLL(None, use_errno=True)
_CLOCK = SystemClock()


@dataclass(frozen=True)
class ProcessId:
    """A process that cannot be confused with a later one of the same id."""

    pid: int
    started: int
    """Start time in clock ticks since boot (field 22 of /proc/PID/stat)."""


@dataclass(frozen=True)
class ProcessInfo:
    """What /proc/PID/stat tells of a process."""

    id: ProcessId
    parent: int
    group: int
    state: str


def read_process(pid: int) -> ProcessInfo | None:
    """What runs under `pid`, or None if nothing does."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name (field 2) is in parentheses and may hold spaces and parentheses itself: read from the last one.
    fields = text[text.rindex(")") + 2 :].split()
    return ProcessInfo(ProcessId(pid, int(fields[19])), int(fields[1]), int(fields[2]), fields[0])


def alive(process: ProcessId) -> bool:
    """True while that very process runs (a zombie does not)."""
    info = read_process(process.pid)
    return info is not None and info.id == process and info.state not in "ZX"


def all_processes() -> list[ProcessInfo]:
    """Every process that we can see."""
    found = (read_process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [info for info in found if info is not None]


def descendants(root: int) -> list[ProcessInfo]:
    """Children of `root`, their children and so on, parents first. Zombies are left out."""
    children: dict[int, list[ProcessInfo]] = {}
    for info in all_processes():
        children.setdefault(info.parent, []).append(info)
    found: list[ProcessInfo] = []
    waiting = [root]
    while waiting:
        for info in children.get(waiting.pop(0), []):
            waiting.append(info.id.pid)
            if info.state not in "ZX":
                found.append(info)
    return found


def command_of(pid: int, limit: int = 120) -> str:
    """The command line of `pid`, shortened; empty if it is gone."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return raw.replace(b"\0", b" ").decode(errors="replace").strip()[:limit]


def become_subreaper() -> None:
    """Make orphans among our descendants our children instead of init's.

    Ray's raylet and workers fork helpers whose parents end first; with this they stay findable by walking
    our own tree, and `reap_zombies` can collect them.
    """
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_zombies(known: Sequence[int] = ()) -> None:
    """Collect adopted children that ended, except `known` ones (their `Popen` collects them)."""
    for info in all_processes():
        if info.parent == os.getpid() and info.state == "Z" and info.id.pid not in known:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(info.id.pid, os.WNOHANG)


def _die_with_parent(parent: int, death_signal: int) -> Callable[[], None]:
    def in_child() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
        if os.getppid() != parent:  # it died between fork and prctl: the signal will never come
            os._exit(125)

    return in_child


def spawn(
    command: Sequence[str],
    *,
    death_signal: int = signal.SIGTERM,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
    user: int | None = None,
    group: int | None = None,
    stdin: int | None = None,
    stdout: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start a long-lived child in a session of its own that gets `death_signal` when we die.

    A session of its own keeps a terminal's Ctrl-C from reaching it: we stop children in order. Call this
    from a thread that lives as long as the child should: the kernel ties the death signal to the *thread*
    that forked (prctl(2), PR_SET_PDEATHSIG).

    Args:
        command: program and arguments.
        death_signal: sent by the kernel when our thread ends, also after a SIGKILL of us.
        env: whole environment; None passes ours on.
        cwd: working directory; None means ours.
        log: file that both outputs are appended to (with `stdout`, only the errors); None discards them.
        user: numeric user to become; None stays (only root may change). Give `group` too.
        group: numeric group to become.
        stdin: None is /dev/null, or `subprocess.PIPE`.
        stdout: None is the log, or `subprocess.PIPE`.

    Raises:
        ClusterError: the program cannot be started.
    """
    options: dict[str, Any] = {} if user is None else {"user": user, "group": group, "extra_groups": []}
    out: int | IO[bytes] = subprocess.DEVNULL
    with contextlib.ExitStack() as stack:
        if log is not None:
            out = stack.enter_context(log.open("ab"))
        try:
            start: type[subprocess.Popen[bytes]] = subprocess.Popen
            return start(
                list(command),
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=out if stdout is None else stdout,
                stderr=out,
                env=env,
                cwd=cwd,
                start_new_session=True,
                # Runs after the change of user, which would clear the death signal.
                preexec_fn=_die_with_parent(os.getpid(), death_signal),
                **options,
            )
        except (OSError, subprocess.SubprocessError) as exc:
            raise ClusterError(f"cannot start {command[0]}: {exc}") from exc


def stop_child(child: subprocess.Popen[bytes], steps: Sequence[tuple[int, float]]) -> int:
    """End a child by one signal after another until it is gone.

    Args:
        child: what `spawn` returned.
        steps: (signal, seconds to wait for the end after it), tried in order; SIGKILL follows the last.

    Returns:
        The exit status as `Popen.returncode` gives it.
    """
    for sign, wait_s in (*steps, (signal.SIGKILL, 10.0)):
        if child.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(wait_s)
    return child.wait()


def end_processes(targets: Sequence[ProcessId], term_s: float = 5.0, kill_s: float = 5.0) -> list[ProcessId]:
    """SIGTERM, then SIGKILL, exactly these processes; returns those that are still there afterwards."""
    left = list(targets)
    for sign, wait_s in ((signal.SIGTERM, term_s), (signal.SIGKILL, kill_s)):
        left = [process for process in left if alive(process)]
        if wait_s <= 0 or not left:
            continue
        for process in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, sign)
        deadline = _CLOCK.monotonic() + wait_s
        while any(alive(process) for process in left) and _CLOCK.monotonic() < deadline:
            reap_zombies()
            time.sleep(0.02)
    return [process for process in left if alive(process)]


FREE_PORTS: Final = range(20_000, 30_000)
"""Where `free_port` looks: below the system's ephemeral range (32768-60999 on Linux), whose ports any
outgoing connection may hold a moment later, above Ray's workers (10002-19999) and below Serve's replicas
(30000-31000)."""
_given: set[int] = set()


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago; another process may take it first.

    No port is given twice in a process: what is chosen first is often bound last.
    """
    if len(_given) > len(FREE_PORTS) // 2:
        _given.clear()
    for _ in range(200):
        port = secrets.choice(FREE_PORTS)
        if port not in _given and port_is_free(port, host):
            _given.add(port)
            return port
    raise ClusterError(
        f"expected a free TCP port between {FREE_PORTS.start} and {FREE_PORTS.stop}, found none"
    )


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """True if a listener could be bound to `port` right now."""
    with socket.socket() as listener:
        # As servers do: a closed connection in TIME_WAIT does not make a port taken.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
        return True


def listener_of(port: int) -> int | None:
    """The id of a process that listens on TCP `port`, if we may see it."""
    inodes: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    if not inodes:
        return None
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                for fd in os.listdir(f"/proc/{name}/fd"):
                    with contextlib.suppress(OSError):
                        if os.readlink(f"/proc/{name}/fd/{fd}") in inodes:
                            return int(name)
    return None


def require_free_port(port: int, purpose: str, how: str, host: str = "127.0.0.1") -> None:
    """Raise ClusterError with a sentence that names `port` if it is taken.

    Args:
        port: the port; 0 is always free.
        purpose: whose port it is, e.g. "PostgreSQL".
        how: what the reader can do, e.g. "choose another with CARILLON_GATEWAY_PORT".
        host: the address to be bound.
    """
    if port == 0 or port_is_free(port, host):
        return
    pid = listener_of(port)
    by = f" by process {pid} ({command_of(pid, 60)})" if pid else ""
    raise ClusterError(f"port {port} for {purpose} is taken{by}; {how}")
