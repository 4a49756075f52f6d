"""The HTTP API under a real uvicorn, with a real Postgres and a router that answers by script."""

from __future__ import annotations

import asyncio
import json
import socket
import uuid
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio

from carillon.errors import ClusterError, InvalidInputError
from carillon.ids import slot_of, uuid_text
from carillon.messages import (
    Change,
    DevicePresence,
    DevicePut,
    Failure,
    Outcome,
    Outcomes,
    PolicyRead,
    PresenceMode,
    PresenceReply,
    Publish,
    SessionsRevoke,
    UserPresence,
)
from cluster.embedded import EmbeddedPostgres
from serve.ingress import Ingress, bind_door
from tests.actors.fakes import actor_config
from tests.integration.ingress_world import FakeRouter, World, store_notifications
from tests.support import eventually

EVENT = {"userId": "ada", "type": "t", "title": "Hello"}


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_world(postgres_server: EmbeddedPostgres) -> AsyncIterator[World]:
    """One replica and database for the tests that leave both usable: starting them takes most of the time."""
    admin = await asyncpg.connect(postgres_server.dsn)
    await admin.execute("create database test_http template template strategy wal_log")
    made = await World(postgres_server.dsn_of("test_http")).start()
    yield made
    await made.stop()
    await admin.execute("drop database test_http with (force)")
    await admin.close()


@pytest_asyncio.fixture(loop_scope="module")
async def world(shared_world: World) -> World:
    """The shared replica, as new."""
    await shared_world.reset()
    return shared_world


@pytest_asyncio.fixture(loop_scope="module")
async def own_world(postgres_dsn: str) -> AsyncIterator[World]:
    """A replica for a test that breaks something."""
    made = await World(postgres_dsn).start()
    yield made
    await made.stop()


def problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    """The problem document of an answer, after checking its form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert set(document) == {"type", "title", "status", "detail", "code", "temporary", "requestId", "errors"}
    assert document["status"] == status
    assert document["code"] == code
    assert document["requestId"] == answer.headers["x-request-id"]
    assert document["temporary"] == ("retry-after" in answer.headers)
    return document


# -- events -------------------------------------------------------------------------------------------


async def test_event_accepted(world: World) -> None:
    """One event is answered 202 with id, seq, status, channels, and reaches the router with its slot."""
    answer = await world.event(EVENT)
    assert answer.status_code == 202
    assert list(answer.json()) == ["id", "seq", "status", "channels"]
    event = world.router.events[0]
    assert uuid_text(event.id) == answer.json()["id"]
    assert (event.tenant, event.user, event.slot) == ("acme", "ada", slot_of("acme", "ada"))
    assert event.idempotency_key is None
    assert not event.retry


async def test_batch_in_order_with_bad_item(world: World) -> None:
    """A batch answers in the order sent; a bad item is its own problem without id and fails no other."""
    answer = await world.event([EVENT, {**EVENT, "title": 5}, {**EVENT, "userId": "grace"}])
    assert answer.status_code == 202
    assert answer.text.startswith('{"results":[')
    first, bad, last = answer.json()["results"]
    assert (first["seq"], last["seq"]) == (1, 2)
    assert list(bad) == ["error"]
    assert bad["error"]["status"] == 422
    assert bad["error"]["errors"] == [{"path": "title", "expected": "text", "got": "5"}]
    assert [event.user for event in world.router.events] == ["ada", "grace"]


async def test_user_ids(world: World) -> None:
    """userIds fans out: one result per recipient, each naming it; a user named twice is notified once."""
    body = {"userIds": ["ada", "", "grace", "ada"], "type": "t", "title": "x"}
    results = (await world.event(body)).json()["results"]
    assert [r["userId"] for r in results] == ["ada", "", "grace", "ada"]
    assert "error" in results[1]
    assert "id" not in results[1]
    assert results[0]["id"] == results[3]["id"]
    assert len(world.router.events) == 2


async def test_limits_of_items(world: World) -> None:
    """1,000 items or recipients pass, one more is 422."""
    assert (await world.event([EVENT] * 1000)).status_code == 202
    problem(await world.event([EVENT] * 1001), 422, "invalid")
    users = [f"u{i}" for i in range(1001)]
    body = {"userIds": users, "type": "t", "title": "x"}
    problem(await world.event(body), 422, "invalid")
    assert (await world.event({**body, "userIds": users[:1000]})).status_code == 202
    assert (await world.event([])).json() == {"results": []}


REFUSED = [
    (b"{", 400, "malformed"),
    (b"nonsense", 400, "malformed"),
    (b'{"userId":"a","type":"t","title":"x"} trailing', 400, "malformed"),
    (b'{"userId":"a","type":"t","title":NaN}', 400, "malformed"),
    (b'\xff\xfe{"a":1}', 400, "malformed"),
    (b'{"userId":"\xc3\x28","type":"t","title":"x"}', 400, "malformed"),
    (b"", 422, "invalid"),
    (b"{}", 422, "invalid"),
    (b"null", 422, "invalid"),
    (b"5", 422, "invalid"),
    (b'"text"', 422, "invalid"),
    (b"[" * 100_000, 422, "invalid"),
    (b'{"userId":"a","type":"t","title":"x","unheardOf":1}', 422, "invalid"),
    (b'{"userId":"a","type":"t","title":"nul \\u0000"}', 422, "invalid"),
    (b'{"userId":"a","type":"t","title":"lone \\ud800"}', 422, "invalid"),
    (b'{"userId":"a","type":"t","title":"x","data":{"n":9007199254740992}}', 422, "invalid"),
    (b'{"userId":"a","type":"t","title":"x","data":{"n":1e999}}', 422, "invalid"),
    (b'{"userId":"a","type":"t","title":"x","data":' + b'{"a":' * 32 + b"1" + b"}" * 33, 422, "invalid"),
    (b'{"userId":"a","type":"t","title":"x","topic":"t"}', 422, "invalid"),
    (b'{"userId":"a","type":"t","title":"x","scheduleAt":"tomorrow"}', 422, "invalid"),
    (b'{"userId":"a","type":"t","title":"x","channels":["email"]}', 422, "not_supported"),
    (b'{"userId":"a","type":"t","template":"x"}', 422, "invalid"),
    (b'{"topic":"","type":"t","title":"x"}', 422, "invalid"),
]


async def test_refused_bodies(world: World) -> None:
    """What is not readable is 400, what breaks a rule 422; nothing of it reaches the router."""
    for body, status, code in REFUSED:
        problem(await world.event(body), status, code)
    assert not world.router.events


async def test_idempotency_keys(world: World) -> None:
    """A key scopes to `events:<key>`, `#index` in a batch, `#userId` in a fan-out; the hash is canonical."""
    await world.event(EVENT, headers={"Idempotency-Key": "k1"})
    await world.event(
        {"title": "Hello", "type": "t", "userId": "ada", "body": None}, headers={"Idempotency-Key": "k1"}
    )
    await world.event([EVENT, {**EVENT, "idempotencyKey": "own"}], headers={"Idempotency-Key": "k2"})
    await world.event({"userIds": ["a", "b"], "type": "t", "title": "x", "idempotencyKey": "k3"})
    events = world.router.events
    assert [event.idempotency_key for event in events] == [
        "events:k1", "events:k1", "events:k2#0", "events:own", "events:k3#a", "events:k3#b",
    ]  # fmt: skip
    assert events[0].body_hash == events[1].body_hash == events[2].body_hash
    assert events[4].body_hash != events[5].body_hash
    problem(await world.event(EVENT, headers={"Idempotency-Key": "k" * 256}), 422, "invalid")


async def test_outcomes_become_answers(world: World) -> None:
    """A replay is marked; conflicts, running firsts, fullness and outages map to their problems."""
    world.router.outcome = lambda event: Outcome(b"\1" * 16, 9, "stored", ["in_app"], replayed=True)
    answer = await world.event(EVENT)
    assert answer.headers["idempotent-replayed"] == "true"
    assert answer.json()["seq"] == 9
    for code, status in (
        ("idempotency_conflict", 422),
        ("in_progress", 409),
        ("busy", 429),
        ("invalid", 422),
        ("internal", 500),
    ):
        world.router.outcome = lambda event, code=code: Outcome(
            event.id, status="failed", code=code, detail="why"
        )
        problem(await world.event(EVENT), status, code)
        results = await world.event([EVENT, EVENT])
        if status == 429:
            problem(results, 429, "busy")  # nothing was stored: said once, for the whole request
        else:
            assert [item["error"]["code"] for item in results.json()["results"]] == [code, code]


async def test_retry_after_ambiguous_failure(world: World) -> None:
    """The link breaks with the event in flight: tried again, same id, with the retry mark."""
    seen: list[Any] = []

    def break_once(link: Any, message: Any, request: int) -> bool:
        if type(message) is Publish and not seen:
            seen.extend(message.events)
            link.close()
            return True
        return False

    world.router.answer = break_once
    answer = await world.event(EVENT)
    assert answer.status_code == 202
    again = world.router.events[0]
    assert (again.id, again.retry) == (seen[0].id, True)
    assert not seen[0].retry


async def test_only_open_events_are_tried_again(world: World) -> None:
    """Of a batch only the events whose shard was away are sent again."""
    tries: list[list[str]] = []

    def answer(link: Any, message: Any, request: int) -> bool:
        if type(message) is not Publish:
            return False
        tries.append([event.user for event in message.events])
        link.reply_nowait(
            request,
            Outcomes(
                [
                    Outcome(event.id, status="failed", code="unavailable")
                    if event.user == "b" and len(tries) == 1
                    else Outcome(event.id, 1, "stored", [])
                    for event in message.events
                ]
            ),
        )
        return True

    world.router.answer = answer
    results = (await world.event([{**EVENT, "userId": user} for user in "abc"])).json()["results"]
    assert tries == [["a", "b", "c"], ["b"]]
    assert [item["status"] for item in results] == ["stored"] * 3


async def test_other_router_takes_over(own_world: World) -> None:
    """The node's router goes away: another one serves, and nobody notices."""
    world = own_world
    second = FakeRouter(world.coordinator, "router-second")
    await second.membership.start()
    try:
        await eventually(lambda: len(second.links) >= 1)
        await world.router.membership.close()
        assert (await world.event(EVENT)).status_code == 202
        assert len(second.events) == 1
    finally:
        await second.membership.close()


async def test_no_router_is_503(postgres_dsn: str) -> None:
    """Without any router a request waits for its deadline, then is 503 with Retry-After."""
    world = await World(postgres_dsn, ingress={"request_timeout_s": 0.4}).start()
    try:
        await world.router.membership.close()
        problem(await world.event(EVENT), 503, "unavailable")
        answer = await world.http.post("/api/notifications/read-all", headers=world.client())
        problem(answer, 503, "unavailable")
        ready = problem(await world.http.get("/readyz"), 503, "unavailable")
        assert [error["path"] for error in ready["errors"]] == ["router"]
    finally:
        await world.stop()


async def test_store_outage_is_503(postgres_dsn: str) -> None:
    """Shards without Postgres: tried for store_retry_s, then 503; a single event and a batch alike."""
    world = await World(postgres_dsn, ingress={"store_retry_s": 0.2}).start()
    try:
        world.router.outcome = lambda event: Outcome(
            event.id, status="failed", code="store_unavailable", retry_after_s=2.5
        )
        answer = await world.event(EVENT)
        problem(answer, 503, "store_unavailable")
        assert answer.headers["retry-after"] == "3"
        assert len(world.router.events) > 1
        problem(await world.event([EVENT] * 3), 503, "store_unavailable")
    finally:
        await world.stop()


# -- who may --------------------------------------------------------------------------------------------


async def test_service_login(world: World) -> None:
    """No key, a wrong one, a token instead: 401 with WWW-Authenticate. A key without the scope: 403."""
    for headers in (
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic abc"},
        {"Authorization": f"Bearer crl_{'0' * 12}_{'0' * 48}"},
        {"Authorization": "Bearer \u00e9".encode()},
        world.client(),
    ):
        answer = await world.http.post("/v1/events", json=EVENT, headers=headers)
        problem(answer, 401, "unauthenticated")
        assert answer.headers["www-authenticate"].startswith("Bearer")
    reader = await world.tenants.create_key("acme", "reader", ["users:read"])
    problem(
        await world.http.post("/v1/events", json=EVENT, headers=world.service(reader)), 403, "not_permitted"
    )
    assert (
        await world.http.get("/v1/users/ada/preferences", headers=world.service(reader))
    ).status_code == 200
    assert not world.router.events


async def test_revoked_key(world: World) -> None:
    """A revoked key stops working within auth_cache_s; its last use was written."""
    key = await world.tenants.create_key("acme", "short", ["events:write"])
    assert (await world.event(EVENT, headers=world.service(key))).status_code == 202
    await world.ingress.app.services.auth.write_uses()
    record = next(k for k in await world.tenants.list_keys("acme") if k.name == "short")
    assert record.last_used_ms is not None
    assert await world.tenants.revoke_key("acme", record.key_id)

    async def refused() -> bool:
        return (await world.event(EVENT, headers=world.service(key))).status_code == 401

    await eventually(refused, 3.0)


async def test_client_login(world: World) -> None:
    """Missing, foreign, expired tokens and API keys are 401 on /api; a good one is served."""
    url = "/api/notifications/unread-count"
    assert (await world.http.get(url, headers=world.client())).json() == {"count": 0, "rev": 0}
    problem(await world.http.get(url), 401, "unauthenticated")
    problem(await world.http.get(url, headers=world.service()), 401, "unauthenticated")
    wrong = type(world.acme)("acme", "x" * 40)
    problem(await world.http.get(url, headers=world.client(tenant=wrong)), 401, "unauthenticated")
    unknown = type(world.acme)("nobody", "x" * 40)
    problem(await world.http.get(url, headers=world.client(tenant=unknown)), 401, "unauthenticated")
    problem(await world.http.get(url, headers=world.client(ttl_s=-60)), 401, "token_expired")


async def test_tokens(world: World) -> None:
    """POST /v1/tokens mints a token that works; bad lifetimes and ids are 422."""
    answer = await world.http.post("/v1/tokens", json={"userId": "ada", "ttlS": 60}, headers=world.service())
    assert answer.status_code == 201
    headers = {"Authorization": f"Bearer {answer.json()['token']}"}
    assert (await world.http.get("/api/notifications", headers=headers)).status_code == 200
    for body in (
        {},
        {"userId": ""},
        {"userId": "a", "ttlS": 0},
        {"userId": "a", "ttlS": True},
        {"userId": "a", "x": 1},
    ):
        problem(await world.http.post("/v1/tokens", json=body, headers=world.service()), 422, "invalid")


async def test_revoked_sessions(world: World) -> None:
    """sessions/revoke goes to the shard; tokens issued before what Postgres then says are 401 at once."""
    headers = world.client()
    await store_notifications(world.dsn, "acme", "ada", 1)
    assert (await world.http.get("/api/notifications", headers=headers)).status_code == 200
    await world.pool.execute("update streams set tokens_valid_from = now() + interval '1 second'")
    answer = await world.http.post("/v1/users/ada/sessions/revoke", headers=world.service())
    assert answer.json() == {"success": True}
    assert world.router.received == [SessionsRevoke("acme", "ada", slot_of("acme", "ada"))]
    problem(await world.http.get("/api/notifications", headers=headers), 401, "unauthenticated")


async def test_what_is_archived_says_so(world: World) -> None:
    """404 either way: `archived` if files of its tenant may hold it, `not_found` if they cannot."""
    raw = bytes.fromhex("019cb0fe940670008000000000000006")
    await world.pool.execute(
        "insert into archive_parts (part, tenant, month, state, first_id, last_id, created_at)"
        " values (gen_random_uuid(), 'acme', '2026-03', 'complete', $1, $1, now())",
        uuid.UUID(bytes=raw),
    )
    for path in (f"/v1/notifications/{uuid_text(raw)}", f"/v1/notifications/{uuid_text(raw)}/explain"):
        told = problem(await world.http.get(path, headers=world.service()), 404, "archived")
        assert "what was read of 2026-03 is archived to files" in told["detail"]
        problem(await world.http.get(path, headers=world.service(world.other_key)), 404, "not_found")
        near = path.replace("000006", "000007")
        problem(await world.http.get(near, headers=world.service()), 404, "not_found")


async def test_tenants_never_meet(world: World) -> None:
    """The same user id in another tenant sees nothing, and the notification's id is unknown there."""
    [raw] = await store_notifications(world.dsn, "acme", "ada", 1)
    mine = await world.http.get(f"/v1/notifications/{uuid_text(raw)}", headers=world.service())
    assert mine.json()["notification"]["id"] == uuid_text(raw)
    other = world.service(world.other_key)
    problem(await world.http.get(f"/v1/notifications/{uuid_text(raw)}", headers=other), 404, "not_found")
    feed = await world.http.get("/v1/users/ada/notifications", headers=other)
    assert feed.json() == {"notifications": [], "nextCursor": None}
    feed = await world.http.get("/api/notifications", headers=world.client(tenant=world.other))
    assert feed.json()["notifications"] == []


# -- the feed and states ----------------------------------------------------------------------------------


async def test_feed_pages(world: World) -> None:
    """The feed pages newest first by an opaque cursor, without gap or repetition."""
    await store_notifications(world.dsn, "acme", "ada", 45)
    seen: list[int] = []
    cursor = None
    while True:
        query = {"limit": "20"} | ({"cursor": cursor} if cursor else {})
        page = (await world.http.get("/api/notifications", params=query, headers=world.client())).json()
        seen += [n["seq"] for n in page["notifications"]]
        cursor = page["nextCursor"]
        if cursor is None:
            break
    assert seen == list(range(45, 0, -1))
    default = (await world.http.get("/api/notifications", headers=world.client())).json()
    assert len(default["notifications"]) == 20


BAD_QUERIES = [
        "limit=0", "limit=101", "limit=x", "limit=-1", "limit=1e1", "cursor=%00", "cursor=nonsense",
        "cursor=cDk5OTk5OTk5OTk5OTk5OTk5OTk5OTk", "status=nonsense", "unread=maybe", "type=" + "x" * 65,
        "unread=true&status=read",
]  # fmt: skip


async def test_bad_feed_queries(world: World) -> None:
    """A bad limit, cursor or filter is 422."""
    for query in BAD_QUERIES:
        answer = await world.http.get(f"/api/notifications?{query}", headers=world.client())
        problem(answer, 422, "invalid")


async def test_changes_go_to_the_owner(world: World) -> None:
    """State changes travel as Change with the user's slot; ids that are none are left out of lists."""
    [raw] = await store_notifications(world.dsn, "acme", "ada", 1)
    text, slot = uuid_text(raw), slot_of("acme", "ada")
    headers = world.client()
    world.router.changed = 3

    async def post(path: str, body: Any = None) -> Any:
        answer = await world.http.post(f"/api/notifications/{path}", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    assert await post("read", {"notificationIds": [text, "nonsense", text]}) == {"success": True}
    assert await post("read", {"notificationIds": []}) == {"success": True}
    assert await post("seen", {"notificationIds": [text]}) == {"success": True}
    assert await post("read-all", {"upToSeq": 5}) == {"count": 3}
    assert await post("read-all") == {"count": 3}
    assert await post(f"{text}/archive") == {"success": True}
    assert await post(f"{text}/dismiss", {}) == {"success": True}
    assert await post(f"{text}/click", {"actionId": "open"}) == {"success": True}
    assert world.router.received == [
        Change("acme", "ada", slot, "read", [raw]),
        Change("acme", "ada", slot, "seen", [raw]),
        Change("acme", "ada", slot, "read_all", [], 5),
        Change("acme", "ada", slot, "read_all"),
        Change("acme", "ada", slot, "archive", [raw], strict=True),
        Change("acme", "ada", slot, "dismiss", [raw], strict=True),
        Change("acme", "ada", slot, "click", [raw], None, "open", True),
    ]


async def test_refused_changes(world: World) -> None:
    """An id in the path that is none, or that the owner does not know, is 404; bad lists are 422."""
    headers = world.client()
    problem(await world.http.post("/api/notifications/nonsense/archive", headers=headers), 404, "not_found")

    def unknown(link: Any, message: Any, request: int) -> bool:
        link.reply_nowait(request, Failure("not_found", "no such notification", False))
        return True

    world.router.answer = unknown
    url = f"/api/notifications/{uuid_text(bytes(16))}/archive"
    problem(await world.http.post(url, headers=headers), 404, "not_found")
    for body in ({}, {"notificationIds": "x"}, {"notificationIds": [1]}, {"notificationIds": ["x"] * 1001}):
        problem(await world.http.post("/api/notifications/read", json=body, headers=headers), 422, "invalid")
    for body in ({"upToSeq": -1}, {"upToSeq": "x"}, {"upToSeq": 2**53}, [1]):
        problem(
            await world.http.post("/api/notifications/read-all", json=body, headers=headers), 422, "invalid"
        )


async def test_devices_and_preferences(world: World) -> None:
    """Devices and preferences are written by the owner and read from Postgres, for services and clients."""
    slot = slot_of("acme", "ada")
    device = {"platform": "ios", "provider": "apns", "token": "t1", "appId": "app", "environment": "sandbox"}
    answer = await world.http.put("/v1/users/ada/devices/phone", json=device, headers=world.service())
    assert answer.json() == {"deviceId": "phone", **device, "locale": None}
    assert world.router.received == [
        DevicePut("acme", "ada", slot, "phone", "ios", "apns", "token", "t1", "app", "sandbox", None)
    ]
    problem(await world.http.get("/v1/users/ada/devices/phone", headers=world.service()), 404, "not_found")
    assert (await world.http.delete("/api/devices/phone", headers=world.client())).json() == {"success": True}
    world.router.devices = 0
    problem(await world.http.delete("/api/devices/phone", headers=world.client()), 404, "not_found")
    for body in (
        {},
        {**device, "token": None},
        {**device, "fid": "f"},
        {**device, "platform": "tv"},
        {**device, "environment": "x"},
        {**device, "x": 1},
        {"platform": "ios", "provider": "apns", "fid": "f"},
    ):
        problem(await world.http.put("/api/devices/phone", json=body, headers=world.client()), 422, "invalid")
    web = {"platform": "web", "provider": "webpush", "subscription": {}}
    problem(await world.http.put("/api/devices/web", json=web, headers=world.client()), 422, "not_supported")

    defaults = (await world.http.get("/api/notifications/preferences", headers=world.client())).json()
    assert defaults["global"] is True
    document = {"channels": {"push": False}}
    answer = await world.http.put("/api/notifications/preferences", json=document, headers=world.client())
    assert answer.json() == {**defaults, **document}
    assert json.loads(world.router.received[-1].document) == document
    assert (answer.headers["etag"], world.router.received[-1].version) == ('"1"', None)
    headers = {**world.client(), "If-Match": '"7"'}
    await world.http.put("/api/notifications/preferences", json=document, headers=headers)
    assert world.router.received[-1].version == 7
    headers["If-Match"] = "seven"
    problem(await world.http.put("/api/notifications/preferences", json={}, headers=headers), 422, "invalid")
    bad = {"quietHours": {"start": "25:00", "end": "07:00"}}
    told = problem(
        await world.http.put("/v1/users/ada/preferences", json=bad, headers=world.service()), 422, "invalid"
    )
    assert told["errors"] == [{"path": "quietHours/start", "expected": "HH:MM", "got": "25:00"}]


async def test_presence(world: World) -> None:
    """Presence comes from the shards by way of the router, in the order asked."""
    one = (await world.http.get("/v1/presence/ada", headers=world.service())).json()
    nobody = {"userId": "ada", "status": "offline", "invisible": False, "devices": [], "lastSeenAt": None}
    assert one == nobody
    many = await world.http.post("/v1/presence/query", json={"userIds": ["b", "a"]}, headers=world.service())
    assert [user["userId"] for user in many.json()["users"]] == ["b", "a"]
    body = {"userIds": ["x"] * 1001}
    problem(await world.http.post("/v1/presence/query", json=body, headers=world.service()), 422, "invalid")


async def test_presence_tells_devices_and_who_hides(world: World) -> None:
    """Devices with attention, since when, and how many connections; `invisible` beside the status."""

    def answer(link: Any, message: Any, request: int) -> bool:
        devices = [DevicePresence("laptop", "focused", 1_700_000_000_000, 2)]
        one = UserPresence("ada", "offline", devices, 1_700_000_000_001, invisible=True)
        link.reply_nowait(request, PresenceReply([one] * len(message.users)))
        return True

    world.router.answer = answer
    since = "2023-11-14T22:13:20.000Z"
    devices = [{"deviceId": "laptop", "attention": "focused", "since": since, "connections": 2}]
    told = {"status": "offline", "devices": devices, "lastSeenAt": "2023-11-14T22:13:20.001Z"}
    service = await world.http.get("/v1/presence/ada", headers=world.service())
    assert service.json() == {"userId": "ada", "invisible": True, **told}
    client = await world.http.get("/api/presence", headers=world.client())
    assert client.json() == {"mode": "invisible", **told}


async def test_a_client_hides(world: World) -> None:
    """PUT /api/presence goes to the owner of the token's user; an unknown mode is refused and named."""
    answer = await world.http.put("/api/presence", json={"mode": "invisible"}, headers=world.client())
    assert (answer.status_code, answer.json()) == (200, {"mode": "invisible"})
    assert world.router.received[-1] == PresenceMode("acme", "ada", slot_of("acme", "ada"), "invisible")
    count = len(world.router.received)
    for body in ({}, {"mode": "away"}, {"mode": None}, {"mode": ["auto"]}):
        told = problem(
            await world.http.put("/api/presence", json=body, headers=world.client()), 422, "invalid"
        )
        assert told["errors"][0]["path"] == "mode"
    assert len(world.router.received) == count


async def test_sync(world: World) -> None:
    """GET /api/sync gives everything after a position, pages it, and refuses to wait for now."""
    ids = await store_notifications(world.dsn, "acme", "ada", 5)
    headers = world.client()

    async def sync(**query: Any) -> Any:
        answer = await world.http.get("/api/sync", params=query, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    first = await sync(since=0, limit=3)
    assert ([n["seq"] for n in first["notifications"]], first["more"], first["lastSeq"]) == (
        [1, 2, 3],
        True,
        3,
    )
    rest = await sync(epoch="e1", since=3, rev=5)
    assert [n["seq"] for n in rest["notifications"]] == [4, 5]
    assert (rest["recovered"], rest["more"], rest["lastSeq"], rest["rev"]) == (True, False, 5, 5)
    await world.pool.execute(
        "update notifications set read_at = now(), seen_at = now(), changed = true, rev = 6 where seq = 2"
    )
    await world.pool.execute("update streams set rev = 6, unread = 4")
    changed = await sync(epoch="e1", since=5, rev=5)
    assert changed["notifications"] == []
    assert [(c["type"], c["notificationIds"], c["rev"]) for c in changed["changes"]] == [
        ("NOTIFICATIONS_READ", [uuid_text(ids[1])], 6)
    ]
    assert (changed["rev"], changed["unreadCount"]) == (6, 4)
    assert (await sync(epoch="another", since=5))["recovered"] is False
    assert (await sync(epoch="e1", since=9))["recovered"] is False
    for wrong in ("-1", "x", "3601"):
        problem(await world.http.get(f"/api/sync?waitS={wrong}", headers=headers), 422, "invalid")
    problem(await world.http.get("/api/sync?since=x", headers=headers), 422, "invalid")


# -- the transport ----------------------------------------------------------------------------------------


async def test_routes_and_methods(world: World) -> None:
    """Unknown routes are 404, wrong methods 405 with Allow; HEAD is GET without a body."""
    problem(await world.http.get("/nowhere"), 404, "not_found")
    problem(await world.http.get("/v1/events/"), 404, "not_found")
    answer = await world.http.get("/v1/events")
    problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    answer = await world.http.delete("/v1/users/ada/preferences")
    problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, PATCH, PUT"
    head = await world.http.head("/healthz")
    assert (head.status_code, head.content) == (200, b"")


async def test_request_id(world: World) -> None:
    """A harmless X-Request-Id is echoed; anything else is replaced."""
    answer = await world.http.get("/nowhere", headers={"X-Request-Id": "abc-123"})
    assert answer.headers["x-request-id"] == answer.json()["requestId"] == "abc-123"
    for bad in ("a b", "x" * 129, '"><script>'):
        answer = await world.http.get("/nowhere", headers={"X-Request-Id": bad})
        assert answer.headers["x-request-id"] not in ("", bad)


async def test_too_large(postgres_dsn: str) -> None:
    """A body over the limit is 413, with its length told first or not."""
    world = await World(postgres_dsn, ingress={"max_request_bytes": 1024}).start()
    try:
        problem(await world.event(b" " * 1025), 413, "too_large")
        assert (await world.event(b" " * 900 + json.dumps(EVENT).encode())).status_code == 202

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(4):
                yield b" " * 400

        answer = await world.http.post("/v1/events", content=chunks(), headers=world.service())
        problem(answer, 413, "too_large")
    finally:
        await world.stop()


async def test_content_type_is_tolerated(world: World) -> None:
    """A wrong content type does not matter: a body is JSON or it is not."""
    answer = await world.event(json.dumps(EVENT).encode(), headers={"Content-Type": "text/plain"})
    assert answer.status_code == 202


async def test_bad_utf8_in_url(world: World) -> None:
    """A path or query that is not UTF-8 is 400; an encoded slash belongs to the id."""
    problem(await world.http.get("/v1/presence/%ff", headers=world.service()), 400, "malformed")
    problem(await world.http.get("/api/notifications?q=%ff", headers=world.client()), 400, "malformed")
    answer = await world.http.get("/v1/presence/a%2Fb", headers=world.service())
    assert answer.json()["userId"] == "a/b"
    problem(await world.http.get("/v1/presence/a%00b", headers=world.service()), 422, "invalid")
    problem(await world.http.get("/v1/presence/" + "x" * 129, headers=world.service()), 422, "invalid")


async def test_cors(world: World) -> None:
    """Browsers may call /api from anywhere, without credentials; /v1 is not for browsers."""
    preflight = await world.http.options(
        "/api/notifications",
        headers={"Origin": "https://app.example", "Access-Control-Request-Method": "GET"},
    )
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in preflight.headers
    answer = await world.http.get("/api/notifications", headers={"Origin": "https://app.example"})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "*"
    answer = await world.event(EVENT, headers={"Origin": "https://app.example"})
    assert "access-control-allow-origin" not in answer.headers


async def test_cors_list(postgres_dsn: str) -> None:
    """With origins named in the settings, only those are allowed."""
    world = await World(
        postgres_dsn, ingress={"cors_origins": "https://a.example, https://b.example"}
    ).start()
    try:
        for origin, allowed in (("https://b.example", "https://b.example"), ("https://c.example", None)):
            answer = await world.http.get("/api/notifications", headers={"Origin": origin})
            assert answer.headers.get("access-control-allow-origin") == allowed
    finally:
        await world.stop()


def _hold_events(world: World) -> list[Any]:
    """Let the router answer no event of "acme"; what it holds."""
    held: list[Any] = []

    def hold(link: Any, message: Any, request: int) -> bool:
        if type(message) is not Publish or message.events[0].tenant != "acme":
            return False
        held.append((link, message, request))
        return True

    world.router.answer = hold
    return held


def _answer_held(held: list[Any]) -> None:
    for link, message, request in held:
        link.reply_nowait(request, Outcomes([Outcome(e.id, 1, "stored", []) for e in message.events]))


async def test_a_tenant_leaves_room_for_others(postgres_dsn: str) -> None:
    """Beyond tenant_in_flight requests a tenant's next are 503; another's are served, and its own soon."""
    world = await World(postgres_dsn, ingress={"max_in_flight": 10, "tenant_in_flight": 2}).start()
    try:
        held = _hold_events(world)
        waiting = [asyncio.ensure_future(world.event(EVENT)) for _ in range(2)]
        await eventually(lambda: len(held) == 2)
        told = problem(await world.event(EVENT), 503, "unavailable")
        assert "of this tenant" in told["detail"]
        preferences = "/v1/users/ada/preferences"
        problem(await world.http.get(preferences, headers=world.service()), 503, "unavailable")
        assert (await world.event(EVENT, headers=world.service(world.other_key))).status_code == 202
        _answer_held(held)
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [202, 202]
        assert (await world.http.get(preferences, headers=world.service())).status_code == 200
    finally:
        await world.stop()


async def test_back_pressure(postgres_dsn: str) -> None:
    """Beyond max_in_flight requests are 503 with Retry-After; health and metrics still answer."""
    world = await World(postgres_dsn, ingress={"max_in_flight": 2}).start()
    try:
        held = _hold_events(world)
        waiting = [asyncio.ensure_future(world.event(EVENT)) for _ in range(2)]
        await eventually(lambda: len(held) == 2)
        problem(await world.event(EVENT), 503, "unavailable")
        assert (await world.http.get("/healthz")).status_code == 200
        _answer_held(held)
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [202, 202]
    finally:
        await world.stop()


# -- operations ---------------------------------------------------------------------------------------------


async def test_ready(own_world: World) -> None:
    """Ready while the whole path works: a lost gateway, slot or database each ends it, by name."""
    world = own_world
    assert (await world.http.get("/readyz")).status_code == 200
    world.coordinator.set_owner(5, None)
    await eventually(lambda: -1 in world.ingress.backend.membership.map.owners)
    told = problem(await world.http.get("/readyz"), 503, "unavailable")
    assert [error["path"] for error in told["errors"]] == ["slots"]
    world.coordinator.set_owner(5, "shard-a")
    world.coordinator.forget("gateway-a")
    await eventually(lambda: not world.ingress.backend.gateways())
    told = problem(await world.http.get("/readyz"), 503, "unavailable")
    assert [error["path"] for error in told["errors"]] == ["gateway"]


async def test_not_ready_without_answering_shard(postgres_dsn: str) -> None:
    """A map that looks right is not enough: a shard that does not answer makes the replica not ready."""
    world = await World(postgres_dsn, ingress={"ready_timeout_s": 0.2}).start()
    try:
        world.router.answer = lambda link, message, request: True
        told = problem(await world.http.get("/readyz"), 503, "unavailable")
        assert [error["path"] for error in told["errors"]] in (["shards"], ["cluster"])
    finally:
        await world.stop()


async def test_metrics(own_world: World) -> None:
    """Metrics cover the cluster, the ingress' own request times among them."""
    world = own_world
    await world.event(EVENT)

    async def there() -> bool:
        answer = await world.http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        return "carillon_ingress_request_seconds_count" in answer.text and 'kind="router"' in answer.text

    await eventually(there, 5.0)


async def test_policy(own_world: World) -> None:
    """PUT keeps the document, GET completes it; a wrong one or a weak key changes nothing."""
    world = own_world
    document = {"whenAway": "both", "types": {"chat": {"holdS": 5}}}
    answer = await world.http.put("/v1/policy", json=document, headers=world.service())
    complete = {
        "whenAway": "both",
        "whenAwayDelayS": 30.0,
        "holdS": 60.0,
        "types": {"chat": {"holdS": 5}},
        "presence": {"watch": "nobody"},
        "topics": {"subscribe": "nobody"},
    }
    assert (answer.status_code, answer.json()) == (200, complete)
    wrong = await world.http.put("/v1/policy", json={"holdS": -1}, headers=world.service())
    assert problem(wrong, 422, "invalid")["errors"][0]["path"] == "holdS"
    assert (await world.http.get("/v1/policy", headers=world.service())).json() == complete
    assert await world.tenants.policy("other") == {}
    weak = await world.tenants.create_key("acme", "reader", ["users:write"])
    problem(await world.http.get("/v1/policy", headers=world.service(weak)), 403, "not_permitted")


async def test_versions_of_a_policy(own_world: World) -> None:
    """Each change is a version with a time, the same document again is none; If-Match replaces that one
    alone; a shard that has not heard of it makes the answer a 202, and the change is stored all the same."""
    world = own_world

    async def put(document: Any, **headers: str) -> httpx.Response:
        return await world.http.put("/v1/policy", json=document, headers=world.service() | headers)

    none = await world.http.get("/v1/policy", headers=world.service())
    assert none.headers["etag"] == '"0"'
    assert "last-modified" not in none.headers
    first = await put({"holdS": 1})
    assert (first.status_code, first.headers["etag"]) == (200, '"1"')
    assert [m.tenant for m in world.router.received if type(m) is PolicyRead] == ["acme"]
    again = await put({"holdS": 1})
    assert (again.status_code, again.headers["etag"]) == (200, '"1"')
    assert again.headers["last-modified"] == first.headers["last-modified"]
    problem(await put({"holdS": 2}, **{"If-Match": '"0"'}), 412, "version_conflict")
    problem(await put({"holdS": 2}, **{"If-Match": "x"}), 422, "invalid")
    raced = await asyncio.gather(*(put({"holdS": n}, **{"If-Match": '"1"'}) for n in range(2, 6)))
    assert sorted(answer.status_code for answer in raced) == [200, 412, 412, 412]
    world.router.missing = ["shard-a"]
    later = await put({"holdS": 9})
    assert (later.status_code, later.headers["etag"], later.json()["holdS"]) == (202, '"3"', 9.0)
    world.router.missing = []
    world.router.answer = lambda link, message, request: (
        type(message) is PolicyRead and (link.fail_nowait(request, InvalidInputError("unheard of")) or True)
    )
    assert (await put({"holdS": 10})).status_code == 202  # a router of an earlier release
    told = await world.http.get("/v1/policy", headers=world.service())
    assert (told.headers["etag"], told.json()["holdS"]) == ('"4"', 10.0)
    assert parsedate_to_datetime(told.headers["last-modified"]).tzinfo is not None
    acts = [act.detail for act in await world.tenants.audit("acme", 10) if act.action == "policy.put"]
    assert [act["version"] for act in acts] == [4, 3, 2, 1, 1]


async def test_docs_work_offline(world: World) -> None:
    """The documentation page loads nothing but our own openapi.json."""
    page = (await world.http.get("/docs")).text
    assert "http://" not in page
    assert "https://" not in page
    assert "src=" not in page
    document = (await world.http.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")


async def test_demo_is_off(world: World) -> None:
    """Demo routes are 404 unless demo mode is on."""
    for method, path in (("GET", "/demo/config.json"), ("POST", "/demo/send"), ("GET", "/demo/received")):
        problem(await world.http.request(method, path), 404, "not_found")


async def test_demo_mode(postgres_dsn: str) -> None:
    """Demo mode gives the gateway's URL and tokens that work, and sends to a demo user."""
    world = await World(
        postgres_dsn, ingress={"demo": True, "demo_tenant": "acme", "demo_users": "ada, grace"}
    ).start()
    try:
        config = (await world.http.get("/demo/config.json")).json()
        assert config["wsUrl"] == "ws://127.0.0.1:1/ws"
        assert [user["userId"] for user in config["users"]] == ["ada", "grace"]
        assert (config["policy"]["whenAway"], config["policy"]["whenAwayDelayS"]) == ("push_after", 30)
        for script in ("carillon-client.js", "fallback.js", "toasts.js", "preferences.js"):
            answer = await world.http.get(f"/demo/{script}")
            assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
        headers = {"Authorization": f"Bearer {config['users'][0]['token']}"}
        assert (await world.http.get("/api/notifications", headers=headers)).status_code == 200
        body = {"userId": "ada", "title": "Hi", "body": "b", "priority": "high"}
        assert (await world.http.post("/demo/send", json=body)).status_code == 202
        assert (world.router.events[0].tenant, world.router.events[0].type) == ("acme", "demo")
        problem(await world.http.post("/demo/send", json={"userId": "ada"}), 422, "invalid")
        problem(await world.http.post("/demo/explain", json={"userId": "ada"}), 422, "invalid")
        assert (await world.http.get("/demo/received")).json() == {"fcm": None, "apns": None}
    finally:
        await world.stop()


async def test_direct_port_taken(postgres_dsn: str) -> None:
    """A direct port in other hands is named; another replica of the same cluster shares it."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ClusterError, match=f"port {port} .* taken"):
            await bind_door("127.0.0.1", port, "tag")
    world = await World(postgres_dsn).start()
    try:
        port = int(world.ingress.url.rsplit(":", 1)[1])
        settings = world.settings.with_values(ingress={"direct_port": port})
        second = Ingress(actor_config("ingress", "ingress-b", world.coordinator, settings=settings))
        await second.start()
        try:
            assert second.url == world.ingress.url
        finally:
            await second.stop()
        assert (await world.event(EVENT)).status_code == 202
        with pytest.raises(ClusterError, match="another Carillon"):
            await bind_door("127.0.0.1", port, "a tag of another cluster")
    finally:
        await world.stop()


async def test_stop_finishes_requests(postgres_dsn: str) -> None:
    """A stopping replica answers what is in flight before it goes."""
    world = await World(postgres_dsn).start()
    held: list[Any] = []

    def hold(link: Any, message: Any, request: int) -> bool:
        if type(message) is Publish:
            held.append((link, message, request))
        return type(message) is Publish

    world.router.answer = hold
    waiting = asyncio.ensure_future(world.event(EVENT))
    await eventually(lambda: held)
    stopping = asyncio.ensure_future(world.ingress.stop())
    link, message, request = held[0]
    await eventually(lambda: world.ingress.app.services.draining)
    link.reply_nowait(request, Outcomes([Outcome(message.events[0].id, 1, "stored", [])]))
    assert (await waiting).status_code == 202
    await stopping
    await world.stop()
