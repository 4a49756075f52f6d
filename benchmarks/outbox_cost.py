"""S10: what an outbox row and an acknowledgement for each event cost: the same path with and without them.

Three groups of users on one system, in turns. `bare` users have no push device and never acknowledge, so
that their events leave no row in the outbox. `acked` users have one device each and acknowledge, so that each
event makes a row, which the acknowledgement cancels. `focused` users do the same and tell that they look at
their screen: the acknowledgement holds the row for `holdS` (60 s), and the end of that cancels it. Each turn
is a closed loop (throughput) and an open loop (latency); which group begins changes from turn to turn, so
that a machine that becomes slower or faster meanwhile favours none.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from dataclasses import fields, replace
from typing import Any, Final

from benchmarks.bench import Bench, Measurement, Options, Progress, opened
from benchmarks.ledger import Verdict
from benchmarks.procs import cpu_between, snapshot
from benchmarks.stats import summary_ms
from benchmarks.target import Target, TargetError
from benchmarks.wire import http_request, now

TURNS: Final = 6
MENTIONED_S: Final = 0.01
"""Processes that cost less CPU for 1,000 events are left out of the notes; the JSON has all."""
KINDS: Final = ("bare", "acked", "focused")


async def outbox_cost(target: Target, options: Options, progress: Progress) -> Measurement:
    """S10: the path with an outbox row and an acknowledgement for each event, against the path without."""
    quiet = replace(options, warmup_events=0)
    connections = options.concurrency
    async with (
        opened(
            target, replace(quiet, ack_s=0.0), "S10-bare", users=options.users, connections=connections
        ) as bare,
        opened(
            target,
            replace(quiet, tells_attention=False),
            "S10-acked",
            users=options.users,
            connections=connections,
        ) as acked,
        opened(target, quiet, "S10-focused", users=options.users, connections=connections) as focused,
        progress.watch(focused),
    ):
        benches = dict(zip(KINDS, (bare, acked, focused), strict=True))
        for bench in (acked, focused):
            await _give_devices(bench, target)
        for bench in benches.values():
            bench.options = replace(bench.options, warmup_events=options.warmup_events)
            await bench.warm_up()
        rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
        waits: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        costs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        mine = {os.getpid()}
        for turn in range(TURNS):
            for kind in KINDS[turn % 3 :] + KINDS[: turn % 3]:
                before, own = snapshot(target.pids, exclude=mine), time.process_time()
                count = len(benches[kind].ledger.accepted)
                rates[kind].append(await _closed(benches[kind], options.duration_s / 2))
                count = max(1, len(benches[kind].ledger.accepted) - count)
                spent = cpu_between(before, snapshot(target.pids, exclude=mine))
                spent["load generator"] = time.process_time() - own
                costs[kind].append({group: 1000 * cpu_s / count for group, cpu_s in spent.items()})
                waits[kind].append(await _open(benches[kind], options.duration_s / 2))
        done = [await bench.finish(bench.name, {}) for bench in benches.values()]
    metrics: dict[str, Any] = {
        kind: {
            "throughput_ratio": statistics.median(
                mine / base for base, mine in zip(rates["bare"], rates[kind], strict=True)
            ),
            "latency_p50_ratio": _ratio(waits, kind, "p50"),
            "latency_p99_ratio": _ratio(waits, kind, "p99"),
        }
        for kind in KINDS
    }
    for kind in KINDS:
        metrics[kind] |= {
            "events_per_s": statistics.median(rates[kind]),
            "cpu_s_per_1000": {
                group: statistics.median(one.get(group, 0.0) for one in costs[kind])
                for group in costs[kind][0]
            },
            "end_to_end_ms": {
                name: statistics.median(one[name] for one in waits[kind]) for name in ("p50", "p99")
            },
        }
    measurement = Measurement(
        "S10", "an outbox row and an acknowledgement for each event", metrics,
        merged([one.verdict for one in done]),
    )  # fmt: skip
    for kind in KINDS:
        part = metrics[kind]
        measurement.notes.append(
            f"{kind}: {part['events_per_s']:,.0f} events/s with {connections} connections; at "
            f"{options.rate_per_s:g}/s p50 {part['end_to_end_ms']['p50']:.2f} ms, "
            f"p99 {part['end_to_end_ms']['p99']:.2f} ms (medians of {TURNS} turns); CPU s of 1,000 events at "
            f"saturation: {sum(part['cpu_s_per_1000'].values()):.3f}, of it "
            + ", ".join(f"{g} {c:.3f}" for g, c in part["cpu_s_per_1000"].items() if c >= MENTIONED_S)
        )
    for kind in KINDS[1:]:
        part = metrics[kind]
        measurement.notes.append(
            f"{kind} against bare, medians of the turns' ratios: throughput {part['throughput_ratio']:.3f}, "
            f"p50 {part['latency_p50_ratio']:.3f}, p99 {part['latency_p99_ratio']:.3f}; CPU "
            f"{sum(part['cpu_s_per_1000'].values()) / sum(metrics['bare']['cpu_s_per_1000'].values()):.3f}"
        )
    return measurement


def _ratio(waits: dict[str, list[dict[str, float]]], kind: str, name: str) -> float:
    """The median over the turns of this kind / bare."""
    return statistics.median(
        mine[name] / base[name] for base, mine in zip(waits["bare"], waits[kind], strict=True)
    )


async def _give_devices(bench: Bench, target: Target) -> None:
    """A phone for each user."""
    for number, user in enumerate(bench.users):
        body = json.dumps(
            {"platform": "android", "provider": "fcm", "token": f"fcm-{user}", "appId": "bench"}
        ).encode()
        connection = bench.connections[number % len(bench.connections)]
        response = await connection.request(
            http_request(bench.door, "PUT", f"/v1/users/{user}/devices/phone", body, target.api_key)
        )
        if response.status not in {200, 201, 204}:
            raise TargetError(f"PUT device answered {response.status}: {response.body[:200]!r}")


async def _closed(bench: Bench, duration_s: float) -> float:
    """All connections post as fast as they are answered; events per second."""
    started, stop_at = now(), now() + duration_s
    before = len(bench.ledger.accepted)
    total = len(bench.users)

    async def worker(index: int) -> None:
        number = index
        while now() < stop_at:
            if not await bench.post(bench.connections[index], number % total, now()):
                await asyncio.sleep(0.05)
            number += len(bench.connections) + 1

    await asyncio.gather(*(worker(index) for index in range(len(bench.connections))))
    await bench.settle()
    return (len(bench.ledger.accepted) - before) / (now() - started)


async def _open(bench: Bench, duration_s: float) -> dict[str, float]:
    """Post at the fixed rate; latencies in ms of the events of this turn."""
    from benchmarks.scenarios import open_loop

    began = now()
    await open_loop(bench, duration_s)
    await bench.settle()
    return latencies_ms(bench, began)


def latencies_ms(bench: Bench, began_s: float) -> dict[str, float]:
    """From the intended moment to the receipt, of the events intended since `began_s`."""
    waits = []
    for receiver in bench.receivers:
        for at, notification, _ in receiver.device.receipts:
            entry = bench.ledger.accepted.get(notification)
            if entry is not None and entry.intended_s >= began_s:
                waits.append(at - entry.intended_s)
    return summary_ms(waits)


def merged(verdicts: list[Verdict]) -> Verdict:
    """The verdict on several groups of users."""
    whole = Verdict()
    for verdict in verdicts:
        for field in fields(Verdict):
            mine, other = getattr(whole, field.name), getattr(verdict, field.name)
            if other is None:
                continue
            if isinstance(other, dict):
                mine.update({key: mine.get(key, 0) + count for key, count in other.items()})
            elif isinstance(other, list):
                mine.extend(other)
            else:
                setattr(whole, field.name, (mine or 0) + other)
    return whole
