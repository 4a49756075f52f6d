"""What S9 reads off a run in which a shard was killed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.faults import Kill, parted
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


def kill(at: float, *users: str) -> Kill:
    return Kill(at, frozenset(slot_of("t", user) for user in users))


def test_users_of_the_killed_shard_are_told_apart() -> None:
    """Their pause is the longest around the kill; the others are summed up in it, and as long before it."""
    events = [(MINE, t / 10, t / 10 + 0.001) for t in range(50)]
    events += [(MINE, t / 10, 6.2 + t / 1000) for t in range(50, 62)]
    events += [(MINE, t / 10, t / 10 + 0.001) for t in range(63, 90)]
    events += [(OTHER, t / 10, t / 10 + (0.005 if 50 <= t < 62 else 0.002)) for t in range(90)]
    events += [(OTHER, -1.0, -0.998), (OTHER, 3.0, 3.05), (OTHER, 7.0, 7.03)]
    found = parted(bench(*events), "t", [kill(4.95, MINE)])
    assert found["pause_s"] == pytest.approx(6.25 - 4.901)
    assert found["pauses"] == [found["pause_s"]]
    assert found["resumed_s"] == pytest.approx(6.25 - 4.95)
    assert found["others_before_ms"]["p99"] == pytest.approx(2.0), "3.0 is longer ago than the pause is long"
    assert found["others_during_ms"]["p50"] == pytest.approx(5.0)
    assert found["others_before_ms"]["n"] == found["others_during_ms"]["n"] == 13
    assert found["others_3s_before_ms"]["max"] == pytest.approx(50.0)
    assert found["others_3s_ms"]["max"] == pytest.approx(30.0)
    assert found["ratios"] == pytest.approx([0.6]), "the longest of 3 s from the kill, and of 3 s before it"
    assert found["ratios_alone"] == pytest.approx([25.0])


def test_several_kills_are_put_together() -> None:
    """Whoever was the other at one kill may be the killed one at the next."""
    events = [(MINE, t / 10, t / 10 + 0.001) for t in range(200) if not 50 <= t < 60]
    events += [(OTHER, t / 10, t / 10 + 0.002) for t in range(200) if not 150 <= t < 170]
    found = parted(bench(*events), "t", [kill(4.95, MINE), kill(14.95, OTHER)])
    assert found["pauses"] == pytest.approx([1.1, 2.1])
    assert found["pause_s"] == pytest.approx(1.6)
    assert found["others_during_ms"]["n"] == 11 + 21
    assert found["others_during_ms"]["max"] == pytest.approx(2.0)
    assert found["others_during_ms"]["p50"] == pytest.approx(1.0), "two thirds are MINE's, of the second kill"


def test_a_pause_before_the_kill_is_not_its_doing() -> None:
    """Only what ends after the kill counts."""
    events = [(MINE, t, t + 0.001) for t in (0.0, 3.0, 3.1, 3.2, 3.4)] + [(OTHER, 0.0, 0.001)]
    assert parted(bench(*events), "t", [kill(3.3, MINE)])["pause_s"] == pytest.approx(0.2)


def test_a_kill_that_concerns_nobody_measures_nothing() -> None:
    """With all users on one side there is nothing to compare."""
    with pytest.raises(TargetError):
        parted(bench((MINE, 0.0, 0.1)), "t", [kill(0.0)])
