"""The shard on real Postgres and real links."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from typing import Any

import pytest

from carillon.errors import RemoteError, StoreUnavailableError
from carillon.ids import slot_of, uuid_text
from carillon.kept_push import history
from carillon.messages import (
    Change,
    ClientAck,
    ClientChange,
    ClientReady,
    ClientResume,
    ClientVisibility,
    Detach,
    DeviceDelete,
    DevicePut,
    PresenceQuery,
    Publish,
    PushLeft,
    PushOutcome,
    PushResult,
    SessionsRevoke,
    SocketDrained,
)
from tests.actors.shard_kit import Kit, clock, make_event
from tests.support import eventually


def device(user: str = "u", token: str = "tok", name: str = "phone") -> DevicePut:
    return DevicePut("t", user, slot_of("t", user), name, "android", "fcm", "token", token, "app")


async def test_an_event_is_committed_before_it_is_answered_and_delivered_live(postgres_dsn: str) -> None:
    """202 means the row is in Postgres; a live device has the frame with the same seq."""
    async with Kit(postgres_dsn) as kit:
        welcome = await kit.gateway.attach_ready(1)
        assert welcome["type"] == "WELCOME"
        assert welcome["lastSeq"] == 0
        assert welcome["recovered"] is None
        event = make_event()
        (outcome,) = await kit.publish(event)
        assert (outcome.status, outcome.seq, outcome.id) == ("delivered", 1, event.id)
        row = await kit.db.fetchrow("select seq, rev, position, delivered_at from notifications")
        assert row is not None
        assert tuple(row)[:3] == (1, 1, 1)
        frames = await kit.gateway.seen(1, 2)
        assert frames[1]["notification"]["id"] == uuid_text(event.id)
        kit.gateway.link.send_nowait(ClientAck(1, seq=1))
        await eventually(lambda: kit.db.fetchval("select delivered_at is not null from notifications"))


async def test_seq_is_gap_free_over_many_concurrent_batches(postgres_dsn: str) -> None:
    """A thousand events of ten users in concurrent requests: each user's seq is 1..100, in order."""
    async with Kit(postgres_dsn) as kit:
        await kit.gateway.attach_ready(1, "u3")
        requests = []
        for _ in range(100):
            requests.append(kit.publish(*[make_event(f"u{n}") for n in range(10)]))
        for outcomes in await asyncio.gather(*requests):
            assert [o.status for o in outcomes].count("delivered") == 1
        for n in range(10):
            seqs = await kit.db.fetch(
                "select n.seq from notifications n join streams s using (stream_id)"
                " where s.user_id = $1 order by n.seq",
                f"u{n}",
            )
            assert [r[0] for r in seqs] == list(range(1, 101))
        await eventually(lambda: len(kit.gateway.seqs(1)) == 100)
        assert kit.gateway.seqs(1) == list(range(1, 101))


async def test_offline_user_without_target_is_stored(postgres_dsn: str) -> None:
    """Nobody there, nothing to push to: the feed keeps it."""
    async with Kit(postgres_dsn) as kit:
        (outcome,) = await kit.publish(make_event())
        assert outcome.status == "stored"
        assert outcome.channels == ["in_app"]


async def test_idempotency_key_has_one_effect(postgres_dsn: str) -> None:
    """Same key and body: same id and seq, replayed; another body: conflict; no gap in seq."""
    async with Kit(postgres_dsn) as kit:
        digest = hashlib.sha256(b"1").digest()
        first = make_event(idempotency_key="e:k", body_hash=digest)
        (one,) = await kit.publish(first)
        again = make_event(idempotency_key="e:k", body_hash=digest)
        other = make_event(idempotency_key="e:k", body_hash=hashlib.sha256(b"2").digest())
        plain = make_event()
        two, three, four = await asyncio.gather(kit.publish(again), kit.publish(other), kit.publish(plain))
        assert not one.replayed
        assert (two[0].id, two[0].seq, two[0].replayed) == (first.id, 1, True)
        assert (three[0].status, three[0].code) == ("failed", "in_progress") or (
            three[0].code == "idempotency_conflict"
        )
        assert (await kit.publish(other))[0].code == "idempotency_conflict"
        assert four[0].seq == 2
        assert await kit.db.fetchval("select count(*) from notifications") == 2


async def test_own_retry_with_the_same_id_has_one_effect(postgres_dsn: str) -> None:
    """An ambiguous failure is retried with the same id and a mark: the first try is found."""
    async with Kit(postgres_dsn) as kit:
        event = make_event()
        (one,) = await kit.publish(event)
        event.retry = True
        (two,), (three,) = await asyncio.gather(kit.publish(event), kit.publish(event))
        assert (two.id, two.seq, two.replayed) == (one.id, one.seq, False)
        assert three.seq == one.seq
        assert await kit.db.fetchval("select seq from streams") == 1


async def test_poison_fails_only_the_culprit(postgres_dsn: str) -> None:
    """A row that Postgres refuses does not take its batch down."""
    async with Kit(postgres_dsn) as kit:
        events = [make_event(f"u{n}") for n in range(9)]
        events[4].content = '"title":"\x00"'  # text cannot hold NUL
        outcomes = await kit.publish(*events)
        assert [o.status for o in outcomes] == ["stored"] * 4 + ["failed"] + ["stored"] * 4
        assert outcomes[4].code == "invalid"
        assert await kit.db.fetchval("select count(*) from notifications") == 8
        assert await kit.db.fetchval("select coalesce(max(seq), 0) from streams where user_id = 'u4'") == 0


async def test_resume_from_memory_and_from_postgres(postgres_dsn: str) -> None:
    """RESUME returns everything missed in seq order and then what was read meanwhile, in pages, then live."""
    async with Kit(postgres_dsn, recent_window=10, replay_page=20, resume_wait_s=60.0) as kit:
        welcome = await kit.gateway.attach_ready(1)
        events = [make_event() for _ in range(65)]
        await kit.publish(*events)
        kit.gateway.attach(2)
        await kit.gateway.seen(2, 1)
        kit.gateway.link.send_nowait(ClientResume(2, welcome["epoch"], 60, 60))
        await eventually(lambda: len(kit.gateway.seqs(2)) == 5)
        assert kit.gateway.frames[2][1]["recovered"] is True
        assert kit.gateway.seqs(2) == [61, 62, 63, 64, 65]

        change = Change("t", "u", slot_of("t", "u"), "read", [events[0].id, events[60].id])
        result = await kit.router.link.request(change)
        assert (result.changed, result.rev, result.unread) == (2, 66, 63)
        kit.gateway.attach(3, epoch=welcome["epoch"], last_seq=3, last_rev=3)
        for page in range(4):
            await eventually(lambda page=page: len(kit.gateway.seqs(3)) >= min(62, 20 * (page + 1)))
            kit.gateway.link.send_nowait(SocketDrained(3))
        await eventually(lambda: kit.gateway.frames[3][-1]["type"] == "NOTIFICATIONS_READ")
        assert kit.gateway.seqs(3) == list(range(4, 66))
        assert kit.gateway.frames[3][-1]["notificationIds"] == [uuid_text(events[0].id)]
        assert kit.gateway.frames[3][-1]["rev"] == 66
        await kit.publish(make_event())
        for conn in (1, 2, 3):
            await eventually(lambda conn=conn: kit.gateway.seqs(conn)[-1] == 66)


async def test_unknown_epoch_is_told(postgres_dsn: str) -> None:
    """A position of another history cannot be resumed: recovered false, then live frames only."""
    async with Kit(postgres_dsn) as kit:
        await kit.publish(make_event())
        kit.gateway.attach(1, epoch="other", last_seq=0)
        frames = await kit.gateway.seen(1, 1)
        assert frames[0]["recovered"] is False
        await kit.publish(make_event())
        await eventually(lambda: kit.gateway.seqs(1) == [2])


async def test_late_resume_is_refused(postgres_dsn: str) -> None:
    """RESUME after the first frame: ERROR resume_too_late and close 4213."""
    async with Kit(postgres_dsn) as kit:
        welcome = await kit.gateway.attach_ready(1)
        kit.gateway.link.send_nowait(ClientResume(1, welcome["epoch"], 0))
        await eventually(lambda: kit.gateway.closed.get(1))
        assert kit.gateway.closed[1][0] == 4213
        assert kit.gateway.frames[1][-1]["code"] == "resume_too_late"


async def test_states_reach_all_devices_after_the_commit(postgres_dsn: str) -> None:
    """Read, seen, archive, click, dismiss and read-all: frames on every connection, counts that are true."""
    async with Kit(postgres_dsn) as kit:
        await kit.gateway.attach_ready(1)
        await kit.gateway.attach_ready(2)
        events = [make_event() for _ in range(6)]
        await kit.publish(*events)
        send = kit.gateway.link.send_nowait
        send(ClientChange(1, "read", [events[0].id], ref="a"))
        send(ClientChange(1, "seen", [events[0].id, events[1].id], ref=2))
        send(ClientChange(2, "archive", [events[2].id]))
        send(ClientChange(2, "click", [events[3].id]))
        send(ClientChange(2, "dismiss", [events[4].id]))
        send(ClientChange(1, "read_all", up_to_seq=5, ref="z"))
        await eventually(lambda: any(f.get("id") == "z" for f in kit.gateway.frames[1]))
        await kit.gateway.seen(2, 7 + 6)
        kinds = [f["type"] for f in kit.gateway.frames[2]][7:]
        assert kinds[0] == "NOTIFICATIONS_READ"
        assert sorted(kinds) == sorted(
            [
                "NOTIFICATIONS_READ", "NOTIFICATIONS_SEEN", "NOTIFICATION_ARCHIVED", "NOTIFICATION_CLICKED",
                "NOTIFICATION_DISMISSED", "ALL_NOTIFICATIONS_READ",
            ]
        )  # fmt: skip
        assert [f["id"] for f in kit.gateway.frames[1] if f["type"] == "OK"] == ["a", 2, "z"]
        seen = next(f for f in kit.gateway.frames[1] if f["type"] == "NOTIFICATIONS_SEEN")
        assert seen["notificationIds"] == [uuid_text(events[1].id)]
        stream = await kit.db.fetchrow("select rev, unread from streams")
        assert tuple(stream) == (12, 1)
        again = await kit.router.link.request(Change("t", "u", slot_of("t", "u"), "read", [events[0].id]))
        assert (again.changed, again.rev, again.unread) == (0, 12, 1)
        with pytest.raises(RemoteError, match="not_found"):
            await kit.router.link.request(
                Change("t", "other", slot_of("t", "other"), "archive", [events[0].id], strict=True)
            )


async def test_push_goes_out_at_once_when_offline_and_is_settled(postgres_dsn: str) -> None:
    """Nobody attached: the row is born claimed, the job leaves, the outcome is kept."""
    async with Kit(postgres_dsn) as kit:
        await kit.router.link.request(device())
        event = make_event(title="ring")
        (outcome,) = await kit.publish(event)
        assert (outcome.status, outcome.channels) == ("queued", ["in_app", "push"])
        await eventually(lambda: kit.router.jobs)
        (job,) = kit.router.jobs
        assert (job.title, job.badge, job.targets[0].token, job.provider) == ("ring", 1, "tok", "fcm")
        assert await kit.db.fetchval("select state from deliveries") == "sending"
        answer = PushOutcome(
            job.delivery, job.attempt, "t", "u", job.slot, event.id, "fcm",
            [PushResult("phone", "sent", "m1", 200, started_ms=event.created_ms, duration_ms=3.5)],
        )  # fmt: skip
        await kit.router.link.request(answer)
        assert await kit.db.fetchval("select state from deliveries") == "sent"
        assert await kit.db.fetchval("select outcome from delivery_attempts") == "sent"


async def test_unacknowledged_delivery_is_pushed_and_an_acknowledgement_cancels_it(postgres_dsn: str) -> None:
    """Live but deaf: the push follows at the end of the window; acknowledged: it never comes."""
    async with Kit(postgres_dsn, ack_window_s=60.0) as kit:
        await kit.router.link.request(device())
        await kit.gateway.attach_ready(1)
        kept, lost = make_event(title="kept"), make_event(title="lost")
        outcomes = await kit.publish(kept, lost)
        assert [o.status for o in outcomes] == ["delivered", "delivered"]
        kit.gateway.link.send_nowait(ClientAck(1, ids=[kept.id]))
        await eventually(
            lambda: kit.db.fetchval("select bool_or(delivered_at is not null) from notifications")
        )
        assert kit.router.jobs == []
        kit.skip(61)
        await eventually(lambda: kit.router.jobs)
        assert [job.notification for job in kit.router.jobs] == [lost.id]
        states = await kit.db.fetch("select notification_id, state, reason from deliveries")
        assert {r[0].bytes: (r[1], r[2]) for r in states} == {lost.id: ("sending", None)}
        text = await kit.db.fetchval("select kept from notifications where id = $1", uuid.UUID(bytes=kept.id))
        [told] = history(text, 0, 0)
        assert (told["state"], told["reason"]) == ("cancelled", "acknowledged")


async def test_failed_push_is_tried_again_and_gives_up(postgres_dsn: str) -> None:
    """A retryable failure comes back after its back-off; an invalid target is deleted."""
    async with Kit(postgres_dsn, push={"backoff_s": 60.0}) as kit:
        await kit.router.link.request(device())
        await kit.publish(make_event())
        await eventually(lambda: kit.router.jobs)
        job = kit.router.jobs[0]

        def answer(attempt: int, outcome: str) -> PushOutcome:
            return PushOutcome(
                job.delivery, attempt, "t", "u", job.slot, job.notification, "fcm",
                [PushResult("phone", outcome, "", 503, "UNAVAILABLE", 0.0, 1, 1.0)],
            )  # fmt: skip

        await kit.router.link.request(answer(1, "failed"))
        row = await kit.db.fetchrow("select state, attempts from deliveries")
        assert tuple(row) == ("failed", 1)
        await kit.db.execute("update deliveries set due_at = now()")
        await eventually(lambda: len(kit.router.jobs) == 2)
        assert kit.router.jobs[1].attempt == 2
        await kit.router.link.request(answer(2, "invalid_target"))
        assert await kit.db.fetchval("select state from deliveries") == "dead"
        assert await kit.db.fetchval("select count(*) from devices") == 0
        assert await kit.db.fetchval("select count(*) from delivery_attempts") == 2


async def test_a_push_that_no_pool_took_waits_without_using_up_a_try(postgres_dsn: str) -> None:
    """Handed back: planned again at once, due after a pause, offered under the same number of tries."""
    async with Kit(postgres_dsn, delivery_lease_s=60.0, push={"left_pause_s": 30.0}) as kit:
        await kit.router.link.request(device())
        await kit.publish(make_event(), make_event())
        await eventually(lambda: len(kit.router.jobs) == 2)
        ids = [job.delivery for job in kit.router.jobs]
        rows = "select distinct state, attempts, reason from deliveries"
        waiting = ("planned", 0, "waits: fcm breaker open")

        async def released() -> bool:
            return [tuple(row) for row in await kit.db.fetch(rows)] == [waiting]

        for round_ in range(3):
            kit.router.link.send_nowait(PushLeft("fcm", "breaker open", ids, [1, 1]))
            await eventually(released)
            kit.skip(31)
            await eventually(lambda n=round_: len(kit.router.jobs) == 2 * (n + 2))
            assert {job.attempt for job in kit.router.jobs} == {1}
        kit.router.link.send_nowait(PushLeft("fcm", "breaker open", ids, [1, 1]))
        await eventually(released)
        assert await kit.db.fetchval("select count(*) from delivery_attempts") == 0


async def test_an_old_or_foreign_hand_back_changes_nothing(postgres_dsn: str) -> None:
    """Of another try, another provider, or of a row that is settled."""
    async with Kit(postgres_dsn) as kit:
        await kit.router.link.request(device())
        await kit.publish(make_event())
        await eventually(lambda: kit.router.jobs)
        job = kit.router.jobs[0]
        kit.router.link.send_nowait(PushLeft("fcm", "full", [job.delivery], [2]))
        kit.router.link.send_nowait(PushLeft("apns", "full", [job.delivery], [1]))
        sent = PushOutcome(
            job.delivery,
            1,
            "t",
            "u",
            job.slot,
            job.notification,
            "fcm",
            [PushResult("phone", "sent", "m", 200)],
        )
        await kit.router.link.request(sent)
        kit.router.link.send_nowait(PushLeft("fcm", "full", [job.delivery], [1]))
        await kit.router.link.request(device())  # answered behind the messages above
        assert tuple(await kit.db.fetchrow("select state, attempts from deliveries")) == ("sent", 1)


async def test_a_target_that_was_left_comes_again_alone(postgres_dsn: str) -> None:
    """Two apps at one provider, one held back: no attempt is noted for it, the other is not repeated."""
    async with Kit(postgres_dsn, push={"left_pause_s": 0.1}) as kit:
        await kit.router.link.request(device())
        other = DevicePut("t", "u", slot_of("t", "u"), "tablet", "android", "fcm", "token", "a", "app")
        await kit.router.link.request(other)
        await kit.publish(make_event())
        await eventually(lambda: kit.router.jobs)
        job = kit.router.jobs[0]
        results = [
            PushResult("phone", "sent", "m", 200),
            PushResult("tablet", "left", error="breaker open", retry_after_s=20.0),
        ]
        outcome = PushOutcome(job.delivery, 1, "t", "u", job.slot, job.notification, "fcm", results)
        await kit.router.link.request(outcome)
        row = await kit.db.fetchrow("select state, reason from deliveries")
        assert tuple(row) == ("failed", "waits: fcm breaker open")
        assert await kit.db.fetchval("select array_agg(device_id) from delivery_attempts") == ["phone"]
        kit.skip(21)
        await eventually(lambda: len(kit.router.jobs) == 2)
        assert [target.device for target in kit.router.jobs[1].targets] == ["tablet"]


async def test_a_push_taken_at_one_provider_and_left_by_another_comes_again_for_the_other(
    postgres_dsn: str,
) -> None:
    """Two phones at two providers, one of which takes nothing: that one alone is tried again."""
    async with Kit(postgres_dsn, push={"left_pause_s": 0.1}) as kit:
        await kit.router.link.request(device())
        tablet = DevicePut("t", "u", slot_of("t", "u"), "tablet", "ios", "apns", "token", "a", "app")
        await kit.router.link.request(tablet)
        await kit.publish(make_event())
        await eventually(lambda: len(kit.router.jobs) == 2)
        job = kit.router.jobs[0]
        sent = PushOutcome(
            job.delivery,
            1,
            "t",
            "u",
            job.slot,
            job.notification,
            "fcm",
            [PushResult("phone", "sent", "m", 200)],
        )
        kit.router.link.send_nowait(PushLeft("apns", "no pool", [job.delivery], [1]))
        await kit.router.link.request(sent)
        await eventually(lambda: len(kit.router.jobs) == 3)
        again = kit.router.jobs[2]
        assert (again.provider, again.attempt, [t.device for t in again.targets]) == ("apns", 2, ["tablet"])


async def test_a_restarted_shard_finds_due_pushes_and_replays_to_sockets(postgres_dsn: str) -> None:
    """What was committed and not yet sent is not lost with the process."""
    async with Kit(postgres_dsn, ack_window_s=60.0) as kit:
        await kit.router.link.request(device())
        welcome = await kit.gateway.attach_ready(1)
        await kit.publish(make_event(), make_event())
        await eventually(lambda: kit.gateway.seqs(1) == [1, 2])
        await kit.shard.stop()
        await kit.start_shard("shard-a")
        gateway = await kit.dial("shard-a", "gateway-1")
        kit.router = await kit.dial("shard-a", "router-1")
        gateway.attach(1, epoch=welcome["epoch"], last_seq=1, last_rev=1, reattach=True, ready=True)
        await eventually(lambda: gateway.seqs(1) == [2])
        assert all(f["type"] != "WELCOME" for f in gateway.frames[1])
        kit.skip(61)
        await eventually(lambda: len(kit.router.jobs) == 2)


async def test_a_fenced_shard_answers_moved_and_writes_nothing(postgres_dsn: str) -> None:
    """A bumped term aborts every write of the old owner."""
    async with Kit(postgres_dsn) as kit:
        await kit.publish(make_event())
        await kit.new_term("shard-a")
        (outcome,) = await kit.publish(make_event())
        assert outcome.status == "moved"
        assert await kit.db.fetchval("select count(*) from notifications") == 1
        kit.coordinator.bump_term("shard-a")
        await eventually(lambda: kit.shard._term_now == 2)
        (outcome,) = await kit.publish(make_event())
        assert (outcome.status, outcome.seq) == ("stored", 2)


async def test_a_change_that_is_fenced_is_made_under_the_next_term(postgres_dsn: str) -> None:
    """The slot stays, its term ends: gateways may know before the shard, which gives the connection back."""
    async with Kit(postgres_dsn) as kit:
        welcome = await kit.gateway.attach_ready(1)
        event = make_event()
        await kit.publish(event)
        await kit.gateway.seen(1, 2)
        await kit.new_term("shard-a")
        kit.gateway.link.send_nowait(ClientChange(1, "read", [event.id], ref="r"))
        await eventually(lambda: kit.gateway.refused == [1], what="the connection given back")
        assert await kit.db.fetchval("select read_at is null from notifications")
        kit.coordinator.bump_term("shard-a")
        await eventually(lambda: kit.shard._term_now == 2)
        kit.gateway.attach(2, epoch=welcome["epoch"], last_seq=1, last_rev=1, reattach=True, ready=True)
        kit.gateway.link.send_nowait(ClientChange(2, "read", [event.id], ref="r"))
        frames = await kit.gateway.seen(2, 2)
        assert [frame["type"] for frame in frames[:2]] == ["NOTIFICATIONS_READ", "OK"]


async def test_slots_given_away_are_refused(postgres_dsn: str) -> None:
    """Events answer moved, sockets are refused, so that both go to the new owner."""
    async with Kit(postgres_dsn) as kit:
        await kit.gateway.attach_ready(1)
        kit.coordinator.set_owner(slot_of("t", "u"), None)
        await eventually(lambda: kit.gateway.refused == [1])
        (outcome,) = await kit.publish(make_event())
        assert outcome.status == "moved"
        kit.gateway.attach(2)
        await eventually(lambda: kit.gateway.refused == [1, 2])


async def test_expired_rows_that_are_read_are_left_out_of_unread_once(postgres_dsn: str) -> None:
    """A user who had expired rows when loaded reads everything: what comes next counts from zero."""
    async with Kit(postgres_dsn) as kit:
        past_ms = clock.now_ms() - 1000
        await kit.publish(make_event(expires_ms=past_ms), make_event(expires_ms=past_ms), make_event())
        await kit.shard.stop()
        await kit.start_shard("shard-a")
        gateway = await kit.dial("shard-a", "gateway-1")
        welcome = await gateway.attach_ready(1)
        assert welcome["unreadCount"] == 1
        gateway.link.send_nowait(ClientChange(1, "read_all", ref="r"))
        await gateway.seen(1, 3)
        router = await kit.dial("shard-a", "router-1")
        await router.link.request(Publish([make_event()]))
        assert (await gateway.attach_ready(2))["unreadCount"] == 1


async def shown_unread(kit: Kit) -> int:
    """What the shard holds for unread, as a change that changes nothing is answered."""
    return (await kit.router.link.request(Change("t", "u", slot_of("t", "u"), "archive", [bytes(16)]))).unread


async def test_a_count_that_failed_is_made_up_for(postgres_dsn: str) -> None:
    """Everything is read while Postgres does not count what had expired: that is counted a moment later."""
    async with Kit(postgres_dsn) as kit:
        await kit.publish(make_event(expires_ms=clock.now_ms() - 1000), make_event())
        await kit.gateway.attach_ready(1)
        count, refused = kit.shard._store.expired, asyncio.Event()

        async def first_fails(*args: Any) -> Any:
            if not refused.is_set():
                refused.set()
                raise StoreUnavailableError("PostgreSQL does not answer")
            return await count(*args)

        kit.shard._store.expired = first_fails
        kit.gateway.link.send_nowait(ClientChange(1, "read_all", ref="r"))
        await refused.wait()
        await kit.publish(make_event(), make_event())
        await eventually(lambda: _counts(kit, 2), what="the right count")


async def test_what_expired_is_counted_anew_after_a_lost_answer(postgres_dsn: str) -> None:
    """A read-all was committed unheard, an event came before the shard could look: it counts as unread."""
    async with Kit(postgres_dsn) as kit:
        await kit.publish(make_event(expires_ms=clock.now_ms() - 1000), make_event())
        await kit.gateway.attach_ready(1)
        store = kit.shard._store
        read_all, load, away = store.read_all, store.load_users, asyncio.Event()

        async def unheard(*args: Any) -> Any:
            await read_all(*args)
            away.set()
            raise StoreUnavailableError("PostgreSQL does not answer")

        async def load_users(*args: Any) -> Any:
            if away.is_set():
                raise StoreUnavailableError("PostgreSQL does not answer")
            return await load(*args)

        store.read_all, store.load_users = unheard, load_users
        kit.gateway.link.send_nowait(ClientChange(1, "read_all", ref="r"))
        await away.wait()
        (outcome,) = await kit.publish(make_event())
        assert outcome.seq == 3
        away.clear()
        await eventually(lambda: _counts(kit, 1), what="the right count")
        await eventually(lambda: kit.gateway.seqs(1) == [3], what="the event")


async def _counts(kit: Kit, unread: int) -> bool:
    return await shown_unread(kit) == unread


async def test_presence_follows_attachments_visibility_and_grace(postgres_dsn: str) -> None:
    """active -> idle by VISIBILITY -> kept through grace -> offline, with last seen."""
    async with Kit(postgres_dsn, grace_s=60.0) as kit:

        async def status() -> str:
            reply = await kit.router.link.request(PresenceQuery("t", ["u", "nobody"]))
            assert reply.users[1].status == "offline"
            return reply.users[0].status

        await kit.gateway.attach_ready(1)
        assert await status() == "active"
        kit.gateway.link.send_nowait(ClientVisibility(1, "hidden"))
        await eventually(lambda: _is(status, "idle"))
        kit.gateway.link.send_nowait(Detach(1, False))
        await eventually(lambda: not kit.shard._sessions.connections())
        assert await status() == "idle"
        kit.skip(61)
        await eventually(lambda: _is(status, "offline"))
        reply = await kit.router.link.request(PresenceQuery("t", ["u"]))
        assert reply.users[0].last_seen_ms is not None
        assert await kit.db.fetchval("select count(*) from streams") == 1, "asking makes no rows"


async def _is(status, wanted: str) -> bool:
    return await status() == wanted


async def test_grace_delays_the_push_to_its_end(postgres_dsn: str) -> None:
    """The last device just left: the push is due when grace ends, not before."""
    async with Kit(postgres_dsn, grace_s=60.0) as kit:
        await kit.router.link.request(device())
        await kit.gateway.attach_ready(1)
        kit.gateway.link.send_nowait(Detach(1, False))
        (outcome,) = await kit.publish(make_event())
        assert outcome.status == "queued"
        assert await kit.db.fetchval("select state from deliveries") == "planned"
        assert kit.router.jobs == []
        kit.skip(61)
        await eventually(lambda: kit.router.jobs)


async def test_the_21st_connection_closes_the_oldest(postgres_dsn: str) -> None:
    """Twenty connections of a user: one more closes the first with 4004."""
    async with Kit(postgres_dsn, max_connections_per_user=3) as kit:
        for conn in range(1, 5):
            await kit.gateway.attach_ready(conn)
        await eventually(lambda: kit.gateway.closed)
        assert kit.gateway.closed == {1: (4004, "too many connections of this user: the oldest goes")}


async def test_revocation_closes_sockets_and_a_target_moves_with_its_token(postgres_dsn: str) -> None:
    """sessions/revoke closes with 4001; the same token registered by another user belongs to that one."""
    async with Kit(postgres_dsn) as kit:
        await kit.gateway.attach_ready(1)
        await kit.router.link.request(SessionsRevoke("t", "u", slot_of("t", "u")))
        await eventually(lambda: kit.gateway.closed.get(1, (0,))[0] == 4001)
        kit.gateway.attach(2, token_issued_ms=clock.now_ms() - 60_000)
        await eventually(lambda: kit.gateway.closed.get(2, (0,))[0] == 4001)
        kit.gateway.attach(3, token_issued_ms=clock.now_ms() + 1)
        await kit.gateway.seen(3, 1)
        kit.gateway.link.send_nowait(Detach(3, True))
        await eventually(lambda: not kit.shard._sessions.connections())
        await kit.router.link.request(device("u"))
        await kit.router.link.request(device("v"))
        owners = await kit.db.fetch("select user_id from devices")
        assert [r[0] for r in owners] == ["v"]
        (outcome,) = await kit.publish(make_event("u"))
        assert outcome.status == "stored"
        assert (await kit.router.link.request(DeviceDelete("t", "v", slot_of("t", "v"), "phone"))).count == 1
        assert (await kit.router.link.request(DeviceDelete("t", "v", slot_of("t", "v"), "phone"))).count == 0


async def test_a_storm_of_attaches_is_loaded_in_few_queries(postgres_dsn: str) -> None:
    """2,000 users attach at once: all welcomed."""
    async with Kit(postgres_dsn) as kit:
        for conn in range(2000):
            kit.gateway.attach(conn, f"user{conn}")
            kit.gateway.link.send_nowait(ClientReady(conn))
        await eventually(lambda: len(kit.gateway.frames) == 2000)
        assert await kit.db.fetchval("select count(*) from streams") == 2000


async def test_a_gap_heals_from_postgres(postgres_dsn: str) -> None:
    """Another writer moved the stream: live sockets get what they did not see before they get what is new."""
    async with Kit(postgres_dsn) as kit:
        await kit.gateway.attach_ready(1)
        await kit.publish(make_event())
        await kit.db.execute(
            "insert into notifications"
            " (id, stream_id, seq, rev, position, priority, type, content, created_at)"
            " select gen_random_uuid(), stream_id, 2, 2, 2, 1, 'x', '\"type\":\"x\"', now() from streams"
        )
        await kit.db.execute("update streams set seq = 2, rev = 2, unread = 2")
        await kit.publish(make_event())
        await eventually(lambda: kit.gateway.seqs(1) == [1, 2, 3])


async def test_a_commit_whose_answer_was_lost_reaches_live_sockets(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks between commit and answer: the retry is told so, and devices get the frame."""
    async with Kit(postgres_dsn) as kit:
        await kit.gateway.attach_ready(1)
        store = kit.shard._store
        append = store.append

        async def commit_and_break(*args: object, **kwargs: object) -> object:
            monkeypatch.setattr(store, "append", append)
            await append(*args, **kwargs)  # type: ignore[arg-type]
            raise StoreUnavailableError("the connection is lost")

        monkeypatch.setattr(store, "append", commit_and_break)
        event = make_event()
        (lost,) = await kit.publish(event)
        assert (lost.status, lost.code) == ("failed", "store_unavailable")
        await eventually(lambda: kit.gateway.seqs(1) == [1])
        event.retry = True
        (again,) = await kit.publish(event)
        assert (again.id, again.seq) == (event.id, 1)
        await kit.publish(make_event())
        await eventually(lambda: kit.gateway.seqs(1) == [1, 2])
