"""How many requests a provider may have in flight: found out from its latency and its refusals.

Sources: sampling windows and gradient are those of Netflix' concurrency-limits (WindowedLimit and
Gradient2Limit, https://github.com/Netflix/concurrency-limits); doubling up to a threshold that a loss sets is
TCP's slow start (RFC 5681, 3.1). The latency without queueing is kept as BBR keeps its own (Cardwell et al.,
2016: the least seen, measured anew with less in flight when it was not seen for long), because the average of
Gradient2 follows the queue that we ourselves make: in the simulation of tests/unit/test_concurrency.py it let
ten times too many requests wait at a provider at its capacity.
"""

from __future__ import annotations

import math
from typing import Final

from carillon.clock import Clock

_MIN_SAMPLES: Final = 10
"""Answers that a window needs to say anything."""
_MIN_WINDOW_S: Final = 0.1
_MAX_WINDOW_S: Final = 1.0
_LOSS_SHARE: Final = 0.1
"""Refusals and missing answers beyond this share of a window are overload; below they are noise."""
_LOSS_FACTOR: Final = 0.7
_TOLERANCE: Final = 2.0
"""Latency may be so many times the usual one before the limit shrinks."""
_SMOOTHING: Final = 0.5
"""Share of the computed change that a shrinking limit follows per window."""
_NEAR: Final = 1.25
"""A latency up to so many times the usual one confirms it."""
_CONFIRMED_S: Final = 30.0
"""A usual latency that was not confirmed for so long is measured anew."""


class AdaptiveLimit:
    """A limit on requests in flight.

    Per window of at least 10 answers and 0.1 to 1 s:

    - more than 10 % were refused as too many or not answered: the limit shrinks to 70 %. The first such
      window sets the threshold; up to it the limit doubles when all is well again, beyond it grows slowly;
    - else the gradient, 2 * usual latency / latency within 0.5 to 1, shrinks it if the provider got slow;
    - else, and if at least half of the limit was in use, it grows: doubling below the threshold, by its
      square root beyond.

    The usual latency is the least seen. If answers took a quarter longer for 30 s, either we queue at the
    provider or it got slower for good: with a third of the limit for two windows it shows.

    Args:
        low: never below, at least 1; where it starts.
        high: never above.
        clock: measures windows.
    """

    def __init__(self, low: int, high: int, clock: Clock) -> None:
        self._low = float(low)
        self._high = float(max(low, high))
        self._clock = clock
        self._limit = self._low
        self._threshold = self._high
        self._usual_s = 0.0
        self._confirmed_at = 0.0
        self._measuring = 0  # windows left with a third of the limit
        self._before = 0.0  # the limit before that
        self._losing = False
        self._sum_s = 0.0
        self._answers = 0
        self._losses = 0
        self._most = 0
        self._closes_at = float("-inf")

    @property
    def limit(self) -> int:
        """Requests that may be in flight."""
        return int(self._limit)

    @property
    def usual_s(self) -> float:
        """The latency that is taken as usual, in seconds; 0.0 while nothing is known."""
        return self._usual_s

    def answered(self, latency_s: float, in_flight: int) -> None:
        """A request was answered.

        Args:
            latency_s: how long it took.
            in_flight: requests that were in flight when it ended, itself included.
        """
        self._sum_s += latency_s
        self._answers += 1
        self._count(in_flight)

    def lost(self, in_flight: int) -> None:
        """A request was refused as one too many, or not answered in time."""
        self._losses += 1
        self._count(in_flight)

    def restart(self) -> None:
        """The provider was away: begin at the lowest again, doubling up to half of the limit before."""
        if not self._losing:  # else the first loss has set it
            self._threshold = max(self._low, self._limit / 2)
        self._limit = self._low
        self._measuring = 0
        self._losing = False
        self._forget()

    def _count(self, in_flight: int) -> None:
        if in_flight > self._most:
            self._most = in_flight
        if self._answers + self._losses >= _MIN_SAMPLES:
            now = self._clock.monotonic()
            if now >= self._closes_at:
                self._close(now)

    def _close(self, now: float) -> None:
        latency_s = self._sum_s / self._answers if self._answers else 0.0
        if self._losses > _LOSS_SHARE * (self._answers + self._losses):
            if not self._losing:
                self._threshold = max(self._low, self._limit * _LOSS_FACTOR)
            self._losing = True
            self._measuring = 0
            self._limit = max(self._low, self._limit * _LOSS_FACTOR)
        else:
            self._losing = False
            self._learn(latency_s, now)
            if not self._measuring:
                self._follow(latency_s)
        # The answers of the next window shall be of requests that started under the new limit.
        self._closes_at = now + min(max(latency_s, _MIN_WINDOW_S), _MAX_WINDOW_S)
        self._forget()

    def _learn(self, latency_s: float, now: float) -> None:
        """Keep the usual latency."""
        if self._measuring:
            self._measuring -= 1
            if self._measuring:
                return  # what waited at the provider is still draining
            self._limit = self._threshold = max(self._limit, self._before)
            self._usual_s, self._confirmed_at = latency_s, now
            return
        if not self._usual_s:
            self._usual_s, self._confirmed_at = latency_s, now
            return
        if latency_s <= _NEAR * self._usual_s:
            self._usual_s += 0.3 * min(0.0, latency_s - self._usual_s)
            self._confirmed_at = now
            return
        # A queue begins: doubling on would overshoot (HyStart: Ha and Rhee, 2011).
        self._threshold = min(self._threshold, self._limit)
        if now - self._confirmed_at >= _CONFIRMED_S:
            self._before = self._limit
            self._limit = max(self._low, self._limit / 3)
            self._measuring = 2

    def _follow(self, latency_s: float) -> None:
        gradient = 1.0
        if latency_s > 0:
            gradient = max(0.5, min(1.0, _TOLERANCE * self._usual_s / latency_s))
        if gradient < 1.0:
            wanted = self._limit * gradient + math.sqrt(self._limit)
            if wanted < self._limit:
                self._limit = max(self._low, self._limit + _SMOOTHING * (wanted - self._limit))
        elif self._most * 2 >= self._limit:
            grown = self._limit + math.sqrt(self._limit)
            if self._limit < self._threshold:
                grown = max(grown, min(self._limit * 2, self._threshold))
            self._limit = min(self._high, grown)

    def _forget(self) -> None:
        self._sum_s = 0.0
        self._answers = self._losses = self._most = 0
