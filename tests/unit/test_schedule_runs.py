"""Schedules as a shard carries them out: each occurrence once and in time, whatever fails on the way."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from zoneinfo import ZoneInfo

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.shard_schedules import Schedules
from carillon.clock import ManualClock, rfc3339
from carillon.errors import StoreUnavailableError, UnavailableError
from carillon.ids import uuid_text
from carillon.messages import Outcome, Outcomes, Publish
from carillon.metrics import Stats
from carillon.schedules import look_ms, next_ms, parse, upcoming
from carillon.settings import Settings
from stores.postgres.schedules import ClaimedSchedule

START = (
    round(datetime(2026, 3, 28, 12, tzinfo=UTC).timestamp()) * 1000
)  # a day before clocks change in Vienna
MINUTE = 60_000
ID = b"\1" * 16
SETTINGS = Settings()


@dataclass
class Kept:
    """The one schedule, as PostgreSQL keeps it: claimed under a lease, settled by who claimed it last."""

    rule: str
    next_ms: int
    due_ms: int
    single: bool
    state: str = "active"
    claim: int = 0
    fired: int = 0
    missed: int = 0
    breaks: bool = False
    """The next settling is lost, with its shard or its connection."""
    zone: str = "UTC"
    """Of the occurrence to come."""
    user_zone: str = "UTC"
    """Where the user is."""

    async def any_due(self, slots: list[int], now_ms: int) -> bool:
        return self.state == "active" and self.due_ms <= now_ms

    async def claim_due(self, now_ms: int, lease_end_ms: int) -> list[ClaimedSchedule]:
        if not await self.any_due([], now_ms):
            return []
        self.claim, self.due_ms = self.claim + 1, lease_end_ms
        event = json.dumps({"userId": "ada", "type": "t", "title": "x"})
        return [
            ClaimedSchedule(
                "t", ID, "ada", self.rule, event, self.single, self.claim, self.next_ms, self.zone
            )
        ]

    async def settle(self, shard: str, term: int, row: ClaimedSchedule, **told: Any) -> bool:
        if self.breaks:
            raise StoreUnavailableError("lost")
        if row.claim != self.claim or self.state != "active":
            return False
        self.state, self.next_ms, self.due_ms = told["state"], told["next_ms"], told["due_ms"]
        self.zone = told["zone"]
        self.fired, self.missed = self.fired + told["fired"], self.missed + told["missed"]
        return True


class Store:
    """What a shard asks of the store of schedules."""

    def __init__(self, kept: Kept) -> None:
        self.any_due, self.settle = kept.any_due, kept.settle
        self._kept = kept

    async def zone(self, tenant: str, user: str) -> str:
        return self._kept.user_zone

    async def claim(
        self, shard: str, term: int, slots: list[int], now_ms: int, limit: int, lease_end_ms: int
    ) -> list[ClaimedSchedule]:
        return await self._kept.claim_due(now_ms, lease_end_ms)


@dataclass
class Road:
    """The way to the recipient's shard, which knows by key what it has stored.

    Attributes:
        mode: ok | lost (it arrives, its answer does not) | full (refused for now) | bad (refused for good) |
            away (no router).
        stored: by idempotency key when it was stored first.
    """

    clock: ManualClock
    mode: str = "ok"
    stored: dict[str, int] = field(default_factory=dict)
    ids: set[bytes] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)

    async def request(self, message: Publish, timeout_s: float) -> Outcomes:
        (event,) = message.events
        if self.mode == "full":
            return Outcomes([Outcome(event.id, 0, "failed", [], code="overloaded", detail="full")])
        assert event.idempotency_key is not None
        if self.mode == "bad" and event.idempotency_key not in self.stored:
            self.refused.add(event.idempotency_key)
            return Outcomes([Outcome(event.id, 0, "failed", [], code="invalid", detail="bad")])
        self.stored.setdefault(event.idempotency_key, self.clock.now_ms())
        self.ids.add(event.id)
        if self.mode == "lost":
            raise UnavailableError("no answer")
        return Outcomes([Outcome(event.id, 1, "stored", ["in_app"])])


RULES = st.one_of(
    st.integers(0, 300).map(lambda minutes: {"at": rfc3339(START + minutes * MINUTE)}),
    st.tuples(
        st.sampled_from([0, 10, 40]) | st.integers(0, 90),
        st.sampled_from([10, 10, 20]) | st.integers(10, 90),
        st.none() | st.integers(1, 6),
    ).map(
        lambda three: {
            "localAt": rfc3339(START + three[0] * MINUTE)[:19],
            "rrule": f"FREQ=MINUTELY;INTERVAL={three[1]}" + (f";COUNT={three[2]}" if three[2] else ""),
        }
    ),
    st.integers(0, 59).map(lambda minute: {"cron": f"{minute} * * * *", "timezone": "Europe/Vienna"}),
)
LOOKS = st.lists(
    st.tuples(
        # Often at the very moment of an occurrence.
        st.integers(1, 18).map(lambda tens: tens * 10 * MINUTE)
        | st.integers(1, 9).map(lambda tens: tens * 10 * MINUTE)
        | st.sampled_from([250, 5000, 31_000])
        | st.integers(1, 3 * 60 * MINUTE),
        st.sampled_from(["ok", "ok", "ok", "lost", "full", "bad", "away"]),
        st.sampled_from([False, False, True]),
        st.booleans(),
    ),
    max_size=14,
)


def occurrences(rule: dict[str, Any], until_ms: int) -> list[int]:
    """All up to a time."""
    when, found = parse(rule), list[int]()
    while (at_ms := next_ms(when, found[-1] if found else START - 1)) is not None and at_ms <= until_ms:
        found.append(at_ms)
    return found


def shard(kept: Kept, road: Road) -> Schedules:
    """One that has just begun."""
    made = Schedules(
        cast("Any", None), road.clock, Stats(), SETTINGS, name="shard-a", term=lambda: 1, slots=lambda: [1],
        router=lambda: None if road.mode == "away" else cast("Any", road), fenced=lambda: None,
    )  # fmt: skip
    made._store_ = cast("Any", Store(kept))
    return made


async def _run(rule: dict[str, Any], looks: list[tuple[int, str, bool, bool]]) -> None:
    clock = ManualClock(START)
    first = next_ms(parse(rule), START - 1)
    assert first is not None
    single = "at" in rule
    kept = Kept(json.dumps(rule), first, first, single)
    road = Road(clock)
    owner = shard(kept, road)
    clean = (31_000, "ok", False)
    # At the end what is claimed is settled; then a look comes at the very moment of an occurrence, an earlier
    # one being missed.
    for pause_ms, mode, breaks, restart in [*looks, (*clean, True), (*clean, False), (0, "ok", False, False)]:
        if not pause_ms:
            two = upcoming(parse(rule), clock.now_ms(), "UTC", 2)
            pause_ms = two[-1] - clock.now_ms() if two else 1
        clock.advance(pause_ms / 1000)
        if restart:
            owner = shard(kept, road)
        road.mode, kept.breaks = mode, breaks
        claimed = kept.due_ms > kept.next_ms  # by a claim whose end is not known, or to be tried again
        before = dict(road.stored)
        await owner._sweep()
        if mode == "ok" and not breaks and not claimed:
            assert kept.state != "active" or kept.next_ms > clock.now_ms(), "what is due is sent at once"
            for key in road.stored.keys() - before.keys():
                late_ms = clock.now_ms() - int(key.rsplit(":", 1)[1])
                assert late_ms <= pause_ms, "it was due at the look before"
    due = occurrences(rule, clock.now_ms())
    sent = [int(key.rsplit(":", 1)[1]) for key in road.stored]
    assert all(key.startswith(f"schedules:{uuid_text(ID)}:") for key in road.stored)
    assert set(sent) <= set(due), "only at its times"
    assert all(at <= when for at, when in zip(sent, road.stored.values(), strict=True)), "not before"
    assert kept.fired == len(sent), "each is told as sent once"
    refused = road.refused - road.stored.keys()
    assert kept.fired + kept.missed + len(refused) == len(due), "each was sent, refused or counted as missed"
    assert (kept.state == "active") == (next_ms(parse(rule), clock.now_ms()) is not None)
    if single and not refused:
        assert sent == due
        assert road.ids <= {ID}, "the id that was told when it was scheduled"
    if due:
        assert sent or refused, "of what was missed one is sent"


@settings(max_examples=200)
@given(RULES, LOOKS)
def test_each_occurrence_comes_once_and_in_time(
    rule: dict[str, Any], looks: list[tuple[int, str, bool, bool]]
) -> None:
    """Shards that die between sending and writing it down, answers that are lost, routers that are away or
    full, looks that come hours late: none is sent twice, early or never; a look sends what is due."""
    asyncio.run(_run(rule, looks))


ZONES = st.sampled_from(["UTC", "Europe/Vienna", "Pacific/Kiritimati", "America/Los_Angeles", "Asia/Kolkata"])


async def _travels(hours: int, journey: list[tuple[int, str]]) -> None:
    clock = ManualClock(START)
    local = datetime(2026, 3, 30, 9) + timedelta(hours=hours)  # noqa: DTZ001  a local time
    rule = {"localAt": local.isoformat(), "timezone": "user"}
    when = parse(rule)
    at_ms = next_ms(when, -1, "UTC")
    assert at_ms is not None
    kept = Kept(json.dumps(rule), at_ms, look_ms(when, at_ms, START, 900), True)
    road = Road(clock)
    owner = shard(kept, road)
    for pause_ms, zone in [
        *journey,
        (-30_000, journey[-1][1]),
        (10**9, journey[-1][1]),
        (10**9, journey[-1][1]),
    ]:
        if pause_ms < 0:  # so long before it is due where the user is
            due_ms = round(local.replace(tzinfo=ZoneInfo(zone)).timestamp()) * 1000
            pause_ms = max(1, due_ms + pause_ms - clock.now_ms())
        clock.advance(pause_ms / 1000)
        kept.user_zone = zone
        await owner._sweep()
        if road.stored:
            ((key, sent_ms),) = road.stored.items()
            wanted = round(local.replace(tzinfo=ZoneInfo(zone)).timestamp()) * 1000
            if sent_ms == clock.now_ms():
                assert int(key.rsplit(":", 1)[1]) == wanted, "that local time where the user is now"
            assert sent_ms >= int(key.rsplit(":", 1)[1]), "not before"
    assert len(road.stored) == 1, "once, however often the user crosses it"
    assert (kept.state, kept.fired) == ("done", 1)


JOURNEYS = st.lists(
    st.tuples(
        st.integers(1, 30).map(lambda hours: hours * 60 * MINUTE) | st.just(900_000),
        ZONES,
    ),
    min_size=1,
    max_size=12,
)


@given(st.integers(-12, 12), JOURNEYS)
def test_who_travels_gets_it_once_at_the_local_time(hours: int, journey: list[tuple[int, str]]) -> None:
    """Wherever the user goes before, and back: one notification, at that time on the user's own clock."""
    asyncio.run(_travels(hours, journey))
