"""What a shard reads and writes: every write behind the fence of its term (docs/explanation/durability.md).

One writer per shard appends and changes, so that the order of commits is the order in which the shard
applies them; acknowledgements, outbox and reads use other connections.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import asyncpg
import msgspec
from asyncpg.pgproto.pgproto import UUID

from carillon.ids import UserKey
from carillon.merge_begun import Begun
from carillon.messages import Event, PushTarget
from carillon.notification import NotificationRow
from carillon.settings import PostgresSettings
from stores.postgres.amendments import RETRACT, Amendments
from stores.postgres.digests import DigestStore
from stores.postgres.merges import MergeStore, MergeWrites
from stores.postgres.shard_documents import UserDocuments
from stores.postgres.shard_kept import KeptStore
from stores.postgres.shard_outbox import Outbox
from stores.postgres.shard_rows import (
    AppendRow,
    ChangeDone,
    KeysTakenError,
    OutboxRow,
    PoisonError,
    StoredKey,
    StreamsErasedError,
    UserRecord,
    claimed_of,
    row_of,
    with_rows,
)

_NOT_BEGUN: Final = Begun(None, None)
NOBODY: Final[Mapping[int, str]] = {}

_NOT_WITH_THEM = "\n      and n.id not in (select t.id from target t)"
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


class ShardStore(Amendments, KeptStore, MergeStore, Outbox, UserDocuments):
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
        super().__init__(settings, shard)
        self._withdraw = withdraw
        self._withdraw_attempts = withdraw_attempts
        self.digests = DigestStore(
            lambda: self.pool, shard, settings.connect_timeout_s,
            # With all a push needs but what would be read for nothing, or again and again: a digest shows the
            # content of a few items, and all items of a user have one document.
            (
                self._sql["claimed"]
                .replace("n.content,", "'' as content,")
                .replace("p.document::text", "null::text"),
                claimed_of,
            ),
        )  # fmt: skip
        self._append_sql = {
            (outbox, ruled, digests, windows, kept): self._append_text(outbox, ruled, digests, windows, kept)
            for outbox, ruled, digests, kept in itertools.product((False, True), repeat=4)
            for windows in range(3)
        }
        self._change_sql = {op: self._change_text("change", "$4", parts) for op, parts in OPERATIONS.items()}
        self._read_all_sql = self._change_text("read_all", "$3", OPERATIONS["read"])
        self.amend_sql = with_rows("amendments")
        self.amend_sql["retract"] = self._change_text("change", "$4", RETRACT, self.amend_sql["noted"])
        ended = "select w.id from stopped w where w.carrier = w.id and w.state = 'cancelled'"
        self.amend_sql["cancel"] %= {"taken_over": self._taken_over(ended, "$5", _NOT_WITH_THEM)}
        ended = (
            "select w.id from done w where w.spoke and (w.state in ('cancelled', 'dead')"
            " or w.state = 'sent' and exists (select from notifications r where r.id = w.notification_id"
            " and r.retracted_at is not null))"
        )
        self._sql["settle"] %= {"taken_over": self._taken_over(ended, "$6", "")}

    def _taken_over(self, ended: str, now: str, but: str) -> str:
        """What carriers spoke for that end untold, as a part of the statement that ends them."""
        return self._sql["taken_over"] % {"ended": ended, "now": now, "but": but}

    def _change_text(self, name: str, streams: str, parts: Mapping[str, str], before: str = "") -> str:
        """A durable change, and what it does to pushes."""
        # What a service retracts is taken off phones that show it for others, too.
        ended = "select w.id from withdrawn w where w.carrier = w.id and w.state <> 'sending'"
        if parts is not RETRACT:
            ended += " and w.gate is distinct from 'withdrawn'"  # those that it ends itself
        taken_over = self._taken_over(ended, "$5", _NOT_WITH_THEM)
        parts = {**parts, "streams": streams, "taken_over": taken_over}
        return self._sql[name] % {**parts, "take_back": before + self._sql["take_back"] % parts}

    def _append_text(self, outbox: bool, ruled: bool, digests: bool, windows: int, kept: bool) -> str:
        """The group commit of batches with or without outbox rows, rules that fired, digests, kept pushes.

        Args:
            windows: of merging that one of its notifications begins, at most.
        """
        names = (
            "shown_array", "shown_name", "ruled", "ruled_values", "ruled_arrays", "ruled_names",
            "begun", "begun_values", "begun_arrays", "begun_names", "kept", "kept_value", "kept_array",
        )  # fmt: skip
        parts = dict.fromkeys(names, "") | {"shown": "n", "planned": "", "slot": ""}
        if outbox:
            number = 30 if ruled else 27
            digest = {
                "digest": ", digest",
                "digest_value": ", d.digest",
                "digest_array": f", ${number}::uuid[]",
            }
            planned = self._sql["append_planned"] % (digest if digests else dict.fromkeys(digest, ""))
            parts |= {"planned": f",\n{planned}", "slot": ", s.slot"}
        last = 26 if outbox else 14
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
        if windows:
            first = last + 1 + 3 * ruled + (outbox and digests)
            names = ("merging", "merge_slot", "merge_slot_2")[: windows + 1]
            types = ("text", "bigint", "bigint")
            parts["begun"] = parts["begun_names"] = "".join(f", {name}" for name in names)
            parts["begun_values"] = "".join(f", e.{name}" for name in names)
            parts["begun_arrays"] = "".join(
                f", ${first + nth}::{kind}[]" for nth, kind in enumerate(types[: windows + 1])
            )
        if kept:
            number = last + 1 + 3 * ruled + (outbox and digests) + (windows + 1 if windows else 0)
            parts |= {"kept": ", kept", "kept_value": ", e.kept", "kept_array": f", ${number}::text[]"}
        return self._sql["append"] % parts

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
        async with self._reading() as connection:
            rows = await connection.fetch(
                self._sql["load_users"], self._shard, term, tenants, names,
                [slot for _, slot, _ in users], [epoch for _, _, epoch in users],
            )  # fmt: skip
            self._check(rows, term)
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

    async def stranger(self, key: UserKey) -> UserRecord | None:
        """A user without a stream, as the first event would find it; None: there is a stream. Makes none."""
        async with self._reading() as connection:
            row = await connection.fetchrow(self._sql["stranger"], *key)
            if row is None:
                return None
            targets = await connection.fetch(self._sql["load_targets"], [key.tenant], [key.user])
        found = UserRecord(key, 0, "", 0, 0, 0, 0, None, None, [], preferences=row[0], zone=row[1])
        found.targets.extend(PushTarget(*t[2:10]) for t in targets)
        return found

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
                merging = merges is not None  # some notifications begin windows, perhaps
                if not keys and before is None and not merges:
                    return await self._append(connection, term, counts, rows, outbox, now_ms, merging=merging)
                async with connection.transaction():
                    await self._fence(connection, term)
                    taken = await self._take_keys(connection, keys, now_ms, keys_since_ms) if keys else ()
                    if len(taken) != len(keys):
                        raise KeysTakenError
                    if before is not None:
                        await before(connection)
                    heads: dict[int, tuple[int, int, int]] = {}
                    if rows:
                        heads = await self._append(
                            connection, term, counts, rows, outbox, now_ms, merging=merging
                        )
                    wanted = set(counts)
                    if merges:
                        heads |= await self._write_merges(connection, term, merges, now_ms, bool(keys))
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
        *,
        merging: bool = False,
    ) -> dict[int, tuple[int, int, int]]:
        events = [row.event for row in rows]
        planned: list[Any] = []
        if outbox:
            planned = _outbox_arrays(events, outbox, now_ms)
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
        begun: list[Any] = []
        if merging and any(row.begun is not None for row in rows):
            of = [_NOT_BEGUN if row.begun is None else row.begun for row in rows]
            begun = [[b.text for b in of], [b.slot for b in of]]
            seconds = [b.second for b in of]
            if any(seconds):
                begun.append(seconds)
        kept: list[Any] = [[row.kept for row in rows]] if any(row.kept is not None for row in rows) else []
        kind = bool(outbox), bool(ruled), bool(digests), max(0, len(begun) - 1), bool(kept)
        answer = await connection.fetch(
            self._append_sql[kind],
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
            *begun,
            *kept,
        )
        self._check(answer, term)
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
        self, keys: Sequence[tuple[str, str]], since_ms: int, aside: bool = False
    ) -> dict[tuple[str, str], StoredKey]:
        """What (tenant, key) pairs made after `since_ms` stand for; unknown ones are left out.

        Args:
            aside: not asked by the writer, whose connection is its own.
        """
        async with self._reading() if aside else self._writing() as connection:
            rows = await connection.fetch(
                self._sql["find_keys"],
                [tenant for tenant, _ in keys],
                [key for _, key in keys],
                since_ms / 1000,
            )
        merged = [r[3].bytes for r in rows if r[4] is None]
        into = await self.find_merged(merged, aside) if merged else {}
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
        self._check(rows, term)
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
        self._check(rows, term)
        return {r[0]: ChangeDone(r[1], r[2], [], r[3], r[4]) for r in rows if r[0]}

    async def existing(self, wanted: Sequence[tuple[int, bytes]]) -> set[bytes]:
        """Which of the (stream id, id) pairs exist."""
        async with self._writing() as connection:
            rows = await connection.fetch(
                self._sql["exists"], [UUID(raw) for _, raw in wanted], [stream for stream, _ in wanted]
            )
        return {r[0].bytes for r in rows}

    # -- what is kept of tenants and of presence --------------------------------------------------------

    async def policies(self, tenants: Sequence[str]) -> dict[str, dict[str, Any] | None]:
        """The policy documents of tenants (None: it stored none); those that do not exist are left out."""
        rows = await self._pool_rows("policies", tenants)
        return {r[0]: None if r[1] is None else msgspec.json.decode(r[1]) for r in rows}

    async def client_secret(self, tenant: str) -> str | None:
        """The secret of a tenant; None if there is no such tenant."""
        async with self._reading() as connection:
            return await connection.fetchval(self._sql["client_secret"], tenant)

    async def save_last_seen(self, term: int, wanted: Sequence[tuple[int, int]]) -> None:
        """Keep when users were last seen: (stream id, ms)."""
        await self._pool_execute(
            "save_last_seen", self._shard, term,
            [stream for stream, _ in wanted], [ms / 1000 for _, ms in wanted],
        )  # fmt: skip

    async def last_seen(self, tenant: str, users: Sequence[str]) -> dict[str, tuple[int | None, int | None]]:
        """When users of a tenant were last seen, and since when they are invisible (ms), those that exist."""
        rows = await self._pool_rows("last_seen", tenant, users)
        return {r[0]: (r[1], r[2]) for r in rows}

    # -- replay -----------------------------------------------------------------------------------------

    async def notifications_after(self, stream_id: int, after_seq: int, limit: int) -> list[NotificationRow]:
        """Rows with seq > after_seq, by seq."""
        return [row_of(r) for r in await self._pool_rows("notifications_after", stream_id, after_seq, limit)]

    async def changes_after(
        self, stream_id: int, after_rev: int, upto_seq: int, or_after_rev: int, limit: int
    ) -> list[NotificationRow] | None:
        """Changed rows with rev > after_rev and (seq <= upto_seq or rev > or_after_rev), by rev and seq.

        None: changes after `after_rev` may have been pruned.
        """
        rows = await self._pool_rows("changes_after", stream_id, after_rev, upto_seq, or_after_rev, limit)
        if rows and rows[0]["pruned"]:
            return None
        return [row_of(r[:-1]) for r in rows if r["id"] is not None]


def _outbox_arrays(events: Sequence[Event], outbox: Sequence[OutboxRow], now_ms: int) -> list[Any]:
    """Parameters of `append_planned`.

    Raises:
        KeyError: a row of a notification that is not among `events`.
    """
    nth = {event.id: number for number, event in enumerate(events, 1)}
    shapes: dict[tuple[Any, ...], int] = {}
    of: list[int] = []
    for o in outbox:
        shape = (o.claimed, o.due_ms, o.gate, o.hold_until_ms, o.reason, o.channel, o.chain, o.step)
        of.append(shapes.setdefault(shape, len(shapes) + 1))
    claimed, due, gates, holds, reasons, channels, chains, steps = zip(*shapes, strict=True)
    return [
        [o.id for o in outbox],
        [nth[o.notification] for o in outbox],
        of,
        now_ms / 1000,
        ["sending" if born else "planned" for born in claimed],
        [ms / 1000 for ms in due],
        gates,
        [None if ms is None else ms / 1000 for ms in holds],
        reasons,
        channels,
        chains,
        steps,
    ]
