"""What the Python client does about users as such, both publishers against the real system."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio
from carillon_client import (
    AsyncPublisher,
    Device,
    Event,
    InvalidRequestError,
    NotFoundError,
    Profile,
    Publisher,
    RetryPolicy,
    UnexpectedAnswerError,
)
from carillon_client.core.user_calls import ExportReader

from tests.integration.client_world import ClientWorld
from tests.support import eventually

RETRY = RetryPolicy(deadline_s=90.0, attempt_timeout_s=20.0, first_pause_s=0.02, longest_pause_s=0.2)
LOST = 3
"""Answers that are lost before each test's calls: what may be repeated is."""

Caller = Callable[..., Any]


@pytest_asyncio.fixture
async def world(postgres_dsn: str) -> AsyncIterator[ClientWorld]:
    async with ClientWorld(postgres_dsn) as made:
        yield made


@pytest_asyncio.fixture(params=["sync", "async"])
async def call(world: ClientWorld, request: pytest.FixtureRequest) -> AsyncIterator[Caller]:
    """Calls a method of one of the publishers by name; what it iterates comes as a list."""
    if request.param == "sync":
        publisher: Any = Publisher(world.url, world.key, retry=RETRY, trust_env=False)
    else:
        publisher = AsyncPublisher(world.url, world.key, retry=RETRY, trust_env=False)

    async def run(name: str, *args: Any, **more: Any) -> Any:
        method = getattr(publisher, name)
        if inspect.isasyncgenfunction(method):
            return [one async for one in method(*args, **more)]
        if request.param == "async":
            return await method(*args, **more)
        work = method if not inspect.isgeneratorfunction(method) else lambda *a, **m: list(method(*a, **m))
        return await asyncio.to_thread(work, *args, **more)

    yield run
    if request.param == "sync":
        publisher.close()
    else:
        await publisher.aclose()


async def test_profiles_erasure_and_export(world: ClientWorld, call: Caller) -> None:
    """A profile is put, read and replaced; the export has all that is kept; after the erasure there is
    nothing. Lost answers change nothing of it."""
    assert await call("profile", "ada") is None
    assert await call("erase_user", "ada") is False
    world.http.swallow = LOST
    attributes = {"plan": "pro", "seats": 3}
    put = await call("put_profile", "ada", Profile(email="ada@example.com", attributes=attributes))
    assert (put.user_id, put.email, put.attributes) == ("ada", "ada@example.com", attributes)
    changed = Profile(timezone="Europe/Vienna", attributes=put.attributes)
    await call("put_profile", "ada", changed)
    read = await call("profile", "ada")
    assert (read.email, read.timezone, read.attributes) == (None, "Europe/Vienna", attributes)
    assert read.updated_at is not None
    with pytest.raises(InvalidRequestError):
        await call("put_profile", "ada", Profile(email="no address"))
    sent = await call("send", Event(user_id="ada", type="t", title="Hello"))
    lines = await call("export_user", "ada")
    kinds = [line["kind"] for line in lines]
    assert kinds[0] == "user"
    assert {"profile", "stream", "notification"} <= set(kinds)
    assert [one["notification"]["id"] for one in lines if one["kind"] == "notification"] == [sent.id]
    world.http.swallow = 1
    assert await call("erase_user", "ada") is True
    assert await call("profile", "ada") is None
    with pytest.raises(NotFoundError):
        await call("export_user", "ada")


async def test_topics(world: ClientWorld, call: Caller) -> None:
    """One or many subscribe, are listed page by page, and end it; repeated calls say the same."""
    world.http.swallow = LOST
    made = await call("subscribe", "goals/rapid", "ada")
    assert (made.topic, made.user_id) == ("goals/rapid", "ada")
    assert (await call("subscription", "goals/rapid", "ada")).since == made.since
    assert await call("subscription", "goals/rapid", "bob") is None
    many = await call("subscribe_many", "goals/rapid", ["ada", "bob", "cy"])
    assert (many.subscribed, many.added) == (3, 2)
    first = await call("subscribers", "goals/rapid", limit=2)
    rest = await call("subscribers", "goals/rapid", cursor=first.next_cursor)
    named = [one.user_id for one in (*first.subscribers, *rest.subscribers)]
    assert sorted(named) == ["ada", "bob", "cy"]
    assert await call("unsubscribe", "goals/rapid", "bob") is True
    assert await call("unsubscribe", "goals/rapid", "nobody") is False


async def test_segments(call: Caller) -> None:
    """Made, previewed, listed, read, replaced and deleted."""
    for user, plan in (("ada", "pro"), ("bob", "free"), ("cy", "pro")):
        await call("put_profile", user, Profile(attributes={"plan": plan}))
    asked = {"attributes.plan": {"eq": "pro"}}
    made = await call("put_segment", "payers", asked, description="who pays")
    assert (made.segment_id, made.filter, made.description) == ("payers", asked, "who pays")
    told = await call("preview_segment", "payers")
    assert (told.count, sorted(told.user_ids)) == (2, ["ada", "cy"])
    assert [one.segment_id for one in (await call("segments")).segments] == ["payers"]
    assert (await call("segment", "payers")).created_at == made.created_at
    assert await call("segment", "nobody") is None
    assert await call("delete_segment", "payers") is True
    assert await call("delete_segment", "payers") is False


async def test_digests(call: Caller) -> None:
    """What waits is listed; an item is taken out, the rest is sent now."""
    phone = Device(platform="android", provider="fcm", token="t", app_id="com.example")
    await call("put_device", "ada", "phone", phone)
    daily = {"frequency": "daily", "at": "08:00"}
    await call("set_preferences", "ada", {"categories": {"news": {"digest": daily}}})
    ids = [
        (await call("send", Event(user_id="ada", type="t", category="news", title=f"n{n}"))).id
        for n in range(3)
    ]
    (digest,) = await call("digests", "ada")
    assert (digest.category, digest.frequency, digest.count) == ("news", "daily", 3)
    assert [item.notification_id for item in digest.items] == ids
    assert await call("remove_from_digest", "ada", digest.digest_id, ids[1]) is True
    assert await call("remove_from_digest", "ada", digest.digest_id, digest.digest_id) is False
    flushed = await call("flush_digest", "ada", digest.digest_id)
    assert (flushed.digest_id, flushed.count) == (digest.digest_id, 2)

    async def gone() -> bool:
        return await call("digests", "ada") == []

    await eventually(gone)


async def test_import(world: ClientWorld, call: Caller) -> None:
    """Lines are stored, those for many for each; a connection that breaks is one more try, and stores nothing
    twice."""
    line = {"type": "t", "title": "imported"}

    def lines() -> Iterator[bytes]:
        for n in range(50):
            yield json.dumps({**line, "userId": f"u{n}"}).encode()
        yield json.dumps({**line, "userIds": ["u0", "u1", ""]}).encode()

    took: list[int] = []
    world.http.swallow = 1
    told = await call("import_events", lines, idempotency_key="once", sent=took.append)
    assert (told.complete, told.lines, told.accepted, told.failed) == (True, 51, 52, 1)
    assert told.replayed == 52
    assert (told.failures[0].line, told.failures[0].user_id) == (51, "")
    assert took[-1] == sum(len(one) + 1 for one in lines())
    assert len(await world.stored()) == 52


async def test_import_of_what_comes_asynchronously(world: ClientWorld) -> None:
    """An asynchronous generator is read as fast as the server takes it."""

    async def lines() -> AsyncIterator[bytes]:
        for n in range(20):
            await asyncio.sleep(0)
            yield json.dumps({"userId": f"u{n}", "type": "t", "title": "x"}).encode()

    async with AsyncPublisher(world.url, world.key, retry=RETRY, trust_env=False) as publisher:
        assert (await publisher.import_events(lines, idempotency_key="k")).accepted == 20


def test_an_export_that_is_not_whole_is_told() -> None:
    """Cut off, or ended by the server's trouble: an error, never a short export."""
    reader = ExportReader()
    assert reader.line('{"kind":"user","userId":"ada"}') == {"kind": "user", "userId": "ada"}
    assert reader.line("") is None
    with pytest.raises(UnexpectedAnswerError):
        reader.finish()
    trouble = {"status": 503, "code": "unavailable", "title": "t", "detail": "the database went away"}
    with pytest.raises(Exception, match="the database went away"):
        reader.line(json.dumps({"kind": "error", "problem": trouble}))
    assert reader.line('{"kind":"end","lines":2}') is None
    reader.finish()
