"""Why a notification goes where it goes, in words and as data: pure.

Rules of preferences and tenants are noted where they fire (`carillon.switches.Fired`). What each notification
goes through beside them, how the user was reached and where the user looked, is noted as one number, the
receipt; the words are made of both when somebody asks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from carillon.attention import Attention
from carillon.clock import rfc3339
from carillon.decision import URGENT
from carillon.external import EXTERNAL, IN_APP
from carillon.plan import Plan, Reach
from carillon.switches import Fired

SYSTEM: Final = "system"
EXPIRED: Final = "expired"
"""The rule of what had expired when it came."""
_PROVIDERS: Final = ("fcm", "apns", "webpush")
_REACHES: Final = (None, Reach.LIVE, Reach.GRACE, Reach.OFFLINE)
_VALUES: Final = {reach: index for index, reach in enumerate(_REACHES) if reach is not None}

_WHOSE: Final = {"user": "The user's preferences", "tenant": "The tenant's rules", "event": "The event"}
RULES: Final[Mapping[str, str]] = {
    "global_off": "{whose} switch all notifications off",
    "type_off": "{whose} switch the type {about} off",
    "category_off": "{whose} switch the category {about} off",
    "channel_off": "{whose} switch the channel {about} off",
    "type_channel_off": "{whose} switch {channels} off for the type {about}",
    "category_channel_off": "{whose} switch {channels} off for the category {about}",
    "emergency_only": "{whose} keep {about} for urgent notifications",
    "forced_on": "The tenant forces {channels} for {about}: preferences do not count",
    "forced_off": "The tenant closes {channels} for {about}: preferences do not count",
    "priority": "{whose} make this {about}",
    "urgent_passes": "It is urgent: what would hold it back does not",
    "forced_passes": "The tenant forces it: what would hold it back does not",
    "do_not_disturb": "The user does not want to be disturbed until {until}",
    "quiet_hours": "{whose} ask for quiet until {until}",
    "type_window": "The tenant sends {about} at other hours: it waits until {until}",
    "digest": "{whose} ask for digests ({about}): the push is collected in a digest due at {until}",
    "rate_limit": "The limit {limit} is used up until {until}",
    "tenant_limit": "The tenant's rate is used up: what exceeds it goes to the {about}",
    "overflow": "What exceeds the limit is collected in a digest due at {until}",
    "live": "The user is connected: it goes to the sockets",
    "grace": "The last device of the user left a moment ago: the push waits for the end of grace",
    "offline": "The user is not connected: what leaves the system goes at once",
    "viewing": "A device shows this very item: the push waits for its acknowledgement",
    "away": "All devices of the user are {about}: the policy's whenAway decides on the push",
    "acknowledgement": "The push waits for an acknowledgement in the app, which cancels it",
    "urgent": "It is urgent: the push goes at once, whatever the user looks at",
    "not_asked": "The event names no channel that leaves the system",
    "no_target": "The user has no target for {channels}",
    "type_devices": "The tenant sends {channels} of this type to {about} devices alone",
    "left_out": "These devices are left out because of their platform: {about}",
    "no_device": "No device is left that gets it: the {channels} ends there, or goes on to the fallback",
    "expires": "It expires at {until}: from then on nobody sees it, and nothing of it is sent",
    "expires_first": "It expires at {until}, before {channels} is due: what waits until then is dropped",
    "expired": "It had expired at {until}, when it came: it is stored, nobody sees it, and nothing is sent",
    "scheduled": "It is kept and sent at {until} (scheduleAt)",
    "replayed": "The idempotency key stands for {about}: the answer is that one's, and nothing is sent again",
    "without_app": "Nothing of it is wanted in the app: what leaves the system goes at once",
}
"""What each rule says."""


def receipt_of(reach: Reach, attention: Attention, providers: Collection[str]) -> int:
    """How the user was reached, as it is stored with the notification (at most 15 bits, never 0)."""
    return providers_receipt(providers) | _VALUES[reach] | attention << 2


def providers_receipt(providers: Collection[str]) -> int:
    """The part of a receipt that says where the user has targets."""
    return sum(32 << index for index, provider in enumerate(_PROVIDERS) if provider in providers)


def circumstance(providers: int, reach: Reach, attention: Attention) -> int:
    """A receipt from its first part: `receipt_of` for the hot path."""
    return providers | _VALUES[reach] | attention << 2


def read_receipt(receipt: int) -> tuple[Reach, Attention, frozenset[str]]:
    """What `receipt_of` was given."""
    reach = _REACHES[receipt & 3]
    assert reach is not None
    providers = frozenset(name for index, name in enumerate(_PROVIDERS) if receipt & 32 << index)
    return reach, Attention(receipt >> 2 & 7), providers


def circumstances(
    channels: Sequence[str] | None,
    fallback: Sequence[str] | None,
    priority: int,
    reach: Reach,
    attention: Attention,
    providers: Collection[str],
    *,
    external: bool,
    filed_away: bool = False,
    held: bool = False,
) -> list[Fired]:
    """The rules that every notification goes through, as they fired.

    Args:
        channels, fallback, priority: of the event; the priority with its override.
        external: something was planned that leaves the system.
        filed_away: nothing is shown in the app.
        held: what leaves the system is held by another rule.
    """
    found: list[Fired] = []
    live = reach is Reach.LIVE
    if live and not filed_away:
        found.append(Fired("live", SYSTEM, None, (IN_APP,)))
    outside = [n for n in (("push",) if channels is None else channels) if n in EXTERNAL]
    outside += [n for n in fallback or () if n not in outside]
    if not outside:
        return [*found, Fired("not_asked", "event")]
    lacking = tuple(
        n for n in outside if EXTERNAL[n].providers and EXTERNAL[n].providers.isdisjoint(providers)
    )
    if lacking:
        found.append(Fired("no_target", SYSTEM, None, lacking))
    if not external or held:
        return found
    names = tuple(n for n in outside if n not in lacking) or tuple(outside)
    if filed_away or (channels is not None and IN_APP not in channels):
        found.append(Fired("without_app", "event", None, names))
    elif priority >= URGENT:
        found.append(Fired("urgent", "event", None, names))
    elif reach is Reach.GRACE:
        found.append(Fired("grace", SYSTEM, None, names))
    elif not live:
        found.append(Fired("offline", SYSTEM, None, names))
    elif attention is Attention.VIEWING:
        found.append(Fired("viewing", SYSTEM, None, names))
    elif attention in (Attention.HIDDEN, Attention.IDLE):
        found.append(Fired("away", "tenant", attention.name.lower(), names))
    else:
        found.append(Fired("acknowledgement", SYSTEM, None, names))
    return found


def expiry(
    expires_ms: int | None, at_ms: int, due_ms: int | None, channels: Iterable[str] = ()
) -> list[Fired]:
    """The rule of an event that expires, none of others.

    Args:
        at_ms: when it was sent.
        due_ms: when what leaves the system is due; None: at once, or nothing does.
        channels: those that are due then.
    """
    if expires_ms is None:
        return []
    if expires_ms <= at_ms:
        return [Fired("expired", "event", None, (), expires_ms)]
    if due_ms is not None and due_ms >= expires_ms:
        return [Fired("expires_first", "event", None, tuple(channels), expires_ms)]
    return [Fired("expires", "event", None, (), expires_ms)]


def of_plan(
    plan: Plan,
    channels: Sequence[str] | None,
    fallback: Sequence[str] | None,
    priority: int,
    reach: Reach,
    attention: Attention,
    providers: Collection[str],
    *,
    expires_ms: int | None = None,
    now_ms: int = 0,
) -> list[Fired]:
    """Every rule behind a plan: first those of preferences and tenant, then the circumstances, then expiry.

    Of what has expired when it comes (`expires_ms` not after `now_ms`) no circumstance counts.
    """
    level = priority if plan.priority is None else plan.priority
    due_ms = None if plan.push_now else plan.push_due_ms
    ends = expiry(expires_ms, now_ms, due_ms, (name for name in plan.channels if name in EXTERNAL))
    if ends and ends[0].rule == EXPIRED:
        return [*plan.rules, *ends]
    return [
        *plan.rules,
        *circumstances(
            channels, fallback, level, reach, attention, providers,
            external=plan.push_due_ms is not None, filed_away=plan.archived, held=plan.gate == "deferred",
        ),
        *ends,
    ]  # fmt: skip


def words(rule: Fired) -> str:
    """One rule as a sentence."""
    text = RULES.get(rule.rule)
    if text is None:  # of a later release
        return rule.rule.replace("_", " ")
    channels = " and ".join(rule.channels) or "the channel"
    until = "" if rule.until_ms is None else rfc3339(rule.until_ms)
    whose = _WHOSE.get(rule.source, "The system")
    limit = "of the user over all types" if rule.about is None else f"for the type {rule.about}"
    return text.format(whose=whose, about=rule.about, channels=channels, until=until, limit=limit) + "."


def told(rules: Sequence[Fired]) -> list[dict[str, Any]]:
    """Rules as data and in words, for an answer."""
    return [
        {
            "rule": rule.rule,
            "source": rule.source,
            "about": rule.about,
            "channels": list(rule.channels),
            "until": None if rule.until_ms is None else rfc3339(rule.until_ms),
            "words": words(rule),
        }
        for rule in rules
    ]
