"""Where a notification goes: a pure function of the event, the user's context, and time.

The context is how the user is reached, where the user looks, and what preferences and the tenant's rules
allow (`carillon.decision`); where there are neither, nothing is paid for them.

The outbox row of an external channel exists whether the user is live or not; liveness and attention only say
when it is due and what may cancel it (guarantees G6, G7).
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from enum import Enum
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from carillon.attention import ALWAYS, ANY, AWAY_LEVELS, DEFERRED, SEEN, Attention
from carillon.decision import URGENT, Verdict, fired, opened
from carillon.digest import OVERFLOW
from carillon.external import IN_APP, PUSH, choose
from carillon.messages import Event
from carillon.policy import Policy
from carillon.switches import Fired


class Reach(Enum):
    """How the shard finds the user: delivering is the presence check."""

    LIVE = 1
    GRACE = 2
    OFFLINE = 3


class Plan(Struct, frozen=True):
    """What to do with one event.

    Attributes:
        status: the routing outcome to answer if the plan holds at the commit.
        channels: channels planned, in order; each but in_app has an outbox row, or may have one later (see
            `keepable`).
        push_due_ms: when what leaves the system is due, None for nothing.
        push_now: True if the row is born claimed: its job is on its way to the pool right after the commit.
        gate: what an acknowledgement does to the push (carillon/attention.py).
        hold_until_ms: until when the push may be held once an active device acknowledged, or with DEFERRED is
            held; None: not at all.
        reason: why it is silent, told in the answer and kept with the row; None for what needs no word.
        chain: channels that follow when all external ones of `channels` ended without success.
        step: 0 if the external channels are those asked for; n for the n-th fallback.
        archived: the user wants nothing of it in the app: it is filed away, and no socket shows it.
        silent: sockets show it without a sound.
        priority: with the user's override; None: as the event says.
        rules: what fired of preferences and tenant's rules.
        digest: the frequency of the digest that what leaves the system waits in; None: in none.
    """

    status: str
    channels: tuple[str, ...]
    push_due_ms: int | None = None
    push_now: bool = False
    gate: str | None = None
    hold_until_ms: int | None = None
    reason: str | None = None
    chain: tuple[str, ...] = ()
    step: int = 0
    archived: bool = False
    silent: bool = False
    priority: int | None = None
    rules: tuple[Fired, ...] = ()
    digest: str | None = None

    @property
    def keepable(self) -> bool:
        """The push waits for an acknowledgement of a device that is there, which most likely ends it: it need
        not be a row of the outbox yet (docs/adr/0016-kept-pushes.md)."""
        return self.gate is None and not self.push_now and self.digest is None and self.status == "delivered"


_FEED_ONLY = Plan("stored", (IN_APP,))
_LIVE_ONLY = Plan("delivered", (IN_APP,))
_DEFAULT: Final = (PUSH,)


def wants_push(event: Event, providers: Collection[str]) -> bool:
    """Whether anything external may be planned at all: then, and only then, attention matters."""
    if event.channels is None and not event.fallback:
        return bool(providers)
    return bool(choose(event.channels, event.fallback, providers).channels)


def plan(
    event: Event,
    reach: Reach,
    *,
    providers: Collection[str],
    now_ms: int,
    ack_window_ms: int,
    grace_end_ms: int,
    lease_ms: int,
    attention: Attention,
    policy: Policy,
    verdict: Verdict | None = None,
) -> Plan:
    """Decide for one event.

    | the user | the push | gate: what an acknowledgement does to it |
    |---|---|---|
    | has no target, or push is not asked for | none | |
    | push alone is asked for | at once | |
    | whatever attention, urgent | at once | ALWAYS: nothing |
    | live; viewing, focused, visible, unknown | after the acknowledgement window | none: ends or holds it |
    | live; all hidden or idle, `in_app` | after the window | ANY: that of every device ends it |
    | live; all hidden or idle, `both` | at once | ALWAYS |
    | live; all hidden or idle, `push_after` | after the delay | SEEN: nothing |
    | in grace | when grace ends | none (ANY with `in_app`) |
    | offline | at once | the same, until it is sent |

    Read, seen, click, dismiss and archive cancel it while it waits, in every row of this table.

    With a verdict closed channels are left out, and what is held is due when that ends (gate DEFERRED), to be
    decided again then, whatever the table says.

    Args:
        providers: push providers at which the user has a target.
        ack_window_ms: how long a live delivery may stay unacknowledged before its push.
        grace_end_ms: wall time at which grace ends, used with Reach.GRACE.
        lease_ms: lease of a row born claimed.
        attention: of the user now; VIEWING if a focused device shows the event's target. Used with
            Reach.LIVE.
        verdict: what preferences and the tenant's rules allow; None: there are none.
    """
    if verdict is not None and (verdict.why or verdict.rules):  # without a rule that fired: as for everybody
        return _ruled(
            event, reach, providers, now_ms, ack_window_ms, grace_end_ms, lease_ms, attention, policy, verdict
        )
    chain: tuple[str, ...] = ()
    step = 0
    external = _DEFAULT if providers else ()
    if event.channels is not None or event.fallback:
        external, chain, step = choose(event.channels, event.fallback, providers)
    alone = event.channels is not None and IN_APP not in event.channels
    found = _decide(
        alone,
        event.priority,
        reach,
        external,
        now_ms,
        ack_window_ms,
        grace_end_ms,
        lease_ms,
        attention,
        policy,
    )
    return replace(found, chain=chain, step=step) if chain or step else found


def asked_for(event: Event) -> list[str]:
    """Every channel the event would use, fallbacks included, in order."""
    names = [IN_APP, PUSH] if event.channels is None else list(event.channels)
    return names + [name for name in event.fallback or () if name not in names]


def _ruled(
    event: Event,
    reach: Reach,
    providers: Collection[str],
    now_ms: int,
    ack_window_ms: int,
    grace_end_ms: int,
    lease_ms: int,
    attention: Attention,
    policy: Policy,
    verdict: Verdict,
) -> Plan:
    names = asked_for(event)
    asked = opened([IN_APP, PUSH] if event.channels is None else event.channels, verdict.off)
    choice = choose(asked, opened(event.fallback or (), verdict.off), providers)
    archived = IN_APP in verdict.off
    live = reach is Reach.LIVE and not archived
    if archived and IN_APP not in names:
        names.insert(0, IN_APP)  # not asked for, but sockets and feed would have shown it
    rules = tuple(fired(verdict, names))
    if not choice.channels and rules:
        # Nothing is there to be collected: it is in the feed, or nowhere.
        rules = tuple(rule for rule in rules if rule.rule != OVERFLOW)
    priority = None if verdict.priority == event.priority else verdict.priority
    if not choice.channels and not archived:
        reason = verdict.reason
        if reason is None and len(opened(names, verdict.off)) < len(names):
            reason = "preferences"
        return Plan(
            "delivered" if live else "stored", (IN_APP,), None, False, None, None, _less(reason, verdict),
            choice.chain, choice.step, False, verdict.silent, priority, rules,
        )  # fmt: skip
    common: dict[str, Any] = {
        "chain": choice.chain, "step": choice.step, "archived": archived, "silent": verdict.silent,
        "priority": priority, "rules": rules,
    }  # fmt: skip
    if not choice.channels:
        return Plan("suppressed", (), reason=_closing(event, providers, verdict), **common)
    alone = archived or (event.channels is not None and IN_APP not in event.channels)
    if verdict.until_ms is not None:
        channels = choice.channels if alone else (IN_APP, *choice.channels)
        status = "delivered" if live and not alone else "deferred"
        until_ms = verdict.until_ms
        return Plan(
            status,
            channels,
            until_ms,
            False,
            DEFERRED,
            until_ms,
            verdict.reason,
            digest=verdict.digest,
            **common,
        )
    found = _decide(
        alone, verdict.priority, reach, choice.channels, now_ms, ack_window_ms, grace_end_ms, lease_ms,
        attention, policy,
    )  # fmt: skip
    return replace(found, **common)


def _closing(event: Event, providers: Collection[str], verdict: Verdict) -> str:
    """Why nothing is left of an event that is not wanted in the app: a limit, if preferences alone would have
    let it leave the system."""
    if verdict.reason is None:
        return "preferences"
    closed = frozenset(verdict.why)
    asked = opened([PUSH] if event.channels is None else event.channels, closed)
    outside = choose(asked, opened(event.fallback or (), closed), providers).channels
    return verdict.reason if outside else "preferences"


def _less(reason: str | None, verdict: Verdict) -> str | None:
    """Why nothing leaves the system, if a rule says so: without a target there was nothing to hold."""
    if reason is None or (verdict.until_ms is not None and not verdict.off):
        return None
    return reason


@functools.lru_cache(maxsize=64)
def _watched(channels: tuple[str, ...], due_ms: int, hold_until_ms: int | None, reason: str | None) -> Plan:
    """What most events of a batch have in common: delivered, and pushed if nobody acknowledges."""
    return Plan("delivered", channels, due_ms, False, None, hold_until_ms, reason)


def _decide(
    alone: bool,
    priority: int,
    reach: Reach,
    external: tuple[str, ...],
    now_ms: int,
    ack_window_ms: int,
    grace_end_ms: int,
    lease_ms: int,
    attention: Attention,
    policy: Policy,
) -> Plan:
    live = reach is Reach.LIVE
    if not external:
        return _LIVE_ONLY if live else _FEED_ONLY
    if alone:
        # Nothing in-app was asked for: sockets show the feed's change, but nothing waits for them.
        return Plan("queued", external, now_ms + lease_ms, True)
    both = (IN_APP, *external)
    at_once = now_ms + lease_ms
    hold_ms = now_ms + policy.hold_ms if policy.hold_ms else None
    gate = ANY if policy.when_away == IN_APP else None
    if priority >= URGENT:
        return Plan("delivered" if live else "queued", both, at_once, True, ALWAYS)
    if reach is Reach.GRACE:
        return Plan("queued", both, grace_end_ms, False, gate, hold_ms)
    if not live:
        return Plan("queued", both, at_once, True, gate, hold_ms)
    if attention not in AWAY_LEVELS:
        reason = "viewing" if attention is Attention.VIEWING else None
        return _watched(both, now_ms + ack_window_ms, hold_ms, reason)
    if policy.when_away == "both":
        return Plan("delivered", both, at_once, True, ALWAYS)
    if policy.when_away == "push_after":
        return Plan("delivered", both, now_ms + policy.delay_ms, False, SEEN, hold_ms)
    return Plan("delivered", both, now_ms + ack_window_ms, False, gate, hold_ms)
