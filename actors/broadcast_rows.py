"""The notifications of a broadcast for users who are not in memory: decided and made many at a time.

Users with the same push providers and the same preferences get the same plan, so that it is made once for
all of them in a chunk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from actors.shard_policies import NO_RULES
from actors.shard_users import read_preferences
from carillon.attention import Attention
from carillon.broadcasts import NotificationIds, SlotUser
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
from stores.postgres.broadcasts import Context
from stores.postgres.shard_rows import AppendRow, OutboxRow

KEPT: int = 1000
"""Preferences documents that are kept read."""


class Made(NamedTuple):
    """What one user gets."""

    user: SlotUser
    row: AppendRow
    status: str
    outbox: Sequence[OutboxRow]
    """Without ids: they are drawn when it is known how many are needed."""


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
        contexts: Mapping[str, Context],
        words: Words,
        ids: NotificationIds,
        policy: TenantPolicy,
        now_ms: int,
    ) -> list[Made]:
        """The rows of users, in their order.

        Args:
            contexts: of all users, with their streams.
        """
        proto = words.event
        plans: dict[tuple[Any, ...], tuple[Plan, int, str | None]] = {}
        made: list[Made] = []
        for one in users:
            context = contexts[one.user]
            assert context.stream_id is not None
            key = context.providers, context.preferences, context.zone
            decided = plans.get(key)
            if decided is None:
                decided = plans[key] = self._decide(proto, context, policy, now_ms)
            found, receipt, decision = decided
            event = Event(
                ids.of(one.user), proto.tenant, one.user, one.slot, proto.type, proto.category,
                proto.priority, words.content(one.user), proto.created_ms, proto.expires_ms,
            )  # fmt: skip
            row = AppendRow(event, context.stream_id, 0, decision, found.archived, found.priority, receipt)
            outbox: Sequence[OutboxRow] = ()
            if found.push_due_ms is not None:
                # Never born claimed: the sweep takes what is due, as fast as the pools do.
                due_ms = now_ms if found.push_now else found.push_due_ms
                digest = None
                if found.digest is not None:
                    user = UserKey(proto.tenant, one.user)
                    digest = digest_id(key_of(user, proto.category, found.digest, found.push_due_ms))
                outbox = [
                    OutboxRow(
                        0, event.id, context.stream_id, one.slot, False, due_ms, found.gate,
                        found.hold_until_ms, found.reason, channel, ",".join(found.chain), found.step,
                        digest,
                    )
                    for channel in found.channels
                    if channel != IN_APP
                ]  # fmt: skip
            made.append(Made(one, row, found.status, outbox))
        return made

    def _decide(
        self, event: Event, context: Context, policy: TenantPolicy, now_ms: int
    ) -> tuple[Plan, int, str | None]:
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
        return found, receipt, pack(found.rules) if found.rules else None
