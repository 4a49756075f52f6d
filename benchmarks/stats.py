"""Percentiles, medians over repeats, and the comparison with a baseline. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

HIGHER_IS_BETTER: Final = ("per_s",)
"""A metric whose name ends so improves upwards; all others (latency, memory, CPU) improve downwards."""


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value such that at least `share` (0..1] of the sample is not above it (nearest rank).

    Nearest rank never interpolates, so a reported p999 is a latency that really happened. `ordered` is sorted
    upwards; an empty one gives NaN.
    """
    if not ordered:
        return math.nan
    rank = math.ceil(share * len(ordered) - 1e-9)
    return ordered[min(len(ordered) - 1, max(0, rank - 1))]


def summary_ms(seconds: Iterable[float]) -> dict[str, float]:
    """Summarise durations given in seconds: `{n, p50, p99, p999, max, mean}` in milliseconds (n is a count).

    With fewer than 1,000 samples p999 is simply the maximum; `n` stands beside it for that reason.
    """
    ordered = sorted(seconds)
    if not ordered:
        return {"n": 0}
    return {
        "n": len(ordered),
        "p50": percentile(ordered, 0.50) * 1000,
        "p99": percentile(ordered, 0.99) * 1000,
        "p999": percentile(ordered, 0.999) * 1000,
        "max": ordered[-1] * 1000,
        "mean": statistics.fmean(ordered) * 1000,
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numeric leaves of nested metrics, by dotted path."""
    flat: dict[str, float] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{path}."))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[path] = float(value)
    return flat


def median_tree(trees: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median of every numeric leaf over repeats; a leaf missing from some repeats uses those that have it.

    Anything that is not a number is taken from the last repeat.
    """
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for tree in trees for name in tree):
        values = [tree[name] for tree in trees if name in tree]
        if all(isinstance(value, Mapping) for value in values):
            merged[name] = median_tree(values)
        elif all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            merged[name] = statistics.median(values)
        else:
            merged[name] = values[-1]
    return merged


def change_percent(metric: str, before: float, now: float) -> float | None:
    """How much worse `now` is, in percent: positive is a regression, whichever way the metric improves.

    None if the baseline is zero or either value is NaN.
    """
    if not before or math.isnan(before) or math.isnan(now):
        return None
    change = (now - before) / before * 100
    return -change if metric.endswith(HIGHER_IS_BETTER) else change
