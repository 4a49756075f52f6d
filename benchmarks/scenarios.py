"""The scenarios. Each sets up users of its own, sends, and ends in a `Measurement`."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, Final

from benchmarks.bench import Bench, Measurement, Options, Progress, opened
from benchmarks.broadcast import broadcast
from benchmarks.checks import received_pushes
from benchmarks.due import schedules_due
from benchmarks.faults import reconnects, shard_killed
from benchmarks.feeds import feed_and_count, read_elsewhere, searches
from benchmarks.outbox_cost import outbox_cost
from benchmarks.presence import presence_query
from benchmarks.procs import cpu_between, snapshot
from benchmarks.rules_cost import rules_cost
from benchmarks.stats import summary_ms
from benchmarks.storm import connection_storm
from benchmarks.target import Target, TargetError
from benchmarks.wire import http_request, now

Scenario = Callable[[Target, Options, Progress], Awaitable[Measurement]]

PUSHES_KEPT: Final = 10_000
"""The local FCM server remembers so many (carillon/testing/provider_server.py)."""


async def one_by_one(bench: Bench, events: int) -> int:
    """Post one event at a time; the next when the last was received. Returns how many were not in time."""
    loop = asyncio.get_running_loop()
    by_user = {receiver.device.user: receiver for receiver in bench.receivers}
    missed = 0
    for number in range(events):
        user = number % len(bench.users)
        receiver = by_user[bench.users[user]]
        arrived: asyncio.Future[None] = loop.create_future()

        def note(at: float, notification: bytes, seq: int, arrived: asyncio.Future[None] = arrived) -> None:
            if not arrived.done():
                arrived.set_result(None)

        receiver.on_receipt = note
        if await bench.post(bench.connections[0], user, now()):
            done, _ = await asyncio.wait([arrived], timeout=bench.options.receipt_timeout_s)
            missed += not done
        receiver.on_receipt = None
    return missed


async def sequential(target: Target, options: Options, progress: Progress) -> Measurement:
    """S1: one event at a time; the next is sent when the last was answered and received."""
    async with (
        opened(target, options, "S1", users=min(50, options.users), connections=1) as bench,
        progress.watch(bench),
    ):
        missed = await one_by_one(bench, options.sequential_events)
        measurement = await bench.finish("sequential: one event at a time", {})
        if missed:
            measurement.notes.append(f"{missed} events not received within {options.receipt_timeout_s} s")
        return measurement


async def concurrent(target: Target, options: Options, progress: Progress) -> Measurement:
    """S2: closed loop, single POSTs on 64 connections at once, to online users."""
    async with (
        opened(target, options, "S2", users=options.users, connections=options.concurrency) as bench,
        progress.watch(bench),
    ):
        stop_at = now() + options.duration_s
        total = len(bench.users)

        async def worker(index: int) -> None:
            connection, number = bench.connections[index], index
            while now() < stop_at:
                if not await bench.post(connection, number % total, now()):
                    await asyncio.sleep(0.05)  # refused or lost: a producer would not hammer either
                number += options.concurrency + 1

        await asyncio.gather(*(worker(index) for index in range(options.concurrency)))
        return await bench.finish(f"{options.concurrency} concurrent single POSTs", bench.rate())


async def batch_loop(bench: Bench, duration_s: float) -> None:
    """Post batches on all connections, each as soon as the last is answered."""
    options = bench.options
    # Built before the clock starts; each batch goes to users drawn with the seed, repeats included.
    prepared = []
    for _ in range(32):
        users = [bench.rng.randrange(len(bench.users)) for _ in range(options.batch)]
        prepared.append((users, bench.batch_request(users)))
    stop_at = now() + duration_s

    async def worker(index: int) -> None:
        number = index * 7
        while now() < stop_at:
            users, request = prepared[number % len(prepared)]
            answered = bench.last_answered_s
            await bench.post_batch(bench.connections[index], users, request)
            if bench.last_answered_s == answered:
                await asyncio.sleep(0.05)
            number += 1

    await asyncio.gather(*(worker(index) for index in range(options.batch_connections)))


async def batches(target: Target, options: Options, progress: Progress) -> Measurement:
    """S3: closed loop, batches of 200 on 4 connections; durable events a second."""
    async with (
        opened(target, options, "S3", users=options.users, connections=options.batch_connections) as bench,
        progress.watch(bench),
    ):
        await batch_loop(bench, options.duration_s)
        return await bench.finish(
            f"batches of {options.batch} on {options.batch_connections} connections", bench.rate()
        )


async def open_loop(bench: Bench, duration_s: float) -> dict[str, Any]:
    """Send at a fixed rate, whatever the answers do; latency counts from the intended moment of each event.

    A closed loop sends nothing while the system stalls, and so hides the stall (coordinated omission). Here
    an event that finds no idle connection waits, and its wait is part of its latency.

    Returns:
        `send_lag_ms`: how late the load generator itself was (timer granularity, no idle connection).
    """
    options = bench.options
    idle: asyncio.Queue[Any] = asyncio.Queue()
    for connection in bench.connections:
        idle.put_nowait(connection)
    lags: list[float] = []
    tasks: set[asyncio.Task[None]] = set()
    total = round(options.rate_per_s * duration_s)
    order = [bench.rng.randrange(len(bench.users)) for _ in range(total)]

    async def send(user: int, intended_s: float) -> None:
        connection = await idle.get()
        lags.append(now() - intended_s)
        try:
            await bench.post(connection, user, intended_s)
        finally:
            idle.put_nowait(connection)

    loop = asyncio.get_running_loop()
    start = now() + 0.05
    for number, user in enumerate(order):
        intended_s = start + number / options.rate_per_s
        while (wait_s := intended_s - now()) > 0:
            await asyncio.sleep(wait_s)
        task = loop.create_task(send(user, intended_s))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    while tasks:
        await asyncio.wait(tasks)
    return {"send_lag_ms": summary_ms(lags)}


async def paced(target: Target, options: Options, progress: Progress) -> Measurement:
    """S4: open loop at 500 events/s."""
    async with (
        opened(target, options, "S4", users=options.users, connections=options.concurrency) as bench,
        progress.watch(bench),
    ):
        metrics = await open_loop(bench, options.duration_s * 2)
        return await bench.finish(
            f"open loop at {options.rate_per_s:g} events/s, latency from the intended time",
            {**bench.rate(), **metrics},
        )


async def half_offline(target: Target, options: Options, progress: Progress) -> Measurement:
    """S5: every user has a phone, half of the users are online; the others' events must reach FCM."""
    if not target.fcm_received_url:
        raise TargetError("S5 needs fcmReceivedUrl in dev.json (the local FCM server of `make up`)")
    users = options.users
    async with (
        opened(
            target,
            options_without_warm_up(options),
            "S5",
            users=users,
            connections=options.concurrency,
            online=users // 2,
        ) as bench,
        progress.watch(bench),
    ):
        targets = {f"fcm-{user}": user for user in bench.users}
        for index, (token, user) in enumerate(targets.items()):
            body = json.dumps(
                {"platform": "android", "provider": "fcm", "token": token, "appId": "bench"},
            ).encode()
            response = await bench.connections[index % len(bench.connections)].request(
                http_request(bench.door, "PUT", f"/v1/users/{user}/devices/phone", body, target.api_key)
            )
            if response.status not in {200, 201, 204}:
                raise TargetError(f"PUT device answered {response.status}: {response.body[:200]!r}")
        before = (await received_pushes(target.fcm_received_url, 0))["count"]
        # Between the monotonic clock of the sends and the wall clock of the provider's record.
        wall_offset_s = time.time() - now()
        online = {receiver.device.user for receiver in bench.receivers}
        numbers = iter(range(options.offline_events))

        async def worker(index: int) -> None:
            for number in numbers:
                await bench.post(bench.connections[index], number % users, now())

        await asyncio.gather(*(worker(index) for index in range(min(16, options.concurrency))))
        expected = sum(1 for entry in bench.ledger.accepted.values() if entry.user not in online)
        await _settle_pushes(target.fcm_received_url, before + expected, options.settle_s)
        await asyncio.sleep(options.linger_s)
        record = await received_pushes(target.fcm_received_url, PUSHES_KEPT)
        arrived: list[bytes] = []
        latencies: list[float] = []
        unneeded = 0
        last_at = bench.first_sent_s
        for push in record["pushes"]:
            user = targets.get(push["target"])
            if user is None:
                continue  # another run's
            notification = push["notificationId"].encode()
            arrived.append(notification)
            entry = bench.ledger.accepted.get(notification)
            if user in online:
                unneeded += 1
            elif entry is not None:
                at = datetime.fromisoformat(push["receivedAt"]).timestamp() - wall_offset_s
                latencies.append(at - entry.intended_s)
                last_at = max(last_at, at)
        measurement = await bench.finish(
            "half of the users offline with a push device",
            {
                **bench.rate(),
                "push_ms": summary_ms(latencies),
                "pushes_per_s": len(latencies) / (last_at - bench.first_sent_s) if latencies else 0.0,
            },
            pushed=arrived,
        )
        repeats = len(arrived) - len(set(arrived))
        if repeats:
            measurement.notes.append(f"{repeats} pushes were repeats (allowed: at least once)")
        if unneeded:
            measurement.notes.append(f"{unneeded} pushes to users who had acknowledged on a socket")
        return measurement


def options_without_warm_up(options: Options) -> Options:
    """S5 registers its devices before the first event, so nothing may be sent before that."""
    return Options(**{**options.__dict__, "warmup_events": 0})


async def _settle_pushes(url: str, count: int, settle_s: float) -> None:
    """Wait until the provider has `count`, or nothing arrives any more for `settle_s`."""
    last, since = -1, now()
    while (seen := (await received_pushes(url, 0))["count"]) < count:
        if seen != last:
            last, since = seen, now()
        elif now() - since > settle_s:
            return
        await asyncio.sleep(0.1)


async def storm(target: Target, options: Options, progress: Progress) -> Measurement:
    """S6: 5,000 connections at once; then one event to each, to prove that they live."""
    return await connection_storm(target, options, progress)


async def cpu_cost(target: Target, options: Options, progress: Progress) -> Measurement:
    """S7: CPU seconds for 1,000 deliveries at 500 events/s, by process; and what idling costs."""
    async with (
        opened(target, options, "S7", users=options.users, connections=options.concurrency) as bench,
        progress.watch(bench),
    ):
        duration_s = options.duration_s * 2
        idle_s = min(5.0, options.duration_s)
        mine = {os.getpid()}
        at_rest = snapshot(target.pids, exclude=mine)
        await asyncio.sleep(idle_s)
        before, own_before = snapshot(target.pids, exclude=mine), time.process_time()
        delivered_before, started = bench.received(), now()
        metrics = await open_loop(bench, duration_s)
        await bench.settle()
        seconds = now() - started
        after, own = snapshot(target.pids, exclude=mine), time.process_time() - own_before
        delivered = bench.received() - delivered_before
        spent = cpu_between(before, after)
        idle = sum(cpu_between(at_rest, before).values()) / idle_s
        per_thousand = {group: cpu * 1000 / delivered for group, cpu in spent.items()} if delivered else {}
        metrics.update(bench.rate())
        metrics.update(
            {
                "cpu_s_per_1000": {"total": sum(per_thousand.values()), **per_thousand},
                "cores_used": sum(spent.values()) / seconds,
                "cores_used_idle": idle,
                "load_generator_cpu_s_per_1000": own * 1000 / delivered if delivered else 0.0,
            }
        )
        return await bench.finish(
            f"CPU seconds for 1,000 deliveries at {options.rate_per_s:g} events/s", metrics
        )


SCENARIOS: Final[dict[str, Scenario]] = {
    "S1": sequential,
    "S2": concurrent,
    "S3": batches,
    "S4": paced,
    "S5": half_offline,
    "S6": storm,
    "S7": cpu_cost,
    "S8": reconnects,
    "S9": shard_killed,
    "S10": outbox_cost,
    "B1": broadcast,
    "C1": presence_query,
    "D1": schedules_due,
    "R1": rules_cost,
    "F1": feed_and_count,
    "F2": searches,
    "F3": read_elsewhere,
}

DESTRUCTIVE: Final = frozenset({"S8", "S9"})
"""They kill processes: of a system that was not started for it only when they are named."""
