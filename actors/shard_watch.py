"""Who may watch whose presence: the shard of the watcher answers, by its tenant's policy."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from actors.link import Link
from actors.shard_policies import Policies
from actors.shard_users import User
from carillon.clock import Clock
from carillon.errors import BusyError, CarillonError, NotPermittedError
from carillon.ids import UserKey
from carillon.messages import ClientWatch, WatchAnswer
from carillon.policy import WatchRule, callback_allowed
from carillon.settings import PresenceSettings

if TYPE_CHECKING:
    from stores.watch_callback import WatchCallback

log = logging.getLogger(__name__)

MAX_KNOWN: Final = 10_000
"""Watchers whose last answer is kept; the oldest goes."""
MAX_QUEUED: Final = 4
"""Unanswered requests of one connection; its next one is answered busy."""


class _Known(NamedTuple):
    """What a tenant's URL answered to a watcher's last request."""

    url: str
    users: tuple[str, ...]
    allowed: set[str]
    until: float


class WatchPermission:
    """Answers WATCH_PRESENCE.

    Args:
        policies: gives the rule of a tenant.
        read_secret: gives the client secret of a tenant, which signs what is asked of its URL.
    """

    def __init__(
        self,
        policies: Policies,
        settings: PresenceSettings,
        clock: Clock,
        read_secret: Callable[[str], Awaitable[str | None]],
    ) -> None:
        self._policies = policies
        self._settings = settings
        self._clock = clock
        self._read_secret = read_secret
        self._callback: WatchCallback | None = None
        self._free = asyncio.Semaphore(settings.callback_at_once)
        self._known: OrderedDict[UserKey, _Known] = OrderedDict()
        self._queues: dict[tuple[Link, int], list[ClientWatch]] = {}  # the first is being answered
        self._tasks: set[asyncio.Task[None]] = set()

    def ask(self, link: Link, message: ClientWatch, user: User) -> None:
        """Answer a client's wish with a `WatchAnswer`, now or later.

        Ordering: a connection's wishes are answered in their order.
        """
        rule = self._policies.of(user.key.tenant).presence
        queue = self._queues.get((link, message.conn))
        if queue is not None:
            if len(queue) >= MAX_QUEUED:
                self._refuse(link, message, BusyError("the requests before are not answered yet"))
            else:
                queue.append(message)
        elif not message.users or rule.watch == "tenant":
            self._send(link, WatchAnswer(message.conn, message.users, ref=message.ref))
        elif rule.watch != "callback":
            self._refuse(link, message, NotPermittedError("watching presence is not permitted here"))
        elif len(self._queues) >= self._settings.callback_waiting:
            self._refuse(link, message, BusyError("too many wait for their tenant's answer"))
        else:
            self._queues[link, message.conn] = [message]
            task = asyncio.get_running_loop().create_task(self._answer_queue(link, message.conn, user))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer_queue(self, link: Link, conn: int, user: User) -> None:
        queue = self._queues[link, conn]
        try:
            while queue:
                message = queue[0]
                try:
                    await self._answer(link, message, user)
                except CarillonError as exc:
                    self._refuse(link, message, exc)
                except Exception as exc:
                    log.exception("WATCH_PRESENCE was not answered")
                    self._refuse(link, message, CarillonError(str(exc)))
                del queue[0]
        finally:
            del self._queues[link, conn]

    async def _answer(self, link: Link, message: ClientWatch, user: User) -> None:
        rule = self._policies.of(user.key.tenant).presence
        if rule.watch == "callback" and message.users:
            allowed = await self._allowed(user.key, rule, message.users)
        elif rule.watch == "nobody":
            allowed = set[str]()
        else:
            allowed = set(message.users)
        users = [name for name in message.users if name in allowed]
        if message.users and not users:
            raise NotPermittedError("none of these users may be watched")
        refused = [name for name in message.users if name not in allowed]
        self._send(link, WatchAnswer(message.conn, users, refused, message.ref))

    async def _allowed(self, key: UserKey, rule: WatchRule, users: Sequence[str]) -> set[str]:
        if not callback_allowed(rule.url, self._settings.callback_hosts):
            log.warning(
                "the presence URL of tenant %s is not asked: its host is not in presence.callback_hosts",
                key.tenant,
            )
            raise NotPermittedError("watching presence is not permitted here")
        asked, known = tuple(users), self._known.get(key)
        fresh = known is not None and self._clock.monotonic() < known.until
        if known is not None and fresh and (known.url, known.users) == (rule.url, asked):
            return known.allowed
        async with self._free:
            secret = await self._read_secret(key.tenant)
            if secret is None:
                raise NotPermittedError("there is no such tenant any more")
            allowed = await self._client().ask(rule.url, secret, key.tenant, key.user, users)
        until = self._clock.monotonic() + self._settings.permission_ttl_s
        self._known[key] = _Known(rule.url, asked, allowed, until)
        self._known.move_to_end(key)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return allowed

    def _client(self) -> WatchCallback:
        if self._callback is None:
            # Its HTTP client is slow to import, and few tenants have such a URL.
            from stores.watch_callback import WatchCallback

            self._callback = WatchCallback(self._settings, self._clock)
        return self._callback

    def _refuse(self, link: Link, message: ClientWatch, exc: CarillonError) -> None:
        code, told = exc.code, str(exc)
        self._send(link, WatchAnswer(message.conn, [], message.users, message.ref, code, told, exc.temporary))

    def _send(self, link: Link, answer: WatchAnswer) -> None:
        if link.closed:
            return  # the gateway asks the shard that it attaches the connection to
        try:
            link.send_nowait(answer)
        except CarillonError as exc:
            log.info("an answer to WATCH_PRESENCE was not sent to %s: %s", link.peer, exc)

    async def close(self) -> None:
        """Stop asking."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._callback is not None:
            await self._callback.close()
