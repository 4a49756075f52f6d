"""Where a notification goes: a pure function of the event, the user's reachability, and time.

The outbox row of an external channel exists whether the user is live or not; liveness only sets when it is
due (guarantees G6, G7): at once if nobody is there, at the end of grace if the last device just left, after
the acknowledgement window if a device is attached.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from carillon.messages import Event

IN_APP: Final = "in_app"
PUSH: Final = "push"


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
    """

    status: str
    channels: tuple[str, ...]
    push_due_ms: int | None = None
    push_now: bool = False


_FEED_ONLY = Plan("stored", (IN_APP,))
_LIVE_ONLY = Plan("delivered", (IN_APP,))


def plan(
    event: Event,
    reach: Reach,
    *,
    has_target: bool,
    now_ms: int,
    ack_window_ms: int,
    grace_end_ms: int,
    lease_ms: int,
) -> Plan:
    """Decide for one event.

    Args:
        has_target: the user has a push target.
        ack_window_ms: how long a live delivery may stay unacknowledged before its push.
        grace_end_ms: wall time at which grace ends, used with Reach.GRACE.
        lease_ms: lease of a row born claimed.
    """
    asked = event.channels
    push = has_target if asked is None else PUSH in asked and has_target
    if not push:
        return _LIVE_ONLY if reach is Reach.LIVE else _FEED_ONLY
    if asked is not None and IN_APP not in asked:
        # Push alone was asked for: sockets show the feed's change, but nothing waits for them.
        return Plan("queued", (PUSH,), now_ms + lease_ms, True)
    channels = (IN_APP, PUSH)
    if reach is Reach.LIVE:
        return Plan("delivered", channels, now_ms + ack_window_ms)
    if reach is Reach.GRACE:
        return Plan("queued", channels, grace_end_ms)
    return Plan("queued", channels, now_ms + lease_ms, True)
