"""Users as such in Postgres: their profiles, and their erasure.

An erasure is one transaction after which nothing is found under the user's name and no stream is the user's.
The rows that hung on the stream have no owner then and are deleted in pieces; that they are still there is
noted, so that whoever owns the slot goes on where a shard was interrupted.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from carillon.errors import FencedError, UnavailableError
from carillon.profiles import Profile
from stores.postgres.named import load_queries
from stores.postgres.pool import Store, acquired

_TRIES: Final = 10


class _NamedMeanwhileError(Exception):
    """Between the lock of the lists and that of the stream the user came into another list."""


@dataclass(slots=True)
class KnownUser:
    """A user who is known, with or without a profile."""

    profile: Profile
    created_ms: int
    updated_ms: int | None
    """None: no profile was ever put."""
    last_seen_ms: int | None


@dataclass(frozen=True, slots=True)
class Erasure:
    """One that is under way."""

    id: int
    stream_id: int | None


class UserStore(Store):
    """Profiles and erasures.

    All methods raise StoreUnavailableError while Postgres does not answer; those that take a term raise
    FencedError once it is over: nothing was written then.
    """

    _sql: Final = load_queries("users")

    async def profile(self, tenant: str, user: str) -> KnownUser | None:
        """What is known of a user; None: nothing."""
        if "\0" in user:
            return None
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["profile"], tenant, user)
        if row is None:
            return None
        profile = Profile(
            row["email"], row["phone"], row["locale"], row["timezone"], row["attributes"] or "{}"
        )
        return KnownUser(profile, row["created_ms"], row["updated_ms"], row["last_seen_ms"])

    async def put_profile(
        self, shard: str, term: int, tenant: str, user: str, slot: int, profile: Profile, now_ms: int
    ) -> None:
        """Replace a user's profile."""
        async with acquired(self._pool, self._timeout_s) as connection:
            fenced = await connection.fetchval(
                self._sql["put_profile"], shard, term, tenant, user, slot, profile.email, profile.phone,
                profile.locale, profile.timezone, profile.attributes, now_ms / 1000,
            )  # fmt: skip
        if not fenced:
            raise FencedError(f"term {term} of {shard} is over")

    # -- erasure ---------------------------------------------------------------------------------------

    async def erase(
        self, shard: str, term: int, tenant: str, user: str, slot: int, now_ms: int, since_ms: int
    ) -> list[Erasure] | None:
        """Take the user's name off everything.

        Args:
            since_ms: an erasure begun since then counts as this one (a request that was told again).

        Returns:
            What is still to be purged, of this erasure and of those before; None: nothing was kept of the
            user, nor erased since `since_ms`.

        Atomicity: after the commit nothing is found under the user's name; whoever loads the user makes a new
        stream with a new epoch.

        Ordering: what names the user in a list is locked before the user's stream, as a chunk of a broadcast
        does; what came to name the user between the two has the erasure begin again.

        Raises:
            UnavailableError: that happened each of `_TRIES` times.
        """
        for _ in range(_TRIES):
            try:
                async with self._fenced(shard, term) as connection:
                    return await self._erase(connection, tenant, user, slot, now_ms, since_ms)
            except _NamedMeanwhileError:
                continue
        raise UnavailableError("the user is named in new broadcasts or schedules all the time")

    async def _erase(
        self, connection: Any, tenant: str, user: str, slot: int, now_ms: int, since_ms: int
    ) -> list[Erasure] | None:
        lists = await connection.fetchrow(self._sql["lock_lists"], tenant, user)
        stream = await connection.fetchval(self._sql["lock_stream"], tenant, user)
        if await connection.fetchval(self._sql["missed_lists"], tenant, user, *lists):
            raise _NamedMeanwhileError
        await connection.execute(self._sql["erase"], tenant, user, slot, stream, now_ms / 1000, *lists)
        rows = await connection.fetch(self._sql["erasures_of"], tenant, user, since_ms / 1000)
        if not rows:
            return None
        return [Erasure(row["erasure_id"], row["stream_id"]) for row in rows if row["open"]]

    async def open_erasures(self, slots: Sequence[int], limit: int) -> list[Erasure]:
        """Erasures of these slots that are not done."""
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(self._sql["open_erasures"], slots, limit)
        return [Erasure(*row) for row in rows]

    async def purge_keys(self, shard: str, term: int, erasure: Erasure, since_ms: int) -> None:
        """Delete the idempotency keys of an erasure; before its notifications."""
        if erasure.stream_id is not None:
            async with self._fenced(shard, term) as connection:
                await connection.execute(self._sql["purge_keys"], erasure.stream_id, since_ms / 1000)

    async def purge(self, shard: str, term: int, erasure: Erasure, limit: int) -> int:
        """Delete some notifications of an erasure, with their deliveries; returns how many."""
        if erasure.stream_id is None:
            return 0
        async with self._fenced(shard, term) as connection:
            return await connection.fetchval(self._sql["purge"], erasure.stream_id, limit)

    async def finish(self, shard: str, term: int, erasure: Erasure, now_ms: int) -> None:
        """Delete the rest, and note that nothing is left."""
        async with self._fenced(shard, term) as connection:
            await connection.execute(self._sql["finish"], erasure.id, erasure.stream_id, now_ms / 1000)

    async def prune(self, before_ms: int) -> None:
        """Forget some of the erasures that were done before a time."""
        async with acquired(self._pool, self._timeout_s) as connection:
            await connection.execute(self._sql["prune_erasures"], before_ms / 1000)

    @contextlib.asynccontextmanager
    async def _fenced(self, shard: str, term: int) -> AsyncIterator[Any]:
        async with acquired(self._pool, self._timeout_s) as connection, connection.transaction():
            if await connection.fetchval(self._sql["fence"], shard, term) is None:
                raise FencedError(f"term {term} of {shard} is over")
            yield connection
