"""Digests of a shard's users: what waited together is told together, once.

A digest is due with the outbox rows that wait in it (carillon/digest.py). Before it is told the batch that
the writer has in flight is awaited: what was planned a moment before the digest's time is in it, what is
planned later belongs to the next one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

from actors.shard_policies import NO_RULES, Policies
from actors.shard_users import User, read_preferences
from actors.templates import Templates
from carillon.budget import Spent
from carillon.clock import Clock
from carillon.decision import Verdict, weigh
from carillon.digest import (
    FLUSHED,
    FLUSHED_BY_USER,
    Item,
    Told,
    digest_id,
    key_of,
    latest_expiry,
    params,
    summary,
    tell,
)
from carillon.errors import CarillonError, FencedError, NotFoundError, StoreUnavailableError
from carillon.ids import UserKey, uuid_text
from carillon.messages import DigestChange, Done
from carillon.metrics import Stats
from carillon.notification import decode_content
from carillon.problems import Problem
from carillon.settings import Settings
from carillon.switches import Preferences
from stores.postgres.digests import START, Place, WaitingItem
from stores.postgres.shard_rows import Claimed
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)

PAGE = 1000
"""Items of a tenant that are looked at together when its rules have changed."""
Which = tuple[int, bytes]
"""A digest: stream and id."""
K = TypeVar("K")
R = TypeVar("R")
FLUSH = "flush"
REMOVE = "remove"


class Digests:
    """Tells digests, and changes open ones.

    Args:
        term: the shard's present term.
        settled: awaits the batch that is being written.
        templates: gives the tenants' templates.
        due: called with the moment (ms) at which rows are due now that were not.
        slots: gives the slots owned now.
        fenced: called when the term turns out to be over.
    """

    def __init__(
        self,
        store: ShardStore,
        policies: Policies,
        clock: Clock,
        stats: Stats,
        settings: Settings,
        *,
        term: Callable[[], int],
        settled: Callable[[], Awaitable[None]],
        templates: Callable[[], Templates],
        due: Callable[[int], None],
        slots: Callable[[], Sequence[int]],
        fenced: Callable[[], None],
    ) -> None:
        self._store = store
        self._policies = policies
        self._clock = clock
        self._stats = stats
        self._settings = settings
        self._term = term
        self._settled = settled
        self._templates = templates
        self._due = due
        self._slots = slots
        self._fenced = fenced
        self._apart_until = float("-inf")
        self._changed: dict[str, Place] = {}  # tenants with other rules: how far their digests moved
        self._wake = asyncio.Event()

    # -- when they are due ------------------------------------------------------------------------------

    async def complete(self, claimed: list[Claimed], now_ms: int) -> set[Which]:
        """Make claimed rows whole: the rest of digests that are due, and what was told already.

        Rows whose digest cannot be read now are taken out: their lease says when they are tried again.

        Returns:
            Digests of which more is due than a push looks at one by one.
        """
        waiting = {(row.stream_id, row.digest or b""): row for row in claimed if row.collected()}
        beyond: set[Which] = set()
        lost: set[Which] = set()
        if waiting:
            await self._settled()
            lease_end_ms = now_ms + round(self._settings.shard.delivery_lease_s * 1000)
            most = self._settings.push.digest_items
            more: list[Claimed] = []
            began = self._clock.monotonic()
            # After a failure each alone for a while. Not at once: an answer may have been lost, and what was
            # claimed then comes back together when the claim lapses.
            for some in [[one] for one in waiting] if began < self._apart_until else [list(waiting)]:
                try:
                    if self._clock.monotonic() - began > self._settings.shard.delivery_lease_s / 2:
                        raise StoreUnavailableError("no time is left")
                    more += await self._store.digests.gather(self._term(), some, now_ms, lease_end_ms, most)
                except StoreUnavailableError as exc:
                    log.warning("%d digests wait until their claim lapses: %s", len(some), exc)
                    lost.update(some)
                    self._apart_until = began + 3 * self._settings.shard.delivery_lease_s
            counts: Counter[Which] = Counter()
            for row in more:
                which = row.stream_id, row.digest or b""
                counts[which] += 1
                row.preferences = waiting[which].preferences  # the same user's
            beyond = {which for which, count in counts.items() if count >= most}
            claimed += more
        unseen = await self._show_apart([row for row in claimed if row.carrier is not None])
        if lost or unseen:
            claimed[:] = [
                row
                for row in claimed
                if row.delivery not in unseen
                and not (row.collected() and (row.stream_id, row.digest or b"") in lost)
            ]
        return beyond

    async def _show_apart(self, rows: Sequence[Claimed]) -> set[int]:
        """See `show`; returns the rows for which there was nothing to be had now."""
        of = {row.delivery: row for row in rows}

        async def work(deliveries: list[int]) -> list[None]:
            await self.show([of[delivery] for delivery in deliveries])
            return []

        return set((await self._apart(list(of), work))[1])

    async def _apart(
        self, some: list[K], work: Callable[[list[K]], Awaitable[list[R]]]
    ) -> tuple[list[R], list[K]]:
        """Work on all at once; if the store fails, on each alone, so that one does not hold up others.

        Returns:
            What came of it; those at which the store failed, or for which no time was left.
        """
        if not some:
            return [], []
        try:
            return await work(some), []
        except StoreUnavailableError as exc:
            log.warning("%d digests wait: %s", len(some), exc)
            if len(some) == 1:
                return [], some
        done: list[R] = []
        failed: list[K] = []
        end = self._clock.monotonic() + self._settings.shard.delivery_lease_s / 2
        for one in some:
            if self._clock.monotonic() >= end:
                failed.append(one)
                continue
            try:
                done += await work([one])
            except StoreUnavailableError as exc:
                log.warning("a digest waits until its claim lapses: %s", exc)
                failed.append(one)
        return done, failed

    async def tell(
        self, free: dict[int, tuple[Claimed, Verdict]], now_ms: int, beyond: Collection[Which]
    ) -> list[tuple[Claimed, Verdict]]:
        """Of each digest and channel one push for all that may go; returns what is to be sent.

        Args:
            beyond: digests of which more is due.
        """
        digests: dict[Which, dict[int, tuple[Claimed, Verdict]]] = {}
        for delivery, (row, verdict) in free.items():
            digests.setdefault((row.stream_id, row.digest or b""), {})[delivery] = row, verdict

        async def work(some: list[Which]) -> list[tuple[Claimed, Verdict]]:
            these = {d: one for which in some for d, one in digests[which].items()}
            return await self._tell(these, now_ms, beyond)

        carriers, _ = await self._apart(list(digests), work)
        return carriers

    async def _tell(
        self, free: dict[int, tuple[Claimed, Verdict]], now_ms: int, beyond: Collection[Which]
    ) -> list[tuple[Claimed, Verdict]]:
        items = [Item(d, row.seq, (row.digest, row.channel)) for d, (row, _) in free.items()]

        def decide(ours: frozenset[int], dealt_with: frozenset[int]) -> list[Told]:
            return tell((item for item in items if item.delivery in ours), dealt_with)

        rows = [(d, row.attempt) for d, (row, _) in free.items()]
        told = await self._store.digests.tell(self._term(), rows, decide, now_ms, beyond)
        carriers: list[tuple[Claimed, Verdict]] = []
        for one in told:
            row, verdict = free[one.carrier]
            row.carrier, row.merged = one.carrier, len(one.items) + one.more
            carriers.append((row, verdict))
            self._stats.observe_ms("digest_late_ms", max(0, now_ms - row.hold_until_ms))
        self._stats.count("digests_told", len(told))
        unseen = await self._show_apart([row for row, _ in carriers])
        return [one for one in carriers if one[0].delivery not in unseen]

    async def show(self, rows: Sequence[Claimed]) -> None:
        """Give rows that tell digests, or what was held together, what their push shows."""
        if not rows:
            return
        push, now_ms = self._settings.push, self._clock.now_ms()
        most = max(push.digest_ids, push.digest_titles)
        carriers = [row.carrier or 0 for row in rows]
        found = await self._store.digests.told(carriers, most, push.digest_titles)
        several: dict[tuple[str, bool], list[Claimed]] = {}
        for row in rows:
            row.told = found.get(row.carrier or 0, ())
            if not row.told:
                continue
            row.content = row.told[0].content
            whole = row.merged <= len(row.told)
            if row.expires_ms is None or row.expires_ms > now_ms:  # else the next one takes over
                row.expires_ms = latest_expiry(item.expires_ms for item in row.told) if whole else None
            # A device is spared that has shown all of it, unless it was asked for.
            shown = [set(item.shown_on) for item in row.told] if whole else []
            row.shown_on = [] if row.reason in (FLUSHED, FLUSHED_BY_USER) else sorted(common(shown))
            if row.merged > 1:
                several.setdefault((row.key.tenant, row.digest is not None), []).append(row)
        for (tenant, digests), some in several.items():
            await self._words(tenant, some, digests=digests)

    async def _words(self, tenant: str, rows: Sequence[Claimed], *, digests: bool) -> None:
        """The words of several items: the tenant's, else ours.

        Args:
            digests: they waited in digests; False: they were held, and are told together.
        """
        rules = self._policies.of(tenant).rules or NO_RULES
        template = rules.digest_template if digests else rules.held_template
        documents: list[dict[str, Any]] = []
        for row in rows:
            newest = [decode_content(item.content) for item in row.told if item.content]
            titles = [str(members["title"]) for members in newest]
            if digests:
                own = summary(row.merged, titles, None)
                row.words = own.title, own.body, None
            types = [item.type for item in row.told]
            documents.append(
                {
                    "userId": row.key.user,
                    "type": "digest" if digests else "held",
                    "template": template,
                    "params": params(row.merged, row.category, titles, types),
                }
            )
        if template is None:
            return
        deadline = self._clock.monotonic() + self._settings.push.digest_render_s
        try:
            made = await self._templates().prepare(documents, tenant, deadline, offered=True)
        except CarillonError as exc:
            log.warning("%d pushes for several go out in our own words: %s", len(rows), exc)
            return
        for index, row in enumerate(rows):
            prepared = made.get(index)
            if prepared is None or isinstance(prepared, Problem):
                detail = "it is no template" if prepared is None else prepared.detail
                log.warning("a push of %s for several goes out in our own words: %s", tenant, detail)
                continue
            rendered = prepared[row.key.user]
            members = rendered.members | rendered.channels.get(row.channel, {})
            row.words = members["title"], members.get("body"), members.get("link")

    # -- what is changed about open ones ----------------------------------------------------------------

    async def change(self, user: User, message: DigestChange) -> Done:
        """Flush a digest, or take one item out of it.

        Raises:
            NotFoundError: there is no such open digest, or item in it.
        """
        now_ms = self._clock.now_ms()
        if message.op == FLUSH:
            reason = FLUSHED_BY_USER if message.by_user else FLUSHED
            count, known = await self._store.digests.flush(
                self._term(), user.stream_id, message.digest, reason, now_ms
            )
            what = "digestId", "an open digest of this user", uuid_text(message.digest)
            self._due(now_ms)
        else:
            count, known = await self._store.digests.remove(
                self._term(), user.stream_id, message.digest, message.notification, now_ms
            )
            what = "notificationId", "an item of this open digest", uuid_text(message.notification)
        if not known:
            raise NotFoundError(f"expected {what[0]} to be {what[1]}", *what)
        return Done(count)

    async def rearrange(self, user: User) -> int:
        """The user's preferences have changed: what waits does so as they want it now, and what they want at
        once is due. Returns how many rows that concerned."""
        await self._settled()  # what was planned by the old ones is in the store
        mine = user.local if user.preferences is None else user.preferences
        return await self._move(
            (item, user.key, mine) for item in await self._store.digests.waiting(user.stream_id)
        )

    def follow(self, tenant: str) -> None:
        """The rules of a tenant have changed: what waits by them will do so as they say now."""
        self._changed[tenant] = START
        self._wake.set()

    async def follow_for_ever(self) -> None:
        """Move what waits in digests of tenants whose rules have changed, a page of each at a time.

        Beside the sweep, which neither waits for it nor fails with it.
        """
        while True:
            await self._wake.wait()
            failed = not self._slots()
            for tenant in [] if failed else list(self._changed):
                after = self._changed.pop(tenant)
                try:
                    reached = await self._rearrange_tenant(tenant, self._slots(), after)
                except Exception as exc:
                    failed, reached = True, after
                    if isinstance(exc, FencedError):
                        self._fenced()
                    elif isinstance(exc, CarillonError):
                        log.info("digests of %s follow its rules later: %s", tenant, exc)
                    else:
                        log.exception("moving the digests of %s failed", tenant)
                if reached is not None:
                    self._changed.setdefault(tenant, reached)  # or, changed again, from the beginning
            if not self._changed:
                self._wake.clear()
            elif failed:
                await asyncio.sleep(self._settings.shard.sweep_s)

    async def _rearrange_tenant(self, tenant: str, slots: Sequence[int], after: Place) -> Place | None:
        """See `rearrange`; of a tenant, some at a time. Returns where to go on, if there is more."""
        await self._settled()
        items, reached = await self._store.digests.waiting_of(tenant, slots, after, PAGE)
        documents = {(item.preferences, item.zone) for item in items}
        known = {
            (document, zone): None
            if document is None and zone is None
            else read_preferences(document or "{}", zone)
            for document, zone in documents
        }
        await self._move(
            (item, UserKey(tenant, item.user), known[item.preferences, item.zone]) for item in items
        )
        return reached

    async def _move(self, items: Iterable[tuple[WaitingItem, UserKey, Preferences | None]]) -> int:
        """Let items wait as their users want it now."""
        now_ms = self._clock.now_ms()
        moves: list[tuple[int, bytes, int]] = []
        for item, key, mine in items:
            rules = self._policies.of(key.tenant).rules or NO_RULES
            verdict = weigh(item.type, item.category, item.priority, mine, rules, now_ms)
            if verdict.digest is None or verdict.until_ms is None:
                moves.append((item.delivery, item.digest, now_ms))
                continue
            digest = digest_id(key_of(key, item.category, verdict.digest, verdict.until_ms))
            if (digest, verdict.until_ms) != (item.digest, item.due_ms):
                moves.append((item.delivery, digest, verdict.until_ms))
        if not moves:
            return 0
        moved = await self._store.digests.move(self._term(), moves, now_ms)
        for due_ms in {due_ms for _, _, due_ms in moves}:
            self._due(due_ms)
        return moved


def common(some: Sequence[set[str]]) -> set[str]:
    """What is in each of the sets; nothing if there is none."""
    return set.intersection(*some) if some else set()


def spend(user: User | None, verdict: Verdict, now_ms: int) -> None:
    """One push takes its part of the limits."""
    if user is None or not verdict.spends:
        return
    if user.spent is None:
        user.spent = Spent()
    for name, limit in verdict.spends:
        user.spent.spend(name, limit, now_ms)


def collecting(rows: Iterable[Claimed]) -> bool:
    """Whether any of the rows has to do with a digest, or speaks for others."""
    return any(row.digest is not None or row.carrier is not None for row in rows)
