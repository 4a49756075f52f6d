"""What a shard keeps of each user beside notifications: push targets, preferences, tokens, visibility."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from carillon.errors import VersionError
from carillon.ids import UserKey
from carillon.messages import PushTarget
from stores.postgres.shard_connections import ShardConnections


class UserDocuments(ShardConnections):
    """The part of `ShardStore` that is about what users store, each write in a transaction of its own."""

    async def put_target(
        self,
        term: int,
        tenant: str,
        user: str,
        target: PushTarget,
        platform: str,
        locale: str | None,
        now_ms: int,
    ) -> list[str]:
        """Register a push target; returns other users of the tenant who lost it to this one."""
        async with self._fenced(term) as connection:
            evicted = await connection.fetch(
                self._sql["evict_target"],
                tenant, target.provider, target.app_id, target.token, user, target.device,
            )  # fmt: skip
            await connection.execute(
                self._sql["put_target"], tenant, user, target.device, platform, target.provider,
                target.token_kind, target.token, target.app_id, target.environment, locale, now_ms / 1000,
            )  # fmt: skip
            return [r[0] for r in evicted if r[0] != user]

    async def delete_target(self, term: int, tenant: str, user: str, device: str) -> bool:
        """Forget a push target; False if there was none."""
        async with self._fenced(term) as connection:
            return await connection.fetchval(self._sql["delete_target"], tenant, user, device) is not None

    async def put_preferences(
        self, term: int, tenant: str, user: str, document: str, now_ms: int, version: int | None = None
    ) -> int:
        """Replace the preferences document (JSON text); returns its version, 1 for the first.

        Args:
            version: the one that is replaced, 0 for none; None: whatever is there.

        Raises:
            VersionError: another version is there.
        """
        async with self._fenced(term) as connection:
            now_s = now_ms / 1000
            stored = await connection.fetchval(
                self._sql["put_preferences"], tenant, user, document, now_s, version
            )
            if stored is None:
                raise VersionError(f"version {version} of the preferences is not the present one", "If-Match")
            return stored

    async def change_preferences(
        self,
        term: int,
        tenant: str,
        user: str,
        change: Callable[[dict[str, Any]], dict[str, Any]],
        now_ms: int,
    ) -> str:
        """Read the preferences document, change it, write it back; returns it as it is then (JSON text)."""
        async with self._fenced(term) as connection:
            known = await connection.fetchval(self._sql["lock_preferences"], tenant, user)
            before: dict[str, Any] = {} if known is None else msgspec.json.decode(known)
            after = change(before)
            document = msgspec.json.encode(after).decode()
            if after != before:
                now_s = now_ms / 1000
                await connection.execute(self._sql["put_preferences"], tenant, user, document, now_s, None)
            return document

    async def log_out(
        self, term: int, stream_id: int, key: UserKey, device: str | None, token_id: bytes, expires_ms: int
    ) -> None:
        """Forget a device's push target (None: none) and refuse a token. Atomicity: both or neither."""
        async with self._fenced(term) as connection:
            if device is not None:
                await connection.execute(self._sql["delete_target"], key.tenant, key.user, device)
            await connection.execute(self._sql["log_out"], stream_id, token_id, expires_ms / 1000)

    async def revoke_tokens(self, term: int, stream_id: int, now_ms: int) -> None:
        """Tokens issued before now are no longer valid."""
        async with self._fenced(term) as connection:
            await connection.execute(self._sql["revoke_tokens"], stream_id, now_ms / 1000)

    async def set_invisible(self, term: int, stream_id: int, since_ms: int | None) -> int | None:
        """Make a user invisible, or (None) visible again.

        Returns:
            Since when it is invisible: who is so already stays it since then.
        """
        async with self._fenced(term) as connection:
            since_s = None if since_ms is None else since_ms / 1000
            return await connection.fetchval(self._sql["set_invisible"], stream_id, since_s)
