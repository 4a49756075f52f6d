"""Durable changes that users make (read, seen, archived, ...), applied by the writer, round by round."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from actors.shard_users import User
from carillon import server_frames
from carillon.clock import Clock, rfc3339
from carillon.errors import CarillonError, NotFoundError
from carillon.session import Effect
from stores.postgres.shard_rows import ChangeDone
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)

AGAIN_MS = 1000
"""Pause before a count that failed is tried again."""


class ChangeEntry:
    """One state change on its way.

    Attributes:
        done: called with (changed, rev, unread) after the commit, or with the error.
        device: that made it; "" if that is not known.
    """

    __slots__ = ("device", "done", "ids", "op", "strict", "up_to_seq", "user")

    def __init__(
        self,
        user: User,
        op: str,
        ids: list[bytes],
        up_to_seq: int | None,
        strict: bool,
        done: Callable[[Any], None],
        device: str = "",
    ) -> None:
        self.device = device
        self.user = user
        self.op = op
        self.ids = ids
        self.up_to_seq = up_to_seq
        self.strict = strict
        self.done = done


class Changes:
    """Applies changes, one statement per operation.

    Args:
        term: gives the shard's present term.
        run: carries out session effects.
        withdrawn: called when pushes are to be taken back.
        expires: called with users of whom something expires, and when.
    """

    def __init__(
        self,
        store: ShardStore,
        clock: Clock,
        *,
        term: Callable[[], int],
        run: Callable[[User, list[Effect]], None],
        withdrawn: Callable[[], None],
        expires: Callable[[User, int], None],
    ) -> None:
        self._expires = expires
        self._store = store
        self._clock = clock
        self._term = term
        self._run_effects = run
        self._withdrawn = withdrawn

    async def apply(self, op: str, changes: list[ChangeEntry]) -> None:
        """Apply changes of one operation, of each user one, and answer them. Raises CarillonError: those that
        are not answered yet may have been committed or not."""
        if op == "expire":
            await self.expire(changes)
            return
        now_ms = self._clock.now_ms()
        results: dict[int, ChangeDone] = {}
        devices = {c.user.stream_id: c.device for c in changes if c.device}
        if op == "read_all":
            upto = {
                c.user.stream_id: c.user.seq if c.up_to_seq is None else min(c.up_to_seq, c.user.seq)
                for c in changes
            }
            if upto:
                results = await self._store.read_all(self._term(), list(upto.items()), now_ms, devices)
        else:
            upto = {}
            wanted = [(c.user.stream_id, list(dict.fromkeys(c.ids))) for c in changes if c.ids]
            if wanted:
                results = await self._store.change(self._term(), op, wanted, now_ms, devices)
        before = await self.recount(
            [c.user for c in changes if c.user.expired and c.user.stream_id in results]
        )
        unknown = await self._unknown([c for c in changes if c.strict and c.user.stream_id not in results])
        for change in changes:
            user = change.user
            result = results.get(user.stream_id)
            if result is None:
                if change in unknown:
                    finish([change], NotFoundError("expected the id of a notification of this user"))
                else:
                    finish([change], (0, user.rev, user.shown_unread()))
                continue
            user.rev, user.unread = result.rev, result.unread
            if result.withdrawn:
                self._withdrawn()
            session = user.session
            if session is not None:
                session.dealt_with(result.ids, upto.get(user.stream_id, 0))
                frames = change_frames(op, result, now_ms, upto.get(user.stream_id, 0))
                self._run_effects(user, session.state_changed(result.rev, user.shown_unread(), frames))
                if user.expired != before.get(user.stream_id, user.expired):
                    self._run_effects(user, session.counted(user.shown_unread(), told=True))
            finish([change], (result.changed, user.rev, user.shown_unread()))

    async def expire(self, changes: list[ChangeEntry]) -> None:
        """Something of these users has expired: count anew, tell it, and know when that happens next."""
        now_ms = self._clock.now_ms()
        await self._count([change.user for change in changes], now_ms)
        for change in changes:
            user = change.user
            session = user.session
            if session is not None:
                session.recent.expire(now_ms)
                self._run_effects(user, session.counted(user.shown_unread()))
                at_ms = session.recent.next_expiry_ms
                if at_ms is not None:
                    self._expires(user, at_ms)
            finish([change], (0, user.rev, user.shown_unread()))

    async def recount(self, users: list[User]) -> dict[int, int]:
        """Count expired rows anew: those that were read are part of `unread` no more, nor to be left out.

        Returns:
            stream id -> how many there were before.
        """
        before = {user.stream_id: user.expired for user in users}
        if users:
            try:
                await self._count(users, self._clock.now_ms())
            except CarillonError as exc:
                log.info("%d users show an old count of unread for a moment: %s", len(users), exc)
                for user in users:
                    self._expires(user, self._clock.now_ms() + AGAIN_MS)
        return before

    async def _count(self, users: list[User], now_ms: int) -> None:
        found = await self._store.expired([user.stream_id for user in users], now_ms)
        for user in users:
            user.expired, user.next_expiry_ms = found.get(user.stream_id, (0, None))
            if user.next_expiry_ms is not None:
                self._expires(user, user.next_expiry_ms)

    async def _unknown(self, changes: list[ChangeEntry]) -> list[ChangeEntry]:
        """Which of the changes that did nothing name no notification of their user."""
        if not changes:
            return []
        existing = await self._store.existing([(c.user.stream_id, raw) for c in changes for raw in c.ids])
        return [c for c in changes if not any(raw in existing for raw in c.ids)]


def finish(changes: Sequence[ChangeEntry], answer: Any) -> None:
    """Answer changes, those that have no answer yet."""
    for change in changes:
        done, change.done = change.done, _answered
        if done is not _answered:
            change.user.pins -= 1
            done(answer)


def _answered(_: Any) -> None:
    """Stands where a callback was that has been called."""


def change_frames(op: str, result: ChangeDone, now_ms: int, up_to_seq: int) -> list[bytes]:
    """The frames that tell a user's devices of one committed change."""
    at = rfc3339(now_ms)
    if op == "read_all":
        return [server_frames.all_notifications_read(at, up_to_seq, result.rev)]
    if op == "read":
        return [server_frames.notifications_read(result.ids, at, result.rev)]
    if op == "seen":
        return [server_frames.notifications_seen(result.ids, result.rev)]
    kind = {"archive": "ARCHIVED", "dismiss": "DISMISSED", "click": "CLICKED"}[op]
    # Only the last frame carries the rev: a client cut off between two asks for the rest (see Session).
    last = len(result.ids) - 1
    return [
        server_frames.notification_state(kind, raw, result.rev - (index < last))
        for index, raw in enumerate(result.ids)
    ]
