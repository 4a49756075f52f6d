"""Where a notification goes: a pure function of the event, the user's reachability and attention, and time.

The outbox row of an external channel exists whether the user is live or not; liveness and attention only say
when it is due and what may cancel it (guarantees G6, G7).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from carillon.attention import ALWAYS, ANY, AWAY_LEVELS, SEEN, Attention
from carillon.messages import Event
from carillon.policy import Policy

IN_APP: Final = "in_app"
PUSH: Final = "push"
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
        channels: channels planned, in order.
        push_due_ms: when the push is due, None for no push.
        push_now: True if the row is born claimed: its job is on its way to the pool right after the commit.
        gate: what an acknowledgement does to the push (carillon/attention.py).
        hold_until_ms: until when the push may be held once an active device acknowledged; None: not at all.
        reason: why it is silent, told in the answer and kept with the row; None for what needs no word.
    """

    status: str
    channels: tuple[str, ...]
    push_due_ms: int | None = None
    push_now: bool = False
    gate: str | None = None
    hold_until_ms: int | None = None
    reason: str | None = None


_FEED_ONLY = Plan("stored", (IN_APP,))
_LIVE_ONLY = Plan("delivered", (IN_APP,))
_BOTH: Final = (IN_APP, PUSH)


def wants_push(event: Event, has_target: bool) -> bool:
    """Whether a push is planned at all: then, and only then, attention matters."""
    return has_target and (event.channels is None or PUSH in event.channels)


def plan(
    event: Event,
    reach: Reach,
    *,
    has_target: bool,
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
        has_target: the user has a push target.
        ack_window_ms: how long a live delivery may stay unacknowledged before its push.
        grace_end_ms: wall time at which grace ends, used with Reach.GRACE.
        lease_ms: lease of a row born claimed.
        attention: of the user now; VIEWING if a focused device shows the event's target. Used with
            Reach.LIVE.
    """
    asked = event.channels
    push = has_target if asked is None else PUSH in asked and has_target
    live = reach is Reach.LIVE
    if not push:
        return _LIVE_ONLY if live else _FEED_ONLY
    if asked is not None and IN_APP not in asked:
        # Push alone was asked for: sockets show the feed's change, but nothing waits for them.
        return Plan("queued", (PUSH,), now_ms + lease_ms, True)
    at_once = now_ms + lease_ms
    hold_ms = now_ms + policy.hold_ms if policy.hold_ms else None
    gate = ANY if policy.when_away == IN_APP else None
    if event.priority >= URGENT:
        return Plan("delivered" if live else "queued", _BOTH, at_once, True, ALWAYS)
    if reach is Reach.GRACE:
        return Plan("queued", _BOTH, grace_end_ms, False, gate, hold_ms)
    if not live:
        return Plan("queued", _BOTH, at_once, True, gate, hold_ms)
    if attention not in AWAY_LEVELS:
        reason = "viewing" if attention is Attention.VIEWING else None
        return Plan("delivered", _BOTH, now_ms + ack_window_ms, False, None, hold_ms, reason)
    if policy.when_away == "both":
        return Plan("delivered", _BOTH, at_once, True, ALWAYS)
    if policy.when_away == "push_after":
        return Plan("delivered", _BOTH, now_ms + policy.delay_ms, False, SEEN, hold_ms)
    return Plan("delivered", _BOTH, now_ms + ack_window_ms, False, gate, hold_ms)
