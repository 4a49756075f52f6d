"""The own door's short cut for `POST /v1/events`: what HTTP/1.1 allows, answered as by the long way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from carillon.messages import Publish
from cluster.embedded import EmbeddedPostgres
from serve.door import DoorProtocol
from tests.integration.ingress_world import World
from tests.support import eventually

BODY = b'{"userId":"ada","type":"t","title":"Hello"}'
LIMIT = 300_000

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_world(postgres_server: EmbeddedPostgres) -> AsyncIterator[World]:
    """One replica for the module."""
    admin = await asyncpg.connect(postgres_server.dsn)
    await admin.execute("create database test_door template template strategy wal_log")
    dsn = postgres_server.dsn_of("test_door")
    made = await World(dsn, ingress={"max_request_bytes": LIMIT}).start()
    yield made
    await made.stop()
    await admin.execute("drop database test_door with (force)")
    await admin.close()


@pytest_asyncio.fixture(loop_scope="module")
async def world(shared_world: World) -> World:
    """The replica, as new."""
    await shared_world.reset()
    return shared_world


@pytest.fixture
def hot(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every request that took the short cut."""
    taken: list[Any] = []
    answer = DoorProtocol._answer

    async def noted(self: DoorProtocol, request: Any) -> None:
        taken.append(request)
        await answer(self, request)

    monkeypatch.setattr(DoorProtocol, "_answer", noted)
    return taken


class Wire:
    """A raw connection to the door."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def __aenter__(self) -> Wire:
        host, port = self._world.ingress.url.removeprefix("http://").split(":")
        self.reader, self.writer = await asyncio.open_connection(host, int(port))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    def post(self, body: bytes = BODY, *lines: str, path: str = "/v1/events", version: str = "1.1") -> bytes:
        """The bytes of a request; a line replaces the default of its name, "Name:" alone leaves it out."""
        headers = {
            "host": "Host: localhost",
            "authorization": f"Authorization: Bearer {self._world.key}",
            "content-length": f"Content-Length: {len(body)}",
        }
        headers.update({line.split(":", 1)[0].lower(): line for line in lines})
        kept = [line for line in headers.values() if not line.endswith(":")]
        return "\r\n".join([f"POST {path} HTTP/{version}", *kept, "", ""]).encode() + body

    def send(self, data: bytes) -> None:
        """Write."""
        self.writer.write(data)

    async def answer(self) -> tuple[int, dict[str, str], Any]:
        """The next answer: status, headers, JSON."""
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)).decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:-2])}
        status = int(head[0].split(" ", 2)[1])
        if status == 100:
            return status, headers, None
        body = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), 10)
        return status, headers, json.loads(body) if body else None

    async def closed(self) -> bool:
        """Whether the door hangs up."""
        return await asyncio.wait_for(self.reader.read(1), 10) == b""


async def test_plain(world: World, hot: list[Any]) -> None:
    """Requests one after another on a connection take the short cut, and their ids are echoed."""
    async with Wire(world) as wire:
        for number in range(3):
            wire.send(wire.post(BODY, f"X-Request-Id: mine-{number}"))
            status, headers, told = await wire.answer()
            assert (status, headers["x-request-id"]) == (202, f"mine-{number}")
            assert headers["content-type"] == "application/json"
            assert told["status"] == "stored"
    assert len(hot) == len(world.router.events) == 3


async def test_in_small_pieces(world: World, hot: list[Any]) -> None:
    """A request that arrives byte by byte is the same request."""
    async with Wire(world) as wire:
        for byte in wire.post():
            wire.send(bytes([byte]))
            await wire.writer.drain()
            await asyncio.sleep(0)
        assert (await wire.answer())[0] == 202
    assert len(hot) == 1


async def test_long_body(world: World, hot: list[Any]) -> None:
    """A body of many packets arrives whole; of a caller that is not known yet it goes the long way."""
    batch = json.dumps([{"userId": "ada", "type": "t", "title": "x" * 200}] * 1000).encode()
    async with Wire(world) as wire:
        for short_cuts in (0, 1):
            wire.send(wire.post(batch))
            status, _, told = await wire.answer()
            assert (status, len(told["results"])) == (202, 1000)
            assert len(hot) == short_cuts


@pytest.mark.parametrize(
    ("lines", "path", "version"),
    [
        ((), "/v1/events?dryRun=false", "1.1"),
        (("Connection: close",), "/v1/events", "1.1"),
        ((), "/v1/events", "1.0"),
    ],
)
async def test_long_way(
    world: World, hot: list[Any], lines: tuple[str, ...], path: str, version: str
) -> None:
    """What is not the plain case goes uvicorn's way, with the same answer."""
    async with Wire(world) as wire:
        wire.send(wire.post(BODY, *lines, path=path, version=version))
        status, _, told = await wire.answer()
        assert (status, told["status"]) == (202, "stored")
        if version == "1.0" or "Connection: close" in lines:
            assert await wire.closed()
    assert not hot


async def test_chunked(world: World, hot: list[Any]) -> None:
    """A chunked body goes the long way."""
    async with Wire(world) as wire:
        head = wire.post(b"", "Content-Length:", "Transfer-Encoding: chunked")
        wire.send(head + b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n")
        assert (await wire.answer())[0] == 202
    assert not hot


async def test_expect_continue(world: World, hot: list[Any]) -> None:
    """A client that waits for 100 gets it."""
    async with Wire(world) as wire:
        request = wire.post(BODY, "Expect: 100-continue")
        wire.send(request[: -len(BODY)])
        assert (await wire.answer())[0] == 100
        wire.send(BODY)
        assert (await wire.answer())[0] == 202
    assert not hot


@pytest.mark.parametrize(
    ("body", "lines", "status", "code"),
    [
        (b"{", (), 400, "malformed"),
        (b"\xff\xfe", (), 400, "malformed"),
        (b"", (), 422, "invalid"),
        (b'{"userId":"ada","type":"t","title":"x","nope":1}', (), 422, "invalid"),
        (BODY, ("Authorization: Bearer crl_0123456789ab_" + "0" * 48,), 401, "unauthenticated"),
        (BODY, ("Authorization:",), 401, "unauthenticated"),
        (BODY, ("Idempotency-Key: " + "k" * 256,), 422, "invalid"),
        (b" " * (LIMIT + 1), (), 413, "too_large"),
    ],
)
async def test_refused_as_ever(
    world: World, body: bytes, lines: tuple[str, ...], status: int, code: str
) -> None:
    """Bad input gets the long way's problem document, and the connection serves its next request."""
    async with Wire(world) as wire:
        told = []
        for path in ("/v1/events", "/v1/events?dryRun=false"):
            wire.send(wire.post(body, *lines, "X-Request-Id: r", path=path))
            got, headers, document = await wire.answer()
            assert headers["content-type"] == "application/problem+json"
            told.append((got, document))
        assert told[0] == told[1]
        assert (told[0][0], told[0][1]["code"]) == (status, code)
        wire.send(wire.post())
        assert (await wire.answer())[0] == 202


async def test_pipelined(world: World, hot: list[Any]) -> None:
    """Requests that arrive together are answered in their order, whichever way they take."""
    async with Wire(world) as wire:
        health = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        requests = [wire.post(BODY, f"X-Request-Id: r{n}") for n in range(3)]
        wire.send(requests[0] + requests[1] + health + requests[2])
        answers = [await wire.answer() for _ in range(4)]
        assert [status for status, _, _ in answers] == [202, 202, 200, 202]
        assert [headers["x-request-id"] for _, headers, _ in answers[:2]] == ["r0", "r1"]
        assert answers[3][1]["x-request-id"] == "r2"
        assert [told["seq"] for _, _, told in (answers[0], answers[1], answers[3])] == [1, 2, 3]
        wire.send(requests[0])
        assert (await wire.answer())[0] == 202
    assert hot


async def test_caller_gone(world: World, hot: list[Any]) -> None:
    """A caller that hangs up while its event is on the way loses its answer and nothing else."""
    waiting: list[Any] = []

    def keep(link: Any, message: Any, request: int) -> bool:
        if type(message) is Publish:
            waiting.append((link, message, request))
            return True
        return False

    world.router.answer = keep
    async with Wire(world) as wire:
        wire.send(wire.post())
        await eventually(lambda: len(waiting) == 1)
    services = world.ingress.app.services
    assert services.in_flight == 1
    world.router.answer = None
    world.router.receive(*waiting[0])
    await eventually(lambda: services.in_flight == 0)
    async with Wire(world) as wire:
        wire.send(wire.post())
        assert (await wire.answer())[0] == 202
    assert len(hot) == 2


async def test_broken_head(world: World) -> None:
    """What is not HTTP is refused and the connection closed."""
    async with Wire(world) as wire:
        wire.send(b"POST /v1/events HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n{}")
        head = await asyncio.wait_for(wire.reader.read(), 10)
        assert head.startswith(b"HTTP/1.1 400")
