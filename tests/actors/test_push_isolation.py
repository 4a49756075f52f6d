"""In-app delivery beside a push provider that hangs: shard, router, pool, links and PostgreSQL are real."""

from __future__ import annotations

import asyncio

from actors.link import dial
from actors.push_pool import PushPool
from actors.router import Router
from carillon.ids import slot_of
from carillon.messages import DevicePut, Publish
from carillon.testing.provider_server import Behaviour, Script
from tests.actors.fakes import SECRET, actor_config
from tests.actors.shard_kit import HandGateway, Kit, make_event
from tests.push_kit import fcm
from tests.support import eventually


async def test_an_fcm_that_never_answers_does_not_slow_in_app_delivery(postgres_dsn: str) -> None:
    """While 300 pushes hang 300 events for a live user arrive, and nothing piles up at FCM."""
    slow = {"max_senders": 1, "timeout_s": 120.0}
    async with fcm(timeout_s=120.0) as (server, channel), Kit(postgres_dsn, push=slow) as kit:
        server.script(Script(shares=[Behaviour(fault="silent", share=1.0)]))
        config = actor_config(
            "pool", "pool-1", kit.coordinator, settings=kit.settings, labels={"provider": "fcm"}
        )
        pool = PushPool(config, make=lambda *_: channel)
        router = Router(actor_config("router", "router-2", kit.coordinator))
        await pool.start()
        await router.start()
        address = kit.coordinator.joined["router-2"].address
        link = await dial(address, HandGateway(), kit.settings.link, "ingress-1", SECRET)
        try:
            for n in range(300):
                user = f"away{n}"
                put = DevicePut(
                    "t", user, slot_of("t", user), "phone", "android", "fcm", "token", f"k{n}", ""
                )
                await kit.router.link.request(put)
            await kit.gateway.attach_ready(1)
            await _round(kit, link, 300)
            kit.router.link.close()  # the jobs go through the real router
            away = [link.request(Publish([make_event(f"away{n}")])) for n in range(300)]
            await asyncio.gather(*away)
            await eventually(lambda: server.requests >= 10, what="FCM was asked")
            await _round(kit, link, 600)
            states = await kit.db.fetch("select distinct state from deliveries")
            assert [row[0] for row in states] == ["sending"], "FCM has answered: this proves nothing"
            assert server.requests <= 2 * kit.settings.push.concurrency_min, "the rest waits here"
            assert kit.gateway.seqs(1) == list(range(1, 601))
        finally:
            link.close()
            await router.stop()
            await pool.stop()


async def _round(kit: Kit, link: object, up_to: int) -> None:
    """300 events for the live user, one after the other, until its socket has all so far."""
    for _ in range(300):
        await link.request(Publish([make_event()]))  # type: ignore[attr-defined]
    await eventually(lambda: len(kit.gateway.seqs(1)) >= up_to)
