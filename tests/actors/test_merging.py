"""Merging on a real shard, real Postgres and real links: dedupe and aggregation end to end."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from typing import Any

from carillon.ids import slot_of, uuid_text
from carillon.messages import (
    Change,
    ClientAck,
    ClientResume,
    Dedupe,
    DevicePut,
    Event,
    Outcome,
    PlanQuery,
    PushOutcome,
    PushResult,
)
from carillon.notification import encode_content
from tests.actors.shard_kit import HandGateway, Kit, clock, make_event
from tests.support import eventually

numbers = itertools.count(2)


def like(actor: str, *, user: str = "u", post: str = "42", **more: Any) -> Event:
    """John liked your post."""
    members = {
        "type": "post.like", "title": f"{actor} liked your post", "actorId": actor, "targetType": "post",
        "targetId": post, "createdAt": "2026-01-01T00:00:00.000Z",
    }  # fmt: skip
    return make_event(user, type="post.like", content=encode_content(members), **({"aggregate": True} | more))


def message(title: str, merge: str, *, key: str | None = "chat", **more: Any) -> Event:
    """One of several that are alike."""
    return make_event(title=title, dedupe=Dedupe(merge, key), **more)


def phone(user: str = "u") -> DevicePut:
    return DevicePut("t", user, slot_of("t", user), "phone", "android", "fcm", "token", f"tok-{user}", "app")


async def rows(kit: Kit) -> list[dict[str, Any]]:
    """The notifications by seq, their content decoded."""
    found = await kit.db.fetch("select * from notifications order by stream_id, seq")
    return [dict(row) | {"content": json.loads(f"{{{row['content']}}}")} for row in found]


def told(gateway: HandGateway, conn: int, kind: str) -> list[dict[str, Any]]:
    return [frame for frame in gateway.frames.get(conn, []) if frame["type"] == kind]


async def read(kit: Kit, *ids: bytes, op: str = "read") -> None:
    await kit.router.link.request(Change("t", "u", slot_of("t", "u"), op, list(ids)))


async def taken(kit: Kit, job: Any) -> None:
    """The provider takes a push."""
    result = PushResult("phone", "sent", "m", 200, started_ms=1, duration_ms=1.0)
    await kit.router.link.request(
        PushOutcome(job.delivery, job.attempt, "t", job.user, job.slot, job.notification, "fcm", [result])
    )


async def test_likes_of_one_post_are_one_notification_that_moves_to_the_top(postgres_dsn: str) -> None:
    """Live devices see it grow in place: same id and seq, newest actor first; unread stays as it is."""
    async with Kit(postgres_dsn) as kit:
        await kit.gateway.attach_ready(1)
        first, other = like("john"), make_event(title="something else")
        (one,) = await kit.publish(first)
        (between,) = await kit.publish(other)
        (two,), (again,) = await kit.publish(like("jane")), await kit.publish(like("john"))
        assert (one.status, between.status) == ("delivered", "delivered")
        for outcome in (two, again):
            assert (outcome.status, outcome.id, outcome.seq) == ("merged", first.id, 1)
            assert outcome.reason == "aggregate"
        await eventually(lambda: len(told(kit.gateway, 1, "NOTIFICATION_UPDATED")) == 2)
        assert kit.gateway.seqs(1) == [1, 2]
        frame = told(kit.gateway, 1, "NOTIFICATION_UPDATED")[-1]
        shown = frame["notification"]
        assert (shown["id"], shown["seq"], shown["count"]) == (uuid_text(first.id), 1, 2)
        assert shown["actors"] == [{"id": "john"}, {"id": "jane"}]
        assert shown["aggregationKey"] == "post.like:post:42"
        assert shown["createdAt"] == "2026-01-01T00:00:00.000Z"
        assert frame["silent"] is True  # within the time in which it may not disturb again
        merged, plain = await rows(kit)
        assert (merged["seq"], merged["rev"], merged["position"]) == (1, 4, 4)
        assert merged["position"] > plain["position"]
        assert tuple(await kit.db.fetchrow("select seq, rev, unread from streams")) == (2, 4, 2)


async def test_a_batch_that_makes_a_notification_merges_into_it(postgres_dsn: str) -> None:
    """One row from the first, whoever follows in the same batch; no change frame is needed for it."""
    async with Kit(postgres_dsn) as kit:
        await kit.gateway.attach_ready(1)
        events = [like(f"a{n}") for n in range(12)]
        outcomes = await kit.publish(*events[:6], make_event(title="between"), *events[6:])
        assert [o.status for o in outcomes].count("merged") == 11
        assert {o.id for o in outcomes if o.status == "merged"} == {events[0].id}
        assert {o.seq for o in outcomes if o.status == "merged"} == {1}
        merged, _ = await rows(kit)
        assert (merged["content"]["count"], len(merged["content"]["actors"])) == (12, 10)
        assert merged["content"]["actors"][0] == {"id": "a11"}
        frames = await kit.gateway.seen(1, 3)
        assert [f["notification"].get("count") for f in frames[1:]] == [12, None]
        assert not told(kit.gateway, 1, "NOTIFICATION_UPDATED")


async def test_after_it_was_read_a_new_notification_begins(postgres_dsn: str) -> None:
    """Read, archived and dismissed end a window; a drop looks at time alone."""
    async with Kit(postgres_dsn) as kit:
        (one,) = await kit.publish(like("john"))
        (dropped,) = await kit.publish(message("hello", "drop", key="d"))
        for op in ("read", "archive", "dismiss", "click"):
            await read(kit, one.id, op=op)
            (two,) = await kit.publish(like("jane"))
            assert two.status == "stored"
            (three,) = await kit.publish(like("jim"))
            assert (three.status, three.id) == ("merged", two.id)
            one = two
        await read(kit, dropped.id)
        (same,) = await kit.publish(message("hello", "drop", key="d"))
        assert (same.status, same.id, same.seq) == ("duplicate", dropped.id, 2)
        assert await kit.db.fetchval("select count(*) from notifications") == 6


async def test_what_each_way_of_merging_makes_of_three_events(postgres_dsn: str) -> None:
    """drop keeps the first, count and replace show the newest, accumulate has them all."""
    async with Kit(postgres_dsn) as kit:
        seen: dict[str, Any] = {}
        for merge in ("drop", "count", "replace", "accumulate"):
            events = [message(f"{merge} {n}", merge, key=merge) for n in range(3)]
            (first,), *rest = [await kit.publish(event) for event in events]
            status = "duplicate" if merge == "drop" else "merged"
            assert {(o.status, o.id) for (o,) in rest} == {(status, first.id)}
            seen[merge] = (await rows(kit))[-1]["content"]
        assert (seen["drop"]["title"], seen["drop"].get("count")) == ("drop 0", None)
        assert (seen["count"]["title"], seen["count"]["count"]) == ("count 2", 3)
        assert (seen["replace"]["title"], seen["replace"]["count"]) == ("replace 2", 3)
        items = seen["accumulate"]["data"]["items"]
        assert [item["title"] for item in items] == ["accumulate 0", "accumulate 1", "accumulate 2"]
        # Without a key: the same type, title, body and target.
        same = [message("same", "drop", key=None) for _ in range(2)]
        outcomes = await kit.publish(*same, message("not the same", "drop", key=None))
        assert [o.status for o in outcomes] == ["stored", "duplicate", "stored"]


async def test_a_retry_of_a_merged_event_counts_once(postgres_dsn: str) -> None:
    """Tried again with its mark, in the same batch or after: the answer of the first try, and no change."""
    async with Kit(postgres_dsn) as kit:
        first, second = like("john"), like("jane", aggregate=True)
        await kit.publish(first)
        (one,) = await kit.publish(second)
        dup = message("x", "drop", key="d")
        await kit.publish(message("x", "drop", key="d"))
        (dropped,) = await kit.publish(dup)
        second.retry = dup.retry = True
        (two,), (three,), (four,) = await asyncio.gather(
            kit.publish(second), kit.publish(second), kit.publish(dup)
        )
        assert (two.status, two.id, two.seq) == (three.status, three.id, three.seq) == ("merged", one.id, 1)
        assert (four.status, four.id, four.seq) == ("duplicate", dropped.id, 2)
        # Read since: the retry is still the same event, not the first of a new notification.
        await read(kit, one.id)
        (late,) = await kit.publish(second)
        assert (late.status, late.id) == ("merged", one.id)
        assert (await rows(kit))[0]["content"]["count"] == 2
        assert await kit.db.fetchval("select count(*) from notifications") == 2


async def test_an_idempotency_key_of_a_merged_event_stands_for_what_it_became_part_of(
    postgres_dsn: str,
) -> None:
    """A replay answers merged into the same notification, another body is a conflict."""
    async with Kit(postgres_dsn) as kit:
        digest = hashlib.sha256(b"1").digest()
        (first,) = await kit.publish(like("john"))
        (one,) = await kit.publish(like("jane", idempotency_key="e:k", body_hash=digest))
        (two,) = await kit.publish(like("jane", idempotency_key="e:k", body_hash=digest))
        assert (one.status, one.id, one.replayed) == ("merged", first.id, False)
        assert (two.status, two.id, two.seq, two.replayed) == ("merged", first.id, 1, True)
        other = like("jane", idempotency_key="e:k", body_hash=hashlib.sha256(b"2").digest())
        (three,) = await kit.publish(other)
        assert three.code == "idempotency_conflict"
        # A taken key rolls the batch back: what is merged beside it is merged once.
        again = like("jane", idempotency_key="e:k", body_hash=digest)
        outcomes = await kit.publish(like("jim"), again, like("joe"))
        assert [o.status for o in outcomes] == ["merged"] * 3
        assert (await rows(kit))[0]["content"]["count"] == 4


async def test_windows_survive_the_shard(postgres_dsn: str) -> None:
    """A restarted shard goes on with the window, and counts no actor twice."""
    async with Kit(postgres_dsn) as kit:
        first = like("john")
        await kit.publish(first, like("jane"))
        await restarted(kit)
        outcomes = await kit.publish(like("jane"), like("jim"))
        assert {(o.status, o.id) for o in outcomes} == {("merged", first.id)}
        (row,) = await rows(kit)
        assert row["content"]["count"] == 3
        assert [actor["id"] for actor in row["content"]["actors"]] == ["jim", "jane", "john"]


async def restarted(kit: Kit) -> None:
    """A shard that begins anew and knows nothing."""
    await kit.shard.stop()
    kit.coordinator.joined.pop("shard-a", None)
    kit.shard = await kit.start_shard("shard-a")
    kit.router = await kit.dial("shard-a", f"router-{next(numbers)}")


async def test_windows_that_have_no_rows_survive_the_shard(postgres_dsn: str) -> None:
    """Nothing was written but the notifications, and the next shard finds their windows all the same.

    What is merged then makes the rows, of the time at which the window began.
    """
    async with Kit(postgres_dsn) as kit:
        once = message("a", "drop", key=None)
        both = like("joan", post="7", dedupe=Dedupe("drop", "joan:7"))
        first, counted = like("john"), message("b", "count")
        await kit.publish(first, once, both, counted, make_event())
        tables = "select (select count(*) from merge_windows), (select count(*) from merged_events)"
        assert tuple(await kit.db.fetchrow(tables)) == (0, 0)
        await restarted(kit)
        outcomes = await kit.publish(
            like("john"), like("jane"), message("a", "drop", key=None), message("c", "count"),
            like("joan", post="7", dedupe=Dedupe("drop", "joan:7")), like("jim", post="7"),
        )  # fmt: skip
        assert [(o.status, o.id) for o in outcomes] == [
            ("merged", first.id), ("merged", first.id), ("duplicate", once.id), ("merged", counted.id),
            ("duplicate", both.id), ("merged", both.id),
        ]  # fmt: skip
        found = {bytes(row["id"].bytes): row["content"] for row in await rows(kit)}
        assert [found[e.id].get("count") for e in (first, counted, both, once)] == [2, 2, 2, None]
        assert [actor["id"] for actor in found[first.id]["actors"]] == ["jane", "john"]
        assert tuple(await kit.db.fetchrow(tables)) == (3, 9)
        assert await kit.db.fetchval(
            "select bool_and(n.id = e.event_id"
            " and e.at = to_timestamp((n.merging::json ->> 1)::float8 / 1000))"
            " from merged_events e join notifications n on n.id = e.notification_id where e.status = 'opened'"
        )
        await restarted(kit)
        (more,) = await kit.publish(like("jack"))
        assert (more.status, more.id) == ("merged", first.id)
        assert (await rows(kit))[0]["content"]["count"] == 3


async def test_a_window_that_was_closed_gives_way_to_the_next(postgres_dsn: str) -> None:
    """Read before its time was over: the next begins anew, and whoever takes over finds that one alone."""
    async with Kit(postgres_dsn) as kit:
        one, two = like("john"), like("jane")
        await kit.publish(one)
        await read(kit, one.id)
        (new,) = await kit.publish(two)
        assert (new.status, new.id) == ("stored", two.id)
        for name in ("jim", "joe"):
            await restarted(kit)
            (grown,) = await kit.publish(like(name))
            assert (grown.status, grown.id) == ("merged", two.id)
        found = "select count(*) filter (where merge_slot is null), count(*) from notifications"
        assert tuple(await kit.db.fetchrow(found)) == (2, 2)
        assert (await rows(kit))[1]["content"]["count"] == 3


async def test_one_batch_begins_windows_that_give_way_to_each_other(postgres_dsn: str) -> None:
    """What the user wants nothing of takes in nothing that is wanted: the later of them has the window."""
    async with Kit(postgres_dsn) as kit:
        await kit.db.execute(
            "insert into preferences (tenant, user_id, document) values ('t', 'u', $1)",
            json.dumps({"categories": {"muted": {"in_app": False}}}),
        )
        muted = message("a", "count", category="muted")
        wanted, more = message("b", "count"), message("c", "count")
        outcomes = await kit.publish(muted, wanted, more)
        assert [o.id for o in outcomes] == [muted.id, wanted.id, wanted.id]
        await restarted(kit)
        (last,) = await kit.publish(message("d", "count"))
        assert (last.status, last.id) == ("merged", wanted.id)


async def test_who_was_away_gets_what_it_has_become(postgres_dsn: str) -> None:
    """RESUME tells of the change; whoever never had it gets it as it is now."""
    async with Kit(postgres_dsn, recent_window=0) as kit:
        welcome = await kit.gateway.attach_ready(1)
        await kit.publish(like("john"))
        await kit.publish(like("jane"))
        await eventually(lambda: told(kit.gateway, 1, "NOTIFICATION_UPDATED"))
        kit.gateway.attach(2)
        kit.gateway.attach(3)
        await kit.gateway.seen(3, 1)
        kit.gateway.link.send_nowait(ClientResume(2, welcome["epoch"], 1, 1))
        kit.gateway.link.send_nowait(ClientResume(3, welcome["epoch"], 0, 0))
        await eventually(lambda: told(kit.gateway, 2, "NOTIFICATION_UPDATED"))
        assert told(kit.gateway, 2, "NOTIFICATION_UPDATED")[0]["notification"]["count"] == 2
        await eventually(lambda: told(kit.gateway, 3, "NEW_NOTIFICATION"))
        (new,) = told(kit.gateway, 3, "NEW_NOTIFICATION")
        assert (new["notification"]["seq"], new["notification"]["count"]) == (1, 2)
        update = next(w for w in kit.gateway.writes[2] if b"UPDATED" in w.frame)
        assert update.update  # whoever named no subprotocol gets it as NEW_NOTIFICATION


async def test_a_phone_is_disturbed_no_more_often_than_the_rule_says(postgres_dsn: str) -> None:
    """A push for the first, one for all that came meanwhile: the same collapse key, the newest text."""
    renotify_s = 1.0
    async with Kit(postgres_dsn, merge={"renotify_s": renotify_s}) as kit:
        await kit.router.link.request(phone())
        first = like("a0")
        began = clock.monotonic()
        await kit.publish(first)
        await eventually(lambda: kit.router.jobs)
        await taken(kit, kit.router.jobs[0])
        for n in range(1, 30):
            (outcome,) = await kit.publish(like(f"a{n}"))
            assert outcome.status == "merged"
        await eventually(lambda: kit.router.jobs[-1].title == "a29 liked your post")
        took_s = clock.monotonic() - began
        assert 2 <= len(kit.router.jobs) <= 1 + took_s / renotify_s
        assert {job.collapse_key for job in kit.router.jobs} == {uuid_text(first.id)}
        assert kit.router.jobs[0].title == "a0 liked your post"
        for job in kit.router.jobs[1:]:
            await taken(kit, job)
        states = await kit.db.fetch("select state from deliveries")
        assert [row["state"] for row in states] == ["sent"] * len(kit.router.jobs)


async def test_urgent_ones_are_pushed_at_once(postgres_dsn: str) -> None:
    """What is urgent waits for nothing, and takes over the push that waits."""
    async with Kit(postgres_dsn, merge={"renotify_s": 600}) as kit:
        await kit.router.link.request(phone())
        await kit.publish(like("a"))
        await eventually(lambda: len(kit.router.jobs) == 1)
        await kit.publish(like("b"))
        await kit.publish(like("c", priority=3))
        await eventually(lambda: len(kit.router.jobs) == 2)
        assert kit.router.jobs[1].priority == 3
        assert await kit.db.fetchval("select count(*) from deliveries") == 2


async def test_an_acknowledged_update_needs_no_push(postgres_dsn: str) -> None:
    """The device that shows the grown notification acknowledges it by id: no push of it."""
    async with Kit(postgres_dsn, ack_window_s=0.5, merge={"renotify_s": 0.0}) as kit:
        await kit.router.link.request(phone())
        await kit.gateway.attach_ready(1)
        first = like("a")
        await kit.publish(first)
        kit.gateway.link.send_nowait(ClientAck(1, seq=1))
        await eventually(lambda: kit.db.fetchval("select state = 'cancelled' from deliveries"))
        await kit.publish(like("b"))
        await kit.gateway.seen(1, 3)
        kit.gateway.link.send_nowait(ClientAck(1, ids=[first.id]))
        cancelled = (
            "select count(*) = 2 from deliveries where state = 'cancelled' and reason = 'acknowledged'"
        )
        await eventually(lambda: kit.db.fetchval(cancelled))
        await kit.publish(like("c"))  # and one that nobody acknowledges is pushed
        await eventually(lambda: kit.router.jobs)
        assert kit.router.jobs[0].title == "c liked your post"


async def test_an_update_is_acknowledged_by_the_revision_that_is_shown(postgres_dsn: str) -> None:
    """A cumulative acknowledgement ends the push of an update that is shown, and no other's."""
    async with Kit(postgres_dsn, ack_window_s=600.0, merge={"renotify_s": 0.0}) as kit:
        await kit.router.link.request(phone())
        await kit.gateway.attach_ready(1)
        await kit.publish(like("a"))
        kit.gateway.link.send_nowait(ClientAck(1, seq=1, rev=1))
        ended = (
            "select (select count(*) from deliveries where state = 'cancelled' and reason = 'acknowledged')"
            " + (select count(*) from notifications where left(kept, 1) = '-')"
        )
        await eventually(lambda: said(kit, ended, 1))
        await kit.publish(like("b"))
        await kit.gateway.seen(1, 3)
        kit.gateway.link.send_nowait(ClientAck(1, seq=1, rev=1))  # of before: "b" is not on the screen
        await kit.publish(make_event())
        kit.gateway.link.send_nowait(ClientAck(1, seq=2, rev=1))
        await eventually(lambda: said(kit, ended, 2))
        waits = (
            "select n.seq from deliveries d join notifications n on n.id = notification_id where state = $1"
        )
        assert await kit.db.fetchval(waits, "planned") == 1
        kit.gateway.link.send_nowait(ClientAck(1, seq=2, rev=3))
        await eventually(lambda: said(kit, ended, 3))


async def test_a_position_acknowledges_the_updates_that_it_covers(postgres_dsn: str) -> None:
    """A stream or poll that goes on from (seq, rev) shows what was updated up to rev, and no more."""
    async with Kit(postgres_dsn, ack_window_s=600.0, merge={"renotify_s": 0.0}) as kit:
        await kit.router.link.request(phone())
        await kit.gateway.attach_ready(1)
        await kit.publish(like("a"))
        await kit.publish(like("b"))
        epoch = await kit.db.fetchval("select epoch from streams")
        kit.gateway.attach(2, epoch=epoch, last_seq=1, last_rev=1, began_seq=1)
        await kit.gateway.seen(2, 1)
        ended = "select array_agg(reason order by id) from deliveries where state = 'cancelled'"
        delivered = "select delivered_at is not null from notifications"
        await eventually(lambda: said(kit, delivered, True))
        assert await kit.db.fetchval(ended) is None
        kit.gateway.attach(3, epoch=epoch, last_seq=1, last_rev=2, began_seq=1)
        await eventually(lambda: said(kit, ended, ["acknowledged"]))


async def said(kit: Kit, query: str, answer: object) -> bool:
    return await kit.db.fetchval(query) == answer


async def test_a_hundred_likes_at_once_are_one_notification_with_one_push(postgres_dsn: str) -> None:
    """From many requests at the same time: the count is that of the actors, and nothing is lost."""
    async with Kit(postgres_dsn) as kit:
        await kit.router.link.request(phone())
        await kit.gateway.attach_ready(1, "other")
        requests = [kit.publish(like(f"a{n}"), make_event("other")) for n in range(100)]
        outcomes: list[Outcome] = [o for answers in await asyncio.gather(*requests) for o in answers[:1]]
        assert sorted(o.status for o in outcomes) == ["merged"] * 99 + ["queued"]
        assert len({o.id for o in outcomes}) == 1
        row = next(row for row in await rows(kit) if row["type"] == "post.like")
        assert (row["content"]["count"], len(row["content"]["actors"])) == (100, 10)
        assert await kit.db.fetchval("select count(*) from merged_events") == 100
        await eventually(lambda: kit.router.jobs)
        assert len(kit.router.jobs) == 1
        assert await kit.db.fetchval("select count(*) from deliveries") <= 2


async def test_poison_among_events_that_are_merged_fails_alone(postgres_dsn: str) -> None:
    """PostgreSQL refuses one event: the others are merged as if it had not been there."""
    async with Kit(postgres_dsn) as kit:
        await kit.publish(like("first"))
        events = [like(f"a{n}") for n in range(9)]
        bad = {"type": "post.like", "title": "a\x00b", "actorId": "x", "targetType": "post", "targetId": "42"}
        events[4].content = encode_content(bad)
        events[7].content = '"title":"\x00"'
        outcomes = await kit.publish(*events)
        good = [o.status for n, o in enumerate(outcomes) if n not in (4, 7)]
        assert good == ["merged"] * 7
        assert outcomes[7].status == "failed"
        row = (await rows(kit))[0]
        assert row["content"]["count"] >= 8
        assert row["rev"] == await kit.db.fetchval("select rev from streams")


async def test_a_fenced_shard_merges_nothing(postgres_dsn: str) -> None:
    """Its term is over: `moved`, and the notification stays as it was."""
    async with Kit(postgres_dsn) as kit:
        await kit.publish(like("john"))
        await kit.new_term("shard-a")
        (outcome,) = await kit.publish(like("jane"))
        assert outcome.status == "moved"
        assert (await rows(kit))[0]["content"]["count"] == 1
        assert await kit.db.fetchval("select count(*) from merged_events") == 0


async def test_a_tenants_rule_merges_what_does_not_ask(postgres_dsn: str) -> None:
    """By type, in the tenant's words and the user's language; an event may decline."""
    policy = {
        "merge": {
            "post.like": {
                "how": "aggregate",
                "texts": {
                    "default": {
                        "title": {
                            "=2": "{actor} and {actor2} liked your post",
                            "other": "{actor} and {others} others liked your post",
                        }
                    },
                    "de": {"title": "{actor} und {others} weitere mögen deinen Beitrag"},
                },
            },
            "test": {"how": "count", "texts": {"default": {"title": {"other": "{count} new: {title}"}}}},
        }
    }
    async with Kit(postgres_dsn) as kit:
        await kit.db.execute(
            "insert into tenants (tenant, client_secret, settings) values ('t', $1, $2)",
            "s" * 32, json.dumps({"policy": policy}),
        )  # fmt: skip
        german = DevicePut(
            "t",
            "g",
            slot_of("t", "g"),
            "phone",
            "android",
            "fcm",
            "token",
            "tok",
            "app",
            "production",
            "de_AT",
        )
        await kit.router.link.request(german)
        await kit.publish(*[like(name, aggregate=None) for name in ("John", "Jane")])
        assert [row["content"]["title"] for row in await rows(kit)] == ["Jane and John liked your post"]
        await kit.publish(like("Jim", aggregate=None))
        assert [row["content"]["title"] for row in await rows(kit)] == ["Jim and 2 others liked your post"]
        (alone,) = await kit.publish(like("Joe", aggregate=False))
        assert alone.status == "stored"
        await kit.publish(*[like(name, user="g", aggregate=None) for name in ("Anna", "Eva")])
        title = "select content::text from notifications n join streams using (stream_id) where user_id = 'g'"
        assert "Eva und 1 weitere" in await kit.db.fetchval(title)
        await kit.publish(make_event("m", title="hi"), make_event("m", title="hi"))
        title = title.replace("'g'", "'m'")
        assert '"title":"2 new: hi"' in await kit.db.fetchval(title)


async def test_who_switched_it_off_gets_one_row_filed_away(postgres_dsn: str) -> None:
    """Nothing in the app, one notification all the same, and no frame of it."""
    async with Kit(postgres_dsn) as kit:
        await kit.gateway.attach_ready(1)
        await kit.db.execute(
            "insert into preferences (tenant, user_id, document) values ('t', 'v', $1)",
            json.dumps({"types": {"post.like": {"in_app": False}}}),
        )
        await kit.gateway.attach_ready(2, "v")
        await kit.publish(like("a", user="v"))
        await kit.publish(like("b", user="v"))
        await kit.publish(make_event("v"))
        await kit.gateway.seen(2, 2)
        assert [f["type"] for f in kit.gateway.frames[2]] == ["WELCOME", "NEW_NOTIFICATION"]
        merged, _ = await rows(kit)
        assert (merged["content"]["count"], merged["archived_at"] is None) == (2, False)


async def test_a_dry_run_says_what_it_would_be_merged_into(postgres_dsn: str) -> None:
    """Into which notification, with what count and title; nothing is done."""
    async with Kit(postgres_dsn) as kit:

        async def plan(event: Event) -> dict[str, Any]:
            reply = await kit.router.link.request(PlanQuery("t", "u", slot_of("t", "u"), event))
            return json.loads(reply.document)

        assert "merge" not in await plan(make_event())
        told = await plan(like("john"))
        assert (told["status"], told["merge"]["status"]) == ("stored", "opened")
        first = like("john")
        await kit.publish(first)
        told = await plan(like("jane"))
        assert told["status"] == "merged"
        assert told["merge"]["into"] == {"id": uuid_text(first.id), "seq": 1}
        assert (told["merge"]["count"], told["merge"]["title"]) == (2, "jane liked your post")
        assert told["merge"]["words"].startswith(f"It would be merged into {uuid_text(first.id)}: ")
        assert (await rows(kit))[0]["content"]["count"] == 1
