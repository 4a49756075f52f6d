"""Broadcasts carried out by real shards, with a real Postgres."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from carillon.broadcasts import NotificationIds, parse_recipients
from carillon.clock import SystemClock
from carillon.errors import StoreUnavailableError
from carillon.ids import Uuid7Source, slot_of
from carillon.messages import UserErase
from stores.postgres.broadcasts import BroadcastRecord, BroadcastStore, NewBroadcast
from stores.postgres.pool import open_pool
from stores.postgres.segments import SegmentStore
from tests.actors.shard_kit import Kit, make_event
from tests.support import eventually

clock = SystemClock()
ids = Uuid7Source()


class World:
    """A kit with a store of broadcasts."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit

    async def open(self) -> World:
        self.pool = await open_pool(self.kit.settings.postgres, 3)
        self.store = BroadcastStore(self.pool)
        await self.pool.execute("insert into tenants (tenant, client_secret) values ('t', 's')")
        return self

    async def people(self, count: int, prefix: str = "u") -> list[str]:
        """Users with streams, nobody of them in memory."""
        users = [f"{prefix}{i:04d}" for i in range(count)]
        await self.pool.execute(
            "insert into streams (tenant, user_id, slot, epoch)"
            " select 't', u, s, 'e' from unnest($1::text[], $2::smallint[]) as x (u, s)",
            users,
            [slot_of("t", user) for user in users],
        )
        return users

    async def send(
        self, audience: Any = "all", state: str = "running", in_ms: int = 0, **event: Any
    ) -> bytes:
        body = {"type": "news", "title": "to all", **event}
        raw, now_ms = ids.next(clock.now_ms()), clock.now_ms()
        new = NewBroadcast(raw, parse_recipients(audience), json.dumps(body), state, now_ms + in_ms)
        assert await self.store.add("t", new, now_ms) == (raw, False)
        return raw

    async def record(self, raw: bytes) -> BroadcastRecord:
        found = await self.store.get("t", raw)
        assert found is not None
        return found

    async def ended(self, raw: bytes, timeout_s: float = 60.0) -> BroadcastRecord:
        async def check() -> Any:
            found = await self.record(raw)
            return found if found.ended_ms is not None else None

        return await eventually(check, timeout_s)

    async def have(self) -> dict[str, int]:
        """How many notifications each user has."""
        rows = await self.pool.fetch(
            "select s.user_id, count(n.id) as n, s.seq, s.rev, s.unread from streams s"
            " left join notifications n using (stream_id) group by s.stream_id"
        )
        for row in rows:
            assert row["seq"] == row["rev"] == row["n"], "a stream and its notifications differ"
        return {row["user_id"]: row["n"] for row in rows}


@pytest.fixture
async def world(postgres_dsn: str) -> AsyncIterator[World]:
    kit = Kit(postgres_dsn)
    kit.settings = kit.settings.with_values(
        broadcast={"look_s": 0.05, "chunk_min": 7, "chunk_max": 40, "retry_s": 0.05}
    )
    async with kit:
        made = await World(kit).open()
        yield made
        await made.pool.close()


async def test_everybody_gets_it_once(world: World) -> None:
    """Each user has one notification, with the id that follows from broadcast and user; the counts say so."""
    users = await world.people(300)
    raw = await world.send()
    record = await world.ended(raw)
    assert (record.state, record.counts.stored, record.total, record.counts.failed) == ("done", 300, 300, 0)
    assert await world.have() == dict.fromkeys(users, 1)
    assert record.started_ms is not None
    made = NotificationIds(raw, record.started_ms)
    rows = await world.pool.fetch("select id, user_id from notifications join streams using (stream_id)")
    assert {row["id"].bytes for row in rows} == {made.of(user) for user in users}
    assert await world.store.broadcast_of("t", "u0001", made.of("u0001")) == raw
    assert await world.store.broadcast_of("t", "u0002", made.of("u0001")) is None
    assert await world.pool.fetchval("select count(*) from broadcast_slots") == 0


async def test_it_goes_on_whatever_looks_take(postgres_dsn: str) -> None:
    """Looks that are due again when they end, and the fewest connections, stop nothing."""
    kit = Kit(postgres_dsn)
    kit.settings = kit.settings.with_values(
        broadcast={"look_s": 0.0001, "chunk_min": 7, "chunk_max": 40}, postgres={"shard_pool_size": 2}
    )
    async with kit:
        world = await World(kit).open()
        users = await world.people(100)
        record = await world.ended(await world.send())
        assert (record.state, record.counts.stored) == ("done", 100)
        assert await world.have() == dict.fromkeys(users, 1)
        await world.pool.close()


async def test_a_list_makes_users(world: World) -> None:
    """Users who were never heard of get a stream with it; nobody else gets it."""
    await world.people(5)
    raw = await world.send({"userIds": ["new", "u0002", "ä/ö"]})
    record = await world.ended(raw)
    assert (record.state, record.counts.stored) == ("done", 3)
    have = await world.have()
    assert {user for user, count in have.items() if count} == {"new", "u0002", "ä/ö"}


async def test_connected_users_come_first(world: World) -> None:
    """A user with a session gets it on the socket, before the pages of the slots; once."""
    await world.people(200)
    await world.kit.gateway.attach_ready(1, "zz")
    raw = await world.send()
    frames = await world.kit.gateway.seen(1, 2)
    assert frames[1]["notification"]["title"] == "to all"
    record = await world.ended(raw)
    assert (record.counts.stored, record.counts.delivered) == (201, 1)
    order = await world.pool.fetch(
        "select user_id from notifications join streams using (stream_id) order by notifications.ctid"
    )
    assert order[0]["user_id"] == "zz"
    assert (await world.have())["zz"] == 1


async def test_an_event_meanwhile_keeps_its_place(world: World) -> None:
    """Users who get single events all the while have streams without a gap, and sockets see every seq."""
    users = await world.people(150)
    for conn, user in enumerate(users[:10], 1):
        await world.kit.gateway.attach_ready(conn, user)
    raw = await world.send()
    for _ in range(20):
        await world.kit.publish(*(make_event(user) for user in users[:20]))
    await world.ended(raw)
    await world.kit.publish(*(make_event(user) for user in users))
    have = await world.have()
    assert [have[user] for user in users] == [22] * 20 + [2] * 130
    for conn in range(1, 11):
        await world.kit.gateway.seen(conn, 23)
        assert world.kit.gateway.seqs(conn) == list(range(1, 23))


async def test_pause_resume_cancel(world: World) -> None:
    """After a pause nothing is stored; after it is resumed the rest is; after a cancellation nothing more."""
    users = await world.people(400)
    store = world.kit.shard._broadcasts._store
    read, go = store.users, asyncio.Event()

    async def held(*args: Any, **more: Any) -> Any:  # it must not be done before we have seen it begin
        if await world.pool.fetchval("select exists (select from notifications)"):
            await go.wait()
        return await read(*args, **more)

    store.users = held
    raw = await world.send()

    async def begun() -> bool:
        return (await world.record(raw)).counts.stored > 0

    await eventually(begun)
    assert await world.store.act("t", raw, "paused", ["running"], clock.now_ms())
    go.set()
    stored = await world.pool.fetchval("select count(*) from notifications")
    other = await world.send({"userIds": ["u0001"]})  # its end shows that the shard went on meanwhile
    await world.ended(other)
    assert await world.pool.fetchval("select count(*) from notifications") == stored + 1
    assert (await world.record(raw)).counts.stored == stored < 400
    assert await world.store.act("t", raw, "running", ["paused"], clock.now_ms())
    assert (await world.ended(raw)).counts.stored == 400
    assert sum((await world.have()).values()) == 401
    assert users
    third = await world.send(state="scheduled", in_ms=3_600_000)
    assert await world.store.act("t", third, "cancelled", ["scheduled", "running"], clock.now_ms())
    assert not await world.store.act("t", third, "running", ["paused"], clock.now_ms())
    assert (await world.record(third)).counts.stored == 0


async def test_it_begins_at_its_time(world: World) -> None:
    """A scheduled one stores nothing before its time, and is done soon after it."""
    await world.people(20)
    raw = await world.send(state="scheduled", in_ms=400)
    due_ms = (await world.record(raw)).start_ms
    record = await world.ended(raw)
    assert record.started_ms is not None
    assert record.started_ms >= due_ms
    assert record.counts.stored == 20


async def test_another_shard_goes_on(world: World) -> None:
    """Slots that move in the middle go on with their new owner: everybody has it once."""
    users = await world.people(600)
    raw = await world.send()

    async def begun() -> bool:
        return (await world.record(raw)).counts.stored > 0

    await eventually(begun)
    await world.kit.start_shard("shard-b", spread=False)
    term = await world.kit.new_term("shard-a")
    world.kit.coordinator._terms["shard-a"] = term
    world.kit.coordinator.set_owner(range(512, 1024), "shard-b")
    record = await world.ended(raw)
    assert record.counts.stored == 600
    assert await world.have() == dict.fromkeys(users, 1)


async def test_policy_of_each_user(world: World) -> None:
    """Preferences count: who switched the type off has it filed away, who has a phone gets a push, who wants
    quiet gets it later."""
    await world.people(30)
    off: dict[str, Any] = {"types": {"news": False}}
    dnd = {"doNotDisturbUntil": "2099-01-01T00:00:00Z"}
    await world.pool.execute(
        "insert into preferences (tenant, user_id, document) values ('t', 'u0001', $1), ('t', 'u0002', $2)",
        json.dumps(off), json.dumps(dnd),
    )  # fmt: skip
    for user in ("u0001", "u0002", "u0003"):
        await world.pool.execute(
            "insert into devices (tenant, user_id, device_id, platform, provider, token_kind, token)"
            " values ('t', $1, 'd', 'ios', 'apns', 'token', $1)", user,
        )  # fmt: skip
    raw = await world.send()
    record = await world.ended(raw)
    counts = record.counts
    assert (counts.stored, counts.suppressed, counts.queued, counts.deferred) == (30, 1, 1, 1)
    rows = await world.pool.fetch(
        "select user_id, archived_at, unread, receipt, decision from notifications"
        " join streams using (stream_id)"
    )
    by_user = {row["user_id"]: row for row in rows}
    assert by_user["u0001"]["archived_at"] is not None
    assert by_user["u0001"]["unread"] == 0
    assert by_user["u0004"]["decision"] is None
    jobs = await eventually(lambda: world.kit.router.jobs)
    assert [job.user for job in jobs] == ["u0003"]
    assert UUID(bytes=jobs[0].notification)


async def test_what_waits_in_a_digest_is_in_it(world: World) -> None:
    """Of a user who wants a digest the push waits in the same one as that of a single event would."""
    await world.people(3)
    await world.pool.execute(
        "insert into preferences (tenant, user_id, document) values ('t', 'u0001', '{\"digest\": \"daily\"}')"
    )
    await world.pool.execute(
        "insert into devices (tenant, user_id, device_id, platform, provider, token_kind, token)"
        " values ('t', 'u0001', 'd', 'ios', 'apns', 'token', 'x')"
    )
    record = await world.ended(await world.send())
    assert (record.counts.stored, record.counts.deferred) == (3, 1)
    await world.kit.publish(make_event("u0001"))
    rows = await world.pool.fetch("select digest, state from deliveries")
    assert len(rows) == 2
    assert {row["state"] for row in rows} == {"planned"}
    assert len({row["digest"] for row in rows} - {None}) == 1


async def test_limits_count(world: World) -> None:
    """Of a tenant with limits every user is asked for: what was spent in a broadcast is spent."""
    policy = {"limits": {"user": {"count": 1, "windowS": 3600}}}
    await world.pool.execute("update tenants set settings = $1", json.dumps({"policy": policy}))
    await world.people(10)
    await world.pool.execute(
        "insert into devices (tenant, user_id, device_id, platform, provider, token_kind, token)"
        " values ('t', 'u0003', 'd', 'ios', 'apns', 'token', 'x')"
    )
    first = await world.ended(await world.send())
    second = await world.ended(await world.send())
    assert (first.counts.queued, second.counts.queued, second.counts.stored) == (1, 0, 10)


async def test_words_in_their_language(world: World) -> None:
    """A template is rendered in the language of each user."""
    await world.people(12)
    document = {"content": {"default": {"title": "Hello {{ n }}"}, "de": {"title": "Hallo {{ n }}"}}}
    await world.pool.execute(
        "insert into templates (tenant, template_id, version, document) values ('t', 'hi', 1, $1)",
        json.dumps(document | {"params": {"n": {}}}),
    )
    await world.pool.execute(
        "insert into devices (tenant, user_id, device_id, platform, provider, token_kind, token, locale)"
        " values ('t', 'u0003', 'd', 'ios', 'apns', 'token', 'x', 'de-AT')"
    )
    record = await world.ended(await world.send(title=None, template="hi", params={"n": 7}))
    assert (record.state, record.counts.stored) == ("done", 12)
    rows = await world.pool.fetch("select user_id, content from notifications join streams using (stream_id)")
    titles = {row["user_id"]: json.loads(f"{{{row['content']}}}")["title"] for row in rows}
    assert titles.pop("u0003") == "Hallo 7"
    assert set(titles.values()) == {"Hello 7"}


async def test_what_cannot_be_sent_fails_and_says_why(world: World) -> None:
    """A template that is gone ends the broadcast, and so does an event that has expired."""
    await world.people(3)
    gone = await world.ended(await world.send(title=None, template="gone"))
    assert gone.state == "failed"
    assert "no template gone" in (gone.reason or "")
    old = await world.ended(await world.send(expiresAt="2020-01-01T00:00:00Z"))
    assert (old.state, old.reason) == ("failed", "the event has expired")


async def test_one_refused_user_does_not_stop_the_others(world: World) -> None:
    """Whom PostgreSQL refuses is listed; everybody else has it."""
    await world.people(30)
    await world.pool.execute(
        "create function refuse() returns trigger language plpgsql as $$ begin"
        " if new.stream_id = (select stream_id from streams where user_id = 'u0007') then"
        " raise exception using errcode = '23514', message = 'not this one'; end if; return new; end $$"
    )
    await world.pool.execute(
        "create trigger refuse before insert on notifications for each row execute function refuse()"
    )
    raw = await world.send()
    record = await world.ended(raw)
    assert (record.counts.stored, record.counts.failed, record.total) == (29, 1, 30)
    (failure,) = await world.store.failures(raw, "", 10)
    assert (failure.user, failure.code) == ("u0007", "invalid")
    assert "not this one" in failure.detail
    assert (await world.have())["u0007"] == 0


# -- failpoints -------------------------------------------------------------------------------------------

PLACES = [
    (place, moment)
    for place in ("slots", "users", "contexts", "make_streams", "enter", "mark", "append", "lane", "finish")
    for moment in ("before", "after")
]
"""Statements of a broadcast; `after`: it has run, and nobody was told. `enter` and `mark` are within the
transaction of a page or of the lane, so that what follows is rolled back."""


class Failpoint:
    """Ends a shard at a statement of its broadcasts, once.

    Args:
        hits: how often the place is passed before.
    """

    def __init__(self, place: str, moment: str, hits: int) -> None:
        self.place = place
        self.moment = moment
        self.left = hits
        self.killed = asyncio.Event()

    def arm(self, shard: Any) -> None:
        store = shard._broadcasts._store
        name = self.place
        if name == "append":  # of a page, which is all that is written for it
            store = store.chunks
        if name == "lane":
            store, name = shard._store, "_append"
        real = getattr(store, name)

        async def statement(*args: Any, **more: Any) -> Any:
            self.left -= 1
            if self.left != 0 and not self.killed.is_set():
                return await real(*args, **more)
            if self.moment == "after" and not self.killed.is_set():
                await real(*args, **more)
            self.killed.set()
            await asyncio.Event().wait()  # the process is gone: nothing comes after this
            raise AssertionError

        setattr(store, name, statement)


@pytest.mark.parametrize(("place", "moment"), PLACES)
async def test_a_shard_that_dies_leaves_nobody_out_and_nobody_twice(
    world: World, place: str, moment: str
) -> None:
    """Killed around each statement, at a time that varies; its successor goes on: everybody has it once."""
    users = await world.people(90)
    await world.pool.execute(
        "insert into topic_subscribers (tenant, topic, slot, user_id)"
        " select 't', 'x', s, u from unnest($1::text[], $2::smallint[]) as x (u, s)",
        [*users, "new1", "new2"], [slot_of("t", user) for user in (*users, "new1", "new2")],
    )  # fmt: skip
    for conn, user in enumerate(users[:5], 1):
        await world.kit.gateway.attach_ready(conn, user)
    shard = world.kit.shards.pop()
    await eventually(lambda: hasattr(shard._broadcasts, "_store"))
    hits = 2 + len(moment) % 2 if place == "append" else 1
    point = Failpoint(place, moment, hits)
    point.arm(shard)
    raw = await world.send({"topic": "x"})
    await asyncio.wait_for(point.killed.wait(), 60.0)
    # Nothing of it is told to anybody any more; what it had open is rolled back by PostgreSQL.
    await shard.stop()
    await world.kit.start_shard("shard-a")
    record = await world.ended(raw)
    assert (record.state, record.counts.stored, record.counts.failed) == ("done", 92, 0)
    assert await world.have() == dict.fromkeys([*users, "new1", "new2"], 1)
    assert record.total == 92


async def test_a_postgres_that_hangs_up_in_the_middle(world: World) -> None:
    """Every connection is ended while pages are written: they are tried again, everybody has it once."""
    users = await world.people(300)
    raw = await world.send()

    async def begun() -> bool:
        return (await world.record(raw)).counts.stored > 0

    await eventually(begun)
    await world.pool.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = current_database() and pid <> pg_backend_pid() and query like '%broadcast%'"
    )
    record = await world.ended(raw)
    assert record.counts.stored == 300
    assert await world.have() == dict.fromkeys(users, 1)


async def test_a_stale_owner_writes_nothing(world: World) -> None:
    """A shard whose term is over, and does not know it yet, stores nothing for a broadcast."""
    await world.people(50)
    await world.kit.new_term("shard-a")
    raw = await world.send()
    other = world.kit.shard._stats.counters

    async def refused() -> bool:
        return other["broadcast_fenced"] >= 2

    await eventually(refused)
    assert await world.pool.fetchval("select count(*) from notifications") == 0
    assert (await world.record(raw)).counts.stored == 0


async def test_who_attaches_meanwhile_misses_nothing(world: World) -> None:
    """Users who attach while pages are written are told of it, from the store or as it happens."""
    users = await world.people(200)
    raw = await world.send()
    for conn, user in enumerate(users, 1):
        world.kit.gateway.attach(conn, user, epoch="e", last_seq=0, last_rev=0)
    await world.ended(raw)
    for conn in range(1, 201):
        await eventually(lambda conn=conn: world.kit.gateway.seqs(conn) == [1], what=f"connection {conn}")


async def test_the_time_zone_of_a_profile_counts(world: World) -> None:
    """Quiet hours that name no time zone are those of where the profile says the user is."""
    await world.people(3)
    now = datetime.now(UTC)
    window = {
        "start": f"{now - timedelta(hours=2):%H:%M}",
        "end": f"{now + timedelta(hours=2):%H:%M}",
    }
    for user in ("u0001", "u0002"):
        await world.pool.execute(
            "insert into preferences (tenant, user_id, document) values ('t', $1, $2)",
            user, json.dumps({"quietHours": window}),
        )  # fmt: skip
        await world.pool.execute(
            "insert into devices (tenant, user_id, device_id, platform, provider, token_kind, token)"
            " values ('t', $1, 'd', 'ios', 'apns', 'token', $1)", user,
        )  # fmt: skip
    await world.pool.execute(
        "insert into profiles (tenant, user_id, slot, timezone) values ('t', 'u0002', $1, 'Etc/GMT-8')",
        slot_of("t", "u0002"),
    )
    counts = (await world.ended(await world.send())).counts
    assert (counts.stored, counts.deferred, counts.queued) == (3, 1, 1)
    jobs = await eventually(lambda: world.kit.router.jobs)
    assert [job.user for job in jobs] == ["u0002"]


async def test_whom_a_broadcast_makes_anew_has_no_old_tokens(world: World) -> None:
    """Tokens of before an erasure are refused, whoever made the user's next stream."""
    await world.people(1)
    issued_ms = clock.now_ms() - 1000
    await world.kit.router.link.request(UserErase("t", "u0000", slot_of("t", "u0000")))
    assert (await world.ended(await world.send(["u0000"]))).counts.stored == 1
    world.kit.gateway.attach(1, "u0000", token_issued_ms=issued_ms)
    await eventually(lambda: world.kit.gateway.closed.get(1, (0,))[0] == 4001)


async def waiting(pool: Any, count: int) -> None:
    """Wait until so many statements wait for rows."""

    async def check() -> bool:
        found = await pool.fetchval("select count(distinct pid) from pg_locks where not granted")
        return found >= count

    await eventually(check, what=f"{count} statements that wait")


async def test_nobody_is_made_anew_by_a_list_that_was_read_before(world: World) -> None:
    """Who is erased while a broadcast to a list runs is on that list no more; nothing is kept of the user."""
    users = await world.people(60)
    users.sort(key=lambda user: (slot_of("t", user), user))
    async with world.pool.acquire() as connection:
        held = connection.transaction()
        await held.start()
        await connection.execute("select from streams where user_id = $1 for update", users[0])
        raw = await world.send(users)
        await waiting(world.pool, 1)
        last = UserErase("t", users[-1], slot_of("t", users[-1]))
        erased = asyncio.ensure_future(world.kit.router.link.request(last))
        await waiting(world.pool, 2)
        await held.rollback()
    await erased
    await world.ended(raw)
    assert await world.have() == dict.fromkeys(users[:-1], 1)


async def test_a_segment_of_few(world: World) -> None:
    """Pages of a segment are read from some slots at a time: whom it fits has it, counted or not."""
    await world.people(300)
    tree = {"attributes.plan": "pro"}
    await SegmentStore(world.pool).put("t", "pros", json.dumps({"filter": tree}), clock.now_ms())
    few = ["u0003", "u0150", "u0299"]
    await world.pool.execute(
        "insert into profiles (tenant, user_id, slot, attributes)"
        " select 't', u, s, '{\"plan\": \"pro\"}' from unnest($1::text[], $2::smallint[]) as x (u, s)",
        few, [slot_of("t", user) for user in few],
    )  # fmt: skip
    await world.kit.gateway.attach_ready(1, few[0])
    await world.kit.gateway.attach_ready(2, "u0001")
    store = world.kit.shard._broadcasts._store
    asked: list[int] = []
    users = store.users

    async def uncounted(one: Any) -> int:
        raise StoreUnavailableError("this takes too long")

    async def watched(tenant: str, recipients: Any, pending: Any, *more: Any) -> Any:
        asked.append(len(pending))
        return await users(tenant, recipients, pending, *more)

    store.estimate = uncounted
    store.users = watched
    record = await world.ended(await world.send({"segment": "pros"}))
    assert (record.state, record.counts.stored, record.total) == ("done", 3, 3)
    assert asked[0] == 8
    assert {user for user, count in (await world.have()).items() if count} == set(few)


async def test_what_a_tenant_merges_is_merged_for_everybody(world: World) -> None:
    """Connected or not: a second event of a type that is merged makes no second notification."""
    rule = {"news": {"how": "aggregate", "windowS": 600}}
    await world.pool.execute("update tenants set settings = $1", json.dumps({"policy": {"merge": rule}}))
    await world.people(10)
    await world.kit.gateway.attach_ready(1, "u0001")
    for title in ("first", "second"):
        assert (await world.ended(await world.send(title=title))).state == "done"
    rows = await world.pool.fetch("select content from notifications")
    assert [json.loads(f"{{{row['content']}}}")["title"] for row in rows] == ["second"] * 10
