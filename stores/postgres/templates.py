"""Templates in Postgres. Reads are not cached here (actors/templates.py does)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

import asyncpg
import msgspec

from carillon.errors import BusyError
from carillon.templates import Template
from stores.postgres.named import load_queries
from stores.postgres.pool import Store, acquired

_TRIES: Final = 5


class TemplateStore(Store):
    """Reads and writes templates."""

    _sql: Final = load_queries("templates")

    def __init__(self, pool: asyncpg.Pool, acquire_timeout_s: float = 5.0, versions_kept: int = 100) -> None:
        super().__init__(pool, acquire_timeout_s)
        self._kept = versions_kept

    async def get(self, tenant: str, template: str, version: int | None = None) -> Template | None:
        """A version, by default the present one; None if there is none."""
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["template"], tenant, template, version)
        return None if row is None else _template(row)

    async def put(self, tenant: str, template: str, document: dict[str, Any], who: str) -> int:
        """Store a new version and return its number; the same document again is no new version.

        Raises:
            BusyError: others store versions of it all the time.
        """
        text = msgspec.json.encode(document).decode()
        for _ in range(_TRIES):
            async with acquired(self._pool, self._timeout_s) as connection:
                known = await connection.fetchrow(self._sql["template"], tenant, template, None)
                if known is not None and known["document"] == text:
                    return known["version"]
                version = await connection.fetchval(self._sql["put_template"], tenant, template, text, who)
                if version is not None:
                    if version > self._kept:
                        await connection.execute(
                            self._sql["prune_versions"], tenant, template, version - self._kept
                        )
                    return version
        raise BusyError(f"template {template} is being changed by others")

    async def delete(self, tenant: str, template: str) -> int:
        """Delete all versions; returns how many there were."""
        async with acquired(self._pool, self._timeout_s) as connection:
            return len(await connection.fetch(self._sql["delete_template"], tenant, template))

    async def page(self, tenant: str, after: str | None, limit: int) -> list[Template]:
        """Present versions by id, those after an id."""
        async with acquired(self._pool, self._timeout_s) as connection:
            return [
                _template(row) for row in await connection.fetch(self._sql["templates"], tenant, after, limit)
            ]

    async def versions(self, tenant: str, template: str) -> list[tuple[int, int, str]]:
        """(version, created ms, who), newest first."""
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(self._sql["versions"], tenant, template)
        return [(row["version"], row["created_ms"], row["created_by"]) for row in rows]

    async def expose(self, tenant: str, shown: Sequence[tuple[bytes, str, int, str]]) -> None:
        """Note who gets which variant: (notification, template, version, variant). Idempotent."""
        ids, templates, versions, variants = zip(*shown, strict=True)
        async with acquired(self._pool, self._timeout_s) as connection:
            await connection.execute(
                self._sql["expose"], tenant, [UUID(bytes=i) for i in ids], templates, versions, variants
            )

    async def exposure(self, tenant: str, notification: bytes) -> tuple[str, int, str] | None:
        """What a notification shows, (template, version, variant); None: of no template with variants."""
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["exposure"], tenant, UUID(bytes=notification))
        return None if row is None else (row["template_id"], row["version"], row["variant"])

    async def results(self, tenant: str, template: str, version: int) -> dict[str, tuple[int, int, int, int]]:
        """By variant: how many were sent, delivered, seen, clicked."""
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(self._sql["results"], tenant, template, version)
        return {row["variant"]: (row["sent"], row["delivered"], row["seen"], row["clicked"]) for row in rows}

    async def locales(self, tenant: str, users: Sequence[str]) -> dict[str, str]:
        """The locales of those users that have one."""
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(self._sql["locales"], tenant, list(users))
        return {row["user_id"]: row["locale"] for row in rows}


def _template(row: asyncpg.Record) -> Template:
    return Template(
        row["template_id"], row["version"], msgspec.json.decode(row["document"]), row["created_ms"]
    )
