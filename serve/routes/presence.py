"""Who is there, for services; how I am seen, for clients."""

from __future__ import annotations

from typing import Any, Final

from carillon.clock import rfc3339
from carillon.events import refused
from carillon.ids import slot_of
from carillon.messages import PresenceMode, PresenceQuery, PresenceReply, UserPresence
from carillon.presence import MODES
from carillon.problems import FieldError, shown
from serve.http import Request, Response, json_response
from serve.routes.bodies import id_list, path_id, valid_id
from serve.routing import CLIENT, SERVICE, Route
from serve.schemas import LAST_SEEN, PRESENT_DEVICES, USER_ID, obj, ref
from serve.services import Services


def _seen(last_seen_ms: int | None) -> str | None:
    return None if last_seen_ms is None else rfc3339(last_seen_ms)


def _devices(one: UserPresence) -> list[dict[str, Any]]:
    return [
        {
            "deviceId": d.device,
            "attention": d.attention,
            "since": rfc3339(d.since_ms),
            "connections": d.connections,
        }
        for d in one.devices
    ]


async def _ask(services: Services, request: Request, users: list[str]) -> list[UserPresence]:
    if not users:
        return []
    reply = await services.backend.request(PresenceQuery(request.tenant, users), request.deadline)
    assert isinstance(reply, PresenceReply)
    return reply.users


def _presence(one: UserPresence) -> dict[str, Any]:
    return {
        "userId": one.user,
        "status": one.status,
        "invisible": one.invisible,
        "devices": _devices(one),
        "lastSeenAt": _seen(one.last_seen_ms),
    }


async def get_presence(services: Services, request: Request) -> Response:
    """GET /v1/presence/{userId}."""
    (one,) = await _ask(services, request, [path_id(request, "userId")])
    return json_response(_presence(one))


async def query_presence(services: Services, request: Request) -> Response:
    """POST /v1/presence/query."""
    users = id_list(await request.json_object(("userIds",)), "userIds")
    for index, user in enumerate(users):
        # What is printable has neither control characters nor lone surrogates: no need for the whole check.
        if not (isinstance(user, str) and user.isprintable() and 0 < len(user) <= 128):
            valid_id(f"userIds/{index}", user)
    return json_response({"users": [_presence(one) for one in await _ask(services, request, users)]})


async def get_my_presence(services: Services, request: Request) -> Response:
    """GET /api/presence."""
    (one,) = await _ask(services, request, [request.user])
    return json_response(
        {
            "mode": "invisible" if one.invisible else "auto",
            "status": one.status,
            "devices": _devices(one),
            "lastSeenAt": _seen(one.last_seen_ms),
        }
    )


async def put_my_presence(services: Services, request: Request) -> Response:
    """PUT /api/presence."""
    mode = (await request.json_object()).get("mode")
    if not isinstance(mode, str) or mode not in MODES:
        expected = "|".join(MODES)
        raise refused(
            f"expected mode to be {expected}, got {shown(mode)}", [FieldError("mode", expected, shown(mode))]
        )
    slot = slot_of(request.tenant, request.user)
    await services.backend.request(PresenceMode(request.tenant, request.user, slot, mode), request.deadline)
    return json_response({"mode": mode})


_STATUS: Final = {"enum": ["active", "idle", "offline"]}
_MODE: Final = obj({"mode": {"enum": list(MODES)}}, ["mode"])
_TAG: Final = "Presence"

ROUTES: Final = (
    Route(
        "GET", "/v1/presence/{userId}", get_presence, SERVICE, "Is the user there?", scope="presence:read",
        doc=(
            "`status` is what others may see: offline for a user who is `invisible`, whose `devices` are "
            "told all the same."
        ),
        answer=ref("Presence"), problems=(422,), tag=_TAG,
    ),
    Route(
        "POST", "/v1/presence/query", query_presence, SERVICE, "Presence of many users",
        scope="presence:read",
        body=obj({"userIds": {"type": "array", "items": USER_ID, "maxItems": 1000}}, ["userIds"]),
        body_example={"userIds": ["ada", "grace"]},
        answer=obj({"users": {"type": "array", "items": ref("Presence")}}, ["users"]),
        answer_example={
            "users": [
                {"userId": "ada", "status": "offline", "invisible": False, "devices": [], "lastSeenAt": None}
            ]
        },
        problems=(400, 413, 422), tag=_TAG,
    ),
    Route(
        "GET", "/api/presence", get_my_presence, CLIENT, "How others see me",
        answer=obj(
            {
                "mode": {"enum": list(MODES)},
                "status": _STATUS,
                "devices": PRESENT_DEVICES,
                "lastSeenAt": LAST_SEEN,
            },
            ["mode", "status", "devices", "lastSeenAt"],
        ),
        tag=_TAG,
    ),
    Route(
        "PUT", "/api/presence", put_my_presence, CLIENT, "Be invisible, or not",
        doc="Holds for the user, on all devices, until it is changed. Delivery does not change.",
        body=_MODE, body_example={"mode": "invisible"}, answer=_MODE, answer_example={"mode": "invisible"},
        problems=(400, 413, 422), tag=_TAG,
    ),
)  # fmt: skip
