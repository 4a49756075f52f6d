"""One presence query over many shards."""

from __future__ import annotations

import asyncio

from actors.directory import REROUTE_CODES, ShardDirectory
from carillon.errors import LinkClosedError, RemoteError, UnavailableError
from carillon.ids import slot_of
from carillon.messages import PresenceQuery, PresenceReply, UserPresence
from carillon.settings import LinkSettings


async def find_presence(
    directory: ShardDirectory, query: PresenceQuery, timeout_s: float, settings: LinkSettings
) -> PresenceReply:
    """Ask every shard that owns some of the users; those whose slot moved meanwhile are asked for again.

    Returns:
        The users in the order asked; one asked for twice is there twice.

    Raises:
        UnavailableError: some user's shard could not be reached within `timeout_s`. Only a shard knows
            whether a user is there, so that "offline" would be a guess.
        RemoteError, LinkTimeoutError: as a shard answered.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    pause_s = max(settings.reconnect_min_s, 0.01)
    slots = {user: slot_of(query.tenant, user) for user in query.users}
    found: dict[str, UserPresence] = {}
    while True:
        changed = directory.changed()
        groups: dict[str, list[str]] = {}
        for user, slot in slots.items():
            owner = directory.owner(slot) if user not in found else None
            if owner is not None:
                groups.setdefault(owner.name, []).append(user)
        remaining_s = deadline - loop.time()
        if groups and remaining_s > 0:
            parts = [PresenceQuery(query.tenant, users) for users in groups.values()]
            asked = zip(groups, parts, strict=True)
            for users in await asyncio.gather(
                *(_ask(directory, name, part, remaining_s) for name, part in asked)
            ):
                for presence in users:
                    found[presence.user] = presence
        missing = sum(user not in found for user in slots)
        if not missing:
            return PresenceReply([found[user] for user in query.users])
        remaining_s = deadline - loop.time()
        if remaining_s <= 0:
            raise UnavailableError(f"the shards of {missing} users are not reachable")
        await asyncio.wait((changed,), timeout=min(pause_s, remaining_s))
        pause_s = min(pause_s * 2, max(settings.reconnect_max_s, pause_s))


async def _ask(
    directory: ShardDirectory, shard: str, query: PresenceQuery, timeout_s: float
) -> list[UserPresence]:
    """Ask one shard; nothing if it is not there or not the owner (any more)."""
    link = directory.link(shard)
    if link is None:
        return []
    try:
        reply = await link.request(query, timeout_s)
    except LinkClosedError:
        return []
    except RemoteError as exc:
        if exc.code in REROUTE_CODES:
            return []
        raise
    return reply.users
