"""What waits in simulations: users who want digests, or are not to be disturbed, and what becomes of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from carillon.clock import rfc3339

if TYPE_CHECKING:
    from tests.simulation.store import Delivery
    from tests.simulation.world import World

MINUTE_MS = 60_000
FAR_MS = 300_000
"""What is due later than that waits for an hour, or a day, that no simulation sees."""


def wish(world: World) -> dict[str, Any]:
    """What one user, or the tenant for all, asks for."""
    dice = world.waiting
    assert dice is not None
    now_ms = world.clock.now_ms()
    what = dice.random()
    if what < 0.55:  # due at the next full minute; once that has passed, tomorrow
        minute = (now_ms // MINUTE_MS + 1) % 1440
        return {"digest": {"frequency": "daily", "at": f"{minute // 60:02}:{minute % 60:02}"}}
    if what < 0.65:
        return {"digest": "hourly"}
    return {}


def begin(world: World, tenant: str, users: list[str]) -> None:
    """What the tenant says for all, and what some say themselves."""
    dice = world.waiting
    if dice is None:
        return
    if dice.random() < 0.6:
        world.db.policies[tenant] = (world.db.policies[tenant] or {}) | {"defaults": wish(world)}
    for user in users:
        if dice.random() < 0.5:
            world.prefer(user, json.dumps(wish(world)))


def step(world: World, tenant: str, users: list[str]) -> None:
    """Something is done about what waits, now and then."""
    dice = world.waiting
    if dice is None or dice.random() > 0.25:
        return
    user, what = dice.choice(users), dice.random()
    waits = [d for d in opened(world) if d.note.stream.key.user == user]
    if what < 0.3 and waits:
        chosen = dice.choice(waits)
        assert chosen.digest is not None
        world.change_digest(user, chosen.digest, "flush")
    elif what < 0.45 and waits:
        chosen = dice.choice(waits)
        assert chosen.digest is not None
        world.change_digest(user, chosen.digest, "remove", chosen.note.row.id)
    elif what < 0.7:
        world.prefer(user, json.dumps(wish(world)))
    elif what < 0.9:  # held, and told together a little later
        until_ms = world.clock.now_ms() + dice.choice((700, 1500, 3000))
        world.prefer(user, json.dumps({"doNotDisturbUntil": rfc3339(until_ms)}))
    else:
        world.db.policies[tenant] = (world.db.policies[tenant] or {}) | {"defaults": wish(world)}


def end(world: World) -> None:
    """Nobody waits for tomorrow: what is open is told."""
    if world.waiting is not None:
        for user, digest in sorted({(d.note.stream.key.user, d.digest or b"") for d in opened(world)}):
            world.change_digest(user, digest, "flush")


def opened(world: World) -> list[Delivery]:
    """What waits in digests that are not told."""
    return [
        d
        for d in world.db.deliveries.values()
        if d.digest is not None and d.carrier is None and d.state == "planned"
    ]


def tomorrow(world: World, delivery: Delivery) -> bool:
    """Whether a row waits in a digest of a day that is not simulated."""
    far = delivery.due_ms - world.clock.now_ms() > FAR_MS
    return far and delivery.digest is not None and (delivery.carrier, delivery.state) == (None, "planned")
