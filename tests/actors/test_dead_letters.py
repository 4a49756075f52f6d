"""Dead letters from the HTTP API and the command line to the provider and back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx
import pytest

from carillon.ids import uuid_text
from carillon.messages import Event
from cluster.cli import main
from serve.ingress import Ingress
from stores.postgres.tenants import TenantStore
from tests.actors.fakes import actor_config
from tests.actors.push_world import FCM_TOKEN, World, world
from tests.actors.shard_kit import make_event
from tests.push_kit import script
from tests.support import eventually


class Api:
    """The HTTP API of the world's cluster, for the tenants "t" and "other"."""

    def __init__(self, w: World, url: str, keys: dict[str, str]) -> None:
        self.w = w
        self.url = url
        self.keys = keys
        self.http = httpx.AsyncClient(base_url=url, trust_env=False, timeout=15.0)

    async def get(self, path: str, tenant: str = "t", **query: Any) -> Any:
        answer = await self.http.get(path, params=query, headers=self._login(tenant))
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def post(self, body: Any, tenant: str = "t") -> httpx.Response:
        path = "/v1/dead-letters/replay"
        return await self.http.post(path, json=body, headers=self._login(tenant))

    async def replay(self, body: Any, tenant: str = "t") -> dict[str, Any]:
        answer = await self.post(body, tenant)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def _login(self, tenant: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[tenant]}"}

    async def die(self, *events: Event) -> None:
        """Publish events that FCM refuses for good, one after the other."""
        script(self.w.fcm, FCM_TOKEN, error="INVALID_ARGUMENT")
        for event in events:
            await self.w.publish(event)

            async def dead(raw: bytes = event.id) -> bool:
                sql = "select state from deliveries where notification_id = $1"
                return await self.w.db.fetchval(sql, uuid_text(raw)) == "dead"

            await eventually(dead)

    async def states(self) -> list[str]:
        rows = await self.w.db.fetch("select state from deliveries order by created_at")
        return [row[0] for row in rows]


@contextlib.asynccontextmanager
async def api(dsn: str, **ingress: Any) -> AsyncIterator[Api]:
    """Everything started, the user's phone registered."""
    pool = await asyncpg.create_pool(dsn, min_size=1, max_size=1)
    store = TenantStore(pool)
    keys = {}
    for tenant in ("t", "other"):
        await store.create_tenant(tenant)
        keys[tenant] = await store.create_key(tenant, "test", ["admin"])
    keys["reader"] = await store.create_key("t", "test", ["users:read"])
    await pool.close()
    async with world(dsn) as w:
        await w.devices("fcm")
        settings = w.settings.with_values(ingress=ingress)
        replica = Ingress(actor_config("ingress", "ingress-1", w.coordinator, settings=settings))
        await replica.start()
        found = Api(w, replica.url, keys)
        try:
            yield found
        finally:
            await found.http.aclose()
            await replica.stop()


async def test_a_dead_letter_is_listed_told_and_replayed_with_fresh_tries(postgres_dsn: str) -> None:
    """503 until the tries are used up; replayed it has all of them again, and its history stays."""
    async with api(postgres_dsn) as a:
        script(a.w.fcm, FCM_TOKEN, error="UNAVAILABLE")
        event = make_event(title="ring")
        await a.w.publish(event)
        assert await a.w.settled(1) == [("push", "dead", "gave up after 2 tries: UNAVAILABLE")]
        (letter,) = (await a.get("/v1/dead-letters"))["deadLetters"]
        assert letter["notificationId"] == uuid_text(event.id)
        assert (letter["userId"], letter["title"], letter["channel"]) == ("u", "ring", "push")
        assert (letter["reason"], letter["attempts"]) == ("gave up after 2 tries: UNAVAILABLE", 2)
        one = await a.get(f"/v1/dead-letters/{letter['id']}")
        assert [(t["attempt"], t["outcome"], t["status"]) for t in one["tries"]] == [
            (1, "failed", 503),
            (2, "failed", 503),
        ]
        done = await a.replay({"ids": [letter["id"]]})
        assert done == {"replayed": 1, "skipped": 0, "remaining": 0, "cursor": None}

        async def died_again() -> bool:
            return await a.w.db.fetchval("select state = 'dead' and attempts = 4 from deliveries")

        await eventually(died_again, what="two more tries")
        again = await a.get(f"/v1/dead-letters/{letter['id']}")
        assert [t["attempt"] for t in again["tries"]] == [1, 2, 3, 4]
        assert again["replayedAt"] is not None
        script(a.w.fcm, FCM_TOKEN)
        assert (await a.replay({"ids": [letter["id"], letter["id"], "77", "x"]}))["replayed"] == 1
        assert await a.w.settled(1) == [("push", "sent", None)]
        assert [p.target for p in a.w.fcm.pushes] == [FCM_TOKEN]
        assert (await a.get("/v1/dead-letters"))["deadLetters"] == []
        assert (await a.replay({"ids": [letter["id"]]}))["skipped"] == 1, "it is dead no more"


async def test_lists_page_filter_and_keep_to_their_tenant(postgres_dsn: str) -> None:
    """Newest first by opaque cursor; by user, type, channel, reason and time; nothing of another tenant."""
    async with api(postgres_dsn) as a:
        events = [make_event(title=f"n{n}", type="a" if n % 2 else "b") for n in range(5)]
        await a.die(*events)
        seen: list[str] = []
        cursor = None
        while True:
            page = await a.get("/v1/dead-letters", limit=2, **({"cursor": cursor} if cursor else {}))
            seen += [one["title"] for one in page["deadLetters"]]
            cursor = page["nextCursor"]
            if cursor is None:
                break
        assert seen == ["n4", "n3", "n2", "n1", "n0"]

        async def titles(**query: Any) -> list[str]:
            return [one["title"] for one in (await a.get("/v1/dead-letters", **query))["deadLetters"]]

        assert await titles(type="a") == ["n3", "n1"]
        assert await titles(userId="u", type="b") == ["n4", "n2", "n0"]
        assert await titles(userId="nobody") == []
        assert await titles(channel="fcm") == []
        assert await titles(reason="invalid_arg") == seen
        middle = (await a.get("/v1/dead-letters"))["deadLetters"][2]["diedAt"]
        assert await titles(since=middle) == ["n4", "n3", "n2"]
        assert await titles(until=middle) == ["n1", "n0"]
        assert await a.get("/v1/dead-letters", tenant="other") == {"deadLetters": [], "nextCursor": None}
        (first, *_) = (await a.get("/v1/dead-letters"))["deadLetters"]
        foreign = await a.http.get(f"/v1/dead-letters/{first['id']}", headers=a._login("other"))
        assert foreign.status_code == 404
        assert (await a.replay({"ids": [first["id"]]}, tenant="other"))["skipped"] == 1
        assert (await a.replay({"filter": {}}, tenant="other"))["replayed"] == 0
        assert await a.states() == ["dead"] * 5


async def test_a_replay_by_filter_goes_on_from_its_cursor(postgres_dsn: str) -> None:
    """At most so many a call; whoever died in between starts again and replays the rest, each once."""
    async with api(postgres_dsn, replay_max=2) as a:
        await a.die(*(make_event(type="a" if n else "b") for n in range(6)))
        script(a.w.fcm, FCM_TOKEN)
        wanted = {"type": "a"}
        first = await a.replay({"filter": wanted})
        assert (first["replayed"], first["skipped"], first["remaining"]) == (2, 0, 3)
        second = await a.replay({"filter": wanted, "cursor": first["cursor"]})
        assert (second["replayed"], second["remaining"]) == (2, 1)
        # The caller died: without the cursor the same call finds what is left.
        last = await a.replay({"filter": wanted})
        assert last == {"replayed": 1, "skipped": 0, "remaining": 0, "cursor": None}
        await eventually(lambda: a.w.fcm.count == 5)

        async def rest() -> bool:
            return await a.states() == ["dead"] + ["sent"] * 5

        await eventually(rest)


async def test_what_has_expired_stays_dead(postgres_dsn: str) -> None:
    """A replay of what nobody wants any more is skipped and says why, at its place in the list."""
    async with api(postgres_dsn) as a:
        await a.die(make_event(title="old"), make_event(title="new"))
        await a.w.db.execute("update notifications set expires_at = now() where content like '%old%'")
        script(a.w.fcm, FCM_TOKEN)
        done = await a.replay({"filter": {}})
        assert (done["replayed"], done["skipped"]) == (1, 1)
        (letter,) = (await a.get("/v1/dead-letters"))["deadLetters"]
        assert (letter["title"], letter["reason"], letter["replayedAt"]) == ("old", "expired", None)


MISTAKES: list[Any] = [
    {},
    {"ids": ["1"], "filter": {}},
    {"ids": ["1"], "cursor": "x"},
    {"ids": "1"},
    {"ids": ["1"] * 501},
    {"filter": {"colour": "red"}},
    {"filter": "all"},
    {"filter": {"since": "yesterday"}},
    {"filter": {}, "limit": 0},
    {"filter": {}, "cursor": "nonsense"},
    {"everything": True},
]


async def test_replays_that_make_no_sense_are_refused(postgres_dsn: str) -> None:
    """422 with the place; nothing is replayed."""
    async with api(postgres_dsn) as a:
        for body in MISTAKES:
            answer = await a.post(body)
            assert answer.status_code == 422, (body, answer.text)
            assert answer.json()["errors"], body


async def test_reading_and_replaying_need_their_scopes(postgres_dsn: str) -> None:
    """A key that may read may not replay."""
    async with api(postgres_dsn) as a:
        assert await a.get("/v1/dead-letters", tenant="reader") == {"deadLetters": [], "nextCursor": None}
        assert (await a.post({"filter": {}}, tenant="reader")).status_code == 403


async def test_the_command_line_lists_shows_and_replays(
    postgres_dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Filters, progress, and exit codes: 0 done, 1 not there, 2 a wrong command line."""
    async with api(postgres_dsn, replay_max=2) as a:
        await a.die(*(make_event(title=f"n{n}") for n in range(3)))
        script(a.w.fcm, FCM_TOKEN)
        login = ["--url", a.url, "--key", a.keys["t"]]

        async def run(*words: str) -> tuple[int, str, str]:
            code = await asyncio.to_thread(main, ["dead-letters", *words, *login], {})
            captured = capsys.readouterr()
            return code, captured.out, captured.err

        code, out, _ = await run("list", "--json", "--user", "u")
        assert code == 0
        letters = json.loads(out)
        assert [one["title"] for one in letters] == ["n2", "n1", "n0"]
        code, out, err = await run("list", "--limit", "2")
        assert (code, len(out.splitlines()), "more than 2" in err) == (0, 2, True)
        code, out, _ = await run("show", letters[0]["id"])
        assert code == 0
        assert "INVALID_ARGUMENT" in out
        assert (await run("show", "999999"))[0] == 1
        assert (await run("replay"))[0] == 2
        assert (await run("replay", "--all", "--type", "test"))[0] == 2
        assert (await run("replay", letters[2]["id"]))[:2] == (0, "1 replayed, 0 skipped\n")
        code, out, err = await run("replay", "--all")
        assert (code, out) == (0, "2 replayed, 0 skipped\n")
        assert "0 to go" in err
        await eventually(lambda: a.w.fcm.count == 3)
        wrong = ["--url", a.url, "--key", "crl_000000000000_" + "0" * 48]
        assert await asyncio.to_thread(main, ["dead-letters", "list", *wrong], {}) == 1
