"""Which nodes live, which actors should be on them, and starting those that are missing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from actors.names import actor_name
from carillon.clock import Clock
from carillon.errors import ClusterError
from carillon.placement import ActorSpec, NodeInfo, wanted_actors
from carillon.settings import Settings

log = logging.getLogger(__name__)


class Nodes(Protocol):
    """What a supervisor needs of Ray (actors/ray_nodes.py); tests give their own."""

    async def alive(self) -> tuple[list[NodeInfo], set[str]]:
        """The live nodes, and the ids of nodes known to be dead."""
        ...

    async def ensure(self, spec: ActorSpec) -> None:
        """Start an actor unless it exists. Returns before it has started."""
        ...

    async def remove(self, name: str) -> None:
        """End an actor for good, if it exists."""
        ...

    async def prepare(self, node: str) -> None:
        """Have a process ready on a node for the next actor that starts there. Never raises."""
        ...


class Supervisor:
    """Keeps the wanted actors started. Restarting a process is Ray's work, not its.

    Args:
        nodes: Ray, or what stands in for it.
        settings: how many actors a node gets.
        clock: monotonic time, for the wait before a second look.
        has_joined: whether the member of a name is there.
    """

    def __init__(
        self, nodes: Nodes, settings: Settings, clock: Clock, has_joined: Callable[[str], bool]
    ) -> None:
        self.live: dict[str, NodeInfo] = {}
        """Nodes that Ray had at the last poll."""
        self.dead: set[str] = set()
        """Nodes that Ray had, or says it had, and has no more."""
        self.wanted: dict[str, ActorSpec] = {}
        """By name, in the order in which to start them."""
        self.draining: set[str] = set()
        """Nodes on which nothing is to be started any more."""
        self._nodes = nodes
        self._settings = settings
        self._clock = clock
        self._has_joined = has_joined
        self._asked_at: dict[str, float] = {}
        self._to_remove: set[str] = set()
        self._spare_at: dict[str, float] = {}  # by node: when to see to its spare process

    async def poll(self) -> None:
        """Ask for the nodes. Raises what Ray raises; the last answer then stays in force."""
        alive, dead = await self._nodes.alive()
        if not alive:
            return  # Ray always has the node that answers: this is no answer
        now_alive = {info.node: info for info in alive}
        gone = (self.live.keys() - now_alive.keys()) | dead
        for node in gone - self.dead:
            log.info("node %s is gone", node)
        for node in now_alive.keys() - self.live.keys():
            log.info("node %s is here", node)
        self.live = now_alive
        self.dead = gone | (self.dead - now_alive.keys())
        self._to_remove |= {name for name, spec in self.wanted.items() if spec.node in self.dead}
        self.want()

    def want(self) -> None:
        """Work out anew what should exist, after `draining` has changed."""
        stay = [info for info in self.live.values() if info.node not in self.draining]
        self.wanted = {actor_name(spec): spec for spec in wanted_actors(self._settings, stay)}

    def find(self, wanted: str) -> NodeInfo:
        """The live node whose id begins with `wanted`. Raises ClusterError: none does, or several do."""
        found = [info for node, info in self.live.items() if wanted and node.startswith(wanted)]
        if len(found) != 1:
            known = ", ".join(sorted(node[:8] for node in self.live)) or "none"
            what = "the ids of several nodes begin with" if found else "there is no live node"
            raise ClusterError(f"{what} {wanted!r}; nodes: {known}")
        return found[0]

    def missing(self) -> list[str]:
        """Wanted actors that have not joined."""
        return [name for name in self.wanted if not self._has_joined(name)]

    async def reconcile(self) -> None:
        """End the actors of lost nodes, start what is missing. Raises what Ray raises."""
        for name in sorted(self._to_remove):
            await self._nodes.remove(name)
            self._to_remove.discard(name)
            self._asked_at.pop(name, None)
        retry_s = self._settings.cluster.spawn_retry_s
        for name in self.missing():
            now = self._clock.monotonic()
            asked_at = self._asked_at.get(name)
            if asked_at is not None:
                if now - asked_at < retry_s:
                    continue
                log.warning("%s has not joined %.0f s after it was started", name, now - asked_at)
            self._asked_at[name] = now
            await self._nodes.ensure(self.wanted[name])
        await self._prepare()

    async def _prepare(self) -> None:
        """See to the spare processes of nodes on which something has started, once nothing starts there."""
        busy = {self.wanted[name].node for name in self.missing()}
        now = self._clock.monotonic()
        for node in [node for node, at in self._spare_at.items() if now >= at and node not in busy]:
            del self._spare_at[node]
            if node in self.live and node not in self.draining:
                await self._nodes.prepare(node)

    def joined(self, name: str, node: str) -> None:
        """An actor has joined: its next absence is a new one. Its process may have been its node's spare."""
        self._asked_at.pop(name, None)
        cluster = self._settings.cluster
        if cluster.spare_process:
            # A little later: those that have just come back have enough to do with what waited for them.
            self._spare_at[node] = self._clock.monotonic() + cluster.spare_delay_s
