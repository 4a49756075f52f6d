"""Why: explanations and dry runs over the whole path, HTTP to Postgres."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from carillon import explain
from carillon.clock import SystemClock, rfc3339
from tests.integration.client_world import ClientWorld
from tests.support import eventually

HOUR = 3_600_000


class Service:
    """A service of the tenant."""

    def __init__(self, world: ClientWorld, http: httpx.AsyncClient) -> None:
        self.world, self.http = world, http

    async def call(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        answer = await self.http.request(
            method,
            f"{self.world.url}{path}",
            json=body,
            headers={"Authorization": f"Bearer {self.world.key}"},
        )
        assert answer.status_code == status, answer.text
        return answer.json()

    async def event(self, user: str = "ada", **more: Any) -> Any:
        return await self.call("POST", "/v1/events", self.body(user, **more), 202)

    async def dry(self, user: str = "ada", **more: Any) -> Any:
        return await self.call("POST", "/v1/events?dryRun=true", self.body(user, **more))

    async def explain(self, told: Any) -> Any:
        return await self.call("GET", f"/v1/notifications/{told['id']}/explain")

    async def prefer(self, user: str = "ada", /, **document: Any) -> Any:
        return await self.call("PUT", f"/v1/users/{user}/preferences", document)

    async def phone(self, user: str = "ada") -> None:
        target = {"platform": "android", "provider": "fcm", "token": f"phone-{user}"}
        await self.call("PUT", f"/v1/users/{user}/devices/phone", target)

    @staticmethod
    def body(user: str, **more: Any) -> Any:
        return {"userId": user, "type": "chat.message", "title": "hello"} | more


@pytest.fixture
async def service(postgres_dsn: str) -> Any:
    async with ClientWorld(postgres_dsn) as world, httpx.AsyncClient(timeout=10) as http:
        yield Service(world, http)


def rules(told: Any) -> list[tuple[str, str]]:
    return [(rule["rule"], rule["source"]) for rule in told["rules"]]


async def test_a_dry_run_tells_what_would_happen_and_does_nothing(service: Service) -> None:
    """The plan and its rules, for each of several preferences; then the same event is sent, and explained by
    the same rules."""
    steps: list[tuple[dict[str, Any], str, list[tuple[str, str]]]] = [
        ({}, "queued", [("offline", "system")]),
        ({"channels": {"push": False}}, "stored", [("channel_off", "user")]),
        ({"types": {"chat.message": False}}, "suppressed", [("type_off", "user")]),
        (
            {"doNotDisturbUntil": rfc3339(SystemClock().now_ms() + HOUR)},
            "deferred",
            [("do_not_disturb", "user")],
        ),
    ]
    await service.phone()
    for number, (document, status, fired) in enumerate(steps):
        await service.prefer(**document)
        plan = await service.dry()
        assert (plan["status"], rules(plan)) == (status, fired)
        assert await service.world.db.fetchval("select count(*) from notifications") == number
        told = await service.event()
        assert (told["status"], told["channels"], told.get("reason")) == (
            plan["status"], plan["channels"], plan["reason"],
        )  # fmt: skip
        why = await service.explain(told)
        assert rules(why) == fired
        assert why["channels"] == plan["channels"]
        assert why["archived"] == plan["archived"] == (status == "suppressed")
    assert await service.world.db.fetchval("select count(*) from deliveries") == 2


async def test_words_are_plain(service: Service) -> None:
    """A reader who knows none of the code understands why no phone rang."""
    until = rfc3339(SystemClock().now_ms() + HOUR)
    await service.phone()
    await service.prefer(doNotDisturbUntil=until)
    why = await service.explain(await service.event())
    assert why["words"] == (
        f"The user does not want to be disturbed until {until}. "
        f"The push waits until {until} (do_not_disturb)."
    )
    await service.prefer(categories={"social": {"channels": {"push": False}}})
    why = await service.explain(await service.event(category="social"))
    assert why["words"] == "The user's preferences switch push off for the category social."
    assert why["deliveries"] == []


async def test_what_has_no_rule_is_explained_too(service: Service) -> None:
    """No target, in-app alone, push alone, urgent: each says so."""
    assert rules(await service.explain(await service.event())) == [("no_target", "system")]
    assert rules(await service.explain(await service.event(channels=["in_app"]))) == [("not_asked", "event")]
    await service.phone()
    assert rules(await service.explain(await service.event(channels=["push"]))) == [("without_app", "event")]
    assert rules(await service.explain(await service.event(priority="urgent"))) == [("urgent", "event")]
    told = await service.event(channels=["apns"], fallback=["fcm"])
    why = await service.explain(told)
    assert why["rules"][0]["channels"] == ["apns"]
    assert rules(why) == [("no_target", "system"), ("without_app", "event")]


async def test_a_tenants_rules_are_told_apart_from_the_users(service: Service) -> None:
    """Defaults and forced rules say whose they are; GET tells the defaults of who stored nothing."""
    await service.call(
        "PUT",
        "/v1/policy",
        {
            "defaults": {"channels": {"push": False}, "timezone": "Europe/Vienna"},
            "forced": {"categories": {"security": True}},
        },
    )
    await service.phone("bob")
    assert rules(await service.dry("bob")) == [("channel_off", "tenant")]
    forced = await service.dry("bob", category="security")
    assert (forced["status"], rules(forced)[0]) == ("queued", ("forced_on", "tenant"))
    shown = await service.call("GET", "/v1/users/bob/preferences")
    assert (shown["channels"], shown["timezone"]) == ({"push": False}, "Europe/Vienna")


async def test_a_dry_run_of_many(service: Service) -> None:
    """A batch and `userIds`: one plan each, in order; a bad item is told beside the others."""
    many = await service.call(
        "POST", "/v1/events?dryRun=true", {"userIds": ["ada", "bob"], "type": "t", "title": "hello"}
    )
    assert [one["userId"] for one in many["results"]] == ["ada", "bob"]
    batch = await service.call(
        "POST", "/v1/events?dryRun=true", [Service.body("ada"), {"userId": "x"}, Service.body("bob")]
    )
    assert [one.get("userId") for one in batch["results"]] == ["ada", None, "bob"]
    assert batch["results"][1]["error"]["code"] == "invalid"
    assert await service.world.db.fetchval("select count(*) from notifications") == 0
    await service.call("POST", "/v1/events?dryRun=maybe", Service.body("ada"), 422)


async def test_an_unknown_notification_is_not_found(service: Service) -> None:
    """404, as everywhere."""
    await service.call("GET", "/v1/notifications/0198c0de-7000-7000-8000-000000000001/explain", status=404)


async def test_merged_pushes_say_into_what(service: Service) -> None:
    """What was told together says so in its explanation."""
    await service.phone()
    await service.prefer(doNotDisturbUntil=rfc3339(SystemClock().now_ms() + 1200))
    first, second = [await service.event() for _ in range(2)]

    async def merged() -> bool:
        why = await service.explain(first)
        return why["deliveries"][0]["reason"] == f"merged into {second['id']}"

    await eventually(merged, what="the end of do-not-disturb")


def test_every_rule_has_words() -> None:
    """No rule is told by its name alone."""
    for name in explain.RULES:
        told = explain.words(explain.Fired(name, "user", "x", ("push",), 0))
        assert told.endswith(".")
        assert "{" not in told
        assert "None" not in told


async def test_one_click_unsubscribes(service: Service) -> None:
    """The link asks on GET and acts on POST, without a login; the next event follows, and the rest stays."""
    made = await service.call(
        "POST", "/v1/unsubscribe-links",
        {"userId": "ada", "category": "marketing", "channel": "push", "baseUrl": service.world.url}, 201,
    )  # fmt: skip
    await service.phone()
    await service.prefer(badge=False)
    assert made["headers"]["List-Unsubscribe"] == f"<{made['url']}>"
    page = await service.http.get(made["url"])
    assert (page.status_code, "marketing by push" in page.text) == (200, True)
    assert (await service.dry(category="marketing"))["status"] == "queued"
    for _ in range(2):
        done = await service.http.post(made["url"], data={"List-Unsubscribe": "One-Click"})
        assert done.status_code == 200, done.text
        plan = await service.dry(category="marketing")
        assert (plan["status"], rules(plan)) == ("stored", [("category_channel_off", "user")])
    stored = await service.call("GET", "/v1/users/ada/preferences")
    assert (stored["categories"], stored["badge"]) == ({"marketing": {"channels": {"push": False}}}, False)
    assert (await service.http.post(made["url"][:-2])).status_code == 404
    both = {"userId": "ada", "category": "a", "type": "b"}
    await service.call("POST", "/v1/unsubscribe-links", both, 422)


async def test_what_closed_a_push_is_told(service: Service) -> None:
    """Read meanwhile; switched off meanwhile, decided again at the end of what held it; told together: each
    delivery says what closed it."""
    await service.phone()
    await service.prefer(doNotDisturbUntil=rfc3339(SystemClock().now_ms() + HOUR))
    read, closed, first, last = [
        await service.event(type=kind) for kind in ("read", "noise", "chat.message", "chat.message")
    ]
    token = (await service.call("POST", "/v1/tokens", {"userId": "ada"}, 201))["token"]
    done = await service.http.post(
        f"{service.world.url}/api/notifications/read",
        json={"notificationIds": [read["id"]]},
        headers={"Authorization": f"Bearer {token}"},
    )
    assert done.status_code == 200, done.text
    await service.prefer(types={"noise": {"channels": {"push": False}}})
    await service.world.db.execute("update deliveries set due_at = now() where state = 'planned'")

    async def ended() -> Any:
        ends = [(await service.explain(one))["deliveries"][0] for one in (read, closed, first)]
        return ends if all(one["state"] == "cancelled" for one in ends) else None

    by_read, by_rule, by_merge = await eventually(ended, 20.0, what="the end of do-not-disturb")
    assert by_read["closedBy"] == {
        "rule": "read", "source": "user", "about": None, "words": "The user read it meanwhile.",
    }  # fmt: skip
    assert by_rule["closedBy"] == {
        "rule": "type_channel_off", "source": "user", "about": "noise",
        "words": "When that was due it was decided again: The user's preferences switch push off for the "
        "type noise.",
    }  # fmt: skip
    assert (by_merge["closedBy"]["rule"], by_merge["closedBy"]["about"]) == ("merged", last["id"])
    for told, one in ((read, by_read), (closed, by_rule), (first, by_merge)):
        assert one["closedBy"]["words"] in (await service.explain(told))["words"]


async def test_where_its_text_and_its_time_come_from(service: Service) -> None:
    """The variant of a template, and scheduleAt, in words and as data; of others nothing is said."""
    content = {"default": {"title": "Hi"}}
    text = {"variants": [{"name": name, "weight": 50, "content": content} for name in ("plain", "other")]}
    await service.call("PUT", "/v1/templates/hi", text)
    event = {"userId": "ada", "type": "t", "template": "hi"}
    why = await service.explain(await service.call("POST", "/v1/events", event, 202))
    variant = why["template"]["variant"]
    assert variant in ("plain", "other")
    assert why["template"] == {"template": "hi", "version": 1, "variant": variant}
    assert why["words"].startswith(f"It has the variant {variant} of the template hi, version 1.")
    at = rfc3339(SystemClock().now_ms() + 5000)
    told = await service.event(scheduleAt=at)

    async def sent() -> bool:
        feed = await service.call("GET", "/v1/users/ada/notifications")
        return told["id"] in [one["id"] for one in feed["notifications"]]

    await eventually(sent, 20.0, what="what was scheduled")
    later = await service.explain(told)
    assert later["words"].startswith("It was sent on ")
    assert at in later["words"]  # as the time, or beside it if this machine was slow
    assert (later["scheduledAt"], later["template"]) == (at, None)
    plain = await service.explain(await service.event())
    assert (plain["scheduledAt"], plain["template"]) == (None, None)
