"""Connections to PostgreSQL, and the one place where driver errors become ours."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping

import asyncpg

from carillon.errors import StoreUnavailableError
from carillon.settings import PostgresSettings

UNAVAILABLE: tuple[type[BaseException], ...] = (
    asyncpg.PostgresConnectionError,  # class 08
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.OperatorInterventionError,  # class 57: admin shutdown, crash shutdown, cannot connect now
    asyncpg.InsufficientResourcesError,  # class 53: disk full, too many connections
    asyncpg.TransactionRollbackError,  # class 40: deadlock, serialization failure
    ConnectionError,
    OSError,
    TimeoutError,
)
"""What means "try again later" and says nothing about the data."""


async def _keep(_: asyncpg.Connection) -> None:
    """Leave a released connection as it is: we set no session state, and the driver's default (RESET ALL and
    more) is one more round trip for every use of a pool."""


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn driver errors that mean "try again later" into StoreUnavailableError; let the others pass."""
    try:
        yield
    except UNAVAILABLE as exc:
        raise StoreUnavailableError(f"PostgreSQL does not answer: {type(exc).__name__}: {exc}") from exc


async def connect(dsn: str, settings: PostgresSettings | None = None) -> asyncpg.Connection:
    """One connection outside any pool. Raises StoreUnavailableError."""
    settings = settings or PostgresSettings()
    with translated():
        return await asyncpg.connect(dsn, timeout=settings.connect_timeout_s)  # type: ignore[arg-type]


async def open_pool(
    settings: PostgresSettings, size: int | None = None, server_settings: Mapping[str, str] | None = None
) -> asyncpg.Pool:
    """A pool of at most `size` connections (default: `settings.pool_size`), opened lazily but for one.

    Statements are prepared and cached by the driver per connection: behind a pooler use session mode.

    Args:
        server_settings: parameters of PostgreSQL for these connections.

    Raises:
        StoreUnavailableError: the server does not answer within `connect_timeout_s`.
    """
    with translated():
        pool = await asyncpg.create_pool(
            settings.dsn,
            min_size=1,
            max_size=size or settings.pool_size,
            timeout=settings.connect_timeout_s,
            command_timeout=settings.statement_timeout_s,
            max_inactive_connection_lifetime=0,
            reset=_keep,
            server_settings={
                "application_name": "carillon",
                "jit": "off",
                "timezone": "UTC",
                **(server_settings or {}),
            },
        )
        assert pool is not None
        return pool


@contextlib.asynccontextmanager
async def acquired(pool: asyncpg.Pool, timeout_s: float) -> AsyncIterator[asyncpg.Connection]:
    """A pooled connection with errors translated; `timeout_s` bounds the wait for a free one."""
    with translated():
        async with pool.acquire(timeout=timeout_s) as connection:
            yield connection  # type: ignore[misc]


class Store:
    """What reads and writes through a pool.

    Args:
        pool: not owned.
        acquire_timeout_s: longest wait for a free connection.

    All methods raise StoreUnavailableError while Postgres does not answer.
    """

    def __init__(self, pool: asyncpg.Pool, acquire_timeout_s: float = 5.0) -> None:
        self._pool = pool
        self._timeout_s = acquire_timeout_s
