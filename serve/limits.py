"""Rate limits at the doors: events pass, are refused with 429, wait, or go where the tenant's overflow goes.

Urgent events pass the limit of their tenant, and count. (That of an API key is the tenant's own fence around
a service: it holds for all that the service sends.) What becomes of what exceeds a tenant's limit and is
accepted is decided by the shard, which knows the user: it is told by `Event.over`.

Most keys and tenants have none: `limits` is an empty tuple then, and that is all that is looked at.
"""

from __future__ import annotations

import asyncio

from carillon.decision import URGENT
from carillon.events import ProblemError, Request
from carillon.limits import REJECT, TENANT, RateLimit
from carillon.messages import Outcome
from carillon.problems import problem
from serve.services import Services

Limits = tuple[RateLimit, ...]


async def tenant_limits(services: Services, tenant: str) -> Limits:
    """The limit of a tenant, for what comes in without an API key. Raises StoreUnavailableError."""
    record = await services.auth.tenant(tenant)
    return () if record is None else record.rate_limits


async def admit_events(services: Services, limits: Limits, parsed: Request) -> Request:
    """Let the events of a request pass the limits, or say of each what becomes of it.

    Of a batch the urgent ones are counted first. What is left of a rate whose overflow is accepted goes to
    the first ones of the others; one that refuses lets the others pass together, or none of them.

    Returns:
        The request: events beyond the rate say so (`over`), or are in `beyond`.

    Raises:
        ProblemError: `rate_limited` (429), as of `admit`: no event of it passes.
    """
    events = parsed.events
    limit = limits[-1]
    own = limits if limit.of != TENANT else limits[:-1]
    if own:
        await admit(services, own, len(events))
    if limit.of != TENANT:
        return parsed
    urgent = [index for index, event in enumerate(events) if event.priority >= URGENT]
    others = len(events) - len(urgent)
    split = limit.overflow != REJECT
    admitted = await services.limits.admit(
        limit.bucket, limit.rate_per_s, limit.burst, len(urgent), others, split=split
    )
    if admitted.urgent == len(urgent) and admitted.others == others:
        return parsed
    passing = urgent[admitted.urgent :]
    for index in passing:
        events[index].over = limit.over
    if passing:
        _over_limit(services, limit, "passed", len(passing))
    left = admitted.others
    beyond: dict[int, Outcome] = {}
    overflowed = 0
    for index, event in enumerate(events):
        if event.priority >= URGENT:
            continue
        if left:
            left -= 1
        elif split and index not in parsed.later:
            event.over = limit.over
            overflowed += 1
        else:
            # What is kept for later is decided later, when nobody counts it: it waits outside.
            beyond[index] = Outcome(
                event.id, status="failed", code="rate_limited", detail=limit.told(),
                retry_after_s=admitted.wait_s,
            )  # fmt: skip
    if overflowed:
        _over_limit(services, limit, limit.overflow, overflowed)
    if not beyond:
        return parsed
    _counted(services, limit, len(beyond))
    for mine in own:
        await services.limits.give_back(mine.bucket, len(beyond))
    if len(beyond) == len(events):
        raise ProblemError(problem("rate_limited", limit.told(), retry_after_s=admitted.wait_s))
    return parsed._replace(beyond=beyond)


async def admit(services: Services, limits: Limits, events: int, *, urgent: bool = False) -> None:
    """Let so many events pass all of the limits; urgent ones pass that of their tenant, and count.

    Raises:
        ProblemError: `rate_limited` (429), with Retry-After and whose limit it was: none of them passes, and
            nothing is taken from the other limit.
    """
    wait_s, limit = await _take(services, limits, events, urgent=urgent)
    if limit is not None:
        _counted(services, limit, events)
        raise ProblemError(problem("rate_limited", limit.told(), retry_after_s=wait_s))


async def admit_patiently(services: Services, limits: Limits, events: int) -> None:
    """Wait until all of the limits let so many events pass."""
    counted = False
    while True:
        wait_s, limit = await _take(services, limits, events)
        if limit is None:
            return
        if not counted:
            _counted(services, limit, events)
            counted = True
        await asyncio.sleep(wait_s)


async def _take(
    services: Services, limits: Limits, events: int, *, urgent: bool = False
) -> tuple[float, RateLimit | None]:
    """Seconds to wait and the limit that asks for it, or (0.0, None): they pass."""
    for place, limit in enumerate(limits):
        if urgent and limit.of == TENANT:
            done = await services.limits.admit(
                limit.bucket, limit.rate_per_s, limit.burst, events, 0, split=False
            )
            if done.urgent < events:
                _over_limit(services, limit, "passed", events - done.urgent)
            continue
        wait_s = await services.limits.take(limit.bucket, limit.rate_per_s, limit.burst, events)
        if wait_s:
            for passed in limits[:place]:
                await services.limits.give_back(passed.bucket, events)
            return wait_s, limit
    return 0.0, None


def _counted(services: Services, limit: RateLimit, events: int) -> None:
    # Tenants that have a limit are few and named by the operator: the number of series is bounded by that.
    services.stats.count(f'events_limited{{limit="{limit.of}",tenant="{limit.tenant}"}}', events)


def _over_limit(services: Services, limit: RateLimit, became: str, events: int) -> None:
    """Count what exceeded a tenant's limit and was accepted."""
    services.stats.count(f'events_over_limit{{became="{became}",tenant="{limit.tenant}"}}', events)
