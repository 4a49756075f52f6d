"""Broadcasts: one event to many users, its progress, and what can be done about it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from carillon.audience import AudienceError
from carillon.broadcasts import (
    ACTIONS,
    ENDED,
    RUNNING,
    SCHEDULED,
    STATES,
    Recipients,
    after,
    parse_recipients,
    progress,
)
from carillon.clock import rfc3339
from carillon.errors import IdempotencyConflictError, NotFoundError
from carillon.event_rules import (
    MAX_EVENT_BYTES,
    MAX_ITEMS,
    MAX_KEY,
    Instant,
    Text,
    expiry_ms,
    explain_event,
    is_object,
    text_error,
)
from carillon.events import ProblemError
from carillon.ids import Uuid7Source, parse_uuid, uuid_text
from carillon.limits import URGENT_WORDS
from carillon.problems import FieldError, Problem, problem, shown
from serve.audit import audited
from serve.http import Header, Request, Response, json_response, whole_number
from serve.limits import Limits, admit
from serve.routes.bodies import id_cursor, known_query, known_state, wrong
from serve.routing import SERVICE, Query, Route, paging
from serve.schemas import INSTANT, USER_ID, UUID, WHOLE, nullable, obj, text
from serve.services import Services
from stores.postgres.broadcasts import BroadcastRecord, NewBroadcast, TooManyError

MAX_LIMIT: Final = 100
DEFAULT_LIMIT: Final = 20
MEMBERS: Final = ("audience", "event", "scheduleAt", "idempotencyKey")
_REPLAYED: Final[Header] = (b"idempotent-replayed", b"true")
_ids = Uuid7Source()
_encode_sorted = msgspec.json.Encoder(order="sorted").encode


def broadcast_json(one: BroadcastRecord, now_ms: int) -> dict[str, Any]:
    """A broadcast as it is told."""
    ran_ms = one.ran_ms + (0 if one.resumed_ms is None else max(0, now_ms - one.resumed_ms))
    told = progress(one.state, one.counts, one.total, ran_ms)
    return {
        "broadcastId": uuid_text(one.id),
        "state": one.state,
        "reason": one.reason,
        "audience": msgspec.Raw(one.audience.encode()),
        "event": msgspec.Raw(one.event.encode()),
        "counts": one.counts._asdict(),
        "users": {"done": told.done, "total": told.total},
        "ratePerS": None if told.rate_per_s is None else round(told.rate_per_s, 1),
        "remainingS": None if told.remaining_s is None else round(told.remaining_s, 1),
        "startAt": rfc3339(one.start_ms),
        "startedAt": None if one.started_ms is None else rfc3339(one.started_ms),
        "endedAt": None if one.ended_ms is None else rfc3339(one.ended_ms),
        "createdAt": rfc3339(one.created_ms),
    }


async def post_broadcast(services: Services, request: Request) -> Response:
    """POST /v1/broadcasts."""
    body = await request.json_object(MEMBERS)
    header = request.header(b"idempotency-key")
    key = body.get("idempotencyKey")
    if key is None and header is not None:
        key = header.decode("utf-8", "replace")
    made, replayed = await start(
        services,
        request.tenant,
        body.get("audience"),
        body.get("event"),
        body.get("scheduleAt"),
        key,
        request.deadline,
        () if request.caller is None else request.caller.limits,
    )
    if not replayed:
        await audited(services, request, "broadcast.create", uuid_text(made))
    record = await _record(services, request, made)
    answer = broadcast_json(record, services.clock.now_ms())
    return json_response(answer, 202, (_REPLAYED,) if replayed else ())


async def start(
    services: Services,
    tenant: str,
    audience: Any,
    event: Any,
    at: Any,
    key: Any,
    deadline: float,
    limits: Limits,
) -> tuple[bytes, bool]:
    """Check and keep a broadcast: its id, and whether it was there already.

    Raises:
        ProblemError: it is refused.
    """
    new = await checked(services, tenant, audience, event, at, key, deadline, limits)
    return await _keep(services, tenant, new)


async def checked(
    services: Services,
    tenant: str,
    audience: Any,
    event: Any,
    at: Any,
    key: Any,
    deadline: float,
    limits: Limits,
    where: str = "event/",
) -> NewBroadcast:
    """A broadcast that is to be kept, or looked at.

    Args:
        audience, event, at, key: as the caller gave them.
        limits: those of the API key and the tenant. A list counts as many events as it has users; of another
            audience nobody knows how many it has, and it counts as one.
        where: what stands before the members of the event in errors.

    Raises:
        ProblemError: it is refused.
    """
    now_ms = services.clock.now_ms()
    recipients = await _recipients(services, tenant, audience)
    content = await _event(services, tenant, event, deadline, where)
    start_ms = now_ms if at is None else _start(services, at, now_ms)
    body_hash = None
    if key is not None:
        error = text_error("idempotencyKey", key, Text(1, MAX_KEY))
        if error is not None:
            raise wrong([error])
        body_hash = hashlib.sha256(_encode_sorted([recipients.json(), content, at])).digest()
    if limits:
        urgent = content.get("priority") in URGENT_WORDS
        await admit(services, limits, len(recipients.users) or 1, urgent=urgent)
    return NewBroadcast(
        _ids.next(now_ms), recipients, msgspec.json.encode(content).decode(),
        SCHEDULED if start_ms > now_ms else RUNNING, max(start_ms, now_ms),
        None if key is None else f"broadcasts:{key}", body_hash,
    )  # fmt: skip


async def _keep(services: Services, tenant: str, new: NewBroadcast) -> tuple[bytes, bool]:
    with _told(services, new):
        return await services.broadcasts.add(tenant, new, services.clock.now_ms(), _most(services, new))


async def refusal(services: Services, tenant: str, new: NewBroadcast) -> bytes | None:
    """The broadcast that stands for the key of a new one, None if it would be kept; nothing is.

    Raises:
        ProblemError: it would be refused.
    """
    with _told(services, new):
        return await services.broadcasts.foretell(tenant, new, _most(services, new))


def _most(services: Services, new: NewBroadcast) -> int:
    settings = services.settings.broadcast
    return settings.max_scheduled if new.state == SCHEDULED else settings.max_open


@contextlib.contextmanager
def _told(services: Services, new: NewBroadcast) -> Iterator[None]:
    """Tells callers why a broadcast is not kept."""
    try:
        yield
    except TooManyError:
        doing = "wait for their time" if new.state == SCHEDULED else "run or are paused"
        most = _most(services, new)
        told = f"at most {most} broadcasts of a tenant {doing}: wait for one to end, or cancel one"
        retry_s = services.settings.broadcast.full_retry_s
        raise ProblemError(problem("too_many", told, retry_after_s=retry_s)) from None
    except IdempotencyConflictError:
        told = "the idempotency key was used with another body"
        raise ProblemError(problem("idempotency_conflict", told)) from None


async def _recipients(services: Services, tenant: str, audience: Any) -> Recipients:
    try:
        recipients = parse_recipients(audience)
        if recipients.audience is not None:
            await services.broadcasts.check(tenant, recipients.audience)
    except AudienceError as exc:
        raise wrong(list(exc.errors)) from None
    except NotFoundError as exc:
        error = FieldError(f"audience/{exc.path}", exc.expected, exc.got)
        raise ProblemError(problem("invalid", str(exc), [error])) from None
    return recipients


def _start(services: Services, at: Any, now_ms: int) -> int:
    most_ms = now_ms + round(services.settings.schedule.max_ahead_s * 1000)
    try:
        if not isinstance(at, str):
            raise ValueError
        start_ms = expiry_ms(msgspec.convert(at, Instant))
    except (msgspec.ValidationError, ValueError):
        raise wrong([FieldError("scheduleAt", "RFC 3339 with offset", shown(at))]) from None
    if start_ms > most_ms:
        raise wrong([FieldError("scheduleAt", f"a time before {rfc3339(most_ms)}", shown(at))])
    return start_ms


async def _event(services: Services, tenant: str, event: Any, deadline: float, where: str) -> dict[str, Any]:
    """The event without recipients, if it could be sent now."""
    if not is_object(event):
        raise wrong([FieldError("event", "an event without recipients", shown(event))])
    errors = [
        FieldError(f"{where}{name}", "absent in a broadcast", shown(event[name]))
        for name in ("userId", "userIds", "topic", "scheduleAt", "idempotencyKey", "dedupe", "aggregate")
        if event.get(name) not in (None, False)
    ]
    code = "invalid"
    if not errors:
        whole = {**event, "userId": "x"}
        refusal = explain_event(whole, recipients=True)
        if refusal is not None:
            code = refusal.code
            errors = [e._replace(path=f"{where}{e.path}") for e in refusal.errors]
        elif len(msgspec.json.encode(event)) > MAX_EVENT_BYTES:
            errors = [FieldError("event", f"an event of at most {MAX_EVENT_BYTES} bytes", "more")]
        elif event.get("template") is not None:
            told = (await services.templates.prepare(whole, tenant, deadline)).get(0)
            if isinstance(told, Problem):
                raise ProblemError(told)
    if errors:
        raise wrong(errors, code)
    return {name: value for name, value in event.items() if value is not None}


def _unknown(name: str) -> NotFoundError:
    return NotFoundError("there is no such broadcast", "broadcastId", "the id of a broadcast", shown(name))


def _path(request: Request) -> bytes:
    raw = parse_uuid(request.params["broadcastId"])
    if raw is None:
        raise _unknown(request.params["broadcastId"])
    return raw


async def _record(services: Services, request: Request, broadcast: bytes) -> BroadcastRecord:
    record = await services.broadcasts.get(request.tenant, broadcast)
    if record is None:
        raise _unknown(uuid_text(broadcast))
    return record


async def get_broadcast(services: Services, request: Request) -> Response:
    """GET /v1/broadcasts/{broadcastId}."""
    record = await _record(services, request, _path(request))
    return json_response(broadcast_json(record, services.clock.now_ms()))


async def list_broadcasts(services: Services, request: Request) -> Response:
    """GET /v1/broadcasts."""
    query = known_query(request, "limit", "cursor", "state")
    limit = whole_number(query, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
    state = known_state(query, STATES)
    found = await services.broadcasts.page(request.tenant, state, id_cursor(query), limit)
    now_ms = services.clock.now_ms()
    return json_response(
        {
            "broadcasts": [broadcast_json(one, now_ms) for one in found],
            "nextCursor": uuid_text(found[-1].id) if len(found) == limit else None,
        }
    )


async def list_failures(services: Services, request: Request) -> Response:
    """GET /v1/broadcasts/{broadcastId}/failures."""
    query = known_query(request, "limit", "cursor")
    limit = whole_number(query, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
    record = await _record(services, request, _path(request))
    last = query.get("cursor", "")
    error = text_error("cursor", last, Text(0, 128, control=True))
    if error is not None or "\0" in last:
        raise wrong([FieldError("cursor", "nextCursor of a page before", shown(last))])
    found = await services.broadcasts.failures(record.id, last, limit)
    return json_response(
        {
            "failures": [
                {"userId": f.user, "code": f.code, "detail": f.detail, "failedAt": rfc3339(f.failed_ms)}
                for f in found
            ],
            "nextCursor": found[-1].user if len(found) == limit else None,
        }
    )


async def act(services: Services, request: Request) -> Response:
    """POST /v1/broadcasts/{broadcastId}/pause, resume and cancel."""
    action = request.params["action"]
    if action not in ACTIONS:
        raise NotFoundError("there is no such action", "action", "|".join(ACTIONS), shown(action))
    body = await request.json_object(())
    assert not body
    broadcast = _path(request)
    record = await _record(services, request, broadcast)
    goal, sources = ACTIONS[action]
    now_ms = services.clock.now_ms()
    if await services.broadcasts.act(request.tenant, broadcast, goal, sorted(sources), now_ms):
        await audited(services, request, f"broadcast.{action}", uuid_text(broadcast))
    record = await _record(services, request, broadcast)
    if after(record.state, action, record.started_ms is not None) != record.state:
        told = f"the broadcast is {record.state}"
        raise ProblemError(problem("ended" if record.state in ENDED else "invalid", told))
    return json_response(broadcast_json(record, services.clock.now_ms()))


async def to_topic(
    services: Services,
    document: Mapping[str, Any],
    tenant: str,
    key: str | None,
    deadline: float,
    limits: Limits,
) -> Response:
    """An event of `POST /v1/events` that names a topic: a broadcast to its subscribers."""
    topic, event, at, own = of_topic(document)
    new = await checked(
        services, tenant, {"topic": topic}, event, at, key if own is None else own, deadline, limits, where=""
    )
    made, replayed = await _keep(services, tenant, new)
    return json_response({"broadcastId": uuid_text(made)}, 202, (_REPLAYED,) if replayed else ())


def of_topic(document: Mapping[str, Any]) -> tuple[Any, dict[str, Any], Any, Any]:
    """The topic that an event names, the event without what is the broadcast's own, its time, its key."""
    event = dict(document)
    return event.pop("topic"), event, event.pop("scheduleAt", None), event.pop("idempotencyKey", None)


_NULLABLE_INSTANT: Final = {"anyOf": [INSTANT, {"type": "null"}]}
_NULLABLE_NUMBER: Final = {"type": ["number", "null"], "minimum": 0}
_USERS: Final = {"type": "array", "minItems": 1, "maxItems": MAX_ITEMS, "items": USER_ID}
_AUDIENCE: Final = {
    "anyOf": [
        {"const": "all"},
        {"type": "object", "description": "{topic}, {segment} or {all: true}, with platforms if wanted"},
        obj({"userIds": _USERS}, ["userIds"]),
        _USERS,
    ]
}
_EVENT: Final = {
    "type": "object",
    "description": "As POST /v1/events takes it, without recipients, dedupe, aggregate and scheduleAt.",
    "required": ["type"],
}
_BROADCAST: Final = obj(
    {
        "broadcastId": UUID, "state": {"enum": list(STATES)}, "reason": {"type": ["string", "null"]},
        "audience": {}, "event": {"type": "object"},
        "counts": obj(
            dict.fromkeys(("stored", "delivered", "queued", "deferred", "suppressed", "failed"), WHOLE),
            ["stored", "delivered", "queued", "deferred", "suppressed", "failed"],
        ),
        "users": obj({"done": WHOLE, "total": {"anyOf": [WHOLE, {"type": "null"}]}}, ["done", "total"]),
        "ratePerS": _NULLABLE_NUMBER, "remainingS": _NULLABLE_NUMBER, "startAt": INSTANT,
        "startedAt": _NULLABLE_INSTANT, "endedAt": _NULLABLE_INSTANT, "createdAt": INSTANT,
    },
    ["broadcastId", "state", "reason", "audience", "event", "counts", "users", "ratePerS", "remainingS",
     "startAt", "startedAt", "endedAt", "createdAt"],
)  # fmt: skip
_TOLD: Final = {
    "broadcastId": "0198c0de-7000-7000-8000-000000000001",
    "state": "running",
    "reason": None,
    "audience": {"topic": "goal.alerts"},
    "event": {"type": "goal", "title": "Goal!"},
    "counts": {
        "stored": 84000,
        "delivered": 1200,
        "queued": 51000,
        "deferred": 300,
        "suppressed": 90,
        "failed": 0,
    },
    "users": {"done": 84000, "total": 200000},
    "ratePerS": 12000.0,
    "remainingS": 9.7,
    "startAt": "2026-12-01T12:00:00.000Z",
    "startedAt": "2026-12-01T12:00:00.000Z",
    "endedAt": None,
    "createdAt": "2026-12-01T12:00:00.000Z",
}
_TAG: Final = "Broadcasts"
_SCOPE: Final = "events:write"
_LIMIT, _CURSOR = paging(DEFAULT_LIMIT, MAX_LIMIT)

ROUTES: Final = (
    Route(
        "POST", "/v1/broadcasts", post_broadcast, SERVICE, "Send an event to many users", scope=_SCOPE,
        doc="Answered when it is kept; the users get it after that, behind single events. Each at most once.",
        headers=(
            Query(
                "Idempotency-Key",
                {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
                "The same key and body: the same broadcast, as long as it is kept.",
            ),
        ),
        body=obj(
            {
                "audience": _AUDIENCE,
                "event": _EVENT,
                **nullable({
                    "scheduleAt": {**INSTANT, "description": "It begins then."},
                    "idempotencyKey": text(1, MAX_KEY),
                }),
            },
            ["audience", "event"],
        ),
        body_example={"audience": {"userIds": ["ada", "bob"]}, "event": {"type": "goal", "title": "Goal!"}},
        status=202, answer=_BROADCAST, answer_example=_TOLD, problems=(400, 413, 422, 429), tag=_TAG,
        counts=True,
    ),
    Route(
        "GET", "/v1/broadcasts", list_broadcasts, SERVICE, "List broadcasts", scope=_SCOPE,
        doc="Newest first.",
        query=(_LIMIT, _CURSOR, Query("state", {"enum": list(STATES)}, "Only in this state.")),
        answer=obj(
            {
                "broadcasts": {"type": "array", "items": _BROADCAST},
                "nextCursor": {"type": ["string", "null"]},
            },
            ["broadcasts", "nextCursor"],
        ),
        answer_example={"broadcasts": [_TOLD], "nextCursor": None}, problems=(400, 422), tag=_TAG,
    ),
    Route(
        "GET", "/v1/broadcasts/{broadcastId}", get_broadcast, SERVICE, "Progress of a broadcast",
        scope=_SCOPE,
        doc="`total` is an estimate until it is done; `remainingS` follows from the rate so far.",
        answer=_BROADCAST, answer_example=_TOLD, problems=(404,), tag=_TAG,
    ),
    Route(
        "GET", "/v1/broadcasts/{broadcastId}/failures", list_failures, SERVICE,
        "Users whom a broadcast could not reach", scope=_SCOPE,
        doc="By user id, the first `broadcast.failures_kept` of them. What push providers refuse is a dead "
        "letter, no failure of a broadcast.",
        query=(_LIMIT, _CURSOR),
        answer=obj(
            {
                "failures": {"type": "array", "items": obj(
                    {"userId": {"type": "string"}, "code": {"type": "string"}, "detail": {"type": "string"},
                     "failedAt": INSTANT},
                    ["userId", "code", "detail", "failedAt"],
                )},
                "nextCursor": {"type": ["string", "null"]},
            },
            ["failures", "nextCursor"],
        ),
        problems=(400, 404, 422), tag=_TAG,
    ),
    Route(
        "POST", "/v1/broadcasts/{broadcastId}/{action}", act, SERVICE, "Pause, resume or cancel a broadcast",
        scope=_SCOPE,
        doc="`action` is pause, resume or cancel. When a pause or a cancellation is answered nothing more is "
        "stored, on any node. What is stored stays. Repeating one changes nothing; of a broadcast that has "
        "ended otherwise it is 409 `ended`.",
        answer=_BROADCAST, answer_example=_TOLD, problems=(404, 409, 422), tag=_TAG,
    ),
)  # fmt: skip
