"""What the archive asks of Postgres, on one connection of its own.

Two advisory locks keep its work apart: whoever runs holds `RUN` for the whole run, and whoever changes what
is archived holds `CHANGE` for one step of it (a part written and its rows gone, a part restored or
rewritten). Both are of the session: they end with the connection, and so does the transaction that would
have needed them.
"""

from __future__ import annotations

import contextlib
import json
import re
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import asyncpg
import msgspec

from carillon.archive import Archived, Line, Part
from carillon.errors import BusyError
from carillon.retention import Month, Partition, least_id, parse_month
from carillon.settings import PostgresSettings
from stores.postgres.named import load_queries
from stores.postgres.pool import connect, translated

_RUN: Final = 0x4341_5251
_CHANGE: Final = 0x4341_5252
_BOUND: Final = re.compile(r"FOR VALUES FROM \('([0-9a-f-]{36})'\) TO \('([0-9a-f-]{36})'\)")
_STREAMS: Final = 50
"""Streams that are told at once: their rows are locked for that moment."""
_TABLES: Final = (
    "notifications",
    "deliveries",
    "delivery_attempts",
    "amendments",
    "template_exposures",
    "merged_events",
)


class DueRow(NamedTuple):
    """A notification that may go."""

    line: Line
    stream_id: int
    seq: int
    changed_rev: int
    """Of its last change; 0 if it never changed after it was appended."""


class ChangedError(Exception):
    """A row is no longer what was archived, or somebody is at it: nothing was taken out."""


class ArchiveStore:
    """The tables, as the archive sees them. Not concurrent: one task uses it."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        queries = load_queries("archive")
        parts = {"line": queries["line"], "settled": queries["settled"]}
        self._sql = {
            name: text.replace("%(line)s", parts["line"]).replace("%(settled)s", parts["settled"])
            for name, text in queries.items()
        }
        self._restore: dict[str, str] = {}

    @classmethod
    async def open(cls, settings: PostgresSettings) -> ArchiveStore:
        """Connect. Raises StoreUnavailableError."""
        connection = await connect(settings.dsn, settings)
        with translated():
            # Background work: it never waits long for others, and stops being heard when it hangs.
            await connection.execute(
                "select set_config('application_name', 'carillon-archive', false),"
                " set_config('jit', 'off', false), set_config('timezone', 'UTC', false),"
                " set_config('lock_timeout', '1s', false),"
                " set_config('idle_in_transaction_session_timeout', '60s', false)"
            )
        return cls(connection)

    @property
    def connection(self) -> asyncpg.Connection:
        """The one connection, for partitions.py."""
        return self._connection

    async def close(self) -> None:
        """Close the connection; with it end its locks."""
        with contextlib.suppress(asyncpg.PostgresError, OSError):
            await self._connection.close(timeout=5)

    def terminate(self) -> None:
        """End the connection at once, as the end of the process would."""
        self._connection.terminate()

    # -- locks ------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The only run in the cluster. Raises BusyError if there is another."""
        if not await self._value("select pg_try_advisory_lock($1)", _RUN):
            raise BusyError("another run of the archive is under way")
        try:
            yield
        finally:
            await self._unlock(_RUN)

    @contextlib.asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """Nobody else changes the archive meanwhile; steps are short, this waits for one at most."""
        with translated():
            # lock_timeout counts for advisory locks, too: a step may take longer than that.
            await self._connection.execute("set lock_timeout = '60s'")
            try:
                await self._connection.execute("select pg_advisory_lock($1)", _CHANGE)
            except asyncpg.LockNotAvailableError:
                raise BusyError("another run changes the archive") from None
            finally:
                await self._connection.execute("set lock_timeout = '1s'")
        try:
            yield
        finally:
            await self._unlock(_CHANGE)

    async def _unlock(self, key: int) -> None:
        if not self._connection.is_closed():
            with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                await self._connection.execute("select pg_advisory_unlock($1)", key)

    # -- what is due ------------------------------------------------------------------------------------

    async def tenants(self) -> dict[str, dict[str, Any]]:
        """Tenants that have users, with what their policy says of retention."""
        return {
            r["tenant"]: {} if r["days"] is None else {"retentionDays": int(float(r["days"]))}
            for r in await self._fetch("tenants")
        }

    async def next_id(self, low: uuid.UUID, high: uuid.UUID) -> uuid.UUID | None:
        """The first notification in [low, high)."""
        return await self._value(self._sql["next_id"], low, high)

    async def passes(self, now_ms: int) -> set[tuple[str, Month]]:
        """(tenant, month) that are not to be looked at yet."""
        return {(r["tenant"], parse_month(r["month"])) for r in await self._fetch("passes", now_ms / 1000)}

    async def passed(self, tenant: str, month: Month, next_ms: int) -> None:
        """Look at a tenant's month again from `next_ms` on."""
        await self._execute("passed", tenant, str(month), next_ms / 1000)

    async def users(self, tenant: str, after: str | None, limit: int) -> list[tuple[int, str]]:
        """(stream, user) of some users of a tenant, in the database's order."""
        return [(r[0], r[1]) for r in await self._fetch("users", tenant, after, limit)]

    async def due(self, streams: Sequence[int], month: Month, before_ms: int, limit: int) -> list[DueRow]:
        """What of a month may go of some streams."""
        found = await self._fetch("due", streams, month.low, month.high, before_ms / 1000, limit)
        return [
            DueRow(
                Line(_id(r["id"]), r["user_id"], r["line"].encode()),
                r["stream_id"],
                r["seq"],
                r["changed_rev"],
            )
            for r in found
        ]

    async def count_due(self, tenant: str, month: Month, before_ms: int) -> int:
        """How many may go of a tenant's month."""
        return await self._value(self._sql["count_due"], tenant, month.low, month.high, before_ms / 1000)

    # -- parts ------------------------------------------------------------------------------------------

    async def intend(self, part: uuid.UUID, tenant: str, month: Month, now_ms: int) -> None:
        """A part is about to be written: whoever comes after a crash knows its file."""
        await self._execute("intend", part, tenant, str(month), now_ms / 1000)

    async def unfinished(self) -> list[tuple[uuid.UUID, str, Month]]:
        """Parts whose files are to be removed: never completed, or superseded."""
        return [(_id(r[0]), r[1], parse_month(r[2])) for r in await self._fetch("unfinished")]

    async def forget(self, part: uuid.UUID) -> None:
        """Its file is gone."""
        await self._execute("forget", part)

    async def parts(
        self,
        tenant: str | None = None,
        month: Month | None = None,
        user: str | None = None,
        notification: uuid.UUID | None = None,
    ) -> list[Part]:
        """Complete parts that may hold what is asked for."""
        found = await self._fetch("parts", tenant, None if month is None else str(month), user, notification)
        return [
            Part(
                _id(r["part"]), r["tenant"], parse_month(r["month"]), r["rows"], r["file_bytes"],
                r["raw_bytes"], r["sha256"], _id(r["first_id"]), _id(r["last_id"]), r["first_user"],
                r["last_user"], r["created_ms"],
            )
            for r in found
        ]  # fmt: skip

    async def tell_pruned(self, rows: Sequence[DueRow]) -> None:
        """Streams say what they are about to miss. Not waited for on disk: what follows it is."""
        furthest: dict[int, tuple[int, int]] = {}
        for row in rows:
            seq, rev = furthest.get(row.stream_id, (0, 0))
            furthest[row.stream_id] = max(seq, row.seq), max(rev, row.changed_rev)
        with translated():
            await self._connection.execute("set synchronous_commit = off")
            try:
                streams = sorted(furthest)
                for at in range(0, len(streams), _STREAMS):
                    some = streams[at : at + _STREAMS]
                    args = some, [furthest[one][0] for one in some], [furthest[one][1] for one in some]
                    await self._connection.execute(self._sql["pruned"], *args)
                    for left in await self._connection.fetch(self._sql["pruned_left"], *args):
                        await self._connection.execute(self._sql["pruned_one"], left[0], *furthest[left[0]])
            except asyncpg.LockNotAvailableError:
                raise ChangedError from None
            finally:
                if not self._connection.is_closed():
                    await self._connection.execute("reset synchronous_commit")

    async def take_out(self, part: Part, lines: Sequence[Line]) -> None:
        """The part is complete, and its rows leave the tables: both or neither.

        Raises:
            ChangedError: a row is not what was archived any more, or is locked.
        """
        ids = [line.id for line in lines]
        low, high = part.month.low, part.month.high
        with translated():
            try:
                async with self._connection.transaction():
                    # Locks never wait: others lock the same rows in other orders.
                    await self._connection.execute(self._sql["lock_notifications"], ids, low, high)
                    await self._connection.execute(self._sql["lock_streams"], ids, low, high)
                    await self._connection.execute(self._sql["lock_deliveries"], ids)
                    now = await self._connection.fetch(self._sql["lines"], ids, low, high)
                    if {_id(r["id"]): r["line"].encode() for r in now} != {one.id: one.raw for one in lines}:
                        raise ChangedError
                    if await self._connection.fetchval(self._sql["remove"], ids, low, high) != len(ids):
                        raise ChangedError
                    await self._complete(part)
            except asyncpg.LockNotAvailableError:
                raise ChangedError from None

    async def swap(self, new: Sequence[Part], old: Sequence[Part]) -> None:
        """New parts hold what old ones held. Raises ChangedError if an old one is superseded already."""
        with translated():
            async with self._connection.transaction():
                await self._swap(new, old)

    async def _swap(self, new: Sequence[Part], old: Sequence[Part]) -> None:
        gone = await self._connection.fetch(self._sql["supersede"], [one.part for one in old])
        if len(gone) != len(old):
            raise ChangedError
        for one in new:
            await self._complete(one)

    async def _complete(self, part: Part) -> None:
        if not await self._connection.fetchval(
            self._sql["complete"], part.part, part.rows, part.file_bytes, part.raw_bytes, part.sha256,
            part.first_id, part.last_id, part.first_user, part.last_user,
        ):  # fmt: skip
            raise ChangedError

    # -- back -------------------------------------------------------------------------------------------

    async def put_back(self, old: Part, new: Sequence[Part], rows: Sequence[Archived]) -> int:
        """Archived rows become rows again, and their part gives way to what is left of it: all or nothing.

        Returns:
            How many were not there yet.
        """
        with translated():
            async with self._connection.transaction():
                await self._swap(new, [old])
                made = await self._restored("notifications", [row.notification for row in rows])
                tries: list[Mapping[str, Any]] = []
                deliveries: list[Mapping[str, Any]] = []
                for row in rows:
                    for delivery in row.deliveries:
                        tries += delivery["tries"]
                        deliveries.append({name: delivery[name] for name in delivery if name != "tries"})
                await self._restored("deliveries", deliveries)
                await self._restored("delivery_attempts", tries)
                await self._restored("amendments", [act for row in rows for act in row.amendments])
                await self._restored(
                    "template_exposures", [row.exposure for row in rows if row.exposure is not None]
                )
                await self._restored("merged_events", [event for row in rows for event in row.merged])
                return made

    async def _restored(self, table: str, rows: Sequence[Mapping[str, Any]]) -> int:
        if not rows:
            return 0
        if table not in self._restore:
            assert table in _TABLES
            columns = await self._connection.fetch(self._sql["columns"], table)
            names = [f'"{c["name"]}"' for c in columns]
            values = [
                f"r.{name}" if c["instead"] is None else f"coalesce(r.{name}, {c['instead']})"
                for name, c in zip(names, columns, strict=True)
            ]
            text = self._sql["restore"].replace("%(table)s", table)
            self._restore[table] = text.replace("%(columns)s", ", ".join(names)).replace(
                "%(values)s", ", ".join(values)
            )
        done = await self._connection.execute(
            self._restore[table], [msgspec.json.encode(row).decode() for row in rows]
        )
        return int(done.rpartition(" ")[2])

    async def streams_of(self, tenant: str, users: Sequence[str]) -> dict[str, int]:
        """The streams of users that there are."""
        return {r[0]: r[1] for r in await self._fetch("streams_of", tenant, users)}

    async def stored(self, ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
        """Which of them are in the tables."""
        return {_id(r[0]) for r in await self._fetch("stored", ids)}

    # -- erasure, other tables, runs --------------------------------------------------------------------

    async def ask_erasure(self, tenant: str, user: str) -> None:
        """What is archived of a user is to be erased."""
        await self._execute("ask_erasure", tenant, user)

    async def erasures(self) -> list[tuple[str, str, Any]]:
        """(tenant, user, when it was asked for), oldest first."""
        return [(r[0], r[1], r[2]) for r in await self._fetch("erasures")]

    async def erased(self, tenant: str, user: str, asked_at: Any) -> None:
        """It is carried out."""
        await self._execute("erased", tenant, user, asked_at)

    async def prune_exposures(self, before_ms: int, limit: int) -> int:
        """Drop some of who got which variant; returns how many."""
        return await self._value(self._sql["prune_exposures"], least_id(before_ms), limit)

    async def prune_audit(self, before_ms: int, limit: int) -> int:
        """Drop some of the audit; returns how many."""
        return await self._value(self._sql["prune_audit"], before_ms / 1000, limit)

    async def last_run(self) -> dict[str, Any]:
        """What `ran` noted; {} at first."""
        text = await self._value(self._sql["last_run"])
        return {} if text is None else json.loads(text)

    async def ran(self, told: Mapping[str, Any]) -> None:
        """Note a run."""
        await self._execute("ran", json.dumps(told))

    async def partitions(self) -> list[Partition]:
        """The partitions by bounds; rows are counted where something was taken out, else estimated.

        A partition whose rows are estimated as none is looked into.
        """
        found: list[Partition] = []
        for r in await self._fetch("partitions"):
            bounds = _BOUND.fullmatch(r["bound"])
            if bounds is None:
                continue  # not one of ours
            name = r["name"]
            if r["removed"]:
                rows = await self._value(f'select count(*) from "{name}"')  # noqa: S608
            else:
                rows = r["estimate"] or int(
                    await self._value(f'select exists (select from "{name}")')  # noqa: S608
                )
            found.append(Partition(name, uuid.UUID(bounds[1]), uuid.UUID(bounds[2]), rows, r["removed"]))
        return found

    # -- inside -----------------------------------------------------------------------------------------

    async def _fetch(self, name: str, *args: Any) -> list[Any]:
        with translated():
            return await self._connection.fetch(self._sql[name], *args)

    async def _value(self, sql: str, *args: Any) -> Any:
        with translated():
            return await self._connection.fetchval(sql, *args)

    async def _execute(self, name: str, *args: Any) -> None:
        with translated():
            await self._connection.execute(self._sql[name], *args)


def _id(found: Any) -> uuid.UUID:
    """asyncpg's UUIDs compare with ours, but are of another type."""
    return uuid.UUID(int=found.int)
