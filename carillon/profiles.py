"""Profiles: what a service knows of a user beside notifications. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from carillon.event_rules import LOCALE, Text, has_control, is_array, is_object, text_error, tree_errors
from carillon.problems import DocumentError, FieldError, shown
from carillon.quiet_hours import known_zone

MEMBERS: Final = ("email", "phone", "locale", "timezone", "attributes")
MAX_ATTRIBUTES: Final = 200
"""Attributes of one user, nested ones included."""
MAX_NAME: Final = 64
"""Characters of an attribute's name."""

_EMAIL: Final = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s.]+")
_PHONE: Final = re.compile(r"\+[1-9][0-9]{6,14}")
_encode: Final = msgspec.json.Encoder().encode


class ProfileError(DocumentError):
    """A profile that breaks rules. Args (positional): the errors, in the order found."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A user's profile.

    Attributes:
        attributes: a JSON object, as text.
    """

    email: str | None = None
    phone: str | None = None
    locale: str | None = None
    timezone: str | None = None
    attributes: str = "{}"


def validate(document: dict[str, Any], max_bytes: int) -> Profile:
    """The profile of a document; what is missing or null is empty.

    Args:
        max_bytes: of the attributes as JSON.

    Raises:
        ProfileError: it breaks a rule; `errors` names each.
    """
    errors = tree_errors(document)
    for name in document:
        if name not in MEMBERS:
            errors.append(FieldError(shown(name), f"one of {', '.join(MEMBERS)}", "an unknown field"))
    if errors:
        raise ProfileError(errors)
    given = {name: value for name, value in document.items() if value is not None}
    for name, (expected, pattern, longest) in _TEXTS.items():
        if name in given:
            wrong = text_error(name, given[name], Text(1, longest))
            if wrong is None and not pattern.fullmatch(given[name]):
                wrong = FieldError(name, expected, shown(given[name]))
            if wrong is not None:
                errors.append(wrong)
    zone = given.get("timezone")
    if zone is not None and not known_zone(zone):
        errors.append(FieldError("timezone", "a time zone name such as Europe/Vienna", shown(zone)))
    attributes = given.get("attributes", {})
    text = "{}"
    if not is_object(attributes):
        errors.append(FieldError("attributes", "an object", shown(attributes)))
    else:
        found: list[FieldError] = []
        count = _names("attributes", attributes, found)
        errors += found[:10]
        raw = _encode(attributes)
        if count > MAX_ATTRIBUTES:
            errors.append(FieldError("attributes", f"at most {MAX_ATTRIBUTES} of them", f"{count}"))
        if len(raw) > max_bytes:
            errors.append(FieldError("attributes", f"at most {max_bytes} bytes of JSON", f"{len(raw)} bytes"))
        text = raw.decode()
    if errors:
        raise ProfileError(errors)
    return Profile(given.get("email"), given.get("phone"), given.get("locale"), zone, text)


_TEXTS: Final[dict[str, tuple[str, re.Pattern[str], int]]] = {
    "email": ("an e-mail address", _EMAIL, 254),
    "phone": ("a number such as +436601234567 (E.164)", _PHONE, 16),
    "locale": ("a locale such as pt-BR", LOCALE, 35),
}


def _names(path: str, value: Any, errors: list[FieldError]) -> int:
    """Check names of attributes, which filters write with dots between; returns how many there are."""
    count = 0
    if is_object(value):
        for name, below in value.items():
            if not 1 <= len(name) <= MAX_NAME or "." in name or has_control(name):
                wanted = f"a name of 1-{MAX_NAME} characters without control characters and dots"
                errors.append(FieldError(f"{path}/{shown(name, MAX_NAME)}", wanted, shown(name)))
            count += 1 + _names(f"{path}/{shown(name, MAX_NAME)}", below, errors)
    elif is_array(value):
        for index, one in enumerate(value):
            count += _names(f"{path}/{index}", one, errors)
    return count


def profile_json(profile: Profile) -> dict[str, Any]:
    """A profile with every member."""
    return {
        "email": profile.email,
        "phone": profile.phone,
        "locale": profile.locale,
        "timezone": profile.timezone,
        "attributes": msgspec.Raw(profile.attributes.encode()),
    }


_decode: Final = msgspec.json.Decoder(dict[str, Any]).decode


def pack(profile: Profile) -> str:
    """A valid profile as text, as messages carry it."""
    return _encode(profile_json(profile)).decode()


def unpack(text: str) -> Profile:
    """The profile of `pack`."""
    document = _decode(text)
    attributes = _encode(document.pop("attributes")).decode()
    return Profile(**document, attributes=attributes)
