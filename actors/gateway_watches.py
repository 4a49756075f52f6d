"""Whom the clients of a gateway watch: PRESENCE, from the shards of the watched to the watchers' sockets.

Whom a connection may watch is decided by the shard of its own user (`ClientWatch`, `WatchAnswer`). Then this
gateway watches each user once, however many of its connections do, at the shard that owns the user, and again
at the next owner when the slot moves, the shard gets a new term or the link breaks. Until the new owner has
told, watchers keep what they know: nobody is shown offline because a shard was restarted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from actors.directory import ShardDirectory
from actors.link import Link
from carillon import server_frames
from carillon.clock import rfc3339
from carillon.errors import BusyError, LinkError
from carillon.ids import UserKey, slot_of
from carillon.messages import ClientWatch, PresenceTold, PresenceWatch, WatchAnswer
from carillon.settings import PresenceSettings

BATCH = 1000
"""Users of one message."""


class Watched:
    """A user that connections of this gateway watch.

    Attributes:
        link, term: where it is watched; None while it is nowhere.
        frame: what was told last; None before its shard has told anything.
    """

    __slots__ = ("conns", "frame", "key", "link", "slot", "state", "term")

    def __init__(self, key: UserKey) -> None:
        self.key = key
        self.slot = slot_of(*key)
        self.conns: dict[Any, None] = {}
        self.link: Link | None = None
        self.term = 0
        self.state: tuple[str, int | None] | None = None
        self.frame: bytes | None = None


class Watcher:
    """A connection that asked.

    Attributes:
        asked: its last WATCH_PRESENCE.
        open: the answer to it has not come.
        again: it was asked by us, not by the client.
        users: whom it watches.
        recheck_at: loop time at which we ask again whether it still may.
    """

    __slots__ = ("again", "asked", "open", "recheck_at", "users")

    def __init__(self) -> None:
        self.asked: ClientWatch | None = None
        self.open = self.again = False
        self.users: dict[UserKey, Watched] = {}
        self.recheck_at = float("inf")


class Watches:
    """The watched users and their watchers.

    Args:
        directory: finds owners.
        write: writes a frame, given as JSON, to connections.
        ask: passes a message of a connection to the shard of its user.
    """

    def __init__(
        self,
        directory: ShardDirectory,
        settings: PresenceSettings,
        *,
        write: Callable[[Iterable[Any], bytes], None],
        ask: Callable[[Any, ClientWatch], None],
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._write = write
        self._ask = ask
        self._watchers: dict[Any, Watcher] = {}
        self._watched: dict[UserKey, Watched] = {}
        self._nowhere: dict[Watched, None] = {}  # to be watched at their shard
        self._dropped: dict[tuple[Link, str], list[str]] = {}
        self._flush_scheduled = False
        self._retry: asyncio.TimerHandle | None = None
        self._recheck: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self.count = 0  # watched users, each counted per connection

    def __bool__(self) -> bool:
        return bool(self._watchers)

    def close(self) -> None:
        """Stop."""
        for timer in (self._retry, self._recheck):
            if timer is not None:
                timer.cancel()
        self._watchers.clear()

    # -- connections ------------------------------------------------------------------------------------

    def asked(self, conn: Any, frame: ClientWatch) -> bool:
        """A client sent WATCH_PRESENCE; False if it was refused right here."""
        frame.users = list(dict.fromkeys(frame.users))
        most = self._settings.max_per_connection
        if len(frame.users) > most:
            told = f"expected userIds to be at most {most} user ids, got {len(frame.users)}"
            self._write((conn,), server_frames.error("invalid", told, False, frame.ref))
            return False
        watcher = self._watchers.get(conn)
        mine = 0 if watcher is None else len(watcher.users)
        if self.count - mine + len(frame.users) > self._settings.max_per_gateway:
            told = "this gateway's clients watch as many users as it can tell of"
            self._write((conn,), server_frames.error("busy", told, True, frame.ref))
            return False
        if watcher is None:
            if not frame.users:
                if frame.ref is not None:
                    self._write((conn,), server_frames.ok(frame.ref))
                return False
            watcher = self._watchers[conn] = Watcher()
        watcher.asked, watcher.open, watcher.again = frame, True, False
        return True

    def attached(self, conn: Any, held: Iterable[Any]) -> None:
        """A connection has another attachment: what its last shard did not answer is asked once more."""
        watcher = self._watchers.get(conn)
        if watcher is None or not watcher.open or watcher.asked is None:
            return
        if not any(message is watcher.asked for message in held):
            self._ask(conn, watcher.asked)

    def answered(self, conn: Any, answer: WatchAnswer) -> None:
        """The shard of a connection's user has decided."""
        watcher = self._watchers.get(conn)
        if watcher is None or watcher.asked is None:
            return
        again = watcher.again
        if answer.ref == watcher.asked.ref:
            watcher.open = False
        if answer.code:
            if not (again and answer.temporary):
                frame = server_frames.error(answer.code, answer.message, answer.temporary, answer.ref)
                self._write((conn,), frame)
            if not answer.temporary:
                self._watch(conn, watcher, [])
                if not watcher.open:  # else a later wish waits for an answer of its own
                    del self._watchers[conn]
                return
        else:
            if answer.ref is not None and not again:
                self._write((conn,), server_frames.ok(answer.ref, answer.refused))
            known = () if not again else watcher.users
            self._watch(conn, watcher, answer.users)
            for key, watched in watcher.users.items():
                if watched.frame is not None and key not in known:
                    self._write((conn,), watched.frame)
            if not watcher.users and not watcher.open:
                self._watchers.pop(conn, None)
                return
        watcher.recheck_at = self._loop.time() + self._settings.recheck_s
        if self._recheck is None:
            self._recheck = self._loop.call_later(self._settings.recheck_s, self._ask_again)

    def ended(self, conn: Any) -> None:
        """A connection is gone."""
        watcher = self._watchers.pop(conn, None)
        if watcher is not None:
            self._watch(conn, watcher, [])

    def _watch(self, conn: Any, watcher: Watcher, users: Iterable[str]) -> None:
        """Let a connection watch these users and no others."""
        before, watcher.users = watcher.users, {}
        self.count -= len(before)
        for user in users:
            key = UserKey(conn.tenant, user)
            watched = before.pop(key, None) or self._watched.get(key)
            if watched is None:
                watched = self._watched[key] = Watched(key)
                self._nowhere[watched] = None
                self._schedule()
            watched.conns[conn] = None
            watcher.users[key] = watched
        for watched in before.values():
            watched.conns.pop(conn, None)
            if not watched.conns:
                self._drop(watched)
        self.count += len(watcher.users)

    def _drop(self, watched: Watched) -> None:
        del self._watched[watched.key]
        self._nowhere.pop(watched, None)
        if watched.link is not None:
            self._dropped.setdefault((watched.link, watched.key.tenant), []).append(watched.key.user)
            self._schedule()

    def _ask_again(self) -> None:
        """Ask whether connections still may watch whom they watch: a friendship may have ended."""
        self._recheck = None
        now, next_at = self._loop.time(), float("inf")
        for conn, watcher in list(self._watchers.items()):
            asked = watcher.asked
            if watcher.recheck_at <= now and not watcher.open and asked is not None:
                watcher.asked = ClientWatch(0, asked.users)
                watcher.open = watcher.again = True
                watcher.recheck_at = now + self._settings.recheck_s
                self._ask(conn, watcher.asked)
            next_at = min(next_at, watcher.recheck_at)
        if self._watchers and next_at < float("inf"):
            self._recheck = self._loop.call_at(max(next_at, now + 0.01), self._ask_again)

    # -- watching at shards -----------------------------------------------------------------------------

    def _schedule(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Tell shards whom to tell of, and whom no longer."""
        self._flush_scheduled = False
        dropped, self._dropped = self._dropped, {}
        for (link, tenant), users in dropped.items():
            self._send(link, tenant, users, False)
        wanted: dict[tuple[Link, str], list[Watched]] = {}
        for watched in self._nowhere:
            member = self._directory.owner(watched.slot)
            link = self._directory.link(member.name) if member is not None else None
            if member is not None and link is not None:
                watched.term = member.term
                wanted.setdefault((link, watched.key.tenant), []).append(watched)
        for (link, tenant), some in wanted.items():
            if self._send(link, tenant, [watched.key.user for watched in some], True):
                for watched in some:
                    watched.link = link
                    del self._nowhere[watched]
            else:
                self._retry_later()

    def _send(self, link: Link, tenant: str, users: list[str], watch: bool) -> bool:
        try:
            for at in range(0, len(users), BATCH):
                link.send_nowait(PresenceWatch(tenant, users[at : at + BATCH], watch))
        except (LinkError, BusyError):
            return False  # it is closed, or its owner resets it: both end in `link_closed`
        return True

    def _retry_later(self) -> None:
        if self._retry is None:
            self._retry = self._loop.call_later(self._settings.retry_s, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        self.flush()

    def map_changed(self) -> None:
        """Watch at the new owner whoever has one, or one of a new term."""
        for watched in self._watched.values():
            if watched.link is not None:
                member = self._directory.owner(watched.slot)
                if member is None or watched.link.peer != member.name or watched.term != member.term:
                    watched.link = None
                    self._nowhere[watched] = None
        self.owners_changed()

    def link_closed(self, link: Link) -> None:
        """A shard is gone, or its link."""
        for watched in self._watched.values():
            if watched.link is link:
                watched.link = None
                self._nowhere[watched] = None
        self.owners_changed()

    def owners_changed(self) -> None:
        """A map came or a link to a shard opened."""
        if self._nowhere:
            self._schedule()

    def told(self, link: Link, message: PresenceTold) -> None:
        """A shard tells of its users."""
        tenant = message.tenant
        for one in message.users:
            watched = self._watched.get(UserKey(tenant, one.user))
            if watched is None or watched.link is not link:
                continue
            # While somebody is there, "last seen" is now and says nothing.
            state = (one.status, one.last_seen_ms if one.status == "offline" else None)
            if state == watched.state:
                continue
            watched.state = state
            seen = None if one.last_seen_ms is None else rfc3339(one.last_seen_ms)
            watched.frame = server_frames.presence(one.user, one.status, seen)
            self._write(tuple(watched.conns), watched.frame)
        for user in message.moved:
            watched = self._watched.get(UserKey(tenant, user))
            if watched is not None and watched.link is link:
                watched.link = None
                self._nowhere[watched] = None
                self._retry_later()
