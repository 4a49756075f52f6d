"""What merging writes to a real PostgreSQL: beside an erasure, and when its rows have lost their owner."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from asyncpg.pgproto.pgproto import UUID

from stores.postgres.merges import MergedRow, MergeWrites, RepushRow, UpdateRow, WindowRow
from stores.postgres.migrate import FOLDER
from stores.postgres.shard_rows import StreamsErasedError
from tests.integration.test_shard_store import NOW, SLOT, Kit
from tests.support import eventually

LATER = NOW + 60_000


def writes(kit: Kit, raw: bytes, *, updates: bool = True) -> MergeWrites:
    """What a batch writes that merges one event into a notification; without `updates`, that drops it."""
    stream = kit.user.stream_id
    made = MergeWrites(
        windows=[WindowRow(stream, "key", raw, LATER, 2, 2, NOW)],
        events=[MergedRow(kit.event().id, raw, stream, "merged", "count", "event", None, "loud")],
    )
    if updates:
        made.updates.append(UpdateRow(raw, stream, '"title":"2"', 1, "test", None, None, True))
        made.pushes.append(push(kit, raw))
    return made


def push(kit: Kit, raw: bytes, number: int = 1000, due_ms: int = NOW) -> RepushRow:
    return RepushRow(number, raw, kit.user.stream_id, SLOT, due_ms, None, None, None, "push", "", 0)


async def merge(kit: Kit, made: MergeWrites, keys: Any = ()) -> dict[int, tuple[int, int, int]]:
    return await kit.store.append(kit.term, {}, [], [], NOW, keys, 0, None, made)


async def left(kit: Kit) -> list[int]:
    tables = ("deliveries", "merge_windows", "merged_events")
    return [await kit.db.fetchval(f"select count(*) from {table}") for table in tables]


@pytest.mark.parametrize("updates", [True, False])
async def test_nothing_is_merged_of_a_user_who_is_erased(postgres_dsn: str, updates: bool) -> None:
    """A batch that waits for an erasure leaves no push, no window, and nothing of the event behind it."""
    async with Kit(postgres_dsn) as kit, kit.other() as eraser:
        event = kit.event()
        await kit.append(event)
        made = writes(kit, event.id, updates=updates)
        async with eraser.transaction():
            await eraser.execute("delete from streams")
            batch = asyncio.create_task(merge(kit, made))
            waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
            await eventually(lambda: kit.db.fetchval(waits))
        assert await batch == {}
        assert await left(kit) == [0, 0, 0]
        assert await merge(kit, writes(kit, event.id, updates=updates)) == {}, "nor once it is through"
        assert await left(kit) == [0, 0, 0]
        keyed = kit.event(idempotency_key="k", body_hash=b"1")
        with pytest.raises(StreamsErasedError) as gone:
            await merge(kit, writes(kit, event.id, updates=updates), [keyed])
        assert gone.value.streams == {kit.user.stream_id}
        assert await kit.db.fetchval("select count(*) from idempotency_keys") == 0


async def test_a_user_who_is_there_has_all_of_it(postgres_dsn: str) -> None:
    """Windows, events and pushes are written whether or not a notification changes."""
    async with Kit(postgres_dsn) as kit:
        event = kit.event()
        await kit.append(event)
        assert await merge(kit, writes(kit, event.id, updates=False)) == {}
        assert await left(kit) == [0, 1, 1]
        assert await merge(kit, writes(kit, event.id)) == {kit.user.stream_id: (1, 2, 1)}
        assert await left(kit) == [1, 1, 2]


@pytest.mark.parametrize("owner", ["streams", "notifications"])
async def test_a_push_without_owner_is_dropped(postgres_dsn: str, owner: str) -> None:
    """It is claimed once and then gone, with its tries; it stops nobody else's however often it was tried."""
    async with Kit(postgres_dsn) as kit:
        kept, lost = kit.event(), kit.event()
        await kit.append(kept, lost, due_ms=NOW)
        await kit.db.execute("update deliveries set attempts = 32767")
        if owner == "notifications":
            await kit.db.execute("delete from notifications where id = $1", UUID(lost.id))
        else:
            await kit.db.execute(
                "update deliveries set stream_id = 0 where notification_id = $1", UUID(lost.id)
            )
        await kit.db.execute(
            "insert into delivery_attempts select id, 1, 'phone', 'fcm', 'failed', '', 503, '', now(), 1"
            " from deliveries"
        )
        claimed = await kit.store.claim_due(kit.term, [SLOT], NOW + 1, 10, NOW + 1000)
        assert [(c.notification, c.attempt) for c in claimed] == [(kept.id, 32767)]
        assert await kit.db.fetchval("select count(*) from deliveries") == 1
        assert await kit.db.fetchval("select array_agg(delivery_id) from delivery_attempts") == [
            claimed[0].delivery
        ]


async def test_what_was_left_without_owner_is_cleared(postgres_dsn: str) -> None:
    """The migration deletes pushes, windows and events of users who are gone, and nothing else."""
    async with Kit(postgres_dsn) as kit:
        event = kit.event()
        await kit.append(event)
        await merge(kit, writes(kit, event.id))
        for table, column in (
            ("deliveries", "id"),
            ("merge_windows", "stream_id"),
            ("merged_events", "event_id"),
        ):
            names = await kit.db.fetchval(
                "select string_agg(column_name, ', ') from information_schema.columns"
                " where table_name = $1 and column_name not in ('stream_id', $2)",
                table, column,
            )  # fmt: skip
            own = {"deliveries": "id + 1", "merge_windows": None, "merged_events": "gen_random_uuid()"}[table]
            extra = ("", "") if own is None else (f"{column}, ", f"{own}, ")
            await kit.db.execute(
                f"insert into {table} (stream_id, {extra[0]}{names}) select 0, {extra[1]}{names} from {table}"
            )
        assert await left(kit) == [2, 2, 2]
        await kit.db.execute((FOLDER / "0055_orphans.sql").read_text())
        assert await left(kit) == [1, 1, 1]
        assert await kit.db.fetchval("select stream_id from deliveries") == kit.user.stream_id
