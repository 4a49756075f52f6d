"""A TCP proxy whose faults are switched while it runs: a network as bad as networks are.

TCP is kept honest: bytes are never taken out of the middle of a stream, for no network does that. What a
fault holds back is either delivered later, in order, or its connection never delivers anything again.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Callable, Sequence
from enum import Enum

Backend = tuple[str, int]


class NetworkFault(Enum):
    """What is wrong with the network."""

    NONE = "none"
    DROP = "drop"
    """Every connection is reset and new ones are refused."""
    HALF_OPEN = "half-open"
    """The present connections die without a word to the server: clients see a reset, the server a peer that
    takes nothing and says nothing, until the fault heals. New connections work: the client came back by
    another way."""
    PARTITION = "partition"
    """Nothing passes in either direction; what was sent arrives when the fault heals."""
    TO_SERVER = "to-server"
    """One way: nothing reaches the server, its own bytes still reach the clients."""
    TO_CLIENT = "to-client"
    """One way: nothing reaches the clients."""
    DELAY = "delay"
    """Everything comes `delay_s` later."""


class _Pair:
    """One proxied connection."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client = client
        self.server = server
        self.dead = False
        """Half-open: nothing is ever passed on again."""
        self.tasks: list[asyncio.Task[None]] = []

    def reset(self) -> None:
        """End both sides with RST."""
        for writer in (self.client, self.server):
            reset(writer)
        for task in self.tasks:
            task.cancel()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    transport = writer.transport
    sock = transport.get_extra_info("socket")
    if sock is not None and not transport.is_closing():
        with contextlib.suppress(OSError):
            # SO_LINGER on with 0 s: close() sends RST.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    transport.abort()


class Proxy:
    """Listens on loopback and passes connections on.

    Args:
        name: what faults and reports call it.
        backends: where to connect to, asked for each connection; one of them is taken at random.
        rng: of that choice.
    """

    def __init__(self, name: str, backends: Callable[[], Sequence[Backend]], rng: random.Random) -> None:
        self.name = name
        self.port = 0
        self.passed = 0
        """Connections passed on so far."""
        self.delay_s = 0.0
        self.fault = NetworkFault.NONE
        self._backends = backends
        self._rng = rng
        self._pairs: set[_Pair] = set()
        self._server: asyncio.Server | None = None
        self._open = {True: asyncio.Event(), False: asyncio.Event()}
        """By direction (True: to the server): set while bytes may pass."""
        for gate in self._open.values():
            gate.set()

    async def start(self) -> int:
        """Listen on any free port; returns it."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self.port

    async def close(self) -> None:
        """Stop listening and end every connection."""
        if self._server is not None:
            self._server.close()
        pairs = list(self._pairs)
        for pair in pairs:
            pair.reset()
        await asyncio.gather(*(task for pair in pairs for task in pair.tasks), return_exceptions=True)

    @property
    def connections(self) -> int:
        """Connections that are open now, half-open ones included."""
        return len(self._pairs)

    def inject(self, fault: NetworkFault, delay_s: float = 0.0) -> int:
        """Switch a fault on; returns how many connections it met."""
        self.heal()
        self.fault = fault
        met = len(self._pairs)
        if fault is NetworkFault.DROP:
            for pair in list(self._pairs):
                pair.reset()
        elif fault is NetworkFault.HALF_OPEN:
            for pair in self._pairs:
                pair.dead = True
                reset(pair.client)
        elif fault is NetworkFault.DELAY:
            self.delay_s = delay_s
        if fault in (NetworkFault.PARTITION, NetworkFault.TO_SERVER):
            self._open[True].clear()
        if fault in (NetworkFault.PARTITION, NetworkFault.TO_CLIENT):
            self._open[False].clear()
        return met

    def heal(self) -> None:
        """The network works again."""
        self.fault = NetworkFault.NONE
        self.delay_s = 0.0
        for gate in self._open.values():
            gate.set()
        for pair in list(self._pairs):
            if pair.dead:
                pair.reset()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.fault is NetworkFault.DROP:
            reset(writer)
            return
        backends = self._backends()
        if not backends:
            reset(writer)
            return
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._rng.choice(backends))
        except OSError:
            reset(writer)
            return
        if self.fault is NetworkFault.DROP:
            reset(writer)
            reset(server_writer)
            return
        self.passed += 1
        pair = _Pair(writer, server_writer)
        self._pairs.add(pair)
        pair.tasks = [
            asyncio.ensure_future(self._pump(pair, reader, server_writer, True)),
            asyncio.ensure_future(self._pump(pair, server_reader, writer, False)),
        ]
        try:
            await asyncio.gather(*pair.tasks)
        except asyncio.CancelledError:
            pass
        finally:
            for task in pair.tasks:
                task.cancel()
            self._pairs.discard(pair)
            for each in (writer, server_writer):
                each.transport.abort()

    async def _pump(
        self, pair: _Pair, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to_server: bool
    ) -> None:
        gate = self._open[to_server]
        try:
            while data := await reader.read(65536):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await gate.wait()
                if pair.dead:
                    break
                writer.write(data)
                await writer.drain()
            await gate.wait()
            if not pair.dead:
                with contextlib.suppress(OSError):
                    writer.write_eof()
        except OSError:
            if not pair.dead:
                pair.reset()
        if pair.dead:  # neither read nor closed: the peer's kernel keeps what it sends until the fault heals
            await asyncio.Event().wait()
