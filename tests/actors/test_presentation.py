"""How a notification presents itself, from the stored preferences to what leaves the system."""

from __future__ import annotations

from typing import Any

import pytest

from actors import shard_presentation
from carillon.ids import slot_of
from carillon.messages import ClientResume, Unsubscribe
from tests.actors.push_world import world
from tests.actors.shard_kit import Kit, make_event
from tests.actors.test_preferences import prefer, rules
from tests.support import eventually


async def test_pushes_are_as_still_as_their_user_wants(postgres_dsn: str) -> None:
    """The tenant's default, until the user says something else: read where FCM and APNs received it."""
    async with world(postgres_dsn) as kit:
        await rules(kit, defaults={"vibration": False})
        await kit.devices("fcm", "apns")

        async def pushed(number: int) -> tuple[dict[str, object], dict[str, object]]:
            await kit.publish(make_event())
            await eventually(lambda: len(kit.fcm.pushes) == len(kit.apns.pushes) == number)
            android = kit.fcm.pushes[-1].payload["android"]["notification"]
            shown = {name: android[name] for name in android if name.startswith(("vib", "def", "channel"))}
            return shown, {name: kit.apns.pushes[-1].payload.get(name) for name in ("vibration",)}

        still = {"default_vibrate_timings": False, "vibrate_timings": ["0s", "0s"]}
        by_default = still | {"channel_id": "carillon_no_vibration"}
        assert await pushed(1) == (by_default, {"vibration": False})
        await prefer(kit, channels={"push": {"vibration": True}})
        assert await pushed(2) == ({"default_vibrate_timings": True}, {"vibration": None})
        await prefer(kit, sound=False)
        nothing = still | {"channel_id": "carillon_no_sound_no_vibration"}
        assert await pushed(3) == (nothing, {"vibration": False})


PLAIN: dict[str, Any] = {
    "type": "PRESENTATION", "sound": True, "vibration": True, "durationMs": None, "autoDismiss": None,
}  # fmt: skip


async def test_connections_are_told_once_and_at_each_change(postgres_dsn: str) -> None:
    """Nothing while nobody says anything; behind the WELCOME else; to all when it changes, and only then."""
    async with Kit(postgres_dsn) as kit:
        await kit.gateway.attach_ready(1)
        await prefer(kit, channels={"push": {"sound": False}}, digest="daily")  # says nothing of the app
        await prefer(kit, channels={"in_app": {"durationMs": 3000, "autoDismiss": False}}, sound="bell")
        short = PLAIN | {"sound": "bell", "durationMs": 3000, "autoDismiss": False}
        assert (await kit.gateway.seen(1, 2))[1] == short
        await kit.gateway.attach_ready(2)
        assert (await kit.gateway.seen(2, 2))[1] == short
        await kit.publish(make_event())
        await prefer(kit, vibration=False)
        await kit.router.link.request(Unsubscribe("t", "u", slot_of("t", "u"), "type", "news", "push"))
        await prefer(kit)
        for conn in (1, 2):
            frames = await kit.gateway.seen(conn, 5)
            assert frames[2]["type"] == "NEW_NOTIFICATION"
            assert frames[2].keys() == {"type", "notification"}, "a notification carries nothing of it"
            assert frames[3:] == [PLAIN | {"vibration": False}, PLAIN]


async def test_who_is_attached_again_hears_it_again(postgres_dsn: str) -> None:
    """Its shard may have been lost between the commit of a change and the frame that tells it."""
    async with Kit(postgres_dsn) as kit:
        await prefer(kit, sound=False)
        welcome = await kit.gateway.attach_ready(1)
        position = {"epoch": welcome["epoch"], "last_seq": 0, "last_rev": 0}
        await kit.gateway.seen(1, 2)
        await prefer(kit)
        assert (await kit.gateway.seen(1, 3))[1:] == [PLAIN | {"sound": False}, PLAIN]
        kit.gateway.attach(1, reattach=True, ready=True, **position)
        assert (await kit.gateway.seen(1, 4))[3] == PLAIN, "as it is now, though that is nothing special"


async def test_it_is_told_before_what_was_missed(postgres_dsn: str) -> None:
    """Behind WELCOME, whatever brings it, and before the first notification: that makes no sound either."""
    async with Kit(postgres_dsn) as kit:
        await prefer(kit, sound=False)
        await kit.publish(make_event(), make_event())
        welcome = await kit.gateway.attach_ready(1)
        position = {"epoch": welcome["epoch"], "last_seq": 0, "last_rev": 0}
        missed = ["NEW_NOTIFICATION", "NEW_NOTIFICATION"]

        async def kinds(conn: int, count: int) -> list[str]:
            return [frame["type"] for frame in await kit.gateway.seen(conn, count)]

        kit.gateway.attach(2, **position)
        assert await kinds(2, 4) == ["WELCOME", "PRESENTATION", *missed]
        kit.gateway.attach(3)
        await kit.gateway.seen(3, 2)
        kit.gateway.link.send_nowait(ClientResume(3, welcome["epoch"], 0, 0))
        greeted = ["WELCOME", "PRESENTATION"]
        assert await kinds(3, 6) == [*greeted, *greeted, *missed]
        kit.gateway.attach(4, reattach=True, ready=True, **position)
        assert await kinds(4, 3) == ["PRESENTATION", *missed]
        kit.gateway.attach(5, reattach=True, ready=True, **position | {"epoch": "another"})
        assert (await kinds(5, 3))[:3] == ["PRESENTATION", *greeted]


async def test_who_is_attached_again_hears_that_nobody_says_anything(postgres_dsn: str) -> None:
    """What another shard told may be over: a tenant's default. Who never had one hears nothing."""
    async with Kit(postgres_dsn) as kit:
        kit.gateway.attach(1, user="v", tenant="never", reattach=True, ready=True)
        await rules(kit)  # a document that says nothing, in the place of one that did
        kit.gateway.attach(2, reattach=True, ready=True)
        await kit.publish(make_event(), make_event(tenant="never", user="v", slot=slot_of("never", "v")))
        for conn, told in ((1, []), (2, [PLAIN])):
            frames = await kit.gateway.seen(conn, 2 + len(told))
            assert [frame["type"] for frame in frames][-2:] == ["WELCOME", "NEW_NOTIFICATION"]
            assert frames[:-2] == told


async def test_many_are_told_in_portions(postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of a tenant's defaults reaches all, also where the next comes before all have heard it."""
    monkeypatch.setattr(shard_presentation, "PORTION", 2)
    async with Kit(postgres_dsn, policy_refresh_s=3600.0) as kit:
        policies, known = kit.shard._policies, []
        await policies.ensure(["t"])
        for duration_ms in (3000, 2000, 1000):
            await rules(kit, defaults={"channels": {"in_app": {"durationMs": duration_ms}}})
            await policies.read_again("t")
            known.append(policies.of("t"))
        for conn in range(9):
            await kit.gateway.attach_ready(conn, user=f"u{conn}")
            assert (await kit.gateway.seen(conn, 2))[1] == PLAIN | {"durationMs": 1000}
        for after in known[1::-1]:  # 2000, and 3000 in the same turn of the loop
            policies._known["t"] = after
            kit.shard._presentations._follow("t")
        for conn in range(9):
            assert (await kit.gateway.seen(conn, 3))[2:] == [PLAIN | {"durationMs": 3000}]
        await eventually(lambda: not kit.shard._presentations._walks)


async def test_a_poll_is_not_woken_by_it(postgres_dsn: str) -> None:
    """It has nothing to answer with; the next frame it gets is a notification."""
    async with Kit(postgres_dsn) as kit:
        await prefer(kit, sound=False)
        await kit.gateway.attach_ready(1, poll=True)
        await prefer(kit, sound=True)
        await kit.publish(make_event())
        frames = await kit.gateway.seen(1, 2)
        assert [frame["type"] for frame in frames] == ["WELCOME", "NEW_NOTIFICATION"]


async def test_a_tenants_defaults_reach_who_is_connected(postgres_dsn: str) -> None:
    """Those who said something themselves hear nothing, nor anybody while it is the same for them."""
    async with Kit(postgres_dsn, policy_refresh_s=0.05) as kit:
        await rules(kit, defaults={"channels": {"in_app": {"durationMs": 1000}}})
        await prefer(kit, "own", channels={"in_app": {"durationMs": 9000}})
        await kit.gateway.attach_ready(1)
        await kit.gateway.attach_ready(2, user="own")
        assert (await kit.gateway.seen(1, 2))[1]["durationMs"] == 1000
        assert (await kit.gateway.seen(2, 2))[1]["durationMs"] == 9000
        await rules(kit, defaults={"channels": {"in_app": {"durationMs": 2000}}})
        assert (await kit.gateway.seen(1, 3))[2] == PLAIN | {"durationMs": 2000}
        await rules(kit)
        assert (await kit.gateway.seen(1, 4))[3] == PLAIN
        await rules(kit, defaults={"channels": {"in_app": {"autoDismiss": False}}})
        for conn, count in ((1, 5), (2, 3)):
            frames = await kit.gateway.seen(conn, count)
            assert [f["type"] for f in frames[1:]] == ["PRESENTATION"] * (count - 1)
            assert frames[-1]["autoDismiss"] is False
