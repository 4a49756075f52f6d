"""Pushes of notifications that take in events, on a real shard, when something comes between."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import asyncpg
import pytest

from carillon.clock import rfc3339
from carillon.ids import slot_of
from carillon.messages import (
    ClientAck,
    ClientVisibility,
    DevicePut,
    PreferencesPut,
    PushLeft,
    PushOutcome,
    PushResult,
)
from tests.actors.shard_kit import Kit, make_event
from tests.actors.test_merging import like, phone, taken
from tests.support import eventually


async def answer(kit: Kit, job: Any, *told: tuple[str, str]) -> None:
    """What the provider says of a push: (device, outcome) of each."""
    results = [
        PushResult(device, outcome, "m", 200, started_ms=1, duration_ms=1.0) for device, outcome in told
    ]
    await kit.router.link.request(
        PushOutcome(
            job.delivery, job.attempt, "t", job.user, job.slot, job.notification, job.provider, results
        )
    )


async def states(kit: Kit) -> list[tuple[str, str]]:
    return [tuple(r) for r in await kit.db.fetch("select channel, state from deliveries order by id")]


async def test_what_is_merged_beside_an_erasure_leaves_nothing(postgres_dsn: str) -> None:
    """The event waits for the erasure, finds no stream and is not stored; it leaves no push behind."""
    async with Kit(postgres_dsn, ack_window_s=0.1, merge={"renotify_s": 0.0}, delivery_lease_s=0.5) as kit:
        await kit.router.link.request(phone())
        await kit.publish(like("a"))
        await eventually(lambda: len(kit.router.jobs) == 1)
        await taken(kit, kit.router.jobs[0])
        eraser = await asyncpg.connect(postgres_dsn)
        try:
            async with eraser.transaction():
                await eraser.execute("delete from streams")
                merged = asyncio.create_task(kit.publish(like("b")))
                waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
                await eventually(lambda: kit.db.fetchval(waits))
        finally:
            await eraser.close()
        (outcome,) = await merged
        assert outcome.status == "failed"
        assert await states(kit) == [("push", "sent")], "what was sent before: an erasure purges it"
        assert (
            await kit.db.fetchval("select count(*) from merged_events where event_id <> notification_id") == 0
        )


async def test_a_push_that_nobody_owns_stops_no_other(postgres_dsn: str) -> None:
    """One that was claimed as often as can be counted is dropped; the pushes of others go on."""
    async with Kit(postgres_dsn, ack_window_s=0.1, delivery_lease_s=0.5) as kit:
        await kit.router.link.request(phone("v"))
        await kit.db.execute(
            "insert into deliveries (notification_id, stream_id, slot, channel, state, due_at, created_at,"
            " updated_at, attempts)"
            " values (gen_random_uuid(), 0, 5, 'push', 'sending', now(), now(), now(), 32767)"
        )
        await kit.publish(make_event("v"))
        await eventually(lambda: len(kit.router.jobs) == 1)
        await eventually(lambda: kit.db.fetchval("select count(*) = 1 from deliveries"))


async def test_who_has_the_first_of_a_half_sent_push_gets_the_next(postgres_dsn: str) -> None:
    """The phone got it and the tablet did not: what is merged then goes to both, once."""
    push = {"backoff_s": 600.0}
    async with Kit(postgres_dsn, ack_window_s=0.1, merge={"renotify_s": 0.0}, push=push) as kit:
        await kit.router.link.request(phone())
        tablet = DevicePut("t", "u", slot_of("t", "u"), "tablet", "android", "fcm", "token", "tok-2", "app")
        await kit.router.link.request(tablet)
        await kit.publish(like("a"))
        await eventually(lambda: len(kit.router.jobs) == 1)
        await answer(kit, kit.router.jobs[0], ("phone", "sent"), ("tablet", "failed"))
        await kit.publish(like("b", priority=3))
        await eventually(lambda: len(kit.router.jobs) == 2)
        assert sorted(t.device for t in kit.router.jobs[1].targets) == ["phone", "tablet"]
        ended = await kit.db.fetch("select state, reason from deliveries order by id")
        assert tuple(ended[0]) == ("cancelled", "superseded")
        await answer(kit, kit.router.jobs[1], ("phone", "sent"), ("tablet", "sent"))
        assert await states(kit) == [("push", "cancelled"), ("push", "sent")]


@pytest.mark.parametrize("first", ["acknowledged", "sent", "no push"])
async def test_what_is_merged_falls_back_for_itself(postgres_dsn: str, first: str) -> None:
    """A push of an update that fails is followed by the next channel, whatever became of the first event."""
    async with Kit(postgres_dsn, ack_window_s=0.1, merge={"renotify_s": 0.0}) as kit:
        await kit.router.link.request(phone())
        token = "ab" * 32
        tablet = DevicePut("t", "u", slot_of("t", "u"), "tablet", "ios", "apns", "token", token, "app")
        await kit.router.link.request(tablet)
        more: dict[str, Any] = {"channels": ["in_app", "fcm"], "fallback": ["apns"]}
        if first == "acknowledged":
            await kit.gateway.attach_ready(1)
        await kit.publish(like("a", channels=["in_app"]) if first == "no push" else like("a", **more))
        if first == "acknowledged":
            kit.gateway.link.send_nowait(ClientAck(1, seq=1, rev=1))
            await eventually(lambda: kit.db.fetchval("select state = 'cancelled' from deliveries"))
        elif first == "sent":
            await eventually(lambda: len(kit.router.jobs) == 1)
            await taken(kit, kit.router.jobs[0])
        tried = len(kit.router.jobs)
        await kit.publish(like("b", **more))
        await eventually(lambda: len(kit.router.jobs) == tried + 1)
        await answer(kit, kit.router.jobs[tried], ("phone", "dead"))
        await eventually(lambda: len(kit.router.jobs) == tried + 2)
        assert kit.router.jobs[-1].provider == "apns"
        await answer(kit, kit.router.jobs[-1], ("tablet", "dead"))
        assert (await states(kit))[-2:] == [("fcm", "cancelled"), ("apns", "dead")]


async def test_a_later_round_that_was_sent_needs_no_fallback(postgres_dsn: str) -> None:
    """The push of the first event fails after that of an update was sent, which told all of it."""
    async with Kit(postgres_dsn, ack_window_s=0.1, merge={"renotify_s": 0.0}) as kit:
        await kit.router.link.request(phone())
        more: dict[str, Any] = {"channels": ["in_app", "fcm"], "fallback": ["apns"]}
        await kit.publish(like("a", **more))
        await eventually(lambda: len(kit.router.jobs) == 1)
        await kit.publish(like("b", **more))
        await eventually(lambda: len(kit.router.jobs) == 2)
        await taken(kit, kit.router.jobs[1])
        await answer(kit, kit.router.jobs[0], ("phone", "dead"))
        assert await states(kit) == [("fcm", "cancelled"), ("fcm", "sent")]


@pytest.mark.parametrize("has_update", [False, True])
async def test_an_acknowledgement_of_before_does_not_end_a_held_push(
    postgres_dsn: str, has_update: bool
) -> None:
    """What do-not-disturb held of an update is sent unless the user has that update in the app."""
    async with Kit(postgres_dsn, ack_window_s=0.1, merge={"renotify_s": 0.0}) as kit:
        await kit.router.link.request(phone())
        await kit.gateway.attach_ready(1)
        kit.gateway.link.send_nowait(ClientVisibility(1, "focused"))
        document = json.dumps({"doNotDisturbUntil": rfc3339(kit.clock.now_ms() + 3_600_000)})
        await kit.router.link.request(PreferencesPut("t", "u", slot_of("t", "u"), document))
        first = like("a")
        await kit.publish(first)
        kit.gateway.link.send_nowait(ClientAck(1, seq=1, rev=1))
        await eventually(lambda: kit.db.fetchval("select delivered_at is not null from notifications"))
        await kit.publish(like("b"))
        await kit.gateway.seen(1, 3)
        if has_update:
            kit.gateway.link.send_nowait(ClientAck(1, ids=[first.id]))
            await eventually(lambda: kit.db.fetchval("select shown_on is not null from deliveries"))
        kit.skip(3601)
        if has_update:
            await eventually(lambda: kit.db.fetchval("select state = 'cancelled' from deliveries"))
            assert kit.router.jobs == []
        else:
            await eventually(lambda: len(kit.router.jobs) == 1)


async def test_a_push_planned_for_later_than_pushes_are_given_up_is_tried(postgres_dsn: str) -> None:
    """What may disturb again in an hour is sent then, however short the patience with providers is."""
    merge, push = {"renotify_s": 3600.0, "aggregate_window_s": 86_400.0}, {"give_up_after_s": 600.0}
    async with Kit(postgres_dsn, ack_window_s=0.1, push=push, merge=merge) as kit:
        await kit.router.link.request(phone())
        await kit.publish(like("a"))
        await eventually(lambda: len(kit.router.jobs) == 1)
        await taken(kit, kit.router.jobs[0])
        await kit.publish(like("b"))
        kit.skip(3601)
        await eventually(lambda: len(kit.router.jobs) == 2)
        job = kit.router.jobs[1]
        kit.router.link.send_nowait(PushLeft(job.provider, "away", [job.delivery], [job.attempt]))
        await eventually(lambda: len(kit.router.jobs) == 3)
        kit.skip(601)
        job = kit.router.jobs[2]
        kit.router.link.send_nowait(PushLeft(job.provider, "away", [job.delivery], [job.attempt]))
        await eventually(
            lambda: kit.db.fetchval("select state = 'dead' from deliveries order by id desc limit 1")
        )
        assert len(kit.router.jobs) == 3
