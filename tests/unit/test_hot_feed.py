"""What a cached feed may say."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from carillon.hot_feed import (
    MAX_ROWS,
    HotFeed,
    HotRow,
    Standing,
    count_of,
    decode_count,
    decode_feed,
    encode,
    extended,
    hot_count,
    page_of,
    unsure,
)

NOW = 1000


@st.composite
def feeds(draw: st.DrawFn) -> list[HotRow]:
    """All rows of a feed, newest first."""
    positions = sorted(draw(st.sets(st.integers(1, 400), max_size=130)), reverse=True)
    return [
        HotRow(
            position,
            position.to_bytes(16, "big"),
            draw(st.booleans()),
            draw(st.booleans()),
            draw(st.sampled_from((None, None, NOW - 1, NOW, NOW + 1))),
            f"{{{position}}}",
        )
        for position in positions
    ]


def truth(
    rows: list[HotRow], below: int, limit: int, read: bool | None, now_ms: int
) -> tuple[list[HotRow], bool]:
    """What Postgres answers: filter, then cut."""
    found = [
        row
        for row in rows
        if row.position < below
        and (row.expires_ms is None or row.expires_ms > now_ms)
        and (read is None or row.read == read)
    ]
    return found[:limit], len(found) > limit


@given(
    feeds(),
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 100)), min_size=1, max_size=6),
    st.integers(1, 410),
    st.integers(1, 100),
    st.sampled_from((None, True, False)),
    st.integers(0, 1),
)
def test_a_page_is_the_truth_or_a_miss(
    rows: list[HotRow],
    reads: list[tuple[int, int]],
    below: int,
    limit: int,
    read: bool | None,
    later: int,
) -> None:
    """However an entry was put together from pages, what it answers is what Postgres would, also later."""
    entry: HotFeed | None = None
    for at, size in reads:
        start = None if at == 0 or entry is None or not entry.rows else entry.rows[-1].position + 3 - at
        found, more = truth(rows, 10**9 if start is None else start, size, None, NOW)
        grown = extended(entry, "e", 7, start, found, not more)
        if grown is not None:
            entry = decode_feed(encode(grown))
            assert entry is not None
            assert len(entry.rows) <= MAX_ROWS
    assert entry is not None
    page = page_of(entry, below, limit, read, NOW + later)
    assert page is None or page == truth(rows, below, limit, read, NOW + later)


@given(feeds())
def test_a_whole_feed_is_never_a_miss(rows: list[HotRow]) -> None:
    """An entry that holds the whole feed answers every page of it."""
    found, more = truth(rows, 10**9, MAX_ROWS, None, NOW)
    entry = extended(None, "e", 7, None, found, not more)
    assert entry is not None
    assert entry.complete is not more
    if not more:
        for below in (1, 200, 401):
            for read in (None, True, False):
                assert page_of(entry, below, 5, read, NOW) == truth(rows, below, 5, read, NOW)


def test_pages_of_another_rev_are_not_put_together() -> None:
    """A page deep in the feed extends an entry of the same epoch and rev only; the top replaces it."""
    row = HotRow(9, bytes(16), False, True, None, "{}")
    entry = extended(None, "e", 7, None, [row], False)
    assert entry is not None
    older = HotRow(8, bytes(16), False, True, None, "{}")
    assert extended(entry, "e", 8, 9, [older], True) is None
    assert extended(entry, "f", 7, 9, [older], True) is None
    assert extended(None, "e", 7, 9, [older], True) is None
    assert extended(entry, "e", 7, 5, [older], True) is None  # a gap between 9 and 5
    grown = extended(entry, "e", 7, 9, [older], True)
    assert grown is not None
    assert ([one.position for one in grown.rows], grown.complete) == ([9, 8], True)
    replaced = extended(grown, "e", 8, None, [row], False)
    assert replaced is not None
    assert ([one.position for one in replaced.rows], replaced.complete, replaced.rev) == ([9], False, 8)


def test_what_may_have_been_acknowledged() -> None:
    """Rows without an acknowledgement are asked about, the others are not."""
    rows = [HotRow(n, bytes([n]), False, n % 2 == 0, None, "{}") for n in range(4)]
    assert unsure(rows) == [b"\1", b"\3"]


def test_a_count_is_true_for_its_rev_and_until_the_next_row_expires() -> None:
    """The count is the stream's, less what has expired; another rev, epoch or a later time is a miss."""
    entry = hot_count("e", 7, 2, NOW)
    assert count_of(entry, Standing("e", 7, 5), NOW - 1) == 3
    assert count_of(entry, Standing("e", 7, 5), NOW) is None
    assert count_of(entry, Standing("e", 8, 5), NOW - 1) is None
    assert count_of(entry, Standing("f", 7, 5), NOW - 1) is None
    assert count_of(hot_count("e", 7, 0, None), Standing("e", 7, 5), 10**15) == 5


@given(st.binary(max_size=200))
def test_garbage_is_a_miss(data: bytes) -> None:
    """Whatever stands in Redis, decoding gives an entry of this version or None."""
    feed, count = decode_feed(data), decode_count(data)
    assert feed is None or feed.version == 1
    assert count is None or count.version == 1


def test_entries_of_another_version_are_a_miss() -> None:
    """An entry whose form another version wrote is not read."""
    assert decode_feed(encode([2, "e", 7, True, []])) is None
    assert decode_feed(encode([1, "e", 7, True, []])) is not None
    assert decode_count(encode([2, "e", 7, 0, None])) is None
    assert decode_feed(None) is None
