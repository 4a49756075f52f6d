"""Every call of the service API except sending: what goes out, how the answer is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from carillon_client.core.codec import encode_json, encode_members, event_members, notification_of
from carillon_client.core.exchange import Call
from carillon_client.errors import InvalidRequestError
from carillon_client.models import (
    Amendment,
    Broadcast,
    BroadcastFailure,
    BroadcastPage,
    Cancelled,
    DeliveryRecord,
    Device,
    Edited,
    Event,
    FeedPage,
    NotificationHistory,
    Presence,
    Retracted,
    Token,
)

MAX_PRESENCE = 1000
"""User ids in one presence query."""

T = TypeVar("T")


def segment(name: str, value: str) -> str:
    """A value as one segment of a path. Raises InvalidRequestError: it cannot be one."""
    if not value or value in (".", ".."):
        # An empty or dotted segment would be another path.
        raise InvalidRequestError(
            0, "invalid", f"expected {name} to be text that can stand in a path, got {value!r}"
        )
    return quote(value, safe="")


def user_path(user_id: str, rest: str = "") -> str:
    """The path of a user."""
    return f"/v1/users/{segment('userId', user_id)}{rest}"


def typed(kind: type[T]) -> Callable[[Any], T]:
    """Reads an answer as `kind`."""

    def parse(document: Any) -> T:
        return msgspec.convert(document, kind)

    return parse


def presence(user_id: str) -> Call[Presence]:
    """GET /v1/presence/{userId}."""
    return Call("GET", f"/v1/presence/{segment('userId', user_id)}", typed(Presence))


def presence_of_many(user_ids: Sequence[str]) -> Call[list[Presence]]:
    """POST /v1/presence/query, at most `MAX_PRESENCE` ids."""

    def parse(document: Any) -> list[Presence]:
        return msgspec.convert(document["users"], list[Presence])

    return Call("POST", "/v1/presence/query", parse, encode_json({"userIds": list(user_ids)}))


def token(user_id: str, ttl_s: float | None) -> Call[Token]:
    """POST /v1/tokens."""
    body: dict[str, Any] = {"userId": user_id}
    if ttl_s is not None:
        body["ttlS"] = ttl_s
    return Call("POST", "/v1/tokens", typed(Token), encode_json(body))


def put_device(user_id: str, device_id: str, device: Device) -> Call[Device]:
    """PUT /v1/users/{userId}/devices/{deviceId}."""
    members: dict[str, Any] = msgspec.to_builtins(device)
    for name in ("deviceId", "registeredAt", "disabledAt", "disabledReason"):
        members.pop(name, None)
    path = user_path(user_id, f"/devices/{segment('deviceId', device_id)}")
    return Call("PUT", path, typed(Device), encode_json(members))


def get_device(user_id: str, device_id: str) -> Call[Device | None]:
    """GET /v1/users/{userId}/devices/{deviceId}; None if there is none."""
    path = user_path(user_id, f"/devices/{segment('deviceId', device_id)}")
    parse: Callable[[Any], Device | None] = typed(Device)
    return Call("GET", path, parse, absent=lambda: None)


def delete_device(user_id: str, device_id: str) -> Call[bool]:
    """DELETE /v1/users/{userId}/devices/{deviceId}; False if there was none.

    404 is no error: a repeated try finds what the first one did.
    """
    path = user_path(user_id, f"/devices/{segment('deviceId', device_id)}")
    return Call("DELETE", path, lambda _: True, absent=lambda: False)


def feed(
    user_id: str,
    *,
    limit: int | None = None,
    cursor: str | None = None,
    status: str | None = None,
    type: str | None = None,
    category: str | None = None,
    q: str | None = None,
) -> Call[FeedPage]:
    """GET /v1/users/{userId}/notifications."""
    given = {"limit": limit, "cursor": cursor, "status": status, "type": type, "category": category, "q": q}
    query = tuple((name, str(value)) for name, value in given.items() if value is not None)
    return Call("GET", user_path(user_id, "/notifications"), feed_page, query=query)


def feed_page(document: Any) -> FeedPage:
    """A page of a feed."""
    return FeedPage(
        notifications=[notification_of(one) for one in document["notifications"]],
        next_cursor=document.get("nextCursor"),
    )


def notification(id: str) -> Call[NotificationHistory]:
    """GET /v1/notifications/{id}."""

    def parse(document: Any) -> NotificationHistory:
        return NotificationHistory(
            notification=notification_of(document["notification"]),
            delivery_state=document["deliveryState"],
            deliveries=msgspec.convert(document.get("deliveries") or [], list[DeliveryRecord]),
            version=document.get("version", 1),
            retracted_at=document.get("retractedAt"),
            cancelled_at=document.get("cancelledAt"),
            changes=msgspec.convert(document.get("changes") or [], list[Amendment]),
        )

    return Call("GET", f"/v1/notifications/{segment('id', id)}", parse)


def edit(id: str, changes: Mapping[str, Any], version: int | None) -> Call[Edited]:
    """PATCH /v1/notifications/{id}; told again it changes nothing more."""

    def parse(document: Any) -> Edited:
        return Edited(notification_of(document["notification"]), document["version"])

    body = {**changes} if version is None else {**changes, "version": version}
    return Call("PATCH", f"/v1/notifications/{segment('id', id)}", parse, encode_json(body))


def retract(id: str) -> Call[Retracted]:
    """POST /v1/notifications/{id}/retract; it may be repeated."""
    return Call("POST", f"/v1/notifications/{segment('id', id)}/retract", typed(Retracted), b"{}")


def cancel(id: str) -> Call[Cancelled]:
    """POST /v1/notifications/{id}/cancel; it may be repeated."""
    return Call("POST", f"/v1/notifications/{segment('id', id)}/cancel", typed(Cancelled), b"{}")


def get_preferences(user_id: str, own: bool) -> Call[dict[str, Any]]:
    """GET /v1/users/{userId}/preferences."""
    return Call("GET", user_path(user_id, "/preferences"), dict, query=_view(own))


def put_preferences(user_id: str, document: Mapping[str, Any]) -> Call[dict[str, Any]]:
    """PUT /v1/users/{userId}/preferences."""
    return Call("PUT", user_path(user_id, "/preferences"), dict, encode_json(document))


def patch_preferences(user_id: str, patch: Mapping[str, Any], own: bool) -> Call[dict[str, Any]]:
    """PATCH /v1/users/{userId}/preferences; told again it changes nothing more."""
    return Call("PATCH", user_path(user_id, "/preferences"), dict, encode_json(patch), query=_view(own))


def _view(own: bool) -> tuple[tuple[str, str], ...]:
    return (("view", "own"),) if own else ()


def revoke_sessions(user_id: str) -> Call[None]:
    """POST /v1/users/{userId}/sessions/revoke."""
    return Call("POST", user_path(user_id, "/sessions/revoke"), lambda _: None, b"{}")


def send_broadcast(
    event: Event | Mapping[str, Any], audience: Any, schedule_at: str | None, key: str
) -> Call[Broadcast]:
    """POST /v1/broadcasts; the key makes it safe to repeat."""
    body: dict[str, Any] = {"audience": audience, "event": event_members(event), "idempotencyKey": key}
    if schedule_at is not None:
        body["scheduleAt"] = schedule_at
    return Call("POST", "/v1/broadcasts", typed(Broadcast), encode_members(body))


def broadcast(id: str) -> Call[Broadcast]:
    """GET /v1/broadcasts/{broadcastId}."""
    return Call("GET", f"/v1/broadcasts/{segment('id', id)}", typed(Broadcast))


def broadcasts(limit: int | None, cursor: str | None, state: str | None) -> Call[BroadcastPage]:
    """GET /v1/broadcasts."""
    given = {"limit": limit, "cursor": cursor, "state": state}
    query = tuple((name, str(value)) for name, value in given.items() if value is not None)
    return Call("GET", "/v1/broadcasts", typed(BroadcastPage), query=query)


def broadcast_failures(id: str) -> Call[list[BroadcastFailure]]:
    """GET /v1/broadcasts/{broadcastId}/failures: the first hundred."""

    def parse(document: Any) -> list[BroadcastFailure]:
        return msgspec.convert(document["failures"], list[BroadcastFailure])

    path = f"/v1/broadcasts/{segment('id', id)}/failures"
    return Call("GET", path, parse, query=(("limit", "100"),))


def act_on_broadcast(id: str, action: str) -> Call[Broadcast]:
    """POST /v1/broadcasts/{broadcastId}/pause, resume or cancel; each may be repeated."""
    return Call("POST", f"/v1/broadcasts/{segment('id', id)}/{action}", typed(Broadcast), b"{}")
