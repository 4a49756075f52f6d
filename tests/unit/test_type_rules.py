"""What a tenant says of single types: on which devices, and at which hours."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.decision import weigh
from carillon.policy import Policy, PolicyError, build, validate
from carillon.quiet_hours import QuietHours, minutes_of
from carillon.switches import Preferences

DEFAULT = Policy("push_after", 30_000, 60_000)
ZONES = st.sampled_from(["UTC", "Europe/Vienna", "America/St_Johns", "Pacific/Kiritimati"])
CLOCK = st.integers(0, 24 * 60 - 1).map(lambda m: f"{m // 60:02d}:{m % 60:02d}")
TIMES = st.integers(1_700_000_000_000, 1_900_000_000_000)
DAYS = frozenset(range(7))


@given(CLOCK, CLOCK, st.none() | ZONES, TIMES, st.integers(0, 3))
def test_outside_of_its_window_a_type_waits(
    start: str, end: str, zone: str | None, now_ms: int, priority: int
) -> None:
    """What leaves the system waits until the window opens where the user is; urgent ones do not."""
    if start == end:
        return
    tenant = build({"types": {"offer": {"window": {"start": start, "end": end}}}}, DEFAULT).rules
    assert tenant is not None
    user = None if zone is None else Preferences({}, zone)
    closed = QuietHours(minutes_of(end), minutes_of(start), Preferences({}, zone).zone, DAYS)
    until_ms = closed.until_ms(now_ms)
    verdict = weigh("offer", None, priority, user, tenant, now_ms)
    if priority == 3:
        assert verdict.until_ms is None
    else:
        assert verdict.until_ms == until_ms
        assert ([one.rule for one in verdict.rules] == ["type_window"]) is (until_ms is not None)
        assert verdict.silent is (until_ms is not None)
    assert weigh("chat", None, priority, user, tenant, now_ms).until_ms is None


@given(CLOCK, CLOCK, CLOCK, CLOCK, ZONES, TIMES)
def test_a_window_and_quiet_hours(a: str, b: str, c: str, d: str, zone: str, now_ms: int) -> None:
    """With both an event waits until neither holds it, if there is such a time before three changes."""
    if a == b:
        return
    tenant = build({"types": {"offer": {"window": {"start": a, "end": b}}}}, DEFAULT).rules
    assert tenant is not None
    user = Preferences({"quietHours": {"start": c, "end": d}}, zone)
    verdict = weigh("offer", None, 1, user, tenant, now_ms)
    at_ms = now_ms if verdict.until_ms is None else verdict.until_ms
    closed = QuietHours(minutes_of(b), minutes_of(a), user.zone, DAYS)
    assert user.quiet is not None
    if len(verdict.rules) < 6:
        assert closed.until_ms(at_ms) is None
        assert user.quiet.until_ms(at_ms) is None
    assert [one.until_ms for one in verdict.rules] == sorted(one.until_ms or 0 for one in verdict.rules)


def test_devices_of_a_type() -> None:
    """Platforms are a type's own; without a word all of them."""
    policy = build({"types": {"offer": {"devices": ["ios", "web"]}, "chat": {"holdS": 1}}}, DEFAULT)
    assert policy.of("offer").platforms == {"ios", "web"}
    assert policy.of("chat").platforms == policy.of("other").platforms == frozenset()
    assert policy.rules is None


@pytest.mark.parametrize(
    ("some", "path"),
    [
        ({"devices": []}, "types/offer/devices"),
        ({"devices": ["ios", "tv"]}, "types/offer/devices/1"),
        ({"window": None}, "types/offer/window"),
        ({"window": {"start": "09:00"}}, "types/offer/window"),
        ({"window": {"start": "9", "end": "20:00"}}, "types/offer/window/start"),
        ({"window": {"start": "09:00", "end": "09:00"}}, "types/offer/window/end"),
    ],
)
def test_what_is_none(some: Any, path: str) -> None:
    """What breaks the form is refused with the place; devices and windows belong to types alone."""
    with pytest.raises(PolicyError) as caught:
        validate({"types": {"offer": some}})
    assert [error.path for error in caught.value.errors] == [path]
    with pytest.raises(PolicyError):
        validate({"devices": ["ios"]})
