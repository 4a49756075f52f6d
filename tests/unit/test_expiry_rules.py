"""`expiresAt`: one moment, at which a notification is over for everybody who has to do with it."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from carillon import edits, merge_windows
from carillon.clock import rfc3339
from carillon.errors import ExpiredError
from carillon.events import EventParser
from carillon.hot_feed import HotFeed, HotRow, Standing, count_of, hot_count, page_of
from carillon.ids import Uuid7Source
from carillon.merge_rules import COUNT, DROP
from carillon.merge_windows import KnownWindow
from carillon.merging import OPENED, Ask, Merger, Window
from carillon.messages import Event
from carillon.messages_push import PushResult
from carillon.notification import NotificationRow, gone
from carillon.outbox import settle
from carillon.recent import LogEntry, Recent
from carillon.settings import MergeSettings
from channels.fcm import fcm_message
from tests.push_kit import job_of, target_of

NOW = 1_800_000_000_000
# At the moment, a millisecond beside it, or anywhere.
AHEAD = st.sampled_from([-1, 0, 0, 1]) | st.integers(-10_000, 10_000)


def row_of(expires_ms: int | None) -> NotificationRow:
    return NotificationRow(bytes(16), 1, 1, 1, '"type":"t","title":"x"', expires_ms=expires_ms)


def merged(expires_ms: int | None, how: str) -> bool:
    """Whether an event like it would become part of it, or be dropped for it."""
    merger = Merger(NOW, MergeSettings())
    merger.know([Window(1, "key", row_of(expires_ms), 1, NOW + 60_000, 1, 1, NOW, False)])
    event = Event(bytes(15) + b"\1", "t", "u", 1, "t", None, 1, "", NOW)
    ask = Ask(how, "key", "key", 60_000, "event", None)
    found = merger.decide(1, event, (ask,), {"type": "t", "title": "y"}, filed=False, priority=1)
    return found.status != OPENED


@given(AHEAD | st.none(), st.sampled_from([COUNT, DROP]))
def test_everybody_sees_the_same_end(ahead_ms: int | None, how: str) -> None:
    """To the millisecond: to devices that come back, in the feed, in the unread count, for edits, and for
    what says the same; without an end it never is over."""
    expires_ms = None if ahead_ms is None else NOW + ahead_ms
    over = ahead_ms is not None and ahead_ms <= 0
    row = row_of(expires_ms)
    assert gone(row, NOW) == over
    assert isinstance(edits.over(expires_ms, None, NOW), ExpiredError) == over
    feed = HotFeed(1, "e", 1, True, [HotRow(1, bytes(16), False, True, expires_ms, "{}")])
    assert page_of(feed, 10, 10, None, NOW) == ([] if over else feed.rows, False)
    assert page_of(feed, 10, 10, True, NOW) == ([], False), "unread"
    counted = hot_count("e", 1, 0, expires_ms)
    assert count_of(counted, Standing("e", 1, 5), NOW) == (None if over else 5), "counted anew"
    window = KnownWindow(how, NOW - 1000, NOW + 60_000, "event", 1, 1, NOW)
    assert merge_windows.closed_by(window, row, False, NOW) == ("expired" if over else None)
    assert merged(expires_ms, how) == (not over)


@given(
    st.integers(0, 250_000_000_000_000), st.integers(-14 * 60, 14 * 60), st.sampled_from(["", ".0", ".12"])
)
def test_the_end_is_the_one_that_was_written(at_s_ms: int, offset_min: int, fraction: str) -> None:
    """Whatever the offset and however many digits: the instant, in the content and as a number."""
    at_ms = at_s_ms // 1000 * 1000 + offset_min * 60_000
    if not at_ms - offset_min * 60_000 >= 0 or at_ms < 0:
        return
    sign, hours, minutes = "-+"[offset_min >= 0], abs(offset_min) // 60, abs(offset_min) % 60
    text = f"{rfc3339(at_ms)[:19]}{fraction}{sign}{hours:02}:{minutes:02}"
    body = f'{{"userId":"u","type":"t","title":"x","expiresAt":"{text}"}}'.encode()
    (event,) = EventParser(Uuid7Source()).parse(body, "t", NOW).events
    wanted = at_ms - offset_min * 60_000 + {"": 0, ".0": 0, ".12": 120}[fraction]
    assert event.expires_ms == wanted
    assert f'"expiresAt":"{rfc3339(wanted)}"' in event.content


RESULTS = st.lists(
    st.builds(
        lambda outcome, after: PushResult("d", outcome, 500, "", "x", after),
        st.sampled_from(["failed", "failed", "unknown", "sent", "dead"]),
        st.sampled_from([0.0, 0.0, 1.0, 7.5]),
    ),
    min_size=1,
    max_size=3,
)


@given(RESULTS, st.integers(1, 3), st.integers(1, 20_000), st.floats(0, 0.999), st.booleans())
def test_no_push_is_tried_at_or_after_the_end(
    results: list[PushResult], attempt: int, ahead_ms: int, draw: float, before: bool
) -> None:
    """A try that would come too late is not waited for, and nothing falls back for what is over; one that
    comes in time is made as if there were no end."""
    told: dict[str, Any] = {
        "max_attempts": 4, "base_s": 1.0, "now_ms": NOW, "jitter": lambda: draw, "sent_before": before,
    }  # fmt: skip
    endless = settle(results, attempt, expires_ms=None, **told)
    found = settle(results, attempt, expires_ms=NOW + ahead_ms, **told)
    if endless.state not in ("failed", "unknown") or endless.due_ms < NOW + ahead_ms:
        assert found == endless
    else:
        assert found.state in ("dead", "sent")
        sent = before or any(one.outcome == "sent" for one in results)
        assert (found.state == "sent") == sent
        assert sent or not found.onward


@given(AHEAD | st.none(), st.integers(1, 4000))
def test_a_phone_that_is_off_does_not_show_it_after_the_end(ahead_ms: int | None, ttl_s: int) -> None:
    """What the provider is told to keep is never kept longer than until then."""
    job = job_of(expires_ms=None if ahead_ms is None else NOW + ahead_ms)
    kept_s = fcm_message(job, target_of("abc"), now_ms=NOW, ttl_s=float(ttl_s)).android.ttl.total_seconds()
    assert 0 <= kept_s <= ttl_s
    if ahead_ms is None:
        assert kept_s == ttl_s
    else:
        assert kept_s * 1000 <= max(0, ahead_ms)
        assert kept_s >= min(ttl_s, max(0, ahead_ms) // 1000)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["new", "update", "update", "expire", "expire"]),
        st.integers(1, 3),
        st.none() | st.integers(0, 40),
    ),
    max_size=20,
)


@settings(max_examples=300)
@given(STEPS)
def test_the_recent_window_shows_no_more_than_what_is_not_over(
    steps: list[tuple[str, int, int | None]],
) -> None:
    """Whatever is added, changed and put off: who comes back is shown exactly what by the last word on it is
    not over; who saw it before it changed is told that it is gone."""
    recent = Recent(100, 0)
    now_ms, rev = 0, 0
    frames: dict[bytes, list[tuple[int, bytes]]] = {}
    ends: dict[bytes, int | None] = {}
    over: dict[bytes, int] = {}
    changed: set[bytes] = set()
    for step, number, at in steps:
        raw = number.to_bytes(16, "big")
        if step == "expire":
            now_ms += (at or 0) // 4
            recent.expire(now_ms)
            for one, until_ms in ends.items():
                if until_ms is not None and until_ms <= now_ms:
                    over.setdefault(one, frames[one][-1][0])
        elif raw in over or (step == "new") == (raw in frames):
            continue
        else:
            rev += 1
            frame = b"%s %d" % (step.encode(), rev)
            until_ms = None if at is None else now_ms + at
            recent.add(LogEntry(rev, rev if step == "new" else 0, frame, step == "update", raw, until_ms))
            frames.setdefault(raw, []).append((rev, frame))
            ends[raw] = until_ms
            if step == "update":
                changed.add(raw)
    wanted = [frame for raw, some in frames.items() if raw not in over for frame in some]
    gone_at = [at for raw, at in over.items() if raw in changed]
    told = recent.missed(0, 0)
    assert sorted(e.frame for e in told if b"RETRACTED" not in e.frame) == sorted(f for _, f in wanted)
    assert sorted(e.rev for e in told if b"RETRACTED" in e.frame) == sorted(gone_at)
    left = [until_ms for raw, until_ms in ends.items() if until_ms is not None and raw not in over]
    if left:
        assert recent.next_expiry_ms is not None
        assert recent.next_expiry_ms <= min(left), "it is looked at in time"
