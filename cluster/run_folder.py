"""What one installation keeps on this machine: the folder `.carillon/`.

lock             held while `up` runs; goes with the process, so a crash leaves none
run.json         the present run: its process, Ray's address, ports (read by status, drain and down)
dev.json         URLs and keys for tools, there only while the system is ready
processes.json   every process of the run, to end what a killed run left
secret, ray_token, api_key    mode 0600
postgres/ valkey/ fcm/ apns/  data and logs of what `up` starts
run/             sockets of the actors
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from carillon.errors import ClusterError
from cluster.embedded import write_private
from cluster.processes import ProcessId, alive, command_of, end_processes, read_process


class RunFolder:
    """Paths and files of `.carillon/`.

    Args:
        path: the folder; made at first use.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).resolve()
        self.dev_file = self.path / "dev.json"
        self.run_file = self.path / "run.json"
        self.processes_file = self.path / "processes.json"
        self.log_folder = self.path / "logs"
        self._lock: int | None = None
        self._recorded: tuple[ProcessId, ...] = ()

    def make(self) -> None:
        """Create the folder. Others may enter it (PostgreSQL's user must), but read nothing."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.path.chmod(0o711)
            self.log_folder.mkdir(exist_ok=True, mode=0o700)
        except OSError as exc:
            raise ClusterError(f"cannot use the folder {self.path}: {exc.strerror}") from exc

    def take(self) -> None:
        """Become the one run of this folder.

        Raises:
            ClusterError: another run has it; the sentence names its process.
        """
        self.make()
        lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            run = self.run() or {}
            raise ClusterError(
                f"Carillon runs already in {self.path} (process {run.get('pid', 'unknown')}): "
                "stop it with `python -m cluster down` or choose another folder with --data-dir"
            ) from None
        self._lock = lock

    def release(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # -- secrets ----------------------------------------------------------------------------------------

    def secret(self, configured: str) -> bytes:
        """The cluster secret: the setting, or one made at first start and kept."""
        return (configured or self._kept("secret")).encode()

    def ray_token_file(self) -> Path:
        """File of the token that Ray's processes ask of each other."""
        self._kept("ray_token")
        return self.path / "ray_token"

    def api_key(self) -> str | None:
        """The demo tenant's API key of earlier runs."""
        with contextlib.suppress(FileNotFoundError):
            return (self.path / "api_key").read_text().strip() or None
        return None

    def keep_api_key(self, key: str) -> None:
        """Remember the demo tenant's API key."""
        write_private(self.path / "api_key", key + "\n")

    def _kept(self, name: str) -> str:
        path = self.path / name
        with contextlib.suppress(FileNotFoundError):
            text = path.read_text().strip()
            if text:
                return text
        write_private(path, secrets.token_hex(32) + "\n")
        return path.read_text().strip()

    # -- the present run --------------------------------------------------------------------------------

    def write_run(self, facts: dict[str, Any]) -> None:
        """Tell other commands about this run."""
        write_private(self.run_file, json.dumps(facts, indent=1) + "\n")

    def run(self) -> dict[str, Any] | None:
        """What `write_run` wrote, if anything."""
        with contextlib.suppress(OSError, ValueError):
            facts = json.loads(self.run_file.read_text())
            return facts if isinstance(facts, dict) else None
        return None

    def running(self) -> ProcessId | None:
        """The process of the run that uses this folder, if it lives."""
        facts = self.run()
        if facts is None:
            return None
        process = ProcessId(int(facts["pid"]), int(facts["started"]))
        return process if alive(process) else None

    def write_dev(self, facts: dict[str, Any]) -> None:
        """Publish URLs and keys: the system is ready."""
        write_private(self.dev_file, json.dumps(facts, indent=1) + "\n")

    def clear(self) -> None:
        """Remove what says that a run is there."""
        for path in (self.dev_file, self.run_file, self.processes_file):
            path.unlink(missing_ok=True)

    # -- processes --------------------------------------------------------------------------------------

    def record(self, processes: Iterable[ProcessId]) -> None:
        """Write down the processes of this run. Cheap if nothing changed."""
        now = tuple(sorted(processes, key=lambda process: process.pid))
        if now != self._recorded:
            self._recorded = now
            write_private(
                self.processes_file, json.dumps([[process.pid, process.started] for process in now])
            )

    def end_leftovers(self) -> list[str]:
        """End what a killed run left; returns the command lines of what was ended. Needs the lock."""
        found: list[ProcessId] = []
        with contextlib.suppress(OSError, ValueError):
            found = [
                ProcessId(int(pid), int(started))
                for pid, started in json.loads(self.processes_file.read_text())
            ]
        left = [process for process in found if process.pid != os.getpid() and alive(process)]
        names = [command_of(process.pid, 60) for process in left]
        stuck = end_processes(left)
        if stuck:
            raise ClusterError(f"process {stuck[0].pid} of an earlier run does not end: end it by hand")
        return names

    def short_folder(self) -> Path:
        """A folder for Ray's sessions and sockets, whose paths must be short (sun_path has 108 bytes)."""
        digest = hashlib.sha256(str(self.path).encode()).hexdigest()[:8]
        folder = Path("/tmp") / f"crl-{digest}"  # noqa: S108
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        # The name can be guessed and /tmp is everybody's.
        facts = folder.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
            raise ClusterError(f"expected {folder} to be a folder of ours: remove it")
        folder.chmod(0o700)
        return folder

    def fresh_short_folder(self) -> Path:
        """`short_folder`, without the logs and sockets of earlier runs. Needs the lock."""
        folder = self.short_folder()
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        return folder


def this_process() -> ProcessId:
    """We."""
    info = read_process(os.getpid())
    assert info is not None
    return info.id
