"""Broadcasts in a shard: found, carried out chunk by chunk in turn, and held behind single events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from actors.broadcast_rows import Decider
from actors.broadcast_work import CannotGoOnError, Shared, Work
from actors.shard_policies import Policies
from actors.shard_users import UserCache
from actors.shard_writer import Writer
from actors.templates import Templates
from carillon.broadcasts import SCHEDULED, pause_ms
from carillon.clock import Clock
from carillon.errors import CarillonError, FencedError, StoreUnavailableError
from carillon.ids import UserKey, uuid_text
from carillon.metrics import Stats
from carillon.settings import Settings
from stores.postgres.broadcasts import BroadcastStore, NotRunningError
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)

BUSY_S = 0.5
"""Single events were appended so short a time ago: the lane rests after each chunk."""
_PRUNE_S = 600.0


class Broadcasts:
    """What is sent to many.

    Args:
        store: gives the connections.
        templates: gives the shard's templates.
        term, slots, owns: of the shard.
        due_now: called when outbox rows were made that are due.
        fenced: called when the term turns out to be over.
    """

    def __init__(
        self,
        store: ShardStore,
        users: UserCache,
        writer: Writer,
        policies: Policies,
        clock: Clock,
        stats: Stats,
        settings: Settings,
        *,
        templates: Callable[[], Templates],
        term: Callable[[], int],
        slots: Callable[[], Sequence[int]],
        owns: Callable[[int], bool],
        due_now: Callable[[], None],
        fenced: Callable[[], None],
    ) -> None:
        self._shard_store = store
        self._users = users
        self._writer = writer
        self._policies = policies
        self._clock = clock
        self._stats = stats
        self._all = settings
        self._settings = settings.broadcast
        self._templates = templates
        self._term = term
        self._slots = slots
        self._owns = owns
        self._due_now = due_now
        self._fenced = fenced
        self._works: dict[bytes, Work] = {}
        self._erased: set[UserKey] = set()  # since the look that is under way began
        self._task: asyncio.Task[None] | None = None
        self._prune_at = 0.0
        self._looked_at = 0.0

    def start(self) -> None:
        """Begin looking, unless `broadcast.look_s` is 0."""
        if self._settings.look_s:
            self._task = asyncio.get_running_loop().create_task(self._run_for_ever())

    async def close(self) -> None:
        """Stop; whoever owns the slots then goes on where this ended."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run_for_ever(self) -> None:
        self._store = BroadcastStore(self._shard_store.pool, self._all.postgres.connect_timeout_s)
        self._shared = Shared(
            self._store, self._shard_store, self._users, self._writer, self._policies, self._templates,
            Decider(self._all.shard), self._clock, self._stats, self._all, self._term, self._owns,
            self._due_now,
        )  # fmt: skip
        waits = True
        while True:
            if waits:
                await asyncio.sleep(self._settings.look_s)
            waits = True
            try:
                await self._look()
                while self._works:
                    await self._round()
                    if self._looked_long_ago():
                        break
                waits = not self._works  # in the midst of one there is nothing to wait for
                if self._clock.monotonic() >= self._prune_at:
                    self._prune_at = self._clock.monotonic() + _PRUNE_S
                    await self._store.prune(self._clock.now_ms() - round(self._settings.keep_s * 1000))
            except CarillonError as exc:
                log.info("broadcasts wait: %s", exc)
            except Exception:
                log.exception("looking for broadcasts failed")

    def erased(self, key: UserKey) -> None:
        """A user was erased: what was read of whom to notify before that is no reason to make it anew."""
        if self._task is None:
            return
        self._erased = self._erased | {key}
        for work in self._works.values():
            if work.one.tenant == key.tenant:
                work.gone.add(key.user)

    # -- what there is to do ----------------------------------------------------------------------------

    def _looked_long_ago(self) -> bool:
        return self._clock.monotonic() - self._looked_at >= self._settings.look_s

    async def _look(self) -> None:
        """Read which broadcasts run; those that are new, or whose slots are others now, begin here."""
        term, slots = self._term(), self._slots()
        self._looked_at = self._clock.monotonic()
        self._erased.clear()
        found = await self._store.active(self._clock.now_ms()) if slots else []
        works: dict[bytes, Work] = {}
        for one in found:
            if one.state == SCHEDULED:
                await self._store.begin(one.id, self._clock.now_ms())
                continue  # found running by the next look
            known = self._works.get(one.id)
            # The list of slots is a new one with every map.
            if known is not None and known.term == term and known.slots is slots:
                works[one.id] = known
                continue
            if one.total is None:
                try:
                    await self._store.estimate(one)
                except StoreUnavailableError as exc:  # it goes on all the same
                    log.info("broadcast %s is not counted: %s", uuid_text(one.id), exc)
            works[one.id] = Work(self._shared, one, term, slots)
        self._works = works
        for key in self._erased:
            self.erased(key)
        self._stats.gauge("broadcasts_running", len(works))

    async def _round(self) -> None:
        """One chunk of each broadcast."""
        idle = True
        for work in list(self._works.values()):
            started = self._clock.monotonic()
            if await self._step(work):
                idle = False
            took_ms = (self._clock.monotonic() - started) * 1000
            await self._rest(took_ms)
        if idle:  # others have slots to do; or the next look knows more
            await asyncio.sleep(self._settings.look_s)

    async def _step(self, work: Work) -> bool:
        broadcast = work.one.id
        try:
            if await work.step():
                return True
            if await self._store.finish(broadcast, self._clock.now_ms()):
                log.info("broadcast %s is done", uuid_text(broadcast))
                del self._works[broadcast]
        except NotRunningError:
            self._works.pop(broadcast, None)
        except FencedError:
            self._works.pop(broadcast, None)
            self._stats.count("broadcast_fenced")
            self._fenced()
        except CannotGoOnError as exc:
            self._works.pop(broadcast, None)
            log.warning("broadcast %s cannot go on: %s", uuid_text(broadcast), exc)
            await self._store.fail(broadcast, str(exc), self._clock.now_ms())
        except CarillonError as exc:
            log.info("broadcast %s waits: %s", uuid_text(broadcast), exc)
            await asyncio.sleep(self._settings.retry_s)
        except Exception:
            log.exception("a chunk of broadcast %s failed", uuid_text(broadcast))
            await asyncio.sleep(self._settings.retry_s)
        return False

    async def _rest(self, took_ms: float) -> None:
        """Leave the time that is not the lane's to single events."""
        if self._clock.monotonic() - self._writer.single_at < BUSY_S:
            wait_s = pause_ms(took_ms, self._settings.busy_share) / 1000
            self._stats.count("broadcast_rest_s", wait_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.sleep(wait_s)
