"""When a schedule is due: once, at a local time, by a rule of RFC 5545, or as cron says it. Pure.

Rules are written in local time. A local time that does not exist (clocks go forward) is taken with the offset
before, one that exists twice is the first of the two, as RFC 5545 §3.3.5 says; so a daily 02:30 comes every
day, and never twice. Rules by hours or minutes count elapsed time: every hour is every 3,600 seconds.

Everything is computed from the rule alone, not from the occurrence before: whoever wakes up late finds the
same
occurrences. A rule that has none (30 February) is looked for until the year 9999, which takes seconds: so new
rules are tried where that stalls nobody (actors/template_worker.py), and those that were accepted have some.
"""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Final

import msgspec
from dateutil import rrule as rules

from carillon.event_rules import Instant, expiry_ms, is_object
from carillon.problems import DocumentError, FieldError, shown
from carillon.quiet_hours import known_zone

USER_ZONE: Final = "user"
"""The zone of the user, wherever that is at the time."""
MEMBERS: Final = ("at", "localAt", "rrule", "cron", "timezone")
MAX_RULE: Final = 500
"""Characters of a rule."""
MAX_COUNT: Final = 1000
"""Largest COUNT: occurrences are counted from the first."""
MISSED_MOST: Final = 1000
"""Missed occurrences that are counted."""

_ZONES_MS: Final = 26 * 3_600_000
"""Zones are at most so far apart."""
_MARGIN: Final = timedelta(hours=25)
"""More than clocks ever change by (24 h, where the date line moved)."""
_LAST: Final = datetime(9990, 1, 1)  # noqa: DTZ001  local times are naive here
_WEEKDAYS: Final = ("MO", "TU", "WE", "TH", "FR", "SA", "SU")
_FREQUENCIES: Final = {
    "YEARLY": rules.YEARLY,
    "MONTHLY": rules.MONTHLY,
    "WEEKLY": rules.WEEKLY,
    "DAILY": rules.DAILY,
}
_ELAPSED: Final = {"HOURLY": 3_600_000, "MINUTELY": 60_000}
_LISTS: Final = {
    "BYMONTH": (1, 12, False),
    "BYMONTHDAY": (1, 31, True),
    "BYYEARDAY": (1, 366, True),
    "BYWEEKNO": (1, 53, True),
    "BYHOUR": (0, 23, False),
    "BYMINUTE": (0, 59, False),
    "BYSETPOS": (1, 366, True),
}
_BYDAY: Final = re.compile(r"([+-]?[1-9][0-9]?)?(MO|TU|WE|TH|FR|SA|SU)")
_UNTIL: Final = re.compile(r"(\d{8})(T(\d{6})(Z?))?")
_MONTHS: Final = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_DAYS: Final = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
_CRON: Final[tuple[tuple[str, int, int, dict[str, int]], ...]] = (
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of the month", 1, 31, {}),
    ("month", 1, 12, {name: index for index, name in enumerate(_MONTHS, 1)}),
    ("day of the week", 0, 7, {name: index for index, name in enumerate(_DAYS)}),
)


class ScheduleError(DocumentError):
    """A schedule that breaks rules. Args (positional): the errors, in the order found."""


@dataclass(frozen=True)
class _Rule:
    """One RFC 5545 rule of days and longer: arguments of dateutil's."""

    frequency: Any
    interval: int
    parts: dict[str, Any]


@dataclass(frozen=True)
class When:
    """When a schedule is due.

    Attributes:
        zone: an IANA name, or `USER_ZONE`.
        at_ms: the one time, if it is an instant.
        local: the one time or the first, as a local time (naive).
        elapsed_ms: period of a rule by hours or minutes; 0: none.
        rules: of days and longer; an occurrence of any is one.
        count: of occurrences in all; 0: no end.
        until: last local time (naive) or instant (aware), None: no end.
    """

    zone: str
    at_ms: int | None = None
    local: datetime | None = None
    elapsed_ms: int = 0
    rules: tuple[_Rule, ...] = ()
    count: int = 0
    until: datetime | None = None

    @property
    def recurring(self) -> bool:
        """True if there may be more than one occurrence."""
        return bool(self.elapsed_ms or self.rules)


# -- reading ------------------------------------------------------------------------------------------


def parse(document: Any) -> When:
    """Read the members of a schedule that say when it is due.

    Raises:
        ScheduleError: they break a rule; `errors` names each.
    """
    if not is_object(document):
        raise ScheduleError([FieldError("", "an object", shown(document))])
    given = {name: document[name] for name in MEMBERS if document.get(name) is not None}
    zone = given.get("timezone", "UTC")
    if zone != USER_ZONE and not known_zone(zone):
        raise ScheduleError([FieldError("timezone", "user, or a zone such as Europe/Vienna", shown(zone))])
    kinds = [name for name in ("at", "localAt", "cron") if name in given]
    if len(kinds) != 1:
        got = " and ".join(kinds) or "nothing"
        raise ScheduleError([FieldError("at", "one of at, localAt (with or without rrule) and cron", got)])
    if "rrule" in given and kinds[0] != "localAt":
        raise ScheduleError([FieldError("localAt", "the first local time of rrule", "nothing")])
    if kinds[0] == "at":
        return When(zone, at_ms=_instant(given["at"]))
    if kinds[0] == "cron":
        return When(zone, rules=_cron(given["cron"]))
    local = _local(given["localAt"])
    return _rrule(given["rrule"], zone, local) if "rrule" in given else When(zone, local=local)


def _instant(value: Any) -> int:
    wrong = FieldError("at", "RFC 3339 with offset, from 1970 to 9989", shown(value))
    if not isinstance(value, str):
        raise ScheduleError([wrong])
    try:
        at: datetime = msgspec.convert(value, Instant)
    except (msgspec.ValidationError, UnicodeError):
        raise ScheduleError([wrong]) from None
    if not 1970 <= at.year < _LAST.year:
        raise ScheduleError([wrong])
    return max(0, expiry_ms(at))


def _local(value: Any) -> datetime:
    wrong = FieldError("localAt", "a local time such as 2026-12-24T18:00:00, without offset", shown(value))
    try:
        at = datetime.fromisoformat(value) if isinstance(value, str) and len(value) <= 32 else None
    except ValueError:
        at = None
    if at is None or at.tzinfo is not None or not 1970 < at.year < _LAST.year or "T" not in value:
        raise ScheduleError([wrong])
    return at.replace(microsecond=at.microsecond // 1000 * 1000, fold=0)


def _wrong(expected: str, got: Any, path: str = "rrule") -> ScheduleError:
    return ScheduleError([FieldError(path, expected, shown(got))])


def _rrule(text: Any, zone: str, start: datetime) -> When:
    if not isinstance(text, str) or not 0 < len(text) <= MAX_RULE or not text.isascii():
        raise _wrong(f"a rule of RFC 5545 of at most {MAX_RULE} characters", text)
    parts: dict[str, str] = {}
    for part in text.upper().removeprefix("RRULE:").split(";"):
        name, equals, value = part.partition("=")
        if not equals or not value or name in parts:
            raise _wrong("NAME=VALUE;..., each name once", part)
        parts[name] = value
    frequency = parts.pop("FREQ", "")
    if frequency not in _FREQUENCIES and frequency not in _ELAPSED:
        raise _wrong("FREQ=YEARLY|MONTHLY|WEEKLY|DAILY|HOURLY|MINUTELY", frequency or "nothing")
    interval = _whole("INTERVAL", parts.pop("INTERVAL", "1"), 1, 10_000)
    count = _whole("COUNT", parts.pop("COUNT"), 1, MAX_COUNT) if "COUNT" in parts else 0
    until = _until(parts.pop("UNTIL")) if "UNTIL" in parts else None
    if count and until is not None:
        raise _wrong("COUNT or UNTIL, not both (RFC 5545)", text)
    if frequency in _ELAPSED:
        if parts:
            raise _wrong(f"only INTERVAL, COUNT and UNTIL with FREQ={frequency}", next(iter(parts)))
        return When(zone, local=start, elapsed_ms=_ELAPSED[frequency] * interval, count=count, until=until)
    more: dict[str, Any] = {}
    for name, value in parts.items():
        if name == "WKST":
            if value not in _WEEKDAYS:
                raise _wrong(f"WKST={'|'.join(_WEEKDAYS)}", value)
            more["wkst"] = _WEEKDAYS.index(value)
        elif name == "BYDAY":
            more["byweekday"] = [_weekday(day, frequency) for day in value.split(",")]
        elif name in _LISTS:
            low, high, negative = _LISTS[name]
            items = value.split(",")
            more[name.lower()] = [_whole(name, item, low, high, negative=negative) for item in items]
        else:
            known = ", ".join(("FREQ", "INTERVAL", "COUNT", "UNTIL", "WKST", "BYDAY", *_LISTS))
            raise _wrong(f"one of {known}", name)
    if "byweekno" in more and frequency != "YEARLY":
        raise _wrong("BYWEEKNO only with FREQ=YEARLY (RFC 5545)", text)
    if "bysetpos" in more and len(more) == 1:
        raise _wrong("BYSETPOS only with another BY (RFC 5545)", text)
    made = _Rule(_FREQUENCIES[frequency], interval, _explicit(frequency, more, start))
    return When(zone, local=start, rules=(made,), count=count, until=until)


def _explicit(frequency: str, parts: dict[str, Any], start: datetime) -> dict[str, Any]:
    """What a rule takes from its first time, said: so that it may be looked at from any later time."""
    given = {"byhour": [start.hour], "byminute": [start.minute], "bysecond": [start.second], **parts}
    days = ("byweekno", "byyearday", "bymonthday", "byweekday")
    if not any(name in parts for name in days):
        if frequency == "WEEKLY":
            given["byweekday"] = [rules.weekday(start.weekday())]
        elif frequency in ("MONTHLY", "YEARLY"):
            given["bymonthday"] = [start.day]
            if frequency == "YEARLY" and "bymonth" not in parts:
                given["bymonth"] = [start.month]
    return given


def _whole(name: str, text: str, low: int, high: int, *, negative: bool = False) -> int:
    digits = text[1:] if negative and text[:1] in "+-" else text
    if not digits.isdigit() or len(digits) > 5 or not low <= int(digits) <= high:
        sign = " or negative" if negative else ""
        raise _wrong(f"{name} from {low} to {high}{sign}", text)
    return -int(digits) if text[0] == "-" else int(digits)


def _weekday(text: str, frequency: str) -> Any:
    match = _BYDAY.fullmatch(text)
    if match is None or (match[1] and frequency not in ("MONTHLY", "YEARLY")):
        raise _wrong("BYDAY of MO..SU, with a number only for months and years", text)
    day = _WEEKDAYS.index(match[2])
    return rules.weekday(day, int(match[1])) if match[1] else rules.weekday(day)


def _until(text: str) -> datetime:
    match = _UNTIL.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        day = datetime.strptime(match[1], "%Y%m%d").date()  # noqa: DTZ007  a date has no zone
        if not match[2]:
            return datetime.combine(day, time(23, 59, 59))
        at = datetime.combine(day, datetime.strptime(match[3], "%H%M%S").time())  # noqa: DTZ007
        return at.replace(tzinfo=UTC) if match[4] else at
    except ValueError:
        raise _wrong("UNTIL=YYYYMMDD, YYYYMMDDTHHMMSS or YYYYMMDDTHHMMSSZ", text) from None


def _cron(text: Any) -> tuple[_Rule, ...]:
    fields = text.upper().split() if isinstance(text, str) and len(text) <= MAX_RULE else []
    if len(fields) != 5:
        raise _wrong("five fields: minute, hour, day of month, month, day of week", text, "cron")
    minute, hour, day, month, weekday = (_cron_field(f, *rule) for f, rule in zip(fields, _CRON, strict=True))
    base: dict[str, Any] = {
        "byminute": sorted(minute),
        "byhour": sorted(hour),
        "bysecond": [0],
        "bymonth": sorted(month),
    }
    by_day = {"bymonthday": sorted(day)}
    by_week = {"byweekday": [rules.weekday((d - 1) % 7) for d in sorted({d % 7 for d in weekday})]}
    # As cron has always done it: with both restricted, either suffices.
    if fields[2] != "*" and fields[4] != "*":
        return tuple(_Rule(rules.DAILY, 1, {**base, **some}) for some in (by_day, by_week))
    some = by_week if fields[4] != "*" else by_day if fields[2] != "*" else {}
    return (_Rule(rules.DAILY, 1, {**base, **some}),)


def _cron_field(text: str, name: str, low: int, high: int, names: dict[str, int]) -> set[int]:
    found: set[int] = set()
    for part in text.split(","):
        span, slash, step_text = part.partition("/")
        first, dash, last = span.partition("-")
        try:
            step = int(step_text) if slash else 1
            if span == "*":
                begin, end = low, high
            else:
                begin = names[first] if first in names else int(first)
                end = (names[last] if last in names else int(last)) if dash else (high if slash else begin)
            if not (part.isascii() and low <= begin <= end <= high and 1 <= step <= high):
                raise ValueError
        except ValueError:
            expected = f"{name} from {low} to {high}, as in 5, 1-5, */15 or 1,15"
            raise _wrong(expected, part, "cron") from None
        found |= set(range(begin, end + 1, step))
    return found


# -- computing ----------------------------------------------------------------------------------------


def instant_ms(local: datetime, zone: zoneinfo.ZoneInfo) -> int:
    """Milliseconds since the epoch of a local time.

    In a gap the offset before it counts, of two the first is taken (RFC 5545 §3.3.5).
    """
    at = local.replace(tzinfo=zone, fold=0)
    return (at.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def local_of(at_ms: int, zone: zoneinfo.ZoneInfo) -> datetime:
    """The local time (naive) of an instant."""
    utc = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=at_ms)
    return utc.astimezone(zone).replace(tzinfo=None, fold=0)


def next_ms(when: When, after_ms: int, zone_name: str = "UTC") -> int | None:
    """The first occurrence after a time; None if there is none.

    Args:
        after_ms: ms since the epoch; -1 finds a time at the epoch, too.
        zone_name: the user's zone, where `when.zone` says so.
    """
    if when.at_ms is not None:
        return when.at_ms if when.at_ms > after_ms else None
    zone = zoneinfo.ZoneInfo(zone_name if when.zone == USER_ZONE else when.zone)
    if not when.recurring:
        assert when.local is not None
        at_ms = instant_ms(when.local, zone)
        return at_ms if at_ms > after_ms else None
    until_ms = None if when.until is None else _until_ms(when.until, zone)
    if until_ms is not None and after_ms >= until_ms:
        return None
    if when.elapsed_ms:
        assert when.local is not None
        first = instant_ms(when.local, zone)
        step = max(0, (after_ms - first) // when.elapsed_ms + 1)
        found: int | None = first + step * when.elapsed_ms
        if when.count and step >= when.count:
            found = None
    elif when.count:
        assert when.local is not None
        times = sorted({instant_ms(local, zone) for local in _counted(when, when.local)})
        found = next((at_ms for at_ms in times if at_ms > after_ms), None)
    else:
        found = _next_clock(when, after_ms, zone)
    if found is None or (until_ms is not None and found > until_ms):
        return None
    return found


def _until_ms(until: datetime, zone: zoneinfo.ZoneInfo) -> int:
    if until.tzinfo is None:
        return instant_ms(until, zone) + 999
    return expiry_ms(until) + 999


def _floor(at_ms: int, zone: zoneinfo.ZoneInfo) -> datetime:
    return local_of(max(0, at_ms), zone) - _MARGIN


def _next_clock(when: When, after_ms: int, zone: zoneinfo.ZoneInfo) -> int | None:
    begin = _floor(after_ms, zone)
    if when.local is not None:
        begin = max(begin, when.local)
    best: int | None = None
    best_local: datetime | None = None
    for local in _locals(when, begin):
        if best_local is not None and local > best_local + _MARGIN:
            break  # a gap moves a local time at most that far
        at_ms = instant_ms(local, zone)
        if at_ms > after_ms and (best is None or at_ms < best):
            best, best_local = at_ms, best_local or local
    return best


def _counted(when: When, start: datetime) -> Iterator[datetime]:
    """The local occurrences of the one rule that has a COUNT, from the first."""
    (rule,) = when.rules
    return iter(
        rules.rrule(rule.frequency, dtstart=start, interval=rule.interval, count=when.count, **rule.parts)
    )


def _locals(when: When, begin: datetime) -> Iterator[datetime]:
    """Local occurrences from `begin`, in order."""
    streams = [
        iter(
            rules.rrule(
                rule.frequency,
                dtstart=_aligned(rule, when.local or begin, begin),
                interval=rule.interval,
                **rule.parts,
            )
        )
        for rule in when.rules
    ]
    heads = [next(stream, None) for stream in streams]
    while True:
        first = min((head for head in heads if head is not None), default=_LAST)
        if first >= _LAST:
            return
        if first >= begin:
            yield first
        heads = [
            next(stream, None) if head == first else head for head, stream in zip(heads, streams, strict=True)
        ]


def _aligned(rule: _Rule, start: datetime, begin: datetime) -> datetime:
    """A start not long before `begin` from which the rule finds the same as from its own."""
    if begin <= start:
        return start
    if rule.frequency == rules.DAILY:
        steps = max(0, (begin.date() - start.date()).days // rule.interval - 1)
        return start + timedelta(days=steps * rule.interval)
    if rule.frequency == rules.WEEKLY:
        steps = max(0, (begin.date() - start.date()).days // (7 * rule.interval) - 1)
        return start + timedelta(weeks=steps * rule.interval)
    if rule.frequency == rules.MONTHLY:
        months = (begin.year - start.year) * 12 + begin.month - start.month
        steps = max(0, months // rule.interval - 1)
        if not steps:
            return start
        index = start.year * 12 + start.month - 1 + steps * rule.interval
        return datetime.combine(date(index // 12, index % 12 + 1, 1), start.time())
    steps = max(0, (begin.year - start.year) // rule.interval - 1)
    if not steps:
        return start
    return datetime.combine(date(start.year + steps * rule.interval, 1, 1), time(0))


def moved_ms(when: When, at_ms: int, before: str, now: str) -> int:
    """The same local time in another zone: what becomes of an occurrence when its user travels."""
    if when.zone != USER_ZONE or before == now or when.elapsed_ms or when.at_ms is not None:
        return at_ms
    return instant_ms(local_of(at_ms, zoneinfo.ZoneInfo(before)), zoneinfo.ZoneInfo(now))


def look_ms(when: When, at_ms: int, now_ms: int, recheck_s: float) -> int:
    """When to look at a schedule: at its time; in the last day before one in the user's zone now and then,
    as the user may travel to where it is earlier."""
    if when.zone != USER_ZONE:
        return at_ms
    return min(at_ms, max(at_ms - _ZONES_MS, now_ms + round(recheck_s * 1000)))


def upcoming(when: When, after_ms: int, zone_name: str, count: int) -> list[int]:
    """The next occurrences, at most `count`."""
    found: list[int] = []
    while len(found) < count:
        at_ms = next_ms(when, found[-1] if found else after_ms, zone_name)
        if at_ms is None:
            break
        found.append(at_ms)
    return found


def advance(when: When, fired_ms: int, now_ms: int, zone_name: str) -> tuple[int | None, int]:
    """What comes after an occurrence that fired: (the next one, how many were missed).

    Occurrences up to `now_ms` are not fired one after the other: the one that fired stands for them.
    """
    missed = 0
    at_ms = next_ms(when, fired_ms, zone_name)
    while at_ms is not None and at_ms <= now_ms:
        missed += 1
        if missed >= MISSED_MOST:
            return next_ms(when, now_ms, zone_name), missed
        at_ms = next_ms(when, at_ms, zone_name)
    return at_ms, missed
