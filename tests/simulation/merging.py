"""Merging in simulations: what producers ask for, and what must hold of it at the end."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

from carillon.ids import uuid_text
from carillon.merging import DUPLICATE, MERGED, OPENED
from carillon.messages import Dedupe
from carillon.notification import decode_content

if TYPE_CHECKING:
    from tests.simulation.world import World

ACTORS = ("john", "jane", "jim", "joan", None)


def ask(rng: random.Random) -> dict[str, Any]:
    """What one event asks for; most ask for nothing. Not of the world's own dice: others stay as they are."""
    what = rng.random()
    if what < 0.6:
        return {}
    actor = rng.choice(ACTORS)
    if what < 0.85:
        return {"aggregate": True, "actor": actor}
    merge = rng.choice(("drop", "drop", "count", "replace", "accumulate"))
    return {"dedupe": Dedupe(merge, rng.choice(("a", "b"))), "actor": actor}


def check_merged(world: World) -> None:
    """Every event that was merged is in the notification that was told, once, and counted there."""
    db = world.db
    counts: Counter[bytes] = Counter()
    actors: dict[bytes, set[str]] = {}
    for event, _ in db.merged.values():
        if event.status == DUPLICATE:
            continue
        known = actors.setdefault(event.notification, set())
        counts[event.notification] += event.how != "aggregate" or event.actor not in known
        if event.actor is not None:
            known.add(event.actor)
        if (event.status == OPENED) != (event.event in db.notes):
            world.violated(f"merging: {event.event.hex()[-6:]} is {event.status}, is it a notification?")
    for entry in world.published:
        outcome = entry.outcome
        if not entry.acknowledged or outcome is None or outcome.status not in ("merged", "duplicate"):
            continue
        became = db.merged.get(entry.event.id)
        if became is None and entry.event.idempotency_key is not None:
            continue  # a replay: another event has the key
        if became is None or became[0].notification != outcome.id:
            world.violated(f"merging: {entry.event.id.hex()[-6:]} was told {outcome.status} and is not")
    for raw, count in counts.items():
        content = decode_content(db.notes[raw].row.content)
        if content.get("count", count) != count:
            world.violated(f"merging: {raw.hex()[-6:]} says {content['count']}, {count} were merged")
    for device in world.devices:
        for row in device.view.store.rows:
            shown = device.view.notes.get(uuid_text(row.id))
            title = decode_content(row.content)["title"]
            if shown is not None and shown.title != title:
                world.violated(f"G5: {device.name} shows seq {row.seq} as {shown.title}, it is {title}")


def told_by(world: World, raw: bytes) -> bytes:
    """The notification in which an event is."""
    known = world.db.merged.get(raw)
    return raw if known is None else known[0].notification


def grown(world: World) -> set[bytes]:
    """Notifications into which something was merged."""
    return {event.notification for event, _ in world.db.merged.values() if event.status == MERGED}
