"""Where a notification goes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from carillon.attention import ALWAYS, ANY, SEEN, Attention
from carillon.messages import Event
from carillon.plan import Plan, Reach, plan
from carillon.policy import Policy
from carillon.settings import WHEN_AWAY

NOW = 1_700_000_000_000


PUSH_AFTER = Policy("push_after", 20_000, 0)


def event(channels: list[str] | None = None, priority: int = 1) -> Event:
    return Event(bytes(16), "t", "u", 1, "x", None, priority, "", NOW, channels=channels)


def decide(
    reach: Reach,
    has_target: bool = True,
    channels: list[str] | None = None,
    *,
    priority: int = 1,
    attention: Attention = Attention.VISIBLE,
    policy: Policy = PUSH_AFTER,
) -> Plan:
    return plan(
        event(channels, priority), reach, has_target=has_target, now_ms=NOW, ack_window_ms=5000,
        grace_end_ms=NOW + 3000, lease_ms=30_000, attention=attention, policy=policy,
    )  # fmt: skip


def test_live_gets_its_push_after_the_acknowledgement_window() -> None:
    """Attached: handed to the sockets, the push waits for the acknowledgement."""
    assert decide(Reach.LIVE) == Plan("delivered", ("in_app", "push"), NOW + 5000, False)


def test_grace_holds_the_push_to_its_end() -> None:
    """The last device just left: it may be back before grace ends."""
    assert decide(Reach.GRACE) == Plan("queued", ("in_app", "push"), NOW + 3000, False)


def test_offline_is_pushed_at_once() -> None:
    """Nobody there: born claimed, under a lease, its job on the way right after the commit."""
    assert decide(Reach.OFFLINE) == Plan("queued", ("in_app", "push"), NOW + 30_000, True)


def test_without_a_target_nothing_is_pushed() -> None:
    """No push target: the sockets if somebody is there, else the feed alone."""
    assert decide(Reach.LIVE, has_target=False) == Plan("delivered", ("in_app",))
    assert decide(Reach.GRACE, has_target=False) == Plan("stored", ("in_app",))
    assert decide(Reach.OFFLINE, has_target=False) == Plan("stored", ("in_app",))


def test_in_app_alone_is_never_pushed() -> None:
    """The event names its channels: push is not among them."""
    assert decide(Reach.OFFLINE, channels=["in_app"]) == Plan("stored", ("in_app",))
    assert decide(Reach.LIVE, channels=["in_app"]) == Plan("delivered", ("in_app",))


def test_push_alone_waits_for_nobody() -> None:
    """Push without in-app goes out at once, also to a user who is there."""
    for reach in Reach:
        assert decide(reach, channels=["push"]) == Plan("queued", ("push",), NOW + 30_000, True)


def test_a_user_who_looks_away_gets_what_the_policy_says() -> None:
    """All devices hidden or idle: in-app only, both at once, or a push after the delay unless seen."""
    for attention in (Attention.HIDDEN, Attention.IDLE):
        in_app, both = Policy("in_app", 0, 0), Policy("both", 0, 0)
        assert decide(Reach.LIVE, attention=attention, policy=in_app) == Plan(
            "delivered", ("in_app", "push"), NOW + 5000, False, ANY
        )
        assert decide(Reach.LIVE, attention=attention, policy=both) == Plan(
            "delivered", ("in_app", "push"), NOW + 30_000, True, ALWAYS
        )
        assert decide(Reach.LIVE, attention=attention) == Plan(
            "delivered", ("in_app", "push"), NOW + 20_000, False, SEEN
        )


def test_an_item_on_screen_is_told_so() -> None:
    """The device shows this very item: the answer says why no phone rings."""
    found = decide(Reach.LIVE, attention=Attention.VIEWING, policy=Policy("both", 0, 60_000))
    assert (found.reason, found.push_due_ms, found.hold_until_ms) == ("viewing", NOW + 5000, NOW + 60_000)


@given(
    st.sampled_from(Reach),
    st.booleans(),
    st.one_of(st.none(), st.lists(st.sampled_from(["in_app", "push"]), unique=True)),
    st.integers(0, 3),
    st.sampled_from([a for a in Attention if a is not Attention.OFFLINE]),
    st.builds(Policy, st.sampled_from(WHEN_AWAY), st.integers(0, 90_000), st.integers(0, 90_000)),
)
def test_a_push_is_planned_exactly_where_it_is_wanted_and_possible(
    reach: Reach,
    has_target: bool,
    channels: list[str] | None,
    priority: int,
    attention: Attention,
    policy: Policy,
) -> None:
    """Liveness, attention and policy move only the time of a push and what may cancel it, never whether there
    is one (G6): unknown never silences, urgent always goes, suppression is bounded."""
    found = decide(reach, has_target, channels, priority=priority, attention=attention, policy=policy)
    wanted = has_target and (channels is None or "push" in channels)
    assert (found.push_due_ms is not None) == wanted == ("push" in found.channels)
    assert found.push_now <= wanted
    assert found.status in {"delivered", "queued", "stored"}
    assert (found.status == "delivered") <= (reach is Reach.LIVE)
    assert (found.reason == "viewing") <= (attention is Attention.VIEWING)
    if found.push_due_ms is None:
        assert found.gate is found.hold_until_ms is None
        return
    longest = max(30_000, 5000, 3000, policy.delay_ms)
    assert NOW <= found.push_due_ms <= NOW + longest
    assert found.hold_until_ms is None or NOW < found.hold_until_ms <= NOW + policy.hold_ms
    if priority == 3:
        assert found.push_now, "urgent goes at once"
        if channels is None or "in_app" in channels:
            assert found.gate == ALWAYS, "and no acknowledgement stops it"
    if reach is Reach.LIVE and attention is Attention.UNKNOWN and not found.push_now:
        assert found.push_due_ms <= NOW + 5000, "unknown waits no longer than the window"
        assert found.gate is None
    if found.gate == SEEN:
        assert attention in (Attention.HIDDEN, Attention.IDLE)
        assert policy.when_away == "push_after"
