"""What becomes of an outbox row after a try: pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from carillon.messages import PushResult

RETRYABLE = frozenset(("failed", "unknown"))


@dataclass(frozen=True, slots=True)
class Settled:
    """New state of the row. `due_ms` is meaningful for failed and unknown: the next try."""

    state: str
    due_ms: int
    reason: str | None


def backoff_s(attempt: int, base_s: float, jitter: Callable[[], float]) -> float:
    """Wait after try number `attempt` (1 = the first): base, 2, 4, 8, ... times base, with full jitter.

    Args:
        jitter: uniform in [0, 1). The wait is at least half of the step, so that a retry never follows
            at once.
    """
    step = base_s * 2 ** (attempt - 1)
    return step * (0.5 + jitter() / 2)


def settle(
    results: Sequence[PushResult],
    attempt: int,
    *,
    max_attempts: int,
    base_s: float,
    now_ms: int,
    expires_ms: int | None,
    jitter: Callable[[], float],
) -> Settled:
    """The row's state after all targets of a try have answered.

    One target that may yet be reached keeps the row alive; a retry leaves out those that were sent. Without
    such a target the row is sent if any target was, else dead with the provider's reason.
    """
    again = [r for r in results if r.outcome in RETRYABLE]
    sent = any(r.outcome == "sent" for r in results)
    if again and attempt < max_attempts:
        asked_s = max((r.retry_after_s for r in again), default=0.0)
        due_ms = now_ms + round(1000 * max(asked_s, backoff_s(attempt, base_s, jitter)))
        if expires_ms is None or due_ms < expires_ms:
            state = "unknown" if any(r.outcome == "unknown" for r in again) else "failed"
            return Settled(state, due_ms, again[0].error or None)
        if not sent:
            return Settled("dead", now_ms, "expired before the next try")
    if sent:
        return Settled("sent", now_ms, None)
    if not results:
        return Settled("cancelled", now_ms, "no push target")
    last = results[-1]
    reason = f"{last.outcome}: {last.error or last.status}"
    if again:
        reason = f"gave up after {attempt} tries: {again[0].error or again[0].outcome}"
    return Settled("dead", now_ms, reason)
