"""Many callers, one question: while one is on its way, the next gathers.

What a group commit is for writes this is for reads: under load one statement answers for many requests, and a
single request waits for nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Gather(Generic[K, V]):
    """Asks for many keys at once.

    Args:
        ask: answers a list of keys, in their order. What it raises, all who asked get.
        max_batch: keys of one question.
    """

    def __init__(self, ask: Callable[[list[K]], Awaitable[Sequence[V]]], max_batch: int = 100) -> None:
        self._ask = ask
        self._max_batch = max_batch
        self._waiting: deque[tuple[K, asyncio.Future[V]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def get(self, key: K) -> V:
        """The answer for a key. Cancellation: the question goes on for the others."""
        return await self.ask_nowait(key)

    def ask_nowait(self, key: K) -> asyncio.Future[V]:
        """The answer to come for a key. Whoever does not need it any more cancels it."""
        future: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        self._waiting.append((key, future))
        if self._task is None:
            self._task = asyncio.ensure_future(self._run())
        return future

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_batch))]
                batch = [(key, future) for key, future in batch if not future.done()]
                if batch:
                    await self._answer(batch)
        finally:
            self._task = None
            while self._waiting:  # cancelled: nobody else will answer them
                self._waiting.popleft()[1].cancel()

    async def _answer(self, batch: list[tuple[K, asyncio.Future[V]]]) -> None:
        try:
            answers = await self._ask([key for key, _ in batch])
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        except Exception as exc:
            for _, future in batch:
                if not future.done():
                    future.set_exception(exc)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)

    async def close(self) -> None:
        """Stop; those who wait are cancelled."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
