"""JSON schemas of requests and answers, for the route table and GET /openapi.json.

They describe; what validates is carillon/events.py and its siblings. Examples in the route table are checked
against them by a test.
"""

from __future__ import annotations

from typing import Any, Final

from carillon.event_rules import (
    ACTION_TEXTS,
    DEDUPES,
    MAX_CHANNELS,
    MAX_WINDOW_S,
    METHODS,
    MIN_WINDOW_S,
    PRIORITY_NAMES,
    TEXTS,
)
from carillon.external import CHANNELS as EVENT_CHANNELS
from carillon.external import EXTERNAL
from carillon.preferences import CHANNELS, DAYS, DIGESTS, MAX_ENTRIES, MAX_SHOWN_MS

Schema = dict[str, Any]

NO_CONTROL: Final = r"^[^\u0000-\u001f\u007f-\u009f]*$"
NO_NUL: Final = r"^[^\u0000]*$"


def text(low: int, high: int, *, control: bool = False) -> Schema:
    """A text member of `low` to `high` characters."""
    return {
        "type": "string",
        "minLength": low,
        "maxLength": high,
        "pattern": NO_NUL if control else NO_CONTROL,
    }


def obj(members: dict[str, Schema], required: list[str] | None = None, *, strict: bool = True) -> Schema:
    """An object; `strict` refuses other members."""
    schema: Schema = {"type": "object", "properties": members}
    if required:
        schema["required"] = required
    if strict:
        schema["additionalProperties"] = False
    return schema


def nullable(members: dict[str, Schema], but: tuple[str, ...] = ()) -> dict[str, Schema]:
    """Members that may be null, which means absent; those in `but` may not."""
    return {
        name: schema if name in but else {"anyOf": [schema, {"type": "null"}]}
        for name, schema in members.items()
    }


def ref(name: str) -> Schema:
    """A reference to a schema of `COMPONENTS`."""
    return {"$ref": f"#/components/schemas/{name}"}


INSTANT: Final[Schema] = {"type": "string", "format": "date-time"}
WHOLE: Final[Schema] = {"type": "integer", "minimum": 0}
_FLAG: Final[Schema] = {"type": "boolean"}
LOCAL_TIME: Final[Schema] = {"type": "string", "pattern": r"^([01]\d|2[0-3]):[0-5]\d$"}
_SOUND: Final[Schema] = {"anyOf": [_FLAG, text(1, 64)]}
USER_ID: Final = text(1, 128)
UUID: Final[Schema] = {"type": "string", "format": "uuid"}
LAST_SEEN: Final[Schema] = {"anyOf": [{"type": "null"}, INSTANT]}
PRESENT_DEVICES: Final[Schema] = {
    "type": "array",
    "items": obj(
        {
            "deviceId": {"type": "string"},
            "attention": {"enum": ["focused", "visible", "idle", "hidden"]},
            "since": INSTANT,
            "connections": {"type": "integer", "minimum": 1},
        },
        ["deviceId", "attention", "since", "connections"],
    ),
}
SUCCESS: Final = obj({"success": {"const": True}}, ["success"])
IDS_BODY: Final = obj(
    {"notificationIds": {"type": "array", "items": {"type": "string"}, "maxItems": 1000}},
    ["notificationIds"],
    strict=False,
)

_EVENT_MEMBERS: Final[dict[str, Schema]] = {
    **{name: text(rule.low, rule.high, control=rule.control) for name, rule in TEXTS.items()},
    "userIds": {
        "type": "array",
        "items": USER_ID,
        "maxItems": 1000,
        "description": "Several recipients of one event; not inside of a batch.",
    },
    "body": {"type": "string", "pattern": NO_NUL, "maxLength": 1024, "description": "At most 4,096 bytes."},
    "priority": {"enum": list(PRIORITY_NAMES), "description": "critical is urgent."},
    "data": {"type": "object", "description": "Yours; integers up to 2^53-1, nesting up to 32."},
    "actions": {
        "type": "array",
        "maxItems": 10,
        "items": obj(
            {
                **{
                    name: text(rule.low, rule.high, control=rule.control)
                    for name, rule in ACTION_TEXTS.items()
                },
                "method": {"enum": list(METHODS)},
                "payload": {"type": "object"},
            }
        ),
    },
    "channels": {
        "type": "array",
        "minItems": 1,
        "maxItems": MAX_CHANNELS,
        "items": {"enum": list(EVENT_CHANNELS)},
        "description": "Absent: in_app, and push if the user has a target.",
    },
    "expiresAt": {**INSTANT, "description": "From 1970 to 9998, with offset."},
    "dedupe": {
        **obj(
            nullable(
                {
                    "key": {**text(1, 255), "description": "Absent: type, title, body and target."},
                    "windowS": {"type": "number", "minimum": MIN_WINDOW_S, "maximum": MAX_WINDOW_S},
                    "merge": {"enum": list(DEDUPES), "description": "Absent: drop."},
                }
            )
        ),
        "description": "What becomes of events that are alike; with `aggregate` only `drop`.",
    },
    "aggregate": {
        "type": "boolean",
        "description": "true: one notification for all of its type and target; absent: the tenant's rule.",
    },
    "scheduleAt": {**INSTANT, "description": "Sent then: answered `deferred`, `id` is that of the schedule."},
    "template": {
        "type": "string",
        "pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(@[1-9][0-9]{0,8})?$",
        "description": "Instead of title and body: the id of a template, or id@version.",
    },
    "params": {"type": "object", "description": "Parameters of the template."},
    "locale": {
        "type": "string",
        "pattern": "^[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8}){0,3}$",
        "description": "Language of the template's texts; absent: the user's.",
    },
    "fallback": {
        "type": "array",
        "maxItems": MAX_CHANNELS,
        "items": {"enum": list(EXTERNAL)},
        "description": "Tried one after the other when `channels` ended without success.",
    },
}
_FOR_ONE: Final = ("userId", "type")
_FOR_MANY: Final = ("userIds", "type")
_TEMPLATED: Final = ("template", "params", "locale")
_ONE: Final = nullable({k: v for k, v in _EVENT_MEMBERS.items() if k != "userIds"}, _FOR_ONE)
_MANY: Final = nullable({k: v for k, v in _EVENT_MEMBERS.items() if k != "userId"}, _FOR_MANY)


def _texts(members: dict[str, Schema], required: tuple[str, ...]) -> Schema:
    """An event: with texts of its own, or with those of a template."""
    null: Schema = {"type": "null"}
    return {
        **obj(members, list(required)),
        "anyOf": [
            {
                "required": ["title"],
                "properties": {"title": members["title"]["anyOf"][0], **dict.fromkeys(_TEMPLATED, null)},
            },
            {
                "required": ["template"],
                "properties": {"template": members["template"]["anyOf"][0], "body": null},
            },
        ],
    }


_NOTIFICATION_ALWAYS: Final[dict[str, Schema]] = {
    "id": UUID,
    "seq": WHOLE,
    "rev": WHOLE,
    "userId": {"type": "string"},
    "type": {"type": "string"},
    "title": {"type": "string"},
    "body": {"type": ["string", "null"]},
    "actorId": {"type": ["string", "null"]},
    "targetType": {"type": ["string", "null"]},
    "targetId": {"type": ["string", "null"]},
    "read": {"type": "boolean"},
    "seen": {"type": "boolean"},
    "archived": {"type": "boolean"},
    "priority": {"enum": ["low", "normal", "high", "urgent"]},
    "category": {"type": ["string", "null"]},
    "actions": {"type": "array", "items": {"type": "object"}},
    "data": {"type": "object"},
    "createdAt": INSTANT,
}

_NOTIFICATION_WHEN_SET: Final[dict[str, Schema]] = {
    **{
        name: {"type": "string"}
        for name in ("imageUrl", "icon", "link", "campaignId", "sourceApp", "aggregationKey", "collapseKey")
    },
    "channels": {"type": "array", "items": {"type": "string"}},
    "count": {"type": "integer", "minimum": 1},
    "actors": {
        "type": "array",
        "items": obj({"id": {"type": ["string", "null"]}, "name": {"type": "string"}}, ["id"], strict=False),
        "description": "Of an aggregate, the newest first.",
    },
    "channelContent": {"type": "object", "description": "By channel what is said there instead."},
    "clicked": {"const": True},
    "dismissed": {"const": True},
    **{
        f"{name}At": INSTANT
        for name in (
            "expires", "updated", "delivered", "seen", "read", "clicked", "dismissed", "archived",
        )
    },
}  # fmt: skip

OUTCOMES: Final = ("sent", "unknown", "failed", "dead", "invalid_target", "disabled_target")
"""Of one try at one target (docs/reference/push.md)."""

_DEAD_LETTER: Final[dict[str, Schema]] = {
    "id": {"type": "string"},
    "notificationId": UUID,
    "userId": {"type": "string"},
    "type": {"type": "string"},
    "title": {"type": ["string", "null"]},
    "channel": {"type": "string"},
    "step": {**WHOLE, "description": "0: a channel the event asked for; n: its n-th fallback."},
    "reason": {"type": "string"},
    "attempts": WHOLE,
    "createdAt": INSTANT,
    "diedAt": INSTANT,
    "replayedAt": {"anyOf": [INSTANT, {"type": "null"}]},
}

COMPONENTS: Final[dict[str, Schema]] = {
    "Event": {
        "description": "One event for one user.",
        **_texts(_ONE, _FOR_ONE),
    },
    "EventToMany": {
        "description": "One event for several users.",
        **_texts(_MANY, _FOR_MANY),
    },
    "EventResult": obj(
        {
            "userId": {"type": "string"},
            "id": UUID,
            "seq": WHOLE,
            "status": {
                "enum": ["delivered", "queued", "stored", "deferred", "merged", "duplicate", "suppressed"]
            },
            "channels": {"type": "array", "items": {"type": "string"}},
            "reason": {"type": "string"},
        },
        ["id", "seq", "status", "channels"],
    ),
    "EventResults": obj(
        {
            "results": {
                "type": "array",
                "items": {
                    "anyOf": [
                        ref("EventResult"),
                        obj({"userId": {"type": "string"}, "error": ref("Problem")}, ["error"]),
                    ]
                },
            }
        },
        ["results"],
    ),
    "DeliveryTry": obj(
        {
            "attempt": {"type": "integer", "minimum": 1},
            "deviceId": {"type": "string"},
            "provider": {"type": "string"},
            "outcome": {"enum": list(OUTCOMES)},
            "providerId": {"type": ["string", "null"], "description": "The provider's message id."},
            "status": {**WHOLE, "description": "HTTP status; 0: no answer."},
            "error": {"type": ["string", "null"]},
            "startedAt": INSTANT,
            "durationMs": {"type": "number", "minimum": 0},
        },
        [
            "attempt",
            "deviceId",
            "provider",
            "outcome",
            "providerId",
            "status",
            "error",
            "startedAt",
            "durationMs",
        ],
    ),
    "DeadLetter": obj(
        {
            **_DEAD_LETTER,
            "tries": {
                "type": "array",
                "items": ref("DeliveryTry"),
                "description": "Every try, those before a replay too; only of a single dead letter.",
            },
        },
        list(_DEAD_LETTER),
    ),
    "Notification": obj(
        {**_NOTIFICATION_ALWAYS, **_NOTIFICATION_WHEN_SET}, list(_NOTIFICATION_ALWAYS), strict=False
    ),
    "Feed": obj(
        {
            "notifications": {"type": "array", "items": ref("Notification")},
            "nextCursor": {"type": ["string", "null"]},
        },
        ["notifications", "nextCursor"],
    ),
    "Preferences": obj(
        {
            "global": _FLAG,
            "channels": {
                "type": "object",
                "propertyNames": {"enum": list(CHANNELS)},
                "additionalProperties": {
                    "anyOf": [
                        _FLAG,
                        obj(
                            {
                                "enabled": _FLAG,
                                "sound": _SOUND,
                                "badge": _FLAG,
                                "vibration": _FLAG,
                                "emergencyOnly": _FLAG,
                                "durationMs": {"type": "integer", "minimum": 0, "maximum": MAX_SHOWN_MS},
                                "autoDismiss": _FLAG,
                            }
                        ),
                    ]
                },
            },
            "categories": ref("PreferenceRules"),
            "types": ref("PreferenceRules"),
            "quietHours": {
                "anyOf": [
                    {"type": "null"},
                    obj(
                        {
                            "start": LOCAL_TIME,
                            "end": LOCAL_TIME,
                            "timezone": {"type": "string", "examples": ["Europe/Vienna"]},
                            "days": {"type": "array", "maxItems": 7, "items": {"enum": list(DAYS)}},
                            "enabled": _FLAG,
                        },
                        ["start", "end"],
                    ),
                ]
            },
            "doNotDisturbUntil": {"anyOf": [{"type": "null"}, INSTANT]},
            "digest": ref("Digest"),
            "sound": _SOUND,
            "badge": _FLAG,
            "vibration": _FLAG,
            "timezone": {"anyOf": [{"type": "null"}, {"type": "string", "examples": ["Europe/Vienna"]}]},
        }
    ),
    "FiredRule": obj(
        {
            "rule": {"type": "string"},
            "source": {"enum": ["user", "tenant", "event", "system"]},
            "about": {"type": ["string", "null"]},
            "channels": {"type": "array", "items": {"type": "string"}},
            "until": {"anyOf": [INSTANT, {"type": "null"}]},
            "words": {"type": "string"},
        },
        ["rule", "source", "about", "channels", "until", "words"],
    ),
    "Plan": obj(
        {
            "userId": {"type": "string"},
            "words": {"type": "string", "description": "All of it in plain words."},
            "sendAt": {**INSTANT, "description": "Only with scheduleAt: kept until then."},
            "then": {"type": "object", "description": "Only with scheduleAt: what would be planned then."},
            "replayed": {
                **obj({"id": UUID, "seq": WHOLE}, ["id", "seq"]),
                "description": "Only if the idempotency key stands for another event: for this one.",
            },
            "devices": {
                **obj(
                    {
                        "platforms": {"type": "array", "items": {"type": "string"}},
                        "reached": {"type": "array", "items": {"type": "string"}},
                        "leftOut": {
                            "type": "array",
                            "items": obj({"deviceId": {"type": "string"}, "platform": {"type": "string"}}),
                        },
                    },
                    ["platforms", "reached", "leftOut"],
                ),
                "description": "Only if the tenant names the platforms that get pushes of the type.",
            },
            "status": {
                "enum": ["delivered", "queued", "stored", "deferred", "suppressed", "merged", "duplicate"]
            },
            "channels": {"type": "array", "items": {"type": "string"}},
            "fallback": {"type": "array", "items": {"type": "string"}},
            "reason": {"type": ["string", "null"]},
            "pushDueAt": {"anyOf": [INSTANT, {"type": "null"}]},
            "digest": {
                "anyOf": [
                    obj(
                        {
                            "digestId": UUID,
                            "category": {"type": ["string", "null"]},
                            "frequency": {"type": "string"},
                            "dueAt": INSTANT,
                        }
                    ),
                    {"type": "null"},
                ]
            },
            "silent": _FLAG,
            "archived": _FLAG,
            "rules": {"type": "array", "items": ref("FiredRule")},
            "merge": {
                **obj(
                    {
                        "status": {"enum": ["opened", "merged", "duplicate"]},
                        "how": {"enum": [*DEDUPES, "aggregate"]},
                        "source": {"enum": ["event", "tenant"]},
                        "windowS": {"type": "number"},
                        "aggregationKey": {"type": "string"},
                        "words": {"type": "string"},
                        "into": obj({"id": UUID, "seq": WHOLE}, ["id", "seq"]),
                        "count": WHOLE,
                        "title": {"type": "string"},
                    },
                    ["status", "how", "source", "windowS", "aggregationKey", "words"],
                ),
                "description": "Only of an event that is to be merged: into what, and what it says then.",
            },
        },
        ["userId", "status", "channels", "rules", "words"],
    ),
    "TopicPlan": obj(
        {
            "topic": {"type": "string"},
            "subscribers": WHOLE,
            "exact": {**_FLAG, "description": "false: `subscribers` is an estimate."},
            "sendAt": {"anyOf": [INSTANT, {"type": "null"}]},
            "lookedAt": {**WHOLE, "description": "Subscribers for whom a plan was made."},
            "failed": {**WHOLE, "description": "Those of them who would not get it."},
            "statuses": {"type": "object", "additionalProperties": WHOLE},
            "channels": {"type": "object", "additionalProperties": WHOLE},
            "rules": {
                "type": "array",
                "items": obj(
                    {
                        "rule": {"type": "string"},
                        "source": {"enum": ["user", "tenant", "event", "system"]},
                        "about": {"type": ["string", "null"]},
                        "users": WHOLE,
                    },
                    ["rule", "source", "about", "users"],
                ),
            },
            "replayed": obj({"broadcastId": UUID}, ["broadcastId"]),
            "words": {"type": "string"},
        },
        ["topic", "words"],
    ),
    "Plans": obj(
        {
            "results": {
                "type": "array",
                "items": {
                    "anyOf": [
                        ref("Plan"),
                        obj({"userId": {"type": "string"}, "error": ref("Problem")}, ["error"]),
                    ]
                },
            }
        },
        ["results"],
    ),
    "Digest": {
        "anyOf": [
            {"enum": list(DIGESTS)},
            obj(
                {"frequency": {"enum": list(DIGESTS)}, "at": LOCAL_TIME, "day": {"enum": list(DAYS)}},
                ["frequency"],
            ),
        ]
    },
    "PreferenceRules": {
        "type": "object",
        "maxProperties": MAX_ENTRIES,
        "propertyNames": text(1, 64),
        "additionalProperties": {
            "anyOf": [
                _FLAG,
                obj(
                    {
                        "enabled": _FLAG,
                        "channels": obj(dict.fromkeys(CHANNELS, _FLAG)),
                        "priority": {"enum": list(PRIORITY_NAMES)},
                        "digest": ref("Digest"),
                        **dict.fromkeys(CHANNELS, _FLAG),
                    }
                ),
            ]
        },
    },
    "Device": {
        **obj(
            {
                "platform": {"enum": ["ios", "android", "web"]},
                "provider": {"enum": ["fcm", "apns"]},
                "token": text(1, 4096),
                "fid": text(1, 4096),
                **nullable(
                    {
                        "appId": text(0, 255),
                        "environment": {"enum": ["production", "sandbox"]},
                        "locale": text(1, 35),
                    }
                ),
            },
            ["platform", "provider"],
        ),
        "oneOf": [{"required": ["token"]}, {"required": ["fid"]}],
        "description": "A push target. fid (Firebase installation id) is for fcm only.",
    },
    "RegisteredDevice": obj(
        {
            "deviceId": {"type": "string"},
            "platform": {"type": "string"},
            "provider": {"type": "string"},
            "token": {"type": "string"},
            "fid": {"type": "string"},
            "appId": {"type": "string"},
            "environment": {"type": "string"},
            "locale": {"type": ["string", "null"]},
            "registeredAt": INSTANT,
            "disabledAt": INSTANT,
            "disabledReason": {"type": ["string", "null"]},
        },
        ["deviceId", "platform", "provider", "appId", "environment", "locale"],
    ),
    "Presence": obj(
        {
            "userId": {"type": "string"},
            "status": {"enum": ["active", "idle", "offline"]},
            "invisible": {"type": "boolean"},
            "devices": PRESENT_DEVICES,
            "lastSeenAt": LAST_SEEN,
        },
        ["userId", "status", "invisible", "devices", "lastSeenAt"],
    ),
    "Problem": obj(
        {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "code": {"type": "string"},
            "temporary": {"type": "boolean"},
            "requestId": {"type": "string"},
            "errors": {
                "type": "array",
                "items": obj(
                    {"path": {"type": "string"}, "expected": {"type": "string"}, "got": {"type": "string"}},
                    ["path", "expected", "got"],
                ),
            },
        },
        ["type", "title", "status", "detail", "code", "temporary", "requestId", "errors"],
    ),
}
"""Named schemas."""
