"""Users as such: their profiles, everything kept of them, and its erasure."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Final

import msgspec

from carillon import profiles
from carillon.clock import rfc3339
from carillon.errors import CarillonError, NotFoundError
from carillon.event_rules import LOCALE
from carillon.events import ProblemError
from carillon.ids import slot_of
from carillon.messages import ProfilePut, UserErase
from carillon.problems import problem, problem_document, problem_of
from carillon.profiles import Profile, ProfileError
from serve.audit import audited
from serve.http import Request, Response, StreamedResponse, json_response
from serve.routes.bodies import path_id
from serve.routing import SERVICE, Route
from serve.schemas import INSTANT, SUCCESS, nullable, obj, text
from serve.services import Services
from stores.postgres.users import KnownUser

NDJSON: Final = b"application/x-ndjson"
_encode: Final = msgspec.json.Encoder().encode


def _unknown(user: str) -> NotFoundError:
    return NotFoundError("nothing is known of this user", "userId", "a known user", user)


def _told(user: str, known: KnownUser) -> dict[str, Any]:
    return {
        "userId": user,
        **profiles.profile_json(known.profile),
        "createdAt": rfc3339(known.created_ms),
        "updatedAt": None if known.updated_ms is None else rfc3339(known.updated_ms),
        "lastSeenAt": None if known.last_seen_ms is None else rfc3339(known.last_seen_ms),
    }


async def put_user(services: Services, request: Request) -> Response:
    """PUT /v1/users/{userId}."""
    user, tenant = path_id(request, "userId"), request.tenant
    document = await request.json_object()
    try:
        profile: Profile = profiles.validate(document, services.settings.ingress.max_attributes_bytes)
    except ProfileError as exc:
        raise ProblemError(problem("invalid", str(exc), exc.errors)) from None
    message = ProfilePut(tenant, user, slot_of(tenant, user), profiles.pack(profile))
    await services.backend.request(message, request.deadline)
    return json_response({"userId": user, **profiles.profile_json(profile)})


async def get_user(services: Services, request: Request) -> Response:
    """GET /v1/users/{userId}."""
    user = path_id(request, "userId")
    known = await services.users.profile(request.tenant, user)
    if known is None:
        raise _unknown(user)
    return json_response(_told(user, known))


async def delete_user(services: Services, request: Request) -> Response:
    """DELETE /v1/users/{userId}."""
    user, tenant = path_id(request, "userId"), request.tenant
    await services.backend.request(UserErase(tenant, user, slot_of(tenant, user)), request.deadline)
    services.auth.revoked(tenant, user)
    await services.feeds.forget(tenant, user)
    await audited(services, request, "user.erase", user)
    return json_response({"success": True})


async def export_user(services: Services, request: Request) -> Response:
    """GET /v1/users/{userId}/export."""
    user, tenant = path_id(request, "userId"), request.tenant
    if await services.users.profile(tenant, user) is None:
        raise _unknown(user)
    await audited(services, request, "user.export", user)
    return StreamedResponse(_export(services, request, tenant, user), content_type=NDJSON)


async def _export(services: Services, request: Request, tenant: str, user: str) -> AsyncGenerator[bytes]:
    now_ms = services.clock.now_ms()
    yield _encode({"kind": "user", "userId": user, "exportedAt": rfc3339(now_ms)}) + b"\n"
    count = 1
    try:
        async for lines in services.exporter.lines(tenant, user, now_ms):
            if lines:
                count += len(lines)
                yield ("\n".join(lines) + "\n").encode()
    except CarillonError as exc:
        told = problem_document(problem_of(exc), request.request_id.decode())
        yield _encode({"kind": "error", "problem": told}) + b"\n"
        return
    yield _encode({"kind": "end", "lines": count + 1}) + b"\n"


_MEMBERS: Final = {
    "email": {"type": "string", "maxLength": 254, "description": "An e-mail address."},
    "phone": {"type": "string", "pattern": r"^\+[1-9][0-9]{6,14}$", "description": "E.164."},
    "locale": {"type": "string", "pattern": f"^({LOCALE.pattern})$"},
    "timezone": text(1, 64),
    "attributes": {"type": "object", "description": "Yours. Names hold no dots."},
}
_EXAMPLE: Final = {
    "email": "ada@example.com",
    "phone": "+436601234567",
    "locale": "de-AT",
    "timezone": "Europe/Vienna",
    "attributes": {"plan": "pro", "seats": 12, "tags": ["beta"]},
}
_NULLABLE_INSTANT: Final = {"anyOf": [INSTANT, {"type": "null"}]}
_USER: Final = obj(
    {
        "userId": {"type": "string"},
        **{name: {"type": ["string", "null"]} for name in ("email", "phone", "locale", "timezone")},
        "attributes": {"type": "object"},
        "createdAt": INSTANT, "updatedAt": _NULLABLE_INSTANT, "lastSeenAt": _NULLABLE_INSTANT,
    },
    ["userId", *profiles.MEMBERS],
)  # fmt: skip
_TOLD: Final = {
    "userId": "ada", **_EXAMPLE, "createdAt": "2026-01-02T03:04:05.000Z",
    "updatedAt": "2026-01-02T03:04:05.000Z", "lastSeenAt": None,
}  # fmt: skip
_READ, _WRITE, _TAG = "users:read", "users:write", "Users"

ROUTES: Final = (
    Route(
        "PUT", "/v1/users/{userId}", put_user, SERVICE, "Replace a user's profile", scope=_WRITE,
        doc="What is left out is empty then. `locale` and `timezone` count where the user's devices and "
        "preferences name none.",
        body=obj(nullable(_MEMBERS)), body_required=False, body_example=_EXAMPLE, answer=_USER,
        answer_example={"userId": "ada", **_EXAMPLE}, problems=(400, 413, 422), tag=_TAG,
    ),
    Route(
        "GET", "/v1/users/{userId}", get_user, SERVICE, "Read a user's profile", scope=_READ,
        doc="A user who has notifications and no profile is answered with an empty one.",
        answer=_USER, answer_example=_TOLD, problems=(404, 422), tag=_TAG,
    ),
    Route(
        "DELETE", "/v1/users/{userId}", delete_user, SERVICE, "Erase everything kept of a user", scope=_WRITE,
        doc="Answered when nothing is left; an erasure that was interrupted goes on by itself. Sockets are "
        "closed with 4001, tokens made before are refused. The audit trail keeps that it was done.",
        answer=SUCCESS, answer_example={"success": True}, problems=(404, 422), tag=_TAG,
    ),
    Route(
        "GET", "/v1/users/{userId}/export", export_user, SERVICE, "Everything kept of a user", scope=_READ,
        doc="Lines of JSON (application/x-ndjson), each with its `kind`; the last one is `end`.",
        answer_type="application/x-ndjson", problems=(404, 422), tag=_TAG,
    ),
)  # fmt: skip
