"""The cluster of one simulation: the real actors on the virtual loop, around a model of PostgreSQL.

Real: coordinator, shards, routers, gateways, push pools, the ingress' backend, the links between them with
their bytes. Modelled: PostgreSQL (store.py), the network (network.py), clients (devices.py), push providers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from actors import member as member_module
from actors.config import ActorConfig
from actors.coordinator import Coordinator
from actors.gateway import Gateway
from actors.push_pool import PushPool
from actors.router import Router
from actors.shard import Shard
from carillon.clock import rfc3339
from carillon.errors import CarillonError
from carillon.ids import UserKey, Uuid7Source, slot_of
from carillon.messages import (
    Address,
    Amend,
    Change,
    DeviceDelete,
    DevicePut,
    DigestChange,
    Event,
    Logout,
    Outcome,
    PreferencesPut,
    PresenceQuery,
    PushJob,
    PushResult,
    PushTarget,
    Replay,
    SessionsRevoke,
)
from carillon.metrics import Stats
from carillon.notification import encode_content
from carillon.settings import Settings
from carillon.token_keys import TokenKeys
from carillon.tokens import mint, token_id
from serve.backend import RouterBackend
from tests.simulation.devices import Device
from tests.simulation.loop import Node, SimLoop, Stuck
from tests.simulation.network import Network
from tests.simulation.store import Database, ModelShardStore, ModelSlotTable

TENANT = "t"
SECRET = "the client secret of the simulation, long enough"
LINK_SECRET = b"secret of the simulation, 32 bytes"
COORDINATOR = Address("127.0.0.1", 9_000)
START_MS = 1_700_000_000_000
DIGEST_START_MS = START_MS + 36_000
"""A full minute, at which digests may be due, comes 4 s later: in the middle of what happens."""

SETTINGS = Settings().with_values(
    cluster={"lease_renew_s": 0.5, "lease_timeout_s": 2.0, "rebalance_delay_s": 0.3, "runtime_dir": "/none"},
    link={"heartbeat_s": 1.5, "dead_after_s": 4.0, "request_timeout_s": 5.0, "handshake_timeout_s": 2.0},
    gateway={"port": 0, "reattach_timeout_s": 8.0, "max_connections": 100},
    ingress={"direct_port": 0, "request_timeout_s": 8.0},
    shard={
        "recent_window": 4, "replay_page": 3, "grace_s": 1.0, "ack_window_s": 3.0, "sweep_s": 1.0,
        "hold_s": 6.0, "when_away_delay_s": 4.0, "delivery_lease_s": 8.0, "sweep_batch": 5, "max_batch": 8,
        "erase_sweep_s": 0,  # the model of the store erases nobody
    },
    push={"min_senders": 1, "max_senders": 1, "timeout_s": 2.0, "max_attempts": 8, "breaker_failures": 5,
          "breaker_open_s": 1.0, "report_timeout_s": 10.0, "scale_idle_s": 60.0},
    merge={"renotify_s": 2.0, "dedupe_window_s": 3.0, "aggregate_window_s": 5.0},
    schedule={"sweep_s": 0},  # the model of the store has no schedules
    broadcast={"look_s": 0},  # nor broadcasts
)  # fmt: skip
"""Small windows and pages, so that few events reach every branch."""


class SimClock:
    """The loop's time as both clocks."""

    def __init__(self, loop: SimLoop, start_ms: int = START_MS) -> None:
        self._loop = loop
        self._start_ms = start_ms

    def now_ms(self) -> int:
        return self._start_ms + round(self._loop.now * 1000)

    def monotonic(self) -> float:
        return self._loop.now


@dataclass
class Published:
    """One event that a producer published."""

    event: Event
    outcome: Outcome | None = None
    abandoned: bool = False

    @property
    def acknowledged(self) -> bool:
        """The producer was told that it is durable."""
        return self.outcome is not None and self.outcome.status in ("delivered", "queued", "stored")


@dataclass
class Provider:
    """What phones received, and how the provider behaves now."""

    mood: str = "well"  # well | failing | silent | slow
    received: dict[tuple[bytes, str], int] = field(default_factory=dict)
    """(notification, device) -> how often it was accepted."""
    unsure: set[bytes] = field(default_factory=set)
    """Notifications of which an acceptance may not have been told."""


class SimChannel:
    """`channels.ports.PushChannel`: the provider's side of the pool."""

    def __init__(self, world: World, provider: str) -> None:
        self.provider = provider
        self._world = world

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def app_of(self, target: PushTarget) -> str:
        return target.app_id

    async def send(self, jobs: list[PushJob]) -> list[list[PushResult]]:
        return [[await self._one(job, target) for target in job.targets] for job in jobs]

    async def _one(self, job: PushJob, target: PushTarget) -> PushResult:
        world, provider = self._world, self._world.provider
        now_ms = world.clock.now_ms()
        mood = provider.mood
        if world.at_try is not None and (broken := world.at_try("before")) is not None:
            broken.device = target.device
            return broken
        await asyncio.sleep(world.rng.uniform(0.5, 1.8) if mood == "slow" else world.rng.uniform(0.01, 0.1))
        if mood == "failing":
            return PushResult(target.device, "failed", status=503, error="UNAVAILABLE", started_ms=now_ms)
        accepted = mood != "silent" or world.rng.random() < 0.5
        if target.token in world.dead_tokens:
            return PushResult(target.device, "invalid_target", status=404, error="UNREGISTERED")
        if accepted and job.sound and not job.withdraw:  # what replaces a text makes none
            key = (job.notification, target.device)
            provider.received[key] = provider.received.get(key, 0) + 1
            world.say(
                "provider", f"takes {job.notification.hex()[-6:]} (push {job.delivery}) for {target.device}"
            )
        if world.at_try is not None and (broken := world.at_try("after")) is not None:
            broken.device = target.device
            return broken
        if mood == "silent":
            provider.unsure.add(job.notification)
            await asyncio.sleep(2.0)
            return PushResult(target.device, "unknown", error="timeout", started_ms=now_ms)
        return PushResult(target.device, "sent", "p", 200, started_ms=now_ms, duration_ms=20.0)


class World:
    """One cluster and everything around it.

    Args:
        seed: decides everything that happens.
        tracing: keep what happens as text in `trace`.
    """

    def __init__(self, seed: int, *, tracing: bool = False) -> None:
        self.seed = seed
        self.tracing = tracing
        self.trace: list[str] = []
        self.loop = SimLoop()
        self.loop.set_exception_handler(self._loop_failed)
        self.waiting = random.Random(-seed - 1) if seed % 4 == 1 else None
        """Dice of users who want digests, or are not to be disturbed, in every fourth world."""
        self.clock = SimClock(self.loop, START_MS if self.waiting is None else DIGEST_START_MS)
        self.rng = random.Random(seed)
        self.network = Network(self.loop, random.Random(seed + 1))
        self.network.fixed_ports["coordinator"] = COORDINATOR.port
        self.db = Database(self.loop, self.clock, random.Random(seed + 2))
        if tracing:
            self.db.on_commit = self.say
        self.provider = Provider()
        self.dead_tokens: set[str] = set()
        self.nodes: dict[str, Node] = {}
        self.actors: dict[str, Any] = {}
        self.kinds: dict[str, str] = {}
        self.devices: list[Device] = []
        self.published: list[Published] = []
        self.violations: list[str] = []
        self.read_all: set[str] = set()
        self.lost_targets: set[str] = set()
        """Users whose push target was taken away or replaced at some time."""
        self.closes: dict[int, int] = {}
        self.frames = 0
        self.unrecovered = 0
        self.faults = 0
        self.publish_share = 0.55
        """Of what happens so much are new events; the rest up to 0.7 are changes that devices make."""
        self.merging = random.Random(-seed) if seed % 3 == 0 else None
        """Dice of producers that ask for merging, in every third world; the others stay as they were."""
        self.wire: Callable[[Any, str], bool] | None = None
        self.at_try: Callable[[str], PushResult | None] | None = None
        """Failpoints (failpoints.py): around messages between processes, and around tries at a provider."""
        self._ids = Uuid7Source()
        self._made = 0
        self._tokens: dict[str, str] = {}

    # -- telling ----------------------------------------------------------------------------------------

    def say(self, who: str, what: str) -> None:
        """Add a line to the trace."""
        if self.tracing:
            self.trace.append(f"{self.loop.now - 1000:9.4f}  {who:<14} {what}")

    def violated(self, what: str) -> None:
        """A promise was broken."""
        self.say("!", what)
        if len(self.violations) < 20:
            self.violations.append(f"at {self.loop.now - 1000:.4f} s: {what}")

    def _loop_failed(self, loop: Any, context: dict[str, Any]) -> None:
        exc = context.get("exception")
        self.violated(f"unexpected: {context.get('message')}: {exc!r}")

    # -- actors -----------------------------------------------------------------------------------------

    def add(self, kind: str, name: str) -> None:
        """Add a process and start it."""
        self.kinds[name] = kind
        self.start(name)

    def start(self, name: str) -> None:
        """Start a process (again), as Ray does after a kill."""
        node = self.nodes[name] = Node(name)
        self.say(name, "starts")
        self.loop.create_task(self._start(name, node), context=node.context)

    async def _start(self, name: str, node: Node) -> None:
        kind = self.kinds[name]
        labels = {"provider": name.removeprefix("pool-")} if kind == "pool" else {}
        config = ActorConfig(kind, name, "local", SETTINGS, LINK_SECRET, labels, COORDINATOR)
        if kind == "coordinator":
            actor: Any = Coordinator(config, self.clock, spawn=False)
            actor._table = ModelSlotTable(SETTINGS, self.clock, self.db)
        elif kind == "shard":
            actor = Shard(config, self.clock)
            actor._store = ModelShardStore(self.db, name)
        elif kind == "router":
            actor = Router(config, self.clock)
        elif kind == "gateway":
            actor = Gateway(config, self.clock, read_keys=_read_keys)
        elif kind == "pool":
            actor = PushPool(config, self.clock, make=lambda provider, *_: SimChannel(self, provider))
        else:
            actor = RouterBackend(config, Stats(), clock=self.clock)
        self.actors[name] = actor
        await actor.start()
        if kind == "coordinator":
            self.loop.create_task(self._replace_superseded(name, actor))

    async def _replace_superseded(self, name: str, actor: Any) -> None:
        """Ray restarts a coordinator that gave up because a newer one had taken over."""
        await actor.terminated
        await asyncio.sleep(0.1)
        if self.actors.get(name) is actor:
            self.kill(name)
            self.start(name)

    def kill(self, name: str, *, silent: bool = False) -> None:
        """SIGKILL; `silent` takes the machine along, so that no peer is told."""
        node = self.nodes[name]
        if not node.dead:
            self.say(name, "is killed" + (" with its machine" if silent else ""))
            self.loop.kill(node)
            if self.kinds[name] == "ingress":
                for entry in self.published:
                    entry.abandoned = entry.outcome is None  # nobody is there any more to be told
            self.network.lose_node(node, silent=silent)

    def freeze(self, name: str) -> None:
        """SIGSTOP."""
        if self.nodes[name].runs:
            self.say(name, "is stopped")
            self.loop.freeze(self.nodes[name])

    def thaw(self, name: str) -> None:
        """SIGCONT."""
        node = self.nodes[name]
        if node.frozen and not node.dead:
            self.say(name, "goes on")
            self.loop.thaw(node)

    def drain(self, name: str) -> None:
        """Let an actor give everything away and stop."""
        if self.nodes[name].runs and name in self.actors:
            self.say(name, "drains")
            self.loop.create_task(self._drain(name), context=self.nodes[name].context)

    async def _drain(self, name: str) -> None:
        with suppress(CarillonError):
            await self.actors[name].drain()
        with suppress(CarillonError):
            await self.actors[name].stop()

    def named(self, kind: str) -> list[str]:
        """The names of one kind."""
        return [name for name, other in self.kinds.items() if other == kind]

    # -- users ------------------------------------------------------------------------------------------

    def key(self, user: str) -> UserKey:
        """A user's key."""
        return UserKey(TENANT, user)

    def token(self, user: str) -> str:
        """A client token that outlives the simulation."""
        found = self._tokens.get(user)
        if found is None:
            found = self._tokens[user] = mint(TENANT, user, SECRET, self.clock.now_ms(), 30 * 86_400.0)
        return found

    def pick_gateway(self) -> tuple[str, int] | None:
        """Where a client connects: any gateway whose port is open."""
        up = [
            (server.node.name, port)
            for port, server in self.network.servers.items()
            if self.kinds.get(server.node.name) == "gateway" and self._is_door(server.node.name, port)
        ]
        return self.rng.choice(up) if up else None

    def _is_door(self, name: str, port: int) -> bool:
        actor = self.actors.get(name)
        return actor is not None and actor.url.endswith(f":{port}/ws")

    def make_event(self, user: str, actor: str | None = None, **more: Any) -> Event:
        """An event as the ingress mints it."""
        now_ms = self.clock.now_ms()
        self._made += 1
        content = encode_content(
            {"type": "sim", "title": f"n{self._made}", "actorId": actor, "createdAt": "x"}
        )
        fields: dict[str, Any] = {
            "id": self._ids.next(now_ms), "tenant": TENANT, "user": user, "slot": slot_of(TENANT, user),
            "type": "sim", "category": None, "priority": 1, "content": content, "created_ms": now_ms,
        }  # fmt: skip
        return Event(**(fields | more))

    def publish(self, events: list[Event]) -> None:
        """A producer publishes a request; what it is told is kept."""
        entries = [Published(event) for event in events]
        self.published += entries
        node = self.nodes["ingress-1"]
        for entry in entries:
            entry.abandoned = node.dead  # connection refused
        self.loop.create_task(self._publish(entries), context=node.context)

    async def _publish(self, entries: list[Published]) -> None:
        backend: RouterBackend = self.actors["ingress-1"]
        deadline = self.clock.monotonic() + SETTINGS.ingress.request_timeout_s
        outcomes = await backend.publish([entry.event for entry in entries], deadline)
        for entry, outcome in zip(entries, outcomes, strict=True):
            entry.outcome = outcome
            if self.tracing:
                self.say(
                    "producer",
                    f"{entry.event.user} {entry.event.id.hex()[-6:]}: {outcome.status} seq {outcome.seq} "
                    f"{outcome.code or ''}",
                )

    def register(self, user: str, token: str) -> None:
        """Register a phone over the API."""
        self.lost_targets.add(user)
        message = DevicePut(
            TENANT, user, slot_of(TENANT, user), f"{user}-phone", "android", "fcm", "token", token
        )
        self._request(message, f"registers a phone of {user}")

    def ask_presence(self, *users: str) -> None:
        """Ask who is there, of strangers too."""
        self._request(PresenceQuery(TENANT, list(users)), f"asks for {users}")

    def prefer(self, user: str, document: str = "{}") -> None:
        """Store preferences."""
        self._request(
            PreferencesPut(TENANT, user, slot_of(TENANT, user), document), f"stores {user}'s preferences"
        )

    def change_digest(self, user: str, digest: bytes, op: str, item: bytes = b"") -> None:
        """Flush a digest, or take an item out of it."""
        message = DigestChange(TENANT, user, slot_of(TENANT, user), digest, op, item)
        self._request(message, f"{op}: digest {digest.hex()[-6:]} of {user}")

    def revoke(self, user: str) -> None:
        """End all sessions of a user; the clients get new tokens."""
        self._tokens.pop(user, None)
        self._request(SessionsRevoke(TENANT, user, slot_of(TENANT, user)), f"revokes {user}'s sessions")

    def log_out(self, user: str) -> None:
        """Log a user's phone out, with the token that all its clients have; they get new ones."""
        self.lost_targets.add(user)
        token = self._tokens.pop(user, "none was minted")
        end_ms = self.clock.now_ms() + 30 * 86_400_000
        message = Logout(TENANT, user, slot_of(TENANT, user), f"{user}-phone", token_id(token), end_ms)
        self._request(message, f"logs {user}'s phone out")

    def replay(self) -> None:
        """Ask for another try of dead letters, or of rows that are none."""
        rows = list(self.db.deliveries.values())
        chosen = [row for row in rows if row.state == "dead"] or rows
        if chosen:
            row = self.rng.choice(chosen)
            message = Replay(TENANT, row.slot, [row.id], self.clock.now_ms())
            self._request(message, f"wants push {row.id} to be tried again")

    def forget_token(self, user: str) -> None:
        """A client was told that its token is no longer valid."""
        self._tokens.pop(user, None)

    def change(self, user: str, op: str, raw: bytes) -> None:
        """Change a notification over the API, known or not."""
        message = Change(TENANT, user, slot_of(TENANT, user), op, [raw], strict=True)
        self._request(message, f"{op} of {user}")

    def amend(self, user: str) -> None:
        """Edit, retract or cancel a notification over the API, one of another user now and then."""
        notes = [note for note in self.db.notes.values() if note.stream.key.user == user]
        if not notes:
            return
        op = self.rng.choice(("edit", "edit", "edit", "retract", "cancel"))
        self._made += 1
        patch: dict[str, Any] = {"title": f"n{self._made}"}
        if self.rng.random() < 0.15:
            patch["expiresAt"] = rfc3339(self.clock.now_ms() + self.rng.choice((-1000, 500, 5000)))
        raw = self.rng.choice(notes).row.id
        message = Amend(
            TENANT, user, slot_of(TENANT, user), op, raw, self.rng.randbytes(16), "key:sim",
            json.dumps(patch),
        )  # fmt: skip
        self._request(message, f"{op}s {raw.hex()[-6:]} of {user}")

    def unregister(self, user: str) -> None:
        """Forget a phone over the API."""
        self.lost_targets.add(user)
        self._request(
            DeviceDelete(TENANT, user, slot_of(TENANT, user), f"{user}-phone"), f"forgets {user}'s phone"
        )

    def _request(self, message: Any, what: str) -> None:
        self.say("producer", what)
        self.loop.create_task(self._ask(message), context=self.nodes["ingress-1"].context)

    async def _ask(self, message: Any) -> Any:
        backend: RouterBackend = self.actors["ingress-1"]
        with suppress(CarillonError):
            return await backend.request(message, self.clock.monotonic() + 5.0)

    def give_phone(self, user: str) -> None:
        """A phone that is registered from the beginning."""
        target = PushTarget(f"{user}-phone", "fcm", "token", f"token-{user}", "", "production", START_MS)
        self.db.devices[TENANT, user, target.device] = target

    def give_pad(self, user: str) -> None:
        """A second device, at another provider."""
        target = PushTarget(f"{user}-pad", "apns", "token", f"pad-{user}", "", "production", START_MS)
        self.db.devices[TENANT, user, target.device] = target

    def lose_phone(self, user: str) -> None:
        """The app is deleted: the provider says so at the next push."""
        self.say("provider", f"does not know {user}'s phone any more")
        self.lost_targets.add(user)
        target = self.db.devices.get((TENANT, user, f"{user}-phone"))
        if target is not None:
            self.dead_tokens.add(target.token)

    async def presence(self) -> dict[str, str]:
        """Everybody's status as the API tells it."""
        users = sorted({device.user for device in self.devices})
        reply = await self._ask_as_ingress(PresenceQuery(TENANT, users))
        return {u.user: u.status for u in reply.users} if reply is not None else {}

    async def _ask_as_ingress(self, message: Any) -> Any:
        return await self.loop.create_task(self._ask(message), context=self.nodes["ingress-1"].context)

    # -- running ----------------------------------------------------------------------------------------

    def run(self, main: Callable[[World], Any]) -> None:
        """Run `main(world)` to its end, and take the loop apart."""
        node = Node("scenario")
        with patched(self):
            asyncio.set_event_loop(None)
            tasks = _keep_tasks(self.loop)
            task = self.loop.create_task(main(self), context=node.context)
            try:
                self.loop.run_until_complete(task)
            except Stuck:
                self.violated("stuck: nothing is scheduled any more")
            finally:
                for other in tasks:
                    if not other.done():
                        other._log_destroy_pending = False  # type: ignore[attr-defined]
                        with suppress(RuntimeError):
                            other.get_coro().close()  # type: ignore[union-attr]
                    elif not other.cancelled():
                        other.exception()
                self.loop.close()


def _keep_tasks(loop: SimLoop) -> list[asyncio.Task[Any]]:
    """Hold every task: those of killed nodes must neither run nor be missed by the collector's warnings."""
    tasks: list[asyncio.Task[Any]] = []

    def factory(loop: Any, work: Any, **more: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=loop, **more)
        tasks.append(task)
        return task

    loop.set_task_factory(factory)
    return tasks


async def _read_keys(tenant: str, /, *, refresh: bool = False) -> TokenKeys | None:
    return TokenKeys((SECRET,)) if tenant == TENANT else None


class _Log(logging.Handler):
    """Exceptions that an actor logs are bugs; with a trace everything is told."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.INFO if world.tracing else logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        if self._world.tracing:
            self._world.say("log", f"{record.name}: {record.getMessage()}")
        if record.exc_info:
            self._world.violated(f"unexpected: {record.getMessage()}: {record.exc_info[1]!r}")


@contextmanager
def patched(world: World) -> Any:
    """Nothing but the seed may decide: randomness of the standard library, file names, logging."""
    rng = random.Random(world.seed + 3)
    state = random.getstate()
    random.seed(world.seed + 4)
    urandom, os.urandom = os.urandom, rng.randbytes
    socket_path = member_module.socket_path
    machine_id = member_module.machine_id
    member_module.socket_path = lambda *_: ""
    member_module.machine_id = lambda: ""
    handler = _Log(world)
    loggers = [logging.getLogger(name) for name in ("actors", "carillon", "stores", "asyncio", "serve")]
    levels = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if world.tracing else logging.ERROR)
        logger.propagate = False
    try:
        yield
    finally:
        os.urandom = urandom
        random.setstate(state)
        member_module.socket_path = socket_path
        member_module.machine_id = machine_id
        for logger, level, propagate in levels:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
