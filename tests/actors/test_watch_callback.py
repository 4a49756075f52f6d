"""A tenant's URL decides who may watch whom: asked over HTTP, signed, bounded, and failing closed."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from typing import Any

import pytest

from tests.actors.presence_kit import World
from tests.actors.test_presence import watched_at
from tests.support import eventually

SECRET = "s" * 32  # of the tenant, see presence_kit


class Friends:
    """A tenant's server, told by the test who is whose friend."""

    def __init__(self) -> None:
        self.friends: dict[str, set[str]] = {}
        self.asked: list[dict[str, Any]] = []
        self.signed: list[bool] = []
        self.status = 200
        self.body: bytes | None = None
        self.location = ""
        self.gate = asyncio.Event()
        self.gate.set()

    async def __aenter__(self) -> Friends:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self._writers: set[asyncio.StreamWriter] = set()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.gate.set()
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await self._server.wait_closed()

    @property
    def policy(self) -> dict[str, Any]:
        """The policy that has this server asked."""
        return {"presence": {"watch": "callback", "url": f"http://127.0.0.1:{self.port}/may"}}

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
                body = await reader.readexactly(int(headers["content-length"]))
                document = json.loads(body)
                self.asked.append(document)
                at, mac = (part.split("=")[1] for part in headers["carillon-signature"].split(","))
                expected = hmac.new(SECRET.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
                self.signed.append(mac == expected)
                await self.gate.wait()
                allowed = self.friends.get(document["watcher"], set())
                answer = self.body
                if answer is None:
                    users = [user for user in document["userIds"] if user in allowed]
                    answer = json.dumps({"userIds": [*users, "somebody-else"]}).encode()
                lines = f"HTTP/1.1 {self.status} X\r\nContent-Length: {len(answer)}\r\n{self.location}\r\n"
                writer.write(lines.encode() + answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.transport.abort()


def world_of(dsn: str, friends: Friends, **presence: Any) -> World:
    hosts = {"callback_hosts": f"other.example,127.0.0.1:{friends.port}", "callback_timeout_s": 5.0}
    return World(dsn, policy=friends.policy, presence=hosts | presence)


async def test_the_url_decides(postgres_dsn: str) -> None:
    """Those it names are watched, the others told as refused; the request is signed and says who asks."""
    async with Friends() as friends, world_of(postgres_dsn, friends) as world:
        friends.friends = {"ann": {"bob", "cat"}}
        ann, dan = await world.come("ann"), await world.come("dan")
        answer = await ann.watch("bob", "eve", "cat")
        assert (answer["type"], answer["refusedUserIds"]) == ("OK", ["eve"])
        await ann.sees("bob", "offline")
        await ann.sees("cat", "offline")
        assert watched_at(world) == {"bob", "cat"}
        refused = await dan.watch("bob")
        assert (refused["type"], refused["code"]) == ("ERROR", "not_permitted")
        assert friends.asked[0] == {"tenant": "acme", "watcher": "ann", "userIds": ["bob", "eve", "cat"]}
        assert friends.signed == [True, True]
        assert (await ann.watch())["type"] == "OK"  # nobody: nothing to ask
        assert len(friends.asked) == 2


async def test_an_answer_holds_for_a_while(postgres_dsn: str) -> None:
    """The same request of the same user, from another connection too, is not asked again; another one is."""
    async with Friends() as friends, world_of(postgres_dsn, friends) as world:
        friends.friends = {"ann": {"bob", "cat"}}
        for _ in range(3):
            ann = await world.come("ann")
            assert (await ann.watch("bob"))["type"] == "OK"
        assert len(friends.asked) == 1
        assert (await ann.watch("bob", "cat"))["type"] == "OK"
        assert len(friends.asked) == 2


async def test_a_friendship_that_ended(postgres_dsn: str) -> None:
    """What is watched is asked for again: who may no longer be watched is watched no longer."""
    times = {"recheck_s": 0.2, "permission_ttl_s": 0.05}
    async with Friends() as friends, world_of(postgres_dsn, friends, **times) as world:
        friends.friends = {"ann": {"bob", "cat"}}
        ann = await world.come("ann")
        assert (await ann.watch("bob", "cat"))["type"] == "OK"
        await eventually(lambda: ann.told("bob")[-1:] == ["offline"])  # asking again may tell it again
        friends.friends["ann"].discard("bob")
        await eventually(lambda: watched_at(world) == {"cat"})
        friends.friends["ann"].add("bob")
        await eventually(lambda: watched_at(world) == {"bob", "cat"})
        friends.status = 503  # not known is no reason to end what was allowed
        asked = len(friends.asked)
        await eventually(lambda: len(friends.asked) > asked + 1)
        assert watched_at(world) == {"bob", "cat"}
        assert not [frame for frame in ann.frames if frame["type"] == "ERROR"]


@pytest.mark.parametrize(
    ("status", "body", "location"),
    [
        (500, None, ""),
        (204, None, ""),
        (200, b"", ""),
        (200, b"[]", ""),
        (200, b'{"userIds":"bob"}', ""),
        (200, b'{"userIds":[1]}', ""),
        (200, b'{"userIds":["' + b"x" * 1_100_000 + b'"]}', ""),
        (302, b"", "Location: http://127.0.0.1:1/\r\n"),
    ],
)
async def test_without_a_proper_answer_nobody_is_watched(
    postgres_dsn: str, status: int, body: bytes | None, location: str
) -> None:
    """It fails closed and says that it may work later; redirects are not followed."""
    async with Friends() as friends, world_of(postgres_dsn, friends) as world:
        friends.friends = {"ann": {"bob"}}
        friends.status, friends.body, friends.location = status, body, location
        ann = await world.come("ann")
        answer = await ann.watch("bob")
        assert (answer["type"], answer["code"], answer["temporary"]) == ("ERROR", "unavailable", True)
        assert not watched_at(world)
        friends.status, friends.body, friends.location = 200, None, ""
        assert (await ann.watch("bob"))["type"] == "OK"


async def test_a_url_that_hangs_holds_up_nobody_else(postgres_dsn: str) -> None:
    """It is given up in time; meanwhile other frames of the connection pass; its wishes wait, bounded,
    and are answered in order."""
    async with Friends() as friends, world_of(postgres_dsn, friends, callback_timeout_s=0.5) as world:
        friends.friends = {"ann": {"bob", "cat"}}
        friends.gate.clear()
        ann = await world.come("ann")
        for number in range(6):
            await ann.send("WATCH_PRESENCE", userIds=["bob"], id=number)
        assert (await ann.answer("VISIBILITY", state="idle"))["type"] == "OK"
        await eventually(lambda: len([f for f in ann.frames if f.get("code") == "busy"]) == 2)
        await eventually(lambda: len([f for f in ann.frames if f.get("code") == "unavailable"]) >= 1)
        friends.gate.set()

        def answers() -> list[int]:
            return [frame["id"] for frame in ann.frames if frame.get("id") in range(6)]

        await eventually(lambda: len(answers()) == 6)
        assert [one for one in answers() if one < 4] == [0, 1, 2, 3]


async def test_a_host_the_operator_did_not_name_is_not_asked(postgres_dsn: str) -> None:
    """A policy that came past the API's check (another setting then) still sends no request."""
    async with Friends() as friends, world_of(postgres_dsn, friends, callback_hosts="") as world:
        friends.friends = {"ann": {"bob"}}
        ann = await world.come("ann")
        assert (await ann.watch("bob"))["code"] == "not_permitted"
        assert friends.asked == []
