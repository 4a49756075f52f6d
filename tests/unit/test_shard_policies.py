"""What a shard knows of policies when reads overtake each other."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.shard_policies import Policies
from carillon.errors import StoreUnavailableError
from carillon.settings import PresenceSettings, ShardSettings


class SlowStore:
    """One policy; what is asked sees it as it is then, and is answered when the test says so.

    Attributes:
        hold: the policy's holdS.
    """

    def __init__(self) -> None:
        self.hold = 0
        self.asked: list[tuple[asyncio.Future[Any], dict[str, Any]]] = []

    async def policies(self, tenants: Sequence[str]) -> dict[str, Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.asked.append((future, {tenant: {"holdS": self.hold} for tenant in tenants}))
        return await future

    def answer(self, at: int) -> None:
        future, found = self.asked.pop(at)
        future.set_result(found)


def policies(store: Any) -> Policies:
    return Policies(store, ShardSettings(), PresenceSettings())


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def read_once() -> tuple[SlowStore, Policies]:
    """Policies that know the tenant, as its first user had it read."""
    store = SlowStore()
    known = policies(store)
    first = asyncio.create_task(known.ensure(["t"]))
    await turn()
    store.answer(0)
    await first
    return store, known


async def test_of_a_strange_tenant_nothing_is_read() -> None:
    """Its first user will have it read."""
    store = SlowStore()
    assert await policies(store).read_again("t") is False
    assert store.asked == []


async def test_a_first_read_that_is_under_way_is_not_the_last() -> None:
    """The tenant's first user had it read before the change was committed: it is read once more."""
    store = SlowStore()
    known = policies(store)
    first = asyncio.create_task(known.ensure(["t"]))
    await turn()
    store.hold = 7
    told = asyncio.create_task(known.read_again("t"))
    await turn()
    store.answer(1)
    assert await told is True
    store.answer(0)  # it saw what was before
    await first
    assert known.of("t").default.hold_ms == 7000


async def test_many_at_once_are_two_reads() -> None:
    """While one is on its way the others gather."""
    store, known = await read_once()
    told = [asyncio.create_task(known.read_again("t")) for _ in range(50)]
    await turn()
    store.answer(0)
    await turn()
    assert len(store.asked) <= 1
    for at in range(len(store.asked)):
        store.answer(at)
    assert await asyncio.gather(*told) == [True] * 50


async def test_a_read_that_fails_leaves_what_was_known() -> None:
    """And says so to who told of the change; the next one is right."""
    store, known = await read_once()
    store.hold = 7
    told = asyncio.create_task(known.read_again("t"))
    await turn()
    store.asked.pop()[0].set_exception(StoreUnavailableError("away", 1.0))
    with pytest.raises(StoreUnavailableError):
        await told
    assert known.of("t").default.hold_ms == 0
    told = asyncio.create_task(known.read_again("t"))
    await turn()
    store.answer(0)
    assert await told is True
    assert known.of("t").default.hold_ms == 7000


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(("change", "tell", "look", "answer")), st.integers(0, 9)), max_size=40)
)
def test_what_was_told_holds_whatever_overtakes_what(steps: list[tuple[str, int]]) -> None:
    """In any order of changes, tellings, looks and answers: once a telling is answered the policy is at least
    as new as it was when the telling was asked for, and it never becomes older again."""

    async def run() -> None:
        store = SlowStore()
        known = policies(store)
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(known.ensure(["t"]))]
        tellings: list[tuple[asyncio.Task[Any], int]] = []
        await turn()
        newest = -1

        def check() -> None:
            nonlocal newest
            present = known.of("t").default.hold_ms // 1000 if "t" in known._known else -1
            assert present >= newest
            newest = present
            for task, least in tellings:
                assert not task.done() or present >= least

        for what, which in steps:
            if what == "change":
                store.hold += 1
            elif what == "tell":
                tellings.append((asyncio.create_task(known.read_again("t")), store.hold))
            elif what == "look":
                tasks.append(asyncio.create_task(known._read(["t"])))
            elif store.asked:
                store.answer(which % len(store.asked))
            await turn()
            check()
        while store.asked:
            store.answer(0)
            await turn()
            check()
        await asyncio.gather(*tasks, *(task for task, _ in tellings))
        check()

    asyncio.run(run())
