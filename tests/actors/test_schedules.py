"""Schedules fired by a real shard, with a real Postgres; the router passes on what the shard publishes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest

from actors.link import Link, dial
from carillon.clock import SystemClock, rfc3339
from carillon.ids import Uuid7Source, slot_of
from carillon.messages import Member, Outcomes, Publish
from carillon.schedules import look_ms, parse
from stores.postgres.pool import open_pool
from stores.postgres.schedules import NewSchedule, ScheduleStore
from tests.actors.fakes import SECRET
from tests.actors.shard_kit import Kit
from tests.support import eventually

clock = SystemClock()
ids = Uuid7Source()


class HandRouter:
    """Passes what a shard publishes to the shard of the kit and remembers it.

    Attributes:
        silent: True: the events arrive, their answers never.
    """

    def __init__(self) -> None:
        self.published: list[Any] = []
        self.times: list[int] = []
        self.silent = False
        self.link: Link
        self._tasks: set[asyncio.Task[None]] = set()

    def link_opened(self, link: Link) -> None:
        self.link = link

    def link_closed(self, link: Link) -> None:
        pass

    def read_finished(self, link: Link) -> None:
        pass

    def receive(self, link: Link, message: Any, request: int) -> None:
        if type(message) is Publish:
            self.published += message.events
            self.times.append(clock.now_ms())
            task = asyncio.ensure_future(self._pass_on(link, message, request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, link: Link, message: Publish, request: int) -> None:
        reply: Outcomes = await link.request(message)
        if not self.silent:
            link.reply_nowait(request, reply)


class World:
    """A kit with a router and a store of schedules."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.router = HandRouter()

    async def open(self) -> World:
        await self.connect("router-2")
        self.pool = await open_pool(self.kit.settings.postgres, 2)
        self.store = ScheduleStore(self.pool)
        await self.pool.execute("insert into tenants (tenant, client_secret) values ('t', 's')")
        return self

    async def connect(self, name: str) -> None:
        kit = self.kit
        link = await dial(
            kit.coordinator.joined["shard-a"].address, self.router, kit.settings.link, name, SECRET
        )
        kit.links.append(link)
        kit.coordinator.forget("router-1")
        kit.coordinator.add(Member("router", name, "local", "x", kit.coordinator.address))

    async def add(self, when: dict[str, Any], next_ms: int, *, single: bool = False, **event: Any) -> bytes:
        body = {"userId": "u", "type": "t", "title": "later", **event}
        user = body.get("userId")
        raw = ids.next(clock.now_ms())
        due_ms = look_ms(parse(when), next_ms, clock.now_ms(), self.kit.settings.schedule.zone_recheck_s)
        row = NewSchedule(
            raw, slot_of("t", user or "x"), user, json.dumps(when), json.dumps(body), single, next_ms, due_ms
        )
        assert await self.store.add("t", [row]) == [(raw, False)]
        return raw

    async def once(self, in_ms: int, **more: Any) -> bytes:
        at_ms = clock.now_ms() + in_ms
        return await self.add({"at": rfc3339(at_ms)}, at_ms, **more)

    async def ended(self, raw: bytes) -> Any:
        async def check() -> Any:
            found = await self.store.get("t", raw)
            assert found is not None
            return found if found.state != "active" else None

        return await eventually(check)

    async def stored(self) -> list[Any]:
        rows = await self.pool.fetch("select id, content from notifications order by seq")
        return [(row["id"].bytes, json.loads(f"{{{row['content']}}}")["title"]) for row in rows]


@pytest.fixture
async def world(postgres_dsn: str) -> AsyncIterator[World]:
    schedule = {
        "sweep_s": 0.05,
        "retry_s": 0.05,
        "lease_s": 2.5,
        "publish_timeout_s": 2.0,
        "zone_recheck_s": 0.05,
    }
    kit = Kit(postgres_dsn)
    kit.settings = kit.settings.with_values(schedule=schedule, link={"request_timeout_s": 2.0})
    async with kit:
        made = await World(kit).open()
        yield made
        await made.pool.close()


async def test_it_comes_at_its_time(world: World) -> None:
    """Not before, with the schedule's id, once."""
    raw = await world.once(400, single=True)
    due_ms = (await world.store.get("t", raw)).next_ms  # type: ignore[union-attr]
    record = await world.ended(raw)
    assert (record.state, record.fired, record.result) == ("done", 1, "stored")
    assert 0 <= world.router.times[0] - due_ms <= 60_000
    assert await world.stored() == [(raw, "later")]


async def test_many_at_once_are_all_sent(world: World) -> None:
    """A thousand that are due in the same moment are all sent."""
    at_ms = clock.now_ms() + 500
    rows = [
        NewSchedule(
            ids.next(clock.now_ms()), slot_of("t", f"u{i}"), f"u{i}", json.dumps({"at": rfc3339(at_ms)}),
            json.dumps({"userId": f"u{i}", "type": "t", "title": "x"}), True, at_ms, at_ms,
        )
        for i in range(1000)
    ]  # fmt: skip
    await world.store.add("t", rows)

    async def all_done() -> bool:
        return await world.pool.fetchval("select count(*) from schedules where state = 'done'") == 1000

    await eventually(all_done, 120.0)
    assert await world.pool.fetchval("select count(*) from notifications") == 1000


async def test_an_answer_that_is_lost_makes_no_second_one(world: World) -> None:
    """The event arrives, the answer does not: it is tried again, and there is one notification."""
    world.router.silent = True
    raw = await world.once(0, userId=None, userIds=["u", "v"])
    await eventually(lambda: len(world.router.published) >= 4)
    world.router.silent = False
    record = await world.ended(raw)
    assert (record.fired, record.result) == (1, "2 recipients")
    assert len(await world.stored()) == 2


async def test_a_restart_neither_loses_nor_repeats(world: World) -> None:
    """What came due while no shard was there comes with the next one; what was under way is not sent
    twice."""
    world.router.silent = True
    under_way = await world.once(0, single=True)
    await eventually(lambda: world.router.published)
    shard = world.kit.shards.pop()
    await shard.stop()
    missed = await world.once(0)
    world.router.silent = False
    await world.kit.start_shard("shard-a")
    await world.connect("router-3")
    await world.ended(under_way)
    assert (await world.ended(missed)).fired == 1
    assert len(await world.stored()) == 2


async def test_a_rule_goes_on(world: World) -> None:
    """After an occurrence the next one is due; those that were missed are counted, one stands for them."""
    start_ms = clock.now_ms() - 3 * 3_600_000 - 1000
    when = {"localAt": rfc3339(start_ms)[:19], "rrule": "FREQ=HOURLY"}
    raw = await world.add(when, start_ms // 1000 * 1000)

    async def fired() -> Any:
        found = await world.store.get("t", raw)
        return found if found is not None and found.fired else None

    record = await eventually(fired)
    assert (record.state, record.fired, record.missed) == ("active", 1, 3)
    assert 0 < record.next_ms - clock.now_ms() <= 3_600_000
    assert len(await world.stored()) == 1


async def test_cancelled_is_cancelled(world: World) -> None:
    """What was cancelled before its time never comes; what ended cannot be cancelled."""
    raw = await world.once(30_000)
    assert await world.store.cancel("t", raw, clock.now_ms())
    other = await world.once(40_000)
    world.kit.skip(41)
    await world.ended(other)
    assert len(await world.stored()) == 1
    assert (await world.ended(raw)).state == "cancelled"
    assert not await world.store.cancel("t", other, clock.now_ms())


async def test_a_shard_whose_term_is_over_sends_nothing(world: World) -> None:
    """Its claims find nothing, and what it claimed before it cannot write down."""
    await world.kit.new_term("shard-a")
    raw = await world.once(0)
    claims = await world.store.claim("shard-a", 1, list(range(1024)), clock.now_ms(), 10, clock.now_ms())
    assert claims == []
    found = await world.store.get("t", raw)
    assert found is not None
    assert (found.state, found.fired) == ("active", 0)
    assert world.router.published == []


async def test_words_are_those_of_the_day(world: World) -> None:
    """A template is rendered when the event is sent, not when it was scheduled; one that is gone is told."""
    insert = "insert into templates (tenant, template_id, version, document) values ('t', 'hi', $1, $2)"
    text = '{"content": {"default": {"title": "%s {{ n }}"}}, "params": {"n": {}}}'
    await world.pool.execute(insert, 1, text % "before")
    raw = await world.once(30_000, title=None, template="hi", params={"n": 7})
    await world.pool.execute(insert, 2, text % "after")
    world.kit.skip(31)
    await world.ended(raw)
    assert (await world.stored())[0][1] == "after 7"
    lost = await world.ended(await world.once(0, title=None, template="gone"))
    assert (lost.state, lost.fired) == ("failed", 0)
    assert "no template" in lost.result


async def test_the_local_time_is_that_of_where_the_user_is(world: World) -> None:
    """The user travels between scheduling and the time: it comes at that time there."""
    zone = "insert into preferences (tenant, user_id, document) values ('t', 'u', $1)"
    await world.pool.execute(zone, '{"timezone": "Etc/GMT-3"}')  # three hours ahead of UTC
    local_ms = clock.now_ms() // 1000 * 1000 + 2000
    when = {"localAt": rfc3339(local_ms)[:19], "timezone": "user"}
    # Scheduled while the user was at UTC: three hours from now. Where the user is now it was long ago.
    raw = await world.add(when, local_ms)
    record = await world.ended(raw)
    assert record.next_ms == local_ms - 3 * 3_600_000
    west = await world.add({**when, "localAt": rfc3339(local_ms + 3_600_000)[:19]}, local_ms + 3_600_000)
    await world.ended(west)
    later = await world.add(
        {**when, "localAt": rfc3339(local_ms + 10 * 3_600_000)[:19]}, local_ms + 36_000_000
    )
    row = "select state, zone from schedules where schedule_id = $1"

    async def moved() -> bool:
        found = await world.pool.fetchrow(row, UUID(bytes=later))
        return tuple(found) == ("active", "Etc/GMT-3")

    await eventually(moved)


async def test_the_same_key_is_the_same_schedule(world: World) -> None:
    """A key used again with the same body is the first schedule, with another body nothing."""
    at_ms = clock.now_ms() + 100_000

    def row(body: bytes) -> NewSchedule:
        return NewSchedule(
            ids.next(clock.now_ms()), 1, "u", "{}", "{}", True, at_ms, at_ms, key="k", body_hash=body
        )

    first, same, other = row(b"1"), row(b"1"), row(b"2")
    assert await world.store.add("t", [first]) == [(first.id, False)]
    assert await world.store.add("t", [same, other]) == [(first.id, True), None]
