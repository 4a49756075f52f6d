"""Failpoints: a process dies, or hears of an error, around every commit, provider call and answer."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from actors.link_stream import Link
from stores.postgres.cluster import ClusterStore
from stores.postgres.digests import DigestStore
from stores.postgres.shard_store import ShardStore
from tests.simulation.failpoints import Armed, Passed, Point, points, statements, wired
from tests.simulation.scenario import simulate
from tests.simulation.world import World

SEEDS = 40
"""Simulations of which it is known what they pass."""
MOST = 500
"""A point that none of so many simulations passes is a point without a test."""

_found: dict[tuple[str, str], list[tuple[int, int]]] = {}
_last = 0


def passed(place: str, moment: str) -> list[tuple[int, int]]:
    """The (seed, how often) that pass a point, most often first; more are tried for what is rare."""
    global _last
    while _last < SEEDS or (_last < MOST and (place, moment) not in _found):
        _last += 1
        for at, hits in _hits(_last).items():
            _found.setdefault(at, []).append((_last, hits))
    return sorted(_found.get((place, moment), ()), key=lambda found: found[1], reverse=True)


def _hits(seed: int) -> dict[tuple[str, str], int]:
    """(place, moment) -> how often a simulation passes it."""
    counts: list[Passed] = []
    enqueue = Link._enqueue

    def watch(world: World) -> None:
        counts.append(Passed(world))
        Link._enqueue = wired(world)  # type: ignore[method-assign]

    try:
        simulate(seed, change=watch)
    finally:
        Link._enqueue = enqueue  # type: ignore[method-assign]
    gc.collect(0)
    return counts[0].hits


@pytest.fixture(autouse=True)
def _without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("point", list(points()), ids=str)
def test_nothing_is_lost_or_doubled_at(point: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every promise holds although the point goes off; a point that no simulation passes fails."""
    seeds = passed(point.place, point.moment)
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
    stores = ("shard", ShardStore, ""), ("shard", DigestStore, "digests."), ("coordinator", ClusterStore, "")
    for kind, store, prefix in stores:
        assert {f"{kind}.{name}" for name in statements(store, prefix)} <= places
