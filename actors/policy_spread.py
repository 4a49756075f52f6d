"""A changed policy, told to every shard."""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import Final

from actors.directory import ShardDirectory
from carillon.errors import CarillonError
from carillon.messages import PolicyHeld, PolicyRead
from carillon.settings import LinkSettings

log = logging.getLogger(__name__)

MAX_WAIT_S: Final = 30.0
"""Whatever a request asks for."""


async def spread_policy(directory: ShardDirectory, told: PolicyRead, settings: LinkSettings) -> PolicyHeld:
    """Have every shard of the map read a tenant's policy again.

    A shard that is away is asked again until the time is over or it is gone from the map: a new process of
    it knows nothing yet, but the link tells no more than that the old one does not answer.

    Returns:
        How many did, and who did not by then. Never later than asked for.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + min(max(told.wait_ms, 0) / 1000, MAX_WAIT_S)
    pause_s = max(settings.reconnect_min_s, 0.01)
    held: set[str] = set()
    while True:
        changed = directory.changed()
        missing = [member.name for member in directory.shards() if member.name not in held]
        left_s = deadline - loop.time()
        if not missing or left_s <= 0:
            return PolicyHeld(len(held), sorted(missing))
        asking = functools.partial(_ask, directory, told, left_s)
        answers = await asyncio.gather(*(asking(name) for name in missing))
        held.update(name for name, done in zip(missing, answers, strict=True) if done)
        left_s = deadline - loop.time()
        if not all(answers) and left_s > 0:
            await asyncio.wait((changed,), timeout=min(pause_s, left_s))
            pause_s = min(pause_s * 2, max(settings.reconnect_max_s, pause_s))


async def _ask(directory: ShardDirectory, told: PolicyRead, timeout_s: float, shard: str) -> bool:
    link = directory.link(shard)
    if link is None:
        return False
    try:
        await link.request(told, timeout_s)
    except CarillonError as exc:
        log.info("%s has not read the policy of %s: %s", shard, told.tenant, exc)
        return False
    return True
