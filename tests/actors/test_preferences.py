"""Preferences and tenants' rules on a real shard and real Postgres."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import pytest

from carillon.clock import rfc3339
from carillon.errors import RemoteError
from carillon.ids import slot_of
from carillon.kept_push import history
from carillon.messages import Change, ClientAck, ClientVisibility, DevicePut, Event, PreferencesPut
from tests.actors.shard_kit import Kit, clock, make_event
from tests.support import eventually

HOUR = 3_600_000


async def phone(kit: Kit, user: str = "u") -> None:
    await kit.router.link.request(
        DevicePut(
            "t", user, slot_of("t", user), "phone", "android", "fcm", "token", f"phone of {user}", "app"
        )
    )


async def prefer(kit: Kit, user: str = "u", /, **document: Any) -> None:
    everything = document.pop("everything", None)
    if everything is not None:
        document["global"] = everything
    await kit.router.link.request(PreferencesPut("t", user, slot_of("t", user), json.dumps(document)))


async def rules(kit: Kit, **policy: Any) -> None:
    """Store a tenant's policy before the shard reads it."""
    await kit.db.execute(
        "insert into tenants (tenant, client_secret, settings) values ('t', $1, $2::jsonb)"
        " on conflict (tenant) do update set settings = excluded.settings",
        "x" * 32,
        json.dumps({"policy": policy}),
    )


async def stored(kit: Kit, event: Event) -> Any:
    return await kit.db.fetchrow("select * from notifications where id = $1", uuid.UUID(bytes=event.id))


async def rows(kit: Kit, event: Event) -> list[tuple[Any, ...]]:
    found = await kit.db.fetch(
        "select channel, state, gate, reason from deliveries where notification_id = $1",
        uuid.UUID(bytes=event.id),
    )
    return [tuple(row) for row in found]


async def test_changes_hold_for_the_next_event(postgres_dsn: str) -> None:
    """Push switched off and on again: each event follows what was stored last; with no rule none is noted."""
    async with Kit(postgres_dsn) as kit:
        await phone(kit)
        before, off, on = make_event(), make_event(), make_event()
        (first,) = await kit.publish(before)
        await prefer(kit, channels={"push": False})
        (second,) = await kit.publish(off)
        await prefer(kit, channels={"push": True})
        (third,) = await kit.publish(on)
        assert [o.status for o in (first, second, third)] == ["queued", "stored", "queued"]
        assert [o.reason for o in (first, second, third)] == [None, "preferences", None]
        assert await rows(kit, off) == []
        assert (await stored(kit, before))["decision"] is None
        assert json.loads((await stored(kit, off))["decision"]) == [
            ["channel_off", "user", "push", ["push"], None]
        ]


async def test_a_version_is_replaced_once(postgres_dsn: str) -> None:
    """Of writers that saw the same version one wins; memory and Postgres have what was committed last."""
    async with Kit(postgres_dsn) as kit:
        slot = slot_of("t", "u")

        async def put(version: int | None, **document: Any) -> int:
            wanted = PreferencesPut("t", "u", slot, json.dumps(document), version)
            return (await kit.router.link.request(wanted)).count

        with pytest.raises(RemoteError, match="version_conflict"):
            await put(3)
        assert await put(0, badge=False) == 1
        done = await asyncio.gather(*(put(1, sound=f"s{n}") for n in range(5)), return_exceptions=True)
        assert sorted(str(type(one).__name__) for one in done) == ["RemoteError"] * 4 + ["int"]
        await asyncio.gather(*(put(None, types={"chat": n % 2 == 0}) for n in range(9)))
        row = await kit.db.fetchrow("select version, document::text from preferences")
        assert row["version"] == 11
        wanted = json.loads(row["document"])["types"]["chat"]
        (outcome,) = await kit.publish(make_event(type="chat"))
        assert (outcome.status == "suppressed") is (not wanted)


async def test_preferences_outlive_the_shard(postgres_dsn: str) -> None:
    """Another process reads them with the user."""
    async with Kit(postgres_dsn) as kit:
        await phone(kit)
        await prefer(kit, types={"test": {"push": False}})
        await kit.shard.stop()
        await kit.start_shard("shard-a")
        kit.router = await kit.dial("shard-a", "router-1")
        (outcome,) = await kit.publish(make_event())
        assert (outcome.status, outcome.channels) == ("stored", ["in_app"])


async def test_what_a_user_switched_off_is_filed_away(postgres_dsn: str) -> None:
    """Stored with its seq, archived, not unread, on no socket, and not on resume; what follows flows on."""
    async with Kit(postgres_dsn) as kit:
        await phone(kit)
        await prefer(kit, types={"test": False})
        await kit.gateway.attach_ready(1)
        off, on = make_event(), make_event(type="other")
        first, second = await kit.publish(off, on)
        assert (first.status, first.channels, first.reason, first.seq) == ("suppressed", [], "preferences", 1)
        assert (second.status, second.seq) == ("delivered", 2)
        frames = await kit.gateway.seen(1, 2)
        assert [f.get("notification", {}).get("seq") for f in frames] == [None, 2]
        row = await stored(kit, off)
        assert row["archived_at"] == row["created_at"]
        assert await kit.db.fetchval("select unread from streams where user_id = 'u'") == 1
        assert await rows(kit, off) == []
        epoch = frames[0]["epoch"]
        kit.gateway.attach(2, epoch=epoch, last_seq=0)
        await kit.gateway.seen(2, 2)
        await eventually(lambda: kit.gateway.seqs(2) == [2])
        welcome = await kit.gateway.attach_ready(3)
        assert welcome["unreadCount"] == 1


async def test_a_batch_counts_unread_right(postgres_dsn: str) -> None:
    """In-app off for one of several types of a batch: every answer of the session counts the others."""
    async with Kit(postgres_dsn) as kit:
        await prefer(kit, types={"test": False})
        await kit.gateway.attach_ready(1)
        batch = [make_event(type=name) for name in ("a", "test", "b", "test", "c")]
        await kit.publish(*batch)
        await kit.gateway.seen(1, 4)
        assert kit.gateway.seqs(1) == [1, 3, 5]
        assert await kit.db.fetchval("select unread from streams where user_id = 'u'") == 3
        await kit.router.link.request(Change("t", "u", slot_of("t", "u"), "read", [batch[2].id]))
        assert (await kit.gateway.attach_ready(2))["unreadCount"] == 2


async def test_quiet_hours_hold_the_push_and_silence_the_app(postgres_dsn: str) -> None:
    """Do-not-disturb: the frame says silent, the push waits for the end; urgent passes both."""
    async with Kit(postgres_dsn) as kit:
        await phone(kit)
        until = clock.now_ms() + HOUR
        await prefer(kit, doNotDisturbUntil=rfc3339(until))
        await kit.gateway.attach_ready(1)
        held, urgent = make_event(), make_event(priority=3)
        first, second = await kit.publish(held, urgent)
        assert (first.status, first.reason, first.channels) == (
            "delivered", "do_not_disturb", ["in_app", "push"],
        )  # fmt: skip
        assert (second.status, second.reason) == ("delivered", None)
        frames = await kit.gateway.seen(1, 3)
        assert [f.get("silent") for f in frames] == [None, True, None]
        assert await rows(kit, held) == [("push", "planned", "deferred", "do_not_disturb")]
        due = await kit.db.fetchval("select max(due_at) from deliveries where gate = 'deferred'")
        assert round(due.timestamp() * 1000) == until
        await eventually(lambda: kit.router.jobs)
        assert [job.notification for job in kit.router.jobs] == [urgent.id]


async def test_an_override_of_priority_reaches_the_push(postgres_dsn: str) -> None:
    """A category that the user made urgent is urgent for planning, in the store and for the provider."""
    async with Kit(postgres_dsn) as kit:
        await phone(kit)
        await prefer(
            kit,
            categories={"pager": {"priority": "urgent"}},
            doNotDisturbUntil="2099-01-01T00:00:00Z",
            sound="bell",
            badge=False,
            vibration=False,
        )
        event = make_event(category="pager")
        (outcome,) = await kit.publish(event)
        assert outcome.status == "queued"
        await eventually(lambda: kit.router.jobs)
        assert kit.router.jobs[0].priority == 3
        (job,) = kit.router.jobs
        assert (job.sound, job.badge, job.vibration) == ("bell", -1, False)
        assert (await stored(kit, event))["priority"] == 3


async def test_a_tenants_rules_hold_for_users_who_stored_nothing(postgres_dsn: str) -> None:
    """Defaults beneath, forced rules above, read with the tenant's first user and refreshed."""
    async with Kit(postgres_dsn, policy_refresh_s=0.1) as kit:
        await rules(
            kit, defaults={"channels": {"push": False}}, forced={"categories": {"security": {"push": True}}}
        )
        await phone(kit)
        plain, forced = await kit.publish(make_event(), make_event(category="security"))
        assert (plain.status, forced.status) == ("stored", "queued")
        await rules(kit)

        async def lifted() -> bool:
            return (await kit.publish(make_event()))[0].status == "queued"

        await eventually(lifted, what="the tenant's new policy")


async def test_more_than_the_limit_is_never_silence(postgres_dsn: str) -> None:
    """Two an hour: the third is told later, or stays in the feed, as the tenant says; urgent passes."""
    async with Kit(postgres_dsn) as kit:
        await rules(kit, limits={"user": {"count": 2, "windowS": 3600}, "overflow": "digest"})
        await phone(kit)
        outcomes = await kit.publish(*(make_event() for _ in range(3)), make_event(priority=3))
        assert [o.status for o in outcomes] == ["queued", "queued", "deferred", "queued"]
        assert outcomes[2].reason == "rate_limit"
        # Without a target nothing takes anything of a limit.
        others = await kit.publish(*(make_event("nobody") for _ in range(4)))
        assert [o.status for o in others] == ["stored"] * 4


async def ended(kit: Kit) -> None:
    """Wait until no row of the outbox is left to do."""
    await eventually(
        lambda: kit.db.fetchval("select bool_and(state in ('cancelled', 'sent', 'sending')) from deliveries"),
        what="an outbox without anything planned",
    )


async def test_what_was_held_is_told_together(postgres_dsn: str) -> None:
    """At the end of do-not-disturb: one push per user for all that was missed, but not for what was read."""
    async with Kit(postgres_dsn) as kit:
        await phone(kit)
        await phone(kit, "v")
        until = rfc3339(clock.now_ms() + HOUR)
        for user in ("u", "v"):
            await prefer(kit, user, doNotDisturbUntil=until)
        events = [make_event(title=f"number {n}") for n in range(4)]
        other = make_event("v", title="alone")
        outcomes = await kit.publish(*events, other)
        assert {o.status for o in outcomes} == {"deferred"}
        await kit.router.link.request(Change("t", "u", slot_of("t", "u"), "read", [events[1].id]))
        assert kit.router.jobs == []
        kit.skip(3601)
        await eventually(lambda: len(kit.router.jobs) == 2, what="both pushes")
        mine, theirs = sorted(kit.router.jobs, key=lambda job: job.user)
        assert (mine.notification, mine.title, mine.body) == (events[3].id, "3 new notifications", "number 3")
        assert (theirs.title, theirs.body) == ("alone", None)
        reasons = [(await rows(kit, event))[0][3] for event in events[:3]]
        carrier = f"merged into {uuid.UUID(bytes=events[3].id)}"
        assert reasons == [carrier, "read", carrier]
        assert await kit.db.fetchval("select max(merged) from deliveries") == 3


async def test_what_was_held_is_decided_again(postgres_dsn: str) -> None:
    """At the end of do-not-disturb push is off by now, or the user is here and has it in the app: no push."""
    async with Kit(postgres_dsn) as kit:
        until = rfc3339(clock.now_ms() + HOUR)
        for user in ("off", "here", "deaf"):
            await phone(kit, user)
            await prefer(kit, user, doNotDisturbUntil=until)
        await kit.gateway.attach_ready(1, "here")
        await kit.gateway.attach_ready(2, "deaf")
        for conn in (1, 2):
            kit.gateway.link.send_nowait(ClientVisibility(conn, "visible"))
        off, here, deaf = (make_event(user) for user in ("off", "here", "deaf"))
        await kit.publish(off, here, deaf)
        kit.gateway.link.send_nowait(ClientAck(1, seq=1))
        await prefer(kit, "off", channels={"push": False})
        await eventually(
            lambda: kit.db.fetchval("select bool_or(delivered_at is not null) from notifications"),
            what="the acknowledgement",
        )
        kit.skip(3601)
        await eventually(lambda: kit.router.jobs, what="the push of who did not acknowledge")
        await ended(kit)
        assert [job.notification for job in kit.router.jobs] == [deaf.id]
        closed = "preferences; closed by user channel_off push"
        assert (await rows(kit, off))[0][1::2] == ("cancelled", closed)
        assert (await rows(kit, here))[0][1::2] == ("cancelled", "active")


async def test_quiet_hours_that_begin_meanwhile_hold_what_waits(postgres_dsn: str) -> None:
    """A push that waits for an acknowledgement is held when its time comes inside of do-not-disturb."""
    async with Kit(postgres_dsn, ack_window_s=60.0) as kit:
        await phone(kit)
        await kit.gateway.attach_ready(1)
        event = make_event()
        await kit.publish(event)
        text = await kit.db.fetchval("select kept from notifications")
        assert [told["state"] for told in history(text, 0, None)] == ["planned"]
        await prefer(kit, doNotDisturbUntil=rfc3339(clock.now_ms() + HOUR))
        kit.skip(61)

        async def held() -> bool:
            return await rows(kit, event) == [("push", "planned", "deferred", "do_not_disturb")]

        await eventually(held, what="the hold")
        # Taken back: due when its hold ends, whatever the user wants by then.
        assert await kit.db.fetchval("select due_at = hold_until and attempts = 0 from deliveries")
        assert kit.router.jobs == []


async def test_what_was_held_survives_the_shard(postgres_dsn: str) -> None:
    """The next process claims it, reads the user's document and tells it together."""
    async with Kit(postgres_dsn) as kit:
        await phone(kit)
        await prefer(kit, doNotDisturbUntil=rfc3339(clock.now_ms() + HOUR))
        await kit.publish(make_event(), make_event())
        await kit.shard.stop()
        await kit.start_shard("shard-a")
        kit.router = await kit.dial("shard-a", "router-1")
        assert kit.router.jobs == []
        kit.skip(3601)
        await eventually(lambda: kit.router.jobs, what="the push")
        await ended(kit)
        assert [job.title for job in kit.router.jobs] == ["2 new notifications"]


async def test_overflow_is_told_when_there_is_room(postgres_dsn: str) -> None:
    """One in 20 s: the other three come as one push when the window lets one pass."""
    async with Kit(postgres_dsn) as kit:
        await rules(kit, limits={"user": {"count": 1, "windowS": 20}})
        await phone(kit)
        outcomes = await kit.publish(*(make_event(title=f"number {n}") for n in range(4)))
        assert [o.status for o in outcomes] == ["queued", "deferred", "deferred", "deferred"]
        await eventually(lambda: kit.router.jobs)
        kit.skip(21)
        await eventually(lambda: len(kit.router.jobs) == 2, what="the digest")
        assert [job.title for job in kit.router.jobs] == ["number 0", "3 new notifications"]
