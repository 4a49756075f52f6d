"""Edits of notifications: what a patch may hold, and what it makes of a content."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon import edits
from carillon.errors import ExpiredError, InvalidInputError, RetractedError, VersionError
from carillon.event_rules import explain_event
from carillon.notification import decode_content, encode_content
from carillon.problems import DocumentError

BEFORE = encode_content(
    {
        "type": "t", "title": "before", "body": "text", "link": "https://example.com", "priority": "high",
        "createdAt": "2026-01-01T00:00:00.000Z", "data": {"a": 1}, "actions": [{"id": "x"}],
        "channelContent": {"apns": {"title": "short", "body": "s"}, "push": {"link": "app://1"}},
    }
)  # fmt: skip

TEXT = st.text("ab é\n\x00\x85\ud800", max_size=12)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "title": st.one_of(st.none(), TEXT),
    "body": st.one_of(st.none(), TEXT),
    "link": st.one_of(st.none(), TEXT),
    "imageUrl": st.one_of(st.none(), TEXT),
    "icon": st.one_of(st.none(), TEXT),
    "data": st.one_of(st.none(), st.dictionaries(TEXT, st.integers(), max_size=3), TEXT),
    "actions": st.one_of(
        st.none(), st.lists(st.dictionaries(st.sampled_from(("id", "label", "x")), TEXT), max_size=3)
    ),
    "expiresAt": st.sampled_from((None, "2030-01-01T00:00:00Z", "2030-01-01T00:00:00", "soon", 7)),
}


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_an_edit_follows_the_rules_of_an_event(patch: dict[str, Any]) -> None:
    """What a patch may hold is what an event may; applied, exactly the named members are different."""
    event = {"userId": "u", "type": "t", "title": "x"} | patch
    refusal = explain_event(event, recipients=True)
    if refusal is not None:
        with pytest.raises(DocumentError):
            edits.read_patch(patch)
        return
    read = edits.read_patch(patch)
    made = edits.edited(BEFORE, None, read.members)
    before = decode_content(BEFORE)
    if made is None:
        return
    after = decode_content(made.content)
    for name in before.keys() | after.keys():
        if name not in patch and name != "channelContent":
            assert after.get(name) == before.get(name), name
    for name, value in patch.items():
        if name in ("title", "body", "link", "imageUrl", "icon", "data"):
            assert after.get(name) == ({} if name == "data" and value is None else value)
    assert edits.edited(made.content, made.expires_ms, read.members) is None, "the same again changes nothing"
    assert encode_content(after) == made.content


def test_a_text_of_its_own_follows_the_edit() -> None:
    """A channel's own title from a template would be the old one: it goes; its other texts stay."""
    made = edits.edited(BEFORE, None, json.dumps({"title": "after"}))
    assert made is not None
    assert made.shown
    assert decode_content(made.content)["channelContent"] == {
        "apns": {"body": "s"},
        "push": {"link": "app://1"},
    }
    all_of_it = edits.edited(BEFORE, None, json.dumps({"title": "a", "body": "b", "link": None}))
    assert all_of_it is not None
    assert "channelContent" not in decode_content(all_of_it.content)


def test_what_no_push_shows_replaces_none() -> None:
    """Data, actions, icon and image are not part of a push."""
    for patch in ({"data": {}}, {"actions": []}, {"icon": "x"}, {"imageUrl": "y"}, {"expiresAt": None}):
        made = edits.edited(BEFORE, None, json.dumps(patch))
        assert made is None or not made.shown


def test_times_are_kept_as_the_feed_shows_them() -> None:
    """expiresAt is stored in UTC with milliseconds, in the content and as a time."""
    read = edits.read_patch({"expiresAt": "2030-01-01T01:00:00+01:00"})
    made = edits.edited(BEFORE, None, read.members)
    assert made is not None
    assert made.expires_ms == 1_893_456_000_000
    assert decode_content(made.content)["expiresAt"] == "2030-01-01T00:00:00.000Z"
    gone = edits.edited(made.content, made.expires_ms, '{"expiresAt":null}')
    assert gone is not None
    assert gone.expires_ms is None


def test_a_notification_does_not_outgrow_its_bound() -> None:
    """32 KiB, as for an event."""
    with pytest.raises(InvalidInputError, match="32768"):
        edits.edited(BEFORE, None, json.dumps({"data": {"a": "x" * 33_000}}))


def test_why_an_edit_is_refused() -> None:
    """Retracted, expired, another version: each says so; the present version and none at all are fine."""
    assert edits.over(101, None, 100) is None
    assert edits.over(None, None, 100) is None
    assert isinstance(edits.over(100, 50, 100), RetractedError)
    assert isinstance(edits.over(100, None, 100), ExpiredError)
    assert edits.conflict(3, 3) is None
    assert edits.conflict(3, None) is None
    assert isinstance(edits.conflict(3, 2), VersionError)


@pytest.mark.parametrize(("text", "version"), [('"3"', 3), ('W/"17"', 17), ("*", None), ("2", 2)])
def test_if_match_is_a_version(text: str, version: int | None) -> None:
    """The ETag that was told, weak or bare; a star is any."""
    assert edits.read_if_match(text) == version


@pytest.mark.parametrize("text", ["", '""', '"a"', "-1", '"1","2"', "²"])
def test_any_other_if_match_is_refused(text: str) -> None:
    """It was meant to guard something: better no edit than an unguarded one."""
    with pytest.raises(DocumentError):
        edits.read_if_match(text)
