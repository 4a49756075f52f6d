"""How a field of the settings is declared, read and held to its bounds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import field
from typing import Any, TypeVar

from carillon.errors import SettingsError

T = TypeVar("T")


def setting(
    default: T, doc: str, *, low: float | None = None, high: float | None = None, unit: str = ""
) -> T:
    """Declare a field: its default, what it does, its bounds (inclusive) and its unit."""
    meta: dict[str, Any] = {"doc": doc, "low": low, "high": high, "unit": unit}
    return field(default=default, metadata=meta)


def check_bounds(section: str, values: Any) -> None:
    """Raises SettingsError if a field of `values` is out of its bounds."""
    for f in dataclasses.fields(values):
        value, low, high = getattr(values, f.name), f.metadata["low"], f.metadata["high"]
        unit = f" {f.metadata['unit']}" if f.metadata["unit"] else ""
        if low is not None and value < low:
            raise SettingsError(f"expected {section}.{f.name} to be at least {low}{unit}, got {value}")
        if high is not None and value > high:
            raise SettingsError(f"expected {section}.{f.name} to be at most {high}{unit}, got {value}")


def parse_value(name: str, kind: Any, text: Any) -> Any:
    """The value of a field, of a TOML value or an environment variable. Raises SettingsError."""
    try:
        if kind is bool:
            word = str(text).lower()
            if word not in {"1", "0", "true", "false", "yes", "no"}:
                raise ValueError
            return word in {"1", "true", "yes"}
        if kind is not str and (isinstance(text, bool) or (kind is int and isinstance(text, float))):
            raise ValueError  # int() would round 80.5 and take true for 1
        value: Any = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError  # nan passes every bound
        return value
    except (TypeError, ValueError):
        names: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}
        wanted = names.get(kind, "text")
        raise SettingsError(f"expected {name} to be {wanted}, got {text!r}") from None
