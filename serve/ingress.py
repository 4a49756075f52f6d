"""One ingress replica: its stores, its link to the cluster, its app, and the door of its own.

Serve's replica (serve/deployment.py) and the tests build this; `start` and `stop` run on the loop that will
serve the requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import socket
import ssl
from collections.abc import Iterator
from typing import Any, Final

import asyncpg
import uvicorn

from actors.config import ActorConfig
from actors.member import advertised_host
from actors.templates import Templates
from actors.tls import server_context
from carillon.clock import Clock, SystemClock
from carillon.errors import CarillonError, ClusterError
from carillon.events import EventParser
from carillon.ids import Uuid7Source
from carillon.metrics import Stats
from serve.app import IngressApp
from serve.auth import Authenticator
from serve.backend import RouterBackend
from serve.connections import Connections
from serve.door import DoorProtocol, protocol_of
from serve.services import Services
from serve.stream_in import StreamIn
from serve.tenant_shares import TenantShares
from stores.archive_export import ArchiveExport
from stores.cached_feed import CachedFeed
from stores.postgres.audience import AudienceReader
from stores.postgres.broadcasts import BroadcastStore
from stores.postgres.dead_letters import DeadLetterReader
from stores.postgres.digests import DigestReader
from stores.postgres.export import Exporter
from stores.postgres.feed import FeedReader
from stores.postgres.inbound import InboundStore
from stores.postgres.pool import open_pool
from stores.postgres.schedules import ScheduleStore
from stores.postgres.search import SearchReader
from stores.postgres.segments import SegmentStore
from stores.postgres.templates import TemplateStore
from stores.postgres.tenants import TenantStore
from stores.postgres.tickets import TicketStore
from stores.postgres.topics import TopicStore
from stores.postgres.users import UserStore
from stores.redis.hot_feed import HotFeedStore
from stores.redis.rate_limiter import RateLimiter

log = logging.getLogger(__name__)
# It says that a request was no HTTP, once for each: whoever can connect could fill the disk with that.
logging.getLogger("uvicorn.error").setLevel(logging.ERROR)

BACKLOG: Final = 2048


def cluster_tag(secret: bytes) -> str:
    """Names a cluster without telling its secret."""
    return hashlib.sha256(b"carillon cluster tag\0" + secret).hexdigest()[:16]


class _Server(uvicorn.Server):
    """uvicorn inside of another program: the process' signals are not its business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install nothing."""
        yield


class Ingress:
    """A replica.

    Args:
        config: of kind "ingress", with a name of its own.
        clock: None is the system's.
    """

    def __init__(self, config: ActorConfig, clock: Clock | None = None) -> None:
        self.config = config
        self.stats = Stats()
        self.url = ""
        """Where the own door listens, e.g. "http://127.0.0.1:8080"; empty until `start`."""
        self.app: IngressApp | None = None
        self.backend: RouterBackend | None = None
        self.connections: Connections | None = None
        self._clock = clock or SystemClock()
        self._pool: asyncpg.Pool | None = None
        self._socket: socket.socket | None = None
        self._server: _Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stream: StreamIn | None = None

    async def start(self) -> None:
        """Open everything; returns when requests are served.

        Raises:
            ClusterError: the direct port is taken.
            StoreUnavailableError: Postgres does not answer.
        """
        settings = self.config.settings
        tag = cluster_tag(self.config.secret)
        host, port = settings.cluster.bind_host, settings.ingress.direct_port
        try:
            self._socket = await bind_door(host, port, tag, tls=bool(settings.ingress.tls_cert_file))
            bound = self._socket.getsockname()[1]
            tls = server_context(settings.ingress.tls_cert_file, settings.ingress.tls_key_file, "ingress")
            shown = advertised_host(settings.cluster, self.config.node, host)
            self.url = f"{'http' if tls is None else 'https'}://{shown}:{bound}"
            self._pool = await open_pool(settings.postgres)
            self.backend = RouterBackend(self.config, self.stats, public=self.url, clock=self._clock)
            self.connections = Connections(settings, self.backend.membership, self.stats, self._clock)
            tenants = TenantStore(self._pool, settings.postgres.connect_timeout_s)
            auth = Authenticator(tenants, settings.ingress, self._clock)
            feed = FeedReader(self._pool, settings.postgres.connect_timeout_s)
            services = Services(
                settings,
                self._clock,
                self.stats,
                EventParser(Uuid7Source()),
                auth,
                feed,
                tenants,
                self.backend,
                TicketStore(self._pool, settings.postgres.connect_timeout_s),
                RateLimiter(settings.redis, settings.ingress.limit_lease_s, self._clock),
                Templates(
                    TemplateStore(self._pool, settings.postgres.connect_timeout_s),
                    settings.template,
                    self._clock,
                    self.stats,
                ),
                ScheduleStore(self._pool, settings.postgres.connect_timeout_s),
                BroadcastStore(self._pool, settings.postgres.connect_timeout_s),
                InboundStore(self._pool, settings.postgres.connect_timeout_s),
                DeadLetterReader(self._pool, settings.postgres.connect_timeout_s),
                CachedFeed(feed, HotFeedStore(settings.redis, self._clock), self.stats, settings.redis),
                SearchReader(self._pool, settings.ingress, self._clock, settings.postgres.connect_timeout_s),
                UserStore(self._pool, settings.postgres.connect_timeout_s),
                Exporter(
                    self._pool,
                    settings.postgres.connect_timeout_s,
                    settings.shard.idempotency_ttl_s,
                    ArchiveExport(self._pool, settings, settings.postgres.connect_timeout_s),
                ),
                TopicStore(self._pool, settings.postgres.connect_timeout_s),
                SegmentStore(self._pool, settings.postgres.connect_timeout_s),
                AudienceReader(self._pool, settings.postgres.connect_timeout_s),
                DigestReader(self._pool, settings.postgres.connect_timeout_s),
                TenantShares(settings.ingress.tenant_in_flight),
                connections=self.connections,
                url=self.url,
                cluster_tag=tag,
            )
            self.app = IngressApp(services)
            await self.backend.start()
        except BaseException:
            await self.stop()
            raise
        self._server = _Server(
            uvicorn.Config(
                self.app,
                http=protocol_of(self.app),
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,  # nothing here looks at the peer's address: one layer less per request
                backlog=BACKLOG,
                ssl_context_factory=None if tls is None else lambda *_: tls,
                timeout_graceful_shutdown=max(1, round(settings.ingress.drain_s)),
            )
        )
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._server.serve(sockets=[self._socket])),
            loop.create_task(self._write_uses(auth, settings.ingress.key_touch_s)),
            loop.create_task(self._look(self._server, settings.ingress.peer_timeout_s)),
        ]
        while not self._server.started:
            if self._tasks[0].done():
                await self._tasks[0]
                raise ClusterError(f"the listener on {self.url} ended before it began")
            await asyncio.sleep(0.005)
        self._stream = StreamIn(services)
        self._stream.start()
        log.info("%s listens on %s", self.config.name, self.url)

    async def status(self) -> dict[str, Any]:
        """Facts for the command line."""
        services = self.app.services if self.app is not None else None
        return {
            "kind": "ingress",
            "name": self.config.name,
            "url": self.url,
            "streams": len(self.connections) if self.connections is not None else 0,
            "inFlight": services.in_flight if services is not None else 0,
            "draining": services.draining if services is not None else False,
            "mapVersion": self.backend.membership.map.version if self.backend is not None else 0,
        }

    def check(self) -> None:
        """Raise if this replica cannot serve any more and is to be replaced.

        Only what a new replica would cure: that Postgres or a router is away is told by GET /readyz.
        """
        if self._server is not None and self._tasks and self._tasks[0].done():
            raise ClusterError(f"the listener on {self.url} ended")

    async def stop(self) -> None:
        """Finish what is in flight (at most `ingress.drain_s`), then close everything."""
        if self._stream is not None:
            await self._stream.close()
        if self.app is not None:
            self.app.services.draining = True
        if self._server is not None and self._tasks:
            # uvicorn closes the listener, lets requests end, and closes idle connections.
            self._server.should_exit = True
            drained = self._drain_connections()
            with contextlib.suppress(Exception):
                await self._tasks[0]
            await drained
            deadline = self._clock.monotonic() + self.config.settings.ingress.drain_s
            assert self.app is not None
            while self.app.services.in_flight and self._clock.monotonic() < deadline:
                await asyncio.sleep(0.01)
        for task in self._tasks[1:]:
            task.cancel()
        await asyncio.gather(*self._tasks[1:], return_exceptions=True)
        self._tasks = []
        if self.app is not None:
            with contextlib.suppress(CarillonError):
                await self.app.services.auth.write_uses()
            await self.app.services.auth.close()
            await self.app.services.limits.close()
            await self.app.services.feeds.close()
            await self.app.services.templates.close()
        if self.connections is not None:
            await self.connections.close()
        if self.backend is not None:
            await self.backend.close(leave=True)
        if self._pool is not None:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(5.0):
                    await self._pool.close()
            self._pool.terminate()
            self._pool = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _drain_connections(self) -> asyncio.Future[None]:
        """Begin to end streams and polls, while the listener closes: they come back to another replica."""
        assert self.connections is not None
        return asyncio.ensure_future(self.connections.drain(self.config.settings.ingress.drain_s / 2))

    async def _look(self, server: _Server, patience_s: float) -> None:
        """Cut off callers that neither speak nor listen."""
        while True:
            await asyncio.sleep(min(1.0, patience_s / 4))
            now = self._clock.monotonic()
            for protocol in tuple(server.server_state.connections):
                if isinstance(protocol, DoorProtocol):
                    protocol.look(now, patience_s)

    async def _write_uses(self, auth: Authenticator, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            try:
                await auth.write_uses()
            except CarillonError as exc:
                log.info("the last use of API keys is not written yet: %s", exc)


async def bind_door(host: str, port: int, tag: str, *, tls: bool = False) -> socket.socket:
    """A listening address shared by all replicas of this cluster on this machine (SO_REUSEPORT).

    SO_REUSEPORT lets any process of the same user share the port, another cluster's too, and the kernel would
    then spread requests over both: so whoever listens there already is asked which cluster it belongs to.

    Raises:
        ClusterError: the port is taken by something else.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio (uvloop does not care) switches Nagle's algorithm off only then:
    # an answer of two writes would wait 40 ms for the acknowledgement of the first.
    door = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if port:
            other = await _who_listens(host, port, tls)
            if other is not None and other != tag:
                who = "another Carillon" if other else "another program"
                raise ClusterError(
                    f"port {port} (ingress.direct_port) is taken by {who}; "
                    "stop it or set CARILLON_INGRESS_DIRECT_PORT"
                )
        door.bind((host, port))
        door.setblocking(False)
        return door
    except OSError as exc:
        door.close()
        if exc.errno == errno.EADDRINUSE:
            why = "is taken by another program; stop it or set CARILLON_INGRESS_DIRECT_PORT"
        else:
            why = f"cannot be opened on {host}: {exc.strerror}"
        raise ClusterError(f"port {port} (ingress.direct_port) {why}") from exc
    except BaseException:
        door.close()
        raise


def _unverified() -> ssl.SSLContext:
    """For asking who listens on this machine: what is told is a tag, compared, and no secret is sent."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def _who_listens(host: str, port: int, tls: bool) -> str | None:
    """The cluster tag of the ingress that listens there; "" for anything else, None if nothing does."""
    target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        async with asyncio.timeout(1.0):
            reader, writer = await asyncio.open_connection(target, port, ssl=_unverified() if tls else None)
    except ssl.SSLError:
        return ""
    except (OSError, TimeoutError):
        return None
    try:
        async with asyncio.timeout(1.0):
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = await reader.read(65536)
        head = answer.split(b'"cluster":"', 1)
        return head[1].split(b'"', 1)[0].decode("ascii", "replace") if len(head) == 2 else ""
    except (OSError, TimeoutError):
        return ""
    finally:
        writer.close()
