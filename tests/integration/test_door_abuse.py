"""The replica's own door under attack: what a stranger can do to memory, descriptors and other callers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import httpx
import pytest

from serve.door import EARLY_BYTES
from tests.fuzz.http import BODY, damaged, plain, requests
from tests.integration.ingress_world import World
from tests.support import eventually

ROUNDS = int(os.environ.get("FUZZ_EXAMPLES", "60")) * 5
PATIENCE_S = 0.4
LIMITS = {"peer_timeout_s": PATIENCE_S, "max_connections": 40, "max_head_bytes": 4096}


@pytest.fixture
async def world(postgres_dsn: str) -> AsyncIterator[World]:
    made = await World(postgres_dsn, ingress=LIMITS).start()
    yield made
    await made.stop()


class Caller:
    """A raw connection."""

    def __init__(self, world: World) -> None:
        self._address = world.ingress.url.removeprefix("http://").split(":")

    async def __aenter__(self) -> Caller:
        self.reader, self.writer = await asyncio.open_connection(self._address[0], int(self._address[1]))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    async def rest(self, timeout_s: float = 60.0) -> bytes:
        """Everything until the door hangs up, or cuts us off."""
        data = b""
        async with asyncio.timeout(timeout_s):
            with contextlib.suppress(ConnectionError):
                while more := await self.reader.read(65_536):
                    data += more
        return data


def connections(world: World) -> set[Any]:
    """Connections that uvicorn has."""
    return world.ingress._server.server_state.connections


async def healthy(world: World) -> None:
    """Others are served."""
    async with httpx.AsyncClient(base_url=world.ingress.url, trust_env=False) as http:
        assert (await http.get("/healthz")).status_code == 200


@pytest.mark.parametrize("start", [b"GET /", b"GET / HTTP/1.1\r\nX: ", b"GET / HTTP/1.1\r\n"])
async def test_an_endless_head_is_cut_off(world: World, start: bytes) -> None:
    """A path, a header or headers without end get 431, long before they fill the memory."""
    more = b"A: b\r\n" * 200 if start.endswith(b"\r\n") else b"x" * 1200
    async with Caller(world) as caller:
        caller.writer.write(start)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while not caller.reader.at_eof() and sent < 10_000_000:
                caller.writer.write(more)
                await caller.writer.drain()
                sent += len(more)
                await asyncio.sleep(0)
        assert sent < 5_000_000
        answer = await caller.rest()
        assert answer == b"" or answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    await eventually(lambda: not connections(world))
    await healthy(world)


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET /heal", id="half a line"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nHost: l\r\nX-A: b", id="half a head"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nHost: l\r\n\r\n\r\n", id="an answer, and then line ends"),
        pytest.param(
            plain("/v1/events", "Authorization: Bearer {key}", "Content-Length: 1000", method="POST") + b"{",
            id="half a body",
        ),
        pytest.param(
            plain("/v1/events?a=b", "Authorization: Bearer x", "Content-Length: 1000", method="POST") + b"{",
            id="half a body of a stranger",
        ),
        pytest.param(
            plain("/api/notifications/read", "Authorization: Bearer {token}", "Transfer-Encoding: chunked",
                  method="POST") + b"5\r\n{",
            id="half a chunk",
        ),
    ],
)  # fmt: skip
async def test_a_slow_caller_is_cut_off(world: World, said: bytes) -> None:
    """Whoever drips, or stops in the middle, is cut off in time and holds nothing."""
    said = said.replace(b"{key}", world.key.encode())
    said = said.replace(b"{token}", world.client()["Authorization"].removeprefix("Bearer ").encode())
    async with Caller(world) as caller:
        caller.writer.write(said)
        dripping = asyncio.ensure_future(drip(caller, b"\r\n" if said.endswith(b"\n\r\n") else b" "))
        await caller.rest()
        dripping.cancel()
    await eventually(lambda: not connections(world))
    await eventually(lambda: not world.ingress.app.services.in_flight)  # what nobody waits for ends, too


async def drip(caller: Caller, drop: bytes) -> None:
    """A byte now and then keeps timers of silence from ending it."""
    with contextlib.suppress(ConnectionError):
        for _ in range(1000):
            await asyncio.sleep(0.05)
            caller.writer.write(drop)


async def test_whoever_takes_no_answer_is_cut_off(world: World) -> None:
    """Answers that nobody reads are given up."""
    async with Caller(world) as caller:
        caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
        one = plain("/openapi.json")
        with contextlib.suppress(ConnectionError):
            for _ in range(400):
                caller.writer.write(one)
                await asyncio.sleep(0)
        await eventually(lambda: not connections(world))


async def test_slow_work_is_no_slow_caller(world: World) -> None:
    """While the answer is our turn, however long, nobody is cut off."""
    waiting: list[Any] = []
    world.router.answer = lambda *asked: waiting.append(asked) or True
    async with Caller(world) as caller:
        authorization = f"Authorization: Bearer {world.key}"
        caller.writer.write(plain("/v1/events", authorization, method="POST", body=BODY))
        await eventually(lambda: waiting)
        (protocol,) = connections(world)
        for _ in range(20):
            protocol.look(protocol.loop.time() + 1000, PATIENCE_S)
        world.router.answer = None
        world.router.receive(*waiting[0])
        head = await asyncio.wait_for(caller.reader.readuntil(b"\r\n\r\n"), 10)
        assert head.startswith(b"HTTP/1.1 202")


async def test_connections_are_bounded(postgres_dsn: str) -> None:
    """Beyond `ingress.max_connections` one more is cut off; with room again others are served."""
    # Patient enough that none of the first is gone before the last one comes.
    world = await World(postgres_dsn, ingress=LIMITS | {"peer_timeout_s": 60.0}).start()
    try:
        await _bounded(world)
    finally:
        await world.stop()


async def _bounded(world: World) -> None:
    async with contextlib.AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(Caller(world)) for _ in range(60)]
        await eventually(lambda: len(connections(world)) == 40)
        await eventually(
            lambda: sum(c.reader.at_eof() or c.reader.exception() is not None for c in callers) == 20
        )
    await eventually(lambda: not connections(world))
    await healthy(world)


async def test_a_stranger_is_refused_before_its_body(world: World) -> None:
    """A long body is not taken in before its caller is known: 401 comes while it is still to be sent."""
    body = b" " * (EARLY_BYTES + 1)
    async with Caller(world) as caller:
        request = plain("/v1/events", "Authorization: Bearer crl_x_y", method="POST", body=body)
        caller.writer.write(request[: -len(body)])
        head = await asyncio.wait_for(caller.reader.readuntil(b"\r\n\r\n"), 10)
        assert head.startswith(b"HTTP/1.1 401")


async def test_damaged_requests(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever arrives, answers are HTTP, none is a defect of ours, nothing is left or logged."""
    token = world.client()["Authorization"].removeprefix("Bearer ")
    makers = requests(world.key, token)
    statuses: set[int] = set()
    gate = asyncio.Semaphore(8)

    async def attack(number: int) -> None:
        dice = Random(number)
        data = damaged(dice, makers)
        async with gate, Caller(world) as caller:
            with contextlib.suppress(ConnectionError):
                cut = dice.randrange(len(data) + 1)
                caller.writer.write(data[:cut])
                await asyncio.sleep(0)
                caller.writer.write(data[cut:])
                if caller.writer.can_write_eof() and dice.random() < 0.7:
                    caller.writer.write_eof()
            answers = await caller.rest()
        heads = re.findall(rb"(?:^|\r\n|[}\]>\n])HTTP/1\.1 (\d{3}) ", answers)
        assert heads or not answers, f"attack {number}: {answers[:200]!r}"
        found = {int(status) for status in heads}
        assert not {s for s in found if s >= 500}, f"attack {number}: {answers[:500]!r} to {data!r}"
        statuses.update(found)

    await asyncio.gather(*(attack(number) for number in range(ROUNDS)))
    await eventually(lambda: not connections(world))
    await eventually(lambda: not world.ingress.app.services.in_flight)  # what nobody waits for ends, too
    await healthy(world)
    assert {200, 202, 400, 401, 404} <= statuses
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
