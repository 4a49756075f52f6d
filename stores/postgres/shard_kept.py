"""Pushes kept in their notification, as a shard writes them and finds those of its predecessors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from asyncpg.pgproto.pgproto import UUID

from carillon.kept_push import KeptPush
from stores.postgres.named import load_queries
from stores.postgres.shard_connections import ShardConnections

PAGE: Final = 20_000
"""Notifications looked at by one statement, for those that keep pushes."""


def texts(page: int) -> dict[str, str]:
    """The statements, with pages of so many notifications."""
    queries = load_queries("kept")
    return {
        name: text.replace("%(page)s", str(page)).replace("%(open)s", queries["open"])
        for name, text in queries.items()
    }


_SQL: Final = texts(PAGE)


class KeptStore(ShardConnections):
    """The part of `ShardStore` that is about pushes which are no rows of the outbox yet."""

    async def acknowledge_kept(
        self, term: int, told: Sequence[tuple[KeptPush, str, bool]], now_ms: int
    ) -> None:
        """Write what is kept after a signal, and deliveredAt if a device has it (True)."""
        ids = [kept.notification for kept, _, _ in told]
        row = await self._row(
            "acknowledge_kept", term, [UUID(raw) for raw in ids], [kept.stream_id for kept, _, _ in told],
            now_ms / 1000, [text for _, text, _ in told], UUID(min(ids)), UUID(max(ids)),
            [has for _, _, has in told],
        )  # fmt: skip
        self._check(row["fenced"], term)

    async def write_kept(self, term: int, pushes: Sequence[KeptPush], now_ms: int) -> int:
        """Make rows of the outbox of kept pushes; idempotent. Returns how many were made."""
        rows = [(push, channel) for push in pushes for channel in push.channels]
        row = await self._row(
            "write_kept", term,
            [UUID(k.notification) for k, _ in rows], [k.slot for k, _ in rows], [c for _, c in rows],
            [k.due_ms / 1000 for k, _ in rows], [k.gate for k, _ in rows],
            [None if k.hold_until_ms is None else k.hold_until_ms / 1000 for k, _ in rows],
            [k.reason for k, _ in rows], [k.chain for k, _ in rows], [k.step for k, _ in rows],
            ["\n".join(k.shown_on) for k, _ in rows], now_ms / 1000,
        )  # fmt: skip
        self._check(row["fenced"], term)
        return row["made"]

    async def adopt_kept(
        self, term: int, slots: Sequence[int], now_ms: int, streams: Sequence[int] | None = None
    ) -> int:
        """Make rows of the outbox of what earlier owners of `slots` kept, or only what `streams` there keep.
        Idempotent; returns how many were made."""
        if streams is not None:
            settled = await self._row("settled_streams", term, streams)
            self._check(settled["fenced"], term)
        since = await self._row("kept_since", term, slots)
        self._check(since, term)
        made, after = 0, since["since"]
        while after is not None:
            page = await self._row("adopt_kept", term, slots, after, streams, now_ms / 1000)
            self._check(page["fenced"], term)
            made += page["made"]
            after = page["last"] if page["looked"] == PAGE else None
        if streams is None:
            adopted = await self._row("adopted", term, slots)
            self._check(adopted["fenced"], term)
        return made

    async def mark_kept(self, term: int, since: bytes) -> None:
        """Notifications with ids before `since` keep no push of this shard's."""
        row = await self._row("mark_kept", term, UUID(since))
        self._check(row[0], term)

    async def _row(self, name: str, term: int, *args: object) -> Any:
        async with self._reading() as connection:
            return await connection.fetchrow(_SQL[name], self._shard, term, *args)
