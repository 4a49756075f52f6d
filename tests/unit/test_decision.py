"""What preferences and a tenant's rules make of an event."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon import preferences as documents
from carillon.attention import DEFERRED, Attention
from carillon.budget import MAX_COUNT, Limit, Spent
from carillon.clock import rfc3339
from carillon.decision import TenantRules, Verdict, family, judge, no_rules, pack, unpack
from carillon.external import CHANNELS, EXTERNAL
from carillon.messages import Event
from carillon.plan import Plan, Reach, asked_for, plan
from carillon.policy import Policy, TenantPolicy, build, validate
from carillon.switches import Fired, Preferences

NOON = round(datetime(2026, 6, 15, 12, tzinfo=ZoneInfo("Europe/Vienna")).timestamp()) * 1000  # a Monday
HOUR = 3_600_000
POLICY = Policy("push_after", 20_000, 0)


def event(
    kind: str = "chat.message", category: str | None = "social", priority: int = 1, **more: Any
) -> Event:
    return Event(bytes(16), "t", "u", 1, kind, category, priority, "", NOON, **more)


def prefs(**document: Any) -> Preferences:
    names = {"everything": "global"}
    whole = {names.get(name, name): value for name, value in document.items()}
    documents.validate(whole)
    return Preferences(whole)


def tenant(**document: Any) -> TenantRules:
    validate(document)
    rules = build(document, POLICY).rules
    return rules if rules is not None else no_rules()


def planned(
    verdict: Verdict | None,
    e: Event | None = None,
    reach: Reach = Reach.OFFLINE,
    providers: Collection[str] = ("fcm",),
    attention: Attention = Attention.VISIBLE,
) -> Plan:
    return plan(
        e or event(), reach, providers=providers, now_ms=NOON, ack_window_ms=5000, grace_end_ms=NOON + 3000,
        lease_ms=30_000, attention=attention, policy=POLICY, verdict=verdict,
    )  # fmt: skip


def decide(
    user: Preferences | None, rules: TenantRules | None = None, e: Event | None = None, **more: Any
) -> Plan:
    e = e or event()
    return planned(judge(e, user, rules or no_rules(), NOON), e, **more)


# -- switches -------------------------------------------------------------------------------------------


def test_a_closed_channel_leaves_the_feed() -> None:
    """Push off: stored, nothing is pushed, and the rule is told."""
    found = decide(prefs(channels={"push": False}))
    assert (found.status, found.channels, found.reason) == ("stored", ("in_app",), "preferences")
    assert found.rules == (Fired("channel_off", "user", "push", ("push",)),)


@pytest.mark.parametrize(
    ("document", "rule", "about"),
    [
        ({"everything": False}, "global_off", None),
        ({"categories": {"social": False}}, "category_off", "social"),
        ({"types": {"chat.message": False}, "categories": {"social": True}}, "type_off", "chat.message"),
    ],
)
def test_what_is_switched_off_as_a_whole_is_filed_away(document: Any, rule: str, about: str | None) -> None:
    """Nothing is shown and nothing is pushed: suppressed, and archived where it can be looked up."""
    for reach in Reach:
        found = decide(prefs(**document), reach=reach)
        assert (found.status, found.channels, found.archived) == ("suppressed", (), True)
        assert found.rules == (Fired(rule, "user", about, ("in_app", "push")),)
        assert found.push_due_ms is None


def test_the_most_specific_word_counts() -> None:
    """Type over category over channel; a bare true says nothing of single channels."""
    off = {"channels": {"push": False}}
    assert decide(prefs(**off, types={"chat.message": {"push": True}})).push_now
    assert decide(prefs(**off, categories={"social": {"channels": {"push": True}}})).push_now
    assert not decide(prefs(**off, types={"chat.message": True})).push_now
    assert decide(prefs(categories={"social": False}, types={"chat.message": True})).push_now
    only_in_app = prefs(categories={"social": {"push": True}}, types={"chat.message": {"push": False}})
    assert decide(only_in_app).status == "stored"


def test_in_app_off_and_push_on_is_pushed_and_filed_away() -> None:
    """The sockets show nothing, the phone rings."""
    found = decide(prefs(channels={"in_app": False}), reach=Reach.LIVE)
    assert (found.status, found.channels, found.archived, found.push_now) == ("queued", ("push",), True, True)


def test_fcm_and_apns_are_push() -> None:
    """A user who wants no push gets it over no provider, as asked nor as a fallback."""
    e = event(channels=["in_app", "fcm"], fallback=["apns"])
    found = decide(prefs(channels={"push": False}), e=e, providers=("fcm", "apns"))
    assert (found.channels, found.chain) == (("in_app",), ())
    assert found.rules[0].channels == ("fcm", "apns")
    assert {family(name) for name in EXTERNAL if EXTERNAL[name].reaches("fcm")} == {"push"}


def test_emergency_only_lets_urgent_ones_through() -> None:
    """A channel for emergencies is closed for all that is not urgent."""
    user = prefs(channels={"push": {"emergencyOnly": True}})
    assert decide(user).rules == (Fired("emergency_only", "user", "push", ("push",)),)
    assert decide(user, e=event(priority=3)).push_now
    assert (
        decide(
            prefs(channels={"push": {"emergencyOnly": True}}, types={"chat.message": {"push": True}})
        ).push_now
        is False
    )


def test_tenant_defaults_lie_beneath() -> None:
    """They hold where the user is silent, and no specific default opens what the user closed."""
    rules = tenant(defaults={"channels": {"push": False}, "types": {"alarm": {"push": True}}})
    assert decide(None, rules).rules == (Fired("channel_off", "tenant", "push", ("push",)),)
    assert decide(None, rules, event("alarm")).push_now
    assert decide(prefs(channels={"push": True}), rules).push_now
    assert not decide(prefs(channels={"push": False}), rules, event("alarm")).push_now
    assert decide(prefs(everything=True), tenant(defaults={"global": False})).push_now


def test_forced_rules_lie_above() -> None:
    """Security mails cannot be switched off, held or limited; what is forced off stays off."""
    rules = tenant(forced={"categories": {"security": True, "spam": {"push": False}}})
    deaf = prefs(
        everything=False,
        quietHours={"start": "00:00", "end": "23:59"},
        doNotDisturbUntil="2099-01-01T00:00:00Z",
    )
    found = decide(deaf, rules, event("login", "security"))
    assert (found.status, found.push_now, found.archived) == ("queued", True, False)
    assert [(r.rule, r.channels) for r in found.rules] == [
        ("forced_on", ("in_app", "push")), ("forced_passes", ()),
    ]  # fmt: skip
    assert decide(prefs(channels={"push": True}), rules, event("x", "spam")).channels == ("in_app",)


def test_priority_override() -> None:
    """A category made urgent passes quiet hours; nothing makes an urgent one less so."""
    user = prefs(categories={"social": {"priority": "urgent"}}, quietHours={"start": "00:00", "end": "23:59"})
    found = decide(user)
    assert (found.push_now, found.priority) == (True, 3)
    assert [r.rule for r in found.rules] == ["priority", "urgent_passes"]
    low = prefs(categories={"social": {"priority": "low"}})
    assert decide(low).priority == 0
    assert decide(low, e=event(priority=3)).priority is None


# -- time -----------------------------------------------------------------------------------------------


def test_quiet_hours_hold_what_leaves_the_system() -> None:
    """Deferred to their end in the user's zone; in-app goes on silently; urgent passes."""
    user = prefs(quietHours={"start": "11:00", "end": "13:30", "timezone": "Europe/Vienna"})
    end = NOON + HOUR * 3 // 2
    assert decide(user) == Plan(
        "deferred", ("in_app", "push"), end, False, DEFERRED, end, "quiet_hours", silent=True,
        rules=(Fired("quiet_hours", "user", None, (), end),),
    )  # fmt: skip
    live = decide(user, reach=Reach.LIVE)
    assert (live.status, live.push_due_ms, live.silent) == ("delivered", end, True)
    assert decide(user, e=event(priority=3)).push_now
    assert decide(user, providers=()).reason is None, "nothing would have been sent"
    assert decide(
        prefs(quietHours=None), tenant(defaults={"quietHours": {"start": "00:00", "end": "23:59"}})
    ).push_now


def test_the_zone_of_the_document_counts_for_all_of_it() -> None:
    """`timezone` holds for quiet hours and digests that name none."""
    user = prefs(timezone="Asia/Tokyo", quietHours={"start": "18:00", "end": "20:00"}, digest="daily")
    assert [r.rule for r in decide(user).rules] == ["digest"]
    assert decide(user).push_due_ms == NOON + 13 * HOUR  # 08:00 in Tokyo is 01:00 in Vienna
    assert (
        decide(prefs(timezone="Asia/Tokyo", quietHours={"start": "18:00", "end": "20:00"})).push_due_ms
        == NOON + HOUR
    )


def test_do_not_disturb_ends_where_quiet_hours_do() -> None:
    """What ends inside of another window goes on with it; every step is told."""
    user = prefs(
        doNotDisturbUntil=rfc3339(NOON + HOUR),
        quietHours={"start": "12:30", "end": "15:00", "timezone": "Europe/Vienna"},
    )
    found = decide(user)
    assert (found.push_due_ms, found.reason) == (NOON + 3 * HOUR, "do_not_disturb")
    assert [r.rule for r in found.rules] == ["do_not_disturb", "quiet_hours"]


def test_a_digest_collects_and_is_not_silent() -> None:
    """In-app comes as ever, the push waits; a type may opt out; its time come, nothing holds it."""
    user = prefs(digest={"frequency": "hourly"}, types={"alarm": {"digest": "instant"}})
    found = decide(user)
    assert (found.push_due_ms, found.gate, found.silent, found.reason) == (
        NOON + HOUR,
        DEFERRED,
        False,
        "digest",
    )
    assert decide(user, e=event("alarm")).push_now
    assert judge(event(), user, no_rules(), NOON, again=True).until_ms is None


# -- limits ---------------------------------------------------------------------------------------------


def test_overflow_is_told_later_or_stays_in_the_feed() -> None:
    """Never silence: a digest when there is room again, or the feed alone; urgent passes."""
    for overflow in ("digest", "feed"):
        rules = tenant(limits={"user": {"count": 2, "windowS": 60}, "overflow": overflow})
        spent = Spent()
        for index in range(3):
            now_ms = NOON + index * 1000
            verdict = judge(event(), None, rules, now_ms, spent)
            for name, limit in verdict.spends:
                spent.spend(name, limit, now_ms)
        found = planned(verdict)
        assert found.silent
        assert found.reason == "rate_limit"
        if overflow == "digest":
            assert (found.status, found.push_due_ms, found.gate) == ("deferred", NOON + 60_000, DEFERRED)
        else:
            assert (found.status, found.channels, found.archived) == ("stored", ("in_app",), False)
        urgent = event(priority=3)
        assert planned(judge(urgent, None, rules, NOON + 3000, spent), urgent).push_now


@given(
    st.lists(st.tuples(st.integers(0, 400), st.sampled_from(["a", "b", "c"])), max_size=80),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(50, 900),
)
def test_no_window_has_more_than_its_limit(
    arrivals: list[tuple[int, str]], count: int, of_type: int, window_ms: int
) -> None:
    """In any window no more pass than configured, for the user and for the type; what fits is never held."""
    limit = {"count": count, "windowS": window_ms / 1000}
    rules = tenant(limits={"user": limit, "types": {"a": {"count": of_type, "windowS": window_ms / 1000}}})
    spent, now_ms = Spent(), NOON
    passed: list[tuple[int, str]] = []
    for pause, kind in arrivals:
        now_ms += pause
        verdict = judge(event(kind), None, rules, now_ms, spent)
        recent = [one for one in passed if one[0] > now_ms - window_ms]
        full = len(recent) >= count or (kind == "a" and sum(k == "a" for _, k in recent) >= of_type)
        assert (verdict.until_ms is not None) == full
        if not full:
            passed.append((now_ms, kind))
            for name, some in verdict.spends:
                spent.spend(name, some, now_ms)
        else:
            assert now_ms < (verdict.until_ms or 0) <= now_ms + window_ms


def test_a_limit_that_changed_counts_what_it_knows() -> None:
    """A smaller limit looks at the last ones, a larger one lets more pass."""
    spent = Spent()
    for t in range(4):
        spent.spend("", Limit(4, 100), t)
    assert spent.free_ms("", Limit(4, 100), 50) == 100
    assert spent.free_ms("", Limit(2, 100), 50) == 102
    assert spent.free_ms("", Limit(MAX_COUNT, 100), 50) == 50


# -- whatever they are ----------------------------------------------------------------------------------

flags = st.booleans()
families = st.sampled_from(documents.CHANNELS)
switch = flags | st.dictionaries(families, flags, max_size=3) | st.fixed_dictionaries(
    {},
    optional={
        "enabled": flags, "channels": st.dictionaries(families, flags, max_size=3),
        "priority": st.sampled_from(["low", "normal", "high", "urgent"]),
        "digest": st.sampled_from(documents.DIGESTS),
    },
)  # fmt: skip
clock = st.builds("{:02}:{:02}".format, st.integers(0, 23), st.sampled_from([0, 30]))
quiet = st.none() | st.fixed_dictionaries(
    {"start": clock, "end": clock}, optional={"days": st.lists(st.sampled_from(documents.DAYS), max_size=7)}
).filter(lambda q: q["start"] != q["end"])
kinds = st.dictionaries(st.sampled_from(["chat.message", "alarm"]), switch, max_size=2)
categories = st.dictionaries(st.sampled_from(["social", "security"]), switch, max_size=2)
document = st.fixed_dictionaries(
    {},
    optional={
        "global": flags,
        "channels": st.dictionaries(
            families, flags | st.fixed_dictionaries({}, optional={"enabled": flags, "emergencyOnly": flags})
        ),
        "categories": categories, "types": kinds, "quietHours": quiet, "timezone": st.just("Europe/Vienna"),
        "digest": st.sampled_from(documents.DIGESTS),
    },
)  # fmt: skip
dnd = st.none() | st.integers(-HOUR, 48 * HOUR).map(lambda ms: rfc3339(NOON + ms))
limits = st.fixed_dictionaries(
    {},
    optional={"user": st.just({"count": 1, "windowS": 60}), "overflow": st.sampled_from(["digest", "feed"])},
)
policies = st.fixed_dictionaries(
    {},
    optional={
        "defaults": document, "limits": limits,
        "forced": st.fixed_dictionaries({}, optional={"categories": categories, "types": kinds}),
    },
)  # fmt: skip
events = st.builds(
    event,
    st.sampled_from(["chat.message", "alarm", "other"]),
    st.sampled_from(["social", "security", None]),
    st.integers(0, 3),
    channels=st.none() | st.lists(st.sampled_from(CHANNELS), min_size=1, max_size=3, unique=True),
    fallback=st.none() | st.lists(st.sampled_from(tuple(EXTERNAL)), max_size=2, unique=True),
)


@given(
    document, dnd, policies, events, st.sampled_from(Reach), st.sets(st.sampled_from(["fcm", "apns"])), flags
)
def test_whatever_the_rules_nothing_gets_lost_and_all_is_told(
    mine: dict[str, Any],
    until: str | None,
    policy: dict[str, Any],
    e: Event,
    reach: Reach,
    providers: set[str],
    used_up: bool,
) -> None:
    """No rule adds a channel; less than without rules is explained; what is held is held for a while only;
    urgent and forced ones are never held; and nothing the user sees depends on chance."""
    user = prefs(
        **{("everything" if k == "global" else k): v for k, v in mine.items()}, doNotDisturbUntil=until
    )
    rules = tenant(**policy)
    spent = Spent()
    if used_up:
        spent.spend("", Limit(1, 60_000), NOON)
    verdict = judge(e, user, rules, NOON, spent)
    assert verdict == judge(e, user, rules, NOON, spent)
    found = planned(verdict, e, reach, providers)
    bare = planned(None, e, reach, providers)
    wanted = asked_for(e)
    assert set(found.channels) <= {*wanted, "in_app"}
    assert not {family(name) for name in [*found.channels, *found.chain]} & verdict.off
    less = set(found.channels) < set(bare.channels) or found.archived
    later = (
        found.push_due_ms is not None
        and bare.push_due_ms is not None
        and found.push_due_ms > bare.push_due_ms
    )
    if less or later or found.silent:
        assert found.rules
    if found.archived:
        assert "in_app" in verdict.off
        assert found.status in ("suppressed", "queued", "deferred")
    else:
        assert found.status != "suppressed"
    urgent = e.priority == 3
    if urgent or any(r.rule == "forced_on" for r in verdict.why.values()):
        assert verdict.until_ms is None
        assert not verdict.silent
    if verdict.until_ms is not None:
        assert NOON < verdict.until_ms <= NOON + 9 * 24 * HOUR
        if found.push_due_ms is not None:
            assert (found.gate, found.push_due_ms, found.push_now) == (DEFERRED, verdict.until_ms, False)
            step = verdict
            for _ in range(3):  # a limit may go on after the night, and a night after a limit
                if step.until_ms is not None:
                    step = judge(e, user, rules, step.until_ms, spent, again=True)
            assert step.until_ms is None, "at its end nothing that is known now holds it any more"
    assert unpack(pack(found.rules)) == list(found.rules)


@given(events, st.sampled_from(Reach), st.sets(st.sampled_from(["fcm", "apns"])), st.sampled_from(Attention))
def test_without_rules_the_plan_is_the_plain_one(
    e: Event, reach: Reach, providers: set[str], attention: Attention
) -> None:
    """A document and a policy that say nothing change nothing."""
    verdict = judge(e, prefs(), no_rules(), NOON)
    assert planned(verdict, e, reach, providers, attention) == planned(None, e, reach, providers, attention)


def test_a_tenant_without_rules_has_none_to_look_at() -> None:
    """The hot path asks one attribute."""
    assert TenantPolicy(POLICY, {}).rules is None
    assert build({"holdS": 3}, POLICY).rules is None


@given(
    st.sampled_from(("hourly", "daily", "weekly")),
    st.sampled_from(("Europe/Vienna", "Asia/Kolkata", "America/Lima", "Australia/Lord_Howe")),
    st.sampled_from((None, "Asia/Tokyo")),
    st.integers(0, 400 * 24 * 3_600_000),
    st.booleans(),
)
def test_a_default_digest_is_due_where_the_user_is(
    frequency: str, zone: str, default_zone: str | None, after_ms: int, by_profile: bool
) -> None:
    """As if the user had asked for it: the same moment, whether preferences or the profile say the zone."""
    now_ms = 1_750_000_000_000 + after_ms
    digest = {"digest": {"frequency": frequency, "at": "08:00", "day": "wed"}}
    rules = tenant(defaults=digest | ({"timezone": default_zone} if default_zone else {}))
    here = Preferences({}, zone) if by_profile else Preferences({"timezone": zone})
    own = Preferences(digest, zone)
    default = judge(event(), here, rules, now_ms)
    assert default.until_ms == judge(event(), own, rules, now_ms).until_ms
    nobody = judge(event(), None, rules, now_ms)
    assert nobody.until_ms == judge(event(), Preferences(digest, default_zone), rules, now_ms).until_ms
    assert {one.source for one in default.rules} == {"tenant"}
