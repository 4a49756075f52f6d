"""A shard on real Postgres, a router, the pools of both providers, local FCM and APNs on HTTP/2."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from actors.push_pool import PushPool
from actors.router import Router
from carillon.ids import slot_of
from carillon.messages import DevicePut
from carillon.testing.apns_server import ApnsServer
from carillon.testing.fcm_server import FcmServer
from carillon.testing.provider_credentials import write_demo_credentials
from tests.actors.fakes import actor_config
from tests.actors.shard_kit import Kit
from tests.push_kit import folder
from tests.support import eventually

FCM_TOKEN = "fcm-token"
APNS_TOKEN = "ab" * 32


class World(Kit):
    """A shard, a router and the pools of both providers."""

    fcm: FcmServer
    apns: ApnsServer

    async def devices(self, *names: str) -> None:
        """Register the user's phone (fcm) and tablet (apns)."""
        phone = ("phone", "android", "fcm", "token", FCM_TOKEN)
        tablet = ("tablet", "ios", "apns", "token", APNS_TOKEN)
        for device in (phone, tablet):
            if device[2] in names:
                await self.router.link.request(DevicePut("t", "u", slot_of("t", "u"), *device))

    async def rows(self) -> list[tuple[str, str, str | None]]:
        """(channel, state, reason) of the one notification's deliveries, in the order they were made."""
        rows = await self.db.fetch("select channel, state, reason from deliveries order by created_at, step")
        return [tuple(row) for row in rows]

    async def settled(self, count: int) -> list[tuple[str, str, str | None]]:
        """The rows once there are so many and nothing is left to do."""

        async def done() -> bool:
            rows = await self.rows()
            return len(rows) == count and all(row[1] in ("sent", "dead", "cancelled") for row in rows)

        await eventually(done, what=f"{count} settled rows")
        return await self.rows()


@contextlib.asynccontextmanager
async def world(dsn: str, push: dict[str, Any] | None = None, **shard: Any) -> AsyncIterator[World]:
    """Everything started; the pools talk to local providers."""
    fcm, apns = FcmServer(folder() / "fcm"), ApnsServer(folder() / "apns")
    values: dict[str, Any] = dict(
        write_demo_credentials(folder() / "settings", await fcm.start(), await apns.start())
    )
    given = values | {"timeout_s": 3.0, "max_senders": 1, "backoff_s": 0.01, "max_attempts": 2} | (push or {})
    kit = World(dsn, push=given, **shard)
    kit.fcm, kit.apns = fcm, apns
    async with kit:
        kit.coordinator.forget("router-1")  # jobs go to the real one
        router = Router(actor_config("router", "router-2", kit.coordinator, settings=kit.settings))
        actors: list[Any] = [router]
        for provider in ("fcm", "apns"):
            config = actor_config(
                "pool", f"{provider}-1", kit.coordinator, settings=kit.settings, labels={"provider": provider}
            )
            actors.append(PushPool(config))
        for actor in actors:
            await actor.start()

        async def linked() -> bool:
            pools = (await actors[0].status())["pools"].values()
            return len(pools) == 2 and all(pool["open"] for pool in pools)

        await eventually(linked)
        try:
            yield kit
        finally:
            for actor in reversed(actors):
                await actor.stop()
            await fcm.close()
            await apns.close()
