"""Measure one ASGI app of benchmarks/asgi/apps.py under uvicorn + httptools + uvloop ("door": serve/door.py).

    python -m benchmarks.asgi.measure raw [--seconds 5] [--connections 64]

Prints requests per second of wall time, per second of the server's CPU time (what one core would serve: on a
machine shared with others the more telling figure), and the latency as the client saw it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

BODY = (
    b'{"userId":"user-1234","type":"comment.reply","title":"Ann replied to you","body":"I think that this is '
    b'a fine idea, let us do it then","data":{"threadId":"t-42","n":5},"link":"https://example.com/t/42",'
    b'"priority":"high"}'
)
REQUEST = (
    b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n"
    b"Content-Type: application/json\r\nX-Request-Id: r-1\r\nContent-Length: %d\r\n\r\n"
)
KEY = b"crl_0123456789ab_" + b"0" * 48


class Client(asyncio.Protocol):
    """One keep-alive connection: the next request leaves when the answer came."""

    def __init__(self, request: bytes, times: list[float]) -> None:
        self._request, self._times, self._buffer, self._sent = request, times, b"", 0.0
        self.stop, self.bad = False, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """First request."""
        self._transport = transport
        self._next()

    def _next(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        """Answers are short and have a Content-Length."""
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._buffer[:end].lower()
        at = head.find(b"content-length: ") + 16
        size = int(head[at:].split(b"\r\n", 1)[0])
        if len(self._buffer) < end + 4 + size:
            return
        if not head.startswith(b"http/1.1 202"):
            self.bad += 1
        self._buffer = self._buffer[end + 4 + size :]
        self._times.append(time.perf_counter() - self._sent)
        if not self.stop:
            self._next()


async def load(port: int, seconds: float, connections: int, key: bytes) -> tuple[list[float], int]:
    """Drive the server; returns latencies in seconds and the number of answers other than 202."""
    request = REQUEST % (key, len(BODY)) + BODY
    loop, times = asyncio.get_running_loop(), []
    clients = []
    for _ in range(connections):
        _, client = await loop.create_connection(lambda: Client(request, times), "127.0.0.1", port)
        clients.append(client)
    await asyncio.sleep(seconds)
    for client in clients:
        client.stop = True
    await asyncio.sleep(0.2)
    return times, sum(client.bad for client in clients)


def cpu_s(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(app: str, python: str, seconds: float, connections: int) -> str:
    """Serve `app` in a process of its own and drive it; returns one line of figures."""
    import uvloop

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    factory = [] if app == "raw" else ["--factory"]
    command = (
        ["benchmarks.asgi.door", str(port)]
        if app == "door"
        else ["uvicorn", f"benchmarks.asgi.apps:{app}", *factory, "--port", str(port), "--loop", "uvloop",
              "--http", "httptools", "--no-access-log", "--log-level", "warning", "--lifespan", "off",
              "--no-server-header", "--no-date-header", "--no-proxy-headers"]
    )  # fmt: skip
    server = subprocess.Popen([python, "-m", *command])
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                time.sleep(0.05)
        uvloop.run(load(port, 1.0, connections, KEY))  # warm-up
        before = cpu_s(server.pid)
        times, bad = uvloop.run(load(port, seconds, connections, KEY))
        used = cpu_s(server.pid) - before
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(10)
    times.sort()
    return (
        f"{app:22} {len(times) / seconds:8.0f}/s wall  {len(times) / used:8.0f}/s per CPU second  "
        f"p50 {times[len(times) // 2] * 1e3:.2f} ms  p99 {times[int(len(times) * 0.99)] * 1e3:.2f} ms  "
        f"bad {bad}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("apps", nargs="+")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--python", default=sys.executable)
    arguments = parser.parse_args()
    for name in arguments.apps:
        print(measure(name, arguments.python, arguments.seconds, arguments.connections), flush=True)
