"""What becomes of an outbox row after a try."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.messages import PushResult
from carillon.outbox import RETRYABLE, Pauses, Settled, backoff_s, settle, without_target

NOW = 1_700_000_000_000
OUTCOMES = ("sent", "unknown", "failed", "dead", "invalid_target", "disabled_target")
results = st.lists(
    st.builds(
        PushResult,
        device=st.text("ab", max_size=3),
        outcome=st.sampled_from(OUTCOMES),
        retry_after_s=st.floats(0, 600),
    ),
    max_size=4,
)


def decide(
    *outcomes: PushResult, attempt: int = 1, expires_ms: int | None = None, sent_before: bool = False
) -> Settled:
    return settle(
        outcomes, attempt, max_attempts=3, base_s=1.0, now_ms=NOW, expires_ms=expires_ms,
        jitter=lambda: 0.5, sent_before=sent_before,
    )  # fmt: skip


def result(outcome: str, retry_after_s: float = 0.0, error: str = "") -> PushResult:
    return PushResult("phone", outcome, error=error, retry_after_s=retry_after_s)


@given(st.integers(1, 20), st.floats(0.001, 60), st.floats(0, 1, exclude_max=True))
def test_backoff_doubles_within_its_jitter(attempt: int, base_s: float, draw: float) -> None:
    """Between half of the step and the step, the step doubling with each try."""
    step = base_s * 2 ** (attempt - 1)
    wait = backoff_s(attempt, base_s, lambda: draw)
    assert step / 2 <= wait <= step


def test_sent_is_the_end() -> None:
    """A provider took it."""
    assert decide(result("sent")) == Settled("sent", NOW, None)


def test_one_target_that_may_yet_be_reached_keeps_the_row_alive() -> None:
    """Sent to one, failed at the other: tried again (for the other alone)."""
    assert decide(result("sent"), result("failed", error="503")) == Settled("failed", NOW + 750, "503")


def test_the_provider_says_when() -> None:
    """Retry-After wins over a shorter back-off, the back-off over a shorter Retry-After."""
    assert decide(result("failed", retry_after_s=60.0)).due_ms == NOW + 60_000
    assert decide(result("failed", retry_after_s=0.1)).due_ms == NOW + 750


def test_an_ambiguous_try_is_unknown() -> None:
    """No answer: it may have been sent; the next try follows and the state says so."""
    assert decide(result("failed"), result("unknown")).state == "unknown"


def test_tries_are_bounded() -> None:
    """The last try failed: dead with the provider's reason, or sent if any target was."""
    assert decide(result("failed", error="503"), attempt=3) == Settled(
        "dead", NOW, "gave up after 3 tries: 503"
    )
    assert decide(result("sent"), result("failed"), attempt=3).state == "sent"


@pytest.mark.parametrize("outcome", ["failed", "unknown", "dead", "invalid_target"])
def test_what_an_earlier_try_reached_counts(outcome: str) -> None:
    """Sent to one, then refused or given up at the other: sent, so that no other channel follows."""
    assert decide(result(outcome), attempt=3, sent_before=True) == Settled("sent", NOW, None)
    assert decide(result("failed"), expires_ms=NOW + 1, sent_before=True) == Settled("sent", NOW, None)
    assert decide(result("failed"), sent_before=True).state == "failed", "there are tries left"


def test_nothing_is_tried_after_it_expired() -> None:
    """The next try would come too late."""
    expired = Settled("dead", NOW, "expired before the next try", onward=False)
    assert decide(result("failed"), expires_ms=NOW + 750) == expired
    assert decide(result("failed"), expires_ms=NOW + 751).state == "failed"


def test_final_refusals_are_not_repeated() -> None:
    """dead, invalid and disabled targets: never again."""
    assert decide(result("dead", error="PayloadTooLarge")) == Settled("dead", NOW, "dead: PayloadTooLarge")
    assert decide(result("invalid_target")).state == "dead"


def test_only_the_end_of_a_chain_is_dead_for_lack_of_a_target() -> None:
    """A plain push without target is nobody's failure; a fallback that reaches nobody is."""
    assert without_target("push", 0, "") == ("cancelled", "no push target")
    assert without_target("apns", 0, "fcm") == ("cancelled", "no apns target")
    assert without_target("fcm", 1, "push") == ("cancelled", "no fcm target")
    assert without_target("push", 2, "") == ("dead", "no push target")


def test_without_targets_it_is_cancelled() -> None:
    """The last target went away meanwhile: nobody to send to, nothing went wrong."""
    assert decide() == Settled("cancelled", NOW, "no push target")


def test_what_was_left_keeps_the_row_alive_beyond_the_last_try() -> None:
    """Sent at one provider, another takes nothing: the row waits for it, until it expires."""
    some = [result("sent")]
    values = {"max_attempts": 3, "base_s": 1.0, "now_ms": NOW, "jitter": lambda: 0.5}
    left = (NOW + 1000, "waits: apns full")
    waits = settle(some, 3, expires_ms=None, left=left, **values)
    assert waits == Settled("failed", NOW + 1000, "waits: apns full")
    assert settle(some, 3, expires_ms=NOW + 1000, left=left, **values).state == "sent"
    both = settle([result("failed")], 9, expires_ms=None, left=left, **values)
    assert both == Settled("failed", NOW + 3000, "waits: apns full")


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5000), st.floats(0, 0.999)), max_size=20))
def test_rows_that_no_pool_took_come_back_one_by_one(rounds: list[tuple[int, int, float]]) -> None:
    """None before half of a pause, each after the one before, none later than the pause and its turn."""
    pauses = Pauses(0.1, 2.0, 100.0)
    now_ms, last, handed = NOW, 0.0, 0
    for count, later_ms, draw in rounds:
        now_ms += later_ms
        dues = pauses.due_ms("fcm", count, now_ms, lambda draw=draw: draw)
        handed += count
        assert len(dues) == count
        assert dues == sorted(dues)
        assert dues[0] >= now_ms + 50
        assert dues[0] >= last
        assert dues[-1] <= now_ms + 2000 + handed * 10 + 1
        last = dues[-1]


def test_a_pause_doubles_once_per_pause_and_starts_again_when_the_provider_takes_pushes() -> None:
    """Many refusals at a time are one; another provider's pause is its own."""
    pauses = Pauses(1.0, 4.0, 1000.0)

    def wait_ms(now_ms: int, provider: str = "fcm") -> int:
        return pauses.due_ms(provider, 1, now_ms, lambda: 0.0)[0] - now_ms

    assert wait_ms(NOW) == 500
    assert wait_ms(NOW + 10) == 500
    assert wait_ms(NOW + 1000) == 1000
    assert wait_ms(NOW + 3000) == 2000
    assert wait_ms(NOW + 7000) == 2000, "bounded"
    assert wait_ms(NOW + 7000, "apns") == 500
    pauses.took("fcm")
    assert wait_ms(NOW + 12_000) == 500


@given(
    results,
    st.integers(1, 10),
    st.one_of(st.none(), st.integers(NOW - 1000, NOW + 10**6)),
    st.floats(0, 0.999),
)
def test_every_row_ends_or_has_a_next_time(
    outcomes: list[PushResult], attempt: int, expires_ms: int | None, draw: float
) -> None:
    """Never a retry at once, after expiry or beyond the bound; never sent without a sent target."""
    settled = settle(
        outcomes, attempt, max_attempts=6, base_s=1.0, now_ms=NOW, expires_ms=expires_ms, jitter=lambda: draw
    )
    again = [r for r in outcomes if r.outcome in RETRYABLE]
    if settled.state in RETRYABLE:
        assert again
        assert attempt < 6
        assert settled.due_ms >= NOW + 500
        assert settled.due_ms >= NOW + round(1000 * max(r.retry_after_s for r in again))
        assert expires_ms is None or settled.due_ms < expires_ms
    else:
        assert settled.state in {"sent", "dead", "cancelled"}
        assert (settled.state == "sent") == any(r.outcome == "sent" for r in outcomes)
        assert (settled.state == "dead") <= bool(settled.reason)
