"""One-time tickets: real Postgres, and the API that makes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from carillon.tokens import ClientIdentity
from stores.postgres.pool import open_pool
from stores.postgres.tickets import TicketStore
from tests.actors.fakes import fast_settings
from tests.integration.ingress_world import World

WHO = ClientIdentity("acme", "ada", 1_700_000_100_000, 1_700_000_000_000, b"i" * 16)
NOW = 1_700_000_010_000


@pytest.fixture
async def pool(postgres_dsn: str) -> AsyncIterator[asyncpg.Pool]:
    made = await open_pool(fast_settings(postgres={"dsn": postgres_dsn}).postgres, 4)
    yield made
    await made.close()


async def test_one_use(pool: asyncpg.Pool) -> None:
    """Of many who show a ticket at once one gets in; what is kept is a hash."""
    store = TicketStore(pool)
    ticket, until_ms = await store.make(WHO, NOW, 30.0)
    assert until_ms == NOW + 30_000
    answers = await asyncio.gather(*(store.redeem(ticket, NOW + 1) for _ in range(8)))
    assert (answers.count(WHO), answers.count(None)) == (1, 7)
    assert await pool.fetchval("select count(*) from tickets") == 0
    other, _ = await store.make(WHO, NOW, 30.0)
    kept = await pool.fetchrow("select * from tickets")
    assert other.removeprefix("tkt_") not in str(dict(kept))


async def test_ends(pool: asyncpg.Pool) -> None:
    """A ticket ends after its time and with its token; what nobody redeemed is swept when others are made."""
    store = TicketStore(pool)
    late, _ = await store.make(WHO, NOW, 30.0)
    assert await store.redeem(late, NOW + 30_001) is None
    _, until_ms = await store.make(WHO, WHO.expires_ms - 5, 30.0)
    assert until_ms == WHO.expires_ms
    await store.make(WHO, WHO.expires_ms + 10, 30.0)
    assert await pool.fetchval("select count(*) from tickets") == 1
    for odd in ("", "tkt_", "x" * 10_000, "tkt_\0", "tkt_" + "ä" * 32):
        assert await store.redeem(odd, NOW) is None


async def test_the_api_makes_them(postgres_dsn: str) -> None:
    """POST /api/tickets answers 201 with a ticket that stands for the token that asked."""
    world = await World(postgres_dsn).start()
    try:
        answer = await world.http.post("/api/tickets", headers=world.client("ada"))
        assert answer.status_code == 201, answer.text
        now_ms = world.clock.now_ms()
        who = await TicketStore(world.pool).redeem(answer.json()["ticket"], now_ms)
        assert who is not None
        assert (who.tenant, who.user) == ("acme", "ada")
        assert who.expires_ms > now_ms
        assert (await world.http.post("/api/tickets", headers=world.service())).status_code == 401
        bad = await world.http.post("/api/tickets", json={"x": 1}, headers=world.client("ada"))
        assert bad.status_code == 422
    finally:
        await world.stop()
