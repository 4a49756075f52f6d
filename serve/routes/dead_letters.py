"""Dead letters: what could not be delivered, and again.

A replay picks at most `ingress.replay_max` dead letters, asks the owners of their users to put them back into
the outbox, and says where to go on. It keeps nothing: whoever is cut off makes the same call again, and what
was replayed by then is no dead letter any more.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec

from carillon.clock import rfc3339
from carillon.errors import NotFoundError
from carillon.event_rules import Instant, Text, expiry_ms, text_error
from carillon.events import refused
from carillon.external import EXTERNAL
from carillon.ids import uuid_text
from carillon.messages import Replay, ReplayResult
from carillon.notification import decode_content
from carillon.problems import FieldError, shown
from serve.http import Request, Response, json_response, whole_number
from serve.routes.bodies import attempt_json, id_list, wrong
from serve.routing import SERVICE, Query, Route, paging
from serve.schemas import INSTANT, USER_ID, WHOLE, nullable, obj, ref, text
from serve.services import Services
from stores.postgres.dead_letters import MAX_ID, DeadFilter, DeadLetter

MAX_LIMIT: Final = 100
DEFAULT_LIMIT: Final = 20
MOST_COUNTED: Final = 10_000
"""`remaining` counts no further."""

_TEXTS: Final = {
    "userId": Text(1, 128),
    "type": Text(1, 64),
    "channel": Text(1, 64),
    "reason": Text(1, 255),
}
_TIMES: Final = ("since", "until")


def _filter(given: dict[str, Any]) -> DeadFilter:
    """The filter of a query or a body. Raises ProblemError (422)."""
    errors: list[FieldError] = []
    texts: dict[str, str] = {}
    times: dict[str, int] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in _TEXTS:
            error = text_error(name, value, _TEXTS[name])
            if error is not None:
                errors.append(error)
            else:
                texts[name] = value
            continue
        try:
            if not isinstance(value, str):
                raise ValueError
            times[name] = expiry_ms(msgspec.convert(value, Instant))
        except (msgspec.ValidationError, ValueError):
            errors.append(FieldError(name, "RFC 3339 with offset", shown(value)))
    if errors:
        raise wrong(errors)
    return DeadFilter(
        texts.get("userId"), texts.get("type"), texts.get("channel"), texts.get("reason"),
        times.get("since"), times.get("until"),
    )  # fmt: skip


def _letter(one: DeadLetter) -> dict[str, Any]:
    return {
        "id": str(one.id),
        "notificationId": uuid_text(one.notification),
        "userId": one.user,
        "type": one.type,
        "title": decode_content(one.content).get("title"),
        "channel": one.channel,
        "step": one.step,
        "reason": one.reason,
        "attempts": one.attempts,
        "createdAt": rfc3339(one.created_ms),
        "diedAt": rfc3339(one.died_us // 1000),
        "replayedAt": None if one.replayed_ms is None else rfc3339(one.replayed_ms),
    }


async def list_dead_letters(services: Services, request: Request) -> Response:
    """GET /v1/dead-letters."""
    query = request.query()
    limit = whole_number(query, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
    chosen = _filter({name: query[name] for name in (*_TEXTS, *_TIMES) if name in query})
    rows, after = await services.dead_letters.page(request.tenant, chosen, query.get("cursor") or None, limit)
    return json_response({"deadLetters": [_letter(one) for one in rows], "nextCursor": after})


async def get_dead_letter(services: Services, request: Request) -> Response:
    """GET /v1/dead-letters/{id}."""
    text_id = request.params["id"]
    found = await services.dead_letters.some(request.tenant, _numbers([text_id]))
    if not found:
        raise NotFoundError("there is no such dead letter", "id", "the id of a dead letter", text_id[:80])
    attempts = await services.dead_letters.attempts(found[0].id)
    return json_response({**_letter(found[0]), "tries": [attempt_json(one) for one in attempts]})


def _numbers(ids: list[str]) -> list[int]:
    """The ids that can be ids of dead letters, each once."""
    numbers = (int(one) for one in ids if one.isascii() and one.isdigit() and len(one) <= 19)
    return list(dict.fromkeys(one for one in numbers if one <= MAX_ID))


async def replay_dead_letters(services: Services, request: Request) -> Response:
    """POST /v1/dead-letters/replay."""
    document = await request.json_object(("ids", "filter", "cursor", "limit"))
    most = services.settings.ingress.replay_max
    given = {name: value for name, value in document.items() if value is not None}
    if ("ids" in given) == ("filter" in given):
        raise refused("expected ids or filter", [FieldError("ids", "one of ids and filter", "both or none")])
    tenant = request.tenant
    if "ids" in given:
        stray = [name for name in ("cursor", "limit") if name in given]
        if stray:
            raise refused(f"{stray[0]} goes with filter", [FieldError(stray[0], "absent with ids", "given")])
        ids = id_list(given, "ids")
        if len(ids) > most:
            raise refused(
                f"expected at most {most} ids", [FieldError("ids", f"at most {most} ids", f"{len(ids)} ids")]
            )
        letters = await services.dead_letters.some(tenant, _numbers(ids))
        replayed = await _replay(services, request, letters)
        return _answer(replayed, len(ids) - replayed, 0, None)
    wanted = given["filter"]
    known = (*_TEXTS, *_TIMES)
    if not isinstance(wanted, dict) or any(name not in known for name in wanted):
        got = shown(wanted if not isinstance(wanted, dict) else next(n for n in wanted if n not in known))
        raise refused(
            f"expected filter to hold {', '.join(known)}", [FieldError("filter", f"some of {known}", got)]
        )
    chosen = _filter(wanted)
    limit, cursor = given.get("limit", most), given.get("cursor")
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= most:
        error = FieldError("limit", f"a whole number from 1 to {most}", shown(limit))
        raise refused(f"expected limit to be {error.expected}", [error])
    if cursor is not None and not isinstance(cursor, str):
        raise refused("expected cursor to be text", [FieldError("cursor", "text", shown(cursor))])
    letters, after = await services.dead_letters.page(tenant, chosen, cursor or None, limit)
    replayed = await _replay(services, request, letters)
    remaining = 0
    if after is not None:
        remaining = await services.dead_letters.count(tenant, chosen, after, MOST_COUNTED)
    return _answer(replayed, len(letters) - replayed, remaining, after)


def _answer(replayed: int, skipped: int, remaining: int, cursor: str | None) -> Response:
    return json_response({"replayed": replayed, "skipped": skipped, "remaining": remaining, "cursor": cursor})


async def _replay(services: Services, request: Request, letters: list[DeadLetter]) -> int:
    """Ask the owner of each slot; returns how many were put back.

    Raises:
        CarillonError: some owner did not answer. Others may have: the same call again does the rest.
    """
    asked_ms = services.clock.now_ms()
    by_slot: dict[int, list[int]] = {}
    for one in letters:
        by_slot.setdefault(one.slot, []).append(one.id)
    answers = await asyncio.gather(
        *(
            services.backend.request(Replay(request.tenant, slot, ids, asked_ms), request.deadline)
            for slot, ids in by_slot.items()
        ),
        return_exceptions=True,
    )
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return sum(answer.replayed for answer in answers if isinstance(answer, ReplayResult))


# -- the table ----------------------------------------------------------------------------------------

_FILTER: Final = {
    "userId": USER_ID,
    "type": text(1, 64),
    "channel": {**text(1, 64), "description": f"{', '.join(EXTERNAL)}."},
    "reason": {**text(1, 255), "description": "Text in the reason, whatever its case."},
    "since": {**INSTANT, "description": "Died at or after."},
    "until": {**INSTANT, "description": "Died before."},
}
_EXAMPLE: Final = {
    "id": "4711",
    "notificationId": "01890a5d-ac96-774b-bcce-b302099a8057",
    "userId": "ada",
    "type": "comment",
    "title": "Grace commented",
    "channel": "push",
    "step": 0,
    "reason": "gave up after 6 tries: UNAVAILABLE",
    "attempts": 6,
    "createdAt": "2026-01-02T03:04:05.000Z",
    "diedAt": "2026-01-02T03:05:05.000Z",
    "replayedAt": None,
}
_COUNTS: Final = obj(
    {"replayed": WHOLE, "skipped": WHOLE, "remaining": WHOLE, "cursor": {"type": ["string", "null"]}},
    ["replayed", "skipped", "remaining", "cursor"],
)
_TAG: Final = "Dead letters"

ROUTES: Final = (
    Route(
        "GET", "/v1/dead-letters", list_dead_letters, SERVICE, "What could not be delivered",
        scope="users:read", doc="Newest first.",
        query=(
            *paging(DEFAULT_LIMIT, MAX_LIMIT),
            *(Query(name, schema, schema.get("description", f"Only this {name}."))
              for name, schema in _FILTER.items()),
        ),
        answer=obj(
            {
                "deadLetters": {"type": "array", "items": ref("DeadLetter")},
                "nextCursor": {"type": ["string", "null"]},
            },
            ["deadLetters", "nextCursor"],
        ),
        answer_example={"deadLetters": [_EXAMPLE], "nextCursor": None},
        problems=(400, 422), tag=_TAG,
    ),
    Route(
        "GET", "/v1/dead-letters/{id}", get_dead_letter, SERVICE, "One dead letter with every try",
        scope="users:read", answer=ref("DeadLetter"), answer_example={**_EXAMPLE, "tries": []},
        problems=(404,), tag=_TAG,
    ),
    Route(
        "POST", "/v1/dead-letters/replay", replay_dead_letters, SERVICE, "Deliver dead letters again",
        scope="events:write",
        doc="By ids, or by filter: at most `ingress.replay_max` a call; with `cursor` in the answer there is "
        "more. Nothing is kept: a call that failed is made again. `remaining` counts up to "
        f"{MOST_COUNTED:,}. What has expired is skipped and stays dead.",
        body=obj(
            nullable(
                {
                    "ids": {"type": "array", "items": {"type": "string"}},
                    "filter": obj(nullable(_FILTER)),
                    "cursor": {"type": "string"},
                    "limit": {"type": "integer", "minimum": 1},
                }
            )
        ),
        body_example={"filter": {"channel": "push", "since": "2026-01-02T00:00:00Z"}},
        answer=_COUNTS, answer_example={"replayed": 500, "skipped": 0, "remaining": 1200, "cursor": "ZDE3"},
        problems=(400, 413, 422), tag=_TAG,
    ),
)  # fmt: skip
