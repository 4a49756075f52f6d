"""Merging in Postgres: windows, which events are in which notification, and the rows they change.

Part of `ShardStore`: reads are made on the connection of the writer, which is the only one that changes what
it reads; the fence of the commit that follows tells if it no longer is. What is written is written in the
transaction of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import asyncpg
from asyncpg.pgproto.pgproto import UUID

from carillon.merge_begun import open_slots, slots_at, unpack
from carillon.merging import Window
from stores.postgres.shard_connections import ShardConnections
from stores.postgres.shard_rows import MergedInto, StreamsErasedError, row_of, with_rows

_SQL: Final = with_rows("merges")


@dataclass(slots=True)
class UpdateRow:
    """A notification that takes in events. `back` counts from the last of its stream (0 = last)."""

    notification: bytes
    stream_id: int
    content: str
    priority: int
    type: str
    category: str | None
    expires_ms: int | None
    top: bool
    """It goes to the top of the feed."""
    back: int = 0


@dataclass(slots=True)
class WindowRow:
    """A window as it is after the batch."""

    stream_id: int
    key: str
    notification: bytes
    ends_ms: int
    events: int
    count: int
    notified_ms: int


@dataclass(slots=True)
class MergedRow:
    """What became of one event (carillon/merging.py)."""

    event: bytes
    notification: bytes
    stream_id: int
    status: str
    how: str
    source: str
    actor: str | None
    notice: str | None
    at_ms: int | None = None
    """Of one that began a notification before: when it did. It is there already, perhaps."""


@dataclass(slots=True)
class RepushRow:
    """A push of a notification that took in events: a waiting one of its channel takes it over."""

    id: int
    notification: bytes
    stream_id: int
    slot: int
    due_ms: int
    gate: str | None
    hold_until_ms: int | None
    reason: str | None
    channel: str
    chain: str
    step: int
    digest: bytes | None = None
    """The digest it waits in; one that waits already joins it, unless it is due before."""


@dataclass(slots=True)
class MergeWrites:
    """What a batch writes beside its own notifications."""

    updates: list[UpdateRow] = field(default_factory=list)
    windows: list[WindowRow] = field(default_factory=list)
    events: list[MergedRow] = field(default_factory=list)
    pushes: list[RepushRow] = field(default_factory=list)
    left: list[tuple[bytes, int]] = field(default_factory=list)
    """Notifications and slots: of windows without rows that began anew with another one."""

    def __bool__(self) -> bool:
        return bool(self.updates or self.windows or self.events or self.pushes)

    def streams(self) -> set[int]:
        """The streams of which something is written."""
        return {row.stream_id for rows in (self.updates, self.windows, self.events) for row in rows}

    def counts(self) -> dict[int, int]:
        """Stream id -> how many of its rows change."""
        found: dict[int, int] = {}
        for row in self.updates:
            found[row.stream_id] = found.get(row.stream_id, 0) + 1
        return found


class MergeStore(ShardConnections):
    """The part of `ShardStore` that is about merging."""

    async def _fetch_merges(self, name: str, aside: bool, *args: Any) -> list[Any]:
        async with self._reading() if aside else self._writing() as connection:
            return await connection.fetch(_SQL[name], *args)

    async def find_windows(
        self, wanted: Sequence[tuple[int, str]], now_ms: int, aside: bool = False
    ) -> list[Window]:
        """Open windows among (stream id, key) pairs, with their notifications; the others are left out.

        Args:
            aside: here and below, not asked by the writer, whose connection is its own.
        """
        slots = [slots_at(key, now_ms) for _, key in wanted]
        rows = await self._fetch_merges(
            "find_windows", aside, [s for s, _ in wanted], [k for _, k in wanted], now_ms / 1000,
            [today for today, _ in slots], [tomorrow for _, tomorrow in slots],
        )  # fmt: skip
        found: dict[tuple[int, str], Window] = {}
        for r in rows:
            row, opening, ends_ms, notified_ms = row_of(r[9:]), None, r[2], r[5]
            if ends_ms is None:  # it has no row of its own
                opening = unpack(r[8])
                ends_ms, notified_ms = dict(opening.windows).get(r[1], 0), opening.notified_ms
                if ends_ms <= now_ms:
                    continue
            window = Window(r[0], r[1], row, r[6], ends_ms, r[3], r[4], notified_ms, r[7], opening)
            known = found.get((r[0], r[1]))
            if known is None or (row.seq, opening is None) > (known.row.seq, known.opening is None):
                found[r[0], r[1]] = window
        return list(found.values())

    async def open_windows(
        self, streams: Sequence[int], now_ms: int, most: int
    ) -> list[tuple[int, str, int]]:
        """(stream id, key, end) of the open windows of streams, at least `most` of one that has as many."""
        first, last = open_slots(now_ms)
        rows = await self._fetch_merges("open_windows", False, streams, now_ms / 1000, most, first, last)
        found: list[tuple[int, str, int]] = []
        for stream, key, ends_ms, text in rows:
            windows = ((key, ends_ms),) if text is None else unpack(text).windows
            found += [(stream, name, end) for name, end in windows]
        return found

    async def find_actors(
        self, wanted: Sequence[tuple[bytes, str]], aside: bool = False
    ) -> set[tuple[bytes, str]]:
        """Which of (notification, actor) pairs are counted already."""
        pairs = [UUID(raw) for raw, _ in wanted], [a for _, a in wanted]
        return {(r[0].bytes, r[1]) for r in await self._fetch_merges("find_actors", aside, *pairs)}

    async def find_locales(self, streams: Sequence[int], aside: bool = False) -> dict[int, str]:
        """The languages of users by stream id, of those that have one."""
        rows = await self._fetch_merges("find_locales", aside, streams)
        return {r[0]: r[1] for r in rows if r[1] is not None}

    async def find_merged(self, ids: Sequence[bytes], aside: bool = False) -> dict[bytes, MergedInto]:
        """What became of those of the events that are no notifications of their own."""
        rows = await self._fetch_merges("find_merged", aside, [UUID(raw) for raw in ids])
        return {r[0].bytes: MergedInto(r[1].bytes, r[2], r[3], r[4]) for r in rows}

    async def prune_merges(self, now_ms: int, since_ms: int) -> None:
        """Delete some windows that ended before `now_ms`, and some of what was merged before `since_ms`."""
        async with self._reading() as connection:
            await connection.execute(_SQL["prune_windows"], now_ms / 1000)
            await connection.execute(_SQL["prune_merged"], since_ms / 1000)

    async def _write_merges(
        self, connection: asyncpg.Connection, term: int, merges: MergeWrites, now_ms: int, keyed: bool
    ) -> dict[int, tuple[int, int, int]]:
        """Within the transaction of a batch; answers (seq, rev, unread) of the streams whose rows changed.

        Raises:
            StreamsErasedError: some streams are gone, and some events of the batch are `keyed`.
        """
        if merges.left:
            left = [UUID(raw) for raw, _ in merges.left], [slot for _, slot in merges.left]
            await connection.execute(_SQL["leave_windows"], *left)
        counts = merges.counts()
        rows, windows, events, pushes = merges.updates, merges.windows, merges.events, merges.pushes
        found = await connection.fetch(
            _SQL["merge_events"], self._shard, term, list(counts), list(counts.values()),
            [UUID(r.notification) for r in rows], [r.stream_id for r in rows], [r.back for r in rows],
            [r.content for r in rows], [r.priority for r in rows], [r.type for r in rows],
            [r.category for r in rows], [_s(r.expires_ms) for r in rows], [r.top for r in rows],
            [w.stream_id for w in windows], [w.key for w in windows], [UUID(w.notification) for w in windows],
            [w.ends_ms / 1000 for w in windows], [w.events for w in windows], [w.count for w in windows],
            [w.notified_ms / 1000 for w in windows],
            [UUID(e.event) for e in events], [UUID(e.notification) for e in events],
            [e.stream_id for e in events], [e.status for e in events], [e.how for e in events],
            [e.source for e in events], [e.actor for e in events], [e.notice for e in events],
            [p.id for p in pushes], [UUID(p.notification) for p in pushes], [p.stream_id for p in pushes],
            [p.slot for p in pushes], [p.due_ms / 1000 for p in pushes], [p.gate for p in pushes],
            [_s(p.hold_until_ms) for p in pushes], [p.reason for p in pushes], [p.channel for p in pushes],
            [p.chain for p in pushes], [p.step for p in pushes], now_ms / 1000,
            [None if p.digest is None else UUID(p.digest) for p in pushes],
            [_s(e.at_ms) for e in events],
        )  # fmt: skip
        self._check(found, term)
        gone = merges.streams() - {r[0] for r in found} if keyed else None
        if gone:
            raise StreamsErasedError(gone)
        return {r[0]: (r[1], r[2], r[3]) for r in found if r[0] and r[1] is not None}


def _s(ms: int | None) -> float | None:
    return None if ms is None else ms / 1000
