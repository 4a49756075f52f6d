"""The pool of one push provider: takes jobs from routers, spreads them over senders, reports to shards.

Memory: `push.max_queue` bounds the jobs held here in any state (waiting, being sent, being reported). A full
pool takes fewer jobs than offered and the rest goes back to the outbox, as does what waits here when the
breaker opens or the pool drains; it never pushes back on the ingress.
Delivery: at least once. A job whose outcome no shard takes is dropped with a log line; its lease in the
outbox runs out and it is tried again with the same ids. Order: none across jobs.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any

from actors.config import ActorConfig
from actors.directory import ShardDirectory
from actors.link import Link
from actors.member import Membership
from actors.names import sender_name
from actors.push_sender import LocalSender, RemoteSender, Sender, SenderConfig, Spawn, spawn_with_ray
from carillon.breaker import Breaker
from carillon.clock import Clock, SystemClock
from carillon.errors import BusyError, CarillonError, LinkError, NotFoundError, RemoteError, UnavailableError
from carillon.messages import Push, PushAccepted, PushJob, PushLeft, PushOutcome, PushResult
from carillon.metrics import Stats
from carillon.settings import PushSettings
from channels.ports import AUTH_ERRORS, PushChannel, make_channel

log = logging.getLogger(__name__)

MakeChannel = Callable[[str, PushSettings, Clock], PushChannel]


class PushPool:
    """The actor.

    Args:
        config: `labels["provider"]` says which provider.
        clock: None is the system's.
        make: builds the channel of the sender inside this process.
        spawn: starts further senders.
    """

    def __init__(
        self,
        config: ActorConfig,
        clock: Clock | None = None,
        *,
        make: MakeChannel = make_channel,
        spawn: Spawn = spawn_with_ray,
    ) -> None:
        self.config = config
        self.provider = config.labels["provider"]
        self.stats = Stats()
        self._clock = clock or SystemClock()
        self._make = make
        self._spawn = spawn
        self._settings = config.settings.push
        self._breaker = Breaker(self._settings.breaker_failures, self._settings.breaker_open_s, self._clock)
        self._queue: dict[
            int, tuple[PushJob, float]
        ] = {}  # by delivery, oldest first, with monotonic arrival
        self._sending: set[tuple[int, int]] = set()  # (delivery, attempt)
        self._reporting = 0
        self._senders: list[Sender] = []
        self._idle_since: dict[str, float] = {}
        self._spawned = 0
        self._spawning = False
        self._dispatch_scheduled = False
        self._draining = False
        self._stopped = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._membership: Membership | None = None
        self._directory: ShardDirectory | None = None
        self._sent = f'pushes_sent{{provider="{self.provider}"}}'
        self._failed = f'pushes_failed{{provider="{self.provider}"}}'

    # -- life cycle ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the channel, join the cluster, serve. Raises SettingsError for unusable credentials."""
        channel = self._make(self.provider, self._settings, self._clock)
        await channel.open()
        self._senders.append(
            LocalSender(sender_name(self.config.name, 0), channel, self._settings, self._clock)
        )
        self._membership = Membership(self.config, self, stats=self.stats, clock=self._clock)
        self._directory = ShardDirectory(self._membership)
        self.stats.count(self._sent, 0)
        self.stats.count(self._failed, 0)
        self._gauge()
        await self._membership.start()
        self._run(self._tick_for_ever())

    async def status(self) -> dict[str, Any]:
        """Facts for the command line."""
        return {
            "kind": self.config.kind,
            "name": self.config.name,
            "provider": self.provider,
            "queued": len(self._queue),
            "sending": len(self._sending),
            "reporting": self._reporting,
            "breaker": self._breaker.state,
            "draining": self._draining,
            "senders": [{"name": s.name, "outstanding": s.outstanding} for s in self._senders],
            "sent": self.stats.counters[self._sent],
            "failed": self.stats.counters[self._failed],
        }

    async def drain(self) -> None:
        """Take no more jobs, hand back what waits, finish what is in flight (twice the timeout at most)."""
        self._draining = True
        self._dispatch()
        self._hand_back_queue("draining")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + 2 * self._settings.timeout_s + 1.0
        while self.held and loop.time() < deadline:
            await asyncio.sleep(0.02)
        if self.held:
            log.warning("%s: %d jobs are left to the outbox", self.config.name, self.held)

    async def stop(self) -> None:
        """Close everything. What is held is recovered from the outbox."""
        self._stopped = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        senders, self._senders = self._senders, []
        for sender in senders:
            await sender.close()
        if self._directory is not None:
            await self._directory.close()
        if self._membership is not None:
            await self._membership.close(leave=self._draining)

    @property
    def held(self) -> int:
        """Jobs in any state."""
        return len(self._queue) + len(self._sending) + self._reporting

    # -- links: routers -----------------------------------------------------------------------------

    def link_opened(self, link: Link) -> None:
        """A router dialled."""

    def link_closed(self, link: Link) -> None:
        """A router went; its jobs stay ours."""

    def receive(self, link: Link, message: Any, request: int) -> None:
        """Take jobs."""
        if type(message) is Push:
            accepted = self._accept(message.jobs)
            reason = "" if accepted == len(message.jobs) else self._why_not()
            link.reply_nowait(request, PushAccepted(accepted, self.held, reason))
        else:
            link.fail_nowait(request, NotFoundError(f"a push pool does not take {type(message).__name__}"))

    def read_finished(self, link: Link) -> None:
        """Dispatching is scheduled by the jobs themselves."""

    def _why_not(self) -> str:
        """Why jobs are not taken now."""
        if self._draining or self._stopped:
            return "draining"
        return "breaker open" if self._breaker.state == "open" else "full"

    def _accept(self, jobs: list[PushJob]) -> int:
        """Queue jobs, from the first; returns how many were taken."""
        if self._draining or self._stopped or self._breaker.state == "open":
            return 0
        now = self._clock.monotonic()
        for count, job in enumerate(jobs):
            if (job.delivery, job.attempt) in self._sending:
                continue  # sent again because our answer was lost
            # The row's lease ran out while it waited here: the newer claim takes the place of the older.
            if self._queue.pop(job.delivery, None) is None and self.held >= self._settings.max_queue:
                self._schedule_dispatch()
                return count
            self._queue[job.delivery] = (job, now)
        self._schedule_dispatch()
        return len(jobs)

    # -- dispatch -----------------------------------------------------------------------------------

    def _schedule_dispatch(self) -> None:
        self._gauge()
        if self._queue and not self._dispatch_scheduled:
            self._dispatch_scheduled = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Hand out queued jobs, each to the sender with the least outstanding."""
        self._dispatch_scheduled = False
        now = self._clock.monotonic()
        lease_s = self.config.settings.shard.delivery_lease_s
        stale_s = max(lease_s / 2, lease_s - self._settings.timeout_s)
        stale: list[PushJob] = []
        while self._queue and self._breaker.allows() and not self._stopped:
            sender = min(self._senders, key=lambda sender: sender.outstanding, default=None)
            if sender is None or sender.outstanding >= self._settings.sender_concurrency:
                break
            delivery = next(iter(self._queue))
            job, arrived = self._queue.pop(delivery)
            if now - arrived > stale_s:
                stale.append(job)  # its lease is about to end: sending it now would send it twice
                continue
            key = (job.delivery, job.attempt)
            self._sending.add(key)
            self._breaker.started()
            try:
                sender.submit(job, self._finished)
            except (LinkError, BusyError) as exc:
                log.warning("%s: %s takes no job: %s", self.config.name, sender.name, exc)
                self._sending.discard(key)
                self._breaker.inconclusive()
                self._queue[delivery] = (job, arrived)
                if isinstance(sender, RemoteSender):
                    sender.lost = True
                    self._sweep_lost()
                break
        if stale:
            self._hand_back(stale, "waited too long")
        if self._breaker.state == "open":
            self._hand_back_queue("breaker open")
        self._gauge()

    def _hand_back_queue(self, reason: str) -> None:
        """What waits here would wait in vain: other pools, or the outbox, have more use for it."""
        queue, self._queue = self._queue, {}
        if queue:
            self._hand_back([job for job, _ in queue.values()], reason)

    def _hand_back(self, jobs: list[PushJob], reason: str) -> None:
        """Tell the owners that these jobs are not tried. Whoever cannot be told has the lease."""
        log.info("%s: %d jobs are handed back: %s", self.config.name, len(jobs), reason)
        directory = self._directory
        assert directory is not None
        by_owner: dict[str, list[PushJob]] = {}
        for job in jobs:
            owner = directory.owner(job.slot)
            by_owner.setdefault(owner.name if owner is not None else "", []).append(job)
        for name, some in by_owner.items():
            link = directory.link(name)
            if link is None:
                continue
            left = PushLeft(self.provider, reason, [j.delivery for j in some], [j.attempt for j in some])
            try:
                link.send_nowait(left)
            except CarillonError as exc:
                log.info("%s: %d jobs wait for their lease to end: %s", self.config.name, len(some), exc)

    def _finished(self, outcome: PushOutcome) -> None:
        """A sender reported (called on the event loop)."""
        self._sending.discard((outcome.delivery, outcome.attempt))
        if self._stopped:
            return
        self._judge(outcome.results)
        for result in outcome.results:
            self.stats.count(self._sent if result.outcome == "sent" else self._failed)
            if result.duration_ms:
                self.stats.observe_ms("push_ms", result.duration_ms)
        self._reporting += 1
        self._run(self._report(outcome))
        self._schedule_dispatch()

    def _judge(self, results: list[PushResult]) -> None:
        """Tell the breaker what the results say about the provider, as opposed to the targets."""
        refused = next((result for result in results if result.error in AUTH_ERRORS), None)
        if refused is not None:
            if self._breaker.trip():
                log.error(
                    "%s: the provider refuses our credentials (%s %s); pushes wait in the outbox",
                    self.config.name,
                    refused.status,
                    refused.error,
                )
        elif any(result.status and result.outcome in _ANSWERED for result in results):
            self._breaker.succeeded()
        elif any(result.outcome not in _ANSWERED and result.status != 429 for result in results):
            if self._breaker.failed():
                log.error("%s: the provider fails (%s); breaker open", self.config.name, results[0].error)
        else:
            self._breaker.inconclusive()

    # -- reporting ----------------------------------------------------------------------------------

    async def _report(self, outcome: PushOutcome) -> None:
        """Tell the owning shard, wherever it is by now."""
        assert self._directory is not None
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.report_timeout_s
        tries = 0
        try:
            while True:
                left_s = deadline - loop.time()
                try:
                    if left_s <= 0:
                        raise UnavailableError("no shard took it in time")
                    wait_s = min(left_s, self.config.settings.link.request_timeout_s)
                    await self._directory.request(outcome.slot, outcome, wait_s)
                    return
                except CarillonError as exc:
                    final = isinstance(exc, RemoteError) and not exc.temporary
                    if final or left_s <= 0:
                        log.warning(
                            "%s: outcome of delivery %d is dropped, its lease will bring it back: %s",
                            self.config.name,
                            outcome.delivery,
                            exc,
                        )
                        return
                tries += 1
                pause_s = random.uniform(0.0, min(0.05 * 2**tries, 2.0))  # noqa: S311  spread, not secrecy
                await asyncio.sleep(min(pause_s, max(deadline - loop.time(), 0.0)))
        finally:
            self._reporting -= 1

    # -- senders ------------------------------------------------------------------------------------

    async def _tick_for_ever(self) -> None:
        """Scale, and resume after a pause of the breaker."""
        interval_s = min(0.25, self._settings.scale_idle_s / 4, self._settings.breaker_open_s / 2)
        while True:
            self._sweep_lost()
            self._scale()
            self._dispatch()
            await asyncio.sleep(interval_s)

    def _sweep_lost(self) -> None:
        for sender in [s for s in self._senders if isinstance(s, RemoteSender) and s.lost]:
            log.warning("%s: sender %s is lost", self.config.name, sender.name)
            self._retire(sender)

    def _scale(self) -> None:
        """One more sender when a full round of jobs waits, one less when one was idle for long."""
        settings, now = self._settings, self._clock.monotonic()
        wanted = len(self._senders) < settings.min_senders or (
            len(self._queue) > settings.sender_concurrency
            and len(self._senders) < settings.max_senders
            and self._breaker.state == "closed"
        )
        if wanted and not self._spawning and not self._draining:
            self._spawning = True
            self._run(self._grow())
        for sender in self._senders[1:]:
            if sender.outstanding:
                self._idle_since.pop(sender.name, None)
                continue
            idle_s = now - self._idle_since.setdefault(sender.name, now)
            if idle_s >= settings.scale_idle_s and len(self._senders) > settings.min_senders:
                log.info("%s: sender %s was idle and is stopped", self.config.name, sender.name)
                self._retire(sender)
                break

    def _retire(self, sender: Sender) -> None:
        self._senders.remove(sender)
        self._idle_since.pop(sender.name, None)
        self._run(sender.close())

    async def _grow(self) -> None:
        self._spawned += 1
        name = sender_name(self.config.name, self._spawned)
        sender = RemoteSender(name, self._clock)
        try:
            config = SenderConfig(name, self.provider, self.config.settings, self.config.secret)
            await sender.open(config, self._spawn, self.config.name)
        except Exception as exc:  # Ray's errors share no base
            log.warning("%s: cannot start another sender: %s: %s", self.config.name, type(exc).__name__, exc)
            await asyncio.sleep(1.0)
        else:
            log.info("%s: sender %s started", self.config.name, name)
            self._senders.append(sender)
            self._schedule_dispatch()
        finally:
            self._spawning = False

    # -- small things -------------------------------------------------------------------------------

    def _gauge(self) -> None:
        self.stats.gauge("pool_queue", self.held)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s: a task failed", self.config.name, exc_info=task.exception())


_ANSWERED = frozenset(("sent", "invalid_target", "disabled_target", "dead"))
"""Outcomes that a working provider gives, whatever it thinks of the target."""
