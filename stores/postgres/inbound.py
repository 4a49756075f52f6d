"""Sources of webhooks in Postgres."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import asyncpg
import msgspec

from stores.postgres.named import load_queries
from stores.postgres.pool import Store, acquired


@dataclass(frozen=True)
class SourceRecord:
    """A source as kept."""

    id: str
    tenant: str
    name: str
    document: dict[str, Any]
    secret: str
    previous_secret: str | None
    previous_until_ms: int
    created_ms: int

    def secrets(self, now_ms: int) -> list[str]:
        """Those that may have signed."""
        if self.previous_secret is None or now_ms >= self.previous_until_ms:
            return [self.secret]
        return [self.secret, self.previous_secret]


class InboundStore(Store):
    """Reads and writes sources."""

    _sql: Final = load_queries("inbound")

    async def put(
        self, tenant: str, name: str, document: dict[str, Any], new_id: str, secret: str, given: bool,
        until_ms: int,
    ) -> tuple[str, bool]:  # fmt: skip
        """Store a source: (its id, whether it is new). `secret` replaces one only if it was `given`."""
        text = msgspec.json.encode(document).decode()
        async with acquired(self._pool, self._timeout_s) as connection:
            row: Any = await connection.fetchrow(
                self._sql["put_source"], new_id, tenant, name, text, secret, given, until_ms / 1000
            )
        return row["source_id"], row["made"]

    async def source(self, source: str) -> SourceRecord | None:
        """The source of an id, None if there is none."""
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["source"], source)
        return None if row is None else _record(row)

    async def sources(self, tenant: str, name: str | None = None) -> list[SourceRecord]:
        """The sources of a tenant by name, at most 1,000; or the one of a name."""
        async with acquired(self._pool, self._timeout_s) as connection:
            return [_record(row) for row in await connection.fetch(self._sql["sources"], tenant, name)]

    async def delete(self, tenant: str, name: str) -> str | None:
        """Delete a source; its id, None if there was none."""
        async with acquired(self._pool, self._timeout_s) as connection:
            return await connection.fetchval(self._sql["delete_source"], tenant, name)


def _record(row: asyncpg.Record) -> SourceRecord:
    return SourceRecord(
        row["source_id"], row["tenant"], row["name"], msgspec.json.decode(row["document"]), row["secret"],
        row["previous_secret"], row["previous_until_ms"] or 0, row["created_ms"],
    )  # fmt: skip
