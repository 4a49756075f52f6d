"""Variants: shares, stickiness, and what results are worth."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from carillon.experiments import choose, interval

WEIGHTS = st.lists(st.integers(1, 1000), min_size=2, max_size=6)


@given(st.text(max_size=30), WEIGHTS)
def test_a_user_keeps_the_variant(key: str, weights: list[int]) -> None:
    """The same user and variants: the same choice, whatever the order they are written in."""
    variants = [(f"v{i}", weight) for i, weight in enumerate(weights)]
    chosen = variants[choose(key, variants)]
    backwards = variants[::-1]
    assert backwards[choose(key, backwards)] == chosen


@given(st.text(max_size=30), WEIGHTS, st.data())
def test_only_those_move_that_must(key: str, weights: list[int], data: st.DataObject) -> None:
    """A variant that grows takes users and loses none; the others exchange none among themselves."""
    grown = data.draw(st.integers(0, len(weights) - 1))
    before = choose(key, [(f"v{i}", w) for i, w in enumerate(weights)])
    weights[grown] += data.draw(st.integers(1, 1000))
    after = choose(key, [(f"v{i}", w) for i, w in enumerate(weights)])
    assert after in (before, grown)


def test_shares_are_those_of_the_weights() -> None:
    """Of 20,000 users each variant gets its share, to within five standard deviations."""
    variants = [("a", 1), ("b", 3), ("c", 6)]
    counts = [0, 0, 0]
    for user in range(20_000):
        counts[choose(f"t\0x\0u{user}", variants)] += 1
    for count, (_, weight) in zip(counts, variants, strict=True):
        share = weight / 10
        assert abs(count - 20_000 * share) < 5 * (20_000 * share * (1 - share)) ** 0.5


@settings(derandomize=True, max_examples=40)
@given(st.text(max_size=10), WEIGHTS)
def test_shares_follow_the_weights(template: str, weights: list[int]) -> None:
    """Whatever weights and template: each variant has its share, to within six standard deviations."""
    variants = [(f"v{i}", weight) for i, weight in enumerate(weights)]
    counts = [0] * len(weights)
    for user in range(2000):
        counts[choose(f"t\0{template}\0u{user}", variants)] += 1
    for count, weight in zip(counts, weights, strict=True):
        share = weight / sum(weights)
        assert abs(count - 2000 * share) <= 6 * (2000 * share * (1 - share)) ** 0.5 + 1


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_intervals_hold_the_rate(hits: int, more: int) -> None:
    """The rate seen lies within; more tries at the same rate make it narrower; nothing seen says nothing."""
    tries = hits + more
    low, high = interval(hits, tries)
    assert 0.0 <= low <= high <= 1.0
    if tries:
        assert low <= hits / tries <= high
        wider = interval(hits * 2, tries * 2)
        assert wider[1] - wider[0] < high - low
    else:
        assert (low, high) == (0.0, 1.0)


def test_intervals_are_right_nineteen_times_of_twenty() -> None:
    """Of 2,000 experiments with a known rate the interval holds it in about 95 %."""
    rng = random.Random(7)
    for rate, tries in ((0.02, 300), (0.5, 50)):
        held = 0
        for _ in range(2000):
            low, high = interval(sum(rng.random() < rate for _ in range(tries)), tries)
            held += low <= rate <= high
        assert 0.93 < held / 2000 < 0.975
