"""Where a notification goes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from carillon.messages import Event
from carillon.plan import Plan, Reach, plan

NOW = 1_700_000_000_000


def event(channels: list[str] | None = None) -> Event:
    return Event(bytes(16), "t", "u", 1, "x", None, 1, "", NOW, channels=channels)


def decide(reach: Reach, has_target: bool = True, channels: list[str] | None = None) -> Plan:
    return plan(
        event(channels), reach, has_target=has_target, now_ms=NOW, ack_window_ms=5000,
        grace_end_ms=NOW + 3000, lease_ms=30_000,
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


@given(
    st.sampled_from(Reach),
    st.booleans(),
    st.one_of(st.none(), st.lists(st.sampled_from(["in_app", "push"]), unique=True)),
)
def test_a_push_is_planned_exactly_where_it_is_wanted_and_possible(
    reach: Reach, has_target: bool, channels: list[str] | None
) -> None:
    """Liveness moves only the time of a push, never whether there is one (G6)."""
    found = decide(reach, has_target, channels)
    wanted = has_target and (channels is None or "push" in channels)
    assert (found.push_due_ms is not None) == wanted == ("push" in found.channels)
    assert found.push_now <= wanted
    if found.push_due_ms is not None:
        assert found.push_due_ms > NOW
    assert found.status in {"delivered", "queued", "stored"}
    assert (found.status == "delivered") <= (reach is Reach.LIVE)
