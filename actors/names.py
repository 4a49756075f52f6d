"""Names of actors: built here and nowhere else, because they are how actors find each other.

A name is unique in the cluster and stable over restarts of the actor. Eight hex digits of the node id tell
nodes apart: ids are random, so two nodes of a cluster of 1,000 share them with a chance of about 1 in 8,600.
"""

from __future__ import annotations

from typing import Final

from actors.config import COORDINATOR_NAME
from carillon.placement import ActorSpec

COORDINATOR: Final = COORDINATOR_NAME
"""The one coordinator of a namespace."""

NODE_DIGITS: Final = 8


def short_node(node: str) -> str:
    """The part of a node id that names use."""
    return node[:NODE_DIGITS]


def shard_name(node: str, index: int) -> str:
    """Shard `index` (from 0) of a node."""
    return f"shard-{short_node(node)}-{index}"


def router_name(node: str) -> str:
    """The router of a node."""
    return f"router-{short_node(node)}"


def gateway_name(node: str, index: int = 0) -> str:
    """Gateway `index` of a node."""
    return f"gateway-{short_node(node)}-{index}"


def pool_name(provider: str, node: str) -> str:
    """The push pool of `provider` on a node."""
    return f"pool-{provider}-{short_node(node)}"


def sender_name(pool: str, index: int) -> str:
    """Sender `index` of a pool."""
    return f"{pool}-sender-{index}"


def ingress_name(node: str, incarnation: str) -> str:
    """An ingress replica. Serve names and restarts replicas itself, so each start is a new member."""
    return f"ingress-{short_node(node)}-{incarnation[:NODE_DIGITS]}"


def actor_name(spec: ActorSpec) -> str:
    """The name of an actor that should exist."""
    if spec.kind == "shard":
        return shard_name(spec.node, spec.index)
    if spec.kind == "router":
        return router_name(spec.node)
    if spec.kind == "gateway":
        return gateway_name(spec.node, spec.index)
    if spec.kind == "pool":
        return pool_name(spec.provider, spec.node)
    raise ValueError(f"expected a kind of actor that is placed, got {spec.kind!r}")
