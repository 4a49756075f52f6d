"""What has expired is nowhere: not in feeds, counts, replays, pushes; those who are connected are told.

Most tests let the wall clocks of all actors jump, so that nothing depends on how fast this machine is.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from carillon.attention import DEFERRED
from carillon.clock import SystemClock, rfc3339
from carillon.messages import ClientChange, ClientReady
from tests.actors.shard_kit import Kit, clock, make_event
from tests.integration.test_amendments import amend, counted, device, edit, feed, frame, jobs, states, tell
from tests.integration.transports_world import Transports
from tests.support import eventually

HOUR_MS = 3_600_000


class Time:
    """The wall clock of everything in this process."""

    def __init__(self) -> None:
        self.ahead_ms = 0

    def jump(self, kit: Kit, ms: int = HOUR_MS) -> None:
        """So much later; a timer of the event loop would have told the shard."""
        self.ahead_ms += ms
        kit.shard._expiry._tick()


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    moved, now_ms = Time(), SystemClock.now_ms
    monkeypatch.setattr(SystemClock, "now_ms", lambda self: now_ms(self) + moved.ahead_ms)
    return moved


def soon(ms: int = HOUR_MS) -> int:
    """When the next jump is over."""
    return clock.now_ms() + ms


async def test_a_timer_tells_when_it_is_time(postgres_dsn: str) -> None:
    """Real time: half a second after it was sent it has left the count, and nobody asked."""
    async with Kit(postgres_dsn) as kit:
        await kit.gateway.attach_ready(1)
        await kit.publish(make_event(expires_ms=soon(500)))

        def over() -> bool:  # on a machine too busy to deliver it in time, it is not delivered
            return [f["type"] for f in kit.gateway.frames[1]] in (
                ["WELCOME", "NEW_NOTIFICATION", "UNREAD_COUNT"], ["WELCOME"],
            ) and clock.now_ms() > at_ms  # fmt: skip

        at_ms = soon(600)
        await eventually(over, what="the new count")


async def count_told(socket: Any) -> dict[str, Any]:
    while True:
        got = await frame(socket)
        if got["type"] == "UNREAD_COUNT":
            return got


async def test_whoever_is_there_is_told_the_new_count(postgres_dsn: str, time: Time) -> None:
    """Something unread expires: every device gets UNREAD_COUNT at that moment, with the rev there was."""
    async with Transports(postgres_dsn) as world:
        await world.send("stays")
        socket, stream = await world.socket(), await world.stream()
        assert (await stream.frame())["type"] == "WELCOME"  # attached: it misses nothing of what follows
        await world.send("goes", expiresAt=rfc3339(soon()))
        await world.send("goes, too, but was read", expiresAt=rfc3339(soon()))
        third = (await feed(world))[0]
        await world.call("POST", "/api/notifications/read", json={"notificationIds": [third["id"]]})
        time.jump(world)
        assert await count_told(socket) == {"type": "UNREAD_COUNT", "count": 1, "rev": 4}
        kinds = [(await stream.frame())["type"] for _ in range(4)]
        assert kinds == [
            "NEW_NOTIFICATION", "NEW_NOTIFICATION", "NOTIFICATIONS_READ", "UNREAD_COUNT",
        ]  # fmt: skip
        assert await counted(world) == 1
        assert [one["title"] for one in await feed(world)] == ["stays"]
        assert await feed(world, q="goes") == []


@pytest.mark.parametrize("window", [50, 0])
async def test_a_resume_after_its_time_brings_nothing(postgres_dsn: str, window: int, time: Time) -> None:
    """Neither the recent window nor the store shows it again, new or edited, nor does sync; who had it before
    the edit is told to let it go; WELCOME's count is right, also for a user nobody was connected of."""
    shard = {"recent_window": window, "grace_s": 0.05}
    async with Transports(postgres_dsn, shard=shard) as world:
        kept = await world.socket()
        gone = await world.send("secret", expiresAt=rfc3339(soon()))
        await edit(world, gone["id"], body="more of it")
        await world.send("stays")
        epoch = (await world.call("GET", "/api/sync?since=0")).json()["epoch"]
        time.jump(world)
        assert (await count_told(kept))["count"] == 1
        for position in (
            {"epoch": epoch, "lastSeq": 0, "lastRev": 0},
            {"epoch": epoch, "lastSeq": 1, "lastRev": 1},
        ):
            late = await world.stream(**position)
            got = [await late.frame()]
            while got[-1].get("notification", {}).get("title") != "stays":
                got.append(await late.frame())
            told = {"type": "NOTIFICATION_RETRACTED", "notificationId": gone["id"], "rev": 2}
            while position["lastSeq"] and told not in got:  # it has the one before the edit
                got.append(await late.frame())
            assert got[0]["unreadCount"] == 1
            assert "secret" not in json.dumps(got)
            await late.close()
        paper = (await world.call("GET", "/api/sync?since=1&rev=1")).json()
        assert paper["changes"] == [
            {"type": "NOTIFICATION_RETRACTED", "notificationId": gone["id"], "rev": 2}
        ], "whoever has it is told to let it go"
        assert paper["unreadCount"] == 1


async def test_who_comes_later_is_welcomed_with_the_right_count(postgres_dsn: str, time: Time) -> None:
    """Nobody was connected when it expired and the shard knows the user: counted again before WELCOME."""
    async with Kit(postgres_dsn) as kit:
        await kit.publish(make_event(expires_ms=soon()), make_event())
        time.jump(kit)
        kit.gateway.attach(1)
        kit.gateway.attach(2)
        for conn in (1, 2):
            assert (await kit.gateway.seen(conn, 1))[0]["unreadCount"] == 1


async def test_what_has_expired_on_arrival_is_not_delivered(postgres_dsn: str) -> None:
    """An event whose time has passed: stored, neither shown nor counted nor pushed; the next one is."""
    async with Kit(postgres_dsn) as kit:
        await kit.router.link.request(device("phone"))
        welcome = await kit.gateway.attach_ready(1)
        assert welcome["unreadCount"] == 0
        late, fine = make_event(expires_ms=clock.now_ms() - 1000), make_event(channels=["in_app"])
        outcomes = await kit.publish(late, fine)
        assert outcomes[0].status == "stored"
        got = (await kit.gateway.seen(1, 2))[1]
        assert (got["notification"]["seq"], got["notification"]["rev"]) == (2, 2)
        await kit.gateway.attach_ready(2)
        assert kit.gateway.frames[2][0]["unreadCount"] == 1
        await kit.db.execute("update deliveries set due_at = now() where state = 'planned'")

        async def dead() -> bool:
            return await states(kit) == [("push", "dead", "expired")]

        await eventually(dead, what="the row's end")
        assert kit.router.jobs == []


async def test_reading_what_has_expired_leaves_the_count(postgres_dsn: str, time: Time) -> None:
    """A device still shows it and marks it as read: the others are told the count, which did not change."""
    async with Kit(postgres_dsn) as kit:
        await kit.gateway.attach_ready(1)
        gone, stays = make_event(expires_ms=soon()), make_event()
        await kit.publish(gone, stays)
        time.jump(kit)
        frames = await kit.gateway.seen(1, 4)
        assert frames[3] == {"type": "UNREAD_COUNT", "count": 1, "rev": 2}
        kit.gateway.link.send_nowait(ClientChange(1, "read", [gone.id]))
        read, count = (await kit.gateway.seen(1, 6))[4:]
        assert read["type"] == "NOTIFICATIONS_READ"
        assert count == {"type": "UNREAD_COUNT", "count": 1, "rev": 3}
        other, again = make_event(expires_ms=soon()), make_event()
        await kit.publish(other, again)
        time.jump(kit)
        await eventually(lambda: kit.gateway.frames[1][-1].get("count") == 2, what="the second expiry")
        await amend(kit, "retract", other.id)
        back, count = (await kit.gateway.seen(1, 11))[9:]
        assert back["type"] == "NOTIFICATION_RETRACTED"
        assert count == {"type": "UNREAD_COUNT", "count": 2, "rev": 6}


async def test_an_edit_moves_the_end(postgres_dsn: str, time: Time) -> None:
    """Later: it stays. Now: it is gone from devices, feed and count. Then nothing edits it any more."""
    async with Transports(postgres_dsn) as world:
        socket = await world.socket()
        one = await world.send("one", expiresAt=rfc3339(soon()))
        assert (await edit(world, one["id"], expiresAt=rfc3339(soon(3 * HOUR_MS)))).status_code == 200
        other = await world.send("other", expiresAt=rfc3339(soon()))
        time.jump(world)
        assert (await count_told(socket))["count"] == 1
        assert [n["title"] for n in await feed(world)] == ["one"]
        answer = await edit(world, one["id"], expiresAt="2020-01-01T00:00:00Z")
        assert answer.status_code == 200
        assert await frame(socket) == {
            "type": "NOTIFICATION_RETRACTED", "notificationId": one["id"], "rev": 4,
        }  # fmt: skip
        assert await feed(world) == []
        assert await counted(world) == 0
        for ident in (one["id"], other["id"]):
            refused = await edit(world, ident, title="x")
            assert (refused.status_code, refused.json()["code"]) == (409, "expired")


async def test_a_connection_that_waits_is_told_when_it_is_live(postgres_dsn: str, time: Time) -> None:
    """WELCOME told a count that is old before the first frame: UNREAD_COUNT follows with it."""
    async with Kit(postgres_dsn, resume_wait_s=30.0) as kit:
        await kit.publish(make_event(expires_ms=soon()))
        kit.gateway.attach(1)
        assert (await kit.gateway.seen(1, 1))[0]["unreadCount"] == 1
        await kit.gateway.attach_ready(2)
        time.jump(kit)
        assert (await kit.gateway.seen(2, 2))[1]["count"] == 0
        kit.gateway.link.send_nowait(ClientReady(1))
        assert (await kit.gateway.seen(1, 2))[1] == {"type": "UNREAD_COUNT", "count": 0, "rev": 1}


async def test_held_pushes_leave_out_what_has_expired(postgres_dsn: str) -> None:
    """Three were held for one moment, one of them has expired: the push speaks for two."""
    async with Kit(postgres_dsn, max_kept_pushes=0) as kit:
        await kit.router.link.request(device("phone"))
        await kit.gateway.attach_ready(1)
        events = [make_event(title=f"n{n}") for n in range(3)]
        await kit.publish(*events)
        await kit.db.execute("update notifications set expires_at = now() where seq = 2")
        await kit.db.execute("update deliveries set gate = $1, hold_until = now(), due_at = now()", DEFERRED)
        (job,) = await jobs(kit, 1)
        assert (job.title, job.body) == ("2 new notifications", "n2")
        await tell(kit, job)

        async def ended() -> Any:
            found = sorted((await states(kit)), key=lambda row: row[1])
            return found if [row[1] for row in found] == ["cancelled", "dead", "sent"] else None

        assert (await eventually(ended, what="the rows' ends"))[1][2] == "expired"
        assert len(kit.router.jobs) == 1


async def test_a_count_that_fails_is_made_again(postgres_dsn: str, time: Time) -> None:
    """PostgreSQL does not answer when something expires: the count is told when it does again."""
    async with Kit(postgres_dsn) as kit:
        await kit.gateway.attach_ready(1)
        tried = asyncio.Event()
        count = kit.shard._store.expired

        async def broken(*args: Any) -> Any:
            tried.set()
            kit.shard._store.expired = count  # type: ignore[method-assign]
            raise ConnectionResetError("simulated")

        kit.shard._store.expired = broken  # type: ignore[method-assign]
        await kit.publish(make_event(expires_ms=soon()))
        time.jump(kit)
        await asyncio.wait_for(tried.wait(), 60.0)
        assert (await kit.gateway.seen(1, 3))[2] == {"type": "UNREAD_COUNT", "count": 0, "rev": 1}
