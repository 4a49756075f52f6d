"""Windows that are not known to be open are not, whatever was forgotten."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from actors.shard_windows import KnownWindows
from carillon.merge_begun import number_of

DAY_MS = 86_400_000
NOW = 1_800_000_000_000
KEYS = [f"drop:{n:032x}" for n in range(6)]
streams = st.integers(1, 3)
keys = st.sampled_from(KEYS)
spans = st.sampled_from((1, 2, 900, 60_000, 300_000, DAY_MS))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("asked"), streams, keys, spans),
        st.tuples(st.just("opened"), streams, keys, spans),
        st.tuples(st.just("elsewhere"), streams, keys, spans),
        st.tuples(st.just("later"), streams, keys, spans),
        st.tuples(st.just("back"), streams, keys, spans),
    ),
    max_size=60,
)


def perhaps(known: KnownWindows, windows: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Those that may be open."""
    return known.perhaps(windows, [number_of(*window) for window in windows])


@given(steps, st.integers(1, 5), st.integers(1, 4))
def test_what_is_open_is_perhaps_open(
    taken: list[tuple[str, int, str, int]], most: int, learned: int
) -> None:
    """Opened here, or by another shard under a term before: it is asked of, however little is remembered.

    Whatever the clock does, and however many are open when they are learned.
    """
    known, term, now_ms, stored = KnownWindows(most), 1, NOW, dict[tuple[int, str], int]()
    for what, stream, key, ms in taken:
        window = (stream, key)
        if what == "opened":
            known.under(term, now_ms)
            known.opened([(*window, now_ms + ms)])
            stored[window] = now_ms + ms
        elif what == "elsewhere":  # the slot was another shard's for a while
            stored[window] = now_ms + ms
            term += 1
        elif what == "later":
            now_ms += ms
        elif what == "back":
            now_ms -= ms // 3
        else:
            known.under(term, now_ms)
            unlearned = known.unlearned([stream])
            if unlearned:
                rows = [(*w, end) for w, end in stored.items() if w[0] in unlearned and end > now_ms]
                known.learn(unlearned, rows[:learned], learned)
            assert stored.get(window, 0) <= now_ms or perhaps(known, [window]) == [window]


def test_what_is_not_open_is_not_asked_of() -> None:
    """Once a stream is learned, a key that nobody opened costs nothing."""
    known = KnownWindows(100)
    known.under(1, NOW)
    assert known.unlearned([7, 7]) == [7]
    known.learn([7], [(7, KEYS[0], NOW + 1000)], 10)
    assert known.unlearned([7]) == []
    assert perhaps(known, [(7, KEYS[0]), (7, KEYS[1])]) == [(7, KEYS[0])]


def test_what_ended_long_ago_is_forgotten() -> None:
    """A window is remembered for four times its length at most, and the stream stays learned."""
    known = KnownWindows(100)
    known.under(1, NOW)
    known.learn([7], [], 10)
    known.opened([(7, KEYS[0], NOW + 60_000), (7, KEYS[1], NOW + 3_600_000)])
    known.under(1, NOW + 100_000)
    known.under(1, NOW + 240_000)
    assert known.unlearned([7]) == []
    assert perhaps(known, [(7, KEYS[0]), (7, KEYS[1])]) == [(7, KEYS[1])]


def test_a_stream_with_many_windows_is_learned_after_a_day() -> None:
    """What is too much to read is asked of one by one until it has ended; what began since is known."""
    known = KnownWindows(100)
    known.under(1, NOW)
    known.learn([7], [(7, key, NOW + DAY_MS) for key in KEYS[:3]], 3)
    assert known.unlearned([7]) == []
    assert perhaps(known, [(7, KEYS[5])]) == [(7, KEYS[5])]
    known.under(1, NOW + DAY_MS - 1)
    assert known.unlearned([7]) == []
    assert perhaps(known, [(7, KEYS[5])]) == [(7, KEYS[5])]
    known.opened([(7, KEYS[4], NOW + DAY_MS + 60_000)])
    known.under(1, NOW + DAY_MS)
    assert known.unlearned([7]) == []
    assert perhaps(known, [(7, KEYS[4]), (7, KEYS[5])]) == [(7, KEYS[4])]
