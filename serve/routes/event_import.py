"""`POST /v1/events/import`: a stream of events of any length, one JSON object a line.

The body is read as fast as its events are stored: while one batch is on its way the next is read, then
nothing is until the first has its outcomes. TCP tells the sender.

Behind Serve's route that holds only for requests with `X-Request-Disconnect-Disabled: ?1`: to notice callers
who hang up Serve reads every other body ahead, as fast as it comes and into memory without a bound (Ray 2.60,
ASGIDIReceiveProxy). What comes without the header there has to be of a known, bounded length.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any, Final

import msgspec

from carillon.errors import CarillonError
from carillon.event_rules import Text, text_error
from carillon.events import NotPlainError, ProblemError, refused
from carillon.events import Request as ParsedEvents
from carillon.lines import TOO_LONG, LineSplitter
from carillon.messages import Outcome
from carillon.problems import Problem, problem, problem_document, problem_of
from serve.http import BEHIND_SERVE, PATIENT, ClientGoneError, Request, Response, json_response
from serve.limits import admit_patiently
from serve.routes.bodies import known_query
from serve.routes.broadcasts import to_topic
from serve.routes.events import parse_events, publish_some
from serve.routes.outcomes import outcome_problem
from serve.routing import SERVICE, Query, Route
from serve.schemas import WHOLE, obj, ref
from serve.services import Services

log = logging.getLogger(__name__)

MAX_KEY: Final = 200
_KEY: Final = Text(1, MAX_KEY)
UNBUFFERED: Final = b"x-request-disconnect-disabled"
"""Header, `?1`: Serve hands the body on as it is read."""
_AGAIN: Final = frozenset({"busy", "unavailable", "store_unavailable"})
"""Failures that pass: the events are sent again, and nothing more is read meanwhile."""
_encode: Final = msgspec.json.Encoder().encode
_any: Final = msgspec.json.Decoder(msgspec.Raw).decode
_object: Final = msgspec.json.Decoder(dict[str, Any]).decode
_value: Final = msgspec.json.Decoder(Any).decode


class _Import:
    """One import under way."""

    def __init__(self, services: Services, request: Request, key: str | None) -> None:
        self.services = services
        self.request = request
        self.settings = services.settings.ingress
        self.key = key
        self.lines = 0
        self.failed = 0
        self.replayed = 0
        self.statuses: dict[str, int] = {}
        self.failures: list[tuple[int, Problem, str | None]] = []
        self._fresh: list[tuple[int, Problem, str | None]] = []

    def fail(self, line: int, told: Problem, user: str | None = None) -> None:
        self.failed += 1
        self._fresh.append((line, told, user))

    def answer(self, *, complete: bool, read: int) -> Response:
        request_id = self.request.request_id.decode()
        headers = () if complete else ((b"connection", b"close"),)
        return json_response(
            {
                "complete": complete,
                "lines": read,
                "events": self.lines,
                "accepted": sum(self.statuses.values()),
                "replayed": self.replayed,
                "failed": self.failed,
                "statuses": self.statuses,
                "failures": [
                    {
                        "line": line,
                        **({} if user is None else {"userId": user}),
                        "error": problem_document(told, request_id),
                    }
                    for line, told, user in self.failures
                ],
            },
            200,
            headers,
        )

    async def run(self, batch: list[tuple[int, bytes]]) -> None:
        """Store the events of some lines, and keep the first failures in the order of the lines."""
        await self.store(batch)
        fresh, self._fresh = self._fresh, []
        room = self.settings.import_failures - len(self.failures)
        self.failures += sorted(fresh, key=lambda one: one[0])[: max(0, room)]

    async def store(self, batch: list[tuple[int, bytes]]) -> None:
        """Store the events of some lines; what becomes of each is counted."""
        self.lines += len(batch)
        good: list[tuple[int, bytes]] = []
        for number, line in batch:
            told = self._unreadable(line)
            if told is not None:
                self.fail(number, told)
                continue
            line = self._keyed(number, line)
            if _for_many(line):
                await self._store_plain(good)  # a user's events are stored in the order of the lines
                good = []
                await self._store_one(number, line)
            else:
                good.append((number, line))
        await self._store_plain(good)

    async def _store_one(self, number: int, line: bytes) -> None:
        """Store a line that is for several users, or for a topic."""
        try:
            parsed = await parse_events(self.services, line, None, self.request.tenant, self._deadline())
        except NotPlainError as wanted:
            await self._to_topic(number, wanted.document)
            return
        except CarillonError as exc:
            self.fail(number, exc.problem if isinstance(exc, ProblemError) else problem_of(exc))
            return
        slots = parsed.slots or ()
        self.lines += len(slots) - 1
        try:
            await self._publish(parsed, [number] * len(slots))
        except CarillonError as exc:
            for slot in slots:
                self.fail(number, problem_of(exc), slot.user)

    async def _to_topic(self, number: int, document: dict[str, Any]) -> None:
        caller = self.request.caller
        limits = () if caller is None else caller.limits
        try:
            if limits:
                await admit_patiently(self.services, limits, 1)
            answer = await to_topic(self.services, document, self.request.tenant, None, self._deadline(), ())
        except CarillonError as exc:
            self.fail(number, exc.problem if isinstance(exc, ProblemError) else problem_of(exc))
        else:
            self.replayed += bool(answer.headers)
            self.statuses["broadcast"] = self.statuses.get("broadcast", 0) + 1

    async def _store_plain(self, good: list[tuple[int, bytes]]) -> None:
        if not good:
            return
        deadline = self._deadline()
        services, tenant = self.services, self.request.tenant
        try:
            body = b"[" + b",".join(line for _, line in good) + b"]"
            parsed = await parse_events(services, body, None, tenant, deadline)
        except ProblemError as exc:
            if len(good) == 1:
                self.fail(good[0][0], exc.problem)
                return
            for one in good:  # what is wrong with one of them is no reason to refuse the others
                await self._store_plain([one])
            return
        except CarillonError as exc:
            self._fail_all(good, exc)
            return
        try:
            await self._publish(parsed, [number for number, _ in good])
        except CarillonError as exc:
            self._fail_all(good, exc)

    def _fail_all(self, lines: list[tuple[int, bytes]], error: CarillonError) -> None:
        for number, _ in lines:
            self.fail(number, problem_of(error))

    async def _publish(self, parsed: ParsedEvents, numbers: list[int]) -> None:
        assert parsed.slots is not None
        services, tenant = self.services, self.request.tenant
        if parsed.variants:
            await services.templates.note_variants(tenant, parsed)
        caller = self.request.caller
        if caller is not None and caller.limits and parsed.events:
            await admit_patiently(services, caller.limits, len(parsed.events))
        patience = services.clock.monotonic() + self.settings.import_patience_s
        outcomes: list[Outcome] = []
        if parsed.later:
            outcomes = await publish_some(services, parsed, tenant, self._deadline())
        elif parsed.events:
            outcomes = await services.backend.publish(parsed.events, self._deadline())
            while True:
                again = [
                    at for at, one in enumerate(outcomes) if one.status == "failed" and one.code in _AGAIN
                ]
                if not again or services.clock.monotonic() >= patience:
                    break
                await asyncio.sleep(max(0.05, *(outcomes[at].retry_after_s for at in again)))
                for at in again:
                    parsed.events[at].retry = True
                told = await services.backend.publish([parsed.events[at] for at in again], self._deadline())
                for at, one in zip(again, told, strict=True):
                    outcomes[at] = one
        for number, slot in zip(numbers, parsed.slots, strict=True):
            refusal = slot.refused if slot.event < 0 else outcome_problem(outcomes[slot.event])
            if refusal is not None:
                self.fail(number, refusal, slot.user)
                continue
            outcome = outcomes[slot.event]
            self.replayed += outcome.replayed
            self.statuses[outcome.status] = self.statuses.get(outcome.status, 0) + 1

    def _deadline(self) -> float:
        return self.services.clock.monotonic() + self.settings.request_timeout_s

    def _unreadable(self, line: bytes) -> Problem | None:
        if line == TOO_LONG:
            return problem("too_large", f"expected a line of at most {self.settings.import_line_bytes} bytes")
        try:
            line.decode()
            _any(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            return problem("malformed", f"the line is not JSON: {exc}")
        return None

    def _keyed(self, number: int, line: bytes) -> bytes:
        """The line with the key that the header gives it, unless it has one."""
        if self.key is None or line[:1] != b"{" or line == b"{}":
            return line
        if b'"idempotencyKey"' in line and _object(line).get("idempotencyKey") is not None:
            return line
        return line[:-1] + b',"idempotencyKey":' + _encode(f"{self.key}#{number}") + b"}"


def _for_many(line: bytes) -> bool:
    """Whether a readable line names several users, or a topic."""
    if b'"userIds"' not in line and b'"topic"' not in line:
        return False
    document = _value(line)
    return isinstance(document, dict) and (
        document.get("userIds") is not None or document.get("topic") is not None  # pyright: ignore[reportUnknownMemberType]
    )


def _check_door(request: Request, limit: int) -> None:
    """Refuse what Serve would read into memory whole, however long it is."""
    if BEHIND_SERVE not in request.scope or request.header(UNBUFFERED) == b"?1":
        return
    length = request.header(b"content-length") or b""
    if not length.isdigit() or int(length[:18]) > limit:
        told = (
            f"through this door an import of more than {limit} bytes, or of unknown length, needs the header "
            "X-Request-Disconnect-Disabled: ?1"
        )
        raise ProblemError(problem("too_large", told, headers=(("Connection", "close"),)))


async def import_events(services: Services, request: Request) -> Response:
    """POST /v1/events/import."""
    known_query(request)
    raw = request.header(b"idempotency-key")
    key = None if raw is None else raw.decode("utf-8", "replace")
    wrong = None if key is None else text_error("Idempotency-Key", key, _KEY)
    if wrong is not None:
        raise refused(f"expected Idempotency-Key to be {wrong.expected}, got {wrong.got}", [wrong])
    settings = services.settings.ingress
    _check_door(request, settings.max_request_bytes)
    request.scope[PATIENT] = True  # the door lets it take its time; here every piece has to come in time
    one = _Import(services, request, key)
    lines = LineSplitter(settings.import_line_bytes)
    waiting: list[tuple[int, bytes]] = []
    sent: asyncio.Task[None] | None = None
    complete = True

    async def store(batch: list[tuple[int, bytes]]) -> asyncio.Task[None]:
        if sent is not None:
            await sent
        return asyncio.ensure_future(one.run(batch))

    try:
        async for piece in _pieces(request, settings.peer_timeout_s):
            if piece is None or services.draining:
                complete = False
                break
            waiting += lines.feed(piece)
            while len(waiting) >= settings.import_batch:
                batch, waiting = waiting[: settings.import_batch], waiting[settings.import_batch :]
                sent = await store(batch)
        if complete:
            waiting += lines.finish()
        while waiting:
            batch, waiting = waiting[: settings.import_batch], waiting[settings.import_batch :]
            sent = await store(batch)
        if sent is not None:
            await sent
    except ClientGoneError:
        log.info("an import of %s ended after line %d: its sender hung up", request.tenant, lines.number)
        raise
    finally:
        if sent is not None:
            # What is on its way is stored or not; nobody is left to be told of a failure.
            await asyncio.gather(sent, return_exceptions=True)
    return one.answer(complete=complete, read=lines.number)


async def _pieces(request: Request, patience_s: float) -> AsyncGenerator[bytes | None]:
    """The body as it comes; None: nothing came for so long."""
    pieces = request.pieces()
    while True:
        try:
            async with asyncio.timeout(patience_s):
                piece = await anext(pieces, None)
        except TimeoutError:
            yield None
            return
        if piece is None:
            return
        yield piece


_ANSWER: Final = obj(
    {
        "complete": {"type": "boolean"}, "lines": WHOLE, "events": WHOLE, "accepted": WHOLE,
        "replayed": WHOLE, "failed": WHOLE, "statuses": {"type": "object", "additionalProperties": WHOLE},
        "failures": {
            "type": "array",
            "items": obj(
                {"line": WHOLE, "userId": {"type": "string"}, "error": ref("Problem")}, ["line", "error"]
            ),
        },
    },
    ["complete", "lines", "events", "accepted", "replayed", "failed", "statuses", "failures"],
)  # fmt: skip

ROUTES: Final = (
    Route(
        "POST", "/v1/events/import", import_events, SERVICE, "Send a stream of events", scope="events:write",
        doc="Body: lines of JSON (application/x-ndjson), each an event as POST /v1/events takes it (with "
        "`userIds`: one for each), of any number. Read as fast as they are stored. A line that fails does "
        "not fail the others; the first `ingress.import_failures` are told. By Serve's route a body beyond "
        "`ingress.max_request_bytes` needs the header below.",
        headers=(
            Query(
                "Idempotency-Key",
                {"type": "string", "minLength": 1, "maxLength": MAX_KEY, "pattern": "^[!-~]+$"},
                "A line without `idempotencyKey` gets `<key>#<line number>`: the file may be sent again.",
            ),
            Query(
                "X-Request-Disconnect-Disabled",
                {"enum": ["?1"]},
                "Has Serve's route hand the body on as it is stored, instead of reading all of it first.",
            ),
        ),
        answer=_ANSWER,
        answer_example={
            "complete": True, "lines": 3, "events": 3, "accepted": 2, "replayed": 0, "failed": 1,
            "statuses": {"stored": 2},
            "failures": [
                {
                    "line": 2,
                    "error": {
                        "type": "urn:carillon:problem:malformed", "title": "The request is not readable",
                        "status": 400, "detail": "the line is not JSON", "code": "malformed",
                        "temporary": False, "requestId": "1", "errors": [],
                    },
                }
            ],
        },
        problems=(413, 422, 429), tag="Events",
    ),
)  # fmt: skip
