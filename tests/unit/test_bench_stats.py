"""Percentiles, medians and baseline arithmetic of the benchmarks."""

from __future__ import annotations

import math

import pytest

from benchmarks.stats import change_percent, flatten, median_tree, percentile, summary_ms


def test_percentiles_are_nearest_rank() -> None:
    """Of 1..1000 the median is 500, p99 990, p999 999: values that occurred, never interpolated ones."""
    ordered = [float(n) for n in range(1, 1001)]
    assert [percentile(ordered, share) for share in (0.5, 0.99, 0.999, 1.0)] == [500, 990, 999, 1000]


def test_percentile_of_few_values_is_the_worst_one() -> None:
    """With three samples p99 is the largest; with none it is NaN, not zero."""
    assert percentile([1.0, 2.0, 9.0], 0.99) == 9.0
    assert math.isnan(percentile([], 0.5))


def test_summary_converts_to_milliseconds_and_counts() -> None:
    """Seconds go in in any order, milliseconds come out with the sample size."""
    summary = summary_ms([0.003, 0.001, 0.002])
    assert summary["n"] == 3
    assert summary["p50"] == pytest.approx(2.0)
    assert summary["max"] == pytest.approx(3.0)
    assert summary_ms([]) == {"n": 0}


def test_medians_reach_nested_leaves() -> None:
    """Each leaf is the median of its own values, a leaf missing from a repeat included."""
    trees = [{"a": {"p50": 1.0}, "b": 5}, {"a": {"p50": 9.0}, "b": 7}, {"a": {"p50": 2.0}}]
    assert median_tree(trees) == {"a": {"p50": 2.0}, "b": 6.0}


def test_worse_is_positive_for_latency_and_for_throughput() -> None:
    """Latency that grew and throughput that fell are both regressions."""
    assert change_percent("post_ms.p50", 2.0, 3.0) == pytest.approx(50.0)
    assert change_percent("events_per_s", 100.0, 80.0) == pytest.approx(20.0)
    assert change_percent("post_ms.p50", 0.0, 3.0) is None


def test_flatten_leaves_text_and_truth_values_out() -> None:
    """Only numbers are compared."""
    assert flatten({"a": {"b": 1, "c": "x"}, "d": True, "e": 2.5}) == {"a.b": 1.0, "e": 2.5}
