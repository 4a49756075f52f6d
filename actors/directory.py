"""Links to every shard, and requests that find the owner of a slot."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

from actors.link import Link, LinkClient, LinkHandler
from actors.member import Membership
from carillon.errors import LinkClosedError, RemoteError, UnavailableError
from carillon.messages import Address, ClusterMap, Member, Message

log = logging.getLogger(__name__)

REROUTE_CODES = frozenset(("moved", "fenced"))
"""Failures that say: not here (any more). The request did not run."""


class ShardDirectory:
    """Links to every shard of the map and requests to a slot's owner.

    Args:
        membership: gives the map; links carry its member's name.
        handler: receives what shards send on these links, and their opening and closing (`link.peer` is the
            shard's name). None if nothing is expected.
    """

    def __init__(self, membership: Membership, handler: LinkHandler | None = None) -> None:
        self._membership = membership
        self._handler = handler
        self._clients: dict[str, LinkClient] = {}
        self._links: dict[str, Link] = {}
        self._members: dict[str, Member] = {}
        self._owners: list[Member | None] = []
        self._change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._callbacks: list[Callable[[], None]] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False
        membership.on_map(self._take_map)

    # -- looking up ---------------------------------------------------------------------------------

    def owner(self, slot: int) -> Member | None:
        """The shard that owns `slot` by the newest map, or None while it has none."""
        owners = self._owners
        return owners[slot] if 0 <= slot < len(owners) else None

    def link(self, shard_name: str) -> Link | None:
        """The open link to a shard, or None."""
        link = self._links.get(shard_name)
        return link if link is not None and not link.closed else None

    def shards(self) -> list[Member]:
        """Every shard of the newest map."""
        return list(self._members.values())

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever a map came or a link to a shard opened. It must not block."""
        self._callbacks.append(callback)

    def changed(self) -> asyncio.Future[None]:
        """A future that is done at the next map or opened link. Shared: wait for it, never cancel it."""
        return self._change

    async def request(self, slot: int, message: Message, timeout_s: float) -> Any:
        """Send a request to the owner of `slot`, following it when it moves.

        Delivery: a lost link is ambiguous and the request is sent again, so `message` must be idempotent
        (all messages with a `slot` are).

        Raises:
            RemoteError: the owner answered with another failure than "moved" or "fenced".
            LinkTimeoutError: the owner did not answer; it may or may not have run.
            BusyError: the link's bounds are reached.
            UnavailableError: no owner could be reached within `timeout_s`.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        pause_s = self._membership.config.settings.link.reconnect_min_s
        reason = "the slot has no owner"
        while True:
            member = self.owner(slot)
            link = self.link(member.name) if member is not None else None
            remaining_s = deadline - loop.time()
            if link is None:
                reason = f"no link to {member.name}" if member is not None else "the slot has no owner"
            elif remaining_s > 0:
                try:
                    return await link.request(message, remaining_s)
                except LinkClosedError as exc:
                    reason = str(exc)
                except RemoteError as exc:
                    if exc.code not in REROUTE_CODES:
                        raise
                    reason = str(exc)
                remaining_s = deadline - loop.time()
            if remaining_s <= 0:
                raise UnavailableError(f"slot {slot}: {reason} within {timeout_s} s")
            # Not only a newer map helps: the shard may be the one that is behind and about to hear of its
            # slot, so the same map is tried again after a pause, too.
            wait_s = remaining_s if link is None else min(remaining_s, pause_s * random.uniform(0.5, 1.5))  # noqa: S311
            await self._wait_changed(wait_s)
            pause_s = min(pause_s * 2, self._membership.config.settings.link.reconnect_max_s)

    async def _wait_changed(self, timeout_s: float) -> None:
        await asyncio.wait((self._change,), timeout=timeout_s)  # leaves the shared future alone, always

    # -- keeping up with the map --------------------------------------------------------------------

    def _take_map(self, new: ClusterMap) -> None:
        if self._closed:
            return
        members = {member.name: member for member in new.shards}
        for name in [name for name in self._clients if name not in members]:
            self._drop(name)
        back: list[str] = []
        for name, member in members.items():
            known = self._members.get(name)
            if name not in self._clients:
                self._clients[name] = self._start_client(name)
            elif known is not None and known.incarnation != member.incarnation:
                # The process this link leads to has been replaced; it may hang without having closed it.
                link = self._links.get(name)
                if link is not None and not link.closed:
                    link.abort(LinkClosedError(f"{name} has a new incarnation"))
                # It listens before it joins. Until then each try waited longer, up to `link.reconnect_max_s`.
                back.append(name)
        self._members = members
        for name in back:
            self._clients[name].again()
        shards = new.shards
        self._owners = [shards[index] if 0 <= index < len(shards) else None for index in new.owners]
        self._wake()

    def _start_client(self, name: str) -> LinkClient:
        config = self._membership.config

        async def resolve() -> Address | None:
            member = self._members.get(name)
            return member.address if member is not None else None

        client = LinkClient(
            resolve,
            _DirectoryLinks(self, name, self._handler),
            config.settings.link,
            config.name,
            config.secret,
            machine=self._membership.machine,
            peer=name,
        )
        client.start()
        return client

    def _drop(self, name: str) -> None:
        client = self._clients.pop(name)
        self._spawn(client.close())

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _wake(self) -> None:
        done, self._change = self._change, asyncio.get_running_loop().create_future()
        done.set_result(None)
        for callback in self._callbacks:
            callback()

    def link_opened(self, name: str, link: Link) -> None:
        """A handshake with shard `name` succeeded (called by the link's handler)."""
        self._links[name] = link
        self._wake()

    def link_closed(self, name: str, link: Link) -> None:
        """The link to shard `name` is gone (called by the link's handler)."""
        if self._links.get(name) is link:
            del self._links[name]

    async def close(self) -> None:
        """Close all links and stop dialling."""
        self._closed = True
        for name in list(self._clients):
            self._drop(name)
        while self._closing:
            await asyncio.gather(*self._closing)
        self._wake()


class _DirectoryLinks:
    """Handler of the link to one shard: keeps the directory informed, hands everything on."""

    def __init__(self, directory: ShardDirectory, name: str, handler: LinkHandler | None) -> None:
        self._directory = directory
        self._name = name
        self._handler = handler

    def link_opened(self, link: Link) -> None:
        """See `LinkHandler.link_opened`."""
        self._directory.link_opened(self._name, link)
        if self._handler is not None:
            self._handler.link_opened(link)

    def link_closed(self, link: Link) -> None:
        """See `LinkHandler.link_closed`."""
        self._directory.link_closed(self._name, link)
        if self._handler is not None:
            self._handler.link_closed(link)

    def receive(self, link: Link, message: Any, request: int) -> None:
        """See `LinkHandler.receive`."""
        if self._handler is not None:
            self._handler.receive(link, message, request)
        elif request > 0:
            link.fail_nowait(request, UnavailableError(f"{self._name}: nobody answers here"))

    def read_finished(self, link: Link) -> None:
        """See `LinkHandler.read_finished`."""
        if self._handler is not None:
            self._handler.read_finished(link)
