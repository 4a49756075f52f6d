"""The pool of one push provider: takes jobs from routers, spreads them over senders, reports to shards.

Memory: `push.max_queue` bounds the jobs held here in any state (waiting, being sent, being reported). A full
pool takes fewer jobs than offered and the rest goes back to the outbox, as does what waits here when the
breaker opens or the pool drains; it never pushes back on the ingress.
Protection: each app (`actors/push_lanes.py`) has its own breaker, rate, pause and concurrency, and never more
of queue and senders than it leaves to the others. What an app does not take now goes back to the outbox.
Delivery: at least once. A job whose outcome no shard takes is dropped with a log line; its lease in the
outbox runs out and it is tried again with the same ids. Order: none across jobs.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any

from actors.config import ActorConfig
from actors.directory import ShardDirectory
from actors.link import Link
from actors.member import Membership
from actors.names import sender_name
from actors.push_lanes import HeldJob, Lane, Lanes, not_tried
from actors.push_sender import (
    LocalSender,
    RemoteSender,
    Sender,
    SenderConfig,
    Spawn,
    outcome_of,
    spawn_with_ray,
)
from carillon.clock import Clock, SystemClock
from carillon.errors import BusyError, CarillonError, LinkError, NotFoundError, RemoteError, UnavailableError
from carillon.messages import Push, PushAccepted, PushJob, PushLeft, PushOutcome
from carillon.metrics import Stats
from carillon.provider_gate import Ticket
from carillon.settings import PushSettings
from channels.ports import PushChannel, make_channel

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
        self._lanes: Lanes
        self._waiting: dict[int, HeldJob] = {}  # by delivery: jobs none of whose parts has started
        self._sending: dict[tuple[int, int], HeldJob] = {}  # by (delivery, attempt): the other ones
        self._reporting = 0
        self._senders: list[Sender] = []
        self._idle_since: dict[str, float] = {}
        self._spawned = 0
        self._spawning = False
        self._dispatch_scheduled = False
        self._wake: asyncio.TimerHandle | None = None
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
        self._lanes = Lanes(self.provider, channel, self._settings, self._clock, self.stats)
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
            "queued": self._lanes.queued,
            "sending": len(self._sending),
            "reporting": self._reporting,
            "breaker": self._lanes.state,
            "apps": [lane.status() for lane in self._lanes],
            "draining": self._draining,
            "senders": [{"name": s.name, "outstanding": s.outstanding} for s in self._senders],
            "sent": self.stats.counters[self._sent],
            "failed": self.stats.counters[self._failed],
        }

    async def drain(self) -> None:
        """Take no more jobs, hand back what waits, finish what is in flight (twice the timeout at most)."""
        self._draining = True
        self._dispatch()
        for lane in self._lanes:
            self._hand_back_queue(lane, "draining")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + 2 * self._settings.timeout_s + 1.0
        while self.held and loop.time() < deadline:
            await asyncio.sleep(0.02)
        if self.held:
            log.warning("%s: %d jobs are left to the outbox", self.config.name, self.held)

    async def stop(self) -> None:
        """Close everything. What is held is recovered from the outbox."""
        self._stopped = True
        if self._wake is not None:
            self._wake.cancel()
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
        return len(self._waiting) + len(self._sending) + self._reporting

    # -- links: routers -----------------------------------------------------------------------------

    def link_opened(self, link: Link) -> None:
        """A router dialled."""

    def link_closed(self, link: Link) -> None:
        """A router went; its jobs stay ours."""

    def receive(self, link: Link, message: Any, request: int) -> None:
        """Take jobs."""
        if type(message) is Push:
            accepted, reason = self._accept(message.jobs)
            link.reply_nowait(request, PushAccepted(accepted, self.held, reason))
        else:
            link.fail_nowait(request, NotFoundError(f"a push pool does not take {type(message).__name__}"))

    def read_finished(self, link: Link) -> None:
        """Dispatching is scheduled by the jobs themselves."""

    def _accept(self, jobs: list[PushJob]) -> tuple[int, str]:
        """Queue jobs.

        Returns:
            How many were taken, from the first, and why not all. Jobs among them whose app alone takes none
            are handed back.
        """
        if self._draining or self._stopped:
            return 0, "draining"
        now = self._clock.monotonic()
        taken, reason = 0, ""
        left: dict[int, tuple[PushJob, str]] = {}
        for index, job in enumerate(jobs):
            if (job.delivery, job.attempt) not in self._sending:  # else our answer was lost: sent again
                # The row's lease ran out while it waited here: the newer claim replaces the older.
                old = self._waiting.pop(job.delivery, None)
                if old is not None:
                    self._withdraw(old)
                elif self.held >= self._settings.max_queue:
                    reason = "full"
                    break
                refused = self._take(job, now)
                if refused:
                    left[index] = (job, refused)
                    continue
            taken = index + 1
        back: dict[str, list[PushJob]] = {}
        for index, (job, why) in left.items():
            if index < taken:
                back.setdefault(why, []).append(job)
            else:
                reason = reason or why
        for why, some in back.items():
            self._hand_back(some, why)
        self._schedule_dispatch()
        return taken, reason

    def _take(self, job: PushJob, now: float) -> str:
        """Queue the parts of a job. If none of its apps takes it now: why not."""
        held = HeldJob(job, now)
        refused: list[tuple[Lane, PushJob]] = []
        why = ""
        for lane, part in self._lanes.split(job):
            if not self._lanes.fair(lane.held, self.held, self._settings.max_queue):
                why = "full"
            elif not lane.gate.takes(lane.held):
                why = "paused" if lane.gate.state == "paused" else "breaker open"
            else:
                older = lane.queue.pop(job.delivery, None)
                if older is not None:  # what is left of a claim whose other parts are in flight
                    older[0].waiting.remove(lane)
                    self._part_ended(older[0])
                lane.queue[job.delivery] = (held, part)
                held.waiting.append(lane)
                held.open += 1
                continue
            refused.append((lane, part))
        if not held.open:
            return why
        for lane, part in refused:
            held.results += not_tried(part.targets, lane, why, self._clock.now_ms())
        self._waiting[job.delivery] = held
        return ""

    def _withdraw(self, held: HeldJob) -> None:
        """Take what waits of a job out of its lanes."""
        for lane in held.waiting:
            del lane.queue[held.job.delivery]
            held.open -= 1
        held.waiting.clear()

    # -- dispatch -----------------------------------------------------------------------------------

    def _schedule_dispatch(self) -> None:
        self._gauge()
        if not self._dispatch_scheduled:
            self._dispatch_scheduled = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Hand out queued jobs: one per app in turn, each to the sender with the least outstanding."""
        self._dispatch_scheduled = False
        lease_s = self.config.settings.shard.delivery_lease_s
        oldest = self._clock.monotonic() - max(lease_s / 2, lease_s - self._settings.timeout_s)
        stale: list[PushJob] = []
        wake_s: float | None = None
        turn = [lane for lane in self._lanes if lane.queue]
        while turn and not self._stopped:
            for lane in list(turn):
                wait_s = lane.gate.wait_s() if lane.queue else None
                if wait_s != 0.0:
                    turn.remove(lane)
                    if wait_s is not None:
                        wake_s = wait_s if wake_s is None else min(wake_s, wait_s)
                    continue
                sender = min(self._senders, key=_outstanding, default=None)
                if sender is None or sender.outstanding >= self._settings.sender_concurrency:
                    turn.clear()
                    break
                if self._lanes.shared:
                    capacity = len(self._senders) * self._settings.sender_concurrency
                    in_flight = sum(map(_outstanding, self._senders))
                    if not self._lanes.fair(lane.gate.in_flight, in_flight, capacity):
                        turn.remove(lane)
                        continue
                held, part = lane.queue.pop(next(iter(lane.queue)))
                held.waiting.remove(lane)
                if held.arrived < oldest:  # its lease is about to end: sending it now would send it twice
                    if self._not_sent(lane, held, part, "waited too long"):
                        stale.append(held.job)
                elif not self._send(lane, held, part, sender):
                    turn.clear()
                    break
        self._hand_back(stale, "waited too long")
        if wake_s is not None and not self._stopped:
            self._wake_in(wake_s)
        self._gauge()

    def _hand_back_queue(self, lane: Lane, reason: str) -> None:
        """What waits here would wait in vain: the outbox has more use for it."""
        queue, lane.queue = lane.queue, {}
        back: list[PushJob] = []
        for held, part in queue.values():
            held.waiting.remove(lane)
            if self._not_sent(lane, held, part, reason):
                back.append(held.job)
        self._hand_back(back, reason)

    def _not_sent(self, lane: Lane, held: HeldJob, part: PushJob, reason: str) -> bool:
        """A part leaves its queue untried. True if the whole job is to be handed back."""
        whole = not held.results and held.open == 1 and held.key not in self._sending
        if not whole:
            held.results += not_tried(part.targets, lane, reason, self._clock.now_ms())
        self._part_ended(held)
        return whole

    def _hand_back(self, jobs: list[PushJob], reason: str) -> None:
        """Tell the owners that these jobs are not tried. Whoever cannot be told has the lease."""
        if not jobs:
            return
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

    def _wake_in(self, wait_s: float) -> None:
        """Dispatch again when a rate lets the next job pass (pauses are looked at by the tick as well)."""
        if self._wake is not None:
            self._wake.cancel()
        self._wake = asyncio.get_running_loop().call_later(max(wait_s, 0.001), self._schedule_dispatch)

    def _send(self, lane: Lane, held: HeldJob, part: PushJob, sender: Sender) -> bool:
        """Give a part to a sender. False if it takes none: the part is in the queue again, as the last."""
        ticket = lane.gate.started(len(part.targets))
        lane.sending += 1
        if self._waiting.get(part.delivery) is held:
            del self._waiting[part.delivery]
        self._sending[held.key] = held
        try:
            sender.submit(part, functools.partial(self._finished, lane, held, ticket))
            return True
        except (LinkError, BusyError) as exc:
            log.warning("%s: %s takes no job: %s", self.config.name, sender.name, exc)
        lane.gate.not_started(ticket)
        lane.sending -= 1
        lane.queue[part.delivery] = (held, part)
        held.waiting.append(lane)
        if held.open == len(held.waiting):
            del self._sending[held.key]
            self._waiting[part.delivery] = held
        if isinstance(sender, RemoteSender):
            sender.lost = True
            self._sweep_lost()
        return False

    def _finished(self, lane: Lane, held: HeldJob, ticket: Ticket, outcome: PushOutcome) -> None:
        """A sender reported (called on the event loop)."""
        lane.sending -= 1
        if self._stopped:
            return
        change = lane.gate.finished(ticket, outcome.results)
        if change:
            self._note(lane, change, outcome)
        if change == "opened":
            self._hand_back_queue(lane, "breaker open")
        for result in outcome.results:
            self.stats.count(self._sent if result.outcome == "sent" else self._failed)
            if result.duration_ms:
                self.stats.observe_ms("push_ms", result.duration_ms)
        held.results += outcome.results
        self._part_ended(held)
        self._schedule_dispatch()

    def _part_ended(self, held: HeldJob) -> None:
        """Report a job once nothing of it is open; one without any result is forgotten."""
        held.open -= 1
        if held.open > 0:
            return
        self._sending.pop(held.key, None)
        if self._waiting.get(held.job.delivery) is held:
            del self._waiting[held.job.delivery]
        if held.results:
            self._reporting += 1
            self._run(self._report(outcome_of(held.job, held.results)))

    def _note(self, lane: Lane, change: str, outcome: PushOutcome) -> None:
        """Log and count what became of an app's breaker."""
        self.stats.count(lane.changes[change])
        lane.publish(self.stats)
        if change == "closed":
            log.info("%s: app %s answers again", self.config.name, lane.name)
            return
        result = outcome.results[0]
        log.error(
            "%s: breaker of app %s open for %.0f s (%s %s); its pushes wait in the outbox",
            self.config.name,
            lane.name,
            lane.gate.breaker.wait_s(),
            result.status,
            result.error,
        )

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
        """Scale, and resume after pauses and openings of breakers."""
        interval_s = min(0.25, self._settings.scale_idle_s / 4, self._settings.breaker_open_s / 2)
        while True:
            self._sweep_lost()
            self._lanes.tick()
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
        # What a breaker, a pause or a rate holds back would not go faster with more senders.
        waiting = sum(len(lane.queue) for lane in self._lanes if not lane.gate.wait_s())
        wanted = len(self._senders) < settings.min_senders or (
            waiting > settings.sender_concurrency and len(self._senders) < settings.max_senders
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


def _outstanding(sender: Sender) -> int:
    return sender.outstanding
