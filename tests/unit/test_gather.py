"""Questions asked together."""

from __future__ import annotations

import asyncio

import pytest

from stores.gather import Gather


class Asked:
    """Answers when told to, and remembers who asked with whom."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self, keys: list[int]) -> list[int]:
        self.batches.append(keys)
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return [key * 10 for key in keys]


async def settle() -> None:
    """Let every task that can run, run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_next_question_gathers() -> None:
    """One asks at once; those who come meanwhile share the next question, in batches of the bound."""
    ask = Asked()
    gather = Gather(ask, max_batch=3)
    waiting = [asyncio.ensure_future(gather.get(n)) for n in range(1)]
    await settle()
    waiting += [asyncio.ensure_future(gather.get(n)) for n in range(1, 6)]
    await settle()
    assert ask.batches == [[0]]
    ask.go.set()
    assert await asyncio.gather(*waiting) == [0, 10, 20, 30, 40, 50]
    assert ask.batches == [[0], [1, 2, 3], [4, 5]]
    assert await gather.get(7) == 70


async def test_an_error_is_everybodys() -> None:
    """What the question raises all who asked get, and the next question is a new one."""
    ask = Asked()
    ask.go.set()
    ask.error = ValueError("no")
    gather = Gather(ask)
    results = await asyncio.gather(gather.get(1), gather.get(2), return_exceptions=True)
    assert [type(one) for one in results] == [ValueError, ValueError]
    ask.error = None
    assert await gather.get(3) == 30


async def test_one_who_leaves_takes_nobody_along() -> None:
    """A caller that is cancelled leaves the others their answer, and is not asked for if there is time."""
    ask = Asked()
    gather = Gather(ask)
    first = asyncio.ensure_future(gather.get(1))
    await settle()
    left, stays = asyncio.ensure_future(gather.get(2)), asyncio.ensure_future(gather.get(3))
    await settle()
    first.cancel()
    left.cancel()
    await settle()
    ask.go.set()
    assert await stays == 30
    assert ask.batches == [[1], [3]]


async def test_close_leaves_nobody_waiting() -> None:
    """Those who wait when it is closed are cancelled, those in the question and those behind it."""
    ask = Asked()
    gather = Gather(ask)
    waiting = [asyncio.ensure_future(gather.get(1))]
    await settle()
    waiting.append(asyncio.ensure_future(gather.get(2)))
    await settle()
    await gather.close()
    for one in waiting:
        with pytest.raises(asyncio.CancelledError):
            await one
