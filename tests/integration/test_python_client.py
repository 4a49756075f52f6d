"""The Python client against the real thing: ingress, router, shard, gateway and PostgreSQL, with wires to
cut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from carillon_client import (
    AsyncPublisher,
    Change,
    Event,
    IdempotencyConflictError,
    InvalidRequestError,
    NotFoundError,
    NotSent,
    PermissionDeniedError,
    Publisher,
    RetryPolicy,
    Sent,
    Subscriber,
    SubscriptionLimits,
    SubscriptionRefusedError,
)

from stores.postgres.pool import open_pool
from stores.postgres.tenants import TenantStore
from tests.integration.client_world import ClientWorld
from tests.support import eventually

RETRY = RetryPolicy(deadline_s=90.0, attempt_timeout_s=20.0, first_pause_s=0.02, longest_pause_s=0.2)
FAST = SubscriptionLimits(reconnect_first_s=0.02, reconnect_longest_s=0.2, ack_linger_s=0.005)


@pytest_asyncio.fixture
async def world(postgres_dsn: str) -> AsyncIterator[ClientWorld]:
    async with ClientWorld(postgres_dsn) as made:
        yield made


def publisher(world: ClientWorld, **more: Any) -> AsyncPublisher:
    return AsyncPublisher(world.url, world.key, **{"retry": RETRY, "trust_env": False, **more})


def subscriber(world: ClientWorld, user: str = "ada", **more: Any) -> Subscriber:
    async def token() -> str:
        async with publisher(world) as service:
            return (await service.mint_token(user)).token

    return Subscriber(world.ws_url, **{"token": token, "limits": FAST, "trust_env": False, **more})


class Taken:
    """Iterates a subscriber in a task and keeps what it gives."""

    def __init__(self, stream: Subscriber) -> None:
        self.titles: list[str | None] = []
        self.task = asyncio.ensure_future(self._run(stream))

    async def _run(self, stream: Subscriber) -> None:
        async for notification in stream:
            self.titles.append(notification.title)

    async def has(self, *titles: str) -> None:
        await eventually(lambda: len(self.titles) >= len(titles), what=f"{titles}, got {self.titles}")
        assert self.titles == list(titles)

    def stop(self) -> None:
        self.task.cancel()


def event(number: int, user: str = "ada") -> Event:
    return Event(type="t", title=f"n{number}", user_id=user)


async def test_a_lost_answer_does_not_duplicate(world: ClientWorld) -> None:
    """The answer is lost after the commit, three times: the retry gets the id of the one stored notification.
    The answer is lost after the commit, three times: the retry gets the id of the one stored notification."""
    world.http.swallow = 3
    async with publisher(world) as service:
        sent = await service.send(event(1))
    assert world.http.connections == 4
    assert sent.replayed
    assert await world.stored() == ["n1"]
    assert await world.count(f"id = '{sent.id}'") == 1


async def test_a_timeout_does_not_duplicate(world: ClientWorld) -> None:
    """The request arrives and its answer takes too long: the retry after the time-out stores nothing more."""
    world.http.hold = True
    retry = RetryPolicy(deadline_s=90.0, attempt_timeout_s=1.0, first_pause_s=0.02)
    async with publisher(world, retry=retry) as service:
        sending = asyncio.ensure_future(service.send(event(1)))
        await eventually(lambda: world.http.connections >= 2, what="a second try")
        world.http.hold = False
        sent = await sending
    assert await world.stored() == ["n1"]
    assert await world.count(f"id = '{sent.id}'") == 1


async def test_a_replaced_ingress_does_not_duplicate(world: ClientWorld) -> None:
    """The ingress is lost under load and another takes over: every event has a result and is stored once, in
    order."""
    async with publisher(world) as service:
        sends = [asyncio.ensure_future(service.send(event(i, f"u{i % 5}"))) for i in range(200)]
        for part in range(8):
            sends += [
                asyncio.ensure_future(service.send(event(200 + part * 20 + i, f"u{i % 5}")))
                for i in range(20)
            ]
            world.http.swallow += 1
            if part == 2:
                world.http.target = None
                world.http.cut()
            await asyncio.sleep(0.03)
            if part == 5:
                world.http.to((await world.start_ingress()).url)
        sent = await asyncio.gather(*sends)
    world.http.swallow = 0
    assert len({one.id for one in sent}) == 360
    stored = await world.stored()
    assert len(stored) == 360
    for user in range(5):
        titles = await world.stored(f"u{user}")
        assert titles == sorted(titles, key=lambda title: int(title[1:]))


def send_many_sync(world: ClientWorld) -> list[Any]:
    events = [event(i, f"u{i % 7}") for i in range(2500)]
    bad: Any = {"userId": "u1", "type": "t"}
    with Publisher(world.url, world.key, retry=RETRY, trust_env=False) as service:
        return list(service.send_many([*events[:1200], bad, *events[1200:]]))


async def test_a_large_batch_from_a_thread(world: ClientWorld) -> None:
    """2,501 events over a wire that loses answers: one result each, the bad one alone is refused, none twice.
    2,501 events over a wire that loses answers: one result each, the bad one alone is refused, none twice."""
    world.http.swallow = 2
    results = await asyncio.to_thread(send_many_sync, world)
    assert len(results) == 2501
    assert [i for i, one in enumerate(results) if isinstance(one, NotSent)] == [1200]
    assert len({one.id for one in results if isinstance(one, Sent)}) == 2500
    assert await world.count("true") == 2500


async def test_to_many_over_a_bad_wire(world: ClientWorld) -> None:
    """One event for 1,500 users, answers lost: each is notified once."""
    world.http.swallow = 2
    async with publisher(world) as service:
        report = await service.send_to([f"u{i}" for i in range(1500)], Event(type="t", title="x"))
    assert len(report.sent) == 1500
    assert await world.count("true") == 1500


async def test_errors_of_the_real_api(world: ClientWorld) -> None:
    """Places in the body, conflicts, unknown ids and missing scopes arrive as their own errors."""
    async with publisher(world) as service:
        with pytest.raises(InvalidRequestError) as told:
            await service.send({"userId": "ada", "type": "t", "title": "x", "priority": "loud"})
        assert told.value.errors[0].path == "priority"
        await service.send({"userId": "ada", "type": "t", "title": "x", "idempotencyKey": "k"})
        with pytest.raises(IdempotencyConflictError):
            await service.send({"userId": "ada", "type": "t", "title": "y", "idempotencyKey": "k"})
        with pytest.raises(NotFoundError):
            await service.notification("01900000-0000-7000-8000-000000000000")
        assert (await service.presence("nobody")).status == "offline"
        assert await service.delete_device("ada", "none") is False
        assert (await service.preferences("ada"))["badge"] is not None
        in_app = {"channels": {"in_app": {"durationMs": 3000}}}
        assert (await service.patch_preferences("ada", in_app, own=True)) == in_app
        whole = await service.patch_preferences("ada", {"sound": "bell"})
        assert (whole["sound"], whole["vibration"]) == ("bell", True)
        assert await service.preferences("ada", own=True) == in_app | {"sound": "bell"}
        assert await service.patch_preferences("ada", {"sound": None}, own=True) == in_app
    pool = await open_pool(world.settings.postgres, 1)
    narrow = await TenantStore(pool).create_key("acme", "narrow", ["events:write"])
    await pool.close()
    async with AsyncPublisher(world.url, narrow, retry=RETRY, trust_env=False) as service:
        with pytest.raises(PermissionDeniedError):
            await service.presence("ada")


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_a_cut_socket_misses_nothing(world: ClientWorld, encoding: Any) -> None:
    """The socket is cut again and again while events come: the subscriber has each once, in order, all
    acknowledged."""
    async with publisher(world) as service, subscriber(world, encoding=encoding) as stream:
        taken = Taken(stream)
        await eventually(lambda: stream.connected)
        for number in range(60):
            await service.send(event(number))
            if number % 10 == 5:
                await eventually(lambda: stream.connected)
                world.ws.cut()
        await taken.has(*(f"n{i}" for i in range(60)))
        taken.stop()
        assert stream._core.connections >= 3

    async def delivered() -> bool:
        return await world.count("delivered_at is not null") >= 59

    await eventually(delivered, what="acknowledgements in PostgreSQL")


async def test_a_cut_link_misses_nothing(world: ClientWorld) -> None:
    """The links between shard, gateway and router break while events come: same socket, nothing missed or
    twice."""
    async with publisher(world) as service, subscriber(world) as stream:
        taken = Taken(stream)
        await eventually(lambda: stream.connected)
        for number in range(60):
            await service.send(event(number))
            if number % 20 == 10:
                for link in world.links_of_shard():
                    link.close()
        await taken.has(*(f"n{i}" for i in range(60)))
        taken.stop()
        assert world.ws.connections == 1
    assert await world.stored() == [f"n{i}" for i in range(60)]


async def test_a_lost_gateway_misses_nothing(world: ClientWorld) -> None:
    """The gateway goes, events come, another takes over: resume brings what was missed."""
    async with publisher(world) as service, subscriber(world) as stream:
        taken = Taken(stream)
        await eventually(lambda: stream.connected)
        await service.send(event(0))
        await taken.has("n0")
        await world.gateways[0].stop()
        for number in range(1, 300):  # more than one page of replay
            service.enqueue_nowait(event(number))
        await service.flush()
        world.ws.to((await world.start_gateway()).url)
        await taken.has(*(f"n{i}" for i in range(300)))
        taken.stop()


async def test_a_stored_position_brings_what_was_not_processed(world: ClientWorld) -> None:
    """A consumer that fails in the middle goes on there in its next life, with what came in between."""
    stream = subscriber(world)

    async def consume(service: AsyncPublisher) -> None:
        async with stream:
            first = asyncio.ensure_future(stream.__anext__())
            await eventually(lambda: stream.connected)
            await service.send_many([event(i) for i in range(5)])
            await first
            assert (await stream.__anext__()).title == "n1"
            raise ZeroDivisionError

    async with publisher(world) as service:
        with pytest.raises(ZeroDivisionError):
            await consume(service)
        saved = str(stream.position)
        await service.send(event(5))
        async with subscriber(world, position=saved) as stream:
            titles = [(await asyncio.wait_for(stream.__anext__(), 30)).title for _ in range(5)]
        assert titles == ["n1", "n2", "n3", "n4", "n5"]
        assert json.loads(saved)["lastSeq"] == 1


async def test_states_reach_the_other_device(world: ClientWorld) -> None:
    """Read, seen, archived, dismissed and clicked here is told there; after an absence, too."""
    async with publisher(world) as service, subscriber(world) as here, subscriber(world) as there:
        task = asyncio.ensure_future(here.__anext__())
        changes = there.changes()
        await eventually(lambda: here.connected and there.connected)
        sent = [await service.send(event(i)) for i in range(5)]
        await task
        await here.mark_read(sent[0].id)
        await here.mark_seen(sent[1].id)
        await here.archive(sent[2].id)
        world.ws.cut()
        await here.dismiss(sent[3].id)
        await here.click(sent[4].id)
        await here.set_visibility("focused")
        found: list[Change] = []
        while not found or found[-1].kind != "NOTIFICATION_CLICKED":
            found.append(await asyncio.wait_for(changes.__anext__(), 30))
        # Whoever comes back after the click is told that it is read, and that it was clicked.
        implied = ("NOTIFICATIONS_READ", (sent[4].id,))
        assert [(c.kind, c.notification_ids) for c in found if (c.kind, c.notification_ids) != implied] == [
            ("NOTIFICATIONS_READ", (sent[0].id,)), ("NOTIFICATIONS_SEEN", (sent[1].id,)),
            ("NOTIFICATION_ARCHIVED", (sent[2].id,)), ("NOTIFICATION_DISMISSED", (sent[3].id,)),
            ("NOTIFICATION_CLICKED", (sent[4].id,)),
        ]  # fmt: skip
        assert (await service.presence("ada")).status == "active"
        assert [n.title async for n in service.feed_all("ada", status="archived")] == ["n3", "n2"]
        await here.mark_all_read()
        assert (await service.notification(sent[1].id)).delivery_state == "READ"


async def test_a_revoked_user_stops(world: ClientWorld) -> None:
    """After revoke_sessions the iterator raises 4001 instead of trying again."""
    async with publisher(world) as service, subscriber(world) as stream:
        task = asyncio.ensure_future(stream.__anext__())
        await eventually(lambda: stream.connected)
        await service.revoke_sessions("ada")
        with pytest.raises(SubscriptionRefusedError) as told:
            await asyncio.wait_for(task, 30)
        assert told.value.code == 4001
