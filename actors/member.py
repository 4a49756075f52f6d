"""Membership: what every actor of the cluster has in common.

A member listens for links, joins the coordinator, keeps the newest cluster map and renews its lease. If the
coordinator is lost it goes on with the last map and dials again: the coordinator is needed to change the
cluster, not to run it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import importlib
import logging
import os
import stat
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from actors.config import COORDINATOR_NAME, ActorConfig
from actors.link import Link, LinkClient, LinkHandler, LinkServer
from carillon.clock import Clock, SystemClock
from carillon.errors import CarillonError, LinkClosedError, LinkError, UnavailableError
from carillon.messages import Address, ClusterMap, Join, Leave, Member, Message, Renew
from carillon.metrics import Stats
from carillon.settings import ClusterSettings

log = logging.getLogger(__name__)

UNIX_PATH_LIMIT: Final = 107
"""Longest path of a Unix socket (sun_path is 108 bytes with its NUL)."""


def machine_id() -> str:
    """Identity of this machine since its boot; empty if the system does not tell.

    Containers of one host share it although they may not share the file system: `dial` falls back to TCP
    when the socket's file is not there.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def socket_path(runtime_dir: str, name: str) -> str:
    """Where a member's Unix socket goes: `<runtime_dir>/run/<name>.sock`, if that is short enough.

    Otherwise a private folder under the system's temporary one, named after the runtime folder. Returns ""
    (TCP only) if neither can be made safely.
    """
    run = Path(runtime_dir).resolve() / "run"
    file_name = f"{name}.sock"
    if len(os.fsencode(str(run / file_name))) <= UNIX_PATH_LIMIT:
        with contextlib.suppress(OSError):
            run.mkdir(mode=0o700, parents=True, exist_ok=True)
            return str(run / file_name)
    digest = hashlib.sha256(os.fsencode(str(run))).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"carillon-{os.getuid()}-{digest}"
    path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.sock"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return ""
    # The name is predictable and /tmp is everybody's: a folder that another user made must not be used.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        return ""
    return str(path) if len(os.fsencode(str(path))) <= UNIX_PATH_LIMIT else ""


def advertised_host(cluster: ClusterSettings, node: str, bound_host: str) -> str:
    """The host that others are told for what an actor of `node` listens on at `bound_host`.

    `cluster.advertise_host` if it is set; else the bound address; for "any address" that of the Ray node,
    because 0.0.0.0 leads nobody anywhere and 127.0.0.1 leads another machine to itself.
    """
    if cluster.advertise_host:
        return cluster.advertise_host
    if bound_host not in ("0.0.0.0", "::"):
        return bound_host
    if node == "local":
        return "127.0.0.1"
    return str(importlib.import_module("ray.util").get_node_ip_address())


class RayCoordinatorResolver:
    """Asks Ray for the coordinator's present address.

    The actor is looked up anew each time: a kept handle may be of a dead actor, and `get_actor` may return
    a dying one, so that only an answer counts.
    """

    def __init__(self, namespace: str, timeout_s: float) -> None:
        self._namespace = namespace
        self._timeout_s = timeout_s
        self._lookup: concurrent.futures.Future[Any] | None = None

    async def __call__(self) -> Address | None:
        """The address, or None while the coordinator is not there."""
        try:
            async with asyncio.timeout(self._timeout_s):
                handle = await asyncio.shield(asyncio.wrap_future(self._start_lookup()))
                if isinstance(handle, Exception):
                    raise handle
                answer = await asyncio.wrap_future(handle.link_address.remote().future())
        except TimeoutError:
            log.info("the coordinator did not answer within %s s", self._timeout_s)
            return None
        except asyncio.CancelledError:
            raise
        except Exception as exc:  # Ray's errors share no base: ValueError for no such actor, RayError, ...
            log.info("no coordinator yet: %s: %s", type(exc).__name__, str(exc).split("\n", 1)[0])
            return None
        if answer is None or isinstance(answer, Address):
            return answer
        return msgspec.convert(answer, _AddressDict).to_address()

    def _start_lookup(self) -> concurrent.futures.Future[Any]:
        """`ray.get_actor` blocks on the GCS: one daemon thread at most waits for it, the loop never."""
        if self._lookup is not None and not self._lookup.done():
            return self._lookup
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._lookup = future

        def look() -> None:
            found: Any
            try:
                ray = importlib.import_module("ray")  # not at import time: tests run without Ray
                found = ray.get_actor(COORDINATOR_NAME, namespace=self._namespace)
            except Exception as exc:
                found = exc  # a result, as nobody may wait any more: no "never retrieved" in the log
            future.set_result(found)

        threading.Thread(target=look, name="coordinator-lookup", daemon=True).start()
        return future


class _AddressDict(msgspec.Struct):
    host: str
    port: int
    unix_path: str = ""
    machine: str = ""

    def to_address(self) -> Address:
        return Address(self.host, self.port, self.unix_path, self.machine)


class Membership:
    """One link server + the link to the coordinator + the newest cluster map + lease renewals.

    Args:
        config: who this member is.
        handler: gets everything of the links that others open to this member; messages of the coordinator
            other than maps come to its `receive` too.
        stats: carried by each renewal.
        public: what clients dial (a gateway's ws:// URL); may be set as an attribute before `start`.
        clock: for the lease; None is the system's.
    """

    def __init__(
        self,
        config: ActorConfig,
        handler: LinkHandler,
        *,
        stats: Stats,
        public: str = "",
        clock: Clock | None = None,
    ) -> None:
        self.config = config
        self.stats = stats
        self.public = public
        self.machine = machine_id()
        self.incarnation = os.urandom(8).hex()
        self.map = ClusterMap(0, [], [], [])
        self.member = Member(config.kind, config.name, config.node, self.incarnation, Address("", 0))
        self._clock = clock or SystemClock()
        self._handler = handler
        self._callbacks: list[Callable[[ClusterMap], None]] = []
        self._first_map = asyncio.Event()
        self._renewed_at = float("-inf")
        settings = config.settings
        self._server = LinkServer(handler, settings.link, config.name, config.secret)
        self._resolve: Callable[[], Awaitable[Address | None]] = RayCoordinatorResolver(
            settings.cluster.namespace, settings.link.handshake_timeout_s
        )
        if config.coordinator is not None:
            self._resolve = self._fixed_coordinator
        self._coordinator = LinkClient(
            self._resolve,
            _CoordinatorLinks(self),
            settings.link,
            config.name,
            config.secret,
            machine=self.machine,
            on_open=self._join,
        )
        self._pushed_version = 0  # highest version pushed on the present link
        self._renewals: asyncio.Task[None] | None = None

    # -- life cycle ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, join, and return once the first map is here (however long the coordinator takes).

        Cancellation: everything opened so far is closed.
        """
        cluster = self.config.settings.cluster
        try:
            path = socket_path(cluster.runtime_dir, self.config.name)
            host, port = await self._server.start(cluster.bind_host, 0, path)
            shown = advertised_host(cluster, self.config.node, host)
            self.member = Member(
                self.config.kind,
                self.config.name,
                self.config.node,
                self.incarnation,
                Address(shown, port, path, self.machine if path else ""),
                self.public,
                dict(self.config.labels),
            )
            self._coordinator.start()
            self._renewals = asyncio.get_running_loop().create_task(self._renew_for_ever())
            await self._first_map.wait()
        except BaseException:
            await self.close()
            raise

    async def close(self, leave: bool = False) -> None:
        """Stop listening, close all links, remove the socket.

        Args:
            leave: tell the coordinator first and wait (at most `link.request_timeout_s`) until it has moved
                what this member owned. False looks like a crash to it: the lease runs out.
        """
        if leave:
            await self.leave()
        await self._stop_renewals()
        await self._coordinator.close()
        await self._server.close()

    async def leave(self) -> bool:
        """Tell the coordinator that this member goes; what it owned has moved when this returns.

        It goes on answering links until `close`, with the last map: whoever still asks is sent to the new
        owner.

        Returns:
            False if the coordinator could not be told: to it this will look like a crash.
        """
        await self._stop_renewals()  # one behind the Leave would be a stranger's: it would close the link
        try:
            await self.ask_coordinator(Leave(self.config.name, self.incarnation))
            left = True
        except CarillonError as exc:
            log.info("%s: the coordinator was not told that it leaves: %s", self.config.name, exc)
            left = False
        await self._coordinator.close()  # a link that is lost would be dialled again, and joined
        return left

    async def _stop_renewals(self) -> None:
        if self._renewals is not None:
            self._renewals.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._renewals
            self._renewals = None

    # -- the map ------------------------------------------------------------------------------------

    def on_map(self, callback: Callable[[ClusterMap], None]) -> None:
        """Call `callback` with each new map, and at once if there is one. It must not block."""
        self._callbacks.append(callback)
        if self.map.version:
            self._notify(callback)

    def members(self, kind: str) -> list[Member]:
        """The live members of one kind, by the newest map."""
        if kind == "shard":
            return list(self.map.shards)
        return [member for member in self.map.members if member.kind == kind]

    def _take_map(self, new: ClusterMap) -> None:
        self.map = new
        self._first_map.set()
        for callback in tuple(self._callbacks):
            self._notify(callback)

    def _notify(self, callback: Callable[[ClusterMap], None]) -> None:
        try:
            callback(self.map)
        except Exception:
            log.exception("%s: taking map %d failed", self.config.name, self.map.version)

    def map_pushed(self, new: ClusterMap) -> None:
        """A map came one-way from the coordinator: a higher version replaces a lower one."""
        self._pushed_version = max(self._pushed_version, new.version)
        if new.version > self.map.version:
            self._take_map(new)

    # -- the coordinator ----------------------------------------------------------------------------

    async def ask_coordinator(self, message: Message, timeout_s: float | None = None) -> Any:
        """Send a request to the coordinator.

        Raises:
            UnavailableError: there is no link to it now.
            RemoteError, LinkClosedError, LinkTimeoutError: see `Link.request`.
        """
        try:
            link = self._coordinator.open_link()
        except LinkClosedError as exc:
            raise UnavailableError("the coordinator is not reachable") from exc
        return await link.request(message, timeout_s)

    def coordinator_link(self) -> Link | None:
        """The open and joined link to the coordinator, if there is one."""
        link = self._coordinator.link
        return link if link is not None and not link.closed else None

    def lease_valid(self) -> bool:
        """False once no renewal could be sent for `cluster.lease_timeout_s`: slots may have moved by now.

        A hint to stop early. What is safe is decided by the term in Postgres, not by this clock.
        """
        return self._clock.monotonic() - self._renewed_at <= self.config.settings.cluster.lease_timeout_s

    async def _fixed_coordinator(self) -> Address | None:
        return self.config.coordinator

    async def _join(self, link: Link) -> None:
        self._pushed_version = 0
        sent_at = self._clock.monotonic()
        answer = await link.request(Join(self.member))
        if not isinstance(answer, ClusterMap):
            raise LinkError(f"expected ClusterMap in answer to Join, got {type(answer).__name__}")
        self._renewed_at = sent_at
        # A newer map may have been pushed behind the answer and been taken before this coroutine ran. A
        # version lower than what an earlier coordinator told us is taken all the same: its table was
        # restored from an older backup, and it is the one that decides.
        if answer.version < self._pushed_version:
            return
        if answer.version < self.map.version:
            log.warning("the cluster map went back from version %d to %d", self.map.version, answer.version)
        self._take_map(answer)

    async def _renew_for_ever(self) -> None:
        interval_s = self.config.settings.cluster.lease_renew_s
        while True:
            await asyncio.sleep(interval_s)
            link = self.coordinator_link()
            if link is None:
                continue
            try:
                link.send_nowait(Renew(self.config.name, self.incarnation, *self.stats.snapshot()))
            except CarillonError as exc:
                log.info("%s: renewal failed: %s", self.config.name, exc)
            else:
                self._renewed_at = self._clock.monotonic()


class _CoordinatorLinks:
    """Takes maps; hands everything else the coordinator sends to the member's own handler."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    def link_opened(self, link: Link) -> None:
        """Nothing: `Membership._join` follows."""

    def link_closed(self, link: Link) -> None:
        """Nothing: the member goes on with its last map."""

    def receive(self, link: Link, message: Any, request: int) -> None:
        """Take a map."""
        if type(message) is ClusterMap:
            self._membership.map_pushed(message)
        else:
            self._membership._handler.receive(link, message, request)

    def read_finished(self, link: Link) -> None:
        """See `LinkHandler.read_finished`."""
        self._membership._handler.read_finished(link)
