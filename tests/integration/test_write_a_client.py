"""docs/how-to/write-a-client.md against a real system: its frames, and the client it shows."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from websockets.asyncio.client import connect

from carillon.client_frames import parse_binary, parse_text
from carillon.notification import ALWAYS, OPTIONAL
from tests.integration.client_world import Wire
from tests.integration.transports_world import Transports
from tests.support import eventually

PAGE = (Path(__file__).resolve().parents[2] / "docs/how-to/write-a-client.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """Code of the page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def shown(name: str) -> list[dict[str, Any]]:
    """Frames of the page: one object a line."""
    return [json.loads(line) for block in blocks(f"json {name}") for line in block.splitlines()]


def test_frames_of_clients_are_taken() -> None:
    """Everything the page tells a client to send is a good frame, as JSON and as MessagePack."""
    frames = shown("client")
    assert len(frames) > 10
    for frame in frames:
        assert parse_text(json.dumps(frame).encode(), 1) == parse_binary(msgspec.msgpack.encode(frame), 1)


@pytest.mark.parametrize("protocol", ["carillon.v1.json", "carillon.v1.msgpack"])
async def test_frames_of_the_server(postgres_dsn: str, protocol: str) -> None:
    """Every frame the page shows is sent, with exactly those members in that order, in both encodings."""
    wanted = {frame["type"]: frame for frame in shown("server")}
    encode = json.dumps if protocol.endswith("json") else msgspec.msgpack.encode
    got: dict[str, dict[str, Any]] = {}
    async with Transports(postgres_dsn, presence={"watch": "tenant"}) as world:
        async with connect(
            f"{world.gateway_actor.url}?deviceId=laptop",
            additional_headers=world.auth(),
            subprotocols=[protocol],  # type: ignore[list-item]
            compression=None,
            proxy=None,
        ) as socket:

            async def frame() -> dict[str, Any]:
                data = await asyncio.wait_for(socket.recv(), 30)
                told = json.loads(data) if isinstance(data, str) else msgspec.msgpack.decode(data)
                got.setdefault(told["type"], told)
                return told

            await socket.send(encode({"type": "PING"}))
            ids = [(await world.send(f"n{n}"))["id"] for n in range(5)]
            for kind, members in (
                ("WATCH_PRESENCE", {"userIds": ["grace"]}),
                ("MARK_SEEN", {"notificationIds": ids[:1]}),
                ("MARK_READ", {"notificationIds": ids[:1]}),
                ("CLICK", {"notificationId": ids[1]}),
                ("DISMISS", {"notificationId": ids[2]}),
                ("ARCHIVE", {"notificationId": ids[3]}),
                ("MARK_ALL_READ", {}),
                ("ARCHIVE", {"notificationId": "01985a3e-7c1f-7a44-9c53-0f6a1c2b3d4e", "id": 2}),
            ):
                await socket.send(encode({"id": 1, "type": kind, **members}))
            await world.call("PUT", "/api/notifications/preferences", json={"sound": "bell"})
            while not {"ERROR", "PRESENCE", "PRESENTATION"} <= set(got):
                await frame()
        page = (await world.call("GET", "/api/sync?since=5&rev=5")).json()
    assert set(got) == set(wanted)
    for kind, told in got.items():
        assert list(told) == list(wanted[kind]), kind
    [notification] = [json.loads(block) for block in blocks("json notification")]
    assert list(got["NEW_NOTIFICATION"]["notification"]) == list(notification)
    [sync] = shown("sync")
    assert list(page) == list(sync)
    changes = [change["type"] for change in page["changes"]]
    assert set(changes) <= set(wanted)


def test_members_of_a_notification() -> None:
    """The page names every member that a notification can have."""
    [notification] = [json.loads(block) for block in blocks("json notification")]
    assert set(ALWAYS) < set(notification)
    optional = PAGE.split("When set there are also `")[1].split("`")[0].replace("\n", " ").split(", ")
    assert set(OPTIONAL) < {name.strip() for name in optional}


class Device:
    """The page's client on one transport, with a network that can be cut."""

    def __init__(self, world: Transports, wire: Wire, how: str) -> None:
        self.world = world
        self.wire = wire
        self.how = how
        self.code: dict[str, Any] = {}
        for block in blocks("python"):
            exec(compile(block, "write-a-client.md", "exec"), self.code)
        self.stream = self.code["Stream"]()
        self.received: list[str] = []
        self.feeds = 0
        self.ttl_s = 600.0
        receive = self.stream.receive

        def noted(frame: dict[str, Any]) -> bool:
            if frame["type"] == "NEW_NOTIFICATION":
                self.received.append(frame["notification"]["title"])
            return receive(frame)

        self.stream.receive = noted

    async def token(self) -> str:
        return self.world.token(ttl_s=self.ttl_s)

    async def read_feed(self) -> None:
        self.feeds += 1
        page = (await self.world.call("GET", "/api/notifications?limit=100")).json()
        self.stream.shown = {one["id"]: one for one in page["notifications"]}

    async def follow(self) -> int | None:
        """Until it stops."""
        url = f"127.0.0.1:{self.wire.port}"
        common = (self.token, "laptop", self.read_feed)
        if self.how == "socket":
            return await self.code["follow_socket"](self.stream, f"ws://{url}/ws", *common)
        async with httpx.AsyncClient(base_url=f"http://{url}", trust_env=False, timeout=60.0) as http:
            if self.how == "stream":
                return await self.code["follow_stream"](self.stream, http, *common)
            return await self.code["follow_polls"](self.stream, http, *common)

    def states(self) -> dict[str, tuple[bool, bool, bool]]:
        """Title to (read, seen, archived) of what is shown."""
        return {
            one["title"]: (one["read"], one["seen"], one["archived"]) for one in self.stream.shown.values()
        }


@asynccontextmanager
async def following(dsn: str, how: str) -> AsyncIterator[tuple[Transports, Device, asyncio.Task[Any]]]:
    """The page's client at work."""
    async with Transports(dsn, shard={"replay_page": 3, "recent_window": 4, "resume_wait_s": 0.1}) as world:
        wire = await Wire().start()
        wire.to(world.gateway_actor.url if how == "socket" else world.ingress.url)
        device = Device(world, wire, how)
        await world.send("before")
        task = asyncio.create_task(device.follow())
        try:
            await eventually(lambda: device.feeds == 1, what="the first WELCOME")
            yield world, device, task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await wire.stop()


@pytest.mark.parametrize("how", ["socket", "stream", "poll"])
async def test_the_shown_client_loses_nothing(postgres_dsn: str, how: str) -> None:
    """The page's client, cut off again and again while notifications come and are read elsewhere, ends with
    what the feed has, and acknowledged all of it."""
    async with following(postgres_dsn, how) as (world, device, _):
        sent = []
        for round_ in range(3):
            for n in range(5):
                sent.append((await world.send(f"n{round_}.{n}"))["id"])
                if n == 2:
                    device.wire.cut()
            # Reads and archives that happen while it is away.
            await world.call("POST", "/api/notifications/read", json={"notificationIds": sent[-1:]})
            await world.call("POST", f"/api/notifications/{sent[-2]}/archive")
            await eventually(lambda: len(device.stream.shown) == len(sent) + 1)
        await world.call("POST", "/api/notifications/read-all")
        listed = []
        for query in ("limit=100", "limit=100&status=archived"):
            listed += (await world.call("GET", f"/api/notifications?{query}")).json()["notifications"]
        wanted = {one["title"]: (one["read"], one["seen"], one["archived"]) for one in listed}
        await eventually(lambda: device.states() == wanted, what="the same states")
        assert device.feeds == 1, "every reconnect resumed"
        if how != "poll":
            assert device.received == [f"n{round_}.{n}" for round_ in range(3) for n in range(5)]

        sent_at = 0.0

        async def acknowledged() -> bool:
            nonlocal sent_at
            query = "select count(*) from notifications where delivered_at is null and seq > 1"
            left = await world.db.fetchval(query)
            if how == "poll" and left > 1 and time.monotonic() > sent_at + 0.5:
                sent_at = time.monotonic()
                await world.send("more")  # the next `since` acknowledges
            return left <= (how == "poll")

        await eventually(acknowledged, what="every notification is acknowledged")


@pytest.mark.parametrize("how", ["socket", "stream", "poll"])
async def test_the_shown_client_stops(postgres_dsn: str, how: str) -> None:
    """It comes back with a new token when one is called expired, and stops when its sessions are revoked."""
    async with following(postgres_dsn, how) as (world, device, task):
        device.ttl_s = -60.0
        device.wire.cut()
        await eventually(lambda: device.stream.failures >= 2, what="it is refused")
        assert not task.done()
        device.ttl_s = 600.0
        await world.send("n2")
        await eventually(lambda: "n2" in device.states())
        await world.http.post(
            "/v1/users/ann/sessions/revoke", headers={"Authorization": f"Bearer {world.key}"}
        )
        assert await asyncio.wait_for(task, 60) == 4001
