"""What was accepted, what arrived, and whether the two agree. Pure: no sockets, no clock.

A benchmark that only counts would call a system fast that drops what it cannot keep up with, so every
scenario ends in a `Verdict`. The rules are those of docs (G1, G3, G4): each id answered with 202 reaches
every connected device of its user exactly once, in `seq` order, with the `seq` that was answered, and is
stored; nobody receives what is not theirs.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

EXAMPLES: Final = 5
"""Violations named in full per kind; the rest are only counted."""


@dataclass(slots=True)
class Accepted:
    """One event that was answered with 202."""

    user: str
    seq: int
    intended_s: float
    """When it was meant to be sent (monotonic seconds); equal to the send time in closed-loop scenarios."""
    answered_s: float
    measured: bool = True
    """False for warm-up events: judged, but not part of latencies or throughput."""
    status: str = ""


@dataclass(slots=True)
class Device:
    """One receiving connection and what it received, in order of arrival."""

    user: str
    receipts: list[tuple[float, bytes, int]] = field(default_factory=list)
    """(monotonic seconds, notification id, seq)."""


@dataclass
class Verdict:
    """Counts of violations; `ok` if there is none."""

    accepted: int = 0
    received: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    """Answers other than 202, by status or problem code: not a violation, they promise nothing."""
    ambiguous: int = 0
    """Events whose answer was lost with its connection: they may arrive or not."""
    lost: int = 0
    duplicated: int = 0
    out_of_order: int = 0
    foreign: int = 0
    """Received by a device of another user."""
    phantom: int = 0
    """Received though never accepted (beyond what `ambiguous` explains)."""
    seq_mismatch: int = 0
    """Received with another `seq` than answered, or one id or `seq` answered twice."""
    seq_gap: int = 0
    """Numbers missing from a user's 1..n."""
    not_stored: int | None = None
    """Accepted but not in Postgres or the feed; None if that was not looked up."""
    wrong: int | None = None
    """Answers other than what Postgres holds, or changes a device was not told of; None outside F1 to F3."""
    not_pushed: int | None = None
    """Accepted for an offline user with a push device, but no push arrived; None outside S5."""
    examples: list[str] = field(default_factory=list)

    VIOLATIONS = (
        "lost", "duplicated", "out_of_order", "foreign", "phantom", "seq_mismatch", "seq_gap", "not_stored",
        "wrong", "not_pushed",
    )  # fmt: skip

    @property
    def ok(self) -> bool:
        """True if nothing was violated and something was accepted at all."""
        return self.accepted > 0 and not any(getattr(self, name) for name in self.VIOLATIONS)

    def sentence(self) -> str:
        """One line for the table."""
        if not self.accepted:
            return f"FAILED: nothing was accepted (refused: {self.refused or 0}, ambiguous: {self.ambiguous})"
        wrong = [f"{getattr(self, name)} {name}" for name in self.VIOLATIONS if getattr(self, name)]
        extra = f", {sum(self.refused.values())} refused" if self.refused else ""
        extra += f", {self.ambiguous} ambiguous" if self.ambiguous else ""
        stored = "" if self.not_stored is None else ", all stored"
        if wrong:
            return f"VIOLATED: {', '.join(wrong)} of {self.accepted}{extra}"
        return f"ok: {self.accepted} accepted, {self.received} received{stored}{extra}"

    def as_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "ok": self.ok,
            "accepted": self.accepted,
            "received": self.received,
            "refused": self.refused,
            "ambiguous": self.ambiguous,
            **{name: getattr(self, name) for name in self.VIOLATIONS},
            "examples": self.examples,
        }


class Ledger:
    """Collects what the load generator was told; `judge` compares it with what devices saw."""

    def __init__(self) -> None:
        self.accepted: dict[bytes, Accepted] = {}
        self.refused: collections.Counter[str] = collections.Counter()
        self.ambiguous = 0
        self.answered_twice: list[bytes] = []

    def accept(self, notification: bytes, entry: Accepted) -> None:
        """Record a 202. An id that was answered before is a violation: every event here is a new one."""
        if notification in self.accepted:
            self.answered_twice.append(notification)
        else:
            self.accepted[notification] = entry

    def refuse(self, reason: int | str, count: int = 1) -> None:
        """Record `count` events that were answered, but not with 202."""
        self.refused[str(reason)] += count

    def lose_answer(self, count: int = 1) -> None:
        """Record `count` events whose answer never came: they may have been stored."""
        self.ambiguous += count

    def latencies_s(self, devices: Iterable[Device]) -> list[float]:
        """Seconds from the intended send to each first receipt of each measured event, per device."""
        found: list[float] = []
        for device in devices:
            seen: set[bytes] = set()
            for at, notification, _ in device.receipts:
                entry = self.accepted.get(notification)
                if entry is not None and entry.measured and notification not in seen:
                    seen.add(notification)
                    found.append(at - entry.intended_s)
        return found


def judge(
    ledger: Ledger,
    devices: Iterable[Device],
    *,
    stored: Mapping[bytes, int] | None = None,
    pushed: Iterable[bytes] | None = None,
    fresh_users: bool = True,
) -> Verdict:
    """Compare answers, receipts, stored rows and pushes.

    Args:
        ledger: the answers.
        devices: every connection that was open from before the first event until after the last receipt.
            Users without one are offline: nothing is expected on sockets for them.
        stored: id -> seq as found in Postgres or the feed; None if not looked up.
        pushed: ids that arrived at the local push servers; None if no push is expected. Each accepted event
            of an offline user must be among them.
        fresh_users: True if no user had notifications before the run, so that seqs are exactly 1..n.
    """
    devices = list(devices)
    verdict = Verdict(accepted=len(ledger.accepted), refused=dict(ledger.refused), ambiguous=ledger.ambiguous)
    examples: dict[str, int] = collections.Counter()

    def wrong(kind: str, what: str, count: int = 1) -> None:
        setattr(verdict, kind, (getattr(verdict, kind) or 0) + count)
        examples[kind] += 1
        if examples[kind] <= EXAMPLES:
            verdict.examples.append(f"{kind}: {what}")

    by_user: dict[str, dict[bytes, Accepted]] = collections.defaultdict(dict)
    for notification, entry in ledger.accepted.items():
        by_user[entry.user][notification] = entry
    for notification in ledger.answered_twice:
        wrong("seq_mismatch", f"id {notification.decode()} was answered to two events")

    strangers: set[bytes] = set()
    for device in devices:
        expected = by_user.get(device.user, {})
        seen: set[bytes] = set()
        highest = 0
        verdict.received += len(device.receipts)
        for _, notification, seq in device.receipts:
            name = notification.decode()
            if notification in seen:
                wrong("duplicated", f"{name} seq {seq} to {device.user}")
                continue
            seen.add(notification)
            if seq <= highest:
                wrong("out_of_order", f"{name} seq {seq} after {highest} to {device.user}")
            highest = max(highest, seq)
            entry = expected.get(notification)
            if entry is not None:
                if entry.seq != seq:
                    wrong("seq_mismatch", f"{name} answered seq {entry.seq}, received {seq}")
            elif notification in ledger.accepted:
                owner = ledger.accepted[notification].user
                wrong("foreign", f"{name} of {owner} was received by {device.user}")
            else:
                strangers.add(notification)
        for notification in expected.keys() - seen:
            wrong("lost", f"{notification.decode()} seq {expected[notification].seq} of {device.user}")
    # An event whose answer was lost may legitimately arrive, under an id nobody told us.
    unexplained = len(strangers) - ledger.ambiguous
    if unexplained > 0:
        wrong("phantom", f"{unexplained} ids that no answer named", unexplained)

    for user, entries in by_user.items():
        seqs = [entry.seq for entry in entries.values()]
        if len(set(seqs)) != len(seqs):
            wrong("seq_mismatch", f"a seq of {user} was answered twice")
        elif fresh_users and not ledger.ambiguous and sum(ledger.refused.values()) == 0:
            # Without refusals and lost answers every seq that the user ever got is known to us.
            missing = max(seqs) - len(seqs)
            if missing:
                wrong("seq_gap", f"{user}: {missing} missing below {max(seqs)}", missing)

    if stored is not None:
        verdict.not_stored = 0
        for notification, entry in ledger.accepted.items():
            found = stored.get(notification)
            if found is None:
                wrong("not_stored", f"{notification.decode()} of {entry.user}")
            elif found != entry.seq:
                wrong("seq_mismatch", f"{notification.decode()} answered seq {entry.seq}, stored {found}")
    if pushed is not None:
        verdict.not_pushed = 0
        arrived = set(pushed)
        online = {device.user for device in devices}
        for notification, entry in ledger.accepted.items():
            if entry.user not in online and notification not in arrived:
                wrong("not_pushed", f"{notification.decode()} of {entry.user}")
    return verdict
