"""The mirror of presence in Redis: what it says, how long, and that nothing waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any
from urllib.parse import urlsplit

import redis.asyncio as aioredis

from tests.actors.gateway_kit import TENANT
from tests.actors.presence_kit import World
from tests.actors.shard_kit import make_event
from tests.support import eventually


class Reader:
    """Another system that reads the mirror."""

    def __init__(self, url: str) -> None:
        self.redis: Any = aioredis.Redis.from_url(url)

    async def status(self, user: str) -> str | None:
        """What the mirror says of a user."""
        value = await self.redis.get(f"carillon:presence:{TENANT}:{user}")
        return None if value is None else json.loads(value)["status"]

    async def says(self, user: str, status: str | None) -> dict[str, Any]:
        """Wait until it does; all that it says then."""

        async def found() -> dict[str, Any] | None:
            value = await self.redis.get(f"carillon:presence:{TENANT}:{user}")
            document = {"status": None} if value is None else json.loads(value)
            return document if document["status"] == status else None

        return await eventually(found, what=f"{status} of {user} in Redis")

    async def __aenter__(self) -> Reader:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.redis.aclose()


class Relay:
    """A way to Redis that can break (connections are refused) or hang (nothing comes through)."""

    def __init__(self, url: str) -> None:
        self._to = urlsplit(url)
        self._server: asyncio.Server | None = None
        self._port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self.hangs = False

    @property
    def url(self) -> str:
        """Like the original, by way of here."""
        return f"redis://:{self._to.password}@127.0.0.1:{self._port}/0"

    async def open(self) -> None:
        """Let connections through, at the same port as before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def shut(self) -> None:
        """Cut all connections and refuse new ones."""
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._to.port is not None
        back, forth = await asyncio.open_connection("127.0.0.1", self._to.port)
        self._writers |= {writer, forth}
        with contextlib.suppress(OSError):
            await asyncio.gather(self._pump(reader, forth), self._pump(back, writer))
        for one in (writer, forth):
            one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            if not self.hangs:
                writer.write(data)
        writer.transport.abort()


async def test_the_mirror_follows_and_lapses(postgres_dsn: str, redis_url: str) -> None:
    """A key per user who is there, renewed while it is; offline is told once, then the key lapses."""
    times = {"mirror_ttl_s": 1.5}
    async with (
        Reader(redis_url) as mirror,
        World(postgres_dsn, presence=times, redis={"url": redis_url}) as world,
    ):
        bob = await world.come("bob")
        await mirror.says("bob", "active")

        async def lapses() -> bool:
            return 0 < await mirror.redis.pttl(f"carillon:presence:{TENANT}:bob") <= 1500

        await eventually(lapses)
        await bob.send("VISIBILITY", state="hidden")
        await mirror.says("bob", "idle")
        await asyncio.sleep(3.5)  # more than two lives of a key
        await mirror.says("bob", "idle")
        assert await mirror.status("ann") is None
        await bob.answer("SET_PRESENCE", mode="invisible")
        await mirror.says("bob", "offline")
        await mirror.says("bob", None)  # as if it had gone: that it is there shows in nothing
        await bob.answer("VISIBILITY", state="focused")
        await bob.answer("VISIBILITY", state="hidden")
        await bob.answer("SET_PRESENCE", mode="invisible")
        await asyncio.sleep(1.1)  # two rounds of renewal
        assert await mirror.status("bob") is None
        await bob.answer("SET_PRESENCE", mode="auto")
        await mirror.says("bob", "idle")
        await bob.close()
        assert (await mirror.says("bob", "offline"))["lastSeenAt"].endswith("Z")
        await mirror.says("bob", None)


async def test_a_lost_shard_leaves_nobody_online_for_ever(postgres_dsn: str, redis_url: str) -> None:
    """What a shard wrote lapses after it: keys of a crash are no ghosts."""
    async with (
        Reader(redis_url) as mirror,
        World(postgres_dsn, presence={"mirror_ttl_s": 0.5}, redis={"url": redis_url}) as world,
    ):
        await world.come("bob")
        await mirror.says("bob", "active")
        for gateway in world.gateways:
            await gateway.stop()
        await world.kit.shard.stop()
        await mirror.says("bob", None)


async def test_redis_may_be_gone(postgres_dsn: str, redis_url: str) -> None:
    """Redis refused, cut or hanging: presence, watching and delivery go on; back again, it is filled."""
    relay = Relay(redis_url)
    await relay.open()
    times = {"mirror_ttl_s": 0.6, "mirror_retry_s": 0.1}
    async with (
        Reader(redis_url) as mirror,
        World(postgres_dsn, presence=times, redis={"url": relay.url, "timeout_s": 0.2}) as world,
    ):
        ann, bob = await world.come("ann"), await world.come("bob")
        await ann.watch("bob")
        await ann.sees("bob", "active")
        await mirror.says("bob", "active")
        await relay.shut()
        await bob.send("VISIBILITY", state="idle")
        await ann.sees("bob", "active", "idle")
        (outcome,) = await world.kit.publish(make_event("bob", TENANT))
        assert outcome.status == "delivered"
        await mirror.says("bob", None)
        await relay.open()
        await mirror.says("bob", "idle")
        relay.hangs = True
        await bob.send("VISIBILITY", state="focused")
        await ann.sees("bob", "active", "idle", "active")
        (outcome,) = await world.kit.publish(make_event("bob", TENANT))
        assert outcome.status == "delivered"
        await mirror.says("bob", None)
        relay.hangs = False
        await mirror.says("bob", "active")
        await mirror.says("ann", "active")
    await relay.shut()
