"""Figures of the data plane alone: `python -m benchmarks.micro_link --loop uvloop --what link,router`.

Both ends run in one process and share one core, so a figure is the sum of what both ends cost; with an
actor at each end the same work is spread over two. Prints one line per measurement.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import tempfile
import time
from typing import Any

import uvloop

from actors.link import Link, LinkServer, dial
from actors.router import Router
from carillon.messages import Address, Done, Event, Outcome, Outcomes, Publish
from carillon.settings import LinkSettings
from tests.actors.fakes import FakeCoordinator, FakeShard, actor_config

SECRET = os.urandom(32)
CONTENT = '"type":"chat.message","title":"You have a message","body":"' + "x" * 200 + '","data":{"a":1}'


def make_event(number: int) -> Event:
    """An event of ordinary size (about 350 bytes encoded)."""
    return Event(
        number.to_bytes(16, "big"), "tenant", f"user-{number % 5000}", number % 1024, "chat.message", None, 1,
        CONTENT, 1_700_000_000_000,
    )  # fmt: skip


class Echo:
    """Answers a Publish with one outcome per event, anything else with Done."""

    def link_opened(self, link: Link) -> None:
        """Nothing."""

    def link_closed(self, link: Link) -> None:
        """Nothing."""

    def receive(self, link: Link, message: Any, request: int) -> None:
        """Answer at once."""
        if type(message) is Publish:
            channels = ["in_app"]
            link.reply_nowait(
                request, Outcomes([Outcome(e.id, 1, "delivered", channels) for e in message.events])
            )
        else:
            link.reply_nowait(request, Done())

    def read_finished(self, link: Link) -> None:
        """Nothing."""


async def rate(link: Link, make: Any, workers: int, seconds: float) -> tuple[float, float, float]:
    """Closed loop of `workers`: (requests per second, p50 ms, p99 ms)."""
    latencies: list[float] = []
    stop_at = time.perf_counter() + seconds

    async def work() -> None:
        while True:
            started = time.perf_counter()
            if started > stop_at:
                return
            await link.request(make(), 10.0)
            latencies.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(workers)))
    took = time.perf_counter() - started
    latencies.sort()
    return (
        len(latencies) / took,
        latencies[len(latencies) // 2] * 1000,
        latencies[int(len(latencies) * 0.99)] * 1000,
    )


async def measure_link(seconds: float) -> None:
    """Requests over a Unix socket, both ends here."""
    settings = LinkSettings()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/link.sock"
        server = LinkServer(Echo(), settings, "server", SECRET)
        host, port = await server.start("127.0.0.1", 0, path)
        for name, address in (("unix", Address(host, port, path, "m")), ("tcp", Address(host, port))):
            link = await dial(address, Echo(), settings, "client", SECRET, "m")
            small, event = Done(), Publish([make_event(1)])
            batch = Publish([make_event(n) for n in range(100)])
            for what, message, workers, per in (
                ("small", small, 1, 1),
                ("small", small, 64, 1),
                ("small", small, 1000, 1),
                ("event", event, 64, 1),
                ("100 events", batch, 16, 100),
            ):
                per_s, p50, p99 = await rate(link, lambda m=message: m, workers, seconds)
                extra = f" = {per_s * per:,.0f} events/s" if per > 1 else ""
                print(
                    f"link {name:4} {what:10} x{workers:<5} {per_s:>9,.0f}/s{extra}"
                    f"  p50 {p50:.3f} ms  p99 {p99:.3f} ms"
                )
            link.close()
        await server.close()


async def measure_router(seconds: float) -> None:
    """Events through a router to two shards that answer at once; ingress, router and shards share a core."""
    coordinator = await FakeCoordinator.start()
    shards = [await FakeShard.start(coordinator, f"shard-{n}") for n in range(2)]
    for shard in shards:
        shard.answer = _answer
    coordinator.spread()
    router = Router(actor_config("router", "router-1", coordinator))
    await router.start()
    while not all(shard["open"] for shard in (await router.status())["shards"].values()):
        await asyncio.sleep(0.01)
    link = await dial(
        router.membership.member.address, Echo(), coordinator.settings.link, "ingress", coordinator.secret,
        router.membership.machine,
    )  # fmt: skip
    numbers = itertools.count()
    for what, size, workers in (
        ("1 event", 1, 1),
        ("1 event", 1, 64),
        ("1 event", 1, 1000),
        ("100 events", 100, 16),
    ):
        messages = [Publish([make_event(n * size + k) for k in range(size)]) for n in range(256)]
        per_s, p50, p99 = await rate(link, lambda m=messages: m[next(numbers) % 256], workers, seconds)
        print(
            f"router {what:10} x{workers:<5} {per_s * size:>9,.0f} events/s"
            f"  p50 {p50:.3f} ms  p99 {p99:.3f} ms"
        )
    link.close()
    await router.stop()
    for shard in shards:
        await shard.stop()
    await coordinator.stop()


def _answer(link: Link, message: Any, request: int) -> bool:
    channels = ["in_app"]
    link.reply_nowait(request, Outcomes([Outcome(e.id, 1, "delivered", channels) for e in message.events]))
    return True


async def run(what: list[str], seconds: float) -> None:
    """Run the chosen measurements."""
    if "link" in what:
        await measure_link(seconds)
    if "router" in what:
        await measure_router(seconds)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--what", default="link,router")
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    factory = uvloop.new_event_loop if options.loop == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(run(options.what.split(","), options.seconds))


if __name__ == "__main__":
    main()
