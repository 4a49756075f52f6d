"""Rate limits of keys and tenants: the document, and what passes both."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.clock import ManualClock
from carillon.errors import InvalidInputError
from carillon.events import ProblemError
from carillon.limits import check_rate, key_limit, tenant_limit
from carillon.metrics import Stats
from carillon.problems import Problem
from carillon.settings import RedisSettings
from serve.limits import admit
from stores.redis.rate_limiter import RateLimiter


def services(clock: ManualClock) -> Any:
    return SimpleNamespace(limits=RateLimiter(RedisSettings(url=""), 0.0, clock), stats=Stats())


def test_the_document() -> None:
    """No document, an empty one, or other members only: no limit; the burst of a second if none is given."""
    assert tenant_limit("acme", None) == tenant_limit("acme", {}) == tenant_limit("acme", {"x": 1}) == ()
    (limit,) = tenant_limit("acme", {"ratePerS": 2.5, "burst": 3})
    assert (limit.bucket, limit.rate_per_s, limit.burst) == ("tenant:acme", 2.5, 3)
    assert limit.told() == "tenant acme, all its keys together, may send 2.5 a second, 3 at once"
    assert key_limit("acme", "k", None, 0) == ()
    assert key_limit("acme", "k", 5.0, 5)[0].told() == "this API key may send 5 a second, 5 at once"
    assert check_rate(2.5, None) == (2.5, 3)
    assert check_rate(None, 7) == (None, None)
    for rate, burst in ((0.0, None), (float("nan"), None), (1e8, None), (1.0, 0), (1.0, 10**8)):
        with pytest.raises(InvalidInputError):
            check_rate(rate, burst)


@given(
    rates=st.tuples(*[st.floats(0.5, 50.0)] * 2),
    bursts=st.tuples(*[st.integers(1, 20)] * 2),
    steps=st.lists(
        st.tuples(st.floats(0.0, 2.0), st.sampled_from("ab"), st.integers(1, 10)), min_size=1, max_size=60
    ),
)
def test_what_passes_is_within_both_limits(
    rates: tuple[float, float], bursts: tuple[int, int], steps: list[tuple[float, str, int]]
) -> None:
    """Over any time no key passes more than its limit, its tenant's keys together no more than the tenant's;
    what is refused is told to wait, and takes nothing that another could have had."""

    async def run() -> None:
        clock = ManualClock()
        made = services(clock)
        tenant = tenant_limit("acme", {"ratePerS": rates[1], "burst": bursts[1]})
        passed: list[tuple[float, str, int]] = []
        refused: list[Problem] = []
        start = clock.monotonic()
        for wait_s, key, events in steps:
            clock.advance(wait_s)
            limits = key_limit("acme", key, rates[0], bursts[0]) + tenant
            try:
                await admit(made, limits, events)
            except ProblemError as exc:
                refused.append(exc.problem)
            else:
                passed.append((clock.monotonic() - start, key, events))
        assert all(one.status == 429 and one.retry_after_s > 0 for one in refused)
        for rate, burst, keys in (
            (rates[0], bursts[0], "a"),
            (rates[0], bursts[0], "b"),
            (rates[1], bursts[1], "ab"),
        ):
            mine = [(t, n) for t, key, n in passed if key in keys]
            for first in range(len(mine)):
                for last in range(first, len(mine)):
                    total = sum(n for _, n in mine[first : last + 1])
                    # 10 - 1: the last one that fits may be larger than what is left, and makes a debt.
                    bound = rate * (mine[last][0] - mine[first][0]) + burst + 9
                    assert total <= bound + 1e-6

    asyncio.run(run())


async def test_what_the_tenant_refuses_costs_the_key_nothing() -> None:
    """A key that may send one event only still may, after its tenant's limit turned it away."""
    clock = ManualClock()
    made = services(clock)
    tenant = tenant_limit("acme", {"ratePerS": 2.0, "burst": 1})
    await admit(made, key_limit("acme", "other", 100.0, 100) + tenant, 1)
    mine = key_limit("acme", "mine", 0.01, 1) + tenant
    with pytest.raises(ProblemError) as refused:
        await admit(made, mine, 1)
    assert "tenant acme" in refused.value.problem.detail
    assert refused.value.problem.retry_after_s == pytest.approx(1.0)  # half a second, told in whole ones
    clock.advance(0.6)
    await admit(made, mine, 1)
    clock.advance(0.6)
    with pytest.raises(ProblemError) as refused:
        await admit(made, mine, 1)
    assert "this API key" in refused.value.problem.detail
    assert dict(made.stats.counters) == {
        'events_limited{limit="tenant",tenant="acme"}': 1,
        'events_limited{limit="key",tenant="acme"}': 1,
    }
