"""Where a notification goes: a pure function of the event, the user's reachability and attention, and time.

The outbox row of an external channel exists whether the user is live or not; liveness and attention only say
when it is due and what may cancel it (guarantees G6, G7).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from carillon.attention import ALWAYS, ANY, AWAY_LEVELS, SEEN, Attention
from carillon.external import IN_APP, PUSH, choose
from carillon.messages import Event
from carillon.policy import Policy

URGENT: Final = 3
"""`Event.priority` that nothing silences."""


class Reach(Enum):
    """How the shard finds the user: delivering is the presence check."""

    LIVE = 1
    GRACE = 2
    OFFLINE = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with one event.

    Attributes:
        status: the routing outcome to answer if the plan holds at the commit.
        channels: channels planned, in order; each but in_app has an outbox row.
        push_due_ms: when what leaves the system is due, None for nothing.
        push_now: True if the row is born claimed: its job is on its way to the pool right after the commit.
        gate: what an acknowledgement does to the push (carillon/attention.py).
        hold_until_ms: until when the push may be held once an active device acknowledged; None: not at all.
        reason: why it is silent, told in the answer and kept with the row; None for what needs no word.
        chain: channels that follow when all external ones of `channels` ended without success.
        step: 0 if the external channels are those asked for; n for the n-th fallback.
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


_FEED_ONLY = Plan("stored", (IN_APP,))
_LIVE_ONLY = Plan("delivered", (IN_APP,))
_DEFAULT: Final = (PUSH,)


def wants_push(event: Event, providers: Collection[str]) -> bool:
    """Whether anything external is planned at all: then, and only then, attention matters."""
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

    Args:
        providers: push providers at which the user has a target.
        ack_window_ms: how long a live delivery may stay unacknowledged before its push.
        grace_end_ms: wall time at which grace ends, used with Reach.GRACE.
        lease_ms: lease of a row born claimed.
        attention: of the user now; VIEWING if a focused device shows the event's target. Used with
            Reach.LIVE.
    """
    chain: tuple[str, ...] = ()
    step = 0
    external = _DEFAULT if providers else ()
    if event.channels is not None or event.fallback:
        external, chain, step = choose(event.channels, event.fallback, providers)
    found = _decide(event, reach, external, now_ms, ack_window_ms, grace_end_ms, lease_ms, attention, policy)
    return replace(found, chain=chain, step=step) if chain or step else found


def _decide(
    event: Event,
    reach: Reach,
    external: tuple[str, ...],
    now_ms: int,
    ack_window_ms: int,
    grace_end_ms: int,
    lease_ms: int,
    attention: Attention,
    policy: Policy,
) -> Plan:
    asked = event.channels
    live = reach is Reach.LIVE
    if not external:
        return _LIVE_ONLY if live else _FEED_ONLY
    if asked is not None and IN_APP not in asked:
        # Nothing in-app was asked for: sockets show the feed's change, but nothing waits for them.
        return Plan("queued", external, now_ms + lease_ms, True)
    both = (IN_APP, *external)
    at_once = now_ms + lease_ms
    hold_ms = now_ms + policy.hold_ms if policy.hold_ms else None
    gate = ANY if policy.when_away == IN_APP else None
    if event.priority >= URGENT:
        return Plan("delivered" if live else "queued", both, at_once, True, ALWAYS)
    if reach is Reach.GRACE:
        return Plan("queued", both, grace_end_ms, False, gate, hold_ms)
    if not live:
        return Plan("queued", both, at_once, True, gate, hold_ms)
    if attention not in AWAY_LEVELS:
        reason = "viewing" if attention is Attention.VIEWING else None
        return Plan("delivered", both, now_ms + ack_window_ms, False, None, hold_ms, reason)
    if policy.when_away == "both":
        return Plan("delivered", both, at_once, True, ALWAYS)
    if policy.when_away == "push_after":
        return Plan("delivered", both, now_ms + policy.delay_ms, False, SEEN, hold_ms)
    return Plan("delivered", both, now_ms + ack_window_ms, False, gate, hold_ms)
