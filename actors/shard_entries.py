"""What the writer of a shard works on: events on their way, and what is counted of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from actors.shard_users import User
from carillon.attention import DEFERRED
from carillon.messages import Event, Outcome
from carillon.plan import Plan, Reach
from stores.postgres.shard_rows import AppendRow


class Entry:
    """One event on its way: where it came from and what is known of it."""

    __slots__ = ("done", "event", "plan", "receipt", "user", "waiters")

    def __init__(self, event: Event, done: Callable[[Outcome], None]) -> None:
        self.event = event
        self.done = done
        self.user: User | None = None
        self.plan: Plan | None = None
        self.receipt = 0
        self.waiters: list[Callable[[Outcome], None]] | None = None

    def share(self, other: Entry) -> None:
        """Let another try of the same event have the outcome of this one."""
        if self.waiters is None:
            self.waiters = []
        self.waiters.append(other.done)


def unread_after(rows: Sequence[AppendRow]) -> list[int]:
    """Of each row how many of its stream that follow in the batch count as unread."""
    after: dict[int, int] = {}
    found: list[int] = []
    for row in reversed(rows):
        found.append(after.get(row.stream_id, 0))
        after[row.stream_id] = found[-1] + (not row.archived)
    found.reverse()
    return found


def disturbs(found: Plan, reach: Reach) -> bool:
    """Whether a plan takes something of the user's attention now."""
    pushed = found.push_due_ms is not None and found.gate != DEFERRED
    return pushed or (reach is Reach.LIVE and not found.archived and not found.silent)


def answered(_: Any) -> None:
    """Stands where a callback was that has been called."""
