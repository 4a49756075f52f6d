"""Links: the data plane between actors.

A link is one stream connection (TCP between machines, a Unix socket on one) that carries length-prefixed
MessagePack envelopes both ways; either end may send one-way messages and requests. docs/reference/links.md
is the wire contract.

Ordering: messages arrive in the order sent, per link. Delivery: at most once; a request that fails with
LinkClosedError or LinkTimeoutError may or may not have run. Writes of one turn of the event loop leave in
one system call. Memory: `LinkSettings.max_outbound_bytes` and `max_in_flight` bound what a slow peer can
make us hold; beyond them sends raise BusyError, which the ingress turns into 503 with Retry-After.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import random
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import msgspec

from carillon.errors import (
    BusyError,
    CarillonError,
    LinkClosedError,
    LinkError,
    LinkFrameError,
    LinkHandshakeError,
    LinkTimeoutError,
    RemoteError,
    UnavailableError,
)
from carillon.messages import Address, Envelope, Failure, Message, Ping, make_envelope_decoder
from carillon.settings import LinkSettings

log = logging.getLogger(__name__)

MAGIC: Final = b"CRLN"
VERSION: Final = 1
_LENGTH: Final = struct.Struct(">I")
_HELLO: Final = struct.Struct(">4sHH32s")  # magic, version, length of the name, nonce
_PROOF_BYTES: Final = 32

_encoder = msgspec.msgpack.Encoder()
_decoder = make_envelope_decoder()
_PING: Final = Envelope(0, Ping())


class LinkHandler(Protocol):
    """What an actor does with its links. All methods run on the event loop and must not block."""

    def link_opened(self, link: Link) -> None:
        """The handshake succeeded; `link.peer` is the peer's name."""
        ...

    def link_closed(self, link: Link) -> None:
        """The link is gone; its pending requests have failed already."""
        ...

    def receive(self, link: Link, message: Any, request: int) -> None:
        """Take one message, in order. `request` > 0: answer with `link.reply_nowait(request, ...)` or
        `link.fail_nowait(request, ...)`, now or later. An exception raised here is answered as a failure."""
        ...

    def read_finished(self, link: Link) -> None:
        """All messages of one chunk of bytes were handed over: the place to start a batch."""
        ...


class Link(asyncio.Protocol):
    """One end of an open link. Made by `LinkServer` and `LinkClient`, not by hand."""

    def __init__(
        self,
        handler: LinkHandler,
        settings: LinkSettings,
        name: str,
        secret: bytes,
        *,
        dialled: bool,
        expected_peer: str = "",
    ) -> None:
        self.peer = ""
        self.closed = False
        self.context: Any = None  # the handler's own note about this link
        self._handler = handler
        self._settings = settings
        self._name = name.encode()
        self._secret = secret
        self._dialled = dialled
        self._expected_peer = expected_peer
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._flush_scheduled = False
        self._next_request = 1
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._nonce = os.urandom(32)
        self._peer_nonce = b""
        self._stage = 0  # 0 hello, 1 proof, 2 open
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._last_received = self._loop.time()
        self._sent_since_tick = False
        self._timer: asyncio.TimerHandle | None = None

    # -- life cycle ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: the stream is open; send our hello."""
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]
        assert self._transport is not None
        self._transport.set_write_buffer_limits(high=self._settings.max_outbound_bytes)
        self._transport.write(_HELLO.pack(MAGIC, VERSION, len(self._name), self._nonce) + self._name)
        self._timer = self._loop.call_later(self._settings.handshake_timeout_s, self._handshake_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the stream is gone; fail everything that waits for it."""
        self._finish(LinkClosedError(f"link to {self.peer or 'peer'} closed: {exc or 'end of stream'}"))

    def close(self) -> None:
        """Flush what is written and close. Pending requests fail with LinkClosedError."""
        if self._transport is not None and not self.closed:
            self._flush()
            self._transport.close()
        self._finish(LinkClosedError(f"link to {self.peer or 'peer'} closed here"))

    async def wait_closed(self) -> None:
        """Return once the link is gone."""
        if not self.closed:
            await asyncio.shield(self._gone)

    def abort(self, error: LinkError) -> None:
        """Drop the link at once; pending requests fail with `error`."""
        if self._transport is not None:
            self._transport.abort()
        self._finish(error)

    def _finish(self, error: LinkError) -> None:
        if self.closed:
            return
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        was_open = self._stage == 2
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # a caller that went away does not log "never retrieved"
        if not self.ready.done():
            self.ready.set_exception(
                error if isinstance(error, LinkHandshakeError) else LinkClosedError(str(error))
            )
            self.ready.exception()
        self._out.clear()
        if not self._gone.done():
            self._gone.set_result(None)
        if was_open:
            self._handler.link_closed(self)

    def _handshake_late(self) -> None:
        self.abort(LinkHandshakeError(f"no handshake within {self._settings.handshake_timeout_s} s"))

    def _tick(self) -> None:
        """Keep-alive: ping a silent link, drop a dead one."""
        quiet_s = self._loop.time() - self._last_received
        if quiet_s > self._settings.dead_after_s:
            self.abort(LinkClosedError(f"link to {self.peer}: nothing received for {quiet_s:.1f} s"))
            return
        if not self._sent_since_tick:
            with contextlib.suppress(LinkError, BusyError):
                self._enqueue(_PING)
        self._sent_since_tick = False
        self._timer = self._loop.call_later(self._settings.heartbeat_s, self._tick)

    # -- sending ------------------------------------------------------------------------------------

    def send_nowait(self, message: Message) -> None:
        """Queue a one-way message.

        Raises:
            LinkClosedError: the link is gone.
            BusyError: the peer does not read and the outbound bound is reached.
        """
        self._enqueue(Envelope(0, message))

    async def request(self, message: Message, timeout_s: float | None = None) -> Any:
        """Send a request and wait for its reply.

        Raises:
            RemoteError: the peer answered with a failure.
            LinkClosedError, LinkTimeoutError: no answer; it may or may not have run.
            BusyError: too many requests in flight or bytes waiting; it did not run.
        """
        return await self.request_nowait(message, timeout_s)

    def request_nowait(self, message: Message, timeout_s: float | None = None) -> asyncio.Future[Any]:
        """Like `request`, returning the future of the reply. Raises LinkClosedError or BusyError at once."""
        if len(self._pending) >= self._settings.max_in_flight:
            raise BusyError(f"{len(self._pending)} requests in flight to {self.peer}")
        number = self._next_request
        self._next_request = number + 1
        self._enqueue(Envelope(number, message))
        future: asyncio.Future[Any] = self._loop.create_future()
        self._pending[number] = future
        timeout = self._settings.request_timeout_s if timeout_s is None else timeout_s
        timer = self._loop.call_later(timeout, self._request_late, number, timeout)

        def settled(_: asyncio.Future[Any]) -> None:
            timer.cancel()
            self._pending.pop(number, None)

        future.add_done_callback(settled)
        return future

    def _request_late(self, number: int, timeout_s: float) -> None:
        future = self._pending.pop(number, None)
        if future is not None and not future.done():
            future.set_exception(LinkTimeoutError(f"no answer from {self.peer} within {timeout_s} s"))

    def reply_nowait(self, request: int, message: Message) -> None:
        """Answer request number `request`. A link that is gone or a `request` of 0 is ignored."""
        if request > 0 and not self.closed:
            with contextlib.suppress(BusyError):
                self._enqueue(Envelope(-request, message), bounded=False)

    def fail_nowait(self, request: int, error: BaseException) -> None:
        """Answer request number `request` with an error (RemoteError at the caller)."""
        if isinstance(error, CarillonError):
            retry = error.retry_after_s if isinstance(error, UnavailableError | RemoteError) else 0.0
            failure = Failure(error.code, str(error), error.temporary, retry)
        else:
            failure = Failure("internal", f"{type(error).__name__}: {error}", False)
        self.reply_nowait(request, failure)

    def _enqueue(self, envelope: Envelope, *, bounded: bool = True) -> None:
        if self.closed or self._stage != 2:
            raise LinkClosedError(f"link to {self.peer or 'peer'} is not open")
        data = _encoder.encode(envelope)
        size = len(data)
        if size > self._settings.max_frame_bytes:
            raise LinkFrameError(f"message of {size} bytes exceeds the frame limit")
        if bounded and self.outbound_bytes() + size > self._settings.max_outbound_bytes:
            raise BusyError(f"{self.outbound_bytes()} bytes wait for {self.peer}")
        self._out.append(_LENGTH.pack(size))
        self._out.append(data)
        self._out_bytes += size + 4
        self._sent_since_tick = True
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def outbound_bytes(self) -> int:
        """Bytes queued here and in the transport, not yet taken by the kernel."""
        transport = self._transport
        return self._out_bytes + (transport.get_write_buffer_size() if transport is not None else 0)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._out and not self.closed and self._transport is not None:
            self._transport.write(b"".join(self._out))
        self._out.clear()
        self._out_bytes = 0

    # -- receiving ----------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """asyncio: cut frames out of the stream and hand them on, in order."""
        self._last_received = self._loop.time()
        buffer = self._buffer
        buffer += data
        if self._stage != 2 and not self._handshake():
            return
        at, end = 0, len(buffer)
        view = memoryview(buffer)
        try:
            while end - at >= 4:
                size = int.from_bytes(view[at : at + 4], "big")
                if size > self._settings.max_frame_bytes:
                    raise LinkFrameError(f"frame of {size} bytes from {self.peer} exceeds the limit")
                if end - at - 4 < size:
                    break
                envelope = _decoder.decode(view[at + 4 : at + 4 + size])
                at += 4 + size
                self._dispatch(envelope)
                if self.closed:
                    return
        except (LinkFrameError, msgspec.DecodeError) as exc:
            self.abort(LinkFrameError(f"bad frame from {self.peer}: {exc}"))
            return
        finally:
            view.release()
            del buffer[:at]
        if at:
            self._handler.read_finished(self)

    def _dispatch(self, envelope: Envelope) -> None:
        number, body = envelope.request, envelope.body
        if number < 0:
            future = self._pending.pop(-number, None)
            if future is not None and not future.done():
                if type(body) is Failure:
                    future.set_exception(
                        RemoteError(body.code, body.message, body.temporary, body.retry_after_s)
                    )
                else:
                    future.set_result(body)
            return
        if type(body) is Ping:
            return
        try:
            self._handler.receive(self, body, number)
        except Exception as exc:
            log.exception("handling %s from %s failed", type(body).__name__, self.peer)
            self.fail_nowait(number, exc)

    def _handshake(self) -> bool:
        """Advance the handshake with what is buffered; True once the link is open."""
        buffer = self._buffer
        if self._stage == 0:
            if len(buffer) < _HELLO.size:
                if buffer and not MAGIC.startswith(bytes(buffer[:4])[: len(buffer)]):
                    self.abort(LinkHandshakeError("not a Carillon link: wrong magic"))
                return False
            magic, version, name_length, nonce = _HELLO.unpack_from(buffer)
            if magic != MAGIC:
                self.abort(LinkHandshakeError("not a Carillon link: wrong magic"))
                return False
            if version != VERSION:
                self.abort(LinkHandshakeError(f"expected link version {VERSION}, got {version}"))
                return False
            if len(buffer) < _HELLO.size + name_length:
                return False
            name = bytes(buffer[_HELLO.size : _HELLO.size + name_length])
            del buffer[: _HELLO.size + name_length]
            self.peer = name.decode("utf-8", "replace")
            if self._expected_peer and self.peer != self._expected_peer:
                # A port or socket path that another process got after the one we look for died.
                self.abort(LinkHandshakeError(f"expected {self._expected_peer} here, found {self.peer}"))
                return False
            self._peer_nonce = nonce
            assert self._transport is not None
            self._transport.write(self._proof(self._dialled, self._name, self._nonce, name, nonce))
            self._stage = 1
        if self._stage == 1:
            if len(buffer) < _PROOF_BYTES:
                return False
            proof = bytes(buffer[:_PROOF_BYTES])
            del buffer[:_PROOF_BYTES]
            expected = self._proof(
                not self._dialled, self.peer.encode(), self._peer_nonce, self._name, self._nonce
            )
            if not hmac.compare_digest(proof, expected):
                self.abort(LinkHandshakeError(f"{self.peer} does not know the cluster secret"))
                return False
            self._stage = 2
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(self._settings.heartbeat_s, self._tick)
            self._handler.link_opened(self)
            if not self.ready.done():
                self.ready.set_result(None)
        return True

    def _proof(self, dialled: bool, name: bytes, nonce: bytes, peer: bytes, peer_nonce: bytes) -> bytes:
        """HMAC-SHA256 over role, both nonces and both names: neither a replay nor a reflection passes."""
        role = b"dialler" if dialled else b"listener"
        text = b"\0".join((MAGIC, role, peer_nonce, nonce, name, peer))
        return hmac.new(self._secret, text, hashlib.sha256).digest()


class LinkServer:
    """Listens on TCP and, if asked, on a Unix socket.

    Args:
        handler: shared by all accepted links.
        name: this actor's name, told to peers.
        secret: the cluster secret.
    """

    def __init__(self, handler: LinkHandler, settings: LinkSettings, name: str, secret: bytes) -> None:
        self._handler = handler
        self._settings = settings
        self._name = name
        self._secret = secret
        self._servers: list[asyncio.Server] = []
        self._links: list[Link] = []

    async def start(self, host: str, port: int = 0, unix_path: str = "") -> tuple[str, int]:
        """Bind and listen; returns the bound (host, port). An old socket file at `unix_path` is replaced."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._make, host, port, backlog=1024)
        self._servers.append(server)
        bound = server.sockets[0].getsockname()
        if unix_path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unix_path)
            self._servers.append(await loop.create_unix_server(self._make, unix_path, backlog=1024))
            os.chmod(unix_path, 0o600)
        return bound[0], bound[1]

    def _make(self) -> Link:
        link = Link(self._handler, self._settings, self._name, self._secret, dialled=False)
        self._links = [known for known in self._links if not known.closed]
        self._links.append(link)
        return link

    async def close(self) -> None:
        """Stop listening and close every accepted link."""
        for server in self._servers:
            server.close()
        for link in self._links:
            link.close()
        for server in self._servers:
            with contextlib.suppress(Exception):
                await server.wait_closed()
        self._servers.clear()
        self._links.clear()


async def dial(
    address: Address,
    handler: LinkHandler,
    settings: LinkSettings,
    name: str,
    secret: bytes,
    machine: str = "",
    peer: str = "",
) -> Link:
    """Open one link: over the Unix socket if the peer is on this machine, else over TCP.

    Raises:
        LinkClosedError: nobody answers there.
        LinkHandshakeError: wrong version or secret.
    """
    loop = asyncio.get_running_loop()

    def make() -> Link:
        return Link(handler, settings, name, secret, dialled=True, expected_peer=peer)

    try:
        if address.unix_path and machine and address.machine == machine:
            _, link = await loop.create_unix_connection(make, address.unix_path)
        else:
            async with asyncio.timeout(settings.handshake_timeout_s):
                _, link = await loop.create_connection(make, address.host, address.port)
    except (OSError, TimeoutError) as exc:
        raise LinkClosedError(f"cannot reach {address.host}:{address.port}: {exc}") from exc
    try:
        await link.ready
    except asyncio.CancelledError:
        link.close()
        raise
    return link


class LinkClient:
    """Keeps one link to a peer open: dials, and dials again with full jitter when it is lost.

    Args:
        resolve: gives the peer's present address, or None while it has none. Called before each dial.
        on_open: awaited after each handshake, before `link` is set (e.g. to join); an error dials again.
    """

    def __init__(
        self,
        resolve: Callable[[], Awaitable[Address | None]],
        handler: LinkHandler,
        settings: LinkSettings,
        name: str,
        secret: bytes,
        *,
        machine: str = "",
        peer: str = "",
        on_open: Callable[[Link], Awaitable[None]] | None = None,
    ) -> None:
        self.link: Link | None = None
        self._resolve = resolve
        self._handler = handler
        self._settings = settings
        self._name = name
        self._secret = secret
        self._machine = machine
        self._peer = peer
        self._on_open = on_open
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        """Begin dialling in the background."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop dialling and close the link."""
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self.link is not None:
            self.link.close()
            self.link = None

    def open_link(self) -> Link:
        """The open link. Raises LinkClosedError while there is none."""
        link = self.link
        if link is None or link.closed:
            raise LinkClosedError("no link to the peer")
        return link

    async def _run(self) -> None:
        failures = 0
        while not self._closing:
            link: Link | None = None
            try:
                address = await self._resolve()
                if address is None:
                    raise LinkClosedError("the peer has no address yet")
                link = await dial(
                    address,
                    self._handler,
                    self._settings,
                    self._name,
                    self._secret,
                    self._machine,
                    self._peer,
                )
                if self._on_open is not None:
                    await self._on_open(link)
                self.link = link
                failures = 0
                await link.wait_closed()
            except (CarillonError, OSError) as exc:
                failures += 1
                if failures in (1, 10, 100):
                    log.info("link of %s: %s (try %d)", self._name, exc, failures)
            finally:
                self.link = None
                if link is not None and not link.closed:
                    link.close()
            ceiling = min(
                self._settings.reconnect_max_s, self._settings.reconnect_min_s * 2 ** min(failures, 16)
            )
            await asyncio.sleep(random.uniform(0, ceiling))  # noqa: S311  spread, not secrecy
