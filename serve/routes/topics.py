"""Topics: who subscribes to what."""

from __future__ import annotations

import base64
import binascii
from typing import Any, Final

from carillon.clock import rfc3339
from carillon.errors import NotFoundError
from carillon.events import ProblemError, refused
from carillon.problems import FieldError, shown
from serve.http import Request, Response, json_response, whole_number
from serve.routes.bodies import MAX_LIST, id_list, known_query, path_id, valid_id
from serve.routing import CLIENT, SERVICE, Route, paging
from serve.schemas import INSTANT, SUCCESS, USER_ID, WHOLE, obj
from serve.services import Services

MAX_LIMIT: Final = 100
DEFAULT_LIMIT: Final = 20


def _no_subscriber(user: str) -> NotFoundError:
    return NotFoundError("the user does not subscribe to this topic", "userId", "a subscriber", user)


async def put_subscriber(services: Services, request: Request) -> Response:
    """PUT /v1/topics/{topic}/subscribers/{userId}."""
    topic, user = path_id(request, "topic"), path_id(request, "userId")
    await request.json_object(())
    await services.topics.subscribe(request.tenant, topic, [user], services.clock.now_ms())
    return await get_subscriber(services, request)


async def get_subscriber(services: Services, request: Request) -> Response:
    """GET /v1/topics/{topic}/subscribers/{userId}."""
    topic, user = path_id(request, "topic"), path_id(request, "userId")
    since_ms = await services.topics.since(request.tenant, topic, user)
    if since_ms is None:
        raise _no_subscriber(user)
    return json_response({"topic": topic, "userId": user, "since": rfc3339(since_ms)})


async def delete_subscriber(services: Services, request: Request) -> Response:
    """DELETE /v1/topics/{topic}/subscribers/{userId}."""
    topic, user = path_id(request, "topic"), path_id(request, "userId")
    if not await services.topics.unsubscribe(request.tenant, topic, user):
        raise _no_subscriber(user)
    return json_response({"success": True})


async def post_subscribers(services: Services, request: Request) -> Response:
    """POST /v1/topics/{topic}/subscribers."""
    topic = path_id(request, "topic")
    document = await request.json_object(("userIds",))
    users = [valid_id(f"userIds/{at}", user) for at, user in enumerate(id_list(document, "userIds"))]
    users = list(dict.fromkeys(users))
    added = await services.topics.subscribe(request.tenant, topic, users, services.clock.now_ms())
    return json_response({"subscribed": len(users), "added": added})


async def list_subscribers(services: Services, request: Request) -> Response:
    """GET /v1/topics/{topic}/subscribers."""
    topic = path_id(request, "topic")
    query = known_query(request, "limit", "cursor")
    limit = whole_number(query, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
    slot, user = _decode(query["cursor"]) if query.get("cursor") else (-1, "")
    found = await services.topics.page(request.tenant, topic, slot, user, limit)
    last = found[-1] if len(found) == limit else None
    return json_response(
        {
            "subscribers": [{"userId": one.user, "since": rfc3339(one.since_ms)} for one in found],
            "nextCursor": None if last is None else _encode(last.slot, last.user),
        }
    )


def _encode(slot: int, user: str) -> str:
    return base64.urlsafe_b64encode(f"{slot}:{user}".encode()).rstrip(b"=").decode()


def _decode(cursor: str) -> tuple[int, str]:
    try:
        text = base64.b64decode(cursor.encode() + b"=" * (-len(cursor) % 4), b"-_", validate=True).decode()
        slot, colon, user = text.partition(":")
        if not colon or not slot.isascii() or not slot.isdigit() or len(slot) > 4:
            raise ValueError
        return int(slot), valid_id("cursor", user)
    except (ValueError, binascii.Error, ProblemError):
        expected = FieldError("cursor", "nextCursor of a page before", shown(cursor))
        raise refused("expected cursor to be a nextCursor of this call", [expected]) from None


async def my_topics(services: Services, request: Request) -> Response:
    """GET /api/topics."""
    query = known_query(request, "limit", "cursor")
    limit = whole_number(query, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
    after = valid_id("cursor", query["cursor"]) if query.get("cursor") else ""
    found = await services.topics.topics_of(request.tenant, request.user, after, limit)
    return json_response(
        {
            "topics": [{"topic": topic, "since": rfc3339(since_ms)} for topic, since_ms in found],
            "nextCursor": found[-1][0] if len(found) == limit else None,
        }
    )


_SUBSCRIBER: Final = obj(
    {"topic": {"type": "string"}, "userId": {"type": "string"}, "since": INSTANT},
    ["topic", "userId", "since"],
)
_EXAMPLE: Final = {"topic": "goals.rapid", "userId": "ada", "since": "2026-01-02T03:04:05.000Z"}
_PAGE: Final = paging(DEFAULT_LIMIT, MAX_LIMIT)
_CURSOR: Final[dict[str, Any]] = {"type": ["string", "null"]}
_TAG: Final = "Topics"

ROUTES: Final = (
    Route(
        "PUT", "/v1/topics/{topic}/subscribers/{userId}", put_subscriber, SERVICE, "Subscribe a user",
        scope="users:write", doc="A topic is there as soon as somebody subscribes to it.",
        body=obj({}), body_required=False, answer=_SUBSCRIBER, answer_example=_EXAMPLE,
        problems=(400, 404, 413, 422), tag=_TAG,
    ),
    Route(
        "GET", "/v1/topics/{topic}/subscribers/{userId}", get_subscriber, SERVICE,
        "Whether a user subscribes", scope="users:read", answer=_SUBSCRIBER, answer_example=_EXAMPLE,
        problems=(404, 422), tag=_TAG,
    ),
    Route(
        "DELETE", "/v1/topics/{topic}/subscribers/{userId}", delete_subscriber, SERVICE, "Unsubscribe a user",
        scope="users:write", answer=SUCCESS, answer_example={"success": True}, problems=(404, 422), tag=_TAG,
    ),
    Route(
        "POST", "/v1/topics/{topic}/subscribers", post_subscribers, SERVICE, "Subscribe many users",
        scope="users:write",
        body=obj({"userIds": {"type": "array", "items": USER_ID, "maxItems": MAX_LIST}}, ["userIds"]),
        body_example={"userIds": ["ada", "bob"]},
        answer=obj({"subscribed": WHOLE, "added": WHOLE}, ["subscribed", "added"]),
        answer_example={"subscribed": 2, "added": 1}, problems=(400, 413, 422), tag=_TAG,
    ),
    Route(
        "GET", "/v1/topics/{topic}/subscribers", list_subscribers, SERVICE, "List the subscribers of a topic",
        scope="users:read", doc="In an order of Carillon's own.", query=_PAGE,
        answer=obj(
            {
                "subscribers": {
                    "type": "array",
                    "items": obj({"userId": {"type": "string"}, "since": INSTANT}, ["userId", "since"]),
                },
                "nextCursor": _CURSOR,
            },
            ["subscribers", "nextCursor"],
        ),
        answer_example={"subscribers": [{"userId": "ada", "since": _EXAMPLE["since"]}], "nextCursor": None},
        problems=(400, 422), tag=_TAG,
    ),
    Route(
        "GET", "/api/topics", my_topics, CLIENT, "What I subscribe to", doc="By name.", query=_PAGE,
        answer=obj(
            {
                "topics": {
                    "type": "array",
                    "items": obj({"topic": {"type": "string"}, "since": INSTANT}, ["topic", "since"]),
                },
                "nextCursor": _CURSOR,
            },
            ["topics", "nextCursor"],
        ),
        answer_example={"topics": [{"topic": "goals.rapid", "since": _EXAMPLE["since"]}], "nextCursor": None},
        problems=(400, 422), tag=_TAG,
    ),
)  # fmt: skip
