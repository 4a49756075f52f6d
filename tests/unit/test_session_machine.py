"""A session among faults: whatever happens in whatever order, no client misses anything (T2)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from carillon.attention import ACKNOWLEDGED, ALWAYS, AWAY, HELD, SEEN, Attention, at_due, on_signal
from carillon.effects import Acknowledged, AcknowledgedRange
from carillon.session import (
    Attachment,
    Close,
    Effect,
    LoadChanges,
    LoadNotifications,
    Phase,
    PresenceChanged,
    PushSignal,
    Send,
    Session,
    SessionLimits,
    Wake,
)
from tests.unit.session_model import NOW_MS, Changed, Client, New, Store, Wire, id_of

OPS = ("read", "seen", "click", "dismiss", "archive", "retract", "edit", "read_all")
pick = st.integers(0, 1000)
rarely = st.sampled_from((False, False, False, True))
"""Whether a fault happens that undoes much: else few sessions would ever come to rest."""


class Load:
    """A query on its way: read at some moment, answered at a later one."""

    def __init__(self, request: LoadNotifications | LoadChanges) -> None:
        self.request = request
        self.rows: Any = None
        self.read = False


class Row:
    """A push in the outbox, as Postgres has it."""

    def __init__(self, seq: int, gate: str | None, now: float, due: float, hold_until: float) -> None:
        self.seq = seq
        self.gate = gate
        self.state = "planned"
        self.due = due
        self.hold_until = hold_until
        self.bound = now + max(WINDOW, DELAY, HOLD)
        self.acknowledged = False
        self.remembered = True  # the session that heard of it still lives
        self.why = ""

    def follow(self, signal: str, now: float) -> None:
        """What `delivery_signal` does."""
        if signal in ACKNOWLEDGED:
            self.acknowledged = True
        done = on_signal(signal, self.state, self.gate, self.hold_until > now)
        if done == "cancel":
            self.state, self.why = "cancelled", signal
        elif done == "hold":
            self.gate, self.due = HELD, self.hold_until
        elif done == "due":
            self.gate, self.due = ALWAYS, now


WINDOW, DELAY, HOLD = 5.0, 30.0, 60.0


class SessionMachine(RuleBasedStateMachine):
    """Sessions of one user over shard restarts, with several devices, slow links and a slow store."""

    @initialize(
        window=st.sampled_from((0, 2, 5)),
        page=st.sampled_from((1, 2, 3)),
        connections=st.sampled_from((2, 20)),
        earlier=st.integers(0, 6),
        live=st.integers(0, 2),
    )
    def start(self, window: int, page: int, connections: int, earlier: int, live: int) -> None:
        self.limits = SessionLimits(recent_window=window, replay_page=page, max_connections=connections)
        self.store = Store()
        for _ in range(earlier):
            self.store.append()
        self.now = 1000.0
        self.session = Session("u", self.store.head(), self.limits)
        self.status = "offline"
        self.untold: list[New | Changed] = []
        self.loads: list[Load] = []
        self.wires: list[Wire] = []
        self.clients: list[Client] = []
        self.numbers = 0
        self.by_attachment: dict[Attachment, Wire] = {}
        self.pushes: dict[bytes, Row] = {}
        self.told: dict[int, tuple[str, str | None]] = {}  # what each wire's gateway remembers of VISIBILITY
        for number in range(live):
            self.connect(0, "fresh")
            self.all_arrives(number)

    # -- the shell ------------------------------------------------------------------------------------

    def run(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                assert effect.to
                for attachment in effect.to:
                    wire = self.by_attachment.get(attachment)
                    assert wire is not None, "a frame to a detached attachment"
                    if effect.replay or effect.epoch:
                        wire.live_at = None  # it catches up: notifications first, then changes
                    if effect.epoch:
                        self.welcomed(effect)
                    if not wire.welcomed and not wire.in_flight:
                        assert b'"type":"WELCOME"' in effect.frame, "the first frame is WELCOME"
                    wire.in_flight.append(effect)
            elif isinstance(effect, Close):
                wire = self.by_attachment.pop(effect.to)
                wire.attachment = None
                # What was written before the close arrives before it.
                while wire.in_flight:
                    wire.gateway_takes()
                while wire.written:
                    wire.client_takes()
                self.wires.remove(wire)
            elif isinstance(effect, LoadNotifications | LoadChanges):
                self.loads.append(Load(effect))
            elif isinstance(effect, PresenceChanged):
                assert effect.status != self.status, "told only when it changes"
                self.status = effect.status
            elif isinstance(effect, PushSignal | Acknowledged):
                assert effect.ids
                if isinstance(effect, PushSignal) and effect.signal == AWAY:
                    assert not self.session.at_hand()
                for raw in effect.ids:
                    if raw in self.pushes:
                        self.pushes[raw].follow(effect.signal, self.now)
            elif isinstance(effect, AcknowledgedRange):
                assert effect.after_seq < effect.upto_seq
                for row in self.pushes.values():
                    if effect.after_seq < row.seq <= effect.upto_seq:
                        row.follow(effect.signal, self.now)
            else:
                assert isinstance(effect, Wake)
                assert self.session.next_deadline() is not None

    def welcomed(self, send: Send) -> None:
        """A WELCOME's count is true for the rev beside it, whatever has happened since."""
        told = json.loads(send.frame)
        assert told["unreadCount"] == self.store.badge_at[told["rev"]], "the count is of another rev"

    def attach(self, wire: Wire, position: tuple[str, int, int | None] | None, **more: Any) -> None:
        self.numbers += 1
        # The shell learns the attachment with the effects, as actors/shard_sessions.py does.
        attachment, effects = self.session.attach(
            "peer", self.numbers, f"d{wire.number}", f"s{wire.number}", self.now, NOW_MS,
            position=position, **more,
        )  # fmt: skip
        wire.attachment = attachment
        self.by_attachment[attachment] = wire
        self.run(effects)

    def reattach(self, wire: Wire) -> None:
        """What actors/gateway_owners.py does when the owner was lost."""
        if wire.welcomed:
            assert wire.epoch is not None
            self.attach(
                wire,
                (wire.epoch, wire.seq, wire.rev),
                reattach=True,
                ready=wire.ready and wire.resume is None,
                attention=self.told.get(wire.number, (None, None))[0],
                viewing=self.told.get(wire.number, (None, None))[1],
                began_seq=wire.began_seq,
                acked_seq=wire.acked_seq,
            )
            if wire.resume is not None and wire.attachment is not None:
                self.run(self.session.resume(wire.attachment, *wire.resume, self.now, NOW_MS))
        else:
            self.attach(wire, wire.url)

    def lose_attachment(self, wire: Wire) -> None:
        attachment, wire.attachment = wire.attachment, None
        wire.in_flight.clear()
        wire.drain_due = False
        if attachment is not None:
            self.by_attachment.pop(attachment, None)
            self.run(self.session.detach(attachment, False, self.now, NOW_MS))

    def plan_push(self, commit: New) -> None:
        """The push of a committed notification, by the attention of that moment (carillon/plan.py)."""
        if not self.session.live:
            return
        attention = self.session.attention(NOW_MS, round(WINDOW * 1000))
        assert attention is not Attention.OFFLINE
        away = attention in (Attention.HIDDEN, Attention.IDLE)
        gate, wait = (SEEN, DELAY) if away else (None, WINDOW)
        self.pushes[commit.id] = Row(commit.seq, gate, self.now, self.now + wait, self.now + HOLD)
        due_ms, hold_ms = NOW_MS + round(wait * 1000), NOW_MS + round(HOLD * 1000)
        self.run(self.session.push_planned(commit.id, commit.seq, gate, due_ms, hold_ms, self.now, NOW_MS))

    def dealt_with(self, told: bool = True) -> None:
        """The change's own statement cancels what waits."""
        for note in self.store.rows:
            row = self.pushes.get(note.id)
            seen = note.seen_ms or note.read_ms or note.dismissed_ms or note.archived_ms or note.retracted_ms
            if row is not None and seen and row.state == "planned":
                row.state, row.why = "cancelled", "seen"
            if row is not None and seen and told:
                self.session.dealt_with([note.id])

    def tell(self) -> None:
        commit = self.untold.pop(0)
        if isinstance(commit, Changed):
            self.dealt_with()
            self.run(
                self.session.state_changed(commit.rev, commit.unread, commit.frames, update=commit.update)
            )
            return
        try:
            if commit.expired:
                effects = self.session.pass_over(commit.seq, commit.rev, commit.unread)
            else:
                effects = self.session.deliver(
                    commit.id, commit.seq, commit.rev, commit.unread, commit.content
                )
        except ValueError:
            head = self.store.head()._replace(seq=commit.seq, rev=commit.rev, unread=commit.unread)
            effects = self.session.heal(head)
        self.run(effects)
        if not commit.expired:
            self.plan_push(commit)

    # -- what happens to the stream -------------------------------------------------------------------

    @rule(tell=st.booleans(), expired=rarely)
    def publish(self, tell: bool, expired: bool) -> None:
        self.untold.append(self.store.append(expired))
        while tell and self.untold:
            self.tell()

    @rule(op=st.sampled_from(OPS), which=st.lists(pick, min_size=1, max_size=4), tell=st.booleans())
    def change(self, op: str, which: list[int], tell: bool) -> None:
        if not self.store.seq:
            return
        seqs = [n % self.store.seq + 1 for n in which]
        commit = self.store.change(op, seqs, upto=seqs[0])
        if commit is not None:
            self.dealt_with(told=False)
            self.untold.append(commit)
        while tell and self.untold:
            self.tell()

    @rule(happens=rarely, op=st.sampled_from(("new", *OPS)), which=pick)
    def another_writer(self, happens: bool, op: str, which: int) -> None:
        """A commit that nobody tells this session of."""
        if not happens:
            return
        if op == "new":
            self.store.append()
        elif self.store.seq:
            seq = which % self.store.seq + 1
            self.store.change(op, [seq], upto=seq)
            self.dealt_with(told=False)

    @precondition(lambda self: self.untold)
    @rule()
    def tell_next(self) -> None:
        self.tell()

    # -- connections ----------------------------------------------------------------------------------

    @rule(which=pick, how=st.sampled_from(("fresh", "url", "url without rev", "known")))
    def connect(self, which: int, how: str) -> None:
        idle = [c for c in self.clients if all(w.client is not c for w in self.wires)]
        if how != "fresh" and idle and idle[which % len(idle)].epoch is not None:
            client = idle[which % len(idle)]
        elif len(self.clients) < 4:
            client, how = Client(self.store), "fresh"
            self.clients.append(client)
        else:
            return
        wire = Wire(self.numbers, client)
        self.wires.append(wire)
        position = client.position("without" not in how) if how.startswith("url") else None
        client.connected(with_position=how != "fresh")
        wire.url = position
        self.attach(wire, position)
        if how == "fresh":
            assert client.welcomes == []

    def attached(self) -> list[Wire]:
        return [w for w in self.wires if w.attachment is not None]

    @precondition(lambda self: self.attached())
    @rule(which=pick, without_rev=rarely)
    def first_frame(self, which: int, without_rev: bool) -> None:
        """The first client frame: RESUME by a client that has a position, else another."""
        wires = [w for w in self.attached() if w.welcomed and w.resume is None]
        if not wires:
            return
        self.first(wires[which % len(wires)], not without_rev)

    def first(self, wire: Wire, with_rev: bool) -> None:
        assert wire.attachment is not None
        while wire.written and not wire.client.welcomes:
            wire.client_takes()
        if wire.client.asked:
            wire.resume = wire.client.position(with_rev)
            wire.ready = True
            self.run(self.session.resume(wire.attachment, *wire.resume, self.now, NOW_MS))
        else:
            wire.ready = True
            self.run(self.session.ready(wire.attachment))

    @precondition(lambda self: self.wires)
    @rule(happens=rarely, which=pick, clean=st.booleans(), frames=st.integers(0, 9))
    def socket_lost(self, happens: bool, which: int, clean: bool, frames: int) -> None:
        """The client got some of what was written to it."""
        if not happens:
            return
        wire = self.wires.pop(which % len(self.wires))
        for _ in range(min(frames, len(wire.written))):
            wire.client_takes()
        attachment, wire.attachment = wire.attachment, None
        if attachment is not None:
            del self.by_attachment[attachment]
            self.run(self.session.detach(attachment, clean, self.now, NOW_MS))
            assert self.session.detach(attachment, clean, self.now, NOW_MS) == []

    @precondition(lambda self: self.attached())
    @rule(happens=rarely, which=pick)
    def link_lost(self, happens: bool, which: int) -> None:
        """What was on its way to the gateway is gone; it attaches again where it is."""
        if not happens:
            return
        wires = self.attached()
        wire = wires[which % len(wires)]
        self.lose_attachment(wire)
        self.reattach(wire)

    @rule(happens=rarely)
    def shard_restarts(self, happens: bool) -> None:
        """A new session from the store, every socket attached again."""
        if not happens:
            return
        self.by_attachment.clear()
        self.loads.clear()
        self.untold.clear()
        self.session = Session("u", self.store.head(), self.limits)
        self.status = "offline"
        for row in self.pushes.values():
            row.remembered = False
        for wire in list(self.wires):
            wire.attachment = None
            wire.in_flight.clear()
            wire.drain_due = False
        for wire in list(self.wires):
            self.reattach(wire)

    # -- wires and the store --------------------------------------------------------------------------

    @precondition(lambda self: self.attached())
    @rule(which=pick, frames=st.integers(1, 5))
    def gateway_writes(self, which: int, frames: int) -> None:
        wires = self.attached()
        wire = wires[which % len(wires)]
        for _ in range(min(frames, len(wire.in_flight))):
            wire.gateway_takes()

    @precondition(lambda self: self.wires)
    @rule(which=pick, frames=st.integers(1, 5))
    def client_reads(self, which: int, frames: int) -> None:
        wire = self.wires[which % len(self.wires)]
        for _ in range(min(frames, len(wire.written))):
            wire.client_takes()

    @precondition(lambda self: self.wires)
    @rule(which=pick)
    def all_arrives(self, which: int) -> None:
        """A fast link and a client that asks for what it missed: it catches up as the store answers."""
        wire = self.wires[which % len(self.wires)]
        while wire.in_flight:
            wire.gateway_takes()
        while wire.written:
            wire.client_takes()
        if wire.welcomed and wire.attachment is not None and wire.resume is None and not wire.ready:
            self.first(wire, True)

    @precondition(lambda self: self.attached())
    @rule(which=pick, spurious=rarely)
    def drained(self, which: int, spurious: bool) -> None:
        wires = [w for w in self.attached() if w.drain_due or spurious]
        if wires:
            wire = wires[which % len(wires)]
            wire.drain_due = False
            assert wire.attachment is not None
            self.run(self.session.drained(wire.attachment))

    @precondition(lambda self: self.loads)
    @rule(which=pick)
    def store_reads(self, which: int) -> None:
        load = self.loads[which % len(self.loads)]
        if not load.read:
            load.rows, load.read = self.store.answer(load.request), True

    @rule(which=pick, loaded=st.booleans())
    def archive(self, which: int, loaded: bool) -> None:
        """An old row that the user has dealt with leaves the store; sessions may know of it only later."""
        if self.store.seq and self.store.prune(which % self.store.seq + 1) and loaded:
            self.store.known_pruned = self.store.pruned_to()

    @precondition(lambda self: self.loads)
    @rule(which=pick)
    def store_answers(self, which: int) -> None:
        load = self.loads.pop(which % len(self.loads))
        rows = load.rows if load.read else self.store.answer(load.request)
        request = load.request
        if isinstance(request, LoadNotifications):
            effects = self.session.notifications_loaded(request.to, rows, request, NOW_MS)
        else:
            effects = self.session.changes_loaded(request.to, rows, request, NOW_MS)
        self.run(effects)

    # -- clients and time -----------------------------------------------------------------------------

    @precondition(lambda self: self.attached())
    @rule(which=pick, ahead=st.integers(-2, 2), single=st.booleans())
    def acknowledge(self, which: int, ahead: int, single: bool) -> None:
        wires = self.attached()
        wire = wires[which % len(wires)]
        attachment = wire.attachment
        assert attachment is not None
        seq = wire.seq + ahead
        before = wire.acked_seq
        if not single:
            wire.acked_seq = max(wire.acked_seq, min(seq, wire.seq))
        effects = self.session.acknowledge(
            attachment, None if single else seq, [id_of(1)] if single else [], self.now, NOW_MS
        )
        self.run(effects)
        for effect in effects:
            if isinstance(effect, Acknowledged) and not single:
                seqs = [int.from_bytes(raw, "big") for raw in effect.ids]
                assert all(s <= min(seq, attachment.cursor_seq) for s in seqs), "only what it was sent"
        if wire.welcomed and not single and attachment.cursor_seq >= wire.acked_seq:
            for raw, row in self.pushes.items():
                if before < row.seq <= wire.acked_seq and row.why != "seen":
                    assert row.acknowledged, f"{raw!r} was acknowledged and its push did not hear of it"

    @precondition(lambda self: self.attached())
    @rule(which=pick, state=st.sampled_from(("focused", "visible", "idle", "hidden")))
    def visibility(self, which: int, state: str) -> None:
        wires = self.attached()
        wire = wires[which % len(wires)]
        assert wire.attachment is not None
        self.told[wire.number] = (state, None)
        self.run(self.session.visibility(wire.attachment, state, None, self.now, NOW_MS))
        if not self.session.at_hand():
            stuck = [
                r for r in self.pushes.values() if r.gate == HELD and r.state == "planned" and r.remembered
            ]
            assert not stuck, "nothing is held for a user who looks away"

    @rule(seconds=st.sampled_from((0.0, 0.6, 6.0, 31.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.run(self.session.tick(self.now, NOW_MS))
        for row in self.pushes.values():  # the sweep, behind the session
            if row.state == "planned" and row.due <= self.now:
                verdict = at_due(
                    row.gate, active=self.session.at_hand(), acknowledged=row.acknowledged, holdable=False
                )
                row.state = "cancelled" if verdict == "drop" else "sent"
                row.why = "active"
        deadline = self.session.next_deadline()
        assert deadline is None or deadline > self.now
        if not self.session.attachments and self.now >= self.session.grace_deadline:
            assert self.session.ended(self.now)
            assert self.session.status() == "offline"

    # -- what always holds ----------------------------------------------------------------------------

    @invariant()
    def presence_is_what_the_connections_say(self) -> None:
        if not hasattr(self, "session"):
            return
        assert self.session.status() == self.status
        attachments = [w.attachment for w in self.wires if w.attachment is not None]
        assert set(attachments) == set(self.session.attachments)
        assert self.session.live == bool(attachments)
        if attachments:
            seen = any(a.attention in ("focused", "visible") for a in attachments)
            assert self.status == ("active" if seen else "idle")

    @invariant()
    def badges_are_right(self) -> None:
        """Whoever is live and has taken everything shows what the store has; so it stays, frame by frame."""
        if not hasattr(self, "session"):
            return
        if (self.session.seq, self.session.rev) != (self.store.seq, self.store.rev):
            return  # a commit is still to be told
        for wire in self.attached():
            assert wire.attachment is not None
            at_rest = wire.attachment.phase is Phase.LIVE and not wire.in_flight and not wire.written
            if at_rest and wire.welcomed and not wire.client.asked:
                assert wire.client.badge == self.store.badge
                wire.client.check()
                wire.live_at = self.store.rev

    @invariant()
    def suppression_is_bounded(self) -> None:
        """A push that waits has its time, and only an active user's or a silent device's are dropped."""
        if not hasattr(self, "session"):
            return
        for row in self.pushes.values():
            if row.state == "planned":
                assert row.due <= row.bound
                if row.gate == HELD and row.remembered and not self.session.at_hand():
                    assert self.session._away_deadline, "nobody would notice"
            if row.state == "cancelled":
                assert row.why == "seen" or row.acknowledged

    @invariant()
    def memory_is_bounded(self) -> None:
        if hasattr(self, "session"):
            assert len(self.session.recent) <= self.limits.recent_window
            assert len(self.session.attachments) <= self.limits.max_connections
            loading = [load.request.to for load in self.loads if load.request.to in self.by_attachment]
            assert len(loading) == len(set(loading)), "one query of an attachment at a time"

    def teardown(self) -> None:
        """Let everything arrive: then every client shows what the store holds."""
        if not hasattr(self, "session"):
            return
        while self.untold:
            self.tell()
        self.untold.append(self.store.append())  # a gap is noticed at the next commit
        self.tell()
        for wire in self.attached():
            if wire.attachment is not None and wire.welcomed and not wire.client.asked:
                self.run(self.session.ready(wire.attachment))
        self.settle()
        self.time_passes(1.0)
        self.settle()
        for wire in self.wires:
            assert wire.attachment is not None
            assert wire.attachment.phase.name == "LIVE"
            assert wire.client.shown_seq == self.store.seq
            wire.client.check()

    def settle(self) -> None:
        """Let the store answer, gateways write, clients read, until nothing moves."""
        for _ in range(10_000):
            if self.loads:
                self.store_answers(0)
                continue
            moved = False
            for wire in list(self.wires):
                while wire.in_flight:
                    wire.gateway_takes()
                    moved = True
                while wire.written:
                    wire.client_takes()
                    moved = True
                if wire.drain_due and wire.attachment is not None:
                    wire.drain_due = False
                    self.run(self.session.drained(wire.attachment))
                    moved = True
                elif wire.attachment is not None and wire.client.asked and not (wire.url or wire.resume):
                    wire.resume = wire.client.position()
                    self.run(self.session.resume(wire.attachment, *wire.resume, self.now, NOW_MS))
                    moved = True
            if not moved and not self.loads:
                break
        else:
            raise AssertionError("the session never comes to rest")


# A failure is shrunk for up to five minutes before it is shown.
TestSession = pytest.mark.timeout(1800)(SessionMachine.TestCase)
# The same examples in each run; derandomize=False looks at others.
TestSession.settings = settings(max_examples=500, stateful_step_count=60, deadline=None, derandomize=True)
