"""Schedules of a shard's slots: claimed when they are due, published like any event, written down.

An occurrence is published with an idempotency key made of schedule and occurrence, so that a claim that is
repeated (the shard died between publishing and writing it down) makes no second notification.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from actors.link import Link
from actors.templates import Templates
from carillon.clock import Clock
from carillon.errors import CarillonError, FencedError, InvalidInputError, UnavailableError
from carillon.events import EventParser, NotPlainError, ProblemError
from carillon.ids import Uuid7Source, uuid_text
from carillon.messages import Event, Outcome, Outcomes, Publish
from carillon.metrics import Stats
from carillon.quiet_hours import known_zone
from carillon.schedules import USER_ZONE, When, advance, look_ms, moved_ms, parse
from carillon.settings import Settings
from stores.postgres.schedules import ClaimedSchedule, ScheduleStore
from stores.postgres.shard_store import ShardStore
from stores.postgres.templates import TemplateStore

log = logging.getLogger(__name__)

_PRUNE_S = 600.0


class Schedules:
    """The clock of what is scheduled.

    Args:
        store: gives the connections.
        name, term, slots: of the shard.
        router: a link to a router, None while there is none.
        fenced: called when the term turns out to be over.
    """

    def __init__(
        self,
        store: ShardStore,
        clock: Clock,
        stats: Stats,
        settings: Settings,
        *,
        name: str,
        term: Callable[[], int],
        slots: Callable[[], Sequence[int]],
        router: Callable[[], Link | None],
        fenced: Callable[[], None],
    ) -> None:
        self._shard_store = store
        self._clock = clock
        self._stats = stats
        self._settings = settings
        self._name = name
        self._term = term
        self._slots = slots
        self._router = router
        self._fenced = fenced
        self._parser = EventParser(Uuid7Source())
        self._store_: ScheduleStore | None = None
        self._templates_: Templates | None = None
        self._task: asyncio.Task[None] | None = None
        self._prune_at = 0.0

    def start(self) -> None:
        """Begin looking, unless `schedule.sweep_s` is 0."""
        if self._settings.schedule.sweep_s:
            self._task = asyncio.get_running_loop().create_task(self._sweep_for_ever())

    async def close(self) -> None:
        """Stop; what is under way is claimed again by whoever owns the slot then."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._templates_ is not None:
            await self._templates_.close()

    @property
    def _store(self) -> ScheduleStore:
        if self._store_ is None:
            self._store_ = ScheduleStore(self._shard_store.pool, self._settings.postgres.connect_timeout_s)
        return self._store_

    @property
    def templates(self) -> Templates:
        """Templates as the shard uses them, made with the first that is wanted."""
        if self._templates_ is None:
            store = TemplateStore(self._shard_store.pool, self._settings.postgres.connect_timeout_s)
            self._templates_ = Templates(store, self._settings.template, self._clock, self._stats)
        return self._templates_

    async def _sweep_for_ever(self) -> None:
        settings = self._settings.schedule
        while True:
            await asyncio.sleep(settings.sweep_s)
            if not self._slots():
                continue
            try:
                while await self._sweep():
                    pass
                if self._clock.monotonic() >= self._prune_at:
                    self._prune_at = self._clock.monotonic() + _PRUNE_S
                    await self._store.prune(self._clock.now_ms() - round(settings.keep_s * 1000))
            except FencedError:
                self._fenced()
            except CarillonError as exc:
                log.info("schedules wait: %s", exc)
            except Exception:
                log.exception("looking for what is scheduled failed")

    async def _sweep(self) -> bool:
        """Fire what is due; True if there may be more."""
        settings = self._settings.schedule
        slots, now_ms = list(self._slots()), self._clock.now_ms()
        if not await self._store.any_due(slots, now_ms):
            return False
        lease_end_ms = now_ms + round(settings.lease_s * 1000)
        claimed = await self._store.claim(
            self._name, self._term(), slots, now_ms, settings.batch, lease_end_ms
        )
        results = await asyncio.gather(*(self._fire(row) for row in claimed), return_exceptions=True)
        for row, result in zip(claimed, results, strict=True):
            if isinstance(result, FencedError):
                raise result
            if isinstance(result, CarillonError):
                log.info("schedule %s waits for its lease to end: %s", uuid_text(row.id), result)
            elif isinstance(result, BaseException):
                log.error("schedule %s failed", uuid_text(row.id), exc_info=result)
        return len(claimed) == settings.batch

    async def _fire(self, row: ClaimedSchedule) -> None:
        when = parse(msgspec.json.decode(row.rule))
        now_ms = self._clock.now_ms()
        zone = await self._zone(row, when)
        at_ms = moved_ms(when, row.next_ms, row.zone, zone)
        if at_ms > now_ms:  # not yet: its user has travelled, or was only looked after
            await self._settle(row, when, "active", at_ms, zone, now_ms)
            return
        try:
            result = await self._publish(row, at_ms)
        except UnavailableError as exc:
            pause_s = max(exc.retry_after_s, self._settings.schedule.retry_s)
            await self._settle(
                row,
                when,
                "active",
                at_ms,
                zone,
                now_ms,
                f"waits: {exc}",
                due_ms=now_ms + round(1000 * pause_s),
            )
            return
        except InvalidInputError as exc:
            result = f"failed: {exc}"
        now_ms = self._clock.now_ms()
        self._stats.count("schedules_fired")
        self._stats.observe_ms("schedule_late_ms", now_ms - at_ms)
        following, missed = advance(when, at_ms, now_ms, zone)
        fired = 0 if result.startswith("failed") else 1
        if following is None:
            state = "done" if fired or when.recurring else "failed"
            await self._settle(row, when, state, at_ms, zone, now_ms, result, fired, missed)
        else:
            await self._settle(row, when, "active", following, zone, now_ms, result, fired, missed)

    async def _zone(self, row: ClaimedSchedule, when: When) -> str:
        if when.zone != USER_ZONE or row.user is None:
            return "UTC"
        zone = await self._store.zone(row.tenant, row.user)
        return zone if known_zone(zone) else "UTC"  # type: ignore[return-value]

    async def _settle(
        self,
        row: ClaimedSchedule,
        when: When,
        state: str,
        next_at: int,
        zone: str,
        now_ms: int,
        result: str | None = None,
        fired: int = 0,
        missed: int = 0,
        due_ms: int | None = None,
    ) -> None:
        if due_ms is None:
            due_ms = look_ms(when, next_at, now_ms, self._settings.schedule.zone_recheck_s)
        await self._store.settle(
            self._name, self._term(), row, state=state, next_ms=next_at, zone=zone, due_ms=due_ms,
            fired=fired, missed=missed, result=None if result is None else result[:500], now_ms=now_ms,
        )  # fmt: skip

    # -- publishing ------------------------------------------------------------------------------------

    async def _publish(self, row: ClaimedSchedule, at_ms: int) -> str:
        """Publish an occurrence; what became of it, in words.

        Raises:
            InvalidInputError: the event cannot be sent, whenever.
            UnavailableError: not now.
        """
        deadline = self._clock.monotonic() + self._settings.schedule.publish_timeout_s
        events = await self._events(row, at_ms, deadline)
        if not events:
            return "failed: the event has no recipient"
        outcomes = await self._send(events, deadline)
        temporary = [o for o in outcomes if o.status == "failed" and _temporary(o)]
        if temporary:
            raise UnavailableError(temporary[0].detail or "not now", temporary[0].retry_after_s)
        failed = [o for o in outcomes if o.status == "failed"]
        if failed:
            told = f"{len(failed)} of {len(outcomes)} failed: {failed[0].detail or failed[0].code}"
            return f"failed: {told}" if len(failed) == len(outcomes) else told
        return outcomes[0].status if len(outcomes) == 1 else f"{len(outcomes)} recipients"

    async def _events(self, row: ClaimedSchedule, at_ms: int, deadline: float) -> list[Event]:
        body = row.event.encode()
        now_ms = self._clock.now_ms()
        try:
            parsed = self._parser.parse(body, row.tenant, now_ms)
        except NotPlainError as wanted:
            prepared = await self.templates.prepare(wanted.document, row.tenant, deadline)
            parsed = self._parser.parse_prepared(wanted.document, prepared, row.tenant, now_ms)
        refused = [slot.refused for slot in parsed.slots or () if slot.refused is not None]
        if refused and not parsed.events:
            raise ProblemError(refused[0])
        for event in parsed.events:
            # The occurrence is what is sent once, whatever its words turn out to be.
            key = f"schedules:{uuid_text(row.id)}:{at_ms}"
            event.idempotency_key = key if row.user is not None else f"{key}#{event.user}"
            event.body_hash = hashlib.sha256(key.encode()).digest()
            if row.single:
                event.id = row.id
                event.retry = True  # it may be there from a claim before, longer ago than keys are kept
        if parsed.variants:
            await self.templates.note_variants(row.tenant, parsed)
        return parsed.events

    async def _send(self, events: list[Event], deadline: float) -> list[Outcome]:
        link = self._router()
        if link is None:
            raise UnavailableError("no router is linked")
        left_s = max(0.01, deadline - self._clock.monotonic())
        try:
            reply: Any = await link.request(Publish(events), left_s)
        except CarillonError as exc:
            raise UnavailableError(str(exc)) from exc
        if not isinstance(reply, Outcomes) or len(reply.outcomes) != len(events):
            raise UnavailableError("the router gave another answer than outcomes")
        return reply.outcomes


_FINAL = frozenset(("invalid", "not_found", "not_permitted", "poison", "idempotency_conflict", "too_large"))


def _temporary(outcome: Outcome) -> bool:
    return outcome.code not in _FINAL
