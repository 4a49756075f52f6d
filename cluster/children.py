"""Children that speak in JSON lines: the Ray head, the local providers, the operator."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from carillon.errors import ClusterError
from cluster.processes import spawn, stop_child


class LineChild:
    """A child process whose standard output is JSON lines.

    Args:
        title: what sentences call it.
        command: program and arguments.
        log: file for its standard error.
        env: whole environment; None passes ours on.
        talks: True to be able to `send` it lines.
    """

    def __init__(
        self,
        title: str,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        *,
        talks: bool = False,
    ) -> None:
        self.title = title
        self.log = log
        self._log_from = log.stat().st_size if log.exists() else 0
        self.child = spawn(
            command, env=env, log=log, stdout=subprocess.PIPE, stdin=subprocess.PIPE if talks else None
        )
        self._reader: asyncio.StreamReader | None = None
        self._close_reader: Callable[[], None] | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.child.pid

    def ended(self) -> bool:
        """True once the process is gone."""
        return self.child.poll() is not None

    def send(self, document: dict[str, Any]) -> None:
        """Write one line to its standard input. Raises ClusterError if it is gone."""
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(json.dumps(document).encode() + b"\n")
            self.child.stdin.flush()
        except OSError as exc:
            raise self._failed() from exc

    async def line(self, timeout_s: float) -> dict[str, Any]:
        """The next line. Raises ClusterError if none comes in time or the process ends."""
        reader = await self._open()
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    text = await reader.readline()
                    if not text:
                        await asyncio.to_thread(self._wait_briefly)
                        raise self._failed()
                    with contextlib.suppress(ValueError):
                        document = json.loads(text)
                        if isinstance(document, dict):
                            return document
        except TimeoutError:
            raise ClusterError(
                f"{self.title} did not answer within {timeout_s:.0f} s; see {self.log}"
            ) from None

    def stop(self, wait_s: float = 10.0) -> int:
        """End it: SIGTERM, then by force. Returns its exit status."""
        if self.child.stdin is not None:
            with contextlib.suppress(OSError):
                self.child.stdin.close()
        if self._close_reader is not None:
            self._close_reader()
        elif self.child.stdout is not None:
            self.child.stdout.close()
        return stop_child(self.child, ((signal.SIGTERM, wait_s),))

    async def _open(self) -> asyncio.StreamReader:
        if self._reader is None:
            reader = asyncio.StreamReader(limit=1 << 20)
            loop = asyncio.get_running_loop()
            transport, _ = await loop.connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), self.child.stdout
            )

            def close() -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed, and the pipe with it
                    loop.call_soon_threadsafe(transport.close)

            # The pipe is the loop's now: closed under it, it would poll a descriptor that is not there.
            self._reader, self._close_reader = reader, close
        return self._reader

    def _wait_briefly(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(2.0)

    def _failed(self) -> ClusterError:
        words = ""
        with contextlib.suppress(OSError), self.log.open(errors="replace") as file:
            file.seek(self._log_from)
            lines = [line.strip() for line in file.read().splitlines() if line.strip()]
            words = f": {lines[-1][:300]}" if lines else ""
        status = self.child.poll()
        return ClusterError(f"{self.title} ended with status {status}{words} (log: {self.log})")
