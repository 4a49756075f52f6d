"""Segments: users by a filter over what is known of them."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from carillon.audience import Audience
from carillon.clock import rfc3339
from carillon.errors import NotFoundError
from carillon.event_rules import Text, text_error
from carillon.events import ProblemError, refused
from carillon.ids import SLOTS
from carillon.problems import FieldError, problem, shown
from carillon.segments import MEMBERS, SegmentError, parse_filter
from serve.audit import audited
from serve.http import Request, Response, json_response, whole_number
from serve.routes.bodies import known_query
from serve.routing import SERVICE, Route, paging
from serve.schemas import INSTANT, SUCCESS, WHOLE, nullable, obj, text
from serve.services import Services
from stores.postgres.segments import SegmentRecord

MAX_LIMIT: Final = 100
DEFAULT_LIMIT: Final = 20
MAX_SHOWN: Final = 20
"""Users that a preview names."""
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DESCRIPTION: Final = Text(0, 255, control=True)


def _path(request: Request) -> str:
    segment = request.params["segmentId"]
    if not _ID.fullmatch(segment):
        wanted = "1-64 letters, digits, dots, dashes or underscores, the first a letter or digit"
        error = FieldError("segmentId", wanted, shown(segment))
        raise refused(f"expected segmentId to be {wanted}, got {shown(segment)}", [error])
    return segment


def _unknown(segment: str) -> NotFoundError:
    return NotFoundError("there is no such segment", "segmentId", "the id of a segment", segment)


def _told(one: SegmentRecord) -> dict[str, Any]:
    return {
        "segmentId": one.id,
        **msgspec.json.decode(one.document),
        "createdAt": rfc3339(one.created_ms),
        "updatedAt": rfc3339(one.updated_ms),
    }


async def put_segment(services: Services, request: Request) -> Response:
    """PUT /v1/segments/{segmentId}."""
    segment = _path(request)
    document = await request.json_object(MEMBERS)
    try:
        parse_filter(document.get("filter"))
    except SegmentError as exc:
        raise ProblemError(problem("invalid", str(exc), exc.errors)) from None
    description = document.get("description")
    wrong = None if description is None else text_error("description", description, _DESCRIPTION)
    if wrong is not None:
        raise refused(f"expected description to be {wrong.expected}, got {wrong.got}", [wrong])
    kept = {"description": description, "filter": document["filter"]}
    await services.segments.put(
        request.tenant, segment, msgspec.json.encode(kept).decode(), services.clock.now_ms()
    )
    await audited(services, request, "segment.put", segment)
    return await get_segment(services, request)


async def get_segment(services: Services, request: Request) -> Response:
    """GET /v1/segments/{segmentId}."""
    segment = _path(request)
    found = await services.segments.get(request.tenant, segment)
    if found is None:
        raise _unknown(segment)
    return json_response(_told(found))


async def delete_segment(services: Services, request: Request) -> Response:
    """DELETE /v1/segments/{segmentId}."""
    segment = _path(request)
    if not await services.segments.delete(request.tenant, segment):
        raise _unknown(segment)
    await audited(services, request, "segment.delete", segment)
    return json_response({"success": True})


async def list_segments(services: Services, request: Request) -> Response:
    """GET /v1/segments."""
    query = known_query(request, "limit", "cursor")
    limit = whole_number(query, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
    after = query.get("cursor") or ""
    if after and not _ID.fullmatch(after):
        error = FieldError("cursor", "nextCursor of a page before", shown(after))
        raise refused("expected cursor to be a nextCursor of this call", [error])
    found = await services.segments.page(request.tenant, after, limit)
    return json_response(
        {
            "segments": [_told(one) for one in found],
            "nextCursor": found[-1].id if len(found) == limit else None,
        }
    )


async def preview_segment(services: Services, request: Request) -> Response:
    """POST /v1/segments/{segmentId}/preview."""
    segment = _path(request)
    await request.json_object(())
    found = await services.segments.get(request.tenant, segment)
    if found is None:
        raise _unknown(segment)
    settings = services.settings.ingress
    until = services.clock.monotonic() + settings.preview_s
    counted = await services.segments.count(
        request.tenant, found.document, lambda: services.clock.monotonic() >= until
    )
    users: list[str] = []
    wanted = min(MAX_SHOWN, counted.count)
    for slot in range(SLOTS):
        if len(users) >= wanted or services.clock.monotonic() >= until + settings.preview_s:
            break
        left = MAX_SHOWN - len(users)
        users += await services.audiences.page(request.tenant, Audience("segment", segment), slot, "", left)
    return json_response(
        {"count": counted.count, "exact": counted.exact, "ofUsers": counted.users, "userIds": users}
    )


_FILTER: Final = {
    "type": "object",
    "description": "Fields with conditions, all of which hold, and `and`, `or`, `not` around them.",
}
_EXAMPLE: Final = {
    "description": "Paying customers on a phone",
    "filter": {
        "attributes.plan": {"in": ["pro", "team"]},
        "attributes.seats": {"gte": 5},
        "or": [{"platform": "ios"}, {"platform": "android"}],
        "not": {"lastSeenAgoS": {"gt": 2592000}},
    },
}
_SEGMENT: Final = obj(
    {
        "segmentId": {"type": "string"}, "description": {"type": ["string", "null"]}, "filter": _FILTER,
        "createdAt": INSTANT, "updatedAt": INSTANT,
    },
    ["segmentId", "description", "filter", "createdAt", "updatedAt"],
)  # fmt: skip
_TOLD: Final = {
    "segmentId": "payers", **_EXAMPLE, "createdAt": "2026-01-02T03:04:05.000Z",
    "updatedAt": "2026-01-02T03:04:05.000Z",
}  # fmt: skip
_READ, _WRITE, _TAG = "users:read", "users:write", "Segments"

ROUTES: Final = (
    Route(
        "PUT", "/v1/segments/{segmentId}", put_segment, SERVICE, "Make or replace a segment", scope=_WRITE,
        body=obj({"filter": _FILTER, **nullable({"description": text(0, 255, control=True)})}, ["filter"]),
        body_example=_EXAMPLE, answer=_SEGMENT, answer_example=_TOLD, problems=(400, 404, 413, 422), tag=_TAG,
    ),
    Route(
        "GET", "/v1/segments", list_segments, SERVICE, "List segments", scope=_READ, doc="By id.",
        query=paging(DEFAULT_LIMIT, MAX_LIMIT),
        answer=obj(
            {"segments": {"type": "array", "items": _SEGMENT}, "nextCursor": {"type": ["string", "null"]}},
            ["segments", "nextCursor"],
        ),
        answer_example={"segments": [_TOLD], "nextCursor": None}, problems=(400, 422), tag=_TAG,
    ),
    Route(
        "GET", "/v1/segments/{segmentId}", get_segment, SERVICE, "Read a segment", scope=_READ,
        answer=_SEGMENT, answer_example=_TOLD, problems=(404, 422), tag=_TAG,
    ),
    Route(
        "DELETE", "/v1/segments/{segmentId}", delete_segment, SERVICE, "Delete a segment", scope=_WRITE,
        doc="A broadcast to it that is under way finds nobody any more.",
        answer=SUCCESS, answer_example={"success": True}, problems=(404, 422), tag=_TAG,
    ),
    Route(
        "POST", "/v1/segments/{segmentId}/preview", preview_segment, SERVICE, "Who fits a segment now",
        scope=_READ,
        doc="Counts for at most `ingress.preview_s`; then `exact` is false, and the rest estimated.",
        body=obj({}), body_required=False,
        answer=obj(
            {
                "count": WHOLE, "exact": {"type": "boolean"}, "ofUsers": WHOLE,
                "userIds": {"type": "array", "items": {"type": "string"}, "maxItems": MAX_SHOWN},
            },
            ["count", "exact", "ofUsers", "userIds"],
        ),
        answer_example={"count": 2, "exact": True, "ofUsers": 3120, "userIds": ["ada", "bob"]},
        problems=(400, 404, 413, 422), tag=_TAG,
    ),
)  # fmt: skip
