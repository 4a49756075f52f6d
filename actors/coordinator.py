"""The coordinator: who is a member, who owns which slots, which actors should exist.

It is needed to change the cluster, not to run it: members go on with their last map while it is away. What it
decides is decided in carillon/placement.py; what must survive it is in Postgres (stores/postgres/cluster.py).

Ordering: everything that writes the slot map runs under one lock. Every change makes a map with the next
version and sends it to all members at once, so within one coordinator epoch a member that sees versions n
and n + 1 has seen everything; a gap (a lost link, a new coordinator) means that slots may have been away and
back.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections import deque
from collections.abc import Coroutine
from typing import Any, Final, Protocol

import asyncpg
import msgspec

from actors.config import ActorConfig
from actors.link import Link, LinkServer
from actors.names import COORDINATOR, actor_name
from actors.roster import Entry, Roster
from carillon.clock import Clock, SystemClock, rfc3339
from carillon.errors import (
    BusyError,
    CarillonError,
    FencedError,
    InvalidInputError,
    LinkClosedError,
    StoreUnavailableError,
    UnavailableError,
)
from carillon.ids import SLOTS
from carillon.messages import (
    Address,
    ClusterMap,
    Done,
    Join,
    Leave,
    Member,
    Renew,
    StatsQuery,
    StatsReply,
)
from carillon.placement import (
    ActorSpec,
    LeaseTable,
    NodeInfo,
    RebalanceTimer,
    assign_slots,
    build_map,
    decide_losses,
    empty_owners,
    map_version,
    moved_slots,
    node_suspects,
    ownerless,
    wanted_actors,
)
from carillon.settings import Settings
from stores.postgres.cluster import ClusterStore
from stores.postgres.migrate import ensure_partitions
from stores.postgres.pool import acquired, open_pool

log = logging.getLogger(__name__)

STORE_CONNECTIONS: Final = 3
"""A move, the one who ends what it waits for, and one for the rest."""
SAVE_DELAY_S: Final = 0.05
"""Maps of one burst of joins are saved once."""
KEPT_MOVES: Final = 20
MAINTENANCE_S: Final = 6 * 3600.0


class Nodes(Protocol):
    """What the coordinator needs of Ray (actors/ray_nodes.py); tests give their own or none."""

    async def alive(self) -> tuple[list[NodeInfo], set[str]]:
        """The live nodes, and the ids of nodes known to be dead."""
        ...

    async def ensure(self, spec: ActorSpec) -> None:
        """Start an actor unless it exists. Returns before it has started."""
        ...

    async def remove(self, name: str) -> None:
        """End an actor for good, if it exists."""
        ...


class Coordinator:
    """The one coordinator of a cluster.

    Args:
        config: kind and name "coordinator"; `coordinator` and `labels` are not used.
        clock: monotonic time for leases; None is the system's.
        spawn: True: watch Ray's nodes and start the actors that should exist on them. False: only members
            that join by themselves (tests without Ray).
        nodes: what stands in for Ray with `spawn`; None is Ray itself.
    """

    def __init__(
        self,
        config: ActorConfig,
        clock: Clock | None = None,
        *,
        spawn: bool = True,
        nodes: Nodes | None = None,
    ) -> None:
        self.config = config
        self.epoch = 0
        """This coordinator's number; 0 until Postgres gave it one."""
        self.map = ClusterMap(0, [-1] * SLOTS, [], [])
        """The newest map."""
        self.terminated: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Set, with the reason, when a newer coordinator has taken over: this one is of no more use."""
        cluster = config.settings.cluster
        self._clock = clock or SystemClock()
        tick_s = min(cluster.lease_renew_s, cluster.lease_timeout_s / 4) / 4
        self._leases = LeaseTable(cluster.lease_timeout_s, tick_s, stall_s=cluster.lease_timeout_s / 4)
        self._rebalance = RebalanceTimer(cluster.rebalance_delay_s)
        self._roster = Roster()
        self._owners: list[str | None] = empty_owners()
        self._change = 0
        self._server = LinkServer(self, config.settings.link, config.name, config.secret)
        self._address: Address | None = None
        self._store: ClusterStore | None = None
        self._store_error = ""
        self._must_reload = False
        self._retry_at = 0.0
        self._lock = asyncio.Lock()
        self._dirty = asyncio.Event()
        self._nodes = nodes
        if spawn and nodes is None:
            self._nodes = importlib.import_module("actors.ray_nodes").RayNodes(config)
        self._live_nodes: dict[str, NodeInfo] = {}
        self._dead_nodes: set[str] = set()
        self._wanted: dict[str, ActorSpec] = {}
        self._asked_at: dict[str, float] = {}
        self._retired = False
        self._changing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._moves: deque[dict[str, Any]] = deque(maxlen=KEPT_MOVES)
        self._stalls = 0

    # -- life cycle ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, take an epoch, load the map, and serve.

        Waits for Postgres as long as it takes: until then members are answered "unavailable" and go on with
        the map they have.
        """
        cluster = self.config.settings.cluster
        host, port = await self._server.start(cluster.bind_host)
        self._address = Address(self._advertised(host), port)
        try:
            if self._nodes is not None:
                await self._poll_nodes()
            await self._load_first()
        except BaseException:
            await self.stop()
            raise
        self._run(self._tick_for_ever())
        self._run(self._save_for_ever())
        self._run(self._maintain_for_ever())
        if self._nodes is not None:
            self._run(self._watch_nodes())
        log.info("coordinator epoch %d serves at %s:%d", self.epoch, self._address.host, port)

    async def stop(self) -> None:
        """Stop serving. Slots and members stay as they are in Postgres."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.close()
        store, self._store = self._store, None
        if store is not None:
            await store.close()

    async def drain(self) -> None:
        """See `retire`."""
        self.retire()

    def retire(self) -> None:
        """The cluster is going down: start no actor and move no slot any more."""
        self._retired = True

    @property
    def waiting_for(self) -> str:
        """What keeps `start` from returning, as a sentence; "" if nothing does."""
        return f"the coordinator waits for PostgreSQL: {self._store_error}" if self._store_error else ""

    def link_address(self) -> Address | None:
        """Where members dial; None before `start` has bound the port."""
        return self._address

    async def status(self) -> dict[str, Any]:
        """JSON-able facts for the command line."""
        now = self._clock.monotonic()
        counts = self._slot_counts()
        return {
            "epoch": self.epoch,
            "version": self.map.version,
            "retired": self._retired,
            "postgres": self._store_error or "ok",
            "stalls": self._stalls,
            "nodes": [
                {"node": info.node, "host": info.host, "head": info.is_head}
                for info in self._live_nodes.values()
            ],
            "wanted": sorted(self._wanted),
            "missing": self._missing(),
            "ownerless": counts.get("", 0),
            "members": [
                {
                    "kind": entry.member.kind,
                    "name": entry.member.name,
                    "node": entry.member.node,
                    "address": f"{entry.member.address.host}:{entry.member.address.port}",
                    "public": entry.member.public,
                    "labels": entry.member.labels,
                    "term": entry.member.term,
                    "incarnation": entry.member.incarnation,
                    "joined": entry.is_joined,
                    "lease_age_s": round(min(self._leases.age_s(entry.member.name, now), 1e9), 3),
                    "slots": counts.get(entry.member.name, 0),
                }
                for entry in sorted(self._roster, key=lambda entry: (entry.member.kind, entry.member.name))
            ],
            "moves": list(self._moves),
        }

    def _run(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the coordinator failed", exc_info=error)

    def _advertised(self, bound_host: str) -> str:
        cluster = self.config.settings.cluster
        if cluster.advertise_host:
            return cluster.advertise_host
        if bound_host not in ("0.0.0.0", "::"):
            return bound_host
        if self.config.node == "local":
            return "127.0.0.1"
        return str(importlib.import_module("ray.util").get_node_ip_address())

    # -- Postgres -----------------------------------------------------------------------------------

    async def _load_first(self) -> None:
        settings = self.config.settings
        wait_s = settings.link.reconnect_min_s or 0.05
        while True:
            try:
                if self._store is None:
                    pool = await open_pool(settings.postgres, STORE_CONNECTIONS)
                    self._store = ClusterStore(pool, settings.postgres, settings.cluster.fence_wait_s)
                epoch = await self._store.take_epoch()
                stored = await self._store.load()
                break
            except (StoreUnavailableError, asyncpg.PostgresError) as exc:
                if self._store_error != str(exc):
                    log.warning("the coordinator waits for PostgreSQL: %s", exc)
                self._store_error = str(exc)
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, settings.link.reconnect_max_s)
        self._store_error = ""
        self.epoch = epoch
        self._owners = list(stored.owners)
        # Everyone of the last map has one lease to join again. Those of nodes that Ray does not have are of
        # an earlier run of the cluster.
        now = self._clock.monotonic()
        for member in stored.members:
            if self._nodes is not None and member.node not in self._live_nodes:
                continue
            self._roster.put(Entry(member))
            self._leases.grant(member.name, now)
        self._publish()

    async def _reload(self) -> None:
        """Read owners and terms again: a commit whose answer was lost may have changed them."""
        assert self._store is not None
        stored = await self._store.load()
        self._must_reload = False
        terms = {name: row.term for name, row in stored.shards.items()}
        changed = self._owners != stored.owners
        for entry in self._roster.shards().values():
            changed |= entry.member.term != terms.get(entry.member.name, entry.member.term)
        if changed:
            self._owners = list(stored.owners)
            self._roster.set_terms(terms)
            self._publish()

    def _store_failed(self, exc: Exception) -> None:
        """Note trouble with Postgres; the next try comes a little later."""
        if isinstance(exc, FencedError):
            self._superseded(str(exc))
            return
        if self._store_error != str(exc):
            log.warning("the cluster map stays as it is: %s", exc)
        self._store_error = str(exc)
        self._must_reload = True
        self._retry_at = self._clock.monotonic() + self.config.settings.link.reconnect_max_s

    def _superseded(self, why: str) -> None:
        """A newer coordinator exists: serve nobody any more, so that members find it."""
        if self.terminated.done():
            return
        log.error("this coordinator stops: %s", why)
        self.terminated.set_result(why)
        self._run(self.stop())

    async def _move(self, target: list[str | None], reason: str) -> None:
        """Carry out a new assignment (under the lock). Raises StoreUnavailableError, FencedError."""
        assert self._store is not None
        moves = moved_slots(self._owners, target)
        if not moves:
            return
        began = self._clock.monotonic()
        terms = await self._store.move_slots(self.epoch, moves)
        took_ms = (self._clock.monotonic() - began) * 1000
        self._owners = target
        self._roster.set_terms(terms)
        self._store_error = ""
        self._moves.append(
            {
                "at": rfc3339(self._clock.now_ms()),
                "reason": reason,
                "slots": len(moves),
                "from": sorted(terms),
                "took_ms": round(took_ms, 1),
            }
        )
        log.info("moved %d slots in %.0f ms: %s", len(moves), took_ms, reason)

    # -- maps ---------------------------------------------------------------------------------------

    def _publish(self, but: Link | None = None) -> None:
        """Make the next map and send it to everyone (`but`: who gets it as an answer)."""
        self._change += 1
        self.map = build_map(
            map_version(self.epoch, self._change),
            self._owners,
            {name: entry.member for name, entry in self._roster.shards().items()},
            [entry.member for entry in self._roster.others()],
        )
        for entry in self._roster:
            link = entry.link
            if link is None or link is but:
                continue
            try:
                link.send_nowait(self.map)
            except BusyError:
                link.abort(LinkClosedError(f"{entry.member.name} does not read its maps"))
            except LinkClosedError:
                pass
        self._dirty.set()

    def _slot_counts(self) -> dict[str, int]:
        shards = self._roster.shards()
        counts = dict.fromkeys(shards, 0)
        for owner in self._owners:
            name = owner if owner is not None and owner in shards else ""
            counts[name] = counts.get(name, 0) + 1
        return counts

    def _live_shards(self) -> set[str]:
        """Shards that can take slots now."""
        now = self._clock.monotonic()
        return {
            name
            for name, entry in self._roster.shards().items()
            if entry.is_joined
            and not entry.leaving
            and entry.member.node not in self._dead_nodes
            and not self._leases.is_lapsed(name, now)
        }

    def _target(self, without: set[str] | frozenset[str] = frozenset()) -> list[str | None]:
        """The best assignment over the live shards; absent ones that may come back keep their slots."""
        live = self._live_shards() - without
        absent = set(self._roster.shards()) - live - without
        return assign_slots(self._owners, live, absent)

    # -- links --------------------------------------------------------------------------------------

    def link_opened(self, link: Link) -> None:
        """See `LinkHandler`."""

    def link_closed(self, link: Link) -> None:
        """A closed link is no loss: the member may be restarting. The lease decides."""
        entry = self._roster.get(link.context) if link.context else None
        if entry is not None and entry.link is link:
            entry.link = None

    def read_finished(self, link: Link) -> None:
        """See `LinkHandler`."""

    def receive(self, link: Link, message: Any, request: int) -> None:
        """See `LinkHandler`."""
        kind = type(message)
        if self.epoch == 0 and kind is not Renew:
            link.fail_nowait(request, UnavailableError("the coordinator waits for PostgreSQL"))
        elif kind is Renew:
            self._renew(link, message)
        elif kind is Join:
            self._run(self._answer(link, request, self._join(link, message.member)))
        elif kind is Leave:
            self._run(self._answer(link, request, self._leave(message)))
        elif kind is StatsQuery:
            link.reply_nowait(request, self._stats())
        else:
            link.fail_nowait(
                request, InvalidInputError(f"expected a membership message, got {kind.__name__}")
            )

    async def _answer(self, link: Link, request: int, work: Coroutine[Any, Any, Any]) -> None:
        try:
            link.reply_nowait(request, await work)
        except CarillonError as exc:
            if isinstance(exc, FencedError | StoreUnavailableError):
                self._store_failed(exc)
            link.fail_nowait(request, exc)
        except asyncpg.PostgresError as exc:
            self._store_failed(exc)
            link.fail_nowait(request, StoreUnavailableError(f"PostgreSQL: {exc}"))

    def _renew(self, link: Link, renew: Renew) -> None:
        entry = self._roster.get(renew.name)
        if entry is None or entry.link is not link or entry.member.incarnation != renew.incarnation:
            # Dropped while it was silent, or replaced: it has to join again to know where it stands.
            link.abort(LinkClosedError(f"{renew.name} is not a member on this link"))
            return
        self._leases.renew(renew.name, self._clock.monotonic())
        self._roster.take_numbers(renew)

    async def _join(self, link: Link, member: Member) -> ClusterMap:
        if member.kind != "shard":
            self._admit(link, msgspec.structs.replace(member, term=0))
            self._publish(but=link)
            return self.map
        async with self._lock:
            self._refuse_taken(link, member)
            if self._must_reload:
                await self._reload()
            assert self._store is not None
            known = self._roster.get(member.name)
            if known is not None and known.member.incarnation == member.incarnation:
                term = known.member.term  # only the link was lost; Postgres need not even be there
            else:
                term = await self._store.register_shard(
                    self.epoch, member.name, member.node, member.incarnation
                )
            self._admit(link, msgspec.structs.replace(member, term=term))
            if not self._retired:
                if ownerless(self._owners, self._roster.shards()):
                    try:
                        await self._move(self._target(), f"{member.name} joined, slots had no owner")
                    except StoreUnavailableError as exc:  # it is a member all the same; the tick tries again
                        self._store_failed(exc)
                self._rebalance.joined(self._clock.monotonic())
            self._publish(but=link)
            return self.map

    def _refuse_taken(self, link: Link, member: Member) -> None:
        """One name, one living process: of two, the one that is already in stays."""
        known = self._roster.get(member.name)
        if (
            known is not None
            and known.member.incarnation != member.incarnation
            and known.link is not link
            and known.is_joined
            and not self._leases.is_lapsed(member.name, self._clock.monotonic())
        ):
            raise UnavailableError(f"another process is {member.name} and renews its lease")

    def _admit(self, link: Link, member: Member) -> None:
        if member.kind != "shard":
            self._refuse_taken(link, member)
        known = self._roster.get(member.name)
        old = known.link if known is not None else None
        link.context = member.name
        self._roster.put(Entry(member, None if link.closed else link))
        self._leases.grant(member.name, self._clock.monotonic())
        if old is not None and old is not link:
            old.close()

    async def _leave(self, leave: Leave) -> Done:
        async with self._lock:
            entry = self._roster.get(leave.name)
            if entry is None or entry.member.incarnation != leave.incarnation:
                return Done(0)
            if entry.member.kind == "shard" and not self._retired:
                entry.leaving = True
                if self._live_shards():
                    if self._must_reload:
                        await self._reload()
                    await self._move(self._target({leave.name}), f"{leave.name} leaves")
                    self._publish()  # it hears of its new term and that it owns nothing, before the answer
            self._drop(leave.name)
            self._publish()
            return Done()

    def _drop(self, name: str) -> None:
        self._roster.drop(name)
        self._leases.drop(name)
        self._asked_at.pop(name, None)

    def _stats(self) -> StatsReply:
        now = self._clock.monotonic()
        return StatsReply(
            version=self.map.version,
            slots=self._slot_counts(),
            members=[
                self._roster.stats_of(entry, min(self._leases.age_s(entry.member.name, now), 1e9))
                for entry in self._roster
            ],
        )

    # -- leases and moves ---------------------------------------------------------------------------

    async def _tick_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._leases.tick_s)
            now = self._clock.monotonic()
            result = self._leases.tick(now)
            if result.stalled_s or result.all_together:
                self._stalls += 1
                log.warning(
                    "nobody is taken for lost: %s",
                    f"the coordinator itself was held up for {result.stalled_s:.1f} s"
                    if result.stalled_s
                    else "all leases ended together",
                )
                continue
            if self._changing is not None or now < self._retry_at or self._retired:
                continue
            if self._suspects() or self._rebalance.is_due(now) or self._must_reload or self._can_give():
                # In a task of its own: waiting for Postgres here would look like a stall.
                self._changing = self._run(self._change_map())
                self._changing.add_done_callback(self._change_done)

    def _change_done(self, _: asyncio.Task[None]) -> None:
        self._changing = None

    def _can_give(self) -> bool:
        return bool(ownerless(self._owners, self._roster.shards()) and self._live_shards())

    def _suspects(self) -> frozenset[str]:
        now = self._clock.monotonic()
        lapsed = {e.member.name for e in self._roster if self._leases.is_lapsed(e.member.name, now)}
        members = [(e.member.name, e.member.node, e.is_joined) for e in self._roster]
        on_dead = {name for name, node, _ in members if node in self._dead_nodes}
        suspects = on_dead | lapsed | node_suspects(lapsed, members)
        losses = decide_losses(suspects, self._roster.shards(), self._live_shards())
        return losses.shards | losses.others

    async def _change_map(self) -> None:
        """Drop who is lost, move what is to be moved. Nothing changes while Postgres does not answer."""
        async with self._lock:
            lost = self._suspects()  # again: somebody may have come back while we waited
            lost_shards = lost & self._roster.shards().keys()
            try:
                if self._must_reload:
                    await self._reload()
                due = self._rebalance.is_due(self._clock.monotonic())
                if lost_shards or due or self._can_give():
                    reason = f"lost {', '.join(sorted(lost_shards))}" if lost_shards else "shards joined"
                    await self._move(target := self._target(lost_shards), reason)
                    moved = target is self._owners
                else:
                    moved = False
                if due:
                    self._rebalance.done()
                self._store_error = ""
            except (StoreUnavailableError, FencedError, asyncpg.PostgresError) as exc:
                self._store_failed(exc)
                lost -= lost_shards
                lost_shards, moved = frozenset(), False
            lost = (lost & self._suspects()) | lost_shards  # others may have joined again meanwhile
            for name in lost:
                entry = self._roster.get(name)
                link = entry.link if entry is not None else None
                self._drop(name)
                if link is not None:  # alive after all? Then it joins again.
                    link.abort(LinkClosedError(f"the lease of {name} is over"))
            if lost:
                log.warning("lost: %s", ", ".join(sorted(lost)))
            if lost or moved:
                self._publish()

    async def _save_for_ever(self) -> None:
        """Keep the members of the newest map in Postgres; while that fails, the next map tries again."""
        while True:
            await self._dirty.wait()
            await asyncio.sleep(SAVE_DELAY_S)
            self._dirty.clear()
            assert self._store is not None
            try:
                await self._store.save_members(self.epoch, [*self.map.shards, *self.map.members])
            except FencedError as exc:
                self._superseded(str(exc))
            except (StoreUnavailableError, asyncpg.PostgresError) as exc:
                log.info("the members are not saved: %s", exc)
                await asyncio.sleep(self.config.settings.link.reconnect_max_s)
                self._dirty.set()

    async def _maintain_for_ever(self) -> None:
        """Partitions ahead of time, and rows of shards that are long gone."""
        while True:
            assert self._store is not None
            try:
                await self._store.forget_old_shards(self.epoch, list(self._roster.shards()))
                async with acquired(
                    self._store.pool, self.config.settings.postgres.connect_timeout_s
                ) as connection:
                    await ensure_partitions(connection, self._clock.now_ms())
                wait_s = MAINTENANCE_S
            except FencedError as exc:
                self._superseded(str(exc))
                return
            except (StoreUnavailableError, asyncpg.PostgresError) as exc:
                log.warning("maintenance of the database has to wait: %s", exc)
                wait_s = 60.0
            await asyncio.sleep(wait_s)

    # -- nodes --------------------------------------------------------------------------------------

    async def _watch_nodes(self) -> None:
        while True:
            try:
                await self._poll_nodes()
                if not self._retired:
                    await self._start_missing()
            except Exception as exc:  # Ray's errors share no base; the last answer stays in force
                log.warning("watching the nodes failed: %s: %s", type(exc).__name__, exc)
            await asyncio.sleep(self.config.settings.cluster.node_poll_s)

    async def _poll_nodes(self) -> None:
        assert self._nodes is not None
        alive, dead = await self._nodes.alive()
        if not alive:
            return  # Ray always has the node that answers: this is no answer
        now_alive = {info.node: info for info in alive}
        gone = (self._live_nodes.keys() - now_alive.keys()) | dead
        for node in gone - self._dead_nodes:
            log.warning("Ray lost node %s", node)
        for node in now_alive.keys() - self._live_nodes.keys():
            log.info("node %s joined", node)
        self._live_nodes = now_alive
        self._dead_nodes = gone | (self._dead_nodes - now_alive.keys())
        removed = [name for name, spec in self._wanted.items() if spec.node in self._dead_nodes]
        self._wanted = {actor_name(spec): spec for spec in wanted_actors(self.config.settings, alive)}
        for name in removed:
            if not self._retired:
                self._run(self._nodes.remove(name))

    def _missing(self) -> list[str]:
        return [name for name in self._wanted if (e := self._roster.get(name)) is None or not e.is_joined]

    async def _start_missing(self) -> None:
        assert self._nodes is not None
        now = self._clock.monotonic()
        retry_s = self.config.settings.cluster.spawn_retry_s
        for name in self._missing():
            if now - self._asked_at.get(name, float("-inf")) < retry_s:
                continue
            if name in self._asked_at:
                log.warning("%s has not joined within %.0f s of its start", name, retry_s)
            self._asked_at[name] = now
            await self._nodes.ensure(self._wanted[name])


def coordinator_config(settings: Settings, secret: bytes, node: str = "local") -> ActorConfig:
    """The configuration of the coordinator on a node."""
    return ActorConfig("coordinator", COORDINATOR, node, settings, secret)
