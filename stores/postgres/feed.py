"""What the ingress reads of users: feed, counts, catching up, single notifications, devices, preferences."""

from __future__ import annotations

import base64
import binascii
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import asyncpg
import msgspec

from carillon.errors import InvalidInputError
from carillon.hot_feed import NOWHERE, Standing
from carillon.kept_push import history
from carillon.merge_begun import unpack
from carillon.merge_windows import KnownWindow
from carillon.merging import OPENED
from carillon.notification import NotificationRow, gone
from stores.postgres.named import load_queries
from stores.postgres.pool import Store, acquired

_STATES: Final = (
    "delivered",
    "seen",
    "read",
    "clicked",
    "dismissed",
    "archived",
    "retracted",
    "updated",
    "expires",
)
ROW_COLUMNS: Final = "n.id, n.seq, n.rev, n.position, n.content, " + ", ".join(
    f"(extract(epoch from n.{state}_at) * 1000)::bigint as {state}_ms" for state in _STATES
)
"""Select list of a NotificationRow, in the order of its fields."""

TOP: Final = 2**63 - 1
"""Above every position: the first page."""
STATUSES: Final = ("unread", "read", "archived")


def encode_cursor(position: int) -> str:
    """An opaque cursor: the page after it begins below `position`."""
    return base64.urlsafe_b64encode(b"p%d" % position).rstrip(b"=").decode()


def decode_cursor(cursor: str) -> int:
    """The position of a cursor.

    Raises:
        InvalidInputError: it is not one of ours.
    """
    try:
        text = base64.b64decode(cursor.encode() + b"=" * (-len(cursor) % 4), b"-_", validate=True)
        if text[:1] != b"p" or not text[1:].isdigit() or len(text) > 20:
            raise ValueError
        position = int(text[1:])
    except (ValueError, binascii.Error):
        raise InvalidInputError(
            "expected cursor to be a nextCursor of this call", "cursor", "a nextCursor", cursor[:40]
        ) from None
    if position > TOP:
        raise InvalidInputError(
            "expected cursor to be a nextCursor of this call", "cursor", "a nextCursor", cursor[:40]
        )
    return position


MERGED_SHOWN: Final = 100
"""Merged events that are told of one notification, the newest."""


@dataclass(frozen=True)
class FeedFilter:
    """What a page of the feed is to hold; None means everything."""

    status: str | None = None
    """unread | read | archived."""
    type: str | None = None
    category: str | None = None


EVERYTHING: Final = FeedFilter()


class PageRead(NamedTuple):
    """A page, and where the stream stood when it was read."""

    rows: list[NotificationRow]
    follower: NotificationRow | None
    """The first row of the next page; None: there is none."""
    epoch: str
    """Empty if there are no rows; for unread and archived ones, too."""
    rev: int


class Head(NamedTuple):
    """Where a user's stream stands."""

    stream_id: int
    epoch: str
    seq: int
    rev: int
    pruned_rev: int
    unread: int


NO_STREAM: Final = Head(0, "", 0, 0, 0, 0)
"""A user to whom nothing happened yet."""


@dataclass(frozen=True)
class SyncPage:
    """What happened after a position."""

    recovered: bool
    """False: something between the position and now cannot be told any more; read the feed instead."""
    notifications: list[NotificationRow]
    changes: list[NotificationRow]
    """Changed rows the client has already, by rev (carillon.change_frames.change_frames writes them)."""
    last_seq: int
    """Position reached: the next `since`."""
    rev: int
    """Position reached: the next `rev`."""
    more: bool
    """True if the page was cut: ask again from (last_seq, rev)."""
    head: Head


class Act(NamedTuple):
    """What a service did to a notification it had sent."""

    act: str
    """edit | retract | cancel."""
    at_ms: int
    actor: str
    version: int | None
    """That an edit made."""
    former: str | None
    """The content that an edit replaced."""


class Target(NamedTuple):
    """A device that has a push target."""

    device: str
    platform: str
    """Empty: not told."""
    provider: str


class MergedEvent(NamedTuple):
    """What became of one event that asked for merging (carillon/merging.py)."""

    event: bytes
    at_ms: int
    status: str
    how: str
    source: str
    actor: str | None
    notice: str | None


class MergeLog(NamedTuple):
    """The events of a notification, as far as they are still known."""

    merged: int
    duplicates: int
    events: list[MergedEvent]
    """The newest first."""
    windows: Sequence[KnownWindow] = ()


@dataclass(frozen=True)
class Found:
    """One notification with the tries of its external deliveries."""

    row: NotificationRow
    user: str
    deliveries: list[dict[str, Any]]
    decision: str | None = None
    """The rules that fired (carillon.decision.pack)."""
    receipt: int | None = None
    """How the user was reached (carillon.explain.receipt_of)."""
    priority: int = 1
    """With the user's override."""
    version: int = 1
    """Of its content."""
    cancelled_ms: int | None = None
    acts: Sequence[Act] = ()
    """What the service did to it, in order."""
    merged: MergeLog | None = None
    """None: nobody asked for merging."""
    created_ms: int = 0
    """When it was sent; the id may be older (`scheduleAt`)."""


class FeedReader(Store):
    """Reads of users.

    All methods raise StoreUnavailableError while Postgres does not answer. Ids are given as they come from
    outside: what PostgreSQL cannot hold (NUL) is simply not found.
    """

    _sql: Final = {name: text.replace("%(row)s", ROW_COLUMNS) for name, text in load_queries("feed").items()}

    async def page(
        self,
        tenant: str,
        user: str,
        now_ms: int,
        *,
        limit: int,
        cursor: str | None = None,
        chosen: FeedFilter = EVERYTHING,
    ) -> tuple[list[NotificationRow], str | None]:
        """One page, newest first, and the cursor of the next (None: this is the last).

        Archived, dismissed, retracted and expired ones are left out unless `chosen.status` asks for them.

        Raises:
            InvalidInputError: the cursor is none of ours.
        """
        below = None if cursor is None else decode_cursor(cursor)
        read = await self.page_at(tenant, user, now_ms, limit=limit, below=below, chosen=chosen)
        return read.rows, encode_cursor(read.rows[-1].position) if read.follower is not None else None

    async def page_at(
        self, tenant: str, user: str, now_ms: int, *, limit: int, below: int | None, chosen: FeedFilter
    ) -> PageRead:
        """`page` from a position on (None: the top), with where the stream stood in the same snapshot."""
        if any("\0" in text for text in (tenant, user, chosen.type, chosen.category) if text):
            return PageRead([], None, "", 0)
        name = {"unread": "feed_unread", "archived": "feed_archived"}.get(chosen.status or "", "feed")
        async with acquired(self._pool, self._timeout_s) as connection:
            found = await connection.fetch(
                self._sql[name],
                tenant,
                user,
                TOP if below is None else below,
                now_ms / 1000,
                limit + 1,
                chosen.type,
                chosen.category,
                chosen.status == "read",
            )
        rev, epoch = 0, ""
        if found and name == "feed":
            place, _, epoch = found[0]["place"].partition(" ")
            rev = int(place)
        rows = [row_of(record) for record in found]
        return PageRead(rows[:limit], rows[limit] if len(rows) > limit else None, epoch, rev)

    async def standings(self, asked: Sequence[tuple[str, str, Sequence[bytes]]]) -> list[Standing]:
        """Where streams stand, in one question.

        Args:
            asked: (tenant, user, notifications that may have been acknowledged meanwhile); no NUL.
        """
        ids = [(uuid.UUID(bytes=raw), at) for at, (_, _, raws) in enumerate(asked, 1) for raw in raws]
        async with acquired(self._pool, self._timeout_s) as connection:
            found = await connection.fetch(
                self._sql["standings"],
                [tenant for tenant, _, _ in asked],
                [user for _, user, _ in asked],
                [one for one, _ in ids],
                [at for _, at in ids],
            )
        return [NOWHERE if record["epoch"] is None else Standing(*record) for record in found]

    async def counted(self, tenant: str, user: str, now_ms: int) -> tuple[Head, int, int | None]:
        """(head, unread rows that have expired, when the next one will)."""
        if "\0" in tenant or "\0" in user:
            return NO_STREAM, 0, None
        async with acquired(self._pool, self._timeout_s) as connection:
            record = await connection.fetchrow(self._sql["counted"], tenant, user, now_ms / 1000)
        if record is None:
            return NO_STREAM, 0, None
        stream_id, epoch, seq, rev, pruned_rev, unread, expired, next_ms = record
        return Head(stream_id, epoch, seq, rev, pruned_rev, max(0, unread - expired)), expired, next_ms

    async def head(self, tenant: str, user: str, now_ms: int) -> Head:
        """Where the stream stands; NO_STREAM if nothing happened to the user yet."""
        if "\0" in tenant or "\0" in user:
            return NO_STREAM
        async with acquired(self._pool, self._timeout_s) as connection:
            record = await connection.fetchrow(self._sql["head"], tenant, user, now_ms / 1000)
        return NO_STREAM if record is None else Head(*record)

    async def unread_count(self, tenant: str, user: str, now_ms: int) -> tuple[int, int]:
        """(count, rev): what is unread and not archived, dismissed, retracted or expired, true for `rev`."""
        head = await self.head(tenant, user, now_ms)
        return head.unread, head.rev

    async def sync(
        self,
        tenant: str,
        user: str,
        now_ms: int,
        *,
        epoch: str | None,
        since: int,
        rev: int | None,
        limit: int,
    ) -> SyncPage:
        """Everything after a position, in order: notifications, then changes of older ones.

        Args:
            epoch: the client's; None is not compared (a first call).
            since: the last seq the client has.
            rev: the last rev it has; None: changes are not asked for.
            limit: notifications, and changed rows, of one page.

        All reads see one snapshot. A page that is cut keeps `rev` where it is until every notification was
        given, so that a change between two calls is never skipped.
        """
        if "\0" in tenant or "\0" in user:
            return SyncPage(since == 0, [], [], 0, 0, False, NO_STREAM)
        async with (
            acquired(self._pool, self._timeout_s) as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            record = await connection.fetchrow(self._sql["head"], tenant, user, now_ms / 1000)
            head = NO_STREAM if record is None else Head(*record)
            lost = (
                (epoch is not None and epoch != head.epoch and not (head is NO_STREAM and since == 0))
                or since > head.seq
                or (rev is not None and (rev > head.rev or rev < head.pruned_rev))
            )
            if lost:
                return SyncPage(False, [], [], head.seq, head.rev, False, head)
            if since < head.seq:
                found = await connection.fetch(self._sql["notifications_after"], head.stream_id, since, limit)
            else:
                found = []
            rows = [row_of(record) for record in found]
            # Seqs have no gaps: a hole, or rows missing at the end, were pruned.
            whole = all(row.seq == since + 1 + index for index, row in enumerate(rows))
            if not whole or (len(rows) < limit and since + len(rows) < head.seq):
                return SyncPage(False, [], [], head.seq, head.rev, False, head)
            shown = [row for row in rows if not gone(row, now_ms)]
            # The client may have read them from the feed, beyond its position.
            withdrawn = sorted((row for row in rows if row.retracted_ms is not None), key=lambda row: row.rev)
            if since + len(rows) < head.seq:
                return SyncPage(
                    True, shown, withdrawn, since + len(rows), head.rev if rev is None else rev, True, head
                )
            if rev is None or rev >= head.rev:
                return SyncPage(True, shown, withdrawn, head.seq, head.rev, False, head)
            changes, more = await self._changes(connection, head, rev, since, limit)
        reached = changes[-1].rev if more else head.rev
        if withdrawn:
            changes = sorted([*changes, *withdrawn], key=lambda row: (row.rev, row.seq))
        return SyncPage(True, shown, changes, head.seq, reached, more, head)

    async def _changes(
        self, connection: Any, head: Head, rev: int, since: int, limit: int
    ) -> tuple[list[NotificationRow], bool]:
        """Changed rows after `rev`, whole revs only (a read-all changes many rows under one), and whether
        there are more."""
        while True:
            found = await connection.fetch(self._sql["changes_after"], head.stream_id, rev, since, limit + 1)
            rows = [row_of(record) for record in found]
            if len(rows) <= limit:
                return rows, False
            last = rows[-1].rev
            whole = [row for row in rows if row.rev < last]
            if whole:
                return whole, True
            limit *= 8  # one rev fills the page: take all of it

    async def notification(self, tenant: str, notification_id: bytes) -> Found | None:
        """A notification of the tenant with its deliveries and their tries, or None."""
        if "\0" in tenant:
            return None
        async with acquired(self._pool, self._timeout_s) as connection:
            record = await connection.fetchrow(
                self._sql["notification"], uuid.UUID(bytes=notification_id), tenant
            )
            if record is None:
                return None
            tries = await connection.fetch(self._sql["deliveries"], uuid.UUID(bytes=notification_id))
            acts = await connection.fetch(self._sql["acts"], uuid.UUID(bytes=notification_id))
            events = await connection.fetch(
                self._sql["merged"], uuid.UUID(bytes=notification_id), MERGED_SHOWN
            )
            windows = []
            if events:  # else nothing was merged: the notification says what windows it began
                windows = await connection.fetch(self._sql["merge_windows"], uuid.UUID(bytes=notification_id))
        by_id: dict[int, dict[str, Any]] = {}
        for t in tries:
            delivery = by_id.setdefault(
                t["id"], {name: t[name] for name in ("channel", "state", "attempts", "reason", "due_ms",
                                                     "created_ms", "updated_ms", "chain", "step", "digest",
                                                     "carrier")}
                | {"tries": []}
            )  # fmt: skip
            if t["attempt"] is not None:
                names = (
                    "attempt", "device_id", "provider", "outcome", "provider_id", "status", "error",
                    "started_ms", "duration_ms",
                )  # fmt: skip
                delivery["tries"].append({name: t[name] for name in names})
        deliveries = list(by_id.values())
        if not deliveries and record["kept"] is not None:
            deliveries = history(record["kept"], record["created_ms"], record["delivered_ms"])
        return Found(
            row_of(record), record["user_id"], deliveries, record["decision"], record["receipt"],
            record["priority"], record["version"], record["cancelled_ms"], [Act(*act) for act in acts],
            _merge_log(notification_id, record, events, windows), record["created_ms"],
        )  # fmt: skip

    async def owner(self, tenant: str, notification_id: bytes) -> str | None:
        """Whose a notification of the tenant is; None: there is none."""
        if "\0" in tenant:
            return None
        async with acquired(self._pool, self._timeout_s) as connection:
            return await connection.fetchval(self._sql["owner"], uuid.UUID(bytes=notification_id), tenant)

    async def archived(self, tenant: str, notification_id: bytes) -> str | None:
        """The month ("2026-03") in whose archive a notification that is not here may be; None: in none."""
        if "\0" in tenant:
            return None
        async with acquired(self._pool, self._timeout_s) as connection:
            return await connection.fetchval(self._sql["archived"], tenant, uuid.UUID(bytes=notification_id))

    async def device(self, tenant: str, user: str, device: str) -> dict[str, Any] | None:
        """A push target by its columns (`registered_ms`, `disabled_ms` in ms), or None."""
        if "\0" in user or "\0" in device:
            return None
        async with acquired(self._pool, self._timeout_s) as connection:
            record = await connection.fetchrow(self._sql["device"], tenant, user, device)
        return None if record is None else dict(record)

    async def targets(self, tenant: str, user: str) -> list[Target]:
        """Where pushes of a user may go."""
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(self._sql["targets"], tenant, user)
        return [Target(row[0], row[1] or "", row[2]) for row in rows]

    async def preferences(self, tenant: str, user: str) -> tuple[dict[str, Any], int]:
        """The stored document and its version, ({}, 0) if there is none."""
        if "\0" in user:
            return {}, 0
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["preferences"], tenant, user)
        return ({}, 0) if row is None else (msgspec.json.decode(row["document"]), row["version"])

    async def ping(self) -> None:
        """Return if Postgres answers and the schema is there."""
        async with acquired(self._pool, self._timeout_s) as connection:
            await connection.fetchval(self._sql["ping"])


def row_of(record: asyncpg.Record) -> NotificationRow:
    """A NotificationRow of a record selected with `ROW_COLUMNS`."""
    return NotificationRow(
        record["id"].bytes,
        record["seq"],
        record["rev"],
        record["position"],
        record["content"],
        record["delivered_ms"],
        record["seen_ms"],
        record["read_ms"],
        record["clicked_ms"],
        record["dismissed_ms"],
        record["archived_ms"],
        record["retracted_ms"],
        record["updated_ms"],
        record["expires_ms"],
    )


def _merge_log(raw: bytes, record: Any, events: list[Any], windows: list[Any]) -> MergeLog | None:
    """What rows tell, and what the notification itself says of windows that have none."""
    text = record["merging"]
    if not events and text is None:
        return None
    told = [MergedEvent(e[0].bytes, *list(e)[1:7]) for e in events]
    known = [KnownWindow(*list(window)[1:]) for window in windows]
    if text is not None:
        opening = unpack(text)
        at_ms, source, told_ms = opening.at_ms, opening.source, opening.notified_ms
        if len(told) < MERGED_SHOWN and all(one.event != raw for one in told):
            told.append(MergedEvent(raw, at_ms, OPENED, opening.how, source, opening.actor, None))
        rows = {window["key"] for window in windows}
        for key, ends_ms in opening.found_by((record["merge_slot"], record["merge_slot_2"])):
            if key not in rows:
                known.append(KnownWindow(key.partition(":")[0], at_ms, ends_ms, source, 1, 1, told_ms))
        known.sort(key=lambda window: window.ends_ms)
    counts = (events[0]["merged"], events[0]["duplicates"]) if events else (0, 0)
    return MergeLog(*counts, told, known)
