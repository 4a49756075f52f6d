"""The user's words with the tenant's beneath, and changes of a part."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carillon.inheritance import complete, merge_patch, patched
from carillon.messages import PRIORITIES
from carillon.preferences import DEFAULTS, PreferencesError, validate
from carillon.presentation import of_app, of_push
from carillon.switches import NOTHING, Preferences, switches

Document = dict[str, Any]

CHANNELS = st.sampled_from(["in_app", "push", "sms"])
DIGESTS = st.sampled_from(["off", "daily", {"frequency": "weekly", "at": "09:00", "day": "fri"}])


def objects(**members: st.SearchStrategy[Any]) -> st.SearchStrategy[Document]:
    return st.fixed_dictionaries({}, optional=members)


HEARD: dict[str, st.SearchStrategy[Any]] = {
    "sound": st.sampled_from([True, False, "bell"]), "badge": st.booleans(), "vibration": st.booleans(),
}  # fmt: skip
ON_SCREEN = {"durationMs": st.integers(0, 9), "autoDismiss": st.booleans()}
ENTRY = st.booleans() | objects(
    enabled=st.booleans(),
    channels=st.dictionaries(CHANNELS, st.booleans(), max_size=2),
    push=st.booleans(),
    priority=st.sampled_from(PRIORITIES),
    digest=DIGESTS,
)
ENTRIES = {
    "categories": objects(social=ENTRY, news=ENTRY),
    "types": objects(reply=ENTRY, report=ENTRY),
    "digest": DIGESTS,
}
QUIET = st.none() | st.just({"start": "22:00", "end": "07:00"})
WHOLE = {
    "global": st.sampled_from([True, True, False]),
    "quietHours": QUIET,
    "timezone": st.sampled_from(["Europe/Vienna", "Asia/Tokyo", None]),
    **HEARD,
}


def channels(**more: st.SearchStrategy[Any]) -> st.SearchStrategy[Document]:
    word = st.booleans() | objects(enabled=st.booleans(), **HEARD, **ON_SCREEN, **more)
    return st.dictionaries(CHANNELS, word, max_size=3)


DETAILED = objects(channels=channels(), **ENTRIES, **WHOLE)
FOR_EMERGENCIES = objects(channels=channels(emergencyOnly=st.booleans()), **WHOLE)
ASKED: list[tuple[str, str | None]] = [
    ("reply", None), ("report", "unknown"), ("unknown", "social"), ("unknown", "news"), ("unknown", None),
]  # fmt: skip


def agrees(user: Document, defaults: Document) -> None:
    """The completed document alone decides as both do."""
    whole = complete(user, defaults)
    validate(whole)
    assert list(whole) == list(DEFAULTS)
    mine, beneath, alone = Preferences(user), Preferences(defaults), Preferences(whole)
    assert of_push(alone.push, NOTHING.push)[:2] == of_push(mine.push, beneath.push)[:2]
    assert of_app(alone.in_app, NOTHING.in_app) == of_app(mine.in_app, beneath.in_app)
    both, one = of_push(mine.push, beneath.push).vibration, of_push(alone.push, NOTHING.push).vibration
    assert both == one or (both, one) == (None, True), "nobody's word is told as true"
    for kind, category in ASKED:
        for urgent in (False, True):
            found = switches(mine, beneath, NOTHING, kind, category, urgent)
            told = switches(alone, NOTHING, NOTHING, kind, category, urgent)
            assert (told.off, told.level) == (found.off, found.level), (kind, category, urgent)
            assert (told.digest and told.digest.frequency) == (found.digest and found.digest.frequency)


@settings(max_examples=1000)
@given(DETAILED, DETAILED)
def test_what_is_told_is_what_holds(user: Document, defaults: Document) -> None:
    """Channels, categories, types, digests, sound: each part inherits what the user left out of it."""
    agrees(user, defaults)


@settings(max_examples=500)
@given(FOR_EMERGENCIES, FOR_EMERGENCIES)
def test_channels_for_emergencies_are_told_as_they_hold(user: Document, defaults: Document) -> None:
    """Who opens a channel, or says that it is not for emergencies alone, opens it for everything."""
    agrees(user, defaults)


@given(DETAILED)
def test_without_defaults_the_users_words_are_told_as_they_are(user: Document) -> None:
    """In the form in which they were stored; the inputs stay what they were."""
    before = copy.deepcopy(user)
    whole = complete(user, {})
    assert {name: whole[name] for name in user} == before
    complete(user, user)
    assert user == before


def test_parts_of_a_channel_and_of_a_category_are_inherited() -> None:
    """A user who chose a sound keeps what the tenant says of the rest of the channel."""
    defaults = {
        "channels": {"in_app": {"durationMs": 5000}, "push": {"sound": "gong", "badge": False}, "sms": False},
        "categories": {"marketing": {"push": False, "priority": "low"}, "news": {"sms": True}},
    }
    user = {
        "channels": {"in_app": {"sound": "bell"}, "push": True},
        "categories": {"marketing": {"email": False}},
        "sound": False,
    }
    whole = complete(user, defaults)
    assert whole["channels"] == {
        "in_app": {"sound": "bell", "durationMs": 5000},
        "push": {"enabled": True, "badge": False},
        "sms": False,
    }
    assert whole["categories"] == {
        "marketing": {"priority": "low", "channels": {"email": False}},
        "news": {"channels": {"sms": True}},
    }


# -- changes of a part ------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_the_examples_of_the_standard(target: Any, patch: Any, result: Any) -> None:
    """RFC 7396, appendix A."""
    assert merge_patch(target, patch) == result


@given(VALUES, VALUES)
def test_a_patch_is_idempotent_and_changes_no_argument(target: Any, patch: Any) -> None:
    """Made twice it changes nothing more: one that was overtaken may be made again."""
    before = json.dumps([target, patch])
    once = merge_patch(target, patch)
    assert merge_patch(once, patch) == once
    assert json.dumps([target, patch]) == before


@given(DETAILED, st.sampled_from(["push", "in_app"]), st.sampled_from(["bell", False]))
def test_a_change_inside_of_a_channel_leaves_its_switch(user: Document, channel: str, sound: Any) -> None:
    """`false` and `{"enabled": false}` say the same, before and after."""
    after = patched(user, {"channels": {channel: {"sound": sound}}})
    validate(after)
    assert Preferences(after).channels == Preferences(user).channels
    assert after["channels"][channel]["sound"] == sound
    assert {**after, "channels": None} == {**user, "channels": None}


def test_short_forms_are_changed_as_long_ones() -> None:
    """Of channels, categories, types and the digest; what is taken out is the tenant's again."""
    user = {"channels": {"push": False}, "categories": {"news": False}, "digest": "daily", "sound": False}
    patch = {
        "channels": {"push": {"sound": "bell"}},
        "categories": {"news": {"priority": "low"}},
        "digest": {"at": "09:00"},
        "sound": None,
    }
    assert patched(user, patch) == {
        "channels": {"push": {"enabled": False, "sound": "bell"}},
        "categories": {"news": {"enabled": False, "priority": "low"}},
        "digest": {"frequency": "daily", "at": "09:00"},
    }
    assert patched(user, {"channels": {"push": True}})["channels"] == {"push": True}


@settings(max_examples=300)
@given(
    DETAILED,
    st.sampled_from(["categories", "types"]),
    st.sampled_from(["social", "reply"]),
    CHANNELS,
    st.booleans() | st.none(),
    st.booleans(),
)
def test_a_channel_of_a_category_is_changed_in_either_form(
    user: Document, section: str, name: str, channel: str, word: bool | None, short: bool
) -> None:
    """What the change says of the channel holds, null: nothing; whatever form was stored. The rest stays."""
    before = copy.deepcopy(user)
    said = {channel: word} if short else {"channels": {channel: word}}
    after = patched(user, {section: {name: said}})
    validate(after)
    assert user == before
    was, now = getattr(Preferences(user), section).get(name), getattr(Preferences(after), section)[name]
    expected = {} if was is None else {key: value for key, value in was.channels.items() if key != channel}
    assert now.channels == (expected if word is None else expected | {channel: word})
    if was is not None:
        assert (now.enabled, now.priority, now.digest_set) == (was.enabled, was.priority, was.digest_set)
        stored: Any = user[section][name]
        if isinstance(stored, dict):
            assert after[section][name].get("digest") == stored.get("digest")


def test_both_forms_of_a_categorys_channels_are_one() -> None:
    """Short over long and long over short; null of all of them comes before the words beside it."""
    long, short = {"channels": {"push": False, "sms": True}}, {"push": False, "sms": True}
    for stored in (long, short):
        user = {"categories": {"news": stored}}
        for change, channels in (
            ({"push": True}, {"push": True, "sms": True}),
            ({"channels": {"push": True}}, {"push": True, "sms": True}),
            ({"push": None}, {"sms": True}),
            ({"channels": None, "push": True}, {"push": True}),
        ):
            found = patched(user, {"categories": {"news": change}})
            assert found == {"categories": {"news": {"channels": channels}}}, (stored, change)
    for invalid in ([1], 5):
        with pytest.raises(PreferencesError):
            validate(patched({"types": {"a": long}}, {"types": {"a": {"push": True, "channels": invalid}}}))


def test_a_digest_inside_of_a_category_is_changed_inside() -> None:
    """`"daily"` with another time of day is daily at that time."""
    after = patched(
        {"categories": {"news": {"digest": "daily"}}}, {"categories": {"news": {"digest": {"at": "09:00"}}}}
    )
    validate(after)
    assert after == {"categories": {"news": {"digest": {"frequency": "daily", "at": "09:00"}}}}
