"""The ingress as a Ray Serve deployment.

Serve starts, restarts, drains and counts the replicas; each serves Serve's route and its own door with the
same app object on the same loop. What Serve needs to be told against its defaults is in `deploy_ingress`.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, Final

import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from actors.config import ActorConfig
from actors.names import ingress_name
from actors.ray_shell import configure_logging, settle_garbage_collector
from carillon.settings import Settings
from serve.app import ServeDoor
from serve.ingress import Ingress

APPLICATION: Final = "carillon"
"""Name of the Serve application."""
DEPLOYMENT: Final = "ingress"


@ray_serve.ingress()
class IngressReplica:
    """What Serve runs: an `Ingress` whose app Serve calls, too.

    Args:
        settings: the whole tree.
        secret: the cluster secret.
    """

    async def __init__(self, settings: Settings, secret: bytes) -> None:
        node = ray.get_runtime_context().get_node_id()
        config = ActorConfig("ingress", ingress_name(node, os.urandom(8).hex()), node, settings, secret)
        configure_logging(config.name)  # Serve sets up its own logger only: an error of ours would go nowhere
        self._ingress = Ingress(config)
        await self._ingress.start()
        settle_garbage_collector()

    def __serve_build_asgi_app__(self) -> Any:
        """Serve: the app, built by the constructor."""
        assert self._ingress.app is not None
        return ServeDoor(self._ingress.app)

    async def check_health(self) -> None:
        """Serve: raises if this replica must be replaced."""
        self._ingress.check()

    async def status(self) -> dict[str, Any]:
        """Facts for the command line."""
        return await self._ingress.status()

    async def __del__(self) -> None:
        # Serve awaits this as the last step of its graceful shutdown.
        ingress = getattr(self, "_ingress", None)
        if ingress is not None:
            await ingress.stop()


def deploy_ingress(
    settings: Settings,
    secret: bytes,
    *,
    nodes: int = 1,
    wait: bool = True,
    route_prefix: str = "/",
    generation: str = "",
    spare: int = 0,
) -> None:
    """Start (or change) the ingress; Ray is initialised already.

    Args:
        settings: replicas per node, ports, timeouts.
        secret: the cluster secret.
        nodes: of the cluster; `ingress.replicas` run for each.
        wait: return only when every replica serves.
        generation: another one than before replaces every replica, one after the other.
        spare: replicas beyond those of the settings, to keep serving while others are replaced.

    Idempotent: deploying the same again changes nothing, other settings replace the replicas one by one.
    """
    ingress = settings.ingress
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    ray_serve.start(
        http_options=HTTPOptions(host=settings.cluster.bind_host, port=ingress.port),
        logging_config=quiet,
    )
    # Serve's own annotations take neither its decorators' results nor the None its documentation names.
    make: Any = ray_serve.deployment
    deployment = make(
        IngressReplica,
        name=DEPLOYMENT,
        num_replicas=ingress.replicas * nodes + spare,
        # Serve's default of 5 would serialise commits; the app has the same bound for both doors together.
        max_ongoing_requests=ingress.max_in_flight,
        # Beyond it Serve answers 503 itself. Without a bound its proxy queues without limit.
        max_queued_requests=ingress.max_in_flight,
        ray_actor_options={"num_cpus": 0},
        max_replicas_per_node=ingress.replicas if nodes > 1 else None,
        health_check_period_s=5.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=ingress.drain_s + 10.0,
        # Serve formats a record for every request unless the deployment itself says WARNING.
        logging_config=quiet,
    )
    # Serve takes a deployment without version for new code each time and replaces every replica; with one, a
    # cluster that grows only adds replicas. The public argument is gone in 2.60 (Serve's own configuration
    # files still set it); to be removed when Serve compares deployments by what they hold.
    told = b"\0".join((repr(settings).encode(), secret, generation.encode()))
    fingerprint = hashlib.sha256(told).hexdigest()
    deployment = deployment.options(version=fingerprint, _internal=True)
    target = ray_serve.RunTarget(
        deployment.bind(settings, secret), name=APPLICATION, route_prefix=route_prefix, logging_config=quiet
    )
    ray_serve.run_many([target], wait_for_applications_running=wait)


def remove_ingress() -> None:
    """Drain and remove the ingress; other applications of the same Serve stay."""
    ray_serve.delete(APPLICATION, _blocking=True)
