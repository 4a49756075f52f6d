"""Helpers shared by the suites."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any


async def eventually(
    check: Callable[[], Any] | Callable[[], Awaitable[Any]], timeout_s: float = 60.0, what: str = ""
) -> Any:
    """Poll `check` until it returns something true; fail with the last answer after `timeout_s`.

    The default is no claim about speed: a machine that others load takes many times as long as an idle one.
    """
    deadline = time.monotonic() + timeout_s
    last: Any = None
    while True:
        try:
            last = check()
            if asyncio.iscoroutine(last):
                last = await last
            if last:
                return last
        except AssertionError as exc:
            last = exc
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what or check}; last answer: {last!r}")
        await asyncio.sleep(0.01)


async def settle(timeout_s: float = 2.0) -> None:
    """Wait until the running loop has no open socket and none that is being accepted.

    A leak is no error here: the warning about it names the socket. uvloop does not show what it has open.
    """
    loop = asyncio.get_running_loop()
    transports: Any = getattr(loop, "_transports", {})
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        accepting = any("accept" in task.get_coro().__qualname__ for task in asyncio.all_tasks())  # type: ignore[union-attr]
        if not accepting and all(transport._sock is None for transport in list(transports.values())):
            return
        await asyncio.sleep(0.005)
