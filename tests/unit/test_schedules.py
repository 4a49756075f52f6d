"""When schedules are due, over changes of the clock."""

from __future__ import annotations

import itertools
import time
import zoneinfo
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from dateutil import rrule as oracle
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from carillon.schedules import (
    ScheduleError,
    advance,
    instant_ms,
    local_of,
    look_ms,
    moved_ms,
    next_ms,
    parse,
    upcoming,
)

ZONES = (
    "Europe/Vienna", "America/New_York", "America/Sao_Paulo", "Australia/Lord_Howe", "Asia/Kathmandu", "UTC",
    "Pacific/Apia", "Africa/Casablanca", "America/St_Johns", "Asia/Tehran", "Antarctica/Troll",
)  # fmt: skip
FIRST, LAST = datetime(2009, 1, 1), datetime(2027, 12, 31)  # noqa: DTZ001  local times
STARTS = st.datetimes(FIRST, LAST).map(lambda at: at.replace(microsecond=0))
WHOLE_MINUTES = STARTS.map(lambda at: at.replace(second=0))


def ms(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def utc(at_ms: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=at_ms)


def times(document: dict[str, Any], after: str, count: int, zone: str = "UTC") -> list[str]:
    found = upcoming(parse(document), ms(after), zone, count)
    return [utc(at).strftime("%m-%d %H:%M") for at in found]


@st.composite
def rules(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A rule that has occurrences, and the same for dateutil."""
    frequency = draw(st.sampled_from(["DAILY", "WEEKLY", "MONTHLY", "YEARLY"]))
    interval = draw(st.integers(1, 5)) if frequency != "YEARLY" else 1
    parts = [f"FREQ={frequency}", f"INTERVAL={interval}"]
    given_: dict[str, Any] = {"freq": getattr(oracle, frequency), "interval": interval}
    if draw(st.booleans()):
        hours = draw(st.lists(st.integers(0, 23), min_size=1, max_size=3, unique=True))
        parts.append("BYHOUR=" + ",".join(map(str, hours)))
        given_["byhour"] = hours
    if draw(st.booleans()):
        minutes = draw(st.lists(st.integers(0, 59), min_size=1, max_size=2, unique=True))
        parts.append("BYMINUTE=" + ",".join(map(str, minutes)))
        given_["byminute"] = minutes
    if frequency == "WEEKLY" and draw(st.booleans()):
        days = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4, unique=True))
        parts.append("BYDAY=" + ",".join(["MO", "TU", "WE", "TH", "FR", "SA", "SU"][d] for d in days))
        given_["byweekday"] = days
    if frequency == "WEEKLY" and draw(st.booleans()):
        parts.append("WKST=SU")
        given_["wkst"] = 6
    if frequency == "MONTHLY" and draw(st.booleans()):
        days = draw(
            st.lists(st.sampled_from([1, 15, 28, 29, 30, 31, -1, -2]), min_size=1, max_size=3, unique=True)
        )
        parts.append("BYMONTHDAY=" + ",".join(map(str, days)))
        given_["bymonthday"] = days
    elif frequency == "MONTHLY" and draw(st.booleans()):
        n = draw(st.sampled_from([1, 2, 4, -1]))
        parts.append(f"BYDAY={n}FR")
        given_["byweekday"] = oracle.FR(n)
    return ";".join(parts), given_


@settings(max_examples=300, deadline=None)
@given(rules(), STARTS, st.sampled_from(ZONES), st.integers(0, 400 * 24 * 60))
def test_occurrences_are_those_of_the_rule(
    rule: tuple[str, dict[str, Any]], start: datetime, zone: str, ahead_min: int
) -> None:
    """From any time on: the local times that dateutil finds, each once, in order, clocks turned or not."""
    text, given_ = rule
    where = zoneinfo.ZoneInfo(zone)
    when = parse({"localAt": start.isoformat(), "rrule": text, "timezone": zone})
    after = instant_ms(start, where) + ahead_min * 60_000
    found = upcoming(when, after, "UTC", 6)
    until = (
        start + timedelta(minutes=ahead_min) + timedelta(days=800 if given_["freq"] > oracle.YEARLY else 4000)
    )
    wanted = sorted(
        {instant_ms(local, where) for local in oracle.rrule(dtstart=start, until=until, **given_)} - set()
    )
    wanted = [at for at in wanted if at > after][:6]
    assert len(wanted) >= 2
    assert found[: len(wanted)] == wanted
    assert all(a < b for a, b in itertools.pairwise(found))


@given(WHOLE_MINUTES, st.sampled_from(ZONES))
def test_a_local_time_is_the_first_of_two_and_never_lost(local: datetime, zone: str) -> None:
    """A local time that exists is itself again; one in a gap moves by the gap, never back."""
    where = zoneinfo.ZoneInfo(zone)
    at_ms = instant_ms(local, where)
    shown = local_of(at_ms, where)
    exists = (
        local.replace(tzinfo=where).astimezone(UTC).astimezone(where).replace(tzinfo=None, fold=0) == local
    )
    assert (shown == local) == exists
    assert shown >= local
    if exists:  # the instant before by any offset that day is no earlier instance of it
        assert local_of(at_ms - 3_600_000, where) != local or zone == "never"


@given(WHOLE_MINUTES, st.sampled_from(ZONES), st.integers(1, 60), st.sampled_from(["HOURLY", "MINUTELY"]))
def test_rules_of_hours_count_elapsed_time(start: datetime, zone: str, interval: int, unit: str) -> None:
    """Every so many hours or minutes, whatever clocks do; COUNT and UNTIL end it."""
    text = f"FREQ={unit};INTERVAL={interval}"
    period = interval * (3_600_000 if unit == "HOURLY" else 60_000)
    first = instant_ms(start, zoneinfo.ZoneInfo(zone))
    body = {"localAt": start.isoformat(), "timezone": zone}
    found = upcoming(parse({**body, "rrule": text}), first - 1, "UTC", 30)
    assert found == [first + i * period for i in range(30)]
    assert upcoming(parse({**body, "rrule": f"{text};COUNT=3"}), first - 1, "UTC", 30) == found[:3]
    end = utc(found[4]).strftime("%Y%m%dT%H%M%SZ")
    assert upcoming(parse({**body, "rrule": f"{text};UNTIL={end}"}), first - 1, "UTC", 30) == found[:5]


@settings(deadline=None)
@given(rules(), STARTS, st.sampled_from(ZONES), st.integers(1, 12))
def test_count_ends_a_rule(rule: tuple[str, dict[str, Any]], start: datetime, zone: str, count: int) -> None:
    """With COUNT there are so many and no more, from whatever time one looks."""
    body = {"localAt": start.isoformat(), "timezone": zone}
    before = instant_ms(start, zoneinfo.ZoneInfo(zone)) - 1
    free = upcoming(parse({**body, "rrule": rule[0]}), before, "UTC", count + 1)
    counted = parse({**body, "rrule": f"{rule[0]};COUNT={count}"})
    assume(len(free) == count + 1)
    assert upcoming(counted, before, "UTC", count + 1) == free[:count]
    assert next_ms(counted, free[count - 1]) is None


def test_clocks_turned() -> None:
    """A worked day in Vienna: 02:30 does not exist on 29 March 2026 and exists twice on 25 October."""
    daily = {"localAt": "2026-03-28T02:30:00", "rrule": "FREQ=DAILY", "timezone": "Europe/Vienna"}
    assert times(daily, "2026-03-27T12:00:00+00:00", 3) == ["03-28 01:30", "03-29 01:30", "03-30 00:30"]
    assert times(daily, "2026-10-23T12:00:00+00:00", 3) == ["10-24 00:30", "10-25 00:30", "10-26 01:30"]


def test_a_day_that_did_not_exist() -> None:
    """Samoa had no 30 December 2011: a daily time of that day falls on the next, and nothing is out of
    order."""
    daily = {"localAt": "2011-12-28T09:00:00", "rrule": "FREQ=DAILY", "timezone": "Pacific/Apia"}
    found = upcoming(parse(daily), ms("2011-12-28T00:00:00+00:00"), "UTC", 5)
    assert all(a < b for a, b in itertools.pairwise(found))
    where = zoneinfo.ZoneInfo("Pacific/Apia")
    assert [local_of(at, where).strftime("%d %H") for at in found] == [
        "28 09",
        "29 09",
        "31 09",
        "01 09",
        "02 09",
    ]


def test_cron() -> None:
    """Five fields; with both days restricted either suffices; 0 and 7 are Sunday."""
    assert times({"cron": "*/20 9 * * *"}, "2026-01-01T09:10:00+00:00", 3) == [
        "01-01 09:20",
        "01-01 09:40",
        "01-02 09:00",
    ]
    assert times({"cron": "0 12 13 * fri"}, "2026-01-01T00:00:00+00:00", 4) == [
        "01-02 12:00", "01-09 12:00", "01-13 12:00", "01-16 12:00",
    ]  # fmt: skip
    sunday = times({"cron": "0 0 * * 0"}, "2026-01-01T00:00:00+00:00", 2)
    assert (
        sunday
        == times({"cron": "0 0 * * 7"}, "2026-01-01T00:00:00+00:00", 2)
        == ["01-04 00:00", "01-11 00:00"]
    )
    assert times({"cron": "30 8 1 jan-mar *"}, "2026-01-01T09:00:00+00:00", 3) == [
        "02-01 08:30",
        "03-01 08:30",
        "01-01 08:30",
    ]
    weekdays = {"cron": "0 9 * * mon-fri", "timezone": "America/New_York"}
    assert times(weekdays, "2026-03-06T15:00:00+00:00", 2) == ["03-09 13:00", "03-10 13:00"]


def test_one_time() -> None:
    """An instant, a local time, and the user's local time."""
    assert times({"at": "2026-05-05T10:00:00+02:00"}, "2026-01-01T00:00:00+00:00", 3) == ["05-05 08:00"]
    local = {"localAt": "2026-05-05T10:00", "timezone": "user"}
    assert times(local, "2026-01-01T00:00:00+00:00", 3, "Asia/Tokyo") == ["05-05 01:00"]
    assert times(local, "2026-05-05T01:00:00+00:00", 3, "Asia/Tokyo") == []


@given(WHOLE_MINUTES, st.sampled_from(ZONES), st.sampled_from(ZONES))
def test_a_user_who_travels_keeps_the_local_time(local: datetime, before: str, now: str) -> None:
    """What was to come at a local time comes at that time where the user is now."""
    when = parse({"localAt": local.isoformat(), "timezone": "user"})
    at_ms = next_ms(when, -1, before)
    assert at_ms is not None
    moved = moved_ms(when, at_ms, before, now)
    shown = local_of(at_ms, zoneinfo.ZoneInfo(before))  # a gap of the first zone has moved it
    assert moved == instant_ms(shown, zoneinfo.ZoneInfo(now))
    assert abs(moved - at_ms) <= 26 * 3_600_000
    assert at_ms - 26 * 3_600_000 <= look_ms(when, at_ms, at_ms - 10**9, 900) <= at_ms
    fixed = parse({"localAt": local.isoformat(), "timezone": "UTC"})
    assert moved_ms(fixed, at_ms, before, now) == at_ms == look_ms(fixed, at_ms, 0, 900)


def test_what_was_missed_is_counted_not_repeated() -> None:
    """After an outage one occurrence stands for all that were missed."""
    hourly = parse({"localAt": "2026-01-01T00:00:00", "rrule": "FREQ=HOURLY"})
    fired, now = ms("2026-01-01T00:00:00+00:00"), ms("2026-01-01T05:30:00+00:00")
    assert advance(hourly, fired, now, "UTC") == (ms("2026-01-01T06:00:00+00:00"), 5)
    assert advance(hourly, fired, fired + 10, "UTC") == (ms("2026-01-01T01:00:00+00:00"), 0)
    minutely = parse({"localAt": "2020-01-01T00:00:00", "rrule": "FREQ=MINUTELY"})
    began = time.perf_counter()
    following, missed = advance(minutely, ms("2020-01-01T00:00:00+00:00"), now, "UTC")
    assert (following, missed) == (now + 60_000, 1000)
    assert time.perf_counter() - began < 30, "three million occurrences were walked one by one"
    once = parse({"at": "2026-01-01T00:00:00Z"})
    assert advance(once, fired, now, "UTC") == (None, 0)


BAD_RULES = """FREQ=SECONDLY|FREQ=DAILY;FREQ=DAILY|INTERVAL=2|FREQ=DAILY;INTERVAL=0|FREQ=DAILY;COUNT=0
|FREQ=DAILY;COUNT=2000|FREQ=DAILY;COUNT=2;UNTIL=20260101|FREQ=DAILY;UNTIL=tomorrow|FREQ=DAILY;BYDAY=2MO
|FREQ=DAILY;BYDAY=XX|FREQ=DAILY;BYHOUR=24|FREQ=DAILY;BYSECOND=1|FREQ=HOURLY;BYMINUTE=5
|FREQ=DAILY;BYSETPOS=1|FREQ=MONTHLY;BYWEEKNO=1|FREQ=DAILY;X|é|""".replace("\n", "").split("|")
BAD_CRONS = [
    "* * * *", "60 * * * *", "* * 0 * *", "a * * * *", "5-1 * * * *", "*/0 * * * *", "1,, * * * *",
    "* * * * 8",
]  # fmt: skip


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ({}, "at"),
        ([], ""),
        ({"at": "2026-01-01T00:00:00"}, "at"),
        ({"at": "2026-01-01T00:00:00Z", "cron": "* * * * *"}, "at"),
        ({"localAt": "2026-01-01T00:00:00Z"}, "localAt"),
        ({"localAt": "2026-01-01"}, "localAt"),
        ({"localAt": "2026-02-30T00:00:00"}, "localAt"),
        ({"rrule": "FREQ=DAILY"}, "at"),
        ({"at": "2026-01-01T00:00:00Z", "rrule": "FREQ=DAILY"}, "localAt"),
        ({"at": "2026-01-01T00:00:00Z", "timezone": "Mars/Olympus"}, "timezone"),
        ({"at": "2026-01-01T00:00:00Z", "timezone": "../etc/passwd"}, "timezone"),
        *(({"localAt": "2026-01-01T00:00:00", "rrule": text}, "rrule") for text in BAD_RULES),
        *(({"cron": text}, "cron") for text in BAD_CRONS),
    ],
)
def test_rules_of_schedules(document: Any, path: str) -> None:
    """What cannot be kept is named."""
    with pytest.raises(ScheduleError) as caught:
        parse(document)
    assert caught.value.errors[0].path == path


@given(
    st.text("FREQ=DAILYWKMONTHBYSTPU;0123456789,-+:", max_size=60),
    st.text("*/0123456789-, monfri", max_size=30),
)
def test_any_text_is_judged(rule: str, cron: str) -> None:
    """Whatever the text: a rule, or an error that says why not."""
    for document in ({"localAt": "2026-01-01T00:00:00", "rrule": rule}, {"cron": cron}):
        try:
            when = parse(document)
        except ScheduleError as exc:
            refused = exc.errors[0].path
        else:
            refused = None
            assert when.recurring
        assert refused in (None, "rrule", "cron")
