"""The circuit breaker."""

from __future__ import annotations

from carillon.breaker import Breaker
from carillon.clock import ManualClock


def test_it_opens_after_so_many_failures_in_a_row() -> None:
    """A success in between starts the count anew."""
    breaker = Breaker(3, 5.0, ManualClock())
    breaker.failed()
    breaker.failed()
    breaker.succeeded()
    assert not breaker.failed()
    assert not breaker.failed()
    assert breaker.allows()
    assert breaker.failed()
    assert not breaker.allows()


def test_after_the_pause_one_probe_passes_and_its_success_closes_it() -> None:
    """Half open: exactly one."""
    clock = ManualClock()
    breaker = Breaker(1, 5.0, clock)
    breaker.failed()
    clock.advance(4.9)
    assert not breaker.allows()
    clock.advance(0.2)
    assert breaker.allows()
    breaker.started()
    assert not breaker.allows()
    breaker.succeeded()
    assert breaker.state == "closed"


def test_a_failed_probe_doubles_the_pause_up_to_a_minute() -> None:
    """5, 10, 20, 40, 60, 60 s."""
    clock = ManualClock()
    breaker = Breaker(1, 5.0, clock)
    breaker.trip()
    for pause_s in (5, 10, 20, 40, 60, 60):
        clock.advance(pause_s - 0.1)
        assert not breaker.allows()
        clock.advance(0.2)
        assert breaker.allows()
        breaker.started()
        assert breaker.failed()


def test_stragglers_from_before_do_not_prolong_the_pause() -> None:
    """Many requests fail together: that is one opening."""
    clock = ManualClock()
    breaker = Breaker(2, 5.0, clock)
    breaker.failed()
    assert breaker.failed()
    for _ in range(100):
        assert not breaker.failed()
    assert not breaker.trip()
    clock.advance(5.1)
    assert breaker.allows()


def test_a_probe_that_tells_nothing_lets_another_one_go() -> None:
    """Say, it was rate-limited."""
    clock = ManualClock()
    breaker = Breaker(1, 5.0, clock)
    breaker.trip()
    clock.advance(5.1)
    breaker.started()
    assert not breaker.allows()
    breaker.inconclusive()
    assert breaker.allows()
