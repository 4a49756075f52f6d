"""The subscriber's machine, driven by hand against a small model of a server."""

from __future__ import annotations

from typing import Any

import pytest
from client_kit import note
from hypothesis import given, settings
from hypothesis import strategies as st

from carillon_client.core.closing import Duty, duty_of_close, duty_of_status
from carillon_client.core.ledger import Entry, Ledger
from carillon_client.core.subscription import Item, Operation, Subscription, SubscriptionLimits
from carillon_client.errors import (
    OperationError,
    OperationTimeoutError,
    QueueFullError,
    SubscriptionRefusedError,
    TokenExpiredError,
)
from carillon_client.models import Change, Notification, Position, Presentation, Reset

LIMITS = SubscriptionLimits(ack_linger_s=0.0)


def welcome(seq: int = 0, rev: int = 0, recovered: bool | None = None, epoch: str = "e1") -> dict[str, Any]:
    return {
        "type": "WELCOME", "epoch": epoch, "lastSeq": seq, "rev": rev, "recovered": recovered, "heartbeatMs":
            25_000,
        "unreadCount": 0,
    }  # fmt: skip


def new(seq: int, epoch: str = "e1") -> dict[str, Any]:
    return {"type": "NEW_NOTIFICATION", "notification": note(seq, epoch)}


def machine(
    position: Position | None = None, limits: SubscriptionLimits = LIMITS, **more: Any
) -> Subscription:
    return Subscription(position, limits, lambda: 1.0, **more)


def opened(position: Position | None = None, **more: Any) -> Subscription:
    """A machine on a connection that was welcomed at 0."""
    self = machine(position, **more)
    self.connecting(0.0)
    self.opened(0.0)
    self.receive(welcome(recovered=None if position is None else True), 0.0)
    self.frames_to_send(0.0)
    return self


class Server:
    """Keeps a stream: a list of ("new", seq) and ("read", seq, rev) in the order of their revs."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.seq = 0

    def publish(self) -> None:
        self.seq += 1
        self.log.append(("new", self.seq))

    def change(self, seq: int) -> None:
        self.log.append(("read", seq))

    def frame(self, index: int) -> dict[str, Any]:
        kind, seq = self.log[index]
        if kind == "new":
            return new(seq)
        return {
            "type": "NOTIFICATIONS_READ",
            "notificationIds": [f"e1-{seq}"],
            "readAt": "x",
            "rev": index + 1,
        }

    def replay(self, query: dict[str, str]) -> list[dict[str, Any]]:
        """What a connection with this position is sent: notifications by seq, then changes by rev."""
        since, rev = int(query["lastSeq"]), int(query["lastRev"])
        notes = [self.frame(i) for i, (kind, seq) in enumerate(self.log) if kind == "new" and seq > since]
        return notes + [
            self.frame(i) for i, (kind, _) in enumerate(self.log) if kind == "read" and i + 1 > rev
        ]


ACTIONS = st.lists(
    st.one_of(
        st.just(("publish", 0)),
        st.tuples(st.just("change"), st.integers(0, 50)),
        st.tuples(st.just("process"), st.integers(1, 3)),
        st.tuples(st.just("skip"), st.integers(0, 5)),
        st.tuples(st.just("drop"), st.integers(0, 6)),
        st.tuples(st.just("restart"), st.integers(0, 6)),
        st.just(("again", 0)),
    ),
    max_size=60,
)


@given(ACTIONS)
@settings(max_examples=400, deadline=None)
def test_nothing_is_missed_and_nothing_comes_twice(actions: list[tuple[str, int]]) -> None:
    """Broken connections, cut replays, duplicates, and restarts from the stored position, in any order.

    One life of the machine hands out each notification once, in order of seq; over restarts every one is
        processed
    at least once; the position never passes what was not processed.
    """
    server = Server()
    subscription = machine()
    processed: set[int] = set()
    seen: list[int] = []
    waiting: list[Item] = []
    wire: list[dict[str, Any]] = []
    sent = 0  # entries of the log that this connection was given
    start = 0

    def connect() -> None:
        nonlocal sent
        query = subscription.connecting(0.0)
        subscription.opened(0.0)
        wire.clear()
        wire.append(welcome(server.seq, len(server.log)))
        if query:
            wire.append(welcome(server.seq, len(server.log), True))
            wire.extend(server.replay(query))
        sent = len(server.log)

    def receive(most: int | None = None) -> None:
        nonlocal sent
        while sent < len(server.log):
            wire.append(server.frame(sent))
            sent += 1
        while wire and (most is None or most > 0):
            subscription.receive(wire.pop(0), 0.0)
            most = None if most is None else most - 1
        for item in subscription.take_items():
            if isinstance(item.value, Notification):
                seen.append(item.value.seq)
            waiting.append(item)

    def process(item: Item) -> None:
        subscription.done(item, 0.0)
        if isinstance(item.value, Notification):
            processed.add(item.value.seq)

    def check() -> None:
        position = subscription.ledger.position
        if position is not None:
            assert set(range(start + 1, position.last_seq + 1)) <= processed

    connect()
    receive()
    for action, value in actions:
        if action == "publish":
            server.publish()
        elif action == "change" and server.seq:
            server.change(value % server.seq + 1)
        elif action == "process":
            receive()
            for _ in range(min(value, len(waiting))):
                process(waiting.pop(0))
        elif action == "skip" and waiting:  # out of order, as with manual acknowledgement
            process(waiting.pop(value % len(waiting)))
        elif action == "again" and server.seq:
            receive()
            wire.append(new(server.seq))
        elif action == "drop":
            receive(value)
            subscription.closed(None)
            connect()
        elif action == "restart":
            receive(value)
            if subscription.ledger.position is not None:
                assert len(seen) == len(set(seen))
                subscription = machine(Position.parse(str(subscription.ledger.position)))
                waiting, seen = [], []
                connect()
        check()
    receive()
    while waiting:
        process(waiting.pop(0))
    check()
    assert processed == set(range(1, server.seq + 1))
    assert seen == sorted(set(seen))
    position = subscription.ledger.position
    assert position is not None
    assert position.last_seq == server.seq
    assert len(subscription.ledger) == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=40))
def test_the_ledger_follows_the_front(steps: list[tuple[bool, int]]) -> None:
    """The position is the last seq before the first entry that is not done."""
    ledger = Ledger(Position(epoch="e", last_seq=0))
    entries: list[Entry] = []
    for add, value in steps:
        if add or not entries:
            entries.append(ledger.add(Entry(seq=len(entries) + 1)))
        else:
            ledger.done(entries[value % len(entries)])
        front = next((i for i, entry in enumerate(entries) if not entry.done), len(entries))
        assert ledger.position is not None
        assert ledger.position.last_seq == front
        assert len(ledger) == len(entries) - front


def test_the_position_stands_still_until_it_is_answered() -> None:
    """Frames before the answering WELCOME are handed out but move nothing; the replay then repeats them
    unseen."""
    self = machine(Position(epoch="e1", last_seq=5, last_rev=9))
    assert self.connecting(0.0) == {"epoch": "e1", "lastSeq": "5", "lastRev": "9"}
    self.receive(welcome(8, 12), 0.0)
    self.receive(new(8), 0.0)
    (item,) = self.take_items()
    self.done(item, 0.0)
    assert self.ledger.position == Position(epoch="e1", last_seq=5, last_rev=9)
    self.receive(welcome(8, 12, True), 0.0)
    for seq in (6, 7, 8):
        self.receive(new(seq), 0.0)
    items = self.take_items()
    assert [item.value.seq for item in items if isinstance(item.value, Notification)] == [6, 7]
    for item in items:
        self.done(item, 0.0)
    assert self.ledger.position == Position(epoch="e1", last_seq=8, last_rev=9)


def test_a_lost_history_is_told() -> None:
    """recovered: false gives a Reset and goes on from the server's position."""
    self = machine(Position(epoch="old", last_seq=5, last_rev=9))
    self.connecting(0.0)
    self.receive(welcome(2, 3), 0.0)
    self.receive(welcome(2, 3, False), 0.0)
    (item,) = self.take_items()
    assert isinstance(item.value, Reset)
    assert item.value.before == Position(epoch="old", last_seq=5, last_rev=9)
    assert self.ledger.position == Position(epoch="old", last_seq=5, last_rev=9)
    self.done(item, 0.0)
    assert self.ledger.position == Position(epoch="e1", last_seq=2, last_rev=3)


def test_a_position_without_rev_takes_the_servers() -> None:
    """Rule 2: without a lastRev of our own, that of the answering WELCOME is the new one."""
    self = machine(Position(epoch="e1", last_seq=5))
    assert "lastRev" not in self.connecting(0.0)
    self.receive(welcome(5, 12, True), 0.0)
    assert self.ledger.position == Position(epoch="e1", last_seq=5, last_rev=12)


@pytest.mark.parametrize("code", [4001, 4002, 4003, 4004, 4099])
def test_some_closes_stop(code: int) -> None:
    """40xx ends the subscription."""
    with pytest.raises(SubscriptionRefusedError) as told:
        opened().closed(code, "why")
    assert told.value.code == code


def test_expired_tokens() -> None:
    """4101: at once with a new token; a static token, or new ones that are expired too, end it."""
    with pytest.raises(TokenExpiredError):
        opened().closed(4101, can_renew=False)
    self = opened()
    assert self.closed(4101) == 0.0
    for _ in range(2):
        self.connecting(0.0)
        assert self.closed(4101) > 0
    with pytest.raises(TokenExpiredError):
        self.closed(4101)


@pytest.mark.parametrize(
    "code", [None, 1000, 1001, 1006, 1009, 1011, 4201, 4202, 4208, 4212, 4213, 4299, 4500]
)
def test_other_closes_reconnect_with_growing_pauses(code: int | None) -> None:
    """1 s doubling to 30 s, jittered; back to 1 s after a WELCOME."""
    self = machine()
    pauses = []
    for _ in range(8):
        self.connecting(0.0)
        pauses.append(self.closed(code))
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    self.connecting(0.0)
    self.receive(welcome(), 0.0)
    assert self.closed(code) == 1
    low = Subscription(None, LIMITS, lambda: 0.0)
    assert low.closed(code) == 0.5


def test_duties() -> None:
    """By range, and by HTTP status of a refused handshake."""
    assert duty_of_close(4101) is Duty.NEW_TOKEN
    assert [duty_of_status(s) for s in (403, 404, 429, 503)] == [Duty.STOP] * 2 + [Duty.RECONNECT] * 2


def test_silence_is_asked_about_and_then_fatal() -> None:
    """PING after the server's heart-beat of silence; no sign of life within the time-out: abandon."""
    self = opened()
    assert self.tick(24.9)
    assert self.frames_to_send(24.9) == []
    assert self.wake_at() == 25.0
    assert self.tick(25.0)
    assert self.frames_to_send(25.0) == [{"type": "PING"}]
    assert self.wake_at() == 35.0
    assert self.tick(34.9)
    assert not self.tick(35.0)
    self.receive({"type": "PONG"}, 34.95)
    assert self.tick(35.0)


def test_silence_while_not_reading_means_nothing() -> None:
    """A full queue stops reading; that is not the server's silence."""
    self = opened()
    assert self.tick(100.0, reading=False)
    assert self.tick(110.0)
    assert self.frames_to_send(110.0) == []


def test_no_welcome_is_fatal() -> None:
    """An open connection without WELCOME is abandoned after its time-out."""
    self = machine()
    self.connecting(0.0)
    self.opened(1.0)
    assert self.wake_at() == 16.0
    assert self.tick(15.9)
    assert not self.tick(16.0)


def test_acknowledgements_travel_together() -> None:
    """What is processed within the linger time is one ACK; more than 1,000 ids are several."""
    self = opened(limits=SubscriptionLimits(ack_linger_s=0.5, remembered_ids=5000))
    for seq in range(1, 1502):
        self.receive(new(seq), 0.0)
    for item in self.take_items():
        self.done(item, 1.0)
    assert self.frames_to_send(1.4) == []
    assert self.wake_at() == 1.5
    acks = self.frames_to_send(1.5)
    assert [len(frame["notificationIds"]) for frame in acks] == [1000, 501]
    assert self.frames_to_send(9.0) == []


def test_acknowledgements_outlive_connections() -> None:
    """What was processed while away is acknowledged on the next connection; a duplicate is acknowledged
    again."""
    self = opened()
    self.receive(new(1), 0.0)
    (item,) = self.take_items()
    self.closed(None)
    self.done(item, 0.0)
    assert self.frames_to_send(0.0) == []
    self.connecting(1.0)
    self.receive(welcome(1, 1), 1.0)
    self.receive(welcome(1, 1, True), 1.0)
    assert {"type": "ACK", "notificationIds": ["e1-1"], "rev": 1} in self.frames_to_send(1.0)
    self.receive(new(1), 1.0)
    assert self.take_items() == []
    assert self.frames_to_send(1.0) == [{"type": "ACK", "notificationIds": ["e1-1"], "rev": 1}]


def test_acknowledgements_that_may_be_lost_are_repeated() -> None:
    """What was told shortly before the connection's last sign, or after it, once more on the next; what was
    told long before that is surely there."""
    self = opened(limits=SubscriptionLimits(ack_linger_s=0.0, ack_repeat_s=5.0))
    for seq, at in ((1, 0.0), (2, 6.0), (3, 10.0)):
        self.receive(new(seq), at)
        (item,) = self.take_items()
        self.done(item, at)
        told = [{"type": "ACK", "notificationIds": [f"e1-{seq}"], "rev": seq}]
        assert self.frames_to_send(at)[-1:] == told
    self.closed(None)
    for again in ([{"type": "ACK", "notificationIds": ["e1-2", "e1-3"], "rev": 3}], []):
        self.connecting(20.0)
        self.receive(welcome(3, 3), 20.0)
        self.receive(welcome(3, 3, True), 20.0)
        assert [frame for frame in self.frames_to_send(20.0) if frame["type"] == "ACK"] == again
        self.receive({"type": "PONG"}, 30.0)  # a sign, long after the acknowledgements
        self.closed(None)


def test_on_receipt() -> None:
    """ack_on_receipt acknowledges what nobody has processed; the position waits nevertheless."""
    self = opened(ack_on_receipt=True)
    self.receive(new(1), 0.0)
    assert self.frames_to_send(0.0) == [{"type": "ACK", "notificationIds": ["e1-1"], "rev": 1}]
    assert self.ledger.position == Position(epoch="e1", last_seq=0, last_rev=0)


def test_operations_end_with_their_answer() -> None:
    """OK and ERROR find their frame by id; no answer in time is an error; the bound refuses."""
    self = opened(limits=SubscriptionLimits(operation_timeout_s=10.0, max_operations=3))
    ok, bad, late = (self.operate({"type": "MARK_READ", "notificationIds": [x]}, 0.0) for x in "abc")
    with pytest.raises(QueueFullError):
        self.operate({"type": "PING"}, 0.0)
    assert [frame["id"] for frame in self.frames_to_send(0.0)] == [1, 2, 3]
    self.receive({"type": "OK", "id": 1}, 1.0)
    self.receive({"type": "ERROR", "id": 2, "code": "invalid", "message": "m", "temporary": False}, 1.0)
    self.receive({"type": "OK", "id": 77}, 1.0)
    assert ok.outcome is True
    assert isinstance(bad.outcome, OperationError)
    assert bad.outcome.code == "invalid"
    self.tick(10.0)
    assert isinstance(late.outcome, OperationTimeoutError)


def test_operations_are_repeated_on_the_next_connection() -> None:
    """Without an answer they are sent again; those of the connection itself fail and are said anew."""
    self = opened()
    ends: list[str] = []

    def operation(frame: dict[str, Any], **more: Any) -> Operation:
        made = self.operate(frame, 0.0, **more)
        made.on_end = lambda: ends.append(frame["type"])
        return made

    read = operation({"type": "MARK_READ", "notificationIds": ["a"]})
    visibility = {"type": "VISIBILITY", "state": "hidden"}
    self.set_visibility(visibility)
    self.watch("presence", {"type": "WATCH_PRESENCE", "userIds": ["b"]})
    operation(visibility, repeat=False)
    self.frames_to_send(0.0)
    self.closed(None)
    assert ends == ["VISIBILITY"]
    self.connecting(0.0)
    self.receive(welcome(), 0.0)
    kinds = [frame["type"] for frame in self.frames_to_send(0.0)]
    assert kinds == ["PING", "VISIBILITY", "WATCH_PRESENCE", "MARK_READ"]
    self.receive({"type": "OK", "id": read.frame["id"]}, 0.0)
    assert read.outcome is True
    self.watch("presence", None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = [
    "type",
    "id",
    "notification",
    "notificationIds",
    "notificationId",
    "rev",
    "epoch",
    "lastSeq",
    "recovered",
    "seq",
]
TYPES = [
    "WELCOME",
    "NEW_NOTIFICATION",
    "NOTIFICATIONS_READ",
    "NOTIFICATION_UPDATED",
    "OK",
    "ERROR",
    "PRESENCE",
    "LATER",
]


@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6), st.sampled_from(TYPES) | JSON)
@settings(max_examples=400)
def test_no_frame_ends_the_stream(frame: dict[str, Any], kind: Any) -> None:
    """Whatever a server sends, the machine goes on and takes the next good notification."""
    self = opened()
    self.receive({**frame, "type": kind}, 0.0)
    self.receive(kind, 0.0)
    self.receive(new(2**40), 0.0)
    items = self.take_items()
    assert any(isinstance(item.value, Notification) and item.value.seq == 2**40 for item in items)
    for item in items:
        self.done(item, 0.0)
    self.frames_to_send(0.0)
    self.tick(1.0)


@pytest.mark.parametrize("on_receipt", [False, True])
def test_an_update_is_acknowledged_by_its_id(on_receipt: bool) -> None:
    """What was merged or edited is shown anew: its push is not needed once the application has it."""
    self = opened(ack_on_receipt=on_receipt)
    self.receive({"type": "NOTIFICATION_UPDATED", "notification": note(3)}, 0.0)
    self.receive({"type": "NOTIFICATION_ARCHIVED", "notificationId": "a", "rev": 1}, 0.0)
    if not on_receipt:
        assert self.frames_to_send(0.0, flush=True) == []
        for item in self.take_items():
            self.done(item, 0.0)
    assert self.frames_to_send(0.0, flush=True) == [{"type": "ACK", "notificationIds": ["e1-3"], "rev": 3}]


def test_what_was_processed_before_an_update_does_not_acknowledge_it() -> None:
    """The update is in the queue: its push is wanted until it is processed, those of others are not."""
    self = opened()
    self.receive({"type": "NEW_NOTIFICATION", "notification": note(1)}, 0.0)
    self.receive({"type": "NEW_NOTIFICATION", "notification": note(2)}, 0.0)
    self.receive({"type": "NOTIFICATION_UPDATED", "notification": note(1) | {"rev": 3}}, 0.0)
    one, two, update = self.take_items()
    self.done(one, 0.0)
    self.done(two, 0.0)
    assert self.frames_to_send(0.0, flush=True) == [
        {"type": "ACK", "notificationIds": ["e1-2"], "rev": 3},
        {"type": "ACK", "notificationId": "e1-1", "rev": 1},
    ]
    self.done(update, 0.0)
    assert self.frames_to_send(0.0, flush=True) == [{"type": "ACK", "notificationIds": ["e1-1"], "rev": 3}]


def test_changes_are_handed_out_with_their_ids() -> None:
    """One id, many ids, or none; an update brings the notification."""
    self = opened()
    self.receive({"type": "NOTIFICATION_ARCHIVED", "notificationId": "a", "rev": 1}, 0.0)
    self.receive({"type": "NOTIFICATIONS_READ", "notificationIds": ["a", "b"], "readAt": "x", "rev": 2}, 0.0)
    self.receive({"type": "ALL_NOTIFICATIONS_READ", "upToSeq": 5, "readAt": "x", "rev": 3}, 0.0)
    self.receive({"type": "NOTIFICATION_UPDATED", "notification": note(3)}, 0.0)
    changes = [item.value for item in self.take_items()]
    assert [(c.notification_ids, c.rev) for c in changes if isinstance(c, Change)] == [
        (("a",), 1), (("a", "b"), 2), ((), 3), (("e1-3",), None),
    ]  # fmt: skip
    assert isinstance(changes[3], Change)
    assert changes[3].notification is not None
    assert changes[3].notification.raw["addedLater"] == 1


def test_presentation_is_that_of_the_present_connection() -> None:
    """Told behind the first WELCOME and at each change; a connection without a word of it is as ever."""
    self = opened(Position("e1", 0, 0))
    self.receive({"type": "PRESENTATION", "sound": "bell", "vibration": False, "durationMs": 5000}, 0.0)
    assert self.presentation == Presentation(sound="bell", vibration=False, duration_ms=5000)
    self.receive(welcome(recovered=True), 0.0)  # the answer to a position
    assert self.presentation.sound == "bell"
    self.receive({"type": "PRESENTATION", "sound": False, "vibration": "?"}, 0.0)
    assert self.presentation.sound == "bell", "a malformed one is passed over"
    assert self.take_items() == []
    self.closed(1006)
    self.connecting(0.0)
    assert self.presentation.sound == "bell", "until the next connection is there"
    self.receive(welcome(), 0.0)
    assert self.presentation == Presentation()
