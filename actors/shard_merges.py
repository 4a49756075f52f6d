"""Merging in the writer of a shard: `carillon.merging` decides, the store is asked and written to.

What is decided becomes what the batch writes and what sessions and outbox are told.

A batch in which nobody asks for merging passes by at the cost of a look at each event.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from actors.shard_users import User
from actors.shard_windows import KnownWindows
from carillon.digest import OVERFLOW, digest_id, key_of
from carillon.external import IN_APP
from carillon.ids import uuid_text
from carillon.merge_rules import AGGREGATE, MergeRule, speaks_languages
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

Asked = tuple[tuple[Ask, ...], dict[str, Any]]
"""How an event is to be merged, and the members of its content."""


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

    def _asked(self, event: Event) -> Asked | None:
        rule = self.rule(event)
        if rule is None and not may_ask(event):
            return None
        try:
            members = decode_content(event.content)
        except (msgspec.MsgspecError, UnicodeError):
            return None  # nothing the ingress wrote: PostgreSQL will say what is wrong with it
        asks = asks_of(event, rule, self._settings, members)
        return (asks, members) if asks else None

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
        asked = {event.id: found for _, event in batch if (found := self._asked(event)) is not None}
        if not asked:
            return None
        merger = Merger(now_ms, self._settings)
        wanted: dict[tuple[int, str], None] = {}
        speaking: set[int] = set()
        for user, event in batch:
            asks, _ = asked.get(event.id, ((), None))
            wanted.update(dict.fromkeys((user.stream_id, ask.key) for ask in asks))
            if any(speaks_languages(ask.rule) for ask in asks):
                speaking.add(user.stream_id)
        open_ones = list(wanted) if aside else await self._perhaps_open(wanted, now_ms)
        windows = await self._store.find_windows(open_ones, now_ms, aside) if open_ones else []
        targets = {(w.stream_id, w.key): w.row.id for w in windows}
        pairs: dict[tuple[bytes, str], None] = {}
        for user, event in batch:
            asks, members = asked.get(event.id, ((), {}))
            actor = members.get("actorId")
            for ask in asks:
                target = targets.get((user.stream_id, ask.key))
                if ask.how == AGGREGATE and target is not None and isinstance(actor, str):
                    pairs[target, actor] = None
        merger.know(windows, await self._store.find_actors(list(pairs), aside) if pairs else ())
        locales = await self._store.find_locales(sorted(speaking), aside) if speaking else {}
        return MergingBatch(self, merger, asked, locales, now_ms)

    async def _perhaps_open(
        self, wanted: Iterable[tuple[int, str]], now_ms: int
    ) -> Sequence[tuple[int, str]]:
        """Those of the windows of which Postgres is to be asked."""
        wanted, most = list(wanted), self._settings.known_windows
        self.windows.under(self._term())
        unlearned = self.windows.unlearned(stream for stream, _ in wanted)
        if unlearned:
            found = await self._store.open_windows(unlearned, now_ms, most)
            if len(found) >= most:
                return wanted  # more than can be known: they are asked of one by one
            self.windows.learn(unlearned, found)
        return self.windows.perhaps(wanted)

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
        self.locales = locales
        self._merges = merges
        self._merger = merger
        self._asked = asked
        self._now_ms = now_ms
        self._targets: dict[bytes, Target] = {}  # that change, or are made
        self._users: dict[bytes, User] = {}
        self._pushes: dict[bytes, tuple[User, Event, Plan, int]] = {}
        self._silent: dict[bytes, bool] = {}
        self._told: set[bytes] = set()  # targets that have a push of this batch

    def __contains__(self, event: Event) -> bool:
        return event.id in self._asked

    def decide(self, user: User, event: Event, *, filed: bool, priority: int) -> Decision:
        """What becomes of an event that asks."""
        asks, members = self._asked[event.id]
        return self._merger.decide(user.stream_id, event, asks, dict(members), filed=filed, priority=priority)

    def take(self, user: User, event: Event, plan: Plan) -> tuple[Decision, bool]:
        """Decide for an event that asks.

        Returns:
            The decision, and whether it disturbs its user: it takes of the limits then.
        """
        priority = event.priority if plan.priority is None else plan.priority
        decision = self.decide(user, event, filed=plan.archived, priority=priority)
        target = decision.target
        notice: str | None = None
        if decision.status == OPENED:
            target.notified_ms = self._now_ms if plan.digest is not None else _told_at(plan, self._now_ms)
            self._targets[target.id] = target
            if plan.push_due_ms is not None:
                self._told.add(target.id)
        elif decision.status == MERGED:
            self._targets[target.id] = target
            self._users[target.id] = user
            notice = self._notify(user, event, plan, decision, urgent=is_urgent(priority))
        self.writes.events.append(
            MergedRow(
                event.id, target.id, user.stream_id, decision.status, decision.ask.how, decision.ask.source,
                decision.actor, notice,
            )
        )  # fmt: skip
        return decision, decision.status == OPENED or notice == LOUD

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
            content = target.content(self.locales.get(target.stream_id))
            if target.row is None:
                contents[target.id] = content
            elif target.changed:
                counts[target.stream_id] = counts.get(target.stream_id, 0) + 1
                row = UpdateRow(
                    target.id, target.stream_id, content, target.priority, target.type, target.category,
                    target.expires_ms, target.top, -counts[target.stream_id],
                )  # fmt: skip
                writes.updates.append(row)
            writes.windows += [
                WindowRow(
                    target.stream_id, key, target.id, ends_ms, target.events, target.count, target.notified_ms
                )
                for key, ends_ms in target.keys.items()
            ]
        self._merges.windows.opened((window.stream_id, window.key) for window in writes.windows)
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
