"""What a user said, apart from what holds; changed in part: real HTTP, a real shard, real Postgres."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from tests.integration.transports_world import Transports

MINE = "/api/notifications/preferences"
THEIRS = "/v1/users/ann/preferences"
DEFAULTS = {
    "channels": {"in_app": {"durationMs": 5000}, "sms": False},
    "quietHours": {"start": "22:00", "end": "07:00"},
}


async def as_service(world: Transports, method: str, path: str, body: Any = None) -> httpx.Response:
    return await world.http.request(method, path, json=body, headers={"Authorization": f"Bearer {world.key}"})


async def test_a_default_never_becomes_the_users_own_word(postgres_dsn: str) -> None:
    """Changed in part by the user and by a service; the tenant's next default reaches who said nothing."""
    async with Transports(postgres_dsn) as world:
        assert (await as_service(world, "PUT", "/v1/policy", {"defaults": DEFAULTS})).status_code == 200
        answer = await world.call("GET", f"{MINE}?view=own")
        assert (answer.json(), answer.headers["etag"]) == ({}, '"0"')
        assert (await world.call("GET", MINE)).json()["channels"] == DEFAULTS["channels"]
        patch = {"channels": {"in_app": {"sound": False}}}
        answer = await world.call(
            "PATCH", f"{MINE}?view=own", json=patch, headers={"Content-Type": "application/merge-patch+json"}
        )
        assert (answer.json(), answer.headers["etag"]) == (patch, '"1"')
        answer = await as_service(world, "PATCH", THEIRS, {"badge": False})
        assert answer.json()["channels"]["in_app"] == {"sound": False, "durationMs": 5000}
        assert answer.json()["quietHours"] == DEFAULTS["quietHours"]
        own = (await as_service(world, "GET", f"{THEIRS}?view=own")).json()
        assert own == {"channels": {"in_app": {"sound": False}}, "badge": False}
        defaults = {"channels": {"in_app": {"durationMs": 7000}}}
        await as_service(world, "PUT", "/v1/policy", {"defaults": defaults})
        assert (await world.call("GET", MINE)).json()["channels"]["in_app"]["durationMs"] == 7000
        answer = await world.call("PATCH", f"{MINE}?view=own", json={"channels": None, "badge": None})
        assert (answer.json(), answer.headers["etag"]) == ({}, '"3"')
        assert (await world.call("PUT", f"{MINE}?view=own", json={"badge": True})).json() == {"badge": True}


async def test_versions_and_refusals(postgres_dsn: str) -> None:
    """If-Match holds for a change in part; what it would make is checked as a whole; else nothing changes."""
    async with Transports(postgres_dsn) as world:
        first = {"If-Match": '"0"'}
        assert (await world.call("PATCH", MINE, json={"sound": "bell"}, headers=first)).status_code == 200
        answer = await world.call("PATCH", MINE, json={"sound": False}, headers=first)
        assert (answer.status_code, answer.json()["code"]) == (412, "version_conflict")
        answer = await world.call("PATCH", MINE, json={"quietHours": {"enabled": True}})
        assert answer.status_code == 422
        assert [error["path"] for error in answer.json()["errors"]] == ["quietHours/start", "quietHours/end"]
        assert (await world.call("PATCH", MINE, json=[1])).status_code == 422
        answer = await world.call("GET", f"{MINE}?view=mine")
        assert [error["path"] for error in answer.json()["errors"]] == ["view"]
        assert (await world.call("GET", f"{MINE}?view=own")).json() == {"sound": "bell"}


async def test_changes_of_different_parts_at_once_all_hold(postgres_dsn: str) -> None:
    """Without If-Match one that was overtaken is made again, of what the other left."""
    async with Transports(postgres_dsn) as world:
        parts: list[dict[str, Any]] = [{"sound": "bell"}, {"badge": False}, {"channels": {"push": False}}]
        answers = await asyncio.gather(*(world.call("PATCH", MINE, json=part) for part in parts))
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        own = (await world.call("GET", f"{MINE}?view=own")).json()
        assert own == {"sound": "bell", "badge": False, "channels": {"push": False}}
