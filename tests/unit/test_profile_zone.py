"""In which time zone a user's quiet hours are."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from carillon.switches import Preferences

ZONES = st.sampled_from(["UTC", "Europe/Vienna", "Pacific/Kiritimati", "America/St_Johns", "Asia/Kolkata"])
CLOCK = st.integers(0, 24 * 60 - 1).map(lambda m: f"{m // 60:02d}:{m % 60:02d}")
TIMES = st.integers(1_700_000_000_000, 1_900_000_000_000)


@given(CLOCK, CLOCK, ZONES, st.none() | ZONES, TIMES)
def test_default_quiet_hours_are_where_the_user_is(
    start: str, end: str, zone: str, default_zone: str | None, now_ms: int
) -> None:
    """A tenant's default window holds as if the user had asked for it, wherever the tenant itself is."""
    window = {"start": start, "end": end}
    defaults = Preferences({"quietHours": window, "timezone": default_zone})
    own = Preferences({"quietHours": window}, zone).quiet
    assert own is not None
    for user in (
        Preferences({}, zone),
        Preferences({"timezone": zone}),
        Preferences({"timezone": zone}, "UTC"),
    ):
        quiet, source = user.quiet_of(defaults)
        assert quiet is not None
        assert (quiet.until_ms(now_ms), source) == (own.until_ms(now_ms), "tenant")
        assert user.quiet_of(defaults)[0] is quiet


@given(CLOCK, CLOCK, ZONES, ZONES)
def test_a_window_that_names_its_zone_keeps_it(start: str, end: str, zone: str, named: str) -> None:
    """Only windows without a zone of their own follow the user; nobody's zone is known, they stay."""
    window: dict[str, Any] = {"start": start, "end": end}
    defaults = Preferences({"quietHours": {**window, "timezone": named}})
    assert Preferences({}, zone).quiet_of(defaults)[0] is defaults.quiet
    floating = Preferences({"quietHours": window, "timezone": named})
    assert Preferences({}).quiet_of(floating)[0] is floating.quiet
    mine = Preferences({"quietHours": window}, zone)
    assert mine.quiet_of(defaults) == (mine.quiet, "user")
