from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import socket
import time
from collections.abc import AsyncIterator

import pytest
from websockets.asyncio.client import connect

from actors.gateway_connection import Connection
from carillon.messages import ClientAck, ClientReady, Detach, SocketDrained
from tests.actors.gateway_kit import (
    Kit,
    RawClient,
    Start,
    client_frame,
    closed_with,
    frame_of,
    running,
    token,
)
from tests.support import eventually


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    async with running() as starter:
        yield starter


def only(kit: Kit) -> Connection:
    (conn,) = kit.gateway._sockets
    return conn


def unsent(conn: Connection) -> int:
    transport = conn._transport
    return 0 if transport is None else transport.get_write_buffer_size()


# -- frames -----------------------------------------------------------------------------------------------


async def test_bad_frames_are_answered_and_the_connection_stays(start: Start) -> None:
    """ERROR says what was expected and echoes the id; the next frame is served as usual."""
    kit = await start()
    client = await kit.client()
    await frame_of(client)
    for bad, code, ref in (
        ("noise", "invalid", None),
        ('{"type":"NO","id":3}', "unknown_type", 3),
        ('{"type":"ACK","seq":"x","id":"a"}', "invalid", "a"),
        ('{"type":"SUBSCRIBE","topic":"","id":4}', "invalid", 4),
    ):
        await client.send(bad)
        answer = await frame_of(client)
        assert (answer["type"], answer["code"], answer["temporary"]) == ("ERROR", code, False)
        assert answer.get("id") == ref
    await client.send(b"\x80")
    assert "text" in (await frame_of(client))["message"]
    await client.send('{"type":"PING"}')
    assert (await frame_of(client))["type"] == "PONG"


async def test_ten_bad_frames_in_a_minute_end_the_connection(start: Start) -> None:
    """The tenth closes with 4003, after its ERROR."""
    kit = await start()
    client = await kit.client()
    await frame_of(client)
    for _ in range(10):
        await client.send("{}")
    answers = [await frame_of(client) for _ in range(10)]
    assert {answer["type"] for answer in answers} == {"ERROR"}
    assert await closed_with(client) == 4003


async def test_an_oversize_message_is_1009(start: Start) -> None:
    """65,536 bytes pass, one more does not; fragments count together."""
    kit = await start()
    client = await kit.client()
    await frame_of(client)
    ping = '{"type":"PING","pad":"' + "x" * (65_536 - 24) + '"}'
    assert len(ping) == 65_536
    await client.send(ping)
    assert (await frame_of(client))["type"] == "PONG"
    await client.send(ping + " ")
    assert await closed_with(client) == 1009
    fragments = await kit.client()
    await frame_of(fragments)
    await fragments.send(["x" * 40_000, "x" * 40_000])
    assert await closed_with(fragments) == 1009


async def test_fragments_make_one_message(start: Start) -> None:
    """A message in pieces, with a ping between and a character cut in two, is one message."""
    kit = await start()
    raw = await RawClient.upgraded(kit)
    await raw.frame()
    data = '{"type":"PING","id":"ü"}'.encode()
    cut = data.index("ü".encode()) + 1
    raw.writer.write(
        client_frame(data[:3], 1, fin=False)
        + client_frame(b"", 0, fin=False)
        + client_frame(data[3:cut], 0, fin=False)
        + client_frame(b"hello", 9)
        + client_frame(data[cut:], 0)
    )
    answers = dict([await raw.frame(), await raw.frame()])
    assert answers[0x8A] == b"hello"
    assert json.loads(answers[0x81]) == {"type": "PONG", "id": "ü"}
    await raw.end()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(client_frame(b'{"type":"\xff"}'), 1007, id="bad UTF-8"),
        pytest.param(client_frame(b'{"type":"PING","a":"\xed\xa0\x80"}'), 1007, id="surrogate in UTF-8"),
        pytest.param(client_frame(b'{"type":"PING"}', mask=False), 1002, id="not masked"),
        pytest.param(client_frame(b"", 0), 1002, id="continuation of nothing"),
        pytest.param(client_frame(b"a", fin=False) + client_frame(b"b"), 1002, id="interleaved"),
        pytest.param(client_frame(b"x", 3), 1002, id="unknown opcode"),
        pytest.param(client_frame(b"x" * 126, 9), 1002, id="long ping"),
        pytest.param(client_frame(b"x", 9, fin=False), 1002, id="fragmented ping"),
        pytest.param(b"\xc1" + client_frame(b"{}")[1:], 1002, id="reserved bit"),
        pytest.param(client_frame(b"\x03", 8), 1002, id="half a close code"),
        pytest.param(client_frame(b"\x03\xe8\xff", 8), 1007, id="close reason not UTF-8"),
        pytest.param(b"\x81\xff\xff\xff\xff\xff\xff\xff\xff\xff", 1009, id="huge length"),
    ],
)
async def test_violations_of_rfc_6455(start: Start, data: bytes, code: int) -> None:
    """Each ends the connection with the RFC's code, is detached, and leaves nothing behind."""
    kit = await start()
    raw = await RawClient.upgraded(kit)
    await raw.frame()
    raw.writer.write(data)
    assert await raw.close_code() == code
    assert (await kit.shard.got(Detach)).clean is False
    await raw.end()
    await eventually(lambda: not kit.gateway._sockets)


async def test_frames_may_be_cut_anywhere(start: Start) -> None:
    """One byte at a time gives the same messages."""
    kit = await start()
    raw = await RawClient.upgraded(kit)
    await raw.frame()
    for byte in client_frame(b'{"type":"PING","id":1}') + client_frame(b'{"type":"PING","id":2}'):
        raw.writer.write(bytes([byte]))
        await raw.writer.drain()
        await asyncio.sleep(0)
    assert [json.loads((await raw.frame())[1])["id"] for _ in range(2)] == [1, 2]
    await raw.end()


async def test_frames_in_the_packet_of_the_request(start: Start) -> None:
    """A client that does not wait for the answer of the handshake loses nothing."""
    kit = await start()
    raw = await RawClient.upgraded(kit, more=client_frame(b'{"type":"ACK","seq":5}'))
    assert json.loads((await raw.frame())[1])["type"] == "WELCOME"
    assert (await kit.shard.got(ClientAck)).seq == 5
    await raw.end()


async def test_noise_harms_nobody(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """Random bytes, random frames and cut-off frames end their own connection at most, and log no error."""
    kit = await start(frames_per_s=10_000, max_errors_per_minute=1000)
    seed = random.randrange(2**32)
    print("seed", seed)
    dice = random.Random(seed)
    bystander = await kit.client("bystander")
    await frame_of(bystander)
    for _ in range(150):
        raw = await RawClient.upgraded(kit)
        noise = b""
        for _ in range(dice.randrange(1, 12)):
            payload = dice.randbytes(dice.choice((0, 1, 5, 125, 126, 3000)))
            if dice.random() < 0.5:
                payload = json.dumps(dice.choice(({"type": "PING"}, [], {"type": "ACK", "seq": 1}))).encode()
            frame = client_frame(
                payload, dice.randrange(16), fin=dice.random() < 0.8, mask=dice.random() < 0.97
            )
            noise += frame[: dice.randrange(len(frame) + 1)] if dice.random() < 0.1 else frame
        raw.writer.write(dice.randbytes(200) if dice.random() < 0.2 else noise)
        if dice.random() < 0.5:
            await raw.writer.drain()
            await asyncio.sleep(0)
        raw.writer.close()
    await eventually(lambda: len(kit.gateway._sockets) == 1)
    await eventually(lambda: len(kit.shard.received(Detach)) == 150)
    await bystander.send('{"type":"PING"}')
    assert (await frame_of(bystander))["type"] == "PONG"
    assert (await kit.gateway.status())["connections"] == 1
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_client_that_is_gone_while_we_close_harms_nobody(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that breaks the protocol and drops its socket costs no other client of its user a frame."""
    kit = await start()
    bystander = await kit.client()
    await frame_of(bystander)
    for turn in range(1, 21):
        raw = await RawClient.upgraded(kit)
        await raw.frame()

        def break_off(raw: RawClient = raw) -> None:
            raw.writer.write(client_frame(b"x", 3))
            raw.writer.transport.abort()

        # In one turn of the loop the gateway reads this, finds the socket gone, and is given a frame.
        asyncio.get_running_loop().call_soon(break_off)
        kit.shard.notify(turn, kit.shard.attaches[-1], kit.shard.attaches[0])
        assert (await frame_of(bystander))["notification"]["seq"] == turn
    await kit.shard.got(Detach, 20)
    await eventually(lambda: len(kit.gateway._sockets) == 1)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


# -- rates ------------------------------------------------------------------------------------------------


async def test_excess_frames_wait_in_the_socket(start: Start) -> None:
    """Beyond the burst the rate holds: no error, no loss, and a bounded number parsed ahead."""
    kit = await start(frames_per_s=50)
    raw = await RawClient.upgraded(kit)
    await raw.frame()
    started = time.monotonic()
    raw.writer.write(
        b"".join(client_frame(json.dumps({"type": "PING", "id": n}).encode()) for n in range(100))
    )
    for n in range(100):
        assert json.loads((await raw.frame())[1])["id"] == n
    # All 100 fit into one slice that is parsed ahead; the debt is paid before anything else is read.
    raw.writer.write(client_frame(b'{"type":"PING","id":"last"}'))
    assert json.loads((await raw.frame())[1])["id"] == "last"
    assert time.monotonic() - started > 0.9, "101 frames at 50/s with a burst of 50 take a second"
    await raw.end()


async def test_a_flood_is_parsed_only_in_slices(start: Start) -> None:
    """What was read from the kernel before the pause stays bytes: it is not parsed before its time."""
    kit = await start(frames_per_s=10)
    raw = await RawClient.upgraded(kit)
    await raw.frame()
    frame = client_frame(b'{"type":"PING"}')
    raw.writer.write(frame * 5000)
    await eventually(lambda: only(kit)._paused)
    await asyncio.sleep(0.1)
    assert -only(kit)._rate.tokens < 4096 / len(frame) + 1
    raw.writer.transport.abort()


async def test_a_users_connections_share_a_rate(start: Start) -> None:
    """Two sockets of one user get no more together than its share; another user's socket is not slowed."""
    kit = await start(frames_per_s=1000, user_frames_per_s=50)
    mine = [await RawClient.upgraded(kit) for _ in range(2)]
    other = await RawClient.upgraded(kit, user="other")
    for raw in (*mine, other):
        await raw.frame()
    started = time.monotonic()
    for raw in mine:
        raw.writer.write(b"".join(client_frame(b'{"type":"PING"}') for _ in range(50)))
    for raw in mine:
        for _ in range(50):
            await raw.frame()
    other.writer.write(client_frame(b'{"type":"PING"}'))
    await other.frame()
    for raw in mine:
        raw.writer.write(client_frame(b'{"type":"PING","id":"last"}'))
        await raw.frame()
    assert time.monotonic() - started > 0.9, "102 frames at 50/s with a burst of 50 take a second"
    for raw in (*mine, other):
        await raw.end()
    await eventually(lambda: not len(kit.gateway._rates), what="the shares to be forgotten")


async def test_acknowledging_what_was_sent_is_free(start: Start) -> None:
    """As many ACKs as notifications cost nothing; further ones count as frames."""
    kit = await start(frames_per_s=10)
    client = await kit.client()
    await kit.shard.attached()
    for seq in range(1, 101):
        kit.shard.notify(seq)
    for _ in range(101):
        await frame_of(client)
    for seq in range(1, 101):
        await client.send(json.dumps({"type": "ACK", "seq": seq}))
    await kit.shard.got(ClientAck, 100)
    assert not only(kit)._paused
    for _ in range(30):
        await client.send(json.dumps({"type": "ACK", "seq": 1}))
    await eventually(lambda: only(kit)._paused)


# -- slow readers -------------------------------------------------------------------------------------------


def deaf(raw: RawClient) -> None:
    """Stop reading, with a small receive buffer."""
    transport = raw.writer.transport
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    transport.pause_reading()  # type: ignore[attr-defined]


async def test_a_slow_reader_is_closed_and_memory_stays_bounded(start: Start) -> None:
    """More than `max_buffer_bytes` of live frames unsent: 4208, detached, and nothing more is buffered."""
    limit = 200_000
    kit = await start(max_buffer_bytes=limit)
    raw = await RawClient.upgraded(kit)
    deaf(raw)
    await kit.shard.attached()
    conn = only(kit)
    most = 0
    seq = 0
    while not kit.shard.received(Detach):
        for _ in range(20):
            seq += 1
            kit.shard.notify(seq, text="x" * 5000)
        await asyncio.sleep(0)
        most = max(most, unsent(conn))
        assert seq < 10_000
    assert limit < most < limit + 20_000
    assert conn.seq < seq, "what was not written must not count as written"
    assert (await kit.gateway.status())["counters"]['gateway_closes{code="4208"}'] == 1
    # The reader wakes up within close_timeout_s: it gets what was buffered, in order, then the code.
    raw.writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert await raw.close_code() == 4208
    await raw.end()


async def test_a_reader_that_never_wakes_is_cut_off(start: Start) -> None:
    """After `close_timeout_s` the buffer of a slow reader is given back."""
    kit = await start(max_buffer_bytes=100_000, close_timeout_s=0.2)
    raw = await RawClient.upgraded(kit)
    deaf(raw)
    await kit.shard.attached()
    for seq in range(1, 2000):
        kit.shard.notify(seq, text="x" * 5000)
    await kit.shard.got(Detach)
    await eventually(lambda: not kit.gateway._sockets)
    raw.writer.transport.abort()


async def test_a_flood_of_pings_without_reading_is_bounded(start: Start) -> None:
    """Answers count as live frames, too: whoever asks without reading is closed."""
    kit = await start(max_buffer_bytes=20_000, frames_per_s=100_000)
    raw = await RawClient.upgraded(kit)
    deaf(raw)
    await kit.shard.attached()
    flood = client_frame(b"x" * 125, 9) * 500
    most = 0
    while not kit.shard.received(Detach):
        raw.writer.write(flood)
        await asyncio.sleep(0)
        if kit.gateway._sockets:
            most = max(most, unsent(only(kit)))
    assert most < 20_000 + 2 * 4096
    raw.writer.transport.abort()


async def test_replay_is_paced_and_does_not_count(start: Start) -> None:
    """A page larger than `max_buffer_bytes` closes nothing; the next is asked for when the buffer ran low."""
    kit = await start(max_buffer_bytes=100_000, low_buffer_bytes=20_000)
    raw = await RawClient.upgraded(kit)
    deaf(raw)
    attach = await kit.shard.attached()
    for seq in range(1, 2001):
        kit.shard.notify(seq, text="x" * 5000, replay=True, page_end=seq == 2000)
    kit.shard.notify(2001, text="live, behind the page")
    await eventually(lambda: only(kit).seq == 2001)
    assert unsent(only(kit)) > 1_000_000
    assert kit.shard.received(SocketDrained) == []
    raw.writer.transport.resume_reading()  # type: ignore[attr-defined]
    seqs = []
    while not seqs or seqs[-1] < 2001:
        _, payload = await raw.frame()
        frame = json.loads(payload)
        if frame["type"] == "NEW_NOTIFICATION":
            seqs.append(frame["notification"]["seq"])
    assert seqs == list(range(1, 2002))
    assert await kit.shard.got(SocketDrained) == SocketDrained(attach.conn)
    assert len(kit.shard.received(SocketDrained)) == 1
    await raw.end()


# -- heart-beat ---------------------------------------------------------------------------------------------


async def test_a_half_open_socket_is_found(start: Start) -> None:
    """A peer that answers no ping is detached and closed with 4212, and not before its time."""
    kit = await start(heartbeat_s=0.2, pong_timeout_s=0.2)
    raw = await RawClient.upgraded(kit)
    await raw.frame()
    started = time.monotonic()
    assert await raw.frame() == (0x89, b"")
    pinged = time.monotonic()
    assert await raw.close_code() == 4212
    assert time.monotonic() - started < 10, "minutes, if TCP were to find out"
    assert time.monotonic() - pinged > 0.05
    assert (await kit.shard.got(Detach)).clean is False
    await eventually(lambda: not kit.gateway._sockets)
    raw.writer.transport.abort()


async def test_whoever_answers_stays(start: Start) -> None:
    """Pongs, or any other frame, keep a connection open over many intervals."""
    kit = await start(heartbeat_s=0.1, pong_timeout_s=1.0)
    client = await kit.client()  # websockets answers pings
    raw = await RawClient.upgraded(kit)
    await raw.frame()
    for _ in range(10):
        assert await raw.frame() == (0x89, b"")
        raw.writer.write(client_frame(b"unasked", 10))
    await client.send('{"type":"PING"}')
    assert (await frame_of(client))["type"] == "WELCOME"
    assert (await frame_of(client))["type"] == "PONG"
    await raw.end()


async def test_a_stall_of_our_own_does_not_blame_the_client(start: Start) -> None:
    """After standing still for longer than `pong_timeout_s` the gateway reads before it judges."""
    kit = await start(heartbeat_s=0.2, pong_timeout_s=0.5)
    raw = await RawClient.upgraded(kit)
    await raw.frame()
    assert await raw.frame() == (0x89, b"")
    client = raw.writer.transport.get_extra_info("socket")

    class Stall(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            os.write(client.fileno(), client_frame(b"", 10))  # the pong comes while nobody reads
            time.sleep(1.0)
            over.set()

    over = asyncio.Event()
    here, there = socket.socketpair()
    transport, _ = await asyncio.get_running_loop().connect_accepted_socket(Stall, here)
    there.send(b"x")
    there.close()
    await over.wait()
    raw.writer.write(client_frame(b'{"type":"PING"}'))
    while (answer := await raw.frame()) == (0x89, b""):
        raw.writer.write(client_frame(b"", 10))
    assert answer == (0x81, b'{"type":"PONG"}')
    transport.close()
    await raw.end()


async def test_nobody_is_declared_dead_while_we_do_not_read(start: Start) -> None:
    """A throttled client's pong waits behind its frames: that is our doing, not its death."""
    kit = await start(heartbeat_s=0.1, pong_timeout_s=0.05, frames_per_s=20)
    client = await kit.client()
    await frame_of(client)
    for n in range(50):  # 30 more than the burst: 1.5 s of not reading
        await client.send(json.dumps({"type": "PING", "id": n}))
    await client.send('{"type":"PING","id":"last"}')
    while (await frame_of(client)).get("id") != "last":
        pass
    assert client.close_code is None


# -- drain -------------------------------------------------------------------------------------------------


async def test_drain_sends_everybody_away_spread_over_time(start: Start) -> None:
    """4201 for each connection, each in a slice of `drain_s` of its own; nobody new gets in."""
    kit = await start(drain_s=0.5)
    clients = [await kit.client() for _ in range(10)]
    raw = await RawClient.open(kit.port)  # in the middle of its handshake
    ends: list[float] = []

    async def watch(client: object) -> None:
        assert await closed_with(client) == 4201  # type: ignore[arg-type]
        ends.append(time.monotonic())

    watchers = [asyncio.create_task(watch(client)) for client in clients]
    await kit.shard.attached(10)
    started = time.monotonic()
    draining = asyncio.create_task(kit.gateway.drain())
    await eventually(lambda: kit.gateway._draining)
    with pytest.raises(OSError):
        await connect(kit.url(token=token()), proxy=None)
    await asyncio.gather(*watchers)
    await draining
    assert len(ends) == 10
    assert ends[-1] - started < 30
    slice_s = 0.5 / 11  # the one in its handshake has a slice, too
    assert [at for at, end in enumerate(ends) if end - started < slice_s * at - 0.01] == [], "a burst"
    await kit.shard.got(Detach, 10)
    await raw.end()


async def test_stop_leaves_nothing_behind(start: Start) -> None:
    """Connections get 1001, links and tasks are gone."""
    kit = await start()
    client = await kit.client()
    await frame_of(client)
    await kit.gateway.stop()
    assert await closed_with(client) == 1001
    await eventually(lambda: not kit.shard.shard.links)
    assert not kit.gateway._sockets


# -- a storm -----------------------------------------------------------------------------------------------


async def test_a_storm_of_connections_is_served(start: Start) -> None:
    """300 clients at once all get their WELCOME, and all move together when the shard dies."""
    kit = await start(shards=2)
    old, new = kit.shards
    raws = await asyncio.gather(*(RawClient.upgraded(kit, f"user-{n}") for n in range(300)))
    for raw in raws:
        assert json.loads((await raw.frame())[1])["type"] == "WELCOME"
        raw.writer.write(client_frame(b'{"type":"PING"}'))
    await old.got(ClientReady, 300)
    await old.shard.stop()
    kit.coordinator.set_owner(range(1024), new.name)
    await new.attached(300)
    assert len({attach.conn for attach in new.attaches}) == 300
    assert {(attach.reattach, attach.ready) for attach in new.attaches} == {(True, True)}
    for raw in raws:
        raw.writer.transport.abort()
