"""Users as such, at their shard: profiles, topics, and their erasure."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from actors.shard_mirror import Mirror
from actors.shard_sessions import Sessions
from actors.shard_users import User, UserCache
from carillon import profiles
from carillon.clock import Clock
from carillon.errors import (
    CarillonError,
    FencedError,
    NotFoundError,
    NotOwnerError,
    NotPermittedError,
    StoreUnavailableError,
)
from carillon.ids import UserKey
from carillon.messages import ClientTopic, Done, ProfilePut, UserErase
from carillon.policy import TopicRule
from carillon.settings import Settings
from stores.postgres.shard_store import ShardStore
from stores.postgres.topics import TopicStore
from stores.postgres.users import Erasure, UserStore

log = logging.getLogger(__name__)

AGAIN_MS = 60_000
"""A request to erase that is told again within so long is the same one."""
_AT_ONCE = 100
"""Interrupted erasures that are looked for at a time."""


class Accounts:
    """Profiles and erasures of the users of one shard.

    Args:
        name: of the shard.
        term, owns, slots: as in `Writer` and `Outbox`.
        mirror: of presence in Redis; None: there is none.
        erased: told of users in the turn in which they were erased.
        uncertain: told of users in memory of whom it is not known whether they were.
        fenced: called when the term turns out to be over.
    """

    def __init__(
        self,
        name: str,
        store: ShardStore,
        users: UserCache,
        sessions: Sessions,
        clock: Clock,
        settings: Settings,
        *,
        term: Callable[[], int],
        owns: Callable[[int], bool],
        slots: Callable[[], Sequence[int]],
        mirror: Mirror | None,
        erased: Callable[[UserKey], None],
        uncertain: Callable[[User], None],
        fenced: Callable[[], None],
    ) -> None:
        self._name = name
        self._shard_store = store
        self._users = users
        self._sessions = sessions
        self._clock = clock
        self._settings = settings
        self._term = term
        self._owns = owns
        self._slots = slots
        self._mirror = mirror
        self._told = erased
        self._uncertain = uncertain
        self._fenced = fenced
        self._store_: UserStore | None = None
        self._topics_: TopicStore | None = None
        self._erasing: dict[UserKey, asyncio.Task[Done]] = {}
        self._purging: set[int] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def _store(self) -> UserStore:
        if self._store_ is None:
            self._store_ = UserStore(self._shard_store.pool, self._settings.postgres.connect_timeout_s)
        return self._store_

    @property
    def _topics(self) -> TopicStore:
        if self._topics_ is None:
            self._topics_ = TopicStore(self._shard_store.pool, self._settings.postgres.connect_timeout_s)
        return self._topics_

    def start(self) -> None:
        """Go on with erasures that were interrupted, unless `shard.erase_sweep_s` is 0."""
        if self._settings.shard.erase_sweep_s:
            self._task = asyncio.get_running_loop().create_task(self._sweep_for_ever())

    async def close(self) -> None:
        """Stop; what is under way goes on at whoever owns the slot then."""
        tasks = [*self._erasing.values(), *([] if self._task is None else [self._task])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def put_profile(self, user: User, message: ProfilePut) -> Done:
        """Replace the profile of a user in memory."""
        profile = profiles.unpack(message.document)
        await self._store.put_profile(
            self._name, self._term(), message.tenant, message.user, message.slot, profile,
            self._clock.now_ms(),
        )  # fmt: skip
        # Whoever holds the user now: it may have been loaded anew meanwhile.
        for known in {user, self._users.peek(user.key) or user}:
            known.take_zone(profile.timezone)
        return Done()

    async def topic(self, user: User, message: ClientTopic, rule: TopicRule) -> None:
        """Subscribe a user to a topic, or end that, as one of its clients asks.

        Raises:
            NotPermittedError: the tenant's policy does not let clients subscribe to it.
                Or the user has as many topics as it may.
        """
        key, topic = user.key, message.topic
        if not message.subscribe:
            await self._topics.unsubscribe(key.tenant, topic, key.user)
            return
        if not rule.allows(topic):
            raise NotPermittedError(f"clients may not subscribe to {topic!r}")
        most = self._settings.shard.max_topics_per_user
        now_ms = self._clock.now_ms()
        if not await self._topics.subscribe_oneself(key.tenant, topic, key.user, most, now_ms):
            raise NotPermittedError(f"a user may subscribe to {most} topics")

    async def erase(self, message: UserErase) -> Done:
        """Erase a user; requests for one that is being erased wait for it.

        Raises:
            NotFoundError: nothing was kept of the user.
        """
        key = UserKey(message.tenant, message.user)
        task = self._erasing.get(key)
        if task is None:
            task = self._erasing[key] = asyncio.get_running_loop().create_task(self._erase(key, message.slot))
            task.add_done_callback(lambda _: self._erasing.pop(key, None))
        return await asyncio.shield(task)

    async def _erase(self, key: UserKey, slot: int) -> Done:
        if not self._owns(slot):
            raise NotOwnerError(f"slot {slot} is not here")
        now_ms = self._clock.now_ms()
        term = self._term()
        try:
            open_ = await self._store.erase(self._name, term, *key, slot, now_ms, now_ms - AGAIN_MS)
        except StoreUnavailableError:
            if (known := self._users.peek(key)) is not None:
                self._uncertain(known)
            raise
        user = self._users.peek(key)
        if open_ is not None:
            # In the turn of the commit: whatever comes from now on finds nobody in memory and loads the user.
            if user is not None:
                self._sessions.end_user(user, 4001, "this user was erased")
            self._users.erased(key)
            self._told(key)
            if self._mirror is not None:
                self._mirror.forget(key)
        if open_ is None:
            raise NotFoundError("nothing is kept of this user", "userId", "a known user", key.user)
        for erasure in open_:
            await self._purge(erasure, term)
        return Done()

    async def _purge(self, erasure: Erasure, term: int) -> None:
        settings = self._settings.shard
        store = self._store
        self._purging.add(erasure.id)
        try:
            keys_since_ms = self._clock.now_ms() - round(settings.idempotency_ttl_s * 1000)
            await store.purge_keys(self._name, term, erasure, keys_since_ms)
            while await store.purge(self._name, term, erasure, settings.erase_batch):
                pass
            await store.finish(self._name, term, erasure, self._clock.now_ms())
        finally:
            self._purging.discard(erasure.id)

    async def _sweep_for_ever(self) -> None:
        settings = self._settings.shard
        while True:
            await asyncio.sleep(settings.erase_sweep_s)
            try:
                term = self._term()
                if self._slots():
                    for erasure in await self._store.open_erasures(list(self._slots()), _AT_ONCE):
                        if erasure.id not in self._purging:
                            log.info("%s goes on with erasure %d", self._name, erasure.id)
                            await self._purge(erasure, term)
                await self._store.prune(self._clock.now_ms() - round(settings.erasure_keep_s * 1000))
            except FencedError:
                self._fenced()
            except CarillonError as exc:
                log.info("%s: erasures wait: %s", self._name, exc)
            except Exception:
                log.exception("%s: looking for interrupted erasures failed", self._name)
