"""Beyond the rate of a tenant: which events of a request that is, and what becomes of them."""

from __future__ import annotations

import asyncio
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.shard_policies import NO_RULES
from actors.shard_users import read_preferences
from carillon.attention import Attention
from carillon.budget import Spent
from carillon.clock import ManualClock
from carillon.decision import judge, pack, unpack
from carillon.digest import OVERFLOW
from carillon.errors import InvalidInputError
from carillon.events import Later, ProblemError, Request
from carillon.explain import told
from carillon.limits import ALONE, OVERFLOWS, PASSES, check_overflow, key_limit, tenant_limit
from carillon.messages import Event
from carillon.metrics import Stats
from carillon.plan import Plan, Reach, plan
from carillon.policy import Policy
from carillon.problems import Problem
from carillon.rate import TokenBucket
from carillon.settings import RedisSettings
from carillon.tenant_rules import rules_of
from serve.limits import admit, admit_events
from stores.redis.rate_limiter import RateLimiter

NOW = 1_781_604_000_000
URGENT = 3
COLLECT_MS = 90_000


def event(priority: int = 1, over: int = 0, **more: Any) -> Event:
    return Event(bytes(16), "acme", "u", 1, "offer", "news", priority, "", NOW, over=over, **more)


def services(clock: ManualClock) -> Any:
    return SimpleNamespace(limits=RateLimiter(RedisSettings(url=""), 0.0, clock), stats=Stats())


def document(rate: float, burst: int, overflow: str) -> dict[str, Any]:
    return {"ratePerS": rate, "burst": burst, "overflow": overflow, "collectS": COLLECT_MS / 1000}


# -- the bucket -------------------------------------------------------------------------------------------


@given(
    rate=st.floats(0.1, 50.0),
    burst=st.integers(1, 20),
    split=st.booleans(),
    steps=st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(0, 8), st.integers(0, 8)), max_size=60),
)
def test_urgent_ones_pass_and_count(
    rate: float, burst: int, split: bool, steps: list[tuple[float, int, int]]
) -> None:
    """All urgent ones pass; of the others, over any time, no more than what the rate and a burst leave (and
    what the last batch was larger than what was left, if it is not split); they pass again after two bursts'
    time at most, and those who are told to wait for it do."""
    clock = ManualClock()
    bucket = TokenBucket(rate, burst, clock)
    passed: list[tuple[float, int]] = []
    for wait_s, urgent, others in steps:
        clock.advance(wait_s)
        within, some, again_s = bucket.admit(urgent, others, split=split)
        assert 0 <= within <= urgent
        assert 0 <= some <= others
        assert split or some in (0, others)
        assert again_s >= 0.0
        passed.append((clock.monotonic(), within + some))
    largest = max((others for _, _, others in steps), default=0)
    slack = 0 if split else max(0, largest - 1)
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            total = sum(n for _, n in passed[first : last + 1])
            assert total <= rate * (passed[last][0] - passed[first][0]) + burst + slack + 1e-6
    debt_s = (2 * burst + slack + 1) / rate
    clock.advance(min(bucket.admit(0, 0, split=split)[2], debt_s) * 1.000001 + 1e-6)
    assert bucket.admit(0, 1, split=split)[1] == 1


def test_without_a_rate_everything_passes() -> None:
    """A rate of 0 is none."""
    assert TokenBucket(0.0, 1, ManualClock()).admit(7, 9, split=True) == (7, 9, 0.0)


# -- which events of a request ----------------------------------------------------------------------------


@given(
    rate=st.floats(0.1, 20.0),
    burst=st.integers(1, 12),
    overflow=st.sampled_from(OVERFLOWS),
    keyed=st.booleans(),
    batches=st.lists(
        st.tuples(
            st.floats(0.0, 2.0),
            st.lists(st.tuples(st.sampled_from([0, 1, 2, URGENT]), st.booleans()), min_size=1, max_size=12),
        ),
        min_size=1,
        max_size=15,
    ),
)
@settings(deadline=None)
def test_every_event_of_a_request_has_one_fate(
    rate: float, burst: int, overflow: str, keyed: bool, batches: list[tuple[float, list[tuple[int, bool]]]]
) -> None:
    """An urgent one is never refused; of the others the first ones are within and the rest are beyond, all in
    the way the operator chose, nothing is lost; what is kept for later is within or refused. A request is
    refused as a whole only if none of it passes, and its key is charged for what passes alone."""

    async def run() -> None:
        clock = ManualClock()
        made = services(clock)
        own = key_limit("acme", "k", 1e6, 10**6) if keyed else ()
        limits = own + tenant_limit("acme", document(rate, burst, overflow))
        within: list[tuple[float, int]] = []
        charged = 0
        for wait_s, kinds in batches:
            clock.advance(wait_s)
            events = [event(priority) for priority, _ in kinds]
            later = {n: Later(NOW, "") for n, (_, is_later) in enumerate(kinds) if is_later}
            refused: Problem | None = None
            parsed = Request(events, [], later)
            try:
                parsed = await admit_events(made, limits, parsed)
            except ProblemError as exc:
                refused = exc.problem
            if refused is not None:
                assert (refused.status, refused.code) == (429, "rate_limited")
                assert refused.retry_after_s > 0
                assert all(one.priority < URGENT and one.over == 0 for one in events)
                assert overflow == "reject" or len(later) == len(events)
                continue
            beyond = parsed.beyond
            charged += len(events) - len(beyond)
            assert len(beyond) < len(events)
            urgent = [one for one in events if one.priority == URGENT]
            others = [n for n, one in enumerate(events) if one.priority < URGENT]
            assert not any(events[n].priority == URGENT for n in beyond)
            marked = [one.over != 0 for one in urgent]
            assert marked == sorted(marked), "the first ones are within"
            fates = [n in beyond or events[n].over != 0 for n in others]
            assert fates == sorted(fates), "in the order of the batch"
            for n in others:
                if events[n].over or n in beyond:
                    assert (n in beyond) == (overflow == "reject" or n in later)
            if overflow == "reject":
                assert len(set(fates)) <= 1, "together, or none"
                assert all(one.over in (0, PASSES) for one in urgent)
            else:
                assert {one.over for one in events} <= {0, ALONE if overflow == "feed" else COLLECT_MS}
            for outcome in beyond.values():
                assert (outcome.status, outcome.code) == ("failed", "rate_limited")
                assert outcome.retry_after_s > 0
            count = sum(one.over == 0 and n not in beyond for n, one in enumerate(events))
            within.append((clock.monotonic(), count))
        slack = 11 if overflow == "reject" else 0
        for first in range(len(within)):
            for last in range(first, len(within)):
                total = sum(n for _, n in within[first : last + 1])
                assert total <= rate * (within[last][0] - within[first][0]) + burst + slack + 1e-6
        if keyed and charged:
            # Nothing ran while we looked: what the key has left says what it was charged, refills aside.
            bucket = made.limits._keys["k"].bucket
            assert bucket._tokens >= 10**6 - charged - 1e-3

    asyncio.run(run())


async def test_a_keys_own_limit_holds_for_urgent_ones_too() -> None:
    """It is the tenant's fence around one of its services; nothing is taken from the tenant's rate then."""
    made = services(ManualClock())
    limits = key_limit("acme", "k", 0.01, 1) + tenant_limit("acme", document(0.01, 2, "feed"))
    await admit_events(made, limits, Request([event(URGENT)], None))
    with pytest.raises(ProblemError) as refused:
        await admit_events(made, limits, Request([event(URGENT)], None))
    assert "this API key" in refused.value.problem.detail
    parsed = await admit_events(made, limits[1:], Request([event()], None))
    assert parsed.events[0].over == 0


async def test_what_is_one_request_for_many_passes_if_it_is_urgent() -> None:
    """A broadcast, a schedule: refused beyond the rate whatever the overflow; urgent ones pass and count."""
    made = services(ManualClock())
    limits = tenant_limit("acme", document(0.01, 5, "digest"))
    await admit(made, limits, 50, urgent=True)
    with pytest.raises(ProblemError):
        await admit(made, limits, 1)
    await admit(made, limits, 50, urgent=True)
    assert made.stats.counters['events_over_limit{became="passed",tenant="acme"}'] == 95


def test_the_document() -> None:
    """Refused unless the operator says otherwise; a digest collects for a minute unless it says otherwise."""
    (limit,) = tenant_limit("acme", {"ratePerS": 1.0, "burst": 1})
    assert (limit.overflow, limit.over, limit.collect_ms) == ("reject", PASSES, 60_000)
    (limit,) = tenant_limit("acme", document(1.0, 1, "feed"))
    assert limit.over == ALONE
    (limit,) = tenant_limit("acme", document(1.0, 1, "digest"))
    assert limit.over == COLLECT_MS
    for overflow, collect_s in (("drop", None), (None, 0.0), (None, 1e9), (None, float("nan"))):
        with pytest.raises(InvalidInputError):
            check_overflow(overflow, collect_s)
    check_overflow("digest", 1.0)


# -- what becomes of one ----------------------------------------------------------------------------------

DOCUMENTS = (
    None,
    "{}",
    '{"quietHours": {"start": "00:00", "end": "23:59"}}',
    '{"digest": "hourly"}',
    '{"channels": {"push": false}}',
    '{"types": {"offer": false}}',
    '{"categories": {"news": {"priority": "urgent"}}}',
    '{"global": false}',
)
POLICIES: tuple[dict[str, Any], ...] = (
    {},
    {"limits": {"user": {"count": 1, "windowS": 3600}}},
    {"limits": {"types": {"offer": {"count": 1, "windowS": 60}}, "overflow": "feed"}},
    {"forced": {"types": {"offer": True}}},
    {"forced": {"types": {"offer": {"push": False}}}},
    {"defaults": {"digest": "daily"}},
)
CHANNELS = st.sampled_from((None, ["push"], ["in_app"], ["in_app", "push", "email"]))


def decided(
    preferences: str | None,
    policy: dict[str, Any],
    one: Event,
    reach: Reach,
    spent: Spent | None,
    now_ms: int,
) -> Plan:
    user = None if preferences is None else read_preferences(preferences, None)
    rules = rules_of(policy) or NO_RULES
    return plan(
        one, reach, providers=("fcm",), now_ms=now_ms, ack_window_ms=5000, grace_end_ms=now_ms + 3000,
        lease_ms=30_000, attention=Attention.VISIBLE, policy=Policy("push_after", 20_000, 0),
        verdict=judge(one, user, rules, now_ms, spent),
    )  # fmt: skip


@given(
    preferences=st.sampled_from(DOCUMENTS),
    policy=st.sampled_from(POLICIES),
    priority=st.sampled_from([1, URGENT]),
    over=st.sampled_from([ALONE, PASSES, COLLECT_MS]),
    channels=CHANNELS,
    reach=st.sampled_from(Reach),
    spent=st.lists(st.integers(0, 7_200_000), max_size=4),
    open_ms=st.sampled_from([0, -5, 700, 4_000_000]),
)
@settings(max_examples=1500)
def test_beyond_the_rate_is_never_silence(
    preferences: str | None,
    policy: dict[str, Any],
    priority: int,
    over: int,
    channels: list[str] | None,
    reach: Reach,
    spent: list[int],
    open_ms: int,
) -> None:
    """Whatever users and tenant want: an urgent or forced event is decided as if it were within the rate, and
    says so; another one goes to the feed, alone or until its digest is told; nothing is louder than it would
    have been within the rate, and each says why."""
    had = Spent()
    had.digest_ms = NOW + open_ms
    for name in ("", "offer"):
        had._moments[name] = deque(sorted(NOW - ago for ago in spent))
    beyond = event(priority, over, channels=channels)
    plain = event(priority, channels=channels)
    found = decided(preferences, policy, beyond, reach, had, NOW)
    usual = decided(preferences, policy, plain, reach, had, NOW)
    names = [one.rule for one in found.rules]
    assert unpack(pack(found.rules)) == list(found.rules)
    assert all(one["words"] for one in told(found.rules))
    urgent = priority == URGENT or usual.priority == URGENT
    forced = policy.get("forced") == {"types": {"offer": True}}
    if urgent or forced or over == PASSES:
        assert found.reason == usual.reason, "nothing is less for it"
        passes = "urgent_passes" if urgent or over == PASSES else "forced_passes"
        assert passes in names
        assert "tenant_limit" not in names
        assert [r for r in found.rules if r.rule != passes] == [r for r in usual.rules if r.rule != passes]
        assert (found.push_due_ms, found.push_now, found.channels) == (
            usual.push_due_ms, usual.push_now, usual.channels,
        )  # fmt: skip
        return
    assert found.archived == usual.archived, "in the feed as it would have been"
    outside = set(found.channels) - {"in_app"}
    assert outside <= set(usual.channels) | {"push", "email"}
    if over == ALONE:
        assert "tenant_limit" in names
        assert not outside
        assert (found.push_due_ms, found.digest) == (None, None)
        assert found.silent or found.archived
        assert found.archived or found.channels == ("in_app",)
        assert not found.chain
    elif "tenant_limit" in names:
        assert not found.push_now
        due = [one.until_ms for one in found.rules if one.rule == "overflow"]
        assert bool(due) == bool(outside), "a digest is told of where there is one"
        if outside:
            (due_ms,) = due
            assert due_ms == (NOW + open_ms if open_ms > 0 else NOW + COLLECT_MS)
            assert (found.digest, found.push_due_ms) == (OVERFLOW, due_ms)
            assert found.reason == "tenant_limit"
    else:
        # Something holds it anyway: it leaves the system when that ends, as it would have.
        assert (found.push_due_ms, found.digest) == (usual.push_due_ms, usual.digest)
        assert not found.push_now


def told_of(preferences: str | None, one: Event, providers: tuple[str, ...] = ("fcm",)) -> tuple[Any, ...]:
    user = None if preferences is None else read_preferences(preferences, None)
    found = plan(
        one, Reach.OFFLINE, providers=providers, now_ms=NOW, ack_window_ms=5000, grace_end_ms=NOW,
        lease_ms=30_000, attention=Attention.VISIBLE, policy=Policy("push_after", 20_000, 0),
        verdict=judge(one, user, NO_RULES, NOW),
    )  # fmt: skip
    return found.status, found.reason, [rule.rule for rule in found.rules]


@pytest.mark.parametrize("fcm", [(), ("fcm",)])
def test_what_passes_was_not_closed_by_preferences(fcm: tuple[str, ...]) -> None:
    """For the app alone, urgent beyond the rate: nothing is less, and no reason is told."""
    for over in (PASSES, ALONE, COLLECT_MS):
        urgent = event(URGENT, over, channels=["in_app"])
        assert told_of(None, urgent, fcm) == ("stored", None, ["urgent_passes"])
    louder = '{"categories": {"news": {"priority": "high"}}}'
    assert told_of(louder, event(channels=["in_app"]), fcm) == ("stored", None, ["priority"])
    closed = event(URGENT, PASSES)
    no_push = '{"channels": {"push": false}}'
    assert told_of(no_push, closed, fcm) == ("stored", "preferences", ["channel_off", "urgent_passes"])


def test_who_closed_what_is_suppressed() -> None:
    """Not wanted in the app, and beyond the rate: the rate's doing, unless there was no push to close."""
    no_app, neither = '{"channels": {"in_app": false}}', '{"channels": {"in_app": false, "push": false}}'
    beyond = event(over=ALONE)
    rules = ["channel_off", "tenant_limit"]
    assert told_of(no_app, beyond) == ("suppressed", "tenant_limit", rules)
    assert told_of(no_app, beyond, ()) == ("suppressed", "preferences", rules)
    assert told_of(no_app, event(over=ALONE, channels=["in_app"])) == ("suppressed", "preferences", rules)
    assert told_of(neither, beyond) == ("suppressed", "preferences", [*rules[:1], *rules])
    assert told_of(no_app, event()) == ("queued", None, ["channel_off"])


def test_no_digest_is_told_of_where_nothing_leaves_the_system() -> None:
    """Beyond the rate, for the app alone or without a target: the rate is told, and no digest."""
    assert told_of(None, event(over=COLLECT_MS))[2] == ["tenant_limit", "overflow"]
    for one, providers in (
        (event(over=COLLECT_MS, channels=["in_app"]), ("fcm",)),
        (event(over=COLLECT_MS), ()),
    ):
        assert told_of(None, one, providers) == ("stored", None, ["tenant_limit"])
