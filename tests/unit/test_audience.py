"""What an audience is, as JSON and back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.audience import (
    EVERYBODY,
    PLATFORMS,
    Audience,
    AudienceError,
    audience_json,
    parse_audience,
)

NAMES = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=128)


@given(
    st.one_of(
        st.just(Audience("all")),
        st.builds(Audience, st.sampled_from(["topic", "segment"]), NAMES),
    ),
    st.sets(st.sampled_from(PLATFORMS)),
)
def test_json_and_back(one: Audience, platforms: set[str]) -> None:
    """Every audience reads as what was written."""
    audience = Audience(one.kind, one.name, tuple(sorted(platforms)))
    assert parse_audience(audience_json(audience)) == audience


def test_everybody() -> None:
    """`all` and its long form are the same."""
    assert parse_audience("all") == parse_audience({"all": True}) == EVERYBODY


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (None, "audience"),
        ("everybody", "audience"),
        ({}, "audience"),
        ({"all": False}, "audience/all"),
        ({"all": True, "topic": "a"}, "audience"),
        ({"topic": ""}, "audience/topic"),
        ({"topic": "a" * 129}, "audience/topic"),
        ({"topic": "a\n"}, "audience/topic"),
        ({"segment": 7}, "audience/segment"),
        ({"topic": "a", "users": []}, "audience/users"),
        ({"topic": "a", "platforms": []}, "audience/platforms"),
        ({"topic": "a", "platforms": ["ios", "fridge"]}, "audience/platforms/1"),
    ],
)
def test_what_is_none(value: Any, path: str) -> None:
    """What means no audience is refused with the place of the error."""
    with pytest.raises(AudienceError) as caught:
        parse_audience(value)
    assert [error.path for error in caught.value.errors] == [path]
