"""A database with months behind it, and an archive beside it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg

from carillon.archive import Search
from carillon.clock import ManualClock, rfc3339
from carillon.ids import slot_of
from carillon.merge_begun import Opening, pack
from carillon.notification import encode_content
from carillon.retention import Month
from carillon.settings import Settings
from stores.archiver import Archiver

NOW = Month(2026, 6).start_ms + 14 * 86_400_000 + 4 * 3_600_000
"""2026-06-15 04:00."""
MARCH, FEBRUARY, APRIL = Month(2026, 3), Month(2026, 2), Month(2026, 4)
CARRIED = (
    "notifications",
    "deliveries",
    "delivery_attempts",
    "amendments",
    "template_exposures",
    "merged_events",
)


class ArchiveWorld:
    """Rows as shards write them, in any month, and the archive over them."""

    def __init__(self, dsn: str, folder: Path, **archive: Any) -> None:
        self.dsn = dsn
        self.root = folder / "archive"
        self.settings = Settings().with_values(
            postgres={"dsn": dsn},
            archive={
                "root": str(self.root),
                "pause_s": 0.0,
                "lock_pause_s": 0.01,
                "revisit_days": 0.0,
                **archive,
            },
        )
        self.clock: Any = ManualClock(NOW)
        self._counter = 0

    async def open(self) -> None:
        self.db = await asyncpg.connect(self.dsn)

    async def close(self) -> None:
        await self.db.close()

    async def archiver(self, progress: Callable[[str], None] = lambda _: None) -> Archiver:
        return await Archiver.open(self.settings, self.clock, progress)

    async def run(self, only: str | None = None) -> Any:
        archiver = await self.archiver()
        try:
            return await archiver.run(only)
        finally:
            await archiver.close()

    async def month_partition(self, month: Month) -> None:
        """The partition of an old month, as `ensure_partitions` made it then."""
        name = f"notifications_{month.year:04d}_{month.month:02d}"
        await self.db.execute(
            f"create table {name} (like notifications including all) with (fillfactor = 50)"
        )
        await self.db.execute(
            f"alter table notifications attach partition {name}"
            f" for values from ('{month.low}') to ('{month.high}')"
        )

    async def tenant(self, tenant: str, **policy: Any) -> None:
        await self.db.execute(
            "insert into tenants (tenant, client_secret, settings) values ($1, 'secret', $2::jsonb)",
            tenant,
            json.dumps({"policy": policy}),
        )

    async def add(
        self,
        tenant: str,
        user: str,
        month: Month,
        count: int,
        *,
        read: bool = True,
        push: str | None = "sent",
        day: int = 3,
        exposed: bool = False,
        **columns: Any,
    ) -> list[uuid.UUID]:
        """Notifications of a user in a month; a push with a try each, in a state."""
        ids: list[uuid.UUID] = []
        at_ms = month.start_ms + (day - 1) * 86_400_000
        for _ in range(count):
            self._counter += 1
            made = uuid.UUID(int=((at_ms + self._counter) << 80) | (7 << 76) | (2 << 62) | self._counter)
            stream_id, seq, rev = await self.db.fetchrow(
                "insert into streams as s (tenant, user_id, slot, epoch, seq, rev, unread)"
                " values ($1, $2, $3, 'e1', 1, $4, $5) on conflict (tenant, user_id) do update"
                " set seq = s.seq + 1, rev = s.rev + $4, unread = s.unread + $5"
                " returning stream_id, seq, rev",
                tenant, user, slot_of(tenant, user), 1 + read, int(not read),
            )  # fmt: skip
            members = {
                "type": "t",
                "title": f"n{seq} von {user}",
                "body": "Zug fährt",
                "createdAt": rfc3339(at_ms),
            }
            members |= {k: v for k, v in columns.items() if k in ("title", "body", "type")}
            at = at_ms / 1000
            await self.db.execute(
                "insert into notifications (id, stream_id, seq, rev, position, changed, priority, type,"
                " content, created_at, read_at, receipt, decision, merging, merge_slot, merge_slot_2)"
                " values ($1, $2, $3, $4, $5, $6, 1, $7, $8, to_timestamp($9), to_timestamp($10), 3, '[]',"
                " $11, 1, 2)",
                made, stream_id, seq, rev, rev - read, read, members["type"], encode_content(members), at,
                at + 60 if read else None,
                pack(Opening("event", at_ms, at_ms, "joan", ((f"drop:{seq:032x}", at_ms + 60_000),))),
            )  # fmt: skip
            if push is not None:
                delivery = await self.db.fetchval(
                    "insert into deliveries (notification_id, stream_id, slot, channel, state, due_at,"
                    " created_at, updated_at, attempts, shown_on)"
                    " values ($1, $2, 1, 'push', $3, to_timestamp($4), to_timestamp($4), to_timestamp($4),"
                    " 1, array['a','b']) returning id",
                    made, stream_id, push, at + 0.125,
                )  # fmt: skip
                await self.db.execute(
                    "insert into delivery_attempts (delivery_id, attempt, device_id, provider, outcome,"
                    " started_at, duration_ms) values ($1, 1, 'd', 'fcm', 'sent', to_timestamp($2), 12.7)",
                    delivery, at,
                )  # fmt: skip
            if exposed:
                await self.db.execute(
                    "insert into amendments values ($1, $2, $3, 'edit', to_timestamp($4), 'k', 2, '\"t\":1')",
                    made, uuid.UUID(int=self._counter), stream_id, at,
                )  # fmt: skip
                await self.db.execute(
                    "insert into merged_events values ($1, $2, $3, to_timestamp($4), 'merged', 'count',"
                    " 'tenant', 'grace', 'quiet')",
                    uuid.UUID(int=self._counter + (1 << 100)), made, stream_id, at,
                )  # fmt: skip
                if push is not None:  # told in a digest, whose push was this one
                    await self.db.execute(
                        "update deliveries set digest = $2, carrier = id where notification_id = $1",
                        made,
                        uuid.UUID(int=self._counter),
                    )
                await self.db.execute(
                    "insert into template_exposures values ($1, $2, 'welcome', 3, 'b')", made, tenant
                )
            ids.append(made)
        return ids

    async def content(self) -> dict[str, list[Any]]:
        """Everything the tables hold of notifications, as comparable rows."""
        return {
            table: sorted(str(sorted(dict(r).items())) for r in await self.db.fetch(f"select * from {table}"))
            for table in CARRIED
        }

    async def stored(self) -> set[uuid.UUID]:
        return {uuid.UUID(int=r[0].int) for r in await self.db.fetch("select id from notifications")}

    async def archived(self, tenant: str = "acme", **wanted: Any) -> list[uuid.UUID]:
        archiver = await self.archiver()
        try:
            return [found.id async for _, found in archiver.search(tenant, Search(**wanted))]
        finally:
            await archiver.close()

    async def findings(self) -> list[str]:
        archiver = await self.archiver()
        try:
            return [one async for one in archiver.verify()]
        finally:
            await archiver.close()

    async def partitions(self) -> set[str]:
        rows = await self.db.fetch(
            "select inhrelid::regclass::text from pg_inherits where inhparent = 'notifications'::regclass"
        )
        return {r[0] for r in rows}
