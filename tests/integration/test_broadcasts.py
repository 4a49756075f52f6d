"""Broadcasts through HTTP, with a real Postgres."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from carillon.broadcasts import NotificationIds, SlotUser, parse_recipients
from carillon.clock import rfc3339
from carillon.ids import SLOTS, Uuid7Source, parse_uuid, slot_of, uuid_text
from cluster.cli import main
from cluster.embedded import EmbeddedPostgres
from stores.postgres.broadcast_append import TURNS
from stores.postgres.broadcasts import BroadcastStore
from tests.integration.ingress_world import World
from tests.support import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVENT = {"type": "goal", "title": "Goal!"}
ids = Uuid7Source()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_world(postgres_server: EmbeddedPostgres) -> AsyncIterator[World]:
    admin = await asyncpg.connect(postgres_server.dsn)
    await admin.execute("create database test_broadcasts template template strategy wal_log")
    made = await World(postgres_server.dsn_of("test_broadcasts")).start()
    yield made
    await made.stop()
    await admin.execute("drop database test_broadcasts with (force)")
    await admin.close()


@pytest_asyncio.fixture(loop_scope="module")
async def world(shared_world: World) -> World:
    await shared_world.reset()
    await shared_world.pool.execute(
        "truncate broadcasts, topic_subscribers, templates, profiles, segments cascade"
    )
    return shared_world


async def post(world: World, body: Any, path: str = "/v1/broadcasts", **headers: str) -> Any:
    return await world.http.post(path, json=body, headers=world.service() | headers)


async def get(world: World, path: str, key: str | None = None) -> Any:
    return await world.http.get(path, headers=world.service(key) if key else world.service())


async def test_a_broadcast_is_kept_and_told(world: World) -> None:
    """It is answered with its state, found by its id, and by nobody else."""
    made = await post(world, {"audience": "all", "event": EVENT})
    assert made.status_code == 202
    told = made.json()
    assert (told["state"], told["audience"], told["event"]) == ("running", "all", EVENT)
    assert told["users"] == {"done": 0, "total": None}
    path = f"/v1/broadcasts/{told['broadcastId']}"
    assert (await get(world, path)).json()["counts"]["stored"] == 0
    assert (await get(world, path, world.other_key)).status_code == 404
    assert (await get(world, "/v1/broadcasts/nonsense")).status_code == 404
    failures = await get(world, f"{path}/failures")
    assert failures.json() == {"failures": [], "nextCursor": None}


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"event": EVENT}, "audience"),
        ({"audience": {"segment": "none"}, "event": EVENT}, "audience/segment"),
        ({"audience": "all"}, "event"),
        ({"audience": "all", "event": {**EVENT, "userId": "a"}}, "event/userId"),
        ({"audience": "all", "event": {**EVENT, "topic": "a"}}, "event/topic"),
        ({"audience": "all", "event": {**EVENT, "title": 5}}, "event/title"),
        ({"audience": "all", "event": {**EVENT, "aggregate": True}}, "event/aggregate"),
        ({"audience": "all", "event": EVENT, "scheduleAt": "tomorrow"}, "scheduleAt"),
        ({"audience": "all", "event": EVENT, "scheduleAt": "9000-01-01T00:00:00Z"}, "scheduleAt"),
        ({"audience": "all", "event": EVENT, "idempotencyKey": ""}, "idempotencyKey"),
        ({"audience": "all", "event": EVENT, "color": 1}, "color"),
    ],
)
async def test_what_is_wrong_is_named(world: World, body: Any, path: str) -> None:
    """422 with the member that is wrong; nothing is kept."""
    answer = await post(world, body)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["path"] == path
    assert await world.pool.fetchval("select count(*) from broadcasts") == 0


async def test_a_template_that_is_missing_is_told_at_once(world: World) -> None:
    """Not by a broadcast that fails later."""
    answer = await post(world, {"audience": "all", "event": {"type": "t", "template": "none"}})
    assert (answer.status_code, answer.json()["errors"][0]["path"]) == (422, "template")


async def test_a_key_makes_one(world: World) -> None:
    """The same key and body is the same broadcast, as header or field; another body is refused."""
    body = {"audience": "all", "event": EVENT}
    first = await post(world, body, **{"Idempotency-Key": "k"})
    again = await post(world, {**body, "idempotencyKey": "k"})
    assert first.json()["broadcastId"] == again.json()["broadcastId"]
    assert again.headers["idempotent-replayed"] == "true"
    other = await post(world, {**body, "audience": ["a"]}, **{"Idempotency-Key": "k"})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_conflict")


async def test_an_event_to_a_topic(world: World) -> None:
    """POST /v1/events with topic answers the broadcast to its subscribers; in a batch it is refused."""
    event = {**EVENT, "topic": "goals"}
    answer = await post(world, event, "/v1/events", **{"Idempotency-Key": "k"})
    assert answer.status_code == 202
    assert list(answer.json()) == ["broadcastId"]
    told = (await get(world, f"/v1/broadcasts/{answer.json()['broadcastId']}")).json()
    assert (told["audience"], told["event"]) == ({"topic": "goals"}, EVENT)
    again = await post(world, event, "/v1/events", **{"Idempotency-Key": "k"})
    assert (again.json(), again.headers["idempotent-replayed"]) == (answer.json(), "true")
    batch = (await post(world, [event, {**EVENT, "userId": "a"}], "/v1/events")).json()["results"]
    assert batch[0]["error"]["errors"][0]["path"] == "topic"
    assert batch[1]["status"] == "stored"
    wrong = await post(world, {**event, "title": 5}, "/v1/events")
    assert (wrong.status_code, wrong.json()["errors"][0]["path"]) == (422, "title")
    dry = await post(world, event, "/v1/events?dryRun=true")
    assert (dry.status_code, dry.json()["subscribers"]) == (200, 0)
    later = await post(world, {**event, "scheduleAt": rfc3339(world.clock.now_ms() + 60_000)}, "/v1/events")
    found = (await get(world, f"/v1/broadcasts/{later.json()['broadcastId']}")).json()
    assert (found["state"], found["startedAt"]) == ("scheduled", None)


async def test_pause_resume_cancel(world: World) -> None:
    """Each does what it says, once or twice; what has ended stays so and says it."""
    told = (await post(world, {"audience": "all", "event": EVENT})).json()
    path = f"/v1/broadcasts/{told['broadcastId']}"

    async def act(action: str) -> tuple[int, str]:
        answer = await post(world, {}, f"{path}/{action}")
        return answer.status_code, answer.json().get("state") or answer.json()["code"]

    assert await act("pause") == (200, "paused")
    assert await act("pause") == (200, "paused")
    assert await act("resume") == (200, "running")
    assert await act("resume") == (200, "running")
    assert await act("cancel") == (200, "cancelled")
    assert await act("cancel") == (200, "cancelled")
    assert await act("resume") == (409, "ended")
    assert await act("explode") == (404, "not_found")
    query = "select action from audit where target = $1 order by id"
    audit = await world.pool.fetch(query, told["broadcastId"])
    assert [row["action"] for row in audit] == [
        "broadcast.create", "broadcast.pause", "broadcast.resume", "broadcast.cancel",
    ]  # fmt: skip
    later = {"audience": "all", "event": EVENT, "scheduleAt": rfc3339(world.clock.now_ms() + 60_000)}
    path = f"/v1/broadcasts/{(await post(world, later)).json()['broadcastId']}"
    assert await act("pause") == (200, "paused")
    assert await act("resume") == (200, "scheduled")


async def test_lists(world: World) -> None:
    """Newest first, by page, by state."""
    made = [(await post(world, {"audience": "all", "event": EVENT})).json()["broadcastId"] for _ in range(3)]
    await post(world, {}, f"/v1/broadcasts/{made[1]}/cancel")
    page = (await get(world, "/v1/broadcasts?limit=2")).json()
    assert [one["broadcastId"] for one in page["broadcasts"]] == [made[2], made[1]]
    rest = (await get(world, f"/v1/broadcasts?limit=2&cursor={page['nextCursor']}")).json()
    assert [one["broadcastId"] for one in rest["broadcasts"]] == [made[0]]
    ended = (await get(world, "/v1/broadcasts?state=cancelled")).json()["broadcasts"]
    assert [one["broadcastId"] for one in ended] == [made[1]]
    assert (await get(world, "/v1/broadcasts?state=odd")).status_code == 422


async def test_a_notification_names_its_broadcast(world: World) -> None:
    """GET .../explain says which broadcast it came with; of others that there is none."""
    told = (await post(world, {"audience": "all", "event": EVENT})).json()
    broadcast = parse_uuid(told["broadcastId"])
    assert broadcast is not None
    record = await BroadcastStore(world.pool).get("acme", broadcast)
    assert record is not None
    assert record.started_ms is not None
    raw = NotificationIds(broadcast, record.started_ms).of("ada")
    stream = await world.pool.fetchval(
        "insert into streams (tenant, user_id, slot, epoch, seq, rev) values ('acme', 'ada', $1, 'e', 2, 2)"
        " returning stream_id",
        slot_of("acme", "ada"),
    )
    other = ids.next(world.clock.now_ms())
    for seq, one in ((1, raw), (2, other)):
        await world.pool.execute(
            "insert into notifications (id, stream_id, seq, rev, position, priority, type, content,"
            " created_at) values ($1::text::uuid, $2, $3, $3, $3, 1, 'goal', $4, now())",
            uuid_text(one), stream, seq, '"type":"goal","title":"Goal!"',
        )  # fmt: skip
    answer = (await get(world, f"/v1/notifications/{uuid_text(raw)}/explain")).json()
    assert answer["broadcastId"] == told["broadcastId"]
    assert answer["words"].startswith(f"It came with the broadcast {told['broadcastId']}.")
    answer = (await get(world, f"/v1/notifications/{uuid_text(other)}/explain")).json()
    assert answer["broadcastId"] is None


async def test_pages_are_in_order_and_membership_is_exact(world: World) -> None:
    """Over many slots at once a page comes in the order asked, and who is asked for by name is told apart."""
    store = BroadcastStore(world.pool)
    users = [f"u{i}" for i in range(300)]
    await world.pool.execute(
        "insert into streams (tenant, user_id, slot, epoch) select 'acme', u, s, 'e'"
        " from unnest($1::text[], $2::smallint[]) as x (u, s)", users, [slot_of("acme", u) for u in users],
    )  # fmt: skip
    await world.pool.execute(
        "insert into topic_subscribers (tenant, topic, slot, user_id) select 'acme', 'odd', slot, user_id"
        " from streams where right(user_id, 1) in ('1', '3', '5', '7', '9')"
    )
    await world.pool.execute(
        "insert into profiles (tenant, user_id, slot, attributes)"
        " select tenant, user_id, slot, jsonb_build_object('n', right(user_id, 1)) from streams"
    )
    odd = {"filter": {"attributes.n": {"in": ["1", "3", "5", "7", "9"]}}}
    await world.http.put("/v1/segments/odd", json=odd, headers=world.service())
    for audience, count in (
        ("all", 300),
        ({"topic": "odd"}, 150),
        ({"segment": "odd"}, 150),
        ({"all": True, "platforms": ["ios"]}, 0),
    ):
        recipients = parse_recipients(audience)
        pending = [(slot, "") for slot in range(SLOTS - 1, -1, -1)]
        page = await store.users("acme", recipients, pending, 1000)
        assert len(page) == count
        assert [one.slot for one in page] == sorted((one.slot for one in page), reverse=True)
        few = [SlotUser(slot_of("acme", u), u) for u in ("u1", "u2", "nobody")]
        meant = {one.user for one in await store.among("acme", recipients, few)}
        assert meant >= {one.user for one in page} & {"u1", "u2"}
        if audience != "all":
            assert meant == {one.user for one in page} & {"u1", "u2"}


async def test_what_decides_is_read_alike_with_and_without_others_between(world: World) -> None:
    """Walking from the first to the last user of a page finds what comparing each does, or says that it did
    not: when many stand between who are not on the page."""
    store = BroadcastStore(world.pool)
    users = [SlotUser(slot, f"u{n:03}") for slot in (9, 5, 7) for n in range(100)]
    await world.pool.execute(
        "insert into streams (tenant, user_id, slot, epoch) select 'acme', s || u, s, 'e'"
        " from unnest($1::text[], $2::smallint[]) as x (u, s)",
        [one.user for one in users], [one.slot for one in users],
    )  # fmt: skip
    users = [SlotUser(one.slot, f"{one.slot}{one.user}") for one in users]
    await world.pool.execute(
        "insert into preferences (tenant, user_id, document) values ('acme', '5u007', '{}')"
    )
    await world.pool.execute(
        "insert into profiles (tenant, user_id, slot, timezone) values ('acme', '7u001', 7, 'Europe/Berlin')"
    )
    nobody = [SlotUser(7, "7u0995"), SlotUser(7, "7u0996")]  # without a stream
    for page in (users, users[30:250], [*users[200:], *nobody], users[::2]):
        exact, walked = await store.contexts("acme", page), await store.contexts("acme", page, dense=True)
        assert exact is not None
        assert walked is not None
        names = {one.user for one in page} - {one.user for one in nobody}
        assert set(exact.streams) == names <= set(walked.streams)
        assert exact.streams.items() <= walked.streams.items()
        assert exact.others == walked.others
        assert set(exact.others) == names & {"5u007", "7u001"}
    assert await store.contexts("acme", users[:200:50], dense=True) is None
    few = await store.contexts("acme", users[:200:50])
    assert few is not None
    assert set(few.streams) == {"9u000", "9u050", "5u000", "5u050"}


async def cli(world: World, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    given = ["broadcast", *words, "--url", world.ingress.url, "--key", world.key]
    status = await asyncio.to_thread(main, given, {})
    return status, capsys.readouterr().out


async def test_the_command_line(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """list, show, pause, resume, watch and cancel say what the API says; failures are listed."""
    told = (await post(world, {"audience": ["ada", "bob"], "event": EVENT})).json()
    broadcast = told["broadcastId"]
    status, out = await cli(world, capsys, "list")
    assert status == 0
    assert out.split() == [broadcast, told["createdAt"], "running", "0/?", "2", "users", "goal", "Goal!"]
    assert await cli(world, capsys, "pause", broadcast) == (0, f"{broadcast}  paused  0/?\n")
    assert await cli(world, capsys, "resume", broadcast) == (0, f"{broadcast}  running  0/?\n")
    await world.pool.execute(
        "insert into broadcast_failures values ($1::text::uuid, 'bob', 'invalid', 'not this one', now())",
        broadcast,
    )
    await world.pool.execute(
        "update broadcasts set state = 'done', stored = 1, delivered = 1, failed = 1, total = 2,"
        " ended_at = now()"
    )
    status, out = await cli(world, capsys, "show", broadcast)
    assert status == 0
    rows = dict(line.split(":", 1) for line in out.splitlines() if not line.startswith("  "))
    assert (rows["state"].strip(), rows["users"].strip(), rows["failed"].strip()) == ("done", "2/2", "1")
    assert "bob" in out.splitlines()[-1]
    status, out = await cli(world, capsys, "watch", broadcast)
    assert (status, out) == (0, f"[{'#' * 30}] 100%  2/2  done  1 delivered  1 failed\n")
    assert (await cli(world, capsys, "cancel", broadcast))[0] == 1
    assert (await cli(world, capsys, "show", "nonsense"))[0] == 1


async def test_a_tenant_has_so_many(world: World) -> None:
    """Beyond its number of running ones, or of scheduled ones, another is 429 that says so, however many ask
    at once; a known key, another tenant and one that ended are none."""
    services = world.ingress.app.services
    before = services.settings
    services.settings = before.with_values(broadcast={"max_open": 3, "max_scheduled": 1, "full_retry_s": 7.0})
    try:
        body = {"audience": "all", "event": EVENT}
        first = await post(world, {**body, "idempotencyKey": "first"})
        answers = await asyncio.gather(*(post(world, body) for _ in range(8)))
        made = [answer.json()["broadcastId"] for answer in answers if answer.status_code == 202]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert (len(made), len(refused)) == (2, 6)
        assert refused[0].headers["retry-after"] == "7"
        told = refused[0].json()
        assert (told["code"], told["temporary"]) == ("too_many", True)
        assert told["detail"] == (
            "at most 3 broadcasts of a tenant run or are paused: wait for one to end, or cancel one"
        )
        again = await post(world, {**body, "idempotencyKey": "first"})
        assert again.json()["broadcastId"] == first.json()["broadcastId"]
        to_topic = await post(world, {**EVENT, "topic": "goals"}, "/v1/events")
        assert (to_topic.status_code, to_topic.json()["code"]) == (429, "too_many")
        others = world.service(world.other_key)
        assert (await world.http.post("/v1/broadcasts", json=body, headers=others)).status_code == 202
        later = {**body, "scheduleAt": rfc3339(world.clock.now_ms() + 60_000)}
        assert [(await post(world, later)).status_code for _ in range(2)] == [202, 429]
        await post(world, {}, f"/v1/broadcasts/{made[0]}/pause")
        assert (await post(world, body)).status_code == 429
        await post(world, {}, f"/v1/broadcasts/{made[1]}/cancel")
        assert (await post(world, body)).status_code == 202
    finally:
        services.settings = before


async def test_a_turn_that_nobody_ends_is_over(postgres_dsn: str) -> None:
    """Who took the turn and is not heard of (a node without power) keeps nobody from reading for long."""
    pool = await asyncpg.create_pool(postgres_dsn, min_size=1, max_size=3)
    store = BroadcastStore(pool)
    page = [SlotUser(1, "u1")]

    async def read(number: int) -> Any:
        async with store.turn(number) as connection:
            return await store.contexts("acme", page, connection=connection)

    assert await read(0) is not None
    silent = await asyncpg.connect(postgres_dsn)
    await silent.execute("begin")
    await silent.fetch(store.sql["take_turn"], TURNS, "0")  # for ever
    reading = asyncio.create_task(read(0))
    assert await read(1) is not None
    waits = (
        "select exists (select from pg_locks where locktype = 'advisory' and not granted"
        " and ((classid::bigint << 32) | objid::bigint) = $1)"
    )
    async with pool.acquire() as connection:
        await eventually(lambda: connection.fetchval(waits, TURNS), what="it waits for its turn")
    await silent.fetch(store.sql["take_turn"], TURNS, "100")
    assert await reading is not None
    with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, ConnectionError):
        await silent.close(timeout=5)
    await pool.close()
