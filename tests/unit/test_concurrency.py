"""The adaptive limit: its bounds, and how it behaves against simulated providers."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from carillon.clock import ManualClock
from carillon.concurrency import AdaptiveLimit


class Provider:
    """A provider with so many workers; a request takes `service_s` once a worker is free.

    A request that is not answered within `timeout_s` is given up, as a sender does.
    """

    def __init__(self, low: int = 10, high: int = 1000, *, workers: int, timeout_s: float = 10.0) -> None:
        self.clock = ManualClock()
        self.limit = AdaptiveLimit(low, high, self.clock)
        self.workers = [0.0] * workers
        self.service_s: Callable[[], float] = lambda: 0.2
        self.refuse: Callable[[], bool] = lambda: False
        self.timeout_s = timeout_s
        self.in_flight = 0
        self.done = 0
        self.most = 0
        self._events: list[tuple[float, int, str, float]] = []
        self._number = 0
        self._began = self.clock.monotonic()

    def run(self, seconds: float, wanted: int = 1_000_000) -> float:
        """Let clients that want `wanted` requests at once go on for so long; returns answers per second."""
        done, begun = self.done, self.clock.monotonic()
        self.most = 0
        until = begun + seconds
        while True:
            self._fill(wanted)
            at, _, what, began = self._events[0]
            if at > until:
                break
            heapq.heappop(self._events)
            self.clock.advance(at - self.clock.monotonic())
            if what == "answer":
                self.limit.answered(at - began, self.in_flight)
                self.done += 1
            else:
                self.limit.lost(self.in_flight)
            self.in_flight -= 1
        self.clock.advance(until - self.clock.monotonic())
        return (self.done - done) / seconds

    def _fill(self, wanted: int) -> None:
        now = self.clock.monotonic()
        while self.in_flight < min(self.limit.limit, wanted):
            self.in_flight += 1
            self._number += 1
            if self.refuse():
                heapq.heappush(self._events, (now + 0.01, self._number, "lost", now))
                continue
            free = heapq.heappop(self.workers)
            end = max(free, now) + self.service_s()
            heapq.heappush(self.workers, end)
            late = end - now > self.timeout_s
            event = (now + self.timeout_s, "lost") if late else (end, "answer")
            heapq.heappush(self._events, (event[0], self._number, event[1], now))
        self.most = max(self.most, self.in_flight)


def test_it_grows_to_what_200_ms_and_1000_a_second_need() -> None:
    """Little's law: 200 in flight. From 10 within two seconds, and it stays."""
    provider = Provider(workers=2000)
    provider.run(2.0)
    assert provider.limit.limit >= 200
    assert provider.run(5.0) >= 1000


def test_it_does_not_grow_beyond_what_is_used() -> None:
    """A provider that gets 30 at a time keeps a limit of that order: a burst later starts from there."""
    provider = Provider(workers=2000)
    provider.run(20.0, wanted=30)
    assert provider.limit.limit <= 100


def test_a_provider_with_a_capacity_is_used_and_not_buried() -> None:
    """100 workers of 200 ms: at least nine tenths of 500/s, and latency stays below three times the usual."""
    provider = Provider(workers=100)
    provider.run(20.0)
    rate = provider.run(20.0)
    assert rate >= 450
    assert provider.most <= 320, "in flight beyond three rounds would only wait at the provider"


def test_a_provider_that_slows_down_is_given_less() -> None:
    """From 200 ms to 4 s with the same workers: within 25 s less than half is in flight, nothing piles up;
    two minutes later that is the usual latency, and its workers are in use again."""
    provider = Provider(workers=100)
    provider.run(20.0)
    before = provider.limit.limit
    provider.service_s = lambda: 4.0
    provider.run(25.0)
    assert provider.limit.limit <= before / 2
    assert provider.most <= before + 1
    provider.run(120.0)
    assert provider.run(20.0) >= 0.8 * 25
    assert provider.most <= 320


def test_a_provider_that_hangs_is_given_the_least_and_recovers_quickly() -> None:
    """Timeouts shrink the limit to its minimum; back to nine tenths of the rate within 5 s."""
    provider = Provider(workers=400, timeout_s=1.0)
    provider.run(10.0)
    before = provider.run(5.0)
    provider.service_s = lambda: 100.0
    provider.run(15.0)
    assert provider.limit.limit == 10
    provider.workers = [provider.clock.monotonic()] * 400  # it was started anew
    provider.service_s = lambda: 0.2
    provider.run(5.0)
    assert provider.run(2.0) >= 0.9 * before


def test_a_restart_doubles_up_to_half_of_before() -> None:
    """After the breaker: from the least, quickly, and carefully near the old limit."""
    provider = Provider(workers=2000)
    provider.run(3.0)
    before = provider.limit.limit
    provider.limit.restart()
    assert provider.limit.limit == 10
    provider.run(2.0)
    assert provider.limit.limit >= before / 2


def test_a_tenth_of_errors_does_not_throttle() -> None:
    """Five in a hundred lost is noise; half of them refused is overload."""
    draw = random.Random(7)
    provider = Provider(workers=2000)
    provider.refuse = lambda: draw.random() < 0.05
    provider.run(5.0)
    assert provider.limit.limit >= 200
    provider.refuse = lambda: draw.random() < 0.5
    provider.run(5.0)
    assert provider.limit.limit <= 20


def test_noisy_latency_does_not_shrink_it() -> None:
    """Answers between 50 and 500 ms at random: the limit still reaches what the load needs."""
    draw = random.Random(3)
    provider = Provider(workers=4000)
    provider.service_s = lambda: draw.uniform(0.05, 0.5)
    provider.run(5.0)
    assert provider.run(10.0) >= 1000


@given(
    low=st.integers(1, 50),
    high=st.integers(1, 500),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["answered", "lost", "restart"]),
            st.floats(0.0, 30.0),
            st.integers(0, 1000),
            st.floats(0.0, 1.0),
        ),
        max_size=300,
    ),
)
def test_it_never_leaves_its_bounds(low: int, high: int, steps: list[tuple[str, float, int, float]]) -> None:
    """Whatever it is told. A window of losses alone never lets it grow."""
    clock = ManualClock()
    limit = AdaptiveLimit(low, high, clock)
    answers = 0
    for what, latency_s, in_flight, pause_s in steps:
        before = limit.limit
        if what == "answered":
            answers += 1
            limit.answered(latency_s, in_flight)
        elif what == "lost":
            limit.lost(in_flight)
            assert answers or limit.limit <= before
        else:
            limit.restart()
            assert limit.limit == low
        assert low <= limit.limit <= max(low, high)
        clock.advance(pause_s)
