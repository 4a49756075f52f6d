"""Time, injected. Nothing else in Carillon reads a clock (ruff TID251 enforces it)."""

from __future__ import annotations

import functools
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Wall time for what is stored or shown, monotonic time for deadlines."""

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch, wall clock."""
        ...

    def monotonic(self) -> float:
        """Seconds of a clock that never goes back; only differences mean anything."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now_ms(self) -> int:
        """See `Clock.now_ms`."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told to: unit tests and the simulation drive it.

    Args:
        now_ms: starting wall time in milliseconds since the epoch.
    """

    def __init__(self, now_ms: int = 1_700_000_000_000) -> None:
        self._now_ms = now_ms
        self._monotonic = 1000.0

    def now_ms(self) -> int:
        """See `Clock.now_ms`."""
        return self._now_ms

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Move both clocks forward by `seconds` (>= 0)."""
        self._now_ms += round(seconds * 1000)
        self._monotonic += seconds


def rfc3339(ms: int) -> str:
    """Format milliseconds since the epoch as RFC 3339 UTC with milliseconds ("2026-01-02T03:04:05.678Z")."""
    whole, rest = divmod(ms, 1000)
    return f"{_second(whole)}.{rest:03d}Z"


@functools.lru_cache(512)
def _second(whole: int) -> str:
    """Most times that are formatted are of the present second; formatting takes 2 us."""
    return f"{datetime.fromtimestamp(whole, UTC):%Y-%m-%dT%H:%M:%S}"
