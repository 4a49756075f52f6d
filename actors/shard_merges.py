"""Merging in the writer of a shard: `carillon.merging` decides, the store is asked and written to.

What is decided becomes what the batch writes and what sessions and outbox are told.

A batch in which nobody asks for merging passes by at the cost of a look at each event.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from actors.shard_users import User
from actors.shard_windows import KnownWindows
from carillon.digest import OVERFLOW, digest_id, key_of
from carillon.external import IN_APP
from carillon.ids import uuid_text
from carillon.merge_begun import Begun, Opening, begun_by_one, number_of, pack, slot_of
from carillon.merge_rules import AGGREGATE, DROP, MergeRule, speaks_languages
from carillon.merging import (
    DUPLICATE,
    LOUD,
    MERGED,
    OPENED,
    TOGETHER,
    Ask,
    Decision,
    Merger,
    Target,
    asks_of,
    is_urgent,
    may_ask,
    notify,
    said_by,
    would,
)
from carillon.messages import Event, Outcome
from carillon.notification import NotificationRow, decode_content
from carillon.plan import Plan
from carillon.policy import TenantPolicy
from carillon.session import Effect
from carillon.settings import MergeSettings
from stores.postgres.merges import MergedRow, MergeWrites, RepushRow, UpdateRow, WindowRow
from stores.postgres.shard_rows import MergedInto, OutboxRow
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """How an event is to be merged.

    Attributes:
        members: of its content, {} of one that asks for `drop` alone: it stays as it is.
        windows: of its asks: stream and key.
        numbers: of these windows.
    """

    asks: tuple[Ask, ...]
    actor: str | None
    members: dict[str, Any]
    windows: Sequence[tuple[int, str]]
    numbers: Sequence[int]


_NOTHING: Final[dict[str, Any]] = {}


class Merges:
    """Merging, as far as it outlives a batch.

    Args:
        policy: gives a tenant's policy.
        term: gives the term under which the shard writes.
    """

    def __init__(
        self,
        store: ShardStore,
        settings: MergeSettings,
        policy: Callable[[str], TenantPolicy],
        term: Callable[[], int],
    ) -> None:
        self._store = store
        self._settings = settings
        self._policy = policy
        self._term = term
        self.windows = KnownWindows(settings.known_windows)

    def asked(self, events: Iterable[Event]) -> bool:
        """Whether some of a batch are perhaps to be merged."""
        return any(may_ask(event) or self._policy(event.tenant).merge is not None for event in events)

    def rule(self, event: Event) -> MergeRule | None:
        """The tenant's rule for the type of an event."""
        rules = self._policy(event.tenant).merge
        return None if rules is None else rules.get(event.type)

    def _asked(self, stream_id: int, event: Event, rule: MergeRule | None) -> Asked | None:
        try:
            said = said_by(event.content)
            asks = asks_of(event, rule, self._settings, said)
            if not asks:
                return None
            members = _NOTHING if asks[-1].how == DROP else decode_content(event.content)
        except (msgspec.MsgspecError, UnicodeError):
            return None  # nothing the ingress wrote: PostgreSQL will say what is wrong with it
        actor = said.actor_id
        if not isinstance(actor, str):
            actor = None
        if len(asks) == 1:
            key = asks[0].key
            return Asked(asks, actor, members, ((stream_id, key),), (number_of(stream_id, key),))
        windows = [(stream_id, ask.key) for ask in asks]
        return Asked(asks, actor, members, windows, [number_of(stream_id, key) for _, key in windows])

    def renotify_ms(self, rule: MergeRule | None) -> int:
        """How often what grows may disturb."""
        if rule is not None and rule.renotify_ms is not None:
            return rule.renotify_ms
        return round(self._settings.renotify_s * 1000)

    async def begin(
        self, batch: Sequence[tuple[User, Event]], now_ms: int, *, aside: bool = False
    ) -> MergingBatch | None:
        """Read what is needed to decide for a batch; None if none of it is to be merged after all.

        Args:
            aside: not asked by the writer.

        Raises:
            StoreUnavailableError: nothing is known.
        """
        asked: dict[bytes, Asked] = {}
        wanted: list[tuple[int, str]] = []
        numbers: list[int] = []
        speaking: set[int] = set()
        tenant: str | None = None
        rules: Mapping[str, MergeRule] | None = None
        for user, event in batch:
            if event.tenant != tenant:
                tenant = event.tenant
                rules = self._policy(tenant).merge
            rule = None if rules is None else rules.get(event.type)
            if rule is None and not may_ask(event):
                continue
            found = self._asked(user.stream_id, event, rule)
            if found is None:
                continue
            asked[event.id] = found
            wanted += found.windows
            numbers += found.numbers
            if speaks_languages(rule):
                speaking.add(user.stream_id)
        if not asked:
            return None
        merger = Merger(now_ms, self._settings)
        open_ones = wanted if aside else await self._perhaps_open(wanted, numbers, now_ms)
        if open_ones:
            await self._know(merger, batch, asked, list(dict.fromkeys(open_ones)), now_ms, aside)
        locales = await self._store.find_locales(sorted(speaking), aside) if speaking else {}
        return MergingBatch(self, merger, asked, locales, now_ms)

    async def _know(
        self,
        merger: Merger,
        batch: Sequence[tuple[User, Event]],
        asked: Mapping[bytes, Asked],
        wanted: Sequence[tuple[int, str]],
        now_ms: int,
        aside: bool,
    ) -> None:
        """Tell a merger what Postgres has of these windows."""
        windows = await self._store.find_windows(wanted, now_ms, aside)
        targets = {(w.stream_id, w.key): w.row.id for w in windows}
        pairs: dict[tuple[bytes, str], None] = {}
        for user, event in batch if targets else ():
            found = asked.get(event.id)
            if found is None or found.actor is None:
                continue
            for ask in found.asks:
                target = targets.get((user.stream_id, ask.key))
                if ask.how == AGGREGATE and target is not None:
                    pairs[target, found.actor] = None
        merger.know(windows, await self._store.find_actors(list(pairs), aside) if pairs else ())

    async def _perhaps_open(
        self, wanted: list[tuple[int, str]], numbers: list[int], now_ms: int
    ) -> list[tuple[int, str]]:
        """Those of the windows of which Postgres is to be asked."""
        known, most = self.windows, self._settings.learned_windows
        known.under(self._term(), now_ms)
        unlearned = known.unlearned([stream for stream, _ in wanted])
        if unlearned:
            known.learn(unlearned, await self._store.open_windows(unlearned, now_ms, most), most)
        return known.perhaps(wanted, numbers)

    async def preview(self, user: User, event: Event, filed: bool, now_ms: int) -> dict[str, Any] | None:
        """What would become of an event now, as `dryRun` tells it; None if it is not to be merged."""
        merging = await self.begin([(user, event)], now_ms, aside=True)
        if merging is None:
            return None
        decision = merging.decide(user, event, filed=filed, priority=event.priority)
        target, ask = decision.target, decision.ask
        told: dict[str, Any] = {
            "status": decision.status,
            "how": ask.how,
            "source": ask.source,
            "windowS": ask.window_ms / 1000,
            "aggregationKey": ask.name,
            "words": would(decision),
        }
        if decision.status != OPENED:
            told["into"] = {"id": uuid_text(target.id), "seq": target.seq}
            if decision.status == MERGED:
                content = decode_content(target.content(merging.locales.get(user.stream_id)))
                told["count"], told["title"] = target.count, content["title"]
        return told

    async def known(self, ids: Sequence[bytes]) -> dict[bytes, MergedInto]:
        """What became of those of the events that were merged before."""
        return await self._store.find_merged(ids) if ids else {}


class MergingBatch:
    """Merging in one batch of the writer.

    Attributes:
        writes: for the commit; complete after `finish`.
        begun: what notifications of this batch say of the windows that they begin, by id; as `writes`.
        locales: languages of users by stream, where texts depend on them.
    """

    def __init__(
        self,
        merges: Merges,
        merger: Merger,
        asked: dict[bytes, Asked],
        locales: dict[int, str],
        now_ms: int,
    ) -> None:
        self.writes = MergeWrites()
        self.begun: dict[bytes, Begun] = {}
        self.locales = locales
        self._merges = merges
        self._merger = merger
        self._asked = asked
        self._now_ms = now_ms
        self._begun: list[tuple[int, str, int]] = []
        self._dropping: dict[int, list[int]] = {}  # numbers of windows of `drop` alone, by their length
        self._opened: dict[bytes, Decision] = {}
        self._targets: dict[bytes, Target] = {}  # that change, or are made
        self._users: dict[bytes, User] = {}
        self._pushes: dict[bytes, tuple[User, Event, Plan, int]] = {}
        self._silent: dict[bytes, bool] = {}
        self._told: set[bytes] = set()  # targets that have a push of this batch

    def asked(self, event: Event) -> Asked | None:
        """How an event is to be merged; None: it is not."""
        return self._asked.get(event.id)

    def alone(self, asked: Asked) -> bool:
        """Whether an event that asks is a notification of its own for sure."""
        return self._merger.alone(asked.windows)

    def decide(self, user: User, event: Event, *, filed: bool, priority: int) -> Decision:
        """What becomes of an event that asks."""
        asks, _, members, *_ = self._asked[event.id]
        return self._merger.decide(user.stream_id, event, asks, dict(members), filed=filed, priority=priority)

    def begin(self, user: User, event: Event, asked: Asked, plan: Plan) -> None:
        """Decide for an event that asks and is `alone`: it begins its windows."""
        ask = asked.asks[0]
        if ask.how != DROP or len(asked.asks) > 1:
            self.take(user, event, plan)
            return
        now_ms, number, window_ms = self._now_ms, asked.numbers[0], ask.window_ms
        self._merger.begin_drop(asked.windows[0], event)
        begun = self._dropping.get(window_ms)
        if begun is None:
            begun = self._dropping[window_ms] = []
        begun.append(number)
        notified_ms = now_ms if plan.push_due_ms is None else self._notified_ms(plan)
        self.begun[event.id] = begun_by_one(
            ask.source, now_ms, notified_ms, asked.actor, ask.key, number, window_ms
        )

    def _notified_ms(self, plan: Plan) -> int:
        """When the user is disturbed by a notification of its own."""
        return self._now_ms if plan.digest is not None else _told_at(plan, self._now_ms)

    def take(self, user: User, event: Event, plan: Plan) -> tuple[Decision, bool]:
        """Decide for an event that asks.

        Returns:
            The decision, and whether it disturbs its user: it takes of the limits then.
        """
        priority = event.priority if plan.priority is None else plan.priority
        decision = self.decide(user, event, filed=plan.archived, priority=priority)
        target = decision.target
        if decision.status == OPENED:
            target.notified_ms = self._notified_ms(plan)
            self._targets[target.id] = target
            self._opened[target.id] = decision
            if plan.push_due_ms is not None:
                self._told.add(target.id)
            return decision, True
        notice: str | None = None
        if decision.status == MERGED:
            self._targets[target.id] = target
            self._users[target.id] = user
            notice = self._notify(user, event, plan, decision, urgent=is_urgent(priority))
        self.writes.events.append(
            MergedRow(
                event.id, target.id, user.stream_id, decision.status, decision.ask.how, decision.ask.source,
                decision.actor, notice,
            )
        )  # fmt: skip
        return decision, notice == LOUD

    def _notify(self, user: User, event: Event, plan: Plan, decision: Decision, *, urgent: bool) -> str:
        target = decision.target
        if target.id in self._told and not urgent:
            return TOGETHER
        due_ms = None if plan.push_due_ms is None else _told_at(plan, self._now_ms)
        renotify_ms = self._merges.renotify_ms(decision.ask.rule)
        digest = plan.digest is not None
        notice, due_ms = notify(target, self._now_ms, due_ms, renotify_ms, urgent=urgent, digest=digest)
        if due_ms is not None:
            self._told.add(target.id)
            known = self._pushes.get(target.id)
            if known is None or due_ms < known[3]:
                self._pushes[target.id] = user, event, plan, due_ms
                if plan.digest == OVERFLOW and user.spent is not None:
                    user.spent.digest_ms = due_ms  # what exceeds the limit next joins it
        if notice == LOUD:
            self._silent[target.id] = self._silent.get(target.id, True) and plan.silent
        return notice

    async def finish(self, draw: Callable[[], Any]) -> dict[bytes, str]:
        """Complete `writes`; returns the content of notifications that this batch makes, by id.

        Args:
            draw: gives the id of the next outbox row.
        """
        contents: dict[bytes, str] = {}
        counts: dict[int, int] = {}
        writes = self.writes
        for target in self._targets.values():
            if target.row is None:
                if self._opened[target.id].ask.how != DROP:
                    contents[target.id] = target.content(self.locales.get(target.stream_id))
                if self._begins(target):
                    continue
            elif target.changed:
                counts[target.stream_id] = counts.get(target.stream_id, 0) + 1
                row = UpdateRow(
                    target.id, target.stream_id, target.content(self.locales.get(target.stream_id)),
                    target.priority, target.type, target.category, target.expires_ms, target.top,
                    -counts[target.stream_id],
                )  # fmt: skip
                writes.updates.append(row)
                if target.opening is not None:
                    writes.events.append(_opened_row(target, target.opening, target.opening.at_ms))
            for key, ends_ms in target.keys.items():
                self._begun.append((target.stream_id, key, ends_ms))
                writes.windows.append(
                    WindowRow(
                        target.stream_id, key, target.id, ends_ms, target.events, target.count,
                        target.notified_ms,
                    )
                )  # fmt: skip
        writes.left = self._merger.left
        dropping = {self._now_ms + window_ms: numbers for window_ms, numbers in self._dropping.items()}
        self._merges.windows.opened(self._begun, dropping)
        for row in writes.updates:
            row.back += counts[row.stream_id]
        for raw, (user, event, plan, due_ms) in self._pushes.items():
            digest = None
            if plan.digest is not None:
                digest = digest_id(key_of(user.key, event.category, plan.digest, due_ms))
            for channel in plan.channels:
                if channel != IN_APP:
                    writes.pushes.append(
                        RepushRow(
                            await draw(), raw, user.stream_id, event.slot, due_ms, plan.gate,
                            plan.hold_until_ms, plan.reason, channel, ",".join(plan.chain), plan.step,
                            digest,
                        )
                    )  # fmt: skip
        return contents

    def _begins(self, target: Target) -> bool:
        """Let a notification of this batch say what windows it begins; False: these need rows."""
        _, _, ask, actor = self._opened[target.id]
        opening = Opening(ask.source, self._now_ms, target.notified_ms, actor, target.began)
        if target.events > 1 or target.rows:
            self.writes.events.append(_opened_row(target, opening))
            return False
        slots: list[int | None] = [None, None]
        for number, (key, ends_ms) in enumerate(target.began):
            if key in target.keys:
                self._begun.append((target.stream_id, key, ends_ms))
                slots[number] = slot_of(key, ends_ms)
        self.begun[target.id] = Begun(pack(opening), *slots)
        return True

    def outcome(
        self,
        decision: Decision,
        plan: Plan,
        seqs: dict[bytes, int],
        heads: dict[int, tuple[int, int, int]],
    ) -> Outcome | None:
        """The answer to an event that is no notification of its own; None: its stream was erased."""
        target = decision.target
        seq = target.seq or seqs.get(target.id)
        if seq is None or (decision.status == MERGED and target.stream_id not in heads):
            return None
        channels = [] if decision.status == DUPLICATE else list(plan.channels)
        return Outcome(target.id, seq, decision.status, channels, reason=decision.ask.how)

    def committed(
        self,
        heads: dict[int, tuple[int, int, int]],
        run: Callable[[User, list[Effect]], None],
        planned: Callable[[User, Event, int, OutboxRow, int], None],
        expires: Callable[[User, int], None],
    ) -> None:
        """After the commit and the new notifications: tell sessions and outbox what changed."""
        revs: dict[bytes, int] = {}
        for row in self.writes.updates:
            target, user = self._targets[row.notification], self._users[row.notification]
            head = heads.get(row.stream_id)
            if head is None:
                continue
            user.rev, user.unread = head[1] - row.back, head[2]
            revs[row.notification] = user.rev
            if target.expires_ms is not None and not target.filed:
                expires(user, target.expires_ms)
            session = user.session
            if session is None:
                continue
            if target.filed:
                run(user, session.state_changed(user.rev, user.shown_unread(), ()))
                continue
            shown = _row_after(target, user.rev, row.content, self._now_ms)
            silent = self._silent.get(target.id, True)
            run(user, session.updated(shown, user.shown_unread(), silent=silent))
        for push in self.writes.pushes:
            user, event, _, _ = self._pushes[push.notification]
            target = self._targets[push.notification]
            if heads.get(push.stream_id) is not None and target.seq:
                row = OutboxRow(
                    push.id, push.notification, push.stream_id, push.slot, False, push.due_ms, push.gate,
                    push.hold_until_ms, push.reason, push.channel, push.chain, push.step,
                )  # fmt: skip
                told = msgspec.structs.replace(event, id=target.id)
                planned(user, told, target.seq, row, revs.get(push.notification, 0))


def _opened_row(target: Target, opening: Opening, at_ms: int | None = None) -> MergedRow:
    """The row of an event that became a notification."""
    return MergedRow(
        target.id, target.id, target.stream_id, OPENED, opening.how, opening.source, opening.actor, None,
        at_ms,
    )  # fmt: skip


def _row_after(target: Target, rev: int, content: str, now_ms: int) -> NotificationRow:
    assert target.row is not None
    return msgspec.structs.replace(
        target.row,
        rev=rev,
        position=rev if target.top else target.row.position,
        content=content,
        updated_ms=now_ms,
        expires_ms=target.expires_ms,
    )


def _told_at(plan: Plan, now_ms: int) -> int:
    """When a plan disturbs its user: one born claimed leaves now, whatever its lease says."""
    if plan.push_due_ms is None or plan.push_now:
        return now_ms
    return max(now_ms, plan.push_due_ms)
