"""Injected time."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.clock import Clock, ManualClock, SystemClock, rfc3339


def test_a_manual_clock_moves_only_when_told() -> None:
    """Both of its clocks move together."""
    clock = ManualClock(5000)
    before = clock.monotonic()
    assert clock.now_ms() == clock.now_ms() == 5000
    clock.advance(1.25)
    assert clock.now_ms() == 6250
    assert clock.monotonic() - before == 1.25


def test_the_system_clock_is_the_machines() -> None:
    """Milliseconds since the epoch, and seconds that never go back."""
    clock: Clock = SystemClock()
    assert abs(clock.now_ms() - datetime.now(UTC).timestamp() * 1000) < 5000
    assert clock.monotonic() <= clock.monotonic()


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1_700_000_000_123, "2023-11-14T22:13:20.123Z"),
        (1_709_208_000_007, "2024-02-29T12:00:00.007Z"),
    ],
)
def test_times_are_rfc_3339_with_milliseconds(ms: int, text: str) -> None:
    """UTC, always three digits, always Z."""
    assert rfc3339(ms) == text


@given(st.integers(0, 4_102_444_800_000))
def test_no_millisecond_is_lost(ms: int) -> None:
    """What is written reads back as the same millisecond."""
    moment = datetime.fromisoformat(rfc3339(ms))
    assert round(moment.timestamp() * 1000) == ms
