"""Audiences in Postgres: page by page, slot by slot, in the order of the user ids.

Whoever walks an audience keeps (slot, last user) and goes on there after a crash: what joins behind that
point is met, what left is not, and nobody is met twice.
"""

from __future__ import annotations

from typing import Any, Final

from carillon.audience import ALL, KINDS, SEGMENT, Audience
from carillon.errors import NotFoundError
from stores.postgres.named import load_queries
from stores.postgres.pool import Store, acquired


def audience_queries(*, counts: bool = False) -> dict[str, str]:
    """The queries as they are sent, by kind of audience; with `counts` those that count."""
    queries = load_queries("audience")
    return {
        name: text.replace("%(reachable)s", queries["reachable"]).replace("%(document)s", queries["document"])
        for name, text in queries.items()
        if (name == "segment_count" if counts else name in KINDS)
    }


class AudienceReader(Store):
    """Pages through audiences."""

    _sql: Final = audience_queries()
    _segment_sql: Final = load_queries("segments")["get"]

    async def page(
        self, tenant: str, audience: Audience, slot: int, after_user: str, limit: int
    ) -> list[str]:
        """Users of an audience in one slot, in order.

        Args:
            after_user: the last user of the page before; empty: from the start.
            limit: of users; fewer than that means that the slot has no more.

        Raises:
            NotFoundError: there is no such segment. (A topic that nobody subscribed to is an empty one.)
        """
        platforms = list(audience.platforms) or None
        more: tuple[Any, ...] = () if audience.kind == ALL else (audience.name,)
        sql = self._sql[audience.kind]
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(sql, tenant, slot, after_user, limit, platforms, *more)
            if not rows and audience.kind == SEGMENT:
                known = await connection.fetchrow(self._segment_sql, tenant, audience.name)
                if known is None:
                    wanted = "the id of a segment"
                    raise NotFoundError("there is no such segment", "segment", wanted, audience.name)
        return [row[0] for row in rows]
