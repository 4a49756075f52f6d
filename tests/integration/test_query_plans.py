"""No query of the hot paths reads a table from end to end.

Checked on a filled and analysed database: 50,000 notifications of five users over the partitions of three
months. What the planner would do with a handful of rows says nothing.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any, cast

import asyncpg
import pytest
import pytest_asyncio

from carillon.clock import SystemClock
from carillon.ids import Uuid7Source
from carillon.merge_begun import open_slots, slots_at
from carillon.settings import PostgresSettings
from cluster.embedded import EmbeddedPostgres
from stores.postgres.dead_letters import TOP as DEAD_TOP
from stores.postgres.dead_letters import DeadLetterReader
from stores.postgres.feed import ROW_COLUMNS, TOP
from stores.postgres.named import load_queries
from stores.postgres.search import search_queries
from stores.postgres.shard_connections import PLANS
from stores.postgres.shard_rows import with_rows
from stores.postgres.shard_store import ShardStore

pytestmark = pytest.mark.asyncio(loop_scope="module")

USERS = 5
ROWS = 50_000
NOW = SystemClock().now_ms()
DEAD_LETTERS = DeadLetterReader(cast("Any", None))
DEAD, DEAD_PAGES = DEAD_LETTERS._sql, DEAD_LETTERS._page_sql
SEARCH = search_queries()
FEED = {name: text.replace("%(row)s", ROW_COLUMNS) for name, text in load_queries("feed").items()}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def filled(postgres_server: EmbeddedPostgres) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A connection to the filled database."""
    admin = await asyncpg.connect(postgres_server.dsn)
    await admin.execute("create database test_plans template template strategy wal_log")
    connection = await asyncpg.connect(postgres_server.dsn_of("test_plans"))
    try:
        await _fill(connection)
        yield connection
    finally:
        await connection.close()
        await admin.execute("drop database test_plans with (force)")
        await admin.close()


async def _fill(connection: asyncpg.Connection[Any]) -> None:
    await connection.execute("insert into tenants (tenant, client_secret) values ('acme', repeat('s', 32))")
    per_user = ROWS // USERS
    await connection.execute(
        "insert into streams (tenant, user_id, slot, epoch, seq, rev, unread)"
        " select 'acme', 'user' || n, n, 'e', $1::int, $1::int, $1::int from generate_series(1, 2000) as n",
        per_user,
    )
    streams = [
        row["stream_id"]
        for row in await connection.fetch("select stream_id from streams order by stream_id limit $1", USERS)
    ]
    source = Uuid7Source()
    months = (0, 31, 62)  # days ahead: rows in three partitions
    rows = []
    for seq in range(1, per_user + 1):
        ms = NOW + months[seq * 3 // (per_user + 1)] * 86_400_000 + seq
        at = datetime.fromtimestamp(ms / 1000, UTC)
        for stream in streams:
            read = at if seq % 3 else None
            expires = at if seq % 50 == 0 else None
            rows.append(
                (uuid.UUID(bytes=source.next(ms)), stream, seq, seq, seq, seq % 10 == 0, 1, "t", None,
                 f'"type":"t","title":"n{seq}","body":null', at, expires, read)
            )  # fmt: skip
    await connection.copy_records_to_table(
        "notifications",
        records=rows,
        columns=[
            "id", "stream_id", "seq", "rev", "position", "changed", "priority", "type", "category", "content",
            "created_at", "expires_at", "read_at",
        ],
    )  # fmt: skip
    await connection.execute(
        "insert into deliveries (notification_id, stream_id, slot, channel, state, due_at, created_at,"
        " updated_at) select id, stream_id, seq % 1024, 'push',"
        " case when seq % 100 = 0 then 'planned' when seq % 20 = 1 then 'dead' else 'sent' end,"
        " created_at, created_at, created_at from notifications"
    )
    await connection.execute("update deliveries set tenant = 'acme' where state = 'dead'")
    await connection.execute(
        "insert into delivery_attempts (delivery_id, attempt, device_id, provider, outcome, started_at,"
        " duration_ms) select id, 1, 'd', 'fcm', 'sent', created_at, 1 from deliveries"
    )
    await connection.execute(
        "insert into devices (tenant, user_id, device_id, platform, provider, token_kind,"
        " token) select 'acme', 'user' || n, 'd', 'ios', 'apns', 'token', 't' || n"
        " from generate_series(1, 2000) as n"
    )
    await connection.execute(
        "insert into preferences (tenant, user_id, document)"
        " select 'acme', 'user' || n, '{}' from generate_series(1, 2000) as n"
    )
    await connection.execute(
        "insert into search_progress (stream_id, seq) select 1000000 + n, 1 from generate_series(1, 5000) n"
    )
    await connection.execute("vacuum analyze")


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All nodes of a plan."""
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


async def plan_of(connection: asyncpg.Connection[Any], sql: str, *arguments: Any) -> list[dict[str, Any]]:
    """The executed nodes of the plan of a statement, as a prepared one would run (generic plan included)."""
    text = await connection.fetchval(f"explain (analyze, format json) {sql}", *arguments)
    [document] = json.loads(text)
    return [node for node in nodes(document["Plan"]) if node.get("Actual Loops", 0) > 0]


def assert_indexed(found: list[dict[str, Any]]) -> None:
    """No table that holds rows is read from end to end."""
    # An empty partition (a month ahead, the default one) is read "from end to end" without reading a page.
    scans = {
        node["Relation Name"]: node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
        for node in found
        if node["Node Type"] == "Seq Scan"
    }
    assert not {name: rows for name, rows in scans.items() if rows}


FEED_ARGUMENTS: tuple[Any, ...] = ("acme", "user3", TOP, NOW / 1000, 21, None, None, False)


@pytest.mark.parametrize("generic", [False, True])
async def test_feed(filled: asyncpg.Connection[Any], generic: bool) -> None:
    """A page of the feed walks an index in order, and reads about as many rows as it gives."""
    await filled.execute(f"set plan_cache_mode = force_{'generic' if generic else 'custom'}_plan")
    for name in ("feed", "feed_unread"):
        found = await plan_of(filled, FEED[name], *FEED_ARGUMENTS)
        assert_indexed(found)
        read = sum(
            node["Actual Rows"] * node["Actual Loops"]
            for node in found
            if node["Node Type"].startswith("Index")
            and node.get("Relation Name", "").startswith("notifications")
        )
        assert read < 400, (name, read)
    assert_indexed(await plan_of(filled, FEED["feed_archived"], *FEED_ARGUMENTS))


@pytest.mark.parametrize("generic", [False, True])
async def test_unread_count(filled: asyncpg.Connection[Any], generic: bool) -> None:
    """The count reads one stream row and the few unread rows that can expire."""
    await filled.execute(f"set plan_cache_mode = force_{'generic' if generic else 'custom'}_plan")
    assert_indexed(await plan_of(filled, FEED["head"], "acme", "user3", NOW / 1000))


@pytest.mark.parametrize("generic", [False, True])
async def test_sync(filled: asyncpg.Connection[Any], generic: bool) -> None:
    """Catching up reads by seq, and changes by rev, without the rows before."""
    await filled.execute(f"set plan_cache_mode = force_{'generic' if generic else 'custom'}_plan")
    stream = await filled.fetchval(
        "select stream_id from streams where tenant = 'acme' and user_id = 'user3'"
    )
    after = ROWS // USERS - 50
    assert_indexed(await plan_of(filled, FEED["notifications_after"], stream, after, 200))
    assert_indexed(await plan_of(filled, FEED["changes_after"], stream, after, ROWS // USERS, 200))


@pytest.mark.parametrize("generic", [False, True])
async def test_by_id(filled: asyncpg.Connection[Any], generic: bool) -> None:
    """A look-up by id touches one partition, and its deliveries by index."""
    await filled.execute(f"set plan_cache_mode = force_{'generic' if generic else 'custom'}_plan")
    some = await filled.fetchval("select id from notifications where seq = 5000 limit 1")
    found = await plan_of(filled, FEED["notification"], some, "acme")
    assert_indexed(found)
    touched = {
        node["Relation Name"] for node in found if node.get("Relation Name", "").startswith("notifications")
    }
    assert len(touched) == 1, touched
    assert_indexed(await plan_of(filled, FEED["deliveries"], some))


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize("user", [None, "user3"])
async def test_dead_letters(filled: asyncpg.Connection[Any], generic: bool, user: str | None) -> None:
    """A page walks the index of dead rows in order; one of them and its tries are found by their keys."""
    await filled.execute(f"set plan_cache_mode = force_{'generic' if generic else 'custom'}_plan")
    of, index = ("of_tenant", "deliveries_dead") if user is None else ("of_user", "deliveries_dead_stream")
    arguments = ("acme", user, 0.0, *DEAD_TOP, 21, None, None, None)
    found = await plan_of(filled, DEAD_PAGES[of], *arguments)
    assert_indexed(found)
    (scan,) = [node for node in found if node.get("Relation Name") == "deliveries"]
    assert scan["Index Name"] == index
    assert scan["Actual Rows"] <= 21
    some = [row["id"] for row in await filled.fetch(DEAD_PAGES[of], *arguments)]
    assert len(some) == 21
    assert_indexed(await plan_of(filled, DEAD["some"], "acme", some))
    assert_indexed(await plan_of(filled, DEAD["attempts"], some[0]))


@pytest.mark.parametrize("generic", [False, True])
async def test_hot_feed(filled: asyncpg.Connection[Any], generic: bool) -> None:
    """To ask whether cached pages of many users are true is a look into an index for each, nothing more."""
    await filled.execute(f"set plan_cache_mode = force_{'generic' if generic else 'custom'}_plan")
    users = [f"user{n}" for n in range(1, 51)]
    ids = [row["id"] for row in await filled.fetch("select id from notifications where seq > 9980")]
    found = await plan_of(
        filled, FEED["standings"], ["acme"] * 50, users, ids, [1 + n % 50 for n in range(len(ids))]
    )
    assert_indexed(found)
    read = sum(
        node["Actual Rows"] * node["Actual Loops"] for node in found if node["Node Type"].startswith("Index")
    )
    assert read <= 50 + len(ids), read
    assert_indexed(await plan_of(filled, FEED["counted"], "acme", "user3", NOW / 1000))


@pytest.mark.parametrize("generic", [False, True])
async def test_search(filled: asyncpg.Connection[Any], generic: bool) -> None:
    """A search looks at the newest rows by the feed's index; in a long feed it finds words by theirs."""
    await filled.execute(f"set plan_cache_mode = force_{'generic' if generic else 'custom'}_plan")
    place = await plan_of(filled, SEARCH["place"], "acme", "user3")
    assert_indexed(place)
    stream = await filled.fetchval("select stream_id from streams where user_id = 'user3'")
    arguments = (stream, "n77", TOP, NOW / 1000, 21, None, None, None)
    assert_indexed(await plan_of(filled, SEARCH["walk"], *arguments, 1000))
    async with filled.transaction():
        fill = await plan_of(filled, SEARCH["fill"], stream, 0, 5000)
    assert_indexed(fill)
    assert await filled.fetchval("select seq from search_progress where stream_id = $1", stream) >= 5000
    others = "select stream_id from streams where user_id = any ('{user1,user2,user4,user5}')"
    for other in await filled.fetch(others):
        await filled.fetchval(SEARCH["fill"], other["stream_id"], 0, ROWS)
    await filled.fetchval(SEARCH["fill"], stream, 5000, ROWS)
    await filled.execute("analyze search_documents")
    found = await plan_of(filled, SEARCH["search"], *arguments, ROWS // USERS - 10)
    assert_indexed(found)
    [words] = [node for node in found if node.get("Index Name") == "search_documents_words"]
    assert words["Actual Rows"] == 111  # n77, n770 to n779, n7700 to n7799


async def test_small_reads(filled: asyncpg.Connection[Any]) -> None:
    """A device and a preferences document are found by their keys."""
    assert_indexed(await plan_of(filled, FEED["device"], "acme", "user3", "d"))
    assert_indexed(await plan_of(filled, FEED["preferences"], "acme", "user3"))


MERGES = with_rows("merges")


@pytest.mark.parametrize("name", ["find_windows", "open_windows"])
async def test_windows_without_rows_are_found_by_their_slots(
    filled: asyncpg.Connection[Any], name: str
) -> None:
    """Generic plans look for windows in the index of those that have slots, never through notifications."""
    key = f"drop:{7:032x}"
    today, tomorrow = slots_at(key, NOW)
    streams = [
        row[0] for row in await filled.fetch("select stream_id from streams order by stream_id limit 3")
    ]
    arguments: tuple[Any, ...] = (streams, NOW / 1000, 1000, *open_slots(NOW))
    if name == "find_windows":
        arguments = (streams, [key] * 3, NOW / 1000, [today] * 3, [tomorrow] * 3)
    transaction = filled.transaction()
    await transaction.start()
    try:
        await filled.execute(
            "update notifications set merge_slot = $1, merging = '[]' where seq % 500 = 7", today
        )
        for setting, value in PLANS.items():
            await filled.execute(f"set local {setting} = {value}")
        found = await plan_of(filled, MERGES[name].rstrip().rstrip(";"), *arguments)
    finally:
        await transaction.rollback()
    read = [node for node in found if node.get("Relation Name", "").startswith("notifications_2")]
    assert read
    assert all("merge_slot" in node.get("Index Name", "") for node in read)
    assert sum(node["Actual Rows"] * node["Actual Loops"] for node in read) == 3 * 20


SHARD = ShardStore(PostgresSettings(dsn="postgresql://nowhere"), "shard-a")
KNOWN_ROWS = {
    name: SHARD._sql[name] for name in ("acknowledge", "ids_between", "release", "settle", "replay")
}
KNOWN_ROWS |= {"read_all": SHARD._read_all_sql, **SHARD._change_sql}


@pytest.mark.parametrize("name", KNOWN_ROWS)
async def test_rows_that_are_known_are_not_looked_for_among_all_that_is_pending(
    filled: asyncpg.Connection[Any], name: str
) -> None:
    """A shard's generic plans find outbox rows by id or notification, however few are pending just then."""
    sql = KNOWN_ROWS[name].rstrip().rstrip(";")
    count = max(int(number) for number in re.findall(r"\$(\d+)", sql))
    async with filled.transaction():
        for setting, value in PLANS.items():
            await filled.execute(f"set local {setting} = {value}")
        await filled.execute(f"prepare known_rows as {sql}")
        try:
            nulls = ", ".join(["null"] * count)
            text = await filled.fetchval(f"explain (format json) execute known_rows({nulls})")
        finally:
            await filled.execute("deallocate known_rows")
    used = {node["Index Name"] for node in nodes(json.loads(text)[0]["Plan"]) if "Index Name" in node}
    assert used & {"deliveries_notification", "deliveries_pkey"}
    assert "deliveries_due" not in used
