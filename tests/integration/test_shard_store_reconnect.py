"""The shard's own connection, after PostgreSQL ended it."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from carillon.errors import StoreUnavailableError
from carillon.settings import PostgresSettings
from stores.postgres.shard_store import ShardStore
from tests.support import eventually


@pytest.mark.parametrize("times", [1, 5])
async def test_writes_go_on_after_idle_connections_were_ended(postgres_dsn: str, times: int) -> None:
    """Connections that the server ends while nobody uses them (a restart) are replaced, however often."""
    store = ShardStore(PostgresSettings(dsn=postgres_dsn, shard_pool_size=2), "shard-x-0")
    admin = await asyncpg.connect(postgres_dsn)
    try:
        await store.open()
        for _ in range(times):
            assert len(await store.draw_delivery_ids(2)) == 2
            await admin.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where datname = current_database() and pid <> pg_backend_pid()"
            )
            await asyncio.sleep(0.1)  # let the driver see the end: it is the idle case that is tested

            async def drawn() -> bool:
                try:
                    return len(await store.draw_delivery_ids(2)) == 2
                except StoreUnavailableError:
                    return False

            await eventually(drawn, 10, "a write")
    finally:
        await store.close()
        await admin.close()
