"""What a shard reads and writes: every write behind the fence of its term (docs/explanation/durability.md).

One writer per shard appends and changes, so that the order of commits is the order in which the shard
applies them; acknowledgements, outbox and reads use other connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import asyncpg
import msgspec
from asyncpg.pgproto.pgproto import UUID

from carillon.errors import FencedError, InvalidInputError, VersionError
from carillon.ids import UserKey
from carillon.messages import Event, PushTarget
from carillon.notification import NotificationRow
from carillon.settings import PostgresSettings
from stores.postgres.amendments import RETRACT, Amendments
from stores.postgres.digests import DigestStore, ToldItem
from stores.postgres.merges import MergedInto, MergeStore, MergeWrites
from stores.postgres.named import load_queries
from stores.postgres.pool import UNAVAILABLE, open_pool, translated


def _ms(column: str) -> str:
    return f"(extract(epoch from n.{column}) * 1000)::bigint"


ROW: Final = "n.id, n.seq, n.rev, n.position, n.content, " + ", ".join(
    _ms(name)
    for name in (
        "delivered_at", "seen_at", "read_at", "clicked_at", "dismissed_at", "archived_at", "retracted_at",
        "updated_at", "expires_at",
    )
)  # fmt: skip
"""Columns of `row_of`, of a table named n."""

PLANS: Final = {
    # Planning the group commit anew costs more than running it for one event.
    "plan_cache_mode": "force_generic_plan",
    # A plan kept from when the tables were empty must not scan them when they are large.
    "enable_seqscan": "off",
}
"""Every statement of a shard finds its rows by an index, whatever their number."""

NOBODY: Final[Mapping[int, str]] = {}

_NOW = "to_timestamp($5)"
_DELIVERED = f"delivered_at = coalesce(n.delivered_at, {_NOW})"
_SEEN = f"seen_at = coalesce(n.seen_at, {_NOW})"
OPERATIONS: Final[dict[str, dict[str, str]]] = {
    # States only grow: read implies seen, click implies read; whoever did any of them has it delivered.
    "read": {
        "where": "n.read_at is null",
        "set": f"read_at = {_NOW}, {_SEEN}, {_DELIVERED}",
        "gone": "a.gone",
        "retire": "true",
        "reason": "'read'",
    },
    "seen": {
        "where": "n.seen_at is null",
        "set": f"seen_at = {_NOW}, {_DELIVERED}",
        "gone": "0",
        "retire": "false",
        "reason": "'seen'",
    },
    "archive": {
        "where": "n.archived_at is null",
        "set": f"archived_at = {_NOW}",
        "gone": "a.gone",
        "retire": "true",
        "reason": "'archived'",
    },
    "dismiss": {
        "where": "n.dismissed_at is null",
        "set": f"dismissed_at = {_NOW}",
        "gone": "a.gone",
        "retire": "true",
        "reason": "'dismissed'",
    },
    "click": {
        "where": "n.clicked_at is null",
        "set": f"clicked_at = {_NOW}, read_at = coalesce(n.read_at, {_NOW}), {_SEEN}, {_DELIVERED}",
        "gone": "a.gone",
        "retire": "true",
        "reason": "'clicked'",
    },
}
"""The durable changes that name ids, as parts of the statement `change`."""


@dataclass(slots=True)
class UserRecord:
    """A user's stream and push targets as loaded."""

    key: UserKey
    stream_id: int
    epoch: str
    seq: int
    rev: int
    unread: int
    """As the stream's row counts; expired rows included."""
    expired: int
    """How many of `unread` had expired when loaded: they are not shown."""
    last_seen_ms: int | None
    valid_from_ms: int | None
    """Tokens issued before are revoked."""
    revoked: list[bytes]
    """Tokens that were logged out."""
    targets: list[PushTarget] = field(default_factory=list)
    preferences: str | None = None
    """The preferences document, None if the user stored none."""
    invisible_since_ms: int | None = None
    """Since when the user wants to be seen as offline; None: it does not."""
    zone: str | None = None
    """Time zone of the user's profile."""
    next_expiry_ms: int | None = None
    """When the next unread row expires; None: none will."""
    pruned_seq: int = 0
    """Notifications up to here may be gone from the tables (retention)."""
    pruned_rev: int = 0
    """Changes up to here may be gone."""


@dataclass(slots=True)
class AppendRow:
    """One notification to append. `back` counts from the last of its stream in the batch (0 = last)."""

    event: Event
    stream_id: int
    back: int = 0
    decision: str | None = None
    """The rules that fired (carillon.decision.pack)."""
    archived: bool = False
    """The user wants nothing of it in the app: filed away from the first, and not counted as unread."""
    priority: int | None = None
    """With the user's override; None: the event's."""
    receipt: int | None = None
    """How the user was reached (carillon.explain.receipt_of)."""


@dataclass(slots=True)
class OutboxRow:
    """One outbox row to append with its notification."""

    id: int
    notification: bytes
    stream_id: int
    slot: int
    claimed: bool
    """True: born "sending" under a lease that ends at `due_ms`; False: "planned", due at `due_ms`."""
    due_ms: int
    gate: str | None = None
    """What an acknowledgement does to it (carillon/attention.py)."""
    hold_until_ms: int | None = None
    reason: str | None = None
    channel: str = "push"
    chain: str = ""
    """Channels that follow, joined by commas."""
    step: int = 0
    digest: bytes | None = None
    """The digest it waits in."""


@dataclass(slots=True)
class StoredKey:
    """What an idempotency key stands for."""

    body_hash: bytes
    notification: bytes
    seq: int | None
    """None if the notification itself is gone (pruned)."""
    merged: MergedInto | None = None
    """The event was merged: what it became part of."""


@dataclass(slots=True)
class ChangeDone:
    """What a change did to one stream."""

    rev: int
    unread: int
    ids: list[bytes]
    changed: int
    withdrawn: int = 0
    """Pushes that are to be taken back from phones, due now."""


@dataclass(slots=True)
class Claimed:
    """A claimed outbox row with all a push needs."""

    delivery: int
    attempt: int
    slot: int
    key: UserKey
    unread: int
    notification: bytes
    seq: int
    type: str
    priority: int
    content: str
    expires_ms: int | None
    sent_to: list[str]
    gate: str | None = None
    acknowledged: bool = False
    """Some device has it."""
    hold_until_ms: int = 0
    shown_on: Sequence[str] = ()
    """Devices that have shown the socket copy."""
    channel: str = "push"
    chain: str = ""
    step: int = 0
    since_ms: int = 0
    """When the row was planned, or last replayed."""
    base_attempt: int = 0
    """Tries before that: they no longer count."""
    reached: Sequence[str] = ()
    """Of a withdrawal: devices that got what it takes back."""
    category: str | None = None
    merged: int = 1
    """For how many notifications it speaks, itself included."""
    preferences: str | None = None
    """The user's document."""
    stream_id: int = 0
    ended: str = "seen"
    """With gate WITHDRAWN why nobody wants it any more: seen, retracted or cancelled."""
    zone: str | None = None
    """Time zone of the user's profile."""
    reason: str | None = None
    carrier: int | None = None
    """The row that told it in its digest; None: it waits there still."""
    digest: bytes | None = None
    told: Sequence[ToldItem] = ()
    """Of the row that tells a digest: the newest items, newest first."""
    words: tuple[str, str | None, str | None] | None = None
    """Title, body and link of a digest, in the tenant's words."""

    def collected(self) -> bool:
        """Whether it waits in a digest that was not told yet."""
        return (
            self.digest is not None and self.carrier is None and self.channel not in ("withdraw", "replace")
        )


@dataclass(slots=True)
class SignalRow:
    """What devices tell of one notification."""

    stream_id: int
    notification: bytes
    signal: str
    """See carillon/attention.py."""
    shown_on: str = ""
    """Devices that have shown it, separated by line feeds."""


@dataclass(slots=True)
class AttemptRow:
    """One try at one target, for the history."""

    delivery: int
    attempt: int
    device: str
    provider: str
    outcome: str
    provider_id: str
    status: int
    error: str
    started_ms: int
    duration_ms: float


@dataclass(slots=True)
class SettleRow:
    """New state of a claimed outbox row."""

    delivery: int
    attempt: int
    state: str
    due_ms: int
    reason: str | None
    onward: bool = True
    """Without success the next channel of the row's chain follows."""


@dataclass(slots=True)
class ReleaseRow:
    """A claimed outbox row that nobody tried: planned again, due at `due_ms`."""

    delivery: int
    attempt: int
    due_ms: int
    reason: str
    held: bool = False
    """Rules hold it until then (gate DEFERRED)."""


@dataclass(slots=True)
class CarrierRow:
    """A claimed outbox row that speaks for others of its user and channel."""

    delivery: int
    attempt: int
    stream_id: int
    slot: int
    channel: str
    others: list[tuple[int, int]]
    """Claimed rows (id, attempt) it speaks for."""


@dataclass(slots=True)
class ReplayRow:
    """A dead letter to try again, as asked for at `asked_ms`."""

    delivery: int
    tenant: str
    slot: int
    asked_ms: int


class PoisonError(InvalidInputError):
    """PostgreSQL refused the data itself (SQLSTATE class 22 or 23): never retry as it is."""

    code = "poison"


def row_of(record: Any) -> NotificationRow:
    """A NotificationRow of a record selected with `ROW`."""
    raw, *rest = record
    return NotificationRow(raw.bytes, *rest)


class ShardStore(Amendments, MergeStore):
    """PostgreSQL as one shard sees it.

    Args:
        settings: connection settings; `shard_pool_size` connections are opened as needed.
        shard: name of the shard, its row in `shards`.
        withdraw, withdraw_attempts: as in `PushSettings`.

    Every method raises StoreUnavailableError while the server does not answer, and every write raises
    FencedError once the term is over: nothing was written then.
    """

    def __init__(
        self, settings: PostgresSettings, shard: str, withdraw: bool = True, withdraw_attempts: int = 3
    ) -> None:
        super().__init__(ROW)
        self._settings = settings
        self._withdraw = withdraw
        self._withdraw_attempts = withdraw_attempts
        self._shard = shard
        self._pool: asyncpg.Pool | None = None
        self._writer: asyncpg.Connection | None = None
        self._sql = {
            name: text % {"row": ROW} if "%(row)s" in text else text
            for name, text in load_queries("shard").items()
        }
        self.digests = DigestStore(
            lambda: self.pool, shard, settings.connect_timeout_s,
            # With all a push needs but the content: a digest shows that of a few items.
            (self._sql["claimed"].replace("n.content,", "'' as content,"), _claimed),
        )  # fmt: skip
        self._append_sql = {
            (outbox, ruled, digests): self._append_text(outbox, ruled, digests)
            for outbox, ruled, digests in itertools.product((False, True), repeat=3)
        }
        self._change_sql = {op: self._change_text("change", "$4", parts) for op, parts in OPERATIONS.items()}
        self._read_all_sql = self._change_text("read_all", "$3", OPERATIONS["read"])
        self.amend_sql = {
            name: text % {"row": ROW} if "%(row)s" in text else text
            for name, text in load_queries("amendments").items()
        }
        self.amend_sql["retract"] = self._change_text("change", "$4", RETRACT, self.amend_sql["noted"])

    def _change_text(self, name: str, streams: str, parts: Mapping[str, str], before: str = "") -> str:
        """A durable change, and what it does to pushes."""
        return self._sql[name] % {
            **parts,
            "take_back": before + self._sql["take_back"] % {**parts, "streams": streams},
        }

    def _append_text(self, outbox: bool, ruled: bool, digests: bool) -> str:
        """The group commit of batches with or without outbox rows, rules that fired, and rows of digests."""
        names = ("shown_array", "shown_name", "ruled", "ruled_values", "ruled_arrays", "ruled_names")
        parts = dict.fromkeys(names, "") | {"shown": "n", "planned": ""}
        if outbox:
            number = 31 if ruled else 28
            digest = {
                "digest": ", digest",
                "digest_value": ", d.digest",
                "digest_array": f", ${number}::uuid[]",
            }
            planned = self._sql["append_planned"] % (digest if digests else dict.fromkeys(digest, ""))
            parts["planned"] = f",\n{planned}"
        last = 27 if outbox else 14
        parts["receipt"] = f"${last}"
        if ruled:
            first = last + 1
            parts |= {
                "shown": "shown",
                "shown_array": f", ${first}::int[]",
                "shown_name": ", shown",
                "ruled": ", decision, archived_at",
                "ruled_values": ", e.decision, to_timestamp(e.archived_s)",
                "ruled_arrays": f", ${first + 1}::text[], ${first + 2}::float8[]",
                "ruled_names": ", decision, archived_s",
            }
        return self._sql["append"] % parts

    async def open(self) -> None:
        """Open the pool."""
        if self._pool is None:
            self._pool = await open_pool(
                self._settings, self._settings.shard_pool_size, server_settings=PLANS
            )

    @property
    def shard(self) -> str:
        """The name of the shard."""
        return self._shard

    @property
    def inside(self) -> Inside:
        """What may run in a transaction of the caller's, who translates its errors."""
        return Inside(self._append, self._delivery_ids)

    @property
    def pool(self) -> asyncpg.Pool:
        """The connections that the writer does not use. Raises StoreUnavailableError: not open."""
        return self._open_pool()

    async def close(self) -> None:
        """Close all connections."""
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        writer, self._writer = self._writer, None
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                if writer is not None:
                    await pool.release(writer)
                await pool.close()
        except (asyncpg.PostgresError, *UNAVAILABLE):
            pool.terminate()

    def _open_pool(self) -> asyncpg.Pool:
        assert self._pool is not None, "open() first"
        return self._pool

    async def _write_connection(self) -> asyncpg.Connection:
        """The writer's own connection, kept out of the pool: appends never wait for reads."""
        if self._writer is not None:
            try:
                lost = self._writer.is_closed()
            except asyncpg.InterfaceError:
                lost = True  # the pool took it back when the server ended it while nobody used it
            if lost:
                self._writer = None
        if self._writer is None:
            self._writer = await self._open_pool().acquire(timeout=self._settings.connect_timeout_s)  # type: ignore[assignment]
        assert self._writer is not None
        return self._writer

    @contextlib.asynccontextmanager
    async def _writing(self) -> AsyncIterator[asyncpg.Connection]:
        with translated():
            connection = await self._write_connection()
            try:
                yield connection
            except (
                asyncpg.DataError, asyncpg.IntegrityConstraintViolationError,
                KeysTakenError, StreamsErasedError,
            ):  # fmt: skip
                raise  # rolled back in good order
            except BaseException:
                # Unknown state (cancelled, timed out, lost): a fresh connection next time.
                self._writer = None
                with contextlib.suppress(Exception):
                    connection.terminate()
                    await self._open_pool().release(connection)
                raise

    @contextlib.asynccontextmanager
    async def _reading(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection of the pool, for one statement after the other."""
        with translated():
            async with self._open_pool().acquire(timeout=self._settings.connect_timeout_s) as connection:
                yield connection  # type: ignore[misc]

    # -- users ------------------------------------------------------------------------------------------

    async def load_users(self, term: int, users: Sequence[tuple[UserKey, int, str]]) -> list[UserRecord]:
        """Load streams (made where missing) and push targets.

        Args:
            users: (key, slot, epoch for a new stream), without repetition.

        Returns:
            A record per user; one missing because another writer made it this instant is left out: ask again.
        """
        tenants = [key.tenant for key, _, _ in users]
        names = [key.user for key, _, _ in users]
        with translated():
            async with self._open_pool().acquire(timeout=self._settings.connect_timeout_s) as connection:
                rows = await connection.fetch(
                    self._sql["load_users"], self._shard, term, tenants, names,
                    [slot for _, slot, _ in users], [epoch for _, _, epoch in users],
                )  # fmt: skip
                if not rows:
                    raise FencedError(f"term {term} of {self._shard} is over")
                targets = await connection.fetch(self._sql["load_targets"], tenants, names)
        records = {
            UserKey(r[0], r[1]): UserRecord(
                UserKey(r[0], r[1]),
                r[2],
                r[3],
                r[4],
                r[5],
                r[6],
                r[7],
                r[8],
                r[9],
                r[10],
                preferences=r[11],
                invisible_since_ms=r[12],
                zone=r[13],
                next_expiry_ms=r[14],
                pruned_seq=r[15],
                pruned_rev=r[16],
            )
            for r in rows
        }
        for t in targets:
            record = records.get(UserKey(t[0], t[1]))
            if record is not None:
                record.targets.append(PushTarget(*t[2:10]))
        return list(records.values())

    # -- the group commit -------------------------------------------------------------------------------

    async def append(
        self,
        term: int,
        counts: dict[int, int],
        rows: Sequence[AppendRow],
        outbox: Sequence[OutboxRow],
        now_ms: int,
        keys: Sequence[Event] = (),
        keys_since_ms: int = 0,
        before: Callable[[asyncpg.Connection], Awaitable[None]] | None = None,
        merges: MergeWrites | None = None,
    ) -> dict[int, tuple[int, int, int]]:
        """Append notifications and outbox rows in one transaction.

        Args:
            counts: stream id -> how many of `rows` are its.
            keys: the events among `rows` that carry an idempotency key: their keys are rows inserted first,
                in the same transaction.
            keys_since_ms: keys made before are past their life and may be taken over.
            before: runs first, in the same transaction; what it raises ends that.
            merges: what is merged into notifications that are there: their revs follow those of `rows`.

        Returns:
            stream id -> (seq, rev, unread) after the batch. A stream that is missing was erased meanwhile.

        Raises:
            FencedError, StoreUnavailableError: nothing was written, or (the latter) it is not known.
            KeysTakenError: a key stands for something already; nothing was written. See `find_keys`.
            StreamsErasedError: some streams are gone, and there are `keys`; nothing was written.
            PoisonError: PostgreSQL refuses the data; nothing was written. Bisect.
        """
        try:
            async with self._writing() as connection:
                if not keys and before is None and merges is None:
                    return await self._append(connection, term, counts, rows, outbox, now_ms)
                async with connection.transaction():
                    if await connection.fetchval(self._sql["fence"], self._shard, term) is None:
                        raise FencedError(f"term {term} of {self._shard} is over")
                    taken = await self._take_keys(connection, keys, now_ms, keys_since_ms) if keys else ()
                    if len(taken) != len(keys):
                        raise KeysTakenError
                    if before is not None:
                        await before(connection)
                    heads: dict[int, tuple[int, int, int]] = {}
                    if rows:
                        heads = await self._append(connection, term, counts, rows, outbox, now_ms)
                    wanted = set(counts)
                    if merges is not None:
                        heads |= await self._write_merges(connection, term, merges, now_ms)
                        wanted |= merges.counts().keys()
                    if keys and len(heads) < len(wanted):
                        # A key without its notification would answer the next try as if it were stored.
                        raise StreamsErasedError(wanted - heads.keys())
                    return heads
        except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError) as exc:
            raise PoisonError(f"PostgreSQL refuses the data: {exc}") from exc

    async def _append(
        self,
        connection: asyncpg.Connection,
        term: int,
        counts: dict[int, int],
        rows: Sequence[AppendRow],
        outbox: Sequence[OutboxRow],
        now_ms: int,
        around: Around | None = None,
    ) -> dict[int, tuple[int, int, int]]:
        events = [row.event for row in rows]
        planned: list[Any] = []
        if outbox:
            planned = [
                [o.id for o in outbox],
                [UUID(o.notification) for o in outbox],
                [o.stream_id for o in outbox],
                [o.slot for o in outbox],
                ["sending" if o.claimed else "planned" for o in outbox],
                [o.due_ms / 1000 for o in outbox],
                now_ms / 1000,
                [o.gate for o in outbox],
                [None if o.hold_until_ms is None else o.hold_until_ms / 1000 for o in outbox],
                [o.reason for o in outbox],
                [o.channel for o in outbox],
                [o.chain for o in outbox],
                [o.step for o in outbox],
            ]
        ruled: list[Any] = []
        priorities = [e.priority for e in events]
        if any(row.decision is not None for row in rows):
            shown = dict.fromkeys(counts, 0)
            for row in rows:
                shown[row.stream_id] += not row.archived
            ruled = [
                list(shown.values()),
                [row.decision for row in rows],
                [row.event.created_ms / 1000 if row.archived else None for row in rows],
            ]
            priorities = [row.event.priority if row.priority is None else row.priority for row in rows]
        digests: list[Any] = []
        # What waits in a digest does so by a rule: other batches do not look.
        if ruled and any(o.digest is not None for o in outbox):
            digests = [[None if o.digest is None else UUID(o.digest) for o in outbox]]
        text = self._append_sql[bool(outbox), bool(ruled), bool(digests)]
        more: Sequence[Any] = ()
        if around is not None:
            text, more = around(text, 13 + len(planned) + 1 + len(ruled) + len(digests))
        answer = await connection.fetch(
            text,
            self._shard,
            term,
            list(counts),
            list(counts.values()),
            [UUID(e.id) for e in events],
            [row.stream_id for row in rows],
            [row.back for row in rows],
            priorities,
            [e.type for e in events],
            [e.category for e in events],
            [e.content for e in events],
            [e.created_ms / 1000 for e in events],
            [None if e.expires_ms is None else e.expires_ms / 1000 for e in events],
            *planned,
            [row.receipt for row in rows],
            *ruled,
            *digests,
            *more,
        )
        if not answer:
            raise FencedError(f"term {term} of {self._shard} is over")
        return {r[0]: (r[1], r[2], r[3]) for r in answer if r[0]}

    async def _take_keys(
        self, connection: asyncpg.Connection, keys: Sequence[Event], now_ms: int, since_ms: int
    ) -> list[Any]:
        return await connection.fetch(
            self._sql["take_keys"],
            [e.tenant for e in keys],
            [e.idempotency_key for e in keys],
            [e.body_hash for e in keys],
            [UUID(e.id) for e in keys],
            now_ms / 1000,
            since_ms / 1000,
        )

    async def find_keys(
        self, keys: Sequence[tuple[str, str]], since_ms: int
    ) -> dict[tuple[str, str], StoredKey]:
        """What (tenant, key) pairs made after `since_ms` stand for; unknown ones are left out."""
        async with self._writing() as connection:
            rows = await connection.fetch(
                self._sql["find_keys"],
                [tenant for tenant, _ in keys],
                [key for _, key in keys],
                since_ms / 1000,
            )
        merged = [r[3].bytes for r in rows if r[4] is None]
        into = await self.find_merged(merged) if merged else {}
        return {(r[0], r[1]): StoredKey(r[2], r[3].bytes, r[4], into.get(r[3].bytes)) for r in rows}

    async def prune_keys(self, since_ms: int) -> None:
        """Delete some keys past their life."""
        await self._pool_execute("prune_keys", since_ms / 1000)

    async def find_ids(self, ids: Sequence[bytes]) -> dict[bytes, tuple[int, int]]:
        """Which notifications exist: id -> (seq, stream id)."""
        async with self._writing() as connection:
            rows = await connection.fetch(self._sql["find_ids"], [UUID(raw) for raw in ids])
        return {r[0].bytes: (r[1], r[2]) for r in rows}

    async def draw_delivery_ids(self, count: int) -> list[int]:
        """Ids for outbox rows, ascending, never given out again."""
        async with self._writing() as connection:
            return await self._delivery_ids(connection, count)

    async def _delivery_ids(self, connection: asyncpg.Connection, count: int) -> list[int]:
        return [r[0] for r in await connection.fetch(self._sql["draw_delivery_ids"], count)]

    # -- changes ----------------------------------------------------------------------------------------

    async def change(
        self,
        term: int,
        op: str,
        wanted: Sequence[tuple[int, Sequence[bytes]]],
        now_ms: int,
        devices: Mapping[int, str] = NOBODY,
    ) -> dict[int, ChangeDone]:
        """Apply one operation of `OPERATIONS` to ids of streams, each stream at most once.

        Args:
            devices: stream id -> the device that made the change, where it is known.

        Returns:
            stream id -> what changed; streams where nothing changed are left out.
        """
        ids = [UUID(raw) for _, some in wanted for raw in some]
        streams = [stream for stream, some in wanted for _ in some]
        async with self._writing() as connection:
            rows = await connection.fetch(
                self._change_sql[op], self._shard, term, ids, streams, now_ms / 1000,
                [devices.get(stream, "") for stream in streams], self._withdraw,
            )  # fmt: skip
        if not rows:
            raise FencedError(f"term {term} of {self._shard} is over")
        return {r[0]: ChangeDone(r[1], r[2], [u.bytes for u in r[3]], len(r[3]), r[4]) for r in rows if r[0]}

    async def read_all(
        self,
        term: int,
        wanted: Sequence[tuple[int, int]],
        now_ms: int,
        devices: Mapping[int, str] = NOBODY,
    ) -> dict[int, ChangeDone]:
        """Mark everything visible up to a seq as read, per (stream id, seq)."""
        async with self._writing() as connection:
            rows = await connection.fetch(
                self._read_all_sql, self._shard, term,
                [stream for stream, _ in wanted], [upto for _, upto in wanted], now_ms / 1000,
                [devices.get(stream, "") for stream, _ in wanted], self._withdraw,
            )  # fmt: skip
        if not rows:
            raise FencedError(f"term {term} of {self._shard} is over")
        return {r[0]: ChangeDone(r[1], r[2], [], r[3], r[4]) for r in rows if r[0]}

    async def existing(self, wanted: Sequence[tuple[int, bytes]]) -> set[bytes]:
        """Which of the (stream id, id) pairs exist."""
        async with self._writing() as connection:
            rows = await connection.fetch(
                self._sql["exists"], [UUID(raw) for _, raw in wanted], [stream for stream, _ in wanted]
            )
        return {r[0].bytes for r in rows}

    async def acknowledge(self, term: int, told: Sequence[SignalRow], now_ms: int) -> int:
        """Set deliveredAt and let waiting pushes follow, each notification at most once. Returns how many
        were acknowledged for the first time."""
        row = await self._pool_row(
            "acknowledge", self._shard, term,
            [UUID(t.notification) for t in told], [t.stream_id for t in told], now_ms / 1000,
            [t.signal for t in told], [t.shown_on for t in told],
        )  # fmt: skip
        if not row["fenced"]:
            raise FencedError(f"term {term} of {self._shard} is over")
        return row["marked"]

    async def ids_between(self, ranges: Sequence[tuple[int, int, int]]) -> list[tuple[bytes, int, int]]:
        """What of ranges (stream id, after seq, up to seq) may be unacknowledged: (id, stream id, seq)."""
        with translated():
            async with self._open_pool().acquire(timeout=self._settings.connect_timeout_s) as connection:
                rows = await connection.fetch(
                    self._sql["ids_between"], [r[0] for r in ranges], [r[1] for r in ranges],
                    [r[2] for r in ranges],
                )  # fmt: skip
        return [(r[0].bytes, r[1], r[2]) for r in rows]

    async def policies(self, tenants: Sequence[str]) -> dict[str, dict[str, Any] | None]:
        """The policy documents of tenants (None: it stored none); those that do not exist are left out."""
        with translated():
            async with self._open_pool().acquire(timeout=self._settings.connect_timeout_s) as connection:
                rows = await connection.fetch(self._sql["policies"], tenants)
        return {r[0]: None if r[1] is None else msgspec.json.decode(r[1]) for r in rows}

    async def client_secret(self, tenant: str) -> str | None:
        """The secret of a tenant; None if there is no such tenant."""
        with translated():
            async with self._open_pool().acquire(timeout=self._settings.connect_timeout_s) as connection:
                return await connection.fetchval(self._sql["client_secret"], tenant)

    async def save_last_seen(self, term: int, wanted: Sequence[tuple[int, int]]) -> None:
        """Keep when users were last seen: (stream id, ms)."""
        await self._pool_execute(
            "save_last_seen", self._shard, term,
            [stream for stream, _ in wanted], [ms / 1000 for _, ms in wanted],
        )  # fmt: skip

    async def last_seen(self, tenant: str, users: Sequence[str]) -> dict[str, tuple[int | None, int | None]]:
        """When users of a tenant were last seen, and since when they are invisible (ms), those that exist."""
        with translated():
            async with self._open_pool().acquire(timeout=self._settings.connect_timeout_s) as connection:
                rows = await connection.fetch(self._sql["last_seen"], tenant, users)
        return {r[0]: (r[1], r[2]) for r in rows}

    # -- outbox -----------------------------------------------------------------------------------------

    async def claim_due(
        self, term: int, slots: Sequence[int], now_ms: int, limit: int, lease_end_ms: int
    ) -> list[Claimed]:
        """Claim due outbox rows of `slots` under a lease, with all a push needs."""
        with translated():
            async with self._open_pool().acquire(timeout=self._settings.connect_timeout_s) as connection:
                ids = await connection.fetch(
                    self._sql["claim_due"],
                    self._shard,
                    term,
                    slots,
                    now_ms / 1000,
                    limit,
                    lease_end_ms / 1000,
                )
                if not ids:
                    return []
                rows = await connection.fetch(self._sql["claimed"], [r[0] for r in ids])
        return [_claimed(r) for r in rows]

    async def release(self, term: int, rows: Sequence[ReleaseRow], now_ms: int) -> int:
        """Give claimed rows back without counting the try; returns how many were still claimed by it."""
        row = await self._pool_row(
            "release", self._shard, term,
            [r.delivery for r in rows], [r.attempt for r in rows], [r.due_ms / 1000 for r in rows],
            [r.reason for r in rows], now_ms / 1000, [r.held for r in rows],
        )  # fmt: skip
        if not row["fenced"]:
            raise FencedError(f"term {term} of {self._shard} is over")
        return row["released"]

    async def tries_before(self, deliveries: Sequence[int]) -> dict[int, tuple[int, int | None]]:
        """Delivery -> (tries that no longer count, expiry in ms), of rows that exist."""
        with translated():
            async with self._open_pool().acquire(timeout=self._settings.connect_timeout_s) as connection:
                rows = await connection.fetch(self._sql["tries_before"], deliveries)
        return {r[0]: (r[1], r[2]) for r in rows}

    async def replay(self, term: int, rows: Sequence[ReplayRow], now_ms: int) -> dict[int, bool]:
        """Put dead letters back into the outbox.

        Returns:
            delivery -> True if it is tried again, False if it has expired; what is no dead letter of the
            tenant and slot is left out.

        Idempotency: a row that was replayed at the same `asked_ms` counts and is not touched.
        """
        with translated():
            async with self._open_pool().acquire(timeout=self._settings.connect_timeout_s) as connection:
                found = await connection.fetch(
                    self._sql["replay"], self._shard, term,
                    [r.delivery for r in rows], [r.tenant for r in rows], [r.slot for r in rows],
                    [r.asked_ms / 1000 for r in rows], now_ms / 1000,
                )  # fmt: skip
        if not found:
            raise FencedError(f"term {term} of {self._shard} is over")
        return {r[0]: r[1] for r in found if r[0]}

    async def merge(self, term: int, rows: Sequence[CarrierRow], now_ms: int) -> dict[int, int]:
        """Cancel what carriers speak for; returns for how many notifications each speaks, if for several.

        Rows of the same user and channel that are held, due and not claimed yet are among them.
        """
        others = [(other, row.delivery) for row in rows for other in row.others]
        with translated():
            async with self._open_pool().acquire(timeout=self._settings.connect_timeout_s) as connection:
                found = await connection.fetch(
                    self._sql["merge"], self._shard, term,
                    [other[0] for other, _ in others], [other[1] for other, _ in others],
                    [carrier for _, carrier in others],
                    [r.delivery for r in rows], [r.attempt for r in rows], [r.stream_id for r in rows],
                    [r.slot for r in rows], [r.channel for r in rows], now_ms / 1000,
                )  # fmt: skip
        if not found:
            raise FencedError(f"term {term} of {self._shard} is over")
        return {r[0]: r[1] for r in found if r[0]}

    async def load_targets(self, keys: Sequence[UserKey]) -> dict[UserKey, list[PushTarget]]:
        """Push targets of users, fresh from the store."""
        with translated():
            async with self._open_pool().acquire(timeout=self._settings.connect_timeout_s) as connection:
                rows = await connection.fetch(
                    self._sql["load_targets"], [k.tenant for k in keys], [k.user for k in keys]
                )
        found: dict[UserKey, list[PushTarget]] = {key: [] for key in keys}
        for t in rows:
            found[UserKey(t[0], t[1])].append(PushTarget(*t[2:10]))
        return found

    async def record_outcomes(
        self,
        term: int,
        attempts: Sequence[AttemptRow],
        settled: Sequence[SettleRow],
        gone: Sequence[tuple[UserKey, str, str]],
        disabled: Sequence[tuple[UserKey, str, str]],
        now_ms: int,
    ) -> int:
        """Write the history of tries, the rows' new states, and what became of targets, in one transaction.

        A row that ends without success and has a chain is "cancelled", and in the same transaction the row of
        the next channel is planned, unless another channel of the step may still succeed or the user has it
        by now. Only the last row of a chain is "dead".

        Args:
            gone, disabled: (user, device id, token) of targets to delete or switch off.

        Returns:
            How many rows of next channels, and withdrawals, were made; they are due now.
        """
        fell = 0
        with translated():
            async with (
                self._open_pool().acquire(timeout=self._settings.connect_timeout_s) as connection,
                connection.transaction(),
            ):
                if await connection.fetchval(self._sql["fence"], self._shard, term) is None:
                    raise FencedError(f"term {term} of {self._shard} is over")
                if attempts:
                    await connection.execute(
                        self._sql["record_attempts"],
                        [a.delivery for a in attempts], [a.attempt for a in attempts],
                        [a.device for a in attempts], [a.provider for a in attempts],
                        [a.outcome for a in attempts], [a.provider_id for a in attempts],
                        [a.status for a in attempts], [a.error[:500] for a in attempts],
                        [a.started_ms / 1000 for a in attempts], [a.duration_ms for a in attempts],
                    )  # fmt: skip
                if settled:
                    ended = await connection.fetch(
                        self._sql["settle"],
                        [s.delivery for s in settled], [s.attempt for s in settled],
                        [s.state for s in settled], [s.due_ms / 1000 for s in settled],
                        [s.reason for s in settled], now_ms / 1000, [s.onward for s in settled],
                        self._withdraw_attempts,
                    )  # fmt: skip
                    failed = [r for r in ended if r["falls"]]
                    fell = len(ended) - len(failed)
                    if failed:
                        made = await connection.fetch(
                            self._sql["fall_back"], [r[0] for r in failed], now_ms / 1000
                        )
                        fell += len(made)
                for name, targets in (("drop_targets", gone), ("disable_targets", disabled)):
                    if not targets:
                        continue
                    columns: list[Any] = [
                        [key.tenant for key, _, _ in targets], [key.user for key, _, _ in targets],
                        [device for _, device, _ in targets], [token for _, _, token in targets],
                    ]  # fmt: skip
                    if name == "disable_targets":
                        columns += [now_ms / 1000, "the provider says it belongs to another sender"]
                    await connection.execute(self._sql[name], *columns)
        return fell

    # -- per-user documents -----------------------------------------------------------------------------

    async def put_target(
        self,
        term: int,
        tenant: str,
        user: str,
        target: PushTarget,
        platform: str,
        locale: str | None,
        now_ms: int,
    ) -> list[str]:
        """Register a push target; returns other users of the tenant who lost it to this one."""
        async with self._fenced(term) as connection:
            evicted = await connection.fetch(
                self._sql["evict_target"],
                tenant, target.provider, target.app_id, target.token, user, target.device,
            )  # fmt: skip
            await connection.execute(
                self._sql["put_target"], tenant, user, target.device, platform, target.provider,
                target.token_kind, target.token, target.app_id, target.environment, locale, now_ms / 1000,
            )  # fmt: skip
            return [r[0] for r in evicted if r[0] != user]

    async def delete_target(self, term: int, tenant: str, user: str, device: str) -> bool:
        """Forget a push target; False if there was none."""
        async with self._fenced(term) as connection:
            return await connection.fetchval(self._sql["delete_target"], tenant, user, device) is not None

    async def put_preferences(
        self, term: int, tenant: str, user: str, document: str, now_ms: int, version: int | None = None
    ) -> int:
        """Replace the preferences document (JSON text); returns its version, 1 for the first.

        Args:
            version: the one that is replaced, 0 for none; None: whatever is there.

        Raises:
            VersionError: another version is there.
        """
        async with self._fenced(term) as connection:
            now_s = now_ms / 1000
            stored = await connection.fetchval(
                self._sql["put_preferences"], tenant, user, document, now_s, version
            )
            if stored is None:
                raise VersionError(f"version {version} of the preferences is not the present one", "If-Match")
            return stored

    async def change_preferences(
        self,
        term: int,
        tenant: str,
        user: str,
        change: Callable[[dict[str, Any]], dict[str, Any]],
        now_ms: int,
    ) -> str:
        """Read the preferences document, change it, write it back; returns it as it is then (JSON text)."""
        async with self._fenced(term) as connection:
            known = await connection.fetchval(self._sql["lock_preferences"], tenant, user)
            before: dict[str, Any] = {} if known is None else msgspec.json.decode(known)
            after = change(before)
            document = msgspec.json.encode(after).decode()
            if after != before:
                now_s = now_ms / 1000
                await connection.execute(self._sql["put_preferences"], tenant, user, document, now_s, None)
            return document

    async def log_out(
        self, term: int, stream_id: int, key: UserKey, device: str | None, token_id: bytes, expires_ms: int
    ) -> None:
        """Forget a device's push target (None: none) and refuse a token. Atomicity: both or neither."""
        async with self._fenced(term) as connection:
            if device is not None:
                await connection.execute(self._sql["delete_target"], key.tenant, key.user, device)
            await connection.execute(self._sql["log_out"], stream_id, token_id, expires_ms / 1000)

    async def revoke_tokens(self, term: int, stream_id: int, now_ms: int) -> None:
        """Tokens issued before now are no longer valid."""
        async with self._fenced(term) as connection:
            await connection.execute(self._sql["revoke_tokens"], stream_id, now_ms / 1000)

    async def set_invisible(self, term: int, stream_id: int, since_ms: int | None) -> int | None:
        """Make a user invisible, or (None) visible again.

        Returns:
            Since when it is invisible: who is so already stays it since then.
        """
        async with self._fenced(term) as connection:
            since_s = None if since_ms is None else since_ms / 1000
            return await connection.fetchval(self._sql["set_invisible"], stream_id, since_s)

    @contextlib.asynccontextmanager
    async def _fenced(self, term: int) -> AsyncIterator[asyncpg.Connection]:
        with translated():
            async with (
                self._open_pool().acquire(timeout=self._settings.connect_timeout_s) as connection,
                connection.transaction(),
            ):
                if await connection.fetchval(self._sql["fence"], self._shard, term) is None:
                    raise FencedError(f"term {term} of {self._shard} is over")
                yield connection  # type: ignore[misc]

    # -- replay -----------------------------------------------------------------------------------------

    async def notifications_after(self, stream_id: int, after_seq: int, limit: int) -> list[NotificationRow]:
        """Rows with seq > after_seq, by seq."""
        return await self._pool_rows("notifications_after", stream_id, after_seq, limit)

    async def changes_after(
        self, stream_id: int, after_rev: int, upto_seq: int, or_after_rev: int, limit: int
    ) -> list[NotificationRow] | None:
        """Changed rows with rev > after_rev and (seq <= upto_seq or rev > or_after_rev), by rev and seq.

        None: changes after `after_rev` may have been pruned.
        """
        args = (stream_id, after_rev, upto_seq, or_after_rev, limit)
        with translated():
            async with self._open_pool().acquire(timeout=self._settings.connect_timeout_s) as connection:
                rows = await connection.fetch(self._sql["changes_after"], *args)
        if rows and rows[0]["pruned"]:
            return None
        return [row_of(r[:-1]) for r in rows if r["id"] is not None]

    async def _pool_rows(self, name: str, *args: Any) -> list[NotificationRow]:
        with translated():
            async with self._open_pool().acquire(timeout=self._settings.connect_timeout_s) as connection:
                return [row_of(r) for r in await connection.fetch(self._sql[name], *args)]

    async def _pool_row(self, name: str, *args: Any) -> Any:
        with translated():
            async with self._open_pool().acquire(timeout=self._settings.connect_timeout_s) as connection:
                return await connection.fetchrow(self._sql[name], *args)

    async def _pool_execute(self, name: str, *args: Any) -> None:
        with translated():
            async with self._open_pool().acquire(timeout=self._settings.connect_timeout_s) as connection:
                await connection.execute(self._sql[name], *args)


Around = Callable[[str, int], tuple[str, Sequence[Any]]]
"""Given the text of the group commit and how many parameters it has: one that does more, and its further
parameters."""


class Inside(NamedTuple):
    """Parts of a transaction, as `ShardStore.append` and `draw_delivery_ids` do them."""

    append: Callable[
        [
            asyncpg.Connection,
            int,
            dict[int, int],
            Sequence[AppendRow],
            Sequence[OutboxRow],
            int,
            Around | None,
        ],
        Awaitable[dict[int, tuple[int, int, int]]],
    ]
    draw_delivery_ids: Callable[[asyncpg.Connection, int], Awaitable[list[int]]]


def _claimed(r: Any) -> Claimed:
    return Claimed(
        r["id"], r["attempts"], r["slot"], UserKey(r["tenant"], r["user_id"]), r["unread"],
        r["notification_id"].bytes, r["seq"], r["type"], r["priority"], r["content"], r["expires_ms"],
        r["sent_to"], r["gate"], r["acknowledged"], r["hold_until_ms"] or 0, r["shown_on"], r["channel"],
        r["chain"], r["step"], r["since_ms"], r["base_attempt"], r["reached"], r["category"], r["merged"],
        r["preferences"], r["stream_id"], r["ended"], r["zone"], r["reason"], r["carrier"],
        None if r["digest"] is None else r["digest"].bytes,
    )  # fmt: skip


class StreamsErasedError(Exception):
    """Streams of the batch were erased since their users were loaded; nothing was written.

    Attributes:
        streams: their ids.
    """

    def __init__(self, streams: set[int]) -> None:
        super().__init__(streams)
        self.streams = streams


class KeysTakenError(Exception):
    """An idempotency key of the batch stands for something already; nothing was written."""
