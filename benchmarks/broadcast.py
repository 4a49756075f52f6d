"""B1: a broadcast to 200,000 users, and what it does to the latency of single events meanwhile."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from typing import Any, Final

import asyncpg

from benchmarks.bench import Bench, Measurement, Options, Progress, opened
from benchmarks.procs import cpu_between, snapshot
from benchmarks.stats import summary_ms
from benchmarks.target import Target, TargetError
from benchmarks.wire import get_json, http_request, now

_LONGEST_S: Final = 180.0
_FILL_SQL: Final = """
with people as (
    select u.name, (crc32(convert_to($1 || ':' || u.name, 'UTF8')) % 1024)::smallint as slot
    from (select $2 || n as name from generate_series(1, $3::int) n) u
), known as (
    insert into streams (tenant, user_id, slot, epoch) select $1, name, slot, 'e1' from people
)
insert into topic_subscribers (tenant, topic, slot, user_id) select $1, $2, slot, name from people
"""
_CHECK_SQL: Final = """
select count(*) filter (where s.seq = $3 and s.rev = $3 and s.unread = $3
                              and $3 = (select count(*) from notifications n where n.stream_id = s.stream_id))
from streams s where s.tenant = $1 and starts_with(s.user_id, $2)
"""
EVENT: Final = {
    "type": "benchmark.broadcast",
    "title": "The doors open at seven",
    "body": "Bring your ticket, and be there a little earlier: there is a bag check.",
    "link": "https://example.com/events/42",
}


class _Sent:
    """One broadcast while it runs."""

    def __init__(self, bench: Bench, topic: str) -> None:
        self.bench = bench
        self.topic = topic
        self.record: dict[str, Any] = {}

    async def send(self) -> None:
        """Start it."""
        body = json.dumps({"audience": {"topic": self.topic}, "event": EVENT}).encode()
        response = await self.bench.connections[0].request(
            http_request(self.bench.door, "POST", "/v1/broadcasts", body, self.bench.target.api_key)
        )
        if response.status != 202:
            raise TargetError(f"POST /v1/broadcasts answered {response.status}: {response.body[:200]!r}")
        self.record = response.json()

    async def wait(self) -> None:
        """Until it is done."""
        path = f"/v1/broadcasts/{self.record['broadcastId']}"
        deadline = now() + _LONGEST_S
        while self.record["state"] != "done":
            if now() > deadline:
                raise TargetError(f"the broadcast was not done in {_LONGEST_S:.0f} s: {self.record}")
            await asyncio.sleep(0.1)
            self.record = await get_json(self.bench.door, path, self.bench.target.api_key)

    def per_s(self) -> float:
        """Users a second from its start to its end."""
        began, ended = (datetime.fromisoformat(self.record[name]) for name in ("startedAt", "endedAt"))
        return self.record["counts"]["stored"] / (ended - began).total_seconds()


async def _paced(bench: Bench, duration_s: float | None, until: asyncio.Task[None] | None) -> dict[str, Any]:
    """Single events at a fixed rate, for a time or until a task ends; their latencies."""
    idle: asyncio.Queue[Any] = asyncio.Queue()
    for connection in bench.connections[1:]:
        idle.put_nowait(connection)
    posts_before, receipts_before = len(bench.post_s), [len(r.device.receipts) for r in bench.receivers]
    tasks: set[asyncio.Task[None]] = set()

    async def send(user: int, intended_s: float) -> None:
        connection = await idle.get()
        try:
            await bench.post(connection, user, intended_s)
        finally:
            idle.put_nowait(connection)

    loop = asyncio.get_running_loop()
    start, number = now() + 0.05, 0
    while (until is None or not until.done()) and (
        duration_s is None or number < duration_s * bench.options.rate_per_s
    ):
        intended_s = start + number / bench.options.rate_per_s
        number += 1
        while (wait_s := intended_s - now()) > 0:
            await asyncio.sleep(wait_s)
        task = loop.create_task(send(bench.rng.randrange(len(bench.users)), intended_s))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    while tasks:
        await asyncio.wait(tasks)
    await bench.settle()
    latencies = [
        at - entry.intended_s
        for receiver, before in zip(bench.receivers, receipts_before, strict=True)
        for at, notification, _ in receiver.device.receipts[before:]
        if (entry := bench.ledger.accepted.get(notification)) is not None
    ]
    return {
        "end_to_end_ms": summary_ms(latencies),
        "post_ms": summary_ms(bench.post_s[posts_before:]),
    }


async def broadcast(target: Target, options: Options, progress: Progress) -> Measurement:
    """B1: a broadcast to 200,000 users beside 500 single events a second; and alone."""
    if target.postgres_dsn is None:
        raise TargetError("B1 needs postgresDsn in dev.json")
    count = options.broadcast_users
    async with (
        opened(target, options, "B1", users=options.users, connections=options.concurrency) as bench,
        progress.watch(bench),
    ):
        topic = f"bench-{options.run}-audience-"
        database: asyncpg.Connection = await asyncpg.connect(target.postgres_dsn, timeout=60)
        try:
            await database.execute(_FILL_SQL, target.tenant, topic, count, timeout=120)
            await database.execute("vacuum analyze streams, topic_subscribers", timeout=120)
            await database.execute("checkpoint", timeout=120)
            await asyncio.sleep(2.0)
            idle = await _paced(bench, options.duration_s * 2, None)
            beside = _Sent(bench, topic)
            await beside.send()
            busy = await _paced(bench, None, asyncio.create_task(beside.wait()))
            await asyncio.sleep(1.0)
            alone = _Sent(bench, topic)
            before = snapshot(target.pids)
            await alone.send()
            await alone.wait()
            spent = cpu_between(before, snapshot(target.pids))
            right = await database.fetchval(_CHECK_SQL, target.tenant, topic, 2, timeout=120)
        finally:
            await database.close()
        per_thousand = {group: cpu * 1000 / count for group, cpu in spent.items()}
        metrics: dict[str, Any] = {
            "users_per_s": beside.per_s(),
            "users_alone_per_s": alone.per_s(),
            "end_to_end_ms": busy["end_to_end_ms"],
            "idle": idle,
            "meanwhile": busy,
            "p99_ratio": busy["end_to_end_ms"]["p99"] / idle["end_to_end_ms"]["p99"],
            "cpu_s_per_1000_users": {"total": sum(per_thousand.values()), **per_thousand},
        }
        measurement = await bench.finish(
            f"{count:,} users beside {options.rate_per_s:g} single events/s", metrics
        )
        if right != count:
            measurement.verdict.wrong = count - right
            measurement.verdict.examples.append(f"{count - right} users without exactly two notifications")
        return measurement
