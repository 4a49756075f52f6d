"""What the local FCM and APNs have in common: scripts, the record of pushes, the process around them."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import random
import signal
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import uvloop
from msgspec import Struct, field

from carillon.clock import Clock, SystemClock
from carillon.testing.http2_server import FAULTS, Answer, Fault, Http2Server

KEPT_PUSHES: Final = 10_000
"""The record holds the newest so many; `count` goes on counting. `--keep` is another number."""


class Behaviour(Struct, rename="camel", forbid_unknown_fields=True):
    """How to answer: an error of the provider, a fault of the transport, a delay; all empty means success."""

    error: str = ""
    """The provider's error name, e.g. UNREGISTERED or BadDeviceToken."""
    status: int = 0
    """HTTP status; 0 means the one that belongs to `error`."""
    plain: bool = False
    """FCM: True leaves out the FcmError detail."""
    timestamp: int | None = None
    """APNs: milliseconds since the epoch, in answers 410; None means now."""
    retry_after: str | None = None
    """Value of a Retry-After header."""
    delay_s: float = 0.0
    fault: str = ""
    """See `carillon.testing.http2_server.Fault`."""
    times: int = 0
    """Applies to so many requests, then is forgotten; 0 means for ever."""
    share: float = 0.0
    """In `shares`: probability (0..1) that this behaviour applies to a request."""


class Script(Struct, rename="camel", forbid_unknown_fields=True):
    """What POST /script takes. Fields that are absent leave the present setting as it is."""

    reset: bool = False
    """True forgets all behaviours first."""
    targets: dict[str, Behaviour] = field(default_factory=dict[str, Behaviour])
    """By target; wins over `shares`."""
    shares: list[Behaviour] | None = None
    """Random behaviours, looked at in order."""
    delay_s: float | None = None
    """Delay of every answer."""
    seed: int | None = None
    stall: bool | None = None
    """True closes the flow-control windows, False opens them."""
    goaway: bool = False
    """True sends GOAWAY on every open connection, now."""
    disconnect: bool = False
    """True drops every open connection, now."""
    max_streams: int | None = None
    """SETTINGS_MAX_CONCURRENT_STREAMS of connections made from now on."""
    enforce_token_updates: bool | None = None
    """APNs: True answers TooManyProviderTokenUpdates to a second new token within 20 min on a connection."""
    revoke_tokens: bool = False
    """FCM: True makes every access token handed out so far invalid, now."""


class ReceivedPush(Struct, rename="camel"):
    """One push the provider accepted."""

    target: str
    notification_id: str
    collapse_key: str
    payload: Any
    headers: dict[str, str]
    """APNs: the apns-* headers. FCM: empty."""
    connection: int
    """Number of the connection it came on, from 1."""
    received_at: str
    """RFC 3339 UTC with milliseconds."""


class LocalProvider:
    """Behaviours and the record of pushes; a base for the two servers.

    Args:
        clock: wall clock of `received_at` and of token checks.
        seed: of the random shares.
    """

    def __init__(self, clock: Clock | None = None, seed: int = 0) -> None:
        self.clock = clock or SystemClock()
        self.count = 0
        """Pushes accepted since the last DELETE /received."""
        self.requests = 0
        """Pushes asked for, whatever became of them."""
        self.rejected: dict[str, int] = {}
        """Answers other than success, by error or fault."""
        self.pushes: deque[ReceivedPush] = deque(maxlen=KEPT_PUSHES)
        self.server: Http2Server | None = None
        self.enforce_token_updates = False
        self._targets: dict[str, Behaviour] = {}
        self._shares: list[Behaviour] = []
        self._delay_s = 0.0
        self._random = random.Random(seed)  # noqa: S311  scripted faults, not secrets

    def script(self, script: Script) -> None:
        """Apply a script. Raises ValueError for a behaviour this provider does not know."""
        for behaviour in [*script.targets.values(), *(script.shares or [])]:
            self.check(behaviour)
        if script.reset:
            self._targets.clear()
            self._shares = []
            self._delay_s = 0.0
            self.enforce_token_updates = False
        self._targets.update(script.targets)
        if script.shares is not None:
            self._shares = script.shares
        if script.delay_s is not None:
            self._delay_s = script.delay_s
        if script.seed is not None:
            self._random.seed(script.seed)
        if script.enforce_token_updates is not None:
            self.enforce_token_updates = script.enforce_token_updates
        if self.server is not None:
            if script.max_streams is not None:
                self.server.max_streams = script.max_streams
            if script.stall is not None:
                self.server.stall(script.stall)
            if script.goaway:
                self.server.goaway()
            if script.disconnect:
                self.server.disconnect()

    def check(self, behaviour: Behaviour) -> None:
        """Raise ValueError if this provider cannot behave so."""
        if behaviour.fault not in FAULTS:
            raise ValueError(f"expected fault to be one of {', '.join(FAULTS[1:])}, got {behaviour.fault!r}")
        if behaviour.error and behaviour.error not in self.errors() and not behaviour.status:
            raise ValueError(f"unknown error {behaviour.error!r}; known: {', '.join(self.errors())}")

    def errors(self) -> dict[str, int]:
        """The provider's error names with their HTTP status."""
        raise NotImplementedError

    def behaviour(self, target: str) -> Behaviour | None:
        """The behaviour for the next push to `target`, None for success. Uses up one of its `times`."""
        found = self._targets.get(target)
        if found is None:
            for candidate in self._shares:
                if self._random.random() < candidate.share:
                    return candidate
            return None
        if found.times > 0:
            found.times -= 1
            if found.times == 0:
                del self._targets[target]
        return found

    def accept(self, push: ReceivedPush) -> None:
        """Note a push that the provider takes."""
        self.count += 1
        self.pushes.append(push)

    def reject(self, why: str) -> None:
        """Note a push that it does not take."""
        self.rejected[why] = self.rejected.get(why, 0) + 1

    def finish(self, answer: Answer, behaviour: Behaviour | None) -> Answer:
        """Complete an answer with the scripted delay and fault."""
        answer.delay_s = self._delay_s
        if behaviour is not None:
            answer.delay_s += behaviour.delay_s
            answer.fault = _fault(behaviour.fault)
        return answer

    def routes(self) -> dict[str, Callable[[dict[str, str], bytes], tuple[int, Any]]]:
        """Routes of the control port."""
        return {
            "GET /received": self._received,
            "GET /tally": self._tally,
            "DELETE /received": self._forget,
            "POST /script": self._script,
            "GET /healthz": lambda query, body: (200, {"ok": True}),
        }

    def _received(self, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        """GET /received?limit=N&target=T: the newest pushes, oldest first."""
        pushes = list(self.pushes)
        if "target" in query:
            pushes = [push for push in pushes if push.target == query["target"]]
        limit = int(query.get("limit", KEPT_PUSHES))
        return 200, {
            "count": self.count,
            "requests": self.requests,
            "rejected": self.rejected,
            "connections": self.server.connections_made if self.server is not None else 0,
            "pushes": pushes[-limit:] if limit > 0 else [],
        }

    def _tally(self, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        """GET /tally: how often each notification was accepted for each target, and when first."""
        tally: dict[str, tuple[int, str]] = {}
        for push in self.pushes:
            key = f"{push.target} {push.notification_id}"
            times, first = tally.get(key, (0, push.received_at))
            tally[key] = (times + 1, first)
        return 200, {"count": self.count, "rejected": self.rejected, "pushes": tally}

    def _forget(self, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        self.count = self.requests = 0
        self.rejected.clear()
        self.pushes.clear()
        return 200, {"ok": True}

    def _script(self, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        self.script(msgspec.json.decode(body, type=Script))
        return 200, {"ok": True}


def _fault(text: str) -> Fault:
    for known in FAULTS:
        if known == text:
            return known
    raise ValueError(text)


class ProviderProcess(Protocol):
    """A server that `main` can run."""

    pushes: deque[ReceivedPush]

    async def start(self, port: int, control_port: int) -> dict[str, Any]:
        """Listen; returns the ready line's document."""
        ...

    async def close(self) -> None:
        """Stop."""
        ...


def main(name: str, make: Callable[[Path], ProviderProcess], argv: list[str]) -> int:
    """Run a local provider as a process: print one JSON line when ready, end on SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog=f"python -m carillon.testing.{name}", description=make.__doc__)
    parser.add_argument("--port", type=int, default=0, help="HTTPS port; 0 means any free one")
    parser.add_argument("--control-port", type=int, default=0, help="plain HTTP port on loopback; 0 likewise")
    parser.add_argument("--dir", required=True, help="folder for certificates and credentials")
    parser.add_argument("--keep", type=int, default=KEPT_PUSHES, help="pushes that the record holds")
    parser.add_argument("--exit-with-parent", action="store_true", help="end when the parent process dies")
    arguments = parser.parse_args(argv)
    if arguments.exit_with_parent:
        die_with_parent()
    folder = Path(arguments.dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        server = make(folder)
        server.pushes = deque(maxlen=arguments.keep)
        ready = await server.start(arguments.port, arguments.control_port)
        print(json.dumps(ready), flush=True)  # noqa: T201  the ready line is the interface
        await stop.wait()
        await server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    return 0


def die_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent ends; without prctl (other systems) this does nothing."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died between the two calls
        raise SystemExit(0)
