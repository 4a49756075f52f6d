"""The Ray side of every actor: a thin shell around a plain class, and how actors are started and ended.

A shell's constructor schedules `start()` on the actor's event loop and returns. So when Ray restarts the
process in place (`max_restarts=-1`) it reruns the constructor with the same arguments and the actor comes up,
joins the coordinator and serves, without anybody calling it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final

import ray
from ray import exceptions
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.config import ActorConfig
from actors.names import COORDINATOR
from actors.quiet_start import import_quietly
from carillon.clock import SystemClock
from carillon.errors import CarillonError, ClusterError
from carillon.messages import Address
from carillon.settings import Settings

log = logging.getLogger(__name__)

OUR_PACKAGES: Final = ("carillon", "stores", "channels", "actors", "serve", "cluster")
FAILED_START_WAIT_S: Final = (1.0, 3.0)
"""A process that cannot start waits a random time of this range before it exits and Ray starts the next."""
MAX_CONCURRENCY: Final = 1000
HEAD_RESOURCE: Final = "node:__internal_head__"


# ---------------------------------------------------------------------------------------------------
# Shells


class ActorShell:
    """Base of the shells. The plain class is imported in the actor's own process, by `path`.

    Args:
        config: given to the plain class.
    """

    path: ClassVar[str] = ""
    """"module:Class" of the plain class."""

    @staticmethod
    def needs(settings: Settings) -> tuple[str, ...]:
        """Modules that the class imports itself once it needs them, and always needs with these settings."""
        return ()

    def __init__(self, config: ActorConfig) -> None:
        configure_logging(config.name)
        self._config = config
        self._actor: Any = None
        self._stopping = False
        # Ray runs the constructor of an actor with async methods on the actor's loop.
        self._starting = asyncio.get_running_loop().create_task(self._start())

    async def _start(self) -> None:
        try:
            gc.disable()  # imports make no garbage that is worth looking for
            path, _, name = self.path.partition(":")
            settings = self._config.settings
            module, *_ = await import_quietly((path, *self.needs(settings)), settings.cluster.start_niceness)
            settle_garbage_collector()
            self._actor = getattr(module, name)(self._config)
            await self._actor.start()
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            log.exception("%s cannot start: %s", self._config.name, exc)
            asyncio.get_running_loop().call_later(random.uniform(*FAILED_START_WAIT_S), os._exit, 1)  # noqa: S311
            raise
        terminated: asyncio.Future[str] | None = getattr(self._actor, "terminated", None)
        if terminated is not None:
            terminated.add_done_callback(self._terminated)
        gc.freeze()  # what `start` made

    def _terminated(self, _: Any) -> None:
        """The actor itself found that it must not go on. A little later, so that the log gets out."""
        if not self._stopping:
            asyncio.get_running_loop().call_later(random.uniform(*FAILED_START_WAIT_S), os._exit, 1)  # noqa: S311

    async def ready(self) -> bool:
        """Return True once the actor serves. Raises what `start()` raised."""
        await asyncio.shield(self._starting)
        return True

    async def status(self) -> dict[str, Any]:
        """The actor's facts; `{"starting": True}` before it serves."""
        if not self._starting.done():
            waiting_for = getattr(self._actor, "waiting_for", "")
            return {"starting": True, "waiting_for": waiting_for, "pid": os.getpid()}
        return {**await self._actor.status(), "pid": os.getpid()}

    async def pid(self) -> int:
        """Process id, on the actor's machine."""
        return os.getpid()

    async def drain(self) -> None:
        """Graceful end of service, if the actor knows one."""
        if self._actor is not None and hasattr(self._actor, "drain"):
            await self._actor.drain()

    async def stop(self) -> None:
        """Stop serving. The process stays, idle, until it is killed."""
        self._stopping = True
        if not self._starting.done():
            self._starting.cancel()
        elif self._actor is not None:
            await self._actor.stop()


class CoordinatorActor(ActorShell):
    """Shell of `actors.coordinator.Coordinator`."""

    path = "actors.coordinator:Coordinator"

    async def link_address(self) -> Address | None:
        """Where members dial; None until it listens."""
        return None if self._actor is None else self._actor.link_address()

    async def config(self) -> ActorConfig:
        """What the cluster was deployed with. Only who may run code in it can ask."""
        return self._config

    async def drain_node(self, node: str) -> dict[str, Any]:
        """See `Coordinator.drain_node`; a refusal is `{"error": sentence}`: Ray changes errors."""
        try:
            return await self._actor.drain_node(node)
        except CarillonError as exc:
            return {"error": str(exc)}

    async def undrain_node(self, node: str) -> dict[str, Any]:
        """See `Coordinator.undrain_node`."""
        try:
            return {"node": await self._actor.undrain_node(node)}
        except CarillonError as exc:
            return {"error": str(exc)}


class RouterActor(ActorShell):
    """Shell of `actors.router.Router`."""

    path = "actors.router:Router"


class ShardActor(ActorShell):
    """Shell of `actors.shard.Shard`."""

    path = "actors.shard:Shard"

    @staticmethod
    def needs(settings: Settings) -> tuple[str, ...]:
        """The presence mirror, with Redis."""
        mirrored = settings.redis.url and settings.presence.mirror_ttl_s > 0
        return ("stores.redis.presence_mirror",) if mirrored else ()


class GatewayActor(ActorShell):
    """Shell of `actors.gateway.Gateway`."""

    path = "actors.gateway:Gateway"

    @staticmethod
    def needs(settings: Settings) -> tuple[str, ...]:
        """What reads tenants' keys, for the first token."""
        return ("stores.postgres.tenants", "stores.postgres.tickets", "stores.token_keys")


class PoolActor(ActorShell):
    """Shell of `actors.push_pool.PushPool`."""

    path = "actors.push_pool:PushPool"


SHELLS: Final[dict[str, type[ActorShell]]] = {
    "coordinator": CoordinatorActor,
    "router": RouterActor,
    "shard": ShardActor,
    "gateway": GatewayActor,
    "pool": PoolActor,
}
"""Shell by kind of actor."""


def configure_logging(name: str) -> None:
    """Log to the worker's stderr file: our packages from INFO on, everybody else's from WARNING."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {name} %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for package in OUR_PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)


def settle_garbage_collector() -> None:
    """Take what is loaded out of the collector's sight and make it run rarely.

    Modules, Ray's runtime and our classes are several hundred thousand objects that never become garbage; a
    full collection walks them all (tens of ms on a busy core), and sessions add to that. With the default
    threshold of 700 allocations a batch of events starts dozens of young collections. Our messages hold no
    cycles, so reference counting frees them; the collector is only the net below.

    Nothing is collected before: the imports leave some three hundred objects of garbage, and looking for them
    would cost 40 ms just when the actor's users have waited longest.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    gc.enable()


# ---------------------------------------------------------------------------------------------------
# Starting and ending


@functools.cache
def make_remote(shell: type[ActorShell]) -> Any:
    """The Ray class of a shell."""
    return ray.remote(shell)


def spawn_actor(config: ActorConfig, node: str | None = None, shell: type[ActorShell] | None = None) -> Any:
    """Start a detached actor named `config.name` and return its handle, without waiting for it.

    Args:
        config: who it is; `config.node` is where it goes unless `node` says otherwise.
        node: Ray node id (hex). The actor never runs elsewhere.
        shell: None takes that of `config.kind`.

    Raises:
        ValueError: an actor of that name exists.
    """
    return (
        make_remote(shell or SHELLS[config.kind])
        .options(
            name=config.name,
            namespace=config.settings.cluster.namespace,
            lifetime="detached",  # they must outlive the driver that ran `make up`
            num_cpus=0,  # placed by us, one per wanted name, not by free cores
            max_restarts=-1,
            max_task_retries=0,  # none of the calls may run twice by itself
            max_concurrency=MAX_CONCURRENCY,
            enable_task_events=False,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node or config.node, soft=False),
        )
        .remote(config)
    )


def find_actor(name: str, namespace: str) -> Any | None:
    """Handle of a named actor, or None. It may be of an actor that is just dying."""
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        return None


def answers(handle: Any, timeout_s: float) -> bool | None:
    """Whether an actor lives: True, False (dead for good) or None (restarting, or busy). Blocks."""
    try:
        # Not ray.get: inside an async actor it warns about blocking the loop, though a thread calls it here.
        handle.pid.remote().future().result(timeout_s)
    except exceptions.ActorUnavailableError:
        return None
    except exceptions.ActorDiedError:
        return False
    except TimeoutError:
        return None
    return True


def head_node() -> str:
    """Id of the head node. Raises ClusterError without a running cluster."""
    for node in ray.nodes():
        if node["Alive"] and HEAD_RESOURCE in node["Resources"]:
            return str(node["NodeID"])
    raise ClusterError("Ray has no live head node: start one with `make up`")


def deploy(
    settings: Settings,
    secret: bytes,
    *,
    timeout_s: float = 90.0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Start Carillon's actors on a running Ray (`ray.init` was called), or find them running.

    Creates the coordinator, which starts everything else, and waits until every wanted actor has joined and
    every slot has an owner.

    Args:
        settings: for all actors; `cluster.runtime_dir` is made absolute, and `postgres.dsn` must be set.
        secret: the cluster secret.
        timeout_s: longest wait for the whole.
        progress: gets a sentence at each change of who is missing.

    Returns:
        The coordinator's status.

    Raises:
        ClusterError: not complete in time; the sentence names who is missing.
    """
    runtime_dir = str(Path(settings.cluster.runtime_dir).resolve())
    settings = settings.with_values(cluster={"runtime_dir": runtime_dir})
    namespace = settings.cluster.namespace
    say = progress or (lambda _: None)
    clock = SystemClock()
    deadline = clock.monotonic() + timeout_s
    handle = find_actor(COORDINATOR, namespace)
    if handle is not None and answers(handle, 5.0) is False:
        handle = None
    if handle is None:
        head = head_node()
        say("starting the coordinator")
        handle = spawn_actor(ActorConfig("coordinator", COORDINATOR, head, settings, secret))
    status: dict[str, Any] = {}
    last = ""
    while True:
        trouble = "the coordinator does not answer"
        with contextlib.suppress(exceptions.RayError):
            status = ray.get(handle.status.remote(), timeout=5.0)
            trouble = _incomplete(status)
        if not trouble:
            say(f"{len(status['wanted'])} actors have joined")
            return status
        if trouble != last:
            say(trouble)
            last = trouble
        if clock.monotonic() > deadline:
            raise ClusterError(
                f"not ready within {timeout_s:.0f} s: {trouble}. The actors' logs are in Ray's session "
                "folder (/tmp/ray/session_latest/logs/worker-*.err)"
            )
        time.sleep(0.1)


def _incomplete(status: dict[str, Any]) -> str:
    """What is still missing, as a sentence; "" if nothing is."""
    if status.get("starting"):
        return status["waiting_for"] or "the coordinator is starting"
    if status["missing"]:
        return f"waiting for {', '.join(status['missing'])}"
    if not status["wanted"]:
        return "the coordinator has not seen a node yet"
    if status["ownerless"]:
        return f"{status['ownerless']} slots have no owner yet"
    return ""


def undeploy(
    namespace: str, *, timeout_s: float = 40.0, progress: Callable[[str], None] | None = None
) -> int:
    """End all actors of a namespace for good: gateways drain, everyone stops, then the processes go.

    Idempotent: without actors it does nothing.

    Args:
        namespace: Ray namespace (`settings.cluster.namespace`).
        timeout_s: longest drain; what is not done then is killed anyway (nothing acknowledged is lost by it).
        progress: gets a sentence per step.

    Returns:
        How many actors there were.
    """
    say = progress or (lambda _: None)
    clock = SystemClock()
    deadline = clock.monotonic() + timeout_s
    handles = {name: handle for name in actor_names(namespace) if (handle := find_actor(name, namespace))}
    kinds: dict[str, list[Any]] = {}
    for name, handle in handles.items():
        kinds.setdefault(name.split("-", 1)[0], []).append(handle)

    def each(kind: str, method: str) -> None:
        actors = kinds.get(kind, [])
        if actors:
            say(f"{method} {len(actors)} {kind}{'s' if len(actors) > 1 else ''}")
            calls = [getattr(actor, method).remote() for actor in actors]
            _settle(calls, max(1.0, deadline - clock.monotonic()))

    each("coordinator", "drain")
    each("gateway", "drain")
    for kind in ("gateway", "router", "pool", "shard", "coordinator"):
        each(kind, "stop")
    for handle in handles.values():
        ray.kill(handle, no_restart=True)
    gone_by = clock.monotonic() + 10.0
    while actor_names(namespace) and clock.monotonic() < gone_by:
        time.sleep(0.05)
    return len(handles)


def actor_names(namespace: str) -> list[str]:
    """Names of all named actors of a namespace."""
    found: Any = list_named_actors(all_namespaces=True)  # dicts, whatever its annotation says
    return [actor["name"] for actor in found if actor["namespace"] == namespace]


def _settle(calls: list[Any], timeout_s: float) -> None:
    """Wait for calls; errors are logged, for everything is killed afterwards anyway."""
    done, late = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
    for call in done:
        try:
            ray.get(call)
        except exceptions.RayError as exc:
            log.info("a call failed on the way down: %s", str(exc).split("\n", 1)[0])
    if late:
        log.warning("%d actors did not finish in time", len(late))
