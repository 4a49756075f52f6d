"""Streams between nodes: delay, bounded buffers, broken and half-open connections.

Bytes of one connection arrive in order; connections do not wait for each other, so messages of two links
overtake each other as they do in life. A broken connection loses what was on its way.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from typing import Any

from tests.simulation.loop import NODE, Node, SimLoop

KERNEL_BYTES = 65_536
"""What a socket's buffers take before the sender sees that nobody reads."""


class Stream(asyncio.Transport):
    """One end of a connection."""

    def __init__(self, network: Network, node: Node) -> None:
        super().__init__()
        self.network = network
        self.loop = network.loop
        self.node = node
        self.peer: Stream
        self.protocol: Any = None
        self.delay_s = 0.001
        self.cut = False  # what we write is lost, nobody is told: a half-open connection
        self._arrivals: deque[tuple[float, bytes | None]] = deque()  # to us; None ends the stream
        self._last_arrival = 0.0
        self._timer: Any = None
        self._reading = True
        self._unread = 0  # bytes we wrote that the peer has not taken
        self._closing = False
        self._lost = False
        self._eof_written = False
        self._high, self._low = 65_536, 16_384
        self._full = False

    # -- asyncio.Transport ------------------------------------------------------------------------------

    def is_closing(self) -> bool:
        return self._closing or self._lost

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 0) if name in ("peername", "sockname") else default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 65_536 if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        return max(0, self._unread - KERNEL_BYTES)

    def write(self, data: Any) -> None:
        if self._closing or self._lost or self._eof_written or not data:
            return
        self._unread += len(data)
        if self.get_write_buffer_size() > self._high and not self._full:
            self._full = True
            self.protocol.pause_writing()
        self._put(bytes(data))

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if not self._eof_written and not self._lost:
            self._eof_written = True
            self._put(None)

    def close(self) -> None:
        if self._closing or self._lost:
            return
        self._closing = True
        self.write_eof()
        if not self.get_write_buffer_size():
            self.loop.call_soon(self._lose, None, context=self.node.context)

    def abort(self) -> None:
        if self._lost:
            return
        self._closing = True
        self.loop.call_soon(self._lose, None, context=self.node.context)
        if not self.cut:
            self.peer._break(ConnectionResetError("reset by peer"), self.delay_s)

    def pause_reading(self) -> None:
        self._reading = False

    def is_reading(self) -> bool:
        return self._reading

    def resume_reading(self) -> None:
        if not self._reading:
            self._reading = True
            self._arm()

    # -- on the way -------------------------------------------------------------------------------------

    def _put(self, data: bytes | None) -> None:
        peer = self.peer
        if peer._lost or self.cut:
            return
        at = max(self._last_arrival, self.loop.now + self.network.delay(self))
        self._last_arrival = at
        peer._arrivals.append((at, data))
        peer._arm()

    def _arm(self) -> None:
        if self._timer is None and self._arrivals and self._reading and not self._lost:
            self._timer = self.loop.call_at(self._arrivals[0][0], self._take, context=self.node.context)

    def _take(self) -> None:
        self._timer = None
        if self._lost or not self._reading:
            return
        now = self.loop.now + 1e-6
        got: list[bytes] = []
        ended = False
        while self._arrivals and self._arrivals[0][0] <= now:
            data = self._arrivals.popleft()[1]
            if data is None:
                ended = True
                break
            got.append(data)
        if got:
            chunk = got[0] if len(got) == 1 else b"".join(got)
            self.peer._taken(len(chunk))
            self.protocol.data_received(chunk)
        if ended and not self._lost:
            keep_open = self.protocol.eof_received()
            if not keep_open:
                self.close()
        self._arm()

    def _taken(self, size: int) -> None:
        self._unread -= size
        if self._lost:
            return
        if self._full and self.get_write_buffer_size() <= self._low:
            self._full = False
            self.loop.call_soon(self.protocol.resume_writing, context=self.node.context)
        if self._closing and not self.get_write_buffer_size():
            self.loop.call_soon(self._lose, None, context=self.node.context)

    # -- ending -----------------------------------------------------------------------------------------

    def _lose(self, exc: Exception | None) -> None:
        if self._lost:
            return
        self._lost = self._closing = True
        self._arrivals.clear()
        self.network.streams.pop(self, None)
        if self.protocol is not None:
            self.protocol.connection_lost(exc)

    def _break(self, exc: Exception, delay_s: float) -> None:
        """The other end is gone: what it sent and has not arrived by then is lost."""
        if not self._lost:
            self.loop.call_later(delay_s, self._lose, exc, context=self.node.context)


class SimSocket:
    """What code asks of a listening socket."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address

    def getsockname(self) -> tuple[str, int]:
        return self._address

    def setsockopt(self, *_: Any) -> None:
        pass


class SimServer:
    """A listener."""

    def __init__(self, network: Network, factory: Any, host: str, port: int, node: Node) -> None:
        self.sockets = [SimSocket((host, port))]
        self.factory = factory
        self.node = node
        self._network = network
        self._port = port

    async def start_serving(self) -> None:
        pass

    def close(self) -> None:
        if self._network.servers.get(self._port) is self:
            del self._network.servers[self._port]

    async def wait_closed(self) -> None:
        pass


class Network:
    """All listeners and streams, and what is wrong with them."""

    def __init__(self, loop: SimLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.servers: dict[int, SimServer] = {}
        self.streams: dict[Stream, None] = {}
        self.slow: dict[frozenset[str], float] = {}  # extra delay between two nodes
        self.parted: set[frozenset[str]] = set()  # pairs of nodes between which nothing passes
        self.fixed_ports: dict[str, int] = {}  # by name of the node that listens
        self._next_port = 10_000
        loop.network = self

    def delay(self, stream: Stream) -> float:
        """Seconds that what is written now takes."""
        delay_s = stream.delay_s * (0.5 + self.rng.random())
        if self.slow:
            delay_s += self.slow.get(frozenset((stream.node.name, stream.peer.node.name)), 0.0)
        return delay_s

    def listen(self, factory: Any, host: str, port: int) -> SimServer:
        """Bind a port; 0 is any free one."""
        node = NODE.get()
        assert node is not None
        port = port or self.fixed_ports.get(node.name, 0)
        if not port:
            self._next_port += 1
            port = self._next_port
        if port in self.servers:
            raise OSError(98, "address in use")
        server = self.servers[port] = SimServer(self, factory, host, port, node)
        return server

    async def connect(self, factory: Any, host: str, port: int) -> tuple[Stream, Any]:
        """Open a connection. Raises ConnectionRefusedError; hangs if the other side's network is gone."""
        node = NODE.get()
        assert node is not None
        await asyncio.sleep(self.rng.uniform(0.0002, 0.002))
        server = self.servers.get(port)
        if server is None:
            raise ConnectionRefusedError(111, "connection refused")
        if frozenset((node.name, server.node.name)) in self.parted:
            await asyncio.sleep(3600)
        near, far = Stream(self, node), Stream(self, server.node)
        near.peer, far.peer = far, near
        near.delay_s = far.delay_s = self.rng.choice((0.0003, 0.0003, 0.001, 0.003))
        self.streams[near] = self.streams[far] = None
        near.protocol, far.protocol = factory(), None
        self.loop.call_soon(self._accept, far, server, context=server.node.context)
        near.protocol.connection_made(near)
        return near, near.protocol

    def _accept(self, far: Stream, server: SimServer) -> None:
        far.protocol = server.factory()
        far.protocol.connection_made(far)
        far._arm()

    # -- faults -----------------------------------------------------------------------------------------

    def lose_node(self, node: Node, *, silent: bool = False) -> None:
        """A process is gone, and what it had open. `silent`: with its machine, so that nobody is told."""
        for port, server in list(self.servers.items()):
            if server.node is node:
                del self.servers[port]
        for stream in list(self.streams):
            if stream.node is node:
                self.streams.pop(stream)
                stream._lost = stream._closing = True
                if silent:
                    stream.peer.cut = True
                elif stream.peer.protocol is not None or not stream.peer._lost:
                    stream.peer._break(ConnectionResetError("peer is gone"), self.delay(stream))

    def between(self, one: str, other: str) -> list[Stream]:
        """Both ends of every connection between two nodes."""
        pair = {one, other}
        return [s for s in self.streams if {s.node.name, s.peer.node.name} == pair]

    def cut_links(self, one: str, other: str) -> None:
        """Break every connection between two nodes."""
        for stream in self.between(one, other):
            stream._break(ConnectionResetError("broken"), self.rng.uniform(0.0, 0.003))

    def half_open(self, one: str, other: str, *, both: bool) -> None:
        """Connections between two nodes go silent, in one direction or both; new ones do not come about."""
        for stream in self.between(one, other):
            if both or stream.node.name == one:
                stream.cut = True
