"""The one that talks to Ray: deploys, removes and asks. Everything here needs `import ray`.

`up` runs it as a process of its own (`python -m cluster.operator`), which ends when the work is done: the
supervisor stays small, answers Ctrl-C at once, and a hanging call to Ray hangs something that can be ended.
One JSON document comes in on stdin, one JSON line per step goes out on stdout.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from carillon.errors import CarillonError, ClusterError
from carillon.settings import Settings

Say = Callable[[str], None]


def connect(address: str, namespace: str) -> None:
    """Join the Ray cluster at `address` as a driver. Raises ClusterError if nothing answers there."""
    import ray

    host = address.rsplit(":", 1)[0]
    loopback = {"_node_ip_address": "127.0.0.1"} if host in ("127.0.0.1", "localhost") else {}
    try:
        ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **loopback,
        )
    except Exception as exc:  # ConnectionError, RuntimeError, ValueError, by the way it fails
        first = str(exc).strip().split("\n", 1)[0]
        raise ClusterError(f"cannot connect to Ray at {address}: {first}") from exc


def deploy_all(settings: Settings, secret: bytes, timeout_s: float, say: Say) -> dict[str, Any]:
    """Start actors and ingress on the Ray we are connected to; return the coordinator's status.

    Both are started side by side: an ingress replica waits for the coordinator by itself, and Serve's own
    processes take as long to start as ours.

    Raises:
        ClusterError: not ready in time, or a part failed.
    """
    import ray

    from actors.ray_shell import deploy
    from serve.deployment import deploy_ingress

    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ingress = pool.submit(deploy_ingress, settings, secret, nodes=nodes)
        actors = pool.submit(deploy, settings, secret, timeout_s=timeout_s, progress=say)
        try:
            actors.result()
            ingress.result(timeout_s)
        except CarillonError:
            raise
        except TimeoutError:
            raise ClusterError(f"the ingress was not ready within {timeout_s:.0f} s") from None
        except Exception as exc:
            raise ClusterError(f"the ingress does not start: {str(exc).strip().splitlines()[0]}") from exc
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    say("the ingress serves")
    return coordinator_status(settings.cluster.namespace)


def undeploy_all(namespace: str, timeout_s: float, say: Say) -> int:
    """Remove ingress and actors, gracefully; return how many actors there were."""
    from actors.ray_shell import undeploy
    from serve.deployment import remove_ingress

    say("draining the ingress")
    with _ignored("the ingress"):
        remove_ingress()
    return undeploy(namespace, timeout_s=timeout_s, progress=say)


class _ignored:
    """On the way down a failure of one part must not keep the others up."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception):
            logging.getLogger(__name__).warning("%s: %s", self._what, error)
            return True
        return False


def coordinator_status(namespace: str, timeout_s: float = 10.0) -> dict[str, Any]:
    """What the coordinator tells. Raises ClusterError if there is none."""
    import ray

    from actors.names import COORDINATOR
    from actors.ray_shell import find_actor

    handle = find_actor(COORDINATOR, namespace)
    if handle is None:
        raise ClusterError(f"Carillon is not deployed in the namespace {namespace!r}")
    try:
        return ray.get(handle.status.remote(), timeout=timeout_s)
    except ray.exceptions.RayError as exc:
        raise ClusterError(f"the coordinator does not answer: {type(exc).__name__}") from exc


def actor_statuses(namespace: str, names: list[str], timeout_s: float = 5.0) -> dict[str, dict[str, Any]]:
    """Status of actors by name; those that do not answer in time have {"error": ...}."""
    import ray

    from actors.ray_shell import find_actor

    calls: dict[str, Any] = {}
    answers: dict[str, dict[str, Any]] = {}
    for name in names:
        handle = find_actor(name, namespace)
        if handle is None:
            answers[name] = {"error": "not there"}
        else:
            calls[name] = handle.status.remote()
    if calls:
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s)
    for name, call in calls.items():
        try:
            answers[name] = ray.get(call, timeout=0.1)
        except ray.exceptions.RayError as exc:
            answers[name] = {"error": type(exc).__name__}
    return answers


def drain_actors(namespace: str, names: list[str], timeout_s: float) -> list[str]:
    """Drain actors by name, all at once; returns those that did not finish in time."""
    import ray

    from actors.ray_shell import find_actor

    calls: dict[str, Any] = {}
    for name in names:
        handle = find_actor(name, namespace)
        if handle is None:
            raise ClusterError(f"there is no actor {name!r} in the namespace {namespace!r}")
        calls[name] = handle.drain.remote()
    done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s)
    return [name for name, call in calls.items() if call not in done]


def main() -> int:
    """Do what the document on stdin says: deploy or undeploy."""
    steps = sys.stdout
    # Whatever Ray or Serve print belongs into the log, not among our lines.
    sys.stdout = sys.stderr
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)

    def put(**line: Any) -> None:
        steps.write(json.dumps(line) + "\n")
        steps.flush()

    import ray  # noqa: F401  the slow part, done while the other servers start

    text = sys.stdin.readline()
    if not text.strip():
        return 0  # the supervisor gave up before it knew Ray's address
    order = json.loads(text)
    try:
        connect(order["address"], order["namespace"])
        put(progress="connected to Ray")
        if order["action"] == "deploy":
            settings = msgspec.convert(order["settings"], Settings)
            status = deploy_all(
                settings,
                order["secret"].encode(),
                order["timeoutS"],
                lambda sentence: put(progress=sentence),
            )
            put(result=status)
        else:
            count = undeploy_all(
                order["namespace"], order["timeoutS"], lambda sentence: put(progress=sentence)
            )
            put(result={"actors": count})
    except CarillonError as exc:
        put(error=str(exc))
        return 1
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except Exception as exc:
        logging.getLogger(__name__).exception("the operator failed")
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr)
        code = 1
    sys.stderr.flush()
    os._exit(code)  # the driver's exit hooks would wait for Serve's and Ray's threads
