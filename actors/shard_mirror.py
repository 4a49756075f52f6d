"""The presence of a shard's users in Redis: changes as they come, everybody who is there every so often.

Beside the work: nothing waits for Redis. While it is away changes are forgotten; when it is back, the next
round writes everybody who is there, and who went offline meanwhile has lapsed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from actors.shard_users import User, UserCache
from carillon.clock import Clock
from carillon.ids import UserKey
from carillon.presence import mirror_key, mirror_value
from carillon.settings import PresenceSettings

if TYPE_CHECKING:
    from stores.redis.presence_mirror import PresenceMirror

log = logging.getLogger(__name__)

BATCH = 500
"""Keys of one round trip."""


class Mirror:
    """Keeps the mirror of one shard.

    Args:
        mirror: where it is written; owned.
    """

    def __init__(
        self, mirror: PresenceMirror, users: UserCache, clock: Clock, settings: PresenceSettings
    ) -> None:
        self._mirror = mirror
        self._users = users
        self._clock = clock
        self._coalesce_s = settings.coalesce_s
        self._round_s = settings.mirror_ttl_s / 3
        self._retry_s = min(settings.mirror_retry_s, self._round_s)
        self._changed: dict[UserKey, None] = {}
        self._gone: dict[UserKey, None] = {}
        self._wake = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def changed(self, user: User) -> None:
        """A user's presence changed."""
        self._changed[user.key] = None
        self._wake.set()

    def forget(self, key: UserKey) -> None:
        """Delete a user's key soon; it lapses anyway."""
        self._changed.pop(key, None)
        self._gone[key] = None
        self._wake.set()

    async def _run(self) -> None:
        round_at = self._clock.monotonic()
        while True:
            try:
                async with asyncio.timeout(max(0.0, round_at - self._clock.monotonic())):
                    await self._wake.wait()
                await asyncio.sleep(self._coalesce_s)
            except TimeoutError:
                pass
            self._wake.clear()
            changed, self._changed = self._changed, {}
            try:
                if self._gone:
                    gone, self._gone = self._gone, {}
                    await self._mirror.delete([mirror_key(*key) for key in gone])
                written = await self._write(list(changed))
                if written and self._clock.monotonic() >= round_at:
                    round_at = self._clock.monotonic() + self._round_s
                    written = await self._write(self._there())
            except Exception:
                log.exception("mirroring presence failed")
                written = False
            if not written:
                # Not before it may be back; then everybody at once.
                round_at = self._clock.monotonic() + self._retry_s
                await asyncio.sleep(self._retry_s)

    def _there(self) -> list[UserKey]:
        """Those to be renewed. A key that does not lapse would tell of an invisible user that it is there."""
        users = self._users.users()
        return [u.key for u in users if u.session is not None and u.invisible_since_ms is None]

    async def _write(self, keys: Iterable[UserKey]) -> bool:
        """Write the present state of those users that are (still) here."""
        todo = list(keys)
        for at in range(0, len(todo), BATCH):
            now_ms = self._clock.now_ms()
            entries = []
            for key in todo[at : at + BATCH]:
                user = self._users.peek(key)
                if user is not None:  # else its slot went away: its owner writes
                    entries.append((mirror_key(*key), mirror_value(*user.presence(now_ms))))
            if entries and not await self._mirror.write(entries):
                return False
        return True

    async def close(self) -> None:
        """Stop; keys lapse."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._mirror.close()
