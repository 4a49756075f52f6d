"""Everything between a client and PostgreSQL, real, in one loop: ingress, router, shard, gateway; and wires
    to cut.

Only the coordinator is a stand-in: slots move when a test says so.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import asyncpg

from actors.gateway import Gateway
from actors.router import Router
from actors.shard import Shard
from serve.ingress import Ingress
from stores.postgres.pool import open_pool
from stores.postgres.tenants import TenantStore
from tests.actors.fakes import FakeCoordinator, actor_config, fast_settings
from tests.support import eventually


class Wire:
    """A TCP proxy that can be cut.

    Attributes:
        target: (host, port) of new connections; None: they are closed at once.
        swallow: answers of this many further requests are swallowed and their connections reset: the request
            arrives,
            the client hears nothing.
        hold: while True nothing goes back to the client.
        connections: how many were opened.
    """

    def __init__(self) -> None:
        self.target: tuple[str, int] | None = None
        self.swallow = 0
        self.hold = False
        self.connections = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> Wire:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def to(self, url: str) -> None:
        """New connections lead to the host and port of `url`."""
        host, port = url.split("//")[1].split("/")[0].rsplit(":", 1)
        self.target = (host, int(port))

    def cut(self) -> None:
        """Reset every connection."""
        for writer in list(self._open):
            writer.transport.abort()

    async def stop(self) -> None:
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        self._open.add(writer)
        try:
            if self.target is None:
                return
            far_reader, far_writer = await asyncio.open_connection(*self.target)
            self._open.add(far_writer)
            try:
                await asyncio.gather(
                    self._pipe(reader, far_writer), self._back(far_reader, writer, far_writer)
                )
            finally:
                self._open.discard(far_writer)
                far_writer.transport.abort()
        except OSError:
            pass
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _back(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, far: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(65536):
            if self.swallow:
                self.swallow -= 1
                break
            while self.hold:
                await asyncio.sleep(0.01)
            writer.write(data)
            await writer.drain()
        writer.transport.abort()
        far.transport.abort()


class ClientWorld:
    """The system, a tenant "acme" with a key, and a wire before each door.

    Args:
        sections: settings on top: `ClientWorld(dsn, gateway={"auth_timeout_s": 1})`.
    """

    def __init__(self, dsn: str, **sections: dict[str, Any]) -> None:
        self.dsn = dsn
        base: dict[str, dict[str, Any]] = {
            "postgres": {"dsn": dsn, "pool_size": 2},
            "shard": {
                "ack_flush_s": 0.01,
                "sweep_s": 0.1,
                "resume_wait_s": 0.3,
                "grace_s": 0.3,
                "clean_close_grace_s": 0.05,
            },
            "gateway": {"close_timeout_s": 0.5, "attach_retry_s": 0.02},
            "ingress": {"auth_cache_s": 0.2},
        }
        for name, values in sections.items():
            base[name] = {**base.get(name, {}), **values}
        self.settings = fast_settings(**base)
        self.gateways: list[Gateway] = []
        self.ingresses: list[Ingress] = []

    async def __aenter__(self) -> ClientWorld:
        self.coordinator = await FakeCoordinator.start(self.settings)
        self.db = await asyncpg.connect(self.dsn)
        pool = await open_pool(self.settings.postgres, 1)
        tenants = TenantStore(pool)
        await tenants.create_tenant("acme")
        self.key = await tenants.create_key("acme", "all", ["admin"])
        await pool.close()
        await self.db.execute(
            "insert into shards (shard, term, node, incarnation) values ('shard-a', 1, 'local', 'x')"
        )
        self.shard = Shard(actor_config("shard", "shard-a", self.coordinator, settings=self.settings))
        await self.shard.start()
        self.coordinator.set_owner(range(1024), "shard-a")
        self.router = Router(actor_config("router", "router-local", self.coordinator, settings=self.settings))
        await self.router.start()
        await self.start_ingress()
        await self.start_gateway()
        self.http = await Wire().start()
        self.ws = await Wire().start()
        self.http.to(self.ingresses[-1].url)
        self.ws.to(self.gateways[-1].url)
        await eventually(lambda: len(self.shard._slots) == 1024)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.http.stop()
        await self.ws.stop()
        for gateway in self.gateways:
            await gateway.stop()
        for ingress in self.ingresses:
            await ingress.stop()
        await self.router.stop()
        await self.shard.stop()
        await self.db.close()
        await self.coordinator.stop()

    @property
    def url(self) -> str:
        """Of the wire before the ingress."""
        return f"http://127.0.0.1:{self.http.port}"

    @property
    def ws_url(self) -> str:
        """Of the wire before the gateway."""
        return f"ws://127.0.0.1:{self.ws.port}/ws"

    async def start_ingress(self) -> Ingress:
        """One more replica."""
        name = f"ingress-{os.urandom(3).hex()}"
        ingress = Ingress(actor_config("ingress", name, self.coordinator, settings=self.settings))
        await ingress.start()
        self.ingresses.append(ingress)
        return ingress

    async def start_gateway(self) -> Gateway:
        """One more gateway."""
        name = f"gateway-{os.urandom(3).hex()}"
        gateway = Gateway(actor_config("gateway", name, self.coordinator, settings=self.settings))
        await gateway.start()
        self.gateways.append(gateway)
        return gateway

    async def stored(self, user: str | None = None) -> list[str]:
        """Titles of the user's (everybody's) notifications by seq, from PostgreSQL."""
        rows = await self.db.fetch(
            "select n.content from notifications n join streams s using (stream_id)"
            " where $1::text is null or s.user_id = $1 order by s.user_id, n.seq",
            user,
        )
        return [row["content"].split('"title":"')[1].split('"')[0] for row in rows]

    async def count(self, condition: str) -> int:
        """Notifications in PostgreSQL for which `condition` holds."""
        return await self.db.fetchval(f"select count(*) from notifications where {condition}")

    def links_of_shard(self) -> list[Any]:
        """Links that others have to the shard."""
        return list(self.shard._membership._server._links)
