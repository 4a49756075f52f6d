"""Schedules: events that are sent later, once or by a rule."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any, Final

import msgspec

from carillon.clock import rfc3339
from carillon.errors import IdempotencyConflictError, NotFoundError
from carillon.event_rules import MAX_KEY, Text, explain_event, is_object, text_error
from carillon.events import ProblemError
from carillon.ids import Uuid7Source, parse_uuid, slot_of, uuid_text
from carillon.limits import URGENT_WORDS
from carillon.problems import FieldError, Problem, problem, shown
from carillon.quiet_hours import known_zone
from carillon.schedules import MEMBERS, USER_ZONE, ScheduleError, look_ms, next_ms, parse
from serve.audit import audited
from serve.http import Header, Request, Response, json_response, whole_number
from serve.limits import admit
from serve.routes.bodies import id_cursor, known_query, known_state, valid_id, wrong
from serve.routing import SERVICE, Query, Route, paging
from serve.schemas import INSTANT, USER_ID, UUID, WHOLE, nullable, obj, ref
from serve.services import Services
from stores.postgres.schedules import NewSchedule, ScheduleRecord

MAX_LIMIT: Final = 100
DEFAULT_LIMIT: Final = 20
STATES: Final = ("active", "done", "cancelled", "failed")
_REPLAYED: Final[Header] = (b"idempotent-replayed", b"true")
_ids = Uuid7Source()
_encode_sorted = msgspec.json.Encoder(order="sorted").encode


def schedule_json(one: ScheduleRecord) -> dict[str, Any]:
    """A schedule as it is told."""
    return {
        "scheduleId": uuid_text(one.id),
        "state": one.state,
        "userId": one.user,
        **msgspec.json.decode(one.rule),
        "event": msgspec.Raw(one.event.encode()),
        "nextAt": rfc3339(one.next_ms) if one.state == "active" else None,
        "firedAt": None if one.fired_ms is None else rfc3339(one.fired_ms),
        "fired": one.fired,
        "missed": one.missed,
        "result": one.result,
        "createdAt": rfc3339(one.created_ms),
    }


async def post_schedule(services: Services, request: Request) -> Response:
    """POST /v1/schedules."""
    body = await request.json_object((*MEMBERS, "event"))
    event = await _event(services, request, body.get("event"))
    users = event.get("userIds") or [event.get("userId")]
    user = event.get("userId")
    rule = {name: body[name] for name in MEMBERS if body.get(name) is not None}
    now_ms = services.clock.now_ms()
    zone = "UTC"
    try:
        when = parse(rule)
        if when.zone == USER_ZONE:
            if user is None:
                raise wrong([FieldError("timezone", "a zone: event has several recipients", "user")])
            found = await services.schedules.zone(request.tenant, user)
            zone = found if found is not None and known_zone(found) else "UTC"
        if when.recurring:
            times = await services.templates.renderer.occurrences(rule, now_ms, zone, request.deadline)
        else:
            at_ms = next_ms(when, now_ms, zone)
            times = [] if at_ms is None else [at_ms]
    except ScheduleError as exc:
        raise ProblemError(problem("invalid", str(exc), exc.errors)) from None
    name = next(iter(n for n in ("rrule", "cron", "localAt", "at") if n in rule))
    if not times:
        raise wrong([FieldError(name, "a time to come", shown(rule[name]))])
    least_s = services.settings.schedule.min_interval_s
    apart_s = min((b - a for a, b in itertools.pairwise(times)), default=1 << 60) / 1000
    if apart_s < least_s:
        raise wrong([FieldError(name, f"at least {least_s:g} s between two times", f"{apart_s:g} s")])
    key, body_hash = _key(request, rule, event)
    if request.caller is not None and request.caller.limits:
        urgent = event.get("priority") in URGENT_WORDS
        # Once: later rounds come from the shards.
        await admit(services, request.caller.limits, len(users), urgent=urgent)
    row_id = _ids.next(now_ms)
    row = NewSchedule(
        row_id, slot_of(request.tenant, user if user is not None else uuid_text(row_id)), user,
        msgspec.json.encode(rule).decode(), msgspec.json.encode(event).decode(), False, times[0],
        look_ms(when, times[0], now_ms, services.settings.schedule.zone_recheck_s), zone, key, body_hash,
    )  # fmt: skip
    try:
        kept, replayed = await services.schedules.add_one(request.tenant, row)
    except IdempotencyConflictError:
        told = "the idempotency key was used with another body"
        raise ProblemError(problem("idempotency_conflict", told)) from None
    if not replayed:
        await audited(services, request, "schedule.create", uuid_text(kept), recipients=len(users))
    record = await services.schedules.get(request.tenant, kept)
    if record is None:
        raise _unknown(uuid_text(kept))
    return json_response(schedule_json(record), 201, (_REPLAYED,) if replayed else ())


async def _event(services: Services, request: Request, event: Any) -> dict[str, Any]:
    """The event of a schedule, if it could be sent now."""
    if not is_object(event):
        raise wrong([FieldError("event", "an event, as POST /v1/events takes it", shown(event))])
    refusal = explain_event(event, recipients=True)
    errors = [] if refusal is None else [e._replace(path=f"event/{e.path}") for e in refusal.errors]
    for name in ("scheduleAt", "idempotencyKey"):
        if event.get(name) is not None:
            errors.append(FieldError(f"event/{name}", "absent", shown(event[name])))
    many = event.get("userIds")
    if many is not None and not 1 <= len(many) <= 1000:
        errors.append(FieldError("event/userIds", "1 to 1000 recipients", f"{len(many)} recipients"))
    if errors:
        code = "invalid" if refusal is None else refusal.code
        first = errors[0]
        detail = f"expected {first.path} to be {first.expected}, got {first.got}"
        raise ProblemError(problem(code, detail, errors))
    if len(msgspec.json.encode({k: v for k, v in event.items() if k != "userIds"})) > 32 * 1024:
        raise wrong([FieldError("event", "an event of at most 32768 bytes", "more")])
    if event.get("template") is not None:
        prepared = await services.templates.prepare(event, request.tenant, request.deadline)
        told = prepared.get(0)
        if isinstance(told, Problem):
            raise ProblemError(told)
    return {name: value for name, value in event.items() if value is not None}


def _key(request: Request, *parts: Any) -> tuple[str | None, bytes | None]:
    raw = request.header(b"idempotency-key")
    if raw is None:
        return None, None
    key = raw.decode("utf-8", "replace")
    error = text_error("Idempotency-Key", key, Text(1, MAX_KEY))
    if error is not None:
        raise wrong([error])
    return f"schedules:{key}", hashlib.sha256(_encode_sorted(parts)).digest()


def _unknown(name: str) -> NotFoundError:
    return NotFoundError("there is no such schedule", "scheduleId", "the id of a schedule", shown(name))


def _path(request: Request) -> bytes:
    raw = parse_uuid(request.params["scheduleId"])
    if raw is None:
        raise _unknown(request.params["scheduleId"])
    return raw


async def get_schedule(services: Services, request: Request) -> Response:
    """GET /v1/schedules/{scheduleId}."""
    record = await services.schedules.get(request.tenant, _path(request))
    if record is None:
        raise _unknown(request.params["scheduleId"])
    return json_response(schedule_json(record))


async def delete_schedule(services: Services, request: Request) -> Response:
    """DELETE /v1/schedules/{scheduleId}."""
    schedule = _path(request)
    cancelled = await services.schedules.cancel(request.tenant, schedule, services.clock.now_ms())
    record = await services.schedules.get(request.tenant, schedule)
    if record is None:
        raise _unknown(request.params["scheduleId"])
    if cancelled:
        await audited(services, request, "schedule.cancel", uuid_text(schedule))
    return json_response(schedule_json(record))


async def list_schedules(services: Services, request: Request) -> Response:
    """GET /v1/schedules."""
    query = known_query(request, "limit", "cursor", "userId", "state")
    limit = whole_number(query, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
    state = known_state(query, STATES)
    user = valid_id("userId", query["userId"]) if "userId" in query else None
    found = await services.schedules.page(request.tenant, user, state, id_cursor(query), limit)
    return json_response(
        {
            "schedules": [schedule_json(one) for one in found],
            "nextCursor": uuid_text(found[-1].id) if len(found) == limit else None,
        }
    )


_RULE: Final = {
    "at": {**INSTANT, "description": "Once, at this time."},
    "localAt": {
        "type": "string",
        "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d)?$",
        "description": "Once, at this local time; with rrule the first one.",
    },
    "rrule": {"type": "string", "maxLength": 500, "description": "A rule of RFC 5545, with localAt."},
    "cron": {"type": "string", "maxLength": 500, "description": "Five fields."},
    "timezone": {"type": "string", "description": "`user`, or an IANA name; UTC if absent."},
}
_EXAMPLE: Final = {
    "localAt": "2026-12-07T09:00:00",
    "rrule": "FREQ=WEEKLY;BYDAY=MO",
    "timezone": "user",
    "event": {"userId": "ada", "type": "report.weekly", "title": "Your week"},
}
_NULLABLE_TEXT: Final = {"type": ["string", "null"]}
_NULLABLE_INSTANT: Final = {"anyOf": [INSTANT, {"type": "null"}]}
_SCHEDULE: Final = obj(
    {
        "scheduleId": UUID, "state": {"enum": list(STATES)}, "userId": _NULLABLE_TEXT,
        **{name: {"type": "string"} for name in MEMBERS}, "event": {"type": "object"},
        "nextAt": _NULLABLE_INSTANT, "firedAt": _NULLABLE_INSTANT, "fired": WHOLE, "missed": WHOLE,
        "result": _NULLABLE_TEXT, "createdAt": INSTANT,
    },
    ["scheduleId", "state", "userId", "event", "nextAt", "firedAt", "fired", "missed", "result", "createdAt"],
)  # fmt: skip
_TOLD: Final = {
    "scheduleId": "0198c0de-7000-7000-8000-000000000001",
    "state": "active",
    "userId": "ada",
    **_EXAMPLE,
    "nextAt": "2026-12-07T08:00:00.000Z",
    "firedAt": None,
    "fired": 0,
    "missed": 0,
    "result": None,
    "createdAt": "2026-12-01T12:00:00.000Z",
}
_TAG: Final = "Schedules"
_SCOPE: Final = "events:write"

ROUTES: Final = (
    Route(
        "POST", "/v1/schedules", post_schedule, SERVICE, "Send an event later, once or by a rule",
        scope=_SCOPE,
        doc="One of `at`, `localAt` (with or without `rrule`) and `cron`. The event is checked now and its "
        "template rendered then.",
        headers=(
            Query(
                "Idempotency-Key",
                {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
                "The same key and body: the same schedule, as long as it is kept.",
            ),
        ),
        body=obj({**nullable(_RULE), "event": {"anyOf": [ref("Event"), ref("EventToMany")]}}, ["event"]),
        body_example=_EXAMPLE, status=201, answer=_SCHEDULE, answer_example=_TOLD,
        problems=(400, 413, 422, 429), tag=_TAG, counts=True,
    ),
    Route(
        "GET", "/v1/schedules", list_schedules, SERVICE, "List schedules", scope=_SCOPE, doc="Newest first.",
        query=(
            *paging(DEFAULT_LIMIT, MAX_LIMIT),
            Query("userId", USER_ID, "Only for this user."),
            Query("state", {"enum": list(STATES)}, "Only in this state."),
        ),
        answer=obj(
            {"schedules": {"type": "array", "items": _SCHEDULE}, "nextCursor": _NULLABLE_TEXT},
            ["schedules", "nextCursor"],
        ),
        answer_example={"schedules": [_TOLD], "nextCursor": None}, problems=(400, 422), tag=_TAG,
    ),
    Route(
        "GET", "/v1/schedules/{scheduleId}", get_schedule, SERVICE, "Read a schedule", scope=_SCOPE,
        answer=_SCHEDULE, problems=(404,), tag=_TAG,
    ),
    Route(
        "DELETE", "/v1/schedules/{scheduleId}", delete_schedule, SERVICE, "Cancel a schedule", scope=_SCOPE,
        doc="Answers what it is then: one that has ended stays as it was.", answer=_SCHEDULE, problems=(404,),
        tag=_TAG,
    ),
)  # fmt: skip
