"""What a shard decides of events of one moment: alike ones are decided once, and as if each were alone."""

from __future__ import annotations

import json
from typing import Any, cast

from hypothesis import example, given
from hypothesis import strategies as st

from actors.shard_entries import Entry, answered
from actors.shard_merges import Merges
from actors.shard_planning import Planner
from actors.shard_policies import NO_RULES
from actors.shard_users import User
from carillon.attention import Attention
from carillon.clock import ManualClock
from carillon.decision import judge
from carillon.ids import UserKey
from carillon.messages import Event
from carillon.plan import Reach, plan, wants_push
from carillon.policy import build, cluster_default
from carillon.settings import ShardSettings
from stores.postgres.shard_rows import UserRecord

SETTINGS = ShardSettings()
DEFAULT = cluster_default(SETTINGS)
BARE = {"types": {"like": {"whenAway": "both"}}}
RULED = {
    "types": {"like": {"whenAway": "both"}},
    "forced": {"types": {"alarm": True}},
    "limits": {"user": {"count": 3, "windowS": 60}, "types": {"like": {"count": 1, "windowS": 60}}},
}
FEED_ONLY = {
    "limits": {"user": {"count": 2, "windowS": 60}, "overflow": "feed"},
    "defaults": {"digest": "hourly"},
}
DOCUMENTS = [
    None,
    None,
    None,
    {"types": {"like": {"channels": {"push": False}}, "chat": {"priority": "critical"}}},
    {"quietHours": {"start": "00:00", "end": "23:59"}},
    {"quietHours": {"start": "13:47", "end": "13:48"}, "digest": "hourly"},
    {"doNotDisturbUntil": "2001-09-09T01:46:45.500Z"},
]
NAMES = ["ann", "bob", "cat"]
CONTENT = '{"type":"x","title":"t"}'


class Looking:
    """Stands for a session: nothing of it counts here but where its user looks."""

    def __init__(self, level: Attention) -> None:
        self.level = level

    def viewed(self) -> list[str]:
        """Nothing in particular."""
        return []

    def attention(self, now_ms: int, window_ms: int) -> Attention:
        """As told."""
        return self.level


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.sampled_from(["chat", "like", "alarm"]),
        st.sampled_from([1, 3]),
        st.sampled_from([None] * 6 + [["push"], ["in_app"]]),
        st.sampled_from([None] * 6 + [["push"]]),
        st.sampled_from([Reach.LIVE] * 6 + [Reach.GRACE, Reach.OFFLINE]),
        st.sampled_from([0] * 20 + [1, 1, 2500, 20_000, 40_000, 720_000, -1, -30_000]),  # ms since the last
    ),
    min_size=20,
    max_size=40,
)
USERS = st.fixed_dictionaries(
    {
        name: st.tuples(
            st.sampled_from(DOCUMENTS),
            st.sampled_from([frozenset[str](), frozenset({"fcm"})]),
            st.sampled_from([Attention.HIDDEN, Attention.UNKNOWN]),
        )
        for name in NAMES
    }
)


def _user(name: str, document: Any, providers: frozenset[str], level: Attention) -> User:
    text = None if document is None else json.dumps(document)
    record = UserRecord(UserKey("demo", name), 1, "e", 0, 0, 0, 0, None, None, [], preferences=text)
    user = User(record, 0)
    user.providers = providers
    user.session = cast("Any", Looking(level))
    return user


@given(st.sampled_from([BARE, BARE, RULED, FEED_ONLY]), USERS, EVENTS)
@example(  # do-not-disturb ends within a minute
    BARE,
    {"ann": (DOCUMENTS[-1], frozenset({"fcm"}), Attention.UNKNOWN)},
    [("ann", "chat", 1, None, None, Reach.LIVE, later) for later in (0, 2600)],
)
def test_events_of_one_moment_are_decided_as_each_would_be_alone(
    document: dict[str, Any], people: dict[str, Any], events: list[Any]
) -> None:
    """Whatever was decided before, and whatever the clock does, a plan is that of the pure functions."""
    tenant = build(document, DEFAULT)
    users = {name: _user(name, *known) for name, known in people.items()}
    reached: list[Reach] = []
    planner = Planner(
        ManualClock(),
        SETTINGS,
        cast("Merges", None),
        reach=lambda user: (reached[-1], 1_000_000_500_000),
        policy=lambda name: tenant,
    )
    now_ms = 1_000_000_003_000  # 01:46:43, in UTC
    for name, kind, priority, channels, fallback, reach, later in events:
        now_ms += later
        reached.append(reach)
        user = users[name]
        event = Event(
            b"0" * 16,
            "demo",
            name,
            0,
            kind,
            None,
            priority,
            CONTENT,
            now_ms,
            channels=channels,
            fallback=fallback,
        )
        verdict = None
        if user.preferences is not None or tenant.rules is not None:
            verdict = judge(event, user.preferences, tenant.rules or NO_RULES, now_ms, user.spent)
        looks = reach is Reach.LIVE and wants_push(event, user.providers)
        alone = plan(
            event,
            reach,
            providers=user.providers,
            now_ms=now_ms,
            ack_window_ms=round(SETTINGS.ack_window_s * 1000),
            grace_end_ms=1_000_000_500_000,
            lease_ms=round(SETTINGS.delivery_lease_s * 1000),
            attention=people[name][2] if looks else Attention.UNKNOWN,
            policy=tenant.of(kind),
            verdict=verdict,
        )
        entry = Entry(event, answered)
        entry.user = user
        assert planner.plan(entry, now_ms, spend=True) == alone
