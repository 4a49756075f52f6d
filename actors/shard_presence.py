"""What a shard tells of its users' presence: to gateways whose clients watch them, and to queries.

A user whom nobody watches costs one look into a dictionary when its status changes, and nothing else. Changes
are gathered for `presence.coalesce_s` and told as the state they lead to. What is told is always the present
state, read when it is sent, so that messages of one link never go back in time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from actors.link import Link
from actors.shard_mirror import Mirror
from actors.shard_users import User, UserCache
from carillon.clock import Clock
from carillon.errors import CarillonError, NotOwnerError
from carillon.ids import UserKey, slot_of
from carillon.messages import (
    DevicePresence,
    PresenceQuery,
    PresenceReply,
    PresenceTold,
    PresenceWatch,
    UserPresence,
    WatchedUser,
)
from carillon.presence import as_seen, devices_of
from carillon.settings import PresenceSettings
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)

_NEVER = (None, None)
BATCH = 1000
"""Users of one message."""


class Presence:
    """Watchers and queries of one shard.

    Args:
        shard: name told in PresenceTold.
        settle_s: after a slot came here, so long a user without a session may be one whose gateway has not
            attached it again yet: nobody is told "offline" before.
        term: gives the present term.
        owns: whether a slot is this shard's.
        mirror: keeps presence in Redis; None: nobody does.
    """

    def __init__(
        self,
        shard: str,
        store: ShardStore,
        users: UserCache,
        clock: Clock,
        settings: PresenceSettings,
        settle_s: float,
        *,
        term: Callable[[], int],
        owns: Callable[[int], bool],
        mirror: Mirror | None = None,
    ) -> None:
        self._shard = shard
        self._store = store
        self._users = users
        self._clock = clock
        self._settings = settings
        self._settle_s = settle_s
        self._term = term
        self._owns = owns
        self._mirror = mirror
        self._watchers: dict[UserKey, dict[Link, None]] = {}
        self._watched: dict[Link, dict[UserKey, None]] = {}
        self._changed: dict[UserKey, User] = {}  # watched, and not told yet
        self._settles_at: dict[int, float] = {}  # slots that came lately
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def watched(self) -> int:
        """Users that somebody watches."""
        return len(self._watchers)

    # -- slots ------------------------------------------------------------------------------------------

    def slots_taken(self, slots: Iterable[int]) -> None:
        """Slots came here."""
        at = self._clock.monotonic() + self._settle_s
        self._settles_at |= dict.fromkeys(slots, at)

    def slots_lost(self, slots: set[int]) -> None:
        """Slots went away, perhaps to come back: whoever watched here is told to watch at the owner."""
        for slot in slots:
            self._settles_at.pop(slot, None)
        moved: dict[tuple[Link, str], list[str]] = {}
        for key in [key for key in self._watchers if slot_of(*key) in slots]:
            self._changed.pop(key, None)
            for link in self._watchers.pop(key):
                self._forget(link, key)
                moved.setdefault((link, key.tenant), []).append(key.user)
        for (link, tenant), users in moved.items():
            for at in range(0, len(users), BATCH):
                self._send(link, tenant, [], users[at : at + BATCH])

    def _settle_left_s(self, key: UserKey) -> float:
        if not self._settles_at:
            return 0.0
        left_s = self._settles_at.get(slot_of(*key), 0.0) - self._clock.monotonic()
        if left_s > 0:
            return left_s
        now = self._clock.monotonic()
        self._settles_at = {slot: at for slot, at in self._settles_at.items() if at > now}
        return 0.0

    # -- watchers ---------------------------------------------------------------------------------------

    def receive(self, link: Link, message: PresenceWatch) -> None:
        """A gateway watches users, or does no longer."""
        if not message.watch:
            for user in message.users:
                key = UserKey(message.tenant, user)
                links = self._watchers.get(key)
                if links is not None and link in links:
                    del links[link]
                    if not links:
                        del self._watchers[key]
                        self._changed.pop(key, None)
                    self._forget(link, key)
            return
        mine, moved = [], []
        for user in message.users:
            (mine if self._owns(slot_of(message.tenant, user)) else moved).append(user)
        if moved:
            self._send(link, message.tenant, [], moved)
        if not mine:
            return
        watched = self._watched.setdefault(link, {})
        for user in mine:
            key = UserKey(message.tenant, user)
            watched[key] = None
            self._watchers.setdefault(key, {})[link] = None
        self._spawn(self._tell_first(link, message.tenant, mine))

    def link_closed(self, link: Link) -> None:
        """A gateway is gone, or its link; it watches again over a new one."""
        for key in self._watched.pop(link, ()):
            links = self._watchers[key]
            del links[link]
            if not links:
                del self._watchers[key]
                self._changed.pop(key, None)

    def status_changed(self, user: User) -> None:
        """A session's status changed: nobody's business if its user is invisible, not even that it did."""
        if user.invisible_since_ms is None:
            self.changed(user)

    def changed(self, user: User) -> None:
        """What others may see of a user changed."""
        if self._mirror is not None:
            self._mirror.changed(user)
        if user.key not in self._watchers:
            return
        self._changed[user.key] = user
        if self._timer is None:
            self._timer = self._loop.call_later(self._settings.coalesce_s, self._tell_changed)

    def _forget(self, link: Link, key: UserKey) -> None:
        watched = self._watched.get(link)
        if watched is not None:
            watched.pop(key, None)
            if not watched:
                del self._watched[link]

    async def _tell_first(self, link: Link, tenant: str, users: list[str]) -> None:
        """Tell the present state of users that were not watched by this gateway before."""
        now, later, wait_s = [], [], 0.0
        for name in users:
            key = UserKey(tenant, name)
            user = self._users.peek(key)
            left_s = self._settle_left_s(key) if user is None or user.session is None else 0.0
            if left_s > 0:
                later.append(name)
                wait_s = max(wait_s, left_s)
            else:
                now.append(name)
        await self._tell_present(link, tenant, now)
        if later:
            await asyncio.sleep(wait_s)
            await self._tell_present(link, tenant, later)

    async def _tell_present(self, link: Link, tenant: str, users: list[str]) -> None:
        if not users:
            return
        unknown = [name for name in users if self._users.peek(UserKey(tenant, name)) is None]
        seen_at = await self._last_seen(tenant, unknown)
        now_ms = self._clock.now_ms()
        told: list[WatchedUser] = []
        for name in users:
            key = UserKey(tenant, name)
            if link not in self._watchers.get(key, ()):
                continue  # unwatched meanwhile, or moved
            user = self._users.peek(key)
            if user is None:
                told.append(WatchedUser(name, *as_seen("offline", *seen_at.get(name, _NEVER))))
            else:
                told.append(WatchedUser(name, *user.presence(now_ms)))
        for at in range(0, len(told), BATCH):
            self._send(link, tenant, told[at : at + BATCH])

    def _tell_changed(self) -> None:
        """Tell what changed since the last time, each gateway what it watches."""
        self._timer = None
        changed, self._changed = self._changed, {}
        now_ms = self._clock.now_ms()
        by_link: dict[tuple[Link, str], list[WatchedUser]] = {}
        for key, user in changed.items():
            told = WatchedUser(key.user, *user.presence(now_ms))
            for link in self._watchers.get(key, ()):
                by_link.setdefault((link, key.tenant), []).append(told)
        for (link, tenant), users in by_link.items():
            for at in range(0, len(users), BATCH):
                self._send(link, tenant, users[at : at + BATCH])

    def _send(self, link: Link, tenant: str, users: list[WatchedUser], moved: Iterable[str] = ()) -> None:
        if link.closed:
            return
        try:
            link.send_nowait(PresenceTold(self._shard, self._term(), tenant, users, list(moved)))
        except CarillonError as exc:
            # It does not read. Over its next link it watches anew and learns what it missed.
            log.info("%s: presence for %s was not sent: %s", self._shard, link.peer, exc)
            link.close()

    async def _last_seen(self, tenant: str, users: list[str]) -> dict[str, tuple[int | None, int | None]]:
        if not users:
            return {}
        try:
            return await self._store.last_seen(tenant, users)
        except CarillonError:
            return {}  # who is not in memory is not connected, whatever Postgres says

    # -- queries ----------------------------------------------------------------------------------------

    async def query(self, message: PresenceQuery) -> PresenceReply:
        """The users' presence, in the order asked.

        Raises:
            NotOwnerError: some user is not this shard's; only its owner knows.
        """
        tenant, users = message.tenant, self._users
        unknown = [name for name in message.users if users.peek(UserKey(tenant, name)) is None]
        seen_at = await self._last_seen(tenant, unknown)
        now_ms = self._clock.now_ms()
        found: list[UserPresence] = []
        for name in message.users:
            key = UserKey(tenant, name)
            if not self._owns(slot_of(tenant, name)):
                raise NotOwnerError(f"the slot of {name!r} is not here")
            user = users.peek(key)
            if user is None:
                last_ms, invisible_ms = seen_at.get(name, _NEVER)
                status, seen_ms = as_seen("offline", last_ms, invisible_ms)
                found.append(UserPresence(name, status, [], seen_ms, invisible_ms is not None))
                continue
            status, seen_ms = user.presence(now_ms)
            devices: list[DevicePresence] = []
            if user.session is not None:
                devices = devices_of(user.session.attachments)
            invisible = user.invisible_since_ms is not None
            found.append(UserPresence(name, status, devices, seen_ms, invisible))
        return PresenceReply(found)

    # -- inside -----------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop telling."""
        if self._mirror is not None:
            await self._mirror.close()
        if self._timer is not None:
            self._timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
