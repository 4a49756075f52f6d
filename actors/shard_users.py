"""The users a shard knows: their stream position, whether they have a push target, their session.

Positions are those of the last commit this shard made: it is the only writer, so a cached position is the
true one until the slot is given away (then every user of the slot is forgotten).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from weakref import WeakValueDictionary

import msgspec

from carillon.budget import Spent
from carillon.errors import CarillonError, FencedError, UnavailableError
from carillon.explain import providers_receipt
from carillon.ids import UserKey
from carillon.messages import PushTarget
from carillon.presence import as_seen
from carillon.session import Head, Session
from carillon.switches import Preferences
from stores.postgres.shard_rows import UserRecord
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)

LOAD_BATCH = 500


class User:
    """One user in memory."""

    __slots__ = (
        "document", "epoch", "expired", "invisible_since_ms", "key", "last_seen_ms", "local",
        "next_expiry_ms", "pins", "preferences", "providers", "pruned", "receipt", "rev", "revoked", "seq",
        "session", "slot", "spent", "stream_id", "unread", "valid_from_ms", "wakes_ms", "zone",
    )  # fmt: skip

    def __init__(self, record: UserRecord, slot: int) -> None:
        self.key = record.key
        self.slot = slot
        self.stream_id = record.stream_id
        self.epoch = record.epoch
        self.seq = record.seq
        self.rev = record.rev
        self.unread = record.unread
        self.expired = record.expired
        self.next_expiry_ms = record.next_expiry_ms  # not later than the next unread row's
        self.wakes_ms = 0  # of `actors.shard_expiry`
        self.pruned = (record.pruned_seq, record.pruned_rev)
        self.providers: frozenset[str] = frozenset()
        self.receipt = 0  # the part of receipts that says where the user has targets
        self.take_targets(record.targets)
        self.last_seen_ms = record.last_seen_ms
        self.invisible_since_ms = record.invisible_since_ms
        self.valid_from_ms = record.valid_from_ms
        self.revoked = frozenset(record.revoked)  # tokens that were logged out
        self.preferences: Preferences | None = None
        self.zone = record.zone
        self.local: Preferences | None = None  # without a document: says in which time zone the user is
        self.take_preferences(record.preferences)
        self.spent: Spent | None = None  # of the tenant's limits
        self.session: Session | None = None
        self.pins = 0  # events queued or in a batch: not to be evicted

    def take_targets(self, targets: Iterable[PushTarget]) -> None:
        """Note at which push providers the user has a target."""
        self.providers = frozenset(target.provider for target in targets)
        self.receipt = providers_receipt(self.providers)

    def take_preferences(self, text: str | None) -> None:
        """Note the user's document, None if there is none."""
        self.document = text
        tenant, zone = self.key.tenant, self.zone
        self.preferences = None if text is None else _shared_preferences(tenant, text, zone)
        self.local = None if zone is None else _shared_preferences(tenant, "{}", zone)

    def take_zone(self, zone: str | None) -> None:
        """Note the time zone of the user's profile."""
        if zone != self.zone:
            self.zone = zone
            self.take_preferences(self.document)

    def head(self) -> Head:
        """Position as committed; unread as shown."""
        return Head(self.epoch, self.seq, self.rev, self.shown_unread(), *self.pruned)

    def presence(self, now_ms: int) -> tuple[str, int | None]:
        """Status and when last seen (ms), as others may see it."""
        session, hidden_ms = self.session, self.invisible_since_ms
        if session is None:
            return as_seen("offline", self.last_seen_ms, hidden_ms)
        return as_seen(session.status(), now_ms if session.live else session.last_seen_ms, hidden_ms)

    def overdue(self, now_ms: int) -> bool:
        """Whether something may have expired since unread rows were counted."""
        return self.next_expiry_ms is not None and self.next_expiry_ms <= now_ms

    def shown_unread(self) -> int:
        """Unread without those that had expired when they were counted last."""
        return max(0, self.unread - self.expired)


def read_preferences(text: str, zone: str | None = None) -> Preferences | None:
    """A stored document, of a user who is in `zone` if it does not say.

    One that cannot be read (its time zone is gone) holds nothing back.
    """
    try:
        return Preferences(msgspec.json.decode(text), zone)
    except (LookupError, ValueError, TypeError, AttributeError):
        log.exception("a preferences document cannot be read: it is left out of account")
        return None


_shared: WeakValueDictionary[tuple[str, str, str | None], Preferences] = WeakValueDictionary()


def _shared_preferences(tenant: str, text: str, zone: str | None) -> Preferences | None:
    """`read_preferences`: users of a tenant with equal documents have one object while they are here.

    What it remembers of the tenant's rules is worked out once for all of them.
    """
    key = (tenant, text, zone)
    known = _shared.get(key)
    if known is None:
        known = read_preferences(text, zone)
        if known is not None:
            _shared[key] = known
    return known


Loaded = Callable[[User | None, CarillonError | None], None]
"""Called with the user, or with the reason why it could not be loaded."""


class UserCache:
    """Bounded cache of users with batched, single-flight loading.

    Args:
        term: gives the shard's present term.
        capacity: users kept; those with a session or with events on their way are kept beyond it.
        prepare: awaited with the tenants of users before they are loaded.
    """

    def __init__(
        self,
        store: ShardStore,
        term: Callable[[], int],
        capacity: int,
        prepare: Callable[[set[str]], Awaitable[None]],
    ) -> None:
        self._store = store
        self._term = term
        self._capacity = capacity
        self._prepare = prepare
        self._users: OrderedDict[UserKey, User] = OrderedDict()
        self._waiting: dict[UserKey, list[Loaded]] = {}
        self._wanted: dict[UserKey, int] = {}
        self._held: dict[UserKey, int] = {}
        self._generation = 0
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._users)

    def get(self, key: UserKey) -> User | None:
        """The user if in memory; marks it as recently used."""
        user = self._users.get(key)
        if user is not None:
            self._users.move_to_end(key)
        return user

    def peek(self, key: UserKey) -> User | None:
        """The user if in memory; being looked at is no use of it."""
        return self._users.get(key)

    def users(self) -> list[User]:
        """All users in memory."""
        return list(self._users.values())

    def ready(self, key: UserKey) -> User | None:
        """The user if in memory with nobody waiting before the caller, whose turn else is `when_loaded`."""
        return None if key in self._waiting else self.get(key)

    def when_loaded(self, key: UserKey, slot: int, callback: Loaded) -> None:
        """Load the user (many at a time) and call back, in the order asked per user."""
        waiting = self._waiting.get(key)
        if waiting is not None:
            waiting.append(callback)
            return
        self._waiting[key] = [callback]
        if key in self._held:
            return
        self._wanted[key] = slot
        self._start_loading()

    def _start_loading(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._load())

    # -- writing past the cache --------------------------------------------------------------------------

    def known(self, key: UserKey) -> bool:
        """Whether somebody here counts on the user: it has a session, is on its way to one, is being written,
        or has had part of a limit."""
        if key in self._waiting:
            return True
        user = self._users.get(key)
        return user is not None and (user.session is not None or user.pins > 0 or user.spent is not None)

    def hold(self, users: Mapping[UserKey, int]) -> None:
        """Keep users (key -> slot) who are not `known` out of memory: their streams are written past it.

        Whoever asks for one waits until `release`.
        """
        for key in users:
            self._users.pop(key, None)
        self._held.update(users)

    def release(self, users: Iterable[UserKey]) -> None:
        """What was held may be loaded."""
        for key in users:
            slot = self._held.pop(key, None)
            if slot is not None and key in self._waiting:
                self._wanted[key] = slot
        if self._wanted:
            self._start_loading()

    def forget_slots(self, lost: set[int]) -> list[User]:
        """Drop every user of slots that were given away; returns those dropped."""
        self._generation += 1
        gone = [user for user in self._users.values() if user.slot in lost]
        for user in gone:
            del self._users[user.key]
        # Read under a later term they would be kept, and be old when their slots come back.
        self._fail(
            [
                key
                for asked in (self._wanted, self._held)
                for key, slot in asked.items()
                if slot in lost and key in self._waiting
            ],
            FencedError("the slot has moved"),
        )
        return gone

    def forget(self, key: UserKey) -> None:
        """Drop one user, so that it is loaded anew."""
        self._users.pop(key, None)

    def erased(self, key: UserKey) -> None:
        """Drop a user whose stream is gone; what is being read of it counts no more."""
        self._generation += 1
        self._users.pop(key, None)

    async def close(self) -> None:
        """Stop loading; whoever waits is told so."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._fail(list(self._waiting), UnavailableError("the shard stops"))

    async def _load(self) -> None:
        tries = 0
        while self._wanted:
            batch = [(key, self._wanted[key]) for key in list(self._wanted)[:LOAD_BATCH]]
            generation = self._generation
            try:
                await self._prepare({key.tenant for key, _ in batch})
                records = await self._store.load_users(
                    self._term(), [(key, slot, os.urandom(6).hex()) for key, slot in batch]
                )
            except FencedError as exc:
                tries += 1
                if tries > 100:  # the map with our new term has not come for seconds
                    tries = 0
                    self._fail([key for key, _ in batch], exc)
                await asyncio.sleep(0.02)
                continue
            except CarillonError as exc:
                self._fail([key for key, _ in batch], exc)
                continue
            except Exception as exc:
                log.exception("loading %d users failed", len(batch))
                self._fail([key for key, _ in batch], UnavailableError(f"loading failed: {exc}"))
                continue
            if generation != self._generation:
                continue  # slots moved meanwhile: what was read may be old already
            tries = 0
            slots = dict(batch)
            for record in records:
                user = User(record, slots[record.key])
                self._users[record.key] = user
                self._wanted.pop(record.key, None)
                for callback in self._waiting.pop(record.key, ()):
                    self._call(callback, user, None)
            self._evict()

    def _fail(self, keys: list[UserKey], error: CarillonError) -> None:
        for key in keys:
            self._wanted.pop(key, None)
            for callback in self._waiting.pop(key, ()):
                self._call(callback, None, error)

    def _call(self, callback: Loaded, user: User | None, error: CarillonError | None) -> None:
        try:
            callback(user, error)
        except Exception:
            log.exception("after loading a user")

    def _evict(self) -> None:
        excess = len(self._users) - self._capacity
        if excess <= 0:
            return
        for key, user in list(self._users.items())[: excess * 2]:
            if excess <= 0:
                break
            if user.session is None and not user.pins:
                del self._users[key]
                excess -= 1
