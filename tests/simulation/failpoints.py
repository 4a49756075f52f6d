"""Failpoints: the moments before and after every commit, provider call and message between processes.

The product has no code for them: the simulation owns the database, the provider and the wire, and breaks off
there. Each point is a place, a moment and what happens:

- place: a statement of the shards' or the coordinator's store (named as its method), a try at the provider,
  or a kind of message between two kinds of processes;
- `before` or `after`: it has run, or was sent, and nobody was told;
- `kill`: the process dies there and is started again; `fail` (statements and tries): it hears of an error.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from actors.link_stream import Link
from carillon.errors import StoreUnavailableError
from carillon.messages import PushResult
from tests.simulation.digests import ModelDigestStore
from tests.simulation.loop import NODE
from tests.simulation.store import ModelClusterStore, ModelShardStore
from tests.simulation.world import World

RESTART_S = 0.7
"""A killed process is there again after so long."""

READS = frozenset(
    (
        "open", "close", "find_ids", "find_keys", "existing", "last_seen", "load_targets", "policies",
        "ids_between", "tries_before", "expired", "standing", "notifications_after", "changes_after",
        "draw_delivery_ids", "load", "find_windows", "open_windows", "find_actors", "find_merged",
        "digests.told", "digests.next_moment", "digests.waiting", "digests.waiting_of",
    )
)  # fmt: skip
"""Statements that commit nothing: whether they ran makes no difference, so they have `before` alone."""

ELSEWHERE = frozenset(
    (
        "save_draining", "set_invisible", "change_preferences", "client_secret",
        "find_locales", "stranger",
    )
)  # fmt: skip
"""Simulated clusters start no processes, so no nodes are left: tests/actors/test_coordinator.py has these.
Nobody hides in them (tests/actors/test_invisible.py) or unsubscribes (tests/integration/test_shard_store.py);
no tenant is asked who may watch whom (test_watch_callback.py) or has texts in several languages
(test_merging.py). No plan is asked for without effect (tests/integration/test_dry_run.py)."""

MESSAGES = (
    ("ingress", "Publish"), ("router", "Publish"), ("shard", "Outcomes"), ("router", "Outcomes"),
    ("gateway", "Attach"), ("gateway", "ClientAck"), ("gateway", "ClientChange"), ("gateway", "ClientResume"),
    ("gateway", "Detach"), ("shard", "Deliver"), ("shard", "AttachRefused"), ("shard", "CloseSocket"),
    ("shard", "Push"), ("router", "Push"), ("pool", "PushAccepted"), ("pool", "PushOutcome"),
    ("router", "PushLeft"), ("shard", "Done"), ("shard", "Join"), ("coordinator", "ClusterMap"),
    ("shard", "Leave"),
)  # fmt: skip
"""(kind of the sender, message): what carries events, acknowledgements, pushes, and ownership."""


STORES: tuple[tuple[str, type, str], ...] = (
    ("shard", ModelShardStore, ""), ("shard", ModelDigestStore, "digests."),
    ("coordinator", ModelClusterStore, ""),
)  # fmt: skip
"""(kind of the process, its store, what the names of its statements begin with)."""


class Point(NamedTuple):
    """One failpoint."""

    place: str
    moment: str
    effect: str

    def __str__(self) -> str:
        return f"{self.place}-{self.moment}-{self.effect}"


def statements(store: type, prefix: str = "") -> list[str]:
    """The statements of a store: its public coroutine methods."""
    return [
        prefix + name
        for name, _ in inspect.getmembers(store, inspect.iscoroutinefunction)
        if not name.startswith("_") and name not in ("open", "close") and name not in ELSEWHERE
    ]


def points() -> Iterator[Point]:
    """All of them."""
    for kind, store, prefix in STORES:
        for name in statements(store, prefix):
            for moment in ("before",) if name in READS else ("before", "after"):
                for effect in ("kill", "fail"):
                    yield Point(f"{kind}.{name}", moment, effect)
    for moment in ("before", "after"):
        for effect in ("kill", "fail"):
            yield Point("pool.try", moment, effect)
    for sender, message in MESSAGES:
        for moment in ("before", "after"):
            yield Point(f"{sender}:{message}", moment, "kill")


class Armed:
    """A failpoint of one world, which goes off once.

    Args:
        after_hits: how often the place is passed before.

    Attributes:
        hits: how often the place was reached.
        went_off: it did.
    """

    def __init__(self, world: World, point: Point, after_hits: int) -> None:
        self.world = world
        self.point = point
        self.hits = 0
        self.went_off = False
        self._left = after_hits
        place = point.place
        if ":" in place:
            world.wire = self._message
        elif place == "pool.try":
            world.at_try = self._try
        else:
            world.db.at_statement = self._statement

    def _due(self) -> bool:
        self.hits += 1
        if self.went_off or self.hits <= self._left:
            return False
        self.went_off = True
        self.world.faults += 1
        self.world.say("!", f"failpoint {self.point}")
        return True

    def _kill(self) -> None:
        node = NODE.get()
        assert node is not None
        self._end(node.name)

    def _end(self, name: str) -> None:
        world = self.world
        if name not in world.kinds or world.nodes[name].dead:
            return
        world.kill(name)
        world.loop.call_later(RESTART_S, self._restart, name, context=world.db.node.context)

    def _restart(self, name: str) -> None:
        if self.world.nodes[name].dead:
            self.world.start(name)

    # -- places -----------------------------------------------------------------------------------------

    def _statement(self, name: str, node: Any, when: str) -> Exception | None:
        """Called when a statement is sent (`before`) and when it has run (`after`)."""
        moment, effect = self.point.moment, self.point.effect
        if when != moment or name != self.point.place.partition(".")[2]:
            return None
        if self.world.kinds.get(node.name) != self.point.place.partition(".")[0] or not self._due():
            return None
        if effect == "kill":
            self._end(node.name)
        return StoreUnavailableError(f"PostgreSQL does not answer: {self.point}")

    def _try(self, when: str) -> PushResult | None:
        if when != self.point.moment or not self._due():
            return None
        if self.point.effect == "kill":
            self._kill()
        return PushResult("", "unknown", error="simulated")

    def _message(self, message: Any, when: str) -> bool:
        """Called around the sending of a message; False: it is not sent."""
        sender, name = self.point.place.split(":")
        if when != self.point.moment or type(message).__name__ != name:
            return True
        node = NODE.get()
        if node is None or self.world.kinds.get(node.name) != sender or not self._due():
            return True
        if when == "before":
            self._end(node.name)
            return False
        # It leaves with the other messages of this turn; then its sender dies.
        self.world.loop.call_later(0.0, self._end, node.name, context=self.world.db.node.context)
        return True


class Passed:
    """Counts in `hits` how often each (place, moment) of a world is passed; nothing goes off."""

    def __init__(self, world: World) -> None:
        self.hits: Counter[tuple[str, str]] = Counter()
        self._world = world
        world.wire, world.at_try, world.db.at_statement = self._message, self._try, self._statement

    def _kind(self, node: Any) -> str:
        return self._world.kinds.get(node.name, "") if node is not None else ""

    def _statement(self, name: str, node: Any, when: str) -> None:
        self.hits[f"{self._kind(node)}.{name}", when] += 1

    def _try(self, when: str) -> None:
        self.hits["pool.try", when] += 1

    def _message(self, message: Any, when: str) -> bool:
        self.hits[f"{self._kind(NODE.get())}:{type(message).__name__}", when] += 1
        return True


def wired(world: World) -> Any:
    """Replacement of `Link._enqueue` that passes by the world's wire."""
    enqueue = Link._enqueue

    @functools.wraps(enqueue)
    def around(self: Link, number: int, message: Any, *, bounded: bool = True) -> None:
        wire = world.wire
        if wire is None:
            enqueue(self, number, message, bounded=bounded)
        elif wire(message, "before"):
            enqueue(self, number, message, bounded=bounded)
            wire(message, "after")

    return around
