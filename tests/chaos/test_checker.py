"""The checker can fail: for every rule a history that keeps the promises, and one change that breaks one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.chaos.checker import judge, violations
from tests.chaos.history import Record

ID = {
    number: f"0190-{number}"
    for number in range(1, 10)
}  # fmt: skip


def history() -> list[Record]:
    """A run in which everything is as promised.

    ann has a device that resumes once and a phone; ben is deaf: his device never acknowledges; cal has a
    phone alone.
    """
    records: list[Record] = [
        {
            "op": "run", "t": 0.0, "seed": 1, "wall0": 0.0, "bounds": {"push_s": 10.0, "presence_s": 5.0},
            "targets": {
                "ann": [["fcm", "ta", "ann-phone"]], "ben": [["fcm", "tb", "ben-phone"]],
                "cal": [["fcm", "tc", "cal-phone"]],
            },
        },
        dial(1, "ann", None, 1.0), welcome(1, None, 0, 1.1),
        publish("a1|ann", "ann", ID[1], 1, 2.0), receive(1, ID[1], 1, 2.1),
        {"op": "ack", "t": 2.2, "conn": 1, "ids": [ID[1]]},
        {"op": "fault", "t": 3.0, "number": 1, "name": "kill-gateway", "detail": ""},
        {"op": "closed", "t": 3.1, "conn": 1, "code": 1006, "by": "lost"},
        publish("a2|ann", "ann", ID[2], 2, 3.2),
        {"op": "healed", "t": 3.3, "number": 1, "name": "kill-gateway"},
        dial(2, "ann", ["e", 1, 1], 3.5), welcome(2, True, 2, 3.6), receive(2, ID[2], 2, 3.7),
        {"op": "ack", "t": 3.8, "conn": 2, "seq": 2},
        {"op": "recovered", "t": 4.0, "number": 1, "name": "kill-gateway", "flowing": 4.0},
        publish("a3|ann", "ann", ID[3], 3, 5.0), receive(2, ID[3], 3, 5.1),
        {"op": "ack", "t": 5.2, "conn": 2, "seq": 3},
        publish("a3|ann", "ann", ID[3], 3, 5.5, attempt=2),
        {"op": "conflict", "start": 5.6, "end": 5.7, "key": "k", "outcome": "refused"},
        {"op": "read", "start": 6.0, "end": 6.1, "user": "ann", "ids": [ID[1]], "via": "http", "ok": True},
        {"op": "state", "t": 6.1, "conn": 2, "kind": "NOTIFICATIONS_READ", "ids": [ID[1]], "upto": 0,
         "rev": 4},
        dial(3, "ben", None, 7.0), welcome(3, None, 0, 7.1),
        publish("b1|ben", "ben", ID[4], 1, 8.0), receive(3, ID[4], 1, 8.1), push("tb", ID[4], 13.0),
        publish("c1|cal", "cal", ID[5], 1, 9.0), push("tc", ID[5], 9.2),
        {"op": "presence", "start": 20.0, "end": 20.1, "final": True,
         "statuses": {"ann": "active", "ben": "idle", "cal": "offline"}},
        {"op": "feed", "start": 21.0, "end": 21.1, "user": "ann", "whole": True, "final": True,
         "items": [[ID[3], 3], [ID[2], 2], [ID[1], 1]]},
        {"op": "device", "t": 22.0, "device": "ann-d", "user": "ann", "connected": True, "stopped": None},
        {"op": "device", "t": 22.0, "device": "ben-d", "user": "ben", "connected": True, "stopped": None},
        stream("ann", 3, 4, 2), stream("ben", 1, 1, 1), stream("cal", 1, 1, 1),
        row("a1|ann", "ann", ID[1], 1, 2.0, read=True), row("a2|ann", "ann", ID[2], 2, 3.2),
        row("a3|ann", "ann", ID[3], 3, 5.0), row("b1|ben", "ben", ID[4], 1, 8.0),
        row("c1|cal", "cal", ID[5], 1, 9.0),
        delivery(1, ID[1], "cancelled", 0, "acknowledged"),
        delivery(2, ID[2], "cancelled", 0, "acknowledged"),
        delivery(3, ID[3], "cancelled", 0, "acknowledged"), delivery(4, ID[4], "sent", 1),
        delivery(5, ID[5], "sent", 1), attempt(4, 1, "ben-phone", "sent"), attempt(5, 1, "cal-phone", "sent"),
    ]  # fmt: skip
    return copy.deepcopy(records)


def publish(label: str, user: str, one: str, seq: int, at: float, attempt: int = 1) -> Record:
    return {
        "op": "publish", "start": at - 0.1, "end": at, "number": 1, "attempt": attempt, "shape": "single",
        "items": [[user, label, f"key-{label}"]], "outcome": "ok", "status": 202,
        "results": [{"id": one, "seq": seq, "status": "delivered", "channels": ["in_app", "push"]}],
    }  # fmt: skip


def dial(conn: int, user: str, position: list[Any] | None, at: float) -> Record:
    return {"op": "dial", "t": at, "conn": conn, "user": user, "device": f"{user}-d", "position": position,
            "how": "url" if position else "none"}  # fmt: skip


def welcome(conn: int, recovered: bool | None, last_seq: int, at: float) -> Record:
    return {"op": "welcome", "t": at, "conn": conn, "recovered": recovered, "epoch": "e", "lastSeq": last_seq,
            "rev": last_seq}  # fmt: skip


def receive(conn: int, one: str, seq: int, at: float) -> Record:
    return {"op": "receive", "t": at, "conn": conn, "id": one, "seq": seq, "rev": seq, "read": False}


def push(target: str, one: str, at: float) -> Record:
    return {"op": "push", "t": at, "provider": "fcm", "target": target, "id": one}


def stream(user: str, seq: int, rev: int, unread: int) -> Record:
    return {"op": "stream", "t": 23.0, "user": user, "epoch": "e", "seq": seq, "rev": rev, "unread": unread}


def row(label: str, user: str, one: str, seq: int, at: float, *, read: bool = False) -> Record:
    return {"op": "row", "id": one, "user": user, "seq": seq, "rev": seq, "read": read, "label": label,
            "t": at, "delivered": None}  # fmt: skip


def delivery(number: int, one: str, state: str, attempts: int, reason: str | None = None) -> Record:
    return {"op": "delivery", "delivery": number, "notification": one, "channel": "push", "state": state,
            "attempts": attempts, "reason": reason, "due": 0.0, "t": 0.0}  # fmt: skip


def attempt(number: int, which: int, device: str, outcome: str) -> Record:
    return {"op": "attempt", "delivery": number, "attempt": which, "device": device, "provider": "fcm",
            "outcome": outcome, "status": 200, "error": "", "t": 9.1}  # fmt: skip


def find(records: list[Record], op: str, **members: Any) -> Record:
    return next(r for r in records if r["op"] == op and all(r.get(k) == v for k, v in members.items()))


def drop(op: str, **members: Any) -> Callable[[list[Record]], None]:
    return lambda records: records.remove(find(records, op, **members))


def change(op: str, changes: dict[str, Any], **members: Any) -> Callable[[list[Record]], None]:
    return lambda records: find(records, op, **members).update(changes)


def add(*more: Record) -> Callable[[list[Record]], None]:
    return lambda records: records.extend(more)


def before(record: Record, op: str, **members: Any) -> Callable[[list[Record]], None]:
    return lambda records: records.insert(records.index(find(records, op, **members)), record)


def both(*steps: Callable[[list[Record]], None]) -> Callable[[list[Record]], None]:
    def apply(records: list[Record]) -> None:
        for step in steps:
            step(records)

    return apply


BREAKS: list[tuple[str, str, Callable[[list[Record]], None]]] = [
    ("G1", "stored", both(drop("row", id=ID[5]), change("stream", {"seq": 0, "unread": 0}, user="cal"))),
    ("G1", "stored", change("row", {"label": "a9|ann"}, id=ID[2])),
    ("G1", "outbox row", drop("delivery", notification=ID[3])),
    ("G1", "in the feed", change("feed", {"items": [[ID[3], 3], [ID[1], 1]]})),
    ("G1", "change kept", both(
        change("row", {"read": False}, id=ID[1]), change("stream", {"unread": 3}, user="ann"),
        drop("state"))),
    ("G2", "one id", add(publish("c1|cal", "cal", ID[8], 2, 9.5), row("x|cal", "cal", ID[8], 2, 9.5))),
    ("G2", "one row", add(row("c1|cal", "cal", ID[8], 2, 9.5))),
    ("G2", "conflict refused", change("conflict", {"outcome": "ok"})),
    ("G3", "gap-free", change("stream", {"seq": 2}, user="cal")),
    ("G3", "gap-free", change("row", {"seq": 2}, id=ID[5])),
    ("G3", "order of answers", both(
        change("publish", {"results": [{"id": ID[1], "seq": 2}]}, start=1.9),
        change("publish", {"results": [{"id": ID[2], "seq": 1}]}, start=3.1))),
    ("G3", "rising", before(receive(2, ID[2], 2, 5.3), "publish", attempt=2)),
    ("G4", "same id", change("receive", {"id": ID[9], "seq": 3}, id=ID[2])),
    ("G4", "stored", change("receive", {"id": ID[9]}, id=ID[4])),
    ("G4", "right user", change("receive", {"id": ID[5]}, id=ID[4])),
    ("G4", "received", drop("receive", id=ID[3])),
    ("G5", "recovered", change("welcome", {"recovered": False}, conn=2)),
    ("G5", "no silent gap", drop("receive", id=ID[2])),
    ("G5", "welcome first", drop("welcome", conn=3)),
    ("G5", "changes", drop("state")),
    ("G6", "pushed", both(
        drop("push", id=ID[4]), drop("attempt", delivery=4), drop("delivery", delivery=4))),
    ("G6", "pushed", both(
        drop("push", id=ID[4]), drop("attempt", delivery=4),
        change("delivery", {"state": "planned", "attempts": 0}, delivery=4),
        add({"op": "end", "t": 60.0}))),
    ("G6", "in time", change("push", {"t": 19.0}, id=ID[4])),
    ("G6", "cancelled for a reason", both(
        drop("push", id=ID[4]), drop("attempt", delivery=4),
        change("delivery", {"state": "cancelled", "reason": "acknowledged"}, delivery=4))),
    ("G6", "dead with a reason", both(
        drop("push", id=ID[4]), drop("attempt", delivery=4),
        change("delivery", {"state": "dead", "reason": None}, delivery=4))),
    ("G7", "own target", change("push", {"target": "tc"}, id=ID[4])),
    ("G7", "sent once", add(attempt(4, 2, "ben-phone", "sent"))),
    ("G7", "sent is received", drop("push", id=ID[5])),
    ("G7", "explained", add(push("tc", ID[5], 9.3))),
    ("G7", "recorded", drop("attempt", delivery=5)),
    ("G7", "of a stored notification", add(push("tc", ID[9], 9.3))),
    ("G8", "online", change("presence", {"statuses": {"ann": "offline"}})),
    ("G8", "offline", change("presence", {"statuses": {"cal": "active"}})),
    ("G8", "offline", add({"op": "closed", "t": 14.0, "conn": 3, "code": 1000, "by": "client"})),
    ("G9", "one row per id", add(row("c1|cal", "cal", ID[5], 1, 9.0))),
    ("G9", "one row per seq", add(row("c2|cal", "cal", ID[8], 1, 9.0))),
    ("G9", "rev", change("row", {"rev": 99}, id=ID[5])),
    ("G9", "unread", change("stream", {"unread": 0}, user="cal")),
    ("recovery", "within the limit", drop("recovered")),
]  # fmt: skip


def test_a_history_as_promised_has_no_violation() -> None:
    """Nothing is found where nothing is wrong, and every guarantee was looked at."""
    _, verdicts = judge(history())
    assert violations(verdicts) == []
    assert [name for name, verdict in verdicts.items() if not verdict.checked] == []


@pytest.mark.parametrize(
    ("guarantee", "rule", "spoil"),
    BREAKS,
    ids=[f"{number}-{guarantee}-{rule}" for number, (guarantee, rule, _) in enumerate(BREAKS)],
)
def test_a_broken_promise_is_found(guarantee: str, rule: str, spoil: Callable[[list[Record]], None]) -> None:
    """One change to the history is told under its guarantee and rule, with evidence or a time."""
    records = history()
    spoil(records)
    _, verdicts = judge(records)
    found = [v for v in verdicts[guarantee].violations if v.rule == rule]
    assert found, [f"{v.guarantee} {v.rule}: {v.text}" for v in violations(verdicts)]
    assert found[0].evidence or found[0].at is not None


@pytest.mark.parametrize(
    "excuse",
    [
        both(add(push("tc", ID[5], 9.6)), change("attempt", {"outcome": "unknown"}, delivery=5),
             add(attempt(5, 2, "cal-phone", "sent")), change("delivery", {"attempts": 2}, delivery=5)),
        both(add(push("tc", ID[5], 9.6)), change("delivery", {"attempts": 2}, delivery=5),
             change("attempt", {"attempt": 2}, delivery=5)),
        both(drop("push", id=ID[5]), change("attempt", {"outcome": "failed"}, delivery=5),
             change("delivery", {"state": "dead", "reason": "gave up"}, delivery=5)),
        change("push", {"t": 13.9}, id=ID[4]),
        both(change("conflict", {"outcome": "ambiguous"}), drop("feed")),
        both(add(dial(9, "ben", ["e", 0, 0], 30.0), welcome(9, None, 0, 30.1), receive(9, ID[4], 1, 30.2),
                 {"op": "closed", "t": 30.3, "conn": 9, "code": 4213, "by": "server"})),
        both(change("presence", {"start": 8.9, "end": 8.95, "statuses": {"ann": "offline"}})),
    ],
    ids=["unknown", "no record", "dead", "in time", "ambiguous", "resume too late", "not quiet"],
)  # fmt: skip
def test_what_the_promises_allow_is_no_violation(excuse: Callable[[list[Record]], None]) -> None:
    """Duplicates behind unknown outcomes, dead letters with a reason, presence right after a fault."""
    records = history()
    excuse(records)
    assert violations(judge(records)[1]) == []
