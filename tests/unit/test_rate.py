"""The token bucket."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from carillon.clock import ManualClock
from carillon.rate import TokenBucket


def test_no_rate_is_no_limit() -> None:
    """0 means unlimited."""
    bucket = TokenBucket(0.0, 0.0, ManualClock())
    for _ in range(10_000):
        assert bucket.wait_s() == 0.0
        bucket.take()


def test_a_burst_then_the_rate() -> None:
    """Ten at once, then one every tenth of a second."""
    clock = ManualClock()
    bucket = TokenBucket(10.0, 10.0, clock)
    for _ in range(10):
        assert bucket.wait_s() == 0.0
        bucket.take()
    assert math.isclose(bucket.wait_s(), 0.1)
    clock.advance(0.05)
    assert math.isclose(bucket.wait_s(), 0.05)
    clock.advance(0.05)
    assert bucket.wait_s() < 1e-9


def test_what_did_not_go_out_costs_nothing() -> None:
    """Given back, up to the burst."""
    bucket = TokenBucket(1.0, 2.0, ManualClock())
    bucket.take(2)
    bucket.give_back(2)
    assert bucket.wait_s() == 0.0
    bucket.give_back(5)
    bucket.take(2)
    assert bucket.wait_s() == 1.0


@given(
    rate=st.floats(0.5, 1000.0),
    burst=st.floats(1.0, 100.0),
    steps=st.lists(st.tuples(st.floats(0.0, 2.0), st.integers(1, 5)), max_size=100),
)
def test_never_more_than_the_rate_allows(rate: float, burst: float, steps: list[tuple[float, int]]) -> None:
    """Whoever asks before taking passes at most rate * t + burst and the debt of one job, from any start."""
    clock = ManualClock()
    bucket = TokenBucket(rate, burst, clock)
    passed: list[tuple[float, int]] = []
    for pause_s, size in steps:
        clock.advance(pause_s)
        if bucket.wait_s() == 0.0:
            bucket.take(size)
            passed.append((clock.monotonic(), size))
    for index, (start, _) in enumerate(passed):
        total = 0
        for at, size in passed[index:]:
            total += size
            assert total <= rate * (at - start) + burst + 5 + 1e-6
