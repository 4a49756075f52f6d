"""Events beyond their tenant's rate, on a real shard and real Postgres: in the feed alone, or in a digest."""

from __future__ import annotations

import json

from carillon.limits import ALONE
from tests.actors.shard_kit import Kit, make_event
from tests.actors.test_digests import phone
from tests.support import eventually

COLLECT_MS = 60_000


async def test_a_digest_of_what_exceeds_the_rate_is_told_once(postgres_dsn: str) -> None:
    """Of a user without preferences and a tenant without rules: what comes beyond the rate waits in one
    digest, due when the first of it has waited for long enough, and is one push then; urgent ones go at once.
    What comes after that begins another."""
    async with Kit(postgres_dsn) as kit:
        await phone(kit)
        outcomes = await kit.publish(make_event(title="a", over=COLLECT_MS), make_event(title="within"))
        assert [(o.status, o.reason) for o in outcomes] == [("deferred", "tenant_limit"), ("queued", None)]
        kit.skip(30)
        events = [
            make_event(title="b", category="x", over=COLLECT_MS),
            make_event(priority=3, over=COLLECT_MS),
        ]
        later, urgent = await kit.publish(*events)
        assert (later.status, urgent.status) == ("deferred", "queued")
        due = await kit.db.fetch("select distinct due_at, digest from deliveries where digest is not null")
        assert len(due) == 1
        assert await kit.db.fetchval("select count(*) from notifications where archived_at is null") == 4
        await eventually(lambda: len(kit.router.jobs) == 2, what="what did not wait")
        kit.skip(31)
        # Beside it come those of before again: nobody told their outcome.
        await eventually(lambda: any(job.count > 1 for job in kit.router.jobs), what="the digest")
        assert [(job.count, job.body) for job in kit.router.jobs if job.count > 1][:1] == [(2, "b\na")]
        (again,) = await kit.publish(make_event(title="c", over=COLLECT_MS))
        assert again.status == "deferred"
        opened = await kit.db.fetchval(
            "select digest from deliveries where digest is not null and state = 'planned'"
        )
        assert opened != due[0]["digest"]


async def test_what_exceeds_the_rate_is_shown_without_a_sound(postgres_dsn: str) -> None:
    """Somebody is there: sockets show it, in order and silently, and nothing leaves the system; nor when
    nobody acknowledges it."""
    async with Kit(postgres_dsn, ack_window_s=5.0) as kit:
        await phone(kit)
        await kit.gateway.attach_ready(1)
        outcomes = await kit.publish(*(make_event(over=over) for over in (0, ALONE, ALONE)))
        assert [(o.status, o.reason) for o in outcomes] == [
            ("delivered", None), ("delivered", "tenant_limit"), ("delivered", "tenant_limit"),
        ]  # fmt: skip
        frames = await kit.gateway.seen(1, 4)
        assert [frame.get("silent", False) for frame in frames[1:]] == [False, True, True]
        assert kit.gateway.seqs(1) == [1, 2, 3]
        kit.skip(6)
        await eventually(lambda: len(kit.router.jobs) == 1, what="the push of the first one")
        kit.skip(3600)
        assert await kit.db.fetchval("select count(distinct notification_id) from deliveries") == 1
        decisions = await kit.db.fetch("select decision from notifications order by seq")
        assert [row["decision"] and json.loads(row["decision"])[0][0] for row in decisions] == [
            None, "tenant_limit", "tenant_limit",
        ]  # fmt: skip
