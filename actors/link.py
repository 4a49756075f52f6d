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
import logging
import os
import random
from collections.abc import Awaitable, Callable

from actors.link_stream import MAX_NAME_BYTES, Link, LinkHandler, handshake_proof
from carillon.errors import CarillonError, LinkClosedError, LinkHandshakeError
from carillon.messages import Address
from carillon.settings import LinkSettings

__all__ = ["Link", "LinkClient", "LinkHandler", "LinkServer", "dial", "handshake_proof"]

log = logging.getLogger(__name__)


class LinkServer:
    """Listens on TCP and, if asked, on a Unix socket.

    Args:
        handler: shared by all accepted links.
        name: this actor's name, told to peers.
        secret: the cluster secret.
    """

    def __init__(self, handler: LinkHandler, settings: LinkSettings, name: str, secret: bytes) -> None:
        _check_identity(name, secret)
        self._handler = handler
        self._settings = settings
        self._name = name
        self._secret = secret
        self._servers: list[asyncio.Server] = []
        self._links: dict[Link, None] = {}  # in order of arrival: closing them has an order
        self._unix_path = ""
        self._unix_inode = 0

    async def start(self, host: str, port: int = 0, unix_path: str = "") -> tuple[str, int]:
        """Bind and listen; returns the bound (host, port). An old socket file at `unix_path` is replaced."""
        loop = asyncio.get_running_loop()
        # Not serving yet: with `start_serving` a cancellation would lose the server without closing it.
        server = await loop.create_server(self._make, host, port, backlog=1024, start_serving=False)
        self._servers.append(server)
        bound = server.sockets[0].getsockname()
        if unix_path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unix_path)
            self._servers.append(
                await loop.create_unix_server(self._make, unix_path, backlog=1024, start_serving=False)
            )
            self._unix_path, self._unix_inode = unix_path, os.stat(unix_path).st_ino
            os.chmod(unix_path, 0o600)
        for listening in self._servers:
            await listening.start_serving()
        return bound[0], bound[1]

    def _make(self) -> Link:
        link = Link(
            self._handler,
            self._settings,
            self._name,
            self._secret,
            dialled=False,
            forget=self._forget,
        )
        self._links[link] = None
        return link

    def _forget(self, link: Link) -> None:
        self._links.pop(link, None)

    async def close(self) -> None:
        """Stop listening, close every accepted link, remove the Unix socket."""
        for server in self._servers:
            server.close()
        for link in tuple(self._links):
            link.close()
        for server in self._servers:
            with contextlib.suppress(Exception):
                await server.wait_closed()
        self._servers.clear()
        self._links.clear()
        if self._unix_path:
            with contextlib.suppress(OSError):
                # A successor of the same name may have put its own socket there already.
                if os.stat(self._unix_path).st_ino == self._unix_inode:
                    os.unlink(self._unix_path)
            self._unix_path = ""


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

    Args:
        machine: our own; a peer with the same one may have a Unix socket that we can reach.
        peer: the name the other end must have; empty accepts any.

    Raises:
        LinkClosedError: nobody answers there.
        LinkHandshakeError: wrong version, secret or name.
    """
    _check_identity(name, secret)
    loop = asyncio.get_running_loop()

    def make() -> Link:
        return Link(handler, settings, name, secret, dialled=True, expected_peer=peer)

    link: Link | None = None
    try:
        async with asyncio.timeout(settings.handshake_timeout_s):
            if address.unix_path and machine and address.machine == machine:
                # Containers of one host share its machine id but perhaps not the folder: then TCP.
                with contextlib.suppress(OSError):
                    _, link = await loop.create_unix_connection(make, address.unix_path)
            if link is None:
                _, link = await loop.create_connection(make, address.host, address.port)
    except (OSError, TimeoutError) as exc:
        reason = str(exc) or f"no answer within {settings.handshake_timeout_s} s"
        raise LinkClosedError(f"cannot reach {address.host}:{address.port}: {reason}") from exc
    try:
        await link.ready
    except asyncio.CancelledError:
        link.close()
        raise
    return link


def _check_identity(name: str, secret: bytes) -> None:
    if not secret:
        raise ValueError("expected a cluster secret, got an empty one: every peer could prove it")
    if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise ValueError(f"expected a name of 1 to {MAX_NAME_BYTES} bytes, got {name!r}")


class LinkClient:
    """Keeps one link to a peer open: dials, and dials again with full jitter when it is lost.

    Args:
        resolve: gives the peer's present address, or None while it has none. Called before each dial.
        on_open: awaited after each handshake, before `link` is set (e.g. to join); an error dials again.
        machine: see `dial`; `peer` likewise.
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
        _check_identity(name, secret)
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
        self._news = asyncio.Event()
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

    def again(self) -> None:
        """The peer is heard to be there (anew): dial at once instead of waiting out the present pause."""
        if self.link is None or self.link.closed:
            self._news.set()

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
                self._news.clear()
                await link.wait_closed()
            except (CarillonError, OSError) as exc:
                failures += 1
                if failures in (1, 10, 100) or failures % 1000 == 0:
                    level = logging.WARNING if isinstance(exc, LinkHandshakeError) else logging.INFO
                    log.log(
                        level, "%s: link to %s: %s (try %d)", self._name, self._peer or "peer", exc, failures
                    )
            except Exception:  # of `resolve` or `on_open`: dialling must not end for it
                failures += 1
                log.exception("%s: link to %s failed", self._name, self._peer or "peer")
            finally:
                self.link = None
                if link is not None and not link.closed:
                    link.close()
            ceiling = min(
                self._settings.reconnect_max_s, self._settings.reconnect_min_s * 2 ** min(failures, 16)
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(0, ceiling)):  # noqa: S311  spread, not secrecy
                    await self._news.wait()
                    failures = 0
            self._news.clear()
