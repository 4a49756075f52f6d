"""Full-text search in a real Postgres: the same answers with and without the index of words."""

from __future__ import annotations

import asyncio
import random
import unicodedata
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from carillon.clock import SystemClock
from carillon.errors import InvalidInputError, UnavailableError
from carillon.settings import IngressSettings, PostgresSettings
from stores.postgres.feed import FeedFilter
from stores.postgres.pool import open_pool
from stores.postgres.search import MAX_WORDS, SearchReader, check_query
from tests.integration.ingress_world import World, store_notifications

CLOCK = SystemClock()
NOW = CLOCK.now_ms()
TEXTS = (
    ("Build 4711 has finished", "All 318 checks passed."),
    ('Über 100% "quoted"\n', None),
    ("deploy-canary@example.org", "https://ci.example.org/runs/99?x=1"),
    ("東京タワーが点灯しました", None),
    ("Ｆｕｌｌ ｗｉｄｔｈ ﬁn", "naïve CAFÉ"),
    ("x" * 300 + " tail", "snake_case under_score"),
    ("", "only a body: Straße"),
    ("'); drop table streams; --", "a:* & b | !c <-> d \\ ''"),
)


@pytest.fixture
async def pool(postgres_dsn: str) -> AsyncIterator[Any]:
    opened = await open_pool(PostgresSettings(dsn=postgres_dsn), 3)
    yield opened
    await opened.close()


def reader(pool: Any, **settings: Any) -> SearchReader:
    return SearchReader(pool, IngressSettings(**settings), CLOCK)


async def found(search: SearchReader, q: str, user: str = "ada", limit: int = 50, **chosen: Any) -> list[int]:
    rows, _ = await search.page(
        "acme", user, q, NOW, CLOCK.monotonic() + 10, limit=limit, chosen=FeedFilter(**chosen)
    )
    return [row.seq for row in rows]


def text_of(number: int) -> dict[str, Any]:
    title, body = TEXTS[(number - 1) % len(TEXTS)]
    return {"title": title, "body": body, "data": {"hidden": "needle"}, "type": f"t{number % 2}"}


@pytest.mark.parametrize("indexed", [False, True])
async def test_what_is_found(pool: Any, postgres_dsn: str, indexed: bool) -> None:
    """Every word of the query begins a word of title or body, whatever case, width, accent or script."""
    await store_notifications(postgres_dsn, "acme", "ada", len(TEXTS), content=text_of)
    await store_notifications(postgres_dsn, "acme", "grace", len(TEXTS), content=text_of)
    search = reader(pool, search_walk=1 if indexed else 1000)
    for q, expected in (
        ("build", [1]), ("BUILD fin", [1]), ("fin build 318", [1]), ("uild", []), ("build nothing", []),
        ("über", [2]), ("ÜBER 100%", [2]), ('"quoted"', [2]), ("quot", [2]), ("uber", []),
        ("deploy canary", [3]), ("deploy-canary@example.org", [3]), ("99", [3]),
        ("東京", [4]), ("点灯", [4]), ("タワー", [4]), ("大阪", []),
        ("full", [5]), ("Ｆull", [5]), ("fin", [5, 1]), ("cafe\u0301", [5]), ("cafe", []),
        ("x" * 64, [6]), ("x" * 200, [6]), ("tail", [6]), ("case", [6]), ("snake_case", [6]),
        ("straße", [7]), ("strasse", []), ("only", [7]), ("a", [8, 7, 1]),
        ("drop table", [8]), ("'); drop", [8]), ("d & !b", [8]), ("needle", []), ("hidden", []),
    ):  # fmt: skip
        assert await found(search, q) == expected, q
    assert (await pool.fetchval("select count(*) from search_documents") > 0) is indexed
    assert await found(search, "build", user="nobody") == []
    assert await found(search, "build", user="a\0") == []


async def test_index_and_walk_agree(pool: Any, postgres_dsn: str) -> None:
    """Whatever was indexed when, filters, states and pages included, the answers are the same."""
    rng = random.Random(7)
    words = [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "über",
        "Straße",
        "東京タワー",
        "ＡＢｃ１",
        "ﬁnal",
        "café",
        "ΟΔΟΣ",
        "İstanbul",
        "K2",
    ]
    plain = reader(pool, search_walk=100_000)
    some = reader(pool, search_walk=5, search_fill_batch=7)
    states = ("archived_at", "dismissed_at", "retracted_at", "read_at", "expires_at")
    for turn in range(6):
        await store_notifications(
            postgres_dsn, "acme", "ada", 20,
            content=lambda n: {
                "title": " ".join(rng.choices(words, k=2)), "body": " ".join(rng.choices(words, k=3)),
                "type": f"t{n % 2}", "category": f"c{n % 3}",
            },
        )  # fmt: skip
        for column in states:
            await pool.execute(
                f"update notifications set {column} = now() - interval '1 hour' where seq = any ($1)",
                rng.sample(range(1, 20 * turn + 21), 3),
            )
        # What a merge does: up to the top.
        await pool.execute("update notifications set position = position + 1000 where seq = $1", 3 * turn + 1)
        for _ in range(12):
            q = " ".join(rng.choices(words, k=rng.choice((1, 1, 2))))[: rng.choice((2, 4, 40))]
            q = rng.choice((q, q.upper(), unicodedata.normalize("NFKC", q)))
            chosen = FeedFilter(
                rng.choice((None, "unread", "read", "archived")),
                rng.choice((None, "t0")), rng.choice((None, None, "c1")),
            )  # fmt: skip
            pages = []
            for search in (plain, some):
                seen, cursor = [], None
                while True:
                    rows, cursor = await search.page(
                        "acme", "ada", q, NOW, CLOCK.monotonic() + 10, limit=3, cursor=cursor, chosen=chosen
                    )
                    seen.append([row.seq for row in rows])
                    if cursor is None:
                        break
                pages.append(seen)
            assert pages[0] == pages[1], (turn, q, chosen)
    assert await pool.fetchval("select seq from search_progress") > 0


async def test_the_index_follows_edits_and_deletions(pool: Any, postgres_dsn: str) -> None:
    """Changed content is found by its new words only; what was deleted leaves no word behind."""
    ids = await store_notifications(postgres_dsn, "acme", "ada", 9, content=lambda n: {"title": f"word{n}"})
    search = reader(pool, search_walk=2)
    assert await found(search, "word4") == [4]
    before = await pool.fetchval("select count(*) from search_documents")
    await pool.execute(
        "update notifications set content = replace(content, 'word4', 'other') where id = $1",
        uuid.UUID(bytes=ids[3]),
    )
    assert (await found(search, "word4"), await found(search, "other")) == ([], [4])
    await pool.execute("update notifications set read_at = now() where seq = 5")
    assert await found(search, "word5") == [5]
    await pool.execute("delete from notifications where seq < 4")
    assert await found(search, "word2") == []
    assert await pool.fetchval("select count(*) from search_documents") == before - 3


async def test_edits_while_words_are_indexed(pool: Any, postgres_dsn: str) -> None:
    """An edit that commits while the former content is being indexed wins, in either order."""
    await store_notifications(postgres_dsn, "acme", "ada", 6, content=lambda n: {"title": f"word{n}"})
    search = reader(pool, search_walk=1)
    async with pool.acquire() as other:
        edit = other.transaction()
        await edit.start()
        await other.execute(
            "update notifications set content = replace(content, 'word2', 'edited') where seq = 2"
        )
        filling = asyncio.ensure_future(found(search, "word1"))
        waiting = (
            "select count(*) from pg_stat_activity"
            " where datname = current_database() and wait_event_type = 'Lock'"
        )
        while not await pool.fetchval(waiting):
            assert not filling.done()
        await edit.commit()
    assert await filling == [1]
    assert (await found(search, "word2"), await found(search, "edited")) == ([], [2])


async def test_searches_at_once(pool: Any, postgres_dsn: str) -> None:
    """Many first searches of one long feed index it together, and all find the same."""
    await store_notifications(postgres_dsn, "acme", "ada", 120, content=lambda n: {"title": f"word{n}"})
    search = reader(pool, search_walk=5, search_fill_batch=10)
    answers = await asyncio.gather(*(found(search, "word77") for _ in range(8)))
    assert answers == [[77]] * 8
    assert await pool.fetchval("select seq from search_progress") == 120
    assert await pool.fetchval("select count(*) from search_documents") == 120


async def test_a_deadline_keeps_what_is_done(pool: Any, postgres_dsn: str) -> None:
    """A search whose time is over while words are indexed says so, and asks again later."""
    await store_notifications(postgres_dsn, "acme", "ada", 50, content=lambda n: {"title": f"word{n}"})
    search = reader(pool, search_walk=5, search_fill_batch=1)
    with pytest.raises(UnavailableError, match="ask again"):
        await search.page("acme", "ada", "word7", NOW, CLOCK.monotonic() - 1, limit=5)
    assert await found(search, "word7") == [7]


async def test_lost_index(pool: Any, postgres_dsn: str) -> None:
    """An index that was lost with its server (it is not logged) is made again."""
    await store_notifications(postgres_dsn, "acme", "ada", 20, content=lambda n: {"title": f"word{n}"})
    search = reader(pool, search_walk=5)
    assert await found(search, "word3") == [3]
    await pool.execute("truncate search_documents, search_progress")
    assert await found(search, "word3") == [3]
    kinds = await pool.fetch(
        "select relpersistence from pg_class where relname in ('search_documents', 'search_progress')"
    )
    assert {row[0] for row in kinds} == {b"u"}


@pytest.mark.parametrize(
    "q", ["%", "--", " ", "a\0b", "w " * (MAX_WORDS + 1), "x" * 256, "京" * (MAX_WORDS + 1)]
)
def test_what_cannot_be_searched_for(q: str) -> None:
    """A query without a word, with too many, too long or with NUL is refused by name."""
    with pytest.raises(InvalidInputError, match="expected q to be"):
        check_query(q)


async def test_over_http(postgres_dsn: str) -> None:
    """`q` narrows the feed of users and services; a bad one is a problem document that names it."""
    world = await World(postgres_dsn).start()
    try:
        await store_notifications(
            postgres_dsn, "acme", "ada", 30, content=lambda n: {"title": f"Word{n % 3}"}
        )
        for path, headers in (
            ("/api/notifications", world.client()),
            ("/v1/users/ada/notifications", world.service()),
        ):
            seen, cursor = [], ""
            while True:
                params = {"q": "word1", "limit": "4"} | ({"cursor": cursor} if cursor else {})
                page = (await world.http.get(path, params=params, headers=headers)).json()
                seen += [note["seq"] for note in page["notifications"]]
                cursor = page["nextCursor"]
                if cursor is None:
                    break
            assert seen == list(range(28, 0, -3))
            for q in ("%", "x" * 256, "a\0"):
                answer = await world.http.get(path, params={"q": q}, headers=headers)
                assert answer.status_code == 422
                problem = answer.json()
                assert problem["errors"][0]["path"] == "q", problem
            assert (
                len((await world.http.get(path, params={"q": ""}, headers=headers)).json()["notifications"])
                == 20
            )
    finally:
        await world.stop()
