"""Tenants and API keys in a real Postgres."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest

from carillon.api_keys import SCOPES, allows, hash_key, key_id_of
from carillon.errors import InvalidInputError, NotFoundError, StoreUnavailableError
from carillon.settings import PostgresSettings
from stores.postgres.pool import open_pool
from stores.postgres.tenants import TenantStore


@pytest.fixture
async def pool(postgres_dsn: str) -> AsyncIterator[Any]:
    opened = await open_pool(PostgresSettings(dsn=postgres_dsn), 2)
    yield opened
    await opened.close()


async def test_tenants(pool: Any) -> None:
    """A tenant is found by its name with its secret, generated or given; a name is taken once."""
    store = TenantStore(pool)
    made = await store.create_tenant("acme")
    assert len(made.client_secret.encode()) >= 32
    assert await store.tenant("acme") == made
    given = await store.create_tenant("other", "s" * 32)
    assert given.client_secret == "s" * 32
    assert await store.tenants() == ["acme", "other"]
    assert await store.tenant("nobody") is None
    assert await store.tenant("a\0b") is None
    with pytest.raises(InvalidInputError, match="exists"):
        await store.create_tenant("acme")
    for name in ("", "a b", "x" * 65, "a:b", "-a"):
        with pytest.raises(InvalidInputError):
            await store.create_tenant(name)
    with pytest.raises(InvalidInputError, match="32 bytes"):
        await store.create_tenant("short", "s" * 31)


async def test_keys(pool: Any) -> None:
    """A key is shown once, found by its hash, listed without its secret, and revoked for good."""
    store = TenantStore(pool)
    await store.create_tenant("acme")
    key = await store.create_key("acme", "ci", ["events:write", "users:read", "events:write"])
    found = await store.api_key(hash_key(key))
    assert found is not None
    assert (found.tenant, found.revoked, found.key_id) == ("acme", False, key_id_of(key))
    assert found.scopes == {"events:write", "users:read"}
    stored = await pool.fetchrow("select key_hash, key_id, name from api_keys")
    assert key.encode() not in bytes(stored["key_hash"])
    assert await store.api_key(hash_key(key + "x")) is None
    assert not await store.revoke_key("other", found.key_id)
    assert await store.revoke_key("acme", found.key_id)
    again = await store.api_key(hash_key(key))
    assert again is not None
    assert again.revoked
    [listed] = await store.list_keys("acme")
    assert (listed.name, listed.revoked) == ("ci", True)
    assert listed.revoked_ms is not None
    with pytest.raises(InvalidInputError, match="unknown scope"):
        await store.create_key("acme", "x", ["everything"])
    with pytest.raises(InvalidInputError):
        await store.create_key("acme", "x", [])
    with pytest.raises(NotFoundError):
        await store.create_key("nobody", "x", ["admin"])


async def test_last_use_never_goes_back(pool: Any) -> None:
    """Uses are written in batches; a late batch does not move the time back."""
    store = TenantStore(pool)
    await store.create_tenant("acme")
    ids = [key_id_of(await store.create_key("acme", str(i), ["admin"])) for i in range(3)]
    await store.touch_keys({ids[0]: 2_000, ids[1]: 3_000, "000000000000": 1})
    await store.touch_keys({ids[0]: 1_000})
    await store.touch_keys({})
    used = {key.key_id: key.last_used_ms for key in await store.list_keys("acme")}
    assert used == {ids[0]: 2_000, ids[1]: 3_000, ids[2]: None}


def test_admin_may_everything() -> None:
    """admin includes every scope; the others only themselves."""
    assert all(allows({"admin"}, scope) for scope in SCOPES)
    assert not allows({"users:read"}, "users:write")


async def test_lost_server_is_told(pool: Any, postgres_dsn: str) -> None:
    """A server that does not answer is StoreUnavailableError, whatever the driver calls it."""
    store = TenantStore(pool, 0.2)
    held = [await pool.acquire() for _ in range(2)]
    with pytest.raises(StoreUnavailableError):
        await store.tenant("acme")
    for connection in held:
        await pool.release(connection)
    nowhere = dataclasses.replace(
        PostgresSettings(), dsn="postgresql://u:p@127.0.0.1:1/x", connect_timeout_s=1.0
    )
    with pytest.raises(StoreUnavailableError):
        await open_pool(nowhere, 1)
    await asyncio.sleep(0)
