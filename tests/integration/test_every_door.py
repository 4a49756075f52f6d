"""Every route, every wrong credential: nobody gets in, and nothing reaches the cluster."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio

from carillon.api_keys import SCOPES
from cluster.embedded import EmbeddedPostgres
from serve.routes import all_routes
from serve.routing import CLIENT, SERVICE
from tests.fuzz.attacks import Facts, forged
from tests.integration.ingress_world import World

GUARDED = [route for route in all_routes() if route.door in (SERVICE, CLIENT)]
FORGERIES = int(os.environ.get("FUZZ_EXAMPLES", "60")) // 10

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(postgres_server: EmbeddedPostgres) -> AsyncIterator[World]:
    admin = await asyncpg.connect(postgres_server.dsn)
    await admin.execute("create database test_every_door template template strategy wal_log")
    made = await World(postgres_server.dsn_of("test_every_door")).start()
    yield made
    await made.stop()
    await admin.execute("drop database test_every_door with (force)")
    await admin.close()


def url_of(route: Any) -> str:
    """The route with an id in its path."""
    path = route.path.replace("{id}", str(uuid.uuid4()))
    while "{" in path:
        path = path[: path.index("{")] + "x" + path[path.index("}") + 1 :]
    return path


async def ask(world: World, route: Any, headers: dict[str, str]) -> httpx.Response:
    body = route.body_example if route.body is not None else None
    return await world.http.request(route.method, url_of(route), headers=headers, json=body)


@pytest.mark.parametrize("route", GUARDED, ids=lambda route: f"{route.method} {route.path}")
async def test_nobody_gets_in(world: World, route: Any) -> None:
    """No credential, the other door's, a forged, an expired or a foreign one: 401, and nothing happens."""
    world.router.forget()
    dice = random.Random(route.path)
    token = world.client()["Authorization"].removeprefix("Bearer ")
    expired = world.client(ttl_s=-60)["Authorization"].removeprefix("Bearer ")
    key = world.key
    wrong = ["x", expired, key[:-1] + ("0" if key[-1] != "0" else "1"), key[:20], key + "0", key.upper()]
    wrong.append(token if route.door == SERVICE else key)
    facts = Facts(token, "ada", [], world.other.client_secret)
    wrong += [forged(dice, facts) for _ in range(FORGERIES)]
    logins = [f"Bearer {text}" for text in wrong if text and text.isascii() and text.isprintable()]
    logins += [f"Basic {key}", key, f"Bearer {key} {key}", f"Token {token}"]
    for login in [None, *logins]:
        answer = await ask(world, route, {} if login is None else {"Authorization": login})
        assert answer.status_code == 401, f"{login}: {answer.status_code} {answer.text[:200]}"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert token not in answer.text
        assert key not in answer.text
    assert (world.router.events, world.router.received) == ([], [])


@pytest.mark.parametrize(
    "route", [route for route in GUARDED if route.door == SERVICE], ids=lambda r: f"{r.method} {r.path}"
)
async def test_a_key_needs_the_scope(world: World, route: Any) -> None:
    """A key with every scope but the route's (and admin) gets 403, and nothing happens."""
    world.router.forget()
    others = [scope for scope in SCOPES if scope not in (route.scope, "admin")]
    key = await world.tenants.create_key("acme", "weak", others)
    answer = await ask(world, route, world.service(key))
    assert (answer.status_code, answer.json()["code"]) == (403, "not_permitted")
    assert (world.router.events, world.router.received) == ([], [])
