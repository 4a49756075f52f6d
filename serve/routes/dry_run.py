"""`POST /v1/events?dryRun=true`: what would become of events, and why; nothing is stored or sent.

Each event is looked at by itself, as if nothing else were in the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from carillon import forecast
from carillon.audience import TOPIC, Audience
from carillon.events import Later
from carillon.events import Request as ParsedEvents
from carillon.ids import uuid_text
from carillon.messages import Event, Outcome, PlanQuery, PlanReply
from carillon.problems import Problem, problem_document
from serve.http import Header, Response, json_response, problem_response
from serve.limits import Limits
from serve.routes.broadcasts import checked, of_topic, refusal
from serve.routes.outcomes import outcome_problem, too_late
from serve.services import Services

MAX_AT_ONCE: Final = 64
"""Plans of one request that are asked for at the same time."""
_REPLAYED: Final[Header] = (b"idempotent-replayed", b"true")


@dataclass(slots=True)
class _Plan:
    """What was found out about one event."""

    document: msgspec.Raw
    problem: Problem | None = None
    replayed: bool = False


async def preview(
    services: Services, parsed: ParsedEvents, tenant: str, deadline: float, request_id: bytes
) -> Response:
    """The plans of events and the rules behind them."""
    plans = await _plans(services, parsed, tenant, deadline)
    replayed = (_REPLAYED,) if plans and all(plan.replayed for plan in plans) else ()
    if parsed.slots is None:
        (plan,) = plans
        if plan.problem is not None:
            return problem_response(plan.problem, request_id)
        return json_response(plan.document, 200, replayed)
    results: list[Any] = []
    for slot in parsed.slots:
        told = slot.refused if slot.event < 0 else plans[slot.event].problem
        if told is None:
            results.append(plans[slot.event].document)
            continue
        user: dict[str, Any] = {} if slot.user is None else {"userId": slot.user}
        results.append(user | {"error": problem_document(told, request_id.decode())})
    return json_response({"results": results}, 200, replayed)


async def _plans(services: Services, parsed: ParsedEvents, tenant: str, deadline: float) -> list[_Plan]:
    """One for each event, in order."""
    known = await _kept(services, parsed, tenant) if parsed.later else {}
    for index, outcome in parsed.beyond.items():
        known[index] = _Plan(msgspec.Raw(b"{}"), outcome_problem(outcome))
    gate = asyncio.Semaphore(MAX_AT_ONCE)

    async def one(index: int, event: Event) -> _Plan:
        if index in known:
            return known[index]
        later = parsed.later.get(index)
        async with gate:
            return await _plan(services, event, 0 if later is None else later.due_ms, deadline)

    return await asyncio.gather(*(one(index, event) for index, event in enumerate(parsed.events)))


async def _plan(services: Services, event: Event, at_ms: int, deadline: float) -> _Plan:
    query = PlanQuery(event.tenant, event.user, event.slot, event, at_ms)
    reply = await services.backend.request(query, deadline)
    assert isinstance(reply, PlanReply)
    told = None if reply.failed is None else outcome_problem(reply.failed)
    return _Plan(msgspec.Raw(reply.document.encode()), told, reply.replayed)


async def _kept(services: Services, parsed: ParsedEvents, tenant: str) -> dict[int, _Plan]:
    """Those of the events to be sent later that would not be kept: too far ahead, or known by their keys."""
    found: dict[int, _Plan] = {}
    keyed: dict[int, Event] = {}
    for index, later in parsed.later.items():
        event = parsed.events[index]
        late = too_late(services, event, later)
        if late is not None:
            found[index] = _Plan(msgspec.Raw(b"{}"), outcome_problem(late))
        elif event.idempotency_key is not None:
            keyed[index] = event
    if not keyed:
        return found
    known = await services.schedules.known(tenant, [event.idempotency_key or "" for event in keyed.values()])
    for index, event in keyed.items():
        other = known.get(event.idempotency_key or "")
        if other is None:
            continue
        if other[1] != event.body_hash:
            conflict = Outcome(event.id, status="failed", code="idempotency_conflict")
            found[index] = _Plan(msgspec.Raw(b"{}"), outcome_problem(conflict))
        else:
            document = forecast.replayed(event.user, Outcome(other[0], status="deferred"))
            found[index] = _Plan(msgspec.Raw(msgspec.json.encode(document)), replayed=True)
    return found


async def preview_topic(
    services: Services,
    document: Mapping[str, Any],
    tenant: str,
    key: str | None,
    deadline: float,
    limits: Limits,
    parse: Callable[[bytes], Awaitable[ParsedEvents]],
) -> Response:
    """What would become of an event for the subscribers of a topic: how many they are, and what is planned
    for the first `ingress.dry_run_sample` of them.

    Args:
        parse: reads the event for the users who are looked at.
    """
    topic, event, at, own = of_topic(document)
    new = await checked(
        services, tenant, {"topic": topic}, event, at, key if own is None else own, deadline, limits, where=""
    )
    now_ms = services.clock.now_ms()
    made = await refusal(services, tenant, new)
    if made is not None:
        told = {"topic": topic, "replayed": {"broadcastId": uuid_text(made)}}
        words = f"The idempotency key stands for the broadcast {uuid_text(made)}: nothing is sent again."
        return json_response(told | {"words": words}, 200, (_REPLAYED,))
    most = services.settings.ingress.dry_run_sample
    found = await services.topics.page(tenant, topic, -1, "", most) if most else []
    count, exact = len(found), True
    if len(found) == most:
        count, exact = await services.broadcasts.count(tenant, Audience(TOPIC, topic))
    start_ms = new.start_ms if new.start_ms > now_ms else None
    plans: list[_Plan] = []
    if found:
        asked = {**event, "userIds": [one.user for one in found]}
        parsed = await parse(msgspec.json.encode(asked))
        later = {} if start_ms is None else {i: Later(start_ms, "") for i in range(len(parsed.events))}
        plans = await _plans(services, parsed._replace(later=later), tenant, deadline)
    good = [msgspec.json.decode(plan.document) for plan in plans if plan.problem is None]
    if start_ms is not None:
        good = [forecast.of_then(plan) for plan in good]
    return json_response(forecast.summary(topic, count, exact, start_ms, good, len(plans) - len(good)), 200)
