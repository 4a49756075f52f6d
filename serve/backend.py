"""The ingress' link to the routers.

Requests go to the router of this node, to any other while that one is away. A try whose fate is unknown (the
link broke, no answer) is made again inside the request's deadline with the same ids and `retry=True`: the
shard then looks first whether the event exists.
"""

from __future__ import annotations

import asyncio
import functools
import random
from typing import Any, Final

from actors.config import ActorConfig
from actors.link import Link, LinkClient
from actors.member import Membership
from carillon.clock import Clock, SystemClock
from carillon.errors import (
    BusyError,
    LinkClosedError,
    LinkFrameError,
    LinkTimeoutError,
    RemoteError,
    StoreUnavailableError,
    UnavailableError,
)
from carillon.ids import SLOTS, slot_of
from carillon.messages import (
    Address,
    ClusterMap,
    Event,
    Member,
    MemberStats,
    Message,
    Outcome,
    Outcomes,
    PresenceQuery,
    Publish,
    StatsQuery,
    StatsReply,
)
from carillon.metrics import Stats

_AGAIN: Final = frozenset({"unavailable", "moved", "fenced", "link", "link_closed", "link_timeout"})
"""Failures that another try inside the deadline may cure."""
_PROBE_TENANT: Final = "\x7fready"
"""Tenant of readiness probes: no tenant can have this name."""


class RouterBackend:
    """Publishes events and sends requests, by way of a router.

    Args:
        config: this ingress, of kind "ingress".
        public: the URL of the replica's own door, told to others.
    """

    def __init__(
        self, config: ActorConfig, stats: Stats, *, public: str = "", clock: Clock | None = None
    ) -> None:
        self.config = config
        self.stats = stats
        self.membership = Membership(config, self, stats=stats, public=public, clock=clock)
        self._clock = clock or SystemClock()
        self._settings = config.settings.ingress
        self._routers: dict[str, LinkClient] = {}
        self._members: dict[str, Member] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._probes: dict[int, str] = {}
        self._tried = 0

    # -- life cycle ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Join the cluster; returns once the first map is here."""
        self.membership.on_map(self._map_changed)
        await self.membership.start()

    async def close(self, leave: bool = False) -> None:
        """Close all links; with `leave` tell the coordinator first."""
        await self.membership.close(leave=leave)
        clients, self._routers = list(self._routers.values()), {}
        for client in clients:
            await client.close()
        if self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)

    def _map_changed(self, new: ClusterMap) -> None:
        members = {member.name: member for member in new.members if member.kind == "router"}
        for name in [name for name in self._routers if name not in members]:
            task = asyncio.ensure_future(self._routers.pop(name).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        self._members = members
        for name in members:
            if name not in self._routers:
                client = LinkClient(
                    functools.partial(self._address_of, name),
                    self,
                    self.config.settings.link,
                    self.config.name,
                    self.config.secret,
                    machine=self.membership.machine,
                )
                self._routers[name] = client
                client.start()

    async def _address_of(self, name: str) -> Address | None:
        member = self._members.get(name)
        return None if member is None else member.address

    # -- LinkHandler: routers send nothing on their own ----------------------------------------------

    def link_opened(self, link: Link) -> None:
        """Nothing: `LinkClient` keeps it."""

    def link_closed(self, link: Link) -> None:
        """Nothing: what is in flight fails and is tried again."""

    def receive(self, link: Link, message: Any, request: int) -> None:
        """Nobody asks an ingress anything."""
        link.fail_nowait(request, UnavailableError("an ingress answers nothing"))

    def read_finished(self, link: Link) -> None:
        """Nothing to batch."""

    # -- choosing a router ---------------------------------------------------------------------------

    def router(self) -> Link | None:
        """An open link to a router, this node's first; None while there is none."""
        other: Link | None = None
        for name, client in self._routers.items():
            link = client.link
            if link is None or link.closed:
                continue
            member = self._members.get(name)
            if member is not None and member.node == self.config.node:
                return link
            other = other or link
        return other

    async def _router_by(self, deadline: float) -> Link:
        while True:
            link = self.router()
            if link is not None:
                return link
            if self._clock.monotonic() >= deadline:
                raise UnavailableError("no router is reachable")
            await asyncio.sleep(0.01)

    # -- requests ------------------------------------------------------------------------------------

    async def publish(self, events: list[Event], deadline: float) -> list[Outcome]:
        """Publish events; one outcome each, in order.

        Args:
            deadline: monotonic; events without outcome by then get a failed one, code "unavailable".

        Idempotency: tries after the first carry the same ids and `retry`, so none of them duplicates.
        """
        outcomes: list[Outcome | None] = [None] * len(events)
        open_ = list(range(len(events)))
        store_deadline = 0.0
        pause_s = self._settings.retry_pause_s
        while True:
            sent = [events[i] for i in open_] if len(open_) < len(events) else events
            answers, why = await self._try_publish(sent, deadline)
            again: list[int] = []
            now = self._clock.monotonic()
            for place, index in enumerate(open_):
                outcome = answers[place] if answers is not None else why
                outcomes[index] = outcome
                status = outcome.status
                if status == "moved" or (status == "failed" and outcome.code in _AGAIN):
                    again.append(index)
                elif status == "failed" and outcome.code == "store_unavailable":
                    store_deadline = store_deadline or now + self._settings.store_retry_s
                    if now < store_deadline:
                        again.append(index)
            wait_s = random.uniform(0, pause_s)  # noqa: S311  spread, not secrecy
            if not again or now + wait_s >= deadline:
                break
            for index in again:
                events[index].retry = True
            open_ = again
            self.stats.count("ingress_retries", len(again))
            await asyncio.sleep(wait_s)
            pause_s = min(pause_s * 2, 1.0)
        for index, outcome in enumerate(outcomes):
            if outcome is None or outcome.status == "moved":
                outcomes[index] = _failed(events[index], "unavailable", "no shard took the event in time")
        return outcomes  # type: ignore[return-value]

    async def _try_publish(
        self, events: list[Event], deadline: float
    ) -> tuple[list[Outcome] | None, Outcome]:
        """One try: the outcomes, or None and the failure that stands for each."""
        try:
            link = await self._router_by(deadline)
            left_s = max(deadline - self._clock.monotonic(), 0.001)
            reply = await link.request(Publish(events), left_s)
            if isinstance(reply, Outcomes) and len(reply.outcomes) == len(events):
                return reply.outcomes, _NOTHING
            return None, _failed(events[0], "internal", "the router gave another answer than outcomes")
        except (LinkClosedError, LinkTimeoutError) as exc:
            return None, _failed(events[0], "unavailable", str(exc))
        except BusyError as exc:
            return None, _failed(events[0], "busy", str(exc), exc.retry_after_s)
        except UnavailableError as exc:
            return None, _failed(events[0], "unavailable", str(exc), exc.retry_after_s)
        except RemoteError as exc:
            return None, _failed(events[0], exc.code, exc.message, exc.retry_after_s)
        except LinkFrameError as exc:
            return None, _failed(events[0], "too_large", str(exc))

    async def request(self, message: Message, deadline: float) -> Any:
        """Send a request that a router passes to the owner of its slot (or answers itself).

        Every such request is a state that is set, not a step that is made: a second run changes nothing, so a
        try whose fate is unknown is simply made again.

        Raises:
            RemoteError: the owner refused (not_found, ...).
            StoreUnavailableError, UnavailableError, BusyError: not done by the deadline.
        """
        pause_s = self._settings.retry_pause_s
        while True:
            try:
                link = await self._router_by(deadline)
                left_s = max(deadline - self._clock.monotonic(), 0.001)
                return await link.request(message, left_s)
            except (LinkClosedError, LinkTimeoutError) as exc:
                failure: Exception = UnavailableError(str(exc))
            except RemoteError as exc:
                if exc.code == "store_unavailable":
                    raise StoreUnavailableError(exc.message, exc.retry_after_s) from exc
                if exc.code not in _AGAIN:
                    raise
                failure = UnavailableError(exc.message, exc.retry_after_s)
            wait_s = random.uniform(0, pause_s)  # noqa: S311  spread, not secrecy
            if self._clock.monotonic() + wait_s >= deadline:
                raise failure
            await asyncio.sleep(wait_s)
            pause_s = min(pause_s * 2, 1.0)

    def gateways(self) -> list[str]:
        """What clients dial: the public URLs of all gateways."""
        return [member.public for member in self.membership.members("gateway") if member.public]

    # -- operations ----------------------------------------------------------------------------------

    async def checks(self, timeout_s: float) -> dict[str, str]:
        """What of the path behind the ingress does not work, by name; empty if all does.

        The last check asks every shard something by way of the router: a map that looks right says nothing
        about shards that do not answer.
        """
        wrong: dict[str, str] = {}
        present = self.membership.map
        ownerless = sum(1 for owner in present.owners if owner < 0) if present.owners else SLOTS
        if ownerless:
            wrong["slots"] = f"{ownerless} of {SLOTS} slots have no owner"
        if not self.membership.members("gateway"):
            wrong["gateway"] = "no gateway is a member"
        link = self.router()
        if link is None:
            wrong["router"] = "no router is reachable"
        elif not ownerless:
            users = [self._probe(present.owners.index(index)) for index in sorted(set(present.owners))]
            try:
                await link.request(PresenceQuery(_PROBE_TENANT, users), timeout_s)
            except (LinkClosedError, LinkTimeoutError, RemoteError, UnavailableError) as exc:
                wrong["shards"] = f"a shard does not answer: {exc}"
        return wrong

    def _probe(self, slot: int) -> str:
        """A user of the probe tenant who falls into `slot`."""
        while slot not in self._probes:
            user = str(self._tried)
            self._tried += 1
            self._probes.setdefault(slot_of(_PROBE_TENANT, user), user)
        return self._probes[slot]

    async def stats_reply(self, timeout_s: float) -> StatsReply:
        """Statistics of the whole cluster, from the coordinator; of this ingress alone while it is away."""
        try:
            reply = await self.membership.ask_coordinator(StatsQuery(), timeout_s)
            if isinstance(reply, StatsReply):
                return reply
        except (UnavailableError, RemoteError, LinkClosedError, LinkTimeoutError):
            pass
        own = MemberStats(self.membership.member, 0.0, *self.stats.snapshot())
        return StatsReply(self.membership.map.version, {}, [own])


_NOTHING: Final = Outcome(b"")


def _failed(event: Event, code: str, detail: str, retry_after_s: float = 1.0) -> Outcome:
    return Outcome(event.id, status="failed", code=code, detail=detail, retry_after_s=retry_after_s)
