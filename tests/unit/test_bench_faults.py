"""What S9 reads off a run in which a shard was killed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.faults import parted
from benchmarks.ledger import Accepted, Device
from benchmarks.target import TargetError
from carillon.ids import slot_of

MINE, OTHER = "u0", "u1"


def bench(*events: tuple[str, float, float]) -> Any:
    """A bench whose devices received (user, due, received)."""
    devices = {user: Device(user) for user, _, _ in events}
    accepted = {}
    for number, (user, due, at) in enumerate(events):
        note = str(number).encode()
        accepted[note] = Accepted(user, number, due, at)
        devices[user].receipts.append((at, note, number))
    receivers = [SimpleNamespace(device=device) for device in devices.values()]
    return SimpleNamespace(receivers=receivers, ledger=SimpleNamespace(accepted=accepted))


def test_users_of_the_killed_shard_are_told_apart() -> None:
    """Their pause is the longest around the kill; the others are summed up before, during and after it."""
    events = [(MINE, t / 10, t / 10 + 0.001) for t in range(50)]
    events += [(MINE, t / 10, 6.2 + t / 1000) for t in range(50, 62)]
    events += [(MINE, t / 10, t / 10 + 0.001) for t in range(63, 90)]
    events += [(OTHER, t / 10, t / 10 + (0.005 if 50 <= t < 62 else 0.002)) for t in range(90)]
    found = parted(bench(*events), "t", {slot_of("t", MINE)}, 4.95)
    assert found["pause_s"] == pytest.approx(6.25 - 4.901)
    assert found["resumed_s"] == pytest.approx(6.25 - 4.95)
    assert found["others_before_ms"]["p99"] == pytest.approx(2.0)
    assert found["others_during_ms"]["p50"] == pytest.approx(5.0)
    assert found["others_after_ms"]["p99"] == pytest.approx(2.0)


def test_a_pause_before_the_kill_is_not_its_doing() -> None:
    """Only what ends after the kill counts."""
    events = [(MINE, t, t + 0.001) for t in (0.0, 3.0, 3.1, 3.2, 3.4)] + [(OTHER, 0.0, 0.001)]
    assert parted(bench(*events), "t", {slot_of("t", MINE)}, 3.3)["pause_s"] == pytest.approx(0.2)


def test_a_kill_that_concerns_nobody_measures_nothing() -> None:
    """With all users on one side there is nothing to compare."""
    with pytest.raises(TargetError):
        parted(bench((MINE, 0.0, 0.1)), "t", set(), 0.0)
