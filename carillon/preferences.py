"""The preferences document of a user: what may be sent, where, and when.

Validated strictly and stored as it came; `carillon.switches` reads it and `carillon.decision` applies it. A
tenant's defaults are such a document, too (carillon/policy.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import msgspec

from carillon.event_rules import (
    PRIORITY_NAMES,
    Instant,
    Text,
    is_array,
    is_object,
    text_error,
    tree_errors,
)
from carillon.problems import DocumentError, FieldError, shown
from carillon.quiet_hours import known_zone

CHANNELS: Final = ("in_app", "push", "email", "sms", "webhook", "chat")
DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DIGESTS: Final = ("off", "instant", "hourly", "daily", "weekly")
"""`off` and `instant` are the same: nothing is collected."""
MAX_ENTRIES: Final = 200
"""Categories or types that one document may name."""
MAX_DOCUMENT_BYTES: Final = 32 * 1024
MAX_SHOWN_MS: Final = 3_600_000
"""Longest `durationMs` of an in-app notification on the screen."""

DEFAULTS: Final[dict[str, Any]] = {
    "global": True,
    "channels": {},
    "categories": {},
    "types": {},
    "quietHours": None,
    "doNotDisturbUntil": None,
    "digest": "off",
    "sound": True,
    "badge": True,
    "vibration": True,
    "timezone": None,
}
"""What holds while the user has stored nothing, and for every member a stored document leaves out."""

_TIME: Final = re.compile(r"(?:[01]\d|2[0-3]):[0-5]\d")
_NAME: Final = Text(1, 64)


def validate(document: Any) -> str:
    """Check a document and return the text to store (members left out stay left out).

    Raises:
        PreferencesError: it breaks a rule; `errors` names each.
    """
    if not is_object(document):
        raise PreferencesError([FieldError("", "an object", shown(document))])
    errors = tree_errors(document) or document_errors("", document)
    if errors:
        raise PreferencesError(errors)
    text = msgspec.json.encode(document).decode()
    if len(text) > MAX_DOCUMENT_BYTES:
        raise PreferencesError([FieldError("", f"at most {MAX_DOCUMENT_BYTES} bytes", f"{len(text)} bytes")])
    return text


class PreferencesError(DocumentError):
    """A preferences document that breaks rules. Args (positional): the errors, in the order found."""


def document_errors(prefix: str, document: dict[str, Any]) -> list[FieldError]:
    """What is wrong with a document that is part of another one at `prefix` ("" or ending in a slash)."""
    errors: list[FieldError] = []
    for name, value in document.items():
        check = _CHECKS.get(name)
        if check is None:
            errors.append(
                FieldError(
                    f"{prefix}{shown(name)}", "a member of the preferences document", "an unknown field"
                )
            )
        else:
            errors.extend(check(f"{prefix}{name}", value))
    return errors


def _flag(path: str, value: Any) -> list[FieldError]:
    return [] if isinstance(value, bool) else [FieldError(path, "true or false", shown(value))]


def _channels(path: str, value: Any) -> list[FieldError]:
    """channels: each true, false, or what is wanted of it."""
    if not is_object(value):
        return [FieldError(path, "an object of channels", shown(value))]
    errors: list[FieldError] = []
    for channel, wanted in value.items():
        below = f"{path}/{shown(channel)}"
        if channel not in CHANNELS:
            errors.append(FieldError(below, f"a channel: {', '.join(CHANNELS)}", "an unknown channel"))
        elif is_object(wanted):
            errors.extend(_members(below, wanted, _OF_CHANNEL, "a channel"))
        elif not isinstance(wanted, bool):
            errors.append(FieldError(below, "true, false or an object", shown(wanted)))
    return errors


def _switches(path: str, value: Any) -> list[FieldError]:
    """The channels of a category or type: each true or false."""
    if not is_object(value):
        return [FieldError(path, "an object of channels", shown(value))]
    return _members(path, value, dict.fromkeys(CHANNELS, _flag), "channels")


def _members(
    path: str, value: dict[str, Any], checks: dict[str, Callable[[str, Any], list[FieldError]]], what: str
) -> list[FieldError]:
    errors: list[FieldError] = []
    for name, member in value.items():
        below = f"{path}/{shown(name)}"
        check = checks.get(name)
        if check is None:
            errors.append(FieldError(below, f"a member of {what}", "an unknown field"))
        else:
            errors.extend(check(below, member))
    return errors


def rules_errors(path: str, value: Any) -> list[FieldError]:
    """categories and types: a name to true, false, or what is wanted of it."""
    if not is_object(value):
        return [FieldError(path, "an object", shown(value))]
    if len(value) > MAX_ENTRIES:
        return [FieldError(path, f"at most {MAX_ENTRIES} entries", f"{len(value)} entries")]
    errors: list[FieldError] = []
    for name, wanted in value.items():
        below = f"{path}/{shown(name, 64)}"
        wrong = text_error(below, name, _NAME)
        if wrong is not None:
            errors.append(wrong)
        elif is_object(wanted):
            errors.extend(_members(below, wanted, _OF_ENTRY, "a category or type"))
        elif not isinstance(wanted, bool):
            errors.append(FieldError(below, "true, false or an object of channels", shown(wanted)))
    return errors


def _quiet_hours(path: str, value: Any) -> list[FieldError]:
    if value is None:
        return []
    if not is_object(value):
        return [FieldError(path, "null or {start, end, timezone, days, enabled}", shown(value))]
    errors: list[FieldError] = []
    for name in ("start", "end"):
        at = value.get(name)
        if not isinstance(at, str) or not _TIME.fullmatch(at):
            errors.append(FieldError(f"{path}/{name}", "HH:MM", shown(at) if name in value else "nothing"))
    if "timezone" in value:
        errors.extend(_zone(f"{path}/timezone", value["timezone"]))
    if "enabled" in value:
        errors.extend(_flag(f"{path}/enabled", value["enabled"]))
    days = value.get("days", list(DAYS))
    if not is_array(days) or len(days) > 7 or any(day not in DAYS for day in days):
        errors.append(FieldError(f"{path}/days", f"an array of {', '.join(DAYS)}", shown(days)))
    for name in value:
        if name not in ("start", "end", "timezone", "days", "enabled"):
            errors.append(FieldError(f"{path}/{shown(name)}", "a member of quietHours", "an unknown field"))
    return errors


def _zone(path: str, value: Any) -> list[FieldError]:
    if known_zone(value):
        return []
    return [FieldError(path, "a time zone name such as Europe/Vienna", shown(value))]


def _maybe_zone(path: str, value: Any) -> list[FieldError]:
    return [] if value is None else _zone(path, value)


def _instant(path: str, value: Any) -> list[FieldError]:
    wrong = [FieldError(path, "null or an RFC 3339 time with offset", shown(value))]
    if value is None:
        return []
    if not isinstance(value, str):
        return wrong
    try:
        msgspec.convert(value, Instant)
    except msgspec.ValidationError:
        return wrong
    return []


def _digest(path: str, value: Any) -> list[FieldError]:
    words = "|".join(DIGESTS)
    if isinstance(value, str):
        return [] if value in DIGESTS else [FieldError(path, words, shown(value))]
    if not is_object(value):
        return [FieldError(path, f"{words} or {{frequency, at, day}}", shown(value))]
    errors = _members(path, value, {"frequency": _digest_word, "at": _clock, "day": _day}, "digest")
    if "frequency" not in value:
        errors.append(FieldError(f"{path}/frequency", words, "nothing"))
    return errors


def _one_of(*words: str) -> Callable[[str, Any], list[FieldError]]:
    def check(path: str, value: Any) -> list[FieldError]:
        ok = isinstance(value, str) and value in words
        return [] if ok else [FieldError(path, "|".join(words), shown(value))]

    return check


_digest_word: Final = _one_of(*DIGESTS)
_day: Final = _one_of(*DAYS)
_priority: Final = _one_of(*PRIORITY_NAMES)


def _clock(path: str, value: Any) -> list[FieldError]:
    ok = isinstance(value, str) and _TIME.fullmatch(value) is not None
    return [] if ok else [FieldError(path, "HH:MM", shown(value))]


def _duration(path: str, value: Any) -> list[FieldError]:
    ok = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SHOWN_MS
    return [] if ok else [FieldError(path, f"milliseconds from 0 to {MAX_SHOWN_MS}", shown(value))]


def _sound(path: str, value: Any) -> list[FieldError]:
    if isinstance(value, bool):
        return []
    wrong = text_error(path, value, Text(1, 64))
    return [] if wrong is None else [FieldError(path, "true, false or the name of a sound", shown(value))]


_CHECKS: Final[dict[str, Callable[[str, Any], list[FieldError]]]] = {
    "global": _flag,
    "channels": _channels,
    "categories": rules_errors,
    "types": rules_errors,
    "quietHours": _quiet_hours,
    "doNotDisturbUntil": _instant,
    "digest": _digest,
    "sound": _sound,
    "badge": _flag,
    "vibration": _flag,
    "timezone": _maybe_zone,
}
_OF_CHANNEL: Final[dict[str, Callable[[str, Any], list[FieldError]]]] = {
    "enabled": _flag,
    "sound": _sound,
    "badge": _flag,
    "vibration": _flag,
    "emergencyOnly": _flag,
    "durationMs": _duration,
    "autoDismiss": _flag,
}
_OF_ENTRY: Final[dict[str, Callable[[str, Any], list[FieldError]]]] = {
    "enabled": _flag,
    "channels": _switches,
    "priority": _priority,
    "digest": _digest,
    **dict.fromkeys(CHANNELS, _flag),
}
