"""What a profile may hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.profiles import MAX_ATTRIBUTES, Profile, ProfileError, pack, unpack, validate

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters=".", categories=["L", "N"]), min_size=1, max_size=64
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(NAMES, below, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(NAMES, VALUES, max_size=5), st.sampled_from([None, "Europe/Vienna", "UTC"]))
def test_there_and_back(attributes: dict[str, Any], zone: str | None) -> None:
    """A valid profile travels as text and comes back as it was."""
    document = {"email": "ada@example.com", "locale": "pt-BR", "timezone": zone, "attributes": attributes}
    profile = validate(document, 1_000_000)
    assert unpack(pack(profile)) == profile
    assert json.loads(profile.attributes) == attributes


def test_nothing_is_something() -> None:
    """Absent and null are the same: an empty profile."""
    assert validate({}, 100) == validate({"email": None, "attributes": None}, 100) == Profile()


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ({"mail": "a@b.cd"}, "mail"),
        ({"email": "ada"}, "email"),
        ({"email": "ada@"}, "email"),
        ({"email": "a da@example.com"}, "email"),
        ({"email": 7}, "email"),
        ({"email": "a@" + "b" * 250 + ".com"}, "email"),
        ({"phone": "06601234567"}, "phone"),
        ({"phone": "+43 660 1234567"}, "phone"),
        ({"locale": "german!"}, "locale"),
        ({"timezone": "Mars/Olympus"}, "timezone"),
        ({"timezone": 7}, "timezone"),
        ({"attributes": []}, "attributes"),
        ({"attributes": {"a.b": 1}}, "attributes/a.b"),
        ({"attributes": {"": 1}}, "attributes/"),
        ({"attributes": {"a": [{"b\n": 1}]}}, "attributes/a/0/b\n"),
        ({"attributes": {"a" * 65: 1}}, "attributes/" + "a" * 63 + "…"),
        ({"attributes": {"a": 2**60}}, "attributes/a"),
        ({"attributes": {"a": "\0"}}, "attributes/a"),
        ({"attributes": {"a": "x" * 2000}}, "attributes"),
        ({"attributes": {str(n): n for n in range(MAX_ATTRIBUTES + 1)}}, "attributes"),
    ],
)
def test_what_breaks_a_rule(document: Any, path: str) -> None:
    """Each broken rule is told with its place."""
    with pytest.raises(ProfileError) as caught:
        validate(document, 2000)
    assert path in [error.path for error in caught.value.errors]
