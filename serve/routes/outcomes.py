"""What became of an event, as answers tell it."""

from __future__ import annotations

from typing import Final

from carillon.clock import rfc3339
from carillon.events import Later
from carillon.messages import Event, Outcome
from carillon.problems import Problem, problem
from serve.services import Services

_TOLD: Final = {
    "in_progress": "the first request with this idempotency key is still running",
    "idempotency_conflict": "the idempotency key was used within 24 h with another body",
}


def outcome_problem(outcome: Outcome) -> Problem | None:
    """The problem of a failed outcome, None of any other."""
    if outcome.status != "failed":
        return None
    code = outcome.code or "internal"
    detail = _TOLD.get(code) or outcome.detail or ""
    return problem(code, "" if code == "internal" else detail, retry_after_s=outcome.retry_after_s)


def too_late(services: Services, event: Event, later: Later) -> Outcome | None:
    """The outcome of an event that is to be sent further ahead than anything is kept; None: it is not."""
    most_ms = services.clock.now_ms() + round(services.settings.schedule.max_ahead_s * 1000)
    if later.due_ms <= most_ms:
        return None
    told = f"scheduleAt: expected a time before {rfc3339(most_ms)}, got {rfc3339(later.due_ms)}"
    return Outcome(event.id, status="failed", code="invalid", detail=told)
