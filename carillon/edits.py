"""Edits of notifications: what a service may change of one it sent, and what a change makes of it. Pure.

A patch names members of the content; what it does not name stays. Null takes a member away (actions and data
become empty). Who got it, its type, category, priority, target and channels were decided when it was sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from carillon.clock import rfc3339
from carillon.errors import CarillonError, ExpiredError, InvalidInputError, RetractedError, VersionError
from carillon.event_rules import (
    ACTION_TEXTS,
    MAX_EVENT_BYTES,
    MAX_INT,
    Instant,
    expiry_ms,
    member_errors,
    tree_errors,
)
from carillon.notification import decode_content, encode_content
from carillon.problems import DocumentError, FieldError, shown

MEMBERS: Final = ("title", "body", "link", "imageUrl", "icon", "actions", "data", "expiresAt")
"""What can be edited."""
VERSION: Final = "version"
"""The version that is edited, in the request only."""
PUSHED: Final = ("title", "body", "link")
"""What a push shows of them."""
_OWN: Final = ("title", "body", "link", "imageUrl")
"""Members that a template may have given a channel of its own (`channelContent`)."""
_EMPTY: Final[dict[str, Any]] = {"actions": [], "data": {}}
_ACTION: Final = (*ACTION_TEXTS, "method", "payload")

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder().decode


class Patch(NamedTuple):
    """What a request asks for."""

    members: str
    """As JSON: named members with their new values, in the form in which they are stored."""
    version: int | None
    """That is to be edited; None: whichever there is."""


class Edited(NamedTuple):
    """What becomes of a notification."""

    content: str
    expires_ms: int | None
    shown: bool
    """A push shows something else now."""


def read_patch(document: Mapping[str, Any]) -> Patch:
    """The body of `PATCH /v1/notifications/{id}`.

    Raises:
        DocumentError: it breaks a rule.
    """
    wrong: list[FieldError] = []
    made: dict[str, Any] = {}
    version: int | None = None
    for name, value in document.items():
        if name == VERSION:
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_INT:
                wrong.append(FieldError(VERSION, "a version (a whole number from 1)", shown(value)))
            else:
                version = value
        elif name not in MEMBERS:
            wrong.append(FieldError(shown(name), f"one of {', '.join(MEMBERS)}", "a member that stays"))
        elif value is None:
            if name == "title":
                wrong.append(FieldError("title", "1-255 characters", "nothing"))
            made[name] = _EMPTY.get(name)
        else:
            errors = member_errors(name, value)
            wrong += errors
            if not errors:
                made[name] = _stored(name, value)
    wrong = wrong or tree_errors(dict(document))
    if wrong:
        raise DocumentError(wrong)
    return Patch(_encode(made).decode(), version)


def _stored(name: str, value: Any) -> Any:
    """A member in the form in which an event's is stored."""
    if name == "expiresAt":
        return rfc3339(expiry_ms(msgspec.convert(value, Instant)))
    if name == "actions":
        return [{part: one[part] for part in _ACTION if one.get(part) is not None} for one in value]
    return value


def edited(content: str, expires_ms: int | None, patch: str) -> Edited | None:
    """What a patch makes of a notification; None: nothing would be different.

    Args:
        content, expires_ms: as stored.
        patch: `Patch.members`.

    Raises:
        InvalidInputError: the notification would be too large.
    """
    before = decode_content(content)
    asked: dict[str, Any] = _decode(patch)
    after = before | asked
    if "expiresAt" in asked:
        at = asked["expiresAt"]
        expires_ms = None if at is None else expiry_ms(msgspec.convert(at, Instant))
    own = before.get("channelContent")
    if own is not None:
        # A text of its own that a template gave a channel was the form of what is edited now.
        gone = [name for name in _OWN if name in asked and asked[name] != before.get(name)]
        left = {
            channel: {name: text for name, text in texts.items() if name not in gone}
            for channel, texts in own.items()
        }
        after["channelContent"] = {channel: texts for channel, texts in left.items() if texts} or None
    made = encode_content(after)
    if made == encode_content(before):
        return None
    size = len(made.encode())
    if size > MAX_EVENT_BYTES:
        raise InvalidInputError(
            f"expected a notification of at most {MAX_EVENT_BYTES} bytes, got {size}",
            "", f"at most {MAX_EVENT_BYTES} bytes", f"{size} bytes",
        )  # fmt: skip
    shown_before = [before.get(name) for name in PUSHED]
    return Edited(made, expires_ms, [after.get(name) for name in PUSHED] != shown_before)


def over(expires_ms: int | None, retracted_ms: int | None, now_ms: int) -> CarillonError | None:
    """Why a notification is not edited any more; None: it may be."""
    if retracted_ms is not None:
        return RetractedError(f"it was retracted at {rfc3339(retracted_ms)}")
    if expires_ms is not None and expires_ms <= now_ms:
        return ExpiredError(f"it has expired at {rfc3339(expires_ms)}")
    return None


def conflict(version: int, asked: int | None) -> CarillonError | None:
    """Why the present version is not to be edited; None: it is.

    Only for an edit that changes something: one that was made already (a try whose answer was lost) succeeds.

    Args:
        asked: the version that the caller means; None: whichever there is.
    """
    if asked is not None and asked != version:
        return VersionError(
            f"expected version {asked}, but version {version} is the present one",
            VERSION, f"version {version}", f"version {asked}",
        )  # fmt: skip
    return None


def former_members(content: str) -> dict[str, Any]:
    """What can be edited of a former content, as it was."""
    members = decode_content(content)
    return {name: members[name] for name in MEMBERS if members.get(name) not in (None, [], {})}


def read_if_match(value: str) -> int | None:
    """The version of an If-Match header (`"3"`); None: any (`*`).

    Raises:
        DocumentError: it is no version.
    """
    text = value.strip()
    if text == "*":
        return None
    digits = text.removeprefix("W/").strip('"')
    if not digits.isascii() or not digits.isdigit() or len(digits) > 9:
        raise DocumentError([FieldError("If-Match", 'an ETag as it was told, such as "3"', shown(text))])
    return int(digits)
