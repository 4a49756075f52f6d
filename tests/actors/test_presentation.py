"""How a notification presents itself, from the stored preferences to what leaves the system."""

from __future__ import annotations

from tests.actors.push_world import world
from tests.actors.shard_kit import make_event
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
