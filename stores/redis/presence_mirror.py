"""Presence written to Redis for other systems to read. Carillon itself never reads it.

A key per user who is there, renewed before it lapses; the format is documented in
docs/how-to/show-presence.md and made by `carillon.presence`. Losing Redis costs the mirror and nothing else
(guarantee G12).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from carillon.settings import RedisSettings

log = logging.getLogger(__name__)


class PresenceMirror:
    """Writes keys of presence.

    Args:
        settings: where Redis is; the URL is not empty.
        ttl_s: life of a key.
    """

    def __init__(self, settings: RedisSettings, ttl_s: float) -> None:
        self._ttl_ms = max(1, round(ttl_s * 1000))
        self._away = False
        self._redis: Any = aioredis.Redis.from_url(
            settings.url,
            socket_timeout=settings.timeout_s,
            socket_connect_timeout=settings.timeout_s,
            max_connections=2,
            retry=Retry(NoBackoff(), 0),  # what is not written now is written with the next round
        )

    async def write(self, entries: Sequence[tuple[str, bytes]]) -> bool:
        """Set keys, in one round trip. False if Redis did not take them (some may be set all the same)."""
        try:
            pipeline = self._redis.pipeline(transaction=False)
            for key, value in entries:
                pipeline.set(key, value, px=self._ttl_ms)
            await pipeline.execute()
        except (RedisError, OSError, TimeoutError) as exc:
            if not self._away:
                log.warning("presence is not mirrored in Redis now: %s: %s", type(exc).__name__, exc)
            self._away = True
            return False
        if self._away:
            log.info("presence is mirrored in Redis again")
        self._away = False
        return True

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete keys; if Redis is away they lapse."""
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            await self._redis.delete(*keys)

    async def close(self) -> None:
        """Close connections."""
        await self._redis.aclose()
