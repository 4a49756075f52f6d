"""Hot feeds and counters in Redis: read many at a time, written beside the answer, never waited for twice.

Whether an entry may be shown is not decided here (carillon/hot_feed.py). Every trouble with Redis is a miss:
after one, Redis is left alone for a moment, so that its loss costs one wait and no error (guarantee G12).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any, Final

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from carillon.clock import Clock
from carillon.hot_feed import HotCount, HotFeed, decode_count, decode_feed, encode
from carillon.settings import RedisSettings
from stores.gather import Gather

log = logging.getLogger(__name__)

MAX_WRITES: Final = 256
"""Entries that wait to be written; further ones are dropped: they will be read, and written, again."""
_WRITES_AT_ONCE: Final = 32
MAX_PAUSE_S: Final = 30.0
"""Longest time for which Redis is left alone after trouble."""
MAX_WRITTEN: Final = 10_000
"""Entries of which a replica remembers that it wrote them; the oldest goes."""


class HotFeedStore:
    """Entries by user.

    Args:
        settings: where Redis is; without a URL, or with `feed_ttl_s` 0, every look is a miss.
    """

    def __init__(self, settings: RedisSettings, clock: Clock) -> None:
        self._clock = clock
        self._ttl_ms = round(settings.feed_ttl_s * 1000)
        self._max_bytes = settings.feed_max_bytes
        self._timeout_s = settings.timeout_s
        self._retry_at = 0.0
        self._pause_s = 0.0
        self._writes: dict[str, bytes] = {}
        self._written: dict[str, tuple[int, float]] = {}
        self._writer: asyncio.Task[None] | None = None
        self._reads: Gather[str, bytes | None] = Gather(self._read)
        self._redis: Any = None
        if settings.url and self._ttl_ms:
            self._redis = aioredis.Redis.from_url(
                settings.url,
                socket_timeout=settings.timeout_s,
                socket_connect_timeout=settings.timeout_s,
                max_connections=4,
                retry=Retry(NoBackoff(), 0),  # a second try is a second wait: Postgres answers sooner
            )

    def available(self) -> bool:
        """False while entries are neither read nor written."""
        return self._redis is not None and self._clock.monotonic() >= self._retry_at

    async def feed(self, tenant: str, user: str) -> HotFeed | None:
        """The user's feed as it was written, whatever its age. Never raises."""
        return decode_feed(await self._reads.get(_key("feed", tenant, user))) if self.available() else None

    async def count(self, tenant: str, user: str) -> HotCount | None:
        """The user's counters as they were written, whatever their age. Never raises."""
        return decode_count(await self._reads.get(_key("count", tenant, user))) if self.available() else None

    def put_feed_nowait(self, tenant: str, user: str, entry: HotFeed, *, missed: bool) -> None:
        """Write the entry soon, if Redis is there and it is not too large.

        Args:
            missed: Redis does not have it; False: nobody asked, and what this replica wrote lately is not
                written again.
        """
        self._put_nowait(_key("feed", tenant, user), encode(entry), missed)

    def put_count_nowait(self, tenant: str, user: str, entry: HotCount, *, missed: bool) -> None:
        """The same for the counters."""
        self._put_nowait(_key("count", tenant, user), encode(entry), missed)

    async def forget(self, tenant: str, user: str) -> None:
        """Delete the user's entries; if Redis is away they lapse. Never raises."""
        keys = [_key("feed", tenant, user), _key("count", tenant, user)]
        for key in keys:
            self._writes.pop(key, None)
            self._written.pop(key, None)
        if self.available():
            await self._tried(self._redis.delete(*keys))

    async def close(self) -> None:
        """Close connections; what was not written is dropped."""
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        await self._reads.close()
        if self._redis is not None:
            await self._redis.aclose()

    async def _read(self, keys: list[str]) -> list[bytes | None]:
        found = await self._tried(self._redis.mget(keys))
        return found if found is not None else [None] * len(keys)

    def _put_nowait(self, key: str, data: bytes, missed: bool) -> None:
        if not self.available() or len(data) > self._max_bytes or len(self._writes) >= MAX_WRITES:
            return
        now, mark = self._clock.monotonic(), hash(data)
        if (
            not missed
            and (known := self._written.get(key)) is not None
            and known[0] == mark
            and known[1] > now
        ):
            return
        while len(self._written) >= MAX_WRITTEN:
            del self._written[next(iter(self._written))]
        self._written[key] = (mark, now + self._ttl_ms / 2000)
        self._writes[key] = data
        if self._writer is None:
            self._writer = asyncio.ensure_future(self._write())

    async def _write(self) -> None:
        try:
            while self._writes:
                keys = list(self._writes)[:_WRITES_AT_ONCE]
                pipe = self._redis.pipeline(transaction=False)
                for key in keys:
                    pipe.set(key, self._writes.pop(key), px=self._ttl_ms)
                if await self._tried(pipe.execute()) is None:
                    self._writes.clear()
        finally:
            self._writer = None

    async def _tried(self, command: Awaitable[Any]) -> Any:
        """The answer of Redis, or None: then nobody asks for a while, twice as long each time."""
        if self._pause_s:  # this one finds out whether it is back; the others do not wait with it
            self._retry_at = self._clock.monotonic() + self._timeout_s + self._pause_s
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await command
        except (RedisError, OSError, TimeoutError) as exc:
            if not self._pause_s:
                log.warning("feeds are read from PostgreSQL alone: %s: %s", type(exc).__name__, exc)
            self._pause_s = min(MAX_PAUSE_S, 2 * max(self._timeout_s, self._pause_s))
            self._retry_at = self._clock.monotonic() + self._pause_s
            self._written.clear()
            return None
        if self._pause_s:
            log.info("feeds are read through Redis again")
        self._pause_s = self._retry_at = 0.0
        return answer


def _key(kind: str, tenant: str, user: str) -> str:
    # The length keeps two pairs of names from making one key.
    return f"carillon:{kind}:{len(tenant)}:{tenant}:{user}"
