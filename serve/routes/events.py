"""`POST /v1/events`."""

from __future__ import annotations

from typing import Final

import msgspec

from carillon.clock import rfc3339
from carillon.events import NotPlainError, refused, topic_of
from carillon.events import Request as ParsedEvents
from carillon.ids import uuid_text
from carillon.messages import Outcome
from carillon.problems import FieldError, problem_document, shown
from serve.http import JSON, Header, Request, Response, problem_response
from serve.limits import Limits, admit_events
from serve.routes.broadcasts import to_topic
from serve.routes.dry_run import preview, preview_topic
from serve.routes.outcomes import outcome_problem, too_late
from serve.routing import SERVICE, Query, Route
from serve.schemas import UUID, obj, ref
from serve.services import Services
from stores.postgres.schedules import NewSchedule

_encode: Final = msgspec.json.Encoder().encode
_REPLAYED: Final[Header] = (b"idempotent-replayed", b"true")
_CHANNELS: Final[dict[tuple[str, ...], str]] = {}


async def post_events(services: Services, request: Request) -> Response:
    """One event, an event for many, or a batch."""
    dry = request.query().get("dryRun", "false")
    if dry not in ("true", "false"):
        expected = FieldError("dryRun", "true or false", shown(dry))
        raise refused(f"expected dryRun to be true or false, got {shown(dry)}", [expected])
    body = await request.body()
    key = request.header(b"idempotency-key")
    answer = dry_run if dry == "true" else publish
    limits = () if request.caller is None else request.caller.limits
    return await answer(services, body, key, request.tenant, request.deadline, request.request_id, limits)


async def dry_run(
    services: Services,
    body: bytes,
    key: bytes | None,
    tenant: str,
    deadline: float,
    request_id: bytes,
    limits: Limits = (),
) -> Response:
    """What `publish` would do, and why; nothing is stored or sent."""
    try:
        parsed = await parse_events(services, body, key, tenant, deadline, limits)
    except NotPlainError as wanted:
        text_key = None if key is None else key.decode("utf-8", "replace")

        async def parse(many: bytes) -> ParsedEvents:
            return await parse_events(services, many, None, tenant, deadline)

        return await preview_topic(services, wanted.document, tenant, text_key, deadline, limits, parse)
    return await preview(services, parsed, tenant, deadline, request_id)


async def parse_events(
    services: Services, body: bytes, key: bytes | None, tenant: str, deadline: float, limits: Limits = ()
) -> ParsedEvents:
    """Read a body whose events the limits let pass. Raises ProblemError: it is refused as a whole."""
    text_key = None if key is None else key.decode("utf-8", "replace")
    try:
        parsed = services.parser.parse(body, tenant, services.clock.now_ms(), text_key)
    except NotPlainError as wanted:
        if topic_of(wanted.document) is not None:
            raise
        prepared = await services.templates.prepare(wanted.document, tenant, deadline)
        parsed = services.parser.parse_prepared(
            wanted.document, prepared, tenant, services.clock.now_ms(), text_key
        )
    if limits and parsed.events:
        return await admit_events(services, limits, parsed)
    return parsed


async def publish(
    services: Services,
    body: bytes,
    key: bytes | None,
    tenant: str,
    deadline: float,
    request_id: bytes,
    limits: Limits = (),
) -> Response:
    """Validate, publish and answer. The hot route calls this without a `Request`.

    Args:
        limits: those of the API key and the tenant; empty: there are none.

    Raises:
        ProblemError: the request as a whole is refused.
    """
    try:
        parsed = await parse_events(services, body, key, tenant, deadline, limits)
    except NotPlainError as wanted:
        text_key = None if key is None else key.decode("utf-8", "replace")
        return await to_topic(services, wanted.document, tenant, text_key, deadline, limits)
    if parsed.variants:
        await services.templates.note_variants(tenant, parsed)
    if parsed.later or parsed.beyond:
        outcomes = await publish_some(services, parsed, tenant, deadline)
    else:
        outcomes = await services.backend.publish(parsed.events, deadline) if parsed.events else []
    if parsed.slots is None:
        outcome = outcomes[0]
        told = outcome_problem(outcome)
        if told is not None:
            return problem_response(told, request_id)
        headers = (_REPLAYED,) if outcome.replayed else ()
        return Response(f"{{{_result(outcome)}}}".encode(), 202, JSON, headers)
    return _many(parsed, outcomes, request_id)


async def publish_some(
    services: Services, parsed: ParsedEvents, tenant: str, deadline: float
) -> list[Outcome]:
    """Publish what is to be sent now, keep what is scheduled, refuse what a limit refused; one outcome each,
    in order."""
    outcomes: dict[int, Outcome] = dict(parsed.beyond)
    rows: dict[int, NewSchedule] = {}
    for index, later in parsed.later.items():
        if index in outcomes:
            continue
        event = parsed.events[index]
        late = too_late(services, event, later)
        if late is not None:
            outcomes[index] = late
            continue
        rule = _encode({"at": rfc3339(later.due_ms)}).decode()
        rows[index] = NewSchedule(
            event.id, event.slot, event.user, rule, later.body, True, later.due_ms, later.due_ms,
            key=event.idempotency_key, body_hash=event.body_hash,
        )  # fmt: skip
    kept = await services.schedules.add(tenant, list(rows.values())) if rows else []
    for index, told_ in zip(rows, kept, strict=True):
        if told_ is None:
            outcomes[index] = Outcome(parsed.events[index].id, status="failed", code="idempotency_conflict")
        else:
            outcomes[index] = Outcome(told_[0], status="deferred", replayed=told_[1])
    now = [
        event
        for index, event in enumerate(parsed.events)
        if index not in parsed.later and index not in outcomes
    ]
    sent = iter(await services.backend.publish(now, deadline) if now else ())
    return [outcomes[i] if i in outcomes else next(sent) for i in range(len(parsed.events))]


def _many(parsed: ParsedEvents, outcomes: list[Outcome], request_id: bytes) -> Response:
    problems = [outcome_problem(outcome) for outcome in outcomes]
    failed = [told for told in problems if told is not None]
    if failed and len(failed) == len(outcomes) and all(told.status in (429, 503) for told in failed):
        # Nothing was stored and all of it may be tried again: said once, where clients look for it.
        return problem_response(failed[0], request_id)
    assert parsed.slots is not None
    parts: list[str] = []
    for slot in parsed.slots:
        user = "" if slot.user is None else f'"userId":{_encode(slot.user).decode()},'
        told = slot.refused if slot.event < 0 else problems[slot.event]
        if told is not None:
            text = _encode(problem_document(told, request_id.decode())).decode()
            parts.append(f'{{{user}"error":{text}}}')
        else:
            parts.append(f"{{{user}{_result(outcomes[slot.event])}}}")
    replayed = bool(outcomes) and all(outcome.replayed for outcome in outcomes)
    return Response(
        f'{{"results":[{",".join(parts)}]}}'.encode(), 202, JSON, (_REPLAYED,) if replayed else ()
    )


def _result(outcome: Outcome) -> str:
    key = tuple(outcome.channels)
    channels = _CHANNELS.get(key)
    if channels is None:
        channels = _encode(outcome.channels).decode()
        if len(_CHANNELS) < 100:
            _CHANNELS[key] = channels
    reason = "" if outcome.reason is None else f',"reason":{_encode(outcome.reason).decode()}'
    return (
        f'"id":"{uuid_text(outcome.id)}","seq":{outcome.seq},"status":"{outcome.status}",'
        f'"channels":{channels}{reason}'
    )


_EVENT = {
    "userId": "ada",
    "type": "comment.reply",
    "title": "Grace replied to you",
    "body": "I think so, too.",
    "priority": "high",
    "actorId": "grace",
    "targetType": "thread",
    "targetId": "42",
    "link": "https://example.com/threads/42",
    "data": {"threadId": 42},
}

ROUTES: Final = (
    Route(
        "POST",
        "/v1/events",
        post_events,
        SERVICE,
        "Send an event",
        scope="events:write",
        doc=(
            "An object is one event (with `userIds`: for up to 1,000 users), an array a batch of so many. "
            "Answered after the commit. One bad item of a batch does not fail the others: it is "
            '`{"error": problem}`.'
        ),
        query=(
            Query(
                "dryRun",
                {"enum": ["true", "false"]},
                "true: nothing is stored; 200 with the plan of each event and the rules behind it.",
            ),
        ),
        headers=(
            Query(
                "Idempotency-Key",
                {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
                "The same key and body within 24 h: the same answer, one effect. On a batch it means "
                "`<key>#<index>`, with `userIds` `<key>#<userId>`.",
            ),
        ),
        body={
            "anyOf": [
                ref("Event"),
                ref("EventToMany"),
                {"type": "array", "maxItems": 1000, "items": ref("Event")},
            ]
        },
        body_example=_EVENT,
        status=202,
        answer={
            "anyOf": [ref("EventResult"), ref("EventResults"), obj({"broadcastId": UUID}, ["broadcastId"])]
        },
        other_answers={
            200: ("With dryRun: the plan", {"anyOf": [ref("Plan"), ref("Plans"), ref("TopicPlan")]})
        },
        answer_example={
            "id": "0198c0de-7000-7000-8000-000000000001",
            "seq": 17,
            "status": "delivered",
            "channels": ["in_app", "push"],
        },
        problems=(400, 409, 413, 422, 429),
        tag="Events",
        counts=True,
    ),
)
