"""From events of one batch to what a commit writes of them: rows of notifications, pushes, merges."""

from __future__ import annotations

from msgspec.structs import replace

from actors.shard_entries import Entry
from actors.shard_kept import KeptPushes
from actors.shard_merges import Merges, MergingBatch
from actors.shard_planning import Planner, digest_of
from actors.shard_users import User
from carillon.decision import pack
from carillon.external import IN_APP
from carillon.kept_push import KeptPush
from carillon.merging import OPENED, Decision
from carillon.plan import Plan
from stores.postgres.shard_rows import AppendRow, OutboxRow
from stores.postgres.shard_store import ShardStore

IDS_BLOCK = 1000
"""Outbox ids drawn at a time."""


class Draft:
    """What one try to commit a batch is to write, and of whom.

    Attributes:
        own: the entries that become notifications, in the order of `rows`.
        counts: how many, by stream.
        kept: pushes that are written into their notifications' rows.
        pushes: all pushes, rows of the outbox and kept ones: (user, entry, push).
        archived: whether any row is filed away.
        merging, merged: the batch's merges, and the entries that were merged into others; None, [] without.
    """

    __slots__ = ("archived", "counts", "kept", "merged", "merging", "outbox", "own", "pushes", "rows")

    def __init__(self, kept: list[KeptPush]) -> None:
        self.own: list[Entry] = []
        self.rows: list[AppendRow] = []
        self.counts: dict[int, int] = {}
        self.outbox: list[OutboxRow] = []
        self.kept = kept
        self.pushes: list[tuple[User, Entry, OutboxRow | KeptPush]] = []
        self.archived = False
        self.merging: MergingBatch | None = None
        self.merged: list[tuple[Entry, Decision]] = []


class Drafter:
    """Drafts the batches of one shard, one at a time."""

    def __init__(self, store: ShardStore, planner: Planner, merges: Merges, kept: KeptPushes) -> None:
        self._store = store
        self._planner = planner
        self._merges = merges
        self._kept = kept
        self._delivery_ids: list[int] = []

    async def draft(self, batch: list[Entry], kept: list[KeptPush], now_ms: int) -> Draft:
        """Decide for a batch; limits are spent at its first try.

        Args:
            kept: of `KeptPushes.begin`; filled here, so that it is known whatever happens.

        Raises:
            FencedError, StoreUnavailableError: from what merges and kept pushes ask of the store.
        """
        found = Draft(kept)
        merging: MergingBatch | None = None
        if self._merges.asked([entry.event for entry in batch]):
            await self._kept.write({e.user.stream_id for e in batch if e.user})
            merging = await self._merges.begin([(e.user, e.event) for e in batch if e.user], now_ms)
        if merging is None:
            found.own = batch
            for entry in batch:
                # Planned before, the batch met a taken idempotency key: limits are not spent twice.
                entry.plan = self._planner.plan(entry, now_ms, spend=entry.plan is None)
        else:
            found.merging = merging
            self._merge(found, merging, batch, now_ms)
        await self._write_rows(found)
        if merging is not None:
            contents = await merging.finish(self._next_delivery_id)
            begun = merging.begun
            for row in found.rows:
                raw = row.event.id
                row.begun = begun.get(raw)
                if raw in contents:  # a copy: a batch that fails is decided anew
                    row.event = replace(row.event, content=contents[raw])
        return found

    def _merge(self, found: Draft, merging: MergingBatch, batch: list[Entry], now_ms: int) -> None:
        plan = self._planner.plan
        for entry in batch:
            user, event = entry.user, entry.event
            assert user is not None
            first = entry.plan is None
            asked = merging.asked(event)
            if asked is None:
                entry.plan = plan(entry, now_ms, spend=first)
            elif merging.alone(asked):
                entry.plan = plan(entry, now_ms, spend=first)
                merging.begin(user, event, asked, entry.plan)
            else:
                entry.plan = plan(entry, now_ms)
                decision, disturbs_now = merging.take(user, event, entry.plan)
                if first and disturbs_now:
                    plan(entry, now_ms, spend=True)
                if decision.status != OPENED:
                    found.merged.append((entry, decision))
                    continue
            found.own.append(entry)

    async def _write_rows(self, found: Draft) -> None:
        counts, rows, merges = found.counts, found.rows, found.merging is not None
        alike: Plan | None = None  # plans of a batch are mostly one and the same
        decisions: dict[int, str] = {}  # as text, by the identity of their plans
        kept_text = ""
        for entry in found.own:
            user, event, decided = entry.user, entry.event, entry.plan
            assert user is not None
            assert decided is not None
            stream_id = user.stream_id
            counts[stream_id] = counts.get(stream_id, 0) + 1
            row = AppendRow(event, stream_id, -counts[stream_id])  # completed below
            rows.append(row)
            row.receipt = entry.receipt
            if decided.rules:
                decision = decisions.get(id(decided))
                if decision is None:
                    decision = decisions[id(decided)] = pack(decided.rules)
                row.decision = decision
                row.archived, row.priority = decided.archived, decided.priority
                found.archived = found.archived or decided.archived
            if decided.push_due_ms is None:
                continue
            if not merges and decided.keepable and self._kept.may_keep(event.id, event.slot):
                push = KeptPush(
                    event.id, stream_id, event.slot, decided.channels[1:], decided.push_due_ms,
                    decided.hold_until_ms, None, decided.reason, ",".join(decided.chain), decided.step,
                )  # fmt: skip
                if decided is not alike:
                    alike, kept_text = decided, push.text()
                row.kept = push.written = kept_text
                found.kept.append(push)
                found.pushes.append((user, entry, push))
                continue
            for channel in decided.channels:
                if channel == IN_APP:
                    continue
                planned = OutboxRow(
                    await self._next_delivery_id(), event.id, stream_id, event.slot,
                    decided.push_now, decided.push_due_ms, decided.gate, decided.hold_until_ms,
                    decided.reason, channel, ",".join(decided.chain), decided.step,
                )  # fmt: skip
                if decided.digest is not None:
                    planned.digest = digest_of(user.key, event, decided)
                found.outbox.append(planned)
                found.pushes.append((user, entry, planned))
        for row in rows:
            row.back += counts[row.stream_id]

    async def _next_delivery_id(self) -> int:
        if not self._delivery_ids:
            self._delivery_ids = (await self._store.draw_delivery_ids(IDS_BLOCK))[::-1]
        return self._delivery_ids.pop()
