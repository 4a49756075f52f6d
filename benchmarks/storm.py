"""S6, the connection storm: clients in processes of their own, memory per connection of the system.

`python -m benchmarks.storm` is one such process: it reads a plan (one JSON line) from stdin, prints what
happened (JSON lines), and closes when it reads another line. A process may hold 20,000 descriptors here, so a
large storm is split over several.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
from typing import Any, Final

import uvloop

from benchmarks.bench import Bench, Measurement, Options, Progress
from benchmarks.checks import stored
from benchmarks.ledger import Device, judge
from benchmarks.procs import Process, cpu_between, memory_of, snapshot
from benchmarks.stats import summary_ms
from benchmarks.target import ROOT, Target, TargetError
from benchmarks.wire import Door, HttpConnection, Receiver, now

PER_PROCESS: Final = 15_000
"""Connections of one client process; below the usual descriptor limit of 20,000."""
_GROUPS: Final = {"gateway": "gateway", "shard": "shard"}
_LINE_LIMIT: Final = 256 * 1024 * 1024


async def connection_storm(target: Target, options: Options, progress: Progress) -> Measurement:
    """Open all connections at once, wait for every WELCOME, send one event to each user."""
    bench = Bench(target, options, "S6")
    count = options.storm_connections
    prefix = f"bench-{options.run}-s6"
    bench.users = [f"{prefix}-{number}" for number in range(count)]
    bench.connections = [HttpConnection(bench.door, options.request_timeout_s) for _ in range(2)]
    children: list[asyncio.subprocess.Process] = []
    try:
        plans = [bench.users[at : at + PER_PROCESS] for at in range(0, count, PER_PROCESS)]
        for number, users in enumerate(plans):
            children.append(await _child(target, options, number, users))
        before = snapshot(target.pids, exclude={os.getpid()}, memory=True)
        progress.line(f"S6: {count:,} connections at once from {len(children)} processes")
        started = now()
        for child in children:
            _say(child, {"go": True})
        opened = await asyncio.gather(*(_read(child) for child in children))
        welcome_s = max(part["lastWelcome"] for part in opened) - started
        await asyncio.sleep(options.linger_s)
        after = snapshot(target.pids, exclude={os.getpid()}, memory=True)
        connected = sum(part["connected"] for part in opened)
        resting = await _rest(target, options, progress) if options.idle_s else {}
        progress.line(f"S6: {connected:,} have WELCOME after {welcome_s:.1f} s; one event to each")
        await one_to_each(bench, options)
        for child in children:
            _say(child, {"expect": True, "settle": options.settle_s, "linger": options.linger_s})
        closed = await asyncio.gather(*(_read(child) for child in children))
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
        for connection in bench.connections:
            connection.close()
    devices = [
        Device(user, [(at, notification.encode(), seq) for at, notification, seq in receipts])
        for part in closed
        for user, receipts in part["receipts"]
    ]
    rows = await stored(target, bench.door, bench.users) if options.check_stored else None
    verdict = judge(bench.ledger, devices, stored=rows)
    waits = [wait for part in opened for wait in part["waits"]]
    metrics: dict[str, Any] = {
        "all_welcome_s": welcome_s,
        "connections_per_s": connected / welcome_s if welcome_s > 0 else 0.0,
        "welcome_ms": summary_ms(waits),
        "memory_per_connection_kb": memory_per_connection(before, after, connected),
        "end_to_end_ms": summary_ms(bench.ledger.latencies_s(devices)),
    }
    if resting:
        metrics["cores_at_rest"] = resting
    measurement = Measurement("S6", f"connection storm of {count:,}", metrics, verdict)
    if resting:
        measurement.notes.append(
            f"at rest for {options.idle_s:g} s, in cores: "
            + ", ".join(f"{group} {cores:.4f}" for group, cores in resting.items() if cores >= 0.001)
        )
    retries = sum(part["retries"] for part in opened)
    if retries:
        measurement.notes.append(f"{retries} dials were refused or lost and tried again")
    if connected < count:
        # A device without WELCOME received nothing, so the verdict counts its event as lost.
        measurement.notes.append(
            f"{count - connected} connections never got WELCOME: {opened[0]['errors'][:3]}"
        )
    return measurement


async def _rest(target: Target, options: Options, progress: Progress) -> dict[str, float]:
    """Leave the connections alone; cores used by each group of processes meanwhile."""
    progress.line(f"S6: at rest for {options.idle_s:g} s")
    began, before = now(), snapshot(target.pids, exclude={os.getpid()})
    await asyncio.sleep(options.idle_s)
    spent = cpu_between(before, snapshot(target.pids, exclude={os.getpid()}))
    seconds = now() - began
    return {group: cpu_s / seconds for group, cpu_s in spent.items()}


def memory_per_connection(
    before: dict[int, Process], after: dict[int, Process], connections: int
) -> dict[str, dict[str, float]]:
    """Growth of the gateway, of the shards and of all processes, in KiB for each connection."""
    if not connections:
        return {}
    grown = {}
    for name, part in {**_GROUPS, "all": ""}.items():
        start, end = memory_of(before, part), memory_of(after, part)
        grown[name] = {kind: (end[kind] - start[kind]) / 1024 / connections for kind in ("rss", "pss")}
    return grown


async def one_to_each(bench: Bench, options: Options) -> None:
    """Send one event to each user, in batches."""
    batches = [
        range(at, min(at + options.batch, len(bench.users)))
        for at in range(0, len(bench.users), options.batch)
    ]
    todo = iter([(list(users), bench.batch_request(users)) for users in batches])

    async def worker(connection: HttpConnection) -> None:
        for users, request in todo:
            await bench.post_batch(connection, users, request)

    await asyncio.gather(*(worker(connection) for connection in bench.connections))


async def _child(
    target: Target, options: Options, number: int, users: list[str]
) -> asyncio.subprocess.Process:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.storm",
        cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=_LINE_LIMIT,
    )  # fmt: skip
    _say(
        child,
        {
            "wsUrl": target.ws_url,
            "seed": f"{options.seed}:{number}",
            "ack": options.ack_s,
            "timeout": options.storm_timeout_s,
            "users": [[user, target.token(user)] for user in users],
        },
    )
    await _read(child)  # "ready"
    return child


def _say(child: asyncio.subprocess.Process, document: dict[str, Any]) -> None:
    assert child.stdin is not None
    child.stdin.write(json.dumps(document).encode() + b"\n")


async def _read(child: asyncio.subprocess.Process) -> dict[str, Any]:
    assert child.stdout is not None
    line = await child.stdout.readline()
    if not line:
        raise TargetError("a client process of the storm ended early")
    return json.loads(line)


# ---------------------------------------------------------------------------------------------------
# The client process


async def _lines() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=_LINE_LIMIT)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    return reader


async def client_process() -> None:
    """Follow the plan on stdin: open, report, receive, report."""
    lines = await _lines()
    plan = json.loads(await lines.readline())
    rng = random.Random(plan["seed"])
    door = Door.of(plan["wsUrl"])
    receivers = [Receiver(door, user, token, "d0", ack=plan["ack"] > 0) for user, token in plan["users"]]
    first_dial: dict[int, float] = {}
    tasks: set[asyncio.Task[Any]] = set()
    _print({"ready": True})
    await lines.readline()

    def lost(receiver: Receiver) -> None:
        task = asyncio.get_running_loop().create_task(receiver.redial(rng))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def one(receiver: Receiver, deadline: float) -> None:
        first_dial[id(receiver)] = now()
        receiver.on_lost = lost
        try:
            await receiver.connect(timeout_s=deadline - now())
        except (OSError, TimeoutError):
            await receiver.redial(rng, deadline)

    deadline = now() + plan["timeout"]
    await asyncio.gather(*(one(receiver, deadline) for receiver in receivers))
    alive = [receiver for receiver in receivers if receiver.welcome_at]
    _print(
        {
            "connected": len(alive),
            "lastWelcome": max((receiver.welcome_at for receiver in alive), default=now()),
            "waits": [receiver.welcome_at - first_dial[id(receiver)] for receiver in alive],
            "retries": sum(receiver.reconnects for receiver in receivers),
            "errors": [error for receiver in receivers for error in receiver.errors][:10],
        }
    )

    async def acknowledge() -> None:
        while True:
            await asyncio.sleep(plan["ack"])
            for receiver in receivers:
                receiver.acknowledge()

    acks = asyncio.get_running_loop().create_task(acknowledge()) if plan["ack"] > 0 else None
    wish = json.loads(await lines.readline())
    last, since = -1, now()
    while (count := sum(bool(receiver.device.receipts) for receiver in receivers)) < len(alive):
        if count != last:
            last, since = count, now()
        elif now() - since > wish["settle"]:
            break
        await asyncio.sleep(0.05)
    await asyncio.sleep(wish["linger"])
    _print(
        {
            "receipts": [
                [r.device.user, [(at, note.decode(), seq) for at, note, seq in r.device.receipts]]
                for r in receivers
            ]
        }
    )
    for task in [*tasks, *([acks] if acks else [])]:
        task.cancel()
    for receiver in receivers:
        receiver.close()
    await asyncio.sleep(0.5)


def _print(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, contextlib.suppress(KeyboardInterrupt):
        runner.run(client_process())
