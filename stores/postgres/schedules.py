"""Schedules in Postgres: kept by the ingress, claimed by the shards that own their slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import asyncpg

from carillon.errors import FencedError, IdempotencyConflictError
from stores.postgres.named import load_queries
from stores.postgres.pool import Store, acquired

_ROW: Final = (
    "schedule_id, user_id, rule, event, single, state, fired, missed, result, "
    "(extract(epoch from next_at) * 1000)::bigint as next_ms, "
    "(extract(epoch from fired_at) * 1000)::bigint as fired_ms, "
    "(extract(epoch from created_at) * 1000)::bigint as created_ms, "
    "(extract(epoch from updated_at) * 1000)::bigint as updated_ms"
)


@dataclass(slots=True)
class NewSchedule:
    """A schedule to keep."""

    id: bytes
    slot: int
    user: str | None
    rule: str
    event: str
    single: bool
    next_ms: int
    due_ms: int
    zone: str = "UTC"
    key: str | None = None
    body_hash: bytes | None = None


@dataclass(slots=True)
class ScheduleRecord:
    """A schedule as kept."""

    id: bytes
    user: str | None
    rule: str
    event: str
    single: bool
    state: str
    next_ms: int
    fired: int
    missed: int
    fired_ms: int | None
    result: str | None
    created_ms: int
    updated_ms: int = 0


@dataclass(slots=True)
class ClaimedSchedule:
    """One claimed by a shard."""

    tenant: str
    id: bytes
    user: str | None
    rule: str
    event: str
    single: bool
    claim: int
    next_ms: int
    zone: str


class ScheduleStore(Store):
    """Reads and writes schedules."""

    _sql: Final = {name: text.replace("%(row)s", _ROW) for name, text in load_queries("schedules").items()}

    # -- the ingress -----------------------------------------------------------------------------------

    async def add(self, tenant: str, rows: Sequence[NewSchedule]) -> list[tuple[bytes, bool] | None]:
        """Keep schedules: (id, whether it was there already) each, None if its key was used with another
        body."""
        async with acquired(self._pool, self._timeout_s) as connection:
            made = await connection.fetch(
                self._sql["add"], tenant, [UUID(bytes=r.id) for r in rows], [r.slot for r in rows],
                [r.user for r in rows], [r.rule for r in rows], [r.event for r in rows],
                [r.single for r in rows], [r.next_ms / 1000 for r in rows], [r.due_ms / 1000 for r in rows],
                [r.key for r in rows], [r.body_hash for r in rows], [r.zone for r in rows],
            )  # fmt: skip
            new = {row[0].bytes for row in made}
            left = [r.key for r in rows if r.id not in new]
            known = await connection.fetch(self._sql["known"], tenant, left) if left else []
        by_key = {row["idempotency_key"]: row for row in known}
        told: list[tuple[bytes, bool] | None] = []
        for row in rows:
            if row.id in new:
                told.append((row.id, False))
                continue
            other = by_key.get(row.key)
            same = other is not None and other["body_hash"] == row.body_hash
            told.append((other["schedule_id"].bytes, True) if other is not None and same else None)
        return told

    async def known(self, tenant: str, keys: Sequence[str]) -> dict[str, tuple[bytes, bytes]]:
        """What idempotency keys stand for: (id, body hash) each; unknown ones are left out."""
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(self._sql["known"], tenant, keys)
        return {row["idempotency_key"]: (row["schedule_id"].bytes, row["body_hash"]) for row in rows}

    async def add_one(self, tenant: str, row: NewSchedule) -> tuple[bytes, bool]:
        """Keep a schedule. Raises IdempotencyConflictError: its key was used with another body."""
        (told,) = await self.add(tenant, [row])
        if told is None:
            raise IdempotencyConflictError("the idempotency key was used with another body")
        return told

    async def get(self, tenant: str, schedule: bytes) -> ScheduleRecord | None:
        """A schedule, None if there is none."""
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["schedule"], tenant, UUID(bytes=schedule))
        return None if row is None else _record(row)

    async def page(
        self, tenant: str, user: str | None, state: str | None, before: bytes | None, limit: int
    ) -> list[ScheduleRecord]:
        """Schedules, newest first; of one user or state; those before an id."""
        last = None if before is None else UUID(bytes=before)
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(self._sql["schedules"], tenant, user, state, last, limit)
        return [_record(row) for row in rows]

    async def cancel(self, tenant: str, schedule: bytes, now_ms: int) -> bool:
        """Cancel an active schedule; False if there is none."""
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["cancel"], tenant, UUID(bytes=schedule), now_ms / 1000)
        return row is not None

    async def zone(self, tenant: str, user: str) -> str | None:
        """The user's time zone: of the preferences, else the tenant's default."""
        async with acquired(self._pool, self._timeout_s) as connection:
            return await connection.fetchval(self._sql["zone"], tenant, user)

    # -- the shard -------------------------------------------------------------------------------------

    async def any_due(self, slots: Sequence[int], now_ms: int) -> bool:
        """Whether a claim would find something."""
        async with acquired(self._pool, self._timeout_s) as connection:
            return bool(await connection.fetchval(self._sql["any_due"], slots, now_ms / 1000))

    async def claim(
        self, shard: str, term: int, slots: Sequence[int], now_ms: int, limit: int, lease_end_ms: int
    ) -> list[ClaimedSchedule]:
        """Claim what is due; nothing if the term is over."""
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(
                self._sql["claim"], shard, term, slots, now_ms / 1000, limit, lease_end_ms / 1000
            )
        return [
            ClaimedSchedule(
                row["tenant"], row["schedule_id"].bytes, row["user_id"], row["rule"], row["event"],
                row["single"], row["claim"], row["next_ms"], row["zone"],
            )
            for row in rows
        ]  # fmt: skip

    async def settle(
        self,
        shard: str,
        term: int,
        row: ClaimedSchedule,
        *,
        state: str,
        next_ms: int,
        zone: str,
        due_ms: int,
        fired: int,
        missed: int,
        result: str | None,
        now_ms: int,
    ) -> bool:
        """Write what became of a claim; False if it was cancelled or claimed again.

        Raises:
            FencedError: the term is over.
        """
        async with acquired(self._pool, self._timeout_s) as connection:
            found: Any = await connection.fetchrow(
                self._sql["settle"], shard, term, row.tenant, UUID(bytes=row.id), row.claim, state,
                next_ms / 1000, due_ms / 1000, fired, missed, result, now_ms / 1000, zone,
            )  # fmt: skip
        if not found["fenced"]:
            raise FencedError(f"term {term} of {shard} is over")
        return bool(found["done"])

    async def prune(self, before_ms: int) -> None:
        """Forget some of those that ended before a time."""
        async with acquired(self._pool, self._timeout_s) as connection:
            await connection.execute(self._sql["prune"], before_ms / 1000)


def _record(row: asyncpg.Record) -> ScheduleRecord:
    return ScheduleRecord(
        row["schedule_id"].bytes, row["user_id"], row["rule"], row["event"], row["single"], row["state"],
        row["next_ms"], row["fired"], row["missed"], row["fired_ms"], row["result"], row["created_ms"],
        row["updated_ms"],
    )  # fmt: skip
