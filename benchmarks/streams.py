"""What event streams cost, and how late each transport is: memory, idle CPU, event to client.

Ingress, router, shard and gateway run in this process, PostgreSQL and the clients in others. Run it from the
repository root:

    .venv/bin/python -m benchmarks.streams [--streams 4000] [--events 300] [--idle 30]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import asyncpg
import uvloop

from cluster.embedded import EmbeddedPostgres
from stores.postgres.migrate import migrate
from tests.integration.transports_world import Transports


def rss_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def hold_streams(url: str) -> None:
    """The clients' process: a stream for every token on standard input, until that ends."""
    host, port = url.removeprefix("http://").split(":")
    loop = asyncio.get_running_loop()
    held: list[asyncio.StreamWriter] = []
    gate = asyncio.Semaphore(100)

    async def hold(token: str) -> None:
        async with gate:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET /api/stream?token={token} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await reader.readuntil(b'"type":"WELCOME"')
            held.append(writer)

    tokens: list[str] = []
    while (line := (await loop.run_in_executor(None, sys.stdin.readline)).strip()) != "go":
        tokens.append(line)
    await asyncio.gather(*map(hold, tokens))
    print(len(held), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


async def memory(world: Transports, streams: int, idle_s: float) -> None:
    """Open `streams` streams of as many users, then watch them do nothing."""
    clients = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.streams", "--hold", world.ingress.url),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert clients.stdin is not None
    assert clients.stdout is not None
    for number in range(streams):
        clients.stdin.write(f"{world.token(f'user-{number}')}\n".encode())
    await clients.stdin.drain()
    gc.collect()
    before = rss_bytes()
    began = time.monotonic()
    clients.stdin.write(b"go\n")
    held = int(await asyncio.wait_for(clients.stdout.readline(), 300))
    took = time.monotonic() - began
    gc.collect()
    print(f"{held} streams in {took:.1f} s; {(rss_bytes() - before) / held:.0f} bytes of RSS each,"
          " session and user of the shard included")  # fmt: skip
    cpu = time.process_time()
    await asyncio.sleep(idle_s)
    print(f"idle: {(time.process_time() - cpu) / idle_s:.1%} of a core, heart-beats included")
    clients.stdin.close()
    await clients.wait()


async def latency(world: Transports, events: int) -> None:
    """From before POST /v1/events to the frame, one event at a time, at a user with all three transports."""
    user = "reader"
    socket, stream = await world.socket(user), await world.stream(user)
    await stream.frame()
    page = (await world.call("GET", "/api/sync?since=0&rev=0", user)).json()
    times: dict[str, list[float]] = {"WebSocket": [], "stream": [], "long poll": []}
    for number in range(events):
        path = (
            f"/api/sync?epoch={page['epoch']}&since={page['lastSeq']}&rev={page['rev']}&waitS=30&deviceId=p"
        )
        poll = asyncio.ensure_future(world.call("GET", path, user))
        while len(world.ingress.connections) < 2:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        readers = [asyncio.ensure_future(socket.recv()), asyncio.ensure_future(stream.frame()), poll]
        began = time.perf_counter()
        for name, reader in zip(times, readers, strict=True):
            reader.add_done_callback(
                lambda _, name=name, began=began: times[name].append((time.perf_counter() - began) * 1000)
            )
        await world.send(f"n{number}", user)
        await asyncio.gather(*readers)
        page = poll.result().json()
    for name, found in times.items():
        found.sort()
        p50, p99 = found[len(found) // 2], found[int(len(found) * 0.99)]
        print(f"{name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms")


async def run(dsn: str, arguments: argparse.Namespace) -> None:
    """Both measurements, a world each."""
    admin = await asyncpg.connect(dsn)
    for name in ("memory", "latency"):
        await admin.execute(f"create database {name}")
    await admin.close()
    base = dsn.rsplit("/", 1)[0]
    await migrate(f"{base}/memory")
    await migrate(f"{base}/latency")
    if arguments.streams:
        async with Transports(
            f"{base}/memory", gateway={"heartbeat_s": 25.0}, ingress={"max_streams": 100_000}
        ) as world:
            await memory(world, arguments.streams, arguments.idle)
    if arguments.events:
        async with Transports(f"{base}/latency") as world:
            await latency(world, arguments.events)


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=4000)
    parser.add_argument("--events", type=int, default=300)
    parser.add_argument("--idle", type=float, default=30.0, help="seconds")
    parser.add_argument("--hold", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if arguments.hold:
        uvloop.run(hold_streams(arguments.hold))
        return
    with tempfile.TemporaryDirectory(prefix="carillon-bench-") as folder:
        Path(folder).chmod(0o711)
        with EmbeddedPostgres(Path(folder) / "postgres", fast=True) as server:
            uvloop.run(run(server.dsn, arguments))


if __name__ == "__main__":
    main()
