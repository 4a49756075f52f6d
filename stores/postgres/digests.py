"""Digests in Postgres: outbox rows that wait together. Kept by shards, shown by the ingress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

import asyncpg

from carillon.digest import Told
from carillon.errors import FencedError
from stores.postgres.named import load_queries
from stores.postgres.pool import Store, acquired
from stores.postgres.shard_rows import Claimed, ToldItem

_SQL: Final = load_queries("digests")

Place = tuple[int, str, int]
"""Slot, user, outbox row: up to where the digests of a tenant were looked through."""
START: Final[Place] = (0, "", 0)
REST: Final = 20_000
"""Items that one statement tells beyond those that were looked at."""


@dataclass(slots=True)
class WaitingItem:
    """An outbox row that waits in a digest of the user's preferences."""

    delivery: int
    digest: bytes
    type: str
    category: str | None
    priority: int
    due_ms: int


@dataclass(slots=True)
class WaitingOf(WaitingItem):
    """One of all users'."""

    stream_id: int
    user: str
    preferences: str | None
    """The user's document."""
    zone: str | None
    """Of the user's profile."""


@dataclass(slots=True)
class OpenItem:
    """One notification of an open digest."""

    notification: bytes
    seq: int
    type: str
    category: str | None
    content: str
    decision: str | None
    channels: list[str]
    created_ms: int


@dataclass(slots=True)
class OpenDigest:
    """A digest that was not told yet."""

    id: bytes
    due_ms: int
    items: int
    """How many; `newest` may be fewer."""
    reason: str | None
    newest: list[OpenItem] = field(default_factory=list)
    """Oldest first."""


class DigestStore:
    """What a shard reads and writes of digests: every write behind the fence of its term.

    Args:
        pool: gives the connections.
        shard: its name.
        acquire_timeout_s: longest wait for a free connection.
        claimed: statement that reads claimed rows by their ids, and what makes `Claimed` of one.

    All methods raise StoreUnavailableError while Postgres does not answer; those that write FencedError once
    the term is over.
    """

    def __init__(
        self,
        pool: Callable[[], asyncpg.Pool],
        shard: str,
        acquire_timeout_s: float,
        claimed: tuple[str, Callable[[Any], Claimed]],
    ) -> None:
        self._pool = pool
        self._shard = shard
        self._timeout_s = acquire_timeout_s
        self._claimed = claimed

    async def gather(
        self, term: int, digests: Sequence[tuple[int, bytes]], now_ms: int, lease_end_ms: int, most: int
    ) -> list[Claimed]:
        """Claim what else of digests (stream, id) is due; without its content, and its user's document.

        Args:
            most: rows of each digest, the newest.
        """
        async with acquired(self._pool(), self._timeout_s) as connection:
            rows = await connection.fetch(
                _SQL["gather"], self._shard, term, [stream for stream, _ in digests],
                [UUID(bytes=raw) for _, raw in digests], now_ms / 1000, lease_end_ms / 1000,
                most,
            )  # fmt: skip
            if not rows:
                return []
            sql, read = self._claimed
            return [read(r) for r in await connection.fetch(sql, [r[0] for r in rows])]

    async def tell(
        self,
        term: int,
        rows: Sequence[tuple[int, int]],
        decide: Callable[[frozenset[int], frozenset[int]], list[Told]],
        now_ms: int,
        beyond: Collection[tuple[int, bytes]] = (),
    ) -> list[Told]:
        """Write which claimed rows are told by which.

        Args:
            rows: (outbox row, attempt).
            decide: called with the rows that are still ours and those of them that were dealt with since they
                were claimed; nothing can change while it runs.
            beyond: digests (stream, id) of which more is due than was looked at: it is told with what was, on
                the same channel.

        Returns:
            What `decide` said, with how many more each tells.

        Atomicity: all or nothing; what is dealt with later finds the rows told.
        """
        async with acquired(self._pool(), self._timeout_s) as connection, connection.transaction():
            await self._fence(connection, term)
            locked = await connection.fetch(_SQL["lock"], [r for r, _ in rows], [a for _, a in rows])
            dealt_with = frozenset(r["id"] for r in locked if r["dealt_with"])
            told = decide(frozenset(r["id"] for r in locked), dealt_with)
            columns: list[tuple[int, int | None, int]] = [
                (item, one.carrier, len(one.items)) for one in told for item in one.items
            ]
            columns += [(item, None, 0) for item in dealt_with]
            if columns:
                await connection.execute(
                    _SQL["tell"], [c[0] for c in columns], [c[1] for c in columns], [c[2] for c in columns],
                    now_ms / 1000,
                )  # fmt: skip
            if beyond and told:
                told = await self._tell_rest(connection, told, beyond, now_ms)
        return told

    async def _tell_rest(
        self, connection: Any, told: list[Told], beyond: Collection[tuple[int, bytes]], now_ms: int
    ) -> list[Told]:
        of = await connection.fetch(
            "select id, stream_id, digest from deliveries where id = any ($1::bigint[])",
            [one.carrier for one in told],
        )
        carriers = [r["id"] for r in of if (r["stream_id"], r["digest"].bytes) in beyond]
        more: Counter[int] = Counter()
        found = REST if carriers else 0
        while found == REST:
            rows = await connection.fetch(_SQL["tell_rest"], carriers, now_ms / 1000, REST)
            found = sum(r["found"] for r in rows)
            more.update({r["carrier"]: r["told"] for r in rows})
        if more:
            await connection.execute(_SQL["tell_for_more"], list(more), list(more.values()))
        return [one._replace(more=more[one.carrier]) for one in told]

    async def told(self, carriers: Sequence[int], most: int, with_content: int) -> dict[int, list[ToldItem]]:
        """The newest items that carriers speak for, newest first.

        Args:
            most: items of each.
            with_content: of so many of them the content, too.
        """
        async with acquired(self._pool(), self._timeout_s) as connection:
            rows = await connection.fetch(_SQL["told"], carriers, most, with_content)
        found: dict[int, list[ToldItem]] = {}
        for r in rows:
            item = ToldItem(r["id"].bytes, r["type"], r["content"], r["expires_ms"], r["shown_on"])
            found.setdefault(r["carrier"], []).append(item)
        return found

    async def next_moment(self, slots: Sequence[int], after_ms: int) -> int | None:
        """When the next outbox row that rules hold is due; None: there is none."""
        async with acquired(self._pool(), self._timeout_s) as connection:
            return await connection.fetchval(_SQL["next_moment"], slots, after_ms / 1000)

    async def flush(
        self, term: int, stream_id: int, digest: bytes, reason: str, now_ms: int
    ) -> tuple[int, bool]:
        """Make an open digest due now: (how many notifications it has, whether it is known)."""
        return await self._counted("flush", term, stream_id, UUID(bytes=digest), now_ms / 1000, reason)

    async def remove(
        self, term: int, stream_id: int, digest: bytes, notification: bytes, now_ms: int
    ) -> tuple[int, bool]:
        """Take an item out of an open digest: (rows that were waiting, whether it is out now)."""
        return await self._counted(
            "remove", term, stream_id, UUID(bytes=digest), UUID(bytes=notification), now_ms / 1000
        )

    async def _counted(self, name: str, term: int, *args: Any) -> tuple[int, bool]:
        async with acquired(self._pool(), self._timeout_s) as connection:
            row: Any = await connection.fetchrow(_SQL[name], self._shard, term, *args)
        self._check(row["fenced"], term)
        return row["items"], row["known"]

    async def waiting(self, stream_id: int) -> list[WaitingItem]:
        """What waits in digests that the preferences of a user ask for."""
        async with acquired(self._pool(), self._timeout_s) as connection:
            rows = await connection.fetch(_SQL["waiting"], stream_id)
        return [
            WaitingItem(r["id"], r["digest"].bytes, r["type"], r["category"], r["priority"], r["due_ms"])
            for r in rows
        ]

    async def waiting_of(
        self, tenant: str, slots: Sequence[int], after: Place, limit: int
    ) -> tuple[list[WaitingOf], Place | None]:
        """The same of all users of a tenant, some at a time.

        Args:
            after: where to begin.
            limit: at least 2.

        Returns:
            What was found, and where to go on; None: there is no more.
        """
        async with acquired(self._pool(), self._timeout_s) as connection:
            rows = await connection.fetch(_SQL["waiting_of"], tenant, slots, *after, limit)
        items = [
            WaitingOf(
                r["id"], r["digest"].bytes, r["type"], r["category"], r["priority"], r["due_ms"],
                r["stream_id"], r["user_id"], r["preferences"], r["zone"],
            )
            for r in rows
            if r["id"] is not None
        ]  # fmt: skip
        if len(rows) < limit:
            return items, None
        last = rows[-1]
        return items, (last["slot"], last["user_id"], last["id"] or 0)

    async def move(self, term: int, rows: Sequence[tuple[int, bytes, int]], now_ms: int) -> int:
        """Let outbox rows wait in other digests: (row, digest, due). Returns how many were waiting."""
        async with acquired(self._pool(), self._timeout_s) as connection:
            row: Any = await connection.fetchrow(
                _SQL["move"], self._shard, term, [r[0] for r in rows], [UUID(bytes=r[1]) for r in rows],
                [r[2] / 1000 for r in rows], now_ms / 1000,
            )  # fmt: skip
        self._check(row["fenced"], term)
        return row["moved"]

    async def _fence(self, connection: Any, term: int) -> None:
        self._check(
            await connection.fetchval(
                "select 1 from shards where shard = $1 and term = $2 for share", self._shard, term
            ),
            term,
        )

    def _check(self, fenced: Any, term: int) -> None:
        if not fenced:
            raise FencedError(f"term {term} of {self._shard} is over")


class DigestReader(Store):
    """Reads open digests."""

    async def open(self, tenant: str, user: str, *, items: int, digests: int) -> list[OpenDigest]:
        """Open digests of a user by due time.

        Args:
            items: newest items of each.
            digests: the first so many.

        Raises:
            StoreUnavailableError: Postgres does not answer.
        """
        if "\0" in user:
            return []
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(_SQL["open_digests"], tenant, user, items, digests)
        found: dict[bytes, OpenDigest] = {}
        for r in rows:
            raw = r["digest"].bytes
            if raw not in found:
                found[raw] = OpenDigest(raw, r["due_ms"], r["items"], r["reason"])
            found[raw].newest.append(
                OpenItem(
                    r["notification_id"].bytes,
                    r["seq"],
                    r["type"],
                    r["category"],
                    r["content"],
                    r["decision"],
                    list(r["channels"]),
                    r["created_ms"],
                )
            )
        return list(found.values())
