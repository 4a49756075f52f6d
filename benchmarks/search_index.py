"""What an index of words costs the shard that stores events, and what filling it later costs.

`python -m benchmarks.search_index [SECONDS] [ROUNDS]`: `micro_shard` on the schema as it is, and on one whose
notifications have a GIN index over the words of title and body, with and without a pending list; in turns, so
that a slow minute of the machine is everybody's. Then the words of 20,000 notifications of one user are
indexed the way a search does it. Starts its own PostgreSQL; figures are in docs/adr/0013.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import asyncpg
import uvloop

from benchmarks import micro_shard
from carillon.clock import SystemClock
from carillon.settings import IngressSettings, PostgresSettings
from cluster.embedded import EmbeddedPostgres
from stores.postgres.migrate import migrate
from stores.postgres.pool import connect, open_pool
from stores.postgres.search import SearchReader

_INDEX: Final = (
    "create index on notifications using gin (search_words(stream_id, content)) with (fastupdate = {})"
)
VARIANTS: Final = {"as it is": "", "GIN, pending list": _INDEX.format("on"), "GIN": _INDEX.format("off")}
LONG_FEED: Final = 20_000


async def fresh(server: EmbeddedPostgres, name: str, statement: str) -> str:
    """A migrated database with one statement more; its DSN."""
    admin = await connect(server.dsn)
    await admin.execute(f"drop database if exists {name} with (force)")
    await admin.execute(f"create database {name}")
    await admin.close()
    dsn = server.dsn_of(name)
    await migrate(dsn)
    if statement:
        connection = await connect(dsn)
        await connection.execute(statement)
        await connection.close()
    return dsn


async def sizes(dsn: str) -> str:
    """Rows stored, and bytes of all indexes for each."""
    connection: asyncpg.Connection = await connect(dsn)
    rows = await connection.fetchval("select count(*) from notifications")
    size = await connection.fetchval(
        "select sum(pg_indexes_size(relid)) from pg_partition_tree('notifications') where isleaf"
    )
    await connection.close()
    return f"{rows:,} rows, {size / rows:,.0f} bytes of indexes each"


async def fill_later(dsn: str) -> None:
    """Index a long feed by searching in it, then search again."""
    connection = await connect(dsn)
    stream = await connection.fetchval(
        "insert into streams (tenant, user_id, slot, epoch, seq, rev)"
        " values ('t', 'long', 0, 'e', $1::int, $1::int) returning stream_id",
        LONG_FEED,
    )
    await connection.execute(
        "insert into notifications (id, stream_id, seq, rev, position, priority, type, content, created_at)"
        " select uuidv7(), $1, n, n, n, 1, 'bench', $2 || n || '\"', now()"
        " from generate_series(1, $3::int) n",
        stream, micro_shard.make("long").content + ',"title":"n', LONG_FEED,
    )  # fmt: skip
    await connection.execute("vacuum analyze notifications")
    pool = await open_pool(PostgresSettings(dsn=dsn), 2)
    clock = SystemClock()
    search = SearchReader(pool, IngressSettings(), clock)
    for turn in ("first", "second", "third"):
        began = time.perf_counter()
        rows, _ = await search.page("t", "long", "n77", clock.now_ms(), clock.monotonic() + 60, limit=20)
        took_ms = (time.perf_counter() - began) * 1000
        print(f"{turn} search in {LONG_FEED:,}: {took_ms:,.1f} ms, {len(rows)} found")
    size = await connection.fetchval("select pg_total_relation_size('search_documents')")
    print(f"{size / LONG_FEED:,.0f} bytes for each indexed notification")
    await pool.close()
    await connection.close()


async def measure(server: EmbeddedPostgres, seconds: float, rounds: int) -> None:
    """All variants in turns."""
    for turn in range(rounds):
        for name, statement in VARIANTS.items():
            dsn = await fresh(server, "bench", statement)
            print(f"-- round {turn + 1}, {name}", flush=True)
            await micro_shard.measure(dsn, seconds)
            print(await sizes(dsn), flush=True)
    await fill_later(await fresh(server, "bench", ""))


def main() -> None:
    """Start PostgreSQL, measure, stop."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 4.0
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    folder = Path(tempfile.mkdtemp(prefix="carillon-bench-"))
    folder.chmod(0o711)
    with EmbeddedPostgres(folder / "pg") as server:
        uvloop.run(measure(server, seconds, rounds))


if __name__ == "__main__":
    main()
