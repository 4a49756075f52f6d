"""The members of a tenant's policy about its users' preferences: defaults, forced rules, limits,
the words of digests.

Defaults lie beneath the users' documents, forced rules above; limits say how often a user may be disturbed.
"""

from __future__ import annotations

import re
from typing import Any, Final
from zoneinfo import ZoneInfo

from carillon.budget import COLLECT_S, MAX_COUNT, MAX_WINDOW_S, Limit, Limits
from carillon.decision import DIGEST, FEED, TenantRules
from carillon.event_rules import Text, is_object, text_error
from carillon.preferences import MAX_ENTRIES, document_errors, rules_errors
from carillon.problems import FieldError, shown
from carillon.quiet_hours import QuietHours, minutes_of
from carillon.switches import Preferences, part
from carillon.templates import parse_reference

RULES: Final = ("defaults", "forced", "limits", "digests", "held")
"""The members."""

_TYPE: Final = Text(1, 64)
_LOCAL: Final = re.compile(r"([01][0-9]|2[0-3]):[0-5][0-9]")
_UTC: Final = ZoneInfo("UTC")
_DAYS: Final = frozenset(range(7))


def rules_of(document: dict[str, Any]) -> TenantRules | None:
    """The rules of a valid policy document, None if it has none."""
    closed = {
        kind: QuietHours(minutes_of(some["window"]["end"]), minutes_of(some["window"]["start"]), _UTC, _DAYS)
        for kind, some in part(document, "types").items()
        if some.get("window")
    }
    if not closed and not any(document.get(name) for name in RULES):
        return None
    defaults, limits = part(document, "defaults"), part(document, "limits")
    of_user, of_types = limits.get("user"), part(limits, "types")
    limited: Limits | None = None
    if of_user or of_types:
        limited = Limits(
            _limit(of_user) if of_user else None,
            {kind: _limit(some) for kind, some in of_types.items()},
            limits.get("overflow", DIGEST),
            round(limits.get("collectS", COLLECT_S) * 1000),
        )
    return TenantRules(
        Preferences(defaults),
        Preferences(part(document, "forced")),
        limited,
        Preferences({}, defaults.get("timezone")),
        closed,
        part(document, "digests").get("template"),
        part(document, "held").get("template"),
    )


def window_errors(path: str, some: Any) -> list[FieldError]:
    """What is wrong with the window of a type."""
    if not is_object(some) or set(some) != {"start", "end"}:
        return [FieldError(path, "{start, end}", shown(some))]
    errors = [
        FieldError(f"{path}/{name}", "a local time HH:MM", shown(value))
        for name, value in some.items()
        if not (isinstance(value, str) and _LOCAL.fullmatch(value))
    ]
    if not errors and some["start"] == some["end"]:
        errors.append(FieldError(f"{path}/end", "another time than start", some["end"]))
    return errors


def _limit(some: dict[str, Any]) -> Limit:
    return Limit(some["count"], round(some["windowS"] * 1000))


def rules_problems(document: dict[str, Any]) -> list[FieldError]:
    """What is wrong with the members."""
    errors: list[FieldError] = []
    for name in RULES:
        if name not in document:
            continue
        some = document[name]
        if not is_object(some):
            errors.append(FieldError(name, "an object", shown(some)))
        elif name == "limits":
            errors.extend(_limits(some))
        elif name in ("digests", "held"):
            errors.extend(_worded(name, some))
        elif name == "forced":
            for name_of, rules in some.items():
                path = f"forced/{shown(name_of)}"
                if name_of in ("categories", "types"):
                    errors.extend(rules_errors(path, rules))
                else:
                    errors.append(FieldError(path, "categories or types", "an unknown field"))
        else:
            errors.extend(document_errors("defaults/", some))
            if some.get("doNotDisturbUntil") is not None:
                errors.append(FieldError("defaults/doNotDisturbUntil", "a user's own choice", "a default"))
    return errors


def _limits(some: dict[str, Any]) -> list[FieldError]:
    errors: list[FieldError] = []
    for name, value in some.items():
        path = f"limits/{shown(name)}"
        if name == "user":
            errors.extend(_limit_errors(path, value))
        elif name == "types":
            if not is_object(value) or len(value) > MAX_ENTRIES:
                errors.append(FieldError(path, f"an object of at most {MAX_ENTRIES} types", shown(value)))
                continue
            for kind, limit in value.items():
                wrong = text_error(f"{path}/{shown(kind, 64)}", kind, _TYPE)
                errors.extend([wrong] if wrong is not None else _limit_errors(f"{path}/{kind}", limit))
        elif name == "overflow":
            if value not in (DIGEST, FEED):
                errors.append(FieldError(path, f"{DIGEST}|{FEED}", shown(value)))
        elif name == "collectS":
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value <= MAX_WINDOW_S:
                errors.append(FieldError(path, f"seconds from 0 to {MAX_WINDOW_S}", shown(value)))
        else:
            errors.append(FieldError(path, "user, types, overflow or collectS", "an unknown field"))
    return errors


def _worded(path: str, some: dict[str, Any]) -> list[FieldError]:
    errors = [
        FieldError(f"{path}/{shown(name)}", "template", "an unknown field")
        for name in some
        if name != "template"
    ]
    if parse_reference(some.get("template")) is None:
        got = shown(some["template"]) if "template" in some else "nothing"
        errors.append(FieldError(f"{path}/template", "the id of a template, perhaps @version", got))
    return errors


def _limit_errors(path: str, value: Any) -> list[FieldError]:
    if not is_object(value) or set(value) != {"count", "windowS"}:
        return [FieldError(path, "{count, windowS}", shown(value))]
    errors: list[FieldError] = []
    for name, low, most in (("count", 1, MAX_COUNT), ("windowS", 0.001, MAX_WINDOW_S)):
        number = value[name]
        kinds = int if name == "count" else int | float
        if not isinstance(number, kinds) or isinstance(number, bool) or not low <= number <= most:
            errors.append(FieldError(f"{path}/{name}", f"{low:g} to {most}", shown(number)))
    return errors
