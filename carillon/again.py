"""Decided again: what becomes of a push that waited, now that its time has come. Pure.

Quiet hours, a digest or a limit held it (gate DEFERRED), or it waited for its user; meanwhile preferences
may have changed, the user may be here, or quiet hours may have begun. What was held is told together: one
push for all that one user missed on one channel.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Final, NamedTuple

from carillon.attention import DEFERRED
from carillon.decision import Verdict, family
from carillon.switches import Fired

SEND: Final = "send"
HOLD: Final = "hold"
CANCEL: Final = "cancel"
TAKES_OVER: Final = "takes over"
"""Reason: the push that spoke for it ended untold. With others like it, it is told together again."""
ACTIVE: Final = "active"
"""Reason: the user is here and has it in the app."""


class Again(NamedTuple):
    """What becomes of a push: sent, held until `until_ms`, or cancelled, and why.

    Attributes:
        rule: that closed or holds it; None: no rule of preferences or tenant did.
    """

    action: str
    reason: str | None = None
    until_ms: int = 0
    rule: Fired | None = None


def decide_again(
    verdict: Verdict, channel: str, gate: str | None, *, present: bool, acknowledged: bool
) -> Again:
    """Decide for one push whose time has come.

    Args:
        verdict: of its event, with the rules of now and `again`.
        gate: DEFERRED if rules held it.
        present: the user looks at a device that is attached now. What is not known is not present.
        acknowledged: some device has it in the app.
    """
    last = verdict.rules[-1] if verdict.rules else None
    if family(channel) in verdict.off:
        rule = verdict.why.get(family(channel), last)
        return Again(CANCEL, verdict.reason or "preferences", 0, rule)
    if verdict.until_ms is not None:
        return Again(HOLD, verdict.reason, verdict.until_ms, last)
    if gate == DEFERRED and present and acknowledged:
        return Again(CANCEL, ACTIVE)
    return Again(SEND)


class Held(NamedTuple):
    """A push that was held and may be sent now."""

    delivery: int
    seq: int
    told_to: Hashable
    """Whom and where: pushes with the same are told together."""


def merge(pushes: Iterable[Held]) -> dict[int, list[int]]:
    """The pushes to send: of each user and channel the newest, with those that it speaks for."""
    newest: dict[Hashable, Held] = {}
    others: dict[Hashable, list[int]] = {}
    for push in pushes:
        known = newest.get(push.told_to)
        if known is None:
            newest[push.told_to] = push
            others[push.told_to] = []
        elif push.seq > known.seq:
            newest[push.told_to] = push
            others[push.told_to].append(known.delivery)
        else:
            others[push.told_to].append(push.delivery)
    return {push.delivery: others[told_to] for told_to, push in newest.items()}
