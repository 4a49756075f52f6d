"""A loop in a thread of its own, for tests that hypothesis calls from a plain function."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopApart:
    """Runs coroutines on a loop of its own; a context manager."""

    def __enter__(self) -> LoopApart:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 280.0) -> T:
        """Run it to its end, from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)
