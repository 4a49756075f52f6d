"""Digests: what is collected is told in order, once, and nothing of it is lost."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from hypothesis import given
from hypothesis import strategies as st

from carillon.budget import Limit, Spent
from carillon.decision import OVERFLOW, judge, no_rules
from carillon.digest import Item, Key, digest_id, key_of, latest_expiry, params, summary, tell
from carillon.ids import UserKey
from carillon.messages import Event
from carillon.switches import Preferences
from carillon.tenant_rules import rules_of

ZONES = (
    "UTC",
    "Europe/Vienna",
    "America/New_York",
    "Australia/Lord_Howe",
    "Asia/Kathmandu",
    "America/Havana",
)
HOUR_MS = 3_600_000


def event(category: str | None = None, kind: str = "k") -> Event:
    return Event(b"", "t", "u", 0, kind, category, 1, "", 0)


# -- ids --------------------------------------------------------------------------------------------------

keys = st.builds(
    Key,
    st.builds(UserKey, st.text(max_size=3), st.text(max_size=3)),
    st.none() | st.text(max_size=3),
    st.sampled_from(["hourly", "daily", "weekly", OVERFLOW]),
    st.integers(0, 2**45),
)


@given(keys, keys)
def test_an_id_stands_for_one_digest(one: Key, other: Key) -> None:
    """The same for equal keys, another for every other, and a UUID of version 8."""
    assert (digest_id(one) == digest_id(other)) == (one == other)
    raw = digest_id(one)
    assert (len(raw), raw[6] >> 4, raw[8] >> 6) == (16, 8, 0b10)


# -- telling ----------------------------------------------------------------------------------------------

items = st.lists(st.tuples(st.integers(1, 50), st.sampled_from("abc")), max_size=30)


@given(items, st.sets(st.integers(0, 29)))
def test_what_waited_is_told_once_and_in_order(found: list[tuple[int, str]], dealt_with: set[int]) -> None:
    """Every item that is left is in the one push of its digest, oldest first; none is empty."""
    waiting = [Item(index, seq, digest) for index, (seq, digest) in enumerate(found)]
    told = tell(waiting, dealt_with)
    left = [item for item in waiting if item.delivery not in dealt_with]
    assert sorted(d for one in told for d in one.items) == [item.delivery for item in left]
    assert len(told) == len({item.digest for item in left})
    by_id = {item.delivery: item for item in waiting}
    for one in told:
        some = [by_id[d] for d in one.items]
        assert len({item.digest for item in some}) == 1
        assert [item.seq for item in some] == sorted(item.seq for item in some)
        assert one.carrier == one.items[-1]


# -- when -------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(ZONES),
    st.sampled_from(["hourly", "daily", "weekly"]),
    st.integers(0, 23),
    st.integers(0, 59),
    st.integers(1_577_836_800, 1_893_456_000),
    st.lists(st.integers(0, 90_000), min_size=1, max_size=12),
)
def test_events_meet_in_the_digest_of_their_local_time(
    zone: str, frequency: str, hour: int, minute: int, start_s: int, pauses_s: list[int]
) -> None:
    """Whatever the clocks do: events wait for the next such local time, and together."""
    local = ZoneInfo(zone)
    digest = {"frequency": frequency, "at": f"{hour:02}:{minute:02}", "day": "wed"}
    user = Preferences({"timezone": zone, "categories": {"news": {"digest": digest}}})
    at = datetime.fromtimestamp(start_s, UTC)
    met: dict[bytes, int] = {}
    for pause_s in pauses_s:
        at += timedelta(seconds=pause_s)
        now_ms = round(at.timestamp() * 1000)
        verdict = judge(event("news"), user, no_rules(), now_ms)
        due_ms = verdict.until_ms
        assert due_ms is not None
        assert verdict.digest == frequency
        assert due_ms > now_ms
        assert (
            met.setdefault(digest_id(key_of(UserKey("t", "u"), "news", frequency, due_ms)), due_ms) == due_ms
        )
        wall = datetime.fromtimestamp(due_ms / 1000, local)
        longest = {"hourly": 1.5, "daily": 25.5, "weekly": 7 * 24 + 1.5}[frequency]
        assert due_ms - now_ms <= longest * HOUR_MS
        if frequency == "hourly":
            assert wall.minute == 0 or _changes(wall, local)
        else:
            assert (wall.hour, wall.minute) == (hour, minute) or _changes(wall, local)
            assert frequency == "daily" or wall.weekday() == 2 or _changes(wall, local)
    assert sorted(met.values()) == list(met.values())
    assert len(set(met.values())) == len(met), "no two digests are due at the same moment"


def _changes(wall: datetime, zone: ZoneInfo) -> bool:
    """Whether the clock is changed at this moment: the local time that was asked for is skipped."""
    before = datetime.fromtimestamp(wall.timestamp() - 1, zone)
    return before.utcoffset() != wall.utcoffset()


def test_a_category_has_a_digest_of_its_own() -> None:
    """By user, category and frequency; limits have one over all categories; urgent ones wait in none."""
    user = Preferences({"digest": "daily", "types": {"t": {"digest": "hourly"}}})
    verdicts = [
        judge(event(c, kind), user, no_rules(), 0) for c, kind in ((None, "k"), ("a", "k"), ("a", "t"))
    ]
    assert [v.digest for v in verdicts] == ["daily", "daily", "hourly"]
    one = UserKey("t", "u")
    ids = {digest_id(key_of(one, c, f, 7)) for c in (None, "", "a") for f in ("daily", "hourly")}
    assert len(ids) == 6
    assert key_of(one, "a", OVERFLOW, 7) == key_of(one, None, OVERFLOW, 7)
    urgent = event("a")
    urgent.priority = 3
    assert judge(urgent, user, no_rules(), 0).digest is None


# -- limits -----------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 4000), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(1000, 20_000),
    st.integers(0, 10),
)
def test_overflow_of_a_while_is_one_digest(
    pauses_ms: list[int], count: int, window_ms: int, collect_s: int
) -> None:
    """What exceeds the limit joins the digest that is open; the next one has its time, too."""
    limits = {"user": {"count": count, "windowS": window_ms / 1000}, "collectS": collect_s}
    rules = rules_of({"limits": limits})
    spent, now_ms, dues = Spent(), 1_000_000, list[int]()
    for pause_ms in pauses_ms:
        now_ms += pause_ms
        verdict = judge(event(), None, rules or no_rules(), now_ms, spent)
        if verdict.digest is None:
            for name, limit in verdict.spends:
                spent.spend(name, limit, now_ms)
            continue
        assert verdict.until_ms is not None
        assert now_ms < verdict.until_ms <= now_ms + max(window_ms, 1000 * collect_s)
        if spent.digest_ms > now_ms:
            assert verdict.until_ms == spent.digest_ms
        else:
            assert verdict.until_ms >= now_ms + min(1000 * collect_s, window_ms)
            dues.append(verdict.until_ms)
        spent.digest_ms = verdict.until_ms
    gaps = [b - a for a, b in itertools.pairwise(dues)]
    assert all(gap >= min(1000 * collect_s, window_ms) for gap in gaps)


def test_overflow_is_a_rule_that_explains_itself() -> None:
    """The limit that is used up, and the digest that collects; in the feed alone there is none."""
    spent = Spent()
    spent.spend("", Limit(1, 60_000), 0)
    for overflow, digest, fired in (
        ("digest", OVERFLOW, ["rate_limit", "overflow"]),
        ("feed", None, ["rate_limit"]),
    ):
        rules = rules_of({"limits": {"user": {"count": 1, "windowS": 60}, "overflow": overflow}})
        verdict = judge(event(), None, rules or no_rules(), 1000, spent)
        assert verdict.digest == digest
        assert [rule.rule for rule in verdict.rules] == fired


# -- words ------------------------------------------------------------------------------------------------


def test_the_words_of_a_digest() -> None:
    """One item speaks for itself; of several the newest are named and the others counted."""
    assert summary(1, ["alone"], "and its text") == ("alone", "and its text")
    assert summary(2, ["b", "a"], None) == ("2 new notifications", "b\na")
    assert summary(9, ["c", "b"], None) == ("9 new notifications", "c\nb\n+7")
    made: dict[str, Any] = params(9, None, ["c", "b"], ["x", "y", "x"])
    assert made == {"count": 9, "category": None, "titles": ["c", "b"], "types": ["x", "y"], "more": 7}
    assert json.dumps(made)


@given(st.lists(st.none() | st.integers(1, 9), max_size=5))
def test_a_push_lives_as_long_as_its_items(expiries: list[int | None]) -> None:
    """Until the last of them expires; for ever if one never does."""
    known = [at for at in expiries if at is not None]
    assert latest_expiry(expiries) == (None if not known or None in expiries else max(known))
