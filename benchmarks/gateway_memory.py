"""Memory of an idle connection, speed of a connection storm, and fan-out of one gateway.

The gateway runs alone in a process; coordinator and shard (stand-ins on real links) run in this one, the
clients in a third. Run it from the repository root:

    .venv/bin/python -m benchmarks.gateway_memory [--connections 5000] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from actors.gateway import Gateway
from carillon import server_frames
from carillon.ids import uuid_text
from carillon.messages import Address, Attach, Deliver, Write
from carillon.notification import encode_content, fresh_json
from carillon.token_keys import TokenKeys
from tests.actors.fakes import FakeCoordinator, FakeShard, actor_config
from tests.actors.gateway_kit import SECRET, token, upgrade_request
from tests.support import eventually


def memory_kib(pid: int) -> dict[str, int]:
    """RSS and private memory (USS) of a process in KiB."""
    found = {"rss": 0, "uss": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "Rss":
            found["rss"] = int(rest.split()[0])
        elif name.startswith("Private_"):
            found["uss"] += int(rest.split()[0])
    return found


def cpu_s(pid: int) -> float:
    """CPU seconds a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


# -- the gateway's process ------------------------------------------------------------------------------


async def run_gateway(port: int) -> None:
    """Serve until standard input ends."""
    coordinator = FakeCoordinator()
    coordinator.address = Address("127.0.0.1", port)

    async def read_keys(tenant: str, /, *, refresh: bool = False) -> TokenKeys | None:
        return TokenKeys((SECRET,))

    gateway = Gateway(actor_config("gateway", "gateway-bench", coordinator), read_keys=read_keys)
    await gateway.start()
    print(gateway.url, flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        if line.strip() == "collect":
            gc.collect()
            print("collected", flush=True)
    await gateway.stop()


# -- the clients' process -------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """Counts messages; frames are cut but not parsed."""

    def __init__(self, crowd: Crowd, user: str) -> None:
        self.crowd = crowd
        self.user = user
        self.buffer = b""
        self.open = False

    def connection_made(self, transport: Any) -> None:
        """Ask for the upgrade."""
        transport.write(upgrade_request(f"/ws?token={token(self.user, ttl_s=3600)}"))

    def data_received(self, data: bytes) -> None:
        """Count what came."""
        data = self.buffer + data if self.buffer else data
        at, end = 0, len(data)
        if not self.open:
            at = data.find(b"\r\n\r\n") + 4
            if at < 4:
                self.buffer = data
                return
            assert data.startswith(b"HTTP/1.1 101"), data[:100]
            self.open = True
        count = 0
        while end - at >= 2:
            length, head = data[at + 1], 2
            if length == 126:
                if end - at < 4:
                    break
                length, head = int.from_bytes(data[at + 2 : at + 4], "big"), 4
            if end - at < head + length:
                break
            if data[at] == 0x81:
                count += 1
            assert data[at] != 0x88, data[at : at + 100]
            at += head + length
        self.buffer = data[at:] if at < end else b""
        self.crowd.count(count)


class Crowd:
    """All clients of the process."""

    def __init__(self) -> None:
        self.seen = 0
        self.wanted = 0
        self.reached = asyncio.Event()

    def count(self, frames: int) -> None:
        """Frames came."""
        self.seen += frames
        if self.wanted and self.seen >= self.wanted:
            self.reached.set()

    async def reach(self, wanted: int) -> float:
        """Monotonic time at which `wanted` frames had come in all."""
        self.wanted = wanted
        self.reached.clear()
        self.count(0)
        await self.reached.wait()
        return time.monotonic()


async def run_clients(port: int, count: int) -> None:
    """Connect `count` clients at once, then answer each line (a number of frames) when they have come."""
    loop = asyncio.get_running_loop()
    crowd = Crowd()
    for n in range(count):
        token(f"user-{n}", ttl_s=3600)  # warm
    print(time.monotonic(), flush=True)
    await asyncio.gather(
        *(
            loop.create_connection(lambda n=n: Client(crowd, f"user-{n}"), "127.0.0.1", port)  # type: ignore[misc]
            for n in range(count)
        )
    )
    print(await crowd.reach(count), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(await crowd.reach(int(line)), flush=True)


# -- the rest ------------------------------------------------------------------------------------------


class Bench:
    """Coordinator, shard and what they measure."""

    def __init__(self, connections: int) -> None:
        self.connections = connections
        self.attaches: list[Attach] = []
        self.link: Any = None

    def receive(self, link: Any, message: Any, request: int) -> bool:
        """Greet attachments."""
        if type(message) is not Attach:
            return False
        self.attaches.append(message)
        self.link = link
        frame = server_frames.welcome(
            message.session_id, message.device, "e1", 0, 0, 0, 25_000, None, "2026-01-01T00:00:00.000Z"
        )
        link.send_nowait(Deliver("shard-bench", 1, [Write([message.conn], frame, epoch="e1")]))
        return True

    async def run(self) -> dict[str, Any]:
        """All measurements."""
        coordinator = await FakeCoordinator.start()
        shard = await FakeShard.start(coordinator, "shard-bench")
        shard.answer = self.receive
        coordinator.set_owner(range(1024), "shard-bench")
        me = [sys.executable, "-m", "benchmarks.gateway_memory"]
        gateway = await child(*me, "--role", "gateway", "--port", str(coordinator.address.port))
        port = (await line_of(gateway)).rsplit(":", 1)[1].split("/")[0]
        await eventually(lambda: shard.links)
        await collect(gateway)
        before = memory_kib(gateway.pid)
        cpu_before = cpu_s(gateway.pid)
        clients = await child(
            *me, "--role", "clients", "--port", port, "--connections", str(self.connections)
        )
        started = float(await line_of(clients))
        storm_s = float(await line_of(clients)) - started
        storm_cpu_s = cpu_s(gateway.pid) - cpu_before
        await collect(gateway)
        after = memory_kib(gateway.pid)
        result = {
            "connections": self.connections,
            "gateway_rss_mib_before": round(before["rss"] / 1024, 1),
            "gateway_rss_mib_after": round(after["rss"] / 1024, 1),
            "rss_kib_per_connection": round((after["rss"] - before["rss"]) / self.connections, 2),
            "uss_kib_per_connection": round((after["uss"] - before["uss"]) / self.connections, 2),
            "storm_s": round(storm_s, 2),
            "storm_per_s": round(self.connections / storm_s),
            "storm_gateway_cpu_us": round(storm_cpu_s / self.connections * 1e6),
        }
        seen = self.connections
        for name, rounds, alone in (("fan_out", 20, False), ("single", 10, True)):
            seen, figures = await self.deliver(gateway.pid, clients, seen, rounds, alone)
            result |= {f"{name}_{key}": value for key, value in figures.items()}
        result["gateway_rss_mib_end"] = round(memory_kib(gateway.pid)["rss"] / 1024, 1)
        for process in (clients, gateway):
            process.stdin.close()  # type: ignore[union-attr]
            if process is clients:
                process.terminate()
            await process.wait()
        await shard.stop()
        await coordinator.stop()
        return result

    async def deliver(
        self, pid: int, clients: Any, seen: int, rounds: int, alone: bool
    ) -> tuple[int, dict[str, int]]:
        """Send `rounds` frames to every connection: one write for all, or a write of its own for each."""
        conns = [attach.conn for attach in self.attaches]
        content = encode_content({"type": "comment", "title": "A title", "body": "A body of some length"})
        cpu_before = cpu_s(pid)
        started = time.monotonic()
        wanted = seen + rounds * len(conns)
        clients.stdin.write(f"{wanted}\n".encode())
        for n in range(rounds):
            seq = seen + n
            key = seq.to_bytes(16, "big")
            frame = server_frames.new_notification(fresh_json(key, seq, seq, '"user"', content))
            assert uuid_text(key).encode() in frame
            if alone:
                for at in range(0, len(conns), 200):
                    writes = [Write([conn], frame, seq, seq) for conn in conns[at : at + 200]]
                    await self.send(writes)
            else:
                await self.send([Write(conns, frame, seq, seq)])
        took_s = float(await line_of(clients)) - started
        frames = rounds * len(conns)
        return wanted, {
            "frames_per_s": round(frames / took_s),
            "gateway_cpu_ns_per_frame": round((cpu_s(pid) - cpu_before) / frames * 1e9),
        }

    async def send(self, writes: list[Write]) -> None:
        """Send, but never more than the link takes."""
        while self.link.outbound_bytes() > 1_000_000:
            await asyncio.sleep(0.001)
        self.link.send_nowait(Deliver("shard-bench", 1, writes))
        await asyncio.sleep(0)


async def child(*command: str) -> asyncio.subprocess.Process:
    """Start a process of ours."""
    return await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, limit=2**20
    )


async def line_of(process: asyncio.subprocess.Process) -> str:
    """The next line it prints."""
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), 120)
    if not line:
        raise SystemExit("a process of the benchmark ended early")
    return line.decode().strip()


async def collect(process: asyncio.subprocess.Process) -> None:
    """Make it collect garbage, so that only what is kept is measured."""
    assert process.stdin is not None
    process.stdin.write(b"collect\n")
    await line_of(process)


def main() -> None:
    """Parse arguments and run the role."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--connections", type=int, default=5000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--role", choices=["all", "gateway", "clients"], default="all", help=argparse.SUPPRESS
    )
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if arguments.role == "gateway":
        uvloop.run(run_gateway(arguments.port))
    elif arguments.role == "clients":
        uvloop.run(run_clients(arguments.port, arguments.connections))
    else:
        result = uvloop.run(Bench(arguments.connections).run())
        print(json.dumps(result) if arguments.json else "\n".join(f"{k:32} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
