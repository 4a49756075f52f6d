"""The shard: the actor that owns users. Thin: each message goes to the part that knows what to do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakValueDictionary

from actors.config import ActorConfig
from actors.link import Link
from actors.member import Membership
from actors.shard_accounts import Accounts
from actors.shard_acks import Acknowledgements
from actors.shard_amendments import AMENDMENTS, AmendEntry
from actors.shard_broadcasts import Broadcasts
from actors.shard_changes import ChangeEntry
from actors.shard_expiry import Expiry
from actors.shard_kept import KeptPushes
from actors.shard_mirror import Mirror
from actors.shard_outbox import Outbox
from actors.shard_policies import Policies
from actors.shard_presence import Presence
from actors.shard_presentation import Presentations
from actors.shard_replays import Replays
from actors.shard_schedules import Schedules
from actors.shard_sessions import Sessions
from actors.shard_users import User, UserCache
from actors.shard_watch import WatchPermission
from actors.shard_writer import Writer
from carillon import server_frames
from carillon.attention import DEFERRED
from carillon.clock import Clock, SystemClock
from carillon.errors import (
    CarillonError,
    FencedError,
    InvalidInputError,
    NotFoundError,
    NotOwnerError,
    UnavailableError,
)
from carillon.ids import SLOTS, UserKey
from carillon.kept_push import KeptPush
from carillon.messages import (
    Amend,
    Attach,
    Change,
    ChangeResult,
    ClientAck,
    ClientChange,
    ClientMode,
    ClientReady,
    ClientResume,
    ClientTopic,
    ClientVisibility,
    ClientWatch,
    ClusterMap,
    Detach,
    DeviceAck,
    DeviceDelete,
    DevicePut,
    DeviceVisibility,
    DigestChange,
    Done,
    Event,
    Logout,
    Outcome,
    Outcomes,
    PlanQuery,
    PlanReply,
    PolicyRead,
    PreferencesPut,
    PresenceMode,
    PresenceQuery,
    PresenceWatch,
    ProfilePut,
    Publish,
    Push,
    PushLeft,
    PushOutcome,
    PushTarget,
    Replay,
    SessionsRevoke,
    SocketDrained,
    Unsubscribe,
    UserErase,
)
from carillon.metrics import Stats
from carillon.plan import Reach
from carillon.presence import MODES
from carillon.session import SessionLimits
from carillon.unsubscribe import Unsubscription, switch_off
from stores.postgres.shard_rows import OutboxRow
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)

CHANGE_OPS = frozenset(("read", "read_all", "seen", "archive", "dismiss", "click"))


class _Batch:
    """One Publish request: answered when the last of its events has its outcome."""

    __slots__ = ("left", "link", "outcomes", "request")

    def __init__(self, link: Link, request: int, count: int) -> None:
        self.link = link
        self.request = request
        self.left = count
        self.outcomes: list[Any] = [None] * count

    def put(self, index: int, outcome: Outcome) -> None:
        self.outcomes[index] = outcome
        self.left -= 1
        if not self.left:
            self.link.reply_nowait(self.request, Outcomes(self.outcomes))


class Shard:
    """Owns the slots that the coordinator's map gives it.

    Args:
        config: `settings.postgres.dsn` must be set.
        clock: None is the system's.
    """

    def __init__(self, config: ActorConfig, clock: Clock | None = None) -> None:
        self._config = config
        self._clock = clock or SystemClock()
        self._settings = config.settings
        self._stats = Stats()
        self._term_now = 0
        self._map_version = 0
        self._owned = bytearray(SLOTS)
        self._slots: list[int] = []
        push = self._settings.push
        self._store = ShardStore(self._settings.postgres, config.name, push.withdraw, push.withdraw_attempts)
        self._routers: dict[str, Link] = {}
        self._links: dict[str, Link] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._gauges: asyncio.Task[None] | None = None
        self._stopped = False
        self._preference_locks: WeakValueDictionary[UserKey, asyncio.Lock] = WeakValueDictionary()
        shard = self._settings.shard
        self._limits = SessionLimits(
            recent_window=shard.recent_window,
            grace_s=shard.grace_s,
            clean_close_grace_s=shard.clean_close_grace_s,
            resume_wait_s=shard.resume_wait_s,
            replay_page=shard.replay_page,
            max_connections=shard.max_connections_per_user,
            heartbeat_ms=round(self._settings.gateway.heartbeat_s * 1000),
            remembered_devices=shard.remembered_devices,
        )

    # -- life cycle -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect to Postgres (waiting for it), listen, join; serves when it returns."""
        while True:
            try:
                await self._store.open()
                break
            except CarillonError as exc:
                log.warning("%s waits for PostgreSQL: %s", self._config.name, exc)
                await asyncio.sleep(0.5)
        shard = self._settings.shard
        presence = self._settings.presence
        self._policies = Policies(self._store, shard, presence)
        self._users = UserCache(self._store, self._term, shard.context_cache, self._policies.ensure)
        self._kept = KeptPushes(
            self._store, self._clock, self._stats, shard, term=self._term, owns=self._owns
        )
        self._acks = Acknowledgements(
            self._store, self._kept, self._clock, self._stats, shard,
            term=self._term, fenced=self._was_fenced,
        )  # fmt: skip
        self._outbox = Outbox(
            self._store, self._users, self._acks, self._kept, self._clock, self._stats, self._settings,
            term=self._term, slots=lambda: self._slots, policies=self._policies, send_jobs=self._send_jobs,
            settled=self._settled, templates=lambda: self._schedules.templates,
            fenced=self._was_fenced,
        )  # fmt: skip
        self._replays = Replays(
            self._store, self._clock,
            term=self._term, owns=self._owns, due_now=self._outbox.due_now, fenced=self._was_fenced,
        )  # fmt: skip
        mirror = self._make_mirror()
        self._presence = Presence(
            self._config.name, self._store, self._users, self._clock, presence, shard.grace_s,
            term=self._term, owns=self._owns, mirror=mirror,
        )  # fmt: skip
        self._watch = WatchPermission(self._policies, presence, self._clock, self._store.client_secret)
        self._expiry = Expiry(self._clock, self._count_anew)
        self._presentations = Presentations(self._users, self._policies)
        self._sessions = Sessions(
            self._config.name, self._store, self._users, self._clock, self._limits,
            term=self._term, map_version=lambda: self._membership.map.version, owns=self._owns,
            acks=self._acks, presence_changed=self._presence.status_changed, watch=self._watch.ask,
            expiry=self._expiry,
            presentation=self._presentations,
            take=lambda link, message: self.receive(link, message, 0),
        )  # fmt: skip
        self._writer = Writer(
            self._store, self._users, self._clock, self._stats, shard, self._settings.merge,
            term=self._term, owns=self._owns, run=self._sessions.run, reach=self._reach,
            policy=self._policies.of, kept=self._kept, planned=self._planned, withdrawn=self._outbox.due_now,
            stopped=self._outbox.stop, expires=self._expiry.watch, fenced=self._was_fenced,
            erased=lambda user: self._sessions.end_user(user, 4001, "this user was erased"),
        )  # fmt: skip
        self._schedules = Schedules(
            self._store, self._clock, self._stats, self._settings, name=self._config.name,
            term=self._term, slots=lambda: self._slots, router=self._router, fenced=self._was_fenced,
        )  # fmt: skip
        self._broadcasts = Broadcasts(
            self._store, self._users, self._writer, self._policies, self._clock, self._stats, self._settings,
            templates=lambda: self._schedules.templates, term=self._term, slots=lambda: self._slots,
            owns=self._owns, due_now=self._outbox.due_now, fenced=self._was_fenced,
        )  # fmt: skip
        self._accounts = Accounts(
            self._config.name, self._store, self._users, self._sessions, self._clock, self._settings,
            term=self._term, owns=self._owns, slots=lambda: self._slots, mirror=mirror,
            erased=self._broadcasts.erased, uncertain=self._writer.suspect, fenced=self._was_fenced,
        )  # fmt: skip
        self._policies.start()
        self._writer.start()
        self._acks.start()
        self._outbox.start()
        self._schedules.start()
        self._broadcasts.start()
        self._accounts.start()
        self._membership = Membership(self._config, self, stats=self._stats, clock=self._clock)
        self._membership.on_map(self._take_map)
        await self._membership.start()
        self._gauges = asyncio.get_running_loop().create_task(self._gauge_for_ever())

    def _make_mirror(self) -> Mirror | None:
        presence, redis = self._settings.presence, self._settings.redis
        if not redis.url or presence.mirror_ttl_s <= 0:
            return None
        from stores.redis.presence_mirror import PresenceMirror  # a shard without Redis needs none of it

        mirror = PresenceMirror(redis, presence.mirror_ttl_s)
        return Mirror(mirror, self._users, self._clock, presence)

    async def stop(self, leave: bool = False) -> None:
        """Stop serving (idempotent). What was not committed is answered as unavailable."""
        if self._stopped:
            return
        self._stopped = True
        if self._gauges is not None:
            self._gauges.cancel()
        await self._broadcasts.close()
        await self._schedules.close()
        await self._accounts.close()
        self._expiry.close()
        await self._writer.close()
        await self._replays.close()
        await self._outbox.close()
        await self._acks.close()
        await self._policies.close()
        await self._sessions.close()
        await self._watch.close()
        await self._presence.close()
        await self._users.close()
        await self._membership.close(leave=leave)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._store.close()

    async def drain(self) -> None:
        """Give the slots away (the coordinator moves them), then stop.

        Serving goes on until they have moved: what comes meanwhile is appended, or answered "moved" by the
        fence, and nobody waits for longer than the move takes.
        """
        if not self._stopped:
            await self._membership.leave()
        await self.stop()

    async def status(self) -> dict[str, Any]:
        """Facts for the command line."""
        return {
            "name": self._config.name,
            "term": self._term_now,
            "slots": len(self._slots),
            "sessions": self._sessions.live,
            "connections": self._sessions.connections(),
            "users": len(self._users),
            "appendQueue": self._writer.queued(),
        }

    async def _gauge_for_ever(self) -> None:
        prune_at = self._clock.monotonic()
        while True:
            self._stats.gauge("sessions", self._sessions.live)
            self._stats.gauge("append_queue", self._writer.queued())
            self._stats.gauge("presence_watched", self._presence.watched)
            await asyncio.sleep(self._settings.cluster.lease_renew_s)
            if self._clock.monotonic() >= prune_at:
                prune_at = self._clock.monotonic() + 600
                since_ms = self._clock.now_ms() - round(self._settings.shard.idempotency_ttl_s * 1000)
                with contextlib.suppress(CarillonError):
                    await self._store.prune_keys(since_ms)
                    now_ms = self._clock.now_ms()
                    await self._store.prune_merges(now_ms, now_ms - round(self._settings.merge.keep_s * 1000))

    # -- ownership --------------------------------------------------------------------------------------

    def _term(self) -> int:
        return self._term_now

    def _owns(self, slot: int) -> bool:
        return 0 <= slot < SLOTS and self._owned[slot] == 1

    def _was_fenced(self) -> None:
        log.info("%s: term %d is over; waiting for the new map", self._config.name, self._term_now)

    def _take_map(self, new: ClusterMap) -> None:
        term_before = self._term_now
        mine = next((i for i, shard in enumerate(new.shards) if shard.name == self._config.name), None)
        if mine is None or new.shards[mine].incarnation != self._membership.incarnation:
            owned: set[int] = set()  # of an earlier process of this name, or not joined yet
        else:
            self._term_now = new.shards[mine].term
            owned = {slot for slot, owner in enumerate(new.owners) if owner == mine}
        before = set(self._slots)
        skipped = new.version > self._map_version + 1 and term_before not in (0, self._term_now)
        self._map_version = new.version
        if skipped:
            # Our term moved on in a map we did not see: slots may have been away and come back since, and
            # another owner may have written to their streams. Everything is read again.
            self._presence.slots_lost(before & owned)
            self._sessions.forget_slots(self._users.forget_slots(before & owned))
            self._presence.slots_taken(before & owned)
            self._kept.slots_came(before & owned)
        self._slots = sorted(owned)
        for slot in before - owned:
            self._owned[slot] = 0
        for slot in owned - before:
            self._owned[slot] = 1
        if before - owned:
            self._presence.slots_lost(before - owned)
            self._sessions.forget_slots(self._users.forget_slots(before - owned))
            self._kept.slots_lost(before - owned)
        if owned - before:
            self._presence.slots_taken(owned - before)
            self._kept.slots_came(owned - before)
            self._outbox.slots_came()

    def _reach(self, user: User) -> tuple[Reach, int]:
        session = user.session
        if session is None:
            return Reach.OFFLINE, 0
        if session.live:
            return Reach.LIVE, 0
        left_s = session.grace_deadline - self._clock.monotonic()
        if left_s <= 0:
            return Reach.OFFLINE, 0
        return Reach.GRACE, self._clock.now_ms() + round(left_s * 1000)

    async def _settled(self) -> None:
        await self._writer.settled()

    def _planned(self, user: User, event: Event, seq: int, row: OutboxRow | KeptPush, rev: int) -> None:
        session = user.session
        self._outbox.planned(user, event, seq, row, live=session is not None and session.live)
        if session is not None and not row.claimed and row.gate != DEFERRED:
            effects = session.push_planned(
                event.id, seq, row.gate, row.due_ms, row.hold_until_ms,
                self._clock.monotonic(), self._clock.now_ms(), rev,
            )  # fmt: skip
            if effects:
                self._sessions.run(user, effects)

    def _count_anew(self, change: ChangeEntry) -> None:
        self._writer.submit_change(change)

    def _router_links(self) -> list[Link]:
        """Open links to routers, those of this node first."""
        routers = [m for m in self._membership.map.members if m.kind == "router"]
        routers.sort(key=lambda m: m.node != self._config.node)
        links = [self._links.get(member.name) for member in routers]
        return [link for link in links if link is not None and not link.closed]

    def _router(self) -> Link | None:
        return next(iter(self._router_links()), None)

    def _send_jobs(self, push: Push) -> bool:
        """To a router: of this node if there is one, else any."""
        for link in self._router_links():
            try:
                link.send_nowait(push)
                return True
            except CarillonError as exc:
                log.info("%s: jobs not sent to %s: %s", self._config.name, link.peer, exc)
        return False

    # -- LinkHandler ------------------------------------------------------------------------------------

    def link_opened(self, link: Link) -> None:
        """See `LinkHandler.link_opened`."""
        self._links[link.peer] = link

    def link_closed(self, link: Link) -> None:
        """See `LinkHandler.link_closed`."""
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
        self._sessions.link_closed(link)
        self._presence.link_closed(link)

    def read_finished(self, link: Link) -> None:
        """Nothing to do: the writer batches by itself."""

    def receive(self, link: Link, message: Any, request: int) -> None:
        """See `LinkHandler.receive`."""
        kind = type(message)
        if kind is Publish:
            self._publish(link, message, request)
        elif kind in _SESSION_MESSAGES:
            self._sessions.receive(link, message)
        elif kind is ClientChange:
            self._client_change(link, message)
        elif kind is Attach:
            self._sessions.attach(link, message)
        elif kind is PushOutcome:
            if self._owns(message.slot):
                self._outbox.outcome(link, request, message)
            else:
                link.fail_nowait(request, NotOwnerError(f"slot {message.slot} is not here"))
        elif kind is Replay:
            self._replays.add(link, request, message)
        elif kind is PushLeft:
            self._outbox.left(message)
        elif kind is Change:
            self._change(link, message, request)
        elif kind is Amend:
            self._amend(link, message, request)
        elif kind is ClientMode or kind is ClientTopic:
            early = self._sessions.early(link, message.conn)
            if early is None:
                self._client_asks(link, message)
            elif len(early) < 64:
                early.append(message)
        elif kind is PresenceWatch:
            self._presence.receive(link, message)
        elif kind is PresenceQuery:
            self._spawn(self._answer(link, request, lambda: self._presence.query(message)))
        elif kind is DeviceAck or kind is DeviceVisibility:
            self._device_said(link, message, request)
        elif kind is PlanQuery:
            self._spawn(self._answer(link, request, lambda: self._preview(message)))
        elif kind is PolicyRead:
            self._spawn(self._answer(link, request, lambda: self._read_policy(message)))
        elif kind is UserErase:
            self._spawn(self._answer(link, request, lambda: self._accounts.erase(message)))
        elif kind in _DOCUMENT_MESSAGES:
            self._spawn(self._answer(link, request, lambda: self._document(message)))
        else:
            link.fail_nowait(request, InvalidInputError(f"a shard does not take {kind.__name__}"))

    def _publish(self, link: Link, message: Publish, request: int) -> None:
        events = message.events
        if not events:
            link.reply_nowait(request, Outcomes([]))
            return
        batch = _Batch(link, request, len(events))
        submit = self._writer.submit
        for index, event in enumerate(events):
            submit(event, lambda outcome, index=index: batch.put(index, outcome))
        self._stats.count("events_accepted", len(events))

    # -- state changes ----------------------------------------------------------------------------------

    def _client_change(self, link: Link, message: ClientChange) -> None:
        early = self._sessions.early(link, message.conn)
        if early is not None:
            if len(early) < 64:
                early.append(message)
            return
        found = self._sessions.find(link, message.conn)
        if found is None or message.op not in CHANGE_OPS:
            return

        def done(answer: tuple[int, int, int] | CarillonError) -> None:
            if isinstance(answer, FencedError):
                self._sessions.give_back(link, message.conn)  # the gateway tells the owner again: perhaps us
                return
            if message.ref is None:
                if isinstance(answer, CarillonError):
                    frame = server_frames.error(answer.code, str(answer), answer.temporary)
                    self._sessions.answer(link, message.conn, frame)
                return
            if isinstance(answer, CarillonError):
                frame = server_frames.error(answer.code, str(answer), answer.temporary, message.ref)
            else:
                frame = server_frames.ok(message.ref)
            self._sessions.answer(link, message.conn, frame)

        strict = message.op in ("archive", "dismiss", "click")
        self._submit_change(found[0], message, strict, done, found[1].device)

    def _submit_change(
        self, user: User, message: Change | ClientChange, strict: bool, done: Any, device: str = ""
    ) -> None:
        self._outbox.settled_in_app(message.ids)
        self._writer.submit_change(
            ChangeEntry(user, message.op, message.ids, message.up_to_seq, strict, done, device)
        )

    def _change(self, link: Link, message: Change, request: int) -> None:
        if message.op not in CHANGE_OPS:
            link.fail_nowait(
                request, InvalidInputError(f"expected a known operation, got {message.op!r}", "op")
            )
            return

        done = _answering(link, request, lambda answer: ChangeResult(*answer))
        self._with_user(message, lambda user: self._submit_change(user, message, message.strict, done), done)

    def _amend(self, link: Link, message: Amend, request: int) -> None:
        if message.op not in AMENDMENTS:
            link.fail_nowait(
                request, InvalidInputError(f"expected a known operation, got {message.op!r}", "op")
            )
            return
        done = _answering(link, request, lambda answer: answer)

        def known(user: User) -> None:
            self._writer.submit_change(AmendEntry(user, message, done))

        self._with_user(message, known, done)

    def _device_said(self, link: Link, message: DeviceAck | DeviceVisibility, request: int) -> None:
        def known(user: User) -> None:
            if isinstance(message, DeviceAck):
                self._sessions.device_ack(user, message)
            elif not self._sessions.device_visibility(user, message):
                told = f"the device {message.device} has no connection, stream or poll of this user now"
                link.fail_nowait(request, NotFoundError(told, "deviceId", "a device that is connected"))
                return
            link.reply_nowait(request, Done())

        self._with_user(message, known, lambda error: link.fail_nowait(request, error))

    def _with_user(self, message: Any, then: Any, failed: Any) -> None:
        """Call `then(user)` once the user is in memory, or `failed(error)`."""
        if not self._owns(message.slot):
            failed(NotOwnerError(f"slot {message.slot} is not here"))
            return
        key = UserKey(message.tenant, message.user)
        user = self._users.ready(key)
        if user is not None:
            then(user)
            return

        def loaded(found: User | None, error: CarillonError | None) -> None:
            if found is None:
                failed(error or UnavailableError("the user could not be loaded"))
            else:
                then(found)

        self._users.when_loaded(key, message.slot, loaded)

    # -- documents of users -----------------------------------------------------------------------------

    async def _user(self, message: Any) -> User:
        future: asyncio.Future[User] = asyncio.get_running_loop().create_future()

        def failed(error: CarillonError) -> None:
            if not future.done():
                future.set_exception(error)

        def found(user: User) -> None:
            if not future.done():
                future.set_result(user)

        self._with_user(message, found, failed)
        return await future

    async def _preview(self, message: PlanQuery) -> PlanReply:
        user: User | None = None
        key = UserKey(message.tenant, message.user)
        if self._owns(message.slot) and self._users.peek(key) is None:
            await self._policies.ensure({message.tenant})
            user = await self._writer.previews.stranger(key, message.slot)  # a look at it makes no user
        if user is None:
            user = await self._user(message)
        return await self._writer.previews.of(user, message.event, message.at_ms)

    async def _read_policy(self, message: PolicyRead) -> Done:
        return Done(int(await self._policies.read_again(message.tenant)))

    async def _document(self, message: Any) -> Done:
        user = await self._user(message)
        if not self._owns(message.slot):
            raise NotOwnerError(f"slot {message.slot} is not here")
        now_ms = self._clock.now_ms()
        kind = type(message)
        if kind is DevicePut:
            target = PushTarget(
                message.device, message.provider, message.token_kind, message.token, message.app_id,
                message.environment, now_ms,
            )  # fmt: skip
            evicted = await self._store.put_target(
                self._term_now, message.tenant, message.user, target, message.platform, message.locale, now_ms
            )
            now_targets = await self._store.load_targets([user.key])
            user.take_targets(now_targets[user.key])
            for name in evicted:
                # Its owner may be another shard: there the next push finds no target and is cancelled.
                other = self._users.get(UserKey(message.tenant, name))
                if other is not None:
                    left = await self._store.load_targets([other.key])
                    other.take_targets(left[other.key])
            return Done()
        if kind is DeviceDelete:
            found = await self._store.delete_target(
                self._term_now, message.tenant, message.user, message.device
            )
            left = await self._store.load_targets([user.key])
            user.take_targets(left[user.key])
            return Done(int(found))
        if kind is PreferencesPut or kind is Unsubscribe:
            # One at a time for a user: what memory is told last is what was committed last.
            async with self._preference_locks.setdefault(user.key, asyncio.Lock()):
                return await self._change_preferences(user, message, now_ms)
        if kind is ProfilePut:
            done = await self._accounts.put_profile(user, message)
            await self._outbox.digests.rearrange(user)  # it may say another time zone
            return done
        if kind is DigestChange:
            return await self._outbox.digests.change(user, message)
        if kind is PresenceMode:
            await self._set_mode(user, message.mode)
            return Done()
        if kind is Logout:
            await self._log_out(user, message)
            return Done()
        await self._store.revoke_tokens(self._term_now, user.stream_id, now_ms)
        user.valid_from_ms = now_ms
        self._sessions.close_user(user, 4001, "the sessions of this user were revoked")
        return Done()

    async def _change_preferences(
        self, user: User, message: PreferencesPut | Unsubscribe, now_ms: int
    ) -> Done:
        if isinstance(message, PreferencesPut):
            document = message.document
            version = await self._store.put_preferences(
                self._term_now, message.tenant, message.user, document, now_ms, message.version
            )
        else:
            what = Unsubscription(*user.key, message.section, message.name, message.channel)
            document = await self._store.change_preferences(
                self._term_now, message.tenant, message.user, lambda known: switch_off(known, what), now_ms
            )
            version = 1
        # Whoever holds the user now: it may have been loaded anew meanwhile.
        for known in {user, self._users.get(user.key) or user}:
            self._presentations.take(known, document)
        await self._outbox.digests.rearrange(user)
        return Done(version)

    async def _set_mode(self, user: User, mode: str) -> None:
        if mode not in MODES:
            raise InvalidInputError(f"expected mode to be one of {', '.join(MODES)}, got {mode!r}", "mode")
        before = user.invisible_since_ms
        user.invisible_since_ms = await self._store.set_invisible(
            self._term_now, user.stream_id, self._clock.now_ms() if mode == "invisible" else None
        )
        if user.session is not None and (before is None) != (user.invisible_since_ms is None):
            self._presence.changed(user)

    def _client_asks(self, link: Link, message: ClientMode | ClientTopic) -> None:
        """Do what a connection asks for, and answer it after the commit."""
        found = self._sessions.find(link, message.conn)
        if found is None:
            return
        if isinstance(message, ClientMode):
            work = self._set_mode(found[0], message.mode)
        else:
            work = self._accounts.topic(found[0], message, self._policies.of(found[0].key.tenant).topics)
        self._spawn(self._client_answer(link, message, work))

    async def _client_answer(self, link: Link, message: ClientMode | ClientTopic, work: Any) -> None:
        frame = None if message.ref is None else server_frames.ok(message.ref)
        try:
            await work
        except CarillonError as exc:
            frame = server_frames.error(exc.code, str(exc), exc.temporary, message.ref)
        if frame is not None:
            self._sessions.answer(link, message.conn, frame)

    async def _log_out(self, user: User, message: Logout) -> None:
        device, token = message.device, message.token_id
        await self._store.log_out(
            self._term_now, user.stream_id, user.key, device, token, message.token_expires_ms
        )
        user.revoked |= {token}
        left = await self._store.load_targets([user.key])
        user.take_targets(left[user.key])
        self._sessions.close_user(
            user, 4001, "logged out", only=lambda a: a.token_id == token or a.device == device
        )

    async def _answer(self, link: Link, request: int, work: Callable[[], Awaitable[Any]]) -> None:
        try:
            link.reply_nowait(request, await work())
        except FencedError as exc:
            link.fail_nowait(request, NotOwnerError(str(exc)))
        except CarillonError as exc:
            link.fail_nowait(request, exc)
        except Exception as exc:
            log.exception("%s: a request failed", self._config.name)
            link.fail_nowait(request, exc)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _answering(link: Link, request: int, reply: Callable[[Any], Any]) -> Callable[[Any], None]:
    """What answers a request with a change's result, or its error."""

    def done(answer: Any) -> None:
        if isinstance(answer, FencedError):
            link.fail_nowait(request, NotOwnerError(str(answer)))
        elif isinstance(answer, CarillonError):
            link.fail_nowait(request, answer)
        else:
            link.reply_nowait(request, reply(answer))

    return done


_SESSION_MESSAGES = frozenset(
    (ClientAck, ClientReady, ClientResume, ClientVisibility, ClientWatch, SocketDrained, Detach)
)
_DOCUMENT_MESSAGES = frozenset(
    (DevicePut, DeviceDelete, PreferencesPut, Unsubscribe, SessionsRevoke, Logout, PresenceMode)
) | {ProfilePut, DigestChange}
