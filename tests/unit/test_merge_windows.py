"""What `explain` says of a merge window is what merging does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from carillon import merge_windows, merging
from carillon.merge_rules import AGGREGATE, COUNT, DROP, MergeRule
from carillon.merge_windows import KnownWindow
from carillon.merging import DUPLICATE, LOUD, OPENED, Ask, Merger, Window
from carillon.messages import Event
from carillon.notification import NotificationRow
from carillon.settings import MergeSettings

NOW = 1_800_000_000_000
SETTINGS = MergeSettings()
moments = st.sampled_from((None, NOW - 1000))


def row_of(
    read: int | None, dismissed: int | None, archived: int | None, retracted: int | None, expires: int | None
) -> NotificationRow:
    return NotificationRow(
        bytes(16), 1, 1, 1, '"type":"t","title":"x"', None, None, read, None, dismissed, archived, retracted,
        None, expires,
    )  # fmt: skip


@given(
    st.sampled_from((DROP, COUNT, AGGREGATE)), st.sampled_from((NOW - 1, NOW, NOW + 60_000)),
    moments, moments, moments, moments, st.sampled_from((None, NOW - 5, NOW + 5)), st.booleans(),
)  # fmt: skip
def test_a_window_is_open_as_long_as_it_takes_in_others(
    how: str, ends_ms: int, read: int | None, dismissed: int | None, archived: int | None,
    retracted: int | None, expires: int | None, cancelled: bool,
) -> None:  # fmt: skip
    """Whatever became of the notification: open is said when the next event would become part of it."""
    row = row_of(read, dismissed, archived, retracted, expires)
    merger = Merger(NOW, SETTINGS)
    merger.know([Window(1, "key", row, 1, ends_ms, 1, 1, NOW, cancelled)])
    event = Event(bytes(15) + b"\1", "t", "u", 1, "t", None, 1, "", NOW)
    ask = Ask(how, "key", "key", 60_000, "event", None)
    decision = merger.decide(1, event, (ask,), {"type": "t", "title": "y"}, filed=False, priority=1)
    known = KnownWindow(how, NOW - 60_000, ends_ms, "event", 1, 1, NOW)
    closed = merge_windows.closed_by(known, row, cancelled, NOW)
    assert (closed is None) == (decision.status != OPENED)
    assert (decision.status == DUPLICATE) <= (how == DROP)
    told = merge_windows.told(known, row, None, SETTINGS, NOW, cancelled=cancelled)
    assert (told["open"], told["closedBy"]) == (closed is None, closed)


@given(st.integers(0, 400_000), st.sampled_from((None, 0, 90_000)), st.integers(0, 500_000))
def test_what_is_merged_disturbs_again_when_it_says_so(
    since_ms: int, renotify_ms: int | None, later_ms: int
) -> None:
    """Before `renotifyAt` an event is quiet, from then on it is not."""
    rule = None if renotify_ms is None else MergeRule(COUNT, 0, renotify_ms, {})
    known = KnownWindow(COUNT, NOW - since_ms, NOW + 3_600_000, "tenant", 2, 2, NOW - since_ms)
    told = merge_windows.told(
        known, row_of(None, None, None, None, None), rule, SETTINGS, NOW, cancelled=False
    )
    again_ms = known.notified_ms + round(told["renotifyS"] * 1000)
    target = merging.Target(b"", 1, 1, None, {}, "t", None, 1, None, 2, 2, known.notified_ms)
    at_ms = NOW + later_ms
    notice, _ = merging.notify(target, at_ms, at_ms, round(told["renotifyS"] * 1000), urgent=False)
    assert (notice == LOUD) == (at_ms >= again_ms)
    assert ("disturbs as a new one" in told["words"]) == (again_ms <= NOW)


def test_the_words_of_a_window() -> None:
    """Rule, who asked, end, count, and when the user may be told again."""
    known = KnownWindow(AGGREGATE, NOW - 60_000, NOW + 3_540_000, "event", 3, 3, NOW - 60_000)
    told = merge_windows.told(
        known, row_of(None, None, None, None, None), None, SETTINGS, NOW, cancelled=False
    )
    words = told.pop("words")
    assert told == {
        "how": "aggregate", "source": "event", "windowS": 3600.0, "endsAt": "2027-01-15T08:59:00.000Z",
        "open": True, "closedBy": None, "events": 3, "count": 3, "notifiedAt": "2027-01-15T07:59:00.000Z",
        "renotifyS": 300.0, "renotifyAt": "2027-01-15T08:04:00.000Z",
    }  # fmt: skip
    assert words == (
        "The rule: events about the same target are gathered for 1 h (the event asks for it). The window is"
        " open until 2027-01-15T08:59:00.000Z. 3 events are in it, and it counts 3 different actors. The user"
        " was told of it at 2027-01-15T07:59:00.000Z: what comes before 2027-01-15T08:04:00.000Z is shown"
        " quietly, and its push comes then."
    )
    read = merge_windows.told(
        known, row_of(NOW, None, None, None, None), None, SETTINGS, NOW, cancelled=False
    )
    assert "The window is closed: it was read." in read["words"]
    assert (read["renotifyAt"], read["closedBy"]) == (None, "read")
