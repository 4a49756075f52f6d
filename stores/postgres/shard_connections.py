"""The connections of a shard's store: the writer's own, and those for everything else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

import asyncpg

from carillon.errors import FencedError
from carillon.settings import PostgresSettings
from stores.postgres.pool import UNAVAILABLE, acquired, open_pool, translated
from stores.postgres.shard_rows import KeysTakenError, StreamsErasedError, with_rows

PLANS: Final = {
    # Planning the group commit anew costs more than running it for one event.
    "plan_cache_mode": "force_generic_plan",
    # A plan kept from when the tables were empty must not scan them when they are large.
    "enable_seqscan": "off",
}
"""Every statement of a shard finds its rows by an index, whatever their number."""


class ShardConnections:
    """What every part of `ShardStore` works with: connections, statements, and the fence.

    Args:
        settings: connection settings; `shard_pool_size` connections are opened as needed.
        shard: name of the shard, its row in `shards`.
    """

    def __init__(self, settings: PostgresSettings, shard: str) -> None:
        self._settings = settings
        self._shard = shard
        self._pool: asyncpg.Pool | None = None
        self._writer: asyncpg.Connection | None = None
        self._sql = with_rows("shard")

    async def open(self) -> None:
        """Open the pool."""
        if self._pool is None:
            self._pool = await open_pool(
                self._settings, self._settings.shard_pool_size, server_settings=PLANS
            )

    @property
    def shard(self) -> str:
        """The name of the shard."""
        return self._shard

    @property
    def pool(self) -> asyncpg.Pool:
        """The connections that the writer does not use; `open` comes first."""
        assert self._pool is not None, "open() first"
        return self._pool

    async def close(self) -> None:
        """Close all connections."""
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        writer, self._writer = self._writer, None
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                if writer is not None:
                    await pool.release(writer)
                await pool.close()
        except (asyncpg.PostgresError, *UNAVAILABLE):
            pool.terminate()

    async def _write_connection(self) -> asyncpg.Connection:
        """The writer's own connection, kept out of the pool: appends never wait for reads."""
        if self._writer is not None:
            try:
                lost = self._writer.is_closed()
            except asyncpg.InterfaceError:
                lost = True  # the pool took it back when the server ended it while nobody used it
            if lost:
                self._writer = None
        if self._writer is None:
            self._writer = await self.pool.acquire(timeout=self._settings.connect_timeout_s)  # type: ignore[assignment]
        assert self._writer is not None
        return self._writer

    @contextlib.asynccontextmanager
    async def _writing(self) -> AsyncIterator[asyncpg.Connection]:
        """The writer's connection, for one statement or transaction after the other."""
        with translated():
            connection = await self._write_connection()
            try:
                yield connection
            except (
                asyncpg.DataError, asyncpg.IntegrityConstraintViolationError,
                KeysTakenError, StreamsErasedError,
            ):  # fmt: skip
                raise  # rolled back in good order
            except BaseException:
                # Unknown state (cancelled, timed out, lost): a fresh connection next time.
                self._writer = None
                with contextlib.suppress(Exception):
                    connection.terminate()
                    await self.pool.release(connection)
                raise

    def _reading(self) -> AbstractAsyncContextManager[asyncpg.Connection]:
        """A connection of the pool, for one statement after the other."""
        return acquired(self.pool, self._settings.connect_timeout_s)

    @contextlib.asynccontextmanager
    async def _fenced(self, term: int) -> AsyncIterator[asyncpg.Connection]:
        """A transaction on a connection of the pool, in which the term cannot end."""
        async with self._reading() as connection, connection.transaction():
            await self._fence(connection, term)
            yield connection

    async def _fence(self, connection: asyncpg.Connection, term: int) -> None:
        self._check(await connection.fetchval(self._sql["fence"], self._shard, term), term)

    def _check(self, fenced: object, term: int) -> None:
        """Raises FencedError if a statement answered nothing, as it does once the term is over."""
        if not fenced:
            raise FencedError(f"term {term} of {self._shard} is over")

    async def _pool_rows(self, name: str, *args: Any) -> list[Any]:
        async with self._reading() as connection:
            return await connection.fetch(self._sql[name], *args)

    async def _pool_row(self, name: str, *args: Any) -> Any:
        async with self._reading() as connection:
            return await connection.fetchrow(self._sql[name], *args)

    async def _pool_execute(self, name: str, *args: Any) -> None:
        async with self._reading() as connection:
            await connection.execute(self._sql[name], *args)
