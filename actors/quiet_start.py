"""Importing an actor's modules without taking the processor from the others.

A process that starts in a dead one's place does so in the middle of work: on a machine whose cores are busy
those that live miss what it takes. On Linux niceness belongs to a thread, and any thread may make itself
nicer: so the imports are done by one that has stepped back, and that ends with them. The process' other
threads keep their priority, and nothing needs the privilege of getting one back (CAP_SYS_NICE).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any


def step_back(niceness: int) -> None:
    """Make the calling thread nicer: `niceness` at least (Linux; elsewhere it would be the process)."""
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):  # then it imports as it is
        if os.getpriority(os.PRIO_PROCESS, thread) < niceness:
            os.setpriority(os.PRIO_PROCESS, thread, niceness)


async def import_quietly(names: Sequence[str], niceness: int) -> list[Any]:
    """Import modules in a thread of their own that has stepped back.

    For the time before an actor serves: once others wait for its loop, a nice thread that holds the
    interpreter's lock would make them wait too.

    Args:
        names: of modules.
        niceness: 0 to 19; how far to step back.

    Raises:
        Whatever the import raises.

    Cancellation: the thread goes on to its end; nobody waits for it.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[list[Any]] = loop.create_future()

    def tell(found: list[Any] | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(found or [])

    def work() -> None:
        step_back(niceness)
        found: list[Any] | None = None
        error: BaseException | None = None
        try:
            found = [importlib.import_module(name) for name in names]
        except BaseException as exc:
            error = exc
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, found, error)

    threading.Thread(target=work, name="imports", daemon=True).start()
    return await done
