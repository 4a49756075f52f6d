"""One scenario's users, devices, HTTP connections and ledger."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import itertools
import json
import random
import re
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from benchmarks.checks import stored
from benchmarks.ledger import Accepted, Ledger, Verdict, judge
from benchmarks.stats import summary_ms
from benchmarks.target import Target
from benchmarks.wire import Door, HttpConnection, Receiver, http_request, now

_TITLE = b"Build 4711 has"
_NUMBERED = b"Build 0000000000 has"
_ANY_NUMBER = re.compile(rb"Build [0-9]{10}")


@dataclass(frozen=True)
class Options:
    """What every scenario may be told. Durations in seconds."""

    door: str = "direct"
    """direct | serve."""
    seed: int = 1
    run: str = "run"
    """Part of every user id: users of one run are new, so that their seqs start at 1."""
    users: int = 200
    """Users that events go to (S1 to S5, S7)."""
    devices: int = 1
    """WebSocket connections of each online user."""
    ack_s: float = 0.25
    """Each device acknowledges what it received at most so often; 0: never."""
    tells_attention: bool = True
    """Devices tell that their screen is looked at."""
    sequential_events: int = 2000
    duration_s: float = 10.0
    """S2, S3; S4 and S7 run twice as long."""
    concurrency: int = 64
    """Connections of S2, S4, S5 and S7."""
    batch: int = 200
    batch_connections: int = 4
    rate_per_s: float = 500.0
    offline_events: int = 2000
    stored_notifications: int = 1_000_000
    """What F1 and F2 read among, put into Postgres once."""
    storm_connections: int = 5000
    storm_timeout_s: float = 60.0
    """S6: longest wait for the last WELCOME."""
    idle_s: float = 0.0
    """S6: so long the connections rest, to know what their heart-beats cost."""
    presence_users: int = 1000
    """C1: users of one query."""
    presence_queries: int = 300
    """C1: measured queries of each kind."""
    kills: int = 5
    """S9: how many shards are killed, one after the other."""
    kill_every_s: float = 9.0
    """S9: from one kill to the next."""
    broadcast_users: int = 200_000
    """B1: users of the topic, put into Postgres before."""
    schedules: int = 2000
    """D1: schedules that are due together."""
    schedule_seconds: int = 5
    """D1: so many full seconds have their share of what is due."""
    schedule_ahead_s: float = 4.0
    """D1: from when the last schedule is made to the first that is due."""
    warmup_events: int = 300
    receipt_timeout_s: float = 5.0
    """S1: longest wait for one receipt before going on (the verdict then tells the loss)."""
    settle_s: float = 15.0
    """After the last event: longest wait without any receipt while some are missing."""
    linger_s: float = 0.5
    """After the last expected receipt: so long duplicates may still show themselves."""
    request_timeout_s: float = 20.0
    check_stored: bool = True


class AnswerItem(msgspec.Struct):
    """What is read of a 202, or of one element of a batch's `results`."""

    id: str = ""
    seq: int = 0
    status: str = ""
    error: Any = None


class BatchAnswer(msgspec.Struct):
    """A batch's 202."""

    results: list[AnswerItem]


@dataclass
class Measurement:
    """One scenario's outcome."""

    name: str
    title: str
    metrics: dict[str, Any]
    verdict: Verdict
    notes: list[str] = field(default_factory=list)


class Progress:
    """One line a second on stderr while a scenario runs: rewritten on a terminal, every 5 s elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._terminal = sys.stderr.isatty()

    def line(self, text: str, *, last: bool = False) -> None:
        """Show `text`; `last` ends a rewritten line."""
        if self.quiet:
            return
        if self._terminal:
            print(f"\r\x1b[2K{text}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    @contextlib.asynccontextmanager
    async def watch(self, bench: Bench) -> AsyncIterator[None]:
        """Show the counts of `bench` until the block ends."""

        async def run() -> None:
            started = now()
            while True:
                await asyncio.sleep(1.0 if self._terminal else 5.0)
                self.line(
                    f"{bench.name} {now() - started:5.0f} s  {len(bench.ledger.accepted):,} accepted  "
                    f"{bench.received():,} received  {sum(bench.ledger.refused.values()):,} refused"
                )

        task = asyncio.get_running_loop().create_task(run())
        try:
            yield
        finally:
            task.cancel()
            if self._terminal and not self.quiet:
                print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


class Bench:
    """Sets a scenario up, sends its events, and judges it.

    Args:
        target: the system.
        options: see `Options`.
        name: "S1" ...; part of the user ids.
    """

    def __init__(self, target: Target, options: Options, name: str) -> None:
        self.target = target
        self.options = options
        self.name = name
        self.door: Door = target.http_door(options.door)
        self.ledger = Ledger()
        self.rng = random.Random(f"{options.seed}:{name}")
        self.users: list[str] = []
        self.receivers: list[Receiver] = []
        self.connections: list[HttpConnection] = []
        self.statuses: collections.Counter[str] = collections.Counter()
        self.post_s: list[float] = []
        """Seconds from the start of each measured POST to its answer."""
        self.first_sent_s = 0.0
        self.last_answered_s = 0.0
        self._singles: list[bytes] = []
        self._numbers: Iterator[int] | None = None  # of texts; None: all have the same
        self._tasks: set[asyncio.Task[Any]] = set()
        self._decode = msgspec.json.Decoder(AnswerItem).decode
        self._decode_batch = msgspec.json.Decoder(BatchAnswer).decode

    # Set-up

    async def open(self, users: int, connections: int, online: int | None = None) -> None:
        """Make users, connect the devices of the first `online` of them (None: all), prepare HTTP."""
        prefix = f"bench-{self.options.run}-{self.name.lower()}"
        self.users = [f"{prefix}-{number}" for number in range(users)]
        self._make_singles()
        self.connections = [
            HttpConnection(self.door, self.options.request_timeout_s) for _ in range(connections)
        ]
        gateway = self.target.ws_door()
        for user in self.users[: users if online is None else online]:
            token = self.target.token(user)
            for number in range(self.options.devices):
                receiver = Receiver(
                    gateway, user, token, f"d{number}", self.options.ack_s > 0, self.options.tells_attention
                )
                receiver.on_lost = self._reconnect
                self.receivers.append(receiver)
        for at in range(0, len(self.receivers), 200):
            await asyncio.gather(*(receiver.connect() for receiver in self.receivers[at : at + 200]))
        if self.options.ack_s > 0:
            self._spawn(self._acknowledge())

    def number_texts(self) -> None:
        """From now on every event has a title of its own, whatever is sent again: nothing is alike."""
        self._numbers = itertools.count(1)
        self._make_singles()

    def _make_singles(self) -> None:
        self._singles = [
            http_request(self.door, "POST", "/v1/events", self._event(user), self.target.api_key)
            for user in self.users
        ]

    def _event(self, user: str) -> bytes:
        made = self.event(user)
        return made if self._numbers is None else made.replace(_TITLE, _NUMBERED)

    def _own(self, request: bytes) -> bytes:
        numbers = self._numbers
        if numbers is None:
            return request
        return _ANY_NUMBER.sub(lambda _: b"Build %010d" % next(numbers), request)

    @staticmethod
    def event(user: str) -> bytes:
        """The event that is sent to `user`: about 170 bytes, as a chat or build notice is."""
        return json.dumps(
            {
                "userId": user,
                "type": "benchmark.event",
                "title": "Build 4711 has finished",
                "body": "All 318 checks passed in 4 min 12 s.",
                "data": {"run": "4711"},
            },
            separators=(",", ":"),
        ).encode()

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _acknowledge(self) -> None:
        while True:
            await asyncio.sleep(self.options.ack_s)
            for receiver in self.receivers:
                receiver.acknowledge()

    def _reconnect(self, receiver: Receiver) -> None:
        self._spawn(receiver.redial(self.rng))

    # Sending

    async def post(
        self, connection: HttpConnection, user: int, intended_s: float, measured: bool = True
    ) -> bool:
        """POST one event and record its answer; True if it was accepted."""
        sent = now()
        if measured and not self.first_sent_s:
            self.first_sent_s = sent
        try:
            response = await connection.request(self._own(self._singles[user]))
        except (OSError, TimeoutError):
            self.ledger.lose_answer()
            return False
        if response.status != 202:
            self.ledger.refuse(response.status)
            return False
        if measured:
            self.post_s.append(response.at - sent)
            self.last_answered_s = response.at
        item = self._decode(response.body)
        self.statuses[item.status] += 1
        self.ledger.accept(
            item.id.encode(),
            Accepted(self.users[user], item.seq, intended_s, response.at, measured, item.status),
        )
        return True

    def batch_request(self, users: Sequence[int]) -> bytes:
        """The bytes of a batch with one event for each of `users`."""
        body = b"[" + b",".join(self._event(self.users[user]) for user in users) + b"]"
        return http_request(self.door, "POST", "/v1/events", body, self.target.api_key)

    async def post_batch(
        self, connection: HttpConnection, users: Sequence[int], request: bytes, measured: bool = True
    ) -> None:
        """POST a prebuilt batch and record its answers."""
        sent = now()
        if measured and not self.first_sent_s:
            self.first_sent_s = sent
        try:
            response = await connection.request(self._own(request))
        except (OSError, TimeoutError):
            self.ledger.lose_answer(len(users))
            return
        if response.status != 202:
            self.ledger.refuse(response.status, len(users))
            return
        if measured:
            self.post_s.append(response.at - sent)
            self.last_answered_s = response.at
        for user, item in zip(users, self._decode_batch(response.body).results, strict=True):
            if item.error is not None:
                code = item.error.get("code", "error") if isinstance(item.error, dict) else "error"
                self.ledger.refuse(str(code))
                continue
            self.statuses[item.status] += 1
            self.ledger.accept(
                item.id.encode(),
                Accepted(self.users[user], item.seq, sent, response.at, measured, item.status),
            )

    async def warm_up(self) -> None:
        """Send events that are judged but not measured: caches, connections, the allocator."""
        count = self.options.warmup_events
        if not count or not self.connections:
            return

        async def worker(connection: HttpConnection, mine: range) -> None:
            for number in mine:
                await self.post(connection, number % len(self.users), now(), measured=False)

        workers = self.connections[:8]
        await asyncio.gather(
            *(
                worker(connection, range(index, count, len(workers)))
                for index, connection in enumerate(workers)
            )
        )
        await self.settle()

    # The end

    def received(self) -> int:
        """Receipts so far, over all devices."""
        return sum(len(receiver.device.receipts) for receiver in self.receivers)

    def expected(self) -> int:
        """Receipts that the accepted events ask for."""
        devices = collections.Counter(receiver.device.user for receiver in self.receivers)
        return sum(devices[entry.user] for entry in self.ledger.accepted.values())

    async def settle(self) -> None:
        """Wait until everything expected has arrived, or nothing arrives any more for `settle_s`."""
        expected, last, since = self.expected(), -1, now()
        while (count := self.received()) < expected:
            if count != last:
                last, since = count, now()
            elif now() - since > self.options.settle_s:
                return
            await asyncio.sleep(0.02)

    async def finish(self, title: str, metrics: dict[str, Any], **judged: Any) -> Measurement:
        """Settle, look up what was stored, judge, and put the measurement together."""
        await self.settle()
        await asyncio.sleep(self.options.linger_s)
        devices = [receiver.device for receiver in self.receivers]
        rows = await stored(self.target, self.door, self.users) if self.options.check_stored else None
        verdict = judge(self.ledger, devices, stored=rows, **judged)
        latencies = self.ledger.latencies_s(devices)
        if latencies:
            metrics = {"end_to_end_ms": summary_ms(latencies), **metrics}
        if self.post_s:
            metrics["post_ms"] = summary_ms(self.post_s)
        measurement = Measurement(self.name, title, metrics, verdict)
        measurement.notes.append("status: " + ", ".join(f"{n:,} {s}" for s, n in self.statuses.most_common()))
        reconnects = sum(receiver.reconnects for receiver in self.receivers)
        if reconnects:
            measurement.notes.append(f"{reconnects} reconnects with resume")
        errors = [error for receiver in self.receivers for error in receiver.errors]
        if errors:
            measurement.notes.append(f"{len(errors)} errors on sockets, first: {errors[0]}")
        return measurement

    def rate(self) -> dict[str, float]:
        """`events_per_s`: measured events accepted, from the first send to the last answer."""
        seconds = self.last_answered_s - self.first_sent_s
        count = sum(1 for entry in self.ledger.accepted.values() if entry.measured)
        return {"events_per_s": count / seconds if seconds > 0 else 0.0, "seconds": seconds}

    async def close(self) -> None:
        """Close everything; never raises."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for receiver in self.receivers:
            receiver.close()
        for connection in self.connections:
            connection.close()
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def opened(
    target: Target, options: Options, name: str, *, users: int, connections: int, online: int | None = None
) -> AsyncIterator[Bench]:
    """A `Bench` that is set up, warmed up, and closed at the end.

    The garbage collector of the load generator rests meanwhile: its pauses would count as the system's.
    """
    bench = Bench(target, options, name)
    try:
        await bench.open(users, connections, online)
        await bench.warm_up()
        gc.collect()
        gc.freeze()
        gc.disable()
        yield bench
    finally:
        gc.enable()
        gc.unfreeze()
        await bench.close()
