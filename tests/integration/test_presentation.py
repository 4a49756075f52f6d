"""How notifications are to be shown in the app: over HTTP in, over a real WebSocket and a real stream out."""

from __future__ import annotations

import json
from typing import Any

from websockets.asyncio.client import ClientConnection

from tests.integration.transports_world import Transports

PREFERENCES = "/api/notifications/preferences"


async def received(socket: ClientConnection, kind: str) -> dict[str, Any]:
    """The next frame of that type."""
    while (frame := json.loads(await socket.recv()))["type"] != kind:
        pass
    return frame


async def test_preferences_reach_every_connection(postgres_dsn: str) -> None:
    """Those that are open when they change, those that come later, and streams; ids go on as ever."""
    async with Transports(postgres_dsn) as world:
        socket = await world.socket(deviceId="laptop")
        stream = await world.stream(deviceId="tablet")
        assert (await stream.frame())["type"] == "WELCOME"
        await world.send("one")
        assert (await stream.frame())["notification"]["seq"] == 1
        document = {"vibration": False, "channels": {"in_app": {"durationMs": 8000, "autoDismiss": False}}}
        assert (await world.call("PUT", PREFERENCES, json=document)).status_code == 200
        expected = {"type": "PRESENTATION", "sound": True, "vibration": False}
        expected |= {"durationMs": 8000, "autoDismiss": False}
        assert await received(socket, "PRESENTATION") == expected
        event = await stream.event()
        assert event is not None
        assert event.frame == expected
        assert (event.id or "").endswith(":1:1")
        await stream.close()
        await world.send("two")
        again = await world.stream(headers={"Last-Event-ID": event.id or ""}, deviceId="tablet")
        frames = await again.frames(3)
        assert [frame["type"] for frame in frames] == ["WELCOME", "PRESENTATION", "NEW_NOTIFICATION"]
        assert frames[1] == expected
        await world.lose_shard()
        assert await received(socket, "PRESENTATION") == expected, "told anew by the shard that took over"
