"""What a user's own devices call: token in hand, always about the token's user."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from carillon.change_frames import change_frames
from carillon.client_frames import VISIBILITY_STATES, visibility
from carillon.clock import rfc3339
from carillon.errors import NotFoundError
from carillon.event_rules import MAX_INT, Text, text_error
from carillon.events import refused
from carillon.ids import slot_of
from carillon.messages import Change, ChangeResult, DeviceAck, DeviceVisibility, Logout
from carillon.notification import notification_json, user_json_of
from carillon.problems import FieldError, shown
from serve.connections import Connections
from serve.http import (
    BEHIND_SERVE,
    STREAM_PATH,
    ClientGoneError,
    LateResponse,
    Request,
    Response,
    json_response,
    whole_number,
)
from serve.poll import Poll, wait_and_sync
from serve.routes import preferences, users
from serve.routes.bodies import notification_ids, path_notification, valid_id
from serve.routing import CLIENT, Query, Route
from serve.schemas import IDS_BODY, INSTANT, SUCCESS, WHOLE, nullable, obj, ref, text
from serve.services import Services
from serve.stream import asked_device
from stores.postgres.feed import SyncPage

SYNC_LIMIT: Final = 200
SYNC_LIMIT_MAX: Final = 1000


async def _change(services: Services, request: Request, op: str, **more: Any) -> ChangeResult:
    message = Change(request.tenant, request.user, slot_of(request.tenant, request.user), op, **more)
    result = await services.backend.request(message, request.deadline)
    assert isinstance(result, ChangeResult)
    return result


async def get_feed(services: Services, request: Request) -> Response:
    """GET /api/notifications."""
    return await users.feed(services, request, request.tenant, request.user)


async def post_ticket(services: Services, request: Request) -> Response:
    """POST /api/tickets."""
    await request.json_object(())
    assert request.identity is not None
    ticket, until_ms = await services.tickets.make(
        request.identity, services.clock.now_ms(), services.settings.ingress.ticket_ttl_s
    )
    return json_response({"ticket": ticket, "expiresAt": rfc3339(until_ms)}, 201)


async def post_logout(services: Services, request: Request) -> Response:
    """POST /api/logout."""
    document = await request.json_object(("deviceId",))
    device = document.get("deviceId")
    if device is not None:
        device = valid_id("deviceId", device)
    who = request.identity
    assert who is not None
    slot = slot_of(who.tenant, who.user)
    message = Logout(who.tenant, who.user, slot, device, who.token_id, who.expires_ms)
    await services.backend.request(message, request.deadline)
    services.auth.revoked(who.tenant, who.user)
    return json_response({"success": True})


async def get_unread_count(services: Services, request: Request) -> Response:
    """GET /api/notifications/unread-count."""
    count, rev = await services.feeds.unread_count(request.tenant, request.user, services.clock.now_ms())
    return json_response({"count": count, "rev": rev})


async def post_read(services: Services, request: Request) -> Response:
    """POST /api/notifications/read."""
    ids = notification_ids(await request.json_object())
    if ids:
        await _change(services, request, "read", ids=ids)
    return json_response({"success": True})


async def post_seen(services: Services, request: Request) -> Response:
    """POST /api/notifications/seen."""
    ids = notification_ids(await request.json_object())
    if ids:
        await _change(services, request, "seen", ids=ids)
    return json_response({"success": True})


async def post_read_all(services: Services, request: Request) -> Response:
    """POST /api/notifications/read-all."""
    document = await request.json_object()
    up_to = None if document.get("upToSeq") is None else _seq(document, "upToSeq")
    result = await _change(services, request, "read_all", up_to_seq=up_to)
    return json_response({"count": result.changed})


async def post_archive(services: Services, request: Request) -> Response:
    """POST /api/notifications/{id}/archive."""
    return await _one(services, request, "archive")


async def post_dismiss(services: Services, request: Request) -> Response:
    """POST /api/notifications/{id}/dismiss."""
    return await _one(services, request, "dismiss")


async def post_click(services: Services, request: Request) -> Response:
    """POST /api/notifications/{id}/click."""
    return await _one(services, request, "click")


async def _one(services: Services, request: Request, op: str) -> Response:
    raw = path_notification(request)
    document = await request.json_object()
    action = document.get("actionId") if op == "click" else None
    if action is not None:
        error = text_error("actionId", action, Text(1, 64))
        if error is not None:
            raise refused(f"expected actionId to be {error.expected}, got {error.got}", [error])
    await _change(services, request, op, ids=[raw], action_id=action, strict=True)
    return json_response({"success": True})


async def get_preferences(services: Services, request: Request) -> Response:
    """GET /api/notifications/preferences."""
    return await preferences.get_preferences(services, request, request.tenant, request.user)


async def put_preferences(services: Services, request: Request) -> Response:
    """PUT /api/notifications/preferences."""
    return await preferences.put_preferences(services, request, request.tenant, request.user)


async def patch_preferences(services: Services, request: Request) -> Response:
    """PATCH /api/notifications/preferences."""
    return await preferences.patch_preferences(services, request, request.tenant, request.user)


async def put_device(services: Services, request: Request) -> Response:
    """PUT /api/devices/{deviceId}."""
    return await users.put_device(services, request, request.tenant, request.user)


async def delete_device(services: Services, request: Request) -> Response:
    """DELETE /api/devices/{deviceId}."""
    return await users.delete_device(services, request, request.tenant, request.user)


async def get_sync(services: Services, request: Request) -> Response:
    """GET /api/sync: everything after a position, in order; with `waitS` once there is something."""
    query = request.query()
    epoch = query.get("epoch") or None
    since = whole_number(query, "since", 0, 0, MAX_INT)
    rev = whole_number(query, "rev", 0, 0, MAX_INT) if "rev" in query else None
    limit = whole_number(query, "limit", SYNC_LIMIT, 1, SYNC_LIMIT_MAX)
    wait_s = min(whole_number(query, "waitS", 0, 0, 3600), services.settings.ingress.max_wait_s)
    device, told = asked_device(query)

    async def read() -> SyncPage:
        return await services.feed.sync(
            request.tenant,
            request.user,
            services.clock.now_ms(),
            epoch=epoch,
            since=since,
            rev=rev,
            limit=limit,
        )

    if not wait_s:
        return _sync_answer(request, await read(), services.clock.now_ms())
    connections = _connections(services, request)
    assert request.identity is not None
    started = services.clock.monotonic()
    poll = Poll(connections, epoch, since, rev)
    position = None if epoch is None else (epoch, since, rev)
    work = asyncio.ensure_future(
        wait_and_sync(connections, request.identity, device, told, poll, position, wait_s, read)
    )
    gone = asyncio.ensure_future(request.gone())
    services.in_flight -= 1  # it takes no work, and is bounded by `ingress.max_streams`
    services.shares.leave(request.tenant)
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGoneError("the caller hung up")
    finally:
        services.in_flight += 1
        services.shares.again(request.tenant)
        gone.cancel()
        work.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
    waited_s = services.clock.monotonic() - started
    return _sync_answer(request, work.result(), services.clock.now_ms(), waited_s)


def _sync_answer(request: Request, page: SyncPage, now_ms: int, waited_s: float = 0.0) -> Response:
    user_json = user_json_of(request.user)
    notifications = ",".join(notification_json(row, user_json) for row in page.notifications)
    frames = change_frames(page.changes, user_json, 0, now_ms, more=False)
    changes = ",".join(frame.decode() for _, frame, _ in frames)
    response = LateResponse(
        (
            f'{{"notifications":[{notifications}],"changes":[{changes}],"lastSeq":{page.last_seq},'
            f'"rev":{page.rev},"unreadCount":{page.head.unread},"epoch":{user_json_of(page.head.epoch)},'
            f'"recovered":{"true" if page.recovered else "false"},"more":{"true" if page.more else "false"}}}'
        ).encode()
    )
    response.waited_s = waited_s
    return response


def _connections(services: Services, request: Request) -> Connections:
    """What holds streams and polls. Raises NotFoundError: not by this way."""
    if services.connections is None or BEHIND_SERVE in request.scope:
        raise NotFoundError(f"streams and long polls are served at the replicas' own door: {services.url}")
    return services.connections


async def get_stream(services: Services, request: Request) -> Response:
    """GET /api/stream by a way that has no socket to hand over."""
    raise NotFoundError(f"streams are served by GET at the replicas' own door: {services.url}{STREAM_PATH}")


async def post_ack(services: Services, request: Request) -> Response:
    """POST /api/ack: ACK for who has no socket."""
    document = await request.json_object()
    device = document.get("deviceId")
    if device is not None:
        valid_id("deviceId", device)
    given = [name for name in ("notificationId", "notificationIds", "seq") if document.get(name) is not None]
    if len(given) != 1:
        shown_names = " and ".join(given) or "none of them"
        wanted = "one of notificationIds, notificationId and seq"
        raise refused(f"expected {wanted}, got {shown_names}", [FieldError("", wanted, shown_names)])
    seq = None
    ids: list[bytes] = []
    if given[0] == "seq":
        seq = _seq(document, "seq")
    elif given[0] == "notificationIds":
        ids = notification_ids(document)
    else:
        ids = notification_ids({"notificationIds": [document["notificationId"]]})
    if ids or seq is not None:
        slot = slot_of(request.tenant, request.user)
        rev = None if document.get("rev") is None else _seq(document, "rev")
        message = DeviceAck(request.tenant, request.user, slot, device, seq, ids, rev)
        await services.backend.request(message, request.deadline)
    return json_response({"success": True})


async def post_visibility(services: Services, request: Request) -> Response:
    """POST /api/visibility: VISIBILITY for who has no socket."""
    document = await request.json_object()
    device = valid_id("deviceId", document.get("deviceId"))
    told = visibility(document)
    slot = slot_of(request.tenant, request.user)
    message = DeviceVisibility(request.tenant, request.user, slot, device, told.state, told.viewing)
    await services.backend.request(message, request.deadline)
    return json_response({"success": True})


def _seq(document: dict[str, Any], name: str) -> int:
    value = document[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_INT:
        raise refused(
            f"expected {name} to be a seq, got {shown(value)}",
            [FieldError(name, "a seq (0 to 2^53-1)", shown(value))],
        )
    return value


_TAG = "Client"
_EMPTY: Final = obj({}, strict=False)
_SYNC_ANSWER: Final = obj(
    {
        "notifications": {"type": "array", "items": ref("Notification")},
        "changes": {"type": "array", "items": {"type": "object"}},
        "lastSeq": WHOLE,
        "rev": WHOLE,
        "unreadCount": WHOLE,
        "epoch": {"type": "string"},
        "recovered": {"type": "boolean"},
        "more": {"type": "boolean"},
    },
    ["notifications", "changes", "lastSeq", "rev", "unreadCount", "epoch", "recovered", "more"],
)


_DEVICE_QUERY: Final = (
    Query("deviceId", text(1, 128), "The id used under /api/devices; absent: random."),
    Query("state", {"enum": list(VISIBILITY_STATES)}, "Where the user looks, as in VISIBILITY."),
    Query("viewing", {"type": "string", "maxLength": 300}, 'Likewise: "targetType:targetId".'),
)


def _state_route(name: str, handler: Any, summary: str, body: dict[str, Any]) -> Route:
    return Route(
        "POST", f"/api/notifications/{{id}}/{name}", handler, CLIENT, summary, body=body, body_required=False,
        answer=SUCCESS, answer_example={"success": True}, problems=(400, 404, 413, 422), tag=_TAG,
    )  # fmt: skip


ROUTES: Final = (
    Route(
        "GET", "/api/notifications", get_feed, CLIENT, "My feed, newest first", query=users.FEED_QUERY,
        doc="Archived, dismissed, retracted and expired ones are left out.",
        answer=ref("Feed"), problems=(400, 422), tag=_TAG,
    ),
    Route(
        "GET", "/api/notifications/unread-count", get_unread_count, CLIENT, "How many are unread",
        answer=obj({"count": WHOLE, "rev": WHOLE}, ["count", "rev"]),
        answer_example={"count": 3, "rev": 40}, tag=_TAG,
    ),
    Route(
        "POST", "/api/notifications/read", post_read, CLIENT, "Mark as read", body=IDS_BODY,
        body_example={"notificationIds": ["0198c0de-7000-7000-8000-000000000001"]},
        answer=SUCCESS, answer_example={"success": True}, problems=(400, 413, 422), tag=_TAG,
    ),
    Route(
        "POST", "/api/notifications/read-all", post_read_all, CLIENT, "Mark all as read",
        body=obj(nullable({"upToSeq": {"type": "integer", "minimum": 0, "maximum": MAX_INT}}), strict=False),
        body_required=False, body_example={"upToSeq": 17}, answer=obj({"count": WHOLE}, ["count"]),
        answer_example={"count": 3}, problems=(400, 413, 422), tag=_TAG,
    ),
    Route(
        "POST", "/api/notifications/seen", post_seen, CLIENT, "Mark as seen", body=IDS_BODY,
        body_example={"notificationIds": ["0198c0de-7000-7000-8000-000000000001"]},
        answer=SUCCESS, answer_example={"success": True}, problems=(400, 413, 422), tag=_TAG,
    ),
    _state_route("archive", post_archive, "Archive", _EMPTY),
    _state_route("click", post_click, "Note a click", obj(nullable({"actionId": text(1, 64)}), strict=False)),
    _state_route("dismiss", post_dismiss, "Dismiss", _EMPTY),
    Route(
        "GET", "/api/notifications/preferences", get_preferences, CLIENT, "My preferences",
        query=(preferences.VIEW,), answer=ref("Preferences"), problems=(400, 422), tag=_TAG,
    ),
    Route(
        "PUT", "/api/notifications/preferences", put_preferences, CLIENT, "Replace my preferences",
        query=(preferences.VIEW,), headers=(users.IF_MATCH,),
        body=ref("Preferences"), body_required=False, body_example=users.PREFERENCES_EXAMPLE,
        answer=ref("Preferences"), problems=(400, 412, 413, 422), tag=_TAG,
    ),
    Route(
        "PATCH", "/api/notifications/preferences", patch_preferences, CLIENT,
        "Change a part of my preferences", doc=users.PATCH_DOC,
        query=(preferences.VIEW,), headers=(users.IF_MATCH,),
        body=users.PREFERENCES_PATCH, body_required=False, body_example=users.PATCH_EXAMPLE,
        answer=ref("Preferences"), problems=(400, 412, 413, 422), tag=_TAG,
    ),
    Route(
        "PUT", "/api/devices/{deviceId}", put_device, CLIENT, "Register my push target", body=ref("Device"),
        body_example=users.DEVICE_EXAMPLE, answer=ref("RegisteredDevice"),
        problems=(400, 413, 422), tag=_TAG,
    ),
    Route(
        "DELETE", "/api/devices/{deviceId}", delete_device, CLIENT, "Forget my push target",
        answer=SUCCESS, answer_example={"success": True}, problems=(404, 422), tag=_TAG,
    ),
    Route(
        "POST", "/api/logout", post_logout, CLIENT, "Log out",
        doc=(
            "The token of this request is refused from now on, and its sockets are closed with 4001. With "
            "`deviceId` that device's push target and sockets go, too: the next user of a shared device "
            "never sees a push for this one."
        ),
        body=obj(nullable({"deviceId": text(1, 128)})), body_required=False,
        body_example={"deviceId": "phone"},
        answer=SUCCESS, answer_example={"success": True}, problems=(400, 413, 422), tag=_TAG,
    ),
    Route(
        "POST", "/api/tickets", post_ticket, CLIENT, "A one-time ticket for a URL",
        doc=(
            "For clients that can only set a URL: `?ticket=` stands for the token that asked, once, within "
            "`ingress.ticket_ttl_s`. The connection ends when that token would."
        ),
        body=_EMPTY, body_required=False, status=201,
        answer=obj({"ticket": text(1, 64), "expiresAt": INSTANT}, ["ticket", "expiresAt"]),
        answer_example={"ticket": "tkt_Zk3...", "expiresAt": "2026-01-01T00:00:30.000Z"},
        problems=(400, 413, 422), tag=_TAG,
    ),
    Route(
        "GET", "/api/sync", get_sync, CLIENT, "Everything after a position",
        doc=(
            "Notifications after `since`, then the changes after `rev` of older ones, as the frames the "
            "WebSocket would carry. `more`: the page was cut, ask again from `lastSeq` and `rev`. "
            "`recovered: false`: the position is not known any more, read the feed."
        ),
        query=(
            Query("epoch", {"type": "string"}, "The epoch the position belongs to; absent: not compared."),
            Query("since", {"type": "integer", "minimum": 0, "maximum": MAX_INT}, "Last seq the client has."),
            Query("rev", {"type": "integer", "minimum": 0, "maximum": MAX_INT}, "Absent: no changes."),
            Query("limit", {"type": "integer", "minimum": 1, "maximum": SYNC_LIMIT_MAX}, "Page size."),
            Query(
                "waitS", {"type": "integer", "minimum": 0, "maximum": 3600},
                "At the replica's own door: wait so many seconds (at most `ingress.max_wait_s`) for news, "
                "connected meanwhile; `since` acknowledges.",
            ),
            *_DEVICE_QUERY,
        ),
        answer=_SYNC_ANSWER, problems=(400, 404, 422, 429), tag=_TAG,
    ),
    Route(
        "GET", "/api/stream", get_stream, CLIENT, "Frames as server-sent events",
        doc=(
            "At the replica's own door only. The frames of the WebSocket as `data`, each with the event id "
            "`epoch:seq:rev`; a position resumes and acknowledges. The last event is `close`, with the "
            "WebSocket's close code. The token may be in the URL."
        ),
        headers=(Query("Last-Event-ID", {"type": "string"}, "Position: `epoch:seq:rev`."),),
        query=(
            Query("lastEventId", {"type": "string"}, "The same, for who cannot set the header."),
            Query("epoch", {"type": "string"}, "Position; with `lastSeq`."),
            Query("lastSeq", {"type": "integer", "minimum": 0, "maximum": MAX_INT}, "Position."),
            Query("lastRev", {"type": "integer", "minimum": 0, "maximum": MAX_INT}, "Position."),
            Query("token", {"type": "string"}, "In place of the Authorization header."),
            Query("ticket", {"type": "string"}, "Of POST /api/tickets, in place of the token."),
            *_DEVICE_QUERY,
        ),
        answer_type="text/event-stream", problems=(400, 404, 422), tag=_TAG,
    ),
    Route(
        "POST", "/api/ack", post_ack, CLIENT, "Acknowledge",
        doc="As the frame ACK. `seq` is cumulative for the connection of `deviceId`.",
        body=obj(
            {
                "notificationIds": {"type": "array", "items": {"type": "string"}, "maxItems": 1000},
                "notificationId": {"type": "string"},
                "seq": {"type": "integer", "minimum": 0, "maximum": MAX_INT},
                "rev": {"type": "integer", "minimum": 0, "maximum": MAX_INT},
                "deviceId": text(1, 128),
            },
            strict=False,
        ),
        body_example={"seq": 17, "rev": 40, "deviceId": "tablet"},
        answer=SUCCESS, answer_example={"success": True}, problems=(400, 413, 422), tag=_TAG,
    ),
    Route(
        "POST", "/api/visibility", post_visibility, CLIENT, "Where the user looks",
        doc="As the frame VISIBILITY, for the stream, poll or socket of `deviceId`; 404 while it has none.",
        body=obj(
            {
                "deviceId": text(1, 128),
                "state": {"enum": list(VISIBILITY_STATES)},
                "viewing": {"type": ["string", "null"], "maxLength": 300},
            },
            ["deviceId", "state"],
            strict=False,
        ),
        body_example={"deviceId": "tablet", "state": "hidden"},
        answer=SUCCESS, answer_example={"success": True}, problems=(400, 404, 413, 422), tag=_TAG,
    ),
)  # fmt: skip
