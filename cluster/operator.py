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
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from carillon.clock import SystemClock
from carillon.errors import CarillonError, ClusterError
from carillon.settings import Settings

Say = Callable[[str], None]


def connect(address: str, namespace: str) -> None:
    """Join the Ray cluster at `address` as a driver. Raises ClusterError if nothing answers there."""
    import ray

    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR)
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

    def ingress() -> None:
        # Serve gives a proxy three chances to answer, then kills it; on a machine that is busy starting
        # everything else that can be too few. Deploying again is idempotent.
        while True:
            try:
                deploy_ingress(settings, secret, nodes=nodes)
                return
            except Exception as exc:
                first = (str(exc).strip() or type(exc).__name__).splitlines()[0]
                if clock.monotonic() > deadline:
                    raise ClusterError(f"the ingress does not start: {first}") from exc
                say(f"the ingress failed, trying again: {first}")
                time.sleep(1.0)

    clock = SystemClock()
    deadline = clock.monotonic() + timeout_s
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    # Not in a `with`: leaving it would wait for a thread that may hang in Serve; the process ends instead.
    pool = concurrent.futures.ThreadPoolExecutor(2)
    serving: concurrent.futures.Future[Any] = pool.submit(ingress)
    deploying: concurrent.futures.Future[Any] = pool.submit(
        deploy, settings, secret, timeout_s=timeout_s, progress=say
    )
    done, _ = concurrent.futures.wait(
        (serving, deploying), timeout_s + 20.0, return_when=concurrent.futures.FIRST_EXCEPTION
    )
    for part in done:
        part.result()
    if serving not in done:
        raise ClusterError(f"the ingress was not ready within {timeout_s:.0f} s")
    if deploying not in done:
        raise ClusterError(f"the actors were not ready within {timeout_s:.0f} s")
    say("the ingress serves")
    return coordinator_status(settings.cluster.namespace)


def undeploy_all(namespace: str, timeout_s: float, say: Say) -> int:
    """Remove ingress and actors, gracefully; return how many actors there were."""
    from actors.ray_shell import undeploy

    drain_ingress(timeout_s / 2, say)
    return undeploy(namespace, timeout_s=timeout_s, progress=say)


def drain_ingress(timeout_s: float, say: Say) -> None:
    """Remove the ingress after the requests it is at."""
    from serve.deployment import remove_ingress

    def remove() -> None:
        try:
            remove_ingress()
        except Exception as exc:  # on the way down one part's failure must not keep the others up
            logging.getLogger(__name__).warning("the ingress: %s", exc)

    say("draining the ingress")
    # A daemon: Serve waits without a limit of its own for replicas that do not end.
    draining = threading.Thread(target=remove, daemon=True)
    draining.start()
    draining.join(timeout_s)


def coordinator_status(namespace: str, timeout_s: float = 10.0) -> dict[str, Any]:
    """What the coordinator tells. Raises ClusterError if there is none."""
    import ray
    from ray import exceptions

    from actors.names import COORDINATOR
    from actors.ray_shell import find_actor

    handle = find_actor(COORDINATOR, namespace)
    if handle is None:
        raise ClusterError(f"Carillon is not deployed in the namespace {namespace!r}")
    try:
        return ray.get(handle.status.remote(), timeout=timeout_s)
    except exceptions.RayError as exc:
        raise ClusterError(f"the coordinator does not answer: {type(exc).__name__}") from exc


def actor_statuses(namespace: str, names: list[str], timeout_s: float = 5.0) -> dict[str, dict[str, Any]]:
    """Status of actors by name; those that do not answer in time have {"error": ...}."""
    import ray
    from ray import exceptions

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
        except exceptions.RayError as exc:
            answers[name] = {"error": type(exc).__name__}
    return answers


class RayControl:
    """Actors of a namespace, through Ray (see `cluster.maintenance.Control`). `connect` was called.

    Args:
        namespace: Ray namespace of all actors.
        answer_s: longest wait for an actor that is only asked.
    """

    def __init__(self, namespace: str, answer_s: float = 10.0) -> None:
        self._namespace = namespace
        self._answer_s = answer_s

    def status(self) -> dict[str, Any]:
        """See `Control`."""
        return coordinator_status(self._namespace, self._answer_s)

    def actor(self, name: str) -> dict[str, Any]:
        """See `Control`."""
        return actor_statuses(self._namespace, [name])[name]

    def start_drain(self, name: str) -> Callable[[float], bool]:
        """See `Control`. An actor that is not there, or dies meanwhile, has nothing left to drain."""
        import ray

        from actors.ray_shell import find_actor

        handle = find_actor(name, self._namespace)
        if handle is None:
            return lambda _: True
        call = handle.drain.remote()

        def wait(timeout_s: float) -> bool:
            done, _ = ray.wait([call], timeout=timeout_s)
            return bool(done)

        return wait

    def stop(self, name: str, timeout_s: float) -> None:
        """See `Control`."""
        import ray

        from actors.ray_shell import find_actor

        handle = find_actor(name, self._namespace)
        if handle is not None:
            ray.wait([handle.stop.remote()], timeout=timeout_s)

    def restart(self, name: str) -> None:
        """See `Control`."""
        self._kill(name, no_restart=False)

    def remove(self, name: str) -> None:
        """See `Control`."""
        self._kill(name, no_restart=True)

    def _kill(self, name: str, *, no_restart: bool) -> None:
        import ray

        from actors.ray_shell import find_actor

        handle = find_actor(name, self._namespace)
        if handle is not None:
            ray.kill(handle, no_restart=no_restart)

    def leave_node(self, node: str) -> dict[str, Any]:
        """See `Control`."""
        return self._ask("drain_node", node)

    def return_to_node(self, node: str) -> str:
        """See `Control`."""
        return self._ask("undrain_node", node)["node"]

    def _ask(self, method: str, *arguments: str) -> Any:
        """Call the coordinator; a refusal comes as a document."""
        import ray
        from ray import exceptions

        from actors.names import COORDINATOR
        from actors.ray_shell import find_actor

        handle = find_actor(COORDINATOR, self._namespace)
        if handle is None:
            raise ClusterError(f"Carillon is not deployed in the namespace {self._namespace!r}")
        try:
            answer: Any = ray.get(getattr(handle, method).remote(*arguments), timeout=self._answer_s)
        except exceptions.RayError as exc:
            raise ClusterError(f"the coordinator does not answer: {type(exc).__name__}") from exc
        if isinstance(answer, dict) and "error" in answer:
            raise ClusterError(answer["error"])
        return answer

    def actors_of(self, node: str) -> list[str]:
        """See `Control`."""
        from actors.names import short_node
        from actors.ray_shell import actor_names

        kinds = ("shard", "router", "gateway", "pool")
        mine = [name for name in actor_names(self._namespace) if name.split("-")[0] in kinds]
        return sorted(name for name in mine if short_node(node) in name.split("-") and "sender" not in name)

    def replace_ingress(self, generation: str) -> None:
        """See `Control`. On a single node one more replica serves meanwhile: a door is always open."""
        import ray

        from serve.deployment import deploy_ingress

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        config = self._ask("config")
        nodes = sum(1 for node in ray.nodes() if node["Alive"])
        spare = 1 if nodes == 1 else 0
        try:
            if spare:
                deploy_ingress(config.settings, config.secret, nodes=nodes, spare=spare)
            deploy_ingress(config.settings, config.secret, nodes=nodes, spare=spare, generation=generation)
            deploy_ingress(config.settings, config.secret, nodes=nodes, generation=generation)
        except Exception as exc:  # Serve's errors share no base
            first = (str(exc).strip() or type(exc).__name__).splitlines()[0]
            raise ClusterError(f"Serve does not replace the ingress: {first}") from exc


def main() -> int:
    """Do what the document on stdin says: deploy, or undeploy before Ray itself ends."""
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
            # Not the ingress: draining it through Serve takes seconds, and it ends with Ray in a moment. A
            # request it was at is one whose answer got lost, which its sender must expect anyway.
            from actors.ray_shell import undeploy

            count = undeploy(
                order["namespace"],
                timeout_s=order["timeoutS"],
                progress=lambda sentence: put(progress=sentence),
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
