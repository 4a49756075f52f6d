"""Segments in Postgres."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from carillon.ids import SLOTS
from carillon.segments import compile_path, parse_filter, uses
from stores.postgres.audience import audience_queries
from stores.postgres.named import load_queries
from stores.postgres.pool import Store, acquired

_CHUNK: Final = 64
"""Slots counted by one statement."""


@dataclass(slots=True)
class SegmentRecord:
    """A segment as kept."""

    id: str
    document: str
    created_ms: int
    updated_ms: int


@dataclass(slots=True)
class SegmentCount:
    """How many users fit."""

    count: int
    exact: bool
    """False: worked out from some of the slots, over which users are spread by a hash."""
    users: int
    """Users there are, as exact as `count`."""


class SegmentStore(Store):
    """Reads and writes segments."""

    _sql: Final = load_queries("segments")
    _count_sql: Final = audience_queries(counts=True)["segment_count"]

    async def put(self, tenant: str, segment: str, document: str, now_ms: int) -> None:
        """Keep a segment.

        Args:
            document: valid, with `filter`.
        """
        tree = parse_filter(msgspec.json.decode(document)["filter"])
        path, variables = compile_path(tree)
        async with acquired(self._pool, self._timeout_s) as connection:
            await connection.execute(
                self._sql["put"], tenant, segment, document, path, msgspec.json.encode(variables).decode(),
                uses(tree, "platform"), now_ms / 1000,
            )  # fmt: skip

    async def get(self, tenant: str, segment: str) -> SegmentRecord | None:
        """A segment, None if there is none."""
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["get"], tenant, segment)
        return None if row is None else SegmentRecord(*row)

    async def page(self, tenant: str, after: str, limit: int) -> list[SegmentRecord]:
        """Segments behind an id, by id."""
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(self._sql["page"], tenant, after, limit)
        return [SegmentRecord(*row) for row in rows]

    async def delete(self, tenant: str, segment: str) -> bool:
        """Forget a segment; False if there was none."""
        async with acquired(self._pool, self._timeout_s) as connection:
            return await connection.fetchrow(self._sql["delete"], tenant, segment) is not None

    async def count(self, tenant: str, document: str, enough: Callable[[], bool]) -> SegmentCount:
        """How many users fit.

        Args:
            enough: asked between statements: True ends the counting, and the rest is estimated.
        """
        tree = parse_filter(msgspec.json.decode(document)["filter"])
        path, variables = compile_path(tree)
        told = msgspec.json.encode(variables).decode()
        looked = users = fitting = 0
        for first in range(SLOTS // _CHUNK):
            slots = list(range(first, SLOTS, SLOTS // _CHUNK))
            async with acquired(self._pool, self._timeout_s) as connection:
                row = await connection.fetchrow(
                    self._count_sql, tenant, slots, path, told, uses(tree, "platform")
                )
            assert row is not None
            users, fitting, looked = users + row["users"], fitting + row["fitting"], looked + len(slots)
            if enough():
                break
        if looked == SLOTS:
            return SegmentCount(fitting, True, users)
        return SegmentCount(round(fitting * SLOTS / looked), False, round(users * SLOTS / looked))
