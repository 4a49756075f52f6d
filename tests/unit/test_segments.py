"""Filters of segments: what they mean, and what they may not be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from carillon.segments import MAX_CONDITIONS, MAX_DEPTH, SegmentError, compile_path, fits, parse_filter
from tests.unit.segment_cases import DOCUMENTS, FILTERS

ADA = {
    "attributes": {
        "plan": "pro",
        "seats": 12,
        "tags": ["beta", "vip"],
        "gone": None,
        "address": {"city": "Wien"},
    },
    "locale": "de-AT",
    "platform": ["ios", "web"],
    "lastSeenAgoS": 3600.5,
}


@pytest.mark.parametrize(
    ("filter_", "holds"),
    [
        ({}, True),
        ({"attributes.plan": "pro"}, True),
        ({"attributes.plan": {"ne": "pro"}}, False),
        ({"attributes.other": {"ne": "pro"}}, True),
        ({"attributes.seats": {"gte": 12, "lt": 13}}, True),
        ({"attributes.seats": {"gt": "1"}}, False),
        ({"attributes.seats": 12.0}, True),
        ({"attributes.seats": True}, False),
        ({"attributes.tags": "vip"}, True),
        ({"attributes.tags": {"in": ["x", "beta"]}}, True),
        ({"attributes.tags": {"contains": "et"}}, True),
        ({"attributes.address.city": {"contains": "ie"}}, True),
        ({"attributes.address": "Wien"}, False),
        ({"attributes.gone": None}, True),
        ({"attributes.gone": {"exists": True}}, True),
        ({"attributes.never": None}, False),
        ({"attributes.never": {"exists": False}}, True),
        ({"timezone": {"exists": True}}, False),
        ({"platform": "web"}, True),
        ({"not": {"platform": "android"}}, True),
        ({"lastSeenAgoS": {"lt": 7200}}, True),
        ({"or": [{"locale": "de"}, {"locale": "de-AT"}]}, True),
        ({"and": [{"locale": "de-AT"}, {"not": {"attributes.plan": "pro"}}]}, False),
        ({"locale": "de-AT", "attributes.plan": "free"}, False),
    ],
)
def test_what_a_filter_means(filter_: Any, holds: bool) -> None:
    """The examples of docs/reference/users.md, and the corners of each operator."""
    assert fits(parse_filter(filter_), ADA) is holds


@given(FILTERS, DOCUMENTS)
def test_not_turns_every_filter_around(filter_: Any, document: Any) -> None:
    """Whatever is unknown of a user: either a filter fits or its negation does."""
    assert fits(parse_filter(filter_), document) is not fits(parse_filter({"not": filter_}), document)


@given(FILTERS)
def test_no_value_gets_into_the_path(filter_: Any) -> None:
    """Values travel as variables; names and needles as quoted text."""
    path, variables = compile_path(parse_filter(filter_))
    assert path.isascii()
    assert path.isprintable()
    assert all(f"${name}" in path for name in variables)


def deep(levels: int) -> Any:
    return {"not": deep(levels - 1)} if levels else {"locale": "de"}


@pytest.mark.parametrize(
    ("filter_", "path"),
    [
        (None, "filter"),
        ([], "filter"),
        ({"plan": "pro"}, "filter/plan"),
        ({"attributes": "pro"}, "filter/attributes"),
        ({"attributes.": "pro"}, "filter/attributes."),
        ({"attributes.a..b": 1}, "filter/attributes.a..b"),
        ({"attributes.a": {}}, "filter/attributes.a"),
        ({"attributes.a": {"like": "x"}}, "filter/attributes.a/like"),
        ({"attributes.a": [1]}, "filter/attributes.a/eq"),
        ({"attributes.a": {"in": []}}, "filter/attributes.a/in"),
        ({"attributes.a": {"in": [1, {}]}}, "filter/attributes.a/in/1"),
        ({"attributes.a": {"exists": 1}}, "filter/attributes.a/exists"),
        ({"attributes.a": {"gt": None}}, "filter/attributes.a/gt"),
        ({"attributes.a": {"gt": True}}, "filter/attributes.a/gt"),
        ({"attributes.a": {"contains": ""}}, "filter/attributes.a/contains"),
        ({"attributes.a": "x" * 256}, "filter/attributes.a/eq"),
        ({"attributes.a": 2**60}, "filter/attributes.a"),
        ({"attributes.a": "\0"}, "filter/attributes.a"),
        ({"and": {}}, "filter/and"),
        ({"or": []}, "filter/or"),
        ({"or": [{"x": 1}]}, "filter/or/0/x"),
        ({"not": [{}]}, "filter/not"),
        (deep(MAX_DEPTH), "filter" + "/not" * MAX_DEPTH),
        ({"or": [{"locale": "de"}] * (MAX_CONDITIONS + 1)}, "filter"),
    ],
)
def test_what_is_none(filter_: Any, path: str) -> None:
    """What is no filter is refused with the place."""
    with pytest.raises(SegmentError) as caught:
        parse_filter(filter_)
    assert [error.path for error in caught.value.errors] == [path]
