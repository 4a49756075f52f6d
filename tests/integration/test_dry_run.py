"""The dry run against the real outcome: what it says of an event is what the event gets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from carillon.clock import SystemClock, rfc3339
from tests.integration.client_world import ClientWorld
from tests.integration.test_explain import HOUR, Service, rules
from tests.support import eventually

DRY = "/v1/events?dryRun=true"


@pytest.fixture
async def service(postgres_dsn: str) -> AsyncIterator[Service]:
    async with (
        ClientWorld(postgres_dsn, ingress={"dry_run_sample": 3}) as world,
        httpx.AsyncClient(timeout=15) as http,
    ):
        yield Service(world, http)


def soon(ms: int = HOUR) -> str:
    return rfc3339(SystemClock().now_ms() + ms)


async def rows(service: Service) -> list[int]:
    """How much is stored of events, schedules and broadcasts."""
    names = ("notifications", "deliveries", "schedules", "broadcasts", "idempotency_keys")
    return [await service.world.db.fetchval(f"select count(*) from {name}") for name in names]


async def test_what_is_sent_later_says_when_and_what_then(service: Service) -> None:
    """The dry run answers as the event would be, says when it is sent and what is planned for then; the
    event that is sent then gets that, and its explanation has the same rules."""
    await service.phone()
    await service.prefer(categories={"news": {"channels": {"push": False}}})
    at = soon(5000)
    plan = await service.dry(category="news", scheduleAt=at)
    assert (plan["status"], plan["channels"], plan["sendAt"]) == ("deferred", [], at)
    assert plan["words"].startswith(
        f"It would be deferred. It is kept and sent at {at} (scheduleAt). Preferences, policy, template, "
        "devices and presence count as they are then. As things are now: It would be stored."
    )
    assert await rows(service) == [0, 0, 0, 0, 0]
    told = await service.event(category="news", scheduleAt=at)
    assert (told["status"], told["channels"]) == (plan["status"], plan["channels"])

    async def sent() -> bool:
        feed = await service.call("GET", "/v1/users/ada/notifications")
        return [one["id"] for one in feed["notifications"]] == [told["id"]]

    await eventually(sent, 20.0, what="what was scheduled")
    why = await service.explain(told)
    assert rules(why) == rules(plan["then"]) == [("category_channel_off", "user")]
    assert why["channels"] == plan["then"]["channels"] == ["in_app"]
    assert rules(await service.dry(scheduleAt=soon(-HOUR))) == [("offline", "system")]  # that is now


async def test_what_cannot_be_scheduled_is_refused_alike(service: Service) -> None:
    """Too far ahead: the same problem, alone and in a batch."""
    far = {"scheduleAt": soon(3 * 366 * 24 * HOUR)}
    for path in ("/v1/events", DRY):
        alone = await service.call("POST", path, service.body("ada", **far), 422)
        assert (alone["code"], alone["detail"][:11]) == ("invalid", "scheduleAt:")
        several = [service.body("ada", **far), service.body("bob", type=5)]
        status = 200 if path == DRY else 202
        both = (await service.call("POST", path, several, status))["results"]
        assert [one["error"]["code"] for one in both] == ["invalid", "invalid"]


async def test_a_policy_of_then_counts_then(service: Service) -> None:
    """Quiet hours that are over by then hold nothing then; grace that is over by then is no grace."""
    await service.phone()
    await service.prefer(doNotDisturbUntil=soon())
    assert (await service.dry())["reason"] == "do_not_disturb"
    later = await service.dry(scheduleAt=soon(2 * HOUR))
    assert rules(later["then"]) == [("offline", "system")]
    assert (later["then"]["status"], later["then"]["pushDueAt"]) == ("queued", None)


async def test_what_had_expired_is_stored_and_shown_to_nobody(service: Service) -> None:
    """Dry run and answer are the same; no push is sent; the explanation says why, as the dry run did."""
    await service.phone()
    past = soon(-HOUR)
    plan = await service.dry(expiresAt=past)
    assert (plan["status"], plan["pushDueAt"], rules(plan)) == ("stored", None, [("expired", "event")])
    assert plan["words"] == (
        f"It would be stored. It had expired at {past}, when it came: it is stored, nobody sees it, and "
        "nothing is sent."
    )
    told = await service.event(expiresAt=past)
    assert (told["status"], told["channels"]) == (plan["status"], plan["channels"])

    async def over() -> Any:
        why = await service.explain(told)
        return why if why["deliveries"][0]["state"] == "dead" else None

    why = await eventually(over, what="the end of its push")
    assert (rules(why), why["expiresAt"]) == (rules(plan), past)
    assert why["deliveries"][0]["reason"] == "expired"
    assert (await service.call("GET", "/v1/users/ada/notifications"))["notifications"] == []


async def test_what_expires_before_its_push_is_due_says_so(service: Service) -> None:
    """Held until after it expires: dry run and explanation name it; else they tell its end alone."""
    await service.phone()
    await service.prefer(doNotDisturbUntil=soon(2 * HOUR))
    ends = soon()
    plan = await service.dry(expiresAt=ends)
    assert rules(plan) == [("do_not_disturb", "user"), ("expires_first", "event")]
    assert f"It expires at {ends}, before push is due: what waits until then is dropped." in plan["words"]
    assert rules(await service.explain(await service.event(expiresAt=ends))) == rules(plan)
    far = {"expiresAt": soon(9 * HOUR)}
    plan = await service.dry(**far)
    assert rules(plan) == [("do_not_disturb", "user"), ("expires", "event")]
    assert rules(await service.explain(await service.event(**far))) == rules(plan)
    then = (await service.dry(scheduleAt=soon(3 * HOUR), expiresAt=ends))["then"]
    assert (then["status"], rules(then)) == ("stored", [("expired", "event")])


async def test_a_known_key_is_answered_as_it_would_be(service: Service) -> None:
    """The same body: the notification that is there. Another one: the conflict. Both as the real answers,
    for what is sent now and for what is sent later, alone and among others."""
    await service.phone()
    for more in ({}, {"scheduleAt": soon()}):
        key = {"idempotencyKey": f"k{len(more)}"} | more
        assert "replayed" not in await service.dry(**key)
        told = await service.event(**key)
        before = await rows(service)
        answer = await service.http.post(
            f"{service.world.url}{DRY}",
            json=service.body("ada", **key),
            headers={"Authorization": f"Bearer {service.world.key}"},
        )
        assert (answer.status_code, answer.headers["idempotent-replayed"]) == (200, "true")
        plan = answer.json()
        again = await service.event(**key)
        assert (plan["status"], plan["channels"]) == (again["status"], again["channels"])
        assert (
            plan["replayed"] == {"id": told["id"], "seq": told["seq"]} == {k: again[k] for k in ("id", "seq")}
        )
        assert plan["words"] == (
            f"The idempotency key stands for {told['id']}: the answer is that one's, and nothing is sent "
            "again."
        )
        assert rules(plan) == [("replayed", "event")]
        other = service.body("ada", title="other", **key)
        real, dry = [await service.call("POST", path, other, 422) for path in ("/v1/events", DRY)]
        assert dry["code"] == real["code"] == "idempotency_conflict"
        assert dry["detail"] == real["detail"]
        batch = (await service.call("POST", DRY, [other, service.body("ada", **key)]))["results"]
        assert batch[0]["error"]["code"] == "idempotency_conflict"
        assert batch[1]["replayed"]["id"] == told["id"]
        assert await rows(service) == before


async def test_a_dry_run_makes_no_user(service: Service) -> None:
    """Alone, for many and for later: no stream is made, and the first real event gets the plan."""
    count = "select count(*) from streams"
    plans = [await service.dry(user, title="1") for user in ("new", "newer")]
    await service.dry("newest", scheduleAt=soon())
    await service.call("POST", DRY, {"userIds": ["a", "b", "new"], "type": "t", "title": "2"})
    assert await service.world.db.fetchval(count) == 0
    for user, plan in zip(("new", "newer"), plans, strict=True):
        told = await service.event(user, title="1")
        assert (
            (told["status"], told["channels"]) == (plan["status"], plan["channels"]) == ("stored", ["in_app"])
        )
        assert rules(await service.explain(told)) == rules(plan) == [("no_target", "system")]
        assert rules(await service.dry(user, title="1")) == rules(plan)  # of a user who is known now
    assert await service.world.db.fetchval(count) == 2


async def test_devices_of_a_type_are_named(service: Service) -> None:
    """Dry run and explanation say which devices a type is not for; one that is for none of them says so."""
    types = {"offer": {"devices": ["ios"]}, "tv": {"devices": ["web"]}}
    await service.call("PUT", "/v1/policy", {"types": types})
    for name, platform in (("pad", "android"), ("phone", "ios")):
        device = {"platform": platform, "provider": "fcm", "token": name}
        await service.call("PUT", f"/v1/users/ada/devices/{name}", device)

    async def known() -> bool:  # policies are read every so often
        return "devices" in await service.dry(type="offer")

    await eventually(known, 20.0, what="the policy at the shard")
    plan = await service.dry(type="offer")
    assert plan["devices"] == {
        "platforms": ["ios"], "reached": ["phone"], "leftOut": [{"deviceId": "pad", "platform": "android"}],
    }  # fmt: skip
    assert "These devices are left out because of their platform: pad (android)." in plan["words"]
    nobody = await service.dry(type="tv")
    assert [name for name, _ in rules(nobody)] == ["offline", "type_devices", "left_out", "no_device"]
    assert "would go at once" not in nobody["words"]
    assert "devices" not in await service.dry(type="other")

    told = await service.event(type="tv")

    async def over() -> Any:
        why = await service.explain(told)
        return why if why["deliveries"][0]["state"] == "cancelled" else None

    why = await eventually(over, what="the end of a push for nobody")
    assert why["deliveries"][0]["reason"] == "no push target; left out: pad (android), phone (ios)"
    closed = why["deliveries"][0]["closedBy"]
    assert (closed["rule"], closed["about"]) == ("no_device", "pad (android), phone (ios)")
    assert rules(why)[-1] == ("left_out", "tenant")
    assert why["rules"][-1]["about"] == "pad (android), phone (ios)"

    await service.prefer(doNotDisturbUntil=soon())
    held = await service.explain(await service.event(type="offer"))
    assert [name for name, _ in rules(held)] == ["do_not_disturb", "type_devices", "left_out"]


async def test_a_topic_is_counted_and_looked_at(service: Service) -> None:
    """So many subscribers, and what some of them would get; what is refused is refused alike; nothing is
    kept."""
    event = {"topic": "goals", "type": "goal", "title": "1:0"}
    nobody = await service.call("POST", DRY, event)
    assert nobody["words"] == "It would go to 0 subscribers of the topic goals."
    users = ["ada", "bob"]
    await service.call("POST", "/v1/topics/goals/subscribers", {"userIds": users})
    await service.phone("ada")
    plan = await service.call("POST", DRY, event)
    assert (plan["subscribers"], plan["exact"], plan["lookedAt"]) == (2, True, 2)
    assert plan["statuses"] == {"queued": 1, "stored": 1}
    assert plan["channels"] == {"in_app": 2, "push": 1}
    assert {(rule["rule"], rule["users"]) for rule in plan["rules"]} == {("offline", 1), ("no_target", 1)}
    assert plan["words"].startswith(
        "It would go to 2 subscribers of the topic goals. All of them were looked at:"
    )
    for more in ("cy", "dan", "eve"):
        await service.call("PUT", f"/v1/topics/goals/subscribers/{more}", status=200)
    plan = await service.call("POST", DRY, event)
    assert (plan["subscribers"], plan["lookedAt"], plan["failed"]) == (5, 3, 0)
    at = soon()
    later = await service.call("POST", DRY, event | {"scheduleAt": at})
    assert (later["sendAt"], sum(later["statuses"].values())) == (at, 3)
    assert f"It would begin at {at}." in later["words"]
    wrong = await service.call("POST", DRY, event | {"title": 5}, 422)
    assert wrong["errors"][0]["path"] == "title"
    assert await rows(service) == [0, 0, 0, 0, 0]
    keyed = event | {"idempotencyKey": "g"}
    made = await service.call("POST", "/v1/events", keyed, 202)
    known = await service.call("POST", DRY, keyed)
    assert known["replayed"] == {"broadcastId": made["broadcastId"]}
    conflict = await service.call("POST", DRY, keyed | {"title": "2:0"}, 422)
    assert conflict["code"] == "idempotency_conflict"

    async def done() -> Any:
        told = await service.call("GET", f"/v1/broadcasts/{made['broadcastId']}")
        return told["counts"] if told["state"] == "done" else None

    counts = await eventually(done, 20.0, what="the broadcast")
    assert (counts["stored"], counts["queued"]) == (5, 1)
