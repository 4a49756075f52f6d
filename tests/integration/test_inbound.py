"""Webhooks through HTTP, and a stream of a real Valkey, into events that reach the router."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
import redis.asyncio as aioredis

from carillon.inbound import sign_standard
from carillon.messages import Outcome
from cluster.embedded import EmbeddedPostgres, EmbeddedValkey
from cluster.processes import free_port
from serve.stream_in import StreamIn
from tests.integration.ingress_world import World
from tests.support import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

SOURCE = {
    "when": "body.kind == 'order'",
    "event": {
        "userId": "{{ body.user }}",
        "type": "order",
        "title": "Order {{ body.order }} by {{ source }}",
        "data": {"lines": "{{ body.lines }}", "id": "{{ id }}"},
        "link": "{{ body.link|default(none) }}",
    },
}
BODY = {"kind": "order", "user": "ada", "order": 7, "lines": [1, {"x": "<b>"}]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_world(postgres_server: EmbeddedPostgres) -> AsyncIterator[World]:
    admin = await asyncpg.connect(postgres_server.dsn)
    await admin.execute("create database test_inbound template template strategy wal_log")
    made = await World(postgres_server.dsn_of("test_inbound")).start()
    yield made
    await made.stop()
    await admin.execute("drop database test_inbound with (force)")
    await admin.close()


@pytest_asyncio.fixture(loop_scope="module")
async def world(shared_world: World) -> World:
    await shared_world.reset()
    await shared_world.pool.execute("truncate inbound_sources")
    return shared_world


async def put(world: World, document: Any, name: str = "shop") -> Any:
    return await world.http.put(f"/v1/sources/{name}", json=document, headers=world.service())


async def send(world: World, path: str, secret: str, body: Any, delivery: str = "d1", ago_s: int = 0) -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    at_s = world.clock.now_ms() // 1000 - ago_s
    headers = {
        "webhook-id": delivery,
        "webhook-timestamp": str(at_s),
        "webhook-signature": sign_standard(secret, delivery, at_s, raw),
    }
    return await world.http.post(path, content=raw, headers=headers)


async def test_a_webhook_becomes_an_event(world: World) -> None:
    """Values keep their type, null members are left out, the delivery is the idempotency key."""
    made = (await put(world, SOURCE)).json()
    answer = await send(world, made["path"], made["secret"], BODY)
    assert answer.status_code == 202, answer.text
    (event,) = world.router.events
    content = json.loads(f"{{{event.content}}}")
    assert (event.tenant, event.user, content["title"]) == ("acme", "ada", "Order 7 by shop")
    assert content["data"] == {"lines": [1, {"x": "<b>"}], "id": "d1"}
    assert "link" not in content
    await send(world, made["path"], made["secret"], BODY)
    assert world.router.events[1].idempotency_key == event.idempotency_key
    await send(world, made["path"], made["secret"], BODY, "d2")
    assert world.router.events[2].idempotency_key != event.idempotency_key


async def test_who_is_not_let_in(world: World) -> None:
    """A wrong secret, an old signature, an unknown path: 401 and 404, and no event."""
    made = (await put(world, SOURCE)).json()
    assert (await send(world, made["path"], "whsec_" + "A" * 40, BODY)).status_code == 401
    assert (await send(world, made["path"], made["secret"], BODY, ago_s=400)).status_code == 401
    assert (await world.http.post(made["path"], json=BODY)).status_code == 401
    for path in ("/v1/inbound/in_" + "0" * 24, "/v1/inbound/shop", "/v1/inbound/a%00b"):
        assert (await send(world, path, made["secret"], BODY)).status_code == 404
    assert world.router.events == []


async def test_what_is_not_wanted_and_what_does_not_fit(world: World) -> None:
    """`when` is false: 200 ignored, whatever else is in it; no JSON: 400; a mapping that finds nothing: 422
    with its place."""
    made = (await put(world, SOURCE)).json()
    for body in ({**BODY, "kind": "other"}, {"kind": "other"}):
        ignored = await send(world, made["path"], made["secret"], body)
        assert (ignored.status_code, ignored.json()) == (200, {"status": "ignored"})
    assert (await send(world, made["path"], made["secret"], b"no json")).status_code == 400
    lacking = await send(world, made["path"], made["secret"], {"kind": "order", "user": "ada"})
    assert (lacking.status_code, lacking.json()["code"]) == (422, "template_failed")
    assert lacking.json()["errors"][0]["path"].startswith("event/")
    wrong = await send(world, made["path"], made["secret"], {**BODY, "user": ""})
    assert (wrong.status_code, wrong.json()["code"]) == (422, "invalid")
    assert world.router.events == []


async def test_sources(world: World) -> None:
    """Made, read without the secret, changed with the same path, its secret replaced with an overlap,
    deleted."""
    made = (await put(world, SOURCE)).json()
    read = (await world.http.get("/v1/sources/shop", headers=world.service())).json()
    assert "secret" not in read
    changed = (await put(world, {**SOURCE, "when": ""})).json()
    assert changed["path"] == made["path"]
    assert "secret" not in changed
    replaced = (await put(world, {**SOURCE, "secret": "another secret, long enough"})).json()
    assert replaced["secret"] == "another secret, long enough"
    for index, secret in enumerate((made["secret"], replaced["secret"])):
        assert (await send(world, made["path"], secret, BODY, f"x{index}")).status_code == 202
    listed = (await world.http.get("/v1/sources", headers=world.service())).json()["sources"]
    assert [one["name"] for one in listed] == ["shop"]
    theirs = await world.http.get("/v1/sources/shop", headers=world.service(world.other_key))
    assert theirs.status_code == 404
    assert (await world.http.delete("/v1/sources/shop", headers=world.service())).status_code == 200
    assert (await send(world, made["path"], replaced["secret"], BODY)).status_code == 404
    for document, path in (
        ({"event": {"title": "{{ bo.x }}"}}, "event/title"),
        ({"event": {"title": "{% if %}"}}, "event/title"),
        ({**SOURCE, "when": "body."}, "when"),
        ({**SOURCE, "secret": "short"}, "secret"),
    ):
        answer = await put(world, document)
        assert (answer.status_code, answer.json()["errors"][0]["path"]) == (422, path)


# -- the stream ---------------------------------------------------------------------------------------

STREAM = {
    "stream": "events", "stream_block_s": 0.05, "stream_claim_s": 0.3, "stream_retry_s": 0.02,
    "stream_tenant": "acme",
}  # fmt: skip


@pytest_asyncio.fixture(loop_scope="module")
async def streaming(postgres_dsn: str, redis_url: str) -> AsyncIterator[tuple[World, Any]]:
    """A replica that reads a stream, and a client of its Valkey."""
    made = await World(postgres_dsn, redis={"url": redis_url}, inbound=STREAM).start()
    client = aioredis.Redis.from_url(redis_url)
    yield made, client
    await client.aclose()
    await made.stop()


async def add(client: Any, event: Any, **fields: str) -> bytes:
    return await client.xadd("events", {"event": json.dumps(event), **fields})


EVENT = {"userId": "ada", "type": "t", "title": "x"}


async def pending(client: Any) -> int:
    return (await client.xpending("events", "carillon"))["pending"]


async def all_acknowledged(client: Any) -> None:
    """Wait until no entry is pending: an entry is acknowledged after what it leads to is there."""

    async def done() -> bool:
        return await pending(client) == 0

    await eventually(done, what="every entry to be acknowledged")


async def test_entries_are_sent_and_acknowledged(streaming: tuple[World, Any]) -> None:
    """Each becomes an event of its tenant, batches too; acknowledged after the answer, and not before."""
    world, client = streaming
    hold = asyncio.Event()
    world.router.answer = lambda link, message, request: (
        not hold.is_set() and bool(held.append((link, message, request)) or True)
    )
    held: list[Any] = []
    entry = await add(client, EVENT)
    await eventually(lambda: held)
    assert await pending(client) == 1
    hold.set()
    for link, message, request in held:
        world.router.receive(link, message, request)
    await add(client, [EVENT, {**EVENT, "userId": "bob"}], tenant="other")
    await eventually(lambda: len(world.router.events) == 3)
    assert [(e.tenant, e.user) for e in world.router.events] == [
        ("acme", "ada"),
        ("other", "ada"),
        ("other", "bob"),
    ]
    assert entry.decode() in world.router.events[0].idempotency_key

    await all_acknowledged(client)


async def test_poison_is_set_aside(streaming: tuple[World, Any]) -> None:
    """What can never be an event is kept apart with the reason, and what comes after it is sent."""
    world, client = streaming
    await client.xadd("events", {"event": b"\xff no json"})
    await client.xadd("events", {"something": "else"})
    await add(client, {"userId": "ada"})
    await add(client, EVENT, tenant="nobody")
    await add(client, EVENT, tenant="bad name!")
    await add(client, [EVENT, {"userId": "ada"}])
    await add(client, {**EVENT, "userId": "last"})
    await eventually(lambda: any(e.user == "last" for e in world.router.events))

    async def dead() -> list[Any]:
        found = await client.xrange("events.dead")
        return found if len(found) == 6 else []

    found = await eventually(dead)
    reasons = sorted(fields[b"reason"].decode()[:9] for _, fields in found)
    assert reasons == ["expected ", "expected ", "invalid: ", "malformed", "there is ", '{"results']
    assert all(b"entry" in fields for _, fields in found)
    await all_acknowledged(client)


async def test_what_fails_for_a_while_is_tried_again(streaming: tuple[World, Any]) -> None:
    """A shard that is busy is not poison: the entry waits, and goes through with the same key."""
    world, client = streaming
    world.router.outcome = lambda event: Outcome(event.id, status="failed", code="busy", retry_after_s=0.01)
    await add(client, EVENT)
    await eventually(lambda: len(world.router.events) >= 3)
    assert await pending(client) == 1
    world.router.outcome = None

    await all_acknowledged(client)
    assert len({e.idempotency_key for e in world.router.events}) == 1
    assert await client.xlen("events.dead") == 0


async def test_entries_of_a_lost_reader_are_taken_over(streaming: tuple[World, Any]) -> None:
    """What another replica read and did not acknowledge is read again after a while."""
    world, client = streaming
    world.router.answer = lambda *_: True  # holds everything
    await add(client, EVENT)

    async def read() -> bool:
        return await pending(client) == 1

    await eventually(read)
    await world.ingress._stream.close()
    world.router.answer = None
    world.ingress._stream = StreamIn(world.ingress.app.services)
    world.ingress._stream.start()
    await eventually(lambda: len(world.router.events) == 1)


async def test_a_restart_of_redis_is_survived(postgres_dsn: str, service_folder: Path) -> None:
    """Valkey goes, comes back empty on the same address: reading goes on by itself."""
    with EmbeddedValkey(service_folder / "valkey-in", port=free_port(), fast=True) as server:
        world = await World(postgres_dsn, redis={"url": server.url}, inbound=STREAM).start()
        client = aioredis.Redis.from_url(server.url)
        try:
            await add(client, EVENT)
            await eventually(lambda: len(world.router.events) == 1)
            await client.aclose()
            url = server.url
            await asyncio.to_thread(server.stop)
            await asyncio.to_thread(server.start)
            assert server.url == url
            client = aioredis.Redis.from_url(server.url)
            await add(client, {**EVENT, "userId": "bob"})
            await eventually(lambda: any(e.user == "bob" for e in world.router.events), 20.0)
        finally:
            await client.aclose()
            await world.stop()
