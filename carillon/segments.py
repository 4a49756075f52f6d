"""Segments: users by a filter over what is known of them. Pure.

A filter is JSON: fields with conditions, all of which have to hold, and `and`, `or`, `not` around them:

    {"attributes.plan": "pro", "attributes.seats": {"gte": 10}, "not": {"platform": "ios"}}

It is read once, into a tree. `fits` evaluates the tree here; `compile_path` writes it as a path of SQL/JSON
(jsonpath) with variables, which PostgreSQL evaluates for each user. A property test holds both to one
verdict.

A field is looked up in the user's document `{attributes, locale, timezone, platform, lastSeenAgoS}`. Where a
list is met, each of its elements counts: a condition holds if it holds for one of them. A value of another
type than the condition's is no error, it just does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from carillon.event_rules import Text, has_control, is_array, is_object, text_error, tree_errors
from carillon.problems import DocumentError, FieldError, shown
from carillon.profiles import MAX_NAME

COMPARED: Final = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
OPERATORS: Final = ("eq", "ne", "in", "exists", *COMPARED, "contains")
FIELDS: Final = ("locale", "timezone", "platform", "lastSeenAgoS")
"""Fields beside `attributes.*`."""
MEMBERS: Final = ("description", "filter")
MAX_CONDITIONS: Final = 100
MAX_DEPTH: Final = 8
MAX_VALUES: Final = 100
"""Values of one `in`."""
_VALUE: Final = Text(0, 255, control=True)
_NEEDLE: Final = Text(1, 255, control=True)


class SegmentError(DocumentError):
    """A segment that breaks rules. Args (positional): the errors, in the order found."""


@dataclass(frozen=True, slots=True)
class Test:
    """One condition: the operator (`eq`, `in`, `exists`, `contains`, or one of `COMPARED`) and its value."""

    path: tuple[str, ...]
    operator: str
    value: Any


@dataclass(frozen=True, slots=True)
class Not:
    """Holds where its part does not."""

    part: Filter


@dataclass(frozen=True, slots=True)
class All:
    """Holds where all its parts do; without parts for everybody."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Any_:
    """Holds where one of its parts does."""

    parts: tuple[Filter, ...]


Filter = Test | Not | All | Any_


# -- reading ------------------------------------------------------------------------------------------


def parse_filter(value: Any, path: str = "filter") -> Filter:
    """The tree of a filter.

    Raises:
        SegmentError: it breaks a rule; `errors` names the first ten.
    """
    errors = tree_errors(value, path)
    if errors:
        raise SegmentError(errors)
    reader = _Reader()
    found = reader.filter(value, path, 1)
    if reader.conditions > MAX_CONDITIONS:
        wanted = f"at most {MAX_CONDITIONS} conditions"
        reader.errors.append(FieldError(path, wanted, f"{reader.conditions} conditions"))
    if reader.errors:
        raise SegmentError(reader.errors[:10])
    return found


class _Reader:
    def __init__(self) -> None:
        self.errors: list[FieldError] = []
        self.conditions = 0

    def wrong(self, path: str, expected: str, got: Any) -> Filter:
        self.errors.append(FieldError(path, expected, shown(got)))
        return All(())

    def filter(self, value: Any, path: str, depth: int) -> Filter:
        if not is_object(value):
            return self.wrong(path, "an object", value)
        if depth > MAX_DEPTH:
            return self.wrong(path, f"nesting of at most {MAX_DEPTH} filters", "deeper nesting")
        parts: list[Filter] = []
        for name, below in value.items():
            at = f"{path}/{shown(name)}"
            if name in ("and", "or"):
                if not is_array(below) or not below:
                    parts.append(self.wrong(at, "an array of filters", below))
                    continue
                some = tuple(self.filter(one, f"{at}/{n}", depth + 1) for n, one in enumerate(below))
                parts.append(All(some) if name == "and" else Any_(some))
            elif name == "not":
                parts.append(Not(self.filter(below, at, depth + 1)))
            else:
                parts.append(self.conditions_of(name, below, at))
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def conditions_of(self, name: str, value: Any, at: str) -> Filter:
        field = tuple(name.split("."))
        if name in FIELDS:
            pass
        elif field[0] != "attributes" or len(field) < 2:
            wanted = f"attributes.<name>, {', '.join(FIELDS)}, and, or, not"
            return self.wrong(at, wanted, "an unknown field")
        elif any(not part or len(part) > MAX_NAME or has_control(part) for part in field):
            return self.wrong(at, f"names of 1-{MAX_NAME} characters with dots between", name)
        if not is_object(value):
            value = {"eq": value}
        if not value:
            return self.wrong(at, "a condition", "none")
        parts = [
            self.test(field, operator, some, f"{at}/{shown(operator)}") for operator, some in value.items()
        ]
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def test(self, field: tuple[str, ...], operator: str, value: Any, at: str) -> Filter:
        self.conditions += 1
        if operator in ("eq", "ne"):
            self.scalar(value, at)
            found = Test(field, "eq", value)
            return found if operator == "eq" else Not(found)
        if operator == "in":
            if not is_array(value) or not 1 <= len(value) <= MAX_VALUES:
                return self.wrong(at, f"an array of 1 to {MAX_VALUES} values", value)
            for n, one in enumerate(value):
                self.scalar(one, f"{at}/{n}")
            return Test(field, "in", tuple(value))
        if operator == "exists":
            if not isinstance(value, bool):
                return self.wrong(at, "true or false", value)
            found = Test(field, "exists", None)
            return found if value else Not(found)
        if operator in COMPARED:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                return self.wrong(at, "a number or text", value)
            self.scalar(value, at)
            return Test(field, operator, value)
        if operator == "contains":
            wrong = text_error(at, value, _NEEDLE)
            if wrong is not None:
                self.errors.append(wrong)
            return Test(field, "contains", value)
        return self.wrong(at, f"one of {', '.join(OPERATORS)}", "an unknown operator")

    def scalar(self, value: Any, at: str) -> None:
        if isinstance(value, str):
            wrong = text_error(at, value, _VALUE)
            if wrong is not None:
                self.errors.append(wrong)
        elif value is not None and not isinstance(value, bool | int | float):
            self.wrong(at, "text, a number, true, false or null", value)


def uses(tree: Filter, field: str) -> bool:
    """Whether a filter asks for a field (`platform` takes a look at the user's devices)."""
    if isinstance(tree, Test):
        return tree.path == (field,)
    parts = (tree.part,) if isinstance(tree, Not) else tree.parts
    return any(uses(part, field) for part in parts)


# -- evaluating ---------------------------------------------------------------------------------------


def fits(tree: Filter, document: dict[str, Any]) -> bool:
    """Whether a user's document fits a filter."""
    if isinstance(tree, Not):
        return not fits(tree.part, document)
    if isinstance(tree, All):
        return all(fits(part, document) for part in tree.parts)
    if isinstance(tree, Any_):
        return any(fits(part, document) for part in tree.parts)
    found = _values(document, tree.path)
    if tree.operator == "exists":
        return bool(found)
    wanted = tree.value if tree.operator == "in" else (tree.value,)
    return any(_holds(tree.operator, one, other) for one in _unwrapped(found) for other in wanted)


def _values(document: Any, path: Sequence[str]) -> list[Any]:
    """What a path leads to; through lists by way of each element."""
    found: list[Any] = [document]
    for name in path:
        found = [one[name] for one in _unwrapped(found) if is_object(one) and name in one]
    return found


def _unwrapped(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for one in values:
        if is_array(one):
            found.extend(one)
        else:
            found.append(one)
    return found


def _holds(operator: str, one: Any, other: Any) -> bool:
    if operator == "contains":
        return isinstance(one, str) and other in one
    if _kind(one) != _kind(other):
        return False
    if operator in ("eq", "in"):
        return one == other
    if operator == "gt":
        return one > other
    if operator == "gte":
        return one >= other
    return one < other if operator == "lt" else one <= other


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "text"
    return "null" if value is None else "other"


# -- compiling ----------------------------------------------------------------------------------------


def compile_path(tree: Filter) -> tuple[str, dict[str, Any]]:
    """A filter as a jsonpath predicate (lax mode) and its variables.

    The predicate is true exactly where the filter holds; else it is false or unknown. Negations stand at
    single conditions alone, where unknown counts as false: a `not` holds exactly where its part does not.
    """
    variables: dict[str, Any] = {}
    return _compiled(tree, variables, holds=True), variables


def _compiled(tree: Filter, variables: dict[str, Any], *, holds: bool) -> str:
    if isinstance(tree, Not):
        return _compiled(tree.part, variables, holds=not holds)
    if isinstance(tree, Test):
        text = _leaf(tree, variables)
        return f"({text})" if holds else f"(!({text}) || (({text}) is unknown))"
    every = isinstance(tree, All) == holds  # De Morgan
    if not tree.parts:
        return "(1 == 1)" if every else "(1 == 0)"
    return (
        "("
        + (" && " if every else " || ").join(_compiled(p, variables, holds=holds) for p in tree.parts)
        + ")"
    )


def _leaf(test: Test, variables: dict[str, Any]) -> str:
    path = "$" + "".join(f".{json.dumps(name)}" for name in test.path)
    if test.operator == "exists":
        return f"exists({path})"
    if test.operator == "contains":
        return f'{path} like_regex {json.dumps(test.value)} flag "q"'
    name = f"v{len(variables)}"
    variables[name] = list(test.value) if test.operator == "in" else test.value
    wanted = f"${name}[*]" if test.operator == "in" else f"${name}"
    return f"{path} {COMPARED.get(test.operator, '==')} {wanted}"
