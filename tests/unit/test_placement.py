"""Placement: slot assignment, leases, losses, wanted actors."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from carillon.ids import SLOTS
from carillon.messages import Address, Member
from carillon.placement import (
    EPOCH_STRIDE,
    ActorSpec,
    LeaseTable,
    NodeInfo,
    RebalanceTimer,
    add_histograms,
    add_totals,
    assign_slots,
    build_map,
    decide_losses,
    empty_owners,
    map_version,
    moved_slots,
    node_suspects,
    ownerless,
    wanted_actors,
)
from carillon.settings import Settings

NAMES = [f"shard-{letter}-{index}" for letter in "abcdef" for index in range(2)]
shard_sets = st.sets(st.sampled_from(NAMES), min_size=1)
some_owners = st.lists(
    st.tuples(st.one_of(st.none(), st.sampled_from(NAMES)), st.integers(1, 400)), min_size=1, max_size=12
)
# Runs of slots, repeated until all have an owner: 1,024 single draws would take a second per example.
any_owners = some_owners.map(lambda runs: ([o for o, n in runs for _ in range(n)] * SLOTS)[:SLOTS])


def counts(owners: list[str | None]) -> Counter[str | None]:
    return Counter(owners)


def histories() -> st.SearchStrategy[list[set[str]]]:
    return st.lists(shard_sets, min_size=1, max_size=8)


@given(histories())
def test_every_slot_has_an_owner_and_counts_differ_by_at_most_one(history: list[set[str]]) -> None:
    """After any sequence of joins and leaves all slots are owned by present shards, fairly."""
    owners = empty_owners()
    for shards in history:
        owners = assign_slots(owners, shards)
        held = counts(owners)
        assert set(held) <= shards
        sizes = [held[name] for name in shards]
        assert sum(sizes) == SLOTS
        assert max(sizes) - min(sizes) <= 1


@given(any_owners, shard_sets)
def test_no_fair_assignment_moves_fewer_slots(owners: list[str | None], shards: set[str]) -> None:
    """The number of moved slots equals the lower bound that fairness allows."""
    after = assign_slots(owners, shards)
    moved = len(moved_slots(owners, after))
    held = sorted((sum(1 for o in owners if o == name) for name in shards), reverse=True)
    base, odd = divmod(SLOTS, len(shards))
    # Whatever the assignment, `odd` shards end with base + 1 and the others with base: at best the largest
    # holders are those with base + 1, and each keeps min(held, target).
    kept_at_most = sum(min(h, base + (1 if rank < odd else 0)) for rank, h in enumerate(held))
    assert moved == SLOTS - kept_at_most


@given(histories())
def test_assignment_does_not_depend_on_the_order_of_the_shards(history: list[set[str]]) -> None:
    """The same history gives the same map, in whatever order the shards are listed."""
    left, right = empty_owners(), empty_owners()
    for shards in history:
        left = assign_slots(left, sorted(shards))
        right = assign_slots(right, sorted(shards, reverse=True))
    assert left == right


@given(any_owners, shard_sets)
def test_a_fair_map_is_left_alone(owners: list[str | None], shards: set[str]) -> None:
    """Assigning again changes nothing."""
    once = assign_slots(owners, shards)
    assert assign_slots(once, shards) == once


@given(shard_sets, st.sampled_from(NAMES))
def test_a_join_moves_slots_only_to_the_newcomer(shards: set[str], newcomer: str) -> None:
    """A join takes the newcomer's fair share, from anybody, and touches nothing else."""
    before = assign_slots(empty_owners(), shards)
    after = assign_slots(before, shards | {newcomer})
    moves = moved_slots(before, after)
    assert set(moves.values()) <= {newcomer}
    if newcomer not in shards:
        assert len(moves) in (SLOTS // (len(shards) + 1), math.ceil(SLOTS / (len(shards) + 1)))


@given(st.sets(st.sampled_from(NAMES), min_size=2), st.data())
def test_a_leave_moves_only_the_leavers_slots(shards: set[str], data: st.DataObject) -> None:
    """What the others own stays where it is."""
    leaver = data.draw(st.sampled_from(sorted(shards)))
    before = assign_slots(empty_owners(), shards)
    after = assign_slots(before, shards - {leaver})
    assert {before[slot] for slot in moved_slots(before, after)} <= {leaver}


@given(any_owners, shard_sets, shard_sets)
def test_an_absent_shard_keeps_what_it_owns_and_gets_nothing(
    owners: list[str | None], shards: set[str], absent: set[str]
) -> None:
    """A restarting shard's slots stay; the rest is shared fairly by those who are there."""
    present = shards - absent
    after = assign_slots(owners, present, absent)
    for slot, owner in enumerate(owners):
        if owner in absent or not present:
            assert after[slot] == owner
        else:
            assert after[slot] in present
    if present:
        held = counts(after)
        sizes = [held[name] for name in present]
        assert max(sizes) - min(sizes) <= 1


def test_without_shards_every_slot_keeps_its_owner() -> None:
    """Nobody to give to: ownership is not thrown away."""
    owners: list[str | None] = ["gone"] * SLOTS
    assert assign_slots(owners, []) == owners
    assert ownerless(owners, []) == SLOTS


def member(kind: str, name: str, node: str = "n", term: int = 0) -> Member:
    return Member(kind, name, node, "i", Address("h", 1), term=term)


@given(any_owners, shard_sets)
def test_the_map_names_each_slots_owner(owners: list[str | None], shards: set[str]) -> None:
    """`owners` index `shards`; an owner that is no member is -1."""
    built = build_map(7, owners, {name: member("shard", name) for name in shards}, [member("router", "r")])
    for slot, owner in enumerate(owners):
        at = built.owners[slot]
        assert (built.shards[at].name if at >= 0 else None) == (owner if owner in shards else None)
    assert [m.name for m in built.members] == ["r"]


@given(st.integers(1, 1000), st.integers(1, EPOCH_STRIDE - 1), st.integers(1, EPOCH_STRIDE - 1))
def test_a_newer_coordinators_maps_are_newer(epoch: int, late: int, early: int) -> None:
    """However many maps the old coordinator made, the next epoch's first is higher."""
    assert map_version(epoch + 1, early) > map_version(epoch, late)


# -- leases -------------------------------------------------------------------------------------------


def leases() -> LeaseTable:
    return LeaseTable(timeout_s=4.0, tick_s=0.25, stall_s=1.0)


def tick_until(table: LeaseTable, start: float, end: float, renewing: list[str]) -> set[str]:
    """Tick every 0.25 s, renewing some members each second; returns who was reported lapsed."""
    lapsed: set[str] = set()
    now = start
    while now < end:
        now += 0.25
        if (now - start) % 1.0 == 0:
            for name in renewing:
                table.renew(name, now)
        lapsed |= table.tick(now).lapsed
    return lapsed


def test_a_silent_member_lapses_and_a_renewing_one_does_not() -> None:
    """The lease decides, member by member."""
    table = leases()
    for name in "ab":
        table.grant(name, 0.0)
    assert tick_until(table, 0.0, 4.0, ["a"]) == set()
    assert tick_until(table, 4.0, 5.0, ["a"]) == {"b"}


def test_a_late_tick_gives_everyone_a_fresh_lease() -> None:
    """The coordinator was not scheduled: silence meanwhile means nothing."""
    table = leases()
    for name in "ab":
        table.grant(name, 0.0)
    table.tick(0.25)
    table.renew("a", 0.3)
    result = table.tick(60.0)
    assert result.stalled_s > 59
    assert result.lapsed == frozenset()
    assert tick_until(table, 60.0, 63.75, ["a"]) == set()
    assert tick_until(table, 63.75, 65.0, ["a"]) == {"b"}


def test_all_leases_together_are_a_stall_and_not_a_loss() -> None:
    """A machine that was asleep moves nothing, even if the coordinator's own ticks came on time."""
    table = leases()
    for name in "abc":
        table.grant(name, 0.0)
    assert tick_until(table, 0.0, 30.0, []) == set()


def test_a_single_member_still_lapses() -> None:
    """One member alone is no "all together"."""
    table = leases()
    table.grant("a", 0.0)
    assert tick_until(table, 0.0, 5.0, []) == {"a"}


def test_a_dropped_member_cannot_renew() -> None:
    """It has to join again."""
    table = leases()
    table.grant("a", 0.0)
    table.drop("a")
    assert not table.renew("a", 1.0)
    assert table.is_lapsed("a", 1.0)


@given(
    st.lists(st.tuples(st.floats(0.01, 3.0), st.sets(st.sampled_from("abcd"))), max_size=60),
)
def test_nobody_is_lapsed_who_renewed_within_the_timeout(steps: list[tuple[float, set[str]]]) -> None:
    """Whatever the pattern of ticks and renewals, a reported lapse means more silence than the lease."""
    table = leases()
    heard = dict.fromkeys("abcd", 0.0)
    for name in heard:
        table.grant(name, 0.0)
    now = 0.0
    for gap, renewing in steps:
        now += gap
        for name in renewing:
            table.renew(name, now)
            heard[name] = now
        for name in table.tick(now).lapsed:
            assert now - heard[name] > 4.0


# -- losses -------------------------------------------------------------------------------------------


def test_a_lapsed_shard_is_lost_only_if_another_lives() -> None:
    """Without anybody to take the slots, slow is better than ownerless."""
    assert decide_losses({"s1"}, {"s1", "s2"}, {"s2"}).shards == {"s1"}
    assert decide_losses({"s1"}, {"s1"}, set()).shards == frozenset()
    assert decide_losses({"s1", "s2"}, {"s1", "s2"}, {"s2"}).shards == frozenset()


def test_members_without_slots_are_lost_at_once() -> None:
    """A gateway needs no successor."""
    assert decide_losses({"g", "s"}, {"s"}, set()).others == {"g"}


def test_a_node_whose_links_are_all_closed_goes_as_one() -> None:
    """One lapsed lease and no open link: the rest of that node is gone too, and no other node."""
    members = [("a0", "A", False), ("a1", "A", False), ("b0", "B", True), ("b1", "B", False)]
    assert node_suspects({"a0"}, members) == {"a0", "a1"}
    assert node_suspects({"b1"}, members) == frozenset()
    assert node_suspects(set(), members) == frozenset()


def test_several_joins_are_rebalanced_once_and_not_put_off_for_ever() -> None:
    """Each join restarts the wait, up to five waits after the first."""
    timer = RebalanceTimer(1.0)
    assert not timer.is_due(100.0)
    timer.joined(0.0)
    timer.joined(0.8)
    assert not timer.is_due(1.5)
    assert timer.is_due(1.8)
    for tenth in range(100):
        timer.joined(tenth / 10)
    assert timer.is_due(5.0)
    timer.done()
    assert not timer.is_due(50.0)


# -- actors -------------------------------------------------------------------------------------------


def test_each_node_gets_shards_a_router_and_a_gateway_and_the_head_the_pools() -> None:
    """Pools follow the credentials; everything else is per node."""
    settings = Settings().with_values(
        cluster={"shards_per_node": 3}, push={"fcm_credentials": "f.json", "apns_key_file": "k.p8"}
    )
    specs = wanted_actors(settings, [NodeInfo("b"), NodeInfo("a"), NodeInfo("c", is_head=True)])
    for node in "abc":
        assert sorted(s.kind for s in specs if s.node == node and s.kind != "pool") == [
            "gateway",
            "router",
            "shard",
            "shard",
            "shard",
        ]
    assert [s for s in specs if s.kind == "pool"] == [
        ActorSpec("c", "pool", 0, "fcm"),
        ActorSpec("c", "pool", 0, "apns"),
    ]
    assert len(specs) == len(set(specs))


def test_without_credentials_there_is_no_pool() -> None:
    """A provider nobody can log in to gets no process."""
    assert {s.kind for s in wanted_actors(Settings(), [NodeInfo("a")])} == {"gateway", "router", "shard"}


def test_totals_add_up() -> None:
    """Counters add by name, histograms by bucket; another number of buckets replaces."""
    assert add_totals({"a": 1}, {"a": 2, "b": 3}) == {"a": 3, "b": 3}
    assert add_histograms({"h": [1, 2]}, {"h": [3, 4], "g": [5]}) == {"h": [4, 6], "g": [5]}
    assert add_histograms({"h": [1, 2]}, {"h": [3]}) == {"h": [3]}
