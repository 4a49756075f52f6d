"""Schedules through HTTP, with a real Postgres."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from carillon.clock import rfc3339
from cluster.embedded import EmbeddedPostgres
from tests.integration.ingress_world import World

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVENT = {"userId": "ada", "type": "t", "title": "later"}
DAILY = {"localAt": "2030-01-01T09:00:00", "rrule": "FREQ=DAILY", "event": EVENT}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_world(postgres_server: EmbeddedPostgres) -> AsyncIterator[World]:
    admin = await asyncpg.connect(postgres_server.dsn)
    await admin.execute("create database test_schedules template template strategy wal_log")
    made = await World(postgres_server.dsn_of("test_schedules")).start()
    yield made
    await made.stop()
    await admin.execute("drop database test_schedules with (force)")
    await admin.close()


@pytest_asyncio.fixture(loop_scope="module")
async def world(shared_world: World) -> World:
    await shared_world.reset()
    await shared_world.pool.execute("truncate schedules, templates")
    return shared_world


def at(world: World, in_s: float) -> str:
    return rfc3339(world.clock.now_ms() + round(in_s * 1000))


async def post(world: World, body: Any, **headers: str) -> Any:
    return await world.http.post("/v1/schedules", json=body, headers=world.service() | headers)


async def get(world: World, path: str) -> Any:
    return (await world.http.get(path, headers=world.service())).json()


async def test_an_event_for_later(world: World) -> None:
    """It is answered deferred, kept with the id it will have, and not sent; what has passed is sent now."""
    answer = await world.event({**EVENT, "scheduleAt": at(world, 60)})
    assert answer.status_code == 202
    told = answer.json()
    assert (told["status"], told["seq"], told["channels"]) == ("deferred", 0, [])
    assert world.router.events == []
    kept = await get(world, f"/v1/schedules/{told['id']}")
    assert (kept["state"], kept["userId"], kept["event"]) == ("active", "ada", EVENT)
    assert (await world.event({**EVENT, "scheduleAt": at(world, -5)})).json()["status"] == "stored"
    assert len(world.router.events) == 1


async def test_a_batch_of_now_and_later(world: World) -> None:
    """Each has its place in the answer; recipients of one event are scheduled one by one."""
    results = (
        await world.event(
            [
                EVENT,
                {**EVENT, "scheduleAt": at(world, 60)},
                {**EVENT, "title": 5},
                {**EVENT, "scheduleAt": at(world, 1e9)},
            ]
        )
    ).json()["results"]
    assert [one.get("status") for one in results] == ["stored", "deferred", None, None]
    assert "scheduleAt" in results[3]["error"]["detail"]
    many = {"userIds": ["a", "", "b"], "type": "t", "title": "x", "scheduleAt": at(world, 60)}
    results = (await world.event(many)).json()["results"]
    assert [one.get("status") for one in results] == ["deferred", None, "deferred"]
    assert (await get(world, "/v1/schedules?userId=b"))["schedules"][0]["scheduleId"] == results[2]["id"]


async def test_a_key_schedules_once(world: World) -> None:
    """The same key and body is the same schedule; another body is refused."""
    body = {**EVENT, "scheduleAt": at(world, 60)}
    first = await world.event(body, headers={"Idempotency-Key": "k"})
    again = await world.event(body, headers={"Idempotency-Key": "k"})
    assert first.json() == again.json()
    assert again.headers["idempotent-replayed"] == "true"
    other = await world.event({**body, "title": "other"}, headers={"Idempotency-Key": "k"})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_conflict")
    made = await post(world, DAILY, **{"Idempotency-Key": "k"})
    same = await post(world, DAILY, **{"Idempotency-Key": "k"})
    assert made.json()["scheduleId"] == same.json()["scheduleId"] != first.json()["id"]
    assert "idempotent-replayed" in same.headers
    wrong = await post(world, {**DAILY, "event": {**EVENT, "title": "o"}}, **{"Idempotency-Key": "k"})
    assert wrong.json()["code"] == "idempotency_conflict"


async def test_rules_are_kept_listed_and_cancelled(world: World) -> None:
    """Made, read, listed by page, cancelled once and for all."""
    made = (await post(world, {**DAILY, "timezone": "Europe/Vienna"})).json()
    assert (made["nextAt"], made["state"]) == ("2030-01-01T08:00:00.000Z", "active")
    await post(world, {"cron": "*/5 * * * *", "event": {**EVENT, "userId": "bob"}})
    page = await get(world, "/v1/schedules?limit=1")
    assert page["schedules"][0]["userId"] == "bob"
    rest = await get(world, f"/v1/schedules?limit=1&cursor={page['nextCursor']}")
    assert rest["schedules"] == [made]
    path = f"/v1/schedules/{made['scheduleId']}"
    gone = await world.http.delete(path, headers=world.service())
    assert (gone.json()["state"], gone.json()["nextAt"]) == ("cancelled", None)
    assert (await world.http.delete(path, headers=world.service())).json()["state"] == "cancelled"
    assert [one["state"] for one in (await get(world, "/v1/schedules?state=active"))["schedules"]] == [
        "active"
    ]
    theirs = await world.http.get(path, headers=world.service(world.other_key))
    assert theirs.status_code == 404


async def test_the_users_own_time(world: World) -> None:
    """`user` is the zone of the user's preferences, else of the tenant's default, else UTC."""
    zone = "insert into preferences (tenant, user_id, document) values ('acme', 'ada', $1)"
    await world.pool.execute(zone, '{"timezone": "Asia/Tokyo"}')
    body = {"localAt": "2030-01-01T09:00:00", "timezone": "user"}
    assert (await post(world, {**body, "event": EVENT})).json()["nextAt"] == "2030-01-01T00:00:00.000Z"
    settings = '{"policy": {"defaults": {"timezone": "Europe/Vienna"}}}'
    await world.pool.execute("update tenants set settings = $1 where tenant = 'acme'", settings)
    other = {**EVENT, "userId": "bob"}
    assert (await post(world, {**body, "event": other})).json()["nextAt"] == "2030-01-01T08:00:00.000Z"
    await world.pool.execute("update tenants set settings = '{}' where tenant = 'acme'")
    many = {"userIds": ["a", "b"], "type": "t", "title": "x"}
    answer = await post(world, {**body, "event": many})
    assert (answer.status_code, answer.json()["errors"][0]["path"]) == (422, "timezone")


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"event": EVENT}, "at"),
        ({**DAILY, "event": {"userId": "ada"}}, "event/type"),
        ({**DAILY, "event": {**EVENT, "scheduleAt": "2030-01-01T00:00:00Z"}}, "event/scheduleAt"),
        ({**DAILY, "event": 5}, "event"),
        ({"at": "2020-01-01T00:00:00Z", "event": EVENT}, "at"),
        ({**DAILY, "rrule": "FREQ=DAILY;UNTIL=20200101"}, "rrule"),
        ({**DAILY, "rrule": "FREQ=DAILY;BYMONTH=2;BYMONTHDAY=30"}, "rrule"),
        (
            {
                **DAILY,
                "rrule": "FREQ=YEARLY;INTERVAL=2;BYMONTH=2;BYMONTHDAY=29",
                "localAt": "2031-01-01T00:00:00",
            },
            "rrule",
        ),
        ({**DAILY, "rrule": "FREQ=FORTNIGHTLY"}, "rrule"),
        ({**DAILY, "timezone": "Vienna"}, "timezone"),
        ({**DAILY, "event": {"userId": "ada", "type": "t", "template": "nothing"}}, "template"),
        ({**DAILY, "every": "day"}, "every"),
    ],
)
async def test_what_cannot_be_kept_is_told(world: World, body: Any, path: str) -> None:
    """A problem names what is wrong, a rule without occurrences included, and nobody waits for it."""
    before = world.clock.monotonic()
    answer = await post(world, body)
    assert (answer.status_code, answer.json()["errors"][0]["path"]) == (422, path), answer.text
    assert world.clock.monotonic() - before < 30
    assert await world.pool.fetchval("select count(*) from schedules") == 0


async def test_occurrences_are_not_too_close(postgres_dsn: str) -> None:
    """A rule whose occurrences are nearer than `schedule.min_interval_s` is refused."""
    world = await World(postgres_dsn, schedule={"min_interval_s": 3600.0}).start()
    try:
        answer = await post(world, {"cron": "*/5 * * * *", "event": EVENT})
        assert (answer.status_code, answer.json()["errors"][0]["got"]) == (422, "300 s")
        assert (await post(world, {"cron": "0 * * * *", "event": EVENT})).status_code == 201
    finally:
        await world.stop()
