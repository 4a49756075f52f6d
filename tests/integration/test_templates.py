"""Templates through HTTP, with a real Postgres and the real process that renders."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import pytest_asyncio

from cluster.cli import main
from cluster.embedded import EmbeddedPostgres
from tests.conftest import run_apart
from tests.integration.ingress_world import World
from tests.support import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

GREETING = {
    "content": {
        "default": {
            "title": "{{ who }} wrote",
            "body": "{{ n|plural({'one': '# message', 'other': '# messages'}) }}",
            "link": "https://example.com/?q={{ who|urlencode }}",
            "channels": {"push": {"body": "Open the app"}},
        },
        "pt": {"title": "{{ who }} escreveu"},
        "pt-BR": {"title": "{{ who }} escreveu pra você"},
    }
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_world(postgres_server: EmbeddedPostgres) -> AsyncIterator[World]:
    admin = await asyncpg.connect(postgres_server.dsn)
    await admin.execute("create database test_templates template template strategy wal_log")
    made = await World(
        postgres_server.dsn_of("test_templates"),
        template={"cache_s": 0.2, "start_s": 5.0, "time_limit_s": 0.2, "max_steps": 1_000_000},
    ).start()
    yield made
    await made.stop()
    await admin.execute("drop database test_templates with (force)")
    await admin.close()


@pytest_asyncio.fixture(loop_scope="module")
async def world(shared_world: World) -> World:
    await shared_world.reset()
    await shared_world.pool.execute("truncate templates, template_exposures")
    shared_world.ingress.app.services.templates._cache.clear()
    return shared_world


async def put(world: World, name: str, document: Any, key: str | None = None) -> Any:
    return await world.http.put(f"/v1/templates/{name}", json=document, headers=world.service(key))


async def stored(world: World, name: str, document: Any) -> int:
    answer = await put(world, name, document)
    assert answer.status_code == 200, answer.text
    return answer.json()["version"]


async def told(world: World, **event: Any) -> dict[str, Any]:
    """Send an event; the content that reached the router."""
    answer = await world.event({"userId": "ada", "type": "t", **event})
    assert answer.status_code == 202, answer.text
    return json.loads(f"{{{world.router.events[-1].content}}}")


async def device(world: World, user: str, locale: str) -> None:
    await world.pool.execute(
        "insert into devices (tenant, user_id, device_id, platform, provider, token_kind, token, locale)"
        " values ('acme', $1, 'd', 'ios', 'apns', 'token', $1, $2)",
        user,
        locale,
    )


async def test_an_event_takes_its_texts_from_a_template(world: World) -> None:
    """Title, body and link are the template's, HTML is escaped, phones get the text as it is."""
    await stored(world, "greeting", GREETING)
    content = await told(world, template="greeting", params={"who": "Tom & <b>", "n": 2})
    assert content["title"] == "Tom &amp; &lt;b&gt; wrote"
    assert content["body"] == "2 messages"
    assert content["link"] == "https://example.com/?q=Tom%20%26%20%3Cb%3E"
    assert content["channelContent"]["push"] == {"title": "Tom & <b> wrote", "body": "Open the app"}


async def test_the_language_is_the_users(world: World) -> None:
    """The event's locale, else that of the user's device, else the default, by the chain; one event for many
    users tells each in their own language."""
    await stored(world, "greeting", GREETING)
    params = {"who": "Ada", "n": 1}
    assert (await told(world, template="greeting", params=params, locale="pt_AO"))["title"] == "Ada escreveu"
    await device(world, "ada", "pt-BR")
    await device(world, "bob", "de")
    answer = await world.event(
        {"userIds": ["ada", "bob", "cy", "a\0", "ada"], "type": "t", "template": "greeting", "params": params}
    )
    results = answer.json()["results"]
    assert ["error" in one for one in results] == [False, False, False, True, False]
    titles = [json.loads(f"{{{event.content}}}")["title"] for event in world.router.events[1:]]
    assert titles == ["Ada escreveu pra você", "Ada wrote", "Ada wrote"]


async def test_missing_parameters_are_told(world: World) -> None:
    """A problem names each parameter that is missing; in a batch it fails only its item."""
    await stored(world, "greeting", GREETING)
    event = {"userId": "ada", "type": "t", "template": "greeting"}
    answer = await world.event(event)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid")
    assert {e["path"] for e in answer.json()["errors"]} == {"params/who", "params/n"}
    results = (await world.event([event, {**event, "params": {"who": "x", "n": 1}}])).json()["results"]
    assert "error" in results[0]
    assert "id" in results[1]
    unknown = await world.event({**event, "template": "nothing"})
    assert (unknown.status_code, unknown.json()["errors"][0]["path"]) == (422, "template")
    broken = await world.event({**event, "params": {"who": "x", "n": "many"}})
    assert (broken.status_code, broken.json()["code"]) == (422, "template_failed")
    assert broken.json()["errors"][0]["path"] == "template/default/body"
    assert len(world.router.events) == 1


async def test_versions(world: World) -> None:
    """Each change is a version, the same document none; an event may name one; a deleted template is gone."""
    assert await stored(world, "v", {"content": {"default": {"title": "one"}}}) == 1
    assert await stored(world, "v", {"content": {"default": {"title": "one"}}}) == 1
    assert await stored(world, "v", {"content": {"default": {"title": "two"}}}) == 2
    assert (await told(world, template="v"))["title"] == "two"
    assert (await told(world, template="v@1"))["title"] == "one"
    answer = await world.http.get("/v1/templates/v/versions", headers=world.service())
    assert [one["version"] for one in answer.json()["versions"]] == [2, 1]
    old = await world.http.get("/v1/templates/v?version=1", headers=world.service())
    assert old.json()["content"]["default"]["title"] == "one"
    assert (await world.http.delete("/v1/templates/v", headers=world.service())).status_code == 200
    assert (await world.event({"userId": "a", "type": "t", "template": "v"})).status_code == 422
    assert (await world.http.get("/v1/templates/v", headers=world.service())).status_code == 404


async def test_a_change_elsewhere_holds_soon(world: World) -> None:
    """What another replica stored is used within `template.cache_s`."""
    await stored(world, "c", {"content": {"default": {"title": "before"}}})
    assert (await told(world, template="c"))["title"] == "before"
    await world.pool.execute(
        "insert into templates (tenant, template_id, version, document) values ('acme', 'c', 2, $1)",
        json.dumps({"content": {"default": {"title": "after"}}, "params": {}}),
    )

    async def after() -> bool:
        return (await told(world, template="c"))["title"] == "after"

    await eventually(after, 3.0)


async def test_tenants_do_not_share_templates(world: World) -> None:
    """A template of another tenant is no template."""
    await stored(world, "mine", {"content": {"default": {"title": "x"}}})
    theirs = await world.http.get("/v1/templates/mine", headers=world.service(world.other_key))
    assert theirs.status_code == 404
    event = {"userId": "ada", "type": "t", "template": "mine"}
    answer = await world.event(event, headers=world.service(world.other_key))
    assert answer.status_code == 422


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ({"content": {"default": {"title": "{% if %}"}}}, "content/default/title"),
        ({"content": {"default": {"title": "{{ 9 ** 9 }}"}}}, "content/default/title"),
        ({"params": {}, "content": {"default": {"title": "{{ who }}"}}}, "content/default/title"),
        ({"content": {"default": {"title": "x"}, "pt_BR": {"title": "x"}}}, "content/pt_BR"),
    ],
)
async def test_a_bad_template_is_not_stored(world: World, document: Any, path: str) -> None:
    """What cannot be rendered is told when it is stored, by its place."""
    answer = await put(world, "bad", document)
    assert (answer.status_code, answer.json()["errors"][0]["path"]) == (422, path)
    assert (await world.http.get("/v1/templates/bad", headers=world.service())).status_code == 404


async def test_preview(world: World) -> None:
    """What a template makes, for a locale or a user, stored or not, without an event."""
    await stored(world, "greeting", GREETING)
    await device(world, "ada", "pt-PT")

    async def preview(**body: Any) -> Any:
        return await world.http.post("/v1/templates/greeting/preview", json=body, headers=world.service())

    params = {"who": "O'Neil", "n": 3}
    made = (await preview(params=params, userId="ada")).json()
    assert (made["locale"], made["title"], made["version"]) == ("pt", "O&#39;Neil escreveu", 1)
    assert made["channels"]["push"]["title"] == "O'Neil escreveu"
    draft = {"content": {"default": {"title": "Draft {{ who }}"}}, "escape": "none"}
    made = (await preview(params={"who": "O'Neil"}, document=draft)).json()
    assert (made["title"], made["version"], made["channels"]) == ("Draft O'Neil", None, {})
    assert (await preview(params={})).status_code == 422
    assert (await preview(params=params, version=9)).status_code == 404
    assert world.router.events == []


async def test_a_template_that_hangs_stalls_nobody(world: World) -> None:
    """It fails with its own problem, and other events go on while it hangs."""
    source = "{% for a in xs %}{% if xs|sort|unique|list|length > 1 %}{% endif %}{% endfor %}done"
    await stored(world, "slow", {"content": {"default": {"title": source}}})
    event = {
        "userId": "ada",
        "type": "t",
        "template": "slow",
        "params": {"xs": [f"x{i}" for i in range(3000)]},
    }
    hanging = asyncio.ensure_future(world.event(event))
    meanwhile = 0
    while not hanging.done():
        assert (await world.event({"userId": "bob", "type": "t", "title": "x"})).status_code == 202
        meanwhile += not hanging.done()
    answer = await hanging
    assert (answer.status_code, answer.json()["code"]) == (422, "template_failed")
    assert "longer" in answer.json()["detail"]
    assert meanwhile > 0
    await stored(world, "fine", {"content": {"default": {"title": "fine"}}})
    assert (await told(world, template="fine"))["title"] == "fine"


async def test_a_lost_process_is_replaced(world: World) -> None:
    """A process that renders and was killed costs one event a problem, not the next."""
    await stored(world, "t", {"content": {"default": {"title": "{{ a }}"}}})
    event = {"userId": "ada", "type": "t", "template": "t", "params": {"a": "x"}}
    assert (await world.event(event)).status_code == 202
    (process,) = world.ingress.app.services.templates.renderer._all
    process._child.kill()

    async def again() -> bool:
        return (await world.event(event)).status_code == 202

    await eventually(again, 5.0)
    assert process._child.poll() is None


async def test_the_process_knows_nothing(world: World) -> None:
    """No setting and no secret is in the environment of the process that renders."""
    await stored(world, "t", {"content": {"default": {"title": "{{ a }}"}}})
    (process,) = world.ingress.app.services.templates.renderer._all
    environ = Path(f"/proc/{process._child.pid}/environ").read_bytes()
    assert {part.split(b"=")[0] for part in environ.split(b"\0") if part} <= {b"PYTHONPATH", b"LC_ALL"}


async def test_events_without_template_start_nothing(postgres_dsn: str) -> None:
    """A replica that never saw a template has no process for them, and asks Postgres nothing more."""
    world = await World(postgres_dsn).start()
    try:
        assert (await world.event({"userId": "ada", "type": "t", "title": "x"})).status_code == 202
        templates = world.ingress.app.services.templates
        assert [process._child for process in templates.renderer._all] == [None]
        assert templates._cache == {}
    finally:
        await world.stop()


async def test_variants_are_sticky_and_counted(world: World) -> None:
    """Each user gets one variant, always the same; results count what became of it, by variant."""
    one = {"name": "one", "weight": 1, "content": {"default": {"title": "1 {{ n }}"}}}
    two = {
        "name": "two",
        "weight": 1,
        "content": {"default": {"title": "2 {{ n }}"}, "pt": {"title": "dois"}},
    }
    await stored(world, "ab", {"variants": [one, two]})
    users = [f"u{i}" for i in range(40)]
    got: dict[str, set[str]] = {user: set() for user in users}
    for _ in range(2):
        world.router.events.clear()
        event = {"userIds": users, "type": "t", "template": "ab", "params": {"n": 7}}
        assert (await world.event(event)).status_code == 202
        for sent in world.router.events:
            got[sent.user].add(json.loads(f"{{{sent.content}}}")["title"])
    assert {len(titles) for titles in got.values()} == {1}
    assert {title for titles in got.values() for title in titles} == {"1 7", "2 7"}
    # The scripted router stores nothing: the rows of the last round are put there by hand.
    for seq, sent in enumerate(world.router.events, 1):
        clicked = "now()" if json.loads(f"{{{sent.content}}}")["title"] == "1 7" else "null"
        await world.pool.execute(
            "insert into notifications (id, stream_id, seq, rev, position, priority, type, content,"
            " created_at, delivered_at, clicked_at)"
            f" values ($1, 1, $2, $2, $2, 1, 't', '', now(), now(), {clicked})",
            UUID(bytes=sent.id),
            seq,
        )
    answer = await world.http.get("/v1/templates/ab/results", headers=world.service())
    first, second = answer.json()["variants"]
    assert (first["variant"], second["variant"], first["sent"] + second["sent"]) == ("one", "two", 40)
    assert first["clicked"]["count"] == first["delivered"]["count"] == first["sent"]
    assert (second["clicked"]["count"], second["clicked"]["low"]) == (0, 0.0)
    assert 0 < second["clicked"]["high"] < first["clicked"]["low"] < 1
    preview = await world.http.post(
        "/v1/templates/ab/preview", json={"params": {"n": 1}, "variant": "two"}, headers=world.service()
    )
    assert (preview.json()["title"], preview.json()["variant"]) == ("2 1", "two")
    for document, path in (
        ({"variants": [one]}, "variants"),
        ({"variants": [one, one]}, "variants/1/name"),
        ({"variants": [one, {**two, "weight": 0}]}, "variants/1/weight"),
        ({"variants": [one, two], "content": one["content"]}, "content"),
    ):
        assert (await put(world, "bad", document)).json()["errors"][0]["path"] == path


async def test_scope(world: World) -> None:
    """Templates need their scope."""
    key = await world.tenants.create_key("acme", "events", ["events:write"])
    assert (await put(world, "x", GREETING, key)).status_code == 403


async def test_command_line(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """put, list, show, versions, preview and delete; what is wrong is one sentence."""
    file = tmp_path / "greeting.json"
    file.write_text(json.dumps(GREETING))

    def run(*words: str, status: int = 0) -> str:
        async def work() -> int:
            return await asyncio.to_thread(main, ["template", *words, "--dsn", world.dsn], {})

        assert run_apart(work) == status
        out = capsys.readouterr()
        return out.out if status == 0 else out.err

    assert "version 1" in run("put", "acme", "greeting", "--file", str(file))
    assert run("list", "acme").startswith("greeting@1 ")
    assert json.loads(run("show", "acme", "greeting"))["params"] == {"n": {}, "who": {}}
    assert "cli:" in run("versions", "acme", "greeting")
    made = run("preview", "acme", "greeting", "--param", "who=Ada", "--param", "n=1", "--locale", "pt-BR")
    assert json.loads(made)["title"] == "Ada escreveu pra você"
    file.write_text('{"content": {"default": {"title": "{{ x"}}}')
    assert "line 1" in run("put", "acme", "greeting", "--file", str(file), status=1)
    assert "no tenant" in run("put", "nobody", "greeting", "--file", str(file), status=1)
    assert "deleted" in run("delete", "acme", "greeting")
    assert "no such template" in run("show", "acme", "greeting", status=1)
