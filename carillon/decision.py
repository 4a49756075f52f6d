"""What preferences and a tenant's rules make of one event: a pure function of event, user context and time.

`carillon.plan` goes on from its verdict to channels and due times. The order in which rules count: the
tenant's forced rules; the user's switches over the tenant's defaults; then, unless it is urgent or forced,
do-not-disturb, quiet hours and digests, which delay what leaves the system; and limits, which do so, too, or
leave it to the feed: those for users, and the tenant's own rate, which the doors measure (`Event.over`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from carillon.budget import ALL, Limit, Limits, Spent
from carillon.digest import OVERFLOW
from carillon.external import EXTERNAL, IN_APP, PUSH, PUSH_PROVIDERS
from carillon.limits import ALONE, PASSES
from carillon.messages import Event
from carillon.preferences import CHANNELS
from carillon.quiet_hours import QuietHours
from carillon.switches import EVENT, TENANT, USER, Fired, Preferences, Switches, remembered

URGENT: Final = 3
"""`Event.priority` that nothing silences."""
DIGEST: Final = "digest"
FEED: Final = "feed"
MINUTE_MS: Final = 60_000
_OUTSIDE: Final = frozenset(CHANNELS) - {IN_APP}


class TenantRules(NamedTuple):
    """A tenant's rules about its users' preferences.

    Attributes:
        defaults: what holds where a user's document is silent.
        forced: types and categories that users cannot switch; None: none.
        limits: None: nothing is limited.
        nobody: stands for a user who stored nothing.
        closed: by type when nothing of it may leave the system, where the user is.
        digest_template: names the template that digests are told by; None: our own words.
        held_template: the same for pushes that were held and are told together.
    """

    defaults: Preferences
    forced: Preferences
    limits: Limits | None
    nobody: Preferences
    closed: Mapping[str, QuietHours] = {}
    digest_template: str | None = None
    held_template: str | None = None


def no_rules() -> TenantRules:
    """Of a tenant without any."""
    return TenantRules(Preferences({}), Preferences({}), None, Preferences({}))


class Verdict(NamedTuple):
    """What is allowed of one event now.

    Attributes:
        off: channels, as preferences name them, that are closed.
        why: the rule behind each closed or forced channel.
        priority: with the user's override.
        until_ms: until when what leaves the system is held; None: it is not.
        silent: in-app without sound.
        rules: those that fired beside `why`.
        spends: limits of which one is used up if anything goes out now.
        reason: in a word, why less happens than the event asks for; None: nothing less.
        digest: the frequency of the digest that collects what leaves the system; None: none does.
    """

    off: frozenset[str]
    why: Any
    priority: int
    until_ms: int | None
    silent: bool
    rules: tuple[Fired, ...]
    spends: Sequence[tuple[str, Limit]]
    reason: str | None
    digest: str | None = None


_FAMILIES: Final = {
    channel: PUSH
    for channel, external in EXTERNAL.items()
    if external.providers and external.providers <= PUSH_PROVIDERS
}


def family(channel: str) -> str:
    """A channel as preferences name it: fcm and apns are push."""
    return _FAMILIES.get(channel, channel)


def judge(
    event: Event,
    user: Preferences | None,
    tenant: TenantRules,
    now_ms: int,
    spent: Spent | None = None,
    *,
    again: bool = False,
) -> Verdict:
    """Decide what is allowed of an event.

    Args:
        user: the user's document, None if there is none.
        spent: what the user has had of the tenant's limits; None: nothing yet.
        again: the event was held and its time has come: digests hold it no more.
    """
    return weigh(
        event.type, event.category, event.priority, user, tenant, now_ms, spent, again=again, over=event.over
    )


def within(verdict: Verdict, spent: Spent | None, now_ms: int) -> bool:
    """Whether a verdict that was found for nothing spent holds for who spent this: no limit is used up."""
    return spent is None or not verdict.spends or _over(verdict.spends, spent, now_ms) is None


def holds_until_ms(user: Preferences | None, now_ms: int) -> int:
    """Until when `judge` says the same of a user who spent nothing.

    Windows and digests begin and end with a minute of the user's clock, and clocks differ by whole minutes.
    """
    minute_ms = now_ms - now_ms % MINUTE_MS + MINUTE_MS
    if user is not None and now_ms < user.dnd_until_ms < minute_ms:
        return user.dnd_until_ms
    return minute_ms


def weigh(
    kind: str,
    category: str | None,
    priority: int,
    user: Preferences | None,
    tenant: TenantRules,
    now_ms: int,
    spent: Spent | None = None,
    *,
    again: bool = False,
    over: int = 0,
) -> Verdict:
    """`judge`, of the members of an event that count; `over` is `Event.over`."""
    mine = tenant.nobody if user is None else user
    urgent = priority >= URGENT
    open_: Switches = remembered(mine, tenant.defaults, tenant.forced, kind, category, urgent)
    if open_.level is not None:
        priority = open_.level
        urgent = priority >= URGENT
    rules: list[Fired] = []
    if open_.priority is not None:
        rules.append(open_.priority)
    until_ms, silent, reason, digest = None, False, None, None
    held = _held(open_, mine, tenant.defaults, now_ms, again)
    if tenant.closed and kind in tenant.closed:
        _outside(held, tenant.closed[kind], kind, mine, tenant.defaults, now_ms)
    if held:
        if urgent or open_.forced is not None:
            rules.append(Fired("urgent_passes", EVENT) if urgent else Fired("forced_passes", TENANT))
        else:
            rules += held
            until_ms = held[-1].until_ms
            reason = held[0].rule
            digest = held[0].about if reason == DIGEST else None
            silent = any(one.rule != DIGEST for one in held)
    off = open_.off
    spends: Sequence[tuple[str, Limit]] = ()
    passes = urgent or over == PASSES
    if over and (passes or open_.forced is not None):
        rules.append(Fired("urgent_passes", EVENT) if passes else Fired("forced_passes", TENANT))
        over = 0
    if over == ALONE or (over and until_ms is None):
        rules.append(Fired("tenant_limit", TENANT, FEED if over == ALONE else DIGEST))
        silent, until_ms, reason, digest = True, None, "tenant_limit", None
        if over == ALONE:
            off |= _OUTSIDE
        else:
            open_ms = 0 if spent is None else spent.digest_ms
            until_ms, digest = open_ms if open_ms > now_ms else now_ms + over, OVERFLOW
            rules.append(Fired("overflow", TENANT, None, (), until_ms))
    elif tenant.limits is not None and not urgent and open_.forced is None and until_ms is None:
        spends = _limits_of(tenant.limits, kind)
        used = _over(spends, spent, now_ms)
        if used is not None:
            rule, limit = used
            rules.append(rule)
            silent, spends, reason = True, (), "rate_limit"
            if tenant.limits.overflow == FEED:
                off |= _OUTSIDE
            else:
                until_ms, digest = rule.until_ms, OVERFLOW
                if not again and spent is not None and until_ms is not None:
                    until_ms = spent.overflow_ms(until_ms, limit, now_ms, tenant.limits.collect_ms)
                    rules.append(Fired("overflow", TENANT, None, (), until_ms))
    elif tenant.limits is not None and (urgent or open_.forced is not None):
        spends = _limits_of(tenant.limits, kind)
        if _over(spends, spent, now_ms) is not None:
            rules.append(Fired("urgent_passes", EVENT) if urgent else Fired("forced_passes", TENANT))
    told = tuple(rules) if len(rules) < 2 else tuple(dict.fromkeys(rules))
    return Verdict(off, open_.why, priority, until_ms, silent, told, spends, reason, digest)


def _held(open_: Switches, user: Preferences, defaults: Preferences, now_ms: int, again: bool) -> list[Fired]:
    """What holds an event that is not urgent, in the order in which it ends."""
    found: list[Fired] = []
    quiet, source = user.quiet_of(defaults)
    at_ms = now_ms
    if not again and open_.digest is not None:
        assert open_.digest_of is not None
        at_ms = open_.digest.next_ms(at_ms)
        rule, whose, about, channels, _ = open_.digest_of
        found.append(Fired(rule, whose, about, channels, at_ms))
    # One after the other suffices: quiet hours end outside of quiet hours, and later than do-not-disturb.
    if user.dnd_until_ms > at_ms:
        at_ms = user.dnd_until_ms
        found.append(Fired("do_not_disturb", USER, None, (), at_ms))
    if quiet is not None:
        until_ms = quiet.until_ms(at_ms)
        if until_ms is not None:
            found.append(Fired("quiet_hours", source, None, (), until_ms))
    return found


def _outside(
    held: list[Fired], closed: QuietHours, kind: str, user: Preferences, defaults: Preferences, now_ms: int
) -> None:
    """Hold until the window of a type is open and the user's quiet hours are over.

    Two that never are at the same time are looked at three times; then the event goes when the last one ends.
    """
    at_ms = (held[-1].until_ms if held else None) or now_ms
    closed = user.local(closed)
    quiet, source = user.quiet_of(defaults)
    for _ in range(3):
        until_ms = closed.until_ms(at_ms)
        if until_ms is None:
            return
        held.append(Fired("type_window", TENANT, kind, (), until_ms))
        at_ms = until_ms
        until_ms = None if quiet is None else quiet.until_ms(at_ms)
        if until_ms is None:
            return
        held.append(Fired("quiet_hours", source, None, (), until_ms))
        at_ms = until_ms


def _limits_of(limits: Limits, kind: str) -> Sequence[tuple[str, Limit]]:
    of_type = limits.types.get(kind)
    if of_type is None:
        return () if limits.user is None else ((ALL, limits.user),)
    return ((kind, of_type),) if limits.user is None else ((ALL, limits.user), (kind, of_type))


def _over(
    spends: Sequence[tuple[str, Limit]], spent: Spent | None, now_ms: int
) -> tuple[Fired, Limit] | None:
    """The limit that is used up for longest."""
    if spent is None:
        return None
    found: tuple[Fired, Limit] | None = None
    latest = now_ms
    for name, limit in spends:
        free_ms = spent.free_ms(name, limit, now_ms)
        if free_ms > latest:
            latest = free_ms
            found = Fired("rate_limit", TENANT, name or None, (), free_ms), limit
    return found


def opened(names: Sequence[str], off: frozenset[str]) -> list[str]:
    """Those of the channels that are not closed."""
    return [name for name in names if _FAMILIES.get(name, name) not in off] if off else list(names)


def fired(verdict: Verdict, names: Sequence[str]) -> list[Fired]:
    """Every rule that fired for an event that would have used these channels, in the order they count."""
    if not verdict.why:
        return list(verdict.rules)
    found: dict[tuple[str, str, str | None], list[str]] = {}
    for name in names:
        rule = verdict.why.get(_FAMILIES.get(name, name))
        if rule is not None:
            found.setdefault(rule[:3], []).append(name)
    switched = [Fired(rule, source, about, tuple(some)) for (rule, source, about), some in found.items()]
    return switched + list(verdict.rules)


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(list[tuple[str, str, str | None, tuple[str, ...], int | None]]).decode


def pack(rules: Sequence[Fired]) -> str:
    """Rules as they are stored with the notification."""
    return _encode(rules).decode()


def unpack(text: str) -> list[Fired]:
    """The rules of `pack`."""
    return [Fired(*one) for one in _decode(text)]
