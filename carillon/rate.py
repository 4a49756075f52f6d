"""A token bucket: so many requests per second, with a burst."""

from __future__ import annotations

import math

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

    def admit(self, urgent: int, others: int, *, split: bool) -> tuple[int, int, float]:
        """Let all of the urgent requests pass, and of the others as many as may.

        Urgent ones count, and make a debt of one burst at most: after a storm of them the others are not shut
        out for longer than that takes to come back.

        Args:
            split: False: the others pass together if one of them may, and make a debt, or none of them does.

        Returns:
            How many of the urgent ones and of the others passed within the rate, and the seconds until
            another one may.
        """
        if not self._rate:
            return urgent, others, 0.0
        self._refill()
        within = min(urgent, max(0, math.floor(self._tokens)))
        if urgent:
            self._tokens = max(self._tokens - urgent, min(self._tokens, -self._burst))
        room = max(0, math.floor(self._tokens))
        passed = min(others, room) if split else others if room else 0
        self._tokens -= passed
        return within, passed, 0.0 if self._tokens >= 1.0 else (1.0 - self._tokens) / self._rate

    def give_back(self, requests: int = 1) -> None:
        """Requests that were taken did not go out."""
        self._tokens = min(self._burst, self._tokens + requests)

    def _refill(self) -> None:
        now = self._clock.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
