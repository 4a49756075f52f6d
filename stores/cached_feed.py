"""The feed as the ingress reads it: from Redis where that is as good as Postgres, else from Postgres.

An entry is written by whoever read the page from Postgres, after the answer: users who never read cost
nothing, and nothing is read for the cache alone. It is shown only after Postgres was asked where the stream
stands; many requests share that question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from carillon.hot_feed import (
    NOWHERE,
    HotFeed,
    Standing,
    count_of,
    extended,
    hot_count,
    hot_row,
    page_of,
    unsure,
)
from carillon.metrics import Stats
from carillon.notification import notification_json, user_json_of
from stores.gather import Gather
from stores.postgres.feed import EVERYTHING, TOP, FeedFilter, FeedReader, decode_cursor, encode_cursor
from stores.redis.hot_feed import HotFeedStore

_READ: Final = {None: None, "read": True, "unread": False}


class FeedPage(NamedTuple):
    """A page, ready to be sent."""

    notifications: list[str]
    """JSON of each, newest first."""
    cursor: str | None
    """Of the next page; None: this is the last."""


class CachedFeed:
    """Feeds and counts of users.

    All methods raise StoreUnavailableError while Postgres does not answer.
    """

    def __init__(self, reader: FeedReader, hot: HotFeedStore, stats: Stats) -> None:
        self._reader = reader
        self._hot = hot
        self._stats = stats
        self._standings: Gather[tuple[str, str, Sequence[bytes]], Standing] = Gather(reader.standings)

    async def close(self) -> None:
        """Stop. The reader is not owned, the store of entries is."""
        await self._standings.close()
        await self._hot.close()

    async def standing(self, tenant: str, user: str, unsure_of: Sequence[bytes] = ()) -> Standing:
        """Where the stream stands, asked together with others who want to know it of theirs."""
        if "\0" in tenant or "\0" in user:
            return NOWHERE
        return await self._standings.get((tenant, user, unsure_of))

    async def page(
        self,
        tenant: str,
        user: str,
        now_ms: int,
        *,
        limit: int,
        cursor: str | None = None,
        chosen: FeedFilter = EVERYTHING,
    ) -> FeedPage:
        """One page, newest first (see `FeedReader.page`).

        Raises:
            InvalidInputError: the cursor is none of ours.
        """
        below = None if cursor is None else decode_cursor(cursor)
        cacheable = chosen.type is None and chosen.category is None and chosen.status in _READ
        entry: HotFeed | None = None
        if cacheable and self._hot.available():
            entry = await self._hot.feed(tenant, user)
            if entry is not None:
                page = await self._shown(tenant, user, entry, below, limit, chosen, now_ms)
                if page is not None:
                    self._stats.count('feed_reads{from="redis"}')
                    return page
        self._stats.count('feed_reads{from="postgres"}')
        read = await self._reader.page_at(tenant, user, now_ms, limit=limit, below=below, chosen=chosen)
        user_json = user_json_of(user)
        if cacheable and chosen.status is None and read.rows:
            rows = [hot_row(row, user_json) for row in read.rows]
            items = [row.json for row in rows]
            if read.follower is not None:
                rows.append(hot_row(read.follower, user_json))
            grown = extended(entry, read.epoch, read.rev, below, rows, read.follower is None)
            if grown is not None:
                self._hot.put_feed_nowait(tenant, user, grown)
        else:
            items = [notification_json(row, user_json) for row in read.rows]
        return FeedPage(items, encode_cursor(read.rows[-1].position) if read.follower is not None else None)

    async def _shown(
        self,
        tenant: str,
        user: str,
        entry: HotFeed,
        below: int | None,
        limit: int,
        chosen: FeedFilter,
        now_ms: int,
    ) -> FeedPage | None:
        """The page of an entry that still is the truth."""
        found = page_of(entry, TOP if below is None else below, limit, _READ[chosen.status], now_ms)
        if found is None:
            return None
        rows, more = found
        standing = await self.standing(tenant, user, unsure(rows))
        if (standing.epoch, standing.rev) != (entry.epoch, entry.rev) or standing.acknowledged:
            self._stats.count("feed_stale")
            return None
        return FeedPage([row.json for row in rows], encode_cursor(rows[-1].position) if more else None)

    async def unread_count(self, tenant: str, user: str, now_ms: int) -> tuple[int, int]:
        """(count, rev): what is unread and not archived, dismissed, retracted or expired, true for `rev`."""
        if self._hot.available():
            entry = await self._hot.count(tenant, user)
            if entry is not None:
                standing = await self.standing(tenant, user)
                count = count_of(entry, standing, now_ms)
                if count is not None:
                    self._stats.count('count_reads{from="redis"}')
                    return count, standing.rev
        self._stats.count('count_reads{from="postgres"}')
        head, expired, until_ms = await self._reader.counted(tenant, user, now_ms)
        if head.rev:
            self._hot.put_count_nowait(tenant, user, hot_count(head.epoch, head.rev, expired, until_ms))
        return head.unread, head.rev
