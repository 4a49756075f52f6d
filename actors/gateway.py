"""The gateway: client sockets and nothing else. Which frame means what is the session's matter.

It listens, upgrades, verifies tokens, keeps the heart-beat of all connections with one sweep, and moves
bytes between sockets and the shards that own their users (actors/gateway_owners.py). Losing a shard costs no
socket; losing a gateway costs its clients a reconnect and a resume.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import logging
import os
import random
import resource
import socket
from typing import Any, Final

from actors.attached import Phase
from actors.config import ActorConfig
from actors.gateway_connection import PAUSED_VERIFY, Connection
from actors.gateway_handshake import Handshake
from actors.gateway_keys import PostgresKeys, ReadKeys, Redeem, TenantKeys
from actors.gateway_owners import Owners
from actors.gateway_rates import UserRates
from actors.link import Link
from actors.member import Membership, advertised_host
from actors.tls import server_context
from carillon import server_frames
from carillon.client_frames import Auth
from carillon.clock import Clock, SystemClock
from carillon.errors import (
    CarillonError,
    ClusterError,
    NotPermittedError,
    TokenExpiredError,
    UnauthenticatedError,
)
from carillon.ids import slot_of
from carillon.metrics import Stats
from carillon.token_keys import TokenKeys
from carillon.tokens import ClientIdentity, TokenRules, claimed_tenant, unknown_key, verify

log = logging.getLogger(__name__)

BACKLOG: Final = 8192
"""Asked of the kernel, which cuts it to net.core.somaxconn: a storm of reconnects waits there."""
TCP_NOTSENT_LOWAT: Final = 25
"""linux/tcp.h; the socket module names it from Python 3.12 on."""
MAX_REDEEMING: Final = 1000
"""Tickets looked up at once; more are told to try later, so that made-up ones cannot queue up without end."""
SPARE_DESCRIPTORS: Final = 512
"""Open files beside the client sockets."""
SPARE_SOCKETS: Final = 1024
"""Sockets beyond `max_connections` that may be in their handshake or being told to try later."""


class Gateway:
    """Owns client sockets.

    Args:
        config: who it is.
        clock: None is the system's.
        read_keys: gives what a tenant's tokens are verified with; None reads it from Postgres.
        redeem: gives whom a ticket stands for; None asks Postgres.
    """

    def __init__(
        self,
        config: ActorConfig,
        clock: Clock | None = None,
        *,
        read_keys: ReadKeys | None = None,
        redeem: Redeem | None = None,
    ) -> None:
        settings = config.settings
        self.config = config
        self.limits = settings.gateway
        self.origins = frozenset(
            origin.strip() for origin in self.limits.allowed_origins.split(",") if origin.strip()
        )
        # How late a deadline may be noticed; pings and their deadlines are set this much earlier.
        self.tick_s = min(0.25, self.limits.heartbeat_s / 10, self.limits.pong_timeout_s / 10)
        self.stats = Stats()
        self.url = ""
        self._clock = clock or SystemClock()
        self._postgres = None if read_keys is not None else PostgresKeys(settings, self._clock)
        self._redeem_ticket = redeem or (self._postgres.redeem if self._postgres else _no_tickets)
        self._redeeming = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._keys = TenantKeys(
            read_keys or self._postgres or _no_keys, settings.ingress.auth_cache_s, self._clock
        )
        self._rules = TokenRules(
            settings.ingress.clock_skew_s, settings.ingress.token_audience, settings.ingress.token_issuer
        )
        self._rates = UserRates(self.limits.user_frames_per_s)
        self._sockets: dict[Connection, None] = {}
        self._open = 0  # sockets that are WebSockets and not closing
        self._draining = False
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._swept_at = 0.0

    # -- life cycle -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bind, join the cluster, accept.

        Raises:
            ClusterError: the port is taken.
        """
        self.loop = asyncio.get_running_loop()
        _raise_descriptor_limit(self.limits.max_connections + SPARE_SOCKETS + SPARE_DESCRIPTORS)
        settings = self.config.settings
        host = settings.cluster.bind_host
        tls = server_context(self.limits.tls_cert_file, self.limits.tls_key_file, "gateway")
        try:
            self._server = await self.loop.create_server(
                lambda: Connection(self),
                host,
                self.limits.port,
                backlog=BACKLOG,
                start_serving=False,
                ssl=tls,
                ssl_handshake_timeout=None if tls is None else self.limits.handshake_timeout_s,
            )
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise ClusterError(f"the gateway cannot listen on {host}:{self.limits.port}: {exc}") from exc
            raise ClusterError(
                f"port {self.limits.port} of {host} is taken: end what listens there, or set gateway.port "
                "(CARILLON_GATEWAY_PORT) to another one, or to 0 for any free one"
            ) from exc
        for listener in self._server.sockets:
            # Inherited by accepted sockets: what a slow reader leaves waits in our buffer, where it is seen
            # and bounded, and not in megabytes of kernel memory.
            listener.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, self.limits.low_buffer_bytes)
        port = self._server.sockets[0].getsockname()[1]
        self._membership = Membership(self.config, _NoLinks(), stats=self.stats, clock=self._clock)
        self.owners = Owners(self, self._membership, self.stats)
        try:
            shown = advertised_host(settings.cluster, self.config.node, host)
            self.url = f"{'ws' if tls is None else 'wss'}://{shown}:{port}/ws"
            self._membership.public = self.url
            await self._membership.start()
            await self._server.start_serving()
        except BaseException:
            self._server.close()
            await self.owners.close()
            raise
        self._swept_at = self.loop.time()
        self._sweep()
        log.info("%s serves %s", self.config.name, self.url)

    async def status(self) -> dict[str, Any]:
        """Facts for the command line."""
        return {
            "kind": "gateway",
            "name": self.config.name,
            "url": self.url,
            "connections": self._open,
            "sockets": len(self._sockets),
            "attached": self.owners.attached,
            "waiting": self.owners.waiting,
            "draining": self._draining,
            "mapVersion": self._membership.map.version,
            "counters": dict(self.stats.counters),
        }

    async def drain(self) -> None:
        """Stop accepting, close every connection with 4201, spread over `drain_s` in random order.

        Cancellation: connections that are left stay open.
        """
        self._draining = True
        if self._server is not None:
            self._server.close()
        conns = [conn for conn in self._sockets if conn.phase < Phase.CLOSING]
        random.shuffle(conns)
        started = self.loop.time()
        for at, conn in enumerate(conns):
            # Each at its own random moment of its own slice of time: neither a burst nor a beat.
            due = started + self.limits.drain_s * (at + random.random()) / len(conns)  # noqa: S311
            if due > self.loop.time():
                await asyncio.sleep(due - self.loop.time())
            if conn.phase is Phase.HANDSHAKE:
                conn.abort()
            else:
                conn.close(4201, "the server is going away")
        deadline = self.loop.time() + self.limits.close_timeout_s + 2 * self.tick_s
        while self._sockets and self.loop.time() < deadline:
            await asyncio.sleep(self.tick_s)

    async def stop(self) -> None:
        """Close everything at once, with 1001; after `drain` leave the cluster, too."""
        if self._server is None:
            return  # never started
        leave, self._draining = self._draining, True
        self._server.close()
        for conn in list(self._sockets):
            conn.close(1001, "the server is going away")
        # One turn for the close frames to leave, then the sockets.
        await asyncio.sleep(0)
        for conn in list(self._sockets):
            conn.abort()
        while self._sockets:
            await asyncio.sleep(0.001)
        if self._sweeper is not None:
            self._sweeper.cancel()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._keys.close()
        if self._postgres is not None:
            await self._postgres.close()
        await self.owners.close()
        await self._membership.close(leave)

    # -- sockets (Host) -------------------------------------------------------------------------------

    def opened(self, conn: Connection) -> bool:
        """See `Host.opened`."""
        self._sockets[conn] = None
        return len(self._sockets) <= self.limits.max_connections + SPARE_SOCKETS

    def healthy(self) -> bool:
        """See `Host.healthy`."""
        return not self._draining

    def gone(self, conn: Connection) -> None:
        """See `Host.gone`."""
        self._sockets.pop(conn, None)

    def ended(self, conn: Connection) -> None:
        """See `Host.ended`."""
        self._open -= 1
        if conn.user_rate is not None:
            self._rates.leave(conn.tenant, conn.user)
        self.owners.detach(conn)

    def count_close(self, code: int) -> None:
        """See `Host.count_close`."""
        self.stats.count(f'gateway_closes{{code="{code}"}}')

    def upgraded(self, conn: Connection, shaken: Handshake) -> None:
        """See `Host.upgraded`."""
        self._open += 1
        if self._draining:
            conn.close(4201, "the server is going away")
        elif self._open > self.limits.max_connections:
            conn.close(4213, "this gateway has all the connections it can serve")
        else:
            conn.device = shaken.device or _random_id()
            if shaken.position is not None:
                conn.epoch, conn.seq, conn.rev = shaken.position
            if shaken.complaint is not None:
                exc = shaken.complaint
                conn.send(server_frames.error(exc.code, str(exc), exc.temporary))
            if shaken.token is not None:
                self.authenticate(conn, Auth(shaken.token))
            elif shaken.ticket is not None:
                self._redeem(conn, shaken.ticket)

    # -- tokens ---------------------------------------------------------------------------------------

    def authenticate(self, conn: Connection, auth: Auth) -> None:
        """See `Host.authenticate`. A storm of connections waits for one read of the tenant's keys."""
        try:
            tenant = claimed_tenant(auth.token)
        except UnauthenticatedError as exc:
            self._refused(conn, auth, exc)
            return
        known, keys = self._keys.cached(tenant)
        # A public key that is not known: the tenant may have a new one.
        refresh = known and keys is not None and bool(keys.public) and unknown_key(auth.token, keys)
        if known and not refresh:
            self._verify(conn, auth, keys)
            return
        opening = conn.phase is Phase.AUTH
        if opening:
            conn.phase = Phase.VERIFY
            conn.pause(PAUSED_VERIFY)

        def told(keys: TokenKeys | None, error: CarillonError | None) -> None:
            if conn.phase is not (Phase.VERIFY if opening else Phase.OPEN):
                return  # it has gone meanwhile
            if error is None:
                self._verify(conn, auth, keys)
            elif opening:
                conn.close(4213, "tokens cannot be verified now, try later")
            else:
                self._refused(conn, auth, error)
            if opening and error is None:
                conn.verified()

        self._keys.fetch(tenant, told, refresh=refresh)

    def _redeem(self, conn: Connection, ticket: str) -> None:
        """Let a connection in that shows a ticket."""
        conn.phase = Phase.VERIFY
        conn.pause(PAUSED_VERIFY)
        if self._redeeming >= MAX_REDEEMING:
            conn.close(4213, "too many tickets at once, try later")
            return
        self._redeeming += 1
        task = self.loop.create_task(self._redeem_now(conn, ticket))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _redeem_now(self, conn: Connection, ticket: str) -> None:
        identity: ClientIdentity | None = None
        failed = True
        try:
            identity = await self._redeem_ticket(ticket)
            failed = False
        except CarillonError as exc:
            log.info("a ticket could not be looked up: %s", exc)
        finally:
            self._redeeming -= 1
        if conn.phase is not Phase.VERIFY:
            return  # it has gone meanwhile
        if failed:
            conn.close(4213, "tickets cannot be verified now, try later")
        elif identity is None:
            conn.close(4001, "the ticket is unknown, used or too old")
        else:
            self._admit(conn, Auth(""), identity, self._clock.now_ms())
            conn.verified()

    def _refused(self, conn: Connection, auth: Auth, error: CarillonError) -> None:
        """A token was not taken. An open connection lives on with the one it has."""
        if conn.phase is Phase.OPEN:
            conn.send(server_frames.error(error.code, str(error), error.temporary, auth.ref))
        else:
            conn.close(4101 if isinstance(error, TokenExpiredError) else 4001, str(error))

    def _verify(self, conn: Connection, auth: Auth, keys: TokenKeys | None) -> None:
        now_ms = self._clock.now_ms()
        try:
            if keys is None:
                raise UnauthenticatedError("the token's signature does not verify")
            identity = verify(auth.token, keys, now_ms, self._rules)
        except UnauthenticatedError as exc:
            self._refused(conn, auth, exc)
        else:
            if conn.phase is Phase.OPEN:
                self._renew(conn, auth, identity, now_ms)
            else:
                self._admit(conn, auth, identity, now_ms)

    def _renew(self, conn: Connection, auth: Auth, identity: ClientIdentity, now_ms: int) -> None:
        """A newer token of the same user: the connection lives as long as that one.

        An older one is not taken: it may have been revoked since, which only the user's shard knows, and it
        asks when a connection attaches.
        """
        if (identity.tenant, identity.user) != (conn.tenant, conn.user):
            error: CarillonError = NotPermittedError("expected a token of the same user", "token")
            self._refused(conn, auth, error)
        elif identity.issued_ms < conn.issued_ms:
            self._refused(conn, auth, UnauthenticatedError("expected a newer token than the present one"))
        else:
            conn.issued_ms = identity.issued_ms
            conn.token_id = identity.token_id
            conn.expires_at = self._end_of(identity, now_ms)
            conn.reschedule()
            if auth.ref is not None:
                conn.send(server_frames.ok(auth.ref))

    def _end_of(self, identity: ClientIdentity, now_ms: int) -> float:
        left_s = (identity.expires_ms - now_ms) / 1000
        if left_s <= 0:  # taken thanks to the skew: until that, too, has passed
            left_s += self._rules.skew_s
        return self.loop.time() + left_s

    def _admit(self, conn: Connection, auth: Auth, identity: ClientIdentity, now_ms: int) -> None:
        if conn.path_user is not None and conn.path_user != identity.user:
            conn.close(4002, "the token is not this user's")
            return
        conn.tenant, conn.user = identity.tenant, identity.user
        conn.slot = slot_of(identity.tenant, identity.user)
        conn.issued_ms = identity.issued_ms
        conn.token_id = identity.token_id
        if auth.device is not None:
            conn.device = auth.device
        conn.path_user = None
        conn.session_id = _random_id()
        conn.expires_at = self._end_of(identity, now_ms)
        conn.phase = Phase.OPEN
        if auth.ref is not None:
            conn.send(server_frames.ok(auth.ref))
        conn.user_rate = self._rates.join(conn.tenant, conn.user)
        conn.start_pings(self.limits.heartbeat_s * random.uniform(0.5, 1.0))  # noqa: S311
        self.owners.attach(conn)

    # -- time -----------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        now = self.loop.time()
        # As after SIGSTOP, or while others have the processor: uvloop runs timers before it reads sockets.
        stalled = now - self._swept_at > self.tick_s + self.limits.pong_timeout_s / 4
        self._swept_at = now
        for conn in [conn for conn in self._sockets if conn.due <= now]:
            conn.look(now, stalled)
        self.stats.gauge("connections", self._open)
        self._sweeper = self.loop.call_later(self.tick_s, self._sweep)


class _NoLinks:
    """Nobody opens links to a gateway: it dials the shards."""

    def link_opened(self, link: Link) -> None:
        """See `LinkHandler`."""

    def link_closed(self, link: Link) -> None:
        """See `LinkHandler`."""

    def receive(self, link: Link, message: Any, request: int) -> None:
        """See `LinkHandler`."""
        link.fail_nowait(request, CarillonError(f"a gateway does not take {type(message).__name__}"))

    def read_finished(self, link: Link) -> None:
        """See `LinkHandler`."""


async def _no_tickets(ticket: str) -> ClientIdentity | None:
    return None


async def _no_keys(tenant: str, /, *, refresh: bool = False) -> TokenKeys | None:
    return None


def _random_id() -> str:
    """16 characters, 96 random bits."""
    return base64.urlsafe_b64encode(os.urandom(12)).decode()


def _raise_descriptor_limit(wanted: int) -> None:
    """Sockets are files: go up to the hard limit, and say so if that is not enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        goal = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (goal, hard))
        if goal < wanted:
            log.warning("only %d open files are allowed, %d may be needed: raise ulimit -n", goal, wanted)
