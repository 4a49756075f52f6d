"""The system under measurement: where it is, its keys, and starting and stopping one of our own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from benchmarks.wire import Door, get_json

ROOT: Final = Path(__file__).resolve().parent.parent


class TargetError(Exception):
    """The system cannot be found, reached or started; the sentence says what to do."""


@dataclass(frozen=True)
class Target:
    """What dev.json tells about a running system."""

    tenant: str
    api_key: str
    client_secret: str
    direct_url: str
    serve_url: str
    ws_url: str
    postgres_dsn: str | None = None
    fcm_received_url: str | None = None
    pids: tuple[int, ...] = ()
    """Processes whose descendants are the system; empty means: recognise them by name."""

    @classmethod
    def from_json(cls, document: dict[str, Any], pid: int | None = None) -> Target:
        """Read the document that `python -m cluster up` writes.

        Args:
            document: dev.json.
            pid: the process of `up`; None: not known.

        Raises:
            TargetError: a member is missing.
        """
        needed = ("tenant", "apiKey", "clientSecret", "directUrl", "httpUrl", "wsUrl")
        missing = [name for name in needed if not document.get(name)]
        if missing:
            raise TargetError(
                f"dev.json lacks {', '.join(missing)}: the benchmarks need the demo tenant (no --no-demo)"
            )
        return cls(
            tenant=document["tenant"],
            api_key=document["apiKey"],
            client_secret=document["clientSecret"],
            direct_url=document["directUrl"],
            serve_url=document["httpUrl"],
            ws_url=document["wsUrl"],
            postgres_dsn=document.get("postgresDsn") or None,
            fcm_received_url=document.get("fcmReceivedUrl") or None,
            pids=(pid,) if pid else (),
        )

    @classmethod
    def load(cls, path: Path) -> Target:
        """Read a dev.json file, and the pid from the run.json beside it. Raises TargetError."""
        try:
            document = json.loads(path.read_text())
        except FileNotFoundError as exc:
            raise TargetError(
                f"{path} does not exist: run `make up`, or let --start bring a system up"
            ) from exc
        except (OSError, ValueError) as exc:
            raise TargetError(f"cannot read {path}: {exc}") from exc
        pid = None
        with contextlib.suppress(OSError, ValueError, KeyError):
            pid = int(json.loads(path.with_name("run.json").read_text())["pid"])
        return cls.from_json(document, pid)

    def http_door(self, door: str) -> Door:
        """The ingress: "direct" is the replica's own listener, "serve" Ray Serve's route."""
        return Door.of(self.serve_url if door == "serve" else self.direct_url)

    def ws_door(self) -> Door:
        """A gateway."""
        return Door.of(self.ws_url)

    def token(self, user: str, ttl_s: int = 86_400) -> str:
        """A client token (JWT, HS256) for `user`, made here: 10 microseconds instead of a request."""
        # The ids of a benchmark are plain ASCII, so this needs none of a JWT library's care.
        issued = int(time.time())
        claims = {"sub": user, "tenant": self.tenant, "iat": issued, "exp": issued + ttl_s}
        signed = b".".join(
            base64.urlsafe_b64encode(json.dumps(part, separators=(",", ":")).encode()).rstrip(b"=")
            for part in ({"alg": "HS256", "typ": "JWT"}, claims)
        )
        mac = hmac.new(self.client_secret.encode(), signed, hashlib.sha256).digest()
        return (signed + b"." + base64.urlsafe_b64encode(mac).rstrip(b"=")).decode()


class OwnSystem:
    """A system of our own: `python -m cluster up` as a subprocess, stopped at the end.

    Args:
        runtime_dir: its folder (data, logs, dev.json).
        timeout_s: longest wait until it is ready.
    """

    def __init__(self, runtime_dir: Path, timeout_s: float = 180.0) -> None:
        self.runtime_dir = runtime_dir
        self.timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    async def start(self) -> Target:
        """Start and wait until `/readyz` answers 200.

        Raises:
            TargetError: it ended or was not ready in time; names the log.
        """
        self.runtime_dir.mkdir(parents=True, exist_ok=True)
        log = self.runtime_dir / "bench-up.log"
        self._log = log.open("wb")
        dev_json = self.runtime_dir / "dev.json"
        dev_json.unlink(missing_ok=True)
        # A session of its own: a Ctrl-C in the terminal reaches the load generator, which then stops the
        # system in order, instead of both at once.
        self._process = subprocess.Popen(  # noqa: ASYNC220  a fork, once
            # A folder and ports of its own: another system may be up on this machine.
            [
                *(sys.executable, "-m", "cluster", "up", "--data-dir", str(self.runtime_dir)),
                *("--http-port", "0", "--direct-port", "0", "--ws-port", "0"),
            ],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.perf_counter() + self.timeout_s
        while time.perf_counter() < deadline:
            if self._process.poll() is not None:
                raise TargetError(f"the system ended with code {self._process.returncode}; see {log}")
            if dev_json.exists():
                with contextlib.suppress(OSError, TimeoutError, ValueError, TargetError):
                    target = Target.load(dev_json)
                    await get_json(target.http_door("direct"), "/readyz")
                    return target
            await asyncio.sleep(0.25)
        raise TargetError(f"the system was not ready within {self.timeout_s:.0f} s; see {log}")

    def stop(self, timeout_s: float = 60.0) -> None:
        """Ask it to end (SIGTERM), wait, and kill what is left after `timeout_s`."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._log is not None:
            self._log.close()
