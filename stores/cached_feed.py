"""The feed as the ingress reads it: from Redis where that is as good as Postgres, else from Postgres.

An entry is written by whoever read the page from Postgres, after the answer: users who never read cost
nothing, and nothing is read for the cache alone. It is shown only after Postgres was asked where the stream
stands; many requests share that question. A request that is alone shares nothing, and Postgres answers it
sooner than Redis and Postgres together: Redis is asked from `redis.feed_from_reads` reads at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

from carillon.hot_feed import (
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
from carillon.settings import RedisSettings
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

    def __init__(self, reader: FeedReader, hot: HotFeedStore, stats: Stats, settings: RedisSettings) -> None:
        self._reader = reader
        self._hot = hot
        self._stats = stats
        self._from_reads = settings.feed_from_reads
        self._reading = 0
        self._standings: Gather[tuple[str, str, Sequence[bytes]], Standing] = Gather(reader.standings)

    async def forget(self, tenant: str, user: str) -> None:
        """Delete what Redis keeps of a user. Never raises."""
        await self._hot.forget(tenant, user)

    async def close(self) -> None:
        """Stop. The reader is not owned, the store of entries is."""
        await self._standings.close()
        await self._hot.close()

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
        self._reading += 1
        try:
            return await self._page(tenant, user, now_ms, limit, below, chosen)
        finally:
            self._reading -= 1

    def _asks_redis(self, user: str) -> bool:
        return self._reading >= self._from_reads and self._hot.available() and "\0" not in user

    async def _page(
        self, tenant: str, user: str, now_ms: int, limit: int, below: int | None, chosen: FeedFilter
    ) -> FeedPage:
        cacheable = chosen.type is None and chosen.category is None and chosen.status in _READ
        entry: HotFeed | None = None
        asks = cacheable and self._asks_redis(user)
        if asks:
            # Asked in the same moment: one wait, not two. It is younger than the request: that suffices.
            standing = self._standings.ask_nowait((tenant, user, ()))
            try:
                entry = await self._hot.feed(tenant, user)
                if entry is not None:
                    page = await self._shown(tenant, user, entry, standing, below, limit, chosen, now_ms)
                    if page is not None:
                        self._stats.count('feed_reads{from="redis"}')
                        return page
            finally:
                standing.cancel()
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
                self._hot.put_feed_nowait(tenant, user, grown, missed=asks)
        else:
            items = [notification_json(row, user_json) for row in read.rows]
        return FeedPage(items, encode_cursor(read.rows[-1].position) if read.follower is not None else None)

    async def _shown(
        self,
        tenant: str,
        user: str,
        entry: HotFeed,
        asked: asyncio.Future[Standing],
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
        ids = unsure(rows)
        standing = await (self._standings.get((tenant, user, ids)) if ids else asked)
        if (standing.epoch, standing.rev) != (entry.epoch, entry.rev) or standing.acknowledged:
            self._stats.count("feed_stale")
            return None
        return FeedPage([row.json for row in rows], encode_cursor(rows[-1].position) if more else None)

    async def unread_count(self, tenant: str, user: str, now_ms: int) -> tuple[int, int]:
        """(count, rev): what is unread and not archived, dismissed, retracted or expired, true for `rev`."""
        self._reading += 1
        try:
            return await self._unread_count(tenant, user, now_ms)
        finally:
            self._reading -= 1

    async def _unread_count(self, tenant: str, user: str, now_ms: int) -> tuple[int, int]:
        asks = self._asks_redis(user)
        if asks:
            asked = self._standings.ask_nowait((tenant, user, ()))
            try:
                entry = await self._hot.count(tenant, user)
                if entry is not None:
                    standing = await asked
                    count = count_of(entry, standing, now_ms)
                    if count is not None:
                        self._stats.count('count_reads{from="redis"}')
                        return count, standing.rev
            finally:
                asked.cancel()
        self._stats.count('count_reads{from="postgres"}')
        head, expired, until_ms = await self._reader.counted(tenant, user, now_ms)
        if head.rev:
            entry = hot_count(head.epoch, head.rev, expired, until_ms)
            self._hot.put_count_nowait(tenant, user, entry, missed=asks)
        return head.unread, head.rev
