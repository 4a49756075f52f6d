"""Everything kept of a user, read piece by piece: as lines of JSON, in bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any, Final

import asyncpg
import msgspec

from carillon.decision import unpack
from carillon.explain import told
from carillon.kept_push import exported
from carillon.notification import NotificationRow, notification_json, user_json_of
from stores.archive_export import ArchiveExport
from stores.postgres.feed import ROW_COLUMNS
from stores.postgres.named import load_queries
from stores.postgres.pool import acquired

PAGE: Final = 200
"""Notifications read at a time."""
OF_USER: Final = ("profile", "preferences", "device", "topic", "schedule", "ticket", "broadcastFailure")
"""Kinds of lines that are found by the user's name."""
OF_STREAM: Final = ("revokedToken", "amendment", "mergedEvent", "mergeWindow")
_COLUMNS: Final = len(NotificationRow.__struct_fields__)
_encode: Final = msgspec.json.Encoder().encode


class Exporter:
    """Reads users.

    Args:
        pool: not owned.
        acquire_timeout_s: longest wait for a free connection; none is held between two pieces.
        keys_s: how long idempotency keys live.
        archive: reads what is archived; None: that is left out.
    """

    def __init__(
        self,
        pool: asyncpg.Pool,
        acquire_timeout_s: float,
        keys_s: float,
        archive: ArchiveExport | None = None,
    ) -> None:
        self._archive = archive
        self._pool = pool
        self._timeout_s = acquire_timeout_s
        self._keys_s = keys_s
        self._sql = {
            name: text.replace("%(row)s", ROW_COLUMNS) for name, text in load_queries("export").items()
        }

    async def lines(self, tenant: str, user: str, now_ms: int) -> AsyncGenerator[list[str]]:
        """Pieces of the export, each a list of lines `{"kind": ..., ...}`, possibly empty.

        Not a snapshot: each piece is as of when it is read. Raises StoreUnavailableError.
        """
        stream = None
        for row in await self._fetch("stream", tenant, user):
            stream = row[0]
            yield [_line("stream", row[1])]
        for kind in OF_USER:
            yield [_line(kind, row[0]) for row in await self._fetch(kind, tenant, user)]
        if stream is None:
            return
        for kind in OF_STREAM:
            yield [_line(kind, row[0]) for row in await self._fetch(kind, stream)]
        since_s = now_ms / 1000 - self._keys_s
        yield [
            _line("idempotencyKey", row[0]) for row in await self._fetch("idempotencyKey", stream, since_s)
        ]
        user_json = user_json_of(user)
        after = 0
        while True:
            rows = await self._fetch("notifications", stream, after, PAGE)
            yield [_notification(row, user_json) for row in rows]
            if len(rows) < PAGE:
                break
            after = rows[-1]["seq"]
        if (
            self._archive is not None
        ):  # last: what is archived meanwhile is told there, or twice, never left out
            async with contextlib.aclosing(self._archive.lines(tenant, user)) as pieces:
                async for piece in pieces:
                    yield piece

    async def _fetch(self, name: str, *args: Any) -> list[asyncpg.Record]:
        async with acquired(self._pool, self._timeout_s) as connection:
            return await connection.fetch(self._sql[name], *args)


def _line(kind: str, document: str) -> str:
    return f'{{"kind":"{kind}",{document[1:]}'


def _notification(record: asyncpg.Record, user_json: str) -> str:
    raw, *rest = tuple(record)[:_COLUMNS]
    row = NotificationRow(raw.bytes, *rest)
    decision = record["decision"]
    rules = [] if decision is None else told(unpack(decision))
    deliveries = record["deliveries"]
    if not deliveries and record["kept"] is not None:
        kept = exported(record["kept"], record["created_ms"], row.delivered_ms)
        deliveries = [_encode(one).decode() for one in kept]
    return (
        f'{{"kind":"notification","notification":{notification_json(row, user_json)},'
        f'"deliveries":[{",".join(deliveries)}],"rules":{_encode(rules).decode()},'
        f'"receipt":{"null" if record["receipt"] is None else record["receipt"]},'
        f'"variant":{record["exposure"] or "null"}}}'
    )
