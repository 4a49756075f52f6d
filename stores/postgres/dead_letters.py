"""Dead letters as the ingress reads them: deliveries that were given up."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any, Final

import asyncpg

from carillon.errors import InvalidInputError
from stores.postgres.named import load_queries
from stores.postgres.pool import Store, acquired

_ROW: Final = """d.id, d.notification_id, s.user_id, d.slot, d.channel, d.step, d.reason, d.attempts, n.type,
       n.content, (extract(epoch from d.created_at) * 1000)::bigint as created_ms,
       (extract(epoch from d.updated_at) * 1000000)::bigint as died_us,
       (extract(epoch from d.replayed_at) * 1000)::bigint as replayed_ms"""

TOP: Final = (253_402_300_799_000_000, 2**63 - 1)
"""Above every position (time in us, id): the first page."""

MAX_ID: Final = 2**63 - 1


@dataclass(frozen=True)
class DeadLetter:
    """One delivery that was given up."""

    id: int
    notification: bytes
    user: str
    slot: int
    channel: str
    step: int
    reason: str
    attempts: int
    type: str
    content: str
    created_ms: int
    died_us: int
    replayed_ms: int | None
    """When it was last replayed, if ever."""


@dataclass(frozen=True)
class DeadFilter:
    """Which dead letters; None means all."""

    user: str | None = None
    type: str | None = None
    channel: str | None = None
    reason: str | None = None
    """Text to find in the reason, whatever its case."""
    since_ms: int | None = None
    """Died at or after."""
    until_ms: int | None = None
    """Died before."""


def encode_cursor(letter: DeadLetter) -> str:
    """An opaque cursor: what follows it begins after `letter`."""
    return base64.urlsafe_b64encode(b"d%d.%d" % (letter.died_us, letter.id)).rstrip(b"=").decode()


def decode_cursor(cursor: str) -> tuple[int, int]:
    """The position of a cursor.

    Raises:
        InvalidInputError: it is not one of ours.
    """
    try:
        text = base64.b64decode(cursor.encode() + b"=" * (-len(cursor) % 4), b"-_", validate=True).decode()
        died, _, number = text[1:].partition(".")
        if text[:1] != "d" or not (died.isdigit() and number.isdigit()) or len(text) > 42:
            raise ValueError
        position = (int(died), int(number))
    except (ValueError, binascii.Error):
        position = (TOP[0] + 1, 0)
    if position[0] > TOP[0] or position[1] > TOP[1]:
        raise InvalidInputError(
            "expected cursor to be a cursor of this call", "cursor", "a cursor of this call", cursor[:40]
        )
    return position


class DeadLetterReader(Store):
    """Reads dead letters."""

    def __init__(self, pool: asyncpg.Pool, acquire_timeout_s: float = 5.0) -> None:
        super().__init__(pool, acquire_timeout_s)
        self._sql = {
            name: text.replace("%(row)s", _ROW) for name, text in load_queries("dead_letters").items()
        }
        page = self._sql.pop("page")
        self._page_sql = {of: page.replace("%(of)s", self._sql.pop(of)) for of in ("of_tenant", "of_user")}

    async def page(
        self, tenant: str, chosen: DeadFilter, cursor: str | None, limit: int
    ) -> tuple[list[DeadLetter], str | None]:
        """One page, newest first, and the cursor of the next (None: this is the last).

        Raises:
            InvalidInputError: the cursor is none of ours.
        """
        sql, arguments = self._question(tenant, chosen, cursor, limit + 1)
        if not sql:
            return [], None
        async with acquired(self._pool, self._timeout_s) as connection:
            found = await connection.fetch(sql, *arguments)
        rows = [_letter(record) for record in found[:limit]]
        return rows, encode_cursor(rows[-1]) if len(found) > limit else None

    async def count(self, tenant: str, chosen: DeadFilter, cursor: str | None, most: int) -> int:
        """How many there are after a cursor, counted up to `most`."""
        sql, arguments = self._question(tenant, chosen, cursor, most)
        if not sql:
            return 0
        async with acquired(self._pool, self._timeout_s) as connection:
            found = await connection.fetchval(
                f"select count(*) from ({sql.rstrip().rstrip(';')}) t",  # noqa: S608  of queries/
                *arguments,
            )
        return int(found or 0)

    async def some(self, tenant: str, ids: list[int]) -> list[DeadLetter]:
        """Those of the ids that are dead letters of the tenant."""
        if not ids:
            return []
        async with acquired(self._pool, self._timeout_s) as connection:
            return [_letter(record) for record in await connection.fetch(self._sql["some"], tenant, ids)]

    async def attempts(self, delivery: int) -> list[dict[str, Any]]:
        """Every try of a delivery, in order."""
        async with acquired(self._pool, self._timeout_s) as connection:
            return [dict(record) for record in await connection.fetch(self._sql["attempts"], delivery)]

    def _question(
        self, tenant: str, chosen: DeadFilter, cursor: str | None, limit: int
    ) -> tuple[str, tuple[Any, ...]]:
        """The query and its arguments; an empty one if nothing can be found."""
        before = TOP if cursor is None else decode_cursor(cursor)
        if chosen.until_ms is not None:
            before = min(before, (chosen.until_ms * 1000, 0))
        words = (tenant, chosen.user, chosen.type, chosen.channel, chosen.reason)
        if any("\0" in word for word in words if word):
            return "", ()
        of = "of_tenant" if chosen.user is None else "of_user"
        since_s = 0.0 if chosen.since_ms is None else chosen.since_ms / 1000
        reason = chosen.reason.lower() if chosen.reason else None
        return self._page_sql[of], (
            tenant, chosen.user, since_s, *before, limit, chosen.type, chosen.channel, reason,
        )  # fmt: skip


def _letter(record: asyncpg.Record) -> DeadLetter:
    return DeadLetter(
        record["id"],
        record["notification_id"].bytes,
        record["user_id"],
        record["slot"],
        record["channel"],
        record["step"],
        record["reason"] or "",
        record["attempts"],
        record["type"],
        record["content"],
        record["created_ms"],
        record["died_us"],
        record["replayed_ms"],
    )
