"""One broadcast as one shard carries it out: its slots, page by page.

First the users who are connected here, over the writer's lane; then every slot in the order of its users.
A page is written by one transaction: notifications, outbox rows, counts, and where the page ended. Users of
the page who are in use here go over the lane before it; whoever has the notification already, from the first
pass or from a page that was cut off, is left out by its id.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import asyncpg
import msgspec

from actors.broadcast_rows import Decider, Made, Words
from actors.shard_policies import Policies
from actors.shard_users import UserCache
from actors.shard_writer import Entry, Writer
from actors.templates import Templates
from carillon.audience import SEGMENT
from carillon.broadcasts import Counts, Mark, NotificationIds, SlotUser, counted, next_size, walked
from carillon.clock import Clock
from carillon.errors import FencedError, UnavailableError
from carillon.events import EventParser, NotPlainError, ProblemError
from carillon.ids import SLOTS, UserKey, Uuid7Source
from carillon.messages import Event
from carillon.metrics import Stats
from carillon.problems import Problem
from carillon.settings import Settings
from carillon.templates import Rendered, parse_reference
from stores.postgres.broadcast_append import Progress, Rows
from stores.postgres.broadcasts import (
    ActiveBroadcast,
    BroadcastStore,
    Contexts,
    Failure,
    NotRunningError,
)
from stores.postgres.pool import acquired
from stores.postgres.shard_rows import PoisonError
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)

RENDER_S = 30.0
"""Longest rendering of the texts of one page."""


class CannotGoOnError(Exception):
    """The event can be sent to nobody. Args: why."""


class Shared(NamedTuple):
    """What all broadcasts of a shard work with."""

    store: BroadcastStore
    shard_store: ShardStore
    users: UserCache
    writer: Writer
    policies: Policies
    templates: Callable[[], Templates]
    decider: Decider
    clock: Clock
    stats: Stats
    settings: Settings
    term: Callable[[], int]
    owns: Callable[[int], bool]
    due_now: Callable[[], None]


class _Chunk(NamedTuple):
    """What one transaction writes."""

    made: Made
    marks: Sequence[Mark]
    failures: Sequence[Failure]
    now_ms: int


class Work:
    """One broadcast in this shard.

    Args:
        one: as read from the store, begun.
        slots: owned now, none of which anybody else writes for.
    """

    def __init__(self, shared: Shared, one: ActiveBroadcast, term: int, slots: Sequence[int]) -> None:
        assert one.started_ms is not None
        self.one = one
        self.term = term
        self.slots = slots
        self.size = shared.settings.broadcast.chunk_min
        audience = one.recipients.audience
        # All users of a slot are looked at, of whom perhaps few fit.
        self._filtered = audience is not None and (audience.kind == SEGMENT or bool(audience.platforms))
        self._dense = audience is not None and not self._filtered
        self._slots_of_page = 8 if self._filtered else SLOTS
        self.gone: set[str] = set()  # users that were erased since it was read whom it is for
        self._shared = shared
        self._ahead: list[SlotUser] = []
        self._contexts = Contexts({}, {})
        self._asked = 0  # of how many pending slots `_ahead` was read
        self._last_page = False
        self._touched: set[int] = set()  # slots in which something may be stored already
        self._careful = False
        self._numbers: list[int] = []
        parallel = shared.settings.broadcast.parallel
        self._turn = zlib.crc32(shared.shard_store.shard.encode()) % parallel if parallel else None
        self._ids = NotificationIds(one.id, one.started_ms)
        self._pending: list[tuple[int, str]] | None = None
        self._live: list[SlotUser] | None = None
        self._event: Event | None = None
        self._parser = EventParser(Uuid7Source())

    # -- steps ------------------------------------------------------------------------------------------

    async def step(self) -> bool:
        """Do one chunk. False: all slots that are ours are done.

        Raises:
            NotRunningError: it was paused, or has ended.
            FencedError: the term is over.
            UnavailableError: not now; the next step tries the same again.
            CannotGoOnError: never.
        """
        try:
            return await self._step()
        except Exception:
            # What was begun may have been stored, whatever was answered: it is asked for from now on.
            self._careful = True
            self._ahead = []
            raise

    async def _step(self) -> bool:
        shared = self._shared
        await shared.policies.ensure({self.one.tenant})
        if self._pending is None:
            self._pending, self._touched = await shared.store.slots(self.one.id, self.slots)
        if self._live is None:
            self._live = await self._connected()
        if self._live:
            batch = self._live[: shared.settings.broadcast.live_batch]
            await self._over_lane(self._left(batch))
            del self._live[: len(batch)]
            return True
        if not self._pending:
            return False
        if not self._ahead:
            await self._read_ahead(self._pending)
        started = shared.clock.monotonic()
        asked, later = self._pending[: self._asked], self._pending[self._asked :]
        part = self._ahead[: self.size]
        at_end = self._last_page and len(part) == len(self._ahead)
        marks, rest = walked(asked, part, len(part) + at_end)
        full = len(part) == self.size
        await self._page(self._left(part), marks)
        self._asked = len(rest)
        rest += later
        self._pending = rest
        del self._ahead[: len(part)]
        took_ms = (shared.clock.monotonic() - started) * 1000
        shared.stats.observe_ms("broadcast_chunk_ms", took_ms)
        if full:  # one that ended early says nothing about full ones
            limits = shared.settings.broadcast
            self.size = next_size(self.size, took_ms, limits.chunk_ms, limits.chunk_min, limits.chunk_max)
        return bool(rest)

    async def _read_ahead(self, pending: Sequence[tuple[int, str]]) -> None:
        """Read users of the next chunks and what decides about them; make streams where they are missing."""
        shared, tenant = self._shared, self.one.tenant
        limit = shared.settings.broadcast.chunk_max
        asked = pending[: self._slots_of_page]
        # In its turn, as chunks are written: beside another shard's, PostgreSQL would fill two processors.
        # Not where few of those looked at fit: that may take long.
        async with shared.store.turn(None if self._filtered else self._turn) as connection:
            started = shared.clock.monotonic()
            page = await shared.store.users(tenant, self.one.recipients, asked, limit, connection)
            self._widen((shared.clock.monotonic() - started) * 1000)
            self._contexts = await self._read_contexts(page, connection)
        await self._make_streams([one for one in self._left(page) if one.user not in self._contexts.streams])
        self._ahead = page
        self._asked = len(asked)
        self._last_page = len(page) < limit

    async def _make_streams(self, users: Sequence[SlotUser]) -> None:
        if not users:
            return
        shared = self._shared
        made = await shared.store.make_streams(
            shared.shard_store.shard, self.term, self.one.tenant, users, [os.urandom(6).hex() for _ in users]
        )
        if not made:
            raise FencedError("streams could not be made")
        self._contexts.streams.update(made)
        if len(made) < len(users):
            raise UnavailableError("streams were made by somebody else meanwhile", 0.1)

    async def _read_contexts(
        self, page: Sequence[SlotUser], connection: asyncpg.Connection | None
    ) -> Contexts:
        if not page:
            return Contexts({}, {})
        store, tenant = self._shared.store, self.one.tenant
        if self._dense:
            found = await store.contexts(tenant, page, True, connection)
            if found is not None:
                return found
            self._dense = False  # most users of a slot are not meant: these alone are looked up from now on
        found = await store.contexts(tenant, page, connection=connection)
        assert found is not None
        return found

    async def _connected(self) -> list[SlotUser]:
        """Users of slots that are not done who have a session here."""
        assert self._pending is not None
        tenant, open_slots = self.one.tenant, {slot for slot, _ in self._pending}
        found = [
            SlotUser(user.slot, user.key.user)
            for user in self._shared.users.users()
            if user.session is not None
            and user.session.live
            and user.key.tenant == tenant
            and user.slot in open_slots
        ]
        if not found:
            return found
        return await self._shared.store.among(tenant, self.one.recipients, found)

    def _widen(self, took_ms: float) -> None:
        """Choose from how many slots the next page is read."""
        target_ms = self._shared.settings.broadcast.chunk_ms
        if took_ms < target_ms:
            self._slots_of_page = min(self._slots_of_page * 2, SLOTS)
        elif took_ms > 4 * target_ms and self._filtered:
            self._slots_of_page = max(self._slots_of_page // 2, 1)

    def _left(self, users: Sequence[SlotUser]) -> Sequence[SlotUser]:
        """Users without those that were erased meanwhile: to notify one would make it anew."""
        return [one for one in users if one.user not in self.gone] if self.gone else users

    # -- users in use here ------------------------------------------------------------------------------

    async def _over_lane(self, users: Sequence[SlotUser]) -> list[Failure]:
        """Append for users in memory, as every event is; those who cannot be notified."""
        shared = self._shared
        words, failures = await self._words(users)
        failed = {one.user for one in failures} | self.gone
        proto = words.event
        events = [
            Event(
                self._ids.of(one.user), proto.tenant, one.user, one.slot, proto.type, proto.category,
                proto.priority, words.content(one.user), proto.created_ms, proto.expires_ms, proto.channels,
                proto.collapse_key, retry=True, fallback=proto.fallback,
            )
            for one in users
            if one.user not in failed
        ]  # fmt: skip
        if not events:
            return failures
        term = self.term
        self._touched.update(one.slot for one in users)

        async def guard(batch: Sequence[Entry], connection: asyncpg.Connection) -> None:
            await shared.store.enter(
                connection, shared.shard_store.shard, term, self.one.id, [], self._ids.bounds()
            )
            by_slot: dict[int, list[str]] = {}
            for entry in batch:
                assert entry.plan is not None
                by_slot.setdefault(entry.event.slot, []).append(entry.plan.status)
            counts = {slot: counted(statuses) for slot, statuses in by_slot.items()}
            await shared.store.mark(connection, self.one.id, [], counts)

        outcomes = await shared.writer.lane.write(events, guard, shared.settings.broadcast.live_wait_ms)
        for event, outcome in zip(events, outcomes, strict=True):
            if outcome.status == "moved":
                raise FencedError("the slot has moved")
            if outcome.status != "failed":
                continue
            if outcome.code == NotRunningError.code:
                raise NotRunningError(outcome.detail or "")
            if outcome.code in _FINAL:
                failures.append(Failure(event.user, outcome.code or "", outcome.detail or ""))
            else:
                raise UnavailableError(outcome.detail or "not now", outcome.retry_after_s or 0.5)
        shared.stats.count("broadcast_users", len(events))
        return failures

    # -- pages ------------------------------------------------------------------------------------------

    async def _page(self, page: Sequence[SlotUser], marks: Sequence[Mark]) -> None:
        """Notify a page of users and note how far it goes. Atomicity: both or neither, but for what went over
        the lane; the ids of that are known when the page is tried again."""
        shared = self._shared
        tenant = self.one.tenant
        failures: list[Failure] = []
        policy = shared.policies.of(tenant)
        # What a user has had of a limit is kept with the user in memory, and only the writer merges.
        everybody = (policy.rules is not None and policy.rules.limits is not None) or (
            policy.merge is not None and self.one.event.get("type") in policy.merge
        )
        keys = {UserKey(tenant, one.user): one for one in page}
        words: Words | None = None
        while True:
            known = {key: one for key, one in keys.items() if everybody or shared.users.known(key)}
            if not known and words is not None:
                break
            if not known:
                # Rendered before anybody is held: that may take seconds.
                words, refused = await self._words(list(keys.values()))
                failures += refused
                for one in refused:
                    del keys[UserKey(tenant, one.user)]
                continue
            most = shared.settings.broadcast.live_batch
            mine = list(known.values())
            for at in range(0, len(mine), most):
                failures += await self._over_lane(mine[at : at + most])
            for key in known:
                del keys[key]
        rest = self._left(list(keys.values()))
        # From here to `hold` nothing waits: nobody of `rest` comes into memory between.
        held = {key: one.slot for key, one in keys.items() if not self.gone or one.user not in self.gone}
        shared.users.hold(held)
        try:
            await self._write(rest, words, marks, failures)
        finally:
            shared.users.release(held)

    async def _write(
        self, users: Sequence[SlotUser], words: Words, marks: Sequence[Mark], failures: list[Failure]
    ) -> None:
        try:
            await self._chunk(users, words, marks, failures)
            return
        except PoisonError as exc:
            error = exc
        # Somebody's data is refused: each half without its marks, the culprit is told.
        self._careful = True
        await self._halves(users, words, error, failures)
        await self._chunk([], words, marks, failures)

    async def _halves(
        self,
        users: Sequence[SlotUser],
        words: Words,
        error: PoisonError,
        failures: list[Failure],
    ) -> None:
        if len(users) <= 1:
            log.warning("a broadcast cannot be stored for a user: %s", error)
            failures += [Failure(one.user, "invalid", str(error)) for one in users]
            return
        middle = len(users) // 2
        for half in (users[:middle], users[middle:]):
            try:
                await self._chunk(half, words, (), ())
            except PoisonError as exc:
                await self._halves(half, words, exc, failures)

    async def _chunk(
        self,
        users: Sequence[SlotUser],
        words: Words,
        marks: Sequence[Mark],
        failures: Sequence[Failure],
    ) -> None:
        """One transaction: one statement if nothing of it can be stored already."""
        shared = self._shared
        now_ms = shared.clock.now_ms()
        made = self._made(users, words, now_ms)
        careful = self._careful or bool(failures) or not users
        careful = careful or not self._touched.isdisjoint(one.slot for one in users)
        try:
            async with acquired(
                shared.shard_store.pool, shared.settings.postgres.connect_timeout_s
            ) as connection:
                chunk = _Chunk(made, marks, failures, now_ms)
                if careful:
                    pushes = await self._carefully(connection, chunk, words)
                else:
                    pushes = await self._at_once(connection, chunk)
        except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError) as exc:
            raise PoisonError(f"PostgreSQL refuses the data: {exc}") from exc
        shared.stats.count("broadcast_users", len(users))
        if failures:
            shared.stats.count("broadcast_failures", len(failures))
        if pushes:
            shared.due_now()

    def _made(self, users: Sequence[SlotUser], words: Words, now_ms: int) -> Made:
        shared = self._shared
        policy = shared.policies.of(self.one.tenant)
        return shared.decider.make(users, self._contexts, words, self._ids, policy, now_ms)

    async def _at_once(self, connection: asyncpg.Connection, chunk: _Chunk) -> bool:
        made, marks, failures, now_ms = chunk
        assert not failures
        shared = self._shared
        progress = Progress(self.one.id, marks, made.counts(), self._turn)
        try:
            gone = await self._append(connection, made.rows, now_ms, progress)
        except FencedError:
            # Fenced, or it does not run: one statement cannot tell which.
            async with connection.transaction():
                await self._enter(connection, [])
            raise UnavailableError("the broadcast was paused a moment ago", 0.1) from None
        if gone:  # erased since they were read, and counted all the same
            less = {slot: Counts(*(-n for n in counts)) for slot, counts in made.counts(gone).items()}
            await shared.store.mark(connection, self.one.id, [], less)
        return bool(made.rows.pushes)

    async def _carefully(self, connection: asyncpg.Connection, chunk: _Chunk, words: Words) -> bool:
        made, marks, failures, now_ms = chunk
        shared = self._shared
        async with connection.transaction():
            stored = await self._enter(connection, made.rows.ids)
            if stored:
                left = [one for one in made.users if self._ids.of(one.user) not in stored]
                made = self._made(left, words, now_ms)
            counts: dict[int, Counts] = {}
            if made.users:
                gone = await self._append(connection, made.rows, now_ms, None)
                counts = made.counts(set(made.rows.streams) - gone if gone else None)
            if failures:
                last = marks[-1].slot if marks else next(iter(counts), 0)
                counts[last] = counts.get(last, Counts()).plus(Counts(failed=len(failures)))
            await shared.store.mark(
                connection, self.one.id, marks, counts, failures, now_ms,
                shared.settings.broadcast.failures_kept,
            )  # fmt: skip
        return bool(made.rows.pushes)

    async def _enter(self, connection: asyncpg.Connection, ids: Sequence[bytes]) -> set[bytes]:
        shared = self._shared
        return await shared.store.enter(
            connection, shared.shard_store.shard, self.term, self.one.id, ids, self._ids.bounds()
        )

    async def _append(
        self, connection: asyncpg.Connection, rows: Rows, now_ms: int, progress: Progress | None
    ) -> set[int]:
        """Write rows; the streams that are gone."""
        shared = self._shared
        lacking = len(rows.pushes) - len(self._numbers)
        if lacking > 0:
            self._numbers += await shared.store.chunks.draw(connection, max(lacking, 1000))
        kept = len(self._numbers) - len(rows.pushes)
        numbers = self._numbers[kept:]
        del self._numbers[kept:]
        return await shared.store.chunks.append(
            connection, shared.shard_store.shard, self.term, rows, numbers, now_ms, progress
        )

    # -- what it says -----------------------------------------------------------------------------------

    async def _words(self, users: Sequence[SlotUser]) -> tuple[Words, list[Failure]]:
        """The event for users, and those for whom its template fails."""
        one = self.one
        assert one.started_ms is not None
        if one.event.get("template") is None:
            if self._event is None:
                self._event = self._plain()
            return Words(self._timely(self._event), None), []
        contents: dict[str, str] = {}
        failures: list[Failure] = []
        found = await self._rendered([u.user for u in users], contents, failures)
        if found is None:
            found = self._event or Event(bytes(16), one.tenant, "", 0, "", None, 1, "", one.started_ms)
        self._event = found
        return Words(self._timely(found), contents), failures

    def _timely(self, event: Event) -> Event:
        if event.expires_ms is not None and event.expires_ms <= self._shared.clock.now_ms():
            raise CannotGoOnError("the event has expired")
        return event

    def _plain(self) -> Event:
        assert self.one.started_ms is not None
        body = msgspec.json.encode({**self.one.event, "userId": "x"})
        try:
            return self._parser.parse(body, self.one.tenant, self.one.started_ms).events[0]
        except (ProblemError, NotPlainError) as exc:
            raise CannotGoOnError(str(exc)) from exc

    async def _rendered(
        self, names: list[str], contents: dict[str, str], failures: list[Failure]
    ) -> Event | None:
        """Render for users; if it fails for some, find out for whom."""
        if not names:
            return None
        shared, one = self._shared, self.one
        assert one.started_ms is not None
        document: dict[str, Any] = {**one.event, "userIds": names}
        deadline = shared.clock.monotonic() + RENDER_S
        templates = shared.templates()
        prepared = await templates.prepare(document, one.tenant, deadline)
        told = prepared.get(0)
        if isinstance(told, Problem):
            reference: Any = parse_reference(one.event["template"])
            if await templates.find(one.tenant, *reference) is None:
                raise CannotGoOnError(told.detail)
            if len(names) == 1:
                failures.append(Failure(names[0], told.code, told.detail))
                return None
            middle = len(names) // 2
            first = await self._rendered(names[:middle], contents, failures)
            second = await self._rendered(names[middle:], contents, failures)
            return first or second
        try:
            parsed = self._parser.parse_prepared(document, prepared, one.tenant, one.started_ms)
        except ProblemError as exc:
            raise CannotGoOnError(str(exc)) from exc
        shown: list[tuple[bytes, str, int, str]] = []
        for index, event in enumerate(parsed.events):
            contents[event.user] = event.content
            variant: Rendered | None = parsed.variants.get(index)
            if variant is not None:
                shown.append(
                    (self._ids.of(event.user), variant.template, variant.version, variant.variant or "")
                )
        if shown:
            await templates.store.expose(one.tenant, shown)
        return parsed.events[0] if parsed.events else None


_FINAL = frozenset(("invalid", "not_found", "poison", "too_large"))
"""Codes of outcomes that no further try changes."""
