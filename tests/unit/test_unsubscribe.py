"""Unsubscribe links."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.decision import judge, no_rules
from carillon.errors import NotFoundError
from carillon.messages import Event
from carillon.preferences import CHANNELS, validate
from carillon.switches import Preferences
from carillon.unsubscribe import Unsubscription, claimed_tenant, mint, switch_off, verify
from tests.unit.test_decision import NOON, document

SECRET = "s" * 32
WHAT = Unsubscription("acme", "ada", "category", "märketing/1", "email")
names = st.sampled_from(["social", "chat.message"])
channels = st.sampled_from(["", *CHANNELS])
wishes = st.builds(
    Unsubscription, st.just("t"), st.just("u"), st.sampled_from(["category", "type"]), names, channels
) | st.builds(Unsubscription, st.just("t"), st.just("u"), st.just(""), st.just(""), channels)


def test_a_token_says_what_it_was_made_for() -> None:
    """Whatever the names; with the present secret or a former one that still counts; safe in a path."""
    token = mint(WHAT, SECRET)
    assert verify(token, ["other" * 8, SECRET]) == WHAT
    assert claimed_tenant(token) == "acme"
    assert set(token) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


@given(st.integers(0, 200), st.characters(codec="ascii"))
def test_a_changed_token_is_none(index: int, char: str) -> None:
    """Any other character anywhere, another secret, nothing at all: not known."""
    token = mint(WHAT, SECRET)
    at = index % len(token)
    changed = token[:at] + char + token[at + 1 :]
    if changed != token:
        try:
            # The last character of a part has bits that decode to nothing.
            assert verify(changed, [SECRET]) == WHAT
        except NotFoundError:
            pass
        else:
            assert at in (len(token) - 1, token.index(".") - 1)
    for wrong in ("", ".", "a.b", token + "é", "x" * 5000):
        with pytest.raises(NotFoundError):
            verify(wrong, [SECRET])
    with pytest.raises(NotFoundError):
        verify(token, ["o" * 32])


def test_only_what_was_named_is_switched_off() -> None:
    """One channel of a category; its other channels, its priority and all else stay."""
    before: dict[str, Any] = {
        "categories": {"marketing": {"push": True, "priority": "low"}, "other": True}, "badge": False,
    }  # fmt: skip
    what = Unsubscription("t", "u", "category", "marketing", "email")
    assert switch_off(before, what) == {
        "categories": {
            "marketing": {"priority": "low", "channels": {"push": True, "email": False}}, "other": True,
        },
        "badge": False,
    }  # fmt: skip
    assert switch_off({}, Unsubscription("t", "u", "", "", "")) == {"global": False}
    assert switch_off({}, Unsubscription("t", "u", "type", "x", "")) == {"types": {"x": False}}


@given(document, wishes)
def test_whatever_the_document_the_link_works_and_opens_nothing(
    mine: dict[str, Any], what: Unsubscription
) -> None:
    """The channel is closed afterwards; what was closed stays so; the document is valid; twice is once."""
    after = switch_off(mine, what)
    validate(after)
    assert switch_off(after, what) == after
    kinds = ["chat.message", "other"] if what.section != "category" else ["other"]
    for kind in kinds:
        e = Event(bytes(16), "t", "u", 1, kind, "social", 1, "", NOON)
        was = judge(e, Preferences(mine), no_rules(), NOON).off
        now = judge(e, Preferences(after), no_rules(), NOON).off
        assert was <= now
        meant = not what.section or what.name in (kind, "social")
        named = {what.section: what.name} in ({"category": "social"}, {"type": kind}, {"": ""})
        if what.section and named and meant:
            assert ({what.channel} if what.channel else set(CHANNELS)) <= now
        if not what.section and not what.channel:
            assert now == set(CHANNELS)
