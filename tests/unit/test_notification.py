"""The notification's JSON: content written once, completed with its state."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from carillon.ids import uuid_text
from carillon.notification import (
    ALWAYS,
    OPTIONAL,
    NotificationRow,
    decode_content,
    encode_content,
    fresh_json,
    notification_json,
    user_json_of,
)

ID = bytes(range(16))
text = st.text(st.characters(exclude_categories=["Cs"]))
STATES = ("delivered", "seen", "read", "clicked", "dismissed", "archived", "updated")


def shown(row: NotificationRow, user: str = "u") -> dict[str, Any]:
    return json.loads(notification_json(row, user_json_of(user)))


def test_what_is_always_there() -> None:
    """An empty notification has every member protocol.md promises, null, false, [] or {}."""
    row = NotificationRow(ID, 3, 7, 7, encode_content({"type": "x"}))
    assert shown(row) == {
        "id": uuid_text(ID), "seq": 3, "rev": 7, "userId": "u", "type": "x", "title": None, "body": None,
        "actorId": None, "targetType": None, "targetId": None, "priority": "normal", "category": None,
        "actions": [], "data": {}, "createdAt": None, "read": False, "seen": False, "archived": False,
    }  # fmt: skip


def test_optional_members_are_there_only_when_set() -> None:
    """None is left out; a value is kept; an unknown member never gets in."""
    content = decode_content(encode_content({"link": "https://x", "icon": None, "nonsense": 1}))
    assert content["link"] == "https://x"
    assert "icon" not in content
    assert "nonsense" not in content
    assert set(content) == {*ALWAYS, "link"}


@given(
    st.dictionaries(st.sampled_from(["title", "body", "actorId", "link", "category"]), text),
    text,
    st.dictionaries(text, st.one_of(text, st.integers(-(2**53) + 1, 2**53 - 1), st.none(), st.booleans())),
)
def test_content_and_user_survive(members: dict[str, Any], user: str, data: dict[str, Any]) -> None:
    """Any text in content, data and user id comes out as it went in, also quotes and control characters."""
    members = members | {"type": "x", "data": data}
    row = NotificationRow(ID, 1, 1, 1, encode_content(members))
    out = shown(row, user)
    assert out["userId"] == user
    assert {name: out[name] for name in members} == members
    assert decode_content(row.content) == {name: out[name] for name in decode_content(row.content)}


@given(st.integers(1, 2**62), st.integers(1, 2**62), text)
def test_a_fresh_notification_is_one_nobody_has_seen(seq: int, rev: int, title: str) -> None:
    """The hot path writes what the general path writes for a row without states."""
    content = encode_content({"type": "x", "title": title})
    fresh = fresh_json(ID, seq, rev, user_json_of("ü"), content)
    assert fresh == notification_json(NotificationRow(ID, seq, rev, rev, content), user_json_of("ü"))


@given(st.sets(st.sampled_from(STATES)))
def test_states_show_as_flags_and_times(states: set[str]) -> None:
    """read, seen, archived always; clicked and dismissed when true; the times of those that happened."""
    row = NotificationRow(ID, 1, 9, 1, encode_content({"type": "x"}))
    for name in states:
        setattr(row, f"{name}_ms", 1_700_000_000_123)
    out = shown(row)
    for name in ("read", "seen", "archived"):
        assert out[name] is (name in states)
    for name in ("clicked", "dismissed"):
        assert out.get(name, False) is (name in states)
    times = {name for name in STATES if f"{name}At" in out}
    assert times == states
    assert all(out[f"{name}At"] == "2023-11-14T22:13:20.123Z" for name in states)


def test_no_optional_member_is_a_state() -> None:
    """Content never holds what a state change would have to rewrite."""
    assert not {"read", "seen", "archived", "clicked", "dismissed", "rev", "seq"} & {*ALWAYS, *OPTIONAL}
