"""One shard against an embedded PostgreSQL: events/s in batches and one at a time, without HTTP.

`python -m benchmarks.micro_shard` prints figures, for comparing two versions of the shard on one machine.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from actors.config import ActorConfig
from actors.link import dial
from actors.shard import Shard
from carillon.ids import Uuid7Source, slot_of
from carillon.messages import Event, Publish
from carillon.notification import encode_content
from carillon.settings import Settings
from cluster.embedded import EmbeddedPostgres
from stores.postgres.migrate import migrate
from stores.postgres.pool import connect
from tests.actors.fakes import SECRET, FakeCoordinator

IDS = Uuid7Source()
WORDS = [format(n * 2654435761 % 2**32, "x")[: 3 + n % 6] for n in range(2000)]
"""Of the bodies: an index of words is to cost what it costs in life."""


def make(user: str) -> Event:
    """A typical event."""
    now = time.time_ns() // 1_000_000
    content = encode_content(
        {
            "type": "bench",
            "title": "A title of usual length",
            "body": " ".join(WORDS[random.randrange(len(WORDS))] for _ in range(14)),
            "createdAt": "2026-01-01T00:00:00.000Z",
        }
    )
    return Event(IDS.next(now), "t", user, slot_of("t", user), "bench", None, 1, content, now)


class _Client:
    def link_opened(self, link: object) -> None: ...
    def link_closed(self, link: object) -> None: ...
    def receive(self, link: object, message: object, request: int) -> None: ...
    def read_finished(self, link: object) -> None: ...


async def measure(dsn: str, seconds: float) -> None:
    """Run both patterns."""
    settings = Settings().with_values(postgres={"dsn": dsn}, cluster={"runtime_dir": tempfile.mkdtemp()})
    coordinator = await FakeCoordinator.start(settings)
    db = await connect(dsn)
    await db.execute("insert into shards (shard, term, node, incarnation) values ('shard-a', 1, 'n', 'i')")
    shard = Shard(ActorConfig("shard", "shard-a", "local", settings, SECRET, {}, coordinator.address))
    await shard.start()
    coordinator.set_owner(range(1024), "shard-a")
    await asyncio.sleep(0.2)
    address = coordinator.joined["shard-a"].address
    link = await dial(address, _Client(), settings.link, "router-1", SECRET)  # type: ignore[arg-type]
    users = [f"user{n}" for n in range(1000)]
    await link.request(Publish([make(u) for u in users]))

    done = 0
    end = time.perf_counter() + seconds

    async def batches(k: int) -> None:
        nonlocal done
        n = 0
        while time.perf_counter() < end:
            await link.request(Publish([make(users[(k * 37 + n * 200 + i) % 1000]) for i in range(200)]))
            n += 1
            done += 200

    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(batches(k) for k in range(4)))
    wall = time.perf_counter() - wall
    report("batches of 200", done, wall, time.process_time() - cpu)

    done, end = 0, time.perf_counter() + seconds
    times: list[float] = []

    async def singles() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await link.request(Publish([make(users[done % 1000])]))
            done += 1

    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(singles() for _ in range(64)))
    wall = time.perf_counter() - wall
    report("64 singles", done, wall, time.process_time() - cpu)
    for n in range(1000):
        t = time.perf_counter()
        await link.request(Publish([make(users[n])]))
        times.append((time.perf_counter() - t) * 1000)
    print(f"one at a time: p50 {statistics.median(times):.2f} ms, p99 {sorted(times)[990]:.2f} ms")
    link.close()
    await shard.stop()
    await coordinator.stop()
    await db.close()


def report(name: str, done: int, wall_s: float, cpu_s: float) -> None:
    """Print one line of figures."""
    print(f"{name}: {done / wall_s:,.0f} events/s, {cpu_s / done * 1e6:.1f} us CPU each")


def main() -> None:
    """Start PostgreSQL, measure, stop."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 4.0
    folder = Path(tempfile.mkdtemp(prefix="carillon-bench-"))
    folder.chmod(0o711)
    with EmbeddedPostgres(folder / "pg") as server:
        asyncio.run(migrate(server.dsn))
        uvloop.run(measure(server.dsn, seconds))


if __name__ == "__main__":
    main()
