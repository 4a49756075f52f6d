"""A dry run foretells what the writer does: for any event and user the same plan, from the same functions."""

from __future__ import annotations

import json
from collections.abc import Coroutine
from typing import Any, cast
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from actors.shard_drafting import Drafter
from actors.shard_entries import Entry, answered
from actors.shard_kept import KeptPushes
from actors.shard_merges import Merges
from actors.shard_planning import Planner
from actors.shard_preview import Previews
from actors.shard_repeats import Repeats
from actors.shard_users import User
from carillon import explain, forecast
from carillon.attention import Attention
from carillon.clock import ManualClock, rfc3339
from carillon.decision import unpack
from carillon.explain import told
from carillon.external import EXTERNAL
from carillon.ids import UserKey, uuid_text
from carillon.messages import Event, Outcome, PlanReply
from carillon.outbox import for_platforms, left_out_told
from carillon.plan import Reach
from carillon.policy import Policy, build, cluster_default
from carillon.settings import MergeSettings, ShardSettings
from stores.postgres.feed import Target
from stores.postgres.shard_rows import OutboxRow, UserRecord
from stores.postgres.shard_store import ShardStore
from tests.unit.test_shard_planning import Looking

SETTINGS = ShardSettings()
NOW_MS = 1_780_000_000_000
HOUR_MS = 3_600_000
POLICIES: list[dict[str, Any]] = [
    {},
    {"whenAway": "both", "types": {"like": {"whenAway": "push_after", "whenAwayDelayS": 30}}},
    {"forced": {"types": {"alarm": True, "like": False}}, "defaults": {"digest": "hourly"}},
    {"limits": {"user": {"count": 1, "windowS": 60}}},
    {"limits": {"user": {"count": 1, "windowS": 60}, "overflow": "feed"}},
    {"types": {"chat": {"window": {"start": "09:00", "end": "09:05"}}}},
]
DOCUMENTS: list[dict[str, Any] | None] = [
    None,
    {"channels": {"push": False}},
    {"channels": {"in_app": False}},
    {"types": {"chat": False}},
    {"quietHours": {"start": "00:00", "end": "23:59"}},
    {"doNotDisturbUntil": rfc3339(NOW_MS + HOUR_MS)},
    {"categories": {"news": {"digest": "daily"}}, "types": {"like": {"priority": "urgent"}}},
]


class Rowless:
    """Stands for what the drafter asks of the store and of kept pushes: ids, and nothing is kept."""

    async def draw_delivery_ids(self, count: int) -> list[int]:
        """In a row."""
        return list(range(1, count + 1))

    def may_keep(self, notification: bytes, slot: int) -> bool:
        """No."""
        return False


def at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits for something")


CHANNELS = [None, None, ["in_app"], ["push"], ["in_app", "fcm"], ["apns"]]
SITUATIONS = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(POLICIES),
        "document": st.sampled_from(DOCUMENTS),
        "providers": st.sampled_from([frozenset[str](), frozenset({"fcm"}), frozenset({"fcm", "apns"})]),
        "reach": st.sampled_from(Reach),
        "level": st.sampled_from([Attention.UNKNOWN, Attention.HIDDEN, Attention.IDLE, Attention.VISIBLE]),
        "type": st.sampled_from(["chat", "like", "alarm"]),
        "category": st.sampled_from([None, "news"]),
        "priority": st.sampled_from([0, 1, 3]),
        "channels": st.sampled_from(CHANNELS),
        "fallback": st.sampled_from([None, None, ["push"], ["apns"]]),
        "expires": st.sampled_from([None, None, -1, 1, 10 * HOUR_MS, 100 * HOUR_MS]),
        "before": st.integers(0, 3),
        "ahead": st.sampled_from([0, 1, HOUR_MS, 30 * HOUR_MS]),
    }
)


class Shard:
    """What a shard decides with, and one user of it."""

    def __init__(self, given_: dict[str, Any]) -> None:
        self.clock = ManualClock(NOW_MS)
        self.given = given_
        policy = build(given_["policy"], cluster_default(SETTINGS))
        self.merges = Merges(cast("ShardStore", None), MergeSettings(), lambda tenant: policy, lambda: 1)
        self.reach: Any = lambda user: (given_["reach"], NOW_MS + 5000)
        self.planner = Planner(
            self.clock, SETTINGS, self.merges, reach=self.reach, policy=lambda tenant: policy
        )
        self.previews = Previews(
            cast("ShardStore", None), self.clock, SETTINGS, self.merges, cast("Repeats", None),
            reach=self.reach, policy=lambda tenant: policy,
        )  # fmt: skip
        rowless = cast("Any", Rowless())
        self.drafter = Drafter(rowless, self.planner, self.merges, cast("KeptPushes", rowless))
        text = None if given_["document"] is None else json.dumps(given_["document"])
        self.user = User(
            UserRecord(UserKey("t", "ada"), 1, "e", 0, 0, 0, 0, None, None, [], preferences=text), 0
        )
        self.user.providers = given_["providers"]
        self.user.session = cast("Any", Looking(given_["level"]))

    def event(self, number: int) -> Event:
        """One as given, with an id of its own."""
        expires = self.given["expires"]
        return Event(
            number.to_bytes(16), "t", "ada", 0, self.given["type"], self.given["category"],
            self.given["priority"], '"type":"x","title":"t"', NOW_MS,
            None if expires is None else NOW_MS + expires, self.given["channels"],
            fallback=self.given["fallback"],
        )  # fmt: skip

    def write(self, event: Event) -> Any:
        """What the writer makes of it now: the draft of a batch."""
        entry = Entry(event, answered)
        entry.user = self.user
        return at_once(self.drafter.draft([entry], [], self.clock.now_ms()))

    def foretell(self, event: Event, at_ms: int = 0) -> Any:
        """What a dry run answers."""
        reply = at_once(self.previews.of(self.user, event, at_ms))
        assert isinstance(reply, PlanReply)
        assert reply.failed is None
        return json.loads(reply.document)


@given(SITUATIONS)
def test_a_dry_run_plans_what_the_writer_writes(situation: dict[str, Any]) -> None:
    """Whatever was sent before: status, channels, rules, due times and digests of a dry run are those of the
    rows that are written for the event right after it."""
    shard = Shard(situation)
    for number in range(situation["before"]):
        shard.write(shard.event(100 + number))
    event = shard.event(1)
    plan = shard.foretell(event)
    draft = shard.write(event)
    (entry,), (row,) = draft.own, draft.rows
    expired = event.expires_ms is not None and event.expires_ms <= NOW_MS
    assert plan["status"] == ("stored" if expired else entry.plan.status)
    assert plan["channels"] == list(entry.plan.channels)
    assert plan["reason"] == entry.plan.reason
    assert (plan["archived"], plan["silent"]) == (row.archived, entry.plan.silent)
    fired = [] if row.decision is None else told(unpack(row.decision))
    assert plan["rules"][: len(fired)] == fired
    pushes: list[OutboxRow] = draft.outbox
    assert [push.channel for push in pushes] == [name for name in plan["channels"] if name in EXTERNAL]
    for push in pushes:
        assert plan["fallback"] == [name for name in push.chain.split(",") if name]
        waits = not push.claimed and not expired
        assert plan["pushDueAt"] == (rfc3339(push.due_ms) if waits else None)
        assert (plan["digest"] is None) == (push.digest is None)
        if push.digest is not None:
            assert plan["digest"]["digestId"] == uuid_text(push.digest)
    assert f"It would be {plan['status']}." in plan["words"]
    assert all(rule["words"] in plan["words"] for rule in plan["rules"])


@given(SITUATIONS)
def test_what_is_sent_later_is_planned_for_then(situation: dict[str, Any]) -> None:
    """`then` is what a dry run answers at that time, if nothing about the user has changed."""
    shard = Shard(situation)
    at_ms = NOW_MS + situation["ahead"]
    event = shard.event(1)
    told_now = shard.foretell(event, at_ms)
    if not situation["ahead"]:
        assert "then" not in told_now
        return
    assert (told_now["status"], told_now["sendAt"], told_now["channels"]) == ("deferred", rfc3339(at_ms), [])
    if situation["reach"] is Reach.GRACE and situation["ahead"] > 5000:
        situation["reach"] = Reach.OFFLINE  # grace is over by then
    shard.clock.advance(situation["ahead"] / 1000)
    assert told_now["then"] == shard.foretell(event)
    assert told_now["words"].endswith(told_now["then"]["words"])
    # Of many, some may be asked when that time has come: theirs is the plan itself.
    come = shard.foretell(event, at_ms)
    assert "then" not in come
    assert forecast.of_then(come) == forecast.of_then(told_now) == told_now["then"]
    forecast.summary("goals", 2, True, at_ms, [forecast.of_then(come), forecast.of_then(told_now)], 0)


@given(SITUATIONS)
def test_a_dry_run_leaves_no_trace(situation: dict[str, Any]) -> None:
    """What the writer decides does not depend on how often it was asked before, for now or for later."""
    asked, alone = Shard(situation), Shard(situation)
    for ahead in (0, situation["ahead"], 0):
        asked.foretell(asked.event(1), NOW_MS + ahead)
    for number in range(3):
        one, other = (shard.write(shard.event(number)) for shard in (asked, alone))
        assert (one.own[0].plan, one.outbox) == (other.own[0].plan, other.outbox)


@given(st.integers(0, 9), st.none() | st.integers(0, 9), st.none() | st.integers(0, 9))
def test_expiry_is_told_by_what_it_ends(at_ms: int, ends_ms: int | None, due_ms: int | None) -> None:
    """One rule of what expires, with its end: it came too late, its push would, or neither."""
    found = explain.expiry(ends_ms, at_ms, due_ms, ["push"])
    if ends_ms is None:
        assert found == []
        return
    wanted = "expired" if ends_ms <= at_ms else "expires"
    if ends_ms > at_ms and due_ms is not None and due_ms >= ends_ms:
        wanted = "expires_first"
    assert [(rule.rule, rule.until_ms) for rule in found] == [(wanted, ends_ms)]
    assert (found[0].channels == ("push",)) == (wanted == "expires_first")


DEVICES = st.lists(st.sampled_from(["ios", "android", "web", ""]), max_size=4)


@given(DEVICES, st.frozensets(st.sampled_from(["ios", "android", "web"])))
def test_the_devices_of_a_type_are_told_apart(devices: list[str], platforms: frozenset[str]) -> None:
    """Each device gets the push or is named among those left out; that none is left is said if so."""
    targets = [Target(f"d{number}", platform, "fcm") for number, platform in enumerate(devices)]
    gets = Policy("in_app", 0, 0, platforms).gets
    mine, others = for_platforms(targets, gets)
    assert sorted(mine + others) == targets
    assert all(gets(one.platform) for one in mine)
    assert not any(gets(one.platform) for one in others)
    rules = {rule.rule: rule for rule in forecast.device_rules(platforms, mine, others, ["push"])}
    assert ("left_out" in rules, "no_device" in rules) == (bool(others), bool(others) and not mine)
    for one in others:
        assert one.device in (rules["left_out"].about or "")
        assert one.device in left_out_told(others)


@given(st.sampled_from(["queued", "stored", "merged", "deferred"]), st.integers(0, 9), st.uuids())
def test_what_a_key_stands_for_is_told_as_it_is_answered(status: str, seq: int, other: UUID) -> None:
    """Status, channels, id and seq are those of the answer; the words say whose they are."""
    outcome = Outcome(other.bytes, seq, status, ["in_app", "push"], replayed=True, reason="why")
    told_ = forecast.replayed("ada", outcome)
    assert (told_["status"], told_["channels"], told_["reason"]) == (status, outcome.channels, "why")
    assert told_["replayed"] == {"id": str(other), "seq": seq}
    assert str(other) in told_["words"]
    assert [rule["rule"] for rule in told_["rules"]] == ["replayed"]
