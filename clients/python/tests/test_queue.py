"""The background queue, driven by hand."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from carillon_client.core.delivery import BatchLimits, Item, item_of
from carillon_client.core.queue import MicroBatcher

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 3)),
        st.tuples(st.just("take"), st.booleans()),
        st.tuples(st.just("finish"), st.integers(0, 5)),
        st.tuples(st.just("wait"), st.integers(1, 10)),
    ),
    max_size=120,
)


def item(user: str, number: int) -> Item:
    return item_of({"type": "t", "title": f"{number:04}", "userId": user}, 1.0, lambda: f"k{number}")


@given(STEPS, st.integers(1, 4), st.integers(1, 3), st.integers(1024, 1200))
@settings(max_examples=300, deadline=None)
def test_nothing_is_lost_and_users_keep_their_order(
    steps: list[tuple[str, int]], most: int, flights: int, most_bytes: int
) -> None:
    """Any interleaving: each item leaves once, in bounds; a user's items leave in order and never in two
    flights."""
    queue = MicroBatcher(BatchLimits(most, most_bytes), 0.005, flights)
    now, number = 0.0, 0
    added: list[Item] = []
    left: list[Item] = []
    flying: list[list[Item]] = []

    def take(flush: bool) -> bool:
        due = queue.due_in_s(now, flush)
        batch = queue.take(now, flush)
        assert bool(batch) == (due == 0.0)
        if batch:
            assert len(batch) <= most
            assert not {i.user for i in batch} & {i.user for other in flying for i in other}
            flying.append(batch)
            left.extend(batch)
            assert len(flying) <= flights
        return bool(batch)

    for step, value in steps:
        if step == "add":
            number += 1
            added.append(item(f"u{value}", number))
            queue.add(now, added[-1])
        elif step == "take":
            take(bool(value))
        elif step == "finish" and flying:
            queue.finish(flying.pop(value % len(flying)))
        elif step == "wait":
            now += value / 1000
        assert len(queue) == len(added) - len(left)
        assert queue.flights == len(flying)
    while take(True) or flying:
        if flying:
            queue.finish(flying.pop())
    assert len(queue) == 0
    assert sorted(i.key for i in left) == sorted(i.key for i in added)
    for user in {i.user for i in added}:
        assert [i.key for i in left if i.user == user] == [i.key for i in added if i.user == user]


def test_an_item_waits_for_company_but_not_longer() -> None:
    """Alone it leaves after the linger time; a full batch and a flush leave at once."""
    queue = MicroBatcher(BatchLimits(max_items=2), 0.005, 4)
    assert queue.due_in_s(0.0) is None
    queue.add(0.0, item("a", 1))
    assert queue.due_in_s(0.002) == 0.003
    assert queue.take(0.002) == []
    assert len(queue.take(0.002, flush=True)) == 1
    queue.add(1.0, item("b", 2))
    queue.add(1.0, item("c", 3))
    assert len(queue.take(1.0)) == 2
