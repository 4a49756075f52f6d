"""Router: finds the shard of every event and puts the answers together.

One loop turn's events travel together: all `Publish` requests read in a turn become one per shard, and
their outcomes are put back in the order of each request. The router keeps no state that a restart would
miss; what it does keep is the order of events within a slot while that slot moves (see `_hold`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Coroutine
from typing import Any, Final

from actors.config import ActorConfig
from actors.directory import REROUTE_CODES, ShardDirectory
from actors.link import Link
from actors.member import Membership
from actors.policy_spread import spread_policy
from actors.pool_directory import PoolDirectory
from actors.presence_query import find_presence
from carillon.clock import Clock, SystemClock
from carillon.errors import (
    BusyError,
    CarillonError,
    InvalidInputError,
    LinkClosedError,
    LinkFrameError,
    LinkTimeoutError,
    RemoteError,
    UnavailableError,
)
from carillon.ids import SLOTS
from carillon.messages import (
    Event,
    Message,
    Outcome,
    Outcomes,
    PolicyRead,
    PresenceQuery,
    Publish,
    Push,
    PushJob,
    PushLeft,
)
from carillon.metrics import Stats

log = logging.getLogger(__name__)

_ANSWER_MARGIN: Final = 0.9
"""Part of the ingress' deadline after which the router gives up, so that its answer still arrives."""


class _Ask:
    """One `Publish` of an ingress: where its answer goes and what is still missing."""

    __slots__ = ("deadline", "link", "missing", "number", "outcomes", "request", "started")

    def __init__(
        self, link: Link, request: int, size: int, number: int, started: float, deadline: float
    ) -> None:
        self.link = link
        self.request = request
        self.number = number  # order of arrival
        self.started = started
        self.deadline = deadline
        self.missing = size
        self.outcomes: list[Any] = [None] * size


_Place = tuple[_Ask, int]
"""Where an event's outcome goes: the ask and the index in it. Ordered by (ask.number, index)."""


class _Lane:
    """What goes to one shard."""

    __slots__ = ("events", "name", "outstanding", "places")

    def __init__(self, name: str) -> None:
        self.name = name
        self.outstanding = 0  # events gathered or sent, without outcome
        self.events: list[Event] = []  # gathered in this turn
        self.places: list[_Place] = []


class _HeldSlot:
    """Events that wait for their slot to have a reachable owner, and all later ones of the slot."""

    __slots__ = ("entries", "not_before")

    def __init__(self, not_before: float) -> None:
        self.entries: list[tuple[Event, _Place]] = []
        self.not_before = not_before  # monotonic; 0 once the map or a link has changed


class Router:
    """The actor. One per node.

    Args:
        config: identity and settings.
        clock: None is the system's.
    """

    def __init__(self, config: ActorConfig, clock: Clock | None = None) -> None:
        self.config = config
        self.stats = Stats()
        self._clock = clock or SystemClock()
        settings = config.settings
        self._deadline_s = settings.ingress.request_timeout_s * _ANSWER_MARGIN
        self._max_outstanding = settings.router.max_outstanding
        self._max_held = settings.router.max_held
        self._max_batch = settings.router.max_batch
        self._max_passing = settings.router.max_passing
        self._release_batch = settings.router.release_batch
        self._release_pause_s = settings.router.release_pause_s
        self._pause_min_s = max(settings.link.reconnect_min_s, 0.01)
        self._pause_max_s = max(settings.link.reconnect_max_s, self._pause_min_s)
        self.membership = Membership(config, self, stats=self.stats, clock=self._clock)
        self._directory: ShardDirectory | None = None
        self._pools: PoolDirectory | None = None
        self._lanes: dict[str, _Lane] = {}
        self._by_slot: list[_Lane | None] = [None] * SLOTS
        self._on_the_way = [0] * SLOTS  # events gathered or sent per slot
        self._held: dict[int, _HeldSlot] = {}
        self._held_count = 0
        self._pauses: dict[int, float] = {}  # slots that moved lately: the next pause
        self._dirty: list[_Lane] = []
        self._flush_scheduled = False
        self._hold_timer: asyncio.TimerHandle | None = None
        self._room = 0  # held events that may be released until then
        self._room_until = float("-inf")  # monotonic
        self._pace_timer: asyncio.TimerHandle | None = None
        self._next_ask = 0
        self._asks_open = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- life cycle ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Join the cluster and dial shards and pools; returns once the first map is here."""
        self._loop = asyncio.get_running_loop()
        self._directory = ShardDirectory(self.membership, self)
        self._directory.on_change(self._map_changed)
        self._pools = PoolDirectory(self.membership, self.stats, self._clock)
        await self.membership.start()

    async def drain(self) -> None:
        """Refuse new events, wait (at most the ingress' deadline) for those on the way, leave the cluster."""
        self._draining = True
        deadline = self._clock.monotonic() + self._deadline_s
        while (self._asks_open or self._tasks) and self._clock.monotonic() < deadline:
            await asyncio.sleep(0.01)
        await self._shut(leave=True)

    async def stop(self) -> None:
        """Close everything. Unanswered requests fail at their ingress, which sends them elsewhere."""
        await self._shut(leave=False)

    async def _shut(self, *, leave: bool) -> None:
        self._stopped = True
        for timer in (self._hold_timer, self._pace_timer):
            if timer is not None:
                timer.cancel()
        self._hold_timer = self._pace_timer = None
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.membership.close(leave=leave)
        if self._directory is not None:
            await self._directory.close()
        if self._pools is not None:
            await self._pools.close()

    async def status(self) -> dict[str, Any]:
        """Facts for the command line."""
        directory = self._directory
        names = [member.name for member in directory.shards()] if directory is not None else []
        return {
            "kind": "router",
            "name": self.config.name,
            "mapVersion": self.membership.map.version,
            "leaseValid": self.membership.lease_valid(),
            "draining": self._draining,
            "shards": {
                name: {
                    "open": directory is not None and directory.link(name) is not None,
                    "outstanding": self._lanes[name].outstanding if name in self._lanes else 0,
                }
                for name in names
            },
            "held": self._held_count,
            "heldSlots": len(self._held),
            "asks": self._asks_open,
            "passing": len(self._tasks),
            "pools": self._pools.status() if self._pools is not None else {},
        }

    # -- LinkHandler (links of ingress and shards, both directions) ---------------------------------

    def link_opened(self, link: Link) -> None:
        """Nothing: shards are dialled by the directory, ingress dials us."""

    def link_closed(self, link: Link) -> None:
        """Nothing: what is on the way to a shard fails by its request."""

    def receive(self, link: Link, message: Any, request: int) -> None:
        """See `LinkHandler.receive`."""
        kind = type(message)
        if kind is Publish:
            self._publish(link, message.events, request)
        elif kind is Push:
            if self._pools is not None:
                self._pools.offer(message.jobs, functools.partial(_hand_back, link))
        elif request <= 0:
            log.warning("unexpected one-way %s from %s", kind.__name__, link.peer)
        elif kind is PresenceQuery:
            self._spawn(link, request, self._find_presence(message))
        elif kind is PolicyRead:
            self._spawn(link, request, self._spread_policy(message))
        elif hasattr(message, "slot"):
            self._spawn(link, request, self._pass_on(message))
        else:
            link.fail_nowait(request, InvalidInputError(f"a router does not answer {kind.__name__}"))

    def read_finished(self, link: Link) -> None:
        """Nothing: batches end with the turn of the loop, over all links."""

    # -- publishing ---------------------------------------------------------------------------------

    def _publish(self, link: Link, events: list[Event], request: int) -> None:
        if self._draining:
            link.fail_nowait(request, UnavailableError("this router is draining"))
            return
        if not events:
            link.reply_nowait(request, Outcomes([]))
            return
        self._next_ask = number = self._next_ask + 1
        now = self._clock.monotonic()
        ask = _Ask(link, request, len(events), number, now, now + self._deadline_s)
        self._asks_open += 1
        by_slot, held, on_the_way = self._by_slot, self._held, self._on_the_way
        dirty, limit = self._dirty, self._max_outstanding
        for index, event in enumerate(events):
            slot = event.slot
            if not 0 <= slot < SLOTS:
                self._settle(
                    ask, index, Outcome(event.id, status="failed", code="invalid", detail="no such slot")
                )
                continue
            lane = by_slot[slot]
            if lane is None or slot in held:
                self._hold(event, (ask, index), 0.0)
            elif lane.outstanding >= limit:
                self._refuse(ask, index, event, "busy", f"{lane.name} is busy", 0.5)
            else:
                lane.outstanding += 1
                on_the_way[slot] += 1
                if not lane.events:
                    dirty.append(lane)
                lane.events.append(event)
                lane.places.append((ask, index))
        if dirty and not self._flush_scheduled:
            self._schedule_flush()

    def _schedule_flush(self) -> None:
        # The end of the turn: by then every link that had bytes has been read.
        self._flush_scheduled = True
        assert self._loop is not None
        self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Send what was gathered, one request per shard."""
        self._flush_scheduled = False
        dirty, self._dirty = self._dirty, []
        size = self._max_batch
        for lane in dirty:
            events, places = lane.events, lane.places
            lane.events, lane.places = [], []
            if len(events) <= size:
                self._send(lane, events, places)
            else:
                for at in range(0, len(events), size):
                    self._send(lane, events[at : at + size], places[at : at + size])

    def _send(self, lane: _Lane, events: list[Event], places: list[_Place]) -> None:
        assert self._directory is not None
        link = self._directory.link(lane.name)
        if link is None:
            self._hold_all(lane, events, places, ambiguous=False, pause=False)
            return
        try:
            future = link.request_nowait(Publish(events), self._deadline_s)
        except LinkClosedError:
            self._hold_all(lane, events, places, ambiguous=False, pause=True)
        except LinkFrameError as exc:
            if len(events) == 1:
                self._fail_all(lane, events, places, "invalid", str(exc), 0.0)
            else:  # too long together, or one of them is poison: halves find out
                middle = len(events) // 2
                self._send(lane, events[:middle], places[:middle])
                self._send(lane, events[middle:], places[middle:])
        except BusyError as exc:
            self._fail_all(lane, events, places, "busy", str(exc), max(exc.retry_after_s, 0.5))
        else:
            future.add_done_callback(functools.partial(self._answered, lane, events, places))

    def _answered(
        self, lane: _Lane, events: list[Event], places: list[_Place], future: asyncio.Future[Any]
    ) -> None:
        if future.cancelled():
            return
        exc = future.exception()
        if exc is not None:
            self._not_answered(lane, events, places, exc)
            return
        reply = future.result()
        outcomes = reply.outcomes if type(reply) is Outcomes else ()
        if len(outcomes) != len(events):
            log.error("%s answered %d events with %s", lane.name, len(events), type(reply).__name__)
            self._fail_all(lane, events, places, "internal", "the shard's answer makes no sense", 0.0)
            return
        lane.outstanding -= len(events)
        on_the_way, pauses, held = self._on_the_way, self._pauses, self._held
        freed: set[int] = set()  # held slots of which nothing is on the way any more
        moved = 0
        for event, place, outcome in zip(events, places, outcomes, strict=True):
            slot = event.slot
            on_the_way[slot] -= 1
            if outcome.status == "moved":
                moved += 1
                self._hold(event, place, self._pause(slot))
            if held and slot in held and not on_the_way[slot]:
                freed.add(slot)
            if outcome.status == "moved":
                continue
            ask, index = place
            ask.outcomes[index] = outcome
            ask.missing -= 1
            if not ask.missing:
                self._reply(ask)
            if pauses:
                pauses.pop(slot, None)
        self.stats.count("events_routed", len(events) - moved)
        if moved:
            self.stats.count("events_rerouted", moved)
        if freed:
            self._release(freed)

    def _not_answered(
        self, lane: _Lane, events: list[Event], places: list[_Place], exc: BaseException
    ) -> None:
        if isinstance(exc, LinkClosedError):
            self._hold_all(lane, events, places, ambiguous=True, pause=False)
        elif isinstance(exc, RemoteError):
            if exc.code in REROUTE_CODES:
                self._hold_all(lane, events, places, ambiguous=False, pause=True)
            else:
                self._fail_all(lane, events, places, exc.code, exc.message, exc.retry_after_s)
        elif isinstance(exc, LinkTimeoutError):
            self._fail_all(lane, events, places, "unavailable", str(exc), 1.0)
        else:
            self._fail_all(lane, events, places, "internal", str(exc), 0.0)

    def _settle(self, ask: _Ask, index: int, outcome: Outcome) -> None:
        ask.outcomes[index] = outcome
        ask.missing -= 1
        if not ask.missing:
            self._reply(ask)

    def _reply(self, ask: _Ask) -> None:
        self._asks_open -= 1
        ask.link.reply_nowait(ask.request, Outcomes(ask.outcomes))
        self.stats.observe_ms("route_ms", (self._clock.monotonic() - ask.started) * 1000)

    def _refuse(
        self, ask: _Ask, index: int, event: Event, code: str, detail: str, retry_after_s: float
    ) -> None:
        self.stats.count("events_refused")
        outcome = Outcome(event.id, status="failed", code=code, detail=detail, retry_after_s=retry_after_s)
        self._settle(ask, index, outcome)

    def _fail_all(
        self,
        lane: _Lane,
        events: list[Event],
        places: list[_Place],
        code: str,
        detail: str,
        retry_after_s: float,
    ) -> None:
        lane.outstanding -= len(events)
        for event, (ask, index) in zip(events, places, strict=True):
            self._on_the_way[event.slot] -= 1
            self._refuse(ask, index, event, code, detail, retry_after_s)
        if self._held:
            self._release({event.slot for event in events})

    # -- slots that move ----------------------------------------------------------------------------

    def _hold_all(
        self, lane: _Lane, events: list[Event], places: list[_Place], *, ambiguous: bool, pause: bool
    ) -> None:
        """Take back a batch that did not arrive (or, `ambiguous`, that may have)."""
        lane.outstanding -= len(events)
        self.stats.count("events_rerouted", len(events))
        slots = {event.slot for event in events}
        pauses = {slot: self._pause(slot) for slot in slots} if pause else {}
        for event, place in zip(events, places, strict=True):
            self._on_the_way[event.slot] -= 1
            if ambiguous:
                event.retry = True
            self._hold(event, place, pauses.get(event.slot, 0.0))
        self._release(slots)

    def _pause(self, slot: int) -> float:
        """When to ask again about a slot that its owner refused, if nothing is heard before.

        Not only we may be behind: the owner may hear of its slot later than we do. Doubles up to
        `link.reconnect_max_s`, as each try sends all held events of the slot.
        """
        waiting = self._held.get(slot)
        if waiting is not None:
            return waiting.not_before  # one refusal of many in flight: counted once
        pause_s = self._pauses.get(slot, self._pause_min_s)
        self._pauses[slot] = min(pause_s * 2, self._pause_max_s)
        return self._clock.monotonic() + pause_s

    def _hold(self, event: Event, place: _Place, not_before: float) -> None:
        """Keep an event until its slot has a reachable owner; later events of the slot queue behind it.

        Ordering: the slot is released only when nothing of it is on the way any more, and then in the order
        of arrival. Otherwise an event that was already under way behind this one, and comes back too, would
        be overtaken by one that arrived after it.
        """
        ask, index = place
        if self._held_count >= self._max_held:
            self._refuse(ask, index, event, "busy", "too many events wait for their shard", 1.0)
            return
        waiting = self._held.get(event.slot)
        if waiting is None:
            waiting = self._held[event.slot] = _HeldSlot(not_before)
        waiting.entries.append((event, place))
        self._held_count += 1
        if self._hold_timer is None and not self._stopped:
            self._arm_hold_timer()

    def _release(self, slots: set[int] | None = None) -> None:
        """Send what is held for slots whose owner can be reached (again).

        Of hundreds of events that waited for a failover, few go at once: answered together, they would be
        a turn of tens of milliseconds in the ingress and in clients, which events of other users sit out.

        Args:
            slots: look at these only; None means all. During a failover answers of the living shards come
                by the thousand, and each must not look at every slot of the dead one.
        """
        if self._directory is None or self._stopped:
            return
        now = self._clock.monotonic()
        if now >= self._room_until:
            self._room, self._room_until = self._release_batch, now + self._release_pause_s
        for slot in list(self._held) if slots is None else slots:
            waiting = self._held.get(slot)
            lane = self._by_slot[slot]
            if waiting is None or lane is None or self._on_the_way[slot] or waiting.not_before > now:
                continue
            if self._directory.link(lane.name) is None:
                continue
            entries = waiting.entries
            if lane.outstanding and lane.outstanding + len(entries) > self._max_outstanding:
                continue  # the next `_hold_tick` comes back to it
            if self._room <= 0:
                if self._pace_timer is None:
                    assert self._loop is not None
                    self._pace_timer = self._loop.call_later(self._release_pause_s, self._release_more)
                break
            self._room -= len(entries)
            del self._held[slot]
            self._held_count -= len(entries)
            entries.sort(key=_arrival)
            lane.outstanding += len(entries)
            self._on_the_way[slot] += len(entries)
            if not lane.events:
                self._dirty.append(lane)
            for event, place in entries:
                lane.events.append(event)
                lane.places.append(place)
        if self._dirty and not self._flush_scheduled:
            self._schedule_flush()

    def _release_more(self) -> None:
        self._pace_timer = None
        self._release()

    def _arm_hold_timer(self) -> None:
        assert self._loop is not None
        self._hold_timer = self._loop.call_later(self._pause_min_s, self._hold_tick)

    def _hold_tick(self) -> None:
        """While anything is held: give up what is too late, try again what has paused."""
        self._hold_timer = None
        now = self._clock.monotonic()
        for slot, waiting in list(self._held.items()):
            if any(place[0].deadline <= now for _, place in waiting.entries):
                late = [entry for entry in waiting.entries if entry[1][0].deadline <= now]
                waiting.entries = [entry for entry in waiting.entries if entry[1][0].deadline > now]
                self._held_count -= len(late)
                if not waiting.entries:
                    del self._held[slot]
                for event, (ask, index) in late:
                    self._refuse(ask, index, event, "unavailable", "the user's shard is not reachable", 1.0)
        self._release()
        if self._held:
            self._arm_hold_timer()

    def _map_changed(self) -> None:
        """A map came, or a link to a shard opened."""
        directory = self._directory
        if directory is None:
            return
        for member in directory.shards():
            if member.name not in self._lanes:
                self._lanes[member.name] = _Lane(member.name)
        owners = [directory.owner(slot) for slot in range(SLOTS)]
        self._by_slot = [self._lanes[owner.name] if owner is not None else None for owner in owners]
        if self._held:
            for waiting in self._held.values():
                waiting.not_before = 0.0
            self._release()
        known = {member.name for member in directory.shards()}
        for name in [
            name for name, lane in self._lanes.items() if name not in known and not lane.outstanding
        ]:
            del self._lanes[name]

    # -- everything else that has an owner ----------------------------------------------------------

    def _spawn(self, link: Link, request: int, work: Coroutine[Any, Any, Message]) -> None:
        if len(self._tasks) >= self._max_passing or self._draining:
            work.close()
            error = (
                UnavailableError("this router is draining")
                if self._draining
                else BusyError("router is busy", 0.5)
            )
            link.fail_nowait(request, error)
            return
        task = asyncio.ensure_future(self._answer(link, request, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, link: Link, request: int, work: Coroutine[Any, Any, Message]) -> None:
        try:
            link.reply_nowait(request, await work)
        except CarillonError as exc:
            link.fail_nowait(request, exc)
        except Exception as exc:
            log.exception("answering %s failed", link.peer)
            link.fail_nowait(request, exc)

    async def _pass_on(self, message: Any) -> Message:
        assert self._directory is not None
        return await self._directory.request(message.slot, message, self._deadline_s)

    async def _find_presence(self, query: PresenceQuery) -> Message:
        assert self._directory is not None
        return await find_presence(self._directory, query, self._deadline_s, self.config.settings.link)

    async def _spread_policy(self, told: PolicyRead) -> Message:
        assert self._directory is not None
        return await spread_policy(self._directory, told, self.config.settings.link)


def _hand_back(link: Link, provider: str, jobs: list[PushJob], reason: str) -> None:
    """Tell the shard that sent these jobs that no pool takes them; if that fails, their leases do it."""
    left = PushLeft(provider, reason, [job.delivery for job in jobs], [job.attempt for job in jobs])
    try:
        link.send_nowait(left)
    except CarillonError as exc:
        log.info("%d pushes wait for their lease to end: %s", len(jobs), exc)


def _arrival(entry: tuple[Event, _Place]) -> tuple[int, int]:
    ask, index = entry[1]
    return (ask.number, index)
