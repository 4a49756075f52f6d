"""Whom something is for, as the tenant says: topics that clients may name, and devices of a type."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.policy import Policy, PolicyError, build, validate

DEFAULT = Policy("push_after", 30_000, 60_000)
PLATFORMS = ("ios", "android", "web")
# A few letters: topics that begin with a prefix, are one, or are shorter than one have to be common.
NAMES = st.text("ab.", min_size=1, max_size=4)
PREFIXES = st.lists(NAMES, min_size=1, max_size=4)


@given(st.sampled_from(["none", "nobody", "any", "prefix", "prefix"]), PREFIXES, NAMES, st.text(max_size=2))
def test_clients_subscribe_to_what_the_rule_names_and_nothing_else(
    which: str, prefixes: list[str], topic: str, rest: str
) -> None:
    """Nobody by default, to any topic, or to those that begin with a prefix; whatever the topic is called."""
    document: dict[str, Any] = {"topics": {"subscribe": which}}
    if which == "none":
        document = {"holdS": 1}
    elif which == "prefix":
        document["topics"]["prefixes"] = prefixes
    validate(document)
    rule = build(document, DEFAULT).topics
    for name in (topic, rest, prefixes[0], prefixes[0] + rest, prefixes[0][:-1], prefixes[0].upper(), "\0"):
        begins = any(name[: len(prefix)] == prefix for prefix in prefixes)
        assert rule.allows(name) == (which == "any" or (which == "prefix" and begins)), name


@given(st.sampled_from(["nobody", "any"]), PREFIXES)
def test_prefixes_without_the_rule_that_heeds_them_are_refused(which: str, prefixes: list[str]) -> None:
    """Nobody believes that topics are closed, or open, by a list that nothing reads."""
    with pytest.raises(PolicyError):
        validate({"topics": {"subscribe": which, "prefixes": prefixes}})


SOME = st.none() | st.sets(st.sampled_from(PLATFORMS), min_size=1).map(sorted)


@given(SOME, SOME, st.sampled_from([*PLATFORMS, ""]), st.booleans())
def test_a_push_goes_to_the_devices_that_its_type_names(
    offer: list[str] | None, chat: list[str] | None, platform: str, held: bool
) -> None:
    """Of a type without a word to all of them; one type's devices are nobody else's; a target whose platform
    is not known gets everything."""
    types: dict[str, Any] = {
        "offer": {"devices": offer} if offer else {},
        "chat": {"devices": chat} if chat else {},
    }
    if held:
        types["offer"]["holdS"] = 5
    validate({"types": types})
    policy = build({"types": types}, DEFAULT)
    for kind, named in (("offer", offer), ("chat", chat), ("other", None)):
        wanted = not named or not platform or platform in named
        assert policy.of(kind).gets(platform) == wanted
