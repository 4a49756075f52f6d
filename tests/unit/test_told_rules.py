"""What is told of a decision is what decided: rules of time, of privilege, and of how the user is reached."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from carillon import explain
from carillon.attention import ALWAYS, DEFERRED, Attention
from carillon.budget import Limit, Spent
from carillon.clock import rfc3339
from carillon.decision import Verdict, judge, no_rules
from carillon.external import CHANNELS, EXTERNAL
from carillon.messages import Event
from carillon.plan import Plan, Reach, plan
from carillon.policy import Policy
from carillon.settings import WHEN_AWAY
from carillon.switches import Fired, Preferences
from tests.unit.test_decision import tenant

NOON = round(datetime(2026, 6, 15, 12, tzinfo=ZoneInfo("Europe/Vienna")).timestamp()) * 1000
MINUTE, HOUR = 60_000, 3_600_000
ACK_MS, GRACE_MS, LEASE_MS, DELAY_MS = 5000, 3000, 30_000, 20_000
POLICY = Policy("push_after", DELAY_MS, 60_000)
PASSES = ("urgent_passes", "forced_passes")


def event(priority: int = 1, **more: Any) -> Event:
    return Event(bytes(16), "t", "u", 1, "chat", "social", priority, "", NOON, **more)


def planned(
    verdict: Verdict | None,
    e: Event,
    reach: Reach,
    providers: set[str],
    attention: Attention = Attention.VISIBLE,
    policy: Policy = POLICY,
) -> Plan:
    return plan(
        e, reach, providers=providers, now_ms=NOON, ack_window_ms=ACK_MS, grace_end_ms=NOON + GRACE_MS,
        lease_ms=LEASE_MS, attention=attention, policy=policy, verdict=verdict,
    )  # fmt: skip


# -- do-not-disturb -------------------------------------------------------------------------------------

ZONES = st.sampled_from(["UTC", "Europe/Vienna", "Asia/Kathmandu", "America/St_Johns"])
CLOCK = st.builds("{:02}:{:02}".format, st.integers(0, 23), st.sampled_from([0, 15, 30, 45]))
NIGHT = st.none() | st.tuples(CLOCK, CLOCK).filter(lambda two: two[0] != two[1])


@settings(max_examples=300)
@given(
    st.integers(-3, 3) | st.integers(-60, 30 * 60).map(lambda minutes: minutes * MINUTE),
    NIGHT,
    ZONES,
    st.sampled_from([0, 1, 1, 2, 3]),
    st.sampled_from(Reach),
)
def test_do_not_disturb_holds_until_its_time_and_no_longer(
    ahead_ms: int, night: tuple[str, str] | None, zone: str, priority: int, reach: Reach
) -> None:
    """To the millisecond; what ends inside of quiet hours waits for their end; the app shows it silently, and
    urgent ones pass."""
    until_ms = NOON + ahead_ms
    document: dict[str, Any] = {"doNotDisturbUntil": rfc3339(until_ms), "timezone": zone}
    if night is not None:
        document["quietHours"] = {"start": night[0], "end": night[1]}
    user = Preferences(document)
    e = event(priority)
    verdict = judge(e, user, no_rules(), NOON)
    expected: list[Fired] = []
    at_ms = NOON
    if until_ms > NOON:
        at_ms = until_ms
        expected.append(Fired("do_not_disturb", "user", None, (), at_ms))
    quiet_ms = None if user.quiet is None else user.quiet.until_ms(at_ms)
    if quiet_ms is not None:
        at_ms = quiet_ms
        expected.append(Fired("quiet_hours", "user", None, (), at_ms))
    held = bool(expected)
    if priority == 3:
        expected = [Fired("urgent_passes", "event")] if held else []
        held = False
    assert list(verdict.rules) == expected
    assert (verdict.until_ms, verdict.silent) == (at_ms if held else None, held)
    assert verdict.reason == (expected[0].rule if held else None)
    found = planned(verdict, e, reach, {"fcm"})
    assert found.channels == ("in_app", "push"), "nothing is left out, it waits"
    assert (found.gate == DEFERRED) == held
    assert found.silent == held
    if held:
        assert (found.push_due_ms, found.hold_until_ms, found.push_now) == (at_ms, at_ms, False)
        assert found.status == ("delivered" if reach is Reach.LIVE else "deferred")


# -- who passes -----------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, "hourly", "daily"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["digest", "feed"]),
    st.sampled_from(["nobody", "urgent", "made urgent", "forced"]),
)
def test_who_passes_passes_everything_and_says_so(
    night: bool, dnd: bool, digest: str | None, window: bool, used_up: bool, overflow: str, who: str
) -> None:
    """What is urgent (by itself, or made so) or forced is held by nothing, and tells that it would have been;
    where nothing would have held it, nothing is told."""
    document: dict[str, Any] = {"timezone": "Europe/Vienna"}
    if night:
        document["quietHours"] = {"start": "11:00", "end": "13:00"}
    if dnd:
        document["doNotDisturbUntil"] = rfc3339(NOON + HOUR)
    if digest is not None:
        document["digest"] = digest
    policy: dict[str, Any] = {"limits": {"user": {"count": 1, "windowS": 60}, "overflow": overflow}}
    if window:
        policy["types"] = {"chat": {"window": {"start": "18:00", "end": "20:00"}}}
    spent = Spent()
    if used_up:
        spent.spend("", Limit(1, MINUTE), NOON - 1)
    usual = judge(event(), Preferences(document), tenant(**policy), NOON, spent)
    assert not any(rule.rule in PASSES for rule in usual.rules)
    held = night or dnd or digest is not None or window or used_up
    assert (usual.reason is not None) == held
    if who == "nobody":
        return
    if who == "made urgent":
        document["categories"] = {"social": {"priority": "urgent"}}
    if who == "forced":
        policy["forced"] = {"categories": {"social": True}}
    e = event(3 if who == "urgent" else 1)
    verdict = judge(e, Preferences(document), tenant(**policy), NOON, spent)
    assert (verdict.until_ms, verdict.silent, verdict.reason, verdict.digest) == (None, False, None, None)
    assert not verdict.off
    passes = [rule for rule in verdict.rules if rule.rule in PASSES]
    which = Fired("forced_passes", "tenant") if who == "forced" else Fired("urgent_passes", "event")
    assert passes == ([which] if held else [])
    overridden = [Fired("priority", "user", "urgent")] if who == "made urgent" else []
    assert list(verdict.rules) == overridden + passes
    assert [name for name, _ in verdict.spends] == [""], "it counts all the same"
    assert planned(verdict, e, Reach.OFFLINE, {"fcm"}).push_now


# -- how the user is reached ----------------------------------------------------------------------------

WHEN_DUE = ("without_app", "urgent", "grace", "offline", "viewing", "away", "acknowledgement")
VERDICTS = st.sampled_from(
    [
        *([{}] * 4),
        {"channels": {"push": False}},
        {"channels": {"in_app": False}},
        {"types": {"chat": False}},
        {"doNotDisturbUntil": rfc3339(NOON + HOUR)},
        {"digest": "daily"},
        {"categories": {"social": {"priority": "urgent"}}},
    ]
)
EVENTS = st.builds(
    event,
    st.sampled_from([0, 1, 2, 3]),
    channels=st.sampled_from([None, None, None])
    | st.lists(st.sampled_from(CHANNELS), min_size=1, max_size=3, unique=True),
    fallback=st.sampled_from([None, None])
    | st.lists(st.sampled_from(tuple(EXTERNAL)), max_size=2, unique=True),
)


@settings(max_examples=500)
@given(
    VERDICTS,
    EVENTS,
    st.sampled_from([Reach.LIVE, Reach.LIVE, Reach.GRACE, Reach.OFFLINE]),
    st.sets(st.sampled_from(["fcm", "apns"])),
    st.sampled_from([a for a in Attention if a is not Attention.OFFLINE]),
    st.builds(Policy, st.sampled_from(WHEN_AWAY), st.just(DELAY_MS), st.sampled_from([0, 60_000])),
)
def test_circumstances_tell_when_and_where_it_goes(
    document: dict[str, Any],
    e: Event,
    reach: Reach,
    providers: set[str],
    attention: Attention,
    policy: Policy,
) -> None:
    """Exactly one rule says when what leaves the system is due, if no other holds it, and that is when it is;
    every channel without a target is named; connected is told of those that are."""
    verdict = judge(e, Preferences(document), no_rules(), NOON) if document else None
    found = planned(verdict, e, reach, providers, attention, policy)
    told = explain.of_plan(found, e.channels, e.fallback, e.priority, reach, attention, providers)
    assert told[: len(found.rules)] == list(found.rules)
    rest = {rule.rule: rule for rule in told[len(found.rules) :]}
    assert len(rest) == len(told) - len(found.rules)
    assert ("live" in rest) == (reach is Reach.LIVE and not found.archived)
    asked = [*(e.channels if e.channels is not None else ["in_app", "push"]), *(e.fallback or ())]
    outside = {name for name in asked if name != "in_app"}
    assert ("not_asked" in rest) == (not outside)
    lacking = {n for n in outside if not any(EXTERNAL[n].reaches(provider) for provider in providers)}
    assert set(rest["no_target"].channels if "no_target" in rest else ()) == lacking
    due = [name for name in WHEN_DUE if name in rest]
    if found.push_due_ms is None or found.gate == DEFERRED:
        assert due == []
        return
    assert len(due) == 1, "one reason for one time"
    (why,) = due
    later_ms = found.push_due_ms - NOON
    alone = found.archived or (e.channels is not None and "in_app" not in e.channels)
    assert (why == "without_app") == alone
    if why in ("without_app", "urgent", "offline"):
        assert (later_ms, found.push_now) == (LEASE_MS, True)
    if why == "urgent":
        assert found.gate == ALWAYS
        assert 3 in (e.priority, found.priority)
    elif why == "offline":
        assert reach is Reach.OFFLINE
    elif why == "grace":
        assert (reach, later_ms) == (Reach.GRACE, GRACE_MS)
    elif why == "viewing":
        assert (attention, found.reason, later_ms) == (Attention.VIEWING, "viewing", ACK_MS)
    elif why == "acknowledgement":
        assert (reach, later_ms, found.gate) == (Reach.LIVE, ACK_MS, None)
    elif why == "away":
        assert rest[why].about in ("hidden", "idle")
        assert rest[why].about == attention.name.lower()
        assert later_ms == {"in_app": ACK_MS, "both": LEASE_MS, "push_after": DELAY_MS}[policy.when_away]
    for rule in told:
        sentence = explain.words(rule)
        assert sentence.endswith(".")
        assert not {"{", "}"} & set(sentence)


@given(
    st.sampled_from(Reach),
    st.sampled_from(Attention),
    st.sets(st.sampled_from(["fcm", "apns", "webpush"])),
)
def test_a_receipt_tells_what_it_was_made_of(reach: Reach, attention: Attention, providers: set[str]) -> None:
    """How the user was reached, where the user looked, and where there were targets; in 15 bits, never 0."""
    receipt = explain.receipt_of(reach, attention, providers)
    assert 0 < receipt < 1 << 15
    assert explain.read_receipt(receipt) == (reach, attention, providers)
    assert explain.circumstance(explain.providers_receipt(providers), reach, attention) == receipt


RULES = sorted(explain.RULES)
HOLDING = ("do_not_disturb", "quiet_hours", "type_window", "digest", "rate_limit", "overflow")
ENDING = ("expires", "expires_first", "expired", "scheduled")
ABOUT = st.none() | st.sampled_from(["social", "chat.message", "daily"])


@given(
    st.sampled_from(RULES), st.sampled_from(["user", "tenant", "event", "system"]), ABOUT,
    st.lists(st.sampled_from(["in_app", "push", "fcm"]), unique=True, max_size=3).map(tuple),
    st.integers(0, 4_000_000_000_000),
)  # fmt: skip
def test_words_have_all_that_the_data_have(
    rule: str, source: str, about: str | None, channels: tuple[str, ...], until_ms: int
) -> None:
    """What a rule is about, its channels and its end are in its sentence, wherever the sentence speaks of
    them."""
    text = explain.RULES[rule]
    assume(about is not None or "{about}" not in text)
    sentence = explain.words(Fired(rule, source, about, channels, until_ms))
    assert ("{about}" not in text) or (about or "") in sentence
    assert ("{channels}" not in text) or all(name in sentence for name in channels)
    assert (rule in (*HOLDING, *ENDING)) == (rfc3339(until_ms) in sentence), "what holds says until when"
    assert "None" not in sentence
