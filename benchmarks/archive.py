"""What live traffic notices of the archive's run: latency of single events before it and during it.

`python -m benchmarks.archive [ROWS] [RATE] [SECONDS]`: a month of ROWS old notifications, nine of ten read,
a third with a push, of the same thousand users for whom a shard then stores RATE events a second, one
request each. The run is a process of its own (`python -m cluster archive run`), with its default pauses and
then without any. Starts its own PostgreSQL, fsync on; figures are in docs/adr/0014.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from actors.config import ActorConfig
from actors.link import dial
from actors.shard import Shard
from benchmarks.micro_shard import _Client, make
from carillon.messages import Publish
from carillon.retention import month_at
from carillon.settings import Settings
from cluster.embedded import EmbeddedPostgres
from cluster.ray_env import ROOT
from stores.postgres.migrate import migrate
from stores.postgres.pool import connect
from tests.actors.fakes import SECRET, FakeCoordinator

USERS = [f"user{n}" for n in range(1000)]


async def fill(db: Any, rows: int, back: int) -> None:
    """An old month of so many rows."""
    month = month_at(time.time_ns() // 1_000_000).plus(-back)
    name = f"notifications_{month.year:04d}_{month.month:02d}"
    await db.execute(f"create table {name} (like notifications including all) with (fillfactor = 50)")
    await db.execute(
        f"alter table notifications attach partition {name}"
        f" for values from ('{month.low}') to ('{month.high}')"
    )
    await db.execute(
        f"insert into {name} (id, stream_id, seq, rev, position, changed, priority, type, content,"  # noqa: S608
        " created_at, read_at, receipt)"
        " select (lpad(to_hex($1::bigint + n), 12, '0') || '7000800000000000'"
        " || lpad(to_hex(n % 4096), 4, '0'))::uuid,"
        " s.stream_id, n, n, n, true, 1, 'bench', $2, to_timestamp($1 / 1000.0),"
        " case when n % 10 > 0 then to_timestamp($1 / 1000.0) end, 3"
        " from generate_series(1, $3::int) n join streams s on s.user_id = 'user' || n % 1000",
        month.start_ms, make("x").content, rows,
    )  # fmt: skip
    await db.execute(
        "insert into deliveries (notification_id, stream_id, slot, channel, state, due_at, created_at,"  # noqa: S608
        " updated_at) select id, stream_id, 1, 'push', 'sent', created_at, created_at, created_at"
        f" from {name} where seq % 3 = 0"
    )
    await db.execute(
        "insert into delivery_attempts (delivery_id, attempt, device_id, provider, outcome, started_at,"
        " duration_ms) select id, 1, 'd', 'fcm', 'sent', created_at, 20 from deliveries where state = 'sent'"
        " on conflict do nothing"
    )
    await db.execute("vacuum analyze")


async def measure(dsn: str, folder: Path, rows: int, rate: float, seconds: float) -> None:
    """Before, during, during without pauses."""
    settings = Settings().with_values(postgres={"dsn": dsn}, cluster={"runtime_dir": str(folder)})
    coordinator = await FakeCoordinator.start(settings)
    db = await connect(dsn)
    await db.execute("insert into shards (shard, term, node, incarnation) values ('shard-a', 1, 'n', 'i')")
    shard = Shard(ActorConfig("shard", "shard-a", "local", settings, SECRET, {}, coordinator.address))
    await shard.start()
    coordinator.set_owner(range(1024), "shard-a")
    await asyncio.sleep(0.2)
    address = coordinator.joined["shard-a"].address
    link = await dial(address, _Client(), settings.link, "router-1", SECRET)  # type: ignore[arg-type]
    await link.request(Publish([make(user) for user in USERS]))

    async def load(name: str, until: asyncio.Event) -> None:
        times: list[float] = []
        waiting: set[asyncio.Task[None]] = set()

        async def one(number: int) -> None:
            began = time.perf_counter()
            await link.request(Publish([make(USERS[number * 37 % 1000])]))
            times.append((time.perf_counter() - began) * 1000)

        began = time.perf_counter()
        number = 0
        while not until.is_set():
            number += 1
            waiting.add(task := asyncio.create_task(one(number)))
            task.add_done_callback(waiting.discard)
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
        await asyncio.gather(*waiting)
        times.sort()
        n = len(times)
        print(
            f"{name}: {n / (time.perf_counter() - began):,.0f} events/s, p50 {times[n // 2]:.2f} ms,"
            f" p99 {times[n * 99 // 100]:.2f}, p99.9 {times[n * 999 // 1000]:.2f}, longest {times[-1]:.0f}",
            flush=True,
        )

    async def alone(name: str) -> None:
        until = asyncio.Event()
        asyncio.get_running_loop().call_later(seconds, until.set)
        await load(name, until)

    await alone("warm")
    environ = os.environ | {"CARILLON_POSTGRES_DSN": dsn, "CARILLON_ARCHIVE_ROOT": str(folder / "archive")}
    for back, (name, more) in enumerate(
        {"default pauses": {}, "no pauses": {"CARILLON_ARCHIVE_PAUSE_S": "0"}}.items(), 5
    ):
        await fill(db, rows, back)
        await alone("without a run")
        until = asyncio.Event()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cluster", "archive", "run", env=environ | more, cwd=ROOT
        )
        began = time.perf_counter()
        loading = asyncio.create_task(load(f"during a run with {name}", until))
        await process.wait()
        took = time.perf_counter() - began
        until.set()
        await loading
        print(f"the run took {took:.1f} s: {rows * 0.9 / took:,.0f} notifications/s", flush=True)
    files = list((folder / "archive").rglob("*.zst"))
    size = sum(one.stat().st_size for one in files)
    print(f"{len(files)} parts, {size / (rows * 1.8):,.0f} bytes for each notification", flush=True)
    link.close()
    await shard.stop()
    await coordinator.stop()
    await db.close()


def main() -> None:
    """Start PostgreSQL, measure, stop."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    rate = float(sys.argv[2]) if len(sys.argv) > 2 else 500.0
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 10.0
    folder = Path(tempfile.mkdtemp(prefix="carillon-bench-"))
    folder.chmod(0o711)
    with EmbeddedPostgres(folder / "pg") as server:
        asyncio.run(migrate(server.dsn))
        uvloop.run(measure(server.dsn, folder, rows, rate, seconds))


if __name__ == "__main__":
    main()
