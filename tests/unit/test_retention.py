"""Retention: months, days, partitions and parts."""

from __future__ import annotations

import itertools
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.errors import InvalidInputError
from carillon.ids import Uuid7Source
from carillon.retention import (
    DAY_MS,
    Month,
    Partition,
    PartSize,
    is_due,
    kept_name,
    month_at,
    month_of,
    parse_month,
    parse_time_of_day,
    plan_merges,
    plan_rewrites,
    retention_days,
    run_is_due,
)

MOMENTS = st.integers(0, 4_102_444_800_000)
MONTHS = st.builds(month_at, MOMENTS)


@given(MOMENTS)
def test_a_moment_lies_in_its_month(ms: int) -> None:
    """And the bounds of a month are ids that sort around those made in it."""
    month = month_at(ms)
    assert month.start_ms <= ms < month.end_ms
    raw = Uuid7Source().next(ms)
    assert month_of(raw) == month
    assert month.low.bytes <= raw < month.high.bytes
    assert parse_month(str(month)) == month


@given(MONTHS, st.integers(-300, 300))
def test_months_follow_each_other(month: Month, count: int) -> None:
    """One ends where the next begins, whichever way one counts."""
    assert month.end_ms == month.plus(1).start_ms
    assert month.plus(count).plus(-count) == month
    assert (month.plus(count) > month) == (count > 0)


@pytest.mark.parametrize(
    "text", ["2026-13", "2026-00", "2026-3", "03-2026", "", "2026-03-01", "1969-12", "2026-0३"]
)
def test_what_is_no_month(text: str) -> None:
    """Refused, naming what was given."""
    with pytest.raises(InvalidInputError, match="expected a month like 2026-03"):
        parse_month(text)


@given(MONTHS, st.integers(1, 4000), MOMENTS)
def test_a_month_goes_when_all_of_it_is_old(month: Month, days: int, now_ms: int) -> None:
    """Its youngest possible notification is older than the retention then, and only then; once due, for
    ever; a longer retention never makes it due earlier."""
    due = is_due(month, now_ms, days)
    assert due == (month.end_ms - 1 < now_ms - days * DAY_MS)
    assert not due or is_due(month, now_ms + 1, days)
    assert not is_due(month, now_ms, days + 1) or due
    assert not is_due(month, now_ms, 0)


def test_a_policy_goes_before_the_setting() -> None:
    """0 is a choice, too."""
    assert retention_days(None, 90) == retention_days({}, 90) == 90
    assert retention_days({"retentionDays": 7}, 90) == 7
    assert retention_days({"retentionDays": 0}, 90) == 0


@given(MOMENTS, st.integers(0, DAY_MS // 60_000 - 1), st.lists(st.integers(1, 3 * DAY_MS), max_size=20))
def test_the_run_comes_once_a_day(start_ms: int, minute: int, waits: list[int]) -> None:
    """However often one looks: no two runs between one time of day and the next, and none is left out."""
    start_ms += 2 * DAY_MS
    at_ms, now_ms, last_ms = minute * 60_000, start_ms, start_ms
    runs: list[int] = []
    for wait in waits:
        now_ms += wait
        if run_is_due(now_ms, at_ms, last_ms):
            runs.append(now_ms)
            last_ms = now_ms
    days = [(one - at_ms) // DAY_MS for one in runs]
    assert len(set(days)) == len(days)
    assert not waits or run_is_due(now_ms, at_ms, last_ms) is False
    assert (last_ms - at_ms) // DAY_MS == (now_ms - at_ms) // DAY_MS
    assert not run_is_due(now_ms, at_ms, None)


@pytest.mark.parametrize("text", ["24:00", "3:00", "03:60", "", "0300"])
def test_what_is_no_time_of_day(text: str) -> None:
    """Refused."""
    with pytest.raises(ValueError, match="expected a time like"):
        parse_time_of_day(text)


NOW = Month(2026, 6)


def partition(month: Month, rows: int, removed: int, months: int = 1) -> Partition:
    return Partition(
        f"notifications_{month.year}_{month.month:02d}",
        month.low,
        month.plus(months).high if months > 1 else month.high,
        rows,
        removed,
    )


@given(
    st.lists(
        st.tuples(st.integers(-40, 3), st.integers(0, 30), st.integers(0, 30)), unique_by=lambda one: one[0]
    ),
    st.integers(0, 100),
)
def test_rewrites_cover_what_they_replace(shapes: list[tuple[int, int, int]], merge_rows: int) -> None:
    """No partition twice, none of this month, the last or later; targets have the bounds of their sources and
    overlap nobody; what has rows keeps a home, what has none goes."""
    given = [partition(NOW.plus(at), rows, removed) for at, rows, removed in shapes]
    plans = list(plan_rewrites(given, NOW.start_ms + DAY_MS, merge_rows))
    sources = [one for plan in plans for one in plan.sources]
    assert len({one.name for one in sources}) == len(sources)
    assert all(one.high.int <= NOW.plus(-1).low.int for one in sources)
    for plan in plans:
        assert (plan.target is None) == (not any(one.rows for one in plan.sources))
        assert len(plan.sources) == 1 or sum(one.rows for one in plan.sources) <= merge_rows
    after = [one for one in given if one not in sources]
    spans = sorted(
        [(p.low.int, p.high.int) for p in after] + [(p.low.int, p.high.int) for p in plans if p.target]
    )
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    names = [p.name for p in after] + [p.target for p in plans if p.target]
    assert len(set(names)) == len(names)
    for one in given:
        if one.high.int <= NOW.plus(-1).low.int:
            assert one in sources or (one.rows and one.removed < one.rows)


def test_a_year_is_named_as_one() -> None:
    """A kept partition of several months keeps its name when it is written anew."""
    assert kept_name(partition(Month(2024, 2), 1, 1)) == "notifications_kept_2024_02"
    assert (
        kept_name(Partition("x", Month(2024, 2).low, Month(2024, 12).high, 1, 1)) == "notifications_kept_2024"
    )


@given(st.lists(st.tuples(st.text("ab", max_size=2), st.integers(1, 120)), max_size=12), st.integers(10, 200))
def test_merges_end(shapes: list[tuple[str, int]], most: int) -> None:
    """Groups of two at least, none too large, no part twice; and merging what was merged comes to an end,
    with no two small neighbours that would fit together."""
    parts = [PartSize(uuid.UUID(int=n), user, size) for n, (user, size) in enumerate(shapes)]
    rounds = 0
    while groups := plan_merges(parts, most):
        rounds += 1
        assert rounds < 12
        by_key = {part.key: part for part in parts}
        keys = [key for group in groups for key in group]
        assert len(set(keys)) == len(keys)
        for group in groups:
            old = [by_key.pop(key) for key in group]
            size = sum(one.raw_bytes for one in old)
            assert len(group) > 1
            assert size <= most
            merged = PartSize(group[0], min(one.first_user for one in old), size)
            by_key[merged.key] = merged
        parts = list(by_key.values())
