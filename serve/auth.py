"""Who is calling: API keys for services, tokens for clients.

What is read from Postgres is trusted for `ingress.auth_cache_s`: a revoked key stops working within that
time. Concurrent misses of one entry share one read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, Generic, TypeVar

from carillon.api_keys import allows, hash_key, key_id_of
from carillon.clock import Clock
from carillon.errors import NotPermittedError, UnauthenticatedError
from carillon.settings import IngressSettings
from carillon.tokens import ClientIdentity, TokenRules, claimed_tenant, unknown_key, verify
from stores.postgres.tenants import ApiKeyRecord, Revocations, TenantRecord, TenantStore
from stores.token_keys import TokenKeySource

V = TypeVar("V")

MAX_ENTRIES: Final = 20_000
"""Entries of one cache; when it is full the oldest are dropped: strangers cannot make it grow."""
_MISSING: Final = "expected `Authorization: Bearer <token>`, got none"


class TimedCache(Generic[V]):
    """Values kept for a time, absent ones (None) too, loaded once however many wait.

    Args:
        load: reads the value of a key; an exception is not kept.
    """

    def __init__(self, load: Callable[[Any], Awaitable[V]], ttl_s: float, clock: Clock) -> None:
        self._load = load
        self._ttl_s = ttl_s
        self._clock = clock
        self._entries: dict[Any, tuple[float, V]] = {}
        self._loading: dict[Any, asyncio.Task[V]] = {}

    def fresh(self, key: Any) -> V | None:
        """The value if it is here and young enough, without waiting; None otherwise."""
        entry = self._entries.get(key)
        if entry is not None and entry[0] > self._clock.monotonic():
            return entry[1]
        return None

    async def get(self, key: Any) -> V:
        """The value, read if need be. Raises what `load` raises."""
        entry = self._entries.get(key)
        if entry is not None and entry[0] > self._clock.monotonic():
            return entry[1]
        task = self._loading.get(key)
        if task is None:
            task = asyncio.ensure_future(self._read(key))
            self._loading[key] = task
            task.add_done_callback(lambda done: self._loaded(key, done))
        # Shielded: a caller that gives up must not take the others' answer with it.
        return await asyncio.shield(task)

    async def _read(self, key: Any) -> V:
        value = await self._load(key)
        self._entries.pop(key, None)  # so that it goes to the end: the first ones are the oldest
        self._entries[key] = (self._clock.monotonic() + self._ttl_s, value)
        while len(self._entries) > MAX_ENTRIES:
            del self._entries[next(iter(self._entries))]
        return value

    def _loaded(self, key: Any, task: asyncio.Task[V]) -> None:
        self._loading.pop(key, None)
        if not task.cancelled():
            task.exception()  # if every caller went away nobody else looks at it

    def forget(self, key: Any) -> None:
        """Drop one entry."""
        self._entries.pop(key, None)

    def clear(self) -> None:
        """Drop all entries."""
        self._entries.clear()


def bearer(header: bytes | None) -> str:
    """The credential of an Authorization header.

    Raises:
        UnauthenticatedError: there is none, or it is of another scheme.
    """
    if header is None:
        raise UnauthenticatedError(_MISSING)
    scheme, _, value = header.partition(b" ")
    value = value.strip()
    if scheme.lower() != b"bearer" or not value or not value.isascii():
        raise UnauthenticatedError(
            "expected `Authorization: Bearer <token>`, got another scheme or nothing in it"
        )
    return value.decode()


class Authenticator:
    """Checks credentials.

    Args:
        tenants: where keys, tenants and revocations are read.
    """

    def __init__(self, tenants: TenantStore, settings: IngressSettings, clock: Clock) -> None:
        self._tenants = tenants
        self._clock = clock
        self._rules = TokenRules(settings.clock_skew_s, settings.token_audience, settings.token_issuer)
        ttl_s = settings.auth_cache_s
        self._keys: TimedCache[ApiKeyRecord | None] = TimedCache(self._read_key, ttl_s, clock)
        self._keys_of = TokenKeySource(self.tenant, settings, clock)
        self._tenant_cache: TimedCache[TenantRecord | None] = TimedCache(tenants.tenant, ttl_s, clock)
        self._revocations: TimedCache[Revocations] = TimedCache(self._read_revocations, ttl_s, clock)
        self._used_ms: dict[str, int] = {}

    async def _read_key(self, header: bytes) -> ApiKeyRecord | None:
        key = bearer(header)
        return None if key_id_of(key) is None else await self._tenants.api_key(hash_key(key))

    async def _read_revocations(self, who: tuple[str, str]) -> Revocations:
        return await self._tenants.revocations(*who)

    def known_key(self, header: bytes | None) -> ApiKeyRecord | None:
        """The key of an Authorization header if it is cached and good; None means: ask `service`."""
        key = self._keys.fresh(header) if header is not None else None
        return key if key is not None and key.valid(self._clock.now_ms()) else None

    async def service(self, header: bytes | None, scope: str) -> ApiKeyRecord:
        """The API key of an Authorization header.

        Raises:
            UnauthenticatedError: there is none, it is unknown or revoked.
            NotPermittedError: it lacks `scope`.
            StoreUnavailableError: Postgres does not answer.
        """
        if header is None or len(header) > 512:
            raise UnauthenticatedError(_MISSING if header is None else "the API key is not known")
        bearer(header)
        key = await self._keys.get(header)
        if key is None or not key.valid(self._clock.now_ms()):
            raise UnauthenticatedError("the API key is not known, was revoked, or has ended")
        if not allows(key.scopes, scope):
            raise NotPermittedError(f"the API key lacks the scope {scope}", "", f"scope {scope}", "none")
        self._used_ms[key.key_id] = self._clock.now_ms()
        return key

    def used(self, key: ApiKeyRecord) -> None:
        """Note the use of a key that `known_key` gave."""
        self._used_ms[key.key_id] = self._clock.now_ms()

    async def client(self, header: bytes | None) -> ClientIdentity:
        """The user of a client token.

        Raises:
            UnauthenticatedError, TokenExpiredError: it is missing, does not verify, was revoked, has expired.
            StoreUnavailableError: Postgres does not answer.
        """
        token = bearer(header)
        tenant = await self.tenant(claimed_tenant(token))
        if tenant is None:
            # The same sentence as for a wrong signature: which tenants exist is nobody's business.
            raise UnauthenticatedError("the token's signature does not verify")
        now_ms = self._clock.now_ms()
        keys = await self._keys_of.of(tenant)
        if unknown_key(token, keys):
            keys = await self._keys_of.of(tenant, refresh=True)
        # Verified first: only then is the user's name trusted enough to ask the database for it.
        who = verify(token, keys, now_ms, self._rules)
        if (await self._revocations.get((who.tenant, who.user))).hit(who):
            raise UnauthenticatedError("the token was revoked")
        return who

    async def tenant(self, name: str) -> TenantRecord | None:
        """The tenant, or None. Raises StoreUnavailableError."""
        return await self._tenant_cache.get(name)

    async def close(self) -> None:
        """Close connections to the tenants' key servers."""
        await self._keys_of.close()

    def revoked(self, tenant: str, user: str) -> None:
        """Tokens of the user were revoked through this replica: it knows at once."""
        self._revocations.forget((tenant, user))

    async def write_uses(self) -> None:
        """Write when keys were last used. Raises StoreUnavailableError; what was not written is kept."""
        used, self._used_ms = self._used_ms, {}
        try:
            await self._tenants.touch_keys(used)
        except BaseException:
            self._used_ms = used | self._used_ms
            raise
