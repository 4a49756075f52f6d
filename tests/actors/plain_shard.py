"""A shard in a process of its own, without Ray: `python -m tests.actors.plain_shard`, its config on stdin."""

from __future__ import annotations

import asyncio
import logging
import pickle
import sys

from actors.config import ActorConfig
from actors.shard import Shard


async def run(config: ActorConfig) -> None:
    """Serve until the process is ended."""
    shard = Shard(config)
    await shard.start()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    asyncio.run(run(pickle.load(sys.stdin.buffer)))
