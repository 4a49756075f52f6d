"""What services ask about users: feeds, devices, preferences, sessions, tokens."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from carillon import tokens
from carillon.clock import rfc3339
from carillon.errors import NotFoundError, UnauthenticatedError
from carillon.events import ProblemError, refused
from carillon.ids import slot_of
from carillon.messages import (
    DeviceDelete,
    Done,
    SessionsRevoke,
)
from carillon.notification import notification_json, user_json_of
from carillon.preferences import DEFAULTS
from carillon.problems import FieldError, shown
from serve.audit import audited
from serve.http import Request, Response, json_response, whole_number
from serve.routes import preferences
from serve.routes.amend import HISTORY, etag, history
from serve.routes.bodies import (
    attempt_json,
    device_put,
    no_notification,
    path_id,
    path_notification,
    valid_id,
)
from serve.routes.merged import MERGED, merge_windows_of, merged_json
from serve.routing import SERVICE, Query, Route, paging
from serve.schemas import INSTANT, SUCCESS, USER_ID, nullable, obj, ref
from serve.services import Services
from stores.postgres.feed import STATUSES, FeedFilter
from stores.postgres.search import MAX_CHARS, MAX_WORDS

MAX_LIMIT: Final = 100
DEFAULT_LIMIT: Final = 20
_FLAGS: Final = {"true": True, "1": True, "false": False, "0": False}
_TEXT_FILTERS: Final = (("type", 64), ("category", 64))


# -- the feed -----------------------------------------------------------------------------------------


async def feed(services: Services, request: Request, tenant: str, user: str) -> Response:
    """One page of a user's feed, by the query of the request."""
    query = request.query()
    limit = whole_number(query, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
    status = query.get("status")
    if status is not None and status not in STATUSES:
        raise _bad("status", "|".join(STATUSES), status)
    unread = query.get("unread")
    if unread is not None:
        if unread not in _FLAGS:
            raise _bad("unread", "true or false", unread)
        if _FLAGS[unread]:
            if status not in (None, "unread"):
                raise _bad("unread", f"absent with status={status}", unread)
            status = "unread"
    for name, longest in _TEXT_FILTERS:
        if len(query.get(name, "")) > longest:
            raise _bad(name, f"at most {longest} characters", f"{len(query[name])} characters")
    chosen = FeedFilter(status, query.get("type") or None, query.get("category") or None)
    cursor, q, now_ms = query.get("cursor") or None, query.get("q"), services.clock.now_ms()
    if q:
        rows, after = await services.search.page(
            tenant, user, q, now_ms, request.deadline, limit=limit, cursor=cursor, chosen=chosen
        )
        user_json = user_json_of(user)
        items = [notification_json(row, user_json) for row in rows]
    else:
        items, after = await services.feeds.page(
            tenant, user, now_ms, limit=limit, cursor=cursor, chosen=chosen
        )
    following = "null" if after is None else f'"{after}"'
    return Response(f'{{"notifications":[{",".join(items)}],"nextCursor":{following}}}'.encode())


def _bad(name: str, expected: str, got: str) -> ProblemError:
    return refused(
        f"expected {name} to be {expected}, got {shown(got)}", [FieldError(name, expected, shown(got))]
    )


async def get_user_feed(services: Services, request: Request) -> Response:
    """GET /v1/users/{userId}/notifications."""
    return await feed(services, request, request.tenant, path_id(request, "userId"))


async def get_notification(services: Services, request: Request) -> Response:
    """GET /v1/notifications/{id}."""
    raw = path_notification(request)
    found = await services.feed.notification(request.tenant, raw)
    if found is None:
        raise await no_notification(services, request, raw)
    row = found.row
    state = (
        "RETRACTED"
        if row.retracted_ms is not None
        else "READ"
        if row.read_ms is not None
        else "DELIVERED"
        if row.delivered_ms is not None
        else "SENT"
    )
    return json_response(
        {
            "notification": msgspec.Raw(notification_json(row, user_json_of(found.user)).encode()),
            "deliveryState": state,
            "deliveries": [_delivery(one) for one in found.deliveries],
            **merged_json(found, await merge_windows_of(services, request.tenant, found)),
            **history(found),
        },
        headers=(etag(found.version),),
    )


def _delivery(one: dict[str, Any]) -> dict[str, Any]:
    return {
        "channel": one["channel"],
        "state": one["state"],
        "attempts": one["attempts"],
        "reason": one["reason"],
        "dueAt": rfc3339(one["due_ms"]),
        "createdAt": rfc3339(one["created_ms"]),
        "updatedAt": rfc3339(one["updated_ms"]),
        "tries": [attempt_json(t) for t in one["tries"]],
    }


# -- devices ------------------------------------------------------------------------------------------


async def put_device(services: Services, request: Request, tenant: str, user: str) -> Response:
    """Register or replace a push target and tell it back."""
    device = path_id(request, "deviceId")
    message = device_put(await request.json_object(), tenant, user, slot_of(tenant, user), device)
    await services.backend.request(message, request.deadline)
    return json_response(
        {
            "deviceId": device,
            "platform": message.platform,
            "provider": message.provider,
            message.token_kind: message.token,
            "appId": message.app_id,
            "environment": message.environment,
            "locale": message.locale,
        }
    )


async def delete_device(services: Services, request: Request, tenant: str, user: str) -> Response:
    """Forget a push target."""
    device = path_id(request, "deviceId")
    done = await services.backend.request(
        DeviceDelete(tenant, user, slot_of(tenant, user), device), request.deadline
    )
    if isinstance(done, Done) and done.count == 0:
        raise NotFoundError("the user has no such device", "deviceId", "a registered device", device)
    return json_response({"success": True})


async def put_user_device(services: Services, request: Request) -> Response:
    """PUT /v1/users/{userId}/devices/{deviceId}."""
    return await put_device(services, request, request.tenant, path_id(request, "userId"))


async def delete_user_device(services: Services, request: Request) -> Response:
    """DELETE /v1/users/{userId}/devices/{deviceId}."""
    return await delete_device(services, request, request.tenant, path_id(request, "userId"))


async def get_user_device(services: Services, request: Request) -> Response:
    """GET /v1/users/{userId}/devices/{deviceId}."""
    user, device = path_id(request, "userId"), path_id(request, "deviceId")
    found = await services.feed.device(request.tenant, user, device)
    if found is None:
        raise NotFoundError("the user has no such device", "deviceId", "a registered device", device)
    document = {
        "deviceId": device,
        "platform": found["platform"],
        "provider": found["provider"],
        found["token_kind"]: found["token"],
        "appId": found["app_id"],
        "environment": found["environment"],
        "locale": found["locale"],
        "registeredAt": rfc3339(found["registered_ms"]),
    }
    if found["disabled_ms"] is not None:
        document["disabledAt"] = rfc3339(found["disabled_ms"])
        document["disabledReason"] = found["disabled_reason"]
    return json_response(document)


# -- preferences --------------------------------------------------------------------------------------


async def get_user_preferences(services: Services, request: Request) -> Response:
    """GET /v1/users/{userId}/preferences."""
    return await preferences.get_preferences(services, request, request.tenant, path_id(request, "userId"))


async def put_user_preferences(services: Services, request: Request) -> Response:
    """PUT /v1/users/{userId}/preferences."""
    return await preferences.put_preferences(services, request, request.tenant, path_id(request, "userId"))


async def patch_user_preferences(services: Services, request: Request) -> Response:
    """PATCH /v1/users/{userId}/preferences."""
    return await preferences.patch_preferences(services, request, request.tenant, path_id(request, "userId"))


# -- sessions, tokens ---------------------------------------------------------------------------------


async def revoke_sessions(services: Services, request: Request) -> Response:
    """POST /v1/users/{userId}/sessions/revoke."""
    user = path_id(request, "userId")
    await request.json_object(())
    tenant = request.tenant
    await services.backend.request(SessionsRevoke(tenant, user, slot_of(tenant, user)), request.deadline)
    services.auth.revoked(tenant, user)
    await audited(services, request, "sessions.revoke", user)
    return json_response({"success": True})


async def post_token(services: Services, request: Request) -> Response:
    """POST /v1/tokens."""
    document = await request.json_object(("userId", "ttlS"))
    user = valid_id("userId", document.get("userId"))
    settings = services.settings.ingress
    ttl_s = document.get("ttlS")
    if ttl_s is None:
        ttl_s = settings.token_ttl_s
    elif (
        isinstance(ttl_s, bool)
        or not isinstance(ttl_s, int | float)
        or not 1 <= ttl_s <= settings.token_ttl_max_s
    ):
        expected = f"seconds from 1 to {settings.token_ttl_max_s:.0f}"
        raise refused(
            f"expected ttlS to be {expected}, got {shown(ttl_s)}",
            [FieldError("ttlS", expected, shown(ttl_s))],
        )
    record = await services.auth.tenant(request.tenant)
    if record is None:
        raise UnauthenticatedError("the tenant of the API key is gone")
    now_ms = services.clock.now_ms()
    token = tokens.mint(request.tenant, user, record.client_secret, now_ms, ttl_s)
    # `exp` is whole seconds, rounded up.
    expires_ms = -(-(now_ms + round(ttl_s * 1000)) // 1000) * 1000
    return json_response({"token": token, "expiresAt": rfc3339(expires_ms)}, 201)


# -- the table ----------------------------------------------------------------------------------------

FEED_QUERY: Final = (
    *paging(DEFAULT_LIMIT, MAX_LIMIT),
    Query("unread", {"enum": ["true", "false"]}, "true: only unread ones."),
    Query("status", {"enum": list(STATUSES)}, "archived lists what was archived or dismissed."),
    Query("type", {"type": "string", "maxLength": 64}, "Only this type."),
    Query("category", {"type": "string", "maxLength": 64}, "Only this category."),
    Query(
        "q",
        {"type": "string", "maxLength": MAX_CHARS},
        f"Each word of it (at most {MAX_WORDS}) starts a word of title or body, in any case.",
    ),
)
DEVICE_EXAMPLE: Final = {
    "platform": "android",
    "provider": "fcm",
    "token": "fcm-registration-token",
    "appId": "com.example.app",
    "environment": "production",
}
IF_MATCH: Final = Query(
    "If-Match", {"type": "string"}, "The ETag of the document that is replaced; else 412."
)
PREFERENCES_EXAMPLE: Final = {
    "channels": {"push": False},
    "quietHours": {"start": "22:00", "end": "07:00", "timezone": "Europe/Vienna", "days": ["mon", "tue"]},
}
PREFERENCES_PATCH: Final[dict[str, Any]] = {
    "type": "object",
    "propertyNames": {"enum": list(DEFAULTS)},
    "description": "A JSON merge patch (RFC 7396) of what the user said; null takes a member out.",
}
PATCH_EXAMPLE: Final = {"channels": {"in_app": {"durationMs": 8000}}, "quietHours": None}
PATCH_DOC: Final = "Of what the user said, not of the tenant's defaults. Holds for the next event."
_READ, _WRITE = "users:read", "users:write"
_TAG = "Users"

ROUTES: Final = (
    Route(
        "POST", "/v1/tokens", post_token, SERVICE, "Mint a client token", scope="tokens:write",
        body=obj(
            {"userId": USER_ID, **nullable({"ttlS": {"type": "number", "minimum": 1, "maximum": 86400}})},
            ["userId"],
        ),
        body_example={"userId": "ada", "ttlS": 3600},
        status=201, answer=obj({"token": {"type": "string"}, "expiresAt": INSTANT}, ["token", "expiresAt"]),
        answer_example={"token": "eyJhbGciOi...", "expiresAt": "2026-01-02T03:04:05.000Z"},
        problems=(400, 413, 422), tag=_TAG,
    ),
    Route(
        "PUT", "/v1/users/{userId}/devices/{deviceId}", put_user_device, SERVICE, "Register a push target",
        scope=_WRITE, doc="A target belongs to one user: registering it for another moves it.",
        body=ref("Device"), body_example=DEVICE_EXAMPLE, answer=ref("RegisteredDevice"),
        answer_example={"deviceId": "pixel-8", **DEVICE_EXAMPLE, "locale": None},
        problems=(400, 413, 422), tag=_TAG,
    ),
    Route(
        "GET", "/v1/users/{userId}/devices/{deviceId}", get_user_device, SERVICE, "Read a push target",
        scope=_READ, answer=ref("RegisteredDevice"), problems=(404, 422), tag=_TAG,
    ),
    Route(
        "DELETE", "/v1/users/{userId}/devices/{deviceId}", delete_user_device, SERVICE,
        "Forget a push target", scope=_WRITE, answer=SUCCESS, answer_example={"success": True},
        problems=(404, 422), tag=_TAG,
    ),
    Route(
        "GET", "/v1/users/{userId}/notifications", get_user_feed, SERVICE, "Read a user's feed", scope=_READ,
        query=FEED_QUERY, answer=ref("Feed"), problems=(400, 422), tag=_TAG,
    ),
    Route(
        "GET", "/v1/users/{userId}/preferences", get_user_preferences, SERVICE, "Read preferences",
        scope=_READ, query=(preferences.VIEW,), answer=ref("Preferences"), problems=(400, 422), tag=_TAG,
    ),
    Route(
        "PUT", "/v1/users/{userId}/preferences", put_user_preferences, SERVICE, "Replace preferences",
        scope=_WRITE, doc="Holds for the next event.", query=(preferences.VIEW,), headers=(IF_MATCH,),
        body=ref("Preferences"),
        body_required=False, body_example=PREFERENCES_EXAMPLE, answer=ref("Preferences"),
        problems=(400, 412, 413, 422), tag=_TAG,
    ),
    Route(
        "PATCH", "/v1/users/{userId}/preferences", patch_user_preferences, SERVICE,
        "Change a part of the preferences", scope=_WRITE, doc=PATCH_DOC, query=(preferences.VIEW,),
        headers=(IF_MATCH,), body=PREFERENCES_PATCH, body_required=False, body_example=PATCH_EXAMPLE,
        answer=ref("Preferences"), problems=(400, 412, 413, 422), tag=_TAG,
    ),
    Route(
        "POST", "/v1/users/{userId}/sessions/revoke", revoke_sessions, SERVICE, "Revoke a user's sessions",
        scope=_WRITE, doc="Tokens issued before now are invalid, sockets are closed with 4001.",
        body=obj({}), body_required=False, answer=SUCCESS, answer_example={"success": True},
        problems=(400, 413, 422), tag=_TAG,
    ),
    Route(
        "GET", "/v1/notifications/{id}", get_notification, SERVICE, "Read a notification and its deliveries",
        scope=_READ,
        answer=obj(
            {
                "notification": ref("Notification"),
                "deliveryState": {"enum": ["SENT", "DELIVERED", "READ", "RETRACTED"]},
                "deliveries": {"type": "array", "items": {"type": "object"}},
                **MERGED,
                **HISTORY,
            },
            ["notification", "deliveryState", "deliveries", *MERGED, *HISTORY],
        ),
        problems=(404,), tag=_TAG,
    ),
)  # fmt: skip
