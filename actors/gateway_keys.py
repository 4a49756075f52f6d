"""Token keys of tenants, cached: a storm of reconnects must not become a storm of queries."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from carillon.clock import Clock
from carillon.errors import BusyError, CarillonError, UnavailableError
from carillon.settings import Settings
from carillon.token_keys import TokenKeys
from carillon.tokens import ClientIdentity

log = logging.getLogger(__name__)

Told = Callable[[TokenKeys | None, CarillonError | None], None]


class ReadKeys(Protocol):
    """Gives a tenant's keys, None if there is no such tenant; raises CarillonError.

    With `refresh` published keys are read anew, as far as their source allows that.
    """

    def __call__(self, tenant: str, /, *, refresh: bool = False) -> Awaitable[TokenKeys | None]:
        """See the class."""
        ...


MAX_ENTRIES: Final = 4096
"""Tenants kept, and (separately) names kept that are no tenant: the oldest goes. Both are small."""
MAX_READS: Final = 64
"""Different tenants asked for at once: made-up names must not queue up without end."""


class TenantKeys:
    """A read-through cache.

    Args:
        read: see `ReadKeys`.
        ttl_s: how long an answer, also None, is trusted.

    One read per tenant runs at a time. While reads fail, what was known before stays valid: a database
    that restarts must not end the service of those who were welcome before.
    """

    def __init__(self, read: ReadKeys, ttl_s: float, clock: Clock) -> None:
        self._read = read
        self._ttl_s = ttl_s
        self._clock = clock
        self._known: dict[str, tuple[TokenKeys, float]] = {}
        self._unknown: dict[str, float] = {}
        self._waiting: dict[tuple[str, bool], list[Told]] = {}
        self._reads: set[asyncio.Task[None]] = set()

    def cached(self, tenant: str) -> tuple[bool, TokenKeys | None]:
        """(True, keys or None) if the answer is fresh, else (False, None)."""
        now = self._clock.monotonic()
        known = self._known.get(tenant)
        if known is not None:
            return (True, known[0]) if known[1] > now else (False, None)
        return self._unknown.get(tenant, now) > now, None

    def fetch(self, tenant: str, told: Told, *, refresh: bool = False) -> None:
        """Call `told(keys, error)` once the answer is there; from the event loop, possibly at once.

        Args:
            refresh: a token names a public key that is not known: see `ReadKeys`.
        """
        asked = (tenant, refresh)
        waiting = self._waiting.get(asked)
        if waiting is not None:
            waiting.append(told)
        elif len(self._waiting) >= MAX_READS:
            told(None, BusyError("too many tenants are looked up at once"))
        else:
            self._waiting[asked] = [told]
            task = asyncio.get_running_loop().create_task(self._look_up(tenant, refresh))
            self._reads.add(task)
            task.add_done_callback(self._reads.discard)

    async def _look_up(self, tenant: str, refresh: bool) -> None:
        keys: TokenKeys | None = None
        error: CarillonError | None = UnavailableError("the look-up was cancelled")
        try:
            keys = await self._read(tenant, refresh=refresh)
            error = None
            self._keep(tenant, keys)
        except CarillonError as exc:
            stale = self._known.get(tenant)
            keys, error = (None, exc) if stale is None else (stale[0], None)
        except Exception as exc:
            log.exception("reading the keys of a tenant failed")
            error = UnavailableError(f"{type(exc).__name__}: {exc}")
        finally:
            for told in self._waiting.pop((tenant, refresh)):
                told(keys, error)

    def _keep(self, tenant: str, keys: TokenKeys | None) -> None:
        until = self._clock.monotonic() + self._ttl_s
        self._known.pop(tenant, None)
        self._unknown.pop(tenant, None)
        kept: dict[str, Any] = self._known if keys is not None else self._unknown
        if len(kept) >= MAX_ENTRIES:
            del kept[next(iter(kept))]
        kept[tenant] = until if keys is None else (keys, until)

    async def close(self) -> None:
        """Give up reads that still run."""
        for task in self._reads:
            task.cancel()
        await asyncio.gather(*self._reads, return_exceptions=True)


Redeem = Callable[[str], Awaitable[ClientIdentity | None]]
"""Gives whom a ticket stands for, once; None if it is not valid. Raises CarillonError."""


class PostgresKeys:
    """Reads keys from Postgres over one connection, opened at the first read, and from JWK Sets.

    Args:
        settings: the whole tree.
    """

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._pool: Any = None
        self._source: Any = None
        self._tickets: Any = None
        self._opening = asyncio.Lock()

    async def __call__(self, tenant: str, /, *, refresh: bool = False) -> TokenKeys | None:
        """See `ReadKeys`. Raises StoreUnavailableError."""
        await self._open()
        return await self._source(tenant, refresh=refresh)

    async def redeem(self, ticket: str) -> ClientIdentity | None:
        """See `Redeem`. Raises StoreUnavailableError."""
        await self._open()
        return await self._tickets.redeem(ticket, self._clock.now_ms())

    async def _open(self) -> None:
        # Imported here: a gateway under test, or with other keys, needs no database driver.
        from stores.postgres.pool import open_pool
        from stores.postgres.tenants import TenantStore
        from stores.postgres.tickets import TicketStore
        from stores.token_keys import TokenKeySource

        postgres = self._settings.postgres
        async with self._opening:
            if self._pool is None:
                pool = await open_pool(postgres, 1)
                store = TenantStore(pool, postgres.connect_timeout_s)
                self._source = TokenKeySource(store.tenant, self._settings.ingress, self._clock)
                self._tickets = TicketStore(pool, postgres.connect_timeout_s)
                self._pool = pool

    async def close(self) -> None:
        """Close connections."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.terminate()
            await self._source.close()
