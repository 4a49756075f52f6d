"""Topics in Postgres: who subscribes to what.

A subscription is a row and nothing else: no shard keeps it in memory, so that anybody may write it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from carillon.ids import slot_of
from stores.postgres.named import load_queries
from stores.postgres.pool import Store, acquired


class Subscriber(NamedTuple):
    """One subscriber of a topic."""

    slot: int
    user: str
    since_ms: int


class TopicStore(Store):
    """Reads and writes subscriptions."""

    _sql: Final = load_queries("topics")

    async def subscribe(self, tenant: str, topic: str, users: Sequence[str], now_ms: int) -> int:
        """Subscribe users, each once; returns how many were not subscribed yet."""
        slots = [slot_of(tenant, user) for user in users]
        async with acquired(self._pool, self._timeout_s) as connection:
            added: Any = await connection.fetchval(
                self._sql["subscribe"], tenant, topic, users, slots, now_ms / 1000
            )
        return added

    async def subscribe_oneself(self, tenant: str, topic: str, user: str, most: int, now_ms: int) -> bool:
        """Subscribe a user who asked for it; False if it has `most` topics already."""
        slot = slot_of(tenant, user)
        async with acquired(self._pool, self._timeout_s) as connection:
            done: Any = await connection.fetchval(
                self._sql["subscribe_oneself"], tenant, topic, user, slot, now_ms / 1000, most
            )
        return done >= 0

    async def unsubscribe(self, tenant: str, topic: str, user: str) -> bool:
        """End a subscription; False if there was none."""
        slot = slot_of(tenant, user)
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["unsubscribe"], tenant, topic, slot, user)
        return row is not None

    async def since(self, tenant: str, topic: str, user: str) -> int | None:
        """Since when (ms) a user subscribes to a topic; None: it does not."""
        slot = slot_of(tenant, user)
        async with acquired(self._pool, self._timeout_s) as connection:
            return await connection.fetchval(self._sql["subscriber"], tenant, topic, slot, user)

    async def page(self, tenant: str, topic: str, slot: int, user: str, limit: int) -> list[Subscriber]:
        """Subscribers behind (slot, user); from the start: behind (-1, "")."""
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(self._sql["subscribers"], tenant, topic, slot, user, limit)
        return [Subscriber(*row) for row in rows]

    async def topics_of(self, tenant: str, user: str, after: str, limit: int) -> list[tuple[str, int]]:
        """Topics of a user by name behind `after`, each with since when (ms)."""
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(self._sql["topics_of"], tenant, user, after, limit)
        return [(row["topic"], row["since_ms"]) for row in rows]
