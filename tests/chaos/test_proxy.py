"""The proxy does to connections what its faults say, and never takes bytes out of the middle of a stream."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from tests.chaos.proxy import NetworkFault, Proxy
from tests.support import eventually

PATIENCE_S = 0.2
"""How long to wait for bytes that must not come."""


class Echo:
    """A server that sends back what it gets, and counts how its connections end."""

    def __init__(self) -> None:
        self.got = b""
        self.ended: list[str] = []
        self.port = 0
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            while data := await reader.read(1024):
                self.got += data
                writer.write(data)
            self.ended.append("end")
        except ConnectionResetError:
            self.ended.append("reset")
        finally:
            writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    server = Echo()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    yield server
    listener.close()
    for writer in server.writers:
        writer.transport.abort()
    await asyncio.sleep(0)


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[Proxy]:
    between = Proxy("test", lambda: [("127.0.0.1", echo.port)], random.Random(1))
    await between.start()
    yield between
    await between.close()


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def ends(proxy: Proxy) -> AsyncIterator[Ends]:
    """A connection through the proxy that has worked once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    yield reader, writer
    writer.transport.abort()


async def nothing_comes(reader: asyncio.StreamReader) -> bool:
    try:
        await asyncio.wait_for(reader.readexactly(1), PATIENCE_S)
    except TimeoutError:
        return True
    return False


async def test_drop_resets_and_refuses(proxy: Proxy, echo: Echo, ends: Ends) -> None:
    """DROP resets both sides of every connection, refuses new ones, and healing lets them in again."""
    assert proxy.inject(NetworkFault.DROP) == 1
    with pytest.raises(ConnectionResetError):
        await ends[0].readexactly(1)
    await eventually(lambda: echo.ended, what="the server's side ends")
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    writer.transport.abort()
    proxy.heal()
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"x")
    assert await reader.readexactly(1) == b"x"
    writer.transport.abort()


async def test_half_open_tells_the_server_nothing(proxy: Proxy, echo: Echo, ends: Ends) -> None:
    """HALF_OPEN resets the client's side alone; new connections work; the server's side ends on healing."""
    proxy.inject(NetworkFault.HALF_OPEN)
    with pytest.raises(ConnectionResetError):
        await ends[0].readexactly(1)
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"x")
    assert await reader.readexactly(1) == b"x"
    assert echo.ended == []
    proxy.heal()
    await eventually(lambda: echo.ended, what="the dead connection ends")
    writer.write(b"y")
    assert await reader.readexactly(1) == b"y"
    writer.transport.abort()


@pytest.mark.parametrize(
    ("fault", "arrives"),
    [(NetworkFault.PARTITION, False), (NetworkFault.TO_SERVER, False), (NetworkFault.TO_CLIENT, True)],
)
async def test_what_is_held_back_comes_later(
    proxy: Proxy, echo: Echo, ends: Ends, fault: NetworkFault, arrives: bool
) -> None:
    """A partition holds bytes back in its direction, whole and in order, until it heals."""
    proxy.inject(fault)
    ends[1].write(b"one")
    assert await nothing_comes(ends[0])
    if arrives:
        await eventually(lambda: echo.got == b"helloone")
    assert echo.got == (b"helloone" if arrives else b"hello")
    ends[1].write(b"two")
    assert await nothing_comes(ends[0])
    proxy.heal()
    assert await ends[0].readexactly(6) == b"onetwo"


async def test_delay_delays(proxy: Proxy, ends: Ends) -> None:
    """DELAY holds each direction for so long, in order."""
    proxy.inject(NetworkFault.DELAY, PATIENCE_S)
    ends[1].write(b"one")
    assert await nothing_comes(ends[0])
    assert await ends[0].readexactly(3) == b"one"


async def test_an_end_is_passed_on(proxy: Proxy, echo: Echo, ends: Ends) -> None:
    """Without a fault the end of a stream is an end, not a reset, and no connection is left behind."""
    ends[1].write_eof()
    assert await ends[0].read() == b""
    assert echo.ended == ["end"]
    await eventually(lambda: proxy.connections == 0, what="the pair is forgotten")
