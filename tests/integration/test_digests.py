"""Digests over the whole path: HTTP, a real shard, Postgres."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.integration.client_world import ClientWorld
from tests.integration.test_explain import Service
from tests.support import eventually


@pytest.fixture
async def service(postgres_dsn: str) -> Any:
    async with ClientWorld(postgres_dsn) as world, httpx.AsyncClient(timeout=10) as http:
        yield Service(world, http)


async def mine(service: Service, method: str, path: str, status: int = 200) -> Any:
    """A call of the user's own client."""
    token = (await service.call("POST", "/v1/tokens", {"userId": "ada"}, 201))["token"]
    answer = await service.http.request(
        method, f"{service.world.url}{path}", headers={"Authorization": f"Bearer {token}"}
    )
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_a_digest_is_listed_flushed_and_explained(service: Service) -> None:
    """Tried first, then sent: the digest says what waits in it, and each item says where it waits."""
    await service.phone()
    daily = {"frequency": "daily", "at": "08:00"}
    await service.prefer(categories={"news": {"digest": daily}}, timezone="Europe/Vienna")
    plan = await service.dry(category="news")
    assert plan["status"] == "deferred"
    assert plan["digest"]["frequency"] == "daily"
    assert plan["digest"]["dueAt"] == plan["pushDueAt"]
    told = [await service.event(category="news", title=f"number {n}") for n in range(3)]
    assert {one["reason"] for one in told if "reason" in one} <= {"digest"}
    (await service.event(category="chat"))
    (digest,) = (await service.call("GET", "/v1/users/ada/digests"))["digests"]
    assert digest["digestId"] == plan["digest"]["digestId"]
    assert (digest["category"], digest["frequency"], digest["count"]) == ("news", "daily", 3)
    assert [item["title"] for item in digest["items"]] == ["number 0", "number 1", "number 2"]
    assert [item["notificationId"] for item in digest["items"]] == [one["id"] for one in told]
    why = await service.explain(told[0])
    assert f"is collected in a digest due at {digest['dueAt']}" in why["words"]
    assert why["deliveries"][0]["digestId"] == digest["digestId"]
    path = f"/v1/users/ada/digests/{digest['digestId']}"
    assert await service.call("DELETE", f"{path}/items/{told[0]['id']}") == {"success": True}
    await service.call("DELETE", f"{path}/items/{plan['digest']['digestId']}", status=404)
    assert await service.call("POST", f"{path}/flush") == {"digestId": digest["digestId"], "count": 2}

    async def gone() -> bool:
        return (await service.call("GET", "/v1/users/ada/digests"))["digests"] == []

    await eventually(gone, what="no open digest")
    why = [await service.explain(one) for one in told]
    assert [one["deliveries"][0]["reason"] for one in why[:2]] == ["removed", "told in a digest"]
    await service.call("POST", "/v1/users/ada/digests/none/flush", status=404)
    feed = await service.call("GET", "/v1/users/ada/notifications")
    assert len(feed["notifications"]) == 4, "all of it is in the feed"


async def test_the_user_has_the_same_calls(service: Service) -> None:
    """The token's user alone: what another one has is not found."""
    await service.phone()
    await service.phone("bob")
    for user in ("ada", "bob"):
        await service.prefer(user, digest="weekly")
    told = [await service.event(title=f"number {n}") for n in range(2)]
    await service.event("bob")
    (theirs,) = (await service.call("GET", "/v1/users/bob/digests"))["digests"]
    (digest,) = (await mine(service, "GET", "/api/digests"))["digests"]
    assert (digest["frequency"], digest["category"], digest["count"]) == ("weekly", None, 2)
    await mine(service, "POST", f"/api/digests/{theirs['digestId']}/flush", 404)
    await mine(service, "DELETE", f"/api/digests/{digest['digestId']}/items/{told[0]['id']}")
    (digest,) = (await mine(service, "GET", "/api/digests"))["digests"]
    assert [item["title"] for item in digest["items"]] == ["number 1"]
    flushed = await mine(service, "POST", f"/api/digests/{digest['digestId']}/flush")
    assert flushed == {"digestId": digest["digestId"], "count": 1}


async def test_limits_collect_what_exceeds_them(service: Service) -> None:
    """The third of two an hour waits in a digest over all categories, and says why."""
    limits = {"user": {"count": 2, "windowS": 3600}, "collectS": 5}
    await service.call("PUT", "/v1/policy", {"limits": limits})
    await service.phone()
    for n in range(2):
        await service.event(title=f"number {n}")
    told = [await service.event(title="more", category=category) for category in ("a", "b")]
    assert [one["status"] for one in told] == ["deferred", "deferred"]
    (digest,) = (await service.call("GET", "/v1/users/ada/digests"))["digests"]
    assert (digest["frequency"], digest["category"], digest["count"]) == ("overflow", None, 2)
    why = await service.explain(told[0])
    assert [rule["rule"] for rule in why["rules"][:2]] == ["rate_limit", "overflow"]
    assert "is collected in a digest" in why["words"]


@pytest.mark.parametrize(
    ("member", "path"),
    [
        ({"digests": {}}, "digests/template"),
        ({"digests": {"template": "a b"}}, "digests/template"),
        ({"digests": {"template": "x", "y": 1}}, "digests/y"),
        ({"limits": {"collectS": -1}}, "limits/collectS"),
    ],
)
async def test_rules_of_the_policy(service: Service, member: dict[str, Any], path: str) -> None:
    """What the policy says of digests is checked when it is stored."""
    refused = await service.call("PUT", "/v1/policy", member, 422)
    assert path in json.dumps(refused)
