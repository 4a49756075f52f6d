"""Imported by each process that Ray starts on a node with spare processes (`RAY_preload_python_modules`).

A spare process then has behind it not only what Ray does at a start, but the imports of our actors, too: who
waits for it waits for a connection to PostgreSQL and little more, and who shares its cores is not held up. In
a process that has work by the time it looks (Serve's, an actor's that is started now) nothing is imported:
its own start does that.
"""

from __future__ import annotations

import importlib
import threading
import time
from typing import Final

import ray

from actors.quiet_start import step_back

LOOK_AFTER_S: Final = 1.0
"""An actor for which Ray starts a process is in it much sooner; a spare one is idle for longer."""
NICENESS: Final = 10
MODULES: Final = (
    "actors.ray_shell",
    "actors.shard",
    "stores.redis.presence_mirror",
    "actors.gateway",
    "stores.postgres.tenants",
    "stores.postgres.tickets",
    "stores.token_keys",
    "actors.router",
)
"""What shards, gateways and routers import at their start: those whose absence users notice."""


def preload() -> None:
    """Import `MODULES` for as long as the process has no actor."""
    step_back(NICENESS)
    time.sleep(LOOK_AFTER_S)
    for name in MODULES:
        if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is not None:
            return
        importlib.import_module(name)


threading.Thread(target=preload, name="preload", daemon=True).start()
