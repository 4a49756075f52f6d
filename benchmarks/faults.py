"""S8 and S9: what the loss of sockets, of a gateway and of a shard costs. They kill processes."""

from __future__ import annotations

import asyncio
import os
import signal
from itertools import pairwise
from typing import Any, Final

import asyncpg

from benchmarks.bench import Bench, Measurement, Options, Progress, opened
from benchmarks.procs import snapshot
from benchmarks.stats import summary_ms
from benchmarks.storm import one_to_each
from benchmarks.target import Target, TargetError
from benchmarks.wire import now
from carillon.ids import slot_of

RESUME_LIMIT_S: Final = 60.0
"""S8: longest wait for the last client to be back."""
STATISTICS_S: Final = 2.0
"""PostgreSQL's sessions report what they did at most a second later, or when they are idle."""
REST_S: Final = 3.0
"""S8: so long the system is left alone, to know what it asks of PostgreSQL without reconnects."""
RECOVERY_S: Final = 10.0
"""S9: events that were due so long after the kill count as sent during it, at most."""


async def reconnects(target: Target, options: Options, progress: Progress) -> Measurement:
    """S8: 5,000 clients are dropped at once, then their gateway is killed; all come back and resume."""
    if not target.postgres_dsn:
        raise TargetError("S8 counts PostgreSQL's transactions and needs postgresDsn in dev.json")
    quiet = Options(**{**options.__dict__, "warmup_events": 0, "devices": 1})
    async with (
        opened(target, quiet, "S8", users=options.storm_connections, connections=2) as bench,
        progress.watch(bench),
    ):
        await one_to_each(bench, options)
        await bench.settle()
        await asyncio.sleep(1.0)  # the last acknowledgements are written
        at_rest = await _transactions_in(target.postgres_dsn, REST_S)
        dropped = await _comes_back(bench, target.postgres_dsn, at_rest, lambda: _drop(bench))
        killed = await _comes_back(bench, target.postgres_dsn, at_rest, lambda: _kill(target, "GatewayActor"))
        await one_to_each(bench, options)
        measurement = await bench.finish(
            f"{options.storm_connections:,} clients dropped at once, twice",
            {"clients_dropped": dropped, "gateway_killed": killed},
        )
        for name, part in (("clients dropped", dropped), ("gateway killed", killed)):
            measurement.notes.append(
                f"{name}: all resumed after {part['all_resumed_s']:.2f} s, half after "
                f"{part['resumed_ms']['p50'] / 1000:.2f} s; {part['transactions_per_reconnect']:.4f} "
                f"transactions of PostgreSQL per reconnect"
            )
        return measurement


def _drop(bench: Bench) -> None:
    for receiver in bench.receivers:
        receiver.drop()


def _kill(target: Target, actor: str) -> None:
    group = f"ray::{actor}"
    found = sorted(p.pid for p in snapshot(target.pids, exclude={os.getpid()}).values() if p.group == group)
    if not found:
        raise TargetError(f"no process {group} was found")
    os.kill(found[0], signal.SIGKILL)


async def _comes_back(bench: Bench, dsn: str, at_rest: float, drop: Any) -> dict[str, Any]:
    """Drop, wait until every client has its WELCOME, and count what that asked of PostgreSQL."""
    before = await _transactions(dsn)
    began = now()
    drop()
    while not all(receiver.welcome_at > began for receiver in bench.receivers):
        if now() - began > RESUME_LIMIT_S:
            away = sum(receiver.welcome_at <= began for receiver in bench.receivers)
            raise TargetError(f"{away} clients are not back after {RESUME_LIMIT_S:g} s")
        await asyncio.sleep(0.02)
    waits = [receiver.welcome_at - began for receiver in bench.receivers]
    await asyncio.sleep(STATISTICS_S)
    seconds = now() - began
    asked = await _transactions(dsn) - before - at_rest * seconds
    # How they spread: the fullest tenth of a second against an even spread over the whole time.
    tenths = [0] * (int(max(waits) * 10) + 1)
    for wait in waits:
        tenths[int(wait * 10)] += 1
    return {
        "all_resumed_s": max(waits),
        "resumed_ms": summary_ms(waits),
        "transactions_per_reconnect": max(0.0, asked) / len(waits),
        "most_in_100_ms": max(tenths),
    }


async def _transactions(dsn: str) -> int:
    """Transactions of this database so far; a statement outside of a block is one."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("select pg_stat_clear_snapshot()")
        return await connection.fetchval(
            "select xact_commit + xact_rollback from pg_stat_database where datname = current_database()"
        )
    finally:
        await connection.close()


async def _transactions_in(dsn: str, seconds: float) -> float:
    """Transactions per second of a system that is left alone."""
    before, began = await _transactions(dsn), now()
    await asyncio.sleep(seconds)
    return (await _transactions(dsn) - before) / (now() - began)


# ---------------------------------------------------------------------------------------------------
# S9


async def shard_killed(target: Target, options: Options, progress: Progress) -> Measurement:
    """S9: a shard is killed under 500 events/s; the pause of its users, and what others notice."""
    from benchmarks.scenarios import open_loop

    if not target.postgres_dsn:
        raise TargetError("S9 reads from PostgreSQL which shard was killed and needs postgresDsn in dev.json")
    # An event that waits for a shard holds its connection: with few, others would wait behind it.
    connections = round(options.rate_per_s * 3)
    async with (
        opened(target, options, "S9", users=options.users, connections=connections) as bench,
        progress.watch(bench),
    ):
        before = await _shards(target.postgres_dsn)
        at = now() + options.duration_s / 2
        killed_at = 0.0

        async def kill() -> None:
            nonlocal killed_at
            await asyncio.sleep(max(0.0, at - now()))
            killed_at = now()
            _kill(target, "ShardActor")

        killing = asyncio.get_running_loop().create_task(kill())
        metrics = await open_loop(bench, options.duration_s * 1.5)
        await killing
        await bench.settle()
        after = await _shards(target.postgres_dsn)
        lost = {name for name, (incarnation, _) in after.items() if before[name][0] != incarnation}
        slots = {slot for name in lost for slot in before[name][1]}
        metrics |= parted(bench, target.tenant, slots, killed_at)
        measurement = await bench.finish(
            f"a shard killed at {options.rate_per_s:g} events/s", {**bench.rate(), **metrics}
        )
        measurement.notes.append(
            f"its users: {metrics['pause_s']:.2f} s without a delivery; the others: p99 "
            f"{metrics['others_before_ms']['p99']:.1f} ms before the kill, "
            f"{metrics['others_during_ms']['p99']:.1f} ms in the {metrics['pause_s']:.2f} s after it"
        )
        return measurement


def parted(bench: Bench, tenant: str, slots: set[int], killed_at: float) -> dict[str, Any]:
    """Latencies of the killed shard's users and of the others, before and after the kill."""
    mine: list[tuple[float, float]] = []
    others: list[tuple[float, float]] = []
    for receiver in bench.receivers:
        part = mine if slot_of(tenant, receiver.device.user) in slots else others
        for at, notification, _ in receiver.device.receipts:
            entry = bench.ledger.accepted.get(notification)
            if entry is not None and entry.measured:
                part.append((entry.intended_s, at))
    if not mine or not others:
        raise TargetError("the killed shard had none of the users, or all of them: use more shards and users")
    times = sorted(at for _, at in mine)
    pauses = [(b - a, b) for a, b in pairwise(times) if b > killed_at and a < killed_at + RECOVERY_S]
    pause_s, resumed_at = max(pauses, default=(0.0, killed_at))
    return {
        "pause_s": pause_s,
        "resumed_s": resumed_at - killed_at,
        "killed_ms": summary_ms([at - due for due, at in mine if killed_at <= due]),
        "others_before_ms": summary_ms([at - due for due, at in others if due < killed_at]),
        "others_during_ms": summary_ms([at - due for due, at in others if killed_at <= due < resumed_at]),
        "others_after_ms": summary_ms([at - due for due, at in others if due >= resumed_at]),
    }


async def _shards(dsn: str) -> dict[str, tuple[str, list[int]]]:
    """(incarnation, slots) by shard."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(
            "select shard, incarnation, array_agg(slot) as slots"
            " from shards join slots using (shard) group by shard"
        )
        return {row["shard"]: (row["incarnation"], row["slots"]) for row in rows}
    finally:
        await connection.close()
