"""Digests on a real shard and real Postgres: collected, told once at their time, changed while open."""

from __future__ import annotations

import asyncio
import json
import uuid
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from actors import shard_digests
from carillon.clock import SystemClock, rfc3339
from carillon.digest import digest_id, key_of, tell
from carillon.errors import RemoteError, StoreUnavailableError
from carillon.ids import UserKey, slot_of
from carillon.messages import Change, ClientAck, ClientVisibility, DevicePut, DigestChange, PreferencesPut
from tests.actors.push_world import world
from tests.actors.shard_kit import AheadClock, Kit, make_event
from tests.support import eventually

HOUR_MS = 3_600_000


class Shifted(AheadClock):
    """The machine's clock, put ahead to half an hour before a full hour, and then on."""

    def __init__(self) -> None:
        super().__init__()
        self.hour_ms = (self.now_ms() // HOUR_MS + 2) * HOUR_MS
        self._approach(HOUR_MS // 2)

    def _approach(self, left_ms: int) -> None:
        self.advance((self.hour_ms - left_ms - self.now_ms()) / 1000)

    def approach(self, kit: Kit, left_ms: int) -> None:
        """Let the hour come after `left_ms`; the shard computes its waits anew."""
        self._approach(left_ms)
        kit.shards[-1]._outbox.due_now()


async def phone(kit: Kit, user: str = "u") -> None:
    await kit.router.link.request(
        DevicePut(
            "t", user, slot_of("t", user), "phone", "android", "fcm", "token", f"phone of {user}", "app"
        )
    )


async def prefer(kit: Kit, user: str = "u", /, **document: Any) -> None:
    await kit.router.link.request(PreferencesPut("t", user, slot_of("t", user), json.dumps(document)))


async def rows(kit: Kit) -> list[tuple[Any, ...]]:
    """(title, state, reason) of all pushes."""
    found = await kit.db.fetch(
        "select n.content, d.state, d.reason from deliveries d"
        " join notifications n on n.id = d.notification_id order by n.seq, d.id"
    )
    return [(json.loads("{" + r[0] + "}")["title"], r[1], r[2]) for r in found]


async def change(kit: Kit, digest: bytes, op: str, item: bytes = b"", by_user: bool = False) -> int:
    message = DigestChange("t", "u", slot_of("t", "u"), digest, op, item, by_user)
    return (await kit.router.link.request(message)).count


async def open_ids(kit: Kit) -> list[bytes]:
    found = await kit.db.fetch("select distinct digest from deliveries where state = 'planned' order by 1")
    return [r[0].bytes for r in found]


async def nothing_open(kit: Kit) -> None:
    await eventually(
        lambda: kit.db.fetchval("select count(*) = 0 from deliveries where state = 'planned'"),
        what="an outbox without anything planned",
    )


async def test_what_waited_is_told_at_the_full_hour(postgres_dsn: str) -> None:
    """Live in the app at once; at the hour one push per category, in order, without what was read."""
    clock = Shifted()
    async with Kit(postgres_dsn, clock=clock, sweep_s=600.0) as kit:
        await phone(kit)
        await prefer(kit, digest="hourly")
        await kit.gateway.attach_ready(1)
        news = [make_event(category="news", title=f"news {n}") for n in range(5)]
        chat = make_event(category="chat", title="a word", collapse_key="x")
        outcomes = await kit.publish(*news, chat)
        assert {(o.status, o.reason) for o in outcomes} == {("delivered", "digest")}
        await kit.gateway.seen(1, 7)
        assert kit.gateway.seqs(1) == [1, 2, 3, 4, 5, 6]
        assert not any(frame.get("silent") for frame in kit.gateway.frames[1])
        await kit.router.link.request(Change("t", "u", slot_of("t", "u"), "read", [news[1].id]))
        assert kit.router.jobs == []
        clock.approach(kit, 500)
        await eventually(lambda: len(kit.router.jobs) == 2, what="both digests")
        assert clock.now_ms() >= clock.hour_ms
        one, several = sorted(kit.router.jobs, key=lambda job: job.count)
        assert (one.title, one.body, one.notifications) == ("a word", None, [chat.id])
        assert (several.title, several.count) == ("4 new notifications", 4)
        assert several.body == "news 4\nnews 3\nnews 2\n+1"
        assert several.notifications == [news[n].id for n in (4, 3, 2, 0)]
        assert several.collapse_key == str(uuid.UUID(bytes=news[4].id))
        assert several.digest == digest_id(key_of(UserKey("t", "u"), "news", "hourly", clock.hour_ms))
        assert await rows(kit) == [
            ("news 0", "cancelled", "told in a digest"),
            ("news 1", "cancelled", "read"),
            ("news 2", "cancelled", "told in a digest"),
            ("news 3", "cancelled", "told in a digest"),
            ("news 4", "sending", "digest"),
            ("a word", "sending", "digest"),
        ]


async def test_events_around_the_hour_make_one_digest(postgres_dsn: str) -> None:
    """Events every few milliseconds around the hour: one push, of all that were planned before."""
    clock = Shifted()
    async with Kit(postgres_dsn, clock=clock) as kit:
        await phone(kit)
        await prefer(kit, digest="hourly")
        await kit.publish(make_event(category="news"))
        clock.approach(kit, 300)
        while clock.now_ms() < clock.hour_ms + 400:
            (outcome,) = await kit.publish(make_event(category="news"))
            assert outcome.reason == "digest"
            await asyncio.sleep(0.003)
        before = await kit.db.fetchval(
            "select count(*) from deliveries where digest = $1",
            uuid.UUID(bytes=digest_id(key_of(UserKey("t", "u"), "news", "hourly", clock.hour_ms))),
        )
        await eventually(lambda: kit.router.jobs, what="the digest")
        assert [job.count for job in kit.router.jobs] == [before]
        waiting = await kit.db.fetch(
            "select due_at, count(*) from deliveries where state = 'planned' group by 1"
        )
        assert [round(r[0].timestamp() * 1000) for r in waiting] == [clock.hour_ms + HOUR_MS]
        assert before + waiting[0][1] == await kit.db.fetchval("select count(*) from deliveries")


async def test_a_digest_survives_the_shard(postgres_dsn: str) -> None:
    """Another process tells it once and at its time, although it sweeps every ten minutes."""
    clock = Shifted()
    async with Kit(postgres_dsn, clock=clock, sweep_s=600.0) as kit:
        await phone(kit)
        await prefer(kit, digest="hourly")
        await kit.publish(*(make_event(title=f"number {n}") for n in range(3)))
        await kit.shard.stop()
        await kit.start_shard("shard-a")
        kit.router = await kit.dial("shard-a", "router-1")
        clock.approach(kit, 500)
        await eventually(lambda: kit.router.jobs, what="the digest")
        assert clock.now_ms() >= clock.hour_ms
        assert [job.count for job in kit.router.jobs] == [3]


async def test_a_claim_that_was_lost_tells_the_same_digest(postgres_dsn: str) -> None:
    """Claimed by a process that died, told or not yet: the next one sends one push for all of it."""
    async with Kit(postgres_dsn) as kit:
        await phone(kit)
        for user in ("u", "v"):
            await phone(kit, user)
            await prefer(kit, user, digest="daily")
            await kit.publish(*(make_event(user, title=f"number {n}") for n in range(3)))
        await kit.db.execute(
            """update deliveries d
               set state = case when told and d.id <> last then 'cancelled' else 'sending' end,
                   attempts = 1, due_at = now() - interval '1 s',
                   carrier = case when told then last end, merged = case when told then 3 end
               from (select digest, max(id) as last from deliveries group by 1) o,
                    (select stream_id, user_id = 'v' as told from streams) s
               where s.stream_id = d.stream_id and o.digest = d.digest"""
        )
        await eventually(lambda: len(kit.router.jobs) == 2, what="both digests")
        shown = sorted((job.user, job.attempt, job.count, job.body) for job in kit.router.jobs)
        body = "number 2\nnumber 1\nnumber 0"
        assert shown == [("u", 2, 3, body), ("v", 2, 3, body)]


async def test_a_lost_claim_larger_than_a_batch_tells_one_digest(postgres_dsn: str) -> None:
    """A process died between claiming and telling: one push of all, however many batches that is."""
    async with Kit(postgres_dsn, sweep_batch=10, sweep_s=600.0) as kit:
        await phone(kit)
        await prefer(kit, digest="daily")
        await kit.publish(*(make_event(title=f"number {n}") for n in range(25)))
        await kit.db.execute(
            "update deliveries set state = 'sending', attempts = 1, due_at = now() - interval '1 s'"
        )
        kit.shards[-1]._outbox.due_now()
        await eventually(lambda: kit.router.jobs, what="the digest")
        left = "select count(*) = 0 from deliveries where carrier is null"
        await eventually(lambda: kit.db.fetchval(left), what="nothing that is not told")
        assert [(job.attempt, job.count) for job in kit.router.jobs] == [(2, 25)]


async def test_a_large_digest_is_told_whole(postgres_dsn: str) -> None:
    """Beyond the newest items the others are told by the same push, in its count, unless they are over."""
    limits = {"digest_items": 5, "digest_ids": 4}
    async with Kit(postgres_dsn, sweep_batch=3, sweep_s=600.0, push=limits) as kit:
        await phone(kit)
        await prefer(kit, digest="daily")
        events = [make_event(title=f"number {n}") for n in range(30)]
        await kit.publish(*events)
        await kit.db.execute(
            """update notifications set read_at = case when seq = 7 then now() end,
               expires_at = case when seq = 9 then now() - interval '1 s' end where seq in (7, 9)"""
        )
        await kit.db.execute("update deliveries set due_at = now() - interval '1 s'")
        kit.shards[-1]._outbox.due_now()
        await eventually(lambda: kit.router.jobs, what="the digest")
        left = (
            "select count(*) = 0 from deliveries where state <> 'cancelled' and carrier is distinct from id"
        )
        await eventually(lambda: kit.db.fetchval(left), what="nothing that is not told")
        assert [(job.title, job.count) for job in kit.router.jobs] == [("28 new notifications", 28)]
        (job,) = kit.router.jobs
        assert job.body == "number 29\nnumber 28\nnumber 27\n+25"
        assert job.notifications == [events[n].id for n in (29, 28, 27, 26)]
        ended = {title: reason for title, state, reason in await rows(kit) if state == "cancelled"}
        assert (ended.pop("number 6"), ended.pop("number 8")) == ("read", "expired")
        assert list(ended.values()) == ["told in a digest"] * 27
        told = "select merged, (select count(*) from deliveries d where d.carrier = c.id) from deliveries c"
        assert tuple(await kit.db.fetchrow(told + " where c.carrier = c.id")) == (28, 28)


async def test_preferences_hold_for_all_items_of_a_digest(postgres_dsn: str) -> None:
    """Items beyond a batch are decided again by their user's preferences, too, which are read once."""
    async with Kit(postgres_dsn, sweep_batch=2, sweep_s=600.0) as kit:
        await phone(kit)
        off = {"off": {"channels": {"push": False}}}
        await prefer(kit, digest="daily")
        await kit.publish(*(make_event(type="off" if n % 2 else "on") for n in range(10)))
        await kit.shard.stop()
        document = json.dumps({"digest": "daily", "types": off})
        await kit.db.execute("update preferences set document = $1::jsonb", document)
        await kit.db.execute("update deliveries set due_at = now() - interval '1 s'")
        await kit.start_shard("shard-a")
        kit.router = await kit.dial("shard-a", "router-1")
        await eventually(lambda: kit.router.jobs, what="the digest")
        assert [job.count for job in kit.router.jobs] == [5]


async def test_a_digest_that_cannot_be_told_holds_up_no_other(postgres_dsn: str) -> None:
    """Postgres refuses one digest of several that are due: the others and what is no digest go; it waits."""
    async with Kit(postgres_dsn, sweep_s=600.0) as kit:
        for user in ("u", "v", "w"):
            await phone(kit, user)
            await prefer(kit, user, digest="daily")
            await kit.publish(*(make_event(user) for _ in range(3)))
        await kit.db.execute(
            """create function refuse() returns trigger language plpgsql as $$ begin
                if new.carrier is not null
                    and (select user_id from streams s where s.stream_id = new.stream_id) = 'v'
                then raise 'no room' using errcode = '53100'; end if;
                return new; end $$;
                create trigger refuse before update on deliveries for each row execute function refuse();
                update deliveries set due_at = now() - interval '1 s'"""
        )
        kit.shards[-1]._outbox.due_now()
        await eventually(lambda: len(kit.router.jobs) == 2, what="the digests of the others")
        assert sorted((job.user, job.count) for job in kit.router.jobs) == [("u", 3), ("w", 3)]
        await kit.db.execute("drop trigger refuse on deliveries")
        await kit.db.execute(
            "update deliveries set due_at = now() - interval '1 s'"
            " where state = 'sending' and carrier is null"
        )
        kit.shards[-1]._outbox.due_now()
        await eventually(lambda: len(kit.router.jobs) == 3, what="the digest that waited")
        assert (kit.router.jobs[2].user, kit.router.jobs[2].count) == ("v", 3)


async def test_a_digest_that_is_flushed_goes_now(postgres_dsn: str) -> None:
    """A service's flush reaches also who looks, but not into do-not-disturb; the user's own passes that."""
    async with Kit(postgres_dsn) as kit:
        await phone(kit)
        await prefer(kit, digest="weekly")
        await kit.gateway.attach_ready(1)
        kit.gateway.link.send_nowait(ClientVisibility(1, "focused"))
        await kit.publish(make_event(title="a"), make_event(title="b"))
        kit.gateway.link.send_nowait(ClientAck(1, seq=2))
        (first,) = await open_ids(kit)
        assert await change(kit, first, "flush") == 2
        await eventually(lambda: kit.router.jobs, what="the flushed digest")
        assert kit.router.jobs.pop().body == "b\na"
        assert await change(kit, first, "flush") == 0, "it was flushed before"
        await prefer(
            kit, digest="weekly", doNotDisturbUntil=rfc3339(SystemClock().now_ms() + 8 * 24 * HOUR_MS)
        )
        await kit.publish(make_event(title="c"))
        (second,) = await open_ids(kit)
        assert await change(kit, second, "flush") == 1
        await eventually(
            lambda: kit.db.fetchval(
                "select reason = 'do_not_disturb' from deliveries where state = 'planned'"
            ),
            what="the hold",
        )
        assert kit.router.jobs == []
        assert await change(kit, second, "flush", by_user=True) == 1
        await eventually(lambda: kit.router.jobs, what="the digest that the user wants")
        assert [job.title for job in kit.router.jobs] == ["c"]
        with pytest.raises(RemoteError, match="an open digest"):
            await change(kit, bytes(16), "flush")


async def test_a_device_is_spared_that_has_shown_all_of_it(postgres_dsn: str) -> None:
    """The phone has shown the newest item alone: it gets the digest. It has shown each: it does not."""
    async with Kit(postgres_dsn) as kit:
        for user in ("u", "v"):
            await phone(kit, user)
            await prefer(kit, user, digest="daily")
            await kit.publish(*(make_event(user, title=f"number {n}") for n in range(2)))
        await kit.db.execute(
            """update deliveries d set due_at = now(), shown_on = array['phone']
               from streams s where s.stream_id = d.stream_id and user_id = 'v'"""
        )
        await kit.db.execute(
            """update deliveries d set due_at = now(), shown_on = case when n.seq = 2 then array['phone'] end
               from streams s, notifications n
               where s.stream_id = d.stream_id and user_id = 'u' and n.id = d.notification_id"""
        )
        await nothing_open(kit)
        await eventually(lambda: kit.router.jobs, what="the digest")
        reason = (
            "select reason from deliveries join streams using (stream_id) where user_id = 'v' order by id"
        )

        async def spared() -> bool:
            reasons = [r[0] for r in await kit.db.fetch(reason)]
            return reasons == ["told in a digest", "shown on every device"]

        await eventually(spared, what="the verdict about the other user")
        assert [(job.user, job.count) for job in kit.router.jobs] == [("u", 2)]


async def test_an_item_can_be_taken_out(postgres_dsn: str) -> None:
    """What was removed is not told; a digest whose items are gone, one way or another, is never sent."""
    async with Kit(postgres_dsn) as kit:
        await phone(kit)
        await prefer(kit, digest="weekly")
        some = [make_event(title=f"number {n}") for n in range(4)]
        soon = make_event(title="gone soon", expires_ms=SystemClock().now_ms() + 300)
        await kit.publish(*some, soon)
        (digest,) = await open_ids(kit)
        assert await change(kit, digest, "remove", some[0].id) == 1
        assert await change(kit, digest, "remove", some[0].id) == 0, "it is out"
        with pytest.raises(RemoteError, match="an item"):
            await change(kit, digest, "remove", bytes(16))
        for op, event in (("read", some[1]), ("archive", some[2]), ("dismiss", some[3])):
            await kit.router.link.request(Change("t", "u", slot_of("t", "u"), op, [event.id]))
        await eventually(lambda: SystemClock().now_ms() > (soon.expires_ms or 0))
        assert await change(kit, digest, "flush") == 1
        await nothing_open(kit)
        await eventually(
            lambda: kit.db.fetchval("select count(*) = 0 from deliveries where state <> 'cancelled'"),
            what="nothing to send",
        )
        assert [reason for _, _, reason in await rows(kit)] == [
            "removed", "read", "archived", "dismissed", "expired",
        ]  # fmt: skip
        assert kit.router.jobs == []


async def test_preferences_that_change_move_what_waits(postgres_dsn: str) -> None:
    """Another frequency: it waits until then, with what comes later. None at all: it is told now."""
    async with Kit(postgres_dsn) as kit:
        await phone(kit)
        await prefer(kit, digest="weekly")
        await kit.publish(make_event(title="a"))
        weekly = await open_ids(kit)
        await prefer(kit, digest={"frequency": "daily", "at": "03:21"})
        daily = await open_ids(kit)
        await kit.publish(make_event(title="b"))
        assert await open_ids(kit) == daily != weekly
        due = await kit.db.fetch("select distinct due_at from deliveries")
        assert [(r[0].hour, r[0].minute) for r in due] == [(3, 21)]
        await prefer(kit, digest="instant")
        await eventually(lambda: kit.router.jobs, what="the digest")
        assert [job.body for job in kit.router.jobs] == ["b\na"]


async def test_quiet_hours_hold_a_digest(postgres_dsn: str) -> None:
    """Decided again at its time: do-not-disturb began meanwhile, so all of it is told when that ends."""
    clock = Shifted()
    async with Kit(postgres_dsn, clock=clock) as kit:
        await phone(kit)
        await prefer(kit, digest="hourly")
        await kit.publish(make_event(title="a"), make_event(title="b"))
        await prefer(kit, digest="hourly", doNotDisturbUntil=rfc3339(clock.hour_ms + 800))
        clock.approach(kit, 200)
        await eventually(lambda: kit.router.jobs, what="the digest")
        assert [job.body for job in kit.router.jobs] == ["b\na"]
        assert clock.now_ms() >= clock.hour_ms + 800


async def test_overflow_makes_one_digest(postgres_dsn: str) -> None:
    """Over the limit, a second apart and of two categories: one push; urgent ones pass at once."""
    async with Kit(postgres_dsn) as kit:
        limits = {"user": {"count": 1, "windowS": 3600}}
        await kit.db.execute(
            "insert into tenants (tenant, client_secret, settings) values ('t', $1, $2::jsonb)",
            "x" * 32,
            json.dumps({"policy": {"limits": limits}}),
        )
        await phone(kit)
        outcomes = await kit.publish(make_event(title="first"), make_event(title="a", category="x"))
        assert [(o.status, o.reason) for o in outcomes] == [("queued", None), ("deferred", "rate_limit")]
        await asyncio.sleep(1.0)
        (late,) = await kit.publish(make_event(title="b", category="y"))
        assert late.reason == "rate_limit"
        (digest,) = await open_ids(kit)
        (urgent,) = await kit.publish(make_event(title="urgent", priority=3))
        assert urgent.status == "queued"
        assert await change(kit, digest, "flush", by_user=True) == 2
        await eventually(lambda: len(kit.router.jobs) == 3, what="the digest")
        assert [job.body for job in kit.router.jobs if job.count > 1] == ["b\na"]
        await nothing_open(kit)


TEMPLATE = {
    "params": {"count": {}, "titles": {}, "more": {}, "category": {}, "types": {}},
    "content": {
        "default": {"title": "{{ count | plural({'one': '# news', 'other': '# pieces of news'}) }}"},
        "de": {
            "title": "{{ count | plural({'one': 'Eine News', 'other': '# Neuigkeiten'}) }} ({{ category }})",
            "body": "{{ titles | join(', ') }}{% if more %} und {{ more }} mehr{% endif %}",
            "link": "https://example.com/{{ category }}",
        },
    },
}


async def test_a_digest_reaches_the_phones_in_the_users_language(postgres_dsn: str) -> None:
    """Shard, router, pools, FCM and APNs: one push per device, in its words; read, it is withdrawn."""
    async with world(postgres_dsn, {"digest_render_s": 60.0}) as kit:
        await kit.db.execute(
            "insert into tenants (tenant, client_secret, settings) values ('t', $1, $2::jsonb)",
            "x" * 32,
            json.dumps({"policy": {"digests": {"template": "digest"}}}),
        )
        await kit.db.execute(
            "insert into templates (tenant, template_id, version, document, created_by)"
            " values ('t', 'digest', 1, $1, 'test')",
            json.dumps(TEMPLATE),
        )
        await kit.devices("fcm", "apns")
        await kit.db.execute("update devices set locale = 'de-AT'")
        await prefer(kit, digest="daily")
        await kit.publish(*(make_event(title=f"number {n}", category="news") for n in range(5)))
        (digest,) = await open_ids(kit)
        assert await change(kit, digest, "flush") == 5
        await eventually(lambda: len(kit.fcm.pushes) == len(kit.apns.pushes) == 1, what="both pushes")
        ids = [str(r[0]) for r in await kit.db.fetch("select id from notifications order by seq desc")]
        phone, tablet = kit.fcm.pushes[0].payload, kit.apns.pushes[0].payload
        alert = {"title": "5 Neuigkeiten (news)", "body": "number 4, number 3, number 2 und 2 mehr"}
        assert phone["notification"] == tablet["aps"]["alert"] == alert
        assert json.loads(phone["data"]["notificationIds"]) == tablet["notificationIds"] == ids
        assert phone["data"]["link"] == tablet["link"] == "https://example.com/news"
        assert (phone["data"]["count"], tablet["count"]) == ("5", 5)
        assert phone["data"]["digestId"] == tablet["digestId"] == str(uuid.UUID(bytes=digest))
        assert phone["android"]["notification"]["tag"] == ids[0]
        newest = uuid.UUID(ids[0]).bytes
        await eventually(
            lambda: kit.db.fetchval("select count(*) = 1 from deliveries where state = 'sent'"),
            what="the outcome",
        )
        await kit.router.link.request(Change("t", "u", slot_of("t", "u"), "read", [newest]))
        await eventually(lambda: len(kit.fcm.pushes) == len(kit.apns.pushes) == 2, what="the withdrawals")
        assert kit.apns.pushes[1].payload["type"] == "WITHDRAW"
        assert (
            kit.apns.pushes[1].headers["apns-collapse-id"] == kit.apns.pushes[0].headers["apns-collapse-id"]
        )


async def test_a_template_that_fails_leaves_our_own_words(postgres_dsn: str) -> None:
    """The tenant's template is gone: the digest goes out all the same."""
    async with Kit(postgres_dsn) as kit:
        await kit.db.execute(
            "insert into tenants (tenant, client_secret, settings) values ('t', $1, $2::jsonb)",
            "x" * 32,
            json.dumps({"policy": {"digests": {"template": "none"}}}),
        )
        await phone(kit)
        await prefer(kit, digest="daily")
        await kit.publish(make_event(title="a"), make_event(title="b"))
        (digest,) = await open_ids(kit)
        await change(kit, digest, "flush")
        await eventually(lambda: kit.router.jobs, what="the digest")
        assert [(job.title, job.body) for job in kit.router.jobs] == [("2 new notifications", "b\na")]


def _like(actor: str, **more: Any) -> Any:
    """One of those that are gathered, of the category that waits."""
    return make_event(
        "u", type="post.like", category="likes", aggregate=True,
        content=f'"type":"post.like","title":"{actor}","actorId":"{actor}","targetType":"post","targetId":"1",'
        '"category":"likes","createdAt":"2026-01-01T00:00:00.000Z"',
        **more,
    )  # fmt: skip


async def test_what_a_merged_notification_has_to_tell_joins_the_digest(postgres_dsn: str) -> None:
    """It was pushed by itself once; what is merged into it waits as any push of its category, told once."""
    clock = Shifted()
    async with Kit(postgres_dsn, clock=clock, sweep_s=600.0, merge={"renotify_s": 0.0}) as kit:
        await phone(kit)
        first = _like("john")
        await kit.publish(first)
        await eventually(lambda: len(kit.router.jobs) == 1)
        await kit.db.execute("update deliveries set state = 'sent'")
        await prefer(kit, categories={"likes": {"digest": {"frequency": "hourly"}}})
        other = make_event(category="likes", title="a comment")
        outcomes = await kit.publish(_like("jane"), other, _like("jim"))
        assert [outcome.status for outcome in outcomes] == ["merged", "deferred", "merged"]
        assert await open_ids(kit) == [digest_id(key_of(UserKey("t", "u"), "likes", "hourly", clock.hour_ms))]
        assert await kit.db.fetchval("select count(*) from deliveries where state = 'planned'") == 2
        clock.approach(kit, 500)
        await eventually(lambda: len(kit.router.jobs) == 2, what="the digest")
        job = kit.router.jobs[1]
        assert (job.title, job.body) == ("2 new notifications", "a comment\njim")
        assert job.notifications == [other.id, first.id]
        await nothing_open(kit)
        assert len(kit.router.jobs) == 2


async def test_what_is_urgent_leaves_the_digest(postgres_dsn: str) -> None:
    """The other items wait on; the notification that became urgent is told at once, and by itself."""
    clock = Shifted()
    async with Kit(postgres_dsn, clock=clock, sweep_s=600.0, merge={"renotify_s": 600.0}) as kit:
        await phone(kit)
        await prefer(kit, categories={"likes": {"digest": {"frequency": "hourly"}}})
        first, other = _like("john"), make_event(category="likes", title="a comment")
        await kit.publish(first, other)
        assert kit.router.jobs == []
        (outcome,) = await kit.publish(_like("jane", priority=3))
        assert (outcome.id, outcome.status) == (first.id, "merged")
        await eventually(lambda: len(kit.router.jobs) == 1, what="the urgent one")
        assert (kit.router.jobs[0].title, kit.router.jobs[0].digest) == ("jane", b"")
        await kit.db.execute("update deliveries set state = 'sent' where state = 'sending'")
        clock.approach(kit, 500)
        await eventually(lambda: len(kit.router.jobs) == 2, what="the digest")
        assert (kit.router.jobs[1].title, kit.router.jobs[1].count) == ("a comment", 1)


async def policy(kit: Kit, **document: Any) -> None:
    await kit.db.execute(
        "insert into tenants (tenant, client_secret, settings) values ('t', $1, $2::jsonb)"
        " on conflict (tenant) do update set settings = excluded.settings",
        "x" * 32,
        json.dumps({"policy": document}),
    )


async def waits(kit: Kit) -> dict[str, tuple[bytes | None, int]]:
    """Of each user with something that waits: the digest, and when it is due."""
    found = await kit.db.fetch(
        "select s.user_id, d.digest, (extract(epoch from d.due_at) * 1000)::bigint as due_ms"
        " from deliveries d join streams s using (stream_id) where d.state = 'planned'"
    )
    return {r["user_id"]: (r["digest"] and r["digest"].bytes, r["due_ms"]) for r in found}


async def test_open_digests_follow_the_tenants_defaults(postgres_dsn: str) -> None:
    """Weekly becomes hourly: those without a word of their own move, each in one digest; then at once."""
    clock = Shifted()
    async with Kit(postgres_dsn, clock=clock, sweep_s=600.0, policy_refresh_s=0.05) as kit:
        await policy(kit, defaults={"digest": {"frequency": "weekly", "at": "08:00"}})
        for user in ("ann", "bob", "own"):
            await phone(kit, user)
        other = f"{(clock.hour_ms // HOUR_MS + 12) % 24:02}:00"  # not the hour that comes
        await prefer(kit, "own", digest={"frequency": "daily", "at": other})
        await kit.publish(
            *(
                make_event(user, category="news", title=f"{user} {n}")
                for user in ("ann", "bob", "own")
                for n in "12"
            )
        )
        before = await waits(kit)
        kit.shard._users.forget(UserKey("t", "bob"))  # not in memory
        await policy(kit, defaults={"digest": "hourly"})
        hourly = {
            user: (digest_id(key_of(UserKey("t", user), "news", "hourly", clock.hour_ms)), clock.hour_ms)
            for user in ("ann", "bob")
        }
        await eventually(lambda: _equal(waits(kit), hourly | {"own": before["own"]}), what="the move")
        assert kit.router.jobs == []
        clock.approach(kit, 500)
        await eventually(lambda: len(kit.router.jobs) == 2, what="both digests")
        assert sorted((job.user, job.title) for job in kit.router.jobs) == [
            ("ann", "2 new notifications"), ("bob", "2 new notifications"),
        ]  # fmt: skip


async def test_pages_reach_all_that_waits(postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users with more than a page, with some, and with nothing that waits: all of it follows."""
    monkeypatch.setattr(shard_digests, "PAGE", 3)
    async with Kit(postgres_dsn, sweep_s=600.0, policy_refresh_s=0.05) as kit:
        await policy(kit, defaults={"digest": {"frequency": "weekly", "at": "08:00"}})
        for n in range(7):
            await phone(kit, f"u{n}")
            if n % 2:
                await prefer(kit, f"u{n}", digest="off")
            await kit.publish(*(make_event(f"u{n}") for _ in range(1 + n)))
        weekly = set(await open_ids(kit))
        assert len(weekly) == 4
        await policy(kit, defaults={"digest": "hourly"})
        followed = "select count(*) = 0 from deliveries where digest = any ($1::uuid[])"
        ids = [uuid.UUID(bytes=raw) for raw in weekly]
        await eventually(lambda: kit.db.fetchval(followed, ids), what="the move of all")
        assert len(await open_ids(kit)) == 4


async def test_no_push_waits_for_digests_that_follow_rules(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking through a tenant's digests fails or takes long: what is due leaves all the same."""
    asked = asyncio.Event()

    async def slow(*args: Any) -> Any:
        asked.set()
        await asyncio.Event().wait()

    async with Kit(postgres_dsn, policy_refresh_s=0.05) as kit:
        monkeypatch.setattr(kit.shard._store.digests, "waiting_of", slow)
        await phone(kit)
        await policy(kit, defaults={"digest": "weekly"})
        await kit.publish(make_event())
        await policy(kit, defaults={"digest": "daily"})
        await eventually(asked.is_set, what="the look at what waits")
        await kit.db.execute("update deliveries set due_at = now() - interval '1 s'")
        await eventually(lambda: kit.router.jobs, what="the push")


async def test_without_a_default_what_waited_by_it_is_told(postgres_dsn: str) -> None:
    """The tenant wants no digests any more: what waited comes now, together; users' own digests stay."""
    async with Kit(postgres_dsn, sweep_s=600.0, policy_refresh_s=0.05) as kit:
        await policy(kit, defaults={"categories": {"news": {"digest": "daily"}}})
        for user in ("ann", "own"):
            await phone(kit, user)
        await prefer(kit, "own", digest="daily")
        await kit.publish(*(make_event(user, category="news") for user in ("ann", "ann", "own")))
        assert set(await waits(kit)) == {"ann", "own"}
        await policy(kit)
        await eventually(lambda: kit.router.jobs, what="what waited")
        assert [(job.user, job.title) for job in kit.router.jobs] == [("ann", "2 new notifications")]
        assert set(await waits(kit)) == {"own"}


async def test_defaults_that_changed_while_nobody_was_there_are_followed(postgres_dsn: str) -> None:
    """The shard was down: its successor moves what waits by the rules of before."""
    clock = Shifted()
    async with Kit(postgres_dsn, clock=clock, sweep_s=600.0, policy_refresh_s=600.0) as kit:
        await policy(kit, defaults={"digest": "daily"})
        await phone(kit)
        await kit.publish(make_event(category="news"))
        await kit.shard.stop()
        await policy(kit, defaults={"digest": "hourly"})
        await kit.start_shard("shard-a")
        kit.router = await kit.dial("shard-a", "router-1")
        await kit.publish(make_event("other"))  # the tenant's rules are read with its first user
        hourly = digest_id(key_of(UserKey("t", "u"), "news", "hourly", clock.hour_ms)), clock.hour_ms
        await eventually(lambda: _equal(waits(kit), {"u": hourly}), what="the move")


async def test_a_default_digest_is_due_where_the_user_is(postgres_dsn: str) -> None:
    """Daily at eight: in the tenant's zone, or that of the user's profile, who has no preferences."""
    async with Kit(postgres_dsn) as kit:
        await policy(
            kit, defaults={"timezone": "Europe/Vienna", "digest": {"frequency": "daily", "at": "08:00"}}
        )
        zones = {"home": "Europe/Vienna", "tokyo": "Asia/Tokyo", "lima": "America/Lima"}
        for user, zone in zones.items():
            await phone(kit, user)
            if user != "home":
                add = "insert into profiles (tenant, user_id, slot, timezone) values ('t', $1, $2, $3)"
                await kit.db.execute(add, user, slot_of("t", user), zone)
        await kit.shard.stop()  # users are read anew, with their profiles
        await kit.start_shard("shard-a")
        kit.router = await kit.dial("shard-a", "router-1")
        await kit.publish(*(make_event(user) for user in zones))
        found = await waits(kit)
        local = {
            user: datetime.fromtimestamp(due_ms / 1000, ZoneInfo(zones[user]))
            for user, (_, due_ms) in found.items()
        }
        assert {user: (at.hour, at.minute) for user, at in local.items()} == dict.fromkeys(zones, (8, 0))


async def _equal(answer: Any, wanted: Any) -> bool:
    return await answer == wanted


async def test_a_digest_whose_telling_breaks_off_is_told_whole(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between statements of one transaction: nothing is told, and after the lease all of it, once."""
    clock = Shifted()
    broken: list[int] = []

    def breaks_once(items: Any, dealt_with: Any) -> Any:
        if not broken:
            broken.append(1)
            raise StoreUnavailableError("the connection broke")
        return tell(items, dealt_with)

    monkeypatch.setattr(shard_digests, "tell", breaks_once)
    async with Kit(postgres_dsn, clock=clock, sweep_s=600.0, delivery_lease_s=30.0) as kit:
        await phone(kit)
        await prefer(kit, digest="hourly")
        await kit.publish(*(make_event(title=f"number {n}") for n in range(3)))
        clock.approach(kit, 500)
        await eventually(lambda: broken, what="the break")
        claimed = "select array_agg(distinct state || coalesce(carrier::text, '')) from deliveries"
        assert await kit.db.fetchval(claimed) == ["sending"]
        assert kit.router.jobs == []
        clock.advance(31)
        kit.shards[-1]._outbox.due_now()
        await eventually(lambda: kit.router.jobs, what="the digest")
        assert [(job.title, job.count) for job in kit.router.jobs] == [("3 new notifications", 3)]
        found = await rows(kit)
        assert [state for _, state, _ in found] == ["cancelled", "cancelled", "sending"]
