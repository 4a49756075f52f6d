"""The preferences document."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.inheritance import complete
from carillon.preferences import DEFAULTS, PreferencesError, validate

FULL: dict[str, Any] = {
    "global": False,
    "channels": {"push": False, "email": True},
    "categories": {"marketing": False, "social": {"push": True}},
    "types": {"comment.reply": True},
    "quietHours": {"start": "22:00", "end": "07:30", "timezone": "Europe/Vienna", "days": ["mon", "sun"]},
    "doNotDisturbUntil": "2030-01-01T00:00:00Z",
    "digest": "daily",
    "sound": "bell",
    "badge": False,
    "vibration": False,
    "timezone": "Asia/Tokyo",
}
RICH: dict[str, Any] = {
    "channels": {
        "push": {"enabled": True, "sound": "bell", "badge": False, "vibration": True},
        "sms": {"emergencyOnly": True},
        "in_app": {"sound": False, "durationMs": 5000, "autoDismiss": True},
    },
    "categories": {
        "chat": {"enabled": True, "channels": {"email": False}, "priority": "high", "digest": "off"}
    },
    "types": {"report": {"digest": {"frequency": "weekly", "at": "09:30", "day": "fri"}, "push": False}},
    "quietHours": {"start": "22:00", "end": "07:00", "enabled": False},
    "digest": "instant",
}


def test_full_document_is_stored_as_it_came() -> None:
    """A valid document is stored unchanged, and told back with every member."""
    assert json.loads(validate(FULL)) == FULL
    assert complete(FULL) == FULL
    assert json.loads(validate(RICH)) == RICH
    assert list(complete({})) == list(DEFAULTS)
    assert validate({}) == "{}"


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ([], ""),
        ({"unheardOf": 1}, "unheardOf"),
        ({"global": 1}, "global"),
        ({"channels": {"pigeon": True}}, "channels/pigeon"),
        ({"channels": {"push": "no"}}, "channels/push"),
        ({"categories": {"": True}}, "categories/"),
        ({"categories": {"x": 5}}, "categories/x"),
        ({"types": {"x": {"push": 1}}}, "types/x/push"),
        ({"types": {f"t{i}": True for i in range(201)}}, "types"),
        ({"quietHours": {"start": "25:00", "end": "07:00"}}, "quietHours/start"),
        ({"quietHours": {"start": "22:00"}}, "quietHours/end"),
        ({"quietHours": {"start": "22:00", "end": "7:00"}}, "quietHours/end"),
        ({"quietHours": {"start": "22:00", "end": "07:00", "timezone": "Mars/Base"}}, "quietHours/timezone"),
        (
            {"quietHours": {"start": "22:00", "end": "07:00", "timezone": "../../etc/passwd"}},
            "quietHours/timezone",
        ),
        ({"quietHours": {"start": "22:00", "end": "07:00", "days": ["monday"]}}, "quietHours/days"),
        ({"quietHours": {"start": "22:00", "end": "07:00", "x": 1}}, "quietHours/x"),
        ({"doNotDisturbUntil": "tomorrow"}, "doNotDisturbUntil"),
        ({"doNotDisturbUntil": "2030-01-01T00:00:00"}, "doNotDisturbUntil"),
        ({"digest": "sometimes"}, "digest"),
        ({"sound": 5}, "sound"),
        ({"badge": None}, "badge"),
        ({"sound": "a\0"}, "sound"),
        ({"channels": {"push": {"loud": True}}}, "channels/push/loud"),
        ({"channels": {"in_app": {"durationMs": -1}}}, "channels/in_app/durationMs"),
        ({"channels": {"sms": {"emergencyOnly": "yes"}}}, "channels/sms/emergencyOnly"),
        ({"categories": {"x": {"priority": "loud"}}}, "categories/x/priority"),
        ({"categories": {"x": {"channels": {"fax": True}}}}, "categories/x/channels/fax"),
        ({"types": {"x": {"digest": "yearly"}}}, "types/x/digest"),
        ({"digest": {"at": "08:00"}}, "digest/frequency"),
        ({"digest": {"frequency": "daily", "at": "8"}}, "digest/at"),
        ({"digest": {"frequency": "weekly", "day": "monday"}}, "digest/day"),
        ({"quietHours": {"start": "22:00", "end": "07:00", "enabled": 1}}, "quietHours/enabled"),
        ({"timezone": "Mars/Base"}, "timezone"),
        ({"vibration": 1}, "vibration"),
    ],
)
def test_refused(document: Any, path: str) -> None:
    """Each broken rule is named by its path."""
    with pytest.raises(PreferencesError) as caught:
        validate(document)
    assert caught.value.errors[0].path == path


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(st.characters(codec=None), max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(list(DEFAULTS)) | st.text(max_size=5), inner, max_size=4)
        ),
        max_leaves=10,
    )
)
def test_any_value_never_crashes(document: Any) -> None:
    """Whatever the value: stored text that is JSON, or an error that names the rule."""
    text = None
    with contextlib.suppress(PreferencesError):
        text = validate(document)
    assert text is None or json.loads(text) == document
