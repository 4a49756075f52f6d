"""Which event loops the integration tests run on."""

from __future__ import annotations

import asyncio
from typing import Any

import uvloop


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Any]:
    """Streams take their socket out of the HTTP server's hands: that is tried on the loop of Ray's actors."""
    if item.path.name == "test_streams.py":
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}
