"""Tenants and API keys in Postgres.

Reads are not cached here: the ingress keeps them for `ingress.auth_cache_s`, gateways likewise.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import asyncpg
import msgspec

from carillon.api_keys import check_scopes, check_tenant_name, hash_key, make_key
from carillon.errors import InvalidInputError, NotFoundError, VersionError
from carillon.jwks_url import check_jwks_url
from carillon.limits import MEMBER, RateLimit, check_overflow, check_rate, key_limit, tenant_limit
from carillon.token_keys import parse_jwks
from carillon.tokens import ClientIdentity
from stores.postgres.named import load_queries
from stores.postgres.pool import Store, acquired

MIN_SECRET_BYTES: Final = 32
"""RFC 7518 §3.2: an HS256 key is at least as long as the hash."""


@dataclass(frozen=True)
class TenantRecord:
    """A tenant: a closed world of users, keys and notifications."""

    tenant: str
    client_secret: str
    """HS256 key of client tokens: its UTF-8 bytes."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    previous_secret: str | None = None
    """The secret before the last rotation, None if there is none."""
    previous_until_ms: int = 0
    """Until when it is valid, ms since the epoch."""
    jwks_url: str | None = None
    """Where the tenant's public keys are read."""
    jwks: Any = None
    """A JWK Set document given instead."""

    @property
    def rate_limits(self) -> tuple[RateLimit, ...]:
        """The tenant's own limit, shared by its keys and by what comes in without one; empty: none."""
        return tenant_limit(self.tenant, self.settings.get(MEMBER))

    def secrets(self, now_ms: int) -> tuple[str, ...]:
        """The secrets that are valid now, the current one first."""
        if self.previous_secret is None or now_ms >= self.previous_until_ms:
            return (self.client_secret,)
        return (self.client_secret, self.previous_secret)


@dataclass(frozen=True)
class ApiKeyRecord:
    """An API key as stored."""

    key_id: str
    tenant: str
    scopes: frozenset[str]
    revoked: bool
    name: str = ""
    created_ms: int | None = None
    last_used_ms: int | None = None
    revoked_ms: int | None = None
    expires_ms: int | None = None
    """When it ends, ms since the epoch; None: never."""
    rotated_to: str | None = None
    """The id of the key that replaces it."""
    rate_per_s: float | None = None
    """Events per second over all replicas; None: no limit."""
    burst: int = 0
    """Events at once, with `rate_per_s`."""
    limits: tuple[RateLimit, ...] = ()
    """All that hold for what the key sends: its own, the tenant's. Empty (usual): nothing to look at."""

    def valid(self, now_ms: int) -> bool:
        """Neither revoked nor at its end."""
        return not self.revoked and (self.expires_ms is None or now_ms < self.expires_ms)


@dataclass(frozen=True)
class Revocations:
    """Tokens of a user that are not valid any more."""

    valid_from_ms: int = 0
    """Those issued before (or without `iat`, if it is set)."""
    tokens: frozenset[bytes] = frozenset()
    """Those that were logged out, by `carillon.tokens.token_id`."""

    def hit(self, who: ClientIdentity) -> bool:
        """Whether a verified token is one of them."""
        return who.issued_ms < self.valid_from_ms or who.token_id in self.tokens


@dataclass(frozen=True)
class AuditRecord:
    """One administrative act."""

    id: int
    at_ms: int
    tenant: str
    actor: str
    action: str
    target: str
    detail: Mapping[str, Any]


class PolicyVersion(NamedTuple):
    """Which policy document of a tenant is the present one."""

    version: int
    """One more with each change; 0: nothing was ever stored."""
    since_ms: int | None
    """Since when, ms since the epoch."""


class TenantStore(Store):
    """Reads and writes tenants and their API keys."""

    _sql: Final = load_queries("tenants")

    async def tenant(self, name: str) -> TenantRecord | None:
        """The tenant, or None if there is none of that name."""
        if "\0" in name:  # PostgreSQL text cannot hold NUL: such a tenant cannot exist
            return None
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["tenant"], name)
        return None if row is None else _tenant(row)

    async def tenants(self) -> list[str]:
        """The names of all tenants, sorted."""
        async with acquired(self._pool, self._timeout_s) as connection:
            return [row["tenant"] for row in await connection.fetch(self._sql["tenants"])]

    async def create_tenant(self, name: str, client_secret: str | None = None) -> TenantRecord:
        """Create a tenant.

        Args:
            name: see `carillon.api_keys.check_tenant_name`.
            client_secret: at least 32 bytes of UTF-8; None generates one.

        Raises:
            InvalidInputError: the name or the secret is not allowed, or the name is taken (code "exists").
        """
        check_tenant_name(name)
        secret = secrets.token_urlsafe(36) if client_secret is None else client_secret
        _check_secret(secret)
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["create_tenant"], name, secret)
        if row is None:
            raise InvalidInputError(f"tenant {name!r} exists already", "tenant", "a new name", name, "exists")
        return _tenant(row)

    async def rotate_secret(self, name: str, until_ms: int, client_secret: str | None = None) -> str:
        """Give a tenant a new client secret and return it; the former one is valid until `until_ms`.

        Replicas and gateways learn of it within `ingress.auth_cache_s`: until then they refuse tokens of the
        new secret, so sign with it only after that time.

        Raises:
            NotFoundError: there is no such tenant.
            InvalidInputError: the secret is too short.
        """
        secret = secrets.token_urlsafe(36) if client_secret is None else client_secret
        _check_secret(secret)
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["rotate_secret"], name, secret, until_ms / 1000)
        if row is None:
            raise NotFoundError(f"there is no tenant {name!r}", "tenant")
        return secret

    async def put_jwks(self, name: str, url: str | None, document: Any = None) -> None:
        """Set where a tenant's public keys come from: a URL, a document, or (both None) nowhere.

        Raises:
            NotFoundError: there is no such tenant.
            InvalidInputError: keys may not be read from there, or the document holds no usable key.
        """
        if url is not None:
            check_jwks_url(url)
        elif document is not None and not parse_jwks(document):
            raise InvalidInputError(
                "expected at least one RSA (2048 bits or more) or EC P-256 signature key", "jwks"
            )
        text = None if document is None else msgspec.json.encode(document).decode()
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["put_jwks"], name, url, text)
        if row is None:
            raise NotFoundError(f"there is no tenant {name!r}", "tenant")

    async def create_key(
        self,
        tenant: str,
        name: str,
        scopes: Iterable[str],
        *,
        rate_per_s: float | None = None,
        burst: int | None = None,
    ) -> str:
        """Create an API key and return it whole: the only time it can be seen.

        Args:
            rate_per_s: events per second over all replicas; None: no limit.
            burst: events at once; None: those of one second.

        Raises:
            NotFoundError: there is no such tenant.
            InvalidInputError: a scope is unknown, or a limit makes no sense.
        """
        rate_per_s, burst = check_rate(rate_per_s, burst)
        allowed = check_scopes(scopes)
        key_id, key = make_key()
        try:
            async with acquired(self._pool, self._timeout_s) as connection:
                await connection.execute(
                    self._sql["create_key"], key_id, hash_key(key), tenant, name, allowed, rate_per_s, burst
                )
        except asyncpg.ForeignKeyViolationError:
            raise NotFoundError(f"there is no tenant {tenant!r}", "tenant") from None
        return key

    async def rotate_key(self, tenant: str, key_id: str, now_ms: int, until_ms: int) -> str:
        """Make a key like another one, which is valid until `until_ms`; returns the new one, whole.

        Raises:
            NotFoundError: the tenant has no valid key of that id, or it was rotated before.
        """
        new_id, key = make_key()
        async with acquired(self._pool, self._timeout_s) as connection:
            made = await connection.fetchval(
                self._sql["rotate_key"], new_id, hash_key(key), tenant, key_id, until_ms / 1000, now_ms / 1000
            )
        if made is None:
            raise NotFoundError(f"tenant {tenant!r} has no key {key_id!r} that could be rotated", "keyId")
        return key

    async def limit_key(
        self, tenant: str, key_id: str, rate_per_s: float | None, burst: int | None = None
    ) -> None:
        """Set or (None) lift the rate limit of a key.

        Raises:
            NotFoundError: the tenant has no such key.
            InvalidInputError: the limit makes no sense.
        """
        rate_per_s, burst = check_rate(rate_per_s, burst)
        async with acquired(self._pool, self._timeout_s) as connection:
            found = await connection.fetchval(self._sql["limit_key"], tenant, key_id, rate_per_s, burst)
        if found is None:
            raise NotFoundError(f"tenant {tenant!r} has no key {key_id!r}", "keyId")

    async def record_audit(
        self, tenant: str, actor: str, action: str, target: str = "", **detail: Any
    ) -> None:
        """Note an administrative act. `detail` holds no secret."""
        async with acquired(self._pool, self._timeout_s) as connection:
            text = msgspec.json.encode(detail).decode()
            await connection.execute(self._sql["record_audit"], tenant, actor, action, target, text)

    async def audit(self, tenant: str | None, limit: int, before: int | None = None) -> list[AuditRecord]:
        """Administrative acts, newest first; of all tenants if None."""
        async with acquired(self._pool, self._timeout_s) as connection:
            rows = await connection.fetch(self._sql["audit"], tenant, before, limit)
        return [
            AuditRecord(*row[:6], msgspec.json.decode(row["detail"]))  # type: ignore[arg-type]
            for row in rows
        ]

    async def api_key(self, key_hash: bytes) -> ApiKeyRecord | None:
        """The key with this hash (`carillon.api_keys.hash_key`), revoked ones too, or None."""
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["api_key"], key_hash)
        return None if row is None else _key(row)

    async def list_keys(self, tenant: str) -> list[ApiKeyRecord]:
        """All keys of a tenant, newest first, revoked ones included."""
        async with acquired(self._pool, self._timeout_s) as connection:
            return [_key(row) for row in await connection.fetch(self._sql["list_keys"], tenant)]

    async def revoke_key(self, tenant: str, key_id: str) -> bool:
        """Revoke a key; False if the tenant has none of that id. Ingress caches forget it within
        `ingress.auth_cache_s`."""
        async with acquired(self._pool, self._timeout_s) as connection:
            return await connection.fetchval(self._sql["revoke_key"], tenant, key_id) is not None

    async def policy(self, tenant: str) -> dict[str, Any]:
        """The policy document as stored, {} if there is none. Raises NotFoundError: no such tenant."""
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["policy"], tenant)
        if row is None:
            raise NotFoundError(f"there is no tenant {tenant!r}", "tenant")
        return {} if row["policy"] is None else msgspec.json.decode(row["policy"])

    async def stored_policy(self, tenant: str) -> tuple[dict[str, Any], PolicyVersion]:
        """The policy document as stored, and its version. Raises NotFoundError: no such tenant."""
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["stored_policy"], tenant)
        if row is None:
            raise NotFoundError(f"there is no tenant {tenant!r}", "tenant")
        document = {} if row["policy"] is None else msgspec.json.decode(row["policy"])
        return document, PolicyVersion(row["version"], row["since_ms"])

    async def put_policy(self, tenant: str, text: str, version: int | None = None) -> PolicyVersion:
        """Replace the policy document.

        Args:
            text: of `carillon.policy.validate`.
            version: only if this is the present one; None: whichever is.

        Returns:
            What is the present one now; the same as before if nothing changed.

        Raises:
            NotFoundError: no such tenant.
            VersionError: another version is the present one; nothing was changed.
        """
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["put_policy"], tenant, text, version)
            if row is not None:
                return PolicyVersion(row["version"], row["since_ms"])
            present = await connection.fetchrow(self._sql["stored_policy"], tenant)
        if present is None:
            raise NotFoundError(f"there is no tenant {tenant!r}", "tenant")
        raise VersionError(
            f"expected version {version} of the policy, got {present['version']}",
            "If-Match", str(present["version"]), str(version),
        )  # fmt: skip

    async def limits(self, tenant: str) -> dict[str, Any]:
        """The document of limits as stored, {} if there is none. Raises NotFoundError: no such tenant."""
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["limits"], tenant)
        if row is None:
            raise NotFoundError(f"there is no tenant {tenant!r}", "tenant")
        return {} if row["limits"] is None else msgspec.json.decode(row["limits"])

    async def limit_tenant(
        self,
        tenant: str,
        rate_per_s: float | None,
        burst: int | None = None,
        overflow: str | None = None,
        collect_s: float | None = None,
    ) -> None:
        """Set or (None) lift the rate limit of a tenant: of all its keys and ways in together.

        Args:
            overflow, collect_s: see `carillon.limits`; None: as they are.

        Raises:
            NotFoundError: there is no such tenant.
            InvalidInputError: the limit makes no sense.
        """
        rate_per_s, burst = check_rate(rate_per_s, burst)
        check_overflow(overflow, collect_s)
        members: dict[str, Any] = {"ratePerS": rate_per_s, "burst": burst}
        if overflow is not None or rate_per_s is None:
            members["overflow"] = overflow
        if collect_s is not None or rate_per_s is None:
            members["collectS"] = collect_s
        text = msgspec.json.encode(members).decode()
        async with acquired(self._pool, self._timeout_s) as connection:
            if await connection.fetchval(self._sql["put_limits"], tenant, text) is None:
                raise NotFoundError(f"there is no tenant {tenant!r}", "tenant")

    async def touch_keys(self, used_ms: Mapping[str, int]) -> None:
        """Note when keys were last used.

        Args:
            used_ms: key id -> wall time in ms; times only ever move forward.
        """
        if not used_ms:
            return
        times = [datetime.fromtimestamp(ms / 1000, UTC) for ms in used_ms.values()]
        async with acquired(self._pool, self._timeout_s) as connection:
            await connection.execute(self._sql["touch_keys"], list(used_ms), times)

    async def revocations(self, tenant: str, user: str) -> Revocations:
        """Which tokens of a user are not valid any more, though they verify."""
        if "\0" in tenant or "\0" in user:
            return Revocations()
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["user_security"], tenant, user)
        if row is None:
            return Revocations()
        return Revocations(row["valid_from_ms"] or 0, frozenset(row["revoked"]))


def _check_secret(secret: str) -> None:
    if len(secret.encode()) < MIN_SECRET_BYTES or "\0" in secret:
        raise InvalidInputError(
            f"expected a client secret of at least {MIN_SECRET_BYTES} bytes, got {len(secret.encode())}",
            "clientSecret",
            f"at least {MIN_SECRET_BYTES} bytes of UTF-8 without NUL",
            f"{len(secret.encode())} bytes",
        )


def _tenant(row: asyncpg.Record) -> TenantRecord:
    jwks = row.get("jwks")
    return TenantRecord(
        row["tenant"],
        row["client_secret"],
        msgspec.json.decode(row["settings"]),
        row.get("previous_secret"),
        row.get("previous_until_ms") or 0,
        row.get("jwks_url"),
        None if jwks is None else msgspec.json.decode(jwks),
    )


def _key(row: asyncpg.Record) -> ApiKeyRecord:
    tenant, key_id, rate_per_s, burst = (
        row["tenant"], row["key_id"], row.get("rate_per_s"), row.get("burst") or 0,
    )  # fmt: skip
    limits = row.get("limits")
    return ApiKeyRecord(
        key_id=key_id,
        tenant=tenant,
        scopes=frozenset(row["scopes"]),
        revoked=row["revoked"],
        name=row["name"],
        created_ms=row.get("created_ms"),
        last_used_ms=row.get("last_used_ms"),
        revoked_ms=row.get("revoked_ms"),
        expires_ms=row.get("expires_ms"),
        rotated_to=row.get("rotated_to"),
        rate_per_s=rate_per_s,
        burst=burst,
        limits=key_limit(tenant, key_id, rate_per_s, burst)
        + tenant_limit(tenant, None if limits is None else msgspec.json.decode(limits)),
    )
