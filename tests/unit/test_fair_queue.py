"""The append queue between tenants."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from actors.fair_queue import FairQueue

TENANTS = "abcde"


@given(st.lists(st.one_of(st.sampled_from(TENANTS), st.integers(1, 7)), max_size=80))
def test_everybody_has_a_turn(acts: list[str | int]) -> None:
    """Nothing is lost, nothing overtakes within a tenant, a batch is as full as it can be, and gives each
    tenant that waits its share of it; if there are more tenants than places, who was left out is next."""
    queue: FairQueue[tuple[str, int]] = FairQueue()
    model: dict[str, deque[int]] = {}
    left_out: set[str] = set()
    for number, act in enumerate(acts):
        if isinstance(act, str):
            queue.append(act, (act, number))
            model.setdefault(act, deque()).append(number)
        else:
            waiting = {tenant: len(line) for tenant, line in model.items() if line}
            batch = queue.take(act)
            assert len(batch) == min(act, sum(waiting.values()))
            had = dict.fromkeys(waiting, 0)
            for tenant, entry in batch:
                assert model[tenant].popleft() == entry
                had[tenant] += 1
            if waiting:
                share = act // len(waiting)
                assert all(had[tenant] >= min(share, count) for tenant, count in waiting.items())
                if len(waiting) <= act:
                    assert all(had.values())
                else:
                    served = {tenant for tenant in waiting if had[tenant]}
                    assert not left_out - served or served <= left_out
                left_out = {tenant for tenant in waiting if not had[tenant]}
        assert len(queue) == sum(map(len, model.values()))
        assert bool(queue) == any(model.values())
        for tenant in TENANTS:
            assert queue.waiting(tenant) == len(model.get(tenant, ()))
    assert sorted(queue.drained()) == sorted((t, n) for t, line in model.items() for n in line)
    assert not queue


def test_a_long_line_holds_nobody_up() -> None:
    """50,000 of one tenant wait; one of another is in the next batch."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(50_000):
        queue.append("noisy", "n")
    queue.append("quiet", "q")
    assert "q" in queue.take(512)
    assert len(queue) == 50_001 - 512
