"""Users whose last write may or may not have been committed: their streams are read before work goes on."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable

from actors.shard_kept import KeptPushes
from actors.shard_users import LOAD_BATCH, User
from carillon.errors import CarillonError
from carillon.ids import UserKey
from carillon.session import Effect
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)


class Suspects:
    """The suspects of one shard; true while there are any.

    Args:
        term, owns, run: as in `Sessions`.
        expires: called with users of whom something expires, and when.
        erased: called with users who turn out to have been erased.
    """

    def __init__(
        self,
        store: ShardStore,
        kept: KeptPushes,
        *,
        term: Callable[[], int],
        owns: Callable[[int], bool],
        run: Callable[[User, list[Effect]], None],
        expires: Callable[[User, int], None],
        erased: Callable[[User], None],
    ) -> None:
        self._store = store
        self._kept = kept
        self._term = term
        self._owns = owns
        self._run_effects = run
        self._expires = expires
        self._erased = erased
        self._users: dict[UserKey, User] = {}

    def __len__(self) -> int:
        return len(self._users)

    def add(self, users: Iterable[User | None]) -> None:
        """A write of these users failed without a word whether it was committed: look before going on."""
        self._users.update({user.key: user for user in users if user is not None})

    async def heal(self) -> None:
        """Read where their streams stand; sessions that missed a commit replay from the store.

        One statement for some of them; those stay whom it could not read.
        """
        taken = dict(itertools.islice(self._users.items(), LOAD_BATCH))
        for key in taken:  # before we look: who becomes a suspect meanwhile is looked at again
            del self._users[key]
        known = {key: user for key, user in taken.items() if self._owns(user.slot)}
        try:
            records = await self._store.load_users(
                self._term(), [(key, user.slot, os.urandom(6).hex()) for key, user in known.items()]
            )
            await self._kept.look_for_unsure({user.stream_id for user in known.values()})
        except CarillonError as exc:
            self._users = taken | self._users  # who came meanwhile may stand for a user who was loaded anew
            log.info("%d users wait for a look at their streams: %s", len(self._users), exc)
            return
        if not self._users:
            self._kept.sure()
        for record in records:
            user = known[record.key]
            if record.stream_id != user.stream_id:
                self._erased(user)
                continue
            moved = (record.seq, record.rev) != (user.seq, user.rev)
            user.seq, user.rev = record.seq, record.rev
            # Also where the position is known: an event may have told that, but not how many have expired.
            user.unread, user.expired = record.unread, record.expired
            user.next_expiry_ms = record.next_expiry_ms
            if record.next_expiry_ms is not None:
                self._expires(user, record.next_expiry_ms)
            if user.session is not None:
                session = user.session
                self._run_effects(
                    user, session.heal(user.head()) if moved else session.counted(user.shown_unread())
                )
