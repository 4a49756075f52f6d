"""Attention on real Postgres and real links: when a push comes, waits, or is not needed."""

from __future__ import annotations

import itertools
import json
import uuid
from typing import Any

import pytest

from actors.push_sender import outcome_of
from carillon import attention
from carillon.attention import on_signal
from carillon.ids import slot_of, uuid_text
from carillon.kept_push import history
from carillon.messages import (
    Change,
    ClientAck,
    ClientChange,
    ClientVisibility,
    Detach,
    DevicePut,
    Event,
    PresenceQuery,
    PushResult,
)
from carillon.notification import encode_content
from channels.fcm import FcmChannel
from tests.actors.shard_kit import HandGateway, Kit, make_event
from tests.push_kit import fcm
from tests.support import eventually


def device(name: str = "phone", user: str = "u") -> DevicePut:
    token = f"{name} of {user}"
    return DevicePut("t", user, slot_of("t", user), name, "android", "fcm", "token", token, "app")


def about(target: str, **more: Any) -> Event:
    kind, _, number = target.partition(":")
    members = {"type": "test", "title": "hello", "targetType": kind, "targetId": number}
    return make_event(content=encode_content(members | {"createdAt": "2026-01-01T00:00:00.000Z"}), **more)


async def attached(
    kit: Kit, conn: int, state: str | None = None, viewing: str | None = None, **more: Any
) -> None:
    """A live device that told its visibility."""
    await kit.gateway.attach_ready(conn, **more)
    if state is not None:
        kit.gateway.link.send_nowait(ClientVisibility(conn, state, viewing))


async def row(kit: Kit, event: Event) -> tuple[Any, ...]:
    """State, gate and reason of its push, wherever that is."""
    raw = uuid.UUID(bytes=event.id)
    found = await kit.db.fetchrow(
        "select state, gate, reason from deliveries where notification_id = $1 and channel <> 'withdraw'", raw
    )
    if found is not None:
        return tuple(found)
    text = await kit.db.fetchval("select kept from notifications where id = $1", raw)
    [told] = history(text, 0, 0)
    return told["state"], json.loads(text.lstrip("-~"))[3], told["reason"]


async def acknowledged(kit: Kit, event: Event) -> None:
    """Wait until the acknowledgement is in Postgres."""
    await eventually(
        lambda: kit.db.fetchval(
            "select delivered_at is not null from notifications where id = $1", uuid.UUID(bytes=event.id)
        ),
        what="deliveredAt",
    )


async def test_urgent_goes_at_once_whatever_attention(postgres_dsn: str) -> None:
    """Focused on the item itself, and acknowledged: the urgent push is on its way all the same."""
    async with Kit(postgres_dsn) as kit:
        await kit.router.link.request(device())
        await attached(kit, 1, "focused", "thread:42")
        event = about("thread:42", priority=3)
        (outcome,) = await kit.publish(event)
        assert (outcome.status, outcome.reason) == ("delivered", None)
        await eventually(lambda: kit.router.jobs)
        assert await row(kit, event) == ("sending", "always", None)


async def test_an_item_on_screen_is_silent_and_says_so(postgres_dsn: str) -> None:
    """The device shows this very item: acknowledged it is held, and dropped when the hold ends."""
    async with Kit(postgres_dsn, ack_window_s=60.0, hold_s=60.0) as kit:
        await kit.router.link.request(device())
        await attached(kit, 1, "focused", "thread:42")
        viewed, other = about("thread:42"), about("thread:43")
        outcomes = await kit.publish(viewed, other)
        assert [o.reason for o in outcomes] == ["viewing", None]
        kit.gateway.link.send_nowait(ClientAck(1, seq=2))
        await acknowledged(kit, other)
        assert await row(kit, viewed) == ("planned", "held", "viewing")
        kit.skip(61)
        await eventually(lambda: _state(kit, viewed, "cancelled", "held"), what="the end")
        await eventually(lambda: _state(kit, other, "cancelled", "held"), what="the end")
        assert await row(kit, viewed) == ("cancelled", "held", "viewing")
        assert await row(kit, other) == ("cancelled", "held", "active")
        assert await kit.db.fetchval("select count(*) from deliveries") == 0, "never rows of the outbox"
        assert kit.router.jobs == []


async def test_looking_away_escalates_what_was_held(postgres_dsn: str) -> None:
    """Acknowledged by a visible device, unseen, then idle: the push comes at once. What was read does not."""
    async with Kit(postgres_dsn, hold_s=60.0) as kit:
        await kit.router.link.request(device())
        await attached(kit, 1, "visible")
        unread, read = make_event(), make_event()
        await kit.publish(unread, read)
        kit.gateway.link.send_nowait(ClientAck(1, seq=2))
        await acknowledged(kit, read)
        await kit.router.link.request(Change("t", "u", slot_of("t", "u"), "read", [read.id]))
        kit.gateway.link.send_nowait(ClientVisibility(1, "idle"))
        await eventually(lambda: kit.router.jobs, what="the push")
        assert [job.notification for job in kit.router.jobs] == [unread.id]
        assert (await row(kit, read))[::2] == ("cancelled", "read")


@pytest.mark.parametrize("clean", [True, False])
async def test_leaving_escalates_what_was_held_after_grace(postgres_dsn: str, clean: bool) -> None:
    """The device that acknowledged goes: the push comes when grace is over."""
    async with Kit(postgres_dsn, hold_s=60.0) as kit:
        await kit.router.link.request(device())
        await attached(kit, 1, "focused")
        event = make_event()
        await kit.publish(event)
        kit.gateway.link.send_nowait(ClientAck(1, seq=1))
        await acknowledged(kit, event)
        kit.gateway.link.send_nowait(Detach(1, clean))
        await eventually(lambda: kit.router.jobs, what="the push")


async def test_a_hidden_tab_delays_the_push_unless_seen(postgres_dsn: str) -> None:
    """All hidden: acknowledged or not the push comes after the delay; seen in time it does not."""
    async with Kit(postgres_dsn, ack_window_s=10.0, when_away_delay_s=60.0) as kit:
        await kit.router.link.request(device())
        await attached(kit, 1, "hidden")
        pushed, seen = make_event(), make_event()
        outcomes = await kit.publish(pushed, seen)
        assert [o.status for o in outcomes] == ["delivered"] * 2
        kit.gateway.link.send_nowait(ClientAck(1, seq=2))
        await acknowledged(kit, seen)
        await kit.router.link.request(Change("t", "u", slot_of("t", "u"), "seen", [seen.id]))
        assert await row(kit, pushed) == ("planned", "seen", None)
        kit.skip(30)  # beyond the window of acknowledgements
        await kit.router.link.request(device())
        assert kit.router.jobs == []
        kit.skip(31)
        await eventually(lambda: kit.router.jobs, what="the push")
        assert [job.notification for job in kit.router.jobs] == [pushed.id]


async def test_a_user_who_is_back_before_the_delay_ends_is_not_pushed(postgres_dsn: str) -> None:
    """Hidden, acknowledged, then visible when the delay ends: held, and dropped."""
    async with Kit(postgres_dsn, when_away_delay_s=60.0, hold_s=120.0) as kit:
        await kit.router.link.request(device())
        await attached(kit, 1, "hidden")
        event = make_event()
        await kit.publish(event)
        kit.gateway.link.send_nowait(ClientAck(1, seq=1))
        kit.gateway.link.send_nowait(ClientVisibility(1, "visible"))
        await acknowledged(kit, event)
        await eventually(lambda: _shown(kit, "active"), what="the visibility")
        kit.skip(61)
        await eventually(lambda: _state(kit, event, "planned", "held"), what="the hold")
        kit.skip(121)
        await eventually(lambda: _state(kit, event, "cancelled", "held"), what="the end of the hold")
        assert kit.router.jobs == []


async def _shown(kit: Kit, status: str) -> bool:
    reply = await kit.router.link.request(PresenceQuery("t", ["u"]))
    return reply.users[0].status == status


async def _state(kit: Kit, event: Event, state: str, gate: str) -> bool:
    return (await row(kit, event))[:2] == (state, gate)


async def test_a_hidden_device_does_not_acknowledge_for_one_that_is_deaf(postgres_dsn: str) -> None:
    """One device says it is visible and is silent, a hidden one acknowledges: the push follows."""
    async with Kit(postgres_dsn, ack_window_s=0.3) as kit:
        await kit.router.link.request(device())
        await attached(kit, 1, "visible")
        await attached(kit, 2, "hidden")
        await kit.publish(make_event())
        kit.gateway.link.send_nowait(ClientAck(2, seq=1))
        await eventually(lambda: kit.router.jobs, what="the push")


@pytest.mark.parametrize(("policy", "pushed"), [("in_app", False), ("both", True)])
async def test_a_tenant_decides_what_happens_while_away(postgres_dsn: str, policy: str, pushed: bool) -> None:
    """in_app: the hidden device's acknowledgement suffices; both: the push goes beside it. Per type too."""
    async with Kit(postgres_dsn, ack_window_s=60.0, policy_refresh_s=0.05) as kit:
        await kit.db.execute(
            "insert into tenants (tenant, client_secret, settings) values ('t', repeat('s', 32), $1)",
            json.dumps({"policy": {"types": {"test": {"whenAway": policy}}}}),
        )
        await kit.router.link.request(device())
        await attached(kit, 1, "hidden")
        event = make_event()
        await kit.publish(event)
        kit.gateway.link.send_nowait(ClientAck(1, seq=1))
        if pushed:
            await eventually(lambda: kit.router.jobs, what="the push")
            return
        await acknowledged(kit, event)
        assert await row(kit, event) == ("cancelled", "any", "acknowledged")
        # A changed policy holds within policy_refresh_s.
        await kit.db.execute('update tenants set settings = \'{"policy": {"whenAway": "both"}}\'')

        async def changed() -> bool:
            await kit.publish(make_event())
            return bool(kit.router.jobs)

        await eventually(changed, what="the new policy")


async def test_a_push_is_not_for_the_device_that_showed_it(postgres_dsn: str) -> None:
    """Phone and tablet have targets, the phone showed the socket copy: the push is the tablet's alone."""
    async with Kit(postgres_dsn, hold_s=60.0) as kit:
        await kit.router.link.request(device("phone"))
        await kit.router.link.request(device("tablet"))
        await attached(kit, 1, "focused", device="phone")
        await attached(kit, 2, "hidden", device="tablet")
        event = make_event()
        await kit.publish(event)
        kit.gateway.link.send_nowait(ClientAck(2, seq=1))
        kit.gateway.link.send_nowait(ClientAck(1, seq=1))
        await eventually(lambda: _state(kit, event, "planned", "held"), what="the hold")
        kit.gateway.link.send_nowait(ClientVisibility(1, "hidden"))
        await eventually(lambda: kit.router.jobs, what="the push")
        assert [t.device for job in kit.router.jobs for t in job.targets] == ["tablet"]


async def test_a_push_that_every_device_showed_is_not_sent(postgres_dsn: str) -> None:
    """Only the phone has a target, and the phone showed it."""
    async with Kit(postgres_dsn, hold_s=60.0) as kit:
        await kit.router.link.request(device("phone"))
        await attached(kit, 1, "focused", device="phone")
        event = make_event()
        await kit.publish(event)
        kit.gateway.link.send_nowait(ClientAck(1, seq=1))
        await eventually(lambda: _state(kit, event, "planned", "held"), what="the hold")
        kit.gateway.link.send_nowait(ClientVisibility(1, "hidden"))
        await eventually(lambda: _state(kit, event, "cancelled", "always"))
        assert (await row(kit, event))[2] == "shown on every device"


async def restarted(kit: Kit) -> HandGateway:
    """Kill the shard; its successor, and a new link of the gateway to it."""
    old = kit.shard
    kit.shards.remove(old)
    await old._outbox.close()
    for task in (old._acks._task, old._policies._task, old._writer._task):
        if task is not None:
            task.cancel()
    old._acks._told.clear()  # what a killed process had not written
    kit.coordinator.forget("shard-a")
    await old.stop()
    kit.shard = await kit.start_shard("shard-a")
    kit.router = await kit.dial("shard-a", "router-1")
    return await kit.dial("shard-a", "gateway-1")


async def test_held_pushes_survive_their_shard(postgres_dsn: str) -> None:
    """Of two held ones of different users the successor drops that of the user who is still active."""
    async with Kit(postgres_dsn, hold_s=60.0) as kit:
        events = []
        for conn, user in ((1, "u"), (2, "v")):
            put = device("phone", user)
            await kit.router.link.request(put)
            await attached(kit, conn, "focused", user=user)
            events.append(make_event(user))
        await kit.publish(*events)
        kit.gateway.link.send_nowait(ClientAck(1, seq=1))
        kit.gateway.link.send_nowait(ClientAck(2, seq=1))
        for event in events:
            await eventually(lambda event=event: _state(kit, event, "planned", "held"), what="the hold")
        welcome = kit.gateway.frames[1][0]
        gateway = await restarted(kit)
        gateway.attach(
            3, "u", epoch=welcome["epoch"], last_seq=1, last_rev=1, reattach=True, ready=True,
            attention="focused", began_seq=0, acked_seq=1,
        )  # fmt: skip
        await eventually(lambda: _shown(kit, "active"), what="the user who is back")
        kit.skip(61)
        await eventually(lambda: kit.router.jobs, what="the push of the user who is gone")
        assert [job.user for job in kit.router.jobs] == ["v"]
        await eventually(lambda: _state(kit, events[0], "cancelled", "held"))


async def test_a_push_comes_though_its_shard_died_within_the_window(postgres_dsn: str) -> None:
    """Delivered, not acknowledged, the shard is killed: the successor sends the push."""
    async with Kit(postgres_dsn, ack_window_s=0.5) as kit:
        await kit.router.link.request(device())
        await attached(kit, 1, "focused")
        await kit.publish(make_event())
        await restarted(kit)
        await eventually(lambda: kit.router.jobs, what="the push")


async def test_a_cumulative_acknowledgement_reaches_back_over_a_reattach(postgres_dsn: str) -> None:
    """Frames written before the shard died and acknowledged after; and acknowledgements that died with it."""
    async with Kit(postgres_dsn, ack_window_s=30.0) as kit:
        await kit.router.link.request(device())
        await attached(kit, 1)
        events = [make_event() for _ in range(5)]
        await kit.publish(*events)
        await kit.gateway.seen(1, 6)
        welcome = kit.gateway.frames[1][0]
        gateway = await restarted(kit)
        # The gateway saw ACK 2 pass; whether the dead shard wrote it nobody knows.
        gateway.attach(
            2, epoch=welcome["epoch"], last_seq=5, last_rev=5, reattach=True, ready=True,
            began_seq=0, acked_seq=2,
        )  # fmt: skip
        for event in events[:2]:
            await acknowledged(kit, event)
            assert (await row(kit, event))[::2] == ("cancelled", "acknowledged")
        assert (await row(kit, events[2]))[0] == "planned"
        gateway.link.send_nowait(ClientAck(2, seq=4))
        await acknowledged(kit, events[3])
        assert (await row(kit, events[2]))[0] == "cancelled"
        assert (await row(kit, events[4]))[0] == "planned"
        gateway.link.send_nowait(ClientAck(2, seq=5))
        await acknowledged(kit, events[4])


async def pushed(kit: Kit, channel: FcmChannel, count: int) -> None:
    """Play router and pool: send a job to FCM, report what it said."""
    await eventually(lambda: len(kit.router.jobs) >= count, what=f"job {count}")
    job = kit.router.jobs[count - 1]
    (results,) = await channel.send([job])
    await kit.router.link.request(outcome_of(job, results))


async def test_reading_here_withdraws_there(postgres_dsn: str) -> None:
    """Pushed to phone and tablet, read on the tablet's socket: a silent push to the phone, with its key."""
    async with Kit(postgres_dsn) as kit, fcm() as (server, channel):
        await kit.router.link.request(device("phone"))
        await kit.router.link.request(device("tablet"))
        event = make_event()
        await kit.publish(event)
        await pushed(kit, channel, 1)
        await attached(kit, 1, device="tablet")
        kit.gateway.link.send_nowait(ClientChange(1, "read", [event.id]))
        await pushed(kit, channel, 2)
        shown, also, withdrawn = server.pushes
        assert {shown.target, also.target} == {"phone of u", "tablet of u"}
        assert withdrawn.target == "phone of u"
        message = withdrawn.payload
        assert message["data"]["type"] == "WITHDRAW"
        assert json.loads(message["data"]["notificationIds"]) == [uuid_text(event.id)]
        assert "notification" not in message
        assert message["apns"]["headers"]["apns-collapse-id"] == uuid_text(event.id)
        rows = await kit.db.fetch("select channel, state from deliveries order by id")
        assert sorted(tuple(r) for r in rows) == [("push", "sent"), ("withdraw", "sent")]
        await kit.router.link.request(Change("t", "u", slot_of("t", "u"), "dismiss", [event.id]))
        assert await kit.db.fetchval("select count(*) from deliveries") == 2, "once"


async def test_a_push_that_was_on_its_way_is_withdrawn_when_it_arrived(postgres_dsn: str) -> None:
    """Read between the claim and the provider's answer: sent, it is taken back; failed, not repeated."""
    async with Kit(postgres_dsn) as kit, fcm() as (_, channel):
        await kit.router.link.request(device("phone"))
        sent, failed = make_event(), make_event()
        await kit.publish(sent)
        await kit.publish(failed)
        await eventually(lambda: len(kit.router.jobs) == 2)
        await kit.router.link.request(Change("t", "u", slot_of("t", "u"), "read_all"))
        answer = PushResult("phone", "failed", error="UNAVAILABLE")
        await kit.router.link.request(outcome_of(kit.router.jobs[1], [answer]))
        assert (await row(kit, failed))[0] == "cancelled"
        await pushed(kit, channel, 1)
        await pushed(kit, channel, 3)
        assert kit.router.jobs[2].withdraw
        assert kit.router.jobs[2].notification == sent.id
        states = await kit.db.fetch("select state from deliveries order by state")
        assert [r[0] for r in states] == ["cancelled", "sent", "sent"]


async def test_reading_withdraws_what_was_given_up_for_others(postgres_dsn: str) -> None:
    """The phone may have it, the tablet does not and the push is dead: read, it goes from the phone, once."""
    async with Kit(postgres_dsn, push={"max_attempts": 2, "backoff_s": 0.01}) as kit:
        await kit.router.link.request(device("phone"))
        await kit.router.link.request(device("tablet"))
        event = make_event()
        await kit.publish(event)
        got = {"phone": "unknown", "tablet": "failed"}
        for number in range(2):
            await eventually(lambda number=number: len(kit.router.jobs) > number, what=f"try {number + 1}")
            job = kit.router.jobs[number]
            results = [PushResult(t.device, got[t.device], error="UNAVAILABLE") for t in job.targets]
            await kit.router.link.request(outcome_of(job, results))
        assert (await row(kit, event))[0] == "dead"
        died = await kit.db.fetchval("select updated_at from deliveries")
        await kit.router.link.request(Change("t", "u", slot_of("t", "u"), "read", [event.id]))
        assert died == await kit.db.fetchval("select updated_at from deliveries where state = 'dead'")
        await eventually(lambda: len(kit.router.jobs) == 3)
        assert kit.router.jobs[2].withdraw
        assert [target.device for target in kit.router.jobs[2].targets] == ["phone"]
        await kit.router.link.request(Change("t", "u", slot_of("t", "u"), "dismiss", [event.id]))
        assert await kit.db.fetchval("select count(*) from deliveries where channel = 'withdraw'") == 1


async def test_a_withdrawal_gives_up_quietly(postgres_dsn: str) -> None:
    """A few tries, then it is left at that: cancelled, no dead letter."""
    async with Kit(postgres_dsn) as kit, fcm() as (_, channel):
        await kit.router.link.request(device("phone"))
        event = make_event()
        await kit.publish(event)
        await pushed(kit, channel, 1)
        await kit.router.link.request(Change("t", "u", slot_of("t", "u"), "archive", [event.id]))
        for count in range(2, 5):
            await eventually(lambda count=count: len(kit.router.jobs) >= count, what=f"try {count - 1}")
            answer = PushResult("phone", "failed", error="UNAVAILABLE")
            await kit.router.link.request(outcome_of(kit.router.jobs[count - 1], [answer]))
            await kit.db.execute("update deliveries set due_at = now() where state = 'failed'")
        state = await kit.db.fetchval("select state from deliveries where channel = 'withdraw'")
        assert state == "cancelled"


async def test_the_database_decides_as_the_core_does(postgres_dsn: str) -> None:
    """delivery_signal and on_signal agree on every combination of their arguments."""
    async with Kit(postgres_dsn) as kit:
        signals = ("silent", "active", "received", "stale", "away", "done", "keep")
        states = ("planned", "failed", "unknown", "sending", "sent", "dead", "cancelled")
        gates = (None, "any", "seen", "held", "always", "withdrawn")
        cases = list(itertools.product(signals, states, gates, (True, False)))
        found = await kit.db.fetch(
            "select delivery_signal(c.signal, c.state, c.gate, c.holdable) as done, c.*"
            " from unnest($1::text[], $2::text[], $3::text[], $4::bool[])"
            " as c (signal, state, gate, holdable)",
            *[list(column) for column in zip(*cases, strict=True)],
        )
        assert len(found) == len(cases)
        for r in found:
            assert r["done"] == on_signal(r["signal"], r["state"], r["gate"], r["holdable"]), dict(r)
        assert set(signals) > attention.ACKNOWLEDGED
