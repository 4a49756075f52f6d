"""Log-out: the token is refused, its sockets close, and the device gets no push for its former user."""

from __future__ import annotations

from typing import Any

from carillon.clock import SystemClock
from carillon.ids import slot_of
from carillon.messages import ClientReady, Logout
from tests.actors.shard_kit import Kit, make_event
from tests.actors.test_shard import device
from tests.support import eventually

clock = SystemClock()
TOKEN, OTHER = b"t" * 16, b"o" * 16


def logout(device_id: str | None, token: bytes = TOKEN, ttl_ms: int = 60_000) -> Logout:
    return Logout("t", "u", slot_of("t", "u"), device_id, token, clock.now_ms() + ttl_ms)


async def closed(kit: Kit, conn: int) -> None:
    await eventually(lambda: kit.gateway.closed.get(conn, (0,))[0] == 4001)


async def test_sockets_and_token(postgres_dsn: str) -> None:
    """Sockets of the token and of the device close with 4001, others stay; the token is refused."""
    async with Kit(postgres_dsn) as kit:
        await kit.gateway.attach_ready(1, device="phone", token_id=TOKEN)
        await kit.gateway.attach_ready(2, device="phone", token_id=OTHER)
        await kit.gateway.attach_ready(3, device="tablet", token_id=OTHER)
        await kit.router.link.request(logout("phone"))
        await closed(kit, 1)
        await closed(kit, 2)
        kit.gateway.attach(4, device="laptop", token_id=TOKEN)
        await closed(kit, 4)
        await kit.publish(make_event("u"))
        await kit.gateway.seen(3, 2)
        assert 3 not in kit.gateway.closed


async def test_the_successor_knows(postgres_dsn: str) -> None:
    """A shard that takes the user over refuses the token, until the token would have ended by itself."""
    async with Kit(postgres_dsn) as kit:
        await kit.router.link.request(logout(None))
        await kit.router.link.request(logout(None, OTHER, ttl_ms=-1))
        await kit.shard.stop()
        await kit.start_shard("shard-a")
        kit.gateway = await kit.dial("shard-a", "gateway-2")
        kit.router = await kit.dial("shard-a", "router-2")
        kit.gateway.attach(1, token_id=TOKEN)
        await closed(kit, 1)
        kit.gateway.attach(2, token_id=OTHER)
        await kit.gateway.seen(2, 1)
        kit.gateway.link.send_nowait(ClientReady(2))
        await kit.router.link.request(logout(None, b"n" * 16))
        kept: Any = await kit.db.fetch("select token_id from revoked_tokens")
        assert {row[0] for row in kept} == {TOKEN, b"n" * 16}


async def test_no_push_for_the_former_user(postgres_dsn: str) -> None:
    """The device's target goes with the log-out: the next event of that user finds none."""
    async with Kit(postgres_dsn) as kit:
        await kit.router.link.request(device("u"))
        (outcome,) = await kit.publish(make_event("u"))
        assert outcome.channels == ["in_app", "push"]
        await kit.router.link.request(logout("phone"))
        (outcome,) = await kit.publish(make_event("u"))
        assert outcome.channels == ["in_app"]
        assert await kit.db.fetchval("select count(*) from devices") == 0
