"""Reads of users from a real Postgres."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.clock import SystemClock
from carillon.errors import InvalidInputError
from carillon.notification import notification_json
from carillon.settings import PostgresSettings
from stores.postgres.feed import FeedFilter, FeedReader, decode_cursor, encode_cursor
from stores.postgres.pool import open_pool
from tests.integration.ingress_world import store_notifications

NOW = SystemClock().now_ms()


@pytest.fixture
async def pool(postgres_dsn: str) -> AsyncIterator[Any]:
    opened = await open_pool(PostgresSettings(dsn=postgres_dsn), 2)
    yield opened
    await opened.close()


def seqs(rows: Any) -> list[int]:
    return [row.seq for row in rows]


async def test_what_is_left_out(pool: Any, postgres_dsn: str) -> None:
    """Archived, dismissed, retracted and expired ones are in neither list nor count."""
    await store_notifications(postgres_dsn, "acme", "ada", 8)
    for seq, column in ((1, "archived_at"), (2, "dismissed_at"), (3, "retracted_at"), (5, "read_at")):
        await pool.execute(f"update notifications set {column} = now() where seq = $1", seq)
    await pool.execute("update notifications set expires_at = now() - interval '1 hour' where seq = 4")
    await pool.execute("update notifications set expires_at = now() + interval '1 day' where seq = 6")
    # What the owning shard keeps: 8 less archived, dismissed, retracted, read. Expiry is nobody's write.
    await pool.execute("update streams set unread = 4, rev = 12")
    feed = FeedReader(pool)
    rows, cursor = await feed.page("acme", "ada", NOW, limit=20)
    assert (seqs(rows), cursor) == ([8, 7, 6, 5], None)
    assert await feed.unread_count("acme", "ada", NOW) == (3, 12)
    assert seqs((await feed.page("acme", "ada", NOW, limit=20, chosen=FeedFilter("unread")))[0]) == [8, 7, 6]
    assert seqs((await feed.page("acme", "ada", NOW, limit=20, chosen=FeedFilter("read")))[0]) == [5]
    assert seqs((await feed.page("acme", "ada", NOW, limit=20, chosen=FeedFilter("archived")))[0]) == [2, 1]
    later = NOW + 2 * 86_400_000
    assert seqs((await feed.page("acme", "ada", later, limit=20))[0]) == [8, 7, 5]


async def test_filters(pool: Any, postgres_dsn: str) -> None:
    """type and category narrow the page."""
    await store_notifications(
        postgres_dsn,
        "acme",
        "ada",
        4,
        content=lambda n: {
            "type": "even" if n % 2 == 0 else "odd",
            "category": "c" if n > 2 else None,
            "title": f"Title {n}",
        },
    )
    feed = FeedReader(pool)

    async def found(**chosen: Any) -> list[int]:
        return seqs((await feed.page("acme", "ada", NOW, limit=20, chosen=FeedFilter(**chosen)))[0])

    assert await found(type="even") == [4, 2]
    assert await found(type="even", category="c") == [4]
    assert await found(type="a\0b") == []


async def test_pages_follow_position(pool: Any, postgres_dsn: str) -> None:
    """Order is by position: what moved to the top (a merge) comes first, and pages never repeat or skip."""
    await store_notifications(postgres_dsn, "acme", "ada", 7)
    await pool.execute("update notifications set position = 8, rev = 8, changed = true where seq = 2")
    feed = FeedReader(pool)
    seen: list[int] = []
    cursor = None
    while True:
        rows, cursor = await feed.page("acme", "ada", NOW, limit=3, cursor=cursor)
        seen += seqs(rows)
        if cursor is None:
            break
    assert seen == [2, 7, 6, 5, 4, 3, 1]
    assert (await feed.page("acme", "grace", NOW, limit=3))[0] == []
    assert (await feed.page("a\0", "b\0", NOW, limit=3))[0] == []


@given(st.integers(0, 2**63 - 1))
def test_cursor_round_trip(position: int) -> None:
    """A cursor gives its position back, and needs no escaping in a URL."""
    cursor = encode_cursor(position)
    assert decode_cursor(cursor) == position
    assert cursor.replace("-", "").replace("_", "").isalnum()


@given(st.text(max_size=40))
def test_any_cursor_never_crashes(cursor: str) -> None:
    """What is no cursor is InvalidInputError naming `cursor`, whatever it is."""
    if encode_cursor(decode_or(cursor, 5)) != cursor:
        with pytest.raises(InvalidInputError, match="cursor"):
            decode_cursor(cursor)


def decode_or(cursor: str, default: int) -> int:
    try:
        return decode_cursor(cursor)
    except InvalidInputError:
        return default


async def test_sync_sees_gaps(pool: Any, postgres_dsn: str) -> None:
    """What was pruned is never skipped silently: recovered is False; nothing missed means True."""
    await store_notifications(postgres_dsn, "acme", "ada", 6)
    feed = FeedReader(pool)
    await pool.execute("delete from notifications where seq = 2")

    async def sync(since: int, rev: int | None = None, limit: int = 10) -> Any:
        return await feed.sync("acme", "ada", NOW, epoch="e1", since=since, rev=rev, limit=limit)

    assert not (await sync(0)).recovered
    assert not (await sync(1)).recovered
    page = await sync(2)
    assert (page.recovered, seqs(page.notifications), page.more) == (True, [3, 4, 5, 6], False)
    await pool.execute("delete from notifications where seq = 6")
    assert not (await sync(4)).recovered
    assert (await sync(6)).recovered
    await pool.execute("update streams set pruned_rev = 4")
    assert not (await sync(6, rev=3)).recovered
    assert (await sync(6, rev=4)).recovered
    assert not (await sync(7)).recovered
    assert not (await sync(6, rev=7)).recovered


async def test_sync_pages_changes_whole(pool: Any, postgres_dsn: str) -> None:
    """A page of changes never ends inside of one rev, even when one rev (read-all) fills it."""
    await store_notifications(postgres_dsn, "acme", "ada", 9)
    await pool.execute("update notifications set changed = true, read_at = now(), rev = 10 where seq <= 6")
    await pool.execute("update notifications set changed = true, seen_at = now(), rev = 11 where seq = 7")
    await pool.execute(
        "update notifications set changed = true, seen_at = now(), rev = 12 where seq in (8, 9)"
    )
    await pool.execute("update streams set rev = 12")
    feed = FeedReader(pool)
    rev, seen = 9, []
    for _ in range(5):
        page = await feed.sync("acme", "ada", NOW, epoch="e1", since=9, rev=rev, limit=2)
        seen.append([(row.rev, row.seq) for row in page.changes])
        rev = page.rev
        if not page.more:
            break
    assert [pair for part in seen for pair in part] == [(10, n) for n in range(1, 7)] + [
        (11, 7),
        (12, 8),
        (12, 9),
    ]
    assert rev == 12
    assert all({r for r, _ in a}.isdisjoint({r for r, _ in b}) for a, b in itertools.pairwise(seen))


async def test_changes_of_what_the_client_lacks_are_not_told(pool: Any, postgres_dsn: str) -> None:
    """A changed notification beyond `since` comes with its state; a retracted one, which the client may have
    read from the feed, is told to be let go."""
    await store_notifications(postgres_dsn, "acme", "ada", 3)
    await pool.execute("update notifications set changed = true, read_at = now(), rev = 4 where seq = 2")
    await pool.execute("update notifications set changed = true, retracted_at = now(), rev = 5 where seq = 3")
    await pool.execute("update streams set rev = 5")
    page = await FeedReader(pool).sync("acme", "ada", NOW, epoch="e1", since=1, rev=3, limit=10)
    assert (seqs(page.notifications), seqs(page.changes), page.last_seq, page.rev) == ([2], [3], 3, 5)
    assert page.changes[0].retracted_ms is not None
    assert '"read":true' in notification_json(page.notifications[0], '"ada"')


async def test_user_without_stream(pool: Any) -> None:
    """A user to whom nothing happened has an empty feed, no count, and nothing to catch up on."""
    feed = FeedReader(pool)
    assert await feed.unread_count("acme", "nobody", NOW) == (0, 0)
    page = await feed.sync("acme", "nobody", NOW, epoch=None, since=0, rev=None, limit=10)
    assert (page.recovered, page.last_seq, page.notifications) == (True, 0, [])
    assert not (await feed.sync("acme", "nobody", NOW, epoch="x", since=3, rev=None, limit=10)).recovered
    assert await feed.preferences("acme", "nobody") == ({}, 0)
    assert await feed.device("acme", "nobody", "d") is None


async def test_one_notification_with_its_tries(pool: Any, postgres_dsn: str) -> None:
    """A notification is found by id within its tenant only, with every try of every delivery."""
    [raw] = await store_notifications(postgres_dsn, "acme", "ada", 1)
    await pool.execute(
        "insert into deliveries (notification_id, stream_id, slot, channel, state, due_at, attempts,"
        " created_at, updated_at) values ($1, 1, 1, 'push', 'failed', now(), 2, now(), now())",
        uuid.UUID(bytes=raw),
    )
    await pool.execute(
        "insert into delivery_attempts (delivery_id, attempt, device_id, provider, outcome, status,"
        " started_at, duration_ms) select id, n, 'phone', 'fcm', 'failed', 503, now(), 12.5 from deliveries,"
        " generate_series(1, 2) as n"
    )
    feed = FeedReader(pool)
    found = await feed.notification("acme", raw)
    assert found is not None
    assert (found.user, found.row.seq) == ("ada", 1)
    [delivery] = found.deliveries
    assert (delivery["state"], [t["attempt"] for t in delivery["tries"]]) == ("failed", [1, 2])
    assert await feed.notification("other", raw) is None
    assert await feed.notification("acme", bytes(16)) is None
