"""The notification as JSON: written once by the ingress, completed with its state by whoever shows it.

The members that no state change touches travel and are stored as text without braces (`content`), so that
neither the shard nor the feed parses or encodes them again: a notification's JSON is `{"id":...,"seq":...,
"rev":...,"userId":...,<content>,"read":...,...}`.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Struct

from carillon.clock import rfc3339
from carillon.external import PUSH
from carillon.ids import uuid_text

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder().decode

ALWAYS: Final[dict[str, Any]] = {
    "type": None,
    "title": None,
    "body": None,
    "actorId": None,
    "targetType": None,
    "targetId": None,
    "priority": "normal",
    "category": None,
    "actions": [],
    "data": {},
    "createdAt": None,
}
"""Immutable members every notification has, with their empty values."""

OPTIONAL: Final = (
    "imageUrl", "icon", "link", "expiresAt", "campaignId", "sourceApp", "channels",
    "count", "actors", "aggregationKey", "collapseKey", "channelContent",
)  # fmt: skip
"""Immutable members that are present only when set."""


class NotificationRow(Struct):
    """A stored notification: immutable content and the times of its states (ms since the epoch)."""

    id: bytes
    seq: int
    rev: int
    position: int
    content: str
    delivered_ms: int | None = None
    seen_ms: int | None = None
    read_ms: int | None = None
    clicked_ms: int | None = None
    dismissed_ms: int | None = None
    archived_ms: int | None = None
    retracted_ms: int | None = None
    updated_ms: int | None = None
    expires_ms: int | None = None


def filed_away(row: NotificationRow) -> bool:
    """Whether the user wanted nothing of it in the app: archived no later than its id was."""
    return row.archived_ms is not None and row.archived_ms <= int.from_bytes(row.id[:6])


def gone(row: NotificationRow, now_ms: int) -> bool:
    """Whether nobody is to see it any more: retracted, or expired."""
    return row.retracted_ms is not None or (row.expires_ms is not None and row.expires_ms <= now_ms)


def encode_content(members: dict[str, Any]) -> str:
    """Write the immutable members in a fixed order, without braces.

    Args:
        members: by protocol name; those of `ALWAYS` that are missing get their empty value, those of
            `OPTIONAL` that are None or missing are left out.
    """
    full = {name: members.get(name, empty) for name, empty in ALWAYS.items()}
    for name in OPTIONAL:
        value = members.get(name)
        if value is not None:
            full[name] = value
    return _encode(full)[1:-1].decode()


def decode_content(content: str) -> dict[str, Any]:
    """The members of a stored `content`."""
    return _decode(f"{{{content}}}")


def text_of(members: dict[str, Any], channel: str, provider: str, name: str) -> Any:
    """A member as one external channel tells it: its own text (`channelContent`), else that of all."""
    own = members.get("channelContent")
    if own is not None:
        for key in (provider, channel, PUSH):
            found = own.get(key, _NOTHING).get(name)
            if found is not None:
                return found or None
    return members.get(name)


_NOTHING: Final[dict[str, Any]] = {}


def target_of(content: str) -> str | None:
    """What a notification is about, "targetType:targetId", as VISIBILITY's `viewing` names it; or None."""
    members = decode_content(content)
    kind, target = members.get("targetType"), members.get("targetId")
    return None if kind is None or target is None else f"{kind}:{target}"


def fresh_json(notification_id: bytes, seq: int, rev: int, user_json: str, content: str) -> str:
    """JSON of a notification that nobody has seen yet: the hot path of delivery.

    Args:
        user_json: the user id as a JSON string, quotes included (encoded once per user).
    """
    return (
        f'{{"id":"{uuid_text(notification_id)}","seq":{seq},"rev":{rev},"userId":{user_json},'
        f'{content},"read":false,"seen":false,"archived":false}}'
    )


def notification_json(row: NotificationRow, user_json: str) -> str:
    """JSON of a notification in any state (see `fresh_json` for `user_json`)."""
    parts = [
        f'{{"id":"{uuid_text(row.id)}","seq":{row.seq},"rev":{row.rev},"userId":{user_json},{row.content}',
        f'"read":{"true" if row.read_ms is not None else "false"}',
        f'"seen":{"true" if row.seen_ms is not None else "false"}',
        f'"archived":{"true" if row.archived_ms is not None else "false"}',
    ]
    if row.clicked_ms is not None:
        parts.append('"clicked":true')
    if row.dismissed_ms is not None:
        parts.append('"dismissed":true')
    for name, at in (
        ("updatedAt", row.updated_ms),
        ("deliveredAt", row.delivered_ms),
        ("seenAt", row.seen_ms),
        ("readAt", row.read_ms),
        ("clickedAt", row.clicked_ms),
        ("dismissedAt", row.dismissed_ms),
        ("archivedAt", row.archived_ms),
    ):
        if at is not None:
            parts.append(f'"{name}":"{rfc3339(at)}"')
    return ",".join(parts) + "}"


def user_json_of(user: str) -> str:
    """A user id as a JSON string, for `fresh_json` and `notification_json`."""
    return _encode(user).decode()
