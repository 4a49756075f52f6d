"""The clock of a shard's users: due outbox rows, outcomes of pushes.

The outbox in Postgres is the truth; what is kept here only makes it prompt. A row whose time comes while
this process is down, or whose job or outcome is lost on the way, is claimed by the sweep (guarantee G6).
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import random
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from actors.link import Link
from actors.shard_acks import Acknowledgements
from actors.shard_again import DecidedAgain
from actors.shard_digests import Digests
from actors.shard_kept import KeptPushes
from actors.shard_policies import Policies
from actors.shard_returns import Returns
from actors.shard_users import User, UserCache
from actors.templates import Templates
from carillon.attention import DEFERRED, HELD, SEEN, WITHDRAWN, at_due
from carillon.clock import Clock
from carillon.errors import CarillonError, FencedError, StoreUnavailableError
from carillon.external import EXTERNAL
from carillon.ids import UserKey, uuid_text
from carillon.kept_push import KeptPush
from carillon.messages import LEFT, Done, Event, Push, PushJob, PushLeft, PushOutcome, PushResult, PushTarget
from carillon.metrics import Stats
from carillon.notification import decode_content, text_of
from carillon.outbox import RETRYABLE, for_platforms, left_out_told, settle, without_target
from carillon.settings import Settings
from stores.postgres.shard_rows import AttemptRow, Claimed, OutboxRow, ReleaseRow, SettleRow
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)

MAX_WAITING = 200_000
"""Live deliveries whose push is watched in memory; beyond it the periodic sweep finds them."""

MAX_MOMENTS = 10_000
"""Moments remembered at which something that rules hold is due; beyond it the periodic sweep finds them."""

MAX_LATE = 10_000
"""Pushes remembered that were planned for so late that others are given up by then."""

WAITS = "waits:"
"""How the reason begins of a push that nobody could try."""

WITHDRAW = "withdraw"
"""Channel of rows that take back what was pushed."""

REPLACE = "replace"
"""Channel of rows that put an edited text in the place of what phones show: without a sound."""

AFTER_DELAY_MS = 50
"""A row that waits for its user to see it is looked at so long after its time: the session, which knows more,
comes first."""


class _Flight:
    """A claimed row whose jobs are at the pools."""

    __slots__ = (
        "attempt",
        "base",
        "expires_ms",
        "left",
        "left_out",
        "open",
        "results",
        "sent_before",
        "until_ms",
    )

    def __init__(
        self,
        attempt: int,
        expires_ms: int | None,
        providers: set[str],
        until_ms: int,
        base: int = 0,
        sent_before: bool = False,
        left_out: str | None = None,
    ) -> None:
        self.attempt = attempt
        self.left_out = left_out  # the reason of a row whose push was not for all devices
        self.base = base  # tries before a replay
        self.sent_before = sent_before  # by an earlier try, to some target
        self.expires_ms = expires_ms
        self.open = providers
        self.results: list[PushResult] = []
        self.until_ms = until_ms
        self.left: tuple[int, str] | None = None  # some targets were not tried: next due, reason


class Outbox:
    """Pushes of one shard.

    Args:
        acks: written before due rows are claimed: they cancel some.
        kept: pushes that are no rows yet; they are when they are due.
        slots: gives the slots owned now.
        policies: of tenants, for what is decided again; should they change, open digests follow.
        settled: awaits the batch that the writer has in flight.
        templates: gives the tenants' templates.
        send_jobs: hands jobs to a router; False if there is none.
        fenced: called when the term turns out to be over.
    """

    def __init__(
        self,
        store: ShardStore,
        users: UserCache,
        acks: Acknowledgements,
        kept: KeptPushes,
        clock: Clock,
        stats: Stats,
        settings: Settings,
        *,
        term: Callable[[], int],
        slots: Callable[[], Sequence[int]],
        policies: Policies,
        settled: Callable[[], Awaitable[None]],
        templates: Callable[[], Templates],
        send_jobs: Callable[[Push], bool],
        fenced: Callable[[], None],
    ) -> None:
        self._policies = policies
        self._store = store
        self._users = users
        self._acks = acks
        self._kept = kept
        acks.on_change(self.settled_in_app, self.due_now)
        self._clock = clock
        self._stats = stats
        self._settings = settings
        self._term = term
        self._slots = slots
        self._send_jobs = send_jobs
        self._fenced = fenced
        self._waiting: dict[bytes, int] = {}  # live and unacknowledged: notification -> due, ascending
        self._timers: list[int] = []  # other known due times
        self._sweeps_ms = 0  # the next sweep that is not the periodic one
        self._moments: set[int] = set()  # those among them at which something is due that rules hold
        self._look_ms = 0.0  # when to look for more of them that another process left to us
        self._fresh: list[tuple[User, Event, int, OutboxRow]] = []
        self._flights: dict[int, _Flight] = {}
        self._outcomes: list[tuple[Link, int, PushOutcome]] = []
        self._stopped: dict[bytes, tuple[str, int]] = {}  # why, and until when jobs may be on their way here
        self._late: dict[int, int] = {}  # pushes tried first when others are given up: when that was
        self._half_tried: list[tuple[int, _Flight]] = []  # sent at one provider, left by another
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._outcome_wake = asyncio.Event()
        self._fresh_wake = asyncio.Event()
        self._settle_lock = asyncio.Lock()
        self._returns = Returns(
            store, clock, settings.push, term=term, released=self._released, fenced=fenced
        )  # fmt: skip
        self.digests = Digests(
            store, policies, clock, stats, settings, term=term, settled=settled, templates=templates,
            due=self._due_at, slots=slots, fenced=fenced,
        )  # fmt: skip
        policies.on_change(self.digests.follow)
        self._again = DecidedAgain(
            store, users, policies, stats, settings.shard, self.digests, term=term, hold=self._returns.add,
            cancel=lambda rows, now_ms: self._settle([], rows, [], [], now_ms),
        )  # fmt: skip

    def start(self) -> None:
        """Begin sweeping and writing."""
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(work)
            for work in (
                self._sweep_for_ever(),
                self._record_for_ever(),
                self._fresh_for_ever(),
                self.digests.follow_for_ever(),
            )
        ]

    async def close(self) -> None:
        """Write what can be written, stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._returns.close()

    # -- what happens -----------------------------------------------------------------------------------

    def settled_in_app(self, ids: Iterable[bytes]) -> None:
        """Acknowledged, read, dismissed, ...: nothing is to be watched any more."""
        for raw in ids:
            self._waiting.pop(raw, None)

    def stop(self, notification: bytes, reason: str) -> None:
        """It was retracted or cancelled: no push of it leaves any more, of whatever was claimed before."""
        self.settled_in_app((notification,))
        now_ms = self._clock.now_ms()
        while self._stopped and next(iter(self._stopped.values()))[1] <= now_ms:
            del self._stopped[next(iter(self._stopped))]
        self._stopped.pop(notification, None)
        lease_ms = round(self._settings.shard.delivery_lease_s * 1000)
        self._stopped[notification] = reason, now_ms + lease_ms

    def planned(self, user: User, event: Event, seq: int, row: OutboxRow | KeptPush, *, live: bool) -> None:
        """A push was committed with its notification."""
        if type(row) is KeptPush:  # what is kept knows when it is due
            if row.due_ms < self._sweeps_ms:
                self._sweeps_ms = row.due_ms
                self._wake.set()
        elif row.claimed:
            assert isinstance(row, OutboxRow)
            self._fresh.append((user, event, seq, row))
            self._fresh_wake.set()
        elif row.gate == DEFERRED:
            self._due_at(row.due_ms)
        elif live and row.gate != SEEN and len(self._waiting) < MAX_WAITING:
            self._waiting[event.id] = row.due_ms
            if len(self._waiting) == 1:
                self._wake.set()
        else:
            heapq.heappush(self._timers, row.due_ms + (AFTER_DELAY_MS if row.gate == SEEN else 0))
            self._wake.set()

    def outcome(self, link: Link, request: int, message: PushOutcome) -> None:
        """A pool tells what became of a job; answered after the commit."""
        self._outcomes.append((link, request, message))
        self._outcome_wake.set()

    def left(self, message: PushLeft) -> None:
        """Nobody tries these jobs. Rows of which nothing was tried go back and the try does not count."""
        dues = self._returns.due_ms(message.provider, len(message.deliveries))
        reason = f"{WAITS} {message.provider} {message.reason}"
        back: list[ReleaseRow] = []
        for delivery, attempt, due_ms in zip(message.deliveries, message.attempts, dues, strict=False):
            flight = self._flights.get(delivery)
            if flight is None or flight.attempt != attempt or message.provider not in flight.open:
                continue  # an earlier process sent it, perhaps to other providers too: its lease decides
            flight.open.discard(message.provider)
            flight.left = (max(due_ms, flight.left[0] if flight.left else 0), reason)
            if flight.open:
                continue
            if flight.results:
                self._half_tried.append((delivery, flight))
                self._outcome_wake.set()
            else:
                del self._flights[delivery]
                back.append(ReleaseRow(delivery, attempt, flight.left[0], reason))
        if back:
            self._returns.add(back)

    def _released(self, rows: list[ReleaseRow]) -> None:
        heapq.heappush(self._timers, min(row.due_ms for row in rows))
        self._stats.count("pushes_handed_back", len(rows))
        self._wake.set()

    def due_now(self) -> None:
        """Something is due: a push whose user looked away."""
        heapq.heappush(self._timers, 0)
        self._wake.set()

    def slots_came(self) -> None:
        """What was due in them is, and what rules hold in them will be."""
        self._look_ms = 0.0
        self.due_now()

    def _due_at(self, due_ms: int) -> None:
        """Something that rules hold is due then, perhaps hours away and for many users: noted once."""
        if due_ms in self._moments or len(self._moments) >= MAX_MOMENTS:
            return
        self._moments.add(due_ms)
        heapq.heappush(self._timers, due_ms)
        self._wake.set()

    # -- the sweep --------------------------------------------------------------------------------------

    def _next_wait_s(self) -> float:
        now_ms = self._clock.now_ms()
        due = [self._timers[0]] if self._timers else []
        if self._waiting:
            due.append(next(iter(self._waiting.values())))
        kept_ms = self._kept.next_due_ms()
        if kept_ms is not None:
            due.append(kept_ms)
        self._sweeps_ms = min(due) if due else sys.maxsize
        sweep_s = self._settings.shard.sweep_s
        return min(sweep_s, max(0.0, (self._sweeps_ms - now_ms) / 1000)) if due else sweep_s

    async def _sweep_for_ever(self) -> None:
        last_full = float("-inf")
        while True:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._next_wait_s())
            now_ms = self._clock.now_ms()
            due = self._clock.monotonic() - last_full >= self._settings.shard.sweep_s
            while self._timers and self._timers[0] <= now_ms:
                self._moments.discard(heapq.heappop(self._timers))
                due = True
            while self._waiting:
                raw, at_ms = next(iter(self._waiting.items()))
                if at_ms > now_ms:
                    break
                del self._waiting[raw]
                due = True
            due = self._kept.came_due(now_ms) or due
            if not due or not self._slots():
                continue
            last_full = self._clock.monotonic()
            try:
                await self._sweep()
                if now_ms >= self._look_ms:
                    await self._look_ahead(now_ms)
            except FencedError:
                self._fenced()
            except StoreUnavailableError as exc:
                log.info("the outbox waits: %s", exc)
            except Exception:
                log.exception("sweeping the outbox failed")

    async def _look_ahead(self, now_ms: int) -> None:
        """Note when the next is due that rules hold, whoever planned it; once that has passed, look again."""
        slots = self._slots()
        moment = await self._store.digests.next_moment(slots, now_ms)
        if slots is not self._slots():
            return  # others came meanwhile
        if moment is None:
            self._look_ms = float("inf")
        else:
            self._look_ms = moment
            self._due_at(moment)

    async def _sweep(self) -> None:
        """Claim what is due and send it. Acknowledgements in memory are written first: they cancel rows."""
        shard = self._settings.shard
        await self._acks.write()
        await self._kept.write_due(self._clock.now_ms())
        await self._kept.follow()
        while True:
            now_ms = self._clock.now_ms()
            lease_end_ms = now_ms + round(shard.delivery_lease_s * 1000)
            claimed = await self._store.claim_due(
                self._term(), self._slots(), now_ms, shard.sweep_batch, lease_end_ms
            )
            self._stats.gauge("outbox_due", len(claimed))
            if not claimed:
                break
            rest = await self._again.look_through(claimed, now_ms)
            targets = await self._store.load_targets(list({c.key for c in rest})) if rest else {}
            await self._dispatch([(c, targets[c.key]) for c in rest], lease_end_ms)
            if len(claimed) < shard.sweep_batch:
                break

    async def _fresh_for_ever(self) -> None:
        """Rows born claimed: their jobs leave right after the commit, with targets as they are now."""
        while True:
            await self._fresh_wake.wait()
            self._fresh_wake.clear()
            fresh, self._fresh = self._fresh, []
            if not fresh:
                continue
            try:
                targets = await self._store.load_targets(list({user.key for user, _, _, _ in fresh}))
                claimed = [
                    (
                        Claimed(
                            row.id, 1, event.slot, user.key, user.shown_unread(), event.id, seq,
                            event.type, event.priority, event.content, event.expires_ms, [],
                            channel=row.channel, chain=row.chain, step=row.step, since_ms=event.created_ms,
                        ),
                        targets[user.key],
                    )
                    for user, event, seq, row in fresh
                ]  # fmt: skip
                lease_end_ms = self._clock.now_ms() + round(self._settings.shard.delivery_lease_s * 1000)
                await self._dispatch(claimed, lease_end_ms)
            except CarillonError as exc:
                log.info("%d pushes wait for their lease to end: %s", len(fresh), exc)
            except Exception:
                log.exception("dispatching %d pushes failed", len(fresh))

    async def _dispatch(self, claimed: Sequence[tuple[Claimed, list[PushTarget]]], lease_end_ms: int) -> None:
        now_ms = self._clock.now_ms()
        jobs: list[PushJob] = []
        settled: list[SettleRow] = []
        for row, targets in claimed:
            withdraw = row.channel == WITHDRAW
            others: Sequence[PushTarget] = ()  # that the tenant's rule for the type leaves out
            stopped = self._stopped.get(row.notification) if self._stopped and not withdraw else None
            if row.gate == WITHDRAWN or stopped is not None:
                # Dealt with while it was claimed, and nobody tried it.
                reason = row.ended if stopped is None else stopped[0]
                ended = SettleRow(
                    row.delivery, row.attempt, "cancelled", now_ms, reason, onward=False, next=True
                )
                settled.append(ended)
                continue
            if row.expires_ms is not None and row.expires_ms <= now_ms and not withdraw:
                ended = SettleRow(
                    row.delivery, row.attempt, "dead", now_ms, "expired", onward=False, next=True
                )
                settled.append(ended)
                continue
            if row.gate in (HELD, SEEN) and row.attempt == 1:
                verdict = self._at_due(row, now_ms)
                if verdict == "drop":
                    settled.append(
                        SettleRow(row.delivery, row.attempt, "cancelled", now_ms, "active", onward=False)
                    )
                    continue
                if verdict == "hold":
                    self._returns.add([ReleaseRow(row.delivery, row.attempt, row.hold_until_ms, "active")])
                    continue
            if withdraw or row.channel == REPLACE:
                mine = [t for t in targets if t.device in row.reached]
            else:
                reaches = EXTERNAL[row.channel].providers
                mine = [t for t in targets if t.provider in reaches]
                policy = self._policies.of(row.key.tenant).of(row.type)
                if policy.platforms and mine:
                    mine, others = for_platforms(mine, policy.gets)
            left = [t for t in mine if t.device not in row.sent_to and t.device not in row.shown_on]
            if not left:
                if row.sent_to:
                    state, reason = "sent", None
                elif mine:
                    state, reason = "cancelled", "shown on every device"
                elif row.channel in (WITHDRAW, REPLACE):
                    state, reason = "cancelled", "no device got it"
                else:
                    state, reason = without_target(row.channel, row.step, row.chain)
                    if others:
                        reason = f"{reason}; {left_out_told(others)}"
                settled.append(SettleRow(row.delivery, row.attempt, state, now_ms, reason, onward=not mine))
                continue
            if self._given_up(row, now_ms):
                # Claimed again and again without a verdict (the provider is away, pools are full): while it
                # may come back rows wait without using up tries, but not for ever.
                reason = f"no outcome within {self._settings.push.give_up_after_s:.0f} s"
                state = "sent" if row.sent_to else "dead"  # the others' tries tell what became of them
                settled.append(SettleRow(row.delivery, row.attempt, state, now_ms, reason))
                continue
            by_provider: dict[str, list[PushTarget]] = {}
            for target in left:
                by_provider.setdefault(target.provider, []).append(target)
            self._flights[row.delivery] = _Flight(
                row.attempt,
                None if withdraw else row.expires_ms,
                set(by_provider),
                lease_end_ms,
                row.base_attempt,
                bool(row.sent_to),
                left_out_told(others) if others else None,
            )
            members = decode_content(row.content)
            user = self._users.peek(row.key)
            for provider, some in by_provider.items():
                job = job_of(row, members, provider, some)
                job.sound, badge, job.vibration = self._again.presented(row)
                if not badge:
                    job.badge = -1
                elif user is not None and user.expired:
                    job.badge = user.shown_unread()
                if row.channel == REPLACE:
                    job.sound, job.vibration = "", False
                jobs.append(job)
        if settled:
            await self._settle([], settled, [], [], now_ms)
        for at in range(0, len(jobs), 200):
            if not self._send_jobs(Push(jobs[at : at + 200])):
                log.warning("no router link: %d pushes go back to the outbox", len(jobs) - at)
                for job in jobs[at:]:
                    self.left(PushLeft(job.provider, "no router", [job.delivery], [job.attempt]))
                break
        if len(self._flights) > 10_000:
            self._flights = {d: f for d, f in self._flights.items() if f.until_ms > now_ms}

    def _given_up(self, row: Claimed, now_ms: int) -> bool:
        """There was no verdict for too long. Never before the first try: it may be planned for long after the
        event, and its time counts from that try."""
        since_ms = max(row.since_ms, row.hold_until_ms) if row.gate == DEFERRED else row.since_ms
        patience_ms = round(self._settings.push.give_up_after_s * 1000)
        if now_ms - since_ms <= patience_ms:
            return False
        first_ms = self._late.get(row.delivery)
        if (
            first_ms is None
            and row.attempt == row.base_attempt + 1
            and not (row.reason or "").startswith(WAITS)
        ):
            first_ms = self._late[row.delivery] = now_ms
            if len(self._late) > MAX_LATE:
                del self._late[next(iter(self._late))]
        return first_ms is None or now_ms - first_ms > patience_ms

    def _at_due(self, row: Claimed, now_ms: int) -> str:
        """What waited for its user to look away is due. The session decides before (`Session.tick`); here it
        is about rows of an earlier process. A user who is not known to be active gets the push."""
        user = self._users.get(row.key)
        active = user is not None and user.session is not None and user.session.at_hand()
        holdable = row.hold_until_ms > now_ms
        return at_due(row.gate, active=active, acknowledged=row.acknowledged, holdable=holdable)

    # -- outcomes ---------------------------------------------------------------------------------------

    async def _record_for_ever(self) -> None:
        while True:
            await self._outcome_wake.wait()
            self._outcome_wake.clear()
            batch, self._outcomes = self._outcomes[:1000], self._outcomes[1000:]
            if self._outcomes:
                self._outcome_wake.set()
            if not batch and not self._half_tried:
                continue
            try:
                await self._record([message for _, _, message in batch])
            except CarillonError as exc:
                if isinstance(exc, FencedError):
                    self._fenced()
                for link, request, _ in batch:
                    link.fail_nowait(request, exc)
            except Exception as exc:
                log.exception("recording %d outcomes failed", len(batch))
                for link, request, _ in batch:
                    link.fail_nowait(request, StoreUnavailableError(f"{type(exc).__name__}"))
            else:
                for link, request, _ in batch:
                    link.reply_nowait(request, Done())

    async def _record(self, messages: Sequence[PushOutcome]) -> None:
        now_ms = self._clock.now_ms()
        attempts: list[AttemptRow] = []
        settled: list[SettleRow] = []
        gone: list[tuple[UserKey, str, str]] = []
        disabled: list[tuple[UserKey, str, str]] = []
        finished: list[tuple[int, _Flight]] = self._half_tried
        self._half_tried = []
        lost: dict[UserKey, list[tuple[str, str]]] = {}
        unknown = [
            m.delivery
            for m in messages
            if m.delivery not in self._flights and any(r.outcome != "sent" for r in m.results)
        ]
        before = await self._store.tries_before(unknown) if unknown else {}
        for message in messages:
            held_back = [r for r in message.results if r.outcome == LEFT]
            tried = message.results
            if held_back:  # one app of several: the others were tried
                tried = [r for r in message.results if r.outcome != LEFT]
            for r in tried:
                attempts.append(
                    AttemptRow(
                        message.delivery, message.attempt, r.device, message.provider, r.outcome,
                        r.provider_id, r.status, r.error, r.started_ms or now_ms, r.duration_ms,
                    )
                )  # fmt: skip
                if r.outcome in ("invalid_target", "disabled_target"):
                    key = UserKey(message.tenant, message.user)
                    lost.setdefault(key, []).append((r.device, r.outcome))
            flight = self._flights.get(message.delivery)
            if flight is None or flight.attempt != message.attempt:
                # Sent by an earlier process of this shard: what the message says is all there is.
                base, expires_ms, sent = before.get(message.delivery, (0, None, False))
                flight = _Flight(message.attempt, expires_ms, {message.provider}, now_ms, base, sent)
            flight.open.discard(message.provider)
            flight.results += tried
            if held_back:
                (due_ms,) = self._returns.due_ms(message.provider, 1)
                asked_ms = now_ms + round(1000 * held_back[0].retry_after_s)
                reason = f"{WAITS} {message.provider} {held_back[0].error}"
                flight.left = (max(due_ms, asked_ms, flight.left[0] if flight.left else 0), reason)
            if any(r.outcome not in RETRYABLE for r in tried):
                self._returns.took(message.provider)
            if not flight.open:
                finished.append((message.delivery, flight))
        for delivery, flight in finished:
            verdict = settle(
                flight.results,
                flight.attempt - flight.base,
                max_attempts=self._settings.push.max_attempts,
                base_s=self._settings.push.backoff_s,
                now_ms=now_ms,
                expires_ms=flight.expires_ms,
                jitter=random.random,
                left=flight.left,
                sent_before=flight.sent_before,
            )
            reason = flight.left_out if verdict.state == "sent" else verdict.reason
            settled.append(
                SettleRow(delivery, flight.attempt, verdict.state, verdict.due_ms, reason, verdict.onward)
            )
            if verdict.state in ("failed", "unknown"):
                heapq.heappush(self._timers, verdict.due_ms)
                self._wake.set()
        present: dict[UserKey, list[PushTarget]] = {}
        if lost:
            present = await self._store.load_targets(list(lost))
            for key, devices in lost.items():
                tokens = {t.device: t.token for t in present[key]}
                for device, outcome in devices:
                    if device in tokens:
                        entry = (key, device, tokens[device])
                        (gone if outcome == "invalid_target" else disabled).append(entry)
        await self._settle(attempts, settled, gone, disabled, now_ms)
        for delivery, flight in finished:
            if self._flights.get(delivery) is flight:
                del self._flights[delivery]
        for key in {key for key, _, _ in gone + disabled}:
            user = self._users.get(key)
            if user is not None:
                taken = {device for other, device, _ in gone + disabled if other == key}
                user.take_targets(t for t in present[key] if t.device not in taken)

    async def _settle(
        self,
        attempts: Sequence[AttemptRow],
        settled: Sequence[SettleRow],
        gone: Sequence[tuple[UserKey, str, str]],
        disabled: Sequence[tuple[UserKey, str, str]],
        now_ms: int,
    ) -> None:
        """Write outcomes; what falls back to another channel is claimed at once.

        One at a time: two channels of one step that end in two transactions at once would each find the
        other still at work, and neither would fall back.
        """
        async with self._settle_lock:
            fell = await self._store.record_outcomes(self._term(), attempts, settled, gone, disabled, now_ms)
        if fell:
            self._stats.count("pushes_fell_back", fell)
            heapq.heappush(self._timers, now_ms)
            self._wake.set()


def job_of(row: Claimed, members: dict[str, Any], provider: str, targets: list[PushTarget]) -> PushJob:
    """The push of one claimed row at one provider; if it speaks for several, it says for how many."""
    title = text_of(members, row.channel, provider, "title") or ""
    told = title if row.merged == 1 else f"{row.merged} new notifications"
    body = text_of(members, row.channel, provider, "body") if row.merged == 1 else title
    link = text_of(members, row.channel, provider, "link")
    collapse_key = members.get("collapseKey") or uuid_text(row.notification)
    if row.digest is not None:
        collapse_key = uuid_text(row.notification)  # its own, whatever its items have
    if row.words is not None:
        told, body, own_link = row.words
        link = own_link if own_link is not None or row.digest is not None else link
    return PushJob(
        delivery=row.delivery,
        attempt=row.attempt,
        tenant=row.key.tenant,
        user=row.key.user,
        slot=row.slot,
        notification=row.notification,
        seq=row.seq,
        type=row.type,
        title=told,
        body=body,
        link=link,
        collapse_key=collapse_key,
        priority=row.priority,
        badge=max(0, row.unread),
        expires_ms=None if row.channel == WITHDRAW else row.expires_ms,
        targets=targets,
        provider=provider,
        withdraw=row.channel == WITHDRAW,
        digest=row.digest if row.carrier is not None and row.digest is not None else b"",
        count=row.merged,
        notifications=[item.notification for item in row.told],
    )
