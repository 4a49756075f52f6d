"""Failpoints: a process dies, or hears of an error, around every commit, provider call and answer."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator

import pytest

from actors.link_stream import Link
from stores.postgres.cluster import ClusterStore
from stores.postgres.shard_store import ShardStore
from tests.simulation.failpoints import Armed, Passed, Point, points, statements, wired
from tests.simulation.scenario import simulate
from tests.simulation.world import World

SEEDS = 40
"""Simulations of which it is known what they pass. A point that none passes is a point without a test."""


@functools.cache
def passed() -> dict[tuple[str, str], list[tuple[int, int]]]:
    """(place, moment) -> the seeds that pass it, most often first, with how often."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    enqueue = Link._enqueue
    for seed in range(1, SEEDS + 1):
        counts: list[Passed] = []

        def watch(world: World, counts: list[Passed] = counts) -> None:
            counts.append(Passed(world))
            Link._enqueue = wired(world)  # type: ignore[method-assign]

        try:
            simulate(seed, change=watch)
        finally:
            Link._enqueue = enqueue  # type: ignore[method-assign]
        for at, hits in counts[0].hits.items():
            found.setdefault(at, []).append((hits, seed))
    return {at: [(seed, hits) for hits, seed in sorted(some, reverse=True)] for at, some in found.items()}


@pytest.fixture(autouse=True)
def _without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("point", list(points()), ids=str)
def test_nothing_is_lost_or_doubled_at(point: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every promise holds although the point goes off; a point that no simulation passes fails."""
    seeds = passed().get((point.place, point.moment))
    assert seeds, f"no simulation passes {point}"
    seed, hits = seeds[len(seeds) // 2]
    armed: list[Armed] = []

    def arm(world: World) -> None:
        armed.append(Armed(world, point, after_hits=hits // 2))
        monkeypatch.setattr(Link, "_enqueue", wired(world))

    world = simulate(seed, change=arm)
    assert armed[0].went_off
    assert not world.violations, f"seed {seed}: " + "\n".join(world.violations)


def test_every_statement_has_its_points() -> None:
    """What the shards and the coordinator ask of the store, each of it, can break off."""
    places = {point.place for point in points()}
    for kind, store in (("shard", ShardStore), ("coordinator", ClusterStore)):
        assert {f"{kind}.{name}" for name in statements(store)} <= places
