"""The process that renders templates and tries new rules of schedules: `python -m actors.template_worker FD`.

Frames on an inherited socket: 4 bytes of length, then MessagePack. It has no database, no secrets and no
links;
its memory is limited, and a clock interrupts what takes too long. Its parent ends it when even that does not
help (actors/template_renderer.py).
"""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import sys
from typing import Any

import msgspec

from carillon.schedules import ScheduleError, parse, upcoming
from carillon.template_language import Language, TemplateFaultError
from carillon.templates import HTML_MEMBERS, Job

_encode = msgspec.msgpack.Encoder().encode
_decode_jobs = msgspec.msgpack.Decoder(list[Job]).decode
OCCURRENCES = 20
"""Occurrences of a new rule that are looked at."""
SLOW = "it takes longer than a template may"


class TooSlowError(BaseException):
    """The clock struck. No Exception: nothing that handles those may keep a template alive."""


def _strike(_signal: int, _frame: Any) -> None:
    raise TooSlowError


class Worker:
    """Answers requests.

    Args:
        time_limit_s: processor time of one text: what the machine does meanwhile is not the template's fault.
    """

    def __init__(self, language: Language, time_limit_s: float) -> None:
        self._language = language
        self._time_limit_s = time_limit_s

    def _timed(self, work: Any) -> Any:
        signal.setitimer(signal.ITIMER_PROF, self._time_limit_s)
        try:
            return work()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def render(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """One answer per job: {"ok": {member: text}} or {"error": why, "member": where, "slow": bool}."""
        slow: set[str] = set()
        answers: list[dict[str, Any]] = []
        for job in jobs:
            member, made = "", {}
            try:
                if job.template in slow:
                    raise TooSlowError
                for member, source in job.sources.items():
                    html = job.html and member in HTML_MEMBERS
                    made[member] = self._timed(
                        lambda source=source, html=html, job=job: self._language.render(
                            source, job.params, job.locale, html=html
                        )
                    )
                answers.append({"ok": made})
            except TemplateFaultError as exc:
                answers.append({"error": str(exc), "member": member})
            except TooSlowError:
                slow.add(job.template)
                answers.append({"error": SLOW, "member": member, "slow": True})
        return answers

    def check(self, sources: list[tuple[str, str]]) -> list[dict[str, Any]]:
        """One answer per text: {"names": [...]} or {"error": why}."""
        answers: list[dict[str, Any]] = []
        for _path, source in sources:
            try:
                names = self._timed(lambda source=source: self._language.names(source))
                answers.append({"names": sorted(names)})
            except TemplateFaultError as exc:
                answers.append({"error": str(exc)})
            except TooSlowError:
                answers.append({"error": SLOW})
        return answers

    def values(self, items: list[Any], params: dict[str, Any]) -> list[dict[str, Any]]:
        """One answer per (path, expression or null, text): {"ok": value} or {"error": why}."""
        answers: list[dict[str, Any]] = []
        language = self._language
        for _path, expression, source in items:
            try:
                if expression is None:
                    made = self._timed(lambda source=source: language.render(source, params, html=False))
                else:
                    made = self._timed(lambda source=expression: language.value(source, params))
                answers.append({"ok": made})
            except TemplateFaultError as exc:
                answers.append({"error": str(exc)})
            except TooSlowError:
                return [{"error": SLOW}] * len(items)
        return answers

    def schedule(self, document: Any, after_ms: int, zone: str) -> list[dict[str, Any]]:
        """The next occurrences of a rule, one {"at": ms} each, or {"errors": [...]}."""
        try:
            found = self._timed(lambda: upcoming(parse(document), after_ms, zone, OCCURRENCES))
        except ScheduleError as exc:
            return [{"errors": [list(error) for error in exc.errors]}]
        except TooSlowError:
            return [{"errors": [["rrule", "a rule with occurrences", "none for centuries"]]}]
        return [{"at": at_ms} for at_ms in found]


def _read(connection: socket.socket, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def main(argv: list[str]) -> None:
    """Serve until the parent goes."""
    fd, time_limit_s, max_steps, max_length, memory = argv
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent, whose end ends us
    signal.signal(signal.SIGPROF, _strike)
    with contextlib.suppress(ValueError, OSError):  # a lower limit that is set already
        resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    worker = Worker(Language(int(max_steps), int(max_length)), float(time_limit_s))
    with socket.socket(fileno=int(fd)) as connection, contextlib.suppress(EOFError, ConnectionError):
        while True:
            frame = _read(connection, int.from_bytes(_read(connection, 4), "big"))
            kind, body = frame[:1], frame[1:]
            if kind == b"r":
                answer = worker.render(_decode_jobs(body))
            elif kind == b"s":
                document, after_ms, zone = msgspec.msgpack.decode(body)
                answer = worker.schedule(document, after_ms, zone)
            elif kind == b"v":
                answer = worker.values(*msgspec.msgpack.decode(body))
            else:
                answer = worker.check(msgspec.msgpack.decode(body, type=list[tuple[str, str]]))
            data = _encode(answer)
            connection.sendall(len(data).to_bytes(4, "big") + data)


if __name__ == "__main__":
    main(sys.argv[1:])
