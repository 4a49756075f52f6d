"""Local time: quiet hours and digests over changes of the clock, against zoneinfo read minute by minute."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from carillon.quiet_hours import Digest, QuietHours, instants

MINUTE = 60_000
HOUR = 60 * MINUTE
DAY = 24 * HOUR
EVERY_DAY = frozenset(range(7))
# Changes of one hour at different local hours, of half an hour, of none, over midnight, and a day skipped.
ZONES = (
    "Europe/Vienna", "America/New_York", "America/Sao_Paulo", "Australia/Lord_Howe", "Asia/Kolkata", "UTC",
    "America/Havana", "Africa/Casablanca", "Pacific/Auckland", "Asia/Beirut",
)  # fmt: skip
CHANGES = (
    "2025-03-30", "2025-10-26", "2025-03-09", "2025-11-02", "2018-11-04", "2018-02-18", "2025-04-06",
    "2025-10-05", "2025-06-15", "2024-03-31", "2024-10-27",
)  # fmt: skip

minutes = st.integers(0, 1439)
zones = st.sampled_from(ZONES)
moments = st.builds(
    lambda day, hours, rest: (
        ms(datetime.fromisoformat(day).replace(tzinfo=UTC)) + hours * HOUR + rest * MINUTE
    ),
    st.sampled_from(CHANGES),
    st.integers(-30, 40),
    st.integers(0, 59),
)


def ms(at: datetime) -> int:
    return round(at.timestamp()) * 1000


def at(text: str, zone: str, fold: int = 0) -> int:
    return ms(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold))


def wall(at_ms: int, zone: ZoneInfo) -> datetime:
    return datetime.fromtimestamp(at_ms / 1000, zone).replace(tzinfo=None)


def quiet(text: str, zone: str, days: frozenset[int] = EVERY_DAY) -> QuietHours:
    start, end = text.split("-")
    return QuietHours(*(int(t[:2]) * 60 + int(t[3:]) for t in (start, end)), ZoneInfo(zone), days)


def read_off(
    start: int, end: int, days: frozenset[int], zone: ZoneInfo, from_ms: int, to_ms: int
) -> list[bool]:
    """Quiet or not, of every minute: windows found by reading the clock, without arithmetic on offsets."""
    shown = [wall(t, zone) for t in range(from_ms, to_ms, MINUTE)]
    found = [False] * len(shown)
    first, last = shown[0].date(), shown[-1].date()
    for number in range((last - first).days + 4):
        day = datetime.combine(first, datetime.min.time()) + timedelta(days=number - 2)
        if day.weekday() not in days:
            continue
        begins = day + timedelta(minutes=start)
        ends = day + timedelta(minutes=end) + timedelta(days=end < start)
        after = next((i for i, t in enumerate(shown) if t >= begins), len(shown))
        until = max((i for i, t in enumerate(shown) if t < ends), default=-1)
        for i in range(after, until + 1):
            found[i] = True
    return found


@given(minutes, minutes, st.frozensets(st.integers(0, 6)), zones, moments)
@example(150, 180, EVERY_DAY, "Europe/Vienna", 1_743_296_400_000)
@example(22 * 60, 2 * 60, EVERY_DAY, "Europe/Vienna", 1_761_436_800_000)  # ends when 03:00 becomes 02:00
@settings(max_examples=150, deadline=None)
def test_quiet_hours_are_what_a_clock_on_the_wall_shows(
    start: int, end: int, days: frozenset[int], zone: str, now_ms: int
) -> None:
    """Minute by minute over changes of the clock: quiet exactly inside of the windows read off zoneinfo, and
    the end is the first minute that is not."""
    where = ZoneInfo(zone)
    from_ms = now_ms - 60 * HOUR
    shown = read_off(start, end, days, where, from_ms, now_ms + 60 * HOUR)
    if start == end:
        shown = [False] * len(shown)
    hours = QuietHours(start, end, where, days)
    for index in range(24 * 60, len(shown) - 30 * 60, 7):
        t = from_ms + index * MINUTE
        until = hours.until_ms(t)
        assert (until is not None) == shown[index], wall(t, where)
        if until is not None and (until - from_ms) // MINUTE < len(shown):
            assert until % MINUTE == 0
            assert not shown[(until - from_ms) // MINUTE]
            assert all(shown[index : (until - from_ms) // MINUTE])


@given(st.lists(moments, min_size=2, max_size=6), minutes, minutes, zones)
@settings(deadline=None)
def test_what_is_remembered_changes_no_answer(times: list[int], start: int, end: int, zone: str) -> None:
    """In whatever order it is asked, an answer is that of one that was never asked before."""
    hours, digest = (
        QuietHours(start, end, ZoneInfo(zone), EVERY_DAY),
        Digest("daily", start, 0, ZoneInfo(zone)),
    )
    for t in times:
        assert hours.until_ms(t) == QuietHours(start, end, ZoneInfo(zone), EVERY_DAY).until_ms(t)
        assert digest.next_ms(t) == Digest("daily", start, 0, ZoneInfo(zone)).next_ms(t)


def test_the_night_of_a_change_has_seven_or_nine_hours() -> None:
    """22:00 to 06:00 in Vienna: seven hours in March, nine in October."""
    spring, autumn = quiet("22:00-06:00", "Europe/Vienna"), quiet("22:00-06:00", "Europe/Vienna")
    began = at("2025-03-29T22:00", "Europe/Vienna")
    assert spring.until_ms(began) == began + 7 * HOUR == at("2025-03-30T06:00", "Europe/Vienna")
    began = at("2025-10-25T22:00", "Europe/Vienna")
    assert autumn.until_ms(began) == began + 9 * HOUR
    assert autumn.until_ms(began - 1) is None
    assert autumn.until_ms(began + 9 * HOUR) is None


def test_a_repeated_hour_wakes_nobody_and_a_skipped_one_ends_with_the_change() -> None:
    """An end at 02:30 is the second one in autumn, and 03:00 in spring."""
    assert quiet("22:00-02:30", "Europe/Vienna").until_ms(at("2025-10-26T02:45", "Europe/Vienna")) == at(
        "2025-10-26T02:30", "Europe/Vienna", fold=1
    )
    assert quiet("22:00-02:30", "Europe/Vienna").until_ms(at("2025-03-30T01:59", "Europe/Vienna")) == at(
        "2025-03-30T03:00", "Europe/Vienna"
    )


def test_days_are_those_on_which_a_window_begins() -> None:
    """Friday night lasts into Saturday; Saturday night is not quiet."""
    friday = quiet("23:00-07:00", "America/New_York", frozenset({4}))
    assert friday.until_ms(at("2025-06-14T06:59", "America/New_York")) == at(
        "2025-06-14T07:00", "America/New_York"
    )
    assert friday.until_ms(at("2025-06-14T23:30", "America/New_York")) is None
    assert friday.until_ms(at("2025-06-13T06:00", "America/New_York")) is None


def test_a_day_that_never_was_ends_no_night() -> None:
    """Samoa had no 30 December 2011: the nights before and after it are one; a nap on it is none."""
    eve = at("2011-12-29T23:00", "Pacific/Apia")
    assert quiet("22:00-07:00", "Pacific/Apia").until_ms(eve) == at("2011-12-31T07:00", "Pacific/Apia")
    assert quiet("13:00-14:00", "Pacific/Apia").until_ms(eve + HOUR) is None


@given(st.sampled_from(["hourly", "daily", "weekly"]), minutes, st.integers(0, 6), zones, moments)
@settings(deadline=None)
def test_a_digest_comes_at_the_local_time(
    frequency: str, minute: int, weekday: int, zone: str, now_ms: int
) -> None:
    """Later than now, within the period and an hour; the clock shows the minute chosen, or it was skipped."""
    where = ZoneInfo(zone)
    found = Digest(frequency, minute, weekday, where).next_ms(now_ms)
    period = {"hourly": HOUR, "daily": DAY, "weekly": 7 * DAY}[frequency]
    assert now_ms < found <= now_ms + period + HOUR
    shown = wall(found, where)
    if frequency == "hourly":
        assert shown.minute == 0
        return
    wanted = timedelta(minutes=minute)
    midnight = shown.replace(hour=0, minute=0)
    before = wall(found - MINUTE, where)
    assert shown - midnight == wanted or before < midnight + wanted < shown
    assert frequency == "daily" or shown.weekday() == weekday


@pytest.mark.parametrize("text", ["2025-10-26T02:30", "2025-03-30T02:30", "2025-06-01T12:00"])
def test_a_reading_has_a_first_and_a_last_moment(text: str) -> None:
    """Twice in autumn, an hour apart; in spring the moment of the change; else once."""
    first, last = instants(datetime.fromisoformat(text), ZoneInfo("Europe/Vienna"))
    assert last - first == (HOUR if "10-26" in text else 0)
    assert wall(first, ZoneInfo("Europe/Vienna")) >= datetime.fromisoformat(text)
