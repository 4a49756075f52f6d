"""S8 and S9: what the loss of sockets, of a gateway and of a shard costs. They kill processes."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import asyncpg

from benchmarks.bench import Bench, Measurement, Options, Progress, opened
from benchmarks.procs import snapshot
from benchmarks.stats import percentile, summary_ms
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
"""S9: a pause that begins so long after a kill is none of its doing."""
SETTLED_S: Final = 3.0
"""S9: goal for the end of the pause. So long from a kill, and as long before it, others are looked at."""


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
    os.kill(_oldest(target, actor), signal.SIGKILL)


def _oldest(target: Target, actor: str) -> int:
    """Pid of the first process of a kind. Takes some 50 ms, in which the load generator does nothing else."""
    group = f"ray::{actor}"
    found = sorted(p.pid for p in snapshot(target.pids, exclude={os.getpid()}).values() if p.group == group)
    if not found:
        raise TargetError(f"no process {group} was found")
    return found[0]


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


@dataclass(frozen=True)
class Kill:
    """One shard that was killed. Times are of the load generator's clock."""

    at: float
    slots: frozenset[int]
    """What it owned."""


async def shard_killed(target: Target, options: Options, progress: Progress) -> Measurement:
    """S9: shards are killed in turn under 500 events/s; the pause of their users, and what others notice."""
    from benchmarks.scenarios import open_loop

    if not target.postgres_dsn:
        raise TargetError("S9 reads from PostgreSQL which shard was killed and needs postgresDsn in dev.json")
    # An event that waits for a shard holds its connection: with few, others would wait behind it.
    connections = round(options.rate_per_s * 3)
    every_s = max(options.kill_every_s, 2 * SETTLED_S + 1.0)
    async with (
        opened(target, options, "S9", users=options.users, connections=connections) as bench,
        progress.watch(bench),
    ):
        kills: list[Kill] = []

        async def kill_in_turn() -> None:
            known = await _shards(target.postgres_dsn)
            at = now() + 2 * SETTLED_S
            for _ in range(options.kills):
                # Looked up outside of the time that is looked at. The oldest, so each time another shard's.
                victim = _oldest(target, "ShardActor")
                await asyncio.sleep(max(0.0, at - now()))
                killed_at = now()
                os.kill(victim, signal.SIGKILL)
                await asyncio.sleep(SETTLED_S + 0.2)
                before, known = known, await _shards(target.postgres_dsn)
                lost = {name for name, (incarnation, _) in known.items() if before[name][0] != incarnation}
                kills.append(Kill(killed_at, frozenset(slot for name in lost for slot in before[name][1])))
                at += every_s

        killing = asyncio.get_running_loop().create_task(kill_in_turn())
        metrics = await open_loop(bench, 3 * SETTLED_S + every_s * (options.kills - 1) + 1.0)
        await killing
        await bench.settle()
        metrics |= parted(bench, target.tenant, kills)
        pauses = ", ".join(f"{pause_s:.2f}" for pause_s in metrics.pop("pauses"))
        disturbed, alone = (_spread(metrics.pop(name)) for name in ("ratios", "ratios_alone"))
        measurement = await bench.finish(
            f"{len(kills)} shards killed in turn at {options.rate_per_s:g} events/s",
            {**bench.rate(), **metrics},
        )
        measurement.notes.append(
            f"its users: {pauses} s without a delivery; the others: p99 "
            f"{metrics['others_before_ms']['p99']:.1f} ms in as long before the kills, "
            f"{metrics['others_during_ms']['p99']:.1f} ms in the pauses; "
            f"{metrics['others_3s_before_ms']['p99']:.1f} ms in {SETTLED_S:g} s before, "
            f"{metrics['others_3s_ms']['p99']:.1f} ms in {SETTLED_S:g} s from the kills; of one kill these "
            f"are {disturbed} times those, and of {SETTLED_S:g} s and the next without a kill {alone} times"
        )
        return measurement


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "?"


def parted(bench: Bench, tenant: str, kills: Sequence[Kill]) -> dict[str, Any]:
    """The pauses of the killed shards' users, and the others' latencies before and after the kills.

    What is compared is equally long, or the p99 of the longer would stand on more rare moments: the time of
    the pause with as much before it, and `SETTLED_S` from the kill, whatever comes after the pause included,
    with `SETTLED_S` before it. The windows of all kills are put together. An event belongs to a window by the
    time it was due. `ratios` compare the p99 of each kill's `SETTLED_S` with those before it, `ratios_alone`
    those with as long before them: what p99 does from one window to the next while nothing happens.
    """
    received = [
        (slot_of(tenant, receiver.device.user), entry.intended_s, at)
        for receiver in bench.receivers
        for at, notification, _ in receiver.device.receipts
        if (entry := bench.ledger.accepted.get(notification)) is not None and entry.measured
    ]
    pauses: list[float] = []
    resumed: list[float] = []
    killed: list[float] = []
    ratios: list[float] = []
    ratios_alone: list[float] = []
    windows: dict[str, list[float]] = {name: [] for name in ("before", "during", "3s_before", "3s")}
    for kill in kills:
        mine = [(due, at) for slot, due, at in received if slot in kill.slots]
        others = [(due, at) for slot, due, at in received if slot not in kill.slots]
        if not mine or not others:
            raise TargetError(
                "the killed shard had none of the users, or all of them: use more shards and users"
            )
        times = sorted(at for _, at in mine)
        around = [(b - a, b) for a, b in pairwise(times) if b > kill.at and a < kill.at + RECOVERY_S]
        # Only those before the next kill can be this one's doing; a later pause is a later kill's.
        until = min((other.at for other in kills if other.at > kill.at), default=kill.at + RECOVERY_S)
        pause_s, resumed_at = max((gap for gap in around if gap[1] < until), default=(0.0, kill.at))
        pauses.append(pause_s)
        resumed.append(resumed_at - kill.at)
        killed += [at - due for due, at in mine if kill.at <= due < resumed_at]
        for name, seconds in (("", resumed_at - kill.at), ("3s", SETTLED_S)):
            before, after = ("3s_before", "3s") if name else ("before", "during")
            windows[before] += [at - due for due, at in others if kill.at - seconds <= due < kill.at]
            windows[after] += [at - due for due, at in others if kill.at <= due < kill.at + seconds]
        edges = [kill.at + step * SETTLED_S for step in (-2, -1, 0, 1)]
        p99s = [
            percentile(sorted(at - due for due, at in others if since <= due < until), 0.99)
            for since, until in pairwise(edges)
        ]
        ratios_alone.append(p99s[1] / p99s[0])
        ratios.append(p99s[2] / p99s[1])
    return {
        "pause_s": statistics.median(pauses),
        "resumed_s": statistics.median(resumed),
        "pauses": pauses,
        "ratios": ratios,
        "ratios_alone": ratios_alone,
        "others_ratio": statistics.median(ratios),
        "others_ratio_alone": statistics.median(ratios_alone),
        "killed_ms": summary_ms(killed),
        **{f"others_{name}_ms": summary_ms(latencies) for name, latencies in windows.items()},
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
