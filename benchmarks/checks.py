"""What the system kept: ids and seqs in Postgres or the feed, and pushes at the local provider."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlencode

import asyncpg

from benchmarks.target import Target
from benchmarks.wire import Door, HttpConnection, get_json, http_request


async def stored_in_postgres(dsn: str, tenant: str, users: Sequence[str]) -> dict[bytes, int]:
    """id -> seq of every notification of these users, from the truth itself."""
    connection = await asyncpg.connect(dsn)
    try:
        found: dict[bytes, int] = {}
        for at in range(0, len(users), 500):
            rows = await connection.fetch(
                "select n.id::text as id, n.seq from streams s join notifications n using (stream_id)"
                " where s.tenant = $1 and s.user_id = any($2::text[])",
                tenant,
                list(users[at : at + 500]),
            )
            found.update((row["id"].encode(), row["seq"]) for row in rows)
        return found
    finally:
        await connection.close()


async def stored_in_feed(door: Door, api_key: str, users: Sequence[str]) -> dict[bytes, int]:
    """id -> seq of every notification in these users' feeds, page by page, where Postgres cannot be asked."""
    connection = HttpConnection(door)
    found: dict[bytes, int] = {}
    try:
        for user in users:
            cursor = ""
            while True:
                query = {"limit": "100", **({"cursor": cursor} if cursor else {})}
                path = f"/v1/users/{quote(user, safe='')}/notifications?{urlencode(query)}"
                response = await connection.request(http_request(door, "GET", path, bearer=api_key))
                if response.status != 200:
                    break
                page = response.json()
                found.update((note["id"].encode(), note["seq"]) for note in page["notifications"])
                cursor = page.get("nextCursor") or ""
                if not cursor:
                    break
    finally:
        connection.close()
    return found


async def stored(target: Target, door: Door, users: Sequence[str]) -> dict[bytes, int]:
    """From Postgres when its DSN is known, else from the feed."""
    if target.postgres_dsn:
        return await stored_in_postgres(target.postgres_dsn, target.tenant, users)
    return await stored_in_feed(door, target.api_key, users)


async def received_pushes(url: str, limit: int) -> dict[str, Any]:
    """The newest `limit` pushes at the local push server, and how many there were: `{count, pushes}`."""
    return await get_json(Door.of(url), f"?limit={limit}")
