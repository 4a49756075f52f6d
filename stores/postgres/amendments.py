"""What a shard writes when a service edits, retracts or cancels what it sent: behind the fence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from asyncpg.pgproto.pgproto import UUID

from carillon.notification import NotificationRow
from stores.postgres.shard_connections import ShardConnections

RETRACT: Final = {
    "where": "true",
    "set": "retracted_at = to_timestamp($5)",
    "gone": "a.gone",
    "retire": "true",
    "reason": "'retracted'",
}
"""The durable change of a retraction, as `OPERATIONS` of shard_store.py has those of users."""


@dataclass(slots=True)
class Amended:
    """One notification that is to be changed by a service."""

    stream_id: int
    notification: bytes
    act: bytes
    """Minted before the first try."""
    actor: str


@dataclass(slots=True)
class EditRow(Amended):
    """New content of one notification."""

    content: str = ""
    expires_ms: int | None = None
    version: int = 1
    """Of the content that was edited."""
    shown: bool = False
    """A push shows something else now."""


@dataclass(slots=True)
class Standing:
    """Where a notification stands."""

    content: str
    version: int
    expires_ms: int | None
    updated_ms: int | None
    retracted_ms: int | None
    cancelled_ms: int | None
    stopped: int
    """Pushes that a cancellation stopped."""
    done: bool
    """The act that was asked about took effect already."""


@dataclass(slots=True)
class EditDone:
    """What an edit did to one stream."""

    row: NotificationRow
    unread: int
    replaced: int
    """Pushes that are to take the place of what phones show, due now."""


class Amendments(ShardConnections):
    """The part of `ShardStore` that is about amendments.

    Attributes:
        amend_sql: its statements: retract, cancel, standing, edit.
    """

    amend_sql: dict[str, str]

    async def retract(
        self, term: int, wanted: Sequence[Amended], now_ms: int
    ) -> dict[int, tuple[int, int, int]]:
        """Retract notifications, one of each stream; what waits outside of the app ends, and what phones show
        is taken back.

        Returns:
            stream id -> (rev, unread, pushes to be taken back) where something changed.
        """
        async with self._writing() as connection:
            rows = await connection.fetch(
                self.amend_sql["retract"], self._shard, term,
                [UUID(w.notification) for w in wanted], [w.stream_id for w in wanted], now_ms / 1000,
                [""] * len(wanted), True, [UUID(w.act) for w in wanted], [w.actor for w in wanted],
            )  # fmt: skip
        self._check(rows, term)
        return {r[0]: (r[1], r[2], r[4]) for r in rows if r[0]}

    async def expired(self, streams: Sequence[int], now_ms: int) -> dict[int, tuple[int, int | None]]:
        """stream id -> (unread rows that have expired, when the next one will)."""
        async with self._writing() as connection:
            rows = await connection.fetch(self._sql["expired"], streams, now_ms / 1000)
        return {r[0]: (r[1], r[2]) for r in rows}

    async def cancel(self, term: int, wanted: Sequence[Amended], now_ms: int) -> int:
        """Stop what is pending of notifications; returns of how many for the first time."""
        async with self._writing() as connection:
            row: Any = await connection.fetchrow(
                self.amend_sql["cancel"], self._shard, term,
                [UUID(w.notification) for w in wanted], [w.stream_id for w in wanted], now_ms / 1000,
                [UUID(w.act) for w in wanted], [w.actor for w in wanted],
            )  # fmt: skip
        self._check(row["fenced"], term)
        return row["cancelled"]

    async def standing(self, wanted: Sequence[Amended]) -> dict[bytes, Standing]:
        """Where notifications stand; those that do not exist are left out."""
        async with self._writing() as connection:
            rows = await connection.fetch(
                self.amend_sql["standing"], [UUID(w.notification) for w in wanted],
                [w.stream_id for w in wanted], [UUID(w.act) for w in wanted],
            )  # fmt: skip
        return {r[0].bytes: Standing(*r[1:]) for r in rows}

    async def edit(self, term: int, wanted: Sequence[EditRow], now_ms: int, keep: int) -> dict[int, EditDone]:
        """Replace the content of notifications, one of each stream.

        Args:
            keep: former contents kept of one notification.

        Returns:
            stream id -> what changed; where another version stands by now nothing does.
        """
        async with self._writing() as connection:
            rows = await connection.fetch(
                self.amend_sql["edit"], self._shard, term,
                [UUID(w.notification) for w in wanted], [w.stream_id for w in wanted], now_ms / 1000,
                [w.content for w in wanted],
                [None if w.expires_ms is None else w.expires_ms / 1000 for w in wanted],
                [w.version for w in wanted], [UUID(w.act) for w in wanted], [w.actor for w in wanted],
                [w.shown for w in wanted], keep,
            )  # fmt: skip
        self._check(rows, term)
        return dict(_edited(record) for record in rows if record[1] is not None)


def _edited(record: Any) -> tuple[int, EditDone]:
    _, raw, *state, stream_id, unread, replaced = record
    return stream_id, EditDone(NotificationRow(raw.bytes, *state), unread, replaced)
