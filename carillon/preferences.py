"""The preferences document of a user: what may be sent, where, and when.

Validated strictly and stored as it came; policy applies it when it plans channels.
"""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Callable
from typing import Any, Final

import msgspec

from carillon.errors import InvalidInputError
from carillon.event_rules import Instant, Text, is_array, is_object, text_error, tree_errors
from carillon.problems import FieldError, shown

CHANNELS: Final = ("in_app", "push", "email", "sms", "webhook", "chat")
DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DIGESTS: Final = ("off", "hourly", "daily", "weekly")
MAX_ENTRIES: Final = 200
"""Categories or types that one document may name."""
MAX_DOCUMENT_BYTES: Final = 32 * 1024

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
}
"""What holds while the user has stored nothing, and for every member a stored document leaves out."""

_TIME: Final = re.compile(r"(?:[01]\d|2[0-3]):[0-5]\d")
_NAME: Final = Text(1, 64)


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """A stored document with every member, in the order of `DEFAULTS`."""
    return {name: document.get(name, default) for name, default in DEFAULTS.items()}


def validate(document: Any) -> str:
    """Check a document and return the text to store (members left out stay left out).

    Raises:
        PreferencesError: it breaks a rule; `errors` names each.
    """
    if not is_object(document):
        raise PreferencesError([FieldError("", "an object", shown(document))])
    errors = tree_errors(document)
    if not errors:
        for name, value in document.items():
            check = _CHECKS.get(name)
            if check is None:
                errors.append(
                    FieldError(shown(name), "a member of the preferences document", "an unknown field")
                )
            else:
                errors.extend(check(name, value))
    if errors:
        raise PreferencesError(errors)
    text = msgspec.json.encode(document).decode()
    if len(text) > MAX_DOCUMENT_BYTES:
        raise PreferencesError([FieldError("", f"at most {MAX_DOCUMENT_BYTES} bytes", f"{len(text)} bytes")])
    return text


class PreferencesError(InvalidInputError):
    """A preferences document that breaks rules. Args (positional): the errors, in the order found."""

    def __init__(self, errors: list[FieldError]) -> None:
        first = errors[0]
        where = f"{first.path} to be " if first.path else ""
        super().__init__(f"expected {where}{first.expected}, got {first.got}", *first)
        self.args = (errors,)
        self.errors = errors
        self.message = f"expected {where}{first.expected}, got {first.got}"

    def __str__(self) -> str:
        return self.message


def _flag(path: str, value: Any) -> list[FieldError]:
    return [] if isinstance(value, bool) else [FieldError(path, "true or false", shown(value))]


def _channels(path: str, value: Any) -> list[FieldError]:
    if not is_object(value):
        return [FieldError(path, "an object of channels", shown(value))]
    errors: list[FieldError] = []
    for channel, wanted in value.items():
        below = f"{path}/{shown(channel)}"
        if channel not in CHANNELS:
            errors.append(FieldError(below, f"a channel: {', '.join(CHANNELS)}", "an unknown channel"))
        else:
            errors.extend(_flag(below, wanted))
    return errors


def _rules(path: str, value: Any) -> list[FieldError]:
    """categories and types: a name to true, false, or channels each."""
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
            errors.extend(_channels(below, wanted))
        elif not isinstance(wanted, bool):
            errors.append(FieldError(below, "true, false or an object of channels", shown(wanted)))
    return errors


def _quiet_hours(path: str, value: Any) -> list[FieldError]:
    if value is None:
        return []
    if not is_object(value):
        return [FieldError(path, "null or {start, end, timezone, days}", shown(value))]
    errors: list[FieldError] = []
    for name in ("start", "end"):
        at = value.get(name)
        if not isinstance(at, str) or not _TIME.fullmatch(at):
            errors.append(FieldError(f"{path}/{name}", "HH:MM", shown(at) if name in value else "nothing"))
    zone = value.get("timezone", "UTC")
    if not isinstance(zone, str) or not _known_zone(zone):
        errors.append(FieldError(f"{path}/timezone", "a time zone name such as Europe/Vienna", shown(zone)))
    days = value.get("days", list(DAYS))
    if not is_array(days) or len(days) > 7 or any(day not in DAYS for day in days):
        errors.append(FieldError(f"{path}/days", f"an array of {', '.join(DAYS)}", shown(days)))
    for name in value:
        if name not in ("start", "end", "timezone", "days"):
            errors.append(FieldError(f"{path}/{shown(name)}", "a member of quietHours", "an unknown field"))
    return errors


def _known_zone(name: str) -> bool:
    # Not `in available_timezones()`: that walks the whole database. A name that is no zone raises one of
    # these, paths ("../x") and empty ones included.
    if not name or len(name) > 64:
        return False
    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


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
    ok = isinstance(value, str) and value in DIGESTS
    return [] if ok else [FieldError(path, "|".join(DIGESTS), shown(value))]


def _sound(path: str, value: Any) -> list[FieldError]:
    if isinstance(value, bool):
        return []
    wrong = text_error(path, value, Text(1, 64))
    return [] if wrong is None else [FieldError(path, "true, false or the name of a sound", shown(value))]


_CHECKS: Final[dict[str, Callable[[str, Any], list[FieldError]]]] = {
    "global": _flag,
    "channels": _channels,
    "categories": _rules,
    "types": _rules,
    "quietHours": _quiet_hours,
    "doNotDisturbUntil": _instant,
    "digest": _digest,
    "sound": _sound,
    "badge": _flag,
}
