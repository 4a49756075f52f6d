"""Everything a client can reach, real but for the coordinator: ingress, router, gateway, shard, Postgres."""

from __future__ import annotations

import asyncio
import json
import ssl
from typing import Any

import asyncpg
import httpx
from websockets.asyncio.client import ClientConnection, connect

from actors.gateway import Gateway
from actors.router import Router
from actors.shard import Shard
from carillon import tokens
from serve.ingress import Ingress
from stores.postgres.pool import open_pool
from stores.postgres.tenants import TenantStore
from tests.actors.fakes import FakeCoordinator, actor_config, fast_settings
from tests.actors.shard_kit import Kit, make_event
from tests.support import eventually

TENANT = "acme"


class Transports(Kit):
    """One replica, one gateway, one router, one shard; tenant "acme"."""

    def __init__(
        self, dsn: str, *, trusting: ssl.SSLContext | None = None, **sections: dict[str, Any]
    ) -> None:
        super().__init__(dsn)
        self._trusting = trusting
        self.settings = fast_settings(
            postgres={"dsn": dsn, "pool_size": 2},
            shard={
                "ack_flush_s": 0.01, "sweep_s": 0.1, "resume_wait_s": 0.3, "grace_s": 0.5,
                "clean_close_grace_s": 0.05, **sections.pop("shard", {}),
            },
            gateway={"attach_retry_s": 0.02, "close_timeout_s": 0.5, **sections.pop("gateway", {})},
            ingress={"drain_s": 0.5, "auth_cache_s": 0.2, **sections.pop("ingress", {})},
            **sections,
        )  # fmt: skip

    async def __aenter__(self) -> Transports:
        self.coordinator = await FakeCoordinator.start(self.settings)
        self.db = await asyncpg.connect(self.dsn)
        pool = await open_pool(self.settings.postgres, 1)
        tenants = TenantStore(pool)
        self.tenant = await tenants.create_tenant(TENANT)
        self.key = await tenants.create_key(TENANT, "all", ["admin"])
        await pool.close()
        self.shard = await self.start_shard("shard-a")
        self.router_actor = Router(self._config("router", "router-a"))
        await self.router_actor.start()
        self.gateway_actor = Gateway(self._config("gateway", "gateway-a"))
        await self.gateway_actor.start()
        self.ingress = Ingress(self._config("ingress", "ingress-a"))
        await self.ingress.start()
        self.http = httpx.AsyncClient(
            base_url=self.ingress.url,
            trust_env=False,
            timeout=60.0,
            headers={"Authorization": ""},
            verify=self._trusting or True,
        )
        self.streams: list[Stream] = []
        self.sockets: list[ClientConnection] = []
        self.stopped: set[Shard] = set()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for stream in self.streams:
            await stream.close()
        for socket in self.sockets:
            await socket.close()
        await self.http.aclose()
        await self.ingress.stop()
        assert self.ingress.app is not None
        inside = self.ingress.app.services.shares._inside
        await eventually(lambda: not inside, what="no request is counted any more")
        await self.gateway_actor.stop()
        await self.router_actor.stop()
        for shard in self.shards:
            if shard not in self.stopped:
                await shard.stop()
        await self.db.close()
        await self.coordinator.stop()

    def _config(self, kind: str, name: str) -> Any:
        return actor_config(kind, name, self.coordinator, settings=self.settings)

    async def lose_shard(self) -> None:
        """The shard goes, and comes back as another process with another term."""
        self.stopped.add(self.shard)
        self.coordinator.forget("shard-a")
        await self.shard.stop()
        self.shard = await self.start_shard("shard-a")

    def token(self, user: str = "ann", ttl_s: float = 600) -> str:
        return tokens.mint(TENANT, user, self.tenant.client_secret, self.clock.now_ms(), ttl_s)

    def auth(self, user: str = "ann") -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token(user)}"}

    async def send(self, title: str = "hello", user: str = "ann", **more: Any) -> Any:
        """POST /v1/events; the answer."""
        body = {"userId": user, "type": "t", "title": title, **more}
        answer = await self.http.post(
            "/v1/events", json=body, headers={"Authorization": f"Bearer {self.key}"}
        )
        assert answer.status_code == 202, answer.text
        return answer.json()

    async def publish_now(self, count: int, user: str = "ann", title: str = "hello") -> None:
        """Events straight to the shard."""
        hand = await self.dial("shard-a", "router-by-hand")
        from carillon.messages import Publish

        events = [make_event(user, TENANT, title) for _ in range(count)]
        for at in range(0, count, 100):
            await hand.link.request(Publish(events[at : at + 100]))

    async def call(self, method: str, path: str, user: str = "ann", **more: Any) -> httpx.Response:
        """A request of a user's device."""
        return await self.http.request(
            method, path, headers=self.auth(user) | more.pop("headers", {}), **more
        )

    async def stream(
        self, user: str = "ann", *, headers: dict[str, str] | None = None, login: bool = True, **query: Any
    ) -> Stream:
        """An open stream."""
        stream = Stream(self, self.auth(user) if login else {}, headers or {}, query)
        self.streams.append(stream)
        await stream.open()
        return stream

    async def socket(self, user: str = "ann", **query: Any) -> ClientConnection:
        """A WebSocket behind its WELCOME, made ready by a PING."""
        fields = "&".join(f"{name}={value}" for name, value in query.items())
        socket = await connect(
            f"{self.gateway_actor.url}?{fields}",
            additional_headers=self.auth(user),
            subprotocols=["carillon.v1.json"],  # type: ignore[list-item]
            compression=None,
            proxy=None,
        )
        self.sockets.append(socket)
        assert json.loads(await socket.recv())["type"] == "WELCOME"
        await socket.send('{"type":"PING"}')
        assert json.loads(await socket.recv())["type"] == "PONG"
        return socket

    async def presence(self, user: str = "ann") -> dict[str, Any]:
        answer = await self.http.get(f"/v1/presence/{user}", headers={"Authorization": f"Bearer {self.key}"})
        return answer.json()

    async def status_is(self, status: str, user: str = "ann") -> None:
        async def check() -> bool:
            return (await self.presence(user))["status"] == status

        await eventually(check, what=f"{user} {status}")


class Event:
    """One server-sent event."""

    def __init__(self, name: str, ident: str | None, data: str) -> None:
        self.name = name
        self.id = ident
        self.frame: dict[str, Any] = json.loads(data)


class Stream:
    """A client of GET /api/stream on a real HTTP client, reading lines as WHATWG HTML §9.2 says."""

    def __init__(
        self, world: Transports, auth: dict[str, str], headers: dict[str, str], query: dict[str, Any]
    ) -> None:
        self._world = world
        self._headers = auth | headers
        self._query = query
        self.beats = 0
        self.retry = 0
        self.ended = False

    async def open(self) -> None:
        request = self._world.http.build_request(
            "GET", "/api/stream", params=self._query, headers=self._headers
        )
        if "Authorization" not in self._headers:
            del request.headers["Authorization"]
        self.response = await self._world.http.send(request, stream=True)
        self.status = self.response.status_code
        self._lines = self.response.aiter_lines()

    async def problem(self) -> dict[str, Any]:
        await self.response.aread()
        return self.response.json()

    async def event(self, timeout_s: float = 30.0) -> Event | None:
        """The next event; None at the end of the stream."""
        name, ident, data = "message", None, []
        async with asyncio.timeout(timeout_s):
            async for line in self._lines:
                field, _, value = line.partition(": ")
                if line == ":":
                    self.beats += 1
                elif field == "retry":
                    self.retry = int(value)
                elif field == "event":
                    name = value
                elif field == "id":
                    ident = value
                elif field == "data":
                    data.append(value)
                elif not line and data:
                    return Event(name, ident, "\n".join(data))
        self.ended = True
        return None

    async def frame(self, timeout_s: float = 30.0) -> dict[str, Any]:
        event = await self.event(timeout_s)
        assert event is not None, "the stream has ended"
        return event.frame

    async def frames(self, count: int) -> list[dict[str, Any]]:
        return [await self.frame() for _ in range(count)]

    async def closed(self) -> int:
        """Read to the end: the code it tells, and then nothing more."""
        while True:
            event = await self.event()
            assert event is not None, "it ended without a word"
            if event.name == "close":
                assert await self.event() is None
                return event.frame["code"]

    async def close(self) -> None:
        await self.response.aclose()
