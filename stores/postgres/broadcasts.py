"""Broadcasts in Postgres: kept by the ingress, carried out by the shards that own the slots."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg
import msgspec

from carillon.audience import ALL, Audience
from carillon.broadcasts import (
    EXACT_BELOW,
    RUNNING,
    SAMPLED_SLOTS,
    Counts,
    Mark,
    NotificationIds,
    Recipients,
    SlotUser,
    estimated,
    members,
    parse_recipients,
)
from carillon.errors import FencedError, IdempotencyConflictError, StoreUnavailableError, UnavailableError
from carillon.ids import SLOTS
from stores.postgres.audience import AudienceReader, audience_queries
from stores.postgres.broadcast_append import COUNTS, TURNS, BroadcastAppend, mark_parameters, numbered
from stores.postgres.named import load_queries
from stores.postgres.pool import Store, acquired

_ROW: Final = ", ".join(
    [
        "b.broadcast_id, b.audience, b.event, b.state, b.reason, b.total, b.ran_ms",
        *(f"b.{name} + coalesce(s.{name}, 0) as {name}" for name in COUNTS),
        *(
            f"(extract(epoch from b.{name}) * 1000)::bigint as {name.removesuffix('_at')}_ms"
            for name in ("start_at", "started_at", "resumed_at", "ended_at", "created_at")
        ),
    ]
)


_MANY: Final = 1 << 60
COUNT_S: Final = 2.0
"""Longest count of an audience."""


class TooManyError(UnavailableError):
    """The tenant has as many broadcasts as it may: nothing was kept."""

    code = "too_many"


class NotRunningError(UnavailableError):
    """The broadcast was paused, or has ended: nothing was written."""

    code = "not_running"


@dataclass(slots=True)
class NewBroadcast:
    """A broadcast to keep."""

    id: bytes
    recipients: Recipients
    event: str
    state: str
    start_ms: int
    key: str | None = None
    body_hash: bytes | None = None


@dataclass(slots=True)
class BroadcastRecord:
    """A broadcast as kept."""

    id: bytes
    audience: str
    event: str
    state: str
    reason: str | None
    total: int | None
    ran_ms: int
    """Before `resumed_ms`."""
    counts: Counts
    start_ms: int
    started_ms: int | None
    resumed_ms: int | None
    ended_ms: int | None
    created_ms: int


@dataclass(slots=True)
class ActiveBroadcast:
    """What shards need to know of one that runs or is to begin."""

    id: bytes
    tenant: str
    recipients: Recipients
    event: dict[str, Any]
    state: str
    total: int | None
    started_ms: int | None


@dataclass(slots=True)
class Failure:
    """A user who could not be notified."""

    user: str
    code: str
    detail: str
    failed_ms: int = 0


class Context(NamedTuple):
    """What decides about one user who is not in memory; about users who have the same it is decided once."""

    providers: tuple[str, ...] = ()
    preferences: str | None = None
    zone: str | None = None
    """Time zone of the user's profile."""


PLAIN: Final = Context()


class Contexts(NamedTuple):
    """What decides about the users of a page."""

    streams: dict[str, int]
    """User -> stream; a user who is missing has none yet."""
    others: dict[str, Context]
    """Of users who have anything that decides; all others are `PLAIN`."""


def paging_queries() -> dict[str, str]:
    """Pages over several slots, by kind of audience: its own query for each slot, in the order asked.

    $1 tenant, $2 slots, $3 their last users, $4 limit, $5 platforms, and what the query of the kind takes.
    """
    return {kind: _each(text, "> p.last", "limit $4") for kind, text in audience_queries().items()}


def membership_queries() -> dict[str, str]:
    """Which of some users are meant, by kind of audience: the page of each user alone.

    Parameters as of `paging_queries`, with users in place of the last ones and 1 for the limit.
    """
    return {kind: _each(text, "= p.last", "") for kind, text in audience_queries().items()}


def _each(text: str, after: str, rest: str) -> str:
    inner = text.replace("$2::smallint", "p.slot").replace("> $3", after)
    return (
        "select p.slot, u.user_id from unnest($2::smallint[], $3::text[]) as p (slot, last) "  # noqa: S608
        f"cross join lateral ({inner}) u {rest}"
    )


class BroadcastStore(Store):
    """Reads and writes broadcasts."""

    def __init__(self, pool: asyncpg.Pool, acquire_timeout_s: float = 5.0) -> None:
        super().__init__(pool, acquire_timeout_s)
        queries = load_queries("broadcasts")
        self.sql: Mapping[str, str] = {
            name: text.replace("%(row)s", _ROW).replace("%(sums)s", queries["sums"])
            for name, text in queries.items()
        }
        self._contexts = {
            dense: queries["contexts"] % {"streams": queries[name]}
            for dense, name in ((False, "streams_of"), (True, "streams_between"))
        }
        self._mark = numbered(self.sql["mark"], "p", 1).replace("%(from)s", "")
        self.chunks = BroadcastAppend(self.sql)
        self._paging = paging_queries()
        self._membership = membership_queries()
        self._audiences = AudienceReader(pool, acquire_timeout_s)

    # -- the ingress -----------------------------------------------------------------------------------

    async def add(
        self, tenant: str, new: NewBroadcast, now_ms: int, most: int | None = None
    ) -> tuple[bytes, bool]:
        """Keep a broadcast: (id, whether it was there already).

        Args:
            most: how many the tenant may have of its kind: if it is scheduled those that wait for their time,
                else those that began and have not ended. None: any number.

        Raises:
            IdempotencyConflictError: its key was used with another body.
            TooManyError: the tenant has so many.
        """
        async with acquired(self._pool, self._timeout_s) as connection, connection.transaction():
            await connection.execute(self.sql["turn"], tenant)
            row = await connection.fetchrow(
                self.sql["add"], UUID(bytes=new.id), tenant,
                msgspec.json.encode(new.recipients.json()).decode(), new.event, new.state,
                new.start_ms / 1000, new.key, new.body_hash, now_ms / 1000, _MANY if most is None else most,
            )  # fmt: skip
            if row is not None:
                return new.id, False
            known = await connection.fetchrow(self.sql["known"], tenant, new.key)
        if known is None:
            raise TooManyError(f"expected fewer than {most} such broadcasts, the tenant has as many")
        if known["body_hash"] != new.body_hash:
            raise IdempotencyConflictError("the idempotency key was used with another body")
        return known["broadcast_id"].bytes, True

    async def foretell(self, tenant: str, new: NewBroadcast, most: int) -> bytes | None:
        """What `add` would find: the broadcast that its key stands for, None if it would be kept.

        Raises: as `add`.
        """
        async with acquired(self._pool, self._timeout_s) as connection:
            known = None
            if new.key is not None:
                known = await connection.fetchrow(self.sql["known"], tenant, new.key)
            if known is None:
                open_ones: Any = await connection.fetchval(self.sql["open"], tenant, new.state)
                if open_ones >= most:
                    raise TooManyError(f"expected fewer than {most} such broadcasts, the tenant has as many")
                return None
        if known["body_hash"] != new.body_hash:
            raise IdempotencyConflictError("the idempotency key was used with another body")
        return known["broadcast_id"].bytes

    async def check(self, tenant: str, audience: Audience) -> None:
        """Raises NotFoundError: there is no such segment."""
        await self._audiences.page(tenant, audience, 0, "", 1)

    async def get(self, tenant: str, broadcast: bytes) -> BroadcastRecord | None:
        """A broadcast, None if there is none."""
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self.sql["broadcast"], tenant, UUID(bytes=broadcast))
        return None if row is None else _record(row)

    async def page(
        self, tenant: str, state: str | None, before: bytes | None, limit: int
    ) -> list[BroadcastRecord]:
        """Broadcasts, newest first; those in a state; those before an id."""
        last = None if before is None else UUID(bytes=before)
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(self.sql["broadcasts"], tenant, state, last, limit)
        return [_record(row) for row in rows]

    async def act(
        self, tenant: str, broadcast: bytes, state: str, sources: Sequence[str], now_ms: int
    ) -> bool:
        """Bring a broadcast to a state from some others; False if it was in none of them.

        Ordering: what is being written for it is committed before this returns; nothing is after a pause or
        a cancellation.
        """
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(
                self.sql["act"], tenant, UUID(bytes=broadcast), state, list(sources), now_ms / 1000
            )
        return row is not None

    async def failures(self, broadcast: bytes, after_user: str, limit: int) -> list[Failure]:
        """Users who could not be notified, by name."""
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(self.sql["failures"], UUID(bytes=broadcast), after_user, limit)
        return [Failure(*row) for row in rows]

    async def broadcast_of(self, tenant: str, user: str, notification: bytes) -> bytes | None:
        """The broadcast that made a notification; None if none did."""
        began_ms = int.from_bytes(notification[:6])
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(self.sql["begun_at"], tenant, began_ms / 1000)
        for row in rows:
            found: bytes = row["broadcast_id"].bytes
            if NotificationIds(found, began_ms).of(user) == notification:
                return found
        return None

    # -- the shard -------------------------------------------------------------------------------------

    async def active(self, now_ms: int) -> list[ActiveBroadcast]:
        """What runs or is to begin now, the oldest first."""
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(self.sql["active"], now_ms / 1000)
        return [
            ActiveBroadcast(
                row["broadcast_id"].bytes, row["tenant"],
                parse_recipients(msgspec.json.decode(row["audience"])), msgspec.json.decode(row["event"]),
                row["state"], row["total"], row["started_ms"],
            )
            for row in rows
        ]  # fmt: skip

    async def begin(self, broadcast: bytes, now_ms: int) -> None:
        """Let one begin whose time has come. Idempotent: whoever comes first sets the moment."""
        await self._execute("begin", UUID(bytes=broadcast), now_ms / 1000)

    async def fail(self, broadcast: bytes, reason: str, now_ms: int) -> None:
        """End one that cannot go on."""
        await self._execute("fail", UUID(bytes=broadcast), reason[:500], now_ms / 1000)

    async def estimate(self, one: ActiveBroadcast) -> int:
        """Count its users, or estimate them if they are many or cannot be counted soon, and keep that."""
        total = len(one.recipients.users)
        if one.recipients.audience is not None:
            total, _ = await self.count(one.tenant, one.recipients.audience)
        await self._execute("estimate", UUID(bytes=one.id), total)
        return total

    async def count(self, tenant: str, audience: Audience) -> tuple[int, bool]:
        """How many users an audience has, and whether they were counted: else it is an estimate."""
        sampled = await self._count(tenant, audience, SAMPLED_SLOTS)
        if sampled <= EXACT_BELOW:
            # Few may fit of very many who have to be looked at.
            with contextlib.suppress(StoreUnavailableError):
                return await self._count(tenant, audience, SLOTS), True
        return estimated(sampled), False

    async def _count(self, tenant: str, audience: Audience, slots: int) -> int:
        text = self._paging.get(audience.kind)
        if text is None:
            pages = [
                await self._audiences.page(tenant, audience, slot, "", EXACT_BELOW) for slot in range(slots)
            ]
            return sum(map(len, pages))
        async with acquired(self._pool, self._timeout_s) as connection:
            found: int | None = await connection.fetchval(
                f"select count(*) from ({text}) counted",  # noqa: S608  our own text
                tenant, list(range(slots)), [""] * slots, 1 << 40, *_rest(audience), timeout=COUNT_S,
            )  # fmt: skip
        return found or 0

    async def slots(self, broadcast: bytes, slots: Sequence[int]) -> tuple[list[tuple[int, str]], set[int]]:
        """Those of `slots` that are not done, in their order, each with the last user looked after; and in
        which of them something may be stored already."""
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(self.sql["progress"], UUID(bytes=broadcast), list(slots))
        known = {row["slot"]: row for row in rows}
        pending = [
            (slot, known[slot]["last_user"] if slot in known else "")
            for slot in slots
            if slot not in known or not known[slot]["done"]
        ]
        return pending, {slot for slot, _ in pending if slot in known}

    @contextlib.asynccontextmanager
    async def turn(self, number: int | None) -> AsyncIterator[asyncpg.Connection | None]:
        """A connection on which one reads alone, among all who read or write chunks in turns of this number.

        It is ended if nothing is asked on it for longer than the store waits for a connection: whoever has
        the turn may have lost its node.

        Args:
            number: None: there are no turns, and no connection is given.
        """
        if number is None:
            yield None
            return
        async with acquired(self._pool, self._timeout_s) as connection, connection.transaction():
            idle_ms = str(round(self._timeout_s * 1000))
            await connection.fetch(self.sql["take_turn"], TURNS + number, idle_ms)
            yield connection

    @contextlib.asynccontextmanager
    async def _on(self, connection: asyncpg.Connection | None) -> AsyncIterator[asyncpg.Connection]:
        """A connection that is given, or one of the pool."""
        if connection is not None:
            yield connection  # errors are translated where it was acquired
            return
        async with acquired(self._pool, self._timeout_s) as own:
            yield own

    async def users(
        self,
        tenant: str,
        recipients: Recipients,
        pending: Sequence[tuple[int, str]],
        limit: int,
        connection: asyncpg.Connection | None = None,
    ) -> list[SlotUser]:
        """A page of users of slots, in the order of `pending` and of the users within a slot.

        Args:
            pending: slots, each with its last user before.
            limit: fewer users than that mean that all these slots are at their end.
            connection: of `turn`; not of use for segments, which take several statements.
        """
        audience = recipients.audience
        if audience is None:
            return members(tenant, recipients.users, pending, limit)
        text = self._paging.get(audience.kind)
        if text is not None:
            async with self._on(connection) as own:
                rows = await own.fetch(
                    text, tenant, [slot for slot, _ in pending], [last for _, last in pending], limit,
                    *_rest(audience),
                )  # fmt: skip
            return [SlotUser(row[0], row[1]) for row in rows]
        found: list[SlotUser] = []
        for slot, last in pending:
            names = await self._audiences.page(tenant, audience, slot, last, limit - len(found))
            found += [SlotUser(slot, name) for name in names]
            if len(found) >= limit:
                break
        return found

    async def among(self, tenant: str, recipients: Recipients, users: Sequence[SlotUser]) -> list[SlotUser]:
        """Those of `users` who are meant; nobody where that cannot be told without walking the audience."""
        audience = recipients.audience
        if audience is None:
            meant = set(recipients.users)
            return [one for one in users if one.user in meant]
        if audience.kind == ALL and not audience.platforms:
            return list(users)
        text = self._membership.get(audience.kind)
        if text is None:
            return []
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(
                text, tenant, [one.slot for one in users], [one.user for one in users], 1, *_rest(audience)
            )
        return [SlotUser(row[0], row[1]) for row in rows]

    async def contexts(
        self,
        tenant: str,
        users: Sequence[SlotUser],
        dense: bool = False,
        connection: asyncpg.Connection | None = None,
    ) -> Contexts | None:
        """What decides about users.

        Args:
            users: a page, in the order of slots and users within each.
            dense: hardly anybody stands between them who is not meant.
            connection: of `turn`.

        Returns:
            Other users may be among the streams. None: with `dense`, too many were.
        """
        names = [one.user for one in users]
        more: tuple[Any, ...] = ()
        most = 2 * len(users) + 50
        if dense:
            last = {one.slot: one.user for one in users}
            first = {one.slot: one.user for one in reversed(users)}
            slots = list(last)
            more = [first[slot] for slot in slots], list(last.values()), most
        else:
            slots = sorted({one.slot for one in users})
        async with self._on(connection) as own:
            rows = await own.fetch(self._contexts[dense], tenant, slots, names, *more)
        found = Contexts({}, {})
        streams, others = found
        for user, stream_id, provider, preferences, zone in rows:
            if stream_id is not None:
                streams[user] = stream_id
                continue
            context = others.get(user, PLAIN)
            if provider is not None:
                context = context._replace(providers=(*context.providers, provider))
            elif preferences is not None:
                context = context._replace(preferences=preferences)
            else:
                context = context._replace(zone=zone)
            others[user] = context
        return None if dense and len(streams) >= most else found

    async def make_streams(
        self, shard: str, term: int, tenant: str, users: Sequence[SlotUser], epochs: Sequence[str]
    ) -> dict[str, int]:
        """Streams for users who have none: user -> stream; nothing if the term is over."""
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(
                self.sql["make_streams"], shard, term, tenant, [one.user for one in users],
                [one.slot for one in users], epochs,
            )  # fmt: skip
        return {row[0]: row[1] for row in rows}

    async def enter(
        self,
        connection: asyncpg.Connection,
        shard: str,
        term: int,
        broadcast: bytes,
        ids: Sequence[bytes],
        bounds: tuple[bytes, bytes],
    ) -> set[bytes]:
        """Begin to write for a broadcast, in the transaction of `connection`.

        Returns:
            Those of `ids` that are stored.

        Raises:
            FencedError: the term is over.
            NotRunningError: it is paused, or has ended.
        """
        row: Any = await connection.fetchrow(
            self.sql["enter"], shard, term, UUID(bytes=broadcast), [UUID(bytes=raw) for raw in ids],
            UUID(bytes=bounds[0]), UUID(bytes=bounds[1]),
        )  # fmt: skip
        if row["term"] is None:
            raise FencedError(f"term {term} of {shard} is over")
        if row["state"] != RUNNING:
            raise NotRunningError(f"the broadcast is {row['state'] or 'gone'}")
        return {raw.bytes for raw in row["stored"]}

    async def mark(
        self,
        connection: asyncpg.Connection,
        broadcast: bytes,
        marks: Sequence[Mark],
        counts: Mapping[int, Counts],
        failures: Sequence[Failure] = (),
        now_ms: int = 0,
        failures_kept: int = 0,
    ) -> None:
        """Write how far slots are and what is counted, in the transaction of `connection`.

        Args:
            counts: by slot, of marked slots and others.
        """
        if failures:
            await connection.execute(
                self.sql["note_failures"], UUID(bytes=broadcast), [f.user for f in failures],
                [f.code for f in failures], [f.detail[:500] for f in failures], failures_kept, now_ms / 1000,
            )  # fmt: skip
        if marks or counts:
            await connection.execute(self._mark, *mark_parameters(broadcast, marks, counts))

    async def finish(self, broadcast: bytes, now_ms: int) -> bool:
        """End a broadcast whose slots are all done; False if some are not."""
        async with acquired(self._pool, self._timeout_s) as connection, connection.transaction():
            row = await connection.fetchrow(self.sql["finish"], UUID(bytes=broadcast), SLOTS, now_ms / 1000)
            if row is not None:
                await connection.execute(self.sql["tidy"], UUID(bytes=broadcast))
        return row is not None

    async def prune(self, before_ms: int) -> None:
        """Forget some of those that ended before a time."""
        await self._execute("prune", before_ms / 1000)

    async def _execute(self, name: str, *args: Any) -> None:
        async with acquired(self._pool, self._timeout_s) as connection:
            await connection.execute(self.sql[name], *args)


def _rest(audience: Audience) -> tuple[Any, ...]:
    platforms = list(audience.platforms) or None
    return (platforms,) if audience.kind == ALL else (platforms, audience.name)


def _record(row: asyncpg.Record) -> BroadcastRecord:
    return BroadcastRecord(
        row["broadcast_id"].bytes, row["audience"], row["event"], row["state"], row["reason"], row["total"],
        row["ran_ms"], Counts(*(row[name] for name in COUNTS)), row["start_ms"], row["started_ms"],
        row["resumed_ms"], row["ended_ms"], row["created_ms"],
    )  # fmt: skip
