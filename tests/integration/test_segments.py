"""Segments on a real PostgreSQL: both evaluations agree, and a walk meets whom the filter fits."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carillon.audience import Audience
from carillon.ids import SLOTS, slot_of
from carillon.segments import compile_path, fits, parse_filter
from stores.postgres.audience import AudienceReader
from stores.postgres.pool import open_pool
from tests.conftest import run_apart
from tests.integration.client_world import ClientWorld
from tests.integration.test_users import Service
from tests.unit.segment_cases import DOCUMENTS, FILTERS


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(FILTERS, st.lists(DOCUMENTS, min_size=1, max_size=6)), min_size=1, max_size=8))
def test_both_evaluations_agree(postgres_dsn: str, cases: list[tuple[Any, list[Any]]]) -> None:
    """What Python and PostgreSQL make of random filters and users is the same."""
    trees = [parse_filter(one) for one, _ in cases]

    async def ask() -> list[list[bool]]:
        connection = await asyncpg.connect(postgres_dsn)
        try:
            found = []
            for tree, (_, documents) in zip(trees, cases, strict=True):
                path, variables = compile_path(tree)
                rows = await connection.fetch(
                    "select coalesce(jsonb_path_match(d::jsonb, $2::text::jsonpath, $3::jsonb, true), false)"
                    " from unnest($1::text[]) with ordinality as t (d, n) order by n",
                    [json.dumps(one) for one in documents],
                    path,
                    json.dumps(variables),
                )
                found.append([row[0] for row in rows])
            return found
        finally:
            await connection.close()

    told = run_apart(ask)
    for tree, (one, documents), answers in zip(trees, cases, told, strict=True):
        assert [fits(tree, document) for document in documents] == answers, (one, compile_path(tree))


@pytest.fixture
async def service(postgres_dsn: str) -> AsyncIterator[Service]:
    async with ClientWorld(postgres_dsn, ingress={"preview_s": 60.0}) as world:
        made = Service(world)
        try:
            yield made
        finally:
            await made.http.aclose()


async def fill(service: Service) -> None:
    """Forty users, of whom some have a profile, a phone, a language, and were seen lately."""
    db = service.world.db
    for n in range(40):
        user = f"u{n:02d}"
        slot = slot_of("acme", user)
        await db.execute(
            "insert into streams (tenant, user_id, slot, epoch, last_seen_at) values ('acme', $1, $2, 'e',"
            " case when $3::int = 0 then now() - interval '1 hour' end)",
            user, slot, n % 4,
        )  # fmt: skip
        if n % 3:
            attributes = {"plan": "pro" if n % 2 else "free", "seats": n, "tags": ["odd"] if n % 2 else []}
            profile = (json.dumps(attributes), "de-AT" if n < 20 else None)
            await db.execute(
                "insert into profiles (tenant, user_id, slot, attributes, locale)"
                " values ('acme', $1, $2, $3::jsonb, $4)",
                user, slot, *profile,
            )  # fmt: skip
        if n % 5 == 0:
            await db.execute(
                "insert into devices (tenant, user_id, device_id, platform, provider, token_kind, token,"
                " disabled_at) values ('acme', $1, 'd', 'ios', 'apns', 'token', $1,"
                " case when $2 then now() end)",
                user, n == 5,
            )  # fmt: skip


def numbers(wanted: Any) -> list[str]:
    return [f"u{n:02d}" for n in range(40) if wanted(n)]


async def test_who_fits(service: Service) -> None:
    """Of everybody known, profile or not, a walk and a preview find those whom the filter fits."""
    await fill(service)
    pool = await open_pool(service.world.settings.postgres, 1)
    try:
        reader = AudienceReader(pool)
        for filter_, wanted in (
            ({}, lambda n: True),
            ({"attributes.plan": "pro"}, lambda n: n % 3 and n % 2),
            ({"attributes.plan": {"ne": "pro"}}, lambda n: not (n % 3 and n % 2)),
            ({"attributes.seats": {"gte": 10, "lt": 20}}, lambda n: n % 3 and 10 <= n < 20),
            ({"platform": "ios"}, lambda n: n % 5 == 0 and n != 5),
            ({"not": {"platform": {"exists": True}}}, lambda n: n % 5 or n == 5),
            ({"lastSeenAgoS": {"lt": 7200}}, lambda n: n % 4 == 0),
            ({"locale": "de-AT", "attributes.tags": "odd"}, lambda n: n % 3 and n % 2 and n < 20),
            ({"timezone": {"exists": True}}, lambda n: False),
        ):
            await service.call("PUT", "/v1/segments/some", {"filter": filter_})
            found: list[str] = []
            for slot in range(SLOTS):
                after = ""
                while page := await reader.page("acme", Audience("segment", "some"), slot, after, 1):
                    found += page
                    after = page[-1]
            assert sorted(found) == numbers(wanted), filter_
            told = await service.call("POST", "/v1/segments/some/preview")
            assert (told["count"], told["exact"], told["ofUsers"]) == (len(found), True, 40)
            assert told["userIds"] == found[:20]
        both = Audience("segment", "some", ("ios",))
        await service.call("PUT", "/v1/segments/some", {"filter": {"attributes.plan": "pro"}})
        phones = [user for slot in range(SLOTS) for user in await reader.page("acme", both, slot, "", 9)]
        assert sorted(phones) == numbers(lambda n: n % 3 and n % 2 and n % 5 == 0 and n != 5)
    finally:
        await pool.close()


async def test_segments_are_kept(service: Service) -> None:
    """Put, read, listed by id, replaced and deleted; what breaks a rule is told with its place."""
    made = await service.call("PUT", "/v1/segments/b", {"filter": {"locale": "de"}, "description": "x"})
    assert (made["segmentId"], made["filter"], made["description"]) == ("b", {"locale": "de"}, "x")
    await service.call("PUT", "/v1/segments/a", {"filter": {}})
    page = await service.call("GET", "/v1/segments?limit=1")
    assert [one["segmentId"] for one in page["segments"]] == ["a"]
    page = await service.call("GET", f"/v1/segments?cursor={page['nextCursor']}")
    assert page == {"segments": [made], "nextCursor": None}
    again = await service.call("PUT", "/v1/segments/b", {"filter": {"locale": "pt"}})
    assert (again["filter"], again["description"], again["createdAt"]) == (
        {"locale": "pt"},
        None,
        made["createdAt"],
    )
    wrong = await service.call("PUT", "/v1/segments/b", {"filter": {"x": 1}}, 422)
    assert wrong["errors"][0]["path"] == "filter/x"
    await service.call("PUT", "/v1/segments/b", {}, 422)
    await service.call("PUT", "/v1/segments/-", {"filter": {}}, 422)
    assert await service.call("DELETE", "/v1/segments/b") == {"success": True}
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/preview")):
        await service.call(method, f"/v1/segments/b{path}", status=404)
