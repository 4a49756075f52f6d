"""JSON schemas of the frames that clients and server exchange, for GET /asyncapi.json.

They describe; what validates is carillon/client_frames.py, what writes is carillon/server_frames.py.
tests/unit/test_asyncapi.py holds both to them, in both directions.
"""

from __future__ import annotations

from typing import Final

from carillon.client_frames import (
    MAX_ID_CHARS,
    MAX_INT,
    MAX_ITEMS,
    MAX_TOKEN_CHARS,
    MAX_VIEWING_CHARS,
    VISIBILITY_STATES,
)
from carillon.preferences import MAX_SHOWN_MS
from carillon.presence import MODES
from carillon.server_frames import STATE_KINDS
from serve.schemas import INSTANT, USER_ID, UUID, WHOLE, Schema, ref, text

_UUID: Final[Schema] = {
    "type": "string",
    "pattern": "^[0-9A-Fa-f]{8}-([0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}$",
    "description": "A notification's id.",
}
_UUIDS: Final[Schema] = {"type": "array", "items": _UUID, "minItems": 1, "maxItems": MAX_ITEMS}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0, "maximum": MAX_INT}
_ID: Final = text(1, MAX_ID_CHARS)
_REF: Final[Schema] = {
    "type": ["string", "integer"],
    "maxLength": MAX_ID_CHARS,
    "minimum": -MAX_INT,
    "maximum": MAX_INT,
}
_VIEWING: Final[Schema] = {
    "type": "string",
    "pattern": "^[^:\\u0000-\\u001f\\u007f-\\u009f]+:[^\\u0000-\\u001f\\u007f-\\u009f]+$",
    "maxLength": MAX_VIEWING_CHARS,
    "description": "targetType:targetId of what is on the screen.",
}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _frame(kind: str, doc: str, members: dict[str, Schema], required: tuple[str, ...]) -> Schema:
    return {
        "type": "object",
        "description": doc,
        "properties": {"type": {"const": kind}, **members},
        "required": ["type", *required],
    }


def _client(
    kind: str, doc: str, members: dict[str, Schema] | None = None, optional: dict[str, Schema] | None = None
) -> Schema:
    """A frame that clients send; `null` in an optional member means absent, unknown members are ignored."""
    given = members or {}
    may = {name: _or_null(schema) for name, schema in {**(optional or {}), "id": _REF}.items()}
    return _frame(kind, doc, {**given, **may}, tuple(given))


_ONE: Final = {"notificationId": _UUID}
_MANY: Final = {"notificationIds": _UUIDS}

CLIENT_FRAMES: Final[dict[str, Schema]] = {
    "AUTH": _client(
        "AUTH",
        "The token, if the request brought none; later a newer one of the same user.",
        {"token": text(1, MAX_TOKEN_CHARS)},
        {"deviceId": _ID},
    ),
    "RESUME": _client(
        "RESUME",
        "Asks for everything after a position; as the first frame only.",
        {"epoch": _ID, "lastSeq": _COUNT},
        {"lastRev": _COUNT},
    ),
    "ACK": {
        **_client("ACK", "This device has them.", {}, {**_ONE, **_MANY, "seq": _COUNT, "rev": _COUNT}),
        # Exactly one of the three.
        "oneOf": [
            {"required": [name], "properties": {name: {"type": kind}}}
            for name, kind in (("notificationId", "string"), ("notificationIds", "array"), ("seq", "integer"))
        ],
    },
    "MARK_READ": _client("MARK_READ", "Read.", _MANY),
    "MARK_SEEN": _client("MARK_SEEN", "Seen.", _MANY),
    "MARK_ALL_READ": _client(
        "MARK_ALL_READ", "Everything up to a seq (absent: the head) is read.", {}, {"upToSeq": _COUNT}
    ),
    "ARCHIVE": _client("ARCHIVE", "Put away.", _ONE),
    "DISMISS": _client("DISMISS", "Dismissed.", _ONE),
    "CLICK": _client("CLICK", "Clicked, which implies read.", _ONE, {"actionId": _ID}),
    "VISIBILITY": _client(
        "VISIBILITY",
        "Where the user looks.",
        {"state": {"enum": list(VISIBILITY_STATES)}},
        {"viewing": _VIEWING},
    ),
    "WATCH_PRESENCE": _client(
        "WATCH_PRESENCE",
        "Whose presence to tell from now on.",
        {"userIds": {"type": "array", "items": USER_ID, "maxItems": MAX_ITEMS}},
    ),
    "SET_PRESENCE": _client(
        "SET_PRESENCE", "How others see the user, on all devices.", {"mode": {"enum": list(MODES)}}
    ),
    "SUBSCRIBE": _client("SUBSCRIBE", "Notifications of a topic from now on.", {"topic": _ID}),
    "UNSUBSCRIBE": _client("UNSUBSCRIBE", "No longer.", {"topic": _ID}),
    "PING": _client("PING", "Answered by PONG."),
}
"""What clients may send, by type."""


def _server(
    kind: str, doc: str, members: dict[str, Schema], optional: dict[str, Schema] | None = None
) -> Schema:
    return _frame(kind, doc, {**members, **(optional or {})}, tuple(members))


_IDS: Final[Schema] = {"type": "array", "items": UUID, "minItems": 1}
_NOTIFICATION: Final = {"notification": ref("Notification")}
_SILENT: Final[dict[str, Schema]] = {
    "silent": {"const": True, "description": "It is shown without a sound and vibration."}
}
_STATE: Final[dict[str, Schema]] = {"notificationId": UUID, "rev": WHOLE}

SERVER_FRAMES: Final[dict[str, Schema]] = {
    "WELCOME": _server(
        "WELCOME",
        "The first frame (`recovered` null), and the answer to a position (true or false).",
        {
            "sessionId": {"type": "string"},
            "deviceId": {"type": "string"},
            "epoch": {"type": "string"},
            "lastSeq": WHOLE,
            "rev": WHOLE,
            "unreadCount": {**WHOLE, "description": "True for `rev`."},
            "heartbeatMs": {"type": "integer", "minimum": 1},
            "recovered": {"type": ["boolean", "null"]},
            "serverTime": INSTANT,
        },
    ),
    "NEW_NOTIFICATION": _server("NEW_NOTIFICATION", "A notification, in seq order.", _NOTIFICATION, _SILENT),
    "NOTIFICATION_UPDATED": _server(
        "NOTIFICATION_UPDATED", "It was edited or merged.", _NOTIFICATION, _SILENT
    ),
    "NOTIFICATIONS_READ": _server(
        "NOTIFICATIONS_READ",
        "Read, on any device.",
        {"notificationIds": _IDS, "readAt": INSTANT, "rev": WHOLE},
    ),
    "ALL_NOTIFICATIONS_READ": _server(
        "ALL_NOTIFICATIONS_READ",
        "Everything visible up to `upToSeq` was read.",
        {"readAt": INSTANT, "upToSeq": WHOLE, "rev": WHOLE},
    ),
    "NOTIFICATIONS_SEEN": _server(
        "NOTIFICATIONS_SEEN", "Seen, on any device.", {"notificationIds": _IDS, "rev": WHOLE}
    ),
    **{
        f"NOTIFICATION_{kind}": _server(
            f"NOTIFICATION_{kind}", f"{kind.capitalize()}, on any device.", _STATE
        )
        for kind in STATE_KINDS
    },
    "UNREAD_COUNT": _server(
        "UNREAD_COUNT", "Only where no other frame carries the change.", {"count": WHOLE, "rev": WHOLE}
    ),
    "PRESENCE": _server(
        "PRESENCE",
        "Of a watched user.",
        {
            "userId": {"type": "string"},
            "status": {"enum": ["active", "idle", "offline"]},
            "lastSeenAt": _or_null(INSTANT),
        },
    ),
    "PRESENTATION": _server(
        "PRESENTATION",
        "How the user wants notifications to be shown: after WELCOME if somebody says anything, and when "
        "that changes.",
        {
            "sound": {"type": ["boolean", "string"], "description": "A string names one of the app."},
            "vibration": {"type": "boolean"},
            "durationMs": {
                "type": ["integer", "null"],
                "minimum": 0,
                "maximum": MAX_SHOWN_MS,
                "description": "So long on the screen; null: as the app has it.",
            },
            "autoDismiss": {
                "type": ["boolean", "null"],
                "description": "Whether it leaves by itself; null: as the app has it.",
            },
        },
    ),
    "PONG": _server("PONG", "Answers PING.", {}, {"id": _REF}),
    "OK": _server(
        "OK",
        "The frame with this `id` took effect: after the commit. After WATCH_PRESENCE it names users that "
        "may not be watched, if there are any.",
        {"id": _REF},
        {"refusedUserIds": {"type": "array", "items": {"type": "string"}}},
    ),
    "ERROR": _server(
        "ERROR",
        "A frame was refused; the connection stays.",
        {"code": {"type": "string"}, "message": {"type": "string"}, "temporary": {"type": "boolean"}},
        {"id": _REF},
    ),
}
"""What the server sends, by type. New members may come: ignore those you do not know."""
