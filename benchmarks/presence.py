"""C1: what it costs to ask who is there."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final

from benchmarks.bench import Bench, Measurement, Options, Progress, opened
from benchmarks.stats import summary_ms
from benchmarks.storm import one_to_each
from benchmarks.target import Target, TargetError
from benchmarks.wire import http_request, now

WARMUP: Final = 20
"""Queries that are checked and not measured."""
OFFLINE_S: Final = 8.0
"""Longest wait until users whose sockets were lost are offline: grace and the coalescing of the way there."""


async def presence_query(target: Target, options: Options, progress: Progress) -> Measurement:
    """C1: presence of 1,000 users in one request: all online, nobody ever seen, half online."""
    quiet = Options(**{**options.__dict__, "warmup_events": 0, "devices": 1})
    count = options.presence_users
    async with (
        opened(target, quiet, "C1", users=count, connections=2) as bench,
        progress.watch(bench),
    ):
        await one_to_each(bench, options)
        await bench.settle()
        strangers = [f"{user}-stranger" for user in bench.users]
        online = set(bench.users)
        metrics: dict[str, Any] = {"all_online_ms": await _ask(bench, bench.users, online)}
        metrics["never_seen_ms"] = await _ask(bench, strangers, set())
        gone = bench.receivers[::2]
        for receiver in gone:
            receiver.close()
        online -= {receiver.device.user for receiver in gone}
        await _until_offline(bench, online)
        metrics["half_online_ms"] = await _ask(bench, bench.users, online)
        await asyncio.gather(*(receiver.connect() for receiver in gone))
        measurement = await bench.finish(f"presence of {count:,} users over HTTP", metrics)
        for name, found in metrics.items():
            if name.endswith("online_ms") or name == "never_seen_ms":
                what = name.removesuffix("_ms").replace("_", " ")
                measurement.notes.append(
                    f"{what}: p50 {found['p50']:.2f} ms, p99 {found['p99']:.2f} ms, max {found['max']:.1f} "
                    f"ms ({found['n']} queries, one at a time, each answer checked)"
                )
        return measurement


def _request(bench: Bench, users: list[str]) -> bytes:
    body = json.dumps({"userIds": users}, separators=(",", ":")).encode()
    return http_request(bench.door, "POST", "/v1/presence/query", body, bench.target.api_key)


async def _statuses(bench: Bench, request: bytes) -> tuple[float, dict[str, str]]:
    """Seconds to the answer's last byte, and status by user."""
    sent = now()
    response = await bench.connections[0].request(request)
    if response.status != 200:
        raise TargetError(f"a presence query was answered {response.status}: {response.body[:200]!r}")
    return response.at - sent, {one["userId"]: one["status"] for one in response.json()["users"]}


async def _ask(bench: Bench, users: list[str], online: set[str]) -> dict[str, float]:
    """Ask again and again, one query at a time; every answer must be right."""
    request = _request(bench, users)
    expected = {user: "active" if user in online else "offline" for user in users}
    took: list[float] = []
    for number in range(WARMUP + bench.options.presence_queries):
        seconds, found = await _statuses(bench, request)
        if found != expected:
            wrong = sum(found.get(user) != status for user, status in expected.items())
            raise TargetError(f"a presence query was wrong for {wrong} of {len(users)} users")
        if number >= WARMUP:
            took.append(seconds)
    return summary_ms(took)


async def _until_offline(bench: Bench, online: set[str]) -> None:
    request, deadline = _request(bench, bench.users), now() + OFFLINE_S
    while True:
        _, found = await _statuses(bench, request)
        if {user for user, status in found.items() if status != "offline"} == online:
            return
        if now() > deadline:
            raise TargetError(f"users without sockets are not offline after {OFFLINE_S:g} s")
        await asyncio.sleep(0.1)
