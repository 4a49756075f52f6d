"""How a gateway knows its clients: keys that rotate."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from websockets.asyncio.client import connect

from carillon.token_keys import PublicKey, TokenKeys
from tests.actors.gateway_kit import SECRET, Start, closed_with, frame_of, running


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
