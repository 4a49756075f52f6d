"""Templates are rendered in processes beside us: a template that hangs costs one of them and nobody's loop.

A process is started with the first template that needs it, and again after one had to be ended. Measured on
two cores: a text costs 0.1 to 0.2 ms, most of it the way there and back; many texts of one request travel
together.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from carillon.clock import Clock
from carillon.errors import BusyError, UnavailableError
from carillon.metrics import Stats
from carillon.problems import FieldError
from carillon.schedules import ScheduleError
from carillon.settings import TemplateSettings
from carillon.templates import Job

log = logging.getLogger(__name__)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


class RenderError(Exception):
    """The process did not answer in time and was ended."""


class _Process:
    """One process that renders, one request at a time."""

    def __init__(self, settings: TemplateSettings) -> None:
        self._settings = settings
        self._child: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, kind: bytes, body: bytes, limit_s: float) -> Any:
        """Raises RenderError: no answer within `limit_s`; the process is gone then."""
        if self._writer is None:
            await self._start()
        assert self._writer is not None
        assert self._reader is not None
        try:
            async with asyncio.timeout(limit_s):
                self._writer.write((len(body) + 1).to_bytes(4, "big") + kind + body)
                await self._writer.drain()
                size = int.from_bytes(await self._reader.readexactly(4), "big")
                return _decode(await self._reader.readexactly(size))
        except (TimeoutError, OSError, EOFError, msgspec.MsgspecError) as exc:
            await self.stop()
            raise RenderError(type(exc).__name__) from exc
        except BaseException:  # cancelled: an answer may still come, and nobody could tell whose it is
            await asyncio.shield(self.stop())
            raise

    async def _start(self) -> None:
        settings = self._settings
        ours, theirs = socket.socketpair()
        command = [
            sys.executable, "-m", "actors.template_worker", str(theirs.fileno()), str(settings.time_limit_s),
            str(settings.max_steps), str(settings.max_length), str(settings.max_memory_bytes),
        ]  # fmt: skip
        # What a template must never find: settings and secrets of ours.
        environ = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "LC_ALL": "C.UTF-8"}

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(  # noqa: S603  our own interpreter and module
                command,
                pass_fds=(theirs.fileno(),),
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )

        try:
            self._child = await asyncio.get_running_loop().run_in_executor(None, start)
        except OSError as exc:
            ours.close()
            raise UnavailableError(f"no process for templates: {exc}") from exc
        finally:
            theirs.close()
        ours.setblocking(False)
        self._reader, self._writer = await asyncio.open_connection(sock=ours)

    async def stop(self) -> None:
        """End the process (idempotent)."""
        child, writer = self._child, self._writer
        self._child = self._reader = self._writer = None
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        if child is not None:
            child.kill()
            await asyncio.get_running_loop().run_in_executor(None, child.wait)


class Renderer:
    """Renders and checks texts, in `template.processes` processes."""

    def __init__(self, settings: TemplateSettings, clock: Clock, stats: Stats) -> None:
        self._settings = settings
        self._clock = clock
        self._stats = stats
        self._idle: asyncio.LifoQueue[_Process] = asyncio.LifoQueue()
        self._all = [_Process(settings) for _ in range(settings.processes)]
        for process in self._all:
            self._idle.put_nowait(process)
        self._waiting = 0

    async def close(self) -> None:
        """End the processes."""
        for process in self._all:
            await process.stop()

    async def render(self, jobs: Sequence[Job], deadline: float) -> list[dict[str, Any]]:
        """Render jobs; one answer each: {"ok": {member: text}} or {"error": why, "member": where}.

        Args:
            deadline: monotonic; by then there is an answer or an error.

        Raises:
            BusyError: `template.max_waiting` requests wait already.
            UnavailableError: the deadline passed.
        """
        answers: list[dict[str, Any]] = []
        size = self._settings.batch
        slow: set[str] = set()
        for at in range(0, len(jobs), size):  # in turns: a large batch does not keep the others waiting
            part = jobs[at : at + size]
            open_ = [job for job in part if job.template not in slow]
            made = iter(
                await self._ask(b"r", open_, sum(len(j.sources) for j in open_), deadline) if open_ else ()
            )
            for job in part:
                answer = {"error": "it takes longer than a template may", "member": ""}
                if job.template not in slow or job in open_:
                    answer = next(made, answer)
                if answer.get("slow"):
                    slow.add(job.template)
                answers.append(answer)
        return answers

    async def check(self, sources: Sequence[tuple[str, str]], deadline: float) -> list[dict[str, Any]]:
        """Compile texts given with their paths: {"names": [...]} or {"error": why} each. Raises as
        `render`."""
        return await self._ask(b"c", list(sources), len(sources), deadline)

    async def values(
        self, items: Sequence[tuple[str, str | None, str]], params: dict[str, Any], deadline: float
    ) -> list[dict[str, Any]]:
        """Fill in texts given as (path, expression, text): {"ok": value} or {"error": why} each.

        An expression's value is taken as it is, a text is rendered. Raises as `render`.
        """
        if not items:
            return []
        answers = await self._ask(b"v", [list(items), params], len(items), deadline)
        return answers if len(answers) == len(items) else [answers[0]] * len(items)

    async def occurrences(
        self, document: dict[str, Any], after_ms: int, zone: str, deadline: float
    ) -> list[int]:
        """The next occurrences of a schedule, some at most. Raises as `render`, and ScheduleError."""
        answers = await self._ask(b"s", [document, after_ms, zone], 1, deadline)
        if answers and ("errors" in answers[0] or "error" in answers[0]):
            told = answers[0].get("errors") or [["rrule", "a rule with occurrences", "none"]]
            raise ScheduleError([FieldError(*error) for error in told])
        return [answer["at"] for answer in answers]

    async def _ask(
        self, kind: bytes, items: Sequence[Any], texts: int, deadline: float
    ) -> list[dict[str, Any]]:
        if self._waiting >= self._settings.max_waiting:
            raise BusyError("too many templates are waiting to be rendered")
        body = _encode(items)
        started = self._clock.monotonic()
        self._waiting += 1
        try:
            async with asyncio.timeout(max(0.0, deadline - started)):
                process = await self._idle.get()
        except TimeoutError:
            raise UnavailableError("templates are rendered too slowly") from None
        finally:
            self._waiting -= 1
        limit_s = self._settings.start_s + self._settings.time_limit_s * max(1, texts)
        left_s = deadline - self._clock.monotonic()
        try:
            answers = await process.ask(kind, body, max(0.001, min(limit_s, left_s)))
        except RenderError as exc:
            self._stats.count("template_processes_ended")
            if left_s < limit_s:
                raise UnavailableError("templates are rendered too slowly") from None
            log.warning("a process that renders templates was ended: %s", exc)
            return [
                {"error": "it takes longer or needs more than a template may", "member": "", "slow": True}
            ] * len(items)
        finally:
            self._idle.put_nowait(process)
        self._stats.count("templates_rendered", len(items))
        self._stats.observe_ms("template_ms", (self._clock.monotonic() - started) * 1000)
        return answers
