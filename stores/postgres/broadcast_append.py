"""The statement that a chunk of a broadcast is written with: positions, notifications and outbox rows of
users who are not in memory, and with `Progress` how far the broadcast is, too.

What users share is said once: an array has its price per element, here and in PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import asyncpg
from asyncpg.pgproto.pgproto import UUID

from carillon.broadcasts import Counts, Mark
from carillon.errors import FencedError, StoreUnavailableError
from carillon.messages import Event
from stores.postgres.named import load_queries

COUNTS: Final = ("stored", "delivered", "queued", "deferred", "suppressed", "failed")
TURNS: Final = 0x4341_5249_0000
"""Advisory locks from here on ("CARI" in front) are turns of broadcasts."""
_FIRST: Final = 17
"""Number of the first parameter behind those of `append`."""


class Shape(NamedTuple):
    """What is stored with the notifications of some users of a chunk."""

    content: str
    priority: int
    decision: str | None
    archived: bool
    """Filed away from the first, and not counted as unread."""
    receipt: int


class PushShape(NamedTuple):
    """What some outbox rows of a chunk share. All are planned, none is born claimed."""

    due_ms: int
    gate: str | None
    hold_until_ms: int | None
    reason: str | None
    channel: str
    chain: str
    step: int


class PushRow(NamedTuple):
    """An outbox row."""

    nth: int
    """Whose: a place in `Rows.ids`, from 0."""
    shape: int
    """A place in `Rows.push_shapes`, from 0."""
    digest: bytes | None


@dataclass(slots=True)
class Rows:
    """What a chunk writes for its users; `ids`, `streams` and `of` have an element for each."""

    event: Event
    """Whose type, category and times all of them have."""
    ids: list[bytes] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    of: list[int] = field(default_factory=list)
    """Places in `shapes`, from 0."""
    shapes: list[Shape] = field(default_factory=list)
    pushes: list[PushRow] = field(default_factory=list)
    push_shapes: dict[PushShape, int] = field(default_factory=dict)
    """Their places, from 0 in this order."""


class Progress(NamedTuple):
    """What is written with the rows: how far the broadcast is."""

    broadcast: bytes
    marks: Sequence[Mark]
    counts: Mapping[int, Counts]
    turn: int | None
    """Chunks of the same number are written one after the other, by whomever; None: no waiting."""


class BroadcastAppend:
    """Writes chunks.

    Args:
        queries: those of broadcasts.sql.
    """

    def __init__(self, queries: Mapping[str, str]) -> None:
        mark = numbered(queries["mark"], "p", _FIRST).replace("%(from)s", "fence,")
        going = numbered(queries["fence"], "p", _FIRST)
        self._draw = load_queries("shard")["draw_delivery_ids"]
        self._texts: dict[tuple[bool, bool], str] = {}
        for whole in (False, True):
            fence = going if whole else queries["fence_alone"]
            marked = f",\nmarked as (\n{mark}\n)" if whole else ""
            for pushes in (False, True):
                first = _FIRST + 11 * whole
                planned = f",\n{numbered(queries['planned'], 'o', first)}" if pushes else ""
                self._texts[whole, pushes] = queries["append"] % {
                    "fence": fence, "planned": planned, "marked": marked
                }  # fmt: skip

    async def draw(self, connection: asyncpg.Connection, count: int) -> list[int]:
        """Ids of outbox rows, ascending, never given out again."""
        return [row[0] for row in await connection.fetch(self._draw, count)]

    async def append(
        self,
        connection: asyncpg.Connection,
        shard: str,
        term: int,
        rows: Rows,
        delivery_ids: Sequence[int],
        now_ms: int,
        progress: Progress | None,
    ) -> set[int]:
        """Write a chunk in one statement.

        Args:
            delivery_ids: of its outbox rows.
            progress: None in a transaction that has asked whether the broadcast runs, and marks by itself.

        Returns:
            Streams that are gone, erased since they were read: nothing was written for these.

        Raises:
            FencedError: the term is over or, with `progress`, it does not run. Nothing was written.
            StoreUnavailableError: two rows have one stream. Nothing was written.
        """
        if len(set(rows.streams)) < len(rows.streams):
            raise StoreUnavailableError("two users of a page have one stream")
        event, shapes = rows.event, rows.shapes
        created_s = event.created_ms / 1000
        expires_s = None if event.expires_ms is None else event.expires_ms / 1000
        more: list[Any] = []
        if progress is not None:
            lock = None if progress.turn is None else TURNS + progress.turn
            more += *mark_parameters(progress.broadcast, progress.marks, progress.counts), lock
        if rows.pushes:
            more += _push_parameters(rows, delivery_ids, now_ms)
        row = await connection.fetchrow(
            self._texts[progress is not None, bool(rows.pushes)],
            shard, term, rows.streams, [UUID(raw) for raw in rows.ids], [of + 1 for of in rows.of],
            event.type, event.category, created_s, expires_s,
            [int(not shape.archived) for shape in shapes],
            [shape.content for shape in shapes],
            [shape.priority for shape in shapes],
            [shape.decision for shape in shapes],
            [created_s if shape.archived else None for shape in shapes],
            [shape.receipt for shape in shapes],
            len(rows.streams),
            *more,
        )  # fmt: skip
        if row is None:
            raise FencedError(f"term {term} of {shard} is over")
        left: list[int] | None = row[0]
        return set() if left is None else set(rows.streams).difference(left)


def numbered(text: str, letter: str, first: int) -> str:
    """A text with its parameters, written %(p1)s to %(p12)s for the letter "p", numbered from `first`."""
    for number in range(1, 13):
        text = text.replace(f"%({letter}{number})s", f"${first + number - 1}")
    return text


def mark_parameters(broadcast: bytes, marks: Sequence[Mark], counts: Mapping[int, Counts]) -> Sequence[Any]:
    """Parameters of `mark`."""
    by_slot = {mark.slot: mark for mark in marks}
    slots = [*by_slot, *(slot for slot in counts if slot not in by_slot)]
    nothing = Counts()
    rows = [counts.get(slot, nothing) for slot in slots]
    return (
        UUID(broadcast), slots,
        [by_slot[slot].last if slot in by_slot else None for slot in slots],
        [slot in by_slot and by_slot[slot].done for slot in slots],
        *([row[index] for row in rows] for index in range(len(COUNTS))),
    )  # fmt: skip


def _push_parameters(rows: Rows, delivery_ids: Sequence[int], now_ms: int) -> Sequence[Any]:
    shapes, pushes = list(rows.push_shapes), rows.pushes
    return (
        delivery_ids,
        [push.nth + 1 for push in pushes],
        [push.shape + 1 for push in pushes],
        [None if push.digest is None else UUID(push.digest) for push in pushes],
        now_ms / 1000,
        [shape.due_ms / 1000 for shape in shapes],
        [shape.gate for shape in shapes],
        [None if shape.hold_until_ms is None else shape.hold_until_ms / 1000 for shape in shapes],
        [shape.reason for shape in shapes],
        [shape.channel for shape in shapes],
        [shape.chain for shape in shapes],
        [shape.step for shape in shapes],
    )
