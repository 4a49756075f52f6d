"""Keys of client tokens, by tenant: secrets from Postgres, public keys from the JWK Set a tenant publishes.

A JWK Set is read over HTTPS and kept for `ingress.jwks_ttl_s`. A token that names a key which is not in it
asks for a fresh one, at most every `ingress.jwks_refresh_s`: keys may rotate at any moment, and strangers may
make up key names. While the provider does not answer, the keys known before stay valid.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final, Protocol

import httpx
import msgspec

from carillon.clock import Clock
from carillon.errors import InvalidInputError
from carillon.settings import IngressSettings
from carillon.token_keys import NO_KEYS, PublicKey, TokenKeys, parse_jwks
from stores.postgres.tenants import TenantRecord

log = logging.getLogger(__name__)

MAX_BYTES: Final = 256 * 1024
"""Longest JWK Set that is read."""
MAX_SETS: Final = 1000
"""JWK Sets kept; the oldest goes."""


class ReadTenant(Protocol):
    """Gives a tenant's record, None if there is no such tenant. Raises StoreUnavailableError."""

    async def __call__(self, name: str, /) -> TenantRecord | None:
        """See the class."""
        ...


class _KeySet:
    """One JWK Set: the keys, and when it was read and asked for."""

    __slots__ = ("keys", "lock", "read_at", "tried_at")

    def __init__(self) -> None:
        self.keys: Mapping[str, PublicKey] | None = None
        self.read_at = float("-inf")
        self.tried_at = float("-inf")
        self.lock = asyncio.Lock()


class TokenKeySource:
    """What tokens of a tenant are verified with.

    Args:
        read_tenant: gives a tenant's record.
    """

    def __init__(self, read_tenant: ReadTenant, settings: IngressSettings, clock: Clock) -> None:
        self._read_tenant = read_tenant
        self._settings = settings
        self._clock = clock
        self._sets: dict[str, _KeySet] = {}
        self._http: httpx.AsyncClient | None = None

    async def __call__(self, tenant: str, *, refresh: bool = False) -> TokenKeys | None:
        """The keys of a tenant, None if there is no such tenant.

        Args:
            refresh: read the JWK Set anew, unless that was done within `ingress.jwks_refresh_s`.

        Raises:
            StoreUnavailableError: Postgres does not answer.
        """
        record = await self._read_tenant(tenant)
        return None if record is None else await self.of(record, refresh=refresh)

    async def of(self, record: TenantRecord, *, refresh: bool = False) -> TokenKeys:
        """The keys of a tenant whose record is at hand. Never raises: the secret always remains."""
        secrets = record.secrets(self._clock.now_ms())
        if record.jwks_url is not None:
            return TokenKeys(secrets, await self._published(record.jwks_url, refresh))
        if record.jwks is not None:
            try:
                return TokenKeys(secrets, parse_jwks(record.jwks))
            except InvalidInputError as exc:
                log.warning("the JWK Set of tenant %s cannot be used: %s", record.tenant, exc)
        return TokenKeys(secrets)

    async def _published(self, url: str, refresh: bool) -> Mapping[str, PublicKey]:
        kept = self._sets.get(url)
        if kept is None:
            while len(self._sets) >= MAX_SETS:
                del self._sets[next(iter(self._sets))]
            kept = self._sets[url] = _KeySet()
        if self._due(kept, refresh):
            async with kept.lock:
                if self._due(kept, refresh):  # else somebody read it while we waited
                    await self._read(url, kept)
        return NO_KEYS if kept.keys is None else kept.keys

    def _due(self, kept: _KeySet, refresh: bool) -> bool:
        now = self._clock.monotonic()
        if now - kept.tried_at < self._settings.jwks_refresh_s:
            return False
        return refresh or now - kept.read_at >= self._settings.jwks_ttl_s

    async def _read(self, url: str, kept: _KeySet) -> None:
        kept.tried_at = self._clock.monotonic()
        try:
            document = await asyncio.wait_for(self._fetch(url), self._settings.jwks_timeout_s)
            kept.keys = parse_jwks(document)
            kept.read_at = self._clock.monotonic()
        except (httpx.HTTPError, OSError, ValueError, InvalidInputError) as exc:
            # Keys known before stay valid: the provider's bad minute must not end the service of its users.
            log.warning("no JWK Set from %s: %s: %s", url, type(exc).__name__, exc)

    async def _fetch(self, url: str) -> Any:
        if self._http is None:
            # Redirects could lead anywhere, and the environment's proxies are not ours.
            self._http = httpx.AsyncClient(
                follow_redirects=False, trust_env=False, timeout=self._settings.jwks_timeout_s
            )
        async with self._http.stream("GET", url, headers={"accept": "application/json"}) as answer:
            if answer.status_code != 200:
                raise _RefusedError(f"status {answer.status_code}")
            body = bytearray()
            async for part in answer.aiter_bytes():
                body += part
                if len(body) > MAX_BYTES:
                    raise _RefusedError(f"longer than {MAX_BYTES} bytes")
        return msgspec.json.decode(bytes(body))

    async def close(self) -> None:
        """Close connections."""
        if self._http is not None:
            http, self._http = self._http, None
            await http.aclose()


class _RefusedError(ValueError):
    """An answer that is no JWK Set. Never leaves this module."""
