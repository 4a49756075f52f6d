"""Forward migrations in numbered files, applied under an advisory lock; partitions made ahead."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import asyncpg

from carillon.clock import Clock, SystemClock
from stores.postgres.pool import connect, translated

FOLDER: Final = Path(__file__).parent / "migrations"
_LOCK: Final = 0x4341_5249  # "CARI": one migrator at a time
MONTHS_AHEAD: Final = 3
FILLFACTOR: Final = 50
"""Percent of a page that appends fill. Nearly every row is updated once, soon, by its acknowledgement; with
room on its page that touches none of the indexes (heap-only tuples). All rows of a page are acknowledged by
one statement or two, so that none makes room for the next: it takes as much room as rows. At 75 % four of ten
updates found it, at 50 % nineteen of twenty, which saves four index entries each."""


async def migrate(dsn: str, clock: Clock | None = None) -> list[str]:
    """Apply what is missing; return the names of the files applied now.

    Atomicity: each file is one transaction together with its entry in `schema_migrations`.
    """
    connection = await connect(dsn)
    applied: list[str] = []
    try:
        with translated():
            await connection.execute("select pg_advisory_lock($1)", _LOCK)
            await connection.execute(
                "create table if not exists schema_migrations"
                " (name text primary key, applied_at timestamptz not null default now())"
            )
            done = {row["name"] for row in await connection.fetch("select name from schema_migrations")}
            for path in sorted(FOLDER.glob("*.sql")):
                if path.name in done:
                    continue
                async with connection.transaction():
                    await connection.execute(path.read_text())
                    await connection.execute("insert into schema_migrations (name) values ($1)", path.name)
                applied.append(path.name)
            await ensure_partitions(connection, (clock or SystemClock()).now_ms())
            return applied
    finally:
        await connection.close()  # releases the advisory lock


def month_bounds(now_ms: int, offset: int) -> tuple[str, str, str]:
    """Suffix and uuid bounds of the month `offset` months after the one of `now_ms`.

    The bounds are the least UUIDs whose 48-bit timestamp lies at the start of the month and of the next.
    """
    moment = datetime.fromtimestamp(now_ms / 1000, UTC)
    index = moment.year * 12 + moment.month - 1 + offset

    def least_uuid(at: int) -> str:
        start = datetime(at // 12, at % 12 + 1, 1, tzinfo=UTC)
        digits = f"{int(start.timestamp() * 1000):012x}"
        return f"{digits[:8]}-{digits[8:]}-0000-0000-000000000000"

    return f"{index // 12:04d}_{index % 12 + 1:02d}", least_uuid(index), least_uuid(index + 1)


async def ensure_partitions(
    connection: asyncpg.Connection, now_ms: int, months_ahead: int = MONTHS_AHEAD
) -> list[str]:
    """Make the partitions of last month, this one and `months_ahead` more; return those made now.

    Idempotent. Coordinators call it daily, so that an append never meets a missing month; rows that did
    (a clock far ahead) sit in the default partition and are moved into the new one here.
    """
    made: list[str] = []
    for offset in range(-1, months_ahead + 1):
        suffix, low, high = month_bounds(now_ms, offset)
        name = f"notifications_{suffix}"
        if await connection.fetchval("select to_regclass($1)", name) is not None:
            continue
        async with connection.transaction():
            # Attaching a month whose rows already sit in the default partition would fail: move them.
            await connection.execute(
                f"create table {name} (like notifications including all) with (fillfactor = {FILLFACTOR})"
            )
            await connection.execute(
                f"with moved as (delete from notifications_default where id >= $1::uuid and id < $2::uuid"  # noqa: S608
                f" returning *) insert into {name} select * from moved",
                low,
                high,
            )
            await connection.execute(
                f"alter table notifications attach partition {name} for values from ('{low}') to ('{high}')"
            )
        made.append(name)
    return made
