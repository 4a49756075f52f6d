"""Why: what became of a notification, and what would become of an event."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec

from carillon import explain
from carillon.attention import Attention
from carillon.clock import rfc3339
from carillon.decision import DIGEST, unpack
from carillon.events import Request as ParsedEvents
from carillon.external import EXTERNAL, IN_APP
from carillon.ids import uuid_text
from carillon.messages import Event, PlanQuery, PlanReply
from carillon.notification import decode_content, filed_away
from carillon.problems import problem_document
from serve.http import Request, Response, json_response
from serve.routes.amend import HISTORY, history
from serve.routes.bodies import no_notification, path_notification
from serve.routes.merged import MERGED, merge_windows_of, merged_json, merged_words
from serve.routing import SERVICE, Route
from serve.schemas import UUID, obj, ref
from serve.services import Services
from stores.postgres.feed import Act, Found

MAX_AT_ONCE: Final = 64
"""Plans of one request that are asked for at the same time."""

_STATES: Final = {
    "planned": "waits until {due}",
    "sending": "is on its way",
    "unknown": "was sent without an answer; it is tried again at {due}",
    "failed": "failed and is tried again at {due}",
    "sent": "was taken by the provider",
    "dead": "was given up",
    "cancelled": "was not needed",
}


async def preview(services: Services, parsed: ParsedEvents, deadline: float, request_id: bytes) -> Response:
    """The plans of events and the rules behind them; nothing is stored."""
    gate = asyncio.Semaphore(MAX_AT_ONCE)

    async def one(event: Event) -> msgspec.Raw:
        async with gate:
            reply = await services.backend.request(
                PlanQuery(event.tenant, event.user, event.slot, event), deadline
            )
        assert isinstance(reply, PlanReply)
        return msgspec.Raw(reply.document.encode())

    plans = await asyncio.gather(*(one(event) for event in parsed.events))
    if parsed.slots is None:
        return json_response(plans[0])
    results: list[Any] = []
    for slot in parsed.slots:
        if slot.refused is None:
            results.append(plans[slot.event])
            continue
        told: dict[str, Any] = {} if slot.user is None else {"userId": slot.user}
        results.append(told | {"error": problem_document(slot.refused, request_id.decode())})
    return json_response({"results": results})


async def get_explanation(services: Services, request: Request) -> Response:
    """GET /v1/notifications/{id}/explain."""
    raw = path_notification(request)
    found = await services.feed.notification(request.tenant, raw)
    if found is None:
        raise await no_notification(services, request, raw)
    made = await services.broadcasts.broadcast_of(request.tenant, found.user, found.row.id)
    came = [] if made is None else [f"It came with the broadcast {uuid_text(made)}."]
    rules = _rules(found)
    deliveries = [_delivery(one) for one in found.deliveries]
    acts = [act_words(act) for act in found.acts]
    windows = await merge_windows_of(services, request.tenant, found)
    return json_response(
        {
            "notificationId": request.params["id"],
            "userId": found.user,
            "broadcastId": None if made is None else uuid_text(made),
            "channels": _channels(found),
            "archived": filed_away(found.row),
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


def _channels(found: Found) -> list[str]:
    """What was planned, as the answer to the event said."""
    asked = decode_content(found.row.content).get("channels")
    in_app = (asked is None or IN_APP in asked) and not filed_away(found.row)
    outside = [d["channel"] for d in found.deliveries if d["channel"] in EXTERNAL]
    return list(dict.fromkeys([IN_APP] * in_app + outside))


def _rules(found: Found) -> list[explain.Fired]:
    rules = [] if found.decision is None else unpack(found.decision)
    if found.receipt is None:
        return rules  # of a release that kept none
    reach, attention, providers = explain.read_receipt(found.receipt)
    outside = [d for d in found.deliveries if d["channel"] in EXTERNAL]
    fallback = [d["channel"] for d in outside if d["step"]]
    if outside and outside[-1]["chain"]:
        fallback += outside[-1]["chain"].split(",")
    closed = {name for rule in rules if rule.until_ms is None for name in rule.channels}
    held = any(rule.until_ms is not None for rule in rules)
    asked = decode_content(found.row.content).get("channels")
    return rules + explain.circumstances(
        [n for n in asked if n not in closed] if asked is not None else None,
        fallback,
        found.priority,
        reach,
        Attention(attention),
        providers,
        external=bool(outside),
        filed_away=filed_away(found.row),
        held=held,
    )


def _delivery(one: dict[str, Any]) -> dict[str, Any]:
    due = rfc3339(one["due_ms"])
    state: str = _STATES[one["state"]].format(due=due)
    because = f" ({one['reason']})" if one["reason"] else ""
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
        "words": f"The {one['channel']} {state}{because}.",
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
                "channels": _NAMES,
                "archived": {"type": "boolean"},
                "rules": {"type": "array", "items": ref("FiredRule")},
                "deliveries": {"type": "array", "items": {"type": "object"}},
                **MERGED,
                **HISTORY,
                "words": {"type": "string"},
            },
            [
                "notificationId", "userId", "broadcastId", "channels", "archived", "rules", "deliveries",
                *MERGED, *HISTORY, "words",
            ],
        ),
        problems=(404, 422), tag="Users",
    ),
)  # fmt: skip
