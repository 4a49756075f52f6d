"""Senders: who drives a push channel. The first lives inside its pool's process, further ones are actors.

A pool and a sender actor talk over one link: `Push` one-way to the sender, one `PushOutcome` one-way back per
job. A sender that is lost leaves its jobs unknown: they are tried again with the same ids.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from actors.link import Link, LinkServer, dial
from actors.member import advertised_host, machine_id
from carillon.clock import Clock, SystemClock
from carillon.errors import BusyError, LinkError
from carillon.messages import Address, Push, PushJob, PushOutcome, PushResult
from carillon.settings import PushSettings, Settings
from channels.ports import PushChannel, make_channel

log = logging.getLogger(__name__)

Done = Callable[[PushOutcome], None]


def outcome_of(job: PushJob, results: list[PushResult]) -> PushOutcome:
    """The report about one job."""
    return PushOutcome(
        job.delivery, job.attempt, job.tenant, job.user, job.slot, job.notification, job.provider, results
    )


def same_for_all(job: PushJob, outcome: str, error: str, now_ms: int) -> PushOutcome:
    """A report that says the same of every target."""
    return outcome_of(
        job, [PushResult(target.device, outcome, error=error, started_ms=now_ms) for target in job.targets]
    )


class Sender(Protocol):
    """Something that sends jobs, several at once."""

    name: str
    outstanding: int
    """Targets of the jobs it has and has not reported."""

    def submit(self, job: PushJob, done: Done) -> None:
        """Take a job; `done` is called once with its outcome, from the event loop."""
        ...

    async def close(self) -> None:
        """Stop. Jobs in flight are reported as unknown or not at all."""
        ...


class LocalSender:
    """Drives a channel in this process.

    Args:
        channel: opened already; closed with the sender.
    """

    def __init__(self, name: str, channel: PushChannel, settings: PushSettings, clock: Clock) -> None:
        self.name = name
        self.outstanding = 0
        self._channel = channel
        # Each request has its own deadline, and a token may have to be fetched before: this bound is for a
        # channel that breaks that promise.
        self._bound_s = 2 * settings.timeout_s + 1.0
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, job: PushJob, done: Done) -> None:
        """See `Sender.submit`."""
        self.outstanding += len(job.targets)
        task = asyncio.get_running_loop().create_task(self._run(job, done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, job: PushJob, done: Done) -> None:
        try:
            async with asyncio.timeout(self._bound_s):
                (results,) = await self._channel.send([job])
            outcome = outcome_of(job, results)
        except TimeoutError:
            outcome = same_for_all(job, "unknown", "timeout", self._clock.now_ms())
        except Exception as exc:
            # Nobody knows how far it came; unknown is tried again, a bounded number of times.
            log.exception("sending delivery %d failed", job.delivery)
            outcome = same_for_all(job, "unknown", type(exc).__name__, self._clock.now_ms())
        finally:
            self.outstanding -= len(job.targets)
        done(outcome)

    async def close(self) -> None:
        """See `Sender.close`."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()


@dataclass(frozen=True)
class SenderConfig:
    """What a sender actor is built from. Pickled by the pool, so plain data only."""

    name: str
    provider: str
    settings: Settings
    secret: bytes

    def __repr__(self) -> str:  # the secret must not reach a log
        return f"SenderConfig(name={self.name!r}, provider={self.provider!r})"


class PushSender:
    """The sender actor: a link server around a `LocalSender`."""

    def __init__(self, config: SenderConfig, clock: Clock | None = None) -> None:
        self._config = config
        self._clock = clock or SystemClock()
        self._sender: LocalSender | None = None
        self._server: LinkServer | None = None

    async def start(self) -> Address:
        """Open the channel and listen; returns where."""
        config = self._config
        channel = make_channel(config.provider, config.settings.push, self._clock)
        await channel.open()
        self._sender = LocalSender(config.name, channel, config.settings.push, self._clock)
        self._server = LinkServer(self, config.settings.link, config.name, config.secret)
        cluster = config.settings.cluster
        host, port = await self._server.start(cluster.bind_host)
        return Address(advertised_host(cluster, "", host), port, "", machine_id())

    async def stop(self) -> None:
        """Close everything."""
        if self._server is not None:
            await self._server.close()
        if self._sender is not None:
            await self._sender.close()

    def link_opened(self, link: Link) -> None:
        """The pool dialled."""

    def link_closed(self, link: Link) -> None:
        """The pool is gone, and Ray ends this actor with it; the outbox recovers what was in flight."""

    def receive(self, link: Link, message: Any, request: int) -> None:
        """Take jobs."""
        if type(message) is not Push or self._sender is None:
            link.fail_nowait(request, LinkError("a sender takes pushes only"))
            return

        def done(outcome: PushOutcome) -> None:
            try:
                link.send_nowait(outcome)
            except (LinkError, BusyError) as exc:
                log.warning("outcome of delivery %d is lost: %s", outcome.delivery, exc)

        for job in message.jobs:
            self._sender.submit(job, done)

    def read_finished(self, link: Link) -> None:
        """Jobs start at once; there is nothing to gather."""


class RaySender(PushSender):
    """The same as a Ray actor."""

    def __init__(self, config: SenderConfig) -> None:
        importlib.import_module("actors.ray_shell").configure_logging(config.name)
        super().__init__(config)


Spawn = Callable[[SenderConfig], Awaitable[tuple[Address, Callable[[], Awaitable[None]]]]]
"""Starts a `PushSender` somewhere; gives its address and what ends it."""


async def spawn_with_ray(config: SenderConfig) -> tuple[Address, Callable[[], Awaitable[None]]]:
    """Start a sender as a Ray actor of this process: it ends when its pool ends.

    No restart by Ray: the pool sees the lost link, reports the jobs as unknown and starts another if the load
    still asks for it.
    """
    ray = importlib.import_module("ray")
    actor = ray.remote(RaySender).options(
        num_cpus=0, max_restarts=0, max_concurrency=16, scheduling_strategy="SPREAD", enable_task_events=False
    )
    handle = await asyncio.to_thread(actor.remote, config)

    async def stop() -> None:
        await asyncio.to_thread(ray.kill, handle)

    try:
        address = await asyncio.wrap_future(handle.start.remote().future())
    except BaseException:
        await stop()
        raise
    return address, stop


class RemoteSender:
    """The pool's side of a sender actor."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.outstanding = 0
        self.lost = False
        """True once the link is gone: take it out of the pool."""
        self._clock = clock
        self._link: Link | None = None
        self._stop: Callable[[], Awaitable[None]] | None = None
        self._pending: dict[tuple[int, int, str], tuple[PushJob, Done]] = {}

    async def open(self, config: SenderConfig, spawn: Spawn, pool_name: str) -> None:
        """Start the actor and dial it."""
        address, self._stop = await spawn(config)
        try:
            self._link = await dial(
                address, self, config.settings.link, pool_name, config.secret, machine_id()
            )
        except BaseException:
            await self._stop()
            raise

    def submit(self, job: PushJob, done: Done) -> None:
        """See `Sender.submit`. Raises LinkError or BusyError if the job cannot be handed over."""
        if self._link is None:
            raise LinkError("the sender is not open")
        self._link.send_nowait(Push([job]))
        # The device tells apart the parts of a job whose targets are of several apps.
        self._pending[job.delivery, job.attempt, job.targets[0].device] = (job, done)
        self.outstanding += len(job.targets)

    async def close(self) -> None:
        """See `Sender.close`."""
        self.lost = True
        if self._link is not None:
            self._link.close()
        if self._stop is not None:
            stop, self._stop = self._stop, None
            await stop()

    def link_opened(self, link: Link) -> None:
        """Dialled."""

    def link_closed(self, link: Link) -> None:
        """Nobody knows what became of the jobs in flight."""
        self.lost = True
        pending, self._pending = self._pending, {}
        self.outstanding = 0
        for job, done in pending.values():
            done(same_for_all(job, "unknown", "sender lost", self._clock.now_ms()))

    def receive(self, link: Link, message: Any, request: int) -> None:
        """Take outcomes."""
        if type(message) is not PushOutcome or not message.results:
            return
        found = self._pending.pop((message.delivery, message.attempt, message.results[0].device), None)
        if found is not None:
            job, done = found
            self.outstanding -= len(job.targets)
            done(message)

    def read_finished(self, link: Link) -> None:
        """Outcomes are handed on one by one."""
