"""What the coordinator asks of Ray: its nodes, and actors on them. Ray's calls block: threads make them."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import ray

from actors.config import ActorConfig
from actors.names import actor_name
from actors.ray_shell import HEAD_RESOURCE, answers, find_actor, spawn_actor
from actors.ray_spare import ensure_spare
from carillon.placement import ActorSpec, NodeInfo

log = logging.getLogger(__name__)


class RayNodes:
    """Ray, as the coordinator sees it.

    Args:
        config: the coordinator's: settings and secret of the actors to start.
    """

    def __init__(self, config: ActorConfig) -> None:
        self._config = config
        self._namespace = config.settings.cluster.namespace

    async def alive(self) -> tuple[list[NodeInfo], set[str]]:
        """The live nodes, and the ids of those Ray has declared dead."""
        nodes = await asyncio.to_thread(ray.nodes)
        live = [
            NodeInfo(node["NodeID"], node["NodeManagerAddress"], HEAD_RESOURCE in node["Resources"])
            for node in nodes
            if node["Alive"]
        ]
        return live, {node["NodeID"] for node in nodes if not node["Alive"]}

    async def ensure(self, spec: ActorSpec) -> None:
        """Start the actor unless it exists; replace one that is dead for good (ray issue 44083)."""
        await asyncio.to_thread(self._ensure, spec)

    def _ensure(self, spec: ActorSpec) -> None:
        name = actor_name(spec)
        found = find_actor(name, self._namespace)
        if found is not None:
            if answers(found, timeout_s=2.0) is not False:
                return  # it is there or being restarted, and will join by itself
            ray.kill(found, no_restart=True)
        config = replace(
            self._config,
            kind=spec.kind,
            name=name,
            node=spec.node,
            labels={"provider": spec.provider} if spec.provider else {},
        )
        log.info("starting %s", name)
        spawn_actor(config)

    async def prepare(self, node: str) -> None:
        """Have a process ready on a node for the next actor that starts there."""
        try:
            if await asyncio.to_thread(ensure_spare, node):
                log.info("a spare process is started on node %s", node[:8])
        except Exception as exc:  # gRPC's and Ray's errors share no base; it only makes a start faster
            log.warning("no spare process on node %s: %s: %s", node[:8], type(exc).__name__, exc)

    async def remove(self, name: str) -> None:
        """End an actor for good: one of a lost node would wait for that node for ever."""
        await asyncio.to_thread(self._remove, name)

    def _remove(self, name: str) -> None:
        found = find_actor(name, self._namespace)
        if found is not None:
            ray.kill(found, no_restart=True)
