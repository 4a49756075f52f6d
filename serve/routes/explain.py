"""Why: what became of a notification."""

from __future__ import annotations

from typing import Any, Final

from carillon import explain
from carillon.attention import Attention
from carillon.clock import rfc3339
from carillon.decision import DIGEST, unpack
from carillon.endings import ending, onward, onward_words
from carillon.external import EXTERNAL, IN_APP
from carillon.forecast import device_rules
from carillon.ids import uuid_text
from carillon.notification import decode_content, filed_away
from carillon.outbox import LEFT_OUT, for_platforms
from carillon.policy import build, cluster_default
from carillon.switches import TENANT
from serve.http import Request, Response, json_response
from serve.routes.amend import HISTORY, history
from serve.routes.bodies import no_notification, path_notification
from serve.routes.merged import MERGED, merge_windows_of, merged_json, merged_words
from serve.routing import SERVICE, Route
from serve.schemas import INSTANT, UUID, obj, ref
from serve.services import Services
from stores.postgres.feed import Act, Found

_TEMPLATE: Final = ("template", "version", "variant")
_WAITING: Final = ("planned", "sending", "unknown", "failed")
_PUNCTUAL_MS: Final = 1000
"""What differs less from its time was sent then."""
_STATES: Final = {
    "planned": "waits until {due}",
    "sending": "is on its way",
    "unknown": "was sent without an answer; it is tried again at {due}",
    "failed": "failed and is tried again at {due}",
    "sent": "was taken by the provider",
    "dead": "was given up",
    "cancelled": "was not needed",
}


async def get_explanation(services: Services, request: Request) -> Response:
    """GET /v1/notifications/{id}/explain."""
    raw = path_notification(request)
    found = await services.feed.notification(request.tenant, raw)
    if found is None:
        raise await no_notification(services, request, raw)
    made = await services.broadcasts.broadcast_of(request.tenant, found.user, found.row.id)
    came = [] if made is None else [f"It came with the broadcast {uuid_text(made)}."]
    kept = await services.schedules.get(request.tenant, raw)
    if kept is not None:
        came.append(scheduled_words(kept.next_ms, found.created_ms))
    text = await services.templates.store.exposure(request.tenant, raw)
    if text is not None:
        came.append(f"It has the variant {text[2]} of the template {text[0]}, version {text[1]}.")
    rules = _rules(found) + await _devices(services, request.tenant, found)
    deliveries = [_delivery(one) for one in found.deliveries]
    acts = [act_words(act) for act in found.acts]
    windows = await merge_windows_of(services, request.tenant, found)
    return json_response(
        {
            "notificationId": request.params["id"],
            "userId": found.user,
            "broadcastId": None if made is None else uuid_text(made),
            "scheduledAt": None if kept is None else rfc3339(kept.next_ms),
            "template": None if text is None else dict(zip(_TEMPLATE, text, strict=True)),
            "channels": _channels(found),
            "archived": _filed(found),
            "expiresAt": None if found.row.expires_ms is None else rfc3339(found.row.expires_ms),
            "rules": explain.told(rules),
            "deliveries": deliveries,
            **merged_json(found, windows),
            **history(found),
            "words": " ".join(
                [
                    *came,
                    *map(explain.words, rules),
                    *merged_words(found, windows),
                    *(one["words"] for one in deliveries),
                    *acts,
                ]
            ),
        }
    )


def scheduled_words(due_ms: int, created_ms: int) -> str:
    """When an event with `scheduleAt` was sent, which may be later than it said."""
    if abs(created_ms - due_ms) <= _PUNCTUAL_MS:
        return f"It was sent on {rfc3339(due_ms)}, as its scheduleAt said."
    return f"It was sent on {rfc3339(created_ms)}; its scheduleAt said {rfc3339(due_ms)}."


def _channels(found: Found) -> list[str]:
    """What was planned, as the answer to the event said."""
    asked = decode_content(found.row.content).get("channels")
    in_app = (asked is None or IN_APP in asked) and not _filed(found)
    outside = [d["channel"] for d in found.deliveries if d["channel"] in EXTERNAL]
    return list(dict.fromkeys([IN_APP] * in_app + outside))


def _filed(found: Found) -> bool:
    """Whether the user wanted nothing of it in the app. It was sent later than its id was made, perhaps."""
    archived_ms = found.row.archived_ms
    return filed_away(found.row) or (archived_ms is not None and archived_ms <= found.created_ms)


def _rules(found: Found) -> list[explain.Fired]:
    rules = [] if found.decision is None else unpack(found.decision)
    outside = [d for d in found.deliveries if d["channel"] in EXTERNAL]
    came_ms = found.created_ms if found.version == 1 else 0  # an edit may bring the end forward
    ends = explain.expiry(
        found.row.expires_ms, came_ms, _due_ms(rules, outside), (d["channel"] for d in outside)
    )
    if found.receipt is None:
        return rules + ends  # of a release that kept none
    if ends and ends[0].rule == explain.EXPIRED:
        return rules + ends
    reach, attention, providers = explain.read_receipt(found.receipt)
    fallback = [d["channel"] for d in outside if d["step"]]
    if outside and outside[-1]["chain"]:
        fallback += outside[-1]["chain"].split(",")
    closed = {name for rule in rules if rule.until_ms is None for name in rule.channels}
    held = any(rule.until_ms is not None for rule in rules)
    asked = decode_content(found.row.content).get("channels")
    around = explain.circumstances(
        [n for n in asked if n not in closed] if asked is not None else None,
        fallback,
        found.priority,
        reach,
        Attention(attention),
        providers,
        external=bool(outside),
        filed_away=_filed(found),
        held=held,
    )
    return rules + around + ends


async def _devices(services: Services, tenant: str, found: Found) -> list[explain.Fired]:
    """Which devices the tenant's rule for the type leaves out: those that were, or now would be."""
    outside = [d for d in found.deliveries if d["channel"] in EXTERNAL]
    rules = [
        explain.Fired("left_out", TENANT, told, (one["channel"],))
        for one in outside
        if (told := onward(one["reason"] or "")[0].partition(LEFT_OUT)[2])
    ]
    waiting = [one["channel"] for one in outside if one["state"] in _WAITING]
    if not waiting or found.row.retracted_ms is not None:
        return rules
    document = await services.tenants.policy(tenant)
    kind = decode_content(found.row.content).get("type") or ""
    policy = build(document, cluster_default(services.settings.shard)).of(kind)
    if not policy.platforms:
        return rules
    targets = await services.feed.targets(tenant, found.user)
    mine = [t for t in targets if any(EXTERNAL[name].reaches(t.provider) for name in waiting)]
    return rules + device_rules(policy.platforms, *for_platforms(mine, policy.gets), waiting)


def _due_ms(rules: list[explain.Fired], outside: list[dict[str, Any]]) -> int | None:
    """Until when what leaves the system was held, or waits; None: it went at once, or nothing leaves it."""
    if not outside:
        return None
    held = [rule.until_ms for rule in rules if rule.until_ms is not None]
    waits = [d["due_ms"] for d in outside if not d["attempts"] and d["state"] in ("planned", "cancelled")]
    return held[-1] if held else max(waits, default=None)


def _delivery(one: dict[str, Any]) -> dict[str, Any]:
    due = rfc3339(one["due_ms"])
    state: str = _STATES[one["state"]].format(due=due)
    closed = ending(one["channel"], one["state"], one["reason"])
    own, following = onward(one["reason"] or "")
    because = f" ({own.partition('; closed by ')[0]})" if own else ""
    digest = one["digest"]
    if digest is not None and one["carrier"] is None and one["state"] == "planned":
        state = f"is collected in a digest due at {due}"
        because = "" if one["reason"] == DIGEST else because
    return {
        "channel": one["channel"],
        "state": one["state"],
        "reason": one["reason"],
        "dueAt": due,
        "step": one["step"],
        "digestId": None if digest is None else str(digest),
        "closedBy": closed,
        "words": " ".join(
            [
                f"The {one['channel']} {state}{because}.",
                *(onward_words(following) if closed is None else [closed["words"]]),
            ]
        ),
    }


_DONE: Final = {
    "edit": "{by} edited it at {at}: version {version}",
    "retract": "{by} retracted it at {at}",
    "cancel": "{by} cancelled what was pending at {at}",
}


def act_words(act: Act) -> str:
    """One act of the service as a sentence."""
    by = "The API " + act.actor.replace(":", " ", 1)
    return _DONE[act.act].format(by=by, at=rfc3339(act.at_ms), version=act.version) + "."


_CLOSED: Final = {
    "anyOf": [
        {"type": "null"},
        obj(
            {
                "rule": {"type": "string"},
                "source": {"enum": ["user", "tenant", "event", "system"]},
                "about": {"type": ["string", "null"]},
                "words": {"type": "string"},
            },
            ["rule", "source", "about", "words"],
        ),
    ]
}
_NAMES: Final = {"type": "array", "items": {"type": "string"}}

ROUTES: Final = (
    Route(
        "GET", "/v1/notifications/{id}/explain", get_explanation, SERVICE,
        "Why a notification went where it went", scope="users:read",
        doc="Every rule that fired, in the order they count, in words and as data, and what became of pushes",
        answer=obj(
            {
                "notificationId": UUID,
                "userId": {"type": "string"},
                "broadcastId": {"anyOf": [UUID, {"type": "null"}]},
                "scheduledAt": {"anyOf": [INSTANT, {"type": "null"}]},
                "template": {
                    "anyOf": [
                        obj(
                            {
                                "template": {"type": "string"},
                                "version": {"type": "integer"},
                                "variant": {"type": "string"},
                            },
                            list(_TEMPLATE),
                        ),
                        {"type": "null"},
                    ],
                    "description": "Only of a template with variants.",
                },
                "channels": _NAMES,
                "archived": {"type": "boolean"},
                "expiresAt": {"anyOf": [INSTANT, {"type": "null"}]},
                "rules": {"type": "array", "items": ref("FiredRule")},
                "deliveries": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "closedBy": {
                                "description": "What closed it before it was sent.", **_CLOSED
                            }
                        },
                    },
                },
                **MERGED,
                **HISTORY,
                "words": {"type": "string"},
            },
            [
                "notificationId", "userId", "broadcastId", "scheduledAt", "template",
                "channels", "archived", "expiresAt", "rules",
                "deliveries",
                *MERGED, *HISTORY, "words",
            ],
        ),
        problems=(404, 422), tag="Users",
    ),
)  # fmt: skip
