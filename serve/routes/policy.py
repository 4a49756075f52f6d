"""The policy of a tenant: push while its users are connected, and who may watch whose presence."""

from __future__ import annotations

from typing import Any, Final

from carillon import policy, retention
from carillon.audience import PLATFORMS
from carillon.budget import MAX_COUNT, MAX_WINDOW_S
from carillon.decision import DIGEST, FEED
from carillon.event_rules import MAX_WINDOW_S as MAX_MERGE_S
from carillon.event_rules import MIN_WINDOW_S
from carillon.events import ProblemError
from carillon.merge_rules import HOW, MAX_BODY, MAX_LOCALES, MAX_TITLE
from carillon.merge_rules import MAX_TYPES as MAX_MERGED
from carillon.preferences import MAX_ENTRIES
from carillon.problems import problem
from carillon.settings import WATCH, WHEN_AWAY
from serve.audit import audited
from serve.http import Request, Response, json_response
from serve.routing import SERVICE, Route
from serve.schemas import LOCAL_TIME, obj, ref, text
from serve.services import Services


async def get_policy(services: Services, request: Request) -> Response:
    """GET /v1/policy."""
    return _complete(services, await services.tenants.policy(request.tenant))


def _complete(services: Services, document: Any) -> Response:
    settings = services.settings
    watch = policy.WatchRule(settings.presence.watch)
    return json_response(policy.complete(document, policy.cluster_default(settings.shard), watch))


async def put_policy(services: Services, request: Request) -> Response:
    """PUT /v1/policy."""
    document = await request.json_object()
    try:
        text = policy.validate(document, services.settings.presence.callback_hosts)
    except policy.PolicyError as exc:
        raise ProblemError(problem("invalid", str(exc), exc.errors)) from None
    await services.tenants.put_policy(request.tenant, text)
    await audited(services, request, "policy.put")
    return _complete(services, document)


_MEMBERS: Final = {
    "whenAway": {"enum": list(WHEN_AWAY)},
    "whenAwayDelayS": {"type": "number", "minimum": 0, "maximum": policy.MAX_DELAY_S},
    "holdS": {"type": "number", "minimum": 0, "maximum": policy.MAX_HOLD_S},
}
_LIMIT: Final = obj(
    {
        "count": {"type": "integer", "minimum": 1, "maximum": MAX_COUNT},
        "windowS": {"type": "number", "minimum": 0.001, "maximum": MAX_WINDOW_S},
    },
    ["count", "windowS"],
)


def _words(most: int) -> dict[str, Any]:
    """A text, or texts by plural form."""
    forms = obj({}, ["other"]) | {
        "properties": {"other": text(1, most, control=True)},
        "patternProperties": {"^(zero|one|two|few|many|=[0-9]{1,6})$": text(1, most, control=True)},
    }
    return {"anyOf": [text(1, most, control=True), forms]}


_MERGE: Final = obj(
    {
        "how": {"enum": list(HOW)},
        "windowS": {"type": "number", "minimum": MIN_WINDOW_S, "maximum": MAX_MERGE_S},
        "renotifyS": {"type": "number", "minimum": 0, "maximum": MAX_MERGE_S},
        "texts": {
            "type": "object",
            "maxProperties": MAX_LOCALES,
            "additionalProperties": obj({"title": _words(MAX_TITLE), "body": _words(MAX_BODY)}),
            "description": "By locale, `default` among them: title and body of what was merged.",
        },
    }
)
_POLICY: Final = obj(
    {
        **_MEMBERS,
        "types": {
            "type": "object",
            "propertyNames": {
                "minLength": 1,
                "maxLength": 64,
                "pattern": r"^[^\u0000-\u001f\u007f-\u009f]*$",
            },
            "maxProperties": policy.MAX_TYPES,
            "additionalProperties": obj(
                {
                    **_MEMBERS,
                    "devices": {
                        "type": "array",
                        "items": {"enum": list(PLATFORMS)},
                        "minItems": 1,
                        "maxItems": 3,
                    },
                    "window": obj({"start": LOCAL_TIME, "end": LOCAL_TIME}, ["start", "end"]),
                }
            ),
        },
        retention.MEMBER: {"type": "number", "minimum": 0, "maximum": retention.MAX_DAYS, "multipleOf": 1},
        "presence": obj(
            {"watch": {"enum": list(WATCH)}, "url": {"type": "string", "maxLength": 2048}}, ["watch"]
        ),
        "topics": obj(
            {
                "subscribe": {"enum": list(policy.SUBSCRIBE)},
                "prefixes": {
                    "type": "array",
                    "items": text(1, 128),
                    "minItems": 1,
                    "maxItems": policy.MAX_PREFIXES,
                },
            },
            ["subscribe"],
        ),
        "defaults": ref("Preferences"),
        "forced": obj({"categories": ref("PreferenceRules"), "types": ref("PreferenceRules")}),
        "digests": obj({"template": text(1, 74)}, ["template"]),
        "held": obj({"template": text(1, 74)}, ["template"]),
        "limits": obj(
            {
                "user": _LIMIT,
                "types": {
                    "type": "object",
                    "propertyNames": text(1, 64),
                    "maxProperties": MAX_ENTRIES,
                    "additionalProperties": _LIMIT,
                },
                "overflow": {"enum": [DIGEST, FEED]},
                "collectS": {"type": "number", "minimum": 0, "maximum": MAX_WINDOW_S},
            }
        ),
        "merge": {
            "type": "object",
            "propertyNames": text(1, 64),
            "maxProperties": MAX_MERGED,
            "additionalProperties": _MERGE,
        },
    }
)
_EXAMPLE: Final = {
    "whenAway": "push_after",
    "whenAwayDelayS": 20,
    "types": {
        "chat.message": {"holdS": 30},
        "offer": {"devices": ["ios", "android"], "window": {"start": "09:00", "end": "20:00"}},
    },
    "defaults": {"quietHours": {"start": "22:00", "end": "07:00", "timezone": "Europe/Vienna"}},
    "forced": {"categories": {"security": True}},
    "limits": {"user": {"count": 30, "windowS": 3600}, "overflow": "digest"},
    "topics": {"subscribe": "prefix", "prefixes": ["public."]},
    "retentionDays": 365,
    "digests": {"template": "digest"},
    "held": {"template": "held"},
    "merge": {
        "post.like": {
            "how": "aggregate",
            "texts": {"default": {"title": "{actor} and {others} more liked your post"}},
        }
    },
}
_ANSWER: Final = {
    "whenAway": "push_after", "whenAwayDelayS": 30.0, "holdS": 60.0, "types": {},
    "presence": {"watch": "nobody"}, "topics": {"subscribe": "nobody"},
}  # fmt: skip

ROUTES: Final = (
    Route(
        "GET", "/v1/policy", get_policy, SERVICE, "Read the tenant's policy", scope="policy:write",
        doc="With every member, those not stored as they hold now.", answer=_POLICY,
        answer_example=_ANSWER,
        tag="Policy",
    ),
    Route(
        "PUT", "/v1/policy", put_policy, SERVICE, "Replace the tenant's policy", scope="policy:write",
        doc="Holds everywhere within `shard.policy_refresh_s`. Members left out are the cluster's defaults.",
        body=_POLICY, body_required=False, body_example=_EXAMPLE, answer=_POLICY, problems=(400, 413, 422),
        tag="Policy",
    ),
)  # fmt: skip
