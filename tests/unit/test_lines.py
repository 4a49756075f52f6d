"""Lines of a stream, however it is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from carillon.lines import TOO_LONG, LineSplitter


@given(st.binary(max_size=200).map(lambda raw: raw.replace(b"\xff", b"\n")), st.lists(st.integers(0, 200)))
def test_pieces_do_not_matter(stream: bytes, cuts: list[int]) -> None:
    """Whatever the pieces: the same lines with the same numbers, and those too long are told as such."""
    splitter = LineSplitter(10)
    found: list[tuple[int, bytes]] = []
    at = 0
    for cut in sorted({min(cut, len(stream)) for cut in cuts} | {len(stream)}):
        found += splitter.feed(stream[at:cut])
        assert len(splitter._rest) <= 10
        at = cut
    found += splitter.finish()
    lines = stream.split(b"\n")
    if not lines[-1]:
        lines.pop()
    assert splitter.number == len(lines)
    for number, line in enumerate(lines, 1):
        told = [one for at, one in found if at == number]
        text = line.strip(b" \t\r")
        if len(line) <= 10:
            assert told == ([text] if text else [])
        elif len(text) > 10:
            assert told == [TOO_LONG]
        else:
            assert told in ([text], [], [TOO_LONG])  # blanks around it made it too long, or did not
    assert [number for number, _ in found] == sorted({number for number, _ in found})
