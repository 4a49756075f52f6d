"""What a shard decides of an event: the core's pure functions, given what the shard knows of the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from actors.shard_entries import Entry, disturbs
from actors.shard_merges import Merges
from actors.shard_policies import NO_RULES
from actors.shard_users import User
from carillon.attention import Attention
from carillon.budget import Spent
from carillon.clock import Clock
from carillon.decision import TenantRules, Verdict, judge, within
from carillon.digest import OVERFLOW, digest_id, key_of
from carillon.explain import circumstance
from carillon.ids import UserKey
from carillon.messages import Event
from carillon.notification import target_of
from carillon.plan import Plan, Reach, plan, wants_push
from carillon.policy import Policy, TenantPolicy
from carillon.settings import ShardSettings
from carillon.switches import Preferences


class Planner:
    """Plans events of users of one shard.

    Args:
        reach: tells how a user is found now, and the wall time at which grace ends.
        policy: gives a tenant's policy.
    """

    def __init__(
        self,
        clock: Clock,
        settings: ShardSettings,
        merges: Merges,
        *,
        reach: Callable[[User], tuple[Reach, int]],
        policy: Callable[[str], TenantPolicy],
    ) -> None:
        self._clock = clock
        self._merges = merges
        self._reach = reach
        self._policy = policy
        self._window_ms = round(settings.ack_window_s * 1000)
        self._lease_ms = round(settings.delivery_lease_s * 1000)
        self._now_ms = 0
        # What was decided in this millisecond. Objects that keys name by their identity are kept beside.
        self._verdicts: dict[tuple[Any, ...], tuple[Verdict, Preferences | None, TenantRules]] = {}
        self._plans: dict[tuple[Any, ...], tuple[Plan, Policy]] = {}

    def plan(self, entry: Entry, now_ms: int, *, spend: bool = False) -> Plan:
        """Decide for one event; with `spend` what it takes of the user's limits is noted.

        Events of one millisecond that differ in nothing that counts are decided once. Of one that names no
        channels, for a user who is there, type, category and priority count, what holds for the user, and
        where it looks.
        """
        user = entry.user
        assert user is not None
        event = entry.event
        reach, grace_end_ms = self._reach(user)
        attention = Attention.UNKNOWN
        if reach is Reach.LIVE and wants_push(event, user.providers):
            attention = self._attention(user, event, now_ms)
        entry.receipt = circumstance(user.receipt, reach, attention)
        policy = self._policy(event.tenant)
        if now_ms != self._now_ms:
            self._now_ms = now_ms
            self._verdicts.clear()
            self._plans.clear()
        verdict: Verdict | None = None
        shared = reach is Reach.LIVE and event.channels is None and not event.fallback
        over = event.over
        if user.preferences is not None or policy.rules is not None or over:
            mine = user.local if user.preferences is None else user.preferences
            rules = policy.rules or NO_RULES
            if not over:
                verdict = self._judge(event, mine, rules)
            if verdict is None or not within(verdict, user.spent, now_ms):
                shared = False
                verdict = judge(event, mine, rules, now_ms, user.spent)
        rule = policy.of(event.type)
        alike = attention, user.providers, event.priority, id(rule), id(verdict)
        known = self._plans.get(alike) if shared else None
        if known is not None:
            found = known[0]
        else:
            found = plan(
                event,
                reach,
                providers=user.providers,
                now_ms=now_ms,
                ack_window_ms=self._window_ms,
                grace_end_ms=grace_end_ms,
                lease_ms=self._lease_ms,
                attention=attention,
                policy=rule,
                verdict=verdict,
            )
            if shared:
                self._plans[alike] = found, rule
        if spend and verdict is not None and verdict.spends and disturbs(found, reach):
            if user.spent is None:
                user.spent = Spent()
            for name, limit in verdict.spends:
                user.spent.spend(name, limit, now_ms)
        if spend and found.digest == OVERFLOW:
            if user.spent is None:
                user.spent = Spent()
            user.spent.digest_ms = found.push_due_ms or 0
        return found

    def _judge(self, event: Event, mine: Preferences | None, rules: TenantRules) -> Verdict:
        """`judge` of a user who spent nothing: the same for all events of this moment that are alike."""
        alike = id(mine), id(rules), event.type, event.category, event.priority
        known = self._verdicts.get(alike)
        if known is None:
            found = judge(event, mine, rules, self._now_ms)
            known = self._verdicts[alike] = found, mine, rules
        return known[0]

    def _attention(self, user: User, event: Event, now_ms: int) -> Attention:
        session = user.session
        assert session is not None
        viewed = session.viewed()
        if viewed and target_of(event.content) in viewed:
            return Attention.VIEWING
        return session.attention(now_ms, self._window_ms)


def digest_of(user: UserKey, event: Event, decided: Plan) -> bytes:
    """The id of the digest that a plan collects in; only for a plan with one."""
    assert decided.digest is not None
    assert decided.push_due_ms is not None
    return digest_id(key_of(user, event.category, decided.digest, decided.push_due_ms))
