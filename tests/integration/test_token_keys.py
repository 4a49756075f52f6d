"""Token keys by tenant: real Postgres, a real HTTP server that publishes a JWK Set."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from carillon.clock import SystemClock
from carillon.errors import InvalidInputError, NotFoundError
from carillon.settings import IngressSettings
from stores.postgres.pool import open_pool
from stores.postgres.tenants import TenantStore
from stores.token_keys import MAX_BYTES, TokenKeySource
from tests.actors.fakes import fast_settings
from tests.integration.ingress_world import World
from tests.support import eventually
from tests.unit.test_token_keys import jwk_of


class KeyServer:
    """Publishes a JWK Set; `answer` is the whole of what it says to a request."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {}
        self.asked = 0
        self.answer: bytes | None = None
        self.hang = False
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/jwks.json"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.asked += 1
        self._writers.append(writer)
        if self.hang:
            return
        body = msgspec.json.encode({"keys": [jwk_of(key, kid=kid) for kid, key in self.keys.items()]})
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        writer.write(self.answer if self.answer is not None else head + body)
        writer.close()

    def add(self, kid: str) -> Any:
        """A new key."""
        key = self.keys[kid] = ec.generate_private_key(ec.SECP256R1())
        return key

    async def stop(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@pytest.fixture
async def server() -> AsyncIterator[KeyServer]:
    made = KeyServer()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def store(postgres_dsn: str) -> AsyncIterator[TenantStore]:
    pool = await open_pool(fast_settings(postgres={"dsn": postgres_dsn}).postgres, 1)
    yield TenantStore(pool)
    await pool.close()


def settings(**values: Any) -> IngressSettings:
    return IngressSettings(**{"jwks_ttl_s": 60.0, "jwks_refresh_s": 0.05, "jwks_timeout_s": 0.5, **values})


async def test_published_keys(store: TenantStore, server: KeyServer) -> None:
    """A JWK Set is read once, again for an unknown key, and outlives its server."""
    server.add("a")
    await store.create_tenant("acme")
    await store.put_jwks("acme", server.url)
    source = TokenKeySource(store.tenant, settings(), SystemClock())
    for _ in range(3):
        keys = await source("acme")
        assert keys is not None
        assert set(keys.public) == {"a"}
    assert server.asked == 1
    server.add("b")
    await eventually(lambda: _names(source, refresh=True))
    assert (await source("nobody")) is None
    asked = server.asked
    for answer in (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
                   b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
                   b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"x" * (MAX_BYTES + 1),
                   b"nonsense\r\n\r\n"):  # fmt: skip
        server.answer = answer
        asked = server.asked

        async def tried(before: int = asked) -> bool:
            await source("acme", refresh=True)
            return server.asked > before

        await eventually(tried)
        assert await _names(source)
    server.hang = True
    asked = server.asked
    await eventually(lambda: tried(asked))
    assert await _names(source)
    await source.close()


async def _names(source: TokenKeySource, refresh: bool = False) -> bool:
    keys = await source("acme", refresh=refresh)
    assert keys is not None
    return set(keys.public) == {"a", "b"}


async def test_strangers_cannot_make_it_ask(store: TenantStore, server: KeyServer) -> None:
    """Unknown keys have the JWK Set read at most once in `ingress.jwks_refresh_s`, however many ask."""
    await store.create_tenant("acme")
    await store.put_jwks("acme", server.url)
    source = TokenKeySource(store.tenant, settings(jwks_refresh_s=60.0), SystemClock())
    await asyncio.gather(*(source("acme", refresh=True) for _ in range(50)))
    await source("acme", refresh=True)
    assert server.asked == 1
    await source.close()


async def test_refused_sources(store: TenantStore, server: KeyServer) -> None:
    """A URL that keys may not come from, a document without usable keys and an unknown tenant are refused."""
    await store.create_tenant("acme")
    with pytest.raises(InvalidInputError):
        await store.put_jwks("acme", "http://id.example/jwks")
    with pytest.raises(InvalidInputError):
        await store.put_jwks("acme", None, {"keys": []})
    with pytest.raises(NotFoundError):
        await store.put_jwks("nobody", server.url)
    with pytest.raises(NotFoundError):
        await store.rotate_secret("nobody", 0)
    with pytest.raises(InvalidInputError):
        await store.rotate_secret("acme", 0, "short")


async def test_secret_rotation(store: TenantStore) -> None:
    """After a rotation both secrets verify until the overlap ends."""
    now_ms = SystemClock().now_ms()
    old = (await store.create_tenant("acme")).client_secret
    new = await store.rotate_secret("acme", now_ms + 60_000)
    record = await store.tenant("acme")
    assert record is not None
    assert record.secrets(now_ms) == (new, old)
    assert record.secrets(now_ms + 60_000) == (new,)


async def test_the_api_takes_them(postgres_dsn: str, server: KeyServer) -> None:
    """A device with a token of the tenant's identity provider reads its feed; rotation is followed."""
    world = await World(postgres_dsn, ingress={"jwks_refresh_s": 0.01, "auth_cache_s": 0.05}).start()
    try:
        await world.tenants.put_jwks("acme", server.url)
        for kid in ("first", "second"):
            key = server.add(kid)
            claims = {"sub": "ada", "tenant": "acme", "exp": 4_000_000_000}
            token = jwt.encode(claims, key, "ES256", {"kid": kid})

            async def taken(bearer: str = token) -> bool:
                answer = await world.http.get(
                    "/api/notifications", headers={"Authorization": f"Bearer {bearer}"}
                )
                return answer.status_code == 200

            await eventually(taken)
        forged = jwt.encode(claims, ec.generate_private_key(ec.SECP256R1()), "ES256", {"kid": "first"})
        answer = await world.http.get("/api/notifications", headers={"Authorization": f"Bearer {forged}"})
        assert answer.status_code == 401
    finally:
        await world.stop()
