"""The servers that `make up` brings along."""

from __future__ import annotations

import asyncpg
import redis


async def test_database_is_migrated(postgres_dsn: str) -> None:
    """Every test gets a database that carries the whole schema."""
    connection = await asyncpg.connect(postgres_dsn)
    try:
        assert await connection.fetchval("select count(*) from streams") == 0
        assert (await connection.fetchval("show server_version")).startswith("18.")
    finally:
        await connection.close()


def test_valkey_is_empty(redis_url: str) -> None:
    """Every test gets an empty Valkey that asks for its password."""
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0

