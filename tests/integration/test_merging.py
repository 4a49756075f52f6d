"""Merging over the whole path: HTTP, sockets, feed, search, sync, explanations; examples of the how-to."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect

from tests.integration.client_world import ClientWorld
from tests.integration.test_explain import Service
from tests.support import eventually

POST = {"type": "post.like", "targetType": "post", "targetId": "42"}


class Merging(Service):
    """A service whose users get likes and messages, and one of these users."""

    async def like(self, name: str, user: str = "ada", **more: Any) -> Any:
        told = POST | {
            "title": f"{name} liked your post",
            "actorId": name.lower(),
            "data": {"actorName": name},
        }
        return await self.event(user, **(told | {"aggregate": True} | more))

    async def token(self, user: str = "ada") -> dict[str, str]:
        answer = await self.call("POST", "/v1/tokens", {"userId": user}, 201)
        return {"Authorization": f"Bearer {answer['token']}"}

    async def mine(self, method: str, path: str, body: Any = None) -> Any:
        """Called by the user's own device."""
        answer = await self.http.request(
            method, f"{self.world.url}{path}", json=body, headers=await self.token()
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def notification(self, told: Any) -> Any:
        return await self.call("GET", f"/v1/notifications/{told['id']}")


@pytest.fixture
async def service(postgres_dsn: str) -> Any:
    async with (
        ClientWorld(postgres_dsn, shard={"policy_refresh_s": 0.1}) as world,
        httpx.AsyncClient(timeout=10) as http,
    ):
        yield Merging(world, http)


def show(what: str, told: Any) -> None:
    """For whoever renews the examples of docs/how-to/merge-notifications.md: SHOW=1 pytest -s."""
    if os.environ.get("SHOW"):
        print(f"\n## {what}\n{json.dumps(told, ensure_ascii=False)}")


async def test_likes_are_gathered_and_explained(service: Merging) -> None:
    """One notification for the likes of a post: the answers, the feed, the events in it and the reasons."""
    first = await service.like("John")
    show("first", first)
    await service.event(title="something else", type="other")
    second, third = await service.like("Jane"), await service.like("Jim")
    show("second", second)
    assert (second["status"], second["id"], second["seq"]) == ("merged", first["id"], first["seq"])
    assert third["reason"] == "aggregate"
    dry = await service.dry(**(POST | {"title": "Joe liked your post", "actorId": "joe", "aggregate": True}))
    show("dry run", dry)
    assert (dry["status"], dry["merge"]["into"]["id"], dry["merge"]["count"]) == ("merged", first["id"], 4)
    feed = (await service.mine("GET", "/api/notifications"))["notifications"]
    show("feed", feed[0])
    assert [one["title"] for one in feed] == ["Jim liked your post", "something else"]
    assert (feed[0]["count"], feed[0]["seq"], feed[0]["id"]) == (3, 1, first["id"])
    assert [actor["name"] for actor in feed[0]["actors"]] == ["Jim", "Jane", "John"]
    one = await service.notification(first)
    assert [e["actorId"] for e in one["merged"]["newest"]] == ["jim", "jane", "john"]
    assert [e["status"] for e in one["merged"]["newest"]] == ["merged", "merged", "opened"]
    why = await service.explain(first)
    show("explain", {name: why[name] for name in ("merged", "words")})
    assert "2 events were merged into it. Merged: events about the same target are gathered" in why["words"]
    (window,) = why["merged"]["windows"]
    assert (window["how"], window["source"], window["windowS"]) == ("aggregate", "event", 3600)
    assert (window["events"], window["count"], window["open"], window["renotifyS"]) == (3, 3, True, 300)
    assert window["words"] in why["words"]
    await service.mine("POST", "/api/notifications/read", {"notificationIds": [first["id"]]})
    read = (await service.explain(first))["merged"]["windows"][0]
    assert (read["open"], read["closedBy"], read["renotifyAt"]) == (False, "read", None)
    # Whoever changed something by version is told that it is another one now.
    assert one["version"] == 3


async def test_what_nothing_was_merged_into_says_its_window(service: Merging) -> None:
    """A lone event is explained as the first of many: its window, the rule, and until when it is open."""
    alone = await service.like("John", dedupe={"key": "like:john"})
    plain = await service.event(title="nobody asks", type="other")
    why = await service.explain(alone)
    show("alone", why["merged"])
    merged = why["merged"]
    assert (merged["count"], merged["events"], merged["duplicates"]) == (1, 0, 0)
    (opened,) = merged["newest"]
    assert (opened["id"], opened["status"], opened["how"]) == (alone["id"], "opened", "aggregate")
    assert (opened["source"], opened["actorId"], opened["notice"]) == ("event", "john", None)
    drop, window = merged["windows"]
    assert (drop["how"], drop["windowS"], drop["open"]) == ("drop", 300, True)
    assert (window["how"], window["source"], window["windowS"]) == ("aggregate", "event", 3600)
    assert (window["events"], window["count"], window["open"], window["renotifyS"]) == (1, 1, True, 300)
    assert window["words"] in why["words"]
    assert await service.notification(alone) | {"merged": merged} == await service.notification(alone)
    assert (await service.explain(plain))["merged"] is None
    # The second one makes rows of it, and nothing that is told of it changes but for what was merged.
    await service.like("John", dedupe={"key": "like:john"})
    again = (await service.explain(alone))["merged"]
    assert [e["status"] for e in again["newest"]] == ["duplicate", "opened"]
    assert again["windows"] == merged["windows"]
    await service.like("Jane")
    grown = (await service.explain(alone))["merged"]
    assert grown["newest"][1:] == again["newest"]
    assert grown["windows"][0] == drop
    assert (grown["windows"][1]["events"], grown["windows"][1]["endsAt"]) == (2, window["endsAt"])
    await service.mine("POST", "/api/notifications/read", {"notificationIds": [alone["id"]]})
    closed = (await service.explain(alone))["merged"]["windows"]
    assert [one["closedBy"] for one in closed] == [None, "read"]


async def test_each_way_of_deduplication(service: Merging) -> None:
    """drop, count in the tenant's words, replace and accumulate."""
    alert = {"type": "disk.full", "title": "Disk full on db1", "dedupe": {"key": "disk:db1", "windowS": 600}}
    first = await service.event(**alert)
    again = await service.event(**alert)
    show("drop", again)
    assert (again["status"], again["id"], again["channels"]) == ("duplicate", first["id"], [])
    why = await service.explain(first)
    show("drop explained", why["words"])
    assert "1 event was dropped because it says the same." in why["words"]
    texts = {
        "default": {
            "title": {"one": "{count} new message", "other": "{count} new messages"},
            "body": "{actor}: {body}",
        }
    }
    await service.call("PUT", "/v1/policy", {"merge": {"chat.message": {"how": "count", "texts": texts}}})

    async def merged() -> bool:
        user = os.urandom(4).hex()
        return [(await service.event(user))["status"] for _ in range(2)] == ["stored", "merged"]

    await eventually(merged, what="the tenant's new policy")
    ann = {"title": "Ann", "actorId": "Ann"}
    assert (await service.event("eve", body="hello", **ann))["status"] == "stored"
    assert (await service.event("eve", body="hello, you", **ann))["status"] == "stored"  # not alike
    for n in range(3):
        chat = {"key": "chat:7", "merge": "count"}
        told = await service.event(body=f"hello {n}", dedupe=chat, **ann)
    show("count", told)
    one = (await service.notification(told))["notification"]
    show("counted", one)
    assert (one["title"], one["body"], one["count"]) == ("3 new messages", "Ann: hello 2", 3)
    for n in range(3):
        told = await service.event(
            type="build",
            title=f"Build {n}",
            link=f"https://ci.example/{n}",
            dedupe={"key": "b", "merge": "replace"},
        )
    one = (await service.notification(told))["notification"]
    assert (one["title"], one["link"], one["count"]) == ("Build 2", "https://ci.example/2", 3)
    for n in range(3):
        mention = {"type": "mention", "title": f"Mention {n}", "data": {"line": n}}
        told = await service.event(**mention, dedupe={"key": "m", "merge": "accumulate"})
    one = (await service.notification(told))["notification"]
    show("accumulated", one["data"])
    assert [(item["title"], item["data"]) for item in one["data"]["items"]] == [
        (f"Mention {n}", {"line": n}) for n in range(3)
    ]


async def test_devices_feed_search_and_sync_show_what_it_has_become(service: Merging) -> None:
    """A socket with and without a subprotocol, `sync`, feed, count and search follow every merge."""
    auth = await service.token()
    new = connect(service.world.ws_url, additional_headers=auth, subprotocols=["carillon.v1.json"])  # type: ignore[list-item]
    old = connect(service.world.ws_url, additional_headers=auth)
    async with new as modern, old as legacy:
        for socket in (modern, legacy):
            assert json.loads(await socket.recv())["type"] == "WELCOME"
            await socket.send('{"type":"PING"}')
            assert json.loads(await socket.recv())["type"] == "PONG"
        first = await service.like("John")
        place = await service.mine("GET", "/api/sync?since=0")
        for _ in range(2):
            assert (await service.mine("GET", "/api/notifications"))["notifications"][0]["count"] == 1
        await service.like("Jane", body="a body that is new")
        for socket, kind in ((modern, "NOTIFICATION_UPDATED"), (legacy, "NEW_NOTIFICATION")):
            fresh = json.loads(await asyncio.wait_for(socket.recv(), 10))
            frame = json.loads(await asyncio.wait_for(socket.recv(), 10))
            assert (fresh["type"], frame["type"]) == ("NEW_NOTIFICATION", kind)
            show(f"frame {kind}", frame)
            assert (frame["notification"]["id"], frame["notification"]["count"]) == (first["id"], 2)
            assert frame["notification"]["aggregationKey"] == "post.like:post:42"
            assert frame["silent"] is True
    for _ in range(2):
        assert (await service.mine("GET", "/api/notifications"))["notifications"][0]["count"] == 2
    assert await service.mine("GET", "/api/notifications/unread-count") == {"count": 1, "rev": 2}
    found = (await service.mine("GET", "/api/notifications?q=jane"))["notifications"]
    assert [one["id"] for one in found] == [first["id"]]
    assert (await service.mine("GET", "/api/notifications?q=john"))["notifications"] == []
    where = f"/api/sync?epoch={place['epoch']}&since={place['lastSeq']}&rev={place['rev']}"
    told = await service.mine("GET", where)
    assert (told["notifications"], told["unreadCount"]) == ([], 1)
    assert [change["type"] for change in told["changes"]] == ["NOTIFICATION_UPDATED"]
    assert told["changes"][0]["notification"]["count"] == 2
    await service.mine("POST", "/api/notifications/read", {"notificationIds": [first["id"]]})
    again = await service.like("Jane")
    assert again["id"] != first["id"]


async def test_what_was_edited_cancelled_or_retracted(service: Merging) -> None:
    """A merge goes on with what was edited; what was cancelled or retracted takes in nothing more."""
    first = await service.like("John")
    edited = await service.call("PATCH", f"/v1/notifications/{first['id']}", {"title": "edited"})
    assert edited["version"] == 2
    merged = await service.like("Jane")
    assert merged["id"] == first["id"]
    one = await service.notification(first)
    assert (one["version"], one["notification"]["title"]) == (3, "Jane liked your post")
    for act in ("cancel", "retract"):
        await service.call("POST", f"/v1/notifications/{first['id']}/{act}")
        anew = await service.like("Jim")
        assert anew["id"] != first["id"]
        first = anew


async def test_a_thousand_likes_by_a_thousand_people(service: Merging) -> None:
    """One notification that counts them all and names ten, and the pushes that `merge.renotify_s` allows: the
    one of the first like, and one when the user may be disturbed again."""
    await service.phone()
    for begin in range(0, 1000, 200):
        batch = [
            service.body("ada", **POST, title=f"user {n} liked", actorId=f"user {n}", aggregate=True)
            for n in range(begin, begin + 200)
        ]
        told = await service.call("POST", "/v1/events", batch, 202)
        assert {one["status"] for one in told["results"][1:]} == {"merged"}
    (note,) = (await service.mine("GET", "/api/notifications"))["notifications"]
    assert (note["count"], len(note["actors"]), note["title"]) == (1000, 10, "user 999 liked")
    assert [actor["id"] for actor in note["actors"]] == [f"user {n}" for n in range(999, 989, -1)]
    why = await service.explain(note)
    assert why["merged"]["windows"][0]["words"].count("it counts 1000 different actors") == 1
    pushes = await service.world.db.fetch("select due_at from deliveries order by due_at")
    assert 1 <= len(pushes) <= 2
