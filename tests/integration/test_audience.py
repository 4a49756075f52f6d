"""Audiences on a real PostgreSQL: complete, in order, and by index whatever the size."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from carillon.audience import EVERYBODY, Audience
from carillon.errors import NotFoundError
from carillon.ids import SLOTS, slot_of
from carillon.settings import PostgresSettings
from cluster.embedded import EmbeddedPostgres
from stores.postgres.audience import AudienceReader, audience_queries
from stores.postgres.pool import open_pool
from tests.integration.test_query_plans import assert_indexed, nodes, plan_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

USERS = 60_000
SLOT = 7


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def filled(postgres_server: EmbeddedPostgres) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A connection to a database with 60,000 users over 64 slots, and 6,000 who never got anything."""
    admin = await asyncpg.connect(postgres_server.dsn)
    await admin.execute("create database test_audiences template template strategy wal_log")
    connection = await asyncpg.connect(postgres_server.dsn_of("test_audiences"))
    try:
        await connection.execute(
            "insert into tenants (tenant, client_secret) values ('acme', repeat('s', 32))"
        )
        await connection.execute(
            "insert into streams (tenant, user_id, slot, epoch)"
            " select 'acme', 'user' || n, n % 64, 'e' from generate_series(1, $1::int) as n",
            USERS,
        )
        await connection.execute(
            "insert into profiles (tenant, user_id, slot)"
            " select 'acme', 'user' || n, n % 64 from generate_series($1::int, $1::int * 11 / 10) as n",
            USERS,
        )
        await connection.execute(
            "insert into devices (tenant, user_id, device_id, platform, provider, token_kind, token)"
            " select 'acme', 'user' || n, 'd', case n % 192 / 64 when 0 then 'ios' else 'android' end, 'fcm',"
            " 'token', n::text from generate_series(1, $1::int) as n where n % 2 = 1",
            USERS,
        )
        for topic, every in (("news", 1), ("rare", 1000)):
            await connection.execute(
                "insert into topic_subscribers (tenant, topic, user_id, slot)"
                " select 'acme', $2, 'user' || n, n % 64 from generate_series(1, $1::int) n where n % $3 = 0",
                USERS, topic, every,
            )  # fmt: skip
        await connection.execute(
            "insert into segments (tenant, segment_id, document, path, vars, platform) values"
            " ('acme', 'news', '{}', '(exists($.\"lastSeenAgoS\")) || ($.\"platform\" == $v0) || (1 == 1)',"
            ' \'{"v0": "web"}\', true)'
        )
        await connection.execute(
            "insert into segments (tenant, segment_id, document, path, vars, platform)"
            " select 'acme', 's' || n, repeat('x', 500), '(1 == 1)', '{}', false"
            " from generate_series(1, 500) n"
        )
        await connection.execute("vacuum analyze")
        yield connection
    finally:
        await connection.close()
        await admin.execute("drop database test_audiences with (force)")
        await admin.close()


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize("platforms", [None, ["ios"]])
@pytest.mark.parametrize("kind", ["all", "topic", "segment"])
async def test_pages_walk_an_index(
    filled: asyncpg.Connection[Any], kind: str, platforms: list[str] | None, generic: bool
) -> None:
    """A page reads about as many rows as it gives, in the middle of a slot as at its start."""
    await filled.execute(f"set plan_cache_mode = force_{'generic' if generic else 'custom'}_plan")
    more = () if kind == "all" else ("news",)
    for after in ("", "user4"):
        found = await plan_of(filled, audience_queries()[kind], "acme", SLOT, after, 50, platforms, *more)
        assert_indexed(found)
        read = sum(
            node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
            for node in found
            if node["Node Type"].startswith("Index") and node.get("Actual Loops") == 1
        )
        assert read < 1500, read  # a slot has 940 of the 60,000, with 50 of three on iOS among 150
    await filled.execute("reset plan_cache_mode")


async def test_a_prepared_page_scans_no_table(filled: asyncpg.Connection[Any]) -> None:
    """Statements as the driver prepares them have no sequential scan in their generic plan."""
    for name, sql in audience_queries().items():
        nulls = ", ".join(["null"] * (5 if name == "all" else 6))
        await filled.execute(f"prepare audience_page as {sql}")
        try:
            await filled.execute("set plan_cache_mode = force_generic_plan")
            text = await filled.fetchval(f"explain (format json) execute audience_page({nulls})")
        finally:
            await filled.execute("deallocate audience_page")
            await filled.execute("reset plan_cache_mode")
        plan = json.loads(text)[0]["Plan"]
        scans = [n["Relation Name"] for n in nodes(plan) if n["Node Type"] == "Seq Scan"]
        assert scans == [], name


async def walk(reader: AudienceReader, audience: Audience, limit: int, slots: range) -> list[str]:
    """Everybody of an audience, by pages."""
    found: list[str] = []
    for slot in slots:
        after = ""
        while page := await reader.page("acme", audience, slot, after, limit):
            assert len(page) <= limit
            found += page
            after = page[-1]
            if len(page) < limit:
                break
    return found


async def test_a_walk_meets_everybody_once(postgres_dsn: str) -> None:
    """Whatever the page size: who has a stream, a profile or both, each once; of another tenant nobody."""
    pool = await open_pool(PostgresSettings(dsn=postgres_dsn), 2)
    try:
        users = [*(f"u{n}" for n in range(300)), "ä", "Z", "z", "a b", "用户", "x" * 128]
        rows = [("acme", user, slot_of("acme", user)) for user in users]
        rows += [("other", user, slot_of("other", user)) for user in users]
        await pool.executemany(
            "insert into streams (tenant, user_id, slot, epoch) values ($1, $2, $3, 'e')", rows[::2]
        )
        await pool.executemany("insert into profiles (tenant, user_id, slot) values ($1, $2, $3)", rows[::3])
        await pool.executemany(
            "insert into topic_subscribers (tenant, topic, user_id, slot) values ($1, 'news', $2, $3)",
            rows[::5],
        )
        await pool.executemany(
            "insert into devices (tenant, user_id, device_id, platform, provider, token_kind, token,"
            " disabled_at) values ($1, $2, 'd', 'ios', 'apns', 'token', $1 || $2,"
            " case when $3::int = 0 then now() end)",
            [(*row[:2], index % 2) for index, row in enumerate(rows)],
        )
        reader = AudienceReader(pool)
        known = {row[1] for row in (*rows[::2], *rows[::3]) if row[0] == "acme"}
        subscribed = {row[1] for row in rows[::5] if row[0] == "acme"}
        phones = {row[1] for row in rows[1::2] if row[0] == "acme"}
        assert len(known) > 100
        for limit in (1, 2, 1000):
            for audience, wanted in (
                (EVERYBODY, known),
                (Audience("topic", "news"), subscribed),
                (Audience("topic", "nothing"), set[str]()),
                (Audience("all", "", ("ios", "web")), known & phones),
                (Audience("topic", "news", ("ios",)), subscribed & phones),
                (Audience("topic", "news", ("web",)), set[str]()),
            ):
                found = await walk(reader, audience, limit, range(SLOTS))
                assert len(found) == len(set(found))
                assert set(found) == wanted
        with pytest.raises(NotFoundError):
            await reader.page("acme", Audience("segment", "nothing"), 0, "", 10)
    finally:
        await pool.close()
