"""A client that knows the eight basic frames and nothing else, on a plain WebSocket library."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.fuzz.schema import check_server_frame
from tests.integration.transports_world import Transports
from tests.support import eventually


class BasicClient:
    """What somebody writes who has read of four frames to hear and four to say, and of no other."""

    def __init__(self) -> None:
        self.shown: dict[str, dict[str, Any]] = {}
        self.pongs = 0
        self.heard: list[str] = []

    async def run(self, socket: ClientConnection) -> None:
        async for message in socket:
            frame = json.loads(message)
            self.heard.append(check_server_frame(frame))
            kind = frame["type"]
            if kind == "NEW_NOTIFICATION":
                one = frame["notification"]
                self.shown[one["id"]] = one
                await socket.send(json.dumps({"type": "ACK", "notificationId": one["id"]}))
            elif kind == "NOTIFICATIONS_READ":
                for key in frame["notificationIds"]:
                    self.shown[key]["read"] = True
            elif kind == "ALL_NOTIFICATIONS_READ":
                for one in self.shown.values():
                    one["read"] = True
            elif kind == "PONG":
                self.pongs += 1

    def titles(self, *, read: bool) -> set[str]:
        return {one["title"] for one in self.shown.values() if one["read"] is read}


@pytest.mark.parametrize("path", ["/ws", "/ws/notifications", "/notifications/ann"])
async def test_eight_frames_suffice(postgres_dsn: str, path: str) -> None:
    """It gets all; its acknowledgements and reads are kept, reads elsewhere show, it may return."""
    async with Transports(postgres_dsn) as world:
        address = world.gateway_actor.url.removesuffix("/ws")

        def dial() -> Any:
            return connect(f"{address}{path}?token={world.token()}", proxy=None)

        first, second = BasicClient(), BasicClient()
        async with dial() as one, dial() as two:
            tasks = [asyncio.create_task(first.run(one)), asyncio.create_task(second.run(two))]
            await one.send('{"type":"PING"}')
            await eventually(lambda: first.pongs == 1, what="PONG")
            ids = [(await world.send(f"n{n}"))["id"] for n in range(4)]
            for client in (first, second):
                await eventually(lambda c=client: list(c.shown) == ids, what="all, in order")

            async def delivered() -> bool:
                count = "select count(*) from notifications where delivered_at is not null"
                return await world.db.fetchval(count) == 4

            await eventually(delivered, what="its acknowledgements are kept")
            await one.send(json.dumps({"type": "MARK_READ", "notificationIds": ids[:2]}))
            for client in (first, second):
                await eventually(lambda c=client: c.titles(read=True) == {"n0", "n1"}, what="read on both")
            # What it has never heard of happens, too: it shows what it knows of, and stays.
            await world.call("POST", f"/api/notifications/{ids[2]}/archive")
            await world.call("POST", "/api/notifications/seen", json={"notificationIds": ids})
            await world.call("POST", f"/api/notifications/{ids[3]}/click")
            await two.send('{"type":"MARK_ALL_READ"}')
            unread = "select unread from streams"

            async def all_read() -> bool:
                return await world.db.fetchval(unread) == 0

            await eventually(all_read, what="all are read")
            last = (await world.send("n4"))["id"]
            for client in (first, second):
                await eventually(lambda c=client: last in c.shown, what="still served")
            assert await world.db.fetchval(unread) == 1
            await one.send('{"type":"MARK_ALL_READ"}')
            for client in (first, second):
                await eventually(lambda c=client: c.titles(read=False) == set(), what="all read on both")
                assert "WELCOME" in client.heard
                assert "ERROR" not in client.heard
        await asyncio.gather(*tasks)
        assert await world.db.fetchval("select unread from streams") == 0
        # It comes back as it came: without a position there is no backlog, and news arrive.
        async with dial() as again:
            back = BasicClient()
            task = asyncio.create_task(back.run(again))
            await eventually(lambda: back.heard == ["WELCOME"])
            await again.send('{"type":"PING"}')
            await eventually(lambda: back.pongs == 1)
            late = (await world.send("n5"))["id"]
            await eventually(lambda: list(back.shown) == [late])
        await asyncio.gather(task)
