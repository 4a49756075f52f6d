"""The pushes of one connected user that wait: what the session remembers of rows of the outbox.

The rows in Postgres are the truth, and a row that this memory lost is found when it is due; what is kept here
makes the moment prompt at which a user looks away. Times are monotonic seconds.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Final

from carillon.attention import ACKNOWLEDGED, HELD, SEEN, at_due, on_signal

MAX_WATCHED: Final = 1000
"""Waiting pushes a session remembers; the oldest are left to the sweep of the outbox."""
SPARE: Final = 64
"""Entries of the heap that may lead nowhere, beside one for each row, before it is made anew."""
_NEVER: Final = float("inf")


class Waiting:
    """One push that waits."""

    __slots__ = ("acknowledged", "due", "gate", "hold_until", "rev", "seq")

    def __init__(self, seq: int, gate: str | None, due: float, hold_until: float, rev: int = 0) -> None:
        self.seq = seq
        self.rev = rev  # of the update that it tells; 0: it tells a new notification
        self.gate = gate
        self.due = due
        self.hold_until = hold_until
        self.acknowledged = False


class PushWatch:
    """The waiting pushes of one user, by notification.

    A busy user has a thousand of them for a minute, and tens a second come, are acknowledged and become due:
    none of these looks at all of them.
    """

    __slots__ = ("_due", "_in_order", "_last_rev", "_last_seq", "_rows")

    def __init__(self) -> None:
        self._rows: dict[bytes, Waiting] = {}
        self._due: list[tuple[float, bytes]] = []  # heap; entries of rows that moved on are skipped
        self._last_seq = self._last_rev = 0
        self._in_order = True  # rows were added with rising seq

    @property
    def next_due(self) -> float:
        """The earliest time at which `take_due` finds something; not later than that, maybe earlier."""
        return self._due[0][0] if self._due else _NEVER

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
        if not rows:
            self._in_order = True
        elif row.seq < self._last_seq:  # something was merged into an older one
            self._in_order = False
        self._last_seq = row.seq
        self._last_rev = max(self._last_rev, row.rev)
        rows[notification] = row
        if row.gate == SEEN:
            self._wait(row.due, notification)

    def _wait(self, due: float, notification: bytes) -> None:
        if len(self._due) > 2 * len(self._rows) + SPARE:
            self._due = [(row.due, raw) for raw, row in self._rows.items() if row.gate in (SEEN, HELD)]
            heapq.heapify(self._due)
        heapq.heappush(self._due, (due, notification))

    def between(self, after: int, upto: int) -> list[bytes]:
        """Those with after < seq <= upto."""
        if not self._in_order:
            return [raw for raw, row in self._rows.items() if after < row.seq <= upto]
        found: list[bytes] = []
        for raw, row in reversed(self._rows.items()):  # what is acknowledged came last
            if row.seq <= after:
                break
            if row.seq <= upto:
                found.append(raw)
        found.reverse()
        return found

    def updates(self, after: int, upto: int) -> list[bytes]:
        """Those that tell updates with after < rev <= upto."""
        if self._last_rev <= after:
            return []
        return [raw for raw, row in self._rows.items() if after < row.rev <= upto]

    def newer(self, ids: Iterable[bytes], rev: int) -> set[bytes]:
        """Those of the ids whose push tells an update after `rev`."""
        if self._last_rev <= rev:
            return set()
        return {raw for raw in ids if (row := self._rows.get(raw)) is not None and row.rev > rev}

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
                self._wait(row.due, raw)

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
        while self._due and self._due[0][0] <= now:
            due, raw = heapq.heappop(self._due)
            row = self._rows.get(raw)
            if row is None or row.due != due or row.gate not in (SEEN, HELD):
                continue
            holdable = row.hold_until > now
            verdict = at_due(row.gate, active=active, acknowledged=row.acknowledged, holdable=holdable)
            if verdict == "hold":
                row.gate, row.due = HELD, row.hold_until
                self._wait(row.due, raw)
                kept.append(raw)
            else:
                if verdict == "drop":
                    dropped.append(raw)
                del self._rows[raw]
        return dropped, kept
