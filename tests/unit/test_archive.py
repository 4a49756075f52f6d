"""The archive's format."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.archive import (
    Line,
    Search,
    describe,
    folder_of,
    join_lines,
    manifest,
    read_line,
    read_manifest,
    split_lines,
    text_matches,
    words_of,
)
from carillon.errors import ArchiveError
from carillon.notification import encode_content
from carillon.retention import Month, least_id

MONTH = Month(2026, 3)
USERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)


def line_of(user: str, number: int = 1, created: str = "2026-03-05T10:00:00+00:00", **content: Any) -> Line:
    made = uuid.UUID(int=least_id(MONTH.start_ms + number).int | number)
    row = {
        "id": str(made), "type": content.get("type", "t"), "created_at": created,
        "content": encode_content({"type": "t", "title": "x"} | content),
    }  # fmt: skip
    told = {"user": user, "notification": row, "deliveries": [], "amendments": [], "exposure": None}
    return Line(made, user, json.dumps(told, ensure_ascii=False).encode())


@given(st.lists(st.tuples(USERS, st.integers(1, 10_000)), min_size=1, unique_by=lambda one: one[1]))
def test_lines_come_back(shapes: list[tuple[str, int]]) -> None:
    """Every line once, by user and id; the manifest says what they span, and reads back as it was."""
    lines = [line_of(user, number, title="a\u2028b\x85c\r") for user, number in shapes]
    raw = join_lines(lines)
    back = split_lines(raw)
    assert sorted(back) == sorted(lines)
    assert [(one.user, one.id.int) for one in back] == sorted((one.user, one.id.int) for one in lines)
    part = describe(uuid.uuid4(), "a/b..", MONTH, back, raw, 17)
    assert (part.rows, part.raw_bytes) == (len(lines), len(raw))
    assert all(
        part.may_hold(one.user) and part.first_id.int <= one.id.int <= part.last_id.int for one in lines
    )
    assert read_manifest(manifest(part)) == part


def test_what_is_cut_is_not_read() -> None:
    """A part that ends within a line, a line that is none, and a manifest of a later version are refused."""
    whole = line_of("ada").raw + b"\n"
    for raw in (whole[:-1], b"{}\n", b'{"user":"a","notification":{"id":"x"}}\n', b"\xff\n"):
        with pytest.raises(ArchiveError):
            split_lines(raw)
    part = describe(uuid.uuid4(), "t", MONTH, split_lines(whole), whole, 1)
    for raw in (
        b"",
        b"[]",
        b"{}",
        manifest(part).replace(b'"version": 1', b'"version": 2'),
        manifest(part)[:-20],
    ):
        with pytest.raises(ArchiveError):
            read_manifest(raw)


def test_a_tenant_is_one_folder() -> None:
    """Whatever it is called."""
    assert folder_of("../x y", MONTH) == "tenant=..%2Fx%20y/month=2026-03"


def test_words_of_texts() -> None:
    """In any case, by their beginnings, in compatibility forms; in scripts without blanks anywhere."""
    assert text_matches(words_of("GRAZ tra"), "Trains to Graz")
    assert not text_matches(words_of("raz"), "Trains to Graz")
    assert text_matches(words_of("ﬁne"), "all FINE")
    assert text_matches(words_of("電車"), "次の電車は")
    assert text_matches([], "whatever")


@given(
    user=st.sampled_from([None, "ada", "bob"]), kind=st.sampled_from([None, "t", "chat"]),
    text=st.sampled_from([None, "hel", "zzz"]), since=st.sampled_from([None, 4, 6]),
    until=st.sampled_from([None, 4, 6]),
)  # fmt: skip
def test_a_search_finds_what_has_all_of_it(
    user: str | None, kind: str | None, text: str | None, since: int | None, until: int | None
) -> None:
    """The manifest and a line's head never exclude what the whole line would match."""
    line = line_of("ada", 3, type="t", title="Hello")
    raw = line.raw + b"\n"
    part = describe(uuid.uuid4(), "t", MONTH, [line], raw, 1)
    day = 86_400_000

    def at(number: int | None) -> int | None:
        return None if number is None else MONTH.start_ms + number * day

    wanted = Search(user, None, kind, text, at(since), at(until))
    found = wanted.may_hold(part) and wanted.matches_head(line) and wanted.matches(read_line(line.raw))
    assert found == (
        user in (None, "ada")
        and kind in (None, "t")
        and text in (None, "hel")
        and since in (None, 4)
        and until in (None, 6)
    )
