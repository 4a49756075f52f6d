"""Links: framing, handshake, requests, bounds, failure; on asyncio's loop and on uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import struct
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgpack
import pytest

from actors.link import Link, LinkClient, LinkServer, dial, handshake_proof
from carillon.errors import (
    BusyError,
    LinkClosedError,
    LinkFrameError,
    LinkHandshakeError,
    LinkTimeoutError,
    NotOwnerError,
    RemoteError,
)
from carillon.messages import Address, Change, Done, Event, Outcome, Outcomes, PresenceQuery, Publish
from carillon.settings import LinkSettings
from tests.support import eventually

SECRET = b"a secret that both ends know"
FAST = {
    "handshake_timeout_s": 10.0,
    "request_timeout_s": 30.0,
    "reconnect_min_s": 0.01,
    "reconnect_max_s": 0.05,
}


def settings(**values: Any) -> LinkSettings:
    return LinkSettings(**{**FAST, **values})


class Recorder:
    """Remembers; answers requests with `answer`, or not at all."""

    def __init__(self, answer: Callable[[Link, Any, int], None] | None = None) -> None:
        self.answer = answer
        self.messages: list[Any] = []
        self.requests: list[int] = []
        self.opened: list[Link] = []
        self.closed: list[Link] = []
        self.reads = 0

    def link_opened(self, link: Link) -> None:
        self.opened.append(link)

    def link_closed(self, link: Link) -> None:
        self.closed.append(link)

    def receive(self, link: Link, message: Any, request: int) -> None:
        self.messages.append(message)
        self.requests.append(request)
        if self.answer is not None:
            self.answer(link, message, request)

    def read_finished(self, link: Link) -> None:
        self.reads += 1


def echo(link: Link, message: Any, request: int) -> None:
    link.reply_nowait(request, message)


class Pair:
    """A server and what dials it, closed at the end of the test."""

    def __init__(self) -> None:
        self._closers: list[Any] = []
        self.addresses: list[Address] = []

    async def serve(
        self, handler: Recorder, secret: bytes = SECRET, name: str = "server", **values: Any
    ) -> Address:
        server = LinkServer(handler, settings(**values), name, secret)
        host, port = await server.start("127.0.0.1", 0)
        self._closers.append(server.close)
        return Address(host, port)

    async def dial(self, address: Address, handler: Recorder | None = None, **values: Any) -> Link:
        link = await dial(address, handler or Recorder(), settings(**values), "client", SECRET)

        async def close() -> None:
            link.close()

        self._closers.append(close)
        return link

    async def raw(self, address: Address) -> Stranger:
        reader, writer = await asyncio.open_connection(address.host, address.port)
        stranger = Stranger(reader, writer)
        self._closers.append(stranger.close)
        return stranger

    async def close(self) -> None:
        for close in reversed(self._closers):
            await close()


class Stranger:
    """The other end, written from docs/reference/links.md alone with an independent MessagePack library."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def shake(self, secret: bytes = SECRET, name: bytes = b"stranger", version: int = 1) -> None:
        nonce = os.urandom(32)
        self.writer.write(b"CRLN" + struct.pack(">HH", version, len(name)) + nonce + name)
        head = await self.reader.readexactly(40)
        assert head[:4] == b"CRLN"
        theirs = await self.reader.readexactly(int.from_bytes(head[6:8], "big"))

        def proof(role: bytes, checker: tuple[bytes, bytes], sender: tuple[bytes, bytes]) -> bytes:
            text = b"CRLN" + struct.pack(">H", 1) + role + checker[0] + sender[0]
            text += (
                struct.pack(">H", len(sender[1]))
                + sender[1]
                + struct.pack(">H", len(checker[1]))
                + checker[1]
            )
            return hmac.new(secret, text, hashlib.sha256).digest()

        us, them = (nonce, name), (head[8:40], theirs)
        self.writer.write(proof(b"D", them, us))
        assert await self.reader.readexactly(32) == proof(b"L", us, them)

    def send(self, envelope: Any) -> None:
        data = msgpack.packb(envelope)
        self.writer.write(struct.pack(">I", len(data)) + data)

    async def read(self) -> Any:
        """The next envelope that is no Ping."""
        while True:
            (size,) = struct.unpack(">I", await self.reader.readexactly(4))
            envelope = msgpack.unpackb(await self.reader.readexactly(size))
            if envelope != [0, [91]]:
                return envelope

    async def end(self) -> bool:
        """True once the other end has closed."""
        try:
            async with asyncio.timeout(30):
                while await self.reader.read(65536):
                    pass
        except ConnectionError:
            pass
        return True

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = Pair()
    yield pair
    await pair.close()


# -- messages -------------------------------------------------------------------------------------------


async def test_requests_and_one_way_messages_arrive_in_order(pair: Pair):
    """A thousand messages of both kinds keep their order; each request gets its own answer."""
    handler = Recorder(echo)
    link = await pair.dial(await pair.serve(handler))
    futures = []
    for n in range(1000):
        if n % 3:
            futures.append(link.request_nowait(Done(n)))
        else:
            link.send_nowait(Done(n))
    answers = await asyncio.gather(*futures)
    assert [m.count for m in handler.messages] == list(range(1000))
    assert [a.count for a in answers] == [n for n in range(1000) if n % 3]
    assert handler.reads < 1000, "messages of one chunk are one read"
    assert link.peer == "server"
    assert handler.opened[0].peer == "client"


async def test_both_ends_may_ask(pair: Pair):
    """The listening end sends requests over the same link, also while it answers one."""
    server, client = Recorder(echo), Recorder(echo)
    link = await pair.dial(await pair.serve(server), client)
    await eventually(lambda: server.opened)
    one, two = await asyncio.gather(link.request(Done(1)), server.opened[0].request(Done(2)))
    assert (one.count, two.count) == (1, 2)


async def test_stranger_with_another_library(pair: Pair):
    """An end written by hand from the wire contract is understood, and understands."""

    def answer(link: Link, message: Any, request: int) -> None:
        event = message.events[0]
        link.reply_nowait(request, Outcomes([Outcome(event.id, 7, "delivered", ["in_app"])]))

    handler = Recorder(answer)
    stranger = await pair.raw(await pair.serve(handler))
    await stranger.shake()
    ident = bytes(range(16))
    event = [
        ident,
        "t",
        "u",
        5,
        "chat",
        None,
        1,
        '"type":"chat"',
        1700,
        None,
        ["in_app"],
    ]  # trailing ones left out
    stranger.send([1, [1, [event]]])
    assert await stranger.read() == [
        -1, [2, [[ident, 7, "delivered", ["in_app"], False, None, None, None, 0.0]]],
    ]  # fmt: skip
    assert handler.messages == [
        Publish([Event(ident, "t", "u", 5, "chat", None, 1, '"type":"chat"', 1700, channels=["in_app"])])
    ]
    handler.opened[0].send_nowait(Change("t", "u", 5, "read"))
    assert await stranger.read() == [0, [3, "t", "u", 5, "read", [], None, None, False]]


async def test_documented_bytes_of_a_ping(pair: Pair):
    """The example of the wire contract is what an idle link sends."""
    stranger = await pair.raw(await pair.serve(Recorder(), heartbeat_s=0.05))
    await stranger.shake()
    assert await stranger.reader.readexactly(8) == bytes.fromhex("00000004 9200915b")


async def test_newer_fields_are_ignored(pair: Pair):
    """A peer of a later version may append fields to messages and to the envelope."""
    handler = Recorder(echo)
    stranger = await pair.raw(await pair.serve(handler))
    await stranger.shake()
    stranger.send([1, [8, 3, "new field"], "new element"])
    assert await stranger.read() == [-1, [8, 3]]


@pytest.mark.parametrize(
    "body", [[77, "of a later version"], [8, "no integer"], "no array", [4], 12, {"a": 1}], ids=repr
)
async def test_a_body_that_cannot_be_read_fails_alone(pair: Pair, body: Any):
    """A request of unknown form gets a failure, a one-way one is dropped; the next still works."""
    handler = Recorder(echo)
    stranger = await pair.raw(await pair.serve(handler))
    await stranger.shake()
    stranger.send([0, body])
    stranger.send([1, body])
    stranger.send([2, [8, 5]])
    failure = await stranger.read()
    assert failure[0] == -1
    assert failure[1][:2] == [90, "link_frame"]
    assert await stranger.read() == [-2, [8, 5]]
    assert [m.count for m in handler.messages] == [5]
    assert handler.opened[0].undecodable == 1


async def test_an_answer_that_cannot_be_read_fails_its_request(pair: Pair):
    """The requester learns at once, and the link goes on."""
    handler = Recorder()
    stranger = await pair.raw(await pair.serve(handler))
    await stranger.shake()
    await eventually(lambda: handler.opened)
    link = handler.opened[0]
    first, second = link.request_nowait(Done(1)), link.request_nowait(Done(2))
    stranger.send([-1, [77]])
    stranger.send([-2, [8, 9]])
    with pytest.raises(LinkFrameError):
        await first
    assert (await second).count == 9


@pytest.mark.parametrize("frame", [b"\xc1", b"", b"\x92", b"\x91\xa1x", b"\x92\xc0\xc0"], ids=repr)
async def test_nonsense_closes_the_link(pair: Pair, frame: bytes):
    """A frame whose envelope cannot be read at all ends the link, and what came before it is handled."""
    handler = Recorder()
    stranger = await pair.raw(await pair.serve(handler))
    await stranger.shake()
    good = msgpack.packb([0, [8, 1]])
    stranger.writer.write(struct.pack(">I", len(good)) + good + struct.pack(">I", len(frame)) + frame)
    assert await stranger.end()
    await eventually(lambda: handler.closed)
    assert handler.messages == [Done(1)]
    assert handler.reads == 1


async def test_oversize_frame_closes_the_link_before_it_is_read(pair: Pair):
    """The length alone is enough: nothing is gathered for a frame beyond the limit."""
    handler = Recorder()
    stranger = await pair.raw(await pair.serve(handler, max_frame_bytes=65536))
    await stranger.shake()
    stranger.writer.write(struct.pack(">I", 65537))
    assert await stranger.end()
    await eventually(lambda: handler.closed)


async def test_frames_cut_anywhere(pair: Pair):
    """A stream that comes byte by byte gives the same messages."""
    handler = Recorder(echo)
    stranger = await pair.raw(await pair.serve(handler))
    await stranger.shake()
    data = b""
    for n in range(3):
        body = msgpack.packb([n + 1, [8, n]])
        data += struct.pack(">I", len(body)) + body
    for at in range(len(data)):
        stranger.writer.write(data[at : at + 1])
        await stranger.writer.drain()
        await asyncio.sleep(0)
    assert [await stranger.read() for _ in range(3)] == [[-n - 1, [8, n]] for n in range(3)]


async def test_a_large_message_in_many_chunks(pair: Pair):
    """Several megabytes arrive whole."""
    link = await pair.dial(await pair.serve(Recorder(echo)))
    query = PresenceQuery("t", [f"user-{n}" * 10 for n in range(50_000)])
    assert await link.request(query) == query


async def test_end_of_stream_inside_a_frame(pair: Pair):
    """A frame of which a part is missing is no message."""
    handler = Recorder()
    stranger = await pair.raw(await pair.serve(handler))
    await stranger.shake()
    stranger.writer.write(struct.pack(">I", 100) + b"\x92\x00")
    await stranger.close()
    await eventually(lambda: handler.closed)
    assert handler.messages == []


# -- handshake ------------------------------------------------------------------------------------------


async def test_wrong_secret_is_refused_by_both(pair: Pair):
    """Neither end opens a link to one that does not know the secret."""
    handler, mine = Recorder(), Recorder()
    address = await pair.serve(handler, secret=b"another secret")
    with pytest.raises(LinkHandshakeError, match="does not know the cluster secret"):
        await pair.dial(address, mine)
    assert (handler.opened, mine.opened) == ([], [])


async def test_a_name_that_was_not_dialled_is_refused(pair: Pair):
    """A port that another actor got after a crash is not mistaken for the actor that had it."""
    address = await pair.serve(Recorder(), name="shard-b")
    with pytest.raises(LinkHandshakeError, match="expected shard-a here, found shard-b"):
        await dial(address, Recorder(), settings(), "client", SECRET, peer="shard-a")


@pytest.mark.parametrize(
    "hello",
    [
        b"GET / HTTP/1.1\r\n",
        b"C",
        b"CRLX",
        b"CRLN" + struct.pack(">HH", 2, 1) + bytes(33),
        b"CRLN" + struct.pack(">HH", 1, 0) + bytes(32),
        b"CRLN" + struct.pack(">HH", 1, 60_000) + bytes(32),
        b"CRLN" + struct.pack(">HH", 1, 1) + bytes(32) + b"\xff",
        b"CRLN" + struct.pack(">HH", 1, 1) + bytes(32) + b"x" + bytes(32),
    ],
    ids=["http", "cut", "magic", "version", "no name", "long name", "name not utf-8", "wrong proof"],
)
async def test_bad_handshakes_are_dropped(pair: Pair, hello: bytes):
    """Another protocol, another version, a bad name, a bad proof or silence: closed, and never opened."""
    handler = Recorder()
    stranger = await pair.raw(await pair.serve(handler, handshake_timeout_s=0.2))
    stranger.writer.write(hello)
    assert await stranger.end()
    assert handler.opened == []


async def test_reflection_is_refused(pair: Pair):
    """A peer without the secret that sends back our own bytes proves nothing."""
    handler = Recorder()
    stranger = await pair.raw(await pair.serve(handler))
    for size in (46, 32):
        stranger.writer.write(await stranger.reader.readexactly(size))
    assert await stranger.end()
    assert handler.opened == []


def test_proof_tells_names_apart():
    """Names that give the same text when joined give different proofs."""
    nonces = {"nonce": bytes(32), "peer_nonce": bytes(32)}
    one = handshake_proof(SECRET, dialled=True, name=b"ab", peer_name=b"c", **nonces)
    two = handshake_proof(SECRET, dialled=True, name=b"a", peer_name=b"bc", **nonces)
    assert one != two


async def test_an_empty_secret_is_refused():
    """A cluster without a secret would let everybody in."""
    with pytest.raises(ValueError, match="secret"):
        LinkServer(Recorder(), settings(), "server", b"")


async def test_version_of_the_listener_is_told(pair: Pair):
    """The dialling end says which version it found."""

    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"CRLN" + struct.pack(">HH", 9, 1) + bytes(33))
        await reader.read()
        writer.close()

    async with await asyncio.start_server(other, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        with pytest.raises(LinkHandshakeError, match="expected link version 1, got 9"):
            await pair.dial(Address(host, port))


# -- failure --------------------------------------------------------------------------------------------


async def test_death_of_the_peer_fails_requests_at_once(pair: Pair):
    """Nobody waits for a deadline when the stream is gone; every request has an exception of its own."""
    handler = Recorder()
    mine = Recorder()
    link = await pair.dial(await pair.serve(handler), mine)
    futures = [link.request_nowait(Done(n), 60.0) for n in range(3)]
    await eventually(lambda: len(handler.messages) == 3)
    started = time.monotonic()
    handler.opened[0].abort(LinkClosedError("killed"))
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert time.monotonic() - started < 30
    assert all(type(r) is LinkClosedError for r in results)
    assert len({id(r) for r in results}) == 3
    assert mine.closed == [link]
    with pytest.raises(LinkClosedError):
        link.send_nowait(Done())
    with pytest.raises(LinkClosedError):
        await link.request(Done())


async def test_exception_of_the_handler_is_an_answer(pair: Pair):
    """One message that fails to be handled costs its own request only; our errors keep their code."""

    def answer(link: Link, message: Any, request: int) -> None:
        if message.count == 1:
            raise KeyError("oops")
        if message.count == 2:
            raise NotOwnerError("elsewhere", 0.25)
        link.reply_nowait(request, message)

    link = await pair.dial(await pair.serve(Recorder(answer)))
    with pytest.raises(RemoteError) as caught:
        await link.request(Done(1))
    assert (caught.value.code, caught.value.temporary) == ("internal", False)
    with pytest.raises(RemoteError) as caught:
        await link.request(Done(2))
    assert (caught.value.code, caught.value.temporary, caught.value.retry_after_s) == ("moved", True, 0.25)
    assert (await link.request(Done(3))).count == 3


async def test_handler_closes_the_link_while_messages_wait(pair: Pair):
    """Messages behind the one that made the handler close are not handed over, and nothing breaks."""

    def answer(link: Link, message: Any, request: int) -> None:
        if message.count == 1:
            link.close()

    handler = Recorder(answer)
    link = await pair.dial(await pair.serve(handler))
    for n in range(10):
        link.send_nowait(Done(n))
    await link.wait_closed()
    assert [m.count for m in handler.messages] == [0, 1]
    assert len(handler.closed) == 1


async def test_close_sends_what_was_written(pair: Pair):
    """Messages written just before `close` arrive."""
    handler = Recorder()
    link = await pair.dial(await pair.serve(handler))
    link.send_nowait(Done(1))
    link.close()
    await eventually(lambda: handler.closed)
    assert handler.messages == [Done(1)]


# -- deadlines ------------------------------------------------------------------------------------------


async def test_deadlines_of_different_lengths(pair: Pair):
    """Each request fails at its own deadline, a late answer is ignored, and the link goes on."""
    handler = Recorder()
    link = await pair.dial(await pair.serve(handler))
    started = time.monotonic()
    waits = (0.3, 0.1, 60.0, 0.2)
    futures = [link.request_nowait(Done(n), wait) for n, wait in enumerate(waits)]
    took: dict[float, float] = {}
    for wait, future in zip(waits, futures, strict=True):
        future.add_done_callback(lambda _, w=wait: took.__setitem__(w, time.monotonic() - started))
    for index in (0, 1, 3):
        with pytest.raises(LinkTimeoutError):
            await futures[index]
    for wait in (0.1, 0.2, 0.3):
        assert wait - 0.01 <= took[wait] < 30
    for number, message in zip(handler.requests, handler.messages, strict=True):
        handler.opened[0].reply_nowait(number, message)
    assert (await futures[2]).count == 2
    assert link.in_flight() == 0


async def test_requests_leave_no_timers_behind(pair: Pair):
    """Ten thousand answered requests with long deadlines leave a handful of timers, not one each."""
    loop = asyncio.get_running_loop()
    if not hasattr(loop, "_scheduled"):
        pytest.skip("uvloop does not show its timers")
    link = await pair.dial(await pair.serve(Recorder(echo)))
    for _ in range(10):
        await asyncio.gather(*(link.request_nowait(Done(), 60.0) for _ in range(1000)))
    assert len(loop._scheduled) < 20


async def test_cancelled_request_counts_until_its_answer(pair: Pair):
    """The peer still works on it, so it stays in flight; its answer then ends it without harm."""
    handler = Recorder()
    link = await pair.dial(await pair.serve(handler, max_in_flight=2), max_in_flight=2)
    task = asyncio.ensure_future(link.request(Done(1)))
    await eventually(lambda: handler.messages)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert link.in_flight() == 1
    other = link.request_nowait(Done(2))
    with pytest.raises(BusyError):
        link.request_nowait(Done(3))
    await eventually(lambda: len(handler.messages) == 2)
    for number in handler.requests:
        handler.opened[0].reply_nowait(number, Done(number))
    assert (await other).count == 2
    assert link.in_flight() == 0


async def test_cancelled_request_ends_at_its_deadline(pair: Pair):
    """A request given up, and never answered, does not stay for ever."""
    link = await pair.dial(await pair.serve(Recorder()))
    future = link.request_nowait(Done(1), 0.05)
    future.cancel()
    await eventually(lambda: link.in_flight() == 0)


# -- bounds ---------------------------------------------------------------------------------------------


async def test_a_peer_that_stops_reading_makes_sends_fail_as_busy(pair: Pair):
    """At the bound sends raise BusyError and memory stays there; when the peer reads again, all arrives."""
    handler = Recorder()
    limit = 1 << 20
    address = await pair.serve(handler, max_outbound_bytes=limit, dead_after_s=60.0)
    stranger = await pair.raw(address)
    await stranger.shake()
    await eventually(lambda: handler.opened)
    link = handler.opened[0]
    stranger.reader._transport.pause_reading()  # type: ignore[attr-defined]
    sent = 0
    text = "x" * 10_000

    def fill() -> bool:
        nonlocal sent
        try:
            while True:
                link.send_nowait(PresenceQuery(text, []))
                sent += 1
        except BusyError:
            return link.outbound_bytes() > limit - 2 * len(text)

    await eventually(fill)
    for _ in range(20):  # the kernel's buffers are full by now: nothing more fits
        await asyncio.sleep(0)
    fill()
    assert link.outbound_bytes() <= limit
    with pytest.raises(BusyError):
        link.request_nowait(PresenceQuery(text, []))
    assert link.in_flight() == 0
    stranger.reader._transport.resume_reading()  # type: ignore[attr-defined]
    for _ in range(sent):
        assert (await stranger.read())[1][0] == 9
    link.send_nowait(Done())


async def test_a_peer_that_asks_and_never_reads_is_dropped(pair: Pair):
    """Answers cannot be refused, so at twice the bound the link ends instead of the memory."""
    big = PresenceQuery("x" * 50_000, [])
    handler = Recorder(lambda link, message, request: link.reply_nowait(request, big))
    stranger = await pair.raw(await pair.serve(handler, max_outbound_bytes=1 << 18, dead_after_s=60.0))
    await stranger.shake()
    stranger.reader._transport.pause_reading()  # type: ignore[attr-defined]
    for n in range(400):
        stranger.send([n + 1, [8, n]])
    await eventually(lambda: handler.closed)


async def test_a_message_that_cannot_be_sent_fails_alone(pair: Pair):
    """Too long or not encodable: the caller is told, and messages before and after it arrive."""
    handler = Recorder(echo)
    link = await pair.dial(await pair.serve(handler), max_frame_bytes=65536)
    link.send_nowait(Done(1))
    with pytest.raises(LinkFrameError, match="exceeds"):
        link.send_nowait(PresenceQuery("x" * 70_000, []))
    with pytest.raises(LinkFrameError, match="cannot encode"):
        link.request_nowait(PresenceQuery("\ud800", []))
    with pytest.raises(LinkFrameError, match="cannot encode"):
        link.send_nowait(Done(1 << 70))
    assert link.in_flight() == 0
    assert (await link.request(Done(2))).count == 2
    assert handler.messages == [Done(1), Done(2)]


async def test_an_answer_that_cannot_be_sent_is_a_failure(pair: Pair):
    """The requester does not wait for its deadline when the answer is too long."""
    big = PresenceQuery("x" * 70_000, [])
    handler = Recorder(lambda link, message, request: link.reply_nowait(request, big))
    link = await pair.dial(await pair.serve(handler, max_frame_bytes=65536))
    with pytest.raises(RemoteError, match="exceeds the frame limit"):
        await link.request(Done(1))


# -- keep-alive -----------------------------------------------------------------------------------------


async def test_an_idle_link_stays_and_a_silent_peer_is_dropped(pair: Pair):
    """Pings keep an idle link; a peer that sends nothing is closed after `dead_after_s`."""
    times = {"heartbeat_s": 0.05, "dead_after_s": 0.3}
    handler = Recorder()
    address = await pair.serve(handler, **times)
    link = await pair.dial(address, **times)
    stranger = await pair.raw(address)
    await stranger.shake()
    silent = asyncio.get_running_loop().time()
    assert await stranger.end()
    assert asyncio.get_running_loop().time() - silent >= 0.25
    assert not link.closed
    assert len(handler.closed) == 1


async def test_a_stall_of_our_own_does_not_blame_the_peer(pair: Pair):
    """After a pause longer than `dead_after_s` of this very process, the link is still there."""
    times = {"heartbeat_s": 0.1, "dead_after_s": 0.3}
    handler = Recorder(echo)
    link = await pair.dial(await pair.serve(handler, **times), **times)
    assert await link.request(Done(1))
    time.sleep(0.6)  # the loop stands still, as after SIGSTOP
    assert (await link.request(Done(2))).count == 2
    assert not link.closed
    assert handler.closed == []


# -- dialling -------------------------------------------------------------------------------------------


async def test_unix_socket_is_used_on_the_same_machine(pair: Pair, tmp_path: Any):
    """With the same machine id the socket is dialled; when its file is missing, TCP."""
    handler = Recorder(echo)
    server = LinkServer(handler, settings(), "server", SECRET)
    path = str(tmp_path / "s")
    host, port = await server.start("127.0.0.1", 0, path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    try:
        link = await dial(Address("127.0.0.1", 1, path, "m"), Recorder(), settings(), "client", SECRET, "m")
        assert (await link.request(Done(1))).count == 1
        link.close()
        gone = Address(host, port, str(tmp_path / "gone"), "m")
        link = await dial(gone, Recorder(), settings(), "client", SECRET, "m")
        assert (await link.request(Done(2))).count == 2
        link.close()
        with pytest.raises(LinkClosedError):
            await dial(Address("127.0.0.1", 1, path, "m"), Recorder(), settings(), "client", SECRET, "other")
    finally:
        await server.close()


async def test_a_socket_left_by_a_crash_is_replaced(tmp_path: Any):
    """The next start listens at the same path."""
    path = str(tmp_path / "s")
    first = LinkServer(Recorder(), settings(), "server", SECRET)
    await first.start("127.0.0.1", 0, path)
    await first.close()
    second = LinkServer(Recorder(echo), settings(), "server", SECRET)
    await second.start("127.0.0.1", 0, path)
    link = await dial(Address("127.0.0.1", 1, path, "m"), Recorder(), settings(), "client", SECRET, "m")
    assert (await link.request(Done(1))).count == 1
    link.close()
    await second.close()


async def test_client_dials_again(pair: Pair):
    """A client finds its lost peer again, whatever `resolve` and `on_open` raise meanwhile."""
    handler = Recorder(echo)
    address = await pair.serve(handler)
    trouble: list[BaseException] = [RuntimeError("resolve"), ValueError("again"), LinkClosedError("nobody")]
    joined: list[Link] = []

    async def resolve() -> Address | None:
        if trouble:
            raise trouble.pop()
        return address

    async def on_open(link: Link) -> None:
        joined.append(link)
        if len(joined) == 1:
            raise RuntimeError("joining failed")

    client = LinkClient(resolve, Recorder(), settings(), "client", SECRET, peer="server", on_open=on_open)
    with pytest.raises(LinkClosedError):
        client.open_link()
    client.start()
    await eventually(lambda: client.link)
    assert len(joined) == 2
    first = client.open_link()
    handler.opened[-1].abort(LinkClosedError("killed"))
    await eventually(lambda: client.link is not None and client.link is not first)
    assert (await client.open_link().request(Done(4))).count == 4
    await client.close()
    assert client.link is None
