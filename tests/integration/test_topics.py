"""Topics through the whole system: services and clients subscribe, audiences follow."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import websockets.asyncio.client as ws_client

from carillon.audience import Audience
from carillon.ids import SLOTS, slot_of
from stores.postgres.audience import AudienceReader
from stores.postgres.pool import open_pool
from tests.integration.client_world import ClientWorld
from tests.integration.test_users import Service
from tests.support import eventually


@pytest.fixture
async def service(postgres_dsn: str) -> AsyncIterator[Service]:
    shard = {"policy_refresh_s": 0.05, "max_topics_per_user": 3}
    async with ClientWorld(postgres_dsn, shard=shard) as world:
        made = Service(world)
        try:
            yield made
        finally:
            await made.http.aclose()


async def subscribers(service: Service, topic: str) -> list[str]:
    """Everybody, by pages of two."""
    found: list[str] = []
    cursor = ""
    while True:
        page = await service.call("GET", f"/v1/topics/{topic}/subscribers?limit=2{cursor}")
        found += [one["userId"] for one in page["subscribers"]]
        if page["nextCursor"] is None:
            return found
        cursor = f"&cursor={page['nextCursor']}"


async def test_services_subscribe_users(service: Service) -> None:
    """A subscription is a state: set twice it is there once, and since the first time."""
    path = "/v1/topics/goals%2Frapid/subscribers"
    told = await service.call("PUT", f"{path}/ada")
    assert (told["topic"], told["userId"]) == ("goals/rapid", "ada")
    assert await service.call("PUT", f"{path}/ada") == told == await service.call("GET", f"{path}/ada")
    await service.call("GET", f"{path}/bob", status=404)
    await service.call("GET", "/v1/topics/other/subscribers/ada", status=404)
    many = [f"u{n}" for n in range(7)]
    assert await service.call("POST", path, {"userIds": ["ada", *many, "u0"]}) == {
        "subscribed": 8,
        "added": 7,
    }
    found = await subscribers(service, "goals%2Frapid")
    assert sorted(found) == sorted(["ada", *many])
    assert found == sorted(found, key=lambda user: (slot_of("acme", user), user))
    await service.call("POST", path, {"userIds": [f"u{n}" for n in range(1001)]}, 422)
    await service.call("POST", path, {"userIds": [""]}, 422)
    await service.call("GET", f"{path}?cursor=xyz", status=422)
    pool = await open_pool(service.world.settings.postgres, 1)
    try:
        reader, topic = AudienceReader(pool), Audience("topic", "goals/rapid")
        pages = [await reader.page("acme", topic, slot, "", 10) for slot in range(SLOTS)]
        assert [user for page in pages for user in page] == found
    finally:
        await pool.close()
    assert await service.call("DELETE", f"{path}/ada") == {"success": True}
    await service.call("DELETE", f"{path}/ada", status=404)
    assert sorted(await subscribers(service, "goals%2Frapid")) == many


class Client:
    """A user's socket."""

    def __init__(self, socket: ws_client.ClientConnection) -> None:
        self.socket = socket

    async def ask(self, kind: str, topic: str) -> Any:
        """Send a frame; its answer."""
        await self.socket.send(json.dumps({"type": kind, "topic": topic, "id": 1}))
        while True:
            frame = json.loads(await self.socket.recv())
            if frame.get("id") == 1:
                return frame


async def test_clients_subscribe_themselves(service: Service) -> None:
    """As far as the tenant's policy lets them: nobody, topics with a prefix, any; at most so many."""
    token = {"Authorization": f"Bearer {await service.token('ada')}"}

    async def topics() -> list[str]:
        answer = await service.http.get("/api/topics?limit=100", headers=token)
        return [one["topic"] for one in answer.json()["topics"]]

    async with ws_client.connect(service.world.ws_url, additional_headers=token) as socket:
        ada = Client(socket)
        refused = await ada.ask("SUBSCRIBE", "public.news")
        assert (refused["type"], refused["code"], refused["temporary"]) == ("ERROR", "not_permitted", False)
        await service.call(
            "PUT", "/v1/policy", {"topics": {"subscribe": "prefix", "prefixes": ["public.", "team."]}}
        )
        await eventually(lambda: allowed(ada, "public.news"))
        assert (await ada.ask("SUBSCRIBE", "private.news"))["code"] == "not_permitted"
        assert await topics() == ["public.news"]
        await service.call("PUT", "/v1/policy", {"topics": {"subscribe": "any"}})
        await eventually(lambda: allowed(ada, "anything"))
        assert (await ada.ask("SUBSCRIBE", "third"))["type"] == "OK"
        assert (await ada.ask("SUBSCRIBE", "fourth"))["code"] == "not_permitted"
        assert (await ada.ask("SUBSCRIBE", "third"))["type"] == "OK"
        await service.call("PUT", "/v1/topics/given/subscribers/ada")
        assert await topics() == ["anything", "given", "public.news", "third"]
        for topic in ("public.news", "given", "nothing"):
            assert (await ada.ask("UNSUBSCRIBE", topic))["type"] == "OK"
        page = await service.http.get("/api/topics?limit=1", headers=token)
        assert page.json()["nextCursor"] == "anything"
        assert await topics() == ["anything", "third"]
    assert await subscribers(service, "third") == ["ada"]


async def allowed(client: Client, topic: str) -> bool:
    return (await client.ask("SUBSCRIBE", topic))["type"] == "OK"
