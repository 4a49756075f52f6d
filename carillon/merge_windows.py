"""What a merge window does to its notification, in words and as data: pure.

A window is open for as long as it lasts and its notification takes in others (carillon/merging.py); how soon
what is merged may disturb again follows from when the user was told last, and from the rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from carillon.clock import rfc3339
from carillon.merge_rules import AGGREGATE, DROP, MergeRule
from carillon.merging import HOW_WORDS, WHO_WORDS, span
from carillon.notification import NotificationRow, filed_away
from carillon.settings import MergeSettings


@dataclass(frozen=True, slots=True)
class KnownWindow:
    """One window of a notification.

    Attributes:
        began_ms: with its first event; None: not known any more.
        source: event | tenant: who asked for it; None: not known any more.
        events: in the notification, the first included.
        count: as the notification says.
        notified_ms: when the user was last disturbed by it, or will be.
    """

    how: str
    began_ms: int | None
    ends_ms: int
    source: str | None
    events: int
    count: int
    notified_ms: int


CLOSED: Final[Mapping[str, str]] = {
    "time": "its time is over",
    "read": "it was read",
    "dismissed": "it was dismissed",
    "archived": "it was archived",
    "cancelled": "it was cancelled",
    "retracted": "it was retracted",
    "expired": "it has expired",
}
"""What ends a window."""


def closed_by(window: KnownWindow, row: NotificationRow, cancelled: bool, now_ms: int) -> str | None:
    """What ended a window: time, or what became of its notification; None: it is open."""
    if window.ends_ms <= now_ms:
        return "time"
    if row.retracted_ms is not None:
        return "retracted"
    if row.expires_ms is not None and row.expires_ms <= now_ms:
        return "expired"
    if window.how == DROP:
        return None  # what was said and dealt with is not said again
    if cancelled:
        return "cancelled"
    if row.read_ms is not None:
        return "read"
    if row.dismissed_ms is not None:
        return "dismissed"
    if row.archived_ms is not None and not filed_away(row):
        return "archived"
    return None


def told(
    window: KnownWindow,
    row: NotificationRow,
    rule: MergeRule | None,
    settings: MergeSettings,
    now_ms: int,
    *,
    cancelled: bool,
) -> dict[str, Any]:
    """A window as `explain` tells it.

    Args:
        rule: the tenant's of today for the type.
        cancelled: the service stopped what was pending of it.
    """
    closed = closed_by(window, row, cancelled, now_ms)
    renotify_ms = round(settings.renotify_s * 1000)
    if rule is not None and rule.renotify_ms is not None:
        renotify_ms = rule.renotify_ms
    length_ms = None if window.began_ms is None else window.ends_ms - window.began_ms
    again_ms = window.notified_ms + renotify_ms
    drops = window.how == DROP
    return {
        "how": window.how,
        "source": window.source,
        "windowS": None if length_ms is None else length_ms / 1000,
        "endsAt": rfc3339(window.ends_ms),
        "open": closed is None,
        "closedBy": closed,
        "events": window.events,
        "count": window.count,
        "notifiedAt": rfc3339(window.notified_ms),
        "renotifyS": None if drops else renotify_ms / 1000,
        "renotifyAt": None if drops or closed is not None else rfc3339(max(again_ms, now_ms)),
        "words": _words(window, closed, length_ms, again_ms, now_ms),
    }


def _words(window: KnownWindow, closed: str | None, length_ms: int | None, again_ms: int, now_ms: int) -> str:
    length = "its window" if length_ms is None else span(length_ms)
    why = HOW_WORDS[window.how].format(window=length)
    who = "" if window.source is None else f" ({WHO_WORDS[window.source]})"
    parts = [f"The rule: {why}{who}."]
    if closed is None:
        parts.append(f"The window is open until {rfc3339(window.ends_ms)}.")
    elif closed == "time":
        parts.append(f"The window ended at {rfc3339(window.ends_ms)}.")
    else:
        parts.append(f"The window is closed: {CLOSED[closed]}.")
    if window.how != DROP:
        many = "1 event is" if window.events == 1 else f"{window.events} events are"
        of = " different actors" if window.how == AGGREGATE else ""
        parts.append(f"{many} in it, and it counts {window.count}{of}.")
        if closed is None:
            parts.append(_when(window.notified_ms, again_ms, now_ms))
    return " ".join(parts)


def _when(notified_ms: int, again_ms: int, now_ms: int) -> str:
    """How soon what is merged next disturbs."""
    if notified_ms > now_ms:
        return f"A push at {rfc3339(notified_ms)} tells what comes until then."
    if again_ms > now_ms:
        quiet = f"what comes before {rfc3339(again_ms)} is shown quietly, and its push comes then."
        return f"The user was told of it at {rfc3339(notified_ms)}: {quiet}"
    return f"The user was told of it at {rfc3339(notified_ms)}: what comes next disturbs as a new one."
