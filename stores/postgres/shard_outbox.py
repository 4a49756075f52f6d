"""Pushes as a shard writes and reads them: claimed, sent, settled, acknowledged; behind the fence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asyncpg.pgproto.pgproto import UUID

from carillon.ids import UserKey
from carillon.messages import PushTarget
from stores.postgres.shard_connections import ShardConnections
from stores.postgres.shard_rows import (
    AttemptRow,
    CarrierRow,
    Claimed,
    ReleaseRow,
    ReplayRow,
    SettleRow,
    SignalRow,
    claimed_of,
)


class Outbox(ShardConnections):
    """The part of `ShardStore` that is about the outbox, and about acknowledgements, which end pushes."""

    _withdraw_attempts: int

    async def acknowledge(self, term: int, told: Sequence[SignalRow], now_ms: int) -> int:
        """Set deliveredAt and let waiting pushes follow, each notification at most once. Returns how many
        were acknowledged for the first time."""
        ids = [t.notification for t in told]
        span = [UUID(raw) for raw in (min(ids, default=bytes(16)), max(ids, default=bytes(16)))]
        row = await self._pool_row(
            "acknowledge", self._shard, term,
            [UUID(raw) for raw in ids], [t.stream_id for t in told], now_ms / 1000,
            [t.signal for t in told], [t.shown_on for t in told], *span, [t.rev for t in told],
        )  # fmt: skip
        self._check(row["fenced"], term)
        return row["marked"]

    async def ids_between(
        self, ranges: Sequence[tuple[int, int, int, bool]]
    ) -> list[tuple[bytes, int, int, int]]:
        """What of ranges may be unacknowledged.

        Args:
            ranges: (stream id, after seq, up to seq, False), or with True updates between revs.

        Returns:
            (id, stream id, seq, rev of the latest update; 0: there was none).
        """
        rows = await self._pool_rows("ids_between", *([r[column] for r in ranges] for column in range(4)))
        return [(r[0].bytes, r[1], r[2], r[3]) for r in rows]

    async def claim_due(
        self, term: int, slots: Sequence[int], now_ms: int, limit: int, lease_end_ms: int
    ) -> list[Claimed]:
        """Claim due outbox rows of `slots` under a lease, with all a push needs.

        Rows of users who were erased, and of notifications that are gone, are deleted: nobody else ends them.
        """
        async with self._reading() as connection:
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
            if len(rows) < len(ids):
                lost = {r[0] for r in ids} - {r["id"] for r in rows}
                await connection.execute(self._sql["drop_lost"], list(lost))
        return [claimed_of(r) for r in rows]

    async def release(self, term: int, rows: Sequence[ReleaseRow], now_ms: int) -> int:
        """Give claimed rows back without counting the try; returns how many were still claimed by it."""
        row = await self._pool_row(
            "release", self._shard, term,
            [r.delivery for r in rows], [r.attempt for r in rows], [r.due_ms / 1000 for r in rows],
            [r.reason for r in rows], now_ms / 1000, [r.held for r in rows],
        )  # fmt: skip
        self._check(row["fenced"], term)
        return row["released"]

    async def tries_before(self, deliveries: Sequence[int]) -> dict[int, tuple[int, int | None, bool]]:
        """Of rows that exist: (tries that no longer count, expiry in ms, whether any reached a target)."""
        rows = await self._pool_rows("tries_before", deliveries)
        return {r[0]: (r[1], r[2], r[3]) for r in rows}

    async def replay(self, term: int, rows: Sequence[ReplayRow], now_ms: int) -> dict[int, bool]:
        """Put dead letters back into the outbox.

        Returns:
            delivery -> True if it is tried again, False if it has expired; what is no dead letter of the
            tenant and slot is left out.

        Idempotency: a row that was replayed at the same `asked_ms` counts and is not touched.
        """
        found = await self._pool_rows(
            "replay", self._shard, term,
            [r.delivery for r in rows], [r.tenant for r in rows], [r.slot for r in rows],
            [r.asked_ms / 1000 for r in rows], now_ms / 1000,
        )  # fmt: skip
        self._check(found, term)
        return {r[0]: r[1] for r in found if r[0]}

    async def merge(self, term: int, rows: Sequence[CarrierRow], now_ms: int) -> dict[int, int]:
        """Cancel what carriers speak for; returns for how many notifications each speaks, if for several.

        Rows of the same user and channel that are held, due and not claimed yet are among them.
        """
        others = [(other, row.delivery) for row in rows for other in row.others]
        found = await self._pool_rows(
            "merge", self._shard, term,
            [other[0] for other, _ in others], [other[1] for other, _ in others],
            [carrier for _, carrier in others],
            [r.delivery for r in rows], [r.attempt for r in rows], [r.stream_id for r in rows],
            [r.slot for r in rows], [r.channel for r in rows], now_ms / 1000,
        )  # fmt: skip
        self._check(found, term)
        return {r[0]: r[1] for r in found if r[0]}

    async def load_targets(self, keys: Sequence[UserKey]) -> dict[UserKey, list[PushTarget]]:
        """Push targets of users, fresh from the store."""
        rows = await self._pool_rows("load_targets", [k.tenant for k in keys], [k.user for k in keys])
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
            How many rows of next channels, withdrawals, and such as take over were made; they are due now.
        """
        fell = 0
        async with self._fenced(term) as connection:
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
                    self._withdraw_attempts, [s.next for s in settled],
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
