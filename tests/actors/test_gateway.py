from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from actors.gateway import Gateway
from carillon import server_frames
from carillon.errors import ClusterError, StoreUnavailableError
from carillon.messages import (
    ClientAck,
    ClientChange,
    ClientReady,
    ClientResume,
    ClientVisibility,
    Detach,
    SocketDrained,
    Write,
)
from carillon.token_keys import TokenKeys
from tests.actors.fakes import actor_config
from tests.actors.gateway_kit import (
    ID,
    SECRET,
    RawClient,
    Start,
    client_frame,
    closed_with,
    frame_of,
    notification,
    running,
    token,
    upgrade_request,
)
from tests.support import eventually


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    async with running() as starter:
        yield starter


def names(messages: list[Any]) -> list[str]:
    return [type(message).__name__ for message in messages]


# -- attaching and delivering ---------------------------------------------------------------------------


async def test_frames_arrive_as_the_shard_wrote_them(start: Start) -> None:
    """Attach carries identity and position; WELCOME and frames come byte for byte, in order."""
    kit = await start()
    client = await kit.client(deviceId="phone", epoch="e0", lastSeq=3, lastRev=4)
    attach = await kit.shard.attached()
    assert (attach.tenant, attach.user, attach.device) == ("acme", "ann", "phone")
    assert (attach.epoch, attach.last_seq, attach.last_rev) == ("e0", 3, 4)
    assert (attach.reattach, attach.legacy) == (False, False)
    assert attach.token_issued_ms > 0
    for seq in range(4, 9):
        kit.shard.notify(seq)
    assert (await frame_of(client))["type"] == "WELCOME"
    assert [await client.recv() for _ in range(5)] == [notification(seq).decode() for seq in range(4, 9)]


async def test_each_encoding_gets_its_form_of_one_write(start: Start) -> None:
    """One write reaches JSON as text, MessagePack as binary, and legacy as NEW_NOTIFICATION."""
    kit = await start()
    clients = [
        await kit.client(),
        await kit.client(msgpack=True),
        await kit.client(legacy=True),
        await kit.client(legacy=True),
    ]
    await kit.shard.attached(4)
    assert [attach.legacy for attach in kit.shard.attaches] == [False, False, True, True]
    assert [client.subprotocol for client in clients] == [
        "carillon.v1.json", "carillon.v1.msgpack", None, None,
    ]  # fmt: skip
    conns = [attach.conn for attach in kit.shard.attaches]
    frame = server_frames.notification_updated('{"id":"x","text":"ü"}')
    kit.shard.write(Write(conns, frame, 1, 1, update=True), Write(conns, notification(2), 2, 2))
    json_client, packed, *legacy = clients
    assert (await frame_of(json_client))["type"] == "WELCOME"
    assert await json_client.recv() == frame.decode()
    assert msgpack.unpackb(await packed.recv())["type"] == "WELCOME"
    assert msgpack.unpackb(await packed.recv()) == json.loads(frame)
    assert msgpack.unpackb(await packed.recv()) == json.loads(notification(2))
    for client in legacy:
        assert (await frame_of(client))["type"] == "WELCOME"
        assert await client.recv() == server_frames.new_notification('{"id":"x","text":"ü"}').decode()
        assert await client.recv() == notification(2).decode()


async def test_client_frames_reach_the_shard_in_order(start: Start) -> None:
    """The first frame is preceded by ClientReady; the rest come as sent, in both encodings."""
    kit = await start()
    for at, packed in enumerate((False, True)):
        kit.shard.shard.received.clear()
        client = await kit.client(msgpack=packed)
        attach = await kit.shard.attached(at + 1)
        for frame in (
            {"type": "ACK", "seq": 4},
            {"type": "MARK_READ", "notificationIds": [ID], "id": "r1"},
            {"type": "VISIBILITY", "state": "idle"},
        ):
            await client.send(msgpack.packb(frame) if packed else json.dumps(frame))
        await kit.shard.got(ClientVisibility)
        ready, ack, change, visibility = kit.shard.messages()
        raw = bytes.fromhex(ID.replace("-", ""))
        assert ready == ClientReady(attach.conn)
        assert ack == ClientAck(attach.conn, 4)
        assert change == ClientChange(attach.conn, "read", [raw], ref="r1")
        assert visibility == ClientVisibility(attach.conn, "idle")
        await client.close()


async def test_resume_first_is_passed_on_without_ready(start: Start) -> None:
    """RESUME as the first frame means no ClientReady; a later one is passed on for the shard to answer."""
    kit = await start()
    client = await kit.client()
    attach = await kit.shard.attached()
    for seq in (5, 6):
        await client.send(
            json.dumps({"type": "RESUME", "epoch": "e1", "lastSeq": seq, "lastRev": 7, "id": seq})
        )
    await kit.shard.got(ClientResume, 2)
    assert kit.shard.messages() == [
        ClientResume(attach.conn, "e1", 5, 7, 5),
        ClientResume(attach.conn, "e1", 6, 7, 6),
    ]


async def test_ping_is_answered_here_and_counts_as_first_frame(start: Start) -> None:
    """PING gets PONG with its id, and the session learns that no RESUME will come."""
    kit = await start()
    client = await kit.client()
    await frame_of(client)
    await client.send('{"type":"PING"}')
    await client.send('{"type":"PING","id":"p"}')
    assert await frame_of(client) == {"type": "PONG"}
    assert await frame_of(client) == {"type": "PONG", "id": "p"}
    await kit.shard.got(ClientReady)
    assert names(kit.shard.messages()) == ["ClientReady"]


async def test_frames_sent_before_welcome_wait_for_it(start: Start) -> None:
    """What a client sends while its session still loads is kept and handed over behind WELCOME."""
    kit = await start()
    kit.shard.greet = False
    client = await kit.client()
    attach = await kit.shard.attached()
    await client.send(json.dumps({"type": "ACK", "seq": 1}))
    await client.send('{"type":"PING"}')
    assert await frame_of(client) == {"type": "PONG"}  # so ACK was read before
    assert kit.shard.messages() == []
    kit.shard.welcome(attach)
    await kit.shard.got(ClientAck)
    assert names(kit.shard.messages()) == ["ClientReady", "ClientAck"]


async def test_a_full_queue_stops_reading(start: Start) -> None:
    """Without an attachment a few frames are kept; the rest stays in the socket, none is lost."""
    kit = await start(max_held_frames=4, frames_per_s=1000)
    kit.shard.greet = False
    client = await kit.client()
    attach = await kit.shard.attached()
    for seq in range(1, 101):
        await client.send(json.dumps({"type": "ACK", "seq": seq}))
    await client.send('{"type":"PING"}')
    with pytest.raises(TimeoutError):
        await frame_of(client, 0.2)
    kit.shard.welcome(attach)
    await kit.shard.got(ClientAck, 100)
    assert [ack.seq for ack in kit.shard.received(ClientAck)] == list(range(1, 101))


@pytest.mark.parametrize(("code", "clean"), [(1000, True), (1001, False), (3000, False)])
async def test_how_a_client_left_is_told(start: Start, code: int, clean: bool) -> None:
    """Only a normal close (1000) is clean."""
    kit = await start()
    client = await kit.client()
    attach = await kit.shard.attached()
    await client.close(code)
    assert await kit.shard.got(Detach) == Detach(attach.conn, clean)
    assert client.close_code == code


async def test_a_lost_socket_is_detached(start: Start) -> None:
    """A reset is not clean."""
    kit = await start()
    client = await kit.client()
    attach = await kit.shard.attached()
    client.transport.abort()
    assert await kit.shard.got(Detach) == Detach(attach.conn, False)
    assert (await kit.gateway.status())["sockets"] == 0


async def test_the_shard_closes_a_connection(start: Start) -> None:
    """CloseSocket becomes a close frame with its code and reason."""
    kit = await start()
    client = await kit.client()
    await kit.shard.attached()
    kit.shard.close(4004, "too many connections")
    assert await closed_with(client) == 4004
    assert client.close_reason == "too many connections"


async def test_frames_of_an_earlier_term_are_dropped(start: Start) -> None:
    """Once a shard spoke with term 3, frames and closes with term 2 are ignored."""
    kit = await start()
    client = await kit.client()
    attach = await kit.shard.attached()
    await frame_of(client)
    kit.shard.write(Write([attach.conn], notification(1), 1, 1), term=3)
    kit.shard.write(Write([attach.conn], notification(2), 2, 2), term=2)
    kit.shard.close(4004, "stale", term=2)
    kit.shard.write(Write([attach.conn], notification(3), 3, 3), term=3)
    assert [(await frame_of(client))["notification"]["seq"] for _ in range(2)] == [1, 3]
    assert (await kit.gateway.status())["counters"]["gateway_stale_frames"] == 2


# -- hand-over ------------------------------------------------------------------------------------------


async def test_a_lost_shard_is_replaced_without_losing_the_socket(start: Start) -> None:
    """After the owner's death the connection is attached at the successor with the last written position."""
    kit = await start(shards=2)
    old, new = kit.shards
    client = await kit.client()
    first = await old.attached()
    old.notify(1)
    old.write(Write([first.conn], notification(2), 2, 5))
    old.write(Write([first.conn], server_frames.unread_count(0, 6), 0, 6))
    for _ in range(4):
        await frame_of(client)
    await old.shard.stop()
    kit.give(new)
    again = await new.attached()
    assert again.reattach
    assert again.ready
    assert (again.epoch, again.last_seq, again.last_rev) == ("e1", 2, 6)
    assert (again.session_id, again.device) == (first.session_id, first.device)
    assert again.conn != first.conn
    await client.send(json.dumps({"type": "ACK", "seq": 2}))
    assert (await new.got(ClientAck)).conn == again.conn
    new.notify(3)
    assert (await frame_of(client))["notification"]["seq"] == 3


async def test_what_the_earlier_owner_still_sends_is_dropped(start: Start) -> None:
    """After a move only the new owner's frames count, although the old one still has a link."""
    kit = await start(shards=2)
    old, new = kit.shards
    client = await kit.client()
    first = await old.attached()
    old.notify(1)
    await frame_of(client)
    assert (await frame_of(client))["notification"]["seq"] == 1
    kit.give(new)
    await new.attached()
    assert await old.got(Detach) == Detach(first.conn, False)
    old.write(Write([first.conn], notification(2), 2, 2))
    old.close(4004, "stale")
    assert old.link is not None
    # The stale frames are on another link: the new owner's must not win by being faster.
    await eventually(lambda: old.link is not None and old.link.outbound_bytes() == 0)
    second = await kit.client("bob")
    await old.attached(2)
    await frame_of(second)
    new.notify(7)
    assert (await frame_of(client))["notification"]["seq"] == 7


async def test_a_new_term_of_the_same_shard_means_a_new_attachment(start: Start) -> None:
    """When the map raises the owner's term, the old number is given back and a new one attached."""
    kit = await start()
    client = await kit.client()
    first = await kit.shard.attached()
    kit.shard.notify(1)
    await frame_of(client)
    await frame_of(client)
    kit.coordinator.bump_term(kit.shard.name)
    again = await kit.shard.attached(2)
    assert (again.reattach, again.last_seq, again.ready) == (True, 1, True)
    assert await kit.shard.got(Detach) == Detach(first.conn, False)
    kit.shard.write(
        Write([first.conn], notification(3), 3, 3)
    )  # crossed the new attachment: must not overtake
    kit.shard.write(Write([again.conn], notification(2), 2, 2), Write([again.conn], notification(3), 3, 3))
    assert [(await frame_of(client))["notification"]["seq"] for _ in range(2)] == [2, 3]


async def test_a_connection_without_welcome_attaches_afresh(start: Start) -> None:
    """A shard that dies before WELCOME leaves position and held frames to the next one."""
    kit = await start(shards=2)
    old, new = kit.shards
    old.greet = False
    client = await kit.client(epoch="e1", lastSeq=4)
    await old.attached()
    await client.send(json.dumps({"type": "ACK", "seq": 4}))
    await old.shard.stop()
    kit.give(new)
    again = await new.attached()
    assert (again.reattach, again.epoch, again.last_seq) == (False, "e1", 4)
    assert (await frame_of(client))["type"] == "WELCOME"
    assert (await new.got(ClientAck)).conn == again.conn
    assert names(new.messages()) == ["ClientReady", "ClientAck"]


async def test_an_unanswered_resume_is_asked_again(start: Start) -> None:
    """A shard that dies between RESUME and its answer leaves it, and a waiting session, to the next."""
    kit = await start(shards=2)
    old, new = kit.shards
    client = await kit.client()
    await old.attached()
    await frame_of(client)
    await client.send(json.dumps({"type": "RESUME", "epoch": "e1", "lastSeq": 2, "id": 1}))
    await old.got(ClientResume)
    await old.shard.stop()
    kit.give(new)
    again = await new.attached()
    assert (again.reattach, again.ready) == (True, False)
    assert await new.got(ClientResume) == ClientResume(again.conn, "e1", 2, None, 1)
    new.welcome(again, seq=2, recovered=True)
    new.notify(3)
    assert [(await frame_of(client))["type"] for _ in range(2)] == ["WELCOME", "NEW_NOTIFICATION"]
    kit.coordinator.bump_term(new.name)
    last = await new.attached(2)
    assert (last.ready, last.last_seq) == (True, 3)
    assert len(new.received(ClientResume)) == 1


async def test_a_resume_from_the_beginning_is_a_position(start: Start) -> None:
    """WELCOME sets the position absolutely: lastSeq 0 survives a hand-over before the first page."""
    kit = await start()
    kit.shard.greet = False
    await kit.client()
    attach = await kit.shard.attached()
    kit.shard.welcome(attach, seq=9)
    kit.shard.welcome(attach, seq=0, recovered=True)
    kit.coordinator.bump_term(kit.shard.name)
    again = await kit.shard.attached(2)
    assert (again.reattach, again.last_seq, again.last_rev) == (True, 0, 0)


async def test_a_refused_attachment_is_tried_until_it_is_taken(start: Start) -> None:
    """A shard that does not know yet that it owns the slot is asked again."""
    kit = await start()
    kit.shard.shard.owned = set()
    client = await kit.client()
    with pytest.raises(TimeoutError):
        await frame_of(client, 0.15)
    kit.shard.shard.owned = None
    await kit.shard.attached()
    assert (await frame_of(client))["type"] == "WELCOME"


async def test_without_owner_for_too_long_the_client_is_sent_away(start: Start) -> None:
    """4202 after `reattach_timeout_s`, for connections that had an owner and for those that never had."""
    kit = await start(reattach_timeout_s=0.3)
    client = await kit.client()
    await kit.shard.attached()
    kit.give(None)
    fresh = await kit.client()
    assert await closed_with(client) == 4202
    assert await closed_with(fresh) == 4202


async def test_refusals_add_up(start: Start) -> None:
    """A shard that always refuses does not keep a connection in limbo."""
    kit = await start(reattach_timeout_s=0.3)
    kit.shard.shard.owned = set()
    assert await closed_with(await kit.client()) == 4202


# -- who may connect ------------------------------------------------------------------------------------


async def test_a_bad_token_is_told_after_the_handshake(start: Start) -> None:
    """4001 for anything but expiry, 4101 for that; the HTTP upgrade succeeds in each case."""
    kit = await start()
    cases = {
        "noise": 4001,
        token(secret="x" * 40): 4001,
        token(tenant="nobody"): 4001,
        token(ttl_s=-60): 4101,
    }
    for bad, code in cases.items():
        for repeat in range(2):  # unknown tenant: read, then cached
            client = await connect(kit.url(token=bad), proxy=None)
            assert await closed_with(client) == code, (bad, repeat)
    assert kit.shard.attaches == []


@pytest.mark.parametrize("path", ["/ws", "/ws/notifications", "/notifications/ann%2Fb%C3%BC"])
async def test_the_endpoint_has_three_names(start: Start, path: str) -> None:
    """All three paths serve; the user in the path is percent-decoded."""
    kit = await start()
    client = await kit.client("ann/bü", path=path)
    assert (await frame_of(client))["type"] == "WELCOME"


async def test_another_users_path_is_not_permitted(start: Start) -> None:
    """/notifications/{userId} with another `sub` closes with 4002."""
    kit = await start()
    assert await closed_with(await kit.client("ann", path="/notifications/bob")) == 4002


async def test_the_token_may_come_as_first_frame(start: Start) -> None:
    """AUTH with a device id attaches and is answered OK; frames in the same packet follow."""
    kit = await start()
    raw = await RawClient.open(kit.port)
    auth = {"type": "AUTH", "token": token(), "deviceId": "tv", "id": 1}
    raw.writer.write(upgrade_request("/ws"))
    await raw.reader.readuntil(b"\r\n\r\n")
    raw.writer.write(client_frame(json.dumps(auth).encode()) + client_frame(b'{"type":"ACK","seq":3}'))
    assert json.loads((await raw.frame())[1]) == {"type": "OK", "id": 1}
    assert json.loads((await raw.frame())[1])["type"] == "WELCOME"
    assert (await kit.shard.attached()).device == "tv"
    assert (await kit.shard.got(ClientAck)).seq == 3
    await raw.end()


async def test_anything_but_auth_first_is_refused(start: Start) -> None:
    """Without a token the first frame must be AUTH."""
    kit = await start()
    client = await connect(kit.url(), proxy=None)
    await client.send('{"type":"PING"}')
    assert (await frame_of(client))["code"] == "unauthenticated"
    assert await closed_with(client) == 4001


async def test_a_client_that_never_authenticates_is_closed(start: Start) -> None:
    """4001 after `auth_timeout_s`."""
    kit = await start(auth_timeout_s=0.2)
    client = await connect(kit.url(), proxy=None)
    assert await closed_with(client) == 4001


async def test_a_storm_reads_a_secret_once(start: Start) -> None:
    """Connections that come while a tenant's secret is being read share that read, and keep its answer."""
    reads: list[str] = []
    go = asyncio.Event()

    async def slow(tenant: str, /, *, refresh: bool = False) -> TokenKeys | None:
        reads.append(tenant)
        await go.wait()
        return TokenKeys((SECRET,))

    kit = await start(read=slow)
    clients = [await kit.client() for _ in range(20)]
    go.set()
    for client in clients:
        assert (await frame_of(client))["type"] == "WELCOME"
    await frame_of(await kit.client())
    assert reads == ["acme"]


async def test_an_unreadable_secret_means_later(start: Start) -> None:
    """While Postgres is away clients hear 4213 (try later), not 4001 (stop)."""
    failing = True

    async def read(tenant: str, /, *, refresh: bool = False) -> TokenKeys | None:
        if failing:
            raise StoreUnavailableError("away")
        return TokenKeys((SECRET,))

    kit = await start(read=read)
    assert await closed_with(await kit.client()) == 4213
    failing = False
    assert (await frame_of(await kit.client()))["type"] == "WELCOME"


async def test_a_known_secret_outlives_the_database() -> None:
    """Once read, a secret serves on while reads fail, however old it is."""
    calls = 0

    async def read(tenant: str, /, *, refresh: bool = False) -> TokenKeys | None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise StoreUnavailableError("away")
        return TokenKeys((SECRET,))

    async with running(ingress={"auth_cache_s": 0.0}) as start:
        kit = await start(read=read)
        for _ in range(3):
            assert (await frame_of(await kit.client()))["type"] == "WELCOME"
    assert calls == 3


async def test_expiry_ends_the_connection(start: Start) -> None:
    """4101 when `exp` passes on an open connection."""
    kit = await start()
    client = await connect(kit.url(token=token(ttl_s=0.05)), proxy=None)
    assert (await frame_of(client))["type"] == "WELCOME"
    assert await closed_with(client) == 4101


async def test_origins_are_matched_exactly(start: Start) -> None:
    """With a list, a request that sends another Origin is 403; one without Origin is no browser."""
    kit = await start(allowed_origins="https://a.example, https://b.example")
    for origin, allowed in {
        "https://a.example": True,
        "https://b.example": True,
        "https://a.example.evil": False,
        "http://a.example": False,
        "null": False,
        None: True,
    }.items():
        connecting = connect(kit.url(token=token()), origin=origin, proxy=None)  # type: ignore[arg-type]
        if allowed:
            assert (await frame_of(await connecting))["type"] == "WELCOME"
        else:
            with pytest.raises(InvalidStatus) as caught:
                await connecting
            assert caught.value.response.status_code == 403


async def test_too_many_connections_are_told_to_try_later(start: Start) -> None:
    """4213 after the handshake, and a place that becomes free is given again."""
    kit = await start(max_connections=2)
    clients = [await kit.client() for _ in range(2)]
    assert await closed_with(await kit.client()) == 4213
    await clients[0].close()
    await kit.shard.got(Detach)
    assert (await frame_of(await kit.client()))["type"] == "WELCOME"


async def test_a_bad_parameter_is_named_and_left_out(start: Start) -> None:
    """A malformed deviceId or position is told by ERROR; the connection serves without it."""
    kit = await start()
    for query, path in (
        ({"deviceId": "x" * 129}, "deviceId"),
        ({"epoch": "e"}, "lastSeq"),
        ({"epoch": "e", "lastSeq": "-1"}, "lastSeq"),
        ({"epoch": "e", "lastSeq": "1", "lastRev": "x"}, "lastRev"),
    ):
        client = await kit.client(**query)
        complaint = await frame_of(client)
        assert complaint["type"] == "ERROR"
        assert path in complaint["message"]
        assert (await frame_of(client))["type"] == "WELCOME"
    assert all(attach.epoch is None and 1 <= len(attach.device) <= 128 for attach in kit.shard.attaches)
    assert len({attach.device for attach in kit.shard.attaches}) == 4


# -- HTTP -----------------------------------------------------------------------------------------------


async def http(port: int, request: str) -> bytes:
    raw = await RawClient.open(port)
    raw.writer.write(request.encode())
    async with asyncio.timeout(30):
        answer = await raw.reader.read()
    await raw.end()
    return answer


async def test_plain_http(start: Start) -> None:
    """Load balancers ask /healthz; everything else gets a status that says what is wrong."""
    kit = await start()
    for request, status in {
        "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n": b"200 OK",
        "HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n": b"200 OK",
        "GET /healthz?x=1 HTTP/1.0\r\n\r\n": b"200 OK",
        "GET / HTTP/1.1\r\nHost: x\r\n\r\n": b"404 Not Found",
        "GET /notifications/ HTTP/1.1\r\nHost: x\r\n\r\n": b"404 Not Found",
        "GET /notifications/%ff HTTP/1.1\r\nHost: x\r\n\r\n": b"400 Bad Request",
        "GET /ws HTTP/1.1\r\nHost: x\r\n\r\n": b"426 Upgrade Required",
        "POST /ws HTTP/1.1\r\nHost: x\r\n\r\n": b"405 Method Not Allowed",
        "GET /ws?a=%ff HTTP/1.1\r\nHost: x\r\n\r\n": b"400 Bad Request",
        "GET /ws HTTP/1.1\r\nHost: x\r\nOrigin: a\r\nOrigin: b\r\n\r\n": b"400 Bad Request",
        f"GET /ws?{'x' * 9000} HTTP/1.1\r\n\r\n": b"414",
        f"GET /ws HTTP/1.1\r\nX: {'x' * 9000}\r\n\r\n": b"431",
        "GET /ws HTTP/1.1\r\n" + "X: y\r\n" * 4000: b"431",
    }.items():
        answer = await http(kit.port, request)
        assert answer.startswith(b"HTTP/1.1 " + status), (request[:60], answer[:200])
    assert (await http(kit.port, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")).endswith(b"\r\n\r\nok\n")
    assert await http(kit.port, "noise\r\n\r\n") == b""
    assert (await kit.gateway.status())["connections"] == 0


async def test_a_handshake_drop_by_drop_is_cut_off(start: Start) -> None:
    """A client that never finishes its request is gone after `handshake_timeout_s`, whatever it sends."""
    kit = await start(handshake_timeout_s=0.3)
    raw = await RawClient.open(kit.port)
    request = upgrade_request("/ws")
    sent = 0
    while sent < len(request) and not raw.reader.at_eof() and raw.reader.exception() is None:
        raw.writer.write(request[sent : sent + 1])
        sent += 1
        await asyncio.sleep(0.02)
    assert 0 < sent < len(request)
    await eventually(lambda: not kit.gateway._sockets)
    await raw.end()


async def test_a_request_in_two_pieces_is_one_request(start: Start) -> None:
    """The end of the head may be cut anywhere."""
    kit = await start()
    for cut in (1, 2, 3, 4, 40):
        raw = await RawClient.open(kit.port)
        request = upgrade_request(f"/ws?token={token()}")
        raw.writer.write(request[:-cut])
        await raw.writer.drain()
        await asyncio.sleep(0.01)
        raw.writer.write(request[-cut:])
        assert (await raw.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        assert json.loads((await raw.frame())[1])["type"] == "WELCOME"
        await raw.end()


async def test_a_taken_port_is_a_sentence(start: Start) -> None:
    """The error names the port and the setting."""
    kit = await start()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = kit.coordinator.settings.with_values(gateway={"port": port})
        other = Gateway(actor_config("gateway", "other", kit.coordinator, settings=settings))
        with pytest.raises(
            ClusterError, match=rf"port {port} of 127\.0\.0\.1 is taken.*CARILLON_GATEWAY_PORT"
        ):
            await other.start()


async def test_the_url_is_in_the_map(start: Start) -> None:
    """Clients find the gateway through the cluster map."""
    kit = await start()
    member = kit.coordinator.joined[kit.gateway.config.name]
    assert member.public == kit.gateway.url == f"ws://127.0.0.1:{kit.port}/ws"


async def test_a_page_that_fits_is_followed_at_once(start: Start) -> None:
    """SocketDrained is sent for once per page end while the socket keeps up."""
    kit = await start()
    await kit.client()
    attach = await kit.shard.attached()
    kit.shard.notify(1, replay=True)
    kit.shard.notify(2, replay=True, page_end=True)
    assert await kit.shard.got(SocketDrained) == SocketDrained(attach.conn)
    assert len(kit.shard.received(SocketDrained)) == 1
