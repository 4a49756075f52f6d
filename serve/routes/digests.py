"""Digests that are open: what waits in them and until when, sent now, or without one of their items."""

from __future__ import annotations

from typing import Any, Final

from carillon.clock import rfc3339
from carillon.decision import DIGEST, unpack
from carillon.digest import OVERFLOW, digest_id, key_of
from carillon.errors import NotFoundError
from carillon.ids import UserKey, parse_uuid, slot_of, uuid_text
from carillon.messages import DigestChange, Done
from carillon.notification import decode_content
from carillon.preferences import DIGESTS
from serve.http import Request, Response, json_response
from serve.routes.bodies import path_id
from serve.routing import CLIENT, SERVICE, Route
from serve.schemas import INSTANT, SUCCESS, UUID, WHOLE, obj
from serve.services import Services
from stores.postgres.digests import OpenDigest

FREQUENCIES: Final = (*DIGESTS[2:], OVERFLOW)


def _shown(user: UserKey, one: OpenDigest) -> dict[str, Any]:
    frequency = _frequency(user, one)
    return {
        "digestId": uuid_text(one.id),
        "category": None if frequency == OVERFLOW else one.newest[-1].category,
        "frequency": frequency,
        "dueAt": rfc3339(one.due_ms),
        "count": one.items,
        "items": [
            {
                "notificationId": uuid_text(item.notification),
                "seq": item.seq,
                "type": item.type,
                "category": item.category,
                "title": decode_content(item.content)["title"],
                "channels": item.channels,
                "createdAt": rfc3339(item.created_ms),
            }
            for item in one.newest
        ],
    }


def _frequency(user: UserKey, one: OpenDigest) -> str:
    """How often the user wants it: the id says so; of one that is held beyond its time, the newest item."""
    newest = one.newest[-1]
    for frequency in FREQUENCIES:
        if digest_id(key_of(user, newest.category, frequency, one.due_ms)) == one.id:
            return frequency
    rules = {rule.rule: rule.about for rule in unpack(newest.decision or "[]")}
    return rules.get(DIGEST) or OVERFLOW


async def _open(services: Services, tenant: str, user: str) -> Response:
    settings = services.settings.ingress
    found = await services.digests.open(
        tenant, user, items=settings.digest_items, digests=settings.digests_listed
    )
    return json_response({"digests": [_shown(UserKey(tenant, user), one) for one in found]})


async def _change(services: Services, request: Request, user: str, op: str, *, by_user: bool) -> int:
    digest = _uuid(request, "digestId", "there is no such open digest")
    item = b""
    if op == "remove":
        item = _uuid(request, "notificationId", "there is no such item in this open digest")
    message = DigestChange(request.tenant, user, slot_of(request.tenant, user), digest, op, item, by_user)
    done = await services.backend.request(message, request.deadline)
    assert isinstance(done, Done)
    return done.count


def _uuid(request: Request, name: str, told: str) -> bytes:
    raw = parse_uuid(request.params[name])
    if raw is None:
        raise NotFoundError(told, name, "a UUID", request.params[name][:80])
    return raw


async def get_user_digests(services: Services, request: Request) -> Response:
    """GET /v1/users/{userId}/digests."""
    return await _open(services, request.tenant, path_id(request, "userId"))


async def flush_user_digest(services: Services, request: Request) -> Response:
    """POST /v1/users/{userId}/digests/{digestId}/flush."""
    await request.json_object(())
    count = await _change(services, request, path_id(request, "userId"), "flush", by_user=False)
    return json_response({"digestId": request.params["digestId"], "count": count})


async def remove_user_item(services: Services, request: Request) -> Response:
    """DELETE /v1/users/{userId}/digests/{digestId}/items/{notificationId}."""
    await _change(services, request, path_id(request, "userId"), "remove", by_user=False)
    return json_response({"success": True})


async def get_digests(services: Services, request: Request) -> Response:
    """GET /api/digests."""
    return await _open(services, request.tenant, request.user)


async def flush_digest(services: Services, request: Request) -> Response:
    """POST /api/digests/{digestId}/flush."""
    await request.json_object(())
    count = await _change(services, request, request.user, "flush", by_user=True)
    return json_response({"digestId": request.params["digestId"], "count": count})


async def remove_item(services: Services, request: Request) -> Response:
    """DELETE /api/digests/{digestId}/items/{notificationId}."""
    await _change(services, request, request.user, "remove", by_user=True)
    return json_response({"success": True})


_TEXT: Final = {"type": ["string", "null"]}
_ITEM: Final = {
    "notificationId": UUID,
    "seq": WHOLE,
    "type": {"type": "string"},
    "category": _TEXT,
    "title": {"type": "string"},
    "channels": {"type": "array", "items": {"type": "string"}},
    "createdAt": INSTANT,
}
_DIGEST: Final = {
    "digestId": UUID,
    "category": _TEXT,
    "frequency": {"enum": list(FREQUENCIES)},
    "dueAt": INSTANT,
    "count": WHOLE,
    "items": {"type": "array", "items": obj(_ITEM, list(_ITEM))},
}
_OPEN: Final = obj({"digests": {"type": "array", "items": obj(_DIGEST, list(_DIGEST))}}, ["digests"])
_OPEN_EXAMPLE: Final = {
    "digests": [
        {
            "digestId": "5f0a6f0e-91c7-8a4e-b3f0-2d9a2f6f1c11",
            "category": "news",
            "frequency": "daily",
            "dueAt": "2026-06-16T06:00:00.000Z",
            "count": 1,
            "items": [
                {
                    "notificationId": "0198c0de-7000-7000-8000-000000000001",
                    "seq": 17,
                    "type": "article",
                    "category": "news",
                    "title": "Build 4711 has finished",
                    "channels": ["push"],
                    "createdAt": "2026-06-15T14:03:05.120Z",
                }
            ],
        }
    ]
}
_FLUSHED: Final = obj({"digestId": UUID, "count": WHOLE}, ["digestId", "count"])
_FLUSHED_EXAMPLE: Final = {"digestId": "5f0a6f0e-91c7-8a4e-b3f0-2d9a2f6f1c11", "count": 3}
_LIST_DOC: Final = (
    "By due time; of each the newest `ingress.digest_items` items, oldest first. `frequency` is `overflow` "
    "for what exceeds the tenant's limits."
)
_TAG: Final = "Digests"

ROUTES: Final = (
    Route(
        "GET", "/v1/users/{userId}/digests", get_user_digests, SERVICE, "Open digests of a user",
        scope="users:read", doc=_LIST_DOC, answer=_OPEN, answer_example=_OPEN_EXAMPLE, problems=(422,),
        tag=_TAG,
    ),
    Route(
        "POST", "/v1/users/{userId}/digests/{digestId}/flush", flush_user_digest, SERVICE,
        "Send a digest now", scope="users:write",
        doc=(
            "It is decided again as at its time, but does not spare who looks at a device; quiet hours and "
            "do-not-disturb hold it. `count` is 0 if it was sent before."
        ),
        body=obj({}), body_required=False, answer=_FLUSHED, answer_example=_FLUSHED_EXAMPLE,
        problems=(400, 404, 413, 422), tag=_TAG,
    ),
    Route(
        "DELETE", "/v1/users/{userId}/digests/{digestId}/items/{notificationId}", remove_user_item, SERVICE,
        "Take an item out of a digest", scope="users:write",
        doc="It stays in the feed. A digest without items is not sent.",
        answer=SUCCESS, answer_example={"success": True}, problems=(404, 422), tag=_TAG,
    ),
    Route(
        "GET", "/api/digests", get_digests, CLIENT, "My open digests", doc=_LIST_DOC, answer=_OPEN,
        answer_example=_OPEN_EXAMPLE, tag=_TAG,
    ),
    Route(
        "POST", "/api/digests/{digestId}/flush", flush_digest, CLIENT, "Send my digest now",
        doc="As I ask for it, neither quiet hours nor do-not-disturb nor limits hold it.",
        body=obj({}), body_required=False, answer=_FLUSHED, answer_example=_FLUSHED_EXAMPLE,
        problems=(400, 404, 413, 422), tag=_TAG,
    ),
    Route(
        "DELETE", "/api/digests/{digestId}/items/{notificationId}", remove_item, CLIENT,
        "Take an item out of my digest", doc="It stays in the feed. A digest without items is not sent.",
        answer=SUCCESS, answer_example={"success": True}, problems=(404, 422), tag=_TAG,
    ),
)  # fmt: skip
