"""Local time: windows in which a user is not to be disturbed, and the moments digests come at.

A window begins with the first moment at which the user's clock reads its start, and ends with the last one at
which it reads its end: the hour that a clock repeats in autumn does not wake anybody. A reading that a clock
skips in spring is the moment of the change. Weekdays are those on which a window begins.

Everything here is a function of its arguments; what is remembered between calls only saves time.
"""

from __future__ import annotations

import calendar
from datetime import datetime, timedelta
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

DAY: Final = timedelta(days=1)
HOUR_MS: Final = 3_600_000
_EVER: Final = 1 << 62
_HORIZON: Final = 9
"""Days looked ahead: a week and both ends."""


def known_zone(name: Any) -> bool:
    """Whether the name is one of the time zone database."""
    if not isinstance(name, str) or not name or len(name) > 64:
        return False
    # Not `in available_timezones()`: that walks the whole database. A name that is no zone raises one of
    # these, paths ("../x") included.
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


def instants(wall: datetime, zone: ZoneInfo) -> tuple[int, int]:
    """The first and the last moment at which a clock reads `wall`, in ms; of a reading that is skipped, the
    moment of the change.

    Args:
        wall: what the clock shows, naive.
    """
    seconds = calendar.timegm(wall.timetuple())
    first = seconds - _offset_s(wall.replace(tzinfo=zone, fold=0))
    last = seconds - _offset_s(wall.replace(tzinfo=zone, fold=1))
    if (
        first > last
    ):  # skipped (PEP 495): the two offsets are those before and after the change, which is between
        before = _offset_s(datetime.fromtimestamp(last, zone))
        low, high = last, first
        while high - low > 1:
            middle = (low + high) // 2
            if _offset_s(datetime.fromtimestamp(middle, zone)) == before:
                low = middle
            else:
                high = middle
        first = last = high
    return first * 1000, last * 1000


def _offset_s(at: datetime) -> int:
    offset = at.utcoffset()
    return 0 if offset is None else round(offset.total_seconds())


def _wall(at_ms: int, zone: ZoneInfo) -> datetime:
    return datetime.fromtimestamp(at_ms // 1000, zone).replace(tzinfo=None, fold=0)


def minutes_of(text: str) -> int:
    """Minutes since midnight of "HH:MM"."""
    return int(text[:2]) * 60 + int(text[3:])


class QuietHours:
    """A window of local time on some weekdays.

    Args:
        start, end: minutes since midnight; an end before the start is on the next day. Equal: no window.
        zone: of the user.
        days: weekdays on which the window begins, 0 = Monday.
    """

    __slots__ = ("_from_ms", "_quiet_until", "_to_ms", "days", "end", "start", "zone")

    def __init__(self, start: int, end: int, zone: ZoneInfo, days: frozenset[int]) -> None:
        self.start = start
        self.end = end
        self.zone = zone
        self.days = days
        # From here to there the answer is known.
        self._from_ms = self._to_ms = 0
        self._quiet_until: int | None = None
        if start == end or not days:
            self._from_ms, self._to_ms = -_EVER, _EVER

    def until_ms(self, now_ms: int) -> int | None:
        """When the window that `now_ms` is in ends, with those that follow without a gap; None: in none."""
        if not self._from_ms <= now_ms < self._to_ms:
            self._look(now_ms)
        return self._quiet_until

    def _look(self, now_ms: int) -> None:
        midnight = _wall(now_ms, self.zone).replace(hour=0, minute=0, second=0)
        until: int | None = None
        begin = now_ms
        upcoming = now_ms + _HORIZON * 24 * HOUR_MS // 2
        for ahead in range(-2, _HORIZON):
            day = midnight + ahead * DAY
            if day.weekday() not in self.days:
                continue
            start, end = self._window(day)
            if until is not None:
                if start > until:
                    break
                until = max(until, end)
            elif start <= now_ms < end:
                begin, until = start, end
            elif start > now_ms:
                upcoming = start
                break
        self._quiet_until = until
        self._from_ms = begin
        self._to_ms = upcoming if until is None else until

    def _window(self, day: datetime) -> tuple[int, int]:
        start = day + timedelta(minutes=self.start)
        end = day + timedelta(minutes=self.end) + (DAY if self.end < self.start else timedelta())
        first, last = instants(end, self.zone)
        if _wall(last - 1, self.zone) >= end:
            last = first  # the clock is put back to this very time: it has shown it, and all after it, before
        return instants(start, self.zone)[0], last


class Digest:
    """How often what may wait is told.

    Args:
        frequency: hourly (at the full local hour), daily or weekly.
        at: minutes since midnight, of daily and weekly ones.
        weekday: of weekly ones, 0 = Monday.
    """

    __slots__ = ("_asked_ms", "_next_ms", "at", "frequency", "weekday", "zone")

    def __init__(self, frequency: str, at: int, weekday: int, zone: ZoneInfo) -> None:
        self.frequency = frequency
        self.at = at
        self.weekday = weekday
        self.zone = zone
        self._asked_ms = self._next_ms = 0

    def next_ms(self, now_ms: int) -> int:
        """The first moment after `now_ms` at which a digest is due."""
        if not self._asked_ms <= now_ms < self._next_ms:
            self._asked_ms, self._next_ms = now_ms, self._find(now_ms)
        return self._next_ms

    def _find(self, now_ms: int) -> int:
        wall = _wall(now_ms, self.zone)
        if self.frequency == "hourly":
            next_ms = now_ms
            for _ in range(3):  # a change of half an hour inside of this one makes it two or three steps
                next_ms = next_ms // 1000 * 1000 + HOUR_MS - (wall.minute * 60 + wall.second) * 1000
                wall = _wall(next_ms, self.zone)
                if not wall.minute:
                    break
            return next_ms
        midnight = wall.replace(hour=0, minute=0, second=0)
        for ahead in range(_HORIZON):
            day = midnight + ahead * DAY
            if self.frequency == "weekly" and day.weekday() != self.weekday:
                continue
            first = instants(day + timedelta(minutes=self.at), self.zone)[0]
            if first > now_ms:
                return first
        raise AssertionError("every week has every weekday")
