"""The model's part of `stores.postgres.amendments`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from carillon.attention import ALWAYS, DEFERRED, WITHDRAWN
from carillon.digest import EXPIRED
from stores.postgres.amendments import Amended, EditDone, EditRow, Standing

if TYPE_CHECKING:
    from tests.simulation.store import Database, Delivery, Note, StreamRow

PENDING = ("planned", "failed", "unknown")


class ModelAmendments:
    """Edits, retractions and cancellations over a `Database`."""

    _db: Database
    _shard: str
    _fence: Any
    _told: Any

    def _note(self, wanted: Amended) -> Note | None:
        note = self._db.notes.get(wanted.notification)
        return note if note is not None and note.stream.id == wanted.stream_id else None

    async def retract(
        self, term: int, wanted: Sequence[Amended], now_ms: int
    ) -> dict[int, tuple[int, int, int]]:
        def statement() -> dict[int, tuple[int, int, int]]:
            self._fence(term)
            found: dict[int, tuple[int, int, int]] = {}
            for w in sorted(wanted, key=lambda w: w.notification):
                note = self._note(w)
                if note is None or note.row.retracted_ms is not None:
                    continue
                stream = note.stream
                self._db.check_owner(self._shard, stream.slot, "a retraction")
                stream.rev += 1
                stream.unread -= note.counted
                note.row.retracted_ms, note.row.rev, note.changed = now_ms, stream.rev, True
                self._db.acts[w.notification, w.act] = ("retract", 0)
                taken_back = self._take_back(note, now_ms)
                found[stream.id] = (stream.rev, stream.unread, taken_back)
                self._told("retract", f"{stream.key.user} {note.row.seq} rev {stream.rev}")
            return found

        return await self._db.run(statement)

    def _take_back(self, note: Note, now_ms: int) -> int:
        shown = False
        ended: list[Delivery] = []
        back = any(d.channel == "withdraw" for d in self._db.of_note.get(note.row.id, ()))
        for d in self._db.of_note.get(note.row.id, ()):
            if d.channel == "withdraw":
                continue
            if d.state in PENDING:
                d.state, d.reason = "cancelled", "retracted"
                if d.gate == WITHDRAWN:
                    d.gate = None
                shown = shown or d.attempts > 0
                ended.append(d)
            elif d.state in ("sending", "sent") and d.gate != WITHDRAWN:
                d.gate = WITHDRAWN
                shown = shown or d.state == "sent"
                if d.state == "sent":
                    ended.append(d)
            elif d.attempts and d.gate != WITHDRAWN and not back and self._db.reached(d):  # it has ended
                d.gate, shown = WITHDRAWN, True
                ended.append(d)
        if shown:
            self._add(note, "withdraw", now_ms).shown_on = [None]  # type: ignore[list-item]
        return int(shown) + self._take_over(ended, now_ms)

    def _take_over(self, ended: Sequence[Delivery], now_ms: int) -> int:
        """What carriers spoke for that ended untold is decided again."""
        from tests.simulation.digests import over

        carriers = {d.id for d in ended if d.carrier == d.id}
        count = 0
        for d in self._db.deliveries.values() if carriers else ():
            note = d.note
            done = note.cancelled_ms is not None or over(note)
            if d.carrier in carriers and d.carrier != d.id and d.state == "cancelled" and not done:
                d.state, d.gate, d.due_ms, d.hold_until_ms = "planned", DEFERRED, now_ms, now_ms
                d.reason = "takes over" if d.digest is None else "digest"
                d.carrier, d.merged, count = None, 1, count + 1
                if note.row.expires_ms is not None and note.row.expires_ms <= now_ms:
                    d.state, d.reason = "cancelled", EXPIRED
                if all(key[0] != d.id for key in self._db.attempts):
                    d.attempts = 0
        return count

    def _add(self, note: Note, channel: str, now_ms: int) -> Delivery:
        from tests.simulation.store import Delivery

        new = Delivery(self._db.draw(), note, note.stream.slot, "planned", now_ms, 0)
        new.channel, new.created_ms = channel, now_ms
        self._db.deliveries[new.id] = new
        self._db.of_note.setdefault(note.row.id, []).append(new)
        return new

    async def expired(self, streams: Sequence[int], now_ms: int) -> dict[int, tuple[int, int | None]]:
        wanted = list(streams)
        return await self._db.run(lambda: {s: self._expired(self._db.by_id[s], now_ms) for s in wanted})

    def _expired(self, stream: StreamRow, now_ms: int) -> tuple[int, int | None]:
        ends = [n.row.expires_ms for n in stream.notes if n.counted and n.row.expires_ms is not None]
        return sum(end <= now_ms for end in ends), min((end for end in ends if end > now_ms), default=None)

    async def cancel(self, term: int, wanted: Sequence[Amended], now_ms: int) -> int:
        def statement() -> int:
            self._fence(term)
            cancelled = 0
            ended: list[Delivery] = []
            for w in wanted:
                note = self._note(w)
                if note is None or note.row.retracted_ms is not None or note.cancelled_ms is not None:
                    continue
                cancelled += 1
                note.cancelled_ms = now_ms
                self._db.acts[w.notification, w.act] = ("cancel", 0)
                for d in self._db.of_note.get(note.row.id, ()):
                    if d.channel == "withdraw":
                        continue
                    if d.state in PENDING:
                        d.state, d.reason = "cancelled", "cancelled"
                        ended.append(d)
                    elif d.state == "sending":
                        d.gate = WITHDRAWN
                self._told("cancel", f"{note.stream.key.user} {note.row.seq}")
            self._take_over(ended, now_ms)
            return cancelled

        return await self._db.run(statement)

    async def standing(self, wanted: Sequence[Amended]) -> dict[bytes, Standing]:
        def statement() -> dict[bytes, Standing]:
            found: dict[bytes, Standing] = {}
            for w in wanted:
                note = self._note(w)
                if note is None:
                    continue
                stopped = sum(d.reason == "cancelled" for d in self._db.of_note.get(w.notification, ()))
                r = note.row
                found[w.notification] = Standing(
                    r.content, note.version, r.expires_ms, r.updated_ms, r.retracted_ms,
                    note.cancelled_ms, stopped, (w.notification, w.act) in self._db.acts,
                )  # fmt: skip
            return found

        return await self._db.run(statement)

    async def edit(self, term: int, wanted: Sequence[EditRow], now_ms: int, keep: int) -> dict[int, EditDone]:
        rows = [copy.copy(row) for row in wanted]

        def statement() -> dict[int, EditDone]:
            self._fence(term)
            found: dict[int, EditDone] = {}
            for w in sorted(rows, key=lambda w: w.notification):
                note = self._note(w)
                if note is None or note.row.retracted_ms is not None or note.version != w.version:
                    continue
                stream, r = note.stream, note.row
                self._db.check_owner(self._shard, stream.slot, "an edit")
                stream.rev += 1
                r.content, r.expires_ms, r.updated_ms, r.rev = w.content, w.expires_ms, now_ms, stream.rev
                note.changed = True
                note.version += 1
                self._db.acts[w.notification, w.act] = ("edit", note.version)
                for key, (kind, version) in list(self._db.acts.items()):
                    old = kind == "edit" and version <= note.version - keep and key[1] != w.act
                    if key[0] == w.notification and old:
                        del self._db.acts[key]
                replaced = w.shown and self._renew(note, now_ms)
                found[stream.id] = EditDone(copy.copy(r), stream.unread, int(replaced))
                self._told("edit", f"{stream.key.user} {r.seq} rev {stream.rev}")
            return found

        return await self._db.run(statement)

    def _renew(self, note: Note, now_ms: int) -> bool:
        """What shows the former text: on its way, waiting to replace another, on phones."""
        r = note.row
        shown = [
            d
            for d in self._db.of_note.get(r.id, ())
            if d.channel != "withdraw" and d.gate != WITHDRAWN and self._db.reached(d)
        ]
        for d in self._db.of_note.get(r.id, ()):
            if d.state == "sending" and d.channel != "withdraw":
                d.stale = True
            elif d.channel == "replace" and d.state in PENDING:
                d.state, d.reason = "cancelled", "edited again"
        through = r.read_ms or r.archived_ms or r.dismissed_ms
        if not shown or through or (r.expires_ms is not None and r.expires_ms <= now_ms):
            return False
        new = self._add(note, "replace", now_ms)
        new.gate, new.merged = ALWAYS, max(shown, key=lambda d: d.id).merged
        return True
