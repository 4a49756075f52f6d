"""Frames that the server sends to clients: compact JSON, `type` first, one object per frame.

Everything is composed once as UTF-8 JSON; a connection with the MessagePack subprotocol gets the same object
through `transcode`. docs: protocol.md, "WebSocket".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from carillon.ids import uuid_text

_json: Final = msgspec.json.Encoder().encode
_from_json: Final = msgspec.json.Decoder().decode
_to_msgpack: Final = msgspec.msgpack.Encoder().encode

STATE_KINDS: Final = ("ARCHIVED", "DISMISSED", "CLICKED", "RETRACTED")
"""What `notification_state` can tell."""

_UPDATED: Final = b'{"type":"NOTIFICATION_UPDATED"'
_NEW: Final = b'{"type":"NEW_NOTIFICATION"'

PONG: Final = b'{"type":"PONG"}'
"""Answer to PING without `id`."""


def _text(value: str) -> str:
    return _json(value).decode()


def _ids(ids: Iterable[bytes]) -> str:
    return '["' + '","'.join(map(uuid_text, ids)) + '"]'


def welcome(
    session_id: str,
    device_id: str,
    epoch: str,
    last_seq: int,
    rev: int,
    unread_count: int,
    heartbeat_ms: int,
    recovered: bool | None,
    server_time: str,
) -> bytes:
    """WELCOME: first frame after an attach, and the answer to a position.

    Args:
        recovered: None while no position was given; True or False answers one.
        server_time: RFC 3339 text, as all times here (`carillon.clock.rfc3339`).
    """
    answer = "null" if recovered is None else "true" if recovered else "false"
    return (
        f'{{"type":"WELCOME","sessionId":{_text(session_id)},"deviceId":{_text(device_id)},'
        f'"epoch":{_text(epoch)},"lastSeq":{last_seq},"rev":{rev},"unreadCount":{unread_count},'
        f'"heartbeatMs":{heartbeat_ms},"recovered":{answer},"serverTime":"{server_time}"}}'
    ).encode()


def new_notification(json_text: str, silent: bool = False) -> bytes:
    """NEW_NOTIFICATION; `json_text` is the notification's JSON (carillon/notification.py).

    Args:
        silent: to be shown without a sound: quiet hours, do-not-disturb, or too many of late.
    """
    if silent:
        return f'{{"type":"NEW_NOTIFICATION","notification":{json_text},"silent":true}}'.encode()
    return f'{{"type":"NEW_NOTIFICATION","notification":{json_text}}}'.encode()


def notification_updated(json_text: str, silent: bool = False) -> bytes:
    """NOTIFICATION_UPDATED (merge, edit); arguments as for `new_notification`."""
    if silent:
        return f'{{"type":"NOTIFICATION_UPDATED","notification":{json_text},"silent":true}}'.encode()
    return f'{{"type":"NOTIFICATION_UPDATED","notification":{json_text}}}'.encode()


def notifications_read(ids: Iterable[bytes], read_at: str, rev: int) -> bytes:
    """NOTIFICATIONS_READ: `ids` that really changed (16 raw bytes each)."""
    return (
        f'{{"type":"NOTIFICATIONS_READ","notificationIds":{_ids(ids)},"readAt":"{read_at}","rev":{rev}}}'
    ).encode()


def all_notifications_read(read_at: str, up_to_seq: int, rev: int) -> bytes:
    """ALL_NOTIFICATIONS_READ: everything up to `up_to_seq`."""
    return (
        f'{{"type":"ALL_NOTIFICATIONS_READ","readAt":"{read_at}","upToSeq":{up_to_seq},"rev":{rev}}}'
    ).encode()


def notifications_seen(ids: Iterable[bytes], rev: int) -> bytes:
    """NOTIFICATIONS_SEEN: `ids` that really changed, 16 raw bytes each."""
    return f'{{"type":"NOTIFICATIONS_SEEN","notificationIds":{_ids(ids)},"rev":{rev}}}'.encode()


def notification_state(kind: str, id: bytes, rev: int) -> bytes:
    """NOTIFICATION_<kind>, with `kind` one of `STATE_KINDS`. Raises ValueError for another."""
    if kind not in STATE_KINDS:
        raise ValueError(f"expected one of {', '.join(STATE_KINDS)}, got {kind!r}")
    return f'{{"type":"NOTIFICATION_{kind}","notificationId":"{uuid_text(id)}","rev":{rev}}}'.encode()


def unread_count(count: int, rev: int) -> bytes:
    """UNREAD_COUNT: only where no other frame carries the change."""
    return f'{{"type":"UNREAD_COUNT","count":{count},"rev":{rev}}}'.encode()


def presence(user: str, status: str, last_seen: str | None) -> bytes:
    """PRESENCE of a watched user; `last_seen` is None while never seen or unknown."""
    seen = "null" if last_seen is None else f'"{last_seen}"'
    return (
        f'{{"type":"PRESENCE","userId":{_text(user)},"status":{_text(status)},"lastSeenAt":{seen}}}'.encode()
    )


def presentation(sound: str, vibration: bool, duration_ms: int | None, auto_dismiss: bool | None) -> bytes:
    """PRESENTATION: how the user wants notifications to be shown (carillon/presentation.py).

    Args:
        sound: "" none, "default", or the name of one.
        duration_ms, auto_dismiss: None: as the client has it.
    """
    told = {"": False, "default": True}.get(sound, sound)
    return _json(
        {
            "type": "PRESENTATION",
            "sound": told,
            "vibration": vibration,
            "durationMs": duration_ms,
            "autoDismiss": auto_dismiss,
        }
    )


def ok(ref: str | int, refused: Iterable[str] = ()) -> bytes:
    """OK: the frame with this `id` took effect (sent after the commit).

    Args:
        refused: after WATCH_PRESENCE, the users that may not be watched.
    """
    users = ",".join(map(_text, refused))
    more = f',"refusedUserIds":[{users}]'.encode() if users else b""
    return b'{"type":"OK","id":' + _json(ref) + more + b"}"


def pong(ref: str | int | None = None) -> bytes:
    """PONG, echoing the `id` of a PING that had one."""
    return PONG if ref is None else b'{"type":"PONG","id":' + _json(ref) + b"}"


def error(code: str, message: str, temporary: bool, ref: str | int | None = None) -> bytes:
    """ERROR.

    Args:
        code: stable name, as in problem documents.
        temporary: True if the same frame may succeed later without a change.
        ref: `id` of the frame it answers; None if that had none.
    """
    echo = "" if ref is None else f',"id":{_json(ref).decode()}'
    return (
        f'{{"type":"ERROR","code":{_text(code)},"message":{_text(message)},'
        f'"temporary":{"true" if temporary else "false"}{echo}}}'
    ).encode()


def as_new_notification(frame: bytes) -> bytes:
    """NOTIFICATION_UPDATED as NEW_NOTIFICATION, for a client that named no subprotocol; others unchanged."""
    return _NEW + frame[len(_UPDATED) :] if frame.startswith(_UPDATED) else frame


def transcode(frame: bytes) -> bytes:
    """The MessagePack form of a JSON frame: same members, same order."""
    return _to_msgpack(_from_json(frame))
