"""Windows that are not known to be open are not, whatever was forgotten."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from actors.shard_windows import KnownWindows

streams = st.integers(1, 3)
keys = st.sampled_from("abcdef")
steps = st.lists(
    st.one_of(
        st.tuples(st.just("asked"), streams, keys),
        st.tuples(st.just("opened"), streams, keys),
        st.tuples(st.just("ended"), streams, keys),
        st.tuples(st.just("elsewhere"), streams, keys),
    ),
    max_size=60,
)


@given(steps, st.integers(1, 5))
def test_what_is_open_is_perhaps_open(taken: list[tuple[str, int, str]], most: int) -> None:
    """Opened here, or by another shard under a term before: it is asked of, however little is remembered."""
    known, term, stored = KnownWindows(most), 1, set[tuple[int, str]]()
    for what, stream, key in taken:
        window = (stream, key)
        if what == "opened":
            known.opened([window])
            stored.add(window)
        elif what == "ended":
            stored.discard(window)
        elif what == "elsewhere":  # the slot was another shard's for a while
            stored.add(window)
            term += 1
        else:
            known.under(term)
            unlearned = known.unlearned([stream])
            if unlearned:
                known.learn(unlearned, [w for w in stored if w[0] in unlearned])
            assert window not in stored or known.perhaps([window]) == [window]


def test_what_is_not_open_is_not_asked_of() -> None:
    """Once a stream is learned, a key that nobody opened costs nothing."""
    known = KnownWindows(100)
    known.under(1)
    assert known.unlearned([7, 7]) == [7]
    known.learn([7], [(7, "a")])
    assert known.unlearned([7]) == []
    assert known.perhaps([(7, "a"), (7, "b")]) == [(7, "a")]
