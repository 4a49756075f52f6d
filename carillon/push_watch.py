"""The pushes of one connected user that wait: what the session remembers of rows of the outbox.

The rows in Postgres are the truth, and a row that this memory lost is found when it is due; what is kept here
makes the moment prompt at which a user looks away. Times are monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from carillon.attention import ACKNOWLEDGED, HELD, SEEN, at_due, on_signal

MAX_WATCHED: Final = 1000
"""Waiting pushes a session remembers; the oldest are left to the sweep of the outbox."""
_NEVER: Final = float("inf")


class Waiting:
    """One push that waits."""

    __slots__ = ("acknowledged", "due", "gate", "hold_until", "seq")

    def __init__(self, seq: int, gate: str | None, due: float, hold_until: float) -> None:
        self.seq = seq
        self.gate = gate
        self.due = due
        self.hold_until = hold_until
        self.acknowledged = False


class PushWatch:
    """The waiting pushes of one user, by notification.

    Attributes:
        next_due: the earliest time at which `take_due` finds something; not later than that, maybe earlier.
    """

    __slots__ = ("_rows", "next_due")

    def __init__(self) -> None:
        self._rows: dict[bytes, Waiting] = {}
        self.next_due = _NEVER

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, notification: bytes) -> Waiting | None:
        """What is known of one."""
        return self._rows.get(notification)

    def add(self, notification: bytes, row: Waiting) -> None:
        """A row was committed."""
        rows = self._rows
        if len(rows) >= MAX_WATCHED:
            del rows[next(iter(rows))]
        rows[notification] = row
        if row.gate == SEEN and row.due < self.next_due:
            self.next_due = row.due

    def between(self, after: int, upto: int) -> list[bytes]:
        """Those with after < seq <= upto."""
        return [raw for raw, row in self._rows.items() if after < row.seq <= upto]

    def forget(self, ids: Iterable[bytes], upto: int = 0) -> None:
        """The user dealt with these, and with everything up to a seq."""
        for raw in ids:
            self._rows.pop(raw, None)
        if upto:
            for raw in self.between(0, upto):
                del self._rows[raw]

    def signalled(self, ids: Iterable[bytes], signal: str, now: float) -> None:
        """Follow what a signal does to the rows."""
        for raw in ids:
            row = self._rows.get(raw)
            if row is None:
                continue
            if signal in ACKNOWLEDGED:
                row.acknowledged = True
            done = on_signal(signal, "planned", row.gate, row.hold_until > now)
            if done in ("cancel", "due"):
                del self._rows[raw]
            elif done == "hold":
                row.gate, row.due = HELD, row.hold_until
                self.next_due = min(self.next_due, row.due)

    def held(self) -> list[bytes]:
        """Those that are held for an active user."""
        return [raw for raw, row in self._rows.items() if row.gate == HELD]

    def take_due(self, now: float, active: bool) -> tuple[list[bytes], list[bytes]]:
        """What becomes of SEEN and HELD rows whose time has come.

        Returns:
            (to be dropped, to be held on). Those that are to be sent are forgotten: the outbox sends them.
        """
        dropped: list[bytes] = []
        kept: list[bytes] = []
        sent: list[bytes] = []
        later = _NEVER
        for raw, row in self._rows.items():
            if row.gate != SEEN and row.gate != HELD:
                continue
            if row.due > now:
                later = min(later, row.due)
                continue
            holdable = row.hold_until > now
            verdict = at_due(row.gate, active=active, acknowledged=row.acknowledged, holdable=holdable)
            if verdict == "hold":
                row.gate, row.due = HELD, row.hold_until
                later = min(later, row.due)
                kept.append(raw)
            else:
                (dropped if verdict == "drop" else sent).append(raw)
        self.forget(dropped)
        self.forget(sent)
        self.next_due = later
        return dropped, kept
