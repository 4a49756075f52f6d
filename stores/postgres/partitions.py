"""Partitions of `notifications` written anew while everybody goes on.

What is kept of old partitions is copied, a few rows at a time, into a table of its own; a trigger notes what
changes meanwhile. Then, in one short transaction that holds the table, what changed is copied again, and the
new table takes the place of the old ones. The lock is asked for with a short patience and tried again: a long
transaction of somebody else makes us wait, never those who come after us. Nothing is deleted row by row, so
there is nothing to vacuum; dropping the old tables is another transaction, because removing large files
takes time.

(`detach partition concurrently` would need no such lock, but is not allowed beside a default partition.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import asyncpg

from carillon.retention import Rewrite

_NEXT: Final = "notifications_next"
_OLD: Final = "notifications_old_"
_TRIGGER: Final = "archive_note_change"
Step = Callable[[str], Awaitable[None]]


class LockedError(Exception):
    """Somebody held the table through all tries: a long transaction, a dump."""


async def tidy(connection: asyncpg.Connection) -> None:
    """Remove what a rewrite that was cut off left behind.

    Raises:
        asyncpg.LockNotAvailableError: a partition is busy; next time.
    """
    noted = await connection.fetch(
        "select tgrelid::regclass::text as name from pg_trigger where tgname = $1", _TRIGGER
    )
    for row in noted:
        await connection.execute(f"drop trigger if exists {_TRIGGER} on {row['name']}")
    asleep = await connection.fetch(
        "select i.inhrelid::regclass::text as name from pg_inherits i join pg_class c on c.oid = i.inhrelid"
        " where i.inhparent = 'notifications'::regclass and 'autovacuum_enabled=off' = any (c.reloptions)"
    )
    for row in asleep:
        await connection.execute(f"alter table {row['name']} reset (autovacuum_enabled)")
    left = await connection.fetch(
        "select c.oid::regclass::text as name from pg_class c where c.relkind = 'r' and not c.relispartition"
        " and (c.relname = $1 or starts_with(c.relname, $2))",
        _NEXT,
        _OLD,
    )
    for row in left:
        await connection.execute(f"drop table {row['name']}")


async def rewrite(
    connection: asyncpg.Connection,
    plan: Rewrite,
    step: Step,
    *,
    batch: int,
    lock_wait_s: float,
    lock_tries: int,
    lock_pause_s: float,
) -> int:
    """Carry out a rewrite; returns the rows that are kept.

    Args:
        step: awaited between any two steps.
        batch: rows copied at a time.
        lock_wait_s: longest wait for a lock that others would queue behind.
        lock_tries, lock_pause_s: how often it is tried, with which pause.

    Raises:
        LockedError: the lock was not to be had; nothing is changed.
    """
    await tidy(connection)
    columns = await _columns(connection)
    low, high = plan.low, plan.high

    async def locked(work: Callable[[], Awaitable[None]]) -> None:
        for tries in range(lock_tries):
            try:
                async with connection.transaction():
                    await connection.execute(f"set local lock_timeout = '{round(lock_wait_s * 1000)}ms'")
                    await work()
                return
            except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
                if tries + 1 < lock_tries:
                    await asyncio.sleep(lock_pause_s)
        names = ", ".join(one.name for one in plan.sources)
        raise LockedError(f"{names}: locked by others for {lock_tries} tries")

    kept = 0
    if plan.target is not None:
        # The check spares the scan when it is attached.
        await connection.execute(
            f"create table {_NEXT} (like notifications including all,"
            f" constraint {plan.target}_bounds check (id >= '{low}' and id < '{high}'))"
            " with (fillfactor = 90)"
        )
    await connection.execute("truncate archive_changes")
    await step("made")
    for source in plan.sources:
        # After so many rows have gone a vacuum may be at it for long, for nothing; whoever waits a second
        # ends it.
        await connection.execute("set lock_timeout = '10s'")
        await connection.execute(f'alter table "{source.name}" set (autovacuum_enabled = off)')
        await connection.execute("set lock_timeout = '1s'")

        async def note(name: str = source.name) -> None:
            await connection.execute(
                f'create trigger {_TRIGGER} after insert or update or delete on "{name}"'
                " for each row execute function archive_note_change()"
            )

        await locked(note)
    await step("noting")
    if plan.target is not None:
        for source in plan.sources:
            kept += await _copy(connection, source.name, columns, batch, step)
        await connection.execute(f"vacuum (analyze) {_NEXT}")
    await step("copied")

    async def change_over() -> None:
        await connection.execute("lock table only notifications in access exclusive mode")
        if plan.target is None:
            for source in plan.sources:  # a row may have come since it was found empty
                if await connection.fetchval(f'select exists (select from "{source.name}")'):  # noqa: S608
                    raise LockedError(f"{source.name} is not empty any more")
        else:
            changed = "select id from archive_changes"
            await connection.execute(f"delete from {_NEXT} where id in ({changed})")  # noqa: S608
            for source in plan.sources:
                await connection.execute(
                    f'insert into {_NEXT} ({columns}) select {columns} from "{source.name}"'  # noqa: S608
                    f" where id in ({changed})"
                )
            # Between the sources there may have been months without a partition.
            await connection.execute(
                "with moved as (delete from notifications_default where id >= $1 and id < $2"  # noqa: S608
                f" returning {columns}) insert into {_NEXT} ({columns}) select {columns} from moved",
                low,
                high,
            )
        for number, source in enumerate(plan.sources):
            await connection.execute(f'alter table notifications detach partition "{source.name}"')
            await connection.execute(f'alter table "{source.name}" rename to {_OLD}{number}')
            await connection.execute("delete from archive_partitions where partition = $1", source.name)
        if plan.target is not None:
            await connection.execute(f"alter table {_NEXT} rename to {plan.target}")
            await connection.execute(
                f"alter table notifications attach partition {plan.target}"
                f" for values from ('{low}') to ('{high}')"
            )

    await locked(change_over)
    await step("changed over")
    await tidy(connection)
    return kept


async def _copy(connection: asyncpg.Connection, source: str, columns: str, batch: int, step: Step) -> int:
    total = 0
    after = "00000000-0000-0000-0000-000000000000"
    while True:
        last = await connection.fetchrow(
            f'with more as (select {columns} from "{source}" where id > $1 order by id limit $2),'  # noqa: S608
            f" copied as (insert into {_NEXT} ({columns}) select {columns} from more)"
            " select (select id from more order by id desc limit 1) as id, count(*) as n from more",
            after,
            batch,
        )
        if last is None or last["id"] is None:
            return total
        total += last["n"]
        after = last["id"]
        await step("copying")


async def _columns(connection: asyncpg.Connection) -> str:
    found = await connection.fetch(
        "select attname from pg_attribute where attrelid = 'notifications'::regclass and attnum > 0"
        " and not attisdropped order by attnum"
    )
    return ", ".join(f'"{row["attname"]}"' for row in found)
