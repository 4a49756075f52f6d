"""Digests as shards see them in Postgres: the model's part of `stores.postgres.digests`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from carillon.attention import DEFERRED, WITHDRAWN
from carillon.digest import EXPIRED, REMOVED, Told
from carillon.errors import FencedError
from stores.postgres.digests import Place, WaitingItem, WaitingOf
from stores.postgres.shard_rows import Claimed, ToldItem

if TYPE_CHECKING:
    from tests.simulation.store import Database, Delivery, Note


class ModelDigestStore:
    """See `DigestStore`."""

    def __init__(
        self, db: Database, fence: Callable[[int], None], claimed: Callable[[Delivery, str], Claimed]
    ) -> None:
        self._db = db
        self._fence = fence
        self._claimed = claimed

    def _of(self, stream_id: int, digest: bytes) -> list[Delivery]:
        return [
            d for d in self._db.deliveries.values() if d.digest == digest and d.note.stream.id == stream_id
        ]

    async def gather(
        self, term: int, digests: Sequence[tuple[int, bytes]], now_ms: int, lease_end_ms: int, most: int
    ) -> list[Claimed]:
        def statement() -> list[Claimed]:
            with contextlib.suppress(FencedError):
                self._fence(term)
                return [
                    dataclasses.replace(self._claimed(d, ""), preferences=None)
                    for one in digests
                    for d in claim(*one)
                ]
            return []

        def claim(stream_id: int, digest: bytes) -> list[Delivery]:
            due = [
                d
                for d in self._of(stream_id, digest)
                if d.state in ("planned", "sending") and d.carrier is None and d.due_ms <= now_ms
            ]
            due = sorted(due, key=lambda d: -d.id)[:most]
            for d in due:
                d.state, d.due_ms = "sending", lease_end_ms
                d.attempts += 1
                d.stale = False
            return due

        return await self._db.run(statement)

    async def tell(
        self,
        term: int,
        rows: Sequence[tuple[int, int]],
        decide: Callable[[frozenset[int], frozenset[int]], list[Told]],
        now_ms: int,
        beyond: Collection[tuple[int, bytes]] = (),
    ) -> list[Told]:
        def statement() -> list[Told]:
            self._fence(term)
            deliveries = self._db.deliveries
            ours = [
                d
                for d, attempt in rows
                if (row := deliveries.get(d)) is not None
                and (row.state, row.attempts, row.carrier) == ("sending", attempt, None)
            ]
            dealt_with = frozenset(
                d for d in ours if deliveries[d].gate == WITHDRAWN or over(deliveries[d].note)
            )
            told = decide(frozenset(ours), dealt_with)
            for one in told:
                for item in one.items:
                    d = deliveries[item]
                    d.carrier = one.carrier
                    if item == one.carrier:
                        d.merged = len(one.items)
                    else:
                        d.state, d.reason = "cancelled", "told in a digest"
            for item in dealt_with:
                deliveries[item].state, deliveries[item].reason = "cancelled", "read"
            return [one._replace(more=tell_rest(deliveries[one.carrier])) for one in told]

        def tell_rest(carrier: Delivery) -> int:
            stream, digest, more = carrier.note.stream.id, carrier.digest or b"", 0
            for d in self._of(stream, digest) if (stream, digest) in beyond else ():
                due = d.state in ("planned", "sending") and d.carrier is None and d.due_ms <= now_ms
                if not due or d.channel != carrier.channel:
                    continue
                expires_ms = d.note.row.expires_ms
                d.state = "cancelled"
                if d.gate == WITHDRAWN or over(d.note):
                    d.reason = "read"
                elif expires_ms is not None and expires_ms <= now_ms:
                    d.reason = EXPIRED
                else:
                    d.reason, d.carrier = "told in a digest", carrier.id
                    more += 1
            carrier.merged += more
            return more

        return await self._db.run(statement)

    async def told(self, carriers: Sequence[int], most: int, with_content: int) -> dict[int, list[ToldItem]]:
        def statement() -> dict[int, list[ToldItem]]:
            found: dict[int, list[ToldItem]] = {}
            for carrier in carriers:
                rows = [d for d in self._db.deliveries.values() if d.carrier == carrier]
                rows.sort(key=lambda d: (-d.note.row.seq, d.note.row.id))
                items = [
                    ToldItem(
                        d.note.row.id, d.note.event.type, d.note.row.content if i < with_content else "",
                        d.note.row.expires_ms, list(d.shown_on),
                    )
                    for i, d in enumerate(rows[:most])
                ]  # fmt: skip
                if items:
                    found[carrier] = items
            return found

        return await self._db.run(statement)

    async def next_moment(self, slots: Sequence[int], after_ms: int) -> int | None:
        asked = frozenset(slots)

        def statement() -> int | None:
            return min(
                (
                    d.due_ms
                    for d in self._db.deliveries.values()
                    if d.slot in asked and d.state == "planned" and d.gate == DEFERRED and d.due_ms > after_ms
                ),
                default=None,
            )

        return await self._db.run(statement)

    async def flush(
        self, term: int, stream_id: int, digest: bytes, reason: str, now_ms: int
    ) -> tuple[int, bool]:
        def statement() -> tuple[int, bool]:
            self._fence(term)
            rows = self._of(stream_id, digest)
            done = [d for d in rows if d.state == "planned" and d.carrier is None]
            for d in done:
                d.due_ms = d.hold_until_ms = now_ms
                d.reason = reason
            return len({d.note.row.id for d in done}), bool(rows)

        return await self._db.run(statement)

    async def remove(
        self, term: int, stream_id: int, digest: bytes, notification: bytes, now_ms: int
    ) -> tuple[int, bool]:
        def statement() -> tuple[int, bool]:
            self._fence(term)
            rows = [
                d for d in self._of(stream_id, digest) if d.note.row.id == notification and d.carrier is None
            ]
            done = [d for d in rows if d.state == "planned"]
            for d in done:
                d.state, d.reason = "cancelled", REMOVED
            return len(done), bool(rows)

        return await self._db.run(statement)

    async def waiting(self, stream_id: int) -> list[WaitingItem]:
        def statement() -> list[WaitingItem]:
            return [
                WaitingItem(d.id, d.digest, e.type, e.category, e.priority, d.due_ms)
                for d in self._db.deliveries.values()
                if d.digest is not None and d.carrier is None and d.reason == "digest"
                and (d.state, d.note.stream.id) == ("planned", stream_id)
                for e in (d.note.event,)
            ]  # fmt: skip

        return await self._db.run(statement)

    async def waiting_of(
        self, tenant: str, slots: Sequence[int], after: Place, limit: int
    ) -> tuple[list[WaitingOf], Place | None]:
        asked = frozenset(slots)

        def statement() -> tuple[list[WaitingOf], Place | None]:
            found = [
                d
                for d in self._db.deliveries.values()
                if d.digest is not None and d.carrier is None and (d.reason, d.state) == ("digest", "planned")
                and d.slot in asked and d.note.stream.key.tenant == tenant
                and place(d) > after
            ]  # fmt: skip
            found.sort(key=place)
            items = [
                WaitingOf(
                    d.id, d.digest or b"", d.note.event.type, d.note.event.category, d.note.event.priority,
                    d.due_ms, d.note.stream.id, key.user, self._db.preferences.get(key), None,
                )
                for d in found[:limit]
                for key in (d.note.stream.key,)
            ]  # fmt: skip
            return items, place(found[limit - 1]) if len(found) >= limit else None

        def place(d: Delivery) -> Place:
            return d.slot, d.note.stream.key.user, d.id

        return await self._db.run(statement)

    async def move(self, term: int, rows: Sequence[tuple[int, bytes, int]], now_ms: int) -> int:
        def statement() -> int:
            self._fence(term)
            moved = 0
            for delivery, digest, due_ms in rows:
                d = self._db.deliveries.get(delivery)
                if d is not None and d.state == "planned" and d.carrier is None:
                    d.digest, d.due_ms, d.hold_until_ms = digest, due_ms, due_ms
                    moved += 1
            return moved

        return await self._db.run(statement)


def over(note: Note) -> bool:
    """Whether the user, or the service, is through with it."""
    row = note.row
    archived = row.archived_ms is not None and row.archived_ms > note.event.created_ms
    return archived or any(
        at is not None for at in (row.seen_ms, row.read_ms, row.dismissed_ms, row.retracted_ms)
    )
