"""What closed a push before it was sent, in words and as data: pure.

The reason that a row of the outbox keeps is a word, or a few; a rule that closed it when its time came is
written behind that word, so that explanations tell whose rule it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from carillon.explain import RULES, words
from carillon.outbox import LEFT_OUT
from carillon.switches import TENANT, Fired

_SYSTEM: Final = "system"
ENDINGS: Final[Mapping[str, tuple[str, str]]] = {
    "acknowledged": (_SYSTEM, "A device of the user acknowledged it before that was due"),
    "active": (_SYSTEM, "The user was active and had it in the app when that was due"),
    "seen": ("user", "The user saw it meanwhile"),
    "read": ("user", "The user read it meanwhile"),
    "clicked": ("user", "The user clicked it meanwhile"),
    "dismissed": ("user", "The user dismissed it meanwhile"),
    "archived": ("user", "The user archived it meanwhile"),
    "retracted": ("event", "Its service retracted it meanwhile"),
    "cancelled": ("event", "Its service cancelled what was pending"),
    "edited again": ("event", "Its service edited it again meanwhile"),
    "superseded": (_SYSTEM, "A newer push about the same took its place"),
    "expired": ("event", "It had expired by then"),
    "expired before the next try": ("event", "It would have expired before the next try"),
    "told in a digest": (_SYSTEM, "It was told in a digest"),
    "removed": (_SYSTEM, "It was taken out of its digest"),
    "no device got it": (_SYSTEM, "No device had got it: there was nothing to take back or to replace"),
    "shown on every device": (_SYSTEM, "Every device with a target showed it already"),
}
"""Reasons as they are stored -> whose doing it was, and the words."""
_MERGED: Final = re.compile(r"merged into ([0-9a-f-]{36})")
_CLOSED: Final = re.compile(r"(\w+); closed by (user|tenant|event|system) (\w+)(?: (.+))?", re.DOTALL)


_NO_TARGET: Final = re.compile(rf"no (\w+) target(?:; {LEFT_OUT}(.+))?", re.DOTALL)
_ONWARD: Final = re.compile(r"(.*?)(?:; |^)falls back to (\w+)", re.DOTALL)


def onward(reason: str) -> tuple[str, str | None]:
    """A reason without what the fallback wrote behind it, and the channel that followed; None: none did."""
    found = _ONWARD.fullmatch(reason)
    return (reason, None) if found is None else (found[1], found[2])


def onward_words(channel: str | None) -> list[str]:
    """Which channel followed, as a sentence, if one did."""
    return [] if channel is None else [f"It fell back to {channel}."]


def closed(reason: str, rule: Fired | None) -> str:
    """The reason of a push that rules closed when its time came: `reason`, and the rule behind it."""
    if rule is None:
        return reason
    return f"{reason}; closed by {rule.source} {rule.rule}" + ("" if rule.about is None else f" {rule.about}")


def ending(channel: str, state: str, reason: str | None) -> dict[str, Any] | None:
    """What closed a push, by its row of the outbox; None: it is open, was sent, or failed at the provider.

    Args:
        state, reason: of the row.
    """
    if state not in ("cancelled", "dead") or not reason:
        return None
    own, following = onward(reason)
    found = _by_itself(channel, own)
    if found is not None:
        found["words"] = " ".join([found["words"], *onward_words(following)])
    return found


def _by_itself(channel: str, reason: str) -> dict[str, Any] | None:
    by_rule = _CLOSED.fullmatch(reason)
    if by_rule is not None:
        word, source, name, about = by_rule.groups()
        sentence = words(Fired(name, source, about, (channel,))) if name in RULES else f"{word}."
        sentence = sentence.replace(" until .", ".")  # its end is not kept: it is over
        return _told(name, source, about, f"When that was due it was decided again: {sentence}")
    merged = _MERGED.fullmatch(reason)
    if merged is not None:
        return _told("merged", _SYSTEM, merged[1], f"It was told together with {merged[1]}, by one push.")
    lacking = _NO_TARGET.fullmatch(reason)
    if lacking is not None:
        name, others = lacking.groups()
        if others is None:
            return _told("no_target", _SYSTEM, None, f"The user had no target for {name} when that was due.")
        sentence = f"No device was left that gets it; left out because of their platform: {others}."
        return _told("no_device", TENANT, others, sentence)
    known = ENDINGS.get(reason)
    if known is None:
        return None
    return _told(reason.replace(" ", "_"), known[0], None, f"{known[1]}.")


def _told(rule: str, source: str, about: str | None, sentence: str) -> dict[str, Any]:
    return {"rule": rule, "source": source, "about": about, "words": sentence}
