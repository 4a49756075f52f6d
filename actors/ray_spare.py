"""A process that Ray has ready on a node for the next actor that is started there.

Of a start, two thirds of the CPU time are Ray's own: the interpreter, `import ray`, the connections to the
node. A process that has this behind it waits idle for whoever comes first, and Ray gives it to an actor that
it restarts. Ray's raylets have a request for that (`PrestartWorkers`); nothing of Ray calls it. It is private
to Ray: the version is pinned in pyproject.toml and tests/actors/test_ray_spare.py asks for one. Without an
answer there is no spare process, and an actor starts as slowly as it does without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import ray

TIMEOUT_S: Final = 5.0
"""Longest wait for a raylet's answer; it does not wait for what it is asked to do."""
NO_ID: Final = b"\xff"
"""Ray's "no actor" is an id of these."""


def ensure_spare(node: str) -> bool:
    """Have one idle process ready on a node. Blocks.

    Args:
        node: Ray node id (hex).

    Returns:
        True if one is being started now, False if there is one already or no such node. One that is starting
        is none yet: who asks again within seconds gets two.

    Raises:
        grpc.RpcError, ImportError, AttributeError: the raylet does not answer, or this is another Ray.
    """
    with _raylet(node) as raylet:
        if raylet is None or _idle(raylet):
            return False
        messages, common = _messages()
        wanted = messages.PrestartWorkersRequest(language=common.PYTHON, num_workers=1)
        raylet.PrestartWorkers(wanted, timeout=TIMEOUT_S)
    return True


def idle_processes(node: str) -> int:
    """How many processes of a node wait for an actor. Blocks; raises like `ensure_spare`."""
    with _raylet(node) as raylet:
        return 0 if raylet is None else _idle(raylet)


def _idle(raylet: Any) -> int:
    messages, common = _messages()
    stats = raylet.GetNodeStats(messages.GetNodeStatsRequest(), timeout=TIMEOUT_S)
    return sum(
        worker.worker_type == common.WORKER
        and not worker.actor_id.strip(NO_ID)
        and not worker.num_running_tasks
        for worker in stats.core_workers_stats
    )


@contextlib.contextmanager
def _raylet(node: str) -> Iterator[Any]:
    """What answers for a node, or None without such a node."""
    info = next((info for info in ray.nodes() if info["Alive"] and info["NodeID"] == node), None)
    if info is None:
        yield None
        return
    # Imported here and below: gRPC's Python half is of use to the coordinator alone, and only for this.
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import node_manager_pb2_grpc

    address = f"{info['NodeManagerAddress']}:{info['NodeManagerPort']}"
    opened: Any = init_grpc_channel(address)  # with the cluster's token and TLS
    with opened as channel:
        yield node_manager_pb2_grpc.NodeManagerServiceStub(channel)


def _messages() -> tuple[Any, Any]:
    from ray.core.generated import common_pb2, node_manager_pb2

    return node_manager_pb2, common_pb2
