"""The hot feed: what Redis keeps of a user's feed and counters, and when it may be shown. Pure.

Every entry carries the `epoch` and `rev` of the stream it was read at. It is shown only while the stream's
row in Postgres, which the owner writes with every change, still stands there; anything else is a miss. So
neither a lost write to Redis nor a late one can make an old answer look like the truth.

Two things change without a `rev`, and are looked at on their own: time (rows expire) and acknowledgements
(`deliveredAt`). See docs/adr/0011-hot-feed-by-rev.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from carillon.notification import NotificationRow, notification_json

E = TypeVar("E", "HotFeed", "HotCount")

MAX_ROWS: Final = 101
"""Notifications of one entry, from the top of the feed: a hundred, and the one that tells whether more
follow."""
_VERSION: Final = 1
"""Of the entries' form: those of another version are no entries."""


class HotRow(Struct, array_like=True):
    """One notification as the feed shows it."""

    position: int
    id: bytes
    read: bool
    delivered: bool
    """False: an acknowledgement may have come since."""
    expires_ms: int | None
    json: str


class HotFeed(Struct, array_like=True):
    """The top of a feed: rows by falling position, none between them left out."""

    version: int
    epoch: str
    rev: int
    complete: bool
    """The feed ends with the last row."""
    rows: list[HotRow]


class HotCount(Struct, array_like=True):
    """The part of the unread count that costs Postgres more than one row."""

    version: int
    epoch: str
    rev: int
    expired: int
    """Unread rows that have expired: the stream's counter holds them still."""
    until_ms: int | None
    """When the next unread row expires, and this is not true any more; None: none will."""


class Standing(NamedTuple):
    """Where a user's stream stands, as Postgres says now."""

    epoch: str
    rev: int
    unread: int
    """As the stream's row counts: expired rows included."""
    acknowledged: bool = False
    """One of the notifications asked about was acknowledged meanwhile."""


NOWHERE: Final = Standing("", 0, 0)
"""A user to whom nothing happened yet."""

_feed_decoder: Final = msgspec.msgpack.Decoder(HotFeed)
_count_decoder: Final = msgspec.msgpack.Decoder(HotCount)
encode: Final = msgspec.msgpack.Encoder().encode


def decode_feed(data: bytes | None) -> HotFeed | None:
    """An entry, or None for whatever is not one."""
    return _decoded(_feed_decoder, data)


def decode_count(data: bytes | None) -> HotCount | None:
    """An entry, or None for whatever is not one."""
    return _decoded(_count_decoder, data)


def _decoded(decoder: msgspec.msgpack.Decoder[E], data: bytes | None) -> E | None:
    if data is None:
        return None
    try:
        entry = decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError):
        return None
    return entry if entry.version == _VERSION else None


def hot_count(epoch: str, rev: int, expired: int, until_ms: int | None) -> HotCount:
    """The counters' entry."""
    return HotCount(_VERSION, epoch, rev, expired, until_ms)


def hot_row(row: NotificationRow, user_json: str) -> HotRow:
    """A row of the feed, ready to be shown (see `notification_json` for `user_json`)."""
    return HotRow(
        row.position,
        row.id,
        row.read_ms is not None,
        row.delivered_ms is not None,
        row.expires_ms,
        notification_json(row, user_json),
    )


def count_of(entry: HotCount, standing: Standing, now_ms: int) -> int | None:
    """The unread count; None if the entry does not tell it."""
    if (entry.epoch, entry.rev) != (standing.epoch, standing.rev):
        return None
    if entry.until_ms is not None and entry.until_ms <= now_ms:
        return None
    return max(0, standing.unread - entry.expired)


def page_of(
    feed: HotFeed, below: int, limit: int, read: bool | None, now_ms: int
) -> tuple[list[HotRow], bool] | None:
    """A page as Postgres would give it at the entry's rev, or None if the entry does not reach so far.

    Args:
        below: only rows of a lower position.
        limit: rows at most.
        read: only those that are read, or not; None: all.

    Returns:
        The rows, and whether more follow.
    """
    found: list[HotRow] = []
    for row in feed.rows:
        if (
            row.position < below
            and (row.expires_ms is None or row.expires_ms > now_ms)
            and (read is None or row.read is read)
        ):
            if len(found) == limit:
                return found, True
            found.append(row)
    return (found, False) if feed.complete else None


def unsure(rows: Sequence[HotRow]) -> list[bytes]:
    """The notifications whose `deliveredAt` may have come since they were read."""
    return [row.id for row in rows if not row.delivered]


def extended(
    before: HotFeed | None, epoch: str, rev: int, below: int | None, rows: Sequence[HotRow], last: bool
) -> HotFeed | None:
    """The entry after a page was read from Postgres, or None if the page does not reach what is known.

    Args:
        before: the entry as it was.
        epoch, rev: of the same snapshot as the page.
        below: the page begins there; None: at the top.
        rows: all of the feed from there on, newest first.
        last: the feed ends with them.
    """
    if below is None:
        known: list[HotRow] = []
    elif (
        before is not None
        and (before.epoch, before.rev) == (epoch, rev)
        and before.rows
        and below >= before.rows[-1].position
    ):
        known = [row for row in before.rows if row.position >= below]
    else:
        return None
    whole = [*known, *rows]
    return HotFeed(_VERSION, epoch, rev, last and len(whole) <= MAX_ROWS, whole[:MAX_ROWS])
