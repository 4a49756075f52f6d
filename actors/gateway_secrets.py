"""Client secrets of tenants, cached: a storm of reconnects must not become a storm of queries."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from carillon.clock import Clock
from carillon.errors import BusyError, CarillonError, UnavailableError
from carillon.settings import PostgresSettings

log = logging.getLogger(__name__)

ReadSecret = Callable[[str], Awaitable[str | None]]
Told = Callable[[str | None, CarillonError | None], None]

MAX_ENTRIES: Final = 4096
"""Secrets kept, and (separately) names kept that are no tenant: the oldest goes. Both are small."""
MAX_READS: Final = 64
"""Different tenants asked for at once: made-up names must not queue up without end."""


class TenantSecrets:
    """A read-through cache.

    Args:
        read: gives a tenant's secret, None if there is no such tenant; raises CarillonError.
        ttl_s: how long an answer, also None, is trusted.

    One read per tenant runs at a time. While reads fail, what was known before stays valid: a database
    that restarts must not end the service of those who were welcome before.
    """

    def __init__(self, read: ReadSecret, ttl_s: float, clock: Clock) -> None:
        self._read = read
        self._ttl_s = ttl_s
        self._clock = clock
        self._known: dict[str, tuple[str, float]] = {}
        self._unknown: dict[str, float] = {}
        self._waiting: dict[str, list[Told]] = {}
        self._reads: set[asyncio.Task[None]] = set()

    def cached(self, tenant: str) -> tuple[bool, str | None]:
        """(True, secret or None) if the answer is fresh, else (False, None)."""
        now = self._clock.monotonic()
        known = self._known.get(tenant)
        if known is not None:
            return (True, known[0]) if known[1] > now else (False, None)
        return self._unknown.get(tenant, now) > now, None

    def fetch(self, tenant: str, told: Told) -> None:
        """Call `told(secret, error)` once the answer is there; from the event loop, possibly at once."""
        waiting = self._waiting.get(tenant)
        if waiting is not None:
            waiting.append(told)
        elif len(self._waiting) >= MAX_READS:
            told(None, BusyError("too many tenants are looked up at once"))
        else:
            self._waiting[tenant] = [told]
            task = asyncio.get_running_loop().create_task(self._look_up(tenant))
            self._reads.add(task)
            task.add_done_callback(self._reads.discard)

    async def _look_up(self, tenant: str) -> None:
        secret: str | None = None
        error: CarillonError | None = UnavailableError("the look-up was cancelled")
        try:
            secret = await self._read(tenant)
            error = None
            self._keep(tenant, secret)
        except CarillonError as exc:
            stale = self._known.get(tenant)
            secret, error = (None, exc) if stale is None else (stale[0], None)
        except Exception as exc:
            log.exception("reading the secret of a tenant failed")
            error = UnavailableError(f"{type(exc).__name__}: {exc}")
        finally:
            for told in self._waiting.pop(tenant):
                told(secret, error)

    def _keep(self, tenant: str, secret: str | None) -> None:
        until = self._clock.monotonic() + self._ttl_s
        self._known.pop(tenant, None)
        self._unknown.pop(tenant, None)
        kept: dict[str, Any] = self._known if secret is not None else self._unknown
        if len(kept) >= MAX_ENTRIES:
            del kept[next(iter(kept))]
        kept[tenant] = until if secret is None else (secret, until)

    async def close(self) -> None:
        """Give up reads that still run."""
        for task in self._reads:
            task.cancel()
        await asyncio.gather(*self._reads, return_exceptions=True)


class PostgresSecrets:
    """Reads secrets from Postgres over one connection, opened at the first read."""

    def __init__(self, settings: PostgresSettings) -> None:
        self._settings = settings
        self._pool: Any = None
        self._opening = asyncio.Lock()

    async def __call__(self, tenant: str) -> str | None:
        """See `TenantSecrets`. Raises StoreUnavailableError."""
        # Imported here: a gateway under test, or with other secrets, needs no database driver.
        from stores.postgres.pool import open_pool
        from stores.postgres.tenants import TenantStore

        async with self._opening:
            if self._pool is None:
                self._pool = await open_pool(self._settings, 1)
        record = await TenantStore(self._pool, self._settings.connect_timeout_s).tenant(tenant)
        return None if record is None else record.client_secret

    async def close(self) -> None:
        """Close the connection."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.terminate()
