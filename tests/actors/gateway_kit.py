"""What the gateway's tests share: a gateway on sockets, shards that greet as sessions do, raw clients."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ClassVar

from websockets.asyncio.client import ClientConnection, connect

from actors.gateway import Gateway
from actors.link import Link
from carillon import server_frames
from carillon.clock import SystemClock
from carillon.ids import slot_of
from carillon.messages import Attach, AttachRefused, CloseSocket, Deliver, Write
from carillon.token_keys import TokenKeys
from carillon.tokens import mint
from tests.actors.fakes import FakeCoordinator, FakeShard, actor_config, fast_settings
from tests.support import eventually

TENANT = "acme"
SECRET = "the client secret of acme, 32 bytes and more"
ID = "018f0000-0000-7000-8000-0000000000aa"


def token(user: str = "ann", *, ttl_s: float = 60, secret: str = SECRET, tenant: str = TENANT) -> str:
    return mint(tenant, user, secret, SystemClock().now_ms(), ttl_s)


async def read_keys(tenant: str, /, *, refresh: bool = False) -> TokenKeys | None:
    return TokenKeys((SECRET,)) if tenant == TENANT else None


def notification(seq: int, text: str = "") -> bytes:
    return server_frames.new_notification(json.dumps({"seq": seq, "text": text}))


class SessionShard:
    """A shard whose sessions greet every attachment with WELCOME; the rest the test sends itself."""

    def __init__(self, shard: FakeShard) -> None:
        self.shard = shard
        self.term = 1
        self.greet = True
        self.attaches: list[Attach] = []
        self.link: Link | None = None
        self.links: dict[int, Link] = {}
        shard.answer = self._receive

    @property
    def name(self) -> str:
        return self.shard.name

    def _receive(self, link: Link, message: Any, request: int) -> bool:
        if type(message) is not Attach:
            return False
        if not self.shard.owns(message.slot):
            link.send_nowait(AttachRefused([message.conn], 1))
            return True
        self.attaches.append(message)
        self.link = self.links[message.conn] = link
        if self.greet and not message.reattach:
            self.welcome(message)
        return True

    def received(self, kind: type[Any]) -> list[Any]:
        return [message for message, _ in self.shard.received if type(message) is kind]

    def messages(self) -> list[Any]:
        return [message for message, _ in self.shard.received]

    def welcome(self, attach: Attach, *, seq: int | None = None, recovered: bool | None = None) -> None:
        at = attach.last_seq if seq is None else seq
        frame = server_frames.welcome(
            attach.session_id, attach.device, "e1", at, at, 0, 25_000, recovered, "2026-01-01T00:00:00.000Z"
        )
        self.write(Write([attach.conn], frame, at, at, epoch="e1"))

    def write(self, *writes: Write, term: int | None = None) -> None:
        assert self.link is not None
        self.link.send_nowait(Deliver(self.name, self.term if term is None else term, list(writes)))

    def notify(self, seq: int, *attaches: Attach, text: str = "", **more: Any) -> None:
        conns = [attach.conn for attach in attaches or self.attaches[-1:]]
        self.write(Write(conns, notification(seq, text), seq, seq, **more))

    def close(self, code: int, reason: str, *, term: int | None = None) -> None:
        assert self.link is not None
        conns = [attach.conn for attach in self.attaches]
        self.link.send_nowait(
            CloseSocket(self.name, self.term if term is None else term, conns, code, reason)
        )

    async def attached(self, count: int = 1) -> Attach:
        await eventually(lambda: len(self.attaches) >= count, what=f"{count} attachments at {self.name}")
        return self.attaches[count - 1]

    async def got(self, kind: type[Any], count: int = 1) -> Any:
        await eventually(lambda: len(self.received(kind)) >= count, what=f"{count} {kind.__name__}")
        return self.received(kind)[count - 1]


class Kit:
    """A coordinator, shards and one gateway."""

    def __init__(self, coordinator: FakeCoordinator, gateway: Gateway) -> None:
        self.coordinator = coordinator
        self.gateway = gateway
        self.shards: list[SessionShard] = []

    @property
    def shard(self) -> SessionShard:
        return self.shards[0]

    @property
    def port(self) -> int:
        return int(self.gateway.url.rsplit(":", 1)[1].split("/")[0])

    async def add_shard(self, name: str) -> SessionShard:
        shard = SessionShard(await FakeShard.start(self.coordinator, name))
        self.shards.append(shard)
        return shard

    def give(self, shard: SessionShard | None, user: str = "ann") -> None:
        self.coordinator.set_owner(slot_of(TENANT, user), None if shard is None else shard.name)

    def url(self, path: str = "/ws", **query: Any) -> str:
        fields = "&".join(f"{name}={value}" for name, value in query.items())
        return f"ws://127.0.0.1:{self.port}{path}" + (f"?{fields}" if fields else "")

    async def client(
        self,
        user: str = "ann",
        *,
        path: str = "/ws",
        msgpack: bool = False,
        legacy: bool = False,
        **query: Any,
    ) -> ClientConnection:
        """A client that has not read its WELCOME yet."""
        name = "carillon.v1.msgpack" if msgpack else "carillon.v1.json"
        return await connect(
            self.url(path, **query),
            additional_headers={"Authorization": f"Bearer {token(user)}"},
            subprotocols=None if legacy else [name],  # type: ignore[list-item]
            compression=None,
            proxy=None,
            max_size=None,
            ping_interval=None,
            close_timeout=2,
        )


Start = Callable[..., Awaitable[Kit]]


@contextlib.asynccontextmanager
async def running(**sections: dict[str, Any]) -> AsyncIterator[Start]:
    """Gives a function that starts a kit, `await start(shards=2, heartbeat_s=..)`; stops all at the end."""
    kits: list[Kit] = []

    async def start(shards: int = 1, read: Any = read_keys, redeem: Any = None, **gateway: Any) -> Kit:
        settings = fast_settings(
            gateway={"close_timeout_s": 0.5, "attach_retry_s": 0.02, **gateway}, **sections
        )
        coordinator = await FakeCoordinator.start(settings)
        config = actor_config("gateway", f"gateway-{os.urandom(3).hex()}", coordinator, settings=settings)
        kit = Kit(coordinator, Gateway(config, read_keys=read, redeem=redeem))
        kits.append(kit)
        for index in range(shards):
            await kit.add_shard(f"shard-{index}-{os.urandom(3).hex()}")
        coordinator.owners = dict.fromkeys(range(1024), kit.shards[0].name) if shards else {}
        coordinator.publish_map()
        await kit.gateway.start()
        for shard in kit.shards:
            await eventually(lambda shard=shard: shard.shard.links, what="the gateway's link to a shard")
        return kit

    try:
        yield start
    finally:
        for raw in RawClient.opened:
            raw.writer.transport.abort()
        RawClient.opened.clear()
        for kit in kits:
            await kit.gateway.stop()
            for shard in kit.shards:
                await shard.shard.stop()
            await kit.coordinator.stop()


async def frame_of(client: ClientConnection, timeout_s: float = 30.0) -> dict[str, Any]:
    """The next frame of a JSON client."""
    async with asyncio.timeout(timeout_s):
        data = await client.recv()
    assert isinstance(data, str)
    return json.loads(data)


async def closed_with(client: ClientConnection, timeout_s: float = 30.0) -> int | None:
    """Wait for the end of a connection, reading what comes before; its close code."""
    async with asyncio.timeout(timeout_s):
        with contextlib.suppress(Exception):
            while True:
                await client.recv()
        await client.wait_closed()
    return client.close_code


class RawClient:
    """A client that can do what websockets would not: half frames, no mask, no reading."""

    opened: ClassVar[list[RawClient]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened.append(self)
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int, *, limit: int = 2**16) -> RawClient:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=limit))

    @classmethod
    async def upgraded(cls, kit: Kit, user: str = "ann", *, more: bytes = b"") -> RawClient:
        self = await cls.open(kit.port)
        self.writer.write(upgrade_request(f"/ws?token={token(user)}") + more)
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        return self

    async def frame(self) -> tuple[int, bytes]:
        """The next frame: (first byte, payload)."""
        head = await self.reader.readexactly(2)
        length = head[1]
        if length == 126:
            length = int.from_bytes(await self.reader.readexactly(2), "big")
        elif length == 127:
            length = int.from_bytes(await self.reader.readexactly(8), "big")
        return head[0], await self.reader.readexactly(length)

    async def close_code(self) -> int:
        """Read on until the close frame."""
        async with asyncio.timeout(30):
            while True:
                first, payload = await self.frame()
                if first == 0x88:
                    return int.from_bytes(payload[:2], "big")

    async def end(self) -> None:
        self.writer.close()
        with contextlib.suppress(Exception):
            await self.writer.wait_closed()


def upgrade_request(path: str, *headers: str) -> bytes:
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        f"GET {path} HTTP/1.1", "Host: localhost", "Upgrade: websocket", "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", *headers,
    ]  # fmt: skip
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def client_frame(payload: bytes, opcode: int = 1, *, fin: bool = True, mask: bool = True) -> bytes:
    """A frame as a client sends it."""
    length = len(payload)
    head = bytearray([(0x80 if fin else 0) | opcode])
    bit = 0x80 if mask else 0
    if length < 126:
        head.append(bit | length)
    elif length < 65_536:
        head.append(bit | 126)
        head += length.to_bytes(2, "big")
    else:
        head.append(bit | 127)
        head += length.to_bytes(8, "big")
    return bytes(head) + (b"\0\0\0\0" if mask else b"") + payload
