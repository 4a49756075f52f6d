"""Where a notification goes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from carillon.attention import ALWAYS, ANY, SEEN, Attention
from carillon.external import CHANNELS, EXTERNAL, choose
from carillon.messages import Event
from carillon.plan import Plan, Reach, plan
from carillon.policy import Policy
from carillon.settings import WHEN_AWAY

NOW = 1_700_000_000_000


PUSH_AFTER = Policy("push_after", 20_000, 0)


def event(channels: list[str] | None = None, priority: int = 1, fallback: list[str] | None = None) -> Event:
    return Event(bytes(16), "t", "u", 1, "x", None, priority, "", NOW, channels=channels, fallback=fallback)


def decide(
    reach: Reach,
    providers: Collection[str] = ("fcm",),
    channels: list[str] | None = None,
    *,
    fallback: list[str] | None = None,
    priority: int = 1,
    attention: Attention = Attention.VISIBLE,
    policy: Policy = PUSH_AFTER,
) -> Plan:
    return plan(
        event(channels, priority, fallback), reach, providers=providers, now_ms=NOW, ack_window_ms=5000,
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
    assert decide(Reach.LIVE, providers=()) == Plan("delivered", ("in_app",))
    assert decide(Reach.GRACE, providers=()) == Plan("stored", ("in_app",))
    assert decide(Reach.OFFLINE, providers=()) == Plan("stored", ("in_app",))


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


names = st.lists(st.sampled_from(CHANNELS), min_size=1, max_size=4)
fallbacks = st.one_of(st.none(), st.lists(st.sampled_from(tuple(EXTERNAL)), max_size=4))
targets = st.sets(st.sampled_from(["fcm", "apns"]))


def reached(channel: str, providers: Collection[str]) -> bool:
    return any(EXTERNAL[channel].reaches(provider) for provider in providers)


@given(
    st.sampled_from(Reach),
    targets,
    st.one_of(st.none(), names),
    fallbacks,
    st.integers(0, 3),
    st.sampled_from([a for a in Attention if a is not Attention.OFFLINE]),
    st.builds(Policy, st.sampled_from(WHEN_AWAY), st.integers(0, 90_000), st.integers(0, 90_000)),
)
def test_a_push_is_planned_exactly_where_it_is_wanted_and_possible(
    reach: Reach,
    providers: set[str],
    channels: list[str] | None,
    fallback: list[str] | None,
    priority: int,
    attention: Attention,
    policy: Policy,
) -> None:
    """Liveness, attention and policy move only the time of a push and what may cancel it, never whether there
    is one (G6): unknown never silences, urgent always goes, suppression is bounded."""
    options: dict[str, Any] = {"fallback": fallback, "priority": priority, "policy": policy}
    found = decide(reach, providers, channels, attention=attention, **options)
    external = [name for name in found.channels if name != "in_app"]
    asked = ["push"] if channels is None else [name for name in channels if name != "in_app"]
    possible = any(reached(name, providers) for name in [*asked, *(fallback or ())])
    assert (found.push_due_ms is not None) == bool(external) == (possible or bool(fallback))
    assert found.push_now <= bool(external)
    for other in Reach:
        again = decide(other, providers, channels, **options)
        assert [name for name in again.channels if name != "in_app"] == external
        assert (again.chain, again.step) == (found.chain, found.step)
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


@given(targets, st.one_of(st.none(), names), fallbacks)
def test_a_chain_goes_on_where_it_was_begun(
    providers: set[str], asked: list[str] | None, fallback: list[str] | None
) -> None:
    """No channel twice, in the order asked; what is skipped has no target, unless nothing has one."""
    channels, chain, step = choose(asked, fallback, providers)
    first = {"push"} if asked is None else set(asked) - {"in_app"}
    assert len({*channels, *chain}) == len([*channels, *chain])
    assert (step == 0) == (not channels or set(channels) <= first)
    rest = [name for name in dict.fromkeys(fallback or ()) if name not in first]
    skipped = rest[: max(0, step - 1)]
    assert list(chain) == rest[step:]
    if step:
        assert list(channels) == [rest[step - 1]]
    if any(reached(name, providers) for name in [*first, *rest]):
        assert all(reached(name, providers) for name in channels)
        assert not any(reached(name, providers) for name in skipped)
    elif fallback and (first or rest):
        assert channels == (tuple(channels) if first else (rest[0],))
        assert step == (0 if first else 1)
    else:
        assert channels == ()


def test_push_covers_the_channels_of_its_providers() -> None:
    """Naming push and fcm is no wish for the same push twice; fcm and apns are two."""
    both = {"fcm", "apns"}
    assert choose(["fcm", "push"], None, both) == (("push",), (), 0)
    assert choose(["apns", "fcm"], None, both) == (("apns", "fcm"), (), 0)
    assert choose(["apns", "fcm"], ["push"], {"fcm"}) == (("fcm",), ("push",), 0)


def test_in_app_falls_back_when_nobody_acknowledges() -> None:
    """The chain of an in-app event begins at the end of the window, or at once with nobody there."""
    asked: dict[str, Any] = {"channels": ["in_app"], "fallback": ["push", "apns"]}
    assert decide(Reach.LIVE, **asked) == Plan(
        "delivered", ("in_app", "push"), NOW + 5000, False, chain=("apns",), step=1
    )
    assert decide(Reach.OFFLINE, **asked).push_now


def test_the_first_channel_without_target_is_skipped() -> None:
    """Planned directly with the next one that has a target; with none at all from the first one on."""
    asked: dict[str, Any] = {"channels": ["apns"], "fallback": ["fcm", "push"]}
    assert decide(Reach.OFFLINE, **asked) == Plan(
        "queued", ("fcm",), NOW + 30_000, True, chain=("push",), step=1
    )
    nobody = decide(Reach.OFFLINE, providers=(), **asked)
    assert nobody == Plan("queued", ("apns",), NOW + 30_000, True, chain=("fcm", "push"))
