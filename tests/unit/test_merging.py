"""Merging: any interleaving of events, reads and restarts keeps one row per open window and loses nothing."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carillon import merge_rules, merging
from carillon.ids import uuid_text
from carillon.merge_rules import MergeRule, merge_problems
from carillon.merge_rules import merge_rules as read_rules
from carillon.merging import (
    DUPLICATE,
    LATER,
    LOUD,
    MERGED,
    OPENED,
    QUIET,
    Merger,
    Target,
    Window,
    asks_of,
    said_by,
)
from carillon.messages import Dedupe, Event
from carillon.notification import NotificationRow, decode_content, encode_content
from carillon.settings import MergeSettings

LIMITS = MergeSettings(max_actors=3, max_items=3)
NOW = 1_700_000_000_000


def event(
    number: int,
    *,
    actor: str | None = None,
    kind: str = "like",
    dedupe: Dedupe | None = None,
    aggregate: bool | None = None,
    at_ms: int = NOW,
    expires_ms: int | None = None,
    **members: Any,
) -> Event:
    told = {"type": kind, "title": f"title {number}", "actorId": actor, "targetType": "post", "targetId": "1"}
    content = encode_content(told | {"createdAt": f"created {number}"} | members)
    raw = at_ms.to_bytes(6, "big") + number.to_bytes(10, "big")
    return Event(
        raw, "t", "u", 0, kind, None, 1, content, at_ms, expires_ms, dedupe=dedupe, aggregate=aggregate
    )


@dataclass
class Row:
    """A stored notification."""

    row: NotificationRow
    priority: int
    events: list[bytes] = field(default_factory=list)


class Store:
    """What Postgres keeps: notifications, windows, counted actors."""

    def __init__(self, limits: MergeSettings = LIMITS) -> None:
        self.limits = limits
        self.rows: dict[bytes, Row] = {}
        self.windows: dict[str, tuple[bytes, int, int, int, int]] = {}
        self.actors: set[tuple[bytes, str]] = set()
        self.duplicates: list[tuple[bytes, bytes]] = []

    def batch(
        self, now_ms: int, events: list[Event], rule: MergeRule | None = None
    ) -> list[merging.Decision]:
        """Decide for a batch as the writer of a shard does, and commit."""
        merger = Merger(now_ms, self.limits)
        merger.know(
            [
                Window(1, key, self.rows[raw].row, self.rows[raw].priority, ends_ms, events_, count, told_ms)
                for key, (raw, ends_ms, events_, count, told_ms) in self.windows.items()
                if ends_ms > now_ms
            ],
            self.actors,
        )
        decisions: list[merging.Decision] = []
        for one in events:
            members = decode_content(one.content)
            asks = asks_of(one, rule, self.limits, said_by(one.content))
            decision = merger.decide(1, one, asks, members, filed=False, priority=one.priority)
            decisions.append(decision)
            if decision.status == DUPLICATE:
                self.duplicates.append((one.id, decision.target.id))
            elif decision.actor is not None:
                self.actors.add((decision.target.id, decision.actor))
        for one, decision in zip(events, decisions, strict=True):
            target, content = decision.target, decision.target.content(None)
            if decision.status == OPENED:
                seq = len(self.rows) + 1
                row = NotificationRow(one.id, seq, seq, seq, content, expires_ms=target.expires_ms)
                self.rows[one.id] = Row(row, target.priority, [one.id])
            elif decision.status == MERGED:
                stored = self.rows[target.id]
                stored.row.content, stored.row.expires_ms = content, target.expires_ms
                stored.events.append(one.id)
            for key, ends_ms in target.keys.items():
                self.windows[key] = (target.id, ends_ms, target.events, target.count, target.notified_ms)
        return decisions


HOW = ("count", "replace", "accumulate")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(("batch", "batch", "batch", "read", "wait")),
        st.lists(
            st.tuples(
                st.sampled_from(("aggregate", "drop", "both", *HOW)),
                st.sampled_from(("ann", "bob", "cat", "dan", "eve", None)),
                st.sampled_from(("k1", "k2")),
            ),
            min_size=1,
            max_size=6,
        ),
        st.integers(0, 5),
    ),
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_one_row_per_open_window_and_nothing_is_lost(steps: list[Any]) -> None:
    """Any interleaving of batches, reads and time: every event is in one row, once, or a duplicate."""
    store, now_ms, number = Store(), NOW, 0
    asked: dict[bytes, tuple[str, str | None]] = {}
    alike: dict[bytes, tuple[str, str]] = {}
    for step, some, which in steps:
        now_ms += 1000
        if step == "wait":
            now_ms += (60_000, 299_000, 301_000, 3_601_000)[which % 4]
        elif step == "read" and store.rows:
            row = list(store.rows.values())[which % len(store.rows)].row
            row.read_ms = row.read_ms or now_ms
        elif step == "batch":
            events = []
            for how, actor, key in some:
                number += 1
                dedupe = None if how == "aggregate" else Dedupe("drop" if how == "both" else how, key)
                aggregate = how in ("aggregate", "both") or None
                one = event(number, actor=actor, dedupe=dedupe, aggregate=aggregate, at_ms=now_ms)
                asked[one.id] = (how, actor)
                alike[one.id] = ("aggregate", "") if how in ("aggregate", "both") else (how, key)
                events.append(one)
            open_before = {raw for raw, row in store.rows.items() if row.row.read_ms is None}
            for one, decision in zip(events, store.batch(now_ms, events), strict=True):
                target = decision.target
                if decision.status == MERGED:  # only into what is unread, in its window
                    assert target.id in open_before or target.id in {e.id for e in events}
                    assert now_ms < store.windows[decision.ask.key][1]
                if decision.status == DUPLICATE:
                    assert asked[one.id][0] in ("drop", "both")
    kept = Counter(raw for row in store.rows.values() for raw in row.events)
    kept.update(raw for raw, _ in store.duplicates)
    assert kept == Counter(list(asked)), "an event was lost, or counted twice"
    for row in store.rows.values():
        content = decode_content(row.row.content)
        (way,) = {asked[raw][0].replace("both", "aggregate") for raw in row.events}
        assert content["createdAt"] == f"created {int.from_bytes(row.events[0][6:], 'big')}"
        if way == "drop":
            assert len(row.events) == 1
            assert "count" not in content
        elif way == "aggregate":
            actors = [asked[raw][1] for raw in row.events]
            assert content["count"] == len(set(actors) - {None}) + actors.count(None)
            named = [actor["id"] for actor in content["actors"]]
            newest = list(dict.fromkeys(actor for actor in reversed(actors) if actor is not None))
            assert named == newest[: LIMITS.max_actors]
        else:
            assert content["count"] == len(row.events)
        if way == "accumulate" and len(row.events) > 1:
            items = content["data"]["items"]
            assert [item["id"] for item in items] == [
                uuid_text(raw) for raw in row.events[-LIMITS.max_items :]
            ]
    # What is alike begins anew only after its window, or after a read.
    latest: dict[tuple[str, str], bytes] = {}
    for raw in store.rows:
        before = latest.get(alike[raw])
        latest[alike[raw]] = raw
        if before is not None:
            way, at_ms = alike[raw][0], int.from_bytes(raw[:6])
            ended = at_ms >= int.from_bytes(before[:6]) + (3_600_000 if way == "aggregate" else 300_000)
            read_ms = store.rows[before].row.read_ms
            assert ended or (way != "drop" and read_ms is not None and read_ms <= at_ms)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 200), st.sampled_from((None, 0, 5, 40))), min_size=1, max_size=60),
    st.sampled_from((0, 50, 300)),
)
def test_nobody_is_disturbed_more_often_than_set(merges: list[tuple[int, int | None]], every_ms: int) -> None:
    """Pushes are as far apart as the rule says, and what is merged is told by one that follows it."""
    target = Target(b"", 1, 1, None, {}, "t", None, 1, None, 1, 1, NOW)
    now_ms, dues, loud = NOW, [NOW], [NOW]
    for pause_ms, wait_ms in merges:
        now_ms += pause_ms
        due_ms = None if wait_ms is None else now_ms + wait_ms
        notice, due = merging.notify(target, now_ms, due_ms, every_ms, urgent=False)
        assert (due is None) == (wait_ms is None)
        assert (notice == QUIET) <= (due is None)
        if notice == LOUD:
            loud.append(now_ms)
        if due is not None:
            assert due >= now_ms
            if not dues or dues[-1] <= now_ms:  # else one is still to come, and tells this, too
                dues.append(due)
            elif notice == LATER:
                assert due >= dues[-1]
    if every_ms:
        assert all(b - a >= every_ms for a, b in itertools.pairwise(dues))
        assert all(b - a >= every_ms for a, b in itertools.pairwise(loud))


@given(
    st.lists(st.tuples(st.integers(0, 90), st.booleans()), min_size=1, max_size=30),
    st.sampled_from((0, 50, 300)),
)
def test_a_push_that_waits_in_a_digest_is_due_with_it(steps: list[tuple[int, bool]], every_ms: int) -> None:
    """However often it was told before: the digest tells it at its time, and disturbs once."""
    target = Target(b"", 1, 1, None, {}, "t", None, 1, None, 1, 1, NOW)
    now_ms = NOW
    for pause_ms, digest in steps:
        now_ms += pause_ms
        wanted = now_ms // 100 * 100 + 100 if digest else now_ms
        told_ms = target.notified_ms
        _, due = merging.notify(target, now_ms, wanted, every_ms, urgent=False, digest=digest)
        assert due is not None
        if digest:
            assert due == wanted
            assert target.notified_ms <= told_ms or target.notified_ms == now_ms
        else:
            assert due >= now_ms


def test_an_urgent_one_is_never_held() -> None:
    """It is told at once, whatever came a moment before."""
    target = Target(b"", 1, 1, None, {}, "t", None, 1, None, 1, 1, NOW)
    assert merging.notify(target, NOW + 1, NOW + 1, 86_400_000, urgent=True) == (LOUD, NOW + 1)


def test_the_same_like_twice_is_one_and_those_of_different_actors_are_gathered() -> None:
    """drop and aggregate together: a key for the act, the target for the gathering."""
    store = Store()

    def like(number: int, actor: str) -> Event:
        return event(number, actor=actor, dedupe=Dedupe("drop", f"like:{actor}"), aggregate=True)

    events = [like(1, "ann"), like(2, "ann"), like(3, "bob"), like(4, "bob"), like(5, "ann")]
    statuses = [d.status for d in store.batch(NOW, events[:3])] + [
        d.status for d in store.batch(NOW, events[3:])
    ]
    assert statuses == [OPENED, DUPLICATE, MERGED, DUPLICATE, DUPLICATE]
    ((row),) = store.rows.values()
    assert decode_content(row.row.content)["count"] == 2


def test_what_was_withdrawn_or_is_over_has_no_duplicates() -> None:
    """Retracted or expired: what says the same is said again."""
    store = Store()
    ask = Dedupe("drop", "k")
    store.batch(NOW, [event(1, dedupe=ask, expires_ms=NOW + 1000)])
    assert store.batch(NOW + 999, [event(2, dedupe=ask)])[0].status == DUPLICATE
    assert store.batch(NOW + 1000, [event(3, dedupe=ask)])[0].status == OPENED
    list(store.rows.values())[-1].row.retracted_ms = NOW + 1001
    assert store.batch(NOW + 1002, [event(4, dedupe=ask)])[0].status == OPENED


def test_the_first_event_keeps_time_and_collapse_key_the_highest_priority_stays() -> None:
    """One banner on the phone, and an urgent one does not become low again."""
    store = Store()
    store.batch(NOW, [event(1, aggregate=True, collapseKey="c1", priority="urgent")])
    store.batch(NOW, [event(2, aggregate=True, collapseKey="c2", priority="low", link="https://x.test/2")])
    ((row),) = store.rows.values()
    content = decode_content(row.row.content)
    assert (content["collapseKey"], content["createdAt"], content["priority"]) == (
        "c1",
        "created 1",
        "urgent",
    )
    assert (content["title"], content["link"]) == ("title 2", "https://x.test/2")


def test_items_are_bounded_in_bytes() -> None:
    """Large items push older ones out; the last is always there, without its data if it is too large."""
    store = Store()
    limits = MergeSettings(max_items=50, max_items_bytes=1024)
    ask = Dedupe("accumulate", "k")
    for number in range(1, 20):
        merger = Merger(NOW, limits)
        merger.know(
            [Window(1, key, store.rows[raw].row, 1, *rest) for key, (raw, *rest) in store.windows.items()]
        )
        one = event(number, dedupe=ask, data={"blob": "x" * (2000 if number == 19 else 100)})
        members = decode_content(one.content)
        decision = merger.decide(
            1, one, asks_of(one, None, limits, said_by(one.content)), members, filed=False, priority=1
        )
        target = decision.target
        row = NotificationRow(target.id, 1, 1, 1, target.content(None))
        store.rows[target.id] = Row(row, 1)
        store.windows |= {
            k: (target.id, end, target.events, target.count, NOW) for k, end in target.keys.items()
        }
        if target.events > 1:
            items = decode_content(row.content)["data"]["items"]
            assert len(json.dumps(items)) < 1400
            assert items[-1]["title"] == f"title {number}"
    assert [("data" in item) for item in items] == [False]
    assert target.count == 19


RULES = {
    "like": {
        "how": "aggregate",
        "windowS": 60,
        "renotifyS": 10,
        "texts": {
            "default": {
                "title": {
                    "=2": "{actor} and {actor2}",
                    "one": "{actor}, {others} other",
                    "other": "{actor}, {others}",
                },
                "body": "{body}",
            },
            "pl": {"title": {"one": "{others} osoba", "few": "{others} osoby", "other": "{others} osób"}},
            "pt-BR": {"title": "{count} curtidas de {actor3}"},
        },
    }
}


@pytest.mark.parametrize(
    ("locale", "count", "title"),
    [
        (None, 2, "Ann and Bob"),
        ("fr-CA", 5, "Ann, 4"),
        ("pl", 2, "1 osoba"),
        ("pl_PL", 4, "3 osoby"),
        ("pl", 6, "5 osób"),
        ("pt-BR", 9, "9 curtidas de Cat"),
        ("pt", 9, "Ann, 8"),
    ],
)
def test_texts_follow_the_language_and_its_plurals(locale: str | None, count: int, title: str) -> None:
    """Exact forms first, then CLDR's for the others; pt-BR -> pt -> default."""
    assert not merge_problems(RULES)
    rules = read_rules({"merge": RULES})
    assert rules is not None
    names = [{"id": "a", "name": "Ann"}, {"id": "Bob"}, {"id": "c", "name": "Cat"}]
    members = {"title": "newest", "body": None, "actors": names, "channelContent": {"push": {"title": "old"}}}
    found = merge_rules.render(rules["like"], locale, members, count)
    assert found["title"] == title
    assert "body" not in found  # the newest event has none
    assert found["channelContent"] == {"push": {}}


def test_a_text_that_names_nobody_known_is_left_out() -> None:
    """Events without actors keep what the newest of them says."""
    rules = read_rules({"merge": RULES})
    assert rules is not None
    assert merge_rules.render(rules["like"], None, {"title": "x", "actors": []}, 2) == {}


@pytest.mark.parametrize(
    ("rules", "path"),
    [
        ([], "merge"),
        ({"like": 1}, "merge/like"),
        ({"like": {"how": "sum"}}, "merge/like/how"),
        ({"like": {"windowS": 0}}, "merge/like/windowS"),
        ({"like": {"renotifyS": -1}}, "merge/like/renotifyS"),
        ({"like": {"mode": 1}}, "merge/like/mode"),
        ({"like": {"texts": {"de": {"title": "x"}}}}, "merge/like/texts/default"),
        ({"like": {"texts": {"default": {}}}}, "merge/like/texts/default"),
        ({"like": {"texts": {"default": {"title": "x"}, "PT_br": {"title": "x"}}}}, "merge/like/texts/PT_br"),
        ({"like": {"texts": {"default": {"title": {"one": "x"}}}}}, "merge/like/texts/default/title"),
        (
            {"like": {"texts": {"default": {"title": {"other": "x", "=a": "y"}}}}},
            "merge/like/texts/default/title/=a",
        ),
        ({"like": {"texts": {"default": {"title": "{who} did"}}}}, "merge/like/texts/default/title"),
        ({"like": {"texts": {"default": {"title": "{actor"}}}}, "merge/like/texts/default/title"),
        ({"like": {"texts": {"default": {"title": ""}}}}, "merge/like/texts/default/title"),
    ],
)
def test_what_is_wrong_with_a_rule_is_named(rules: Any, path: str) -> None:
    """Each broken rule by its path."""
    assert [error.path for error in merge_problems(rules)] == [path]


def test_the_event_wins_over_the_rule() -> None:
    """Its own dedupe and `aggregate: false`; a drop goes with the rule's aggregation."""
    rules = read_rules({"merge": {"like": {"how": "aggregate", "windowS": 60}}})
    assert rules is not None

    def asked(rule: MergeRule | None, **more: Any) -> list[tuple[str, str, int]]:
        one = event(1, **more)
        return [(a.how, a.source, a.window_ms) for a in asks_of(one, rule, LIMITS, said_by(one.content))]

    rule = rules["like"]
    assert asked(None) == []
    assert asked(rule) == [("aggregate", "tenant", 60_000)]
    assert asked(rule, aggregate=False) == []
    assert asked(rule, aggregate=True) == [("aggregate", "event", 60_000)]
    assert asked(None, aggregate=True) == [("aggregate", "event", 3_600_000)]
    assert asked(rule, dedupe=Dedupe("count", "k")) == [("count", "event", 300_000)]
    assert asked(rule, dedupe=Dedupe("drop", "k", 5000)) == [
        ("drop", "event", 5000),
        ("aggregate", "tenant", 60_000),
    ]
    assert asked(MergeRule("replace", 0, None, {})) == [("replace", "tenant", 300_000)]
    assert asked(MergeRule(None, 0, 10, {})) == []
