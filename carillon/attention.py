"""Attention: what the user's devices say of where the user looks, and what that means for a waiting push.

A push that waits is a row of the outbox with a *gate*, which says what an acknowledgement does to it, by what
the device that acknowledges told of its visibility:

| gate | the row waits for | device never told | focused, visible | hidden, idle |
|---|---|---|---|---|
| none | the end of the window, or of grace | cancels | holds (*) | nothing: received, not shown |
| ANY | the same | cancels | holds (*) | cancels |
| SEEN | the end of the delay of `push_after` | nothing | nothing | nothing |
| HELD | the end of the hold | cancels | nothing | nothing |
| ALWAYS | a provider | nothing | nothing | nothing |
| DEFERRED | the end of quiet hours, a digest | nothing | nothing | nothing |

(*) or cancels, if it may not be held (`holdS` 0, too old, or tried already).

Whatever the gate, read, seen, clicked, dismissed and archived cancel. `on_signal` is this table; the function
`delivery_signal` of the database is the same one, and a test compares the two over all their arguments.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

ANY: Final = "any"
SEEN: Final = "seen"
HELD: Final = "held"
ALWAYS: Final = "always"
DEFERRED: Final = "deferred"
"""Gate of a push that quiet hours, a digest or a limit holds: it is decided again when that ends."""
WITHDRAWN: Final = "withdrawn"
"""Gate of a push that was sent, or is being sent, for something that was dealt with elsewhere."""

SILENT: Final = "silent"
"""Signal: acknowledged by a device that never told its visibility."""
ACTIVE: Final = "active"
"""Signal: acknowledged by a device that told it is focused or visible."""
RECEIVED: Final = "received"
"""Signal: acknowledged by a device that told it is hidden or idle."""
AWAY: Final = "away"
"""Signal: the user looked away from a held one: its push is due now."""
DONE: Final = "done"
"""Signal: its time came and the user is active and has it: it is dropped."""
KEEP: Final = "keep"
"""Signal: the same, and it may still be held."""
STALE: Final = "stale"
"""Signal: a device acknowledged it as it was before the update that its push tells: it ends nothing."""
ACKNOWLEDGED: Final = frozenset((SILENT, ACTIVE, RECEIVED, STALE))
"""The signals that set deliveredAt."""

ACTIVE_STATES: Final = frozenset(("focused", "visible"))
"""VISIBILITY that says: the user can see the application."""


class Attention(IntEnum):
    """How closely a user looks; of several devices the best counts."""

    OFFLINE = 0
    HIDDEN = 1
    IDLE = 2
    UNKNOWN = 3
    """Attached, and no device says or shows anything. Unknown never silences."""
    VISIBLE = 4
    FOCUSED = 5
    VIEWING = 6
    """Focused on the very item that the event is about."""


LEVELS: Final = {
    "hidden": Attention.HIDDEN,
    "idle": Attention.IDLE,
    "visible": Attention.VISIBLE,
    "focused": Attention.FOCUSED,
}
"""What a device may tell (VISIBILITY)."""

AWAY_LEVELS: Final = (Attention.HIDDEN, Attention.IDLE)


def device_attention(
    state: str, reported: bool, owes_since_ms: int, now_ms: int, window_ms: int
) -> Attention:
    """What one attached device contributes.

    Args:
        state: as it told last; "visible" if it never did.
        reported: it told its visibility at least once.
        owes_since_ms: since when it has a delivery that it did not acknowledge; 0: it has none.
        window_ms: the acknowledgement window.
    """
    if reported:
        return LEVELS[state]
    # It never tells: it counts as visible for as long as it acknowledges.
    if owes_since_ms and now_ms - owes_since_ms > window_ms:
        return Attention.UNKNOWN
    return Attention.VISIBLE


def combined(devices: list[Attention]) -> Attention:
    """Of several devices the best that is known counts; nothing known of any is UNKNOWN, none is OFFLINE."""
    known = [one for one in devices if one is not Attention.UNKNOWN]
    if known:
        return max(known)
    return Attention.UNKNOWN if devices else Attention.OFFLINE


def signal_of(state: str, reported: bool) -> str:
    """What an acknowledgement of a device tells."""
    if not reported:
        return SILENT
    return ACTIVE if state in ACTIVE_STATES else RECEIVED


def on_signal(signal: str, state: str, gate: str | None, holdable: bool) -> str:
    """What a signal does to a push.

    Args:
        state: of its row; only planned, failed and unknown ones can still be stopped.
        holdable: it may be held, and the hold would end in the future.

    Returns:
        cancel | hold (until its hold ends) | due (now) | show (note that the device has shown it) | none.
    """
    if state in ("planned", "failed", "unknown"):
        if signal == SILENT and gate in (None, ANY, HELD):
            return "cancel"
        if signal == RECEIVED and gate == ANY:
            return "cancel"
        if signal == ACTIVE and gate in (None, ANY):
            return "hold" if state == "planned" and holdable else "cancel"
        if state == "planned":
            if signal == DONE and gate in (HELD, SEEN):
                return "cancel"
            if signal == KEEP and gate == SEEN:
                return "hold"
            if signal == AWAY and gate in (None, ANY, HELD):
                return "due"
    if signal == ACTIVE and state in ("planned", "failed", "unknown", "sending"):
        return "show"
    return "none"


def at_due(gate: str | None, *, active: bool, acknowledged: bool, holdable: bool) -> str:
    """What becomes of a waiting push whose time has come.

    Args:
        active: a device that tells its visibility says now that it is focused or visible. What is not known
            is not active, so that it is sent.
        acknowledged: some device has it.
        holdable: as in `on_signal`.

    Returns:
        send | drop | hold.
    """
    if gate == HELD and active:
        return "drop"
    if gate == SEEN and active and acknowledged:
        return "hold" if holdable else "drop"
    return "send"
