"""The circuit breaker."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from carillon.breaker import Breaker
from carillon.clock import ManualClock


def test_it_opens_after_so_many_failures_in_a_row() -> None:
    """A success in between starts the count anew."""
    breaker = Breaker(3, 5.0, ManualClock())
    breaker.failed(breaker.started())
    breaker.failed(breaker.started())
    breaker.succeeded(breaker.started())
    assert not breaker.failed(breaker.started())
    assert not breaker.failed(breaker.started())
    assert breaker.allows()
    assert breaker.failed(breaker.started())
    assert not breaker.allows()
    assert breaker.wait_s() == 5.0


def test_after_the_pause_one_probe_passes_and_its_success_closes_it() -> None:
    """Half open: exactly one."""
    clock = ManualClock()
    breaker = Breaker(1, 5.0, clock)
    breaker.failed(breaker.started())
    clock.advance(4.9)
    assert not breaker.allows()
    clock.advance(0.2)
    assert breaker.allows()
    probe = breaker.started()
    assert not breaker.allows()
    assert breaker.succeeded(probe)
    assert breaker.state == "closed"


def test_a_failed_probe_doubles_the_pause_up_to_a_minute() -> None:
    """5, 10, 20, 40, 60, 60 s."""
    clock = ManualClock()
    breaker = Breaker(1, 5.0, clock)
    breaker.trip(breaker.started())
    for pause_s in (5, 10, 20, 40, 60, 60):
        clock.advance(pause_s - 0.1)
        assert not breaker.allows()
        clock.advance(0.2)
        assert breaker.allows()
        assert breaker.failed(breaker.started())


def test_stragglers_from_before_do_not_prolong_the_pause() -> None:
    """Many requests fail together: that is one opening."""
    clock = ManualClock()
    breaker = Breaker(2, 5.0, clock)
    tickets = [breaker.started() for _ in range(102)]
    assert [breaker.failed(ticket) for ticket in tickets] == [False, True] + [False] * 100
    assert not breaker.trip(tickets[0])
    clock.advance(5.1)
    assert breaker.allows()


def test_a_success_from_before_does_not_close_it() -> None:
    """It was under way when the credentials were refused: nothing says that they are taken now."""
    clock = ManualClock()
    breaker = Breaker(5, 5.0, clock)
    early, refused = breaker.started(), breaker.started()
    assert breaker.trip(refused)
    assert not breaker.succeeded(early)
    assert breaker.state == "open"
    clock.advance(5.1)
    probe = breaker.started()
    assert not breaker.succeeded(early)
    assert not breaker.allows(), "the probe is still under way"
    assert breaker.succeeded(probe)


def test_a_failure_from_before_does_not_count_after_it_closed() -> None:
    """A request that hung through the whole bad time says nothing about the good one."""
    clock = ManualClock()
    breaker = Breaker(1, 5.0, clock)
    early = breaker.started()
    breaker.failed(breaker.started())
    clock.advance(5.1)
    breaker.succeeded(breaker.started())
    assert not breaker.failed(early)
    assert breaker.state == "closed"


def test_a_probe_that_tells_nothing_lets_another_one_go() -> None:
    """Say, it was rate-limited."""
    clock = ManualClock()
    breaker = Breaker(1, 5.0, clock)
    breaker.trip(breaker.started())
    clock.advance(5.1)
    probe = breaker.started()
    assert not breaker.allows()
    breaker.inconclusive(probe)
    assert breaker.allows()


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["start", "good", "bad", "nothing", "refused"]),
            st.floats(0.1, 30.0),
        ),
        max_size=200,
    )
)
def test_never_two_probes_and_never_stuck(steps: list[str | float]) -> None:
    """Whatever ends in whatever order: while not closed at most one request of this phase is out, and when
    all have ended and a minute has passed one may go."""
    clock = ManualClock()
    breaker = Breaker(3, 5.0, clock)
    out: list[int] = []
    for step in steps:
        if isinstance(step, float):
            clock.advance(step)
        elif step == "start":
            if breaker.allows():
                out.append(breaker.started())
        elif out:
            ticket = out.pop(0)
            end = {"good": breaker.succeeded, "bad": breaker.failed, "refused": breaker.trip}
            end.get(step, breaker.inconclusive)(ticket)
        if breaker.state != "closed":
            assert sum(map(breaker.current, out)) <= 1
    for ticket in out:
        breaker.inconclusive(ticket)
    clock.advance(60.1)
    assert breaker.allows()
