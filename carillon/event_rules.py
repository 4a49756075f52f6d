"""The rules of one event, told one by one: the slow path that explains what the fast path refused.

`carillon.events` decodes events with a typed decoder that only says yes or no. Whatever it refuses comes here
as plain Python values, and every broken rule is named. Both follow protocol.md; a property test holds them
to the same verdict.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, Final, NamedTuple, TypeGuard, cast

import msgspec
from msgspec import Meta

from carillon.external import CHANNELS, EXTERNAL
from carillon.messages import PRIORITIES
from carillon.problems import FieldError, shown

MAX_INT: Final = 2**53 - 1
MAX_DEPTH: Final = 32
MAX_EVENT_BYTES: Final = 32 * 1024
MAX_BODY_BYTES: Final = 4096
MAX_ITEMS: Final = 1000
MAX_ACTIONS: Final = 10
MAX_KEY: Final = 255
MAX_URL: Final = 2048
LAST_EXPIRY_MS: Final = 253_370_764_800_000
"""9999-01-01: PostgreSQL and Python end with that year, and offsets must not carry beyond it."""

MAX_CHANNELS: Final = 20
LATER_CHANNELS: Final = ("email", "sms", "webhook", "chat", "webpush")
_LISTS: Final = ("userIds", "channels", "fallback", "actions")
LATER_FIELDS: Final = ("topic",)
"""Known to the protocol, not built yet: refused unless null."""
DEDUPES: Final = ("drop", "count", "replace", "accumulate")
"""What `dedupe.merge` may be (carillon/merging.py)."""
MIN_WINDOW_S: Final = 0.001
MAX_WINDOW_S: Final = 86_400
"""Of `dedupe.windowS`."""
METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")
PRIORITY_NAMES: Final = (*PRIORITIES, "critical")

Instant = Annotated[datetime, Meta(tz=True)]
"""An RFC 3339 time with its offset."""

_TEMPLATE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(@[1-9][0-9]{0,8})?")
LOCALE: Final = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8}){0,3}")
"""What a locale looks like (BCP 47, as far as templates tell them apart)."""
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE: Final = re.compile(r"[\ud800-\udfff]")


class Text(NamedTuple):
    """A text member: its length in characters, and whether control characters are allowed."""

    low: int
    high: int
    control: bool = False


TEXTS: Final[dict[str, Text]] = {
    "userId": Text(1, 128),
    "type": Text(1, 64),
    "category": Text(1, 64),
    "title": Text(1, 255, control=True),
    "actorId": Text(1, 128),
    "targetType": Text(1, 64),
    "targetId": Text(1, 255),
    "imageUrl": Text(1, MAX_URL),
    "icon": Text(1, MAX_URL),
    "link": Text(1, MAX_URL),
    "collapseKey": Text(1, MAX_KEY),
    "campaignId": Text(1, 128),
    "sourceApp": Text(1, 64),
    "idempotencyKey": Text(1, MAX_KEY),
}
ACTION_TEXTS: Final[dict[str, Text]] = {
    "id": Text(1, 64),
    "label": Text(1, 255, control=True),
    "action": Text(1, 64),
    "url": Text(1, MAX_URL),
}


def is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    """True for a JSON object."""
    return isinstance(value, dict)


def is_array(value: Any) -> TypeGuard[list[Any]]:
    """True for a JSON array."""
    return isinstance(value, list)


def has_control(text: str) -> bool:
    """True if a C0, DEL or C1 control character is in `text`."""
    return not text.isprintable() and _CONTROL.search(text) is not None


def text_error(path: str, value: Any, rule: Text) -> FieldError | None:
    """What is wrong with a text member, or None."""
    if not isinstance(value, str):
        return FieldError(path, "text", shown(value))
    if not rule.low <= len(value) <= rule.high:
        return FieldError(path, f"{rule.low}-{rule.high} characters", f"{len(value)} characters")
    if not rule.control and has_control(value):
        return FieldError(path, "no control characters", shown(value))
    return None


def tree_errors(value: Any, path: str = "", depth: int = 1) -> list[FieldError]:
    """What no document may hold: NUL, lone surrogates, numbers that readers round, deep nesting.

    Args:
        depth: of `value` itself; the event's own object is 1.
    """
    found: list[FieldError] = []
    _walk(value, path, depth, found)
    return found


def _walk(value: Any, path: str, depth: int, found: list[FieldError]) -> None:
    if len(found) >= 10:  # enough to act on; a hostile document does not get a long answer
        return
    kind: Any = cast("Any", type(value))
    if kind is str:
        if "\0" in value:
            found.append(FieldError(path, "no NUL character", shown(value)))
        elif _SURROGATE.search(value):
            found.append(FieldError(path, "no lone surrogate", shown(value)))
    elif kind is int:
        if not -MAX_INT <= value <= MAX_INT:
            found.append(FieldError(path, "an integer between -(2^53-1) and 2^53-1", shown(value)))
    elif kind is float:
        if value - value != 0.0:  # infinity (1e400) and NaN
            found.append(FieldError(path, "a finite number", shown(value)))
    elif kind is dict or kind is list:
        if depth > MAX_DEPTH:
            found.append(FieldError(path, f"nesting of at most {MAX_DEPTH}", "deeper nesting"))
            return
        if kind is list:
            for index, item in enumerate(value):
                _walk(item, f"{path}/{index}" if path else str(index), depth + 1, found)
            return
        for key, item in value.items():
            name = shown(key, 40)
            below = f"{path}/{name}" if path else name
            if "\0" in key or _SURROGATE.search(key):
                found.append(FieldError(below, "a name without NUL and lone surrogates", name))
            _walk(item, below, depth + 1, found)


def later_field(name: str, value: Any) -> FieldError | None:
    """The complaint about a member that is known but not built, or None if its value asks for nothing."""
    if value is None:
        return None
    if name == "topic":
        return FieldError(name, "absent here: it stands in the one event of POST /v1/events", shown(value))
    if name in LATER_FIELDS:
        return FieldError(name, "absent: not supported yet", shown(value))
    return None


def _check_body(value: Any) -> FieldError | None:
    if not isinstance(value, str):
        return FieldError("body", "text", shown(value))
    size = len(value.encode("utf-8", "surrogatepass"))
    return (
        FieldError("body", f"at most {MAX_BODY_BYTES} bytes", f"{size} bytes")
        if size > MAX_BODY_BYTES
        else None
    )


def _check_priority(value: Any) -> FieldError | None:
    ok = isinstance(value, str) and value in PRIORITY_NAMES
    return None if ok else FieldError("priority", "|".join(PRIORITY_NAMES), shown(value))


def _check_data(value: Any) -> FieldError | None:
    return None if is_object(value) else FieldError("data", "an object", shown(value))


def _check_expires(value: Any) -> FieldError | None:
    wrong = FieldError("expiresAt", "RFC 3339 with offset, from 1970 to 9998", shown(value))
    if not isinstance(value, str):
        return wrong
    try:
        at: datetime = msgspec.convert(value, Instant)
    except (msgspec.ValidationError, UnicodeError):
        return wrong
    return None if 0 <= expiry_ms(at) < LAST_EXPIRY_MS else wrong


def _check_schedule(value: Any) -> FieldError | None:
    wrong = _check_expires(value)
    return None if wrong is None else wrong._replace(path="scheduleAt")


def _check_flag(value: Any) -> FieldError | None:
    return None if isinstance(value, bool) else FieldError("aggregate", "true or false", shown(value))


def _check_dedupe(value: Any) -> FieldError | None:
    if not is_object(value):
        return FieldError("dedupe", "an object", shown(value))
    for name, part in value.items():
        path = f"dedupe/{shown(name)}"
        if name not in ("key", "windowS", "merge"):
            return FieldError(path, "key, windowS or merge", "an unknown field")
        if part is None:
            continue
        if name == "key":
            error = text_error(path, part, Text(1, MAX_KEY))
            if error is not None:
                return error
        elif name == "merge" and part not in DEDUPES:
            return FieldError(path, "|".join(DEDUPES), shown(part))
        elif name == "windowS":
            number = isinstance(part, int | float) and not isinstance(part, bool)
            if not number or not MIN_WINDOW_S <= cast("float", part) <= MAX_WINDOW_S:
                wanted = f"seconds from {MIN_WINDOW_S:g} to {MAX_WINDOW_S}"
                return FieldError(path, wanted, shown(part))
    return None


def _check_template(value: Any) -> FieldError | None:
    ok = isinstance(value, str) and _TEMPLATE.fullmatch(value) is not None
    return None if ok else FieldError("template", "the id of a template, or id@version", shown(value))


def _check_params(value: Any) -> FieldError | None:
    return None if is_object(value) else FieldError("params", "an object", shown(value))


def _check_locale(value: Any) -> FieldError | None:
    ok = isinstance(value, str) and LOCALE.fullmatch(value) is not None
    return None if ok else FieldError("locale", "a locale such as pt or pt-BR", shown(value))


_OTHERS: Final[dict[str, Callable[[Any], FieldError | None]]] = {
    "body": _check_body,
    "priority": _check_priority,
    "data": _check_data,
    "expiresAt": _check_expires,
    "scheduleAt": _check_schedule,
    "aggregate": _check_flag,
    "dedupe": _check_dedupe,
    "template": _check_template,
    "params": _check_params,
    "locale": _check_locale,
}


def expiry_ms(at: datetime) -> int:
    """Milliseconds since the epoch of an aware time, exactly (no float)."""
    day = at.toordinal() - 719_163
    offset = at.utcoffset()
    shift_ms = 0 if offset is None else round(offset.total_seconds()) * 1000
    clock_ms = ((at.hour * 60 + at.minute) * 60 + at.second) * 1000 + at.microsecond // 1000
    return day * 86_400_000 + clock_ms - shift_ms


class Refusal(NamedTuple):
    """Why an event is refused."""

    code: str
    """invalid | not_supported."""
    errors: list[FieldError]


def explain_event(item: Any, *, recipients: bool) -> Refusal | None:
    """Check one event given as plain values; None if it follows every rule.

    Args:
        item: what stands for the event in the request, of any type.
        recipients: False inside of a batch, where `userIds` is not supported.
    """
    if not is_object(item):
        return Refusal("invalid", [FieldError("", "an event (an object)", shown(item))])
    wrong: list[FieldError] = []
    later: list[FieldError] = []
    for name, value in item.items():
        if value is None and (name in TEXTS or name in _OTHERS or name in _LISTS):
            continue  # null means absent
        late = later_field(name, value)
        if late is not None:
            later.append(late)
        elif name in LATER_FIELDS:
            continue
        elif name in TEXTS:
            error = text_error(name, value, TEXTS[name])
            if error is not None:
                wrong.append(error)
        elif name in _OTHERS:
            error = _OTHERS[name](value)
            if error is not None:
                wrong.append(error)
        elif name == "channels":
            _explain_channels(name, value, CHANNELS, wrong, later)
        elif name == "fallback":
            if value != []:
                _explain_channels(name, value, tuple(EXTERNAL), wrong, later)
        elif name == "actions":
            _explain_actions(value, wrong)
        elif name == "userIds":
            if not recipients:
                later.append(
                    FieldError("userIds", "userId: userIds inside of a batch is not supported", "userIds")
                )
            elif not is_array(value):
                wrong.append(FieldError("userIds", "an array of user ids", shown(value)))
        else:
            wrong.append(FieldError(shown(name), "a field of the protocol", "an unknown field"))
    _explain_required(item, wrong, later)
    _explain_merging(item, wrong)
    if not wrong and not later:
        # userIds have their own verdict each (one bad recipient does not fail the others).
        wrong = tree_errors({k: v for k, v in item.items() if k != "userIds"})
    if wrong:
        return Refusal("invalid", wrong + later)
    return Refusal("not_supported", later) if later else None


def member_errors(name: str, value: Any) -> list[FieldError]:
    """What is wrong with one member of an event, other than its recipients and channels."""
    wrong: list[FieldError] = []
    if name == "actions":
        _explain_actions(value, wrong)
    else:
        error = text_error(name, value, TEXTS[name]) if name in TEXTS else _OTHERS[name](value)
        wrong += [] if error is None else [error]
    return wrong


def _explain_required(item: dict[str, Any], wrong: list[FieldError], later: list[FieldError]) -> None:
    if item.get("type") is None:
        wrong.append(FieldError("type", "1-64 characters", "nothing"))
    if item.get("template") is None:
        if item.get("title") is None:
            wrong.append(FieldError("title", "1-255 characters", "nothing"))
        for name in ("params", "locale"):
            if item.get(name) is not None:
                wrong.append(FieldError(name, f"absent: {name} belongs to template", shown(item[name])))
    elif item.get("body") is not None:
        wrong.append(FieldError("body", "absent: the template has it", shown(item["body"])))
    named = [name for name in ("userId", "userIds", "topic") if item.get(name) is not None]
    if not named:
        wrong.append(FieldError("userId", "userId or userIds", "neither"))
    elif len(named) > 1:
        wrong.append(FieldError(named[1], f"one of {' and '.join(named)}", "several"))


def _explain_merging(item: dict[str, Any], wrong: list[FieldError]) -> None:
    dedupe = item.get("dedupe")
    merge = dedupe.get("merge") if is_object(dedupe) else None
    if item.get("aggregate") is True and merge in DEDUPES and merge != DEDUPES[0]:
        wrong.append(FieldError("dedupe/merge", f"{DEDUPES[0]}: aggregate decides on the rest", merge))


def _explain_channels(
    name: str, value: Any, known: tuple[str, ...], wrong: list[FieldError], later: list[FieldError]
) -> None:
    if not is_array(value) or not value:
        wrong.append(FieldError(name, f"some of {', '.join(known)}", shown(value)))
        return
    words = " or ".join(known)
    for index, channel in enumerate(value[:MAX_CHANNELS]):
        if isinstance(channel, str) and channel in LATER_CHANNELS:
            later.append(FieldError(f"{name}/{index}", f"{words}: not supported yet", channel))
        elif channel not in known:
            wrong.append(FieldError(f"{name}/{index}", words, shown(channel)))
    if len(value) > MAX_CHANNELS:
        wrong.append(FieldError(name, f"at most {MAX_CHANNELS} entries", f"{len(value)} entries"))


def _explain_actions(value: Any, wrong: list[FieldError]) -> None:
    if not is_array(value) or len(value) > MAX_ACTIONS:
        got = f"{len(value)} actions" if is_array(value) else shown(value)
        wrong.append(FieldError("actions", f"an array of at most {MAX_ACTIONS} actions", got))
        return
    for index, action in enumerate(value):
        path = f"actions/{index}"
        if not is_object(action):
            wrong.append(FieldError(path, "an object", shown(action)))
            continue
        for name, part in action.items():
            below = f"{path}/{shown(name)}"
            if name not in ACTION_TEXTS and name not in ("method", "payload"):
                wrong.append(FieldError(below, "a field of an action", "an unknown field"))
            elif part is None:
                continue
            elif name in ACTION_TEXTS:
                error = text_error(below, part, ACTION_TEXTS[name])
                if error is not None:
                    wrong.append(error)
            elif name == "method" and part not in METHODS:
                wrong.append(FieldError(below, "|".join(METHODS), shown(part)))
            elif name == "payload" and not is_object(part):
                wrong.append(FieldError(below, "an object", shown(part)))
