"""Retention: which months of a tenant leave the tables, and what stays. Pure.

A month of a tenant is due once its last moment is older than the tenant's retention: it goes as a whole, so
that an archive has few large parts, and notifications stay between `retention_days` and a month more. The
month of a notification is that of its id (UUIDv7), which is what `notifications` is partitioned by.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from carillon.errors import InvalidInputError
from carillon.ids import uuid7_ms

DAY_MS: Final = 86_400_000
MAX_DAYS: Final = 36_500
"""Longest retention that can be asked for: a hundred years."""
MEMBER: Final = "retentionDays"
"""Of a tenant's policy document."""
_MONTH: Final = re.compile(r"(\d{4})-(\d{2})", re.ASCII)
_TIME_OF_DAY: Final = re.compile(r"([01]\d|2[0-3]):([0-5]\d)", re.ASCII)


class Month(NamedTuple):
    """A calendar month in UTC. Orders by time."""

    year: int
    month: int
    """1 to 12."""

    def __str__(self) -> str:
        return f"{self.year:04d}-{self.month:02d}"

    def plus(self, months: int) -> Month:
        """The month so many later; negative: earlier."""
        index = self.year * 12 + self.month - 1 + months
        return Month(index // 12, index % 12 + 1)

    @property
    def start_ms(self) -> int:
        """Its first millisecond."""
        return int(datetime(self.year, self.month, 1, tzinfo=UTC).timestamp()) * 1000

    @property
    def end_ms(self) -> int:
        """The first millisecond of the next."""
        return self.plus(1).start_ms

    @property
    def low(self) -> uuid.UUID:
        """The least id of the month."""
        return least_id(self.start_ms)

    @property
    def high(self) -> uuid.UUID:
        """The least id of the next month."""
        return least_id(self.end_ms)


def least_id(ms: int) -> uuid.UUID:
    """The least UUID whose 48-bit timestamp is `ms`."""
    return uuid.UUID(int=ms << 80)


def month_at(ms: int) -> Month:
    """The month of a moment."""
    moment = datetime.fromtimestamp(ms / 1000, UTC)
    return Month(moment.year, moment.month)


def month_of(raw: bytes) -> Month:
    """The month of an id."""
    return month_at(uuid7_ms(raw))


def parse_month(text: str) -> Month:
    """The month of "2026-03".

    Raises:
        InvalidInputError: it is none.
    """
    found = _MONTH.fullmatch(text)
    if found is None or not 1 <= int(found[2]) <= 12 or not 1970 <= int(found[1]) <= 9000:
        raise InvalidInputError(f"expected a month like 2026-03, got {text!r}", "month", "YYYY-MM", text[:40])
    return Month(int(found[1]), int(found[2]))


def retention_days(policy: Mapping[str, Any] | None, default: int) -> int:
    """Days that a tenant's notifications stay; 0: for ever."""
    own = (policy or {}).get(MEMBER)
    return default if own is None else int(own)


def is_due(month: Month, now_ms: int, days: int) -> bool:
    """Whether everything of the month is older than `days` (0: never)."""
    return days > 0 and month.end_ms <= now_ms - days * DAY_MS


def parse_time_of_day(text: str) -> int:
    """Milliseconds after midnight of "03:30".

    Raises:
        ValueError: it is none.
    """
    found = _TIME_OF_DAY.fullmatch(text)
    if found is None:
        raise ValueError(f"expected a time like 03:30, got {text!r}")
    return (int(found[1]) * 60 + int(found[2])) * 60_000


def run_is_due(now_ms: int, at_ms: int, last_ms: int | None) -> bool:
    """Whether the daily run at `at_ms` after midnight (UTC) is due: none began since it last came round.

    A system that was down at that time catches up as soon as it is back; one that never ran begins with the
    next time that comes round.

    Args:
        last_ms: when the last run began, or, if there never was one, when the job first looked.
    """
    today = now_ms - now_ms % DAY_MS + at_ms
    latest = today if today <= now_ms else today - DAY_MS
    return last_ms is not None and last_ms < latest


# -- partitions ---------------------------------------------------------------------------------------------


class Partition(NamedTuple):
    """A partition of `notifications` by its bounds."""

    name: str
    low: uuid.UUID
    high: uuid.UUID
    rows: int
    """Rows in it; an estimate if `removed` is 0."""
    removed: int
    """Rows taken out of it since it was last written anew: room that nothing uses."""

    @property
    def first(self) -> Month:
        """Its first month."""
        return month_of(self.low.bytes)


@dataclass(frozen=True)
class Rewrite:
    """Partitions that give way to one, or to none."""

    sources: tuple[Partition, ...]
    """Neighbours, by bounds; between them there may be months without a partition."""
    target: str | None
    """Name of the partition with what is kept; None: nothing is, they just go."""

    @property
    def low(self) -> uuid.UUID:
        """Lower bound of the target."""
        return self.sources[0].low

    @property
    def high(self) -> uuid.UUID:
        """Upper bound of the target (exclusive)."""
        return self.sources[-1].high


def plan_rewrites(partitions: Iterable[Partition], now_ms: int, merge_rows: int) -> Iterator[Rewrite]:
    """What is to be done about old partitions, oldest first.

    * One that holds nothing any more goes.
    * One of which at least half was taken out is written anew: its rows move to a small one of the same
      bounds.
    * The months of a calendar year that has been over for a year become one, so that a feed never has to look
      into more than about thirty partitions, as long as they hold `merge_rows` rows at most.

    This month, the last one and those to come are left alone: appends go there, and they are made ahead of
    time (stores/postgres/migrate.py).
    """
    present = month_at(now_ms)
    old = sorted((p for p in partitions if p.high.int <= present.plus(-1).low.int), key=lambda p: p.low.int)
    rest: list[Partition] = []
    for one in old:
        if not one.rows:
            yield Rewrite((one,), None)
        else:
            rest.append(one)
    merged: set[str] = set()
    for year in sorted({p.first.year for p in rest}):
        first, after = Month(year, 1), Month(year + 1, 1)
        some = [p for p in rest if p.low.int >= first.low.int and p.high.int <= after.low.int]
        over = present >= Month(year + 2, 1)
        if over and len(some) > 1 and sum(p.rows for p in some) <= merge_rows:
            merged.update(p.name for p in some)
            yield Rewrite(tuple(some), f"notifications_kept_{year:04d}")
    for one in rest:
        if one.name not in merged and one.removed >= one.rows:
            yield Rewrite((one,), kept_name(one))


def kept_name(one: Partition) -> str:
    """What the partition is called once only kept rows are in it."""
    first = one.first
    if one.high.int > first.high.int:
        return f"notifications_kept_{first.year:04d}"
    return f"notifications_kept_{first.year:04d}_{first.month:02d}"


# -- parts that become one ----------------------------------------------------------------------------------


class PartSize(NamedTuple):
    """What is known of a part when parts are to be merged."""

    key: Any
    first_user: str
    raw_bytes: int


def plan_merges(parts: Sequence[PartSize], most_bytes: int) -> list[list[Any]]:
    """Groups of parts to be merged, by their users: each of two at least, of `most_bytes` at most together.

    A part of half of `most_bytes` or more stays as it is, so that nothing is written over and over again.
    """
    groups: list[list[Any]] = []
    group: list[Any] = []
    size = 0
    for part in sorted(parts, key=lambda p: p.first_user):
        if part.raw_bytes * 2 >= most_bytes:
            continue
        if group and size + part.raw_bytes > most_bytes:
            groups.append(group)
            group, size = [], 0
        group.append(part.key)
        size += part.raw_bytes
    groups.append(group)
    return [some for some in groups if len(some) > 1]
