"""Judges a history by the promises of docs/explanation/durability.md. Pure: no system, no clock.

`tests/chaos/test_checker.py` has, for every rule, a history that breaks it.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.facts import Connection, Facts
from tests.chaos.history import Record

CLAIMS = {
    "G1": "every acknowledged event and change is in PostgreSQL and in the feed, delivered or pending",
    "G2": "one idempotency key, one effect; another body under it is refused",
    "G3": "seq has no gap and grows on every connection, in the order of the answers",
    "G4": "a connected device receives everything; what comes twice has the same id",
    "G5": "a resume brings everything missed in order, changes too, or says recovered: false",
    "G6": "what no device acknowledged is pushed in time, or visibly pending or dead",
    "G7": "every push is a recorded attempt; only unknown outcomes explain a second one",
    "G8": "presence is right once things are quiet",
    "G9": "nothing of a stale owner was written: no conflicting rows, the heads agree with them",
    "recovery": "after every fault events flow to everybody again within the limit",
}
PENDING = ("planned", "sending", "unknown", "failed")


@dataclass
class Violation:
    """One broken promise, with the operations that show it."""

    guarantee: str
    rule: str
    text: str
    at: float | None = None
    evidence: list[Record] = field(default_factory=list)


@dataclass
class Verdict:
    """What was looked at for one guarantee, and what was wrong."""

    guarantee: str
    checked: int = 0
    violations: list[Violation] = field(default_factory=list)


class Checker:
    """One pass over the facts.

    Args:
        facts: of a run that has ended: load stopped, faults healed, outbox given its time.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.verdicts = {name: Verdict(name) for name in CLAIMS}

    def check(self) -> dict[str, Verdict]:
        """Verdicts by guarantee."""
        rules: list[Callable[[], None]] = [
            self.stored, self.in_feed, self.changes_kept, self.keys, self.order, self.connections,
            self.complete_devices, self.read_state, self.fallback, self.attempts, self.presence,
            self.conflicts, self.recovery,
        ]  # fmt: skip
        for rule in rules:
            rule()
        return self.verdicts

    def looked(self, guarantee: str, count: int = 1) -> None:
        """Count what was examined: a guarantee of which nothing was examined is not proved."""
        self.verdicts[guarantee].checked += count

    def wrong(
        self,
        guarantee: str,
        rule: str,
        text: str,
        *evidence: Record | None,
        at: float | None = None,
    ) -> None:
        """Note a violation."""
        shown = [record for record in evidence if record is not None]
        if at is None:
            times = [r.get("t", r.get("end")) for r in shown if r.get("t", r.get("end")) is not None]
            at = min(times, default=None)
        self.verdicts[guarantee].violations.append(Violation(guarantee, rule, text, at, shown))

    # -- G1 -----------------------------------------------------------------------------------------------

    def stored(self) -> None:
        """Every 202 has its row, as answered; with a push in its plan, its outbox row."""
        for entry in self.facts.accepted:
            self.looked("G1")
            row = self.facts.rows.get(entry.id)
            if row is None:
                self.wrong(
                    "G1", "stored", f"{entry.id} of {entry.user} was answered and is gone", entry.record
                )
                continue
            told = (entry.user, entry.seq, entry.label)
            found = (row["user"], row["seq"], row["label"])
            if told != found:
                self.wrong(
                    "G1", "stored", f"{entry.id} was answered as {told}, stored {found}", entry.record, row
                )
            if "push" in entry.channels and not self.facts.deliveries.get(entry.id):
                self.wrong(
                    "G1", "outbox row", f"{entry.id} planned a push and has no outbox row", entry.record
                )

    def in_feed(self) -> None:
        """A feed that is read after the answer holds the event."""
        per_user: dict[str, list[Any]] = collections.defaultdict(list)
        for entry in self.facts.accepted:
            per_user[entry.user].append(entry)
        for feed in self.facts.feeds:
            self.looked("G1")
            shown = {one for one, _ in feed["items"]}
            lowest = 0 if feed.get("whole") else min((seq for _, seq in feed["items"]), default=0)
            missing = [
                entry
                for entry in per_user[feed["user"]]
                if entry.record["end"] < feed["start"] and entry.seq >= lowest and entry.id not in shown
            ]
            if missing:
                first = missing[0]
                self.wrong(
                    "G1", "in the feed",
                    f"the feed of {feed['user']} lacks {len(missing)} acknowledged events, first {first.id}"
                    f" (seq {first.seq})", first.record, {k: v for k, v in feed.items() if k != "items"},
                )  # fmt: skip

    def changes_kept(self) -> None:
        """A read that was answered is stored."""
        for read in self.facts.reads:
            if not read["ok"]:
                continue
            for one in read["ids"]:
                self.looked("G1")
                row = self.facts.rows.get(one)
                if row is not None and not row["read"]:
                    self.wrong(
                        "G1", "change kept", f"{one} was marked read, answered, and is unread", read, row
                    )

    # -- G2 -----------------------------------------------------------------------------------------------

    def keys(self) -> None:
        """One label (= one key, or one request without key) has one id and one row, whatever was tried."""
        ids: dict[str, dict[str, Record]] = collections.defaultdict(dict)
        for entry in self.facts.accepted:
            ids[entry.label].setdefault(entry.id, entry.record)
        for label, found in ids.items():
            self.looked("G2")
            if len(found) > 1:
                self.wrong("G2", "one id", f"{label} was answered with {sorted(found)}", *found.values())
        rows: dict[str, list[Record]] = collections.defaultdict(list)
        for row in [*self.facts.rows.values(), *self.facts.twice]:
            if row["label"] in self.facts.offered:
                rows[row["label"]].append(row)
        for label, found_rows in rows.items():
            if len(found_rows) > 1:
                self.wrong(
                    "G2", "one row", f"{label} is stored {len(found_rows)} times", *found_rows,
                    *self.facts.offered[label],
                )  # fmt: skip
        for record in self.facts.conflicts:
            self.looked("G2")
            if record["outcome"] == "ok":
                self.wrong("G2", "conflict refused", f"another body under {record['key']} was taken", record)

    # -- G3, G9 ---------------------------------------------------------------------------------------------

    def order(self) -> None:
        """1..n per user, and an event that began after another's answer has the higher seq."""
        for user, stream in self.facts.streams.items():
            self.looked("G3")
            seqs = sorted(row["seq"] for row in self.facts.rows_of[user])
            expected = list(range(1, stream["seq"] + 1))
            if seqs != expected:
                missing = sorted(set(expected) - set(seqs))[:5]
                doubled = [seq for seq, count in collections.Counter(seqs).items() if count > 1][:5]
                self.wrong(
                    "G3", "gap-free",
                    f"{user}: {len(seqs)} rows, head {stream['seq']}, missing {missing}, doubled {doubled}",
                    stream,
                )  # fmt: skip
        per_user: dict[str, dict[str, Any]] = collections.defaultdict(dict)
        for entry in self.facts.accepted:
            known = per_user[entry.user].get(entry.id)
            # The earliest answer counts as its end, the earliest try of its label as its start.
            if known is None or entry.record["end"] < known[1]:
                began = min(record["start"] for record in self.facts.offered[entry.label])
                per_user[entry.user][entry.id] = (began, entry.record["end"], entry.seq, entry.record)
        for user, entries in per_user.items():
            by_end = sorted(entries.values(), key=lambda e: e[1])
            by_start = sorted(entries.values(), key=lambda e: e[0])
            at, highest, holder = 0, 0, None
            for began, _, seq, record in by_start:
                while at < len(by_end) and by_end[at][1] < began:
                    if by_end[at][2] > highest:
                        highest, holder = by_end[at][2], by_end[at][3]
                    at += 1
                self.looked("G3")
                if seq <= highest:
                    self.wrong(
                        "G3", "order of answers",
                        f"{user}: seq {seq} was asked for after seq {highest} was answered", record, holder,
                    )  # fmt: skip

    def conflicts(self) -> None:
        """No id twice, no (user, seq) twice, and the stream's head is what its rows say."""
        for row in self.facts.twice:
            self.wrong(
                "G9", "one row per id", f"{row['id']} is stored twice", row, self.facts.rows[row["id"]]
            )
        for user, stream in self.facts.streams.items():
            self.looked("G9")
            rows = self.facts.rows_of[user]
            seen: dict[int, Record] = {}
            for row in rows:
                if row["seq"] in seen:
                    self.wrong(
                        "G9", "one row per seq", f"{user} has seq {row['seq']} twice", row, seen[row["seq"]]
                    )
                seen[row["seq"]] = row
            if any(row["rev"] > stream["rev"] for row in rows):
                self.wrong("G9", "rev", f"{user}: a row's rev is beyond the head {stream['rev']}", stream)
            unread = sum(1 for row in rows if not row["read"])
            if unread != stream["unread"]:
                self.wrong("G9", "unread", f"{user}: unread {stream['unread']}, {unread} rows are", stream)

    # -- G3, G4, G5 on connections ------------------------------------------------------------------------

    def connections(self) -> None:
        """Per connection: seq strictly rising, without a gap, from the position that was asked for."""
        ids: dict[tuple[str, int], Record] = {}
        for connection in self.facts.connections.values():
            self._connection(connection)
            for event in connection.events:
                if event["op"] != "receive":
                    continue
                self.looked("G4")
                place = (connection.user, event["seq"])
                first = ids.setdefault(place, event)
                if first["id"] != event["id"]:
                    self.wrong(
                        "G4", "same id", f"{place} came as {first['id']} and {event['id']}", event, first
                    )
                row = self.facts.rows.get(event["id"])
                if row is None:
                    self.wrong("G4", "stored", f"{event['id']} was delivered and is not stored", event)
                elif (row["user"], row["seq"]) != place:
                    self.wrong("G4", "right user", f"{event['id']} is {row['user']} {row['seq']}", event, row)

    def _connection(self, connection: Connection) -> None:
        position = connection.dialled["position"]
        last: int | None = None
        early = 0
        before: Record | None = None
        for event in connection.events:
            if event["op"] == "welcome":
                if event["recovered"] is False:
                    self.looked("G5")
                    self.wrong(
                        "G5", "recovered",
                        f"{connection.device} was told recovered: false; nothing was pruned and the epoch is"
                        " the same", connection.dialled, event,
                    )  # fmt: skip
                    last = event["lastSeq"]
                elif event["recovered"] is True and position is not None:
                    self.looked("G5")
                    last = position[1] if last is None else last
                elif event["recovered"] is None and position is None:
                    last = event["lastSeq"]
            elif event["op"] == "receive":
                self.looked("G3")
                where = f"{connection.device} (connection {connection.number})"
                if last is None and position is not None:
                    # The RESUME came too late, or is on its way: the position stands until it is answered.
                    if event["seq"] <= early:
                        self.wrong("G3", "rising", f"{where}: seq {event['seq']} after {early}", event)
                    early = event["seq"]
                    continue
                if last is None:
                    self.wrong(
                        "G5", "welcome first", f"{where}: seq {event['seq']} before its position", event
                    )
                elif event["seq"] <= last:
                    self.wrong("G3", "rising", f"{where}: seq {event['seq']} after {last}", event, before)
                elif event["seq"] > last + 1:
                    self.wrong(
                        "G5", "no silent gap", f"{where}: seq {event['seq']} after {last}",
                        connection.dialled, before, event,
                    )  # fmt: skip
                last = max(last or 0, event["seq"])
                before = event

    def complete_devices(self) -> None:
        """A device that is connected at the end has everything since it was first there."""
        for device, standing in self.facts.standing.items():
            if not standing["connected"]:
                continue
            connections = self.facts.devices[device]
            base = next((e["lastSeq"] for c in connections for e in c.events if e["op"] == "welcome"), None)
            if base is None:
                continue
            user = standing["user"]
            has = {e["id"] for c in connections for e in c.events if e["op"] == "receive"}
            for row in self.facts.rows_of[user]:
                if row["seq"] <= base:
                    continue
                self.looked("G4")
                if row["id"] not in has:
                    self.wrong(
                        "G4", "received", f"{device} never received {row['id']} (seq {row['seq']})", row,
                        connections[-1].dialled,
                    )  # fmt: skip

    def read_state(self) -> None:
        """A connected device shows as read what is read, of what it received."""
        for device, standing in self.facts.standing.items():
            if not standing["connected"]:
                continue
            view: dict[str, bool] = {}
            seqs: dict[str, int] = {}
            for connection in self.facts.devices[device]:
                for event in connection.events:
                    if event["op"] == "receive":
                        view[event["id"]] = bool(event["read"]) or view.get(event["id"], False)
                        seqs[event["id"]] = event["seq"]
                    elif event["op"] == "state" and event["kind"] == "NOTIFICATIONS_READ":
                        for one in event["ids"]:
                            if one in view:
                                view[one] = True
                    elif event["op"] == "state" and event["kind"] == "ALL_NOTIFICATIONS_READ":
                        for one, seq in seqs.items():
                            if seq <= event["upto"]:
                                view[one] = True
            for one, shown in view.items():
                row = self.facts.rows.get(one)
                if row is None:
                    continue
                self.looked("G5")
                if shown != row["read"]:
                    word = {True: "read", False: "unread"}
                    self.wrong(
                        "G5", "changes", f"{device} shows {one} (seq {row['seq']}) as {word[shown]}, it is"
                        f" {word[row['read']]}", row,
                    )  # fmt: skip

    # -- G6, G7 -------------------------------------------------------------------------------------------

    def fallback(self) -> None:
        """No acknowledgement, no reading: a push in time, or a row that says why not."""
        bound_s = self.facts.bound("push_s", 30.0)
        for row in self.facts.rows.values():
            if not self.facts.has_push(row["user"]):
                continue
            deliveries = self.facts.deliveries.get(row["id"], [])
            pushes = self.facts.pushes.get(row["id"], [])
            touched = row["id"] in self.facts.acked or row["id"] in self.facts.read_asked
            self.looked("G6")
            for delivery in deliveries:
                if delivery["state"] == "cancelled" and not touched and not pushes:
                    self.wrong(
                        "G6", "cancelled for a reason",
                        f"the push of {row['id']} ({row['user']}) was cancelled ({delivery['reason']}); no"
                        " device acknowledged or read it", row, delivery,
                    )  # fmt: skip
                if delivery["state"] == "dead" and not delivery["reason"]:
                    self.wrong(
                        "G6", "dead with a reason", f"the push of {row['id']} is dead, unsaid why", delivery
                    )
            if touched:
                continue
            deadline = self.facts.deadline(row["t"], bound_s)
            if pushes:
                first = min(push["t"] for push in pushes)
                if first > deadline:
                    self.wrong(
                        "G6", "in time",
                        f"{row['id']} ({row['user']}) was pushed {first - row['t']:.1f} s after"
                        f" its commit, {first - deadline:.1f} s too late", row, *deliveries, *pushes,
                    )  # fmt: skip
                continue
            if any(d["state"] == "dead" and d["reason"] for d in deliveries):
                continue
            if any(d["state"] == "cancelled" for d in deliveries):
                continue  # told above
            if any(d["state"] in PENDING for d in deliveries) and self.facts.end <= deadline:
                continue
            self.wrong(
                "G6",
                "pushed",
                f"{row['id']} ({row['user']}) has no acknowledgement and no push",
                row,
                *deliveries,
            )

    def attempts(self) -> None:
        """Pushes that arrived against attempts that were recorded, per target."""
        targets = self.facts.run["targets"]
        for one, row in self.facts.rows.items():
            pushes = self.facts.pushes.get(one, [])
            deliveries = self.facts.deliveries.get(one, [])
            if not pushes and not deliveries:
                continue
            devices = {target: device for _, target, device in targets.get(row["user"], [])}
            claims = sum(d["attempts"] for d in deliveries)
            recorded = [a for d in deliveries for a in self.facts.attempts.get(d["delivery"], [])]
            for push in pushes:
                if push["target"] not in devices:
                    self.wrong(
                        "G7", "own target", f"{one} of {row['user']} went to {push['target']}", push, row
                    )
            for target, device in devices.items():
                self.looked("G7")
                got = [push for push in pushes if push["target"] == target]
                own = [a for a in recorded if a["device"] == device]
                sent = sum(a["outcome"] == "sent" for a in own)
                unknown = sum(a["outcome"] == "unknown" for a in own)
                unrecorded = max(0, claims - len({(a["delivery"], a["attempt"]) for a in own}))
                if sent > 1:
                    self.wrong(
                        "G7", "sent once", f"{one} was sent to {device} {sent} times, known each time", *own
                    )
                if sent > len(got):
                    self.wrong("G7", "sent is received", f"{one} is sent to {device}; it never arrived", *own)
                if len(got) > sent + unknown + unrecorded:
                    self.wrong(
                        "G7", "explained",
                        f"{one} arrived {len(got)} times at {device}; {sent} sent, {unknown} unknown,"
                        f" {unrecorded} without record", *got, *own, *deliveries,
                    )  # fmt: skip
            for delivery in deliveries:
                outcomes = [a["outcome"] for a in recorded if a["delivery"] == delivery["delivery"]]
                if delivery["state"] == "sent" and "sent" not in outcomes:
                    self.wrong("G7", "recorded", f"{one} is sent without a recorded attempt", delivery)
        known = self.facts.rows.keys()
        for one, pushes in self.facts.pushes.items():
            if one not in known:
                self.wrong("G7", "of a stored notification", f"{one} was pushed and is not stored", *pushes)

    # -- G8 -----------------------------------------------------------------------------------------------

    def presence(self) -> None:
        """After `presence_s` of quiet without a fault, the answer is what the sockets say."""
        settle_s = self.facts.bound("presence_s", 10.0)
        spans: dict[str, list[tuple[float, float, float]]] = collections.defaultdict(list)
        for connection in self.facts.connections.values():
            began = connection.dialled["t"]
            ended = connection.closed["t"] if connection.closed else float("inf")
            welcomed = next((e["t"] for e in connection.events if e["op"] == "welcome"), ended)
            spans[connection.user].append((began, welcomed, ended))
        for answer in self.facts.presences:
            if not self.facts.quiet_between(answer["start"] - settle_s, answer["end"]):
                continue
            for user, status in answer["statuses"].items():
                mine = spans.get(user, [])
                since, until = answer["start"] - settle_s, answer["end"]
                there = any(welcomed <= since and ended >= until for _, welcomed, ended in mine)
                # A dial that has no WELCOME yet may already be attached: neither here nor away.
                away = all(ended <= since or began >= until for began, _, ended in mine)
                if there:
                    self.looked("G8")
                    if status == "offline":
                        self.wrong(
                            "G8", "online", f"{user} is connected and called offline", at=answer["start"]
                        )
                elif away:
                    self.looked("G8")
                    if status != "offline":
                        self.wrong("G8", "offline", f"{user} is gone and called {status}", at=answer["start"])

    # -- recovery -----------------------------------------------------------------------------------------

    def recovery(self) -> None:
        """The run noted when events reached everybody again."""
        for fault in self.facts.faults:
            self.looked("recovery")
            if fault.recovered is None:
                self.wrong(
                    "recovery", "within the limit",
                    f"{fault.name} ({fault.detail}): events did not flow again",
                    at=fault.start,
                )  # fmt: skip


def judge(records: Iterable[Record]) -> tuple[Facts, dict[str, Verdict]]:
    """Facts and verdicts of a history."""
    facts = Facts(records)
    return facts, Checker(facts).check()


def violations(verdicts: dict[str, Verdict]) -> list[Violation]:
    """All of them."""
    return [violation for verdict in verdicts.values() for violation in verdict.violations]
