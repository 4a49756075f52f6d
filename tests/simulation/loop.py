"""An asyncio event loop whose clock is virtual, and the nodes (processes) that live on it.

Time jumps to the next timer as soon as nothing is left to do, so an hour of a cluster costs what its events
cost. Everything that is scheduled belongs to the node in whose context it was scheduled: a node can be killed
(nothing of it ever runs again, as after SIGKILL) or frozen (SIGSTOP: what would have run waits for the thaw).
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from asyncio import events
from collections.abc import Callable
from typing import Any

NODE: contextvars.ContextVar[Node | None] = contextvars.ContextVar("node", default=None)


class Stuck(Exception):
    """Nothing is scheduled any more, and what was waited for has not happened."""


class Node:
    """One process: what it schedules can be ended or held up as a whole."""

    __slots__ = ("backlog", "context", "dead", "frozen", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.frozen = False
        self.backlog: list[events.Handle] = []
        self.context = contextvars.copy_context()
        self.context.run(NODE.set, self)

    @property
    def runs(self) -> bool:
        """Neither dead nor frozen."""
        return not (self.dead or self.frozen)


class SimLoop(asyncio.BaseEventLoop):
    """The loop. Deterministic as long as what runs on it is: no threads, no sets ordered by address."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.network: Any = None
        self._timers: list[tuple[float, int, events.TimerHandle]] = []
        self._order = 0

    def time(self) -> float:
        """See `asyncio.AbstractEventLoop.time`."""
        return self.now

    def _run_once(self) -> None:
        """One turn: what is ready; if nothing is, time goes to the next timer."""
        ready = self._ready
        if not ready:
            timers = self._timers
            while timers and timers[0][2]._cancelled:
                heapq.heappop(timers)
            if not timers:
                raise Stuck
            if timers[0][0] > self.now:
                self.now = timers[0][0]
            while timers and timers[0][0] <= self.now:
                handle = heapq.heappop(timers)[2]
                if not handle._cancelled:
                    ready.append(handle)
        for _ in range(len(ready)):
            if not ready:
                break  # a node was frozen in this turn, and took its part along
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    # -- scheduling -------------------------------------------------------------------------------------

    def call_soon(
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> events.Handle:
        """See `asyncio.AbstractEventLoop.call_soon`."""
        if context is None:
            context = contextvars.copy_context()
        handle = events.Handle(callback, args, self, context)
        node = context.get(NODE)
        if node is None or not (node.dead or node.frozen):
            self._ready.append(handle)
        elif node.dead:
            handle.cancel()
        else:
            node.backlog.append(handle)
        return handle

    def call_at(
        self,
        when: float,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> events.TimerHandle:
        """See `asyncio.AbstractEventLoop.call_at`."""
        if context is None:
            context = contextvars.copy_context()
        handle = events.TimerHandle(when, callback, args, self, context)
        node = context.get(NODE)
        if node is None or not (node.dead or node.frozen):
            self._order = order = self._order + 1
            heapq.heappush(self._timers, (when, order, handle))
        elif node.dead:
            handle.cancel()
        else:
            node.backlog.append(handle)
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> events.TimerHandle:
        """See `asyncio.AbstractEventLoop.call_later`."""
        return self.call_at(self.now + delay, callback, *args, context=context)

    # -- nodes ------------------------------------------------------------------------------------------

    def kill(self, node: Node) -> None:
        """Nothing of this node runs any more. What it had open is the network's matter."""
        node.dead = True
        node.backlog.clear()
        for handle in (*self._ready, *(timer[2] for timer in self._timers)):
            if not handle._cancelled and handle._context.get(NODE) is node:
                handle.cancel()

    def freeze(self, node: Node) -> None:
        """Stop a node as SIGSTOP does: its timers and input wait."""
        node.frozen = True
        ready = list(self._ready)
        self._ready.clear()
        for handle in ready:
            mine = handle._context.get(NODE) is node
            (node.backlog if mine else self._ready).append(handle)
        others = []
        for timer in sorted(self._timers):
            if timer[2]._context.get(NODE) is node:
                node.backlog.append(timer[2])
            else:
                others.append(timer)
        self._timers = others  # sorted, hence a heap

    def thaw(self, node: Node) -> None:
        """Let a frozen node go on (SIGCONT): what became due meanwhile runs at once."""
        node.frozen = False
        backlog, node.backlog = node.backlog, []
        for handle in backlog:
            if handle._cancelled:
                continue
            if isinstance(handle, events.TimerHandle):
                self._order += 1
                heapq.heappush(self._timers, (handle._when, self._order, handle))
            else:
                self._ready.append(handle)

    # -- the network ------------------------------------------------------------------------------------

    async def create_server(self, factory: Any, host: Any = None, port: int = 0, **more: Any) -> Any:
        """Listen in the simulated network."""
        return self.network.listen(factory, host, port)

    async def create_connection(self, factory: Any, host: Any = None, port: Any = None, **more: Any) -> Any:
        """Connect in the simulated network."""
        return await self.network.connect(factory, host, port)
