"""How a gateway knows its clients: keys that rotate, tokens that are renewed, tickets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from websockets.asyncio.client import connect

from carillon.errors import StoreUnavailableError
from carillon.token_keys import PublicKey, TokenKeys
from carillon.tokens import ClientIdentity, mint
from tests.actors.gateway_kit import SECRET, Kit, Start, closed_with, frame_of, running, token


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    async with running() as starter:
        yield starter


async def test_an_unknown_public_key_is_looked_up_anew(start: Start) -> None:
    """A token whose key the gateway does not know makes it read the tenant's keys again, and then serves."""
    old, new = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    asked: list[bool] = []

    async def read(tenant: str, /, *, refresh: bool = False) -> TokenKeys | None:
        asked.append(refresh)
        keys = {"old": PublicKey("ES256", old.public_key())}
        if refresh:
            keys["new"] = PublicKey("ES256", new.public_key())
        return TokenKeys((SECRET,), keys)

    def signed(key: Any, kid: str) -> str:
        claims = {"sub": "ann", "tenant": "acme", "exp": 4_000_000_000}
        return jwt.encode(claims, key, "ES256", {"kid": kid})

    kit = await start(read=read)
    for token_of, code in (
        (signed(old, "old"), None),
        (signed(new, "new"), None),
        (signed(old, "new"), 4001),
    ):
        client = await connect(kit.url(token=token_of), proxy=None)
        if code is None:
            assert (await frame_of(client))["type"] == "WELCOME"
        else:
            assert await closed_with(client) == code
    assert asked == [False, True]


# -- a newer token on an open connection ------------------------------------------------------------------


async def auth(client: Any, bearer: str) -> dict[str, Any]:
    """Send AUTH; the answer."""
    await client.send(json.dumps({"type": "AUTH", "token": bearer, "id": "a"}))
    return await frame_of(client)


async def short_lived(kit: Kit, ttl_s: float) -> Any:
    client = await connect(kit.url(token=token(ttl_s=ttl_s)), proxy=None)
    assert (await frame_of(client))["type"] == "WELCOME"
    return client


async def test_a_newer_token_prolongs_the_connection(start: Start) -> None:
    """AUTH with a newer token of the user is answered OK, and the connection outlives the old one."""
    kit = await start()
    client = await short_lived(kit, 20.0)
    assert await auth(client, token(ttl_s=30)) == {"type": "OK", "id": "a"}
    renewed = await auth(client, token(ttl_s=60))
    assert renewed == {"type": "OK", "id": "a"}
    (conn,) = kit.gateway._sockets
    assert conn.expires_at - kit.gateway.loop.time() > 50
    assert conn.due <= conn.expires_at


async def test_a_bad_token_does_not_end_an_open_connection(start: Start) -> None:
    """A token that is forged, expired, another user's or older is an ERROR; the connection keeps its own."""
    kit = await start()
    client = await short_lived(kit, 60)
    now_ms = kit.gateway._clock.now_ms()
    old = mint("acme", "ann", SECRET, now_ms - 5000, 60)
    for bearer, code in (
        ("nonsense", "unauthenticated"),
        (mint("acme", "ann", "x" * 40, now_ms, 60), "unauthenticated"),
        (mint("nobody", "ann", SECRET, now_ms, 60), "unauthenticated"),
        (mint("acme", "ann", SECRET, now_ms - 100_000, 1), "token_expired"),
        (mint("acme", "bob", SECRET, now_ms, 60), "not_permitted"),
        (old, "unauthenticated"),
    ):
        told = await auth(client, bearer)
        assert (told["type"], told["code"], told["id"]) == ("ERROR", code, "a")
    assert await auth(client, token(ttl_s=60)) == {"type": "OK", "id": "a"}


# -- tickets ----------------------------------------------------------------------------------------------


async def test_a_ticket_lets_in_once(start: Start) -> None:
    """A valid ticket is as good as its token; a second use, or a made-up one, is 4001."""
    tickets: dict[str, ClientIdentity] = {}

    async def redeem(ticket: str) -> ClientIdentity | None:
        return tickets.pop(ticket, None)

    kit = await start(redeem=redeem)
    now_ms = kit.gateway._clock.now_ms()
    tickets["good"] = ClientIdentity("acme", "ann", now_ms + 60_000, now_ms)
    client = await connect(kit.url(ticket="good"), proxy=None)
    assert (await frame_of(client))["type"] == "WELCOME"
    attach = await kit.shard.attached()
    assert (attach.user, attach.token_issued_ms) == ("ann", now_ms)
    for wrong in ("good", "made-up", ""):
        assert await closed_with(await connect(kit.url(ticket=wrong), proxy=None)) == 4001
    tickets["others"] = ClientIdentity("acme", "bob", now_ms + 60_000, now_ms)
    assert (
        await closed_with(await connect(kit.url("/notifications/ann", ticket="others"), proxy=None)) == 4002
    )
    tickets["brief"] = ClientIdentity("acme", "ann", now_ms + 100, now_ms)
    assert await closed_with(await connect(kit.url(ticket="brief"), proxy=None)) == 4101


async def test_tickets_while_the_database_is_away(start: Start) -> None:
    """4213: the client tries later, with another ticket."""

    async def redeem(ticket: str) -> ClientIdentity | None:
        raise StoreUnavailableError("away")

    kit = await start(redeem=redeem)
    assert await closed_with(await connect(kit.url(ticket="good"), proxy=None)) == 4213
