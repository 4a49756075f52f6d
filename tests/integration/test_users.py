"""Users as such, through the whole system: profiles, everything kept of them, and its erasure."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import asyncpg
import httpx
import pytest
import websockets.asyncio.client as ws_client
from websockets.exceptions import ConnectionClosed

from carillon.clock import SystemClock, rfc3339
from carillon.ids import slot_of
from stores.postgres.named import load_queries
from tests.integration.client_world import ClientWorld
from tests.support import eventually

clock = SystemClock()
PROFILE = {
    "email": "ada@example.com",
    "phone": "+436601234567",
    "locale": "de-AT",
    "timezone": "Europe/Vienna",
    "attributes": {"plan": "pro", "seats": 12, "address": {"city": "Wien"}},
}


class Service:
    """What a service does with a world."""

    def __init__(self, world: ClientWorld) -> None:
        self.world = world
        self.http = httpx.AsyncClient(
            base_url=world.url,
            headers={"Authorization": f"Bearer {world.key}"},
            trust_env=False,
            timeout=15,
        )

    async def call(self, method: str, path: str, body: Any = None, status: int = 200, **more: Any) -> Any:
        answer = await self.http.request(method, path, json=body, **more)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def token(self, user: str) -> str:
        return (await self.call("POST", "/v1/tokens", {"userId": user}, 201))["token"]

    async def export(self, user: str) -> list[dict[str, Any]]:
        answer = await self.http.get(f"/v1/users/{user}/export")
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in answer.text.splitlines()]


@pytest.fixture
async def service(postgres_dsn: str) -> AsyncIterator[Service]:
    async with ClientWorld(
        postgres_dsn, shard={"erase_batch": 2, "erase_sweep_s": 0.1, "policy_refresh_s": 0.05}
    ) as world:
        made = Service(world)
        try:
            yield made
        finally:
            await made.http.aclose()


async def test_a_profile(service: Service) -> None:
    """What was put is told; what is left out is empty; who only has notifications has an empty profile."""
    await service.call("GET", "/v1/users/ada", status=404)
    assert await service.call("PUT", "/v1/users/ada", PROFILE) == {"userId": "ada", **PROFILE}
    told = await service.call("GET", "/v1/users/ada")
    assert told | PROFILE == told
    assert told["createdAt"] <= told["updatedAt"]
    await service.call("PUT", "/v1/users/ada", {"attributes": {"plan": "free"}})
    told = await service.call("GET", "/v1/users/ada")
    assert (told["email"], told["attributes"]) == (None, {"plan": "free"})
    await service.call("POST", "/v1/events", {"userId": "bob", "type": "t", "title": "x"}, 202)
    told = await service.call("GET", "/v1/users/bob")
    assert (told["attributes"], told["updatedAt"]) == ({}, None)
    wrong = await service.call("PUT", "/v1/users/ada", {"timezone": "Mars/Olympus", "x": 1}, 422)
    assert wrong["errors"][0]["path"] == "x"
    large = {"attributes": {"a": "x" * service.world.settings.ingress.max_attributes_bytes}}
    await service.call("PUT", "/v1/users/ada", large, 422)


async def fill(service: Service, user: str, other: str) -> None:
    """Something of every kind about a user."""
    db = service.world.db
    device = {"platform": "android", "provider": "fcm", "token": f"token-{user}", "appId": "app"}
    await service.call("PUT", f"/v1/users/{user}", PROFILE)
    await service.call("PUT", f"/v1/users/{user}/devices/phone", device)
    await service.call("PUT", f"/v1/users/{user}/preferences", {"channels": {"push": True}})
    for n in range(6):  # the last one is merged into the one before, the first one could be
        event = {"userId": user, "type": "t", "title": f"n{n}", "idempotencyKey": f"{user}-{n}"}
        more = {"dedupe": {"key": "k", "merge": "count"}} if n >= 4 else {"aggregate": n == 0}
        await service.call("POST", "/v1/events", event | more, 202)
    later = rfc3339(clock.now_ms() + 3_600_000)
    event = {"type": "t", "title": "later"}
    await service.call("POST", "/v1/events", {"userId": user, **event, "scheduleAt": later}, 202)
    await service.call("POST", "/v1/schedules", {"at": later, "event": {"userIds": [user], **event}}, 201)
    await service.call(
        "POST", "/v1/schedules", {"at": later, "event": {"userIds": [user, other], **event}}, 201
    )
    token = await service.token(user)
    client = {"Authorization": f"Bearer {token}"}
    await service.call("POST", "/api/tickets", headers=client, status=201)
    await service.call(
        "POST", "/api/logout", headers={"Authorization": f"Bearer {await service.token(user)}"}
    )
    await db.execute(
        "insert into topic_subscribers (tenant, topic, slot, user_id) values ('acme', 'news', $1, $2)",
        slot_of("acme", user),
        user,
    )
    await db.execute(
        "insert into template_exposures (notification_id, tenant, template_id, version, variant)"
        " select n.id, 'acme', 'hi', 1, 'a' from notifications n join streams s using (stream_id)"
        " where s.user_id = $1",
        user,
    )
    await db.execute(
        "insert into delivery_attempts (delivery_id, attempt, device_id, provider, outcome, started_at,"
        " duration_ms) select d.id, 1, 'phone', 'fcm', 'sent', now(), 1.5 from deliveries d"
        " join streams s using (stream_id) where s.user_id = $1",
        user,
    )
    await db.execute(
        "insert into amendments (notification_id, act_id, stream_id, act, at, actor, version, former)"
        " select n.id, gen_random_uuid(), n.stream_id, 'edit', now(), 'key:k', 2, '\"title\":\"before\"'"
        " from notifications n join streams s using (stream_id) where s.user_id = $1 and n.seq = 1",
        user,
    )
    await db.execute(
        "with b as (insert into broadcasts (broadcast_id, tenant, audience, event, state, start_at,"
        " created_at, updated_at) values (gen_random_uuid(), 'acme', $2, '{}', 'done', now(), now(), now())"
        " returning broadcast_id)"
        " insert into broadcast_failures (broadcast_id, user_id, code, detail, failed_at)"
        " select broadcast_id, $1, 'invalid', 'x', now() from b",
        user,
        json.dumps({"userIds": [user, other]}),
    )
    await db.execute(
        "insert into search_progress (stream_id, seq) select stream_id, 1 from streams where user_id = $1",
        user,
    )


NAMES = {"user_id": "user", "stream_id": "stream", "notification_id": "note", "delivery_id": "delivery"}


async def columns(db: asyncpg.Connection[Any]) -> list[tuple[str, str]]:
    """Tables with a column that names a user or something of a user's; partitions left out."""
    rows = await db.fetch(
        "select c.table_name, c.column_name from information_schema.columns c"
        " join pg_class t on t.relname = c.table_name and t.relkind in ('r', 'p') and not t.relispartition"
        " where c.table_schema = 'public' and c.column_name = any ($1::text[]) order by 1, 2",
        list(NAMES),
    )
    return [(row[0], row[1]) for row in rows]


async def known_ids(db: asyncpg.Connection[Any], user: str) -> dict[str, Any]:
    """The ids under which things of a user are kept."""
    stream = await db.fetchval("select stream_id from streams where user_id = $1", user)
    notes = await db.fetch("select id from notifications where stream_id = $1", stream)
    deliveries = await db.fetch("select id from deliveries where stream_id = $1", stream)
    return {
        "user": [user],
        "stream": [stream],
        "note": [row[0] for row in notes],
        "delivery": [row[0] for row in deliveries],
    }


async def left(db: asyncpg.Connection[Any], ids: dict[str, Any]) -> dict[str, int]:
    """How many rows of each table are about a user."""
    found: dict[str, int] = {}
    for table, column in await columns(db):
        count = await db.fetchval(
            f"select count(*) from {table} where {column} = any ($1)", ids[NAMES[column]]
        )
        if count:
            found[table] = found.get(table, 0) + count
    return found


async def test_erase_and_export(service: Service) -> None:
    """Everything kept of a user is exported; after DELETE none of it is there, and all of others still is."""
    db = service.world.db
    await fill(service, "ada", "bob")
    await fill(service, "bob", "cy")
    ids, others = await known_ids(db, "ada"), await known_ids(db, "bob")
    kept, kept_of_bob = await left(db, ids), await left(db, others)
    assert {table for table, _ in await columns(db)} - set(kept) <= UNUSED

    lines = await service.export("ada")
    assert lines[0]["kind"] == "user"
    assert lines[-1] == {"kind": "end", "lines": len(lines)}
    kinds = {name: [line for line in lines if line["kind"] == name] for name in {x["kind"] for x in lines}}
    assert {name: len(some) for name, some in kinds.items()} == {
        "user": 1, "stream": 1, "profile": 1, "preferences": 1, "device": 1, "topic": 1, "schedule": 3,
        "ticket": 1, "revokedToken": 1, "idempotencyKey": 6, "notification": 5, "end": 1,
        "amendment": 1, "broadcastFailure": 1, "mergedEvent": 3, "mergeWindow": 2,
    }  # fmt: skip
    alone = {"notificationId": kinds["notification"][0]["notification"]["id"]}
    (opened,) = [line for line in kinds["mergedEvent"] if line["eventId"] == alone["notificationId"]]
    assert (opened["status"], opened["how"], opened["source"]) == ("opened", "aggregate", "event")
    (window,) = [line for line in kinds["mergeWindow"] if alone.items() <= line.items()]
    assert window["key"].startswith("aggregate:")
    assert (window["events"], window["count"], window["notifiedAt"]) == (1, 1, opened["at"])
    assert window["endsAt"] > opened["at"]
    assert kinds["profile"][0] | PROFILE == kinds["profile"][0]
    note = kinds["notification"][4]
    assert (note["notification"]["title"], note["notification"]["seq"]) == ("n5", 5)
    assert note["deliveries"][0]["tries"][0]["deviceId"] == "phone"
    assert note["variant"] == {"template": "hi", "version": 1, "variant": "a"}
    assert "bob" not in json.dumps(lines)
    stamps = re.findall(r'"\d{4}-\d\d-\d\dT[^"]*"', json.dumps(lines))
    assert all(re.fullmatch(r'"[-\d]{10}T[:\d]{8}\.\d{3}Z"', stamp) for stamp in stamps)

    token = await service.token("ada")
    socket = await ws_client.connect(
        service.world.ws_url, additional_headers={"Authorization": f"Bearer {token}"}
    )
    welcome = json.loads(await socket.recv())
    assert await service.call("DELETE", "/v1/users/ada") == {"success": True}
    assert await close_code(socket) == 4001

    assert await left(db, ids) == {}
    assert await left(db, others) == kept_of_bob
    assert await db.fetchval("select count(*) from idempotency_keys where key like '%ada%'") == 0
    assert await db.fetchval("select count(*) from schedules where event like '%\"ada\"%'") == 0
    assert await db.fetchval("select count(*) from schedules where state = 'cancelled'") == 1
    lists = await db.fetch("select audience from broadcasts order by audience")
    assert [json.loads(row[0])["userIds"] for row in lists] == [["bob", "cy"], ["bob"]]
    erasure = await db.fetchrow("select * from erasures")
    assert erasure is not None
    assert erasure["done_at"] is not None
    assert erasure["stream_id"] is None
    acts = await db.fetch("select action, target from audit where target = 'ada' order by id")
    assert [tuple(row) for row in acts] == [("user.export", "ada"), ("user.erase", "ada")]

    await service.call("GET", "/v1/users/ada", status=404)
    await service.call("GET", "/v1/users/ada/export", status=404)
    await service.call("DELETE", "/v1/users/nobody", status=404)

    # The name may come back: another user, who begins anew. What the former one holds opens nothing.
    await eventually(lambda: refused(service, token))
    await service.call(
        "POST", "/v1/events", {"userId": "ada", "type": "t", "title": "n", "idempotencyKey": "ada-1"}, 202
    )
    assert [
        line["notification"]["seq"] for line in await service.export("ada") if line["kind"] == "notification"
    ] == [1]
    async with ws_client.connect(
        service.world.ws_url, additional_headers={"Authorization": f"Bearer {token}"}
    ) as again:
        assert await close_code(again) == 4001
    fresh = await service.token("ada")
    async with ws_client.connect(
        service.world.ws_url, additional_headers={"Authorization": f"Bearer {fresh}"}
    ) as again:
        assert json.loads(await again.recv())["epoch"] != welcome["epoch"]


async def close_code(socket: ws_client.ClientConnection) -> int:
    """Read on until the server closes."""
    with contextlib.suppress(ConnectionClosed):
        async for _ in socket:
            pass
    return socket.close_code or 0


async def refused(service: Service, token: str) -> bool:
    """Whether the ingress takes a token no more."""
    answer = await service.http.get("/api/notifications", headers={"Authorization": f"Bearer {token}"})
    return answer.status_code == 401


UNUSED = {"erasures", "search_documents", "archive_erasures"}
"""Named by no id; filled by a trigger when somebody searches; what an erasure leaves to the archive."""


async def test_no_table_is_forgotten(service: Service) -> None:
    """Every table that names users, streams, notifications or deliveries is part of erasure."""
    text = "\n".join(load_queries("users").values())
    for table in {table for table, _ in await columns(service.world.db)} - UNUSED:
        assert re.search(rf"delete from {table}\b", text), f"{table}: erase it in queries/users.sql"


async def test_the_language_of_the_profile(service: Service) -> None:
    """A template speaks the profile's language where no device names one; the device's word counts first."""
    texts = {"content": {"default": {"title": "Hi"}, "de": {"title": "Hallo"}, "pt": {"title": "Oi"}}}
    await service.call("PUT", "/v1/templates/hi", texts)
    event = {"userId": "ada", "type": "t", "template": "hi"}

    async def title() -> str:
        await service.call("POST", "/v1/events", event, 202)
        feed = await service.call("GET", "/v1/users/ada/notifications?limit=1")
        return feed["notifications"][0]["title"]

    assert await title() == "Hi"
    await service.call("PUT", "/v1/users/ada", {"locale": "de-AT"})
    assert await title() == "Hallo"
    device = {"platform": "ios", "provider": "fcm", "token": "x"}
    await service.call("PUT", "/v1/users/ada/devices/phone", device)
    assert await title() == "Hallo"
    await service.call("PUT", "/v1/users/ada/devices/phone", {**device, "locale": "pt-BR"})
    assert await title() == "Oi"


async def test_the_time_zone_of_the_profile(service: Service) -> None:
    """Quiet hours that name no zone are where the profile says, at once; preferences count first."""
    zone = "Pacific/Kiritimati"  # 14 hours ahead
    local = datetime.now(ZoneInfo(zone))
    quiet = {
        "start": (local - timedelta(hours=1)).strftime("%H:%M"),
        "end": (local + timedelta(hours=1)).strftime("%H:%M"),
    }
    event = {"userId": "ada", "type": "t", "title": "x"}

    async def quiet_now() -> bool:
        told = await service.call("POST", "/v1/events?dryRun=true", event)
        return "quiet_hours" in [rule["rule"] for rule in told["rules"]]

    device = {"platform": "ios", "provider": "fcm", "token": "x"}
    await service.call("PUT", "/v1/users/ada/devices/phone", device)
    await service.call("PUT", "/v1/users/ada/preferences", {"quietHours": quiet})
    assert not await quiet_now()
    await service.call("PUT", "/v1/users/ada", {"timezone": zone})
    assert await quiet_now()
    await service.call("PUT", "/v1/users/ada/preferences", {"quietHours": quiet, "timezone": "UTC"})
    assert not await quiet_now()
    await service.call("PUT", "/v1/users/ada/preferences", {"quietHours": quiet})
    assert await quiet_now()
    await service.call("PUT", "/v1/users/ada", {})
    assert not await quiet_now()

    # The tenant's default quiet hours are where the user is, too, document or not.
    await service.call("PUT", "/v1/policy", {"defaults": {"quietHours": quiet}})
    for user in ("ada", "bob"):
        event["userId"] = user
        await service.call("PUT", f"/v1/users/{user}/devices/phone", {**device, "token": user})
        await service.call("PUT", f"/v1/users/{user}", {"timezone": zone})
        await eventually(quiet_now)
    await service.call("PUT", "/v1/policy", {"defaults": {"quietHours": {**quiet, "timezone": "UTC"}}})
    await eventually(lambda: changed(quiet_now))


async def changed(quiet_now: Callable[[], Awaitable[bool]]) -> bool:
    return not await quiet_now()


async def test_schedules_follow_the_profile(service: Service) -> None:
    """A schedule in the user's time is in the zone of the profile."""
    await service.call("PUT", "/v1/users/ada", {"timezone": "Asia/Tokyo"})
    event = {"userId": "ada", "type": "t", "title": "x"}
    body = {"localAt": "2030-01-02T09:00:00", "timezone": "user", "event": event}
    made = await service.call("POST", "/v1/schedules", body, 201)
    assert made["nextAt"] == "2030-01-02T00:00:00.000Z"
