"""Rate limits at the doors: events pass, are refused with 429, or wait.

Most keys and tenants have none: `limits` is an empty tuple then, and that is all that is looked at.
"""

from __future__ import annotations

import asyncio

from carillon.events import ProblemError
from carillon.limits import RateLimit
from carillon.problems import problem
from serve.services import Services

Limits = tuple[RateLimit, ...]


async def tenant_limits(services: Services, tenant: str) -> Limits:
    """The limit of a tenant, for what comes in without an API key. Raises StoreUnavailableError."""
    record = await services.auth.tenant(tenant)
    return () if record is None else record.rate_limits


async def admit(services: Services, limits: Limits, events: int) -> None:
    """Let so many events pass all of the limits.

    Raises:
        ProblemError: `rate_limited` (429), with Retry-After and whose limit it was: none of them passes, and
            nothing is taken from the other limit.
    """
    wait_s, limit = await _take(services, limits, events)
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


async def _take(services: Services, limits: Limits, events: int) -> tuple[float, RateLimit | None]:
    """Seconds to wait and the limit that asks for it, or (0.0, None): they pass."""
    for place, limit in enumerate(limits):
        wait_s = await services.limits.take(limit.bucket, limit.rate_per_s, limit.burst, events)
        if wait_s:
            for passed in limits[:place]:
                await services.limits.give_back(passed.bucket, events)
            return wait_s, limit
    return 0.0, None


def _counted(services: Services, limit: RateLimit, events: int) -> None:
    # Tenants that have a limit are few and named by the operator: the number of series is bounded by that.
    services.stats.count(f'events_limited{{limit="{limit.of}",tenant="{limit.tenant}"}}', events)
