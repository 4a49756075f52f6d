"""What closed a push, in words: also where a fallback followed, and where nobody was left to get it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon import endings
from carillon.outbox import left_out_told, without_target
from carillon.switches import Fired
from serve.routes.explain import scheduled_words
from stores.postgres.feed import Target

NOW_MS = 1_780_000_000_000
ABOUT = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=20)
REASONS = st.one_of(
    st.sampled_from(sorted(endings.ENDINGS)),
    st.builds(
        endings.closed,
        st.sampled_from(["preferences", "rate_limit"]),
        st.builds(
            Fired, st.sampled_from(["type_channel_off", "rate_limit"]), st.just("user"), st.none() | ABOUT
        ),
    ),
    st.builds("merged into {}".format, st.uuids()),
    st.builds("no {} target".format, st.sampled_from(["push", "fcm", "apns"])),
    st.builds("no push target; left out: {} (ios)".format, ABOUT),
)


@given(REASONS, st.sampled_from(["push", "fcm", "apns"]), st.sampled_from(["cancelled", "dead"]))
def test_a_fallback_behind_it_changes_no_ending(reason: str, following: str, state: str) -> None:
    """Rule, source and what it is about stay; the words say which channel followed."""
    alone = endings.ending("push", state, reason)
    chained = endings.ending("push", state, f"{reason}; falls back to {following}")
    assert alone is not None
    assert chained == alone | {"words": f"{alone['words']} It fell back to {following}."}


@given(st.none() | st.text(), st.sampled_from(["push", "fcm"]))
def test_a_reason_is_split_from_what_followed(reason: str | None, following: str) -> None:
    """As the statement joins them, a row without a reason of its own too."""
    joined = "; ".join([*([] if reason is None else [reason]), f"falls back to {following}"])
    assert endings.onward(joined) == (reason or "", following)
    assert endings.onward("gave up after 2 tries: X") == ("gave up after 2 tries: X", None)
    assert endings.ending("push", "dead", f"invalid_target: gone; falls back to {following}") is None


@pytest.mark.parametrize("channel", ["push", "fcm", "apns"])
def test_nobody_left_is_an_ending(channel: str) -> None:
    """No target, or none of the platforms of the type: it is told which."""
    for step, chain in ((0, ""), (1, "")):
        state, reason = without_target(channel, step, chain)
        bare = endings.ending(channel, state, reason)
        assert bare == {
            "rule": "no_target", "source": "system", "about": None,
            "words": f"The user had no target for {channel} when that was due.",
        }  # fmt: skip
        others = left_out_told([Target("pad", "android", "fcm")])
        ruled = endings.ending(channel, state, f"{reason}; {others}; falls back to apns")
        assert ruled is not None
        assert (ruled["rule"], ruled["source"], ruled["about"]) == ("no_device", "tenant", "pad (android)")
        assert ruled["words"].endswith("platform: pad (android). It fell back to apns.")


def test_what_was_sent_late_says_when() -> None:
    """Within a second it was sent as asked; beyond, both times are told."""
    asked = "2026-05-28T20:26:40.000Z"
    for late_ms in (0, 40, 1000):
        words = scheduled_words(NOW_MS, NOW_MS + late_ms)
        assert words == f"It was sent on {asked}, as its scheduleAt said."
    words = scheduled_words(NOW_MS, NOW_MS + 61_500)
    assert words == f"It was sent on 2026-05-28T20:27:41.500Z; its scheduleAt said {asked}."
