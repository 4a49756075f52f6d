"""Pushes kept in their notification: what signals make of them, and what their text tells."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from carillon.attention import ACTIVE, AWAY, DONE, HELD, KEEP, RECEIVED, SILENT, STALE, on_signal
from carillon.kept_push import KeptPush, exported, history

NOW = 1_800_000_000_000
RAW = bytes(16)

pushes = st.builds(
    KeptPush,
    notification=st.just(RAW),
    stream_id=st.just(1),
    slot=st.just(2),
    channels=st.lists(st.sampled_from(("push", "email", "fcm")), min_size=1, max_size=2, unique=True),
    due_ms=st.integers(NOW - 1000, NOW + 9000),
    hold_until_ms=st.none() | st.integers(NOW - 1000, NOW + 60_000),
    gate=st.sampled_from((None, HELD)),
    reason=st.sampled_from((None, "viewing")),
    chain=st.sampled_from(("", "email,sms")),
    step=st.integers(0, 2),
    shown_on=st.lists(st.sampled_from(("phone", "pad")), unique=True),
)
signals = st.sampled_from((ACTIVE, AWAY, DONE, KEEP, RECEIVED, SILENT, STALE))
devices = st.sampled_from(("", "phone", "phone\npad", 'a "b"'))


@given(pushes, signals, devices)
def test_it_follows_signals_as_a_row_of_the_outbox_does(push: KeptPush, signal: str, shown: str) -> None:
    """Ended, due or held exactly where `on_signal` says so of a planned row; what shows it gets no push."""
    before = replace(push)
    holdable = push.hold_until_ms is not None and push.hold_until_ms > NOW
    expected = on_signal(signal, "planned", push.gate, holdable)
    what, text = push.follow(signal, shown, NOW)
    assert what == {"cancel": "end", "due": "write"}.get(expected, "keep")
    [told] = history(text, 1, None)[:1]
    assert told["state"] == ("cancelled" if expected == "cancel" else "planned")
    if expected == "hold":
        assert (push.gate, push.due_ms) == (HELD, before.hold_until_ms)
    elif expected == "due":
        assert push.due_ms == NOW
    elif expected == "none":
        assert push == before
    if expected in ("hold", "show", "due"):
        assert set(push.shown_on) == {*before.shown_on, *filter(None, shown.split("\n"))}


@given(pushes, signals, devices)
def test_a_signal_that_is_told_again_changes_nothing(push: KeptPush, signal: str, shown: str) -> None:
    """A statement that failed is said once more: the second answer leaves the push as the first did."""
    push.follow(signal, shown, NOW)
    once = replace(push)
    push.follow(signal, shown, NOW)
    assert push == once


@given(pushes)
def test_its_text_tells_every_channel(push: KeptPush) -> None:
    """While it waits the history has one planned row for each channel, with its due time and chain."""
    rows = history(push.text(), NOW, None)
    assert [row["channel"] for row in rows] == push.channels
    for row in rows:
        assert (row["state"], row["due_ms"], row["chain"], row["step"], row["reason"]) == (
            "planned", push.due_ms, push.chain, push.step, push.reason,
        )  # fmt: skip


def test_what_ended_says_why() -> None:
    """An acknowledgement, or a user who was active when its time came; exports say the same."""
    push = KeptPush(RAW, 1, 2, ["push"], NOW + 5000, NOW + 60_000)
    _, text = replace(push).follow(SILENT, "", NOW)
    [row] = history(text, NOW, NOW + 80)
    assert (row["state"], row["reason"], row["updated_ms"]) == ("cancelled", "acknowledged", NOW + 80)
    [told] = exported(text, NOW, NOW + 80)
    assert (told["state"], told["reason"], told["tries"]) == ("cancelled", "acknowledged", [])
    push.follow(ACTIVE, "phone", NOW)
    _, text = push.follow(DONE, "", NOW + 60_000)
    [row] = history(text, NOW, NOW + 80)
    assert (row["state"], row["reason"], row["updated_ms"]) == ("cancelled", "active", NOW + 60_000)
