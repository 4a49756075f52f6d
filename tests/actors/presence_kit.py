"""Shards and gateways, all real, on one Postgres, with clients that watch each other."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import msgpack
from websockets.asyncio.client import ClientConnection, connect

from actors.gateway import Gateway
from carillon.ids import slot_of
from tests.actors.fakes import actor_config
from tests.actors.gateway_kit import TENANT, read_keys, token
from tests.actors.shard_kit import Kit
from tests.support import eventually


class Client:
    """A device on a WebSocket: keeps every frame."""

    def __init__(self, socket: ClientConnection, user: str) -> None:
        self.socket = socket
        self.user = user
        self.frames: list[dict[str, Any]] = []
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        with contextlib.suppress(Exception):
            async for data in self.socket:
                self.frames.append(json.loads(data) if isinstance(data, str) else msgpack.unpackb(data))

    async def send(self, kind: str, **members: Any) -> None:
        """Send a frame."""
        frame = {"type": kind, **members}
        packed = self.socket.subprotocol == "carillon.v1.msgpack"
        await self.socket.send(msgpack.packb(frame) if packed else json.dumps(frame))

    async def answer(self, kind: str, **members: Any) -> dict[str, Any]:
        """Send a frame with an id and wait for its OK or ERROR."""
        ref = f"r{len(self.frames)}-{id(members)}"
        await self.send(kind, id=ref, **members)
        found = await eventually(lambda: [f for f in self.frames if f.get("id") == ref], what="an answer")
        return found[0]

    async def watch(self, *users: str) -> dict[str, Any]:
        """WATCH_PRESENCE, answered."""
        return await self.answer("WATCH_PRESENCE", userIds=list(users))

    def told(self, user: str) -> list[str]:
        """Every status told of a user."""
        return [f["status"] for f in self.frames if f["type"] == "PRESENCE" and f["userId"] == user]

    async def sees(self, user: str, *statuses: str) -> dict[str, Any]:
        """Wait until exactly these statuses were told of a user; the last frame."""
        await eventually(lambda: self.told(user) == list(statuses), what=f"{statuses} of {user}")
        return [f for f in self.frames if f["type"] == "PRESENCE" and f["userId"] == user][-1]

    async def close(self, code: int = 1000) -> None:
        """Close the socket."""
        await self.socket.close(code)
        await self._reader


class World:
    """A `Kit` with gateways; its tenant lets everybody watch everybody."""

    def __init__(
        self, dsn: str, *, policy: dict[str, Any] | None = None, presence: dict[str, Any] | None = None,
        gateways: int = 1, redis: dict[str, Any] | None = None, **shard: Any,
    ) -> None:  # fmt: skip
        quick = {"coalesce_s": 0.01, "retry_s": 0.02, "recheck_s": 60.0}
        self.kit = Kit(
            dsn, presence=quick | (presence or {}), redis=redis, **({"policy_refresh_s": 0.1} | shard)
        )
        self.policy = {"presence": {"watch": "tenant"}} if policy is None else policy
        self.gateways: list[Gateway] = []
        self.clients: list[Client] = []
        self._count = gateways

    async def __aenter__(self) -> World:
        await self.kit.__aenter__()
        await self.kit.db.execute(
            "insert into tenants (tenant, client_secret, settings) values ($1, $2, $3)",
            TENANT, "s" * 32, json.dumps({"policy": self.policy}),
        )  # fmt: skip
        for _ in range(self._count):
            await self.add_gateway()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for client in self.clients:
            await client.close()
        for gateway in self.gateways:
            await gateway.stop()
        await self.kit.__aexit__(*exc)

    async def add_gateway(self) -> Gateway:
        """Start one more gateway."""
        name = f"gateway-real-{len(self.gateways)}"
        settings = self.kit.settings.with_values(gateway={"attach_retry_s": 0.02, "close_timeout_s": 0.5})
        config = actor_config("gateway", name, self.kit.coordinator, settings=settings)
        gateway = Gateway(config, read_keys=read_keys)
        await gateway.start()
        self.gateways.append(gateway)
        return gateway

    async def set_policy(self, policy: dict[str, Any]) -> None:
        """Change the tenant's policy in the store."""
        await self.kit.db.execute(
            "update tenants set settings = $2 where tenant = $1", TENANT, json.dumps({"policy": policy})
        )

    async def come(
        self, user: str, gateway: int = 0, *, msgpack: bool = False, device: str = "d", welcome: bool = True
    ) -> Client:
        """Connect a device; its WELCOME has come."""
        name = "carillon.v1.msgpack" if msgpack else "carillon.v1.json"
        port = self.gateways[gateway].url.rsplit(":", 1)[1].split("/")[0]
        socket = await connect(
            f"ws://127.0.0.1:{port}/ws?deviceId={device}",
            additional_headers={"Authorization": f"Bearer {token(user)}"},
            subprotocols=[name],  # type: ignore[list-item]
            compression=None, proxy=None, ping_interval=None, close_timeout=2,
        )  # fmt: skip
        client = Client(socket, user)
        self.clients.append(client)
        if welcome:
            await eventually(lambda: client.frames, what=f"the WELCOME of {user}")
        return client

    def give(self, user: str, shard: str | None) -> None:
        """Move the slot of a user."""
        self.kit.coordinator.set_owner(slot_of(TENANT, user), shard)
