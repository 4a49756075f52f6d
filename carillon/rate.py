"""A token bucket: so many requests per second, with a burst."""

from __future__ import annotations

from carillon.clock import Clock


class TokenBucket:
    """Lets requests pass at a rate.

    Over any t seconds at most `rate * t + burst + largest - 1` requests pass, where `largest` is the most
    that one call of `take` took: a job with several targets is never split, it makes a debt instead.

    Args:
        rate: requests per second; 0 means unlimited.
        burst: requests that may pass at once after a rest, at least 1.
        clock: measures the refill.
    """

    def __init__(self, rate: float, burst: float, clock: Clock) -> None:
        self._rate = rate
        self._burst = max(burst, 1.0)
        self._clock = clock
        self._tokens = self._burst
        self._at = clock.monotonic()

    def wait_s(self) -> float:
        """Seconds until the next request may pass; 0.0 means now."""
        if not self._rate:
            return 0.0
        self._refill()
        return 0.0 if self._tokens >= 1.0 else (1.0 - self._tokens) / self._rate

    def take(self, requests: int = 1) -> None:
        """Requests pass. Call it when `wait_s` is 0."""
        if self._rate:
            self._refill()
            self._tokens -= requests

    def give_back(self, requests: int = 1) -> None:
        """Requests that were taken did not go out."""
        self._tokens = min(self._burst, self._tokens + requests)

    def _refill(self) -> None:
        now = self._clock.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
