"""Which event loops the actor tests run on."""

from __future__ import annotations

import asyncio
from typing import Any

import uvloop


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Any]:
    """Links run on both loops: Ray's actors use uvloop, the command line asyncio's own. So do gateways, whose
    buffers and closing the two treat differently."""
    if item.path.name in (
        "test_link.py",
        "test_gateway.py",
        "test_gateway_limits.py",
        "test_shard_timers.py",
    ):
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}
