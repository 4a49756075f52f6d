"""`POST /v1/events/import`: a stream of any length, read as fast as it is stored."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from carillon.messages import Outcome, Outcomes, Publish
from serve.app import ServeDoor
from tests.integration.ingress_world import World
from tests.support import eventually

PATH = "/v1/events/import"


def line(n: int, **more: Any) -> bytes:
    return json.dumps({"userId": f"u{n}", "type": "t", "title": f"n{n}", **more}).encode() + b"\n"


@pytest.fixture
async def world(postgres_dsn: str) -> AsyncIterator[World]:
    sizes = {"import_batch": 10, "import_failures": 3, "import_line_bytes": 2048, "peer_timeout_s": 4.0}
    made = await World(postgres_dsn, ingress=sizes).start()
    yield made
    await made.stop()


async def send(world: World, body: Any, **headers: str) -> dict[str, Any]:
    answer = await world.http.post(PATH, content=body, headers=world.service() | headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_what_is_good_is_stored_and_what_is_not_is_told(world: World) -> None:
    """Each line by itself: broken ones fail with their number, also the last one, and one too long."""
    body = [line(n) for n in range(25)]
    body[3] = b'{"userId": \n'
    body[7] = b"   \n"
    body[11] = line(11, title=None)
    body[12] = line(12, data={"x": "y" * 3000})
    body[13] = b'{"userId":"a","type":"t","title":"1"},{"userId":"b","type":"t","title":"2"}\n'
    body[20] = b"\xff\n"
    body.append(b'{"userId":"last","type":"t","ti')
    told = await send(world, b"".join(body))
    assert (told["complete"], told["lines"], told["events"], told["accepted"], told["failed"]) == (
        True, 26, 25, 19, 6,
    )  # fmt: skip
    assert [(one["line"], one["error"]["code"]) for one in told["failures"]] == [
        (4, "malformed"), (12, "invalid"), (13, "too_large"),
    ]  # fmt: skip
    wanted = [f"u{n}" for n in range(25) if n not in (3, 7, 11, 12, 13, 20)]
    assert [event.user for event in world.router.events] == wanted
    assert told["statuses"] == {"stored": 19}
    assert await send(world, b"") == {
        "complete": True, "lines": 0, "events": 0, "accepted": 0, "replayed": 0, "failed": 0, "statuses": {},
        "failures": [],
    }  # fmt: skip


async def test_keys(world: World) -> None:
    """With a header each line has a key of its own, by its number; one that a line names counts first."""
    await send(world, line(1) + b"\n" + line(2, idempotencyKey="mine"), **{"Idempotency-Key": "day-1"})
    first, second = [event.idempotency_key for event in world.router.events]
    assert first.endswith("day-1#1")
    assert second.endswith("mine")
    world.router.forget()
    world.router.outcome = lambda event: Outcome(event.id, 1, "stored", replayed=True)
    told = await send(world, line(1) + b"\n" + line(3), **{"Idempotency-Key": "day-1"})
    assert [event.idempotency_key.rpartition("#")[2] for event in world.router.events] == ["1", "3"]
    assert (told["accepted"], told["replayed"]) == (2, 2)
    long = await world.http.post(PATH, content=b"", headers=world.service() | {"Idempotency-Key": "x" * 201})
    assert long.status_code == 422


async def test_who_may_not(world: World) -> None:
    """No key, or one without the scope, and nothing is read."""
    assert (await world.http.post(PATH, content=line(1))).status_code == 401
    weak = await world.tenants.create_key("acme", "weak", ["users:read"])
    assert (await world.http.post(PATH, content=line(1), headers=world.service(weak))).status_code == 403
    assert world.router.events == []


class Held:
    """A router that answers when it is told to."""

    def __init__(self, world: World) -> None:
        self.waiting: list[Callable[[], None]] = []
        self.open = False
        world.router.answer = self._answer

    def _answer(self, link: Any, message: Any, request: int) -> bool:
        if type(message) is not Publish:
            return False

        def reply() -> None:
            link.reply_nowait(request, Outcomes([Outcome(e.id, 1, "stored") for e in message.events]))

        if self.open:
            reply()
        else:
            self.waiting.append(reply)
        return True

    def release(self) -> None:
        self.open = True
        for reply in self.waiting:
            reply()


async def test_it_reads_only_as_fast_as_it_stores(world: World) -> None:
    """While nothing is stored the sender stops after little; then all of it arrives, in order."""
    held = Held(world)
    sent = 0

    async def lines() -> AsyncIterator[bytes]:
        nonlocal sent
        for n in range(20_000):
            yield line(n, data={"pad": "x" * 1000})  # 20 MB: buffers of the kernel grow to 10
            sent += 1

    work = asyncio.ensure_future(send(world, lines()))
    await eventually(lambda: held.waiting)
    seen = -1
    while seen != sent:  # the buffers of the kernel fill up, and then nothing more goes in
        seen = sent
        await asyncio.sleep(0.3)
    assert sent < 20_000
    assert len(held.waiting) == 1
    held.release()
    told = await work
    assert (told["complete"], told["lines"], told["accepted"]) == (True, 20_000, 20_000)
    assert sent == 20_000


async def test_what_cannot_be_stored_now_is_sent_again(world: World) -> None:
    """A system that is busy, or has no owner for a slot, holds the import up and loses nothing of it."""
    refused: dict[bytes, int] = {}

    def outcome(event: Any) -> Outcome:
        refused[event.id] = refused.get(event.id, 0) + 1
        if refused[event.id] == 1:
            return Outcome(event.id, status="failed", code="busy", detail="full", retry_after_s=0.05)
        return Outcome(event.id, 1, "stored")

    world.router.outcome = outcome
    told = await send(world, b"".join(line(n) for n in range(25)))
    assert (told["accepted"], told["failed"]) == (25, 0)
    assert set(refused.values()) == {2}


async def test_a_sender_that_hangs_up(world: World) -> None:
    """What came whole before is stored; the replica goes on."""
    reader, writer = await asyncio.open_connection(*world.ingress.url.removeprefix("http://").split(":"))
    key = world.service()["Authorization"]
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nContent-Length: 1000000\r\n\r\n"
    writer.write(head.encode() + b"".join(line(n) for n in range(25)) + b'{"userId":')
    await eventually(lambda: len(world.router.events) == 20)
    writer.transport.abort()
    del reader
    await eventually(lambda: world.ingress.app.services.in_flight == 0)
    assert (await send(world, line(1)))["accepted"] == 1


async def test_a_sender_that_stops(world: World) -> None:
    """After `ingress.peer_timeout_s` without a byte it is told what was stored, and that it was not all."""

    reader, writer = await asyncio.open_connection(*world.ingress.url.removeprefix("http://").split(":"))
    key = world.service()["Authorization"]
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nContent-Length: 1000000\r\n\r\n"
    writer.write(head.encode() + b"".join(line(n) for n in range(12)))
    answer = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    assert b"connection: close" in answer
    told = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert (told["complete"], told["lines"], told["accepted"]) == (False, 12, 12)


async def test_longer_than_the_patience_of_the_door(world: World) -> None:
    """An import that goes on and on is not cut off while its sender keeps sending."""

    async def lines() -> AsyncIterator[bytes]:
        for n in range(12):
            yield line(n)
            await asyncio.sleep(0.5)

    told = await send(world, lines())
    assert (told["complete"], told["accepted"]) == (True, 12)


async def test_a_key_with_a_rate(world: World) -> None:
    """The rate of the key holds an import up instead of refusing it."""
    slow = await world.tenants.create_key("acme", "slow", ["events:write"], rate_per_s=100.0, burst=10)
    answer = await world.http.post(
        PATH, content=b"".join(line(n) for n in range(30)), headers=world.service(slow)
    )
    assert answer.json()["accepted"] == 30


async def test_lines_for_many(world: World) -> None:
    """`userIds` is one event each, with its own key, in the order of the lines; who is refused is named, and
    `topic` is a broadcast. What stands in `data` under these names means nothing."""
    many = {"userId": None, "userIds": ["u0", "b", "", "b"], "idempotencyKey": "mine"}
    body = [line(0), line(1, **many), line(0, data={"userIds": ["x"], "topic": "y"}), line(2, userIds=["z"])]
    body += [line(3, userId=None, userIds=[]), line(4, userId=None, topic="goals", idempotencyKey="t")]
    told = await send(world, b"".join(body), **{"Idempotency-Key": "day"})
    sent = [(event.user, event.idempotency_key.partition(":")[2]) for event in world.router.events]
    assert sent == [("u0", "day#1"), ("u0", "mine#u0"), ("b", "mine#b"), ("u0", "day#3")]
    assert [(one["line"], one.get("userId")) for one in told["failures"]] == [(2, ""), (4, None)]
    assert (told["lines"], told["accepted"], told["failed"]) == (6, 6, 2)
    assert told["statuses"] == {"stored": 5, "broadcast": 1}
    assert told["events"] == told["accepted"] + told["failed"]
    again = await send(world, body[5])
    assert (again["accepted"], again["replayed"]) == (1, 1)
    (audience,) = [row[0] for row in await world.pool.fetch("select audience from broadcasts")]
    assert json.loads(audience) == {"topic": "goals"}
    templated = await send(world, line(5, userId=None, userIds=["a", "b"], title=None, template="none"))
    assert (templated["accepted"], templated["failed"]) == (0, 1)


async def test_by_serves_route(world: World) -> None:
    """Serve reads a body ahead unless a header forbids it: without it only a bounded one is taken."""
    limit = world.settings.ingress.max_request_bytes
    transport = httpx.ASGITransport(app=ServeDoor(world.ingress.app))

    async def endless() -> AsyncIterator[bytes]:
        yield line(1)
        yield line(2)

    async with httpx.AsyncClient(transport=transport, base_url="http://serve") as serve:

        async def post(content: Any, **more: str) -> Any:
            return await serve.post(PATH, content=content, headers=world.service() | more)

        assert (await post(line(0))).json()["accepted"] == 1
        for answer in (await post(endless()), await post(line(1), **{"Content-Length": str(limit + 1)})):
            assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
            assert "X-Request-Disconnect-Disabled: ?1" in answer.json()["detail"]
            assert answer.headers["connection"] == "close"
        taken = await post(endless(), **{"X-Request-Disconnect-Disabled": "?1"})
        assert taken.json()["accepted"] == 2
    assert [event.user for event in world.router.events] == ["u0", "u1", "u2"]
