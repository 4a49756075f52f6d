"""Both publishers against a fake server over real HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from client_kit import KEY, FakeServer, eventually, note, problem

from carillon_client import (
    AsyncPublisher,
    AuthenticationError,
    BatchLimits,
    ClosedError,
    Device,
    Event,
    GaveUpError,
    InvalidRequestError,
    NotFoundError,
    NotSent,
    PermissionDeniedError,
    Publisher,
    QueueFullError,
    RetryPolicy,
    SendReport,
    Sent,
    TransportError,
    UnavailableError,
)

FAST = RetryPolicy(deadline_s=60.0, attempt_timeout_s=20.0, first_pause_s=0.01, longest_pause_s=0.05)
HASTY = RetryPolicy(deadline_s=60.0, attempt_timeout_s=1.5, first_pause_s=0.01, longest_pause_s=0.05)


def event(number: int = 0, user: str = "ada") -> Event:
    return Event(type="t", title=f"n{number}", user_id=user)


class Both:
    """One face for both publishers, so that every claim is checked of each."""

    def __init__(self, kind: str, fake: FakeServer) -> None:
        self.kind, self.fake = kind, fake

    def run(self, work: Callable[[Any], Any], retry: RetryPolicy = FAST, **more: Any) -> Any:
        """Call `work` with a publisher; in the asynchronous case its result is awaited."""
        if self.kind == "sync":
            with Publisher(self.fake.url, KEY, retry=retry, **more) as publisher:
                return work(publisher)

        async def body() -> Any:
            async with AsyncPublisher(self.fake.url, KEY, retry=retry, **more) as publisher:
                return await work(publisher)

        return asyncio.run(body())


@pytest.fixture(params=["sync", "async"])
def both(request: pytest.FixtureRequest, fake: FakeServer) -> Both:
    return Both(request.param, fake)


@pytest.mark.parametrize(
    "fault",
    [
        "drop",
        "lose",
        "hang",
        "garbage",
        "cut",
        (503, {}),
        (500, {}),
        (429, {"Retry-After": "0"}),
        (409, {}),
        (502, {}),
    ],
    ids=str,
)
def test_one_effect_whatever_happens_to_the_first_try(both: Both, fault: Any) -> None:
    """Lost before or after its effect, timed out, refused for now: the event is sent once more and stored
    once."""
    both.fake.script = [fault]
    sent = both.run(lambda p: p.send(event()), HASTY if fault == "hang" else FAST)
    assert isinstance(sent, Sent)
    assert (sent.id, sent.seq, sent.status, sent.channels) == ("id-1", 1, "stored", ("in_app",))
    keys = [json.loads(body)["idempotencyKey"] for _, _, _, body in both.fake.requests]
    assert keys == [sent.idempotency_key] * 2
    assert len(both.fake.store.order) == 1


def test_retry_after_is_waited_for(both: Both) -> None:
    """Retry-After: 1 keeps the next try off for a second, whatever the own pauses are."""
    both.fake.script = [(429, {"Retry-After": "1"})]
    began = time.monotonic()
    both.run(lambda p: p.send(event()))
    assert time.monotonic() - began >= 1.0


def test_the_deadline_ends_it(both: Both) -> None:
    """A server that never answers: GaveUpError at the deadline, which says that it may have been stored."""
    both.fake.script = ["hang"] * 50
    began = time.monotonic()
    with pytest.raises(GaveUpError) as told:
        both.run(
            lambda p: p.send(event()), RetryPolicy(deadline_s=2.0, attempt_timeout_s=0.3, first_pause_s=0.01)
        )
    assert time.monotonic() - began < 30
    assert told.value.maybe_sent
    assert isinstance(told.value.last, TransportError)
    assert told.value.attempts >= 2


def test_nobody_there(both: Both) -> None:
    """A refused connection is retried, and the error says that nothing was sent."""
    both.fake.url = "http://127.0.0.1:1"
    with pytest.raises(GaveUpError) as told:
        both.run(lambda p: p.send(event()), RetryPolicy(max_attempts=3, first_pause_s=0.01))
    assert not told.value.maybe_sent
    assert told.value.attempts == 3


def test_problems_are_typed(both: Both) -> None:
    """code, places, request id and temporary of the problem document arrive in an error of its own class."""
    with pytest.raises(InvalidRequestError) as told:
        both.run(lambda p: p.send({"type": "t"}))
    assert told.value.errors[0] == ("title", "text", "?")
    assert (told.value.code, told.value.request_id, told.value.temporary) == ("invalid", "r1", False)
    for status, kind in ((401, AuthenticationError), (403, PermissionDeniedError)):
        both.fake.script = [(status, {})]
        with pytest.raises(kind):
            both.run(lambda p: p.send(event()))
    assert len(both.fake.requests) == 3


def test_many_have_each_a_result(both: Both) -> None:
    """Stored, refused by the server and impossible ones: one result each, in order, in requests within the
    bounds."""
    events: list[Any] = [event(i) for i in range(25)]
    events[3] = {"type": "t"}
    events[7] = {"type": "t", "title": object()}
    events[9] = 5
    both.fake.script = ["lose"]
    report = both.run(lambda p: p.send_many(events), limits=BatchLimits(max_items=10))
    assert isinstance(report, SendReport)
    assert len(report) == 25
    assert [i for i, one in enumerate(report) if isinstance(one, NotSent)] == [3, 7, 9]
    assert [one.event for one in report.failed] == [events[3], events[7], events[9]]
    assert [e["title"] for e in both.fake.store.order] == [e.title for e in events if isinstance(e, Event)]
    sizes = [len(json.loads(body)) for _, _, _, body in both.fake.requests]
    assert sizes == [10, 10, 10, 3]
    with pytest.raises(InvalidRequestError):
        report.raise_for_failures()


def test_no_events_no_request(both: Both) -> None:
    """An empty batch is an empty report."""
    assert len(both.run(lambda p: p.send_many([]))) == 0
    assert len(both.run(lambda p: p.send_to([], Event(type="t", title="x")))) == 0
    assert both.fake.requests == []


def test_a_large_batch_is_halved_until_it_passes(both: Both) -> None:
    """413 splits: everything is stored all the same."""
    both.fake.script = [(413, {}), (413, {})]
    report = both.run(lambda p: p.send_many([event(i) for i in range(8)]))
    assert len(report.sent) == 8
    assert [e["title"] for e in both.fake.store.order] == [f"n{i}" for i in range(8)]


def test_to_many_users(both: Both) -> None:
    """One event for many users: a result for each, in order, once for one named twice; retries do not
    duplicate."""
    both.fake.script = ["lose"]
    report = both.run(lambda p: p.send_to(["a", "b", "a", "c"], Event(type="t", title="x")))
    assert [one.user_id for one in report] == ["a", "b", "c"]
    assert [e["userId"] for e in both.fake.store.order] == ["a", "b", "c"]
    with pytest.raises(InvalidRequestError):
        both.run(lambda p: p.send_to(["a"], event()))


def test_what_is_asked_of_users(both: Both) -> None:
    """Paths, bodies and answers of every other call."""
    fake = both.fake
    presence = {
        "userId": "a/b",
        "status": "active",
        "devices": [{"deviceId": "d", "attention": "focused", "since": "x"}],
        "lastSeenAt": None,
        "later": 1,
    }
    fake.answers = {
        ("GET", "/v1/presence/a%2Fb"): (200, presence),
        ("POST", "/v1/presence/query"): (200, {"users": [presence]}),
        ("POST", "/v1/tokens"): (201, {"token": "tok", "expiresAt": "x"}),
        ("PUT", "/v1/users/a/devices/d"): (
            200,
            {"deviceId": "d", "platform": "ios", "provider": "apns", "token": "t"},
        ),
        ("GET", "/v1/users/a/devices/d"): (
            200,
            {"deviceId": "d", "platform": "ios", "provider": "apns", "token": "t"},
        ),
        ("DELETE", "/v1/users/a/devices/d"): (200, {"success": True}),
        ("GET", "/v1/users/a/notifications?limit=1&status=unread&q=hi+there"): (
            200,
            {"notifications": [note(2)], "nextCursor": "c"},
        ),
        ("GET", "/v1/users/a/notifications?limit=100"): (
            200,
            {"notifications": [note(2)], "nextCursor": "c"},
        ),
        ("GET", "/v1/users/a/notifications?limit=100&cursor=c"): (
            200,
            {"notifications": [note(1)], "nextCursor": None},
        ),
        ("GET", "/v1/notifications/i"): (
            200,
            {
                "notification": note(1),
                "deliveryState": "SENT",
                "deliveries": [
                    {
                        "channel": "push",
                        "state": "done",
                        "attempts": 1,
                        "tries": [{"attempt": 1, "outcome": "accepted"}],
                    }
                ],
            },
        ),
        ("PATCH", "/v1/notifications/i"): (
            200,
            {"notification": {"id": "i", "seq": 1, "type": "t", "title": "new"}, "version": 2},
        ),
        ("POST", "/v1/notifications/i/retract"): (200, {"id": "i", "retractedAt": "later"}),
        ("POST", "/v1/notifications/i/cancel"): (
            200,
            {"id": "i", "cancelledAt": "now", "retractedAt": None, "stopped": 1},
        ),
        ("GET", "/v1/users/a/preferences"): (200, {"badge": True}),
        ("PUT", "/v1/users/a/preferences"): (200, {"badge": False}),
        ("PATCH", "/v1/users/a/preferences"): (200, {"badge": False, "sound": "bell"}),
        ("POST", "/v1/users/a/sessions/revoke"): (200, {"success": True}),
    }
    assert both.run(lambda p: p.presence("a/b")).devices[0].attention == "focused"
    assert len(both.run(lambda p: p.presence_of_many(["a"] * 1001))) == 2
    assert [
        len(json.loads(body)["userIds"]) for _, path, _, body in fake.requests if path.endswith("query")
    ] == [1000, 1]
    token = both.run(lambda p: p.mint_token("a", 60))
    assert token.token == "tok"
    assert "tok" not in repr(token).replace("token", "")
    assert json.loads(fake.requests[-1][3]) == {"userId": "a", "ttlS": 60}
    assert (
        both.run(
            lambda p: p.put_device("a", "d", Device(platform="ios", provider="apns", token="t"))
        ).device_id
        == "d"
    )
    assert json.loads(fake.requests[-1][3]) == {"platform": "ios", "provider": "apns", "token": "t"}
    assert both.run(lambda p: p.get_device("a", "d")).token == "t"
    assert both.run(lambda p: p.get_device("a", "none")) is None
    assert both.run(lambda p: p.delete_device("a", "d")) is True
    assert both.run(lambda p: p.delete_device("a", "none")) is False
    page = both.run(lambda p: p.feed("a", limit=1, status="unread", q="hi there"))
    assert (page.notifications[0].title, page.next_cursor) == ("n2", "c")
    assert page.notifications[0].raw["addedLater"] == 1
    history = both.run(lambda p: p.notification("i"))
    assert (history.delivery_state, history.deliveries[0].tries[0].outcome) == ("SENT", "accepted")
    assert (history.version, history.changes) == (1, [])
    after = both.run(lambda p: p.edit("i", {"title": "new", "body": None}, version=1))
    assert (after.notification.title, after.version) == ("new", 2)
    assert json.loads(fake.requests[-1][3]) == {"title": "new", "body": None, "version": 1}
    assert both.run(lambda p: p.retract("i")).retracted_at == "later"
    assert both.run(lambda p: p.cancel("i")).stopped == 1
    assert both.run(lambda p: p.preferences("a")) == {"badge": True}
    assert both.run(lambda p: p.set_preferences("a", {"badge": False})) == {"badge": False}
    patch = {"sound": "bell", "digest": None}
    assert both.run(lambda p: p.patch_preferences("a", patch))["sound"] == "bell"
    assert json.loads(fake.requests[-1][3]) == patch
    assert both.run(lambda p: p.revoke_sessions("a")) is None
    with pytest.raises(NotFoundError):
        both.run(lambda p: p.notification("none"))
    for wrong in ("", ".", ".."):
        with pytest.raises(InvalidRequestError):
            both.run(lambda p, wrong=wrong: p.presence(wrong))

    async def whole_feed(publisher: Any) -> list[str]:
        if both.kind == "sync":
            return [n.title for n in publisher.feed_all("a")]
        return [n.title async for n in publisher.feed_all("a")]

    with_sync = (lambda p: asyncio.run(whole_feed(p))) if both.kind == "sync" else whole_feed
    assert both.run(with_sync) == ["n2", "n1"]


def test_broadcasts(both: Both) -> None:
    """Paths, bodies and answers of the calls about broadcasts; a key is made where none is given."""
    told = {
        "broadcastId": "b", "state": "running", "audience": "all", "event": {"type": "t"},
        "counts": {"stored": 3, "delivered": 1, "later": 9}, "users": {"done": 3, "total": None},
        "ratePerS": 1.5, "remainingS": None,
    }  # fmt: skip
    failure = {"userId": "a", "code": "invalid", "detail": "x", "failedAt": "y"}
    both.fake.answers = {
        ("POST", "/v1/broadcasts"): (202, told),
        ("GET", "/v1/broadcasts/b"): (200, told | {"state": "done"}),
        ("GET", "/v1/broadcasts?limit=1&state=done"): (200, {"broadcasts": [told], "nextCursor": "c"}),
        ("GET", "/v1/broadcasts/b/failures?limit=100"): (200, {"failures": [failure], "nextCursor": None}),
        **{
            ("POST", f"/v1/broadcasts/b/{act}"): (200, told | {"state": act})
            for act in ("pause", "resume", "cancel")
        },
    }
    sent = both.run(lambda p: p.send_broadcast(event(), {"topic": "x"}, schedule_at="z"))
    assert (sent.broadcast_id, sent.counts.stored, sent.users.total, sent.ended) == ("b", 3, None, False)
    body = json.loads(both.fake.requests[-1][3])
    assert (body["audience"], body["scheduleAt"], body["event"]["type"]) == (
        {"topic": "x"},
        "z",
        event().type,
    )
    assert len(body["idempotencyKey"]) >= 32
    assert both.run(lambda p: p.broadcast("b")).ended
    page = both.run(lambda p: p.broadcasts(limit=1, state="done"))
    assert (page.broadcasts[0].broadcast_id, page.next_cursor) == ("b", "c")
    assert both.run(lambda p: p.broadcast_failures("b"))[0].user_id == "a"
    assert both.run(lambda p: p.pause_broadcast("b")).state == "pause"
    assert both.run(lambda p: p.resume_broadcast("b")).state == "resume"
    assert both.run(lambda p: p.cancel_broadcast("b")).state == "cancel"


def test_calls_are_retried_and_give_up(both: Both) -> None:
    """A 503 answer to a query ends as GaveUpError with the last problem inside."""
    both.fake.answers["GET", "/v1/presence/a"] = (503, problem(503, "store_unavailable"))
    with pytest.raises(GaveUpError) as told:
        both.run(lambda p: p.presence("a"), RetryPolicy(max_attempts=3, first_pause_s=0.01))
    assert isinstance(told.value.last, UnavailableError)
    assert len(both.fake.requests) == 3


def test_closed_is_closed(both: Both) -> None:
    """After close nothing is sent."""
    kept: list[Any] = []

    async def keep_async(publisher: Any) -> None:
        kept.append(publisher)

    both.run(kept.append if both.kind == "sync" else keep_async)

    def send() -> None:
        if both.kind == "sync":
            kept[0].send(event())
        else:
            asyncio.run(kept[0].send(event()))

    with pytest.raises(ClosedError):
        send()


def test_wrong_arguments_are_refused_without_showing_the_key() -> None:
    """URLs and keys that cannot be ones."""
    for url in ("", "127.0.0.1:8000", "ftp://host"):
        with pytest.raises(ValueError, match="expected url"):
            Publisher(url, KEY)
    with pytest.raises(ValueError, match="expected key") as told:
        Publisher("http://host", "secret\nkey")
    assert "secret" not in str(told.value)


def test_threads_share_a_publisher(fake: FakeServer) -> None:
    """Eight threads, one publisher: everything is stored once, over no more connections than allowed."""
    with Publisher(fake.url, KEY, retry=FAST, max_connections=4) as publisher:
        threads = [threading.Thread(target=publisher.send, args=(event(i),)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(e["title"] for e in fake.store.order) == sorted(f"n{i}" for i in range(8))


async def test_what_comes_together_travels_together(fake: FakeServer) -> None:
    """A thousand concurrent sends are few requests, and every caller gets the result of its own event."""
    async with AsyncPublisher(fake.url, KEY, retry=FAST) as publisher:
        sent = await asyncio.gather(*(publisher.send(event(i, f"u{i}")) for i in range(1000)))
    assert len(fake.requests) <= 5
    for number, one in enumerate(sent):
        assert fake.store.by_key[one.idempotency_key]["event"]["title"] == f"n{number}"


async def test_one_users_events_keep_their_order(fake: FakeServer) -> None:
    """Over many small requests in flight at once, each user's events are stored in the order given."""
    fake.delay_s = 0.002
    limits = BatchLimits(max_items=3)
    async with AsyncPublisher(
        fake.url, KEY, retry=FAST, limits=limits, linger_s=0, max_flights=4
    ) as publisher:
        for number in range(120):
            publisher.enqueue_nowait(event(number, f"u{number % 5}"))
            if number % 7 == 0:
                await asyncio.sleep(0)
        await publisher.flush()
    for user in range(5):
        titles = [e["title"] for e in fake.store.order if e["userId"] == f"u{user}"]
        assert titles == [f"n{n}" for n in range(user, 120, 5)]
    assert fake.most_in_flight > 1


async def test_a_full_queue_holds_its_callers_back(fake: FakeServer) -> None:
    """enqueue waits for room, enqueue_nowait refuses, and the bound is never passed."""
    fake.delay_s = 0.02
    limits = BatchLimits(max_items=2)
    async with AsyncPublisher(
        fake.url, KEY, retry=FAST, limits=limits, linger_s=0, max_queue=6, max_flights=1
    ) as publisher:
        futures = [publisher.enqueue_nowait(event(i)) for i in range(6)]
        with pytest.raises(QueueFullError):
            publisher.enqueue_nowait(event(6))
        waiting = [asyncio.ensure_future(publisher.enqueue(event(i))) for i in range(6, 30)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        waiting[5].cancel()
        for number, task in enumerate(waiting):
            if number != 5:
                futures.append(await task)
                assert len(publisher._futures) <= 6
        results = await asyncio.gather(*futures)
    assert len({one.id for one in results}) == 29
    assert [e["title"] for e in fake.store.order] == [f"n{i}" for i in range(30) if i != 11]


async def test_close_sends_what_is_queued(fake: FakeServer) -> None:
    """Leaving the block flushes: every queued event has its result, also after a retry."""
    fake.script = ["lose"]
    async with AsyncPublisher(fake.url, KEY, retry=FAST, linger_s=60.0) as publisher:
        futures = [publisher.enqueue_nowait(event(i)) for i in range(5)]
    assert [(await future).seq for future in futures] == [1, 2, 3, 4, 5]


async def test_a_cancelled_close_loses_nothing_silently(fake: FakeServer) -> None:
    """If closing is cut short, what has no result fails with an error."""
    fake.script = ["hang"] * 10
    publisher = AsyncPublisher(fake.url, KEY, retry=RetryPolicy(), linger_s=0)
    future = publisher.enqueue_nowait(event())
    await eventually(lambda: fake.requests)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(publisher.aclose(), 0.1)
    with pytest.raises(ClosedError):
        await future


async def test_a_cancelled_caller_does_not_unsend(fake: FakeServer) -> None:
    """Cancelling send leaves the event on its way, and others in its batch untouched."""
    fake.delay_s = 0.05
    async with AsyncPublisher(fake.url, KEY, retry=FAST) as publisher:
        first = asyncio.ensure_future(publisher.send(event(1)))
        second = asyncio.ensure_future(publisher.send(event(2)))
        await eventually(lambda: fake.requests)
        first.cancel()
        assert (await second).status == "stored"
    assert len(fake.store.order) == 2
