"""The recent window of a session: the last changes as frames, for those who come back soon."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import NamedTuple

from carillon import server_frames


class LogEntry(NamedTuple):
    """One durable change in the recent window."""

    rev: int
    seq: int  # > 0 for a new notification
    frame: bytes
    """Empty: what it told is gone, only the position moves."""
    update: bool
    id: bytes = b""
    """The notification whose content it shows; empty: it shows none."""
    expires_ms: int | None = None


class Recent:
    """Every change after a rev.

    Args:
        most: entries kept.
        rev: of the stream now.

    Attributes:
        since: it holds every change with a higher rev.
    """

    __slots__ = ("_entries", "_most", "next_expiry_ms", "since")

    def __init__(self, most: int, rev: int) -> None:
        self._entries: deque[LogEntry] = deque()
        self._most = most
        self.since = rev
        self.next_expiry_ms: int | None = None  # not later than the first expiry of what it shows

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: LogEntry) -> None:
        """A change was told."""
        self._entries.append(entry)
        if len(self._entries) > self._most:
            self.since = self._entries.popleft().rev
        if entry.expires_ms is not None and (
            self.next_expiry_ms is None or entry.expires_ms < self.next_expiry_ms
        ):
            self.next_expiry_ms = entry.expires_ms

    def clear(self, rev: int) -> None:
        """Know nothing before `rev`."""
        self._entries.clear()
        self.since = rev
        self.next_expiry_ms = None

    def oldest_seq(self, head_seq: int) -> int:
        """Least position from which it holds every later notification."""
        for entry in self._entries:
            if entry.seq:
                return entry.seq - 1
        return head_seq

    def missed(self, cursor_seq: int, cursor_rev: int) -> list[LogEntry]:
        """What a connection at a position lacks, in the order to be written."""
        missed = [e for e in self._entries if e.seq > cursor_seq]
        # The frames of missed notifications are as they were when new, so that every later change of them
        # follows, also those the client's rev (of another stream position, or none) would leave out.
        told = min(cursor_rev, missed[0].rev) if missed else cursor_rev
        missed += [e for e in self._entries if not e.seq and e.rev > told]
        return [e for e in missed if e.frame]

    def withdraw(self, ids: Collection[bytes]) -> None:
        """What shows these notifications is not shown any more."""
        self._entries = deque(
            entry._replace(frame=b"", id=b"", expires_ms=None) if entry.id and entry.id in ids else entry
            for entry in self._entries
        )

    def expire(self, now_ms: int) -> None:
        """What has expired is not shown any more; who may have an earlier version is told that it is gone."""
        if self.next_expiry_ms is None or self.next_expiry_ms > now_ms:
            return
        until = {e.id: e.expires_ms for e in self._entries if e.id}  # the last word: an update may put it off
        over = {raw for raw, ends_ms in until.items() if ends_ms is not None and ends_ms <= now_ms}
        updated = {e.id: e.rev for e in self._entries if e.id in over and not e.seq}  # the last of each
        self.withdraw(over)
        gone = {rev: server_frames.notification_state("RETRACTED", raw, rev) for raw, rev in updated.items()}
        if gone:
            self._entries = deque(
                e._replace(frame=gone[e.rev], update=False) if e.rev in gone and not e.frame else e
                for e in self._entries
            )
        self.next_expiry_ms = min(
            (ends_ms for raw, ends_ms in until.items() if ends_ms is not None and raw not in over),
            default=None,
        )
