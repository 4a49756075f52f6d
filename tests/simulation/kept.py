"""Pushes kept in their notification: what the model's store does with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from carillon.kept_push import KeptPush

if TYPE_CHECKING:
    from tests.simulation.store import Database, Note


class ModelKept:
    """The part of `ModelShardStore` that is `stores.postgres.shard_kept.KeptStore`."""

    _db: Database
    _shard: str
    _fence: Callable[[int], None]
    _told: Callable[[str, str], None]

    async def acknowledge_kept(
        self, term: int, told: Sequence[tuple[KeptPush, str, bool]], now_ms: int
    ) -> None:
        rows = [(push.notification, push.stream_id, text, has) for push, text, has in told]

        def statement() -> None:
            self._fence(term)
            for raw, stream, text, has in rows:
                note = self._db.notes.get(raw)
                if note is None or note.stream.id != stream:
                    continue
                self._db.check_owner(self._shard, note.stream.slot, "an acknowledgement of a kept push")
                if has and note.row.delivered_ms is None:
                    note.row.delivered_ms = now_ms
                note.kept = text
                self._told("keeps", f"{raw.hex()[-6:]} {text}")

        await self._db.run(statement)

    async def write_kept(self, term: int, pushes: Sequence[KeptPush], now_ms: int) -> int:
        pushes = [replace(push) for push in pushes]

        def statement() -> int:
            self._fence(term)
            made = 0
            for push in pushes:
                note = self._db.notes.get(push.notification)
                if note is not None and open_(note):
                    made += sum(self._made(note, push, channel) for channel in push.channels)
            return made

        return await self._db.run(statement)

    def _made(self, note: Note, push: KeptPush, channel: str) -> bool:
        from tests.simulation.store import Delivery

        rows = self._db.of_note.setdefault(note.row.id, [])
        if any(d.channel == channel for d in rows):
            return False
        self._db.check_owner(self._shard, note.stream.slot, "a kept push")
        row = Delivery(
            self._db.draw(), note, push.slot, "planned", push.due_ms, 0, push.reason, push.gate,
            push.hold_until_ms, list(push.shown_on), channel, push.chain, push.step, note.event.created_ms,
        )  # fmt: skip
        self._db.deliveries[row.id] = row
        rows.append(row)
        self._told("writes", f"push {row.id} of {note.row.id.hex()[-6:]}")
        return True

    async def adopt_kept(
        self, term: int, slots: Sequence[int], now_ms: int, streams: Sequence[int] | None = None
    ) -> int:
        wanted = set(slots)
        only = None if streams is None else set(streams)

        def statement() -> int:
            self._fence(term)
            db = self._db
            own = db.kept_marks.get(self._shard)
            found = [db.kept_from.get(slot, own) for slot in wanted]
            marks = [mark for mark in found if mark is not None]
            made = 0
            for raw, note in sorted(db.notes.items()) if marks else ():
                if raw <= min(marks) or note.kept is None or not note.kept.startswith("["):
                    continue
                if note.stream.slot not in wanted or (only is not None and note.stream.id not in only):
                    continue
                if db.of_note.get(raw) or not open_(note):
                    continue
                for push in pushes_of(note):
                    made += sum(self._made(note, push, channel) for channel in push.channels)
            if only is None:
                for slot in wanted:
                    db.kept_from.pop(slot, None)
            return made

        return await self._db.run(statement)

    async def mark_kept(self, term: int, since: bytes) -> None:
        def statement() -> None:
            self._fence(term)
            self._db.kept_marks[self._shard] = since

        await self._db.run(statement)


def pushes_of(note: Note) -> list[KeptPush]:
    """What a notification's text says that it keeps."""
    fields: list[Any] = json.loads(note.kept or "[]")
    return [KeptPush(note.row.id, note.stream.id, note.stream.slot, *fields)]


def open_(note: Note) -> bool:
    """Nobody has dealt with it."""
    r = note.row
    times = (r.seen_ms, r.read_ms, r.archived_ms, r.dismissed_ms, r.retracted_ms, note.cancelled_ms)
    return all(at is None for at in times)


def waits(db: Database, note: Note) -> bool:
    """Its push is kept, and no row of the outbox yet."""
    return (note.kept or "").startswith("[") and not db.of_note.get(note.row.id)
