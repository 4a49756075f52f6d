"""A broadcast carried out by one shard on an embedded PostgreSQL, without HTTP and without sockets.

`python -m benchmarks.micro_broadcast [users] [chunk_min]` prints figures, for comparing two versions on one
machine: with users who have nothing, and with users who have preferences each.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import asyncpg
import uvloop

from actors.config import ActorConfig
from actors.shard import Shard
from benchmarks.procs import cpu_between, snapshot
from carillon.broadcasts import RUNNING, parse_recipients
from carillon.ids import Uuid7Source, slot_of
from carillon.settings import Settings
from cluster.embedded import EmbeddedPostgres
from stores.postgres.broadcasts import BroadcastStore, NewBroadcast
from stores.postgres.migrate import migrate
from stores.postgres.pool import open_pool
from tests.actors.fakes import SECRET, FakeCoordinator

EVENT = {
    "type": "news",
    "title": "A title of usual length",
    "body": "The quick brown fox jumps over the lazy dog and tells of it at some length, as bodies do.",
    "link": "https://example.com/news/42",
}
PREFERENCES = '{"types": {"other": false}, "quietHours": {"start": "00:00", "end": "23:59"}}'


async def people(pool: asyncpg.Pool, tenant: str, count: int) -> None:
    """Users with streams; those of `choosy` have preferences."""
    await pool.execute("insert into tenants (tenant, client_secret) values ($1, repeat('s', 32))", tenant)
    users = [f"user{n}" for n in range(count)]
    await pool.execute(
        "insert into streams (tenant, user_id, slot, epoch)"
        " select $1, u, s, 'e' from unnest($2::text[], $3::smallint[]) as x (u, s)",
        tenant, users, [slot_of(tenant, user) for user in users],
    )  # fmt: skip
    if tenant == "choosy":
        await pool.execute(
            "insert into preferences (tenant, user_id, document)"
            " select $1, u, $3 from unnest($2::text[]) as x (u)", tenant, users, PREFERENCES,
        )  # fmt: skip


async def measure(dsn: str, count: int, chunk: int) -> None:
    """One broadcast for each kind of users."""
    settings = Settings().with_values(
        postgres={"dsn": dsn}, cluster={"runtime_dir": tempfile.mkdtemp()}, shard={"sweep_s": 600.0},
        broadcast={"look_s": 0.1, "chunk_min": chunk},
    )  # fmt: skip
    coordinator = await FakeCoordinator.start(settings)
    pool = await open_pool(settings.postgres, 2)
    await pool.execute("insert into shards (shard, term, node, incarnation) values ('shard-a', 1, 'n', 'i')")
    for tenant in ("plain", "choosy"):
        await people(pool, tenant, count)
    await pool.execute("vacuum analyze")
    shard = Shard(ActorConfig("shard", "shard-a", "local", settings, SECRET, {}, coordinator.address))
    await shard.start()
    coordinator.set_owner(range(1024), "shard-a")
    store, ids = BroadcastStore(pool), Uuid7Source()
    for tenant in ("plain", "choosy"):
        now_ms = time.time_ns() // 1_000_000
        raw = ids.next(now_ms)
        before, cpu = snapshot((os.getpid(),)), time.process_time()
        size = await pool.fetchval("select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')")
        await store.add(
            tenant, NewBroadcast(raw, parse_recipients("all"), json.dumps(EVENT), RUNNING, now_ms), now_ms
        )
        while True:
            await asyncio.sleep(0.2)
            record = await store.get(tenant, raw)
            assert record is not None
            if record.ended_ms is not None:
                break
        cpu = time.process_time() - cpu
        spent = cpu_between(before, snapshot((os.getpid(),))).get("postgres", 0.0)
        assert record.counts.stored == count, record
        wal = await pool.fetchval("select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')") - size
        print(
            f"{tenant}: {count / record.ran_ms * 1000:,.0f} users/s, each {cpu / count * 1e6:.1f} us CPU of "
            f"the shard, {spent / count * 1e6:.1f} us of PostgreSQL, {float(wal) / count:,.0f} bytes of WAL"
        )
    await shard.stop()
    await coordinator.stop()
    await pool.close()


def main() -> None:
    """Start PostgreSQL, measure, stop."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    chunk = int(sys.argv[2]) if len(sys.argv) > 2 else Settings().broadcast.chunk_min
    folder = Path(tempfile.mkdtemp(prefix="carillon-bench-"))
    folder.chmod(0o711)
    with EmbeddedPostgres(folder / "pg") as server:
        asyncio.run(migrate(server.dsn))
        uvloop.run(measure(server.dsn, count, chunk))


if __name__ == "__main__":
    main()
