"""Links to the push pools, and the choice among them."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import Any, Final

from actors.link import Link, LinkClient
from actors.member import Membership
from carillon.clock import Clock
from carillon.errors import CarillonError
from carillon.messages import Address, ClusterMap, Member, Push, PushAccepted, PushJob
from carillon.metrics import Stats

log = logging.getLogger(__name__)

Left = Callable[[str, list[PushJob], str], None]
"""Called with the provider, jobs that no pool will try, and why."""

_HALF_LIFE_S: Final = 1.0
"""What a pool said it holds counts half after so long: it works on, and tells only when it is given more."""


class _Pool:
    """One pool member: its link, and what it has to do as far as this router knows."""

    __slots__ = ("client", "member", "offered", "queued", "queued_at")

    def __init__(self, member: Member, client: LinkClient) -> None:
        self.member = member
        self.client = client
        self.offered = 0  # jobs sent and not answered yet
        self.queued = 0.0  # jobs the pool held at its last answer
        self.queued_at = 0.0

    def load(self, now: float) -> float:
        """Jobs it has to do, estimated."""
        if not self.queued:
            return self.offered
        return self.offered + self.queued * 0.5 ** ((now - self.queued_at) / _HALF_LIFE_S)


class PoolDirectory:
    """Hands push jobs to the least loaded pool of their provider.

    Delivery: none promised. A job that no pool takes is handed back at once; one whose pool dies comes again
    from the outbox when its lease ends. Nothing waits here, so a slow pool holds up nobody.

    Args:
        membership: gives the map; pools are its members of kind "pool", by label "provider".
        stats: counts `pushes_offered` and `pushes_left`.
        clock: for the estimates of load.
    """

    def __init__(self, membership: Membership, stats: Stats, clock: Clock) -> None:
        self._membership = membership
        self._stats = stats
        self._clock = clock
        self._limit = membership.config.settings.push.max_queue
        self._pools: dict[str, _Pool] = {}
        self._by_provider: dict[str, list[_Pool]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False
        membership.on_map(self._take_map)

    def offer(self, jobs: list[PushJob], left: Left) -> None:
        """Send jobs to pools. Never blocks, never raises.

        Args:
            left: told, now or later, of the jobs that certainly nobody took. Those whose fate is unknown (the
                link broke) are left to their lease.
        """
        groups: dict[str, list[PushJob]] = {}
        for job in jobs:
            groups.setdefault(job.provider, []).append(job)
        for provider, group in groups.items():
            self._offer_to(provider, group, left)

    def _offer_to(self, provider: str, jobs: list[PushJob], left: Left) -> None:
        now = self._clock.monotonic()
        best: _Pool | None = None
        best_load = float("inf")
        for pool in self._by_provider.get(provider, ()):
            link = pool.client.link
            if link is None or link.closed:
                continue
            load = pool.load(now)
            if load < best_load:
                best, best_load = pool, load
        room = self._limit - best.offered if best is not None else 0
        if best is None or room <= 0:
            self._leave(provider, jobs, "no pool" if best is None else "full", left)
            return
        taken = jobs if len(jobs) <= room else jobs[:room]
        try:
            future = best.client.open_link().request_nowait(Push(taken))
        except CarillonError as exc:
            log.info("push pool %s: %s", best.member.name, exc)
            self._leave(provider, jobs, "no pool", left)
            return
        best.offered += len(taken)
        self._stats.count(f'pushes_offered{{provider="{provider}"}}', len(taken))
        if len(taken) < len(jobs):
            self._leave(provider, jobs[len(taken) :], "full", left)
        future.add_done_callback(functools.partial(self._answered, best, provider, taken, left))

    def _leave(self, provider: str, jobs: list[PushJob], reason: str, left: Left) -> None:
        self._stats.count(f'pushes_left{{provider="{provider}"}}', len(jobs))
        left(provider, jobs, reason)

    def _answered(
        self, pool: _Pool, provider: str, sent: list[PushJob], left: Left, future: asyncio.Future[Any]
    ) -> None:
        pool.offered -= len(sent)
        if future.cancelled() or future.exception() is not None:
            # Taken or not, nobody knows: the lease decides.
            self._stats.count(f'pushes_left{{provider="{provider}"}}', len(sent))
            return
        answer = future.result()
        if type(answer) is PushAccepted:
            pool.queued, pool.queued_at = float(answer.queued), self._clock.monotonic()
            if answer.accepted < len(sent):
                self._leave(provider, sent[answer.accepted :], answer.reason or "full", left)

    def status(self) -> dict[str, Any]:
        """Per pool: provider, whether its link is open, jobs offered and queued."""
        now = self._clock.monotonic()
        return {
            name: {
                "provider": pool.member.labels.get("provider", ""),
                "open": pool.client.link is not None and not pool.client.link.closed,
                "offered": pool.offered,
                "load": round(pool.load(now)),
            }
            for name, pool in self._pools.items()
        }

    # -- keeping up with the map --------------------------------------------------------------------

    def _take_map(self, new: ClusterMap) -> None:
        if self._closed:
            return
        members = {member.name: member for member in new.members if member.kind == "pool"}
        for name in [name for name in self._pools if name not in members]:
            self._drop(name)
        for name, member in members.items():
            pool = self._pools.get(name)
            if pool is not None and pool.member.incarnation != member.incarnation:
                self._drop(name)  # another process: another link, nothing queued
                pool = None
            if pool is None:
                self._pools[name] = _Pool(member, self._start_client(member))
            else:
                pool.member = member
        self._by_provider = {}
        for pool in self._pools.values():
            self._by_provider.setdefault(pool.member.labels.get("provider", ""), []).append(pool)

    def _start_client(self, member: Member) -> LinkClient:
        config = self._membership.config

        async def resolve() -> Address | None:
            return member.address

        client = LinkClient(
            resolve,
            _PoolLinks(),
            config.settings.link,
            config.name,
            config.secret,
            machine=self._membership.machine,
            peer=member.name,
        )
        client.start()
        return client

    def _drop(self, name: str) -> None:
        task = asyncio.ensure_future(self._pools.pop(name).client.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all links."""
        self._closed = True
        self._by_provider = {}
        for name in list(self._pools):
            self._drop(name)
        while self._closing:
            await asyncio.gather(*self._closing)


class _PoolLinks:
    """Pools send nothing of their own accord to a router."""

    def link_opened(self, link: Link) -> None:
        """Nothing."""

    def link_closed(self, link: Link) -> None:
        """Nothing: the outbox brings the jobs back."""

    def receive(self, link: Link, message: Any, request: int) -> None:
        """Nothing is expected."""
        log.warning("unexpected %s from pool %s", type(message).__name__, link.peer)

    def read_finished(self, link: Link) -> None:
        """Nothing."""
