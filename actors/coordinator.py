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
from collections.abc import Coroutine
from typing import Any, Final

import asyncpg
import msgspec

from actors.archive_job import ArchiveJob
from actors.config import ActorConfig
from actors.link import Link, LinkServer
from actors.member import advertised_host
from actors.names import COORDINATOR
from actors.roster import Entry, Roster
from actors.slot_table import STORE_ERRORS, SlotTable
from actors.supervisor import Nodes, Supervisor
from carillon.clock import Clock, SystemClock
from carillon.errors import (
    BusyError,
    CarillonError,
    ClusterError,
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
    LeaseTable,
    RebalanceTimer,
    assign_slots,
    build_map,
    decide_losses,
    map_version,
    node_suspects,
    ownerless,
)
from carillon.settings import Settings

log = logging.getLogger(__name__)

SAVE_DELAY_S: Final = 0.05
"""Maps of one burst of joins are saved once."""
MAINTENANCE_S: Final = 6 * 3600.0


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
        self._table = SlotTable(config.settings, self._clock)
        self._change = 0
        self._server = LinkServer(self, config.settings.link, config.name, config.secret)
        self._address: Address | None = None
        self._lock = asyncio.Lock()
        self._dirty = asyncio.Event()
        self._supervisor: Supervisor | None = None
        if spawn:  # imported here: without it the coordinator runs without Ray
            ray_nodes: Nodes = nodes or importlib.import_module("actors.ray_nodes").RayNodes(config)
            self._supervisor = Supervisor(ray_nodes, config.settings, self._clock, self._has_joined)
        self._draining: set[str] = set()
        self._retired = False
        self._changing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stalls = 0

    @property
    def epoch(self) -> int:
        """This coordinator's number; 0 until Postgres gave it one."""
        return self._table.epoch

    # -- life cycle ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, take an epoch, load the map, and serve.

        Waits for Postgres as long as it takes: until then members are answered "unavailable" and go on with
        the map they have.
        """
        cluster = self.config.settings.cluster
        host, port = await self._server.start(cluster.bind_host)
        self._address = Address(advertised_host(cluster, self.config.node, host), port)
        try:
            if self._supervisor is not None:
                await self._supervisor.poll()
            await self._load_first()
        except BaseException:
            await self.stop()
            raise
        self._run(self._tick_for_ever())
        self._run(self._save_for_ever())
        self._run(self._maintain_for_ever())
        if self.config.settings.postgres.dsn:  # a simulation has no database
            self._run(ArchiveJob(self.config.settings, self._clock).run_for_ever())
        if self._supervisor is not None:
            self._run(self._watch_nodes(self._supervisor))
        log.info("coordinator epoch %d serves at %s:%d", self.epoch, self._address.host, port)

    async def stop(self) -> None:
        """Stop serving. Slots and members stay as they are in Postgres."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.close()
        await self._table.close()

    async def drain(self) -> None:
        """See `retire`."""
        self.retire()

    def retire(self) -> None:
        """The cluster is going down: start no actor and move no slot any more."""
        self._retired = True

    async def drain_node(self, wanted: str) -> dict[str, Any]:
        """Leave a node: its shards give their slots to those of other nodes, and nothing starts there again.

        Its actors stay as they are; whoever asked drains and ends them. Idempotent, and remembered over a
        restart of the coordinator.

        Args:
            wanted: the node's id, or the start of it.

        Returns:
            `{"node": id, "members": [{"kind", "name"}, ...], "slots": how many moved}`.

        Raises:
            ClusterError: no such node, several, or one that cannot be left; the sentence says why.
            FencedError, StoreUnavailableError: nothing is changed, or only remembered: ask again.
        """
        assert self._supervisor is not None
        info = self._supervisor.find(wanted)
        stay = self._supervisor.live.keys() - self._draining - {info.node}
        if info.is_head:
            raise ClusterError(
                f"node {info.node[:8]} is the head, where the coordinator is: drain other nodes, "
                "or remove everything with `down`"
            )
        if not stay:
            raise ClusterError(f"no node would be left to take over from {info.node[:8]}")
        async with self._lock:
            leaving = {e.member.name for e in self._roster.shards().values() if e.member.node == info.node}
            if not self._live_shards() - leaving:
                raise ClusterError(f"no shard of another node could take over from {info.node[:8]}")
            await self._set_draining(self._draining | {info.node})
            before = self._slot_counts()
            try:
                await self._reload_if_needed()
                if await self._move(self._target(leaving), f"node {info.node[:8]} is drained"):
                    self._publish()
            except STORE_ERRORS as exc:
                self._store_failed(exc)
                raise StoreUnavailableError(f"the slots have not moved: {exc}") from exc
        members = [e.member for e in self._roster if e.member.node == info.node]
        return {
            "node": info.node,
            "members": [{"kind": member.kind, "name": member.name} for member in members],
            "slots": sum(before.get(name, 0) for name in leaving),
        }

    async def undrain_node(self, wanted: str) -> str:
        """Use a node again that was drained; returns its id. Raises like `drain_node`."""
        assert self._supervisor is not None
        info = self._supervisor.find(wanted)
        async with self._lock:
            await self._set_draining(self._draining - {info.node})
        return info.node

    async def _set_draining(self, nodes: set[str]) -> None:
        """Remember which nodes are left (under the lock)."""
        assert self._supervisor is not None
        nodes = nodes & self._supervisor.live.keys()  # ids are never used again
        if nodes != self._draining:
            try:
                await self._table.save_draining(nodes)
            except STORE_ERRORS as exc:
                self._store_failed(exc)
                raise StoreUnavailableError(f"not done, PostgreSQL does not answer: {exc}") from exc
            self._draining = self._supervisor.draining = nodes
            self._supervisor.want()

    @property
    def waiting_for(self) -> str:
        """What keeps `start` from returning, as a sentence; "" if nothing does."""
        return f"the coordinator waits for PostgreSQL: {self._table.error}" if self._table.error else ""

    def link_address(self) -> Address | None:
        """Where members dial; None before `start` has bound the port."""
        return self._address

    async def status(self) -> dict[str, Any]:
        """JSON-able facts for the command line."""
        now = self._clock.monotonic()
        counts = self._slot_counts()
        supervisor = self._supervisor
        return {
            "epoch": self.epoch,
            "version": self.map.version,
            "retired": self._retired,
            "postgres": self._table.error or "ok",
            "stalls": self._stalls,
            "nodes": [
                {
                    "node": info.node,
                    "host": info.host,
                    "head": info.is_head,
                    "draining": info.node in self._draining,
                }
                for info in (supervisor.live.values() if supervisor else ())
            ],
            "wanted": sorted(supervisor.wanted) if supervisor else [],
            "missing": supervisor.missing() if supervisor else [],
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
            "moves": list(self._table.moves),
            "limited": self._roster.counters("events_limited"),
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

    # -- Postgres -----------------------------------------------------------------------------------

    async def _load_first(self) -> None:
        stored = await self._table.open()
        if self._supervisor is not None:
            self._draining = self._supervisor.draining = set(stored.draining)
            self._supervisor.want()
        # Everyone of the last map has one lease to join again. Those of nodes that Ray does not have are of
        # an earlier run of the cluster.
        now = self._clock.monotonic()
        for member in stored.members:
            if self._supervisor is not None and member.node not in self._supervisor.live:
                continue
            self._roster.put(Entry(member))
            self._leases.grant(member.name, now)
        self._publish()

    async def _reload_if_needed(self) -> None:
        """A commit whose answer was lost may have changed owners and terms (under the lock)."""
        if self._table.must_reload:
            changed, terms = await self._table.reload()
            if self._roster.set_terms(terms) or changed:
                self._publish()

    async def _move(self, target: list[str | None], reason: str) -> bool:
        """Carry out a new assignment (under the lock); whether anything moved. Raises as `SlotTable.move`."""
        terms = await self._table.move(target, reason)
        if terms:
            self._roster.set_terms(terms)
        return terms is not None

    def _store_failed(self, exc: Exception) -> None:
        if isinstance(exc, FencedError):
            self._superseded(str(exc))
        else:
            self._table.failed(exc)

    def _superseded(self, why: str) -> None:
        """A newer coordinator exists: serve nobody any more, so that members find it."""
        if self.terminated.done():
            return
        log.error("this coordinator stops: %s", why)
        self.terminated.set_result(why)
        self._run(self.stop())

    # -- maps ---------------------------------------------------------------------------------------

    def _publish(self, but: Link | None = None) -> None:
        """Make the next map and send it to everyone (`but`: who gets it as an answer)."""
        self._change += 1
        self.map = build_map(
            map_version(self.epoch, self._change),
            self._table.owners,
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
        for owner in self._table.owners:
            name = owner if owner is not None and owner in shards else ""
            counts[name] = counts.get(name, 0) + 1
        return counts

    def _has_joined(self, name: str) -> bool:
        entry = self._roster.get(name)
        return entry is not None and entry.is_joined

    def _dead_nodes(self) -> set[str]:
        return self._supervisor.dead if self._supervisor is not None else set()

    def _live_shards(self) -> set[str]:
        """Shards that can take slots now."""
        now = self._clock.monotonic()
        return {
            name
            for name, entry in self._roster.shards().items()
            if entry.is_joined
            and not entry.leaving
            and entry.member.node not in self._dead_nodes()
            and entry.member.node not in self._draining
            and not self._leases.is_lapsed(name, now)
        }

    def _target(self, without: set[str] | frozenset[str] = frozenset()) -> list[str | None]:
        """The best assignment over the live shards; absent ones that may come back keep their slots."""
        live = self._live_shards() - without
        absent = set(self._roster.shards()) - live - without
        return assign_slots(self._table.owners, live, absent)

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
            await self._reload_if_needed()
            known = self._roster.get(member.name)
            if known is not None and known.member.incarnation == member.incarnation:
                term = known.member.term  # only the link was lost; Postgres need not even be there
            else:
                term = await self._table.register(member)
            self._admit(link, msgspec.structs.replace(member, term=term))
            if not self._retired:
                if ownerless(self._table.owners, self._roster.shards()):
                    try:
                        await self._move(self._target(), f"{member.name} joined, slots had no owner")
                    except STORE_ERRORS as exc:  # it is a member all the same; the tick tries again
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
        if self._supervisor is not None:
            self._supervisor.joined(member.name, member.node)
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
                    await self._reload_if_needed()
                    await self._move(self._target({leave.name}), f"{leave.name} leaves")
                    self._publish()  # it hears of its new term and that it owns nothing, before the answer
            self._drop(leave.name)
            self._publish()
            return Done()

    def _drop(self, name: str) -> None:
        self._roster.drop(name)
        self._leases.drop(name)

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
            if self._changing is not None or now < self._table.retry_at or self._retired:
                continue
            if self._suspects() or self._rebalance.is_due(now) or self._table.must_reload or self._can_give():
                # In a task of its own: waiting for Postgres here would look like a stall.
                self._changing = self._run(self._change_map())
                self._changing.add_done_callback(self._change_done)

    def _change_done(self, _: asyncio.Task[None]) -> None:
        self._changing = None

    def _can_give(self) -> bool:
        return bool(ownerless(self._table.owners, self._roster.shards()) and self._live_shards())

    def _suspects(self) -> frozenset[str]:
        now = self._clock.monotonic()
        lapsed = {e.member.name for e in self._roster if self._leases.is_lapsed(e.member.name, now)}
        members = [(e.member.name, e.member.node, e.is_joined) for e in self._roster]
        dead = self._dead_nodes()
        on_dead = {name for name, node, _ in members if node in dead}
        suspects = on_dead | lapsed | node_suspects(lapsed, members)
        losses = decide_losses(suspects, self._roster.shards(), self._live_shards())
        return losses.shards | losses.others

    async def _change_map(self) -> None:
        """Drop who is lost, move what is to be moved. Nothing changes while Postgres does not answer."""
        async with self._lock:
            lost = self._suspects()  # again: somebody may have come back while we waited
            lost_shards = lost & self._roster.shards().keys()
            try:
                await self._reload_if_needed()
                due = self._rebalance.is_due(self._clock.monotonic())
                if lost_shards or due or self._can_give():
                    reason = f"lost {', '.join(sorted(lost_shards))}" if lost_shards else "shards joined"
                    moved = await self._move(self._target(lost_shards), reason)
                else:
                    moved = False
                if due:
                    self._rebalance.done()
            except (FencedError, *STORE_ERRORS) as exc:
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
            try:
                await self._table.save_members([*self.map.shards, *self.map.members])
            except FencedError as exc:
                self._superseded(str(exc))
            except STORE_ERRORS as exc:
                log.info("the members are not saved: %s", exc)
                await asyncio.sleep(self.config.settings.link.reconnect_max_s)
                self._dirty.set()

    async def _maintain_for_ever(self) -> None:
        """Partitions ahead of time, and rows of shards that are long gone."""
        while True:
            try:
                await self._table.maintain(list(self._roster.shards()))
                wait_s = MAINTENANCE_S
            except FencedError as exc:
                self._superseded(str(exc))
                return
            except STORE_ERRORS as exc:
                log.warning("maintenance of the database has to wait: %s", exc)
                wait_s = 60.0
            await asyncio.sleep(wait_s)

    async def _watch_nodes(self, supervisor: Supervisor) -> None:
        while True:
            try:
                if not self._retired:
                    await supervisor.poll()
                    await supervisor.reconcile()
            except Exception as exc:  # Ray's errors share no base; the last answer stays in force
                log.warning("watching the nodes failed: %s: %s", type(exc).__name__, exc)
            await asyncio.sleep(self.config.settings.cluster.node_poll_s)


def coordinator_config(settings: Settings, secret: bytes, node: str = "local") -> ActorConfig:
    """The configuration of the coordinator on a node."""
    return ActorConfig("coordinator", COORDINATOR, node, settings, secret)
