"""What a dry run answers: the plan of an event as a document, in words and as data. Pure.

The rules and their words are those of `carillon.explain`; here is what stands around them: an event that is
sent later, one whose idempotency key stands for something, and many users of whom some were looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from carillon.clock import rfc3339
from carillon.explain import told
from carillon.external import EXTERNAL
from carillon.ids import uuid_text
from carillon.messages import Outcome
from carillon.outbox import OnPlatform, named
from carillon.plan import Plan
from carillon.switches import EVENT, TENANT, Fired

RULES_TOLD: Final = 20
"""Rules that the summary for many users counts, the most frequent ones."""
_LATER: Final = (
    "Preferences, policy, template, devices and presence count as they are then. As things are now:"
)


def device_rules(
    platforms: Collection[str],
    reached: Sequence[OnPlatform],
    others: Sequence[OnPlatform],
    channels: Sequence[str],
) -> list[Fired]:
    """The rules behind `carillon.outbox.for_platforms`, for the channels it is about."""
    names = tuple(channels)
    found = [Fired("type_devices", TENANT, " and ".join(sorted(platforms)), names)]
    if others:
        found.append(Fired("left_out", TENANT, named(others), names))
    if others and not reached:
        found.append(Fired("no_device", TENANT, None, names))
    return found


def outside(channels: Iterable[str]) -> list[str]:
    """Those of the channels that leave the system."""
    return [name for name in channels if name in EXTERNAL]


def planned(
    user: str,
    plan: Plan,
    rules: Sequence[Fired],
    *,
    expired: bool = False,
    digest: Mapping[str, Any] | None = None,
    merge: Mapping[str, Any] | None = None,
    devices: Mapping[str, Any] | None = None,
    status: str | None = None,
) -> dict[str, Any]:
    """The document of an event that would be sent now.

    Args:
        expired: nobody is to see it any more.
        digest: that what leaves the system waits in.
        merge: what merging makes of it; None: it is not to be merged.
        devices: which of them get pushes of its type; None: all.
        status: in place of the plan's own.
    """
    shown = plan.status if status is None else status
    due_ms = None if plan.push_now or expired else plan.push_due_ms
    found = told(rules)
    words = [f"It would be {shown}.", *(rule["words"] for rule in found)]
    if merge is not None:
        words.append(merge["words"])
    joins = merge is not None and merge["status"] != "opened"
    nobody = devices is not None and not devices["reached"]
    if plan.push_due_ms is not None and not (expired or joins or nobody):
        names = " and ".join(outside(plan.channels))
        words.append(
            f"The {names} would " + ("go at once." if due_ms is None else f"be due at {rfc3339(due_ms)}.")
        )
    document: dict[str, Any] = {
        "userId": user,
        "status": shown,
        "channels": list(plan.channels),
        "fallback": list(plan.chain),
        "reason": plan.reason,
        "pushDueAt": None if due_ms is None else rfc3339(due_ms),
        "digest": digest,
        "silent": plan.silent,
        "archived": plan.archived,
        "rules": found,
    }
    if devices is not None:
        document["devices"] = devices
    if merge is not None:
        document["merge"] = merge
    return document | {"words": " ".join(words)}


def replayed(user: str, outcome: Outcome) -> dict[str, Any]:
    """The document of an event whose idempotency key stands for another one."""
    other = uuid_text(outcome.id)
    rule = Fired("replayed", EVENT, other)
    document = _bare(user, outcome.status, outcome.channels, outcome.reason, rule)
    return document | {"replayed": {"id": other, "seq": outcome.seq}}


def later(user: str, at_ms: int, then: dict[str, Any]) -> dict[str, Any]:
    """The document of an event that would be kept until `at_ms`; `then`: what would be planned then."""
    document = _bare(user, "deferred", (), None, Fired("scheduled", EVENT, None, (), at_ms))
    words = f"It would be deferred. {document['words']} {_LATER} {then['words']}"
    return document | {"sendAt": rfc3339(at_ms), "then": then, "words": words}


def of_then(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is planned for the time an event is sent: its own plan, if that time had come when it was made."""
    return document.get("then", document)


def _bare(user: str, status: str, channels: Sequence[str], reason: str | None, rule: Fired) -> dict[str, Any]:
    found = told([rule])
    return {
        "userId": user, "status": status, "channels": list(channels), "fallback": [], "reason": reason,
        "pushDueAt": None, "digest": None, "silent": False, "archived": False, "rules": found,
        "words": found[0]["words"],
    }  # fmt: skip


def summary(
    topic: str,
    subscribers: int,
    exact: bool,
    start_ms: int | None,
    plans: Sequence[Mapping[str, Any]],
    failed: int,
) -> dict[str, Any]:
    """What would become of an event for the subscribers of a topic.

    Args:
        subscribers: how many there are; `exact`: counted, not estimated.
        start_ms: when it begins; None: now.
        plans: documents of those who were looked at.
        failed: of how many others no plan could be made.
    """
    statuses = Counter[str](plan["status"] for plan in plans)
    channels = Counter[str](name for plan in plans for name in plan["channels"])
    rules: Counter[tuple[str, str, str | None]] = Counter()
    for plan in plans:
        rules.update({(rule["rule"], rule["source"], rule["about"]): 1 for rule in plan["rules"]})
    looked = len(plans) + failed
    many = f"{'' if exact else 'about '}{subscribers} subscriber{'' if subscribers == 1 else 's'}"
    words = [f"It would go to {many} of the topic {topic}."]
    if start_ms is not None:
        words.append(f"It would begin at {rfc3339(start_ms)}. {_LATER}")
    if looked:
        each = [f"{count} would be {status}" for status, count in statuses.most_common()]
        if failed:
            each.append(f"{failed} would fail")
        who = "All of them were" if exact and looked >= subscribers else f"{looked} of them were"
        words.append(f"{who} looked at: {', '.join(each)}.")
    return {
        "topic": topic,
        "subscribers": subscribers,
        "exact": exact,
        "sendAt": None if start_ms is None else rfc3339(start_ms),
        "lookedAt": looked,
        "failed": failed,
        "statuses": dict(statuses.most_common()),
        "channels": dict(channels.most_common()),
        "rules": [
            {"rule": rule, "source": source, "about": about, "users": users}
            for (rule, source, about), users in rules.most_common(RULES_TOLD)
        ],
        "words": " ".join(words),
    }
