"""What a notification's row says of its windows is what they are, and where they are found."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from carillon.merge_begun import Opening, open_slots, pack, slot_of, slots_at, unpack

DAY_MS = 86_400_000
digests = st.binary(min_size=16, max_size=16).map(bytes.hex)
keys = st.builds("{}:{}".format, st.sampled_from(("drop", "count", "aggregate")), digests)
times = st.integers(1_600_000_000_000, 4_000_000_000_000)
spans = st.integers(1, DAY_MS)
actors = st.none() | st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=128)


@given(st.sampled_from(("event", "tenant")), times, st.integers(0, DAY_MS), actors, st.data())
def test_nothing_is_lost_in_the_row(
    source: str, at_ms: int, later_ms: int, actor: str | None, data: st.DataObject
) -> None:
    """It is JSON, and reads as it was written, whatever the actor is called."""
    windows = tuple(
        (key, at_ms + ms) for key, ms in data.draw(st.lists(st.tuples(keys, spans), min_size=1, max_size=2))
    )
    opening = Opening(source, at_ms, at_ms + later_ms, actor, windows)
    assert unpack(pack(opening)) == opening
    assert json.loads(pack(opening))[3] == actor
    assert opening.how == windows[-1][0].split(":")[0]


@given(keys, times, spans, st.integers(0, DAY_MS))
def test_a_window_is_found_until_it_ends(key: str, at_ms: int, span_ms: int, after_ms: int) -> None:
    """In one of two slots at every moment of it, and among all that may be open; each fits a bigint."""
    slot = slot_of(key, at_ms + span_ms)
    now_ms = at_ms + after_ms % span_ms
    assert slot in slots_at(key, now_ms)
    least, greatest = open_slots(now_ms)
    assert least <= slot <= greatest
    assert greatest < 1 << 63


@given(keys, keys, times)
def test_only_windows_in_their_slots_are_its_own(one: str, other: str, at_ms: int) -> None:
    """A slot that was given up is that of a window that began anew elsewhere."""
    windows = ((one, at_ms + 1000), (other, at_ms + 2000))
    opening = Opening("event", at_ms, at_ms, None, windows)
    assert opening.found_by((slot_of(*windows[0]), slot_of(*windows[1]))) == list(windows)
    assert opening.found_by((None, None)) == []
    if slot_of(*windows[0]) != slot_of(*windows[1]):
        assert opening.found_by((None, slot_of(*windows[1]))) == [windows[1]]
