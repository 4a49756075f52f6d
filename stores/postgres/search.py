"""Full-text search in a user's feed.

Most users have few notifications: those are looked through, newest first, by the index of the feed. Only
where that is not enough, in a long feed with few matches, are words indexed (`search_documents`), once, by
the search that needs them; later searches add what came since. Nothing of it happens when an event is stored.
"""

from __future__ import annotations

import asyncio
import re
import unicodedata
from typing import Final

import asyncpg

from carillon.clock import Clock
from carillon.errors import InvalidInputError, UnavailableError
from carillon.notification import NotificationRow
from carillon.settings import IngressSettings
from stores.postgres.feed import (
    EVERYTHING,
    ROW_COLUMNS,
    TOP,
    FeedFilter,
    decode_cursor,
    encode_cursor,
    row_of,
)
from stores.postgres.named import load_queries
from stores.postgres.pool import acquired

MAX_CHARS: Final = 255
MAX_WORDS: Final = 32
_ALONE: Final = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Characters that are words (`search_text` in Postgres has the same)."""
_WORD: Final = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")


def check_query(q: str) -> None:
    """Refuse what cannot be searched for.

    Raises:
        InvalidInputError: it is too long, or holds no word, too many, or NUL.
    """
    words = len(_WORD.findall(unicodedata.normalize("NFKC", q)))
    if len(q) > MAX_CHARS:
        expected, got = f"at most {MAX_CHARS} characters", f"{len(q)} characters"
    elif "\0" in q:
        expected, got = "text without NUL", "NUL"
    elif not words:
        expected, got = "at least one letter or digit", q[:40]
    elif words > MAX_WORDS:
        expected, got = f"at most {MAX_WORDS} words", f"{words} words"
    else:
        return
    raise InvalidInputError(f"expected q to be {expected}, got {got!r}", "q", expected, got)


def search_queries() -> dict[str, str]:
    """The statements of a search, put together from their parts."""
    raw = load_queries("search")
    return {
        name: raw[name]
        .replace("%(row)s", ROW_COLUMNS)
        .replace("%(wanted)s", raw["wanted"])
        .replace("%(matches)s", raw["matches"])
        for name in ("place", "walk", "search", "fill")
    }


class SearchReader:
    """Searches.

    Args:
        pool: of `stores.postgres.pool.open_pool`; not owned.
        acquire_timeout_s: longest wait for a free connection.

    All methods raise StoreUnavailableError while Postgres does not answer.
    """

    def __init__(
        self, pool: asyncpg.Pool, settings: IngressSettings, clock: Clock, acquire_timeout_s: float = 5.0
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._timeout_s = acquire_timeout_s
        self._walk = settings.search_walk
        self._batch = settings.search_fill_batch
        self._fills = asyncio.Semaphore(settings.search_fills)
        self._sql = search_queries()

    async def page(
        self,
        tenant: str,
        user: str,
        q: str,
        now_ms: int,
        deadline: float,
        *,
        limit: int,
        cursor: str | None = None,
        chosen: FeedFilter = EVERYTHING,
    ) -> tuple[list[NotificationRow], str | None]:
        """Notifications in whose title or body every word of `q` begins a word, newest first, and the cursor
        of the next page (None: this is the last).

        Args:
            deadline: monotonic time; the index of a long feed that is not whole by then is left as it is.

        Raises:
            InvalidInputError: the cursor is none of ours, or `q` cannot be searched for.
            UnavailableError: the index is not whole yet; the next try goes on where this one ended.
        """
        check_query(q)
        below = TOP if cursor is None else decode_cursor(cursor)
        if any("\0" in text for text in (tenant, user, chosen.type, chosen.category) if text):
            return [], None
        async with acquired(self._pool, self._timeout_s) as connection:
            place = await connection.fetchrow(self._sql["place"], tenant, user)
            if place is None:
                return [], None
            stream, seq, indexed = place
            arguments = (
                stream, q, below, now_ms / 1000, limit + 1, chosen.type, chosen.category, chosen.status,
            )  # fmt: skip
            found = await connection.fetch(self._sql["walk"], *arguments, self._walk)
        if len(found) <= limit and seq > self._walk:
            if seq - indexed > self._walk:
                indexed = await self._fill(stream, seq, indexed, deadline)
            async with acquired(self._pool, self._timeout_s) as connection:
                found = await connection.fetch(self._sql["search"], *arguments, indexed)
        rows = [row_of(record) for record in found[:limit]]
        return rows, encode_cursor(rows[-1].position) if len(found) > limit else None

    async def _fill(self, stream: int, upto: int, indexed: int, deadline: float) -> int:
        """Index the words of a stream up to a seq, in small transactions; the seq reached."""
        try:
            async with asyncio.timeout(deadline - self._clock.monotonic()), self._fills:
                while indexed < upto:
                    async with acquired(self._pool, self._timeout_s) as connection:
                        reached = await connection.fetchval(self._sql["fill"], stream, indexed, self._batch)
                    if reached is None:
                        break
                    indexed = reached
        except TimeoutError:
            raise UnavailableError("the words of a long feed are being indexed: ask again", 1.0) from None
        return indexed
