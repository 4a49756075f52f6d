"""PostgreSQL as the shards and the coordinator see it: tables in memory, one statement at a time.

`tests/conformance/test_shard_store_model.py` holds it against the real store. A statement that was sent runs
whatever becomes of its sender; its answer may be lost, and nobody knows then whether it ran.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import inspect
import json
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from actors.slot_table import SlotTable
from carillon.attention import ACKNOWLEDGED, ALWAYS, DEFERRED, DONE, HELD, SEEN, SILENT, WITHDRAWN, on_signal
from carillon.clock import Clock
from carillon.errors import FencedError, StoreUnavailableError, VersionError
from carillon.ids import SLOTS, UserKey, uuid_text
from carillon.merge_begun import Opening, open_slots, unpack
from carillon.merging import OPENED, Window
from carillon.messages import Event, Member, PushTarget
from carillon.notification import NotificationRow
from carillon.settings import Settings
from stores.postgres.cluster import ShardRow, StoredMap
from stores.postgres.merges import MergedRow, MergeWrites, WindowRow
from stores.postgres.shard_rows import (
    AppendRow,
    AttemptRow,
    CarrierRow,
    ChangeDone,
    Claimed,
    KeysTakenError,
    MergedInto,
    OutboxRow,
    PoisonError,
    ReleaseRow,
    ReplayRow,
    SettleRow,
    SignalRow,
    StoredKey,
    UserRecord,
)
from stores.postgres.shard_store import NOBODY
from tests.simulation.amendments import ModelAmendments
from tests.simulation.digests import ModelDigestStore
from tests.simulation.kept import ModelKept
from tests.simulation.loop import NODE, Node, SimLoop

PENDING = ("planned", "failed", "unknown")
CLAIMABLE = (*PENDING, "sending")


@dataclass(slots=True)
class Note:
    """A row of `notifications`."""

    stream: StreamRow
    event: Event
    row: NotificationRow
    changed: bool = False
    decision: str | None = None
    version: int = 1
    cancelled_ms: int | None = None
    opening: Opening | None = None
    slots: tuple[int | None, ...] = ()
    kept: str | None = None

    @property
    def open(self) -> bool:
        """The user is not through with it."""
        return self.counted

    @property
    def counted(self) -> bool:
        """Part of the stream's unread."""
        r = self.row
        return (
            r.read_ms is None and r.archived_ms is None and r.dismissed_ms is None and r.retracted_ms is None
        )


def _window(
    key: tuple[int, str],
    note: Note,
    ends_ms: int,
    events: int,
    count: int,
    notified_ms: int,
    opening: Opening | None = None,
) -> Window:
    row, cancelled = copy.copy(note.row), note.cancelled_ms is not None
    return Window(*key, row, note.event.priority, ends_ms, events, count, notified_ms, cancelled, opening)


@dataclass(slots=True)
class StreamRow:
    """A row of `streams` with its notifications."""

    id: int
    key: UserKey
    slot: int
    epoch: str
    seq: int = 0
    rev: int = 0
    unread: int = 0
    last_seen_ms: int | None = None
    valid_from_ms: int | None = None
    invisible_since_ms: int | None = None
    revoked: dict[bytes, int] = field(default_factory=dict)
    """Tokens that were logged out, with their ends (ms)."""
    notes: list[Note] = field(default_factory=list)


@dataclass(slots=True)
class Delivery:
    """A row of `deliveries`."""

    id: int
    note: Note
    slot: int
    state: str
    due_ms: int
    attempts: int
    reason: str | None = None
    gate: str | None = None
    hold_until_ms: int | None = None
    shown_on: list[str] = field(default_factory=list)
    channel: str = "push"
    chain: str = ""
    step: int = 0
    created_ms: int = 0
    tenant: str | None = None
    base_attempt: int = 0
    replayed_ms: int | None = None
    merged: int = 1
    stale: bool = False
    digest: bytes | None = None
    carrier: int | None = None


class Database:
    """The tables, and what is wrong with the server.

    Attributes:
        down: no statement runs and no answer arrives.
        lose_answers: probability that a statement runs and its answer is lost.
        slow_s: longest extra time of a statement.
        wrong: what a commit broke that must never be broken.
        on_commit: called with (kind, detail) of what was committed, for the trace.
    """

    def __init__(self, loop: SimLoop, clock: Clock, rng: random.Random) -> None:
        self.loop = loop
        self.clock = clock
        self.rng = rng
        self.node = Node("postgres")
        self.down = False
        self.lose_answers = 0.0
        self.slow_s = 0.0
        self.fences = True
        self.fenced = 0  # statements that the fence refused
        self.moves = 0
        self.wrong: list[str] = []
        self.on_commit: Callable[[str, str], None] | None = None
        self.calling = ""  # the method whose statement is being sent
        self.at_statement: Callable[[str, Any, str], Exception | None] | None = None
        self.epoch = 0
        self.members: list[Member] = []
        self.draining: frozenset[str] = frozenset()
        self.owners: list[str | None] = [None] * SLOTS
        self.moved_at: dict[int, float] = {}  # when slots got their owner
        self.kept_marks: dict[str, bytes] = {}
        self.kept_from: dict[int, bytes] = {}  # by slot
        self.shards: dict[str, ShardRow] = {}
        self.streams: dict[UserKey, StreamRow] = {}
        self.by_id: dict[int, StreamRow] = {}
        self.notes: dict[bytes, Note] = {}
        self.deliveries: dict[int, Delivery] = {}
        self.of_note: dict[bytes, list[Delivery]] = {}
        self.attempts: dict[tuple[int, int, str], AttemptRow] = {}
        self.devices: dict[tuple[str, str, str], PushTarget] = {}
        self.disabled: set[tuple[str, str, str]] = set()
        self.keys: dict[tuple[str, str], tuple[bytes, bytes, int]] = {}
        self.acts: dict[tuple[bytes, bytes], tuple[str, int]] = {}  # (notification, act): kind, version
        self.windows: dict[tuple[int, str], WindowRow] = {}
        self.merged: dict[bytes, tuple[MergedRow, int]] = {}  # by event, with when
        self.policies: dict[str, dict[str, Any] | None] = {}  # by tenant
        self.preferences: dict[UserKey, str] = {}
        self.preference_versions: dict[UserKey, int] = {}
        self._next_delivery = 1
        self._next_stream = 1

    def run(self, statement: Callable[[], Any]) -> asyncio.Future[Any]:
        """Send a statement; the future of its answer."""
        answer = self.loop.create_future()
        if self.at_statement is not None:
            name, node, statement = self.calling, NODE.get(), self._watched(statement)
            refused = self.at_statement(name, node, "before")
            if refused is not None:
                self.loop.call_later(
                    self._delay(), self._tell, answer, None, refused, context=self.node.context
                )
                return answer
        self.loop.call_later(self._delay(), self._execute, answer, statement, context=self.node.context)
        return answer

    def _watched(self, statement: Callable[[], Any]) -> Callable[[], Any]:
        """A statement behind which a failpoint may lie."""
        name, node = self.calling, NODE.get()

        def run() -> Any:
            result = statement()
            assert self.at_statement is not None
            lost = self.at_statement(name, node, "after")
            if lost is not None:
                raise lost
            return result

        return run

    def _delay(self) -> float:
        return self.rng.uniform(0.0002, 0.0012) + (self.rng.uniform(0, self.slow_s) if self.slow_s else 0.0)

    def _execute(self, answer: asyncio.Future[Any], statement: Callable[[], Any]) -> None:
        result: Any = None
        error: Exception | None = None
        if self.down:
            error = StoreUnavailableError("PostgreSQL does not answer: simulated")
        else:
            try:
                result = statement()
            except Exception as exc:
                error = exc
            if self.lose_answers and self.rng.random() < self.lose_answers:
                error = StoreUnavailableError("PostgreSQL does not answer: the connection broke")
        self.loop.call_later(self._delay(), self._tell, answer, result, error, context=self.node.context)

    def _tell(self, answer: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
        if answer.done():
            return  # its sender gave up
        if error is None and self.down:
            error = StoreUnavailableError("PostgreSQL does not answer: it went away after the commit")
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)

    def draw(self) -> int:
        """The next outbox id."""
        self._next_delivery += 1
        return self._next_delivery - 1

    def reached(self, delivery: Delivery) -> list[str]:
        """Devices that got a push of this row, or may have."""
        found = {
            device
            for (id_, _, device), a in self.attempts.items()
            if id_ == delivery.id and a.outcome in ("sent", "unknown")
        }
        return sorted(found)

    def stream_of(self, key: UserKey, slot: int, epoch: str) -> StreamRow:
        """The stream of a user, made where missing."""
        stream = self.streams.get(key)
        if stream is None:
            stream = self.streams[key] = StreamRow(self._next_stream, key, slot, epoch)
            self.by_id[stream.id] = stream
            self._next_stream += 1
        return stream

    def check_owner(self, shard: str, slot: int, what: str) -> None:
        """A write of a user is made by the shard that owns the user's slot."""
        owner = self.owners[slot]
        if owner != shard:
            self.wrong.append(f"G9: {shard} committed {what} in slot {slot}, which is {owner}'s")


def _named(store: type, prefix: str = "") -> type:
    """Let the database know which method a statement is of."""
    for name, method in list(vars(store).items()):
        if not name.startswith("_") and inspect.iscoroutinefunction(method):
            setattr(store, name, _naming(prefix + name, method))
    return store


def _naming(name: str, method: Any) -> Any:
    @functools.wraps(method)
    async def call(self: Any, *args: Any, **more: Any) -> Any:
        self._db.calling = name  # read before the first await
        return await method(self, *args, **more)

    return call


_named(ModelAmendments)
_named(ModelKept)
_named(ModelDigestStore, "digests.")


@_named
class ModelShardStore(ModelAmendments, ModelKept):
    """`stores.postgres.shard_store.ShardStore` over a `Database`."""

    def __init__(self, db: Database, shard: str) -> None:
        self._db = db
        self._shard = shard
        self.digests = ModelDigestStore(db, self._fence, self._claimed)

    async def open(self) -> None:
        await self._db.run(lambda: None)

    async def close(self) -> None:
        pass

    def _fence(self, term: int) -> None:
        row = self._db.shards.get(self._shard)
        if self._db.fences and (row is None or row.term != term):
            self._db.fenced += 1
            self._told("is fenced", f"term {term}")
            raise FencedError(f"term {term} of {self._shard} is over")

    def _told(self, kind: str, detail: str) -> None:
        if self._db.on_commit is not None:
            self._db.on_commit(f"{self._shard} {kind}", detail)

    # -- users ------------------------------------------------------------------------------------------

    async def load_users(self, term: int, users: Sequence[tuple[UserKey, int, str]]) -> list[UserRecord]:
        def statement() -> list[UserRecord]:
            self._fence(term)
            now_ms = self._db.clock.now_ms()
            records = []
            for key, slot, epoch in users:
                s = self._db.stream_of(key, slot, epoch)
                expired, next_ms = self._expired(s, now_ms)
                targets = self._targets(key)
                records.append(
                    UserRecord(
                        key, s.id, s.epoch, s.seq, s.rev, s.unread, expired, s.last_seen_ms, s.valid_from_ms,
                        sorted(token for token, end in s.revoked.items() if end > now_ms), targets,
                        self._db.preferences.get(key), s.invisible_since_ms, next_expiry_ms=next_ms,
                    )
                )  # fmt: skip
            return records

        return await self._db.run(statement)

    async def stranger(self, key: UserKey) -> UserRecord | None:
        def statement() -> UserRecord | None:
            if key in self._db.streams:
                return None
            return UserRecord(
                key, 0, "", 0, 0, 0, 0, None, None, [], self._targets(key), self._db.preferences.get(key)
            )

        return await self._db.run(statement)

    def _targets(self, key: UserKey) -> list[PushTarget]:
        found = [
            target
            for (tenant, user, device), target in self._db.devices.items()
            if (tenant, user) == tuple(key) and (tenant, user, device) not in self._db.disabled
        ]
        return sorted(found, key=lambda t: t.device)

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
        before: Any = None,
        merges: MergeWrites | None = None,
    ) -> dict[int, tuple[int, int, int]]:
        assert before is None, "the model has no broadcasts"
        rows = [replace(r, event=copy.copy(r.event)) for r in rows]
        outbox = [copy.copy(row) for row in outbox]
        counts = dict(counts)
        merges = copy.deepcopy(merges)

        def statement() -> dict[int, tuple[int, int, int]]:
            if merges is not None:
                for event in merges.events:  # all or nothing
                    if event.event in self._db.merged and event.at_ms is None:
                        self._fence(term)
                        self._free(keys, keys_since_ms)
                        raise PoisonError(f"PostgreSQL refuses the data: merged twice {event.event.hex()}")
            heads = self._append(term, counts, rows, outbox, now_ms, keys, keys_since_ms)
            return heads | self._merge_events(merges, now_ms) if merges else heads

        return await self._db.run(statement)

    def _free(self, keys: Sequence[Event], since_ms: int) -> None:
        for event in keys:
            known = self._db.keys.get((event.tenant, event.idempotency_key or ""))
            if known is not None and known[2] >= since_ms:
                raise KeysTakenError

    def _append(
        self,
        term: int,
        counts: dict[int, int],
        rows: Sequence[AppendRow],
        outbox: Sequence[OutboxRow],
        now_ms: int,
        keys: Sequence[Event],
        keys_since_ms: int,
    ) -> dict[int, tuple[int, int, int]]:
        db = self._db
        self._fence(term)
        self._free(keys, keys_since_ms)
        moved = {stream: db.by_id[stream] for stream in counts if stream in db.by_id}
        for row in rows:
            if row.event.id in db.notes:
                raise PoisonError(f"PostgreSQL refuses the data: duplicate key {row.event.id.hex()}")
        for event in keys:
            assert event.body_hash is not None
            db.keys[event.tenant, event.idempotency_key or ""] = (event.body_hash, event.id, now_ms)
        for stream in moved.values():
            n, away = counts[stream.id], sum(r.archived for r in rows if r.stream_id == stream.id)
            stream.seq, stream.rev, stream.unread = stream.seq + n, stream.rev + n, stream.unread + n - away
            db.check_owner(self._shard, stream.slot, "an append")
        for row in rows:
            found = moved.get(row.stream_id)
            if found is None:
                continue
            e = row.event
            seq, rev = found.seq - row.back, found.rev - row.back
            shown = NotificationRow(e.id, seq, rev, rev, e.content, expires_ms=e.expires_ms)
            if row.priority is not None:
                e.priority = row.priority
            if row.archived:
                shown.archived_ms = e.created_ms
            note = db.notes[e.id] = Note(found, e, shown, decision=row.decision, kept=row.kept)
            if row.begun is not None and row.begun.text is not None:
                note.opening, note.slots = unpack(row.begun.text), (row.begun.slot, row.begun.second)
            found.notes.append(note)
            self._told("appends", f"{found.key.user} seq {seq} {e.id.hex()[-6:]}")
        for planned in outbox:
            if planned.stream_id not in moved:
                continue
            state = "sending" if planned.claimed else "planned"
            delivery = Delivery(
                planned.id, db.notes[planned.notification], planned.slot, state, planned.due_ms,
                int(planned.claimed), planned.reason, planned.gate, planned.hold_until_ms,
                [], planned.channel, planned.chain, planned.step, now_ms, digest=planned.digest,
            )  # fmt: skip
            db.deliveries[planned.id] = delivery
            db.of_note.setdefault(planned.notification, []).append(delivery)
        for stream in moved.values():
            stream.notes.sort(key=lambda n: n.row.seq)
        return {s.id: (s.seq, s.rev, s.unread) for s in moved.values()}

    async def find_keys(
        self, keys: Sequence[tuple[str, str]], since_ms: int, aside: bool = False
    ) -> dict[tuple[str, str], StoredKey]:
        def statement() -> dict[tuple[str, str], StoredKey]:
            found = {}
            for key in keys:
                known = self._db.keys.get(key)
                if known is not None and known[2] >= since_ms:
                    note = self._db.notes.get(known[1])
                    into = None if note else self._merged([known[1]]).get(known[1])
                    found[key] = StoredKey(known[0], known[1], note.row.seq if note else None, into)
            return found

        return await self._db.run(statement)

    async def prune_keys(self, since_ms: int) -> None:
        def statement() -> None:
            for key in [key for key, known in self._db.keys.items() if known[2] < since_ms]:
                del self._db.keys[key]

        await self._db.run(statement)

    async def find_ids(self, ids: Sequence[bytes]) -> dict[bytes, tuple[int, int]]:
        def statement() -> dict[bytes, tuple[int, int]]:
            notes = self._db.notes
            return {raw: (notes[raw].row.seq, notes[raw].stream.id) for raw in ids if raw in notes}

        return await self._db.run(statement)

    # -- merging ----------------------------------------------------------------------------------------

    def _merge_events(self, merges: MergeWrites, now_ms: int) -> dict[int, tuple[int, int, int]]:
        db, heads = self._db, {}
        for stream_id, count in merges.counts().items():
            stream = db.by_id[stream_id]
            db.check_owner(self._shard, stream.slot, "a merge")
            stream.rev += count
            heads[stream_id] = (stream.seq, stream.rev, stream.unread)
        for row in merges.updates:
            note = db.notes[row.notification]
            rev = note.stream.rev - row.back
            note.row.rev, note.changed, note.row.content = rev, True, row.content
            note.row.position = rev if row.top else note.row.position
            note.row.expires_ms, note.row.updated_ms = row.expires_ms, now_ms
            e = note.event = copy.copy(note.event)
            e.priority, e.type, e.category = row.priority, row.type, row.category
            note.version += 1
            self._told("merges", f"{note.stream.key.user} seq {note.row.seq} rev {rev}")
        for raw, slot in merges.left:
            if raw in db.notes:
                db.notes[raw].slots = tuple(None if one == slot else one for one in db.notes[raw].slots)
        for window in merges.windows:
            db.windows[window.stream_id, window.key] = window
        for event in merges.events:
            if event.at_ms is None or event.event not in db.merged:
                db.merged[event.event] = (event, now_ms if event.at_ms is None else event.at_ms)
        taken_over = set()
        for push in merges.pushes:
            for d in db.of_note.get(push.notification, ()):
                if d.channel != push.channel or d.state not in PENDING:
                    continue
                if d.state != "planned" or d.attempts:
                    if d.due_ms >= push.due_ms and d.carrier is None:
                        d.state, d.reason = "cancelled", "superseded"
                    continue
                taken_over.add((push.notification, push.channel))
                if push.due_ms <= d.due_ms:
                    if d.digest is not None or push.digest is not None:
                        d.reason = push.reason
                    d.due_ms, d.digest = push.due_ms, push.digest
                d.gate, d.hold_until_ms = push.gate, push.hold_until_ms
                d.shown_on, d.created_ms = [], now_ms
        for push in merges.pushes:
            if (push.notification, push.channel) not in taken_over:
                note = db.notes[push.notification]
                delivery = Delivery(
                    push.id, note, push.slot, "planned", push.due_ms, 0, push.reason, push.gate,
                    push.hold_until_ms, [], push.channel, push.chain, push.step, now_ms,
                )  # fmt: skip
                delivery.digest = push.digest
                db.deliveries[push.id] = delivery
                db.of_note.setdefault(push.notification, []).append(delivery)
        return heads

    async def open_windows(
        self, streams: Sequence[int], now_ms: int, most: int
    ) -> list[tuple[int, str, int]]:
        first, last = open_slots(now_ms)

        def statement() -> list[tuple[int, str, int]]:
            found = []
            for stream in streams:
                rows = [(*k, w.ends_ms) for k, w in self._db.windows.items() if k[0] == stream]
                found += [row for row in rows if row[2] > now_ms][:most]
                known = self._db.by_id.get(stream)
                for nth in (0, 1):
                    notes = [
                        n for n in (known.notes if known else ()) if n.slots and n.slots[nth] is not None
                    ]
                    told = [n.opening for n in notes if n.opening and first <= (n.slots[nth] or 0) <= last]
                    found += [(stream, *window) for opening in told[:most] for window in opening.windows]
            return found

        return await self._db.run(statement)

    async def find_windows(
        self, wanted: Sequence[tuple[int, str]], now_ms: int, aside: bool = False
    ) -> list[Window]:
        def statement() -> list[Window]:
            found = []
            for key in wanted:
                those: list[Window] = []
                w = self._db.windows.get(key)
                note = None if w is None else self._db.notes.get(w.notification)
                if w is not None and note is not None and w.ends_ms > now_ms:
                    those.append(_window(key, note, w.ends_ms, w.events, w.count, w.notified_ms))
                stream = self._db.by_id.get(key[0])
                for note in () if stream is None else stream.notes:
                    if note.opening is not None:
                        for name, ends_ms in note.opening.found_by(note.slots):
                            if name == key[1] and ends_ms > now_ms:
                                told_ms = note.opening.notified_ms
                                those.append(_window(key, note, ends_ms, 1, 1, told_ms, note.opening))
                if those:  # the newest; with a row rather than without
                    found.append(max(those, key=lambda w: (w.row.seq, w.opening is None)))
            return found

        return await self._db.run(statement)

    async def find_actors(
        self, wanted: Sequence[tuple[bytes, str]], aside: bool = False
    ) -> set[tuple[bytes, str]]:
        asked = set(wanted)
        return await self._db.run(
            lambda: asked & {(e.notification, e.actor or "") for e, _ in self._db.merged.values()}
        )

    async def find_locales(self, streams: Sequence[int], aside: bool = False) -> dict[int, str]:
        return await self._db.run(dict[int, str])  # no device of the model names one

    async def find_merged(self, ids: Sequence[bytes], aside: bool = False) -> dict[bytes, MergedInto]:
        return await self._db.run(lambda: self._merged(ids))

    def _merged(self, ids: Sequence[bytes]) -> dict[bytes, MergedInto]:
        found = {}
        for raw in ids:
            event, _ = self._db.merged.get(raw, (None, 0))
            note = None if event is None else self._db.notes.get(event.notification)
            if event is not None and event.status != OPENED and note is not None:
                found[raw] = MergedInto(event.notification, event.stream_id, event.status, note.row.seq)
        return found

    async def prune_merges(self, now_ms: int, since_ms: int) -> None:
        def statement() -> None:
            db = self._db
            db.windows = {k: w for k, w in db.windows.items() if w.ends_ms >= now_ms}
            db.merged = {k: m for k, m in db.merged.items() if m[1] >= since_ms}

        await self._db.run(statement)

    async def draw_delivery_ids(self, count: int) -> list[int]:
        return await self._db.run(lambda: [self._db.draw() for _ in range(count)])

    # -- changes ----------------------------------------------------------------------------------------

    def _cancel(self, notes: Sequence[Note], reason: str, now_ms: int) -> int:
        ended = [
            delivery
            for note in notes
            for delivery in self._db.of_note.get(note.row.id, ())
            if delivery.state in PENDING
        ]
        for delivery in ended:
            delivery.state, delivery.reason = "cancelled", reason
            if delivery.gate == WITHDRAWN:
                delivery.gate = None
        return self._take_over(ended, now_ms)

    async def change(
        self,
        term: int,
        op: str,
        wanted: Sequence[tuple[int, Sequence[bytes]]],
        now_ms: int,
        devices: Mapping[int, str] = NOBODY,
    ) -> dict[int, ChangeDone]:
        # As with `push.withdraw` off: what was sent is not taken back here.
        def statement() -> dict[int, ChangeDone]:
            self._fence(term)
            done: dict[int, ChangeDone] = {}
            for stream_id, ids in wanted:
                hit = [n for raw in ids if (n := self._db.notes.get(raw)) and n.stream.id == stream_id]
                column = {"archive": "archived", "dismiss": "dismissed", "click": "clicked"}.get(op, op)
                hit = [
                    n for n in hit if n.row.retracted_ms is None and getattr(n.row, f"{column}_ms") is None
                ]
                if not hit:
                    continue
                stream = hit[0].stream
                self._db.check_owner(self._shard, stream.slot, f"a change ({op})")
                stream.rev += 1
                if op != "seen":
                    stream.unread -= sum(n.counted for n in hit)
                for n in hit:
                    self._set(n, column, now_ms, stream.rev)
                again = self._cancel(hit, "read" if op == "read" else column, now_ms)
                ids = [n.row.id for n in hit]
                done[stream_id] = ChangeDone(stream.rev, stream.unread, ids, len(hit), again)
                self._told(op, f"{stream.key.user} {[n.row.seq for n in hit]} rev {stream.rev}")
            return done

        return await self._db.run(statement)

    def _set(self, note: Note, column: str, now_ms: int, rev: int) -> None:
        row = note.row
        setattr(row, f"{column}_ms", now_ms)
        if column in ("clicked", "read"):
            row.read_ms = now_ms if row.read_ms is None else row.read_ms
        if column in ("clicked", "read", "seen"):
            row.seen_ms = now_ms if row.seen_ms is None else row.seen_ms
            row.delivered_ms = now_ms if row.delivered_ms is None else row.delivered_ms
        row.rev = rev
        note.changed = True

    async def read_all(
        self,
        term: int,
        wanted: Sequence[tuple[int, int]],
        now_ms: int,
        devices: Mapping[int, str] = NOBODY,
    ) -> dict[int, ChangeDone]:
        def statement() -> dict[int, ChangeDone]:
            self._fence(term)
            done: dict[int, ChangeDone] = {}
            for stream_id, upto in wanted:
                stream = self._db.by_id[stream_id]
                hit = [n for n in stream.notes if n.row.seq <= upto and n.counted]
                if not hit:
                    continue
                self._db.check_owner(self._shard, stream.slot, "a change (read_all)")
                stream.rev += 1
                stream.unread -= len(hit)
                for n in hit:
                    self._set(n, "read", now_ms, stream.rev)
                again = self._cancel(hit, "read", now_ms)
                done[stream_id] = ChangeDone(stream.rev, stream.unread, [], len(hit), again)
                self._told("read_all", f"{stream.key.user} up to {upto} rev {stream.rev}")
            return done

        return await self._db.run(statement)

    async def existing(self, wanted: Sequence[tuple[int, bytes]]) -> set[bytes]:
        def statement() -> set[bytes]:
            notes = self._db.notes
            return {raw for stream, raw in wanted if raw in notes and notes[raw].stream.id == stream}

        return await self._db.run(statement)

    async def acknowledge(self, term: int, told: Sequence[SignalRow], now_ms: int) -> int:
        rows = [copy.copy(row) for row in told]

        def statement() -> int:
            self._fence(term)
            new = 0
            for t in rows:
                note = self._db.notes.get(t.notification)
                if note is None or note.stream.id != t.stream_id:
                    continue
                if note.row.delivered_ms is None and t.signal in ACKNOWLEDGED:
                    note.row.delivered_ms = now_ms
                    new += 1
                    if t.signal == SILENT and (note.kept or "").startswith("["):
                        note.kept = f"-{note.kept}"
                if t.rev is not None and note.row.updated_ms is not None and note.row.rev > t.rev:
                    continue
                for delivery in self._db.of_note.get(t.notification, ()):
                    if delivery.channel != "withdraw":
                        self._follow(delivery, t, now_ms)
            return new

        return await self._db.run(statement)

    def _follow(self, delivery: Delivery, told: SignalRow, now_ms: int) -> None:
        holdable = delivery.hold_until_ms is not None and delivery.hold_until_ms > now_ms
        done = on_signal(told.signal, delivery.state, delivery.gate, holdable)
        if done == "none":
            return
        shown = told.shown_on.split("\n") if told.shown_on else []
        if done == "cancel":
            delivery.state = "cancelled"
            delivery.reason = (delivery.reason or "active") if told.signal == DONE else "acknowledged"
        elif done == "hold":
            assert delivery.hold_until_ms is not None
            delivery.gate, delivery.due_ms = HELD, delivery.hold_until_ms
        elif done == "due":
            delivery.gate, delivery.due_ms = ALWAYS, now_ms
        if not set(shown) <= set(delivery.shown_on):
            delivery.shown_on = [*delivery.shown_on, *shown]
        self._told("follows", f"push {delivery.id}: {told.signal} -> {done}")

    async def ids_between(
        self, ranges: Sequence[tuple[int, int, int, bool]]
    ) -> list[tuple[bytes, int, int, int]]:
        def statement() -> list[tuple[bytes, int, int, int]]:
            found: list[tuple[bytes, int, int, int]] = []
            for stream, after, upto, by_rev in ranges:
                for n in self._db.by_id[stream].notes:
                    rev = 0 if n.row.updated_ms is None else n.row.rev
                    pending = any(d.state in PENDING for d in self._db.of_note.get(n.row.id, ()))
                    waits = (n.kept or "").startswith("[")
                    open_ = pending or ((n.row.delivered_ms is None or waits) and not by_rev)
                    if open_ and after < (rev if by_rev else n.row.seq) <= upto:
                        found.append((n.row.id, stream, n.row.seq, rev))
            return found

        return await self._db.run(statement)

    async def policies(self, tenants: Sequence[str]) -> dict[str, dict[str, Any] | None]:
        return await self._db.run(
            lambda: {t: self._db.policies[t] for t in tenants if t in self._db.policies}
        )

    async def client_secret(self, tenant: str) -> str | None:
        return await self._db.run(lambda: "s" * 32 if tenant in self._db.policies else None)

    async def save_last_seen(self, term: int, wanted: Sequence[tuple[int, int]]) -> None:
        def statement() -> None:
            with contextlib.suppress(FencedError):
                self._fence(term)
                for stream, ms in wanted:
                    self._db.by_id[stream].last_seen_ms = ms

        await self._db.run(statement)

    async def last_seen(self, tenant: str, users: Sequence[str]) -> dict[str, tuple[int | None, int | None]]:
        def statement() -> dict[str, tuple[int | None, int | None]]:
            rows = {u: self._db.streams.get(UserKey(tenant, u)) for u in users}
            return {u: (s.last_seen_ms, s.invisible_since_ms) for u, s in rows.items() if s is not None}

        return await self._db.run(statement)

    # -- outbox -----------------------------------------------------------------------------------------

    async def claim_due(
        self, term: int, slots: Sequence[int], now_ms: int, limit: int, lease_end_ms: int
    ) -> list[Claimed]:
        asked = frozenset(slots)

        def statement() -> list[Claimed]:
            with contextlib.suppress(FencedError):
                self._fence(term)
                return self._claim(asked, now_ms, limit, lease_end_ms)
            return []

        return await self._db.run(statement)

    def _claim(self, slots: frozenset[int], now_ms: int, limit: int, lease_end_ms: int) -> list[Claimed]:
        due = [
            d
            for d in self._db.deliveries.values()
            if d.state in CLAIMABLE and d.due_ms <= now_ms and d.slot in slots
        ]
        due.sort(key=lambda d: (d.due_ms, d.note.stream.id))
        claimed = []
        for d in due[:limit]:
            self._db.check_owner(self._shard, d.slot, "a claim")
            d.state, d.due_ms = "sending", lease_end_ms
            d.attempts = min(d.attempts + 1, 32767)
            d.stale = False
            n = d.note
            self._told("claims", f"push {d.id} of {n.stream.key.user} seq {n.row.seq}, try {d.attempts}")
            claimed.append(self._claimed(d, n.row.content))
        return claimed

    def _claimed(self, d: Delivery, content: str) -> Claimed:
        sent_to = [
            a.device for (id_, _, _), a in self._db.attempts.items() if id_ == d.id and a.outcome == "sent"
        ]
        n, e = d.note, d.note.event
        reached: list[str] = []
        if d.channel in ("withdraw", "replace"):
            pushes = [o for o in self._db.of_note[n.row.id] if o.channel != "withdraw"]
            reached = sorted({device for o in pushes for device in self._db.reached(o)})
        ended = "cancelled" if n.cancelled_ms is not None else "seen"
        if n.row.retracted_ms is not None:
            ended = "retracted"
        told = d
        if d.channel in ("withdraw", "replace"):
            told = next((o for o in self._db.of_note[n.row.id] if o.carrier == o.id), d)
        return Claimed(
            d.id, d.attempts, d.slot, n.stream.key, n.stream.unread, n.row.id, n.row.seq, e.type,
            e.priority, content, n.row.expires_ms, sent_to, d.gate,
            bool(d.shown_on) or (n.row.delivered_ms or -1) >= d.created_ms,
            d.hold_until_ms or 0, list(d.shown_on),
            d.channel, d.chain, d.step, d.created_ms if d.replayed_ms is None else d.replayed_ms,
            d.base_attempt, reached, e.category, d.merged, self._db.preferences.get(n.stream.key),
            n.stream.id, ended, None, d.reason, told.carrier, told.digest,
        )  # fmt: skip

    async def release(self, term: int, rows: Sequence[ReleaseRow], now_ms: int) -> int:
        def statement() -> int:
            self._fence(term)
            released = 0
            for r in rows:
                d = self._db.deliveries.get(r.delivery)
                if d is not None and d.attempts == r.attempt and d.state == "sending":
                    d.state, d.due_ms, d.reason = "planned", r.due_ms, r.reason
                    d.attempts -= 1
                    if r.held:
                        d.hold_until_ms = r.due_ms
                        d.gate = WITHDRAWN if d.gate == WITHDRAWN else DEFERRED
                    released += 1
                    self._told("releases", f"push {r.delivery}: {r.reason}")
            return released

        return await self._db.run(statement)

    async def merge(self, term: int, rows: Sequence[CarrierRow], now_ms: int) -> dict[int, int]:
        def statement() -> dict[int, int]:
            self._fence(term)
            db, found = self._db, {}
            carriers = [
                r for r in rows
                if (d := db.deliveries.get(r.delivery)) is not None
                and (d.state, d.attempts) == ("sending", r.attempt)
            ]  # fmt: skip
            gone: dict[int, list[Delivery]] = {}
            for r in carriers:
                claimed = [
                    d for other, attempt in r.others
                    if (d := db.deliveries[other]).state == "sending" and d.attempts == attempt
                ]  # fmt: skip
                due = [
                    d for d in db.deliveries.values()
                    if d.state == "planned" and d.due_ms <= now_ms and d.gate == DEFERRED and d.digest is None
                    and (d.slot, d.note.stream.id, d.channel) == (r.slot, r.stream_id, r.channel)
                    and not (d.note.row.expires_ms is not None and d.note.row.expires_ms <= now_ms)
                ]  # fmt: skip
                gone[r.delivery] = claimed + due
            for r in carriers:
                carrier = db.deliveries[r.delivery]
                ids = {d.id for d in gone[r.delivery]}
                theirs = [d for d in db.deliveries.values() if d.carrier in ids and d.id not in ids]
                for d in gone[r.delivery] + theirs:
                    d.reason, d.carrier = f"merged into {uuid_text(carrier.note.row.id)}", carrier.id
                for d in gone[r.delivery]:
                    d.state = "cancelled"
                if gone[r.delivery]:
                    carrier.merged += len(gone[r.delivery]) + len(theirs)
                    carrier.carrier = carrier.id
                    found[r.delivery] = carrier.merged
                    self._told("merges", f"{len(gone[r.delivery])} pushes into {r.delivery}")
            return found

        return await self._db.run(statement)

    async def tries_before(self, deliveries: Sequence[int]) -> dict[int, tuple[int, int | None, bool]]:
        def statement() -> dict[int, tuple[int, int | None, bool]]:
            found = [self._db.deliveries[d] for d in deliveries if d in self._db.deliveries]
            sent = {id_ for (id_, _, _), a in self._db.attempts.items() if a.outcome == "sent"}
            return {d.id: (d.base_attempt, d.note.row.expires_ms, d.id in sent) for d in found}

        return await self._db.run(statement)

    async def replay(self, term: int, rows: Sequence[ReplayRow], now_ms: int) -> dict[int, bool]:
        def statement() -> dict[int, bool]:
            self._fence(term)
            done: dict[int, bool] = {}
            for r in rows:
                d = self._db.deliveries.get(r.delivery)
                if d is None or (d.tenant, d.slot) != (r.tenant, r.slot):
                    continue
                if d.state != "dead":
                    if d.replayed_ms == r.asked_ms:
                        done[d.id] = True
                    continue
                end_ms = d.note.row.expires_ms
                expired = (end_ms is not None and end_ms <= now_ms) or d.note.row.retracted_ms is not None
                expired = expired or d.note.cancelled_ms is not None
                done[d.id] = not expired
                d.due_ms, d.gate = now_ms, ALWAYS
                if expired:
                    d.reason = "expired"
                else:
                    d.state, d.reason = "planned", None
                    d.base_attempt, d.replayed_ms = d.attempts, r.asked_ms
                self._told("replays", f"push {d.id}: {d.state}")
            return done

        return await self._db.run(statement)

    async def load_targets(self, keys: Sequence[UserKey]) -> dict[UserKey, list[PushTarget]]:
        return await self._db.run(lambda: {key: self._targets(key) for key in keys})

    async def record_outcomes(
        self,
        term: int,
        attempts: Sequence[AttemptRow],
        settled: Sequence[SettleRow],
        gone: Sequence[tuple[UserKey, str, str]],
        disabled: Sequence[tuple[UserKey, str, str]],
        now_ms: int,
    ) -> int:
        def statement() -> int:
            self._fence(term)
            db = self._db
            failed: list[Delivery] = []
            retired: list[Delivery] = []
            renewed: list[Delivery] = []
            silent: list[Delivery] = []
            for a in attempts:
                db.attempts.setdefault((a.delivery, a.attempt, a.device), a)
            for s in settled:
                d = db.deliveries.get(s.delivery)
                if d is not None and d.attempts == s.attempt and d.state == "sending":
                    self._settle(d, s)
                    if s.onward and d.chain and s.state in ("dead", "cancelled"):
                        failed.append(d)
                    if d.gate == WITHDRAWN and db.reached(d):
                        retired.append(d)
                    elif d.stale and d.note.open and db.reached(d):
                        renewed.append(d)
                    if d.carrier == d.id and (s.next or d.gate == WITHDRAWN):
                        gone_too = d.state == "sent" and d.gate == WITHDRAWN and d.note.row.retracted_ms
                        if gone_too or d.state in ("cancelled", "dead"):
                            silent.append(d)
                    self._told("settles", f"push {s.delivery}: {d.state} {s.reason or ''}")
            for key, device, token in gone:
                target = db.devices.get((*key, device))
                if target is not None and target.token == token:
                    del db.devices[(*key, device)]
            for key, device, token in disabled:
                target = db.devices.get((*key, device))
                if target is not None and target.token == token:
                    db.disabled.add((*key, device))
            for d in retired:
                self._add(d.note, "withdraw", now_ms)
            for d in renewed:
                new = self._add(d.note, "replace", now_ms)
                new.gate, new.merged = ALWAYS, d.merged
            taken_over = self._take_over(silent, now_ms)
            return len(retired) + len(renewed) + taken_over + self._fall_back(failed, now_ms)

        return await self._db.run(statement)

    def _settle(self, d: Delivery, s: SettleRow) -> None:
        d.state, d.due_ms, d.reason = s.state, s.due_ms, s.reason
        if s.state == "dead":
            d.tenant = d.note.stream.key.tenant
        given_up = s.state == "dead" or (s.state in ("failed", "unknown") and s.attempt >= 3)
        back = d.channel in ("withdraw", "replace") and given_up
        ended = d.gate == WITHDRAWN and s.state != "sent"
        if back or ended or (s.onward and d.chain and s.state == "dead"):
            d.state = "cancelled"

    def _fall_back(self, failed: list[Delivery], now_ms: int) -> int:
        ready: dict[bytes, Delivery] = {}
        for d in sorted(failed, key=lambda one: (one.created_ms, one.step, one.id), reverse=True):
            row = d.note.row
            wanted = (row.delivered_ms or -1) < d.created_ms or d.gate in (SEEN, ALWAYS)
            seen = row.seen_ms is not None and row.seen_ms >= d.created_ms
            away = row.archived_ms is not None and row.archived_ms != d.note.event.created_ms
            touched = (seen or None, away or None, row.dismissed_ms, row.retracted_ms or d.note.cancelled_ms)
            others = self._db.of_note[row.id]
            ended = all(
                o.state not in CLAIMABLE
                and (o.created_ms < d.created_ms or (o.step <= d.step and o.state != "sent"))
                for o in others
            )
            if wanted and touched == (None,) * 4 and ended:
                ready.setdefault(row.id, d)
        for raw, d in ready.items():
            following, _, chain = d.chain.partition(",")
            for other in failed:
                if other.note.row.id == raw:
                    told = f"falls back to {following}"
                    other.reason = f"{other.reason}; {told}" if other.reason is not None else told
            new = Delivery(
                self._db.draw(), d.note, d.slot, "planned", now_ms, 0, None,
                ALWAYS if d.gate in (SEEN, ALWAYS) else None, None, list(d.shown_on), following, chain,
                d.step + 1, now_ms,
            )  # fmt: skip
            self._db.deliveries[new.id] = new
            self._db.of_note[raw].append(new)
            self._told("falls back", f"push {d.id} -> {new.id} ({following})")
        return len(ready)

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
        def statement() -> list[str]:
            self._fence(term)
            evicted = []
            for (t, u, device), known in list(self._db.devices.items()):
                same = (known.provider, known.app_id, known.token) == (
                    target.provider, target.app_id, target.token,
                )  # fmt: skip
                if t == tenant and same and (u, device) != (user, target.device):
                    del self._db.devices[t, u, device]
                    evicted.append(u)
            named = msgspec.structs.replace(target, platform=platform)
            self._db.devices[tenant, user, target.device] = named
            self._db.disabled.discard((tenant, user, target.device))
            return [u for u in evicted if u != user]

        return await self._db.run(statement)

    async def delete_target(self, term: int, tenant: str, user: str, device: str) -> bool:
        def statement() -> bool:
            self._fence(term)
            return self._db.devices.pop((tenant, user, device), None) is not None

        return await self._db.run(statement)

    async def put_preferences(
        self, term: int, tenant: str, user: str, document: str, now_ms: int, version: int | None = None
    ) -> int:
        def statement() -> int:
            self._fence(term)
            key = UserKey(tenant, user)
            present = self._db.preference_versions.get(key, 0)
            if version is not None and version != present:
                raise VersionError(f"version {version} of the preferences is not the present one", "If-Match")
            self._db.preferences[key] = document
            self._db.preference_versions[key] = present + 1
            return present + 1

        return await self._db.run(statement)

    async def change_preferences(
        self,
        term: int,
        tenant: str,
        user: str,
        change: Callable[[dict[str, Any]], dict[str, Any]],
        now_ms: int,
    ) -> str:
        def statement() -> str:
            self._fence(term)
            key = UserKey(tenant, user)
            before = json.loads(self._db.preferences.get(key, "{}"))
            after = change(before)
            if after != before:
                self._db.preferences[key] = json.dumps(after)
                self._db.preference_versions[key] = self._db.preference_versions.get(key, 0) + 1
            return json.dumps(after)

        return await self._db.run(statement)

    async def revoke_tokens(self, term: int, stream_id: int, now_ms: int) -> None:
        def statement() -> None:
            self._fence(term)
            self._db.by_id[stream_id].valid_from_ms = now_ms

        await self._db.run(statement)

    async def set_invisible(self, term: int, stream_id: int, since_ms: int | None) -> int | None:
        def statement() -> int | None:
            self._fence(term)
            row = self._db.by_id[stream_id]
            row.invisible_since_ms = None if since_ms is None else row.invisible_since_ms or since_ms
            return row.invisible_since_ms

        return await self._db.run(statement)

    async def log_out(
        self, term: int, stream_id: int, key: UserKey, device: str | None, token_id: bytes, expires_ms: int
    ) -> None:
        def statement() -> None:
            self._fence(term)
            if device is not None:
                self._db.devices.pop((key.tenant, key.user, device), None)
            self._db.by_id[stream_id].revoked.setdefault(token_id, expires_ms)

        await self._db.run(statement)

    # -- replay -----------------------------------------------------------------------------------------

    async def notifications_after(self, stream_id: int, after_seq: int, limit: int) -> list[NotificationRow]:
        def statement() -> list[NotificationRow]:
            rows = [n.row for n in self._db.by_id[stream_id].notes if n.row.seq > after_seq]
            return [copy.copy(row) for row in rows[:limit]]

        return await self._db.run(statement)

    async def changes_after(
        self, stream_id: int, after_rev: int, upto_seq: int, or_after_rev: int, limit: int
    ) -> list[NotificationRow]:
        def statement() -> list[NotificationRow]:
            rows = [
                n.row
                for n in self._db.by_id[stream_id].notes
                if n.changed and n.row.rev > after_rev and (n.row.seq <= upto_seq or n.row.rev > or_after_rev)
            ]
            rows.sort(key=lambda r: (r.rev, r.seq))
            return [copy.copy(row) for row in rows[:limit]]

        return await self._db.run(statement)


@_named
class ModelClusterStore:
    """`stores.postgres.cluster.ClusterStore` over a `Database`."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def close(self) -> None:
        pass

    async def take_epoch(self) -> int:
        def statement() -> int:
            self._db.epoch += 1
            return self._db.epoch

        return await self._db.run(statement)

    def _check(self, epoch: int) -> None:
        if epoch != self._db.epoch:
            raise FencedError(f"coordinator epoch {epoch} is over: the present one is {self._db.epoch}")

    async def load(self) -> StoredMap:
        def statement() -> StoredMap:
            db = self._db
            terms = {name: row.term for name, row in db.shards.items()}
            members = []
            for member in db.members:
                if member.kind == "shard" and member.name not in terms:
                    continue
                fields = {name: getattr(member, name) for name in member.__struct_fields__}
                members.append(Member(**(fields | {"term": terms.get(member.name, 0)})))
            return StoredMap(list(db.owners), dict(db.shards), members, db.draining)

        return await self._db.run(statement)

    async def register_shard(self, epoch: int, shard: str, node: str, incarnation: str) -> int:
        def statement() -> int:
            self._check(epoch)
            known = self._db.shards.get(shard)
            term = 1 if known is None else known.term + (known.incarnation != incarnation)
            self._db.shards[shard] = ShardRow(shard, term, node, incarnation)
            return term

        return await self._db.run(statement)

    async def move_slots(self, epoch: int, moves: Any) -> dict[str, int]:
        moves = dict(moves)

        def statement() -> dict[str, int]:
            self._check(epoch)
            db = self._db
            losers = sorted(
                {old for slot, new in moves.items() if (old := db.owners[slot]) is not None and old != new}
            )
            terms = {}
            for name in losers:
                row = db.shards[name]
                terms[name] = row.term + 1
                db.shards[name] = ShardRow(name, row.term + 1, row.node, row.incarnation)
            for slot, new in moves.items():
                marks = [db.kept_from.get(slot)]
                if db.owners[slot] != new:
                    marks.append(db.kept_marks.get(db.owners[slot] or ""))
                if known := [mark for mark in marks if mark is not None]:
                    db.kept_from[slot] = min(known)
                db.owners[slot] = new
                db.moved_at[slot] = db.loop.now
            db.moves += 1
            if db.on_commit is not None:
                db.on_commit("coordinator moves", f"{len(moves)} slots, new terms {terms}")
            return terms

        return await self._db.run(statement)

    async def save_members(self, epoch: int, members: Sequence[Member]) -> None:
        kept = list(members)

        def statement() -> None:
            self._check(epoch)
            self._db.members = kept

        await self._db.run(statement)

    async def save_draining(self, epoch: int, nodes: Collection[str]) -> None:
        kept = frozenset(nodes)

        def statement() -> None:
            self._check(epoch)
            self._db.draining = kept

        await self._db.run(statement)

    async def forget_old_shards(self, epoch: int, keep: Any = ()) -> None:
        await self._db.run(lambda: self._check(epoch))


class ModelSlotTable(SlotTable):
    """The coordinator's table with the model behind it."""

    def __init__(self, settings: Settings, clock: Clock, db: Database) -> None:
        super().__init__(settings, clock)
        self._store = ModelClusterStore(db)  # type: ignore[assignment]

    async def maintain(self, shards: Any) -> None:
        await self.store.forget_old_shards(self.epoch, shards)


def users_of(db: Database) -> Iterator[StreamRow]:
    """Every stream, in order of making."""
    yield from db.streams.values()
