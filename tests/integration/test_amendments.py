"""Notifications that their service edits, retracts or cancels: everything real but the coordinator."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect

from carillon.clock import rfc3339
from carillon.errors import RemoteError
from carillon.ids import slot_of, uuid_text
from carillon.messages import Amend, Amended, DevicePut, PushOutcome, PushResult
from stores.postgres.pool import open_pool
from stores.postgres.tenants import TenantStore
from tests.actors.shard_kit import Kit, make_event
from tests.integration.transports_world import TENANT, Transports
from tests.support import eventually


async def service(world: Transports, method: str, path: str, key: str = "", **more: Any) -> httpx.Response:
    """A request of a service."""
    headers = {"Authorization": f"Bearer {key or world.key}"} | more.pop("headers", {})
    return await world.http.request(method, path, headers=headers, **more)


async def edit(world: Transports, ident: str, **members: Any) -> httpx.Response:
    return await service(world, "PATCH", f"/v1/notifications/{ident}", json=members)


async def frame(socket: Any) -> dict[str, Any]:
    return json.loads(await asyncio.wait_for(socket.recv(), 60.0))


async def feed(world: Transports, **query: Any) -> list[dict[str, Any]]:
    fields = "&".join(f"{name}={value}" for name, value in query.items())
    return (await world.call("GET", f"/api/notifications?{fields}")).json()["notifications"]


async def counted(world: Transports) -> int:
    return (await world.call("GET", "/api/notifications/unread-count")).json()["count"]


async def test_an_edit_is_seen_everywhere(postgres_dsn: str) -> None:
    """Sockets, stream, old clients, feed, search, sync and GET show the new text; nothing is unread anew."""
    async with Transports(postgres_dsn) as world:
        sent = await world.send("Flight 12 leaves at 9", body="gate A", link="https://example.com/12")
        assert [one["title"] for one in await feed(world)] == ["Flight 12 leaves at 9"]
        socket, stream = await world.socket(), await world.stream()
        assert (await stream.frame())["type"] == "WELCOME"
        async with connect(world.gateway_actor.url, additional_headers=world.auth(), proxy=None) as old:
            assert (await frame(old))["type"] == "WELCOME"
            await old.send('{"type":"PING"}')
            assert (await frame(old))["type"] == "PONG"
            answer = await edit(
                world, sent["id"], title="Flight 12 leaves at 11", body=None, data={"late": 2}
            )
            assert answer.status_code == 200, answer.text
            assert answer.headers["etag"] == '"2"'
            told = answer.json()
            assert told["version"] == 2
            shown = told["notification"]
            assert (shown["title"], shown["body"], shown["data"]) == (
                "Flight 12 leaves at 11", None, {"late": 2},
            )  # fmt: skip
            assert shown["link"] == "https://example.com/12", "what is not named stays"
            assert "updatedAt" in shown
            for kind, got in (
                ("NOTIFICATION_UPDATED", await frame(socket)),
                ("NOTIFICATION_UPDATED", await stream.frame()),
                ("NEW_NOTIFICATION", await frame(old)),
            ):
                assert got == {"type": kind, "notification": shown}
        assert await feed(world) == [shown]
        assert await feed(world, q="11") == [shown]
        assert await feed(world, q="gate") == []
        assert await counted(world) == 1
        paper = (await world.call("GET", "/api/sync?since=1&rev=1")).json()
        assert paper["changes"] == [{"type": "NOTIFICATION_UPDATED", "notification": shown}]
        full = (await service(world, "GET", f"/v1/notifications/{sent['id']}")).json()
        assert full["version"] == 2
        (change,) = full["changes"]
        assert change["act"] == "edit"
        assert change["version"] == 2
        assert change["by"] == f"key:{world.key.split('_')[1]}"
        assert change["former"] == {
            "title": "Flight 12 leaves at 9", "body": "gate A", "link": "https://example.com/12",
        }  # fmt: skip
        why = (await service(world, "GET", f"/v1/notifications/{sent['id']}/explain")).json()
        assert why["changes"] == full["changes"]
        assert why["words"].endswith(
            f"The API key {world.key.split('_')[1]} edited it at {change['at']}: version 2."
        )


@pytest.mark.parametrize("window", [50, 0])
async def test_who_was_away_hears_of_edit_and_retraction(postgres_dsn: str, window: int) -> None:
    """Resumed from the recent window or the store: the new text; of what was retracted nothing but that."""
    async with Transports(postgres_dsn, shard={"recent_window": window}) as world:
        here = await world.socket()
        first, second = await world.send("first"), await world.send("secret")
        await edit(world, first["id"], title="first, edited")
        await service(world, "POST", f"/v1/notifications/{second['id']}/retract")
        kinds = [(await frame(here))["type"] for _ in range(4)]
        assert kinds == [
            "NEW_NOTIFICATION", "NEW_NOTIFICATION", "NOTIFICATION_UPDATED", "NOTIFICATION_RETRACTED",
        ]  # fmt: skip
        epoch = (await world.call("GET", "/api/sync?since=0")).json()["epoch"]
        late = await world.stream(epoch=epoch, lastSeq=0, lastRev=0)
        got = [await late.frame()]
        while got[-1]["type"] != "NOTIFICATION_RETRACTED":
            got.append(await late.frame())
        assert "secret" not in json.dumps(got)
        titles = [one["notification"]["title"] for one in got if "notification" in one]
        assert titles[-1] == "first, edited"


async def test_a_retraction_leaves_nothing(postgres_dsn: str) -> None:
    """Gone from sockets, feed, search, sync and count; told twice it says the same; GET knows who did it."""
    async with Transports(postgres_dsn) as world:
        kept, gone = await world.send("kept"), await world.send("wrong recipient")
        await feed(world)
        await counted(world)
        socket = await world.socket()
        answer = await service(world, "POST", f"/v1/notifications/{gone['id']}/retract")
        assert answer.status_code == 200, answer.text
        assert await frame(socket) == {
            "type": "NOTIFICATION_RETRACTED", "notificationId": gone["id"], "rev": 3,
        }  # fmt: skip
        again = await service(world, "POST", f"/v1/notifications/{gone['id']}/retract", json={})
        assert again.json() == answer.json()
        assert [one["id"] for one in await feed(world)] == [kept["id"]]
        assert await feed(world, q="wrong") == []
        assert await feed(world, status="archived") == []
        assert await counted(world) == 1
        paper = (await world.call("GET", "/api/sync?since=0&rev=0")).json()
        assert [one["id"] for one in paper["notifications"]] == [kept["id"]]
        paper = (await world.call("GET", "/api/sync?since=2&rev=2")).json()
        assert paper["changes"] == [
            {"type": "NOTIFICATION_RETRACTED", "notificationId": gone["id"], "rev": 3}
        ]
        assert (await edit(world, gone["id"], title="x")).json()["code"] == "retracted"
        assert (await edit(world, gone["id"], title="x")).status_code == 409
        full = (await service(world, "GET", f"/v1/notifications/{gone['id']}")).json()
        assert full["deliveryState"] == "RETRACTED"
        assert full["retractedAt"] == answer.json()["retractedAt"]
        assert [one["act"] for one in full["changes"]] == ["retract"]
        for op in ("archive", "dismiss"):
            assert (await world.call("POST", f"/api/notifications/{gone['id']}/{op}")).status_code == 200
        assert await counted(world) == 1
        assert await world.db.fetchval("select rev from streams") == 3, "nothing changes it any more"


async def test_what_an_edit_may_not(postgres_dsn: str) -> None:
    """Unknown ids and other tenants' are 404, a lacking scope 403, rules 422, another version 412."""
    async with Transports(postgres_dsn) as world:
        pool = await open_pool(world.settings.postgres, 1)
        tenants = TenantStore(pool)
        await tenants.create_tenant("other")
        other = await tenants.create_key("other", "all", ["admin"])
        reader = await tenants.create_key(TENANT, "reader", ["users:read"])
        await pool.close()
        ident = (await world.send("hello"))["id"]
        calls = [("PATCH", ""), ("POST", "/retract"), ("POST", "/cancel")]
        for method, op in calls:
            for path in (ident, str(uuid.uuid4()), "nonsense"):
                key = other if path == ident else ""
                answer = await service(world, method, f"/v1/notifications/{path}{op}", key, json={})
                assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
            answer = await service(world, method, f"/v1/notifications/{ident}{op}", reader, json={})
            assert answer.status_code == 403
            answer = await service(world, method, f"/v1/notifications/{ident}{op}", json={"x": 1})
            assert (answer.status_code, answer.json()["errors"][0]["path"]) == (422, "x")
        for wrong in (
            {"title": None}, {"title": ""}, {"title": "x" * 256}, {"body": "x" * 4097}, {"type": "other"},
            {"priority": "urgent"}, {"data": []}, {"actions": [{"id": "a", "more": 1}]}, {"link": "a\x00b"},
            {"expiresAt": "tomorrow"}, {"version": 0}, {"version": "1"}, {"data": {"n": 2**53}},
        ):  # fmt: skip
            answer = await edit(world, ident, **wrong)
            assert answer.status_code == 422, wrong
            assert answer.json()["code"] == "invalid"
        answer = await edit(world, ident, data={"a": "x" * 40_000})
        assert answer.status_code == 422
        assert (await edit(world, ident, title="a", version=2)).status_code == 412
        assert await world.db.fetchval("select count(*) from amendments") == 0
        assert (await edit(world, ident, title="a", version=1)).json()["version"] == 2
        match = {"If-Match": '"1"'}
        late = await service(world, "PATCH", f"/v1/notifications/{ident}", json={"title": "b"}, headers=match)
        assert (late.status_code, late.json()["code"]) == (412, "version_conflict")
        made = await service(world, "PATCH", f"/v1/notifications/{ident}", json={"title": "a"}, headers=match)
        assert (made.status_code, made.json()["version"]) == (200, 2), "a try whose answer was lost"
        odd = await service(
            world, "PATCH", f"/v1/notifications/{ident}", json={}, headers={"If-Match": "abc"}
        )
        assert odd.status_code == 422
        same = await service(
            world, "PATCH", f"/v1/notifications/{ident}", json={"title": "a"}, headers={"If-Match": '"2"'}
        )
        assert same.json()["version"] == 2, "nothing changed"
        assert (await edit(world, ident)).json()["version"] == 2
        got = await service(world, "GET", f"/v1/notifications/{ident}")
        assert got.headers["etag"] == '"2"'
        assert await world.db.fetchval("select rev from streams") == 2


async def test_what_was_to_be_sent_later_is_cancelled_by_its_id(postgres_dsn: str) -> None:
    """The id that scheduleAt was answered with: its schedule ends; told twice: the same; unknown: 404."""
    async with Transports(postgres_dsn) as world:
        tomorrow = rfc3339(world.clock.now_ms() + 86_400_000)
        later = await world.send("later", scheduleAt=tomorrow)
        path = f"/v1/notifications/{later['id']}/cancel"
        answer = await service(world, "POST", path)
        assert answer.status_code == 200, answer.text
        assert answer.json()["stopped"] == 1
        assert (await service(world, "POST", path)).json() == answer.json()
        kept = (await service(world, "GET", f"/v1/schedules/{later['id']}")).json()
        assert kept["state"] == "cancelled"
        sent = await world.send("later", scheduleAt="2020-01-01T00:00:00Z")
        assert (await service(world, "POST", f"/v1/notifications/{sent['id']}/cancel")).status_code == 200
        for op in ("retract", "cancel"):
            unknown = f"/v1/notifications/{uuid.uuid4()}/{op}"
            assert (await service(world, "POST", unknown)).status_code == 404


# -- one shard, by hand -----------------------------------------------------------------------------------


def device(name: str, provider: str = "fcm") -> DevicePut:
    return DevicePut("t", "u", slot_of("t", "u"), name, "android", provider, "token", f"{name} of u", "app")


async def amend(kit: Kit, op: str, raw: bytes, patch: dict[str, Any] | None = None, **more: Any) -> Amended:
    act = more.pop("act", None) or os.urandom(16)
    message = Amend(
        "t", "u", slot_of("t", "u"), op, raw, act, "key:k", json.dumps(patch or {}), more.pop("version", None)
    )
    return await kit.router.link.request(message)


async def tell(kit: Kit, job: Any, outcome: str = "sent") -> None:
    """What the provider made of a job."""
    results = [PushResult(target.device, outcome, error="UNAVAILABLE") for target in job.targets]
    await kit.router.link.request(
        PushOutcome(
            job.delivery, job.attempt, job.tenant, job.user, job.slot, job.notification, job.provider, results
        )
    )


async def jobs(kit: Kit, count: int) -> list[Any]:
    await eventually(lambda: len(kit.router.jobs) >= count, what=f"{count} jobs")
    return kit.router.jobs


async def states(kit: Kit) -> list[tuple[str, str, str | None]]:
    rows = await kit.db.fetch("select channel, state, reason from deliveries order by id")
    return [tuple(row) for row in rows]


async def test_a_retraction_takes_back_what_phones_show(postgres_dsn: str) -> None:
    """Sent: a withdrawal to that phone. On its way: withdrawn once it turns out to be sent. Once each."""
    async with Kit(postgres_dsn) as kit:
        await kit.router.link.request(device("phone"))
        shown, moving = make_event(title="shown"), make_event(title="moving")
        await kit.publish(shown)
        await tell(kit, (await jobs(kit, 1))[0])
        await kit.publish(moving)
        await jobs(kit, 2)
        await amend(kit, "retract", shown.id)
        await amend(kit, "retract", shown.id)
        withdrawal = (await jobs(kit, 3))[2]
        assert (withdrawal.withdraw, withdrawal.notification) == (True, shown.id)
        assert withdrawal.collapse_key == uuid_text(shown.id)
        assert [t.device for t in withdrawal.targets] == ["phone"]
        await tell(kit, withdrawal)
        await amend(kit, "retract", moving.id)
        await tell(kit, kit.router.jobs[1])
        last = (await jobs(kit, 4))[3]
        assert (last.withdraw, last.notification) == (True, moving.id)
        await tell(kit, last)
        assert [row[:2] for row in await states(kit)] == [
            ("push", "sent"), ("push", "sent"), ("withdraw", "sent"), ("withdraw", "sent"),
        ]  # fmt: skip


@pytest.mark.parametrize("ended", ["sent", "dead", "cancelled"])
async def test_a_retraction_takes_back_what_one_of_two_devices_shows(postgres_dsn: str, ended: str) -> None:
    """The other did not get it, the push was given up or stopped: the one that (perhaps) has it is told."""
    async with Kit(postgres_dsn, push={"backoff_s": 60.0, "max_attempts": 2}) as kit:
        await kit.router.link.request(device("phone"))
        await kit.router.link.request(device("tablet"))
        event = make_event()
        await kit.publish(event)
        (job,) = await jobs(kit, 1)
        got = {"phone": "unknown" if ended == "dead" else "sent", "tablet": "failed"}
        results = [PushResult(t.device, got[t.device], error="UNAVAILABLE") for t in job.targets]
        fields = job.tenant, job.user, job.slot, job.notification, job.provider, results
        await kit.router.link.request(PushOutcome(job.delivery, job.attempt, *fields))
        if ended == "cancelled":
            await amend(kit, "cancel", event.id)
        else:
            kit.skip(61)
            again = (await jobs(kit, 2))[1]
            left = ["phone", "tablet"] if ended == "dead" else ["tablet"]
            assert sorted(target.device for target in again.targets) == left
            await tell(kit, again, "failed")
        tries = len(kit.router.jobs)
        assert [row[:2] for row in await states(kit)] == [("push", ended)]
        await amend(kit, "retract", event.id)
        withdrawal = (await jobs(kit, tries + 1))[tries]
        assert (withdrawal.withdraw, withdrawal.notification) == (True, event.id)
        assert [target.device for target in withdrawal.targets] == ["phone"]
        await tell(kit, withdrawal)
        assert [row[:2] for row in await states(kit)] == [("push", ended), ("withdraw", "sent")]


@pytest.mark.parametrize("op", ["retract", "cancel"])
async def test_what_waits_is_stopped(postgres_dsn: str, op: str) -> None:
    """A push that waits for an acknowledgement, one that failed and one on its way: none is sent (again)."""
    async with Kit(postgres_dsn, ack_window_s=60.0, push={"backoff_s": 60.0}) as kit:
        await kit.router.link.request(device("phone"))
        failed, moving, waits = (make_event(title=title) for title in ("failed", "moving", "waits"))
        for event in (failed, moving):
            await kit.publish(event)
        first, second = (await jobs(kit, 2))[:2]
        await tell(kit, first, "failed")
        await kit.gateway.attach_ready(1)
        await kit.publish(waits)
        for event in (failed, moving, waits):
            answer = await amend(kit, op, event.id)
            assert (answer.cancelled_ms is not None) == (op == "cancel")
            assert (answer.retracted_ms is not None) == (op == "retract")
            assert await amend(kit, op, event.id) == answer, "told twice"
            assert answer.stopped == (op == "cancel" and event is not moving)
        await tell(kit, second, "failed")
        reason = {"retract": "retracted", "cancel": "cancelled"}[op]
        assert [row for row in await states(kit) if row[0] == "push"] == [
            ("push", "cancelled", reason),
            ("push", "cancelled", "UNAVAILABLE"),
            ("push", "cancelled", reason),
        ]  # fmt: skip
        assert len(kit.router.jobs) == 2
        expected = ["WELCOME", "NEW_NOTIFICATION"] + ["NOTIFICATION_RETRACTED"] * 3 * (op == "retract")
        await kit.gateway.seen(1, len(expected))
        assert [f["type"] for f in kit.gateway.frames[1]] == expected


async def test_a_push_that_is_about_to_leave_stays(postgres_dsn: str) -> None:
    """Retracted between the commit of its event and the look-up of where to push: no job is made."""
    async with Kit(postgres_dsn) as kit:
        await kit.router.link.request(device("phone"))
        held, load = asyncio.Event(), kit.shard._store.load_targets

        async def slowly(keys: Any) -> Any:
            await held.wait()
            return await load(keys)

        kit.shard._store.load_targets = slowly  # type: ignore[method-assign]
        event = make_event()
        await kit.publish(event)
        await amend(kit, "retract", event.id)
        held.set()

        async def ended() -> bool:
            return [row[:2] for row in await states(kit)] == [("push", "cancelled")]

        await eventually(ended, what="the end of its row")
        assert kit.router.jobs == []


async def test_a_cancelled_notification_falls_back_no_more(postgres_dsn: str) -> None:
    """Its push on the way fails for good: the chain ends there, and a replay of dead letters skips it."""
    async with Kit(postgres_dsn) as kit:
        await kit.router.link.request(device("phone"))
        await kit.router.link.request(device("pad", "apns"))
        event = make_event(channels=["fcm"], fallback=["apns"])
        await kit.publish(event)
        (job,) = await jobs(kit, 1)
        await amend(kit, "cancel", event.id)
        await tell(kit, job, "dead")
        assert [row[:2] for row in await states(kit)] == [("fcm", "cancelled")]


async def test_an_edit_replaces_what_phones_show(postgres_dsn: str) -> None:
    """Shown: replaced, same collapse id, no sound. On its way: once it arrived. Waiting: the new text."""
    async with Kit(postgres_dsn, ack_window_s=60.0, hold_s=0.0) as kit:
        await kit.router.link.request(device("phone"))
        shown, moving, waits = (make_event(title=title) for title in ("shown", "moving", "waits"))
        await kit.publish(shown)
        await tell(kit, (await jobs(kit, 1))[0])
        await kit.publish(moving)
        await jobs(kit, 2)
        await amend(kit, "edit", shown.id, {"title": "shown, edited"})
        new = (await jobs(kit, 3))[2]
        assert (new.title, new.collapse_key, new.sound, new.withdraw) == (
            "shown, edited", uuid_text(shown.id), "", False,
        )  # fmt: skip
        assert [t.device for t in new.targets] == ["phone"]
        await tell(kit, new)
        await amend(kit, "edit", moving.id, {"title": "moving, edited"})
        assert len(kit.router.jobs) == 3
        await tell(kit, kit.router.jobs[1])
        new = (await jobs(kit, 4))[3]
        assert (new.title, new.sound) == ("moving, edited", "")
        await tell(kit, new)
        await kit.gateway.attach_ready(1)
        await kit.publish(waits)
        await amend(kit, "edit", waits.id, {"title": "waits, edited"})
        await kit.db.execute("update deliveries set due_at = now() where state = 'planned'")
        push = (await jobs(kit, 5))[4]
        assert (push.title, push.sound) == ("waits, edited", "default")
        await tell(kit, push)
        await amend(kit, "edit", waits.id, {"data": {"unseen": "by pushes"}})
        assert sorted(row[0] for row in await states(kit)) == ["push"] * 3 + ["replace"] * 2
        await amend(kit, "retract", shown.id)
        back = (await jobs(kit, 6))[5]
        assert (back.withdraw, back.notification) == (True, shown.id)


async def test_an_edit_of_what_the_user_is_through_with_pushes_nothing(postgres_dsn: str) -> None:
    """Read, it was taken back from the phone: an edit does not bring it there again."""
    async with Kit(postgres_dsn) as kit:
        await kit.router.link.request(device("phone"))
        event = make_event()
        await kit.publish(event)
        await tell(kit, (await jobs(kit, 1))[0])
        await kit.db.execute("update notifications set read_at = now()")
        answer = await amend(kit, "edit", event.id, {"title": "other"})
        assert answer.version == 2
        assert [row[0] for row in await states(kit)] == ["push"]


async def test_an_act_told_again_is_done_once(postgres_dsn: str) -> None:
    """A try whose answer was lost: no second version, whatever came in between, also at another shard."""
    async with Kit(postgres_dsn, edit_history=2) as kit:
        event = make_event()
        await kit.publish(event)
        act = os.urandom(16)
        assert (await amend(kit, "edit", event.id, {"title": "b"}, act=act, version=1)).version == 2
        assert (await amend(kit, "edit", event.id, {"title": "b"}, act=act, version=1)).version == 2
        assert (await amend(kit, "edit", event.id, {"title": "c"})).version == 3
        assert (await amend(kit, "edit", event.id, {"title": "b"}, act=act, version=1)).version == 3
        content = await kit.db.fetchval("select content from notifications")
        assert '"title":"c"' in content
        for title in "defg":
            await amend(kit, "edit", event.id, {"title": title})
        versions = await kit.db.fetchval("select array_agg(version order by version) from amendments")
        assert versions == [6, 7], "so many are kept"
        with pytest.raises(RemoteError) as refused:
            await amend(kit, "edit", event.id, {"title": "x"}, version=1)
        assert refused.value.code == "version_conflict"
        with pytest.raises(RemoteError) as unknown:
            await amend(kit, "retract", os.urandom(16))
        assert unknown.value.code == "not_found"
        with pytest.raises(RemoteError):
            await amend(kit, "read", event.id)


async def test_edits_of_many_at_once_are_all_made(postgres_dsn: str) -> None:
    """Several of one user and of one notification in a burst: each is a version, in order."""
    async with Kit(postgres_dsn) as kit:
        one, other = make_event(), make_event()
        await kit.publish(one, other)
        await kit.gateway.attach_ready(1)
        burst = [
            amend(kit, "edit", raw, {"title": f"v{n}"}) for n in range(2, 7) for raw in (one.id, other.id)
        ]
        answers = await asyncio.gather(*burst)
        assert [a.version for a in answers] == [n for n in range(2, 7) for _ in (1, 2)]
        frames = (await kit.gateway.seen(1, 11))[1:]
        assert [f["notification"]["rev"] for f in frames] == list(range(3, 13))
        assert frames[-1]["notification"]["title"] == "v6"
