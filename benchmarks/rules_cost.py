"""R1: what rules cost: the same path for users without any and for users with all of them.

Two tenants of one system, in turns. The first has no policy, its users have no preferences. The second has
defaults, forced rules, limits (never reached), rules of the benchmark's type, and of what is alike: its
events are compared by content, other types are counted and gathered. Each of its users has a preferences
document with switches, quiet hours (over for today), a digest and a time zone. Every event has a title of its
own, and nobody has a phone, so that what is sent and what comes of it are the same: every event is delivered.
Which tenant begins changes from turn to turn.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any, Final

from benchmarks.bench import Bench, Measurement, Options, Progress, opened
from benchmarks.outbox_cost import latencies_ms, merged
from benchmarks.target import ROOT, Target, TargetError
from benchmarks.wire import HttpConnection, http_request, now

TURNS: Final = 6
KINDS: Final = ("bare", "ruled")
MOST: Final = {"count": 1000, "windowS": 1}
"""A limit that no user of this benchmark reaches."""


def calm(clock_s: float) -> dict[str, Any]:
    """Quiet hours that are over: one hour, twelve hours from now."""
    start = (int(clock_s // 3600) + 12) % 24
    return {"start": f"{start:02}:00", "end": f"{(start + 1) % 24:02}:00", "timezone": "Europe/Vienna"}


def policy(clock_s: float) -> dict[str, Any]:
    """Every rule a tenant can have, none of which changes what becomes of the benchmark's events."""
    return {
        "defaults": {
            "quietHours": calm(clock_s),
            "channels": {"push": {"enabled": True, "sound": "bell"}, "sms": {"emergencyOnly": True}},
            "categories": {"marketing": False},
        },
        "forced": {"categories": {"security": True}, "types": {"account.locked": True}},
        "limits": {"user": MOST, "types": {"benchmark.event": MOST, "chat.message": MOST}},
        "types": {"benchmark.event": {"whenAwayDelayS": 20, "holdS": 30}, "chat.message": {"holdS": 10}},
        "merge": {
            "benchmark.event": {"how": "drop", "windowS": 60, "renotifyS": 300},
            "chat.message": {"how": "count", "texts": {"default": {"title": "{count} new messages"}}},
            "post.like": {"how": "aggregate", "windowS": 3600},
        },
        "digests": {"template": "digest"},
        "held": {"template": "held"},
    }


def preferences(clock_s: float, user: str) -> dict[str, Any]:
    """A user's document with everything in it; no two are equal."""
    return {
        "channels": {"push": {"enabled": True, "sound": "chime"}, "email": False},
        "categories": {"social": {"channels": {"email": False}, "priority": "high"}, "news": False},
        "types": {
            "benchmark.event": {"channels": {"email": False}},
            **{f"other.{n}": False for n in range(20)},
            f"of.{user}": False,
        },
        "quietHours": calm(clock_s),
        "digest": {"frequency": "daily", "at": "08:00"},
        "timezone": "Europe/Vienna",
    }


async def rules_cost(target: Target, options: Options, progress: Progress) -> Measurement:
    """R1: S1 and S3 with every rule on, against the path without any."""
    ruled_target = await _second_tenant(target, options.run)
    await _put(ruled_target, options, [("/v1/policy", policy(time.time()))])
    single = replace(options, warmup_events=0)
    connections = max(1, options.batch_connections)
    users = min(50, options.users)
    async with (
        opened(target, single, "R1-bare", users=users, connections=connections) as bare,
        opened(ruled_target, single, "R1-ruled", users=users, connections=connections) as ruled,
        progress.watch(ruled),
    ):
        benches = dict(zip(KINDS, (bare, ruled), strict=True))
        at_s = time.time()
        await _put(
            ruled_target,
            options,
            [(f"/v1/users/{user}/preferences", preferences(at_s, user)) for user in ruled.users],
        )
        await _policy_known(ruled)
        for bench in benches.values():
            bench.number_texts()
            bench.options = replace(bench.options, warmup_events=options.warmup_events)
            await bench.warm_up()
        waits: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
        missed = 0
        for turn in range(TURNS):
            for kind in KINDS if turn % 2 else KINDS[::-1]:
                bench = benches[kind]
                late, wait = await _one_by_one(bench, max(1, options.sequential_events // TURNS))
                missed += late
                waits[kind].append(wait)
                rates[kind].append(await _batches(bench, options.duration_s / 2))
        done = [await bench.finish(bench.name, {}) for bench in benches.values()]
    pairs = list(zip(waits["bare"], waits["ruled"], strict=True))
    metrics: dict[str, Any] = {
        kind: {
            "end_to_end_ms": {
                name: statistics.median(one[name] for one in waits[kind]) for name in ("p50", "p99")
            },
            "batch_events_per_s": statistics.median(rates[kind]),
        }
        for kind in KINDS
    }
    metrics["p50_difference_ms"] = statistics.median(mine["p50"] - base["p50"] for base, mine in pairs)
    metrics["batch_throughput_ratio"] = statistics.median(
        mine / base for base, mine in zip(rates["bare"], rates["ruled"], strict=True)
    )
    measurement = Measurement(
        "R1", "every rule on, against the path without", metrics, merged([one.verdict for one in done])
    )
    for kind in KINDS:
        part = metrics[kind]
        measurement.notes.append(
            f"{kind}: one at a time p50 {part['end_to_end_ms']['p50']:.2f} ms, p99 "
            f"{part['end_to_end_ms']['p99']:.2f} ms; batches of {options.batch}: "
            f"{part['batch_events_per_s']:,.0f} events/s (medians of {TURNS} turns)"
        )
    measurement.notes.append(
        f"ruled against bare, medians of the turns: p50 {metrics['p50_difference_ms']:+.2f} ms, batches "
        f"{metrics['batch_throughput_ratio']:.3f}"
    )
    if missed:
        measurement.notes.append(f"{missed} events not received within {options.receipt_timeout_s} s")
    return measurement


async def _second_tenant(target: Target, run: str) -> Target:
    """A tenant of our own beside the demo tenant."""
    if not target.postgres_dsn:
        raise TargetError("R1 needs postgresDsn in dev.json: it makes a second tenant")
    name = f"bench-rules-{run}"
    told = await _cluster("tenant", "create", name, "--dsn", target.postgres_dsn)
    secret = told.partition("client secret ")[2].strip()
    key = (await _cluster("key", "create", name, "--name", "bench", "--dsn", target.postgres_dsn)).strip()
    return replace(target, tenant=name, api_key=key, client_secret=secret)


async def _cluster(*words: str) -> str:
    """What `python -m cluster ...` prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cluster", *words),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, error = await process.communicate()
    if process.returncode:
        raise TargetError(f"{' '.join(words[:3])} failed: {error.decode(errors='replace').strip()[-300:]}")
    return out.decode()


async def _put(target: Target, options: Options, documents: list[tuple[str, dict[str, Any]]]) -> None:
    door = target.http_door(options.door)
    connection = HttpConnection(door, options.request_timeout_s)
    try:
        for path, document in documents:
            response = await connection.request(
                http_request(door, "PUT", path, json.dumps(document).encode(), target.api_key)
            )
            if response.status not in {200, 204}:
                raise TargetError(f"PUT {path} answered {response.status}: {response.body[:200]!r}")
    finally:
        connection.close()


async def _policy_known(bench: Bench, timeout_s: float = 30.0) -> None:
    """Wait until the shards plan by the tenant's policy: until a dry run names a rule of it."""
    body = json.dumps(
        {"userId": bench.users[0], "type": "x", "category": "marketing", "title": "known?"}
    ).encode()
    request = http_request(bench.door, "POST", "/v1/events?dryRun=true", body, bench.target.api_key)
    give_up = now() + timeout_s
    while now() < give_up:
        response = await bench.connections[0].request(request)
        if response.status == 200 and json.loads(response.body)["status"] == "suppressed":
            return
        await asyncio.sleep(0.2)
    raise TargetError(f"the policy is not known after {timeout_s:g} s")


async def _one_by_one(bench: Bench, events: int) -> tuple[int, dict[str, float]]:
    """One turn as S1: how many were late, and latencies in ms."""
    from benchmarks.scenarios import one_by_one

    began = now()
    missed = await one_by_one(bench, events)
    return missed, latencies_ms(bench, began)


async def _batches(bench: Bench, duration_s: float) -> float:
    """One turn as S3: events a second."""
    from benchmarks.scenarios import batch_loop

    started, before = now(), len(bench.ledger.accepted)
    await batch_loop(bench, duration_s)
    seconds = now() - started
    await bench.settle()
    return (len(bench.ledger.accepted) - before) / seconds
