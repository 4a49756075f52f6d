"""D1: how late what is scheduled comes, when much is due in the same seconds and single events go on."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from typing import Any, Final

from benchmarks.bench import Bench, Measurement, Options, Progress, opened
from benchmarks.ledger import Accepted
from benchmarks.outbox_cost import merged
from benchmarks.stats import summary_ms
from benchmarks.target import Target, TargetError
from benchmarks.wire import http_request, now

MADE_PER_S: Final = 500
"""Schedules are made faster than this: what is due first is not due before the last is made."""


async def schedules_due(target: Target, options: Options, progress: Progress) -> Measurement:
    """D1: schedules that are due at the same five full seconds, beside single events; how late each comes."""
    from benchmarks.scenarios import open_loop

    cold = replace(options, warmup_events=0)
    async with (
        opened(target, cold, "D1", users=options.users, connections=1) as bench,
        opened(target, options, "D1-beside", users=options.users, connections=options.concurrency) as beside,
        progress.watch(bench),
    ):
        first_s = math.ceil(time.time() + options.schedule_ahead_s + options.schedules / MADE_PER_S)
        started = now()
        await _schedule(bench, first_s)
        spent_s = now() - started
        left_s = max(0.0, first_s - time.time())
        load = await open_loop(beside, left_s + options.schedule_seconds + 1.0)
        await bench.settle()
        _number(bench)
        done = await bench.finish("D1", {})
        single = await beside.finish("D1-beside", load)
    late_s = bench.ledger.latencies_s(receiver.device for receiver in bench.receivers)
    verdict = merged([done.verdict, single.verdict])
    verdict.wrong = sum(one < 0 for one in late_s)
    if verdict.wrong:
        verdict.examples.append(f"wrong: {verdict.wrong} came early, by {-min(late_s):.3f} s at most")
    first = first_s + now() - time.time()
    late, before = summary_ms(late_s), summary_ms(_beside(beside, 0.0, first))
    meanwhile = summary_ms(_beside(beside, first, first + options.schedule_seconds))
    metrics: dict[str, Any] = {
        "late_ms": late,
        "before_ms": before,
        "meanwhile_ms": meanwhile,
        "send_lag_ms": single.metrics["send_lag_ms"],
    }
    title = (
        f"{options.schedules:,} schedules due in {options.schedule_seconds} full seconds, beside "
        f"{options.rate_per_s:g} events/s"
    )
    measurement = Measurement("D1", title, metrics, verdict, [*done.notes])
    ready = f"{left_s:.1f} s before the first was due" if left_s else "when some were due"
    measurement.notes.append(
        f"this run: late by p50 {late['p50']:.0f} ms, p99 {late['p99']:.0f} ms, "
        f"at most {late['max']:.0f} ms; events before p99 {before.get('p99', 0):.0f} ms, "
        f"meanwhile {meanwhile.get('p99', 0):.0f} ms"
    )
    measurement.notes.append(f"made by batches of {options.batch} in {spent_s:.1f} s, {ready}")
    return measurement


async def _schedule(bench: Bench, first_s: int) -> None:
    """Make the schedules, each of them for one user and one of the seconds, by batches."""
    offset_s = now() - time.time()  # of the clock that receipts are read from
    options = bench.options
    left = [
        (number % len(bench.users), first_s + number % options.schedule_seconds)
        for number in range(options.schedules)
    ]
    while left:
        some, left = left[: options.batch], left[options.batch :]
        events = [
            json.loads(bench.event(bench.users[user])) | {"scheduleAt": _utc(at_s)} for user, at_s in some
        ]
        body = json.dumps(events).encode()
        request = http_request(bench.door, "POST", "/v1/events", body, bench.target.api_key)
        response = await bench.connections[0].request(request)
        if response.status != 202:
            raise TargetError(f"POST /v1/events answered {response.status}: {response.body[:200]!r}")
        for (user, at_s), item in zip(some, response.json()["results"], strict=True):
            if item.get("status") != "deferred":
                raise TargetError(f"an event with scheduleAt was answered {item}")
            bench.statuses["deferred"] += 1
            bench.ledger.accept(
                item["id"].encode(),
                Accepted(bench.users[user], 0, at_s + offset_s, response.at, True, "deferred"),
            )


def _beside(bench: Bench, from_s: float, until_s: float) -> list[float]:
    """Latencies of the events that were meant to be sent in a while."""
    return [
        at - entry.intended_s
        for receiver in bench.receivers
        for at, notification, _ in receiver.device.receipts
        if (entry := bench.ledger.accepted.get(notification)) is not None
        and entry.measured
        and from_s <= entry.intended_s < until_s
    ]


def _number(bench: Bench) -> None:
    """A schedule has no seq when it is made: what a device received is held against what is stored."""
    for receiver in bench.receivers:
        for _, notification, seq in receiver.device.receipts:
            entry = bench.ledger.accepted.get(notification)
            if entry is not None and not entry.seq:
                entry.seq = seq


def _utc(at_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_s))
