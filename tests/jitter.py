"""A slow, loaded machine, made from a seed: `pytest -p tests.jitter --jitter 7 tests/actors/test_shard.py`.

What a test leaves to chance shows itself under it in one run, not in one of a hundred:

- Sockets of asyncio's own loop are read late, each by itself, as if its other end did not get the processor.
  Whoever asserts, behind one thing, what came another way finds it missing. (uvloop lets nobody between.)
- The whole process stands still now and then, for up to a third of a second. Whoever has less time than that
  for something to happen is too late.

A test that fails under it is mended by waiting for what it asserts, by a clock that it moves itself, or by a
limit that is no claim.
"""

from __future__ import annotations

import asyncio.selector_events
import ctypes
import random
import threading
import time
from typing import Any

import pytest

LATE_SHARE = 0.08
"""Of the moments in which a socket has become readable or writable: so many are held back."""
LATE_S = 0.06
STALL_EVERY_S = 0.7
STALL_S = 0.35


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--jitter", type=int, default=1, metavar="SEED", help="what tests.jitter does, and when")


def pytest_configure(config: pytest.Config) -> None:
    dice = random.Random(config.getoption("--jitter"))
    _read_late(random.Random(dice.random()))
    stalls = random.Random(dice.random())
    threading.Thread(target=_stand_still, args=(stalls,), daemon=True, name="jitter").start()


def _read_late(dice: random.Random) -> None:
    loop_class: Any = asyncio.selector_events.BaseSelectorEventLoop
    process_events = loop_class._process_events

    def late(self: Any, events: list[Any]) -> None:
        held: dict[int, float] = self.__dict__.setdefault("_jitter_held", {})
        now = time.monotonic()
        ready, waits = [], False
        for key, mask in events:
            until = held.get(key.fd)
            if until is None and key.fd != self._ssock.fileno() and dice.random() < LATE_SHARE:
                until = held[key.fd] = now + dice.random() * LATE_S
            if until is not None and now < until:
                waits = True  # the selector tells it again: it tells what is, not what changed
                continue
            held.pop(key.fd, None)
            ready.append((key, mask))
        if waits and not ready and not self._ready:
            time.sleep(0.001)
        process_events(self, ready)

    loop_class._process_events = late


def _stand_still(dice: random.Random) -> None:
    usleep = ctypes.PyDLL(None).usleep  # PyDLL keeps the interpreter's lock, so that nobody else runs
    while True:
        time.sleep(dice.random() * 2 * STALL_EVERY_S)
        usleep(int(dice.random() * STALL_S * 1_000_000))
