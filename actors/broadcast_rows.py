"""The notifications of a broadcast for users who are not in memory: decided and made many at a time.

Users with the same push providers and the same preferences get the same plan, so that it is made once for
all of them in a chunk, and what is stored of it is said once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from actors.shard_policies import NO_RULES
from actors.shard_users import read_preferences
from carillon.attention import Attention
from carillon.broadcasts import Counts, NotificationIds, SlotUser, counted
from carillon.decision import judge, pack
from carillon.digest import digest_id, key_of
from carillon.explain import circumstance, providers_receipt
from carillon.external import IN_APP
from carillon.ids import UserKey
from carillon.messages import Event
from carillon.plan import Plan, Reach, plan
from carillon.policy import TenantPolicy
from carillon.settings import ShardSettings
from carillon.switches import Preferences
from stores.postgres.broadcast_append import PushRow, PushShape, Rows, Shape
from stores.postgres.broadcasts import PLAIN, Context, Contexts

KEPT: int = 1000
"""Preferences documents that are kept read."""


class Made(NamedTuple):
    """What users get."""

    users: Sequence[SlotUser]
    rows: Rows
    statuses: list[str]
    """What became of those of each of the rows' shapes."""

    def counts(self, streams: set[int] | None = None) -> dict[int, Counts]:
        """What became of users, by slot.

        Args:
            streams: count these users only; None: all.
        """
        by_slot: dict[int, list[str]] = {}
        for one, of, stream in zip(self.users, self.rows.of, self.rows.streams, strict=True):
            if streams is None or stream in streams:
                by_slot.setdefault(one.slot, []).append(self.statuses[of])
        return {slot: counted(statuses) for slot, statuses in by_slot.items()}


class _Decided(NamedTuple):
    """The plan of users, as they share it."""

    plan: Plan
    receipt: int
    decision: str | None


class Words(NamedTuple):
    """The event as users get it."""

    event: Event
    """With any id and user: what it says but for those."""
    contents: Mapping[str, str] | None
    """User -> content, where a template made it; None: the event's own for all."""

    def content(self, user: str) -> str:
        """What a user gets to read."""
        return self.event.content if self.contents is None else self.contents[user]


class Decider:
    """Plans for users who are not connected."""

    def __init__(self, settings: ShardSettings) -> None:
        self._lease_ms = round(settings.delivery_lease_s * 1000)
        self._window_ms = round(settings.ack_window_s * 1000)
        self._read: OrderedDict[tuple[str, str | None], Preferences | None] = OrderedDict()

    def preferences(self, text: str | None, zone: str | None) -> Preferences | None:
        """A document of users in a time zone, read once for all who share both."""
        if text is None:
            return None
        key = text, zone
        if key in self._read:
            self._read.move_to_end(key)
            return self._read[key]
        found = self._read[key] = read_preferences(text, zone)
        if len(self._read) > KEPT:
            self._read.popitem(last=False)
        return found

    def make(
        self,
        users: Sequence[SlotUser],
        contexts: Contexts,
        words: Words,
        ids: NotificationIds,
        policy: TenantPolicy,
        now_ms: int,
    ) -> Made:
        """The rows of users, in their order.

        Args:
            contexts: of all users, with their streams.
        """
        rows = Rows(words.event)
        made = Made(users, rows, [])
        plans: dict[Context, _Decided] = {}
        shapes: dict[tuple[Context, str], int] = {}
        streams, others = contexts
        content_of, id_of = words.content, ids.of
        for nth, one in enumerate(users):
            user = one.user
            context = others.get(user, PLAIN)
            content = content_of(user)
            shape = shapes.get((context, content))
            if shape is None:
                decided = plans.get(context)
                if decided is None:
                    decided = plans[context] = self._decide(words.event, context, policy, now_ms)
                shape = shapes[context, content] = len(rows.shapes)
                rows.shapes.append(_shape(words.event, content, decided))
                made.statuses.append(decided.plan.status)
            rows.ids.append(id_of(user))
            rows.streams.append(streams[user])
            rows.of.append(shape)
            if plans[context].plan.push_due_ms is not None:
                self._push(rows, nth, one, plans[context].plan, now_ms)
        return made

    def _push(self, rows: Rows, nth: int, one: SlotUser, found: Plan, now_ms: int) -> None:
        """The outbox rows of a user."""
        assert found.push_due_ms is not None
        digest = None
        if found.digest is not None:
            user = UserKey(rows.event.tenant, one.user)
            digest = digest_id(key_of(user, rows.event.category, found.digest, found.push_due_ms))
        # Never born claimed: the sweep takes what is due, as fast as the pools do.
        due_ms = now_ms if found.push_now else found.push_due_ms
        for channel in found.channels:
            if channel == IN_APP:
                continue
            shape = PushShape(
                due_ms, found.gate, found.hold_until_ms, found.reason, channel, ",".join(found.chain),
                found.step,
            )  # fmt: skip
            place = rows.push_shapes.setdefault(shape, len(rows.push_shapes))
            rows.pushes.append(PushRow(nth, place, digest))

    def _decide(self, event: Event, context: Context, policy: TenantPolicy, now_ms: int) -> _Decided:
        providers = frozenset(context.providers)
        verdict = None
        preferences = self.preferences(context.preferences, context.zone)
        if preferences is not None or policy.rules is not None:
            if preferences is None and context.zone is not None:
                preferences = self.preferences("{}", context.zone)
            verdict = judge(event, preferences, policy.rules or NO_RULES, now_ms)
        found = plan(
            event,
            Reach.OFFLINE,
            providers=providers,
            now_ms=now_ms,
            ack_window_ms=self._window_ms,
            grace_end_ms=0,
            lease_ms=self._lease_ms,
            attention=Attention.UNKNOWN,
            policy=policy.of(event.type),
            verdict=verdict,
        )
        receipt = circumstance(providers_receipt(providers), Reach.OFFLINE, Attention.UNKNOWN)
        return _Decided(found, receipt, pack(found.rules) if found.rules else None)


def _shape(event: Event, content: str, decided: _Decided) -> Shape:
    found, receipt, decision = decided
    priority = event.priority if found.priority is None else found.priority
    return Shape(content, priority, decision, found.archived, receipt)
