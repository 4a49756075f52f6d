"""The subscriber against a fake gateway over real WebSockets."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from client_kit import FakeServer, Socket, eventually

from carillon_client import (
    Change,
    ClosedError,
    Notification,
    OperationError,
    Position,
    Reset,
    Subscriber,
    SubscriptionLimits,
    SubscriptionRefusedError,
    TokenExpiredError,
)

FAST = SubscriptionLimits(
    reconnect_first_s=0.02,
    reconnect_longest_s=0.1,
    welcome_timeout_s=30.0,
    pong_timeout_s=30.0,
    ack_linger_s=0.005,
    operation_timeout_s=60.0,
)


def subscriber(fake: FakeServer, **more: Any) -> Subscriber:
    return Subscriber(fake.ws_url, **{"token": "tok", "limits": FAST, **more})


async def take(source: Any, count: int) -> list[Any]:
    """The next items of an iterator, within a minute each."""
    return [await asyncio.wait_for(source.__anext__(), 60) for _ in range(count)]


def query(socket: Socket) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(socket.path).query).items()}


async def steady(socket: Socket) -> None:
    await socket.welcome(0)
    for seq in (1, 2, 3):
        await socket.notify(seq)
    await socket.read()


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_notifications_are_acknowledged_once_processed(fake: FakeServer, encoding: Any) -> None:
    """The one in hand is not acknowledged, those before it are; leaving the block acknowledges it, too."""
    fake.sockets = [steady]
    async with subscriber(fake, encoding=encoding, device_id="phone") as stream:
        got = await take(stream, 2)
        assert [n.title for n in got] == ["n1", "n2"]
        (socket,) = fake.opened
        assert socket.binary == (encoding == "msgpack")
        assert socket.headers["Authorization"] == "Bearer tok"
        assert urlsplit(socket.path).path == "/ws"
        assert query(socket) == {"deviceId": "phone"}
        await eventually(lambda: socket.acked() == ["e1-1"])
        assert stream.position == Position(epoch="e1", last_seq=1, last_rev=0)
    await eventually(lambda: socket.acked() == ["e1-1", "e1-2"])
    assert stream.position == Position(epoch="e1", last_seq=2, last_rev=0)
    await eventually(lambda: socket.connection.close_code == 1000)
    with pytest.raises(StopAsyncIteration):
        await stream.__anext__()


async def test_an_exception_leaves_the_item_unprocessed(fake: FakeServer) -> None:
    """What the application failed on is neither acknowledged nor passed by the position."""
    fake.sockets = [steady]

    stream = subscriber(fake)

    async def consume() -> None:
        async with stream:
            async for _ in stream:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await consume()
    assert fake.opened[0].acked() == []
    assert stream.position == Position(epoch="e1", last_seq=0, last_rev=0)


async def test_manual_acknowledgement(fake: FakeServer) -> None:
    """Only what was acknowledged is; the position waits for the oldest."""
    fake.sockets = [steady]
    async with subscriber(fake, ack="manual") as stream:
        first, second, _ = await take(stream, 3)
        stream.ack(second, "unknown")
        await eventually(lambda: fake.opened[0].acked() == ["e1-2"])
        assert stream.position is not None
        assert stream.position.last_seq == 0
        stream.ack(first.id)
        assert stream.position.last_seq == 2
    await eventually(lambda: fake.opened[0].acked() == ["e1-2", "e1-1"])


async def test_acknowledgement_on_receipt(fake: FakeServer) -> None:
    """ack="received" acknowledges before anybody iterates."""
    fake.sockets = [steady]
    async with subscriber(fake, ack="received"):
        await eventually(lambda: fake.opened and fake.opened[0].acked() == ["e1-1", "e1-2", "e1-3"])


async def test_lost_connections_are_resumed(fake: FakeServer) -> None:
    """Broken, drained, refused and silent connections: each is replaced, with the position; nothing comes
    twice."""

    async def broken(socket: Socket) -> None:
        await socket.welcome(0)
        await socket.notify(1)
        await socket.read("PING")
        socket.reset()

    async def drained(socket: Socket) -> None:
        await socket.welcome(3)
        await socket.welcome(3, recovered=True)
        await socket.notify(1)
        await socket.notify(2)
        await socket.close(4201)

    async def early(socket: Socket) -> None:
        await socket.close(4213)

    async def silent(socket: Socket) -> None:
        await socket.welcome(3)
        await socket.welcome(3, recovered=True)
        await socket.notify(3)
        socket.deaf = True
        await socket.read()

    async def last(socket: Socket) -> None:
        await socket.welcome(4)
        await socket.welcome(4, recovered=True)
        await socket.notify(4)
        await socket.read()

    fake.sockets = [broken, drained, early, silent, last]
    limits = SubscriptionLimits(reconnect_first_s=0.02, heartbeat_s=0.1, pong_timeout_s=1.5)
    async with subscriber(fake, limits=limits) as stream:
        assert [n.seq for n in await take(stream, 4)] == [1, 2, 3, 4]
        assert [query(s).get("lastSeq") for s in fake.opened] == [None, "1", "2", "2", "3"]
        assert query(fake.opened[1]) == {"epoch": "e1", "lastSeq": "1", "lastRev": "0"}


async def test_a_stored_position_is_where_it_goes_on(fake: FakeServer) -> None:
    """The text of a position, given to another subscriber, is in its URL from the first connection."""

    async def resumed(socket: Socket) -> None:
        await socket.welcome(9)
        await socket.welcome(9, recovered=True)
        await socket.notify(8)
        await socket.read()

    fake.sockets = [resumed]
    text = str(Position(epoch="e1", last_seq=7, last_rev=3))
    async with subscriber(fake, position=text) as stream:
        assert [n.seq for n in await take(stream, 1)] == [8]
        assert query(fake.opened[0]) == {"epoch": "e1", "lastSeq": "7", "lastRev": "3"}


async def test_a_reset_is_told(fake: FakeServer) -> None:
    """recovered: false reaches on_reset, and in events() its place in the order."""

    async def forgot(socket: Socket) -> None:
        await socket.welcome(9, 4, epoch="e2")
        await socket.welcome(9, 4, False, epoch="e2")
        await socket.notify(10, "e2")
        await socket.read()

    fake.sockets = [forgot]
    told: list[Reset] = []
    position = Position(epoch="e1", last_seq=7, last_rev=3)
    async with subscriber(fake, position=position, on_reset=told.append) as stream:
        assert [n.seq for n in await take(stream, 1)] == [10]
        assert told == [Reset(Position(epoch="e2", last_seq=9, last_rev=4), position)]
    async with subscriber(fake, position=position) as stream:
        kinds = [type(one) for one in await take(stream.events(), 2)]
        assert kinds == [Reset, Notification]


@pytest.mark.parametrize("code", [4001, 4002, 4003, 4004])
async def test_some_closes_end_it(fake: FakeServer, code: int) -> None:
    """What arrived is handed out first; then the iterator raises, and so does every operation."""

    async def refuse(socket: Socket) -> None:
        await socket.welcome(0)
        await socket.notify(1)
        await socket.close(code, "no")

    fake.sockets = [refuse]
    async with subscriber(fake) as stream:
        assert len(await take(stream, 1)) == 1
        with pytest.raises(SubscriptionRefusedError) as told:
            await take(stream, 1)
        assert (told.value.code, told.value.reason) == (code, "no")
        with pytest.raises(SubscriptionRefusedError):
            await stream.mark_read("x")
    assert len(fake.opened) == 1


async def test_expired_tokens_are_replaced(fake: FakeServer) -> None:
    """4101 asks the function for a new token and goes on; a static token ends it."""

    async def expired(socket: Socket) -> None:
        await socket.close(4101)

    fake.sockets = [expired, steady]
    tokens = iter(["old", "new"])

    async def next_token() -> str:
        return next(tokens)

    async with subscriber(fake, token=next_token) as stream:
        await take(stream, 1)
    assert [s.headers["Authorization"] for s in fake.opened] == ["Bearer old", "Bearer new"]
    fake.sockets = [expired]
    async with subscriber(fake) as stream:
        with pytest.raises(TokenExpiredError):
            await take(stream, 1)


async def test_a_token_function_may_fail(fake: FakeServer) -> None:
    """An OSError is tried again; anything else comes out of the iterator."""
    fake.sockets = [steady]
    calls: list[int] = []

    def unreliable() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("token service is away")
        return "tok"

    async with subscriber(fake, token=unreliable) as stream:
        assert len(await take(stream, 1)) == 1

    def broken() -> str:
        raise KeyError("defect")

    async with subscriber(fake, token=broken) as stream:
        with pytest.raises(KeyError):
            await take(stream, 1)


async def test_nobody_there_is_tried_again(fake: FakeServer) -> None:
    """A refused connection is no error of the iterator; closing ends the waiting."""
    stream = Subscriber("ws://127.0.0.1:1", token="t", limits=FAST)
    task = asyncio.ensure_future(stream.__anext__())
    await eventually(lambda: stream._core.failures >= 3)
    assert not task.done()
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await task


async def test_operations_wait_for_their_answer(fake: FakeServer) -> None:
    """OK returns, ERROR raises with its code, and an answer lost with its connection comes on the next."""

    async def first(socket: Socket) -> None:
        await socket.welcome(0)
        socket.refuse["ARCHIVE"] = {"code": "not_found", "message": "none", "temporary": False}
        await socket.read("CLICK")
        socket.deaf = True
        await socket.read("MARK_ALL_READ")
        socket.reset()

    fake.sockets = [first, steady]
    async with subscriber(fake) as stream:
        await stream.mark_read("a", "b")
        with pytest.raises(OperationError) as told:
            await stream.archive("x")
        assert told.value.code == "not_found"
        await stream.click("a", "open")
        await asyncio.wait_for(stream.mark_all_read(7), 60)
        await stream.set_visibility("hidden", "thread:1")
        await stream.mark_seen("a")
        await stream.dismiss("a")
        sent = [{k: v for k, v in f.items() if k != "id"} for s in fake.opened for f in s.received]
    assert {"type": "MARK_READ", "notificationIds": ["a", "b"]} in sent
    assert {"type": "CLICK", "notificationId": "a", "actionId": "open"} in sent
    assert sent.count({"type": "MARK_ALL_READ", "upToSeq": 7}) == 2
    assert {"type": "VISIBILITY", "state": "hidden", "viewing": "thread:1"} in sent
    with pytest.raises(ClosedError):
        await stream.mark_read("a")


async def test_an_operation_inside_the_loop_does_not_lock_up(fake: FakeServer) -> None:
    """With a queue of one, full, the answer to an operation is read all the same."""

    async def many(socket: Socket) -> None:
        await socket.welcome(0)
        for seq in range(1, 201):
            await socket.notify(seq)
        await socket.read()

    fake.sockets = [many]
    seen: list[int] = []
    async with subscriber(fake, max_queue=1) as stream:
        async for notification in stream:
            await asyncio.wait_for(stream.mark_read(notification.id), 60)
            seen.append(notification.seq)
            if len(seen) == 200:
                break
    assert seen == list(range(1, 201))


async def test_changes_and_notifications_in_two_tasks(fake: FakeServer) -> None:
    """changes() has what happens to notifications; events() has everything in one order."""

    async def mixed(socket: Socket) -> None:
        await socket.welcome(0)
        await socket.notify(1)
        await socket.send(
            {"type": "NOTIFICATIONS_READ", "notificationIds": ["e1-1"], "readAt": "x", "rev": 2}
        )
        await socket.send({"type": "SOMETHING_LATER"})
        await socket.notify(2)
        await socket.read()

    fake.sockets = [mixed]
    async with subscriber(fake) as stream:
        changes = stream.changes()
        assert [n.seq for n in await take(stream, 2)] == [1, 2]
        (change,) = await take(changes, 1)
        assert (change.kind, change.notification_ids, change.rev) == ("NOTIFICATIONS_READ", ("e1-1",), 2)
        with pytest.raises(RuntimeError):
            stream.changes()
        await changes.aclose()  # type: ignore[attr-defined]
    async with subscriber(fake) as stream:
        kinds = [type(one) for one in await take(stream.events(), 3)]
        assert kinds == [Notification, Change, Notification]
        assert stream.position == Position(epoch="e1", last_seq=1, last_rev=2)


async def test_a_slow_reader_holds_the_socket_back(fake: FakeServer) -> None:
    """No more than the queue's bound is taken in while nobody iterates, and everything comes in the end."""
    written: list[int] = []

    async def flood(socket: Socket) -> None:
        await socket.welcome(0)
        for seq in range(1, 3001):
            await socket.send(
                {"type": "NEW_NOTIFICATION", "notification": {"id": f"{seq}", "seq": seq, "body": "x" * 5000}}
            )
            written.append(seq)
        await socket.read()

    fake.sockets = [flood]
    async with subscriber(fake, max_queue=10) as stream:
        await eventually(lambda: len(stream._main.items) == 10)
        await asyncio.sleep(0.1)
        assert len(stream._main.items) == 10
        assert len(written) < 3000
        assert [n.seq for n in await take(stream, 3000)] == list(range(1, 3001))


async def test_wrong_arguments() -> None:
    """What cannot be right is refused at once."""
    for more in (
        {"url": "http://x"},
        {"ack": "never"},
        {"encoding": "xml"},
        {"max_queue": 0},
        {"position": "{}"},
    ):
        with pytest.raises(ValueError):
            Subscriber(**{"url": "ws://host", "token": "t", **more})  # type: ignore[arg-type]
