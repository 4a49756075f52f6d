"""The simulation's model of the shard store does what the real one does: the same calls, the same answers."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import inspect
import operator
import random
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest

from carillon.attention import (
    ACTIVE,
    ALWAYS,
    ANY,
    AWAY,
    DEFERRED,
    DONE,
    HELD,
    KEEP,
    RECEIVED,
    SEEN,
    SILENT,
    STALE,
)
from carillon.clock import SystemClock
from carillon.digest import Item, Told, tell
from carillon.errors import FencedError, VersionError
from carillon.ids import UserKey, Uuid7Source
from carillon.ids import slot_of as slot_of_user
from carillon.kept_push import KeptPush
from carillon.merge_begun import Begun, Opening, pack, slot_of
from carillon.messages import Event, PushTarget
from carillon.settings import PostgresSettings
from stores.postgres.amendments import Amended, EditRow
from stores.postgres.cluster import ClusterStore, ShardRow
from stores.postgres.digests import DigestStore
from stores.postgres.merges import MergedRow, MergeWrites, RepushRow, UpdateRow, WindowRow
from stores.postgres.shard_rows import (
    AppendRow,
    AttemptRow,
    CarrierRow,
    Claimed,
    KeysTakenError,
    OutboxRow,
    PoisonError,
    ReleaseRow,
    ReplayRow,
    SettleRow,
    SignalRow,
    UserRecord,
)
from stores.postgres.shard_store import OPERATIONS, ShardStore
from tests.simulation.digests import ModelDigestStore
from tests.simulation.store import Database, ModelClusterStore, ModelShardStore

DIGESTS = (bytes(15) + b"a", bytes(15) + b"b")
USERS = [UserKey("t", name) for name in ("ann", "bob", "cat")]
KEYS = [f"count:{n * 0x1234567890ABCDEF:032x}" for n in range(1, 5)]
ACTS = [bytes([n]) * 16 for n in range(40)]
SIGNALS = (ACTIVE, AWAY, DONE, KEEP, RECEIVED, SILENT, STALE)
EXPECTED = (FencedError, KeysTakenError, PoisonError, VersionError)


@pytest.mark.parametrize(
    ("model", "real"),
    [(ModelShardStore, ShardStore), (ModelClusterStore, ClusterStore), (ModelDigestStore, DigestStore)],
)
def test_the_model_takes_the_same_calls(model: type, real: type) -> None:
    """Every public method of the model is one of the real store, with its parameters."""
    for name, method in inspect.getmembers(model, inspect.isfunction):
        if not name.startswith("_"):
            theirs = inspect.signature(getattr(real, name)).parameters
            assert list(inspect.signature(method).parameters) == list(theirs), name
    lacking = {
        name
        for name, _ in inspect.getmembers(real, inspect.isfunction)
        if not name.startswith("_") and not hasattr(model, name)
    }
    assert not lacking, f"the simulation does not know {lacking}"


class Pair:
    """Both stores; every call goes to both, and their answers must be equal."""

    def __init__(self, real: ShardStore, rng: random.Random, db: asyncpg.Connection) -> None:
        self.db = Database(asyncio.get_running_loop(), SystemClock(), random.Random(1))  # type: ignore[arg-type]
        self.db.shards["shard-a"] = ShardRow("shard-a", 1, "local", "x")
        self.db.owners = ["shard-a"] * 1024
        self.real, self.model = real, ModelShardStore(self.db, "shard-a")
        self.sql = db
        self.rng = rng
        self.ids = Uuid7Source()
        self.now_ms = SystemClock().now_ms()
        self.streams: dict[UserKey, int] = {}
        self.notes: list[tuple[int, bytes]] = []
        self.claimed: list[tuple[int, int]] = []
        self.merged: list[bytes] = []
        self.made = 0

    def term(self) -> int:
        """The present one, now and then an old one."""
        return 1 if self.rng.random() < 0.93 else 0

    async def both(self, name: str, *args: Any, order: Callable[[Any], Any] | None = None) -> Any:
        """Call `name` at both; answers or errors must agree. Returns the answer, None for an error."""
        answers = []
        for store in (self.real, self.model):
            call: Callable[..., Awaitable[Any]] = operator.attrgetter(name)(store)
            try:
                answer = await call(*args)
                answers.append(order(answer) if order is not None else answer)
            except EXPECTED as exc:
                answers.append(type(exc).__name__)
        assert answers[0] == answers[1], f"{name}{args}"
        return None if isinstance(answers[0], str) and answers[0].endswith("Error") else answers[0]

    # -- one random step --------------------------------------------------------------------------------

    async def step(self) -> None:
        """One call."""
        self.now_ms += self.rng.randrange(1, 2000)
        steps = (
            self.append, self.append, self.append, self.append, self.change, self.change, self.acknowledge,
            self.claim, self.amend, self.amend, self.settle, self.digest, self.digest, self.replay, self.look,
            self.targets, self.load, self.merge_events, self.look_at_merges,
            self.log_out, self.dead_letters, self.keep,
        )  # fmt: skip
        await self.rng.choice(steps)()

    async def load(self) -> None:
        key = self.rng.choice(USERS)
        if self.rng.random() < 0.2:
            document = self.rng.choice(("{}", '{"global": true}'))
            version = self.rng.choice((None, None, 0, 1, 2))
            await self.both(
                "put_preferences", self.term(), key.tenant, key.user, document, self.now_ms, version
            )
        asked = [(key, slot_of_user(*key), f"e-{key.user}")]
        records = await self.both("load_users", self.term(), asked, order=_tokens_sorted)
        for record in records or ():
            self.streams[key] = record.stream_id

    async def append(self) -> None:
        rng = self.rng
        if not self.streams:
            await self.load()
            return
        counts: dict[int, int] = {}
        rows: list[AppendRow] = []
        outbox: list[OutboxRow] = []
        keyed: list[Event] = []
        for _ in range(rng.choice((1, 1, 2, 5))):
            key = rng.choice(list(self.streams))
            stream, slot = self.streams[key], slot_of_user(*key)
            twice = bool(self.notes) and rng.random() < 0.05
            raw = rng.choice(self.notes)[1] if twice else self.ids.next(self.now_ms)
            event = Event(
                raw, key.tenant, key.user, slot, "test", None, 1, f'"title":"{self.made}"', self.now_ms,
                self.now_ms + 3000 if rng.random() < 0.2 else None,
            )  # fmt: skip
            if any(row.event.id == raw for row in rows):
                continue
            self.made += 1
            if rng.random() < 0.2:
                name = f"k{rng.randrange(8)}"
                if all(other.idempotency_key != name for other in keyed):
                    event.idempotency_key = name
                    event.body_hash = hashlib.sha256(name.encode()).digest()
                    keyed.append(event)
            counts[stream] = counts.get(stream, 0) + 1
            row = AppendRow(event, stream, -counts[stream])
            if rng.random() < 0.2:
                row.decision, row.archived, row.priority = "[]", rng.random() < 0.5, rng.choice((None, 0, 3))
            rows.append(row)
            if rng.random() < 0.6:
                (number,) = await self.both("draw_delivery_ids", 1)
                claimed = rng.random() < 0.3
                gate = rng.choice((None, ANY, SEEN, HELD, ALWAYS, DEFERRED))
                hold_ms = rng.choice((None, self.now_ms + rng.randrange(9000)))
                if gate == SEEN and hold_ms is None:
                    gate = ALWAYS  # KEEP is told only of what may be held
                due_ms = self.now_ms + rng.randrange(4000)
                chain = rng.choice(("", "", "apns", "apns,push"))
                row = OutboxRow(number, raw, stream, slot, claimed, due_ms, gate, hold_ms)
                row.channel, row.chain = "fcm", chain
                if rng.random() < 0.5 and rows[-1].decision is not None:
                    row.digest, row.gate, row.claimed = rng.choice(DIGESTS), DEFERRED, False
                    row.reason = "digest"
                outbox.append(row)
            elif rng.random() < 0.6:
                push = self.push(raw, stream, slot)
                rows[-1].kept = push.text()
        for row in rows:
            row.back += counts[row.stream_id]
        since_ms = self.now_ms - 60_000
        opened = self.opened(rows) if rng.random() < 0.4 else None
        done = await self.both(
            "append", self.term(), counts, rows, outbox, self.now_ms, keyed, since_ms, None, opened
        )
        if done is not None:
            self.notes += [(row.stream_id, row.event.id) for row in rows]
        if keyed:
            pairs = [(e.tenant, e.idempotency_key or "") for e in keyed]
            await self.both("find_keys", pairs, since_ms)

    def push(self, raw: bytes, stream: int, slot: int) -> KeptPush:
        """One that may be kept."""
        rng, now_ms = self.rng, self.now_ms
        channels = rng.choice((["fcm"], ["fcm"], ["fcm", "email"]))
        hold_ms = rng.choice((None, now_ms + rng.randrange(9000)))
        push = KeptPush(raw, stream, slot, channels, now_ms + rng.randrange(4000), hold_ms)
        push.gate, push.reason = rng.choice((None, HELD)), rng.choice((None, "viewing"))
        push.chain, push.shown_on = rng.choice(("", "email,sms")), rng.choice(((), ("phone", "pad")))
        return push

    async def keep(self) -> None:
        """Something is done about kept pushes, or about some that others made rows."""
        rng = self.rng
        which = rng.randrange(4)
        some = [self.push(raw, stream, self.db.by_id[stream].slot) for stream, raw in self.some()]
        if which == 0 and some:
            told = [(push, rng.choice(("", "-", "~")) + push.text(), rng.random() < 0.8) for push in some]
            await self.both("acknowledge_kept", self.term(), told, self.now_ms)
        elif which == 1 and some:
            # What is another stream's by mistake is written to that stream's notification: neither looks.
            await self.both("write_kept", self.term(), some, self.now_ms)
        elif which == 2:
            since = rng.choice(self.notes)[1] if self.notes else bytes(16)
            await self.both("mark_kept", self.term(), since)
        else:
            slots = [slot_of_user(*key) for key in USERS if rng.random() < 0.7]
            streams = rng.choice((None, None, list(self.streams.values())[:1]))
            await self.both("adopt_kept", self.term(), slots, self.now_ms, streams)
        await self.compare_kept()

    async def compare_kept(self) -> None:
        """What notifications keep, one by one."""
        rows = await self.sql.fetch(
            "select id, kept, delivered_at is not null from notifications order by id"
        )
        assert [(r[0].bytes, r[1], r[2]) for r in rows] == [
            (raw, note.kept, note.row.delivered_ms is not None) for raw, note in sorted(self.db.notes.items())
        ]

    def opened(self, rows: list[AppendRow]) -> MergeWrites:
        """What a batch writes whose notifications begin windows: some without rows, of others the rows."""
        merges, rng = MergeWrites(), self.rng
        for row in rows:
            raw, stream = row.event.id, row.stream_id
            actor = rng.choice((None, "john"))
            windows = [
                (key, self.now_ms + rng.randrange(6000)) for key in rng.sample(KEYS, rng.choice((1, 2)))
            ]
            if rng.random() < 0.7:
                told_ms = self.now_ms + rng.randrange(3000)
                opening = Opening("tenant", self.now_ms, told_ms, actor, tuple(windows))
                slots = [slot_of(*one) if rng.random() < 0.9 else None for one in windows]
                row.begun = Begun(pack(opening), *slots)
            elif all((w.stream_id, w.key) != (stream, windows[0][0]) for w in merges.windows):
                merges.windows.append(
                    WindowRow(stream, windows[0][0], raw, windows[0][1], 1, rng.randrange(1, 9), self.now_ms)
                )
                merges.events.append(MergedRow(raw, raw, stream, "opened", "drop", "tenant", actor, None))
        return merges

    async def merge_events(self) -> None:
        """Some notifications take in events; one perhaps was merged before."""
        rng = self.rng
        some = {raw: stream for stream, raw in self.some() if self.db.notes[raw].stream.id == stream}
        if not some:
            return
        merges, back = MergeWrites(), dict[int, int]()
        for raw, stream in some.items():
            self.made += 1
            slot = self.db.by_id[stream].slot
            event = self.ids.next(self.now_ms) if rng.random() < 0.9 else rng.choice([*self.merged, raw])
            if any(row.event == event for row in merges.events):
                continue
            if rng.random() < 0.7:
                back[stream] = back.get(stream, 0) + 1
                ends_ms = rng.choice((None, self.now_ms + rng.randrange(9000)))
                content = f'"title":"m{self.made}"'
                top = rng.random() < 0.7
                merges.updates.append(
                    UpdateRow(
                        raw, stream, content, rng.randrange(4), "kind", "c", ends_ms, top, -back[stream]
                    )
                )
                if rng.random() < 0.7:
                    (number,) = await self.both("draw_delivery_ids", 1)
                    gate = rng.choice((None, ANY, ALWAYS, DEFERRED))
                    due_ms = self.now_ms + rng.randrange(4000)
                    digest = rng.choice((None, None, *DIGESTS))
                    merges.pushes.append(
                        RepushRow(
                            number, raw, stream, slot, due_ms, gate, None, "r", "fcm", "apns", 0, digest
                        )
                    )
            key = rng.choice(KEYS)
            if all((w.stream_id, w.key) != (stream, key) for w in merges.windows):
                ends_ms = self.now_ms + rng.randrange(6000)
                merges.windows.append(WindowRow(stream, key, raw, ends_ms, self.made, self.made, self.now_ms))
            status = rng.choice(("opened", "merged", "duplicate"))
            actor = rng.choice((None, "john", "jane"))
            merges.events.append(MergedRow(event, raw, stream, status, "count", "event", actor, "loud"))
            opening = self.db.notes[raw].opening
            if opening is not None and rng.random() < 0.5 and all(e.event != raw for e in merges.events):
                began_ms = opening.at_ms
                merges.events.append(
                    MergedRow(raw, raw, stream, "opened", "count", "event", opening.actor, None, began_ms)
                )
            slots = [slot for slot in self.db.notes[raw].slots if slot is not None]
            if slots and rng.random() < 0.3:
                merges.left.append((raw, rng.choice(slots)))
        for row in merges.updates:
            row.back += back[row.stream_id]
        done = await self.both("append", self.term(), {}, [], [], self.now_ms, [], 0, None, merges)
        if done is not None:
            self.merged += [row.event for row in merges.events]

    async def look_at_merges(self) -> None:
        streams = list(self.streams.values())
        wanted = [(stream, key) for stream in streams for key in KEYS]
        await self.both("find_windows", wanted, self.now_ms, order=lambda found: sorted(map(repr, found)))
        await self.both("open_windows", streams, self.now_ms, 1000, order=sorted)
        pairs = [(raw, actor) for _, raw in self.some() for actor in ("john", "jane")]
        await self.both("find_actors", pairs)
        await self.both("find_locales", streams)
        await self.both("find_merged", self.rng.sample(self.merged, min(len(self.merged), 5)))
        if self.rng.random() < 0.1:
            await self.both("prune_merges", self.now_ms - 4000, self.now_ms - 20_000)

    def some(self) -> list[tuple[int, bytes]]:
        """Some notifications, one perhaps with a stream that is not its own."""
        found = self.rng.sample(self.notes, min(len(self.notes), self.rng.choice((1, 2, 4))))
        if found and self.rng.random() < 0.1:
            found[0] = (self.rng.choice(list(self.streams.values())), found[0][1])
        return found

    async def change(self) -> None:
        if self.rng.random() < 0.2 and self.streams:
            stream = self.rng.choice(list(self.streams.values()))
            await self.both("read_all", self.term(), [(stream, self.rng.randrange(1, 40))], self.now_ms)
            return
        wanted: dict[int, list[bytes]] = {}
        for stream, raw in self.some():
            wanted.setdefault(stream, []).append(raw)
        op = self.rng.choice(list(OPERATIONS))
        if wanted:
            await self.both(
                "change", self.term(), op, list(wanted.items()), self.now_ms,
                order=lambda done: {k: (d.rev, d.unread, sorted(d.ids), d.changed) for k, d in done.items()},
            )  # fmt: skip

    async def amend(self) -> None:
        """Edits, retractions and cancellations, one of each stream, some of them told twice."""
        rng, some = self.rng, dict(self.some())
        acts = [Amended(stream, raw, rng.choice(ACTS), "key:k") for stream, raw in some.items()]
        before = await self.both("standing", acts)
        kind = rng.choice(("retract", "cancel", "edit", "edit", "edit"))
        if not acts:
            return
        if kind != "edit":
            await self.both(kind, self.term(), acts, self.now_ms)
            await self.both("standing", acts)
            return
        rows: list[EditRow] = []
        for a in acts:
            found = (before or {}).get(a.notification)
            if found is None or found.done:
                continue
            self.made += 1
            expires_ms = rng.choice((found.expires_ms, self.now_ms + 2500))
            version = found.version if rng.random() < 0.9 else found.version + 1
            rows.append(
                EditRow(
                    a.stream_id, a.notification, a.act, a.actor, f'"title":"{self.made}"', expires_ms,
                    version, rng.random() < 0.7,
                )
            )  # fmt: skip
        if rows:
            await self.both("edit", self.term(), rows, self.now_ms, 3)
            await self.both("edit", self.term(), rows, self.now_ms, 3)
            await self.both("standing", acts)

    async def acknowledge(self) -> None:
        told = [
            SignalRow(
                stream,
                raw,
                self.rng.choice(SIGNALS),
                self.rng.choice(("", "phone", "phone\npad")),
                self.rng.choice((None, None, 0, 2, 5, 12)),
            )
            for stream, raw in self.some()
        ]
        await self.both("acknowledge", self.term(), told, self.now_ms)

    async def claim(self) -> None:
        slots = [slot_of_user(*key) for key in USERS if self.rng.random() < 0.7]
        due_ms = self.now_ms + self.rng.choice((0, 5000))
        lease_ms = due_ms + 3000 + self.made
        claimed = await self.both(
            "claim_due", self.term(), slots, due_ms, 1000, lease_ms,
            order=lambda rows: sorted(map(_reached_sorted, rows), key=lambda c: c.delivery),
        )  # fmt: skip
        self.claimed += [(c.delivery, c.attempt) for c in claimed or ()]

    async def merge(self, delivery: int, attempt: int) -> None:
        """A claimed row speaks for others that are claimed, and for what of its user is held and due."""
        d = self.db.deliveries[delivery]
        others = [o for o in self.rng.sample(self.claimed, min(2, len(self.claimed))) if o[0] != delivery]
        row = CarrierRow(delivery, attempt, d.note.stream.id, d.slot, d.channel, list(dict(others).items()))
        await self.both("merge", self.term(), [row], self.now_ms + 5000)

    async def digest(self) -> None:
        """Something is done with a digest."""
        rng, now_ms = self.rng, self.now_ms + self.rng.choice((0, 5000))
        if not self.streams:
            return
        stream, digest = rng.choice(list(self.streams.values())), rng.choice(DIGESTS)
        which = rng.randrange(6)
        if which == 0:
            lease_ms = now_ms + 4000 + self.made
            more = await self.both(
                "digests.gather", self.term(), [(stream, digest)], now_ms, lease_ms, rng.choice((1, 2, 50)),
                order=lambda rows: sorted(rows, key=lambda c: c.delivery),
            )  # fmt: skip
            self.claimed += [(c.delivery, c.attempt) for c in more or ()]
        elif which == 1:
            await self.both("digests.flush", self.term(), stream, digest, "flushed", now_ms)
        elif which == 2 and self.notes:
            of, raw = rng.choice(self.notes)
            await self.both("digests.remove", self.term(), of, digest, raw, now_ms)
        elif which == 3:
            slots = [slot_of_user(*key) for key in USERS if rng.random() < 0.7]
            await self.both("digests.next_moment", slots, now_ms)
            waiting = await self.both(
                "digests.waiting", stream, order=lambda rows: sorted(rows, key=lambda w: w.delivery)
            )
            moves = [(w.delivery, rng.choice(DIGESTS), now_ms + 13 * w.delivery) for w in waiting[:2]]
            if moves:
                await self.both("digests.move", self.term(), moves, now_ms)
        else:
            await self.tell(now_ms)

    async def tell(self, now_ms: int) -> None:
        """Digests that were claimed are told, and what they told is read."""
        held = [d for d in self.db.deliveries.values() if d.state == "sending" and d.digest is not None]
        wrong = self.rng.random() < 0.1
        rows = [(d.id, d.attempts + wrong) for d in held]
        items = [Item(d.id, d.note.row.seq, (d.digest, d.channel)) for d in held]

        def decide(ours: frozenset[int], dealt_with: frozenset[int]) -> list[Told]:
            return tell([item for item in items if item.delivery in ours], dealt_with)

        beyond = {(d.note.stream.id, d.digest) for d in held} if self.rng.random() < 0.5 else set()
        await self.both("digests.tell", self.term(), rows, decide, now_ms, beyond)
        carriers = sorted({d.carrier for d in self.db.deliveries.values() if d.carrier is not None})
        if carriers:
            await self.both("digests.told", carriers, 3, 2)

    async def settle(self) -> None:
        rng, now_ms = self.rng, self.now_ms
        if not self.claimed:
            return
        delivery, attempt = rng.choice(self.claimed)
        if rng.random() < 0.3:
            due_ms = now_ms + 7 * delivery
            row = ReleaseRow(delivery, attempt, due_ms, "full", rng.random() < 0.5)
            await self.both("release", self.term(), [row], now_ms)
            return
        if rng.random() < 0.3:
            await self.merge(delivery, attempt)
            return
        state = rng.choice(("sent", "failed", "unknown", "dead", "dead"))
        outcome = {"dead": "invalid_target"}.get(state, state)
        tried = AttemptRow(delivery, attempt, "phone", "fcm", outcome, "", 200, "", now_ms, 1.0)
        reason = rng.choice((None, "gone"))
        row = SettleRow(
            delivery, attempt, state, now_ms + 11 * delivery, reason, rng.random() < 0.8, rng.random() < 0.5
        )
        key = rng.choice(USERS)
        lost = [(key, "phone", f"token-{rng.randrange(3)}")]
        gone, disabled = (lost, []) if rng.random() < 0.5 else ([], lost)
        await self.both("record_outcomes", self.term(), [tried], [row], gone, disabled, now_ms)

    async def dead_letters(self) -> None:
        """Some of all rows, dead or not."""
        asked_ms = self.now_ms - self.rng.choice((0, 0, 5000))
        some = self.rng.sample(self.claimed, min(3, len(self.claimed)))
        deliveries = sorted({delivery for delivery, _ in some} | {999_999})
        await self.both("tries_before", deliveries)
        rows = [
            ReplayRow(d.id, self.rng.choice(("t", "t", "t", "other")), d.slot, asked_ms)
            for d in (self.db.deliveries.get(delivery) for delivery in deliveries)
            if d is not None
        ]
        if rows:
            await self.both("replay", self.term(), rows, self.now_ms)
            await self.both("replay", self.term(), rows, self.now_ms)

    async def replay(self) -> None:
        if self.streams:
            stream = self.rng.choice(list(self.streams.values()))
            a, b, c = (self.rng.randrange(30) for _ in range(3))
            await self.both("notifications_after", stream, a, self.rng.choice((1, 5, 100)))
            await self.both("changes_after", stream, a, b, c, self.rng.choice((1, 5, 100)))

    async def look(self) -> None:
        await self.both("expired", list(self.streams.values()), self.now_ms + self.rng.choice((0, 2000)))
        await self.both("find_ids", [raw for _, raw in self.some()])
        await self.both("existing", self.some())
        await self.both("policies", ["t", "nobody"])
        if self.streams:
            stream = self.rng.choice(list(self.streams.values()))
            after = self.rng.randrange(20)
            ranges = [(stream, after, after + self.rng.randrange(30), by_rev) for by_rev in (False, True)]
            await self.both("ids_between", ranges, order=sorted)
            await self.both("save_last_seen", self.term(), [(stream, self.now_ms)])
            since_ms = self.rng.choice((None, self.now_ms, self.now_ms + 5))
            await self.both("set_invisible", self.term(), stream, since_ms)
            await self.both("last_seen", "t", ["ann", "bob", "nobody"])
            await self.both("client_secret", "nobody")

    async def targets(self) -> None:
        rng, key = self.rng, self.rng.choice(USERS)
        if rng.random() < 0.7:
            name = rng.choice(("phone", "pad"))
            token = f"token-{rng.randrange(3)}"
            target = PushTarget(name, "fcm", "token", token, "app", "production", self.now_ms)
            await self.both("put_target", self.term(), *key, target, "android", None, self.now_ms)
        else:
            await self.both("delete_target", self.term(), *key, "phone")
        await self.both("load_targets", USERS)
        for one in USERS:
            await self.both("stranger", one)

    async def log_out(self) -> None:
        if self.streams:
            key, stream = self.rng.choice(list(self.streams.items()))
            device, token = self.rng.choice(("phone", None)), self.rng.randbytes(2)
            await self.both("log_out", self.term(), stream, key, device, token, 4_000_000_000_000)
            await self.both("load_targets", USERS)
            await self.load()

    async def compare_outbox(self) -> None:
        """The outbox, row by row."""
        rows = await self.sql.fetch(
            "select id, state, attempts, reason, gate, coalesce(shown_on, '{}'), channel, chain,"
            " round(extract(epoch from due_at) * 1000)::bigint, digest, carrier, coalesce(merged, 1)"
            " from deliveries order by id"
        )
        model = sorted(self.db.deliveries.values(), key=lambda d: d.id)
        assert [tuple(r) for r in rows] == [
            (
                d.id,
                d.state,
                d.attempts,
                d.reason,
                d.gate,
                d.shown_on,
                d.channel,
                d.chain,
                d.due_ms,
                None if d.digest is None else uuid.UUID(bytes=d.digest),
                d.carrier,
                d.merged,
            )
            for d in model
        ]


def _reached_sorted(row: Claimed) -> Claimed:
    return dataclasses.replace(row, reached=sorted(row.reached))


def _tokens_sorted(records: list[UserRecord]) -> list[UserRecord]:
    return [dataclasses.replace(record, revoked=sorted(record.revoked)) for record in records]


@pytest.mark.parametrize("seed", range(1, 9))
async def test_the_model_answers_as_postgres_does(postgres_dsn: str, seed: int) -> None:
    """A hundred and fifty random calls: equal answers, equal refusals, and the same outbox at the end."""
    real = ShardStore(PostgresSettings(dsn=postgres_dsn), "shard-a", withdraw=False)
    db = await asyncpg.connect(postgres_dsn)
    await real.open()
    try:
        await db.execute(
            "insert into shards (shard, term, node, incarnation) values ('shard-a', 1, 'n', 'x')"
        )
        pair = Pair(real, random.Random(seed), db)
        for _ in range(150):
            await pair.step()
        await pair.compare_outbox()
        assert not pair.db.wrong
        assert len(pair.notes) > 20
    finally:
        await real.close()
        await db.close()
