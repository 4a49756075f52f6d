"""Fallback chains end to end: a shard on real Postgres, a router, two pools, local FCM and APNs on HTTP/2."""

from __future__ import annotations

from typing import Any

from carillon.ids import slot_of, uuid_text
from carillon.messages import ClientAck, Event, PreferencesPut
from tests.actors.push_world import APNS_TOKEN, FCM_TOKEN, world
from tests.actors.shard_kit import make_event
from tests.push_kit import script
from tests.support import eventually


def chained(*fallback: str, channels: list[str], **more: Any) -> Event:
    return make_event(channels=channels, fallback=list(fallback), **more)


async def test_a_dead_apns_target_falls_back_to_fcm(postgres_dsn: str) -> None:
    """APNs says 410: the target is deleted and the phone gets it through FCM, for the same notification."""
    async with world(postgres_dsn) as w:
        await w.devices("fcm", "apns")
        script(w.apns, APNS_TOKEN, error="Unregistered")
        (outcome,) = await w.publish(chained("fcm", channels=["apns"], title="ring"))
        assert (outcome.status, outcome.channels) == ("queued", ["apns"])
        reason = "invalid_target: Unregistered; falls back to fcm"
        assert await w.settled(2) == [("apns", "cancelled", reason), ("fcm", "sent", None)]
        assert [(p.target, p.notification_id) for p in w.fcm.pushes] == [
            (FCM_TOKEN, str(await w.db.fetchval("select id from notifications")))
        ]
        assert await w.db.fetchval("select array_agg(device_id) from devices") == ["phone"]


async def test_what_is_not_wanted_in_the_app_falls_back_as_well(postgres_dsn: str) -> None:
    """In-app switched off: the notification is filed away from the first; its chain goes on all the same."""
    async with world(postgres_dsn) as w:
        await w.devices("fcm", "apns")
        await w.router.link.request(
            PreferencesPut("t", "u", slot_of("t", "u"), '{"channels": {"in_app": false}}')
        )
        script(w.apns, APNS_TOKEN, error="Unregistered")
        await w.publish(chained("fcm", channels=["in_app", "apns"]))
        assert [row[:2] for row in await w.settled(2)] == [("apns", "cancelled"), ("fcm", "sent")]


async def test_a_provider_that_gives_up_falls_back(postgres_dsn: str) -> None:
    """503 until the tries are used up: then the other provider."""
    async with world(postgres_dsn) as w:
        await w.devices("fcm", "apns")
        script(w.fcm, FCM_TOKEN, error="UNAVAILABLE")
        await w.publish(chained("apns", channels=["in_app", "fcm"]))
        first, second = await w.settled(2)
        assert first == ("fcm", "cancelled", "gave up after 2 tries: UNAVAILABLE; falls back to apns")
        assert second == ("apns", "sent", None)
        assert [p.target for p in w.apns.pushes] == [APNS_TOKEN]


async def test_who_was_reached_by_an_earlier_try_needs_no_other_channel(postgres_dsn: str) -> None:
    """One of two phones took it at the first try, the other's provider is away at all: nothing follows."""
    async with world(postgres_dsn) as w:
        await w.devices("fcm", "apns")
        script(w.fcm, FCM_TOKEN, error="UNAVAILABLE")
        await w.publish(chained("fcm", channels=["in_app", "push"]))
        assert await w.settled(1) == [("push", "sent", None)]
        assert [p.target for p in w.apns.pushes] == [APNS_TOKEN]


async def test_a_chain_ends_in_a_dead_letter(postgres_dsn: str) -> None:
    """Every channel failed or reaches nobody: the last row is dead and says why."""
    async with world(postgres_dsn) as w:
        await w.devices("apns")
        script(w.apns, APNS_TOKEN, error="Unregistered")
        await w.publish(chained("fcm", channels=["apns"]))
        assert (await w.settled(2))[1] == ("fcm", "dead", "no fcm target")
        assert not w.fcm.pushes
        await w.publish(chained("push", channels=["fcm"]))
        assert (await w.settled(4))[2:] == [
            ("fcm", "cancelled", "no fcm target; falls back to push"),
            ("push", "dead", "no push target"),
        ]


async def test_an_unacknowledged_in_app_notification_falls_back_to_push(postgres_dsn: str) -> None:
    """in_app alone, then push: an acknowledgement in time stops the chain, silence starts it."""
    async with world(postgres_dsn, ack_window_s=20.0, hold_s=0.0, max_kept_pushes=0) as w:
        await w.devices("fcm")
        await w.gateway.attach_ready(1)
        kept = chained("push", channels=["in_app"], title="kept")
        lost = chained("push", channels=["in_app"], title="lost")
        outcomes = await w.publish(kept, lost)
        assert [(o.status, o.channels) for o in outcomes] == [("delivered", ["in_app", "push"])] * 2
        w.gateway.link.send_nowait(ClientAck(1, ids=[kept.id]))
        await eventually(
            lambda: w.db.fetchval("select bool_or(delivered_at is not null) from notifications"),
            what="the acknowledgement",
        )
        w.skip(21)
        assert await w.settled(2) == [("push", "cancelled", "acknowledged"), ("push", "sent", None)]
        assert [p.payload["notification"]["title"] for p in w.fcm.pushes] == ["lost"]


async def test_a_restarted_shard_goes_on_with_the_chain(postgres_dsn: str) -> None:
    """The next channel is a row in Postgres, planned in the transaction that ended the one before."""
    async with world(postgres_dsn) as w:
        await w.devices("apns")
        for link in w.links:
            link.close()
        await w.shard.stop()
        stream = await w.db.fetchval("select stream_id from streams")
        event = chained("apns", channels=["fcm"])
        # As the process before left it: stored, its first channel given up, the next one not yet claimed.
        await w.db.execute(
            "insert into notifications"
            " (id, stream_id, seq, rev, position, priority, type, content, created_at)"
            " values ($1, $2, 1, 1, 1, 1, 'test', $3, now())",
            uuid_text(event.id), stream, event.content,
        )  # fmt: skip
        await w.db.execute("update streams set seq = 1, rev = 1, unread = 1")
        await w.db.execute(
            "insert into deliveries (notification_id, stream_id, slot, channel, due_at, step, created_at,"
            " updated_at) select id, stream_id, $1, 'apns', now(), 1, now(), now() from notifications",
            event.slot,
        )
        await w.start_shard("shard-a")
        assert await w.settled(1) == [("apns", "sent", None)]
