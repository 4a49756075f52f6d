"""The policy of a tenant: push while its users are connected, and who may watch whose presence."""

from __future__ import annotations

import asyncio
import logging
from email.utils import formatdate
from typing import Any, Final

from carillon import policy, retention
from carillon.audience import PLATFORMS
from carillon.budget import MAX_COUNT, MAX_WINDOW_S
from carillon.decision import DIGEST, FEED
from carillon.errors import CarillonError
from carillon.event_rules import MAX_WINDOW_S as MAX_MERGE_S
from carillon.event_rules import MIN_WINDOW_S
from carillon.events import ProblemError
from carillon.merge_rules import HOW, MAX_BODY, MAX_LOCALES, MAX_TITLE
from carillon.merge_rules import MAX_TYPES as MAX_MERGED
from carillon.messages import PolicyHeld, PolicyRead
from carillon.preferences import MAX_ENTRIES
from carillon.problems import DocumentError, problem
from carillon.settings import WATCH, WHEN_AWAY
from serve.audit import audited
from serve.http import Request, Response, json_response
from serve.routes.amend import etag, if_match
from serve.routes.users import IF_MATCH
from serve.routing import SERVICE, Route
from serve.schemas import LOCAL_TIME, obj, ref, text
from serve.services import Services
from stores.postgres.tenants import PolicyVersion

log = logging.getLogger(__name__)

_ANSWER_S: Final = 1.0
"""For a router's answer to arrive, beyond the time that it has for asking the shards."""


async def get_policy(services: Services, request: Request) -> Response:
    """GET /v1/policy."""
    return _complete(services, *await services.tenants.stored_policy(request.tenant))


def _complete(services: Services, document: Any, version: PolicyVersion, status: int = 200) -> Response:
    settings = services.settings
    watch = policy.WatchRule(settings.presence.watch)
    headers = [etag(version.version)]
    if version.since_ms is not None:
        headers.append((b"last-modified", formatdate(version.since_ms / 1000, usegmt=True).encode()))
    whole = policy.complete(document, policy.cluster_default(settings.shard), watch)
    return json_response(whole, status, headers)


async def put_policy(services: Services, request: Request) -> Response:
    """PUT /v1/policy."""
    document = await request.json_object()
    try:
        text = policy.validate(document, services.settings.presence.callback_hosts)
        version = if_match(request)
    except DocumentError as exc:
        raise ProblemError(problem("invalid", str(exc), exc.errors)) from None
    stored = await services.tenants.put_policy(request.tenant, text, version)
    everywhere, _ = await asyncio.gather(
        _spread(services, request), audited(services, request, "policy.put", version=stored.version)
    )
    return _complete(services, document, stored, 200 if everywhere else 202)


async def _spread(services: Services, request: Request) -> bool:
    """Tell the shards; whether all of them decide by it now. What is stored holds there soon in any case."""
    wait_s = services.settings.ingress.policy_wait_s
    deadline = min(request.deadline, services.clock.monotonic() + wait_s + _ANSWER_S)
    try:
        held = await services.backend.request(PolicyRead(request.tenant, round(wait_s * 1000)), deadline)
    except CarillonError as exc:
        log.warning("the shards look for the policy of %s by themselves: %s", request.tenant, exc)
        return False
    if type(held) is PolicyHeld and held.missing:
        log.warning("the policy of %s is not known yet to %s", request.tenant, ", ".join(held.missing))
    # Not by none: a router that knows no shard yet has told nobody.
    return type(held) is PolicyHeld and held.shards > 0 and not held.missing


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
        doc="With every member, those not stored as they hold now. `ETag` is its version (`\"0\"`: nothing "
        "was ever stored), `Last-Modified` since when it is the present one.", answer=_POLICY,
        answer_example=_ANSWER,
        tag="Policy",
    ),
    Route(
        "PUT", "/v1/policy", put_policy, SERVICE, "Replace the tenant's policy", scope="policy:write",
        doc="Members left out are the cluster's defaults. Answered once every shard decides by it; `ETag` "
        "and `Last-Modified` are told as by GET.",
        headers=(IF_MATCH,), body=_POLICY, body_required=False, body_example=_EXAMPLE, answer=_POLICY,
        other_answers={202: (
            "Stored; a shard did not say within `ingress.policy_wait_s` that it knows, and holds it within "
            "`shard.policy_refresh_s`", _POLICY,
        )},
        problems=(400, 412, 413, 422),
        tag="Policy",
    ),
)  # fmt: skip
