"""What protects one app at one provider: breaker, rate, pause and concurrency, behind one question.

An app is what shares credentials and fate: a Firebase project, an APNs topic in one environment. Pure; the
pool asks `allows` before it sends a job, and tells every result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from carillon.breaker import Breaker
from carillon.clock import Clock
from carillon.concurrency import AdaptiveLimit
from carillon.messages import PushResult
from carillon.rate import TokenBucket
from carillon.settings import PushSettings

ANSWERED: Final = frozenset(("sent", "invalid_target", "disabled_target", "dead"))
"""Outcomes that a working provider gives, whatever it thinks of the target."""

_TOO_MANY_IN_A_ROW: Final = 3
"""A 429 may be about one device only (both providers count per device as well): so many without a success
between them are about us."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """One admitted job; given back with its results."""

    phase: int
    requests: int


class ProviderGate:
    """Admission of one app.

    Args:
        settings: breaker, concurrency, longest pause.
        rate: requests per second, 0 for no limit.
        auth_errors: errors that say: the provider refuses our credentials.
        clock: of everything.
    """

    def __init__(
        self, settings: PushSettings, rate: float, auth_errors: frozenset[str], clock: Clock
    ) -> None:
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_open_s, clock)
        self.limit = AdaptiveLimit(settings.concurrency_min, settings.concurrency_max, clock)
        self.in_flight = 0
        """Requests sent and not answered."""
        self._bucket = TokenBucket(rate, rate * settings.rate_burst_s, clock)
        self._auth_errors = auth_errors
        self._longest_pause_s = settings.max_pause_s
        self._clock = clock
        self._paused_until = float("-inf")
        self._refusals = 0

    @property
    def state(self) -> str:
        """closed | paused | half_open | open."""
        state = self.breaker.state
        return "paused" if state == "closed" and self.pause_s() > 0 else state

    def pause_s(self) -> float:
        """Seconds for which the provider asked us to wait."""
        return max(0.0, self._paused_until - self._clock.monotonic())

    def takes(self, held: int) -> bool:
        """Whether a further job is worth holding here.

        Args:
            held: jobs of this app that are held already. While half open one is enough: it is the probe.
        """
        state = self.state
        return state == "closed" or (state == "half_open" and held == 0)

    def wait_s(self) -> float | None:
        """Seconds until a job may go; 0.0 is now, None is when one that is in flight has ended."""
        wait_s = max(self.breaker.wait_s(), self.pause_s(), self._bucket.wait_s())
        if wait_s > 0:
            return wait_s
        if not self.breaker.allows():
            return None
        # A probe does not wait for what was sent before the breaker opened and still hangs.
        return 0.0 if self.in_flight < self.limit.limit or self.breaker.state != "closed" else None

    def started(self, requests: int) -> Ticket:
        """A job of so many requests goes out. Call it when `wait_s` is 0."""
        self._bucket.take(requests)
        self.in_flight += requests
        return Ticket(self.breaker.started(), requests)

    def not_started(self, ticket: Ticket) -> None:
        """It did not go out after all."""
        self._bucket.give_back(ticket.requests)
        self.in_flight -= ticket.requests
        self.breaker.inconclusive(ticket.phase)

    def finished(self, ticket: Ticket, results: Sequence[PushResult]) -> str:
        """The job ended.

        Returns:
            "opened", "closed" or "" for what it did to the breaker.
        """
        in_flight, self.in_flight = self.in_flight, self.in_flight - ticket.requests
        if not self.breaker.current(ticket.phase):
            return ""  # sent in another time
        change = self._tell_breaker(ticket.phase, results)
        if change == "opened":
            self.limit.restart()
            self._refusals = 0
        else:
            self._tell_limit(results, in_flight)
        self._obey(results)
        return change

    def _tell_breaker(self, phase: int, results: Sequence[PushResult]) -> str:
        """What the results say about the provider, as opposed to the targets."""
        if any(result.error in self._auth_errors for result in results):
            return "opened" if self.breaker.trip(phase) else ""
        if any(result.status and result.outcome in ANSWERED for result in results):
            return "closed" if self.breaker.succeeded(phase) else ""
        if any(result.outcome not in ANSWERED and result.status != 429 for result in results):
            return "opened" if self.breaker.failed(phase) else ""
        self.breaker.inconclusive(phase)
        return ""

    def _tell_limit(self, results: Sequence[PushResult], in_flight: int) -> None:
        for result in results:
            if result.status in (429, 503) or (not result.status and result.outcome not in ANSWERED):
                self.limit.lost(in_flight)
            elif result.status and result.status < 500:
                # An error of the provider's own says nothing: it may come at once or late, at any load.
                self.limit.answered(result.duration_ms / 1000, in_flight)

    def _obey(self, results: Sequence[PushResult]) -> None:
        for result in results:
            if result.outcome in ANSWERED:
                if result.status:
                    self._refusals = 0
                continue
            if result.status == 429:
                self._refusals += 1
            asked = result.status == 503 or (result.status == 429 and self._refusals >= _TOO_MANY_IN_A_ROW)
            if asked and result.retry_after_s > 0:
                pause_s = min(result.retry_after_s, self._longest_pause_s)
                self._paused_until = max(self._paused_until, self._clock.monotonic() + pause_s)
