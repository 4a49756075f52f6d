"""One tenant's flood beside another tenant's single event, on a real shard and a real Postgres."""

from __future__ import annotations

from carillon.ids import uuid_text
from carillon.messages import Publish
from tests.actors.shard_kit import Kit, make_event

FLOOD = 3000


async def test_a_flood_delays_another_tenant_by_batches_not_by_its_length(postgres_dsn: str) -> None:
    """3,000 events of one tenant are queued before one of another: that is stored among the first of them.
    The flood is stored whole and in order, and so are several events of the other tenant's user."""
    async with Kit(postgres_dsn, max_batch=100) as kit:
        await kit.publish(make_event("loud", "noisy"), make_event("calm", "quiet"))  # both are known
        flood = kit.router.link.request_nowait(Publish([make_event("loud", "noisy") for _ in range(FLOOD)]))
        events = [make_event("calm", "quiet") for _ in range(3)]
        outcomes = await kit.publish(*events)
        assert [outcome.seq for outcome in outcomes] == [2, 3, 4]
        outcomes = (await flood).outcomes
        assert [outcome.seq for outcome in outcomes] == list(range(2, FLOOD + 2))
        # Transactions are numbered in the order of their commits here: one writer, one after the other.
        before = await kit.db.fetchval(
            "select count(*) from notifications n where n.xmin::text::bigint <"
            " (select q.xmin::text::bigint from notifications q where q.id = $1::text::uuid)",
            uuid_text(events[0].id),
        )
        assert before < FLOOD / 2


async def test_a_tenant_has_its_share_of_the_queue(postgres_dsn: str) -> None:
    """What exceeds the share is busy, temporarily; another tenant still has room."""
    async with Kit(postgres_dsn, max_batch=10, tenant_queue=50, max_queue=80) as kit:
        await kit.publish(make_event("loud", "noisy"), make_event("calm", "quiet"))
        flood = kit.router.link.request_nowait(Publish([make_event("loud", "noisy") for _ in range(70)]))
        (outcome,) = await kit.publish(make_event("calm", "quiet"))
        assert outcome.seq == 2
        outcomes = (await flood).outcomes
        refused = [one for one in outcomes if one.status == "failed"]
        assert len(refused) == 20
        assert {(one.code, one.retry_after_s) for one in refused} == {("busy", 1.0)}
        assert "share" in refused[0].detail
        assert await kit.db.fetchval("select count(*) from notifications") == 2 + 50 + 1
