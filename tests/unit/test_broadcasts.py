"""What broadcasts decide: states, ids, pages, progress, the lane."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.audience import EVERYBODY, Audience, AudienceError
from carillon.broadcasts import (
    ACTIONS,
    DONE,
    ENDED,
    STATES,
    Counts,
    Mark,
    NotificationIds,
    Recipients,
    SlotUser,
    after,
    counted,
    estimated,
    lane_turn,
    members,
    next_size,
    parse_recipients,
    pause_ms,
    progress,
    walked,
)
from carillon.ids import Uuid7Source, slot_of, uuid7_ms
from cluster.broadcasts import progress_line

MS = 1_780_000_000_000
SOURCE = Uuid7Source()


# -- states -----------------------------------------------------------------------------------------------


@given(st.sampled_from(STATES), st.lists(st.sampled_from(sorted(ACTIONS)), max_size=6), st.booleans())
def test_what_has_ended_stays_so(state: str, actions: list[str], started: bool) -> None:
    """No row of actions brings back a broadcast that has ended, and every action may be repeated."""
    ended = False
    for action in actions:
        new = after(state, action, started)
        if new is None:
            assert state in ENDED or action == "resume"
            continue
        assert not ended or new == state
        assert after(new, action, started) == new
        state, ended = new, new in ENDED


def test_what_never_ran_waits_again() -> None:
    """A scheduled one that is resumed goes on waiting; one that ran goes on running."""
    assert after("paused", "resume", False) == "scheduled"
    assert after("paused", "resume", True) == "running"
    assert after("running", "resume", True) == "running"
    assert after("done", "pause", True) is None
    assert after("done", "cancel", True) is None


# -- whom -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "meant"),
    [
        ("all", Recipients(EVERYBODY)),
        ({"topic": "goals"}, Recipients(Audience("topic", "goals"))),
        ({"userIds": ["b", "a", "b"]}, Recipients(None, ("b", "a"))),
        (["a"], Recipients(None, ("a",))),
    ],
)
def test_recipients(given_: Any, meant: Recipients) -> None:
    """Every form is understood, and what is written is read back the same."""
    assert parse_recipients(given_) == meant
    assert parse_recipients(meant.json()) == meant


@pytest.mark.parametrize(
    ("wrong", "path"),
    [
        (None, "audience"),
        ("everybody", "audience"),
        ([], "audience"),
        ({"userIds": []}, "audience/userIds"),
        ({"userIds": ["a"] * 1001}, "audience/userIds"),
        ({"userIds": ["a", ""]}, "audience/userIds/1"),
        ({"userIds": ["a\x00"]}, "audience/userIds/0"),
        ({"userIds": ["\ud800"]}, "audience/userIds/0"),
        ({"userIds": ["a"], "topic": "t"}, "audience/topic"),
    ],
)
def test_what_means_nobody_is_refused_by_name(wrong: Any, path: str) -> None:
    """The member that is wrong is named."""
    with pytest.raises(AudienceError) as raised:
        parse_recipients(wrong)
    assert raised.value.errors[0].path == path


# -- ids --------------------------------------------------------------------------------------------------


@given(st.lists(st.text(min_size=1, max_size=20).filter(str.isprintable), min_size=2, unique=True))
def test_ids_follow_from_broadcast_and_user(users: list[str]) -> None:
    """The same user has the same id, others have others, all of the month in which it began and in bounds."""
    broadcast = SOURCE.next(MS)
    ids = NotificationIds(broadcast, MS + 77)
    made = [ids.of(user) for user in users]
    assert made == [NotificationIds(broadcast, MS + 77).of(user) for user in users]
    assert len(set(made)) == len(users)
    low, high = ids.bounds()
    for raw in made:
        assert uuid7_ms(raw) == MS + 77
        assert raw[6] >> 4 == 7
        assert raw[8] >> 6 == 0b10
        assert low <= raw <= high
    other = NotificationIds(SOURCE.next(MS), MS + 77)
    assert not set(made) & {other.of(user) for user in users}


# -- walking ----------------------------------------------------------------------------------------------


@given(
    st.dictionaries(st.integers(0, 30), st.lists(st.text("abc", min_size=1, max_size=3), unique=True)),
    st.lists(st.integers(1, 9), min_size=1),
)
def test_every_user_is_met_once(audience: dict[int, list[str]], sizes: list[int]) -> None:
    """Whatever the pages' sizes, walking meets each user once and marks each slot done once."""
    pending = [(slot, "") for slot in sorted(audience)]
    met: list[SlotUser] = []
    done: list[int] = []
    last: dict[int, str] = {}
    turn = 0
    while pending:
        limit = sizes[turn % len(sizes)]
        turn += 1
        page = [
            SlotUser(slot, user)
            for slot, before in pending
            for user in sorted(audience[slot])
            if user > before
        ][:limit]
        marks, rest = walked(pending, page, limit)
        met += page
        for mark in marks:
            done += [mark.slot] * mark.done
            last[mark.slot] = mark.last
        # Whoever goes on from the marks alone asks for the same.
        assert rest == [(slot, last.get(slot, "")) for slot in sorted(audience) if slot not in done]
        pending = rest
    assert sorted(met) == sorted(SlotUser(slot, user) for slot, users in audience.items() for user in users)
    assert sorted(done) == sorted(audience)


def test_a_page_out_of_order_is_refused() -> None:
    """A slot that comes again later would leave users out: nothing is marked."""
    page = [SlotUser(1, "a"), SlotUser(2, "a"), SlotUser(1, "b")]
    with pytest.raises(ValueError, match="not in order"):
        walked([(1, ""), (2, "")], page, 3)
    assert walked([(5, "x")], [], 3) == ([Mark(5, "x", True)], [])


@given(st.sets(st.text("abcdef", min_size=1, max_size=3), max_size=40), st.integers(1, 10))
def test_a_list_is_walked_by_slot(users: set[str], limit: int) -> None:
    """A list is met user by user, each in its own slot."""
    pending = [(slot, "") for slot in range(1024)]
    met: list[SlotUser] = []
    while pending:
        page = members("t", sorted(users), pending, limit)
        met += page
        _, pending = walked(pending, page, limit)
    assert sorted(one.user for one in met) == sorted(users)
    assert all(slot_of("t", user) == slot for slot, user in met)


# -- progress ---------------------------------------------------------------------------------------------

counts = st.builds(Counts, *[st.integers(0, 10**9)] * 6)


@given(st.sampled_from(STATES), counts, st.none() | st.integers(0, 10**9), st.integers(0, 10**9))
def test_progress_is_never_absurd(state: str, made: Counts, total: int | None, ran_ms: int) -> None:
    """Done is never more than the total, nothing is negative, what has ended has nothing to go."""
    found = progress(state, made, total, ran_ms)
    assert found.done == made.stored + made.failed
    assert found.total is None or found.total >= found.done
    assert found.remaining_s is None or found.remaining_s >= 0
    if state in ENDED:
        assert found.remaining_s == 0
    if state == DONE:
        assert found.total == found.done


def test_progress_by_hand() -> None:
    """84,000 of 200,000 in 7 s: 12,000 a second, and 9.7 s to go."""
    found = progress("running", Counts(stored=83_990, failed=10), 200_000, 7000)
    assert (found.done, found.total, found.rate_per_s) == (84_000, 200_000, 12_000.0)
    assert found.remaining_s == pytest.approx(9.67, abs=0.01)


@given(st.lists(st.sampled_from(["stored", "delivered", "queued", "deferred", "suppressed"])))
def test_counts_add_up(statuses: list[str]) -> None:
    """Counting in parts and adding is counting all."""
    middle = len(statuses) // 2
    assert counted(statuses[:middle]).plus(counted(statuses[middle:], 3)) == counted(statuses, 3)
    assert counted(statuses).stored == len(statuses)


def test_an_estimate_is_the_sample_times_the_slots() -> None:
    """3,125 users in 16 of 1,024 slots are about 200,000."""
    assert estimated(3125) == 200_000


# -- the lane ---------------------------------------------------------------------------------------------


@given(st.integers(1, 1000), st.floats(0, 10_000), st.floats(1, 1000))
def test_sizes_stay_in_their_bounds(size: int, took_ms: float, target_ms: float) -> None:
    """A chunk's size stays within its bounds and moves by half at most."""
    new = next_size(size, took_ms, target_ms, 50, 1000)
    assert 50 <= new <= 1000
    assert new >= min(1000, size // 2)
    assert new <= max(50, size * 1.5 + 2)


@given(st.floats(0.01, 1), st.floats(0.001, 1000))
def test_sizes_settle_where_a_chunk_takes_its_time(share: float, per_user_ms: float) -> None:
    """With a constant cost per user the size comes to what takes the target, and the lane to its share."""
    size = 50
    for _ in range(60):
        size = next_size(size, size * per_user_ms, 25.0, 1, 100_000)
    assert size == pytest.approx(max(1, 25 / per_user_ms), rel=0.05, abs=1)
    took_ms = size * per_user_ms
    assert took_ms / (took_ms + pause_ms(took_ms, share)) == pytest.approx(share)


def test_the_lane_waits_behind_single_events_for_so_long() -> None:
    """With nothing queued it goes; behind a queue it waits, but not for ever."""
    assert lane_turn(0, 0, 50)
    assert not lane_turn(1, 49, 50)
    assert lane_turn(1000, 50, 50)


def test_a_line_of_progress() -> None:
    """Bar, share, users, rate and what is left."""
    one: dict[str, Any] = {
        "state": "running",
        "users": {"done": 84_000, "total": 200_000},
        "ratePerS": 12_000.0,
        "counts": {"delivered": 1200, "queued": 0, "deferred": 0, "suppressed": 0, "failed": 0},
    }
    assert progress_line(one, None) == (
        "[#############                 ]  42%  84,000/200,000  12,000/s  10 s to go  1,200 delivered"
    )
    assert "5,800/s  20 s to go" in progress_line(one, 5800.0)
    one["users"] = {"done": 0, "total": None}
    assert progress_line(one | {"ratePerS": None}, None) == f"[{' ' * 30}]   0%  0/?  1,200 delivered"
