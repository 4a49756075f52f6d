"""What a shard decides of an event: the core's pure functions, given what the shard knows of the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from actors.shard_entries import Entry, disturbs
from actors.shard_merges import Merges
from actors.shard_policies import NO_RULES
from actors.shard_users import User
from carillon.attention import DEFERRED, Attention
from carillon.budget import Spent
from carillon.clock import Clock
from carillon.decision import TenantRules, Verdict, holds_until_ms, judge, within
from carillon.digest import OVERFLOW, digest_id, key_of
from carillon.explain import circumstance
from carillon.ids import UserKey
from carillon.messages import Event
from carillon.notification import target_of
from carillon.plan import Plan, Reach, plan, wants_push
from carillon.policy import TenantPolicy
from carillon.settings import ShardSettings
from carillon.switches import Preferences

MOST_KNOWN: Final = 10_000
"""Decisions that are remembered, some 5 MB: beyond it all are forgotten."""


class _Known(NamedTuple):
    """A plan and what it came from: good until then."""

    plan: Plan
    verdict: Verdict | None
    until_ms: int
    mine: Preferences | None
    policy: TenantPolicy


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
        self._until_ms = 0
        # What was decided, by what counts for it. Objects that keys name by their identity are kept beside.
        self._verdicts: dict[tuple[Any, ...], tuple[Verdict, Preferences | None, TenantRules]] = {}
        self._plans: dict[tuple[Any, ...], _Known] = {}

    def plan(self, entry: Entry, now_ms: int, *, spend: bool = False) -> Plan:
        """Decide for one event; with `spend` what it takes of the user's limits is noted.

        Events that differ in nothing that counts are decided once: of one that names no channels, for a user
        who is there, type, category and priority count, what holds for the user, and where it looks. That
        holds for as long as rules say the same; what is due so long after now is decided anew each time.
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
            self._turn(now_ms)
        rules, mine, over = policy.rules, user.preferences, event.over
        if mine is None and (rules is not None or over):
            mine = user.local
        alike: Any = None
        if reach is Reach.LIVE and event.channels is None and not event.fallback and not over:
            alike = (
                attention, user.providers, event.type, event.category, event.priority, id(mine), id(policy)
            )  # fmt: skip
            known = self._plans.get(alike)
            if known is not None and now_ms < known.until_ms:
                verdict = known.verdict
                if verdict is None or within(verdict, user.spent, now_ms):
                    if spend and verdict is not None:
                        self._spend(user, known.plan, verdict, reach)
                    return known.plan
        verdict = None
        if mine is not None or rules is not None or over:
            verdict = None if over else self._judge(event, mine, rules or NO_RULES)
            if verdict is None or not within(verdict, user.spent, now_ms):
                alike = None
                verdict = judge(event, mine, rules or NO_RULES, now_ms, user.spent)
        found = plan(
            event,
            reach,
            providers=user.providers,
            now_ms=now_ms,
            ack_window_ms=self._window_ms,
            grace_end_ms=grace_end_ms,
            lease_ms=self._lease_ms,
            attention=attention,
            policy=policy.of(event.type),
            verdict=verdict,
        )
        if alike is not None:
            lasts = verdict is not None and (found.push_due_ms is None or found.gate == DEFERRED)
            until_ms = holds_until_ms(mine, now_ms) if lasts else now_ms + 1
            self._plans[alike] = _Known(found, verdict, until_ms, mine, policy)
        if spend and verdict is not None:
            self._spend(user, found, verdict, reach)
        return found

    def _spend(self, user: User, found: Plan, verdict: Verdict, reach: Reach) -> None:
        """Note what a plan takes of the limits of its user."""
        if verdict.spends and disturbs(found, reach):
            if user.spent is None:
                user.spent = Spent()
            for name, limit in verdict.spends:
                user.spent.spend(name, limit, self._now_ms)
        if found.digest == OVERFLOW:
            if user.spent is None:
                user.spent = Spent()
            user.spent.digest_ms = found.push_due_ms or 0

    def _turn(self, now_ms: int) -> None:
        """Time has passed: forget what may not hold any more, or what is too much to remember."""
        if not self._now_ms <= now_ms < self._until_ms or len(self._plans) + len(self._verdicts) > MOST_KNOWN:
            self._verdicts.clear()
            self._plans.clear()
            self._until_ms = holds_until_ms(None, now_ms)
        self._now_ms = now_ms

    def _judge(self, event: Event, mine: Preferences | None, rules: TenantRules) -> Verdict:
        """`judge` of a user who spent nothing: the same for all events of this time that are alike."""
        if mine is not None and mine.dnd_until_ms > self._now_ms:
            return judge(event, mine, rules, self._now_ms)  # it ends at any moment
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
