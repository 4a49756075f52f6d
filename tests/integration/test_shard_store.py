"""What a shard asks of PostgreSQL, on a real one: fence, keys, outbox, partitions."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest

from carillon.errors import FencedError
from carillon.ids import UserKey, Uuid7Source, slot_of
from carillon.messages import Event, PushTarget
from carillon.settings import PostgresSettings
from stores.postgres.migrate import ensure_partitions, month_bounds
from stores.postgres.named import load_queries
from stores.postgres.shard_documents import UserDocuments
from stores.postgres.shard_outbox import Outbox
from stores.postgres.shard_rows import (
    AppendRow,
    AttemptRow,
    CarrierRow,
    KeysTakenError,
    OutboxRow,
    ReleaseRow,
    ReplayRow,
    SettleRow,
    SignalRow,
    UserRecord,
)
from stores.postgres.shard_store import ShardStore
from tests.support import eventually

NOW = 1_800_000_000_000
ids = Uuid7Source()
KEY = UserKey("t", "u")
SLOT = slot_of(*KEY)


class Kit:
    """A store under a term, a plain connection beside it, one user."""

    db: asyncpg.Connection
    user: UserRecord

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.term = 0
        self.store = ShardStore(PostgresSettings(dsn=dsn), "shard-a")

    async def __aenter__(self) -> Kit:
        self.db = await asyncpg.connect(self.dsn)
        await self.store.open()
        self.term = await self.bump()
        (self.user,) = await self.store.load_users(self.term, [(KEY, SLOT, "e1")])
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.store.close()
        await self.db.close()

    async def bump(self) -> int:
        """Take the slots away: a new term."""
        return await self.db.fetchval(
            "insert into shards (shard, term, node, incarnation) values ('shard-a', 1, 'n', 'i')"
            " on conflict (shard) do update set term = shards.term + 1 returning term"
        )

    @contextlib.asynccontextmanager
    async def other(self) -> AsyncIterator[asyncpg.Connection]:
        """One more connection."""
        connection = await asyncpg.connect(self.dsn)
        try:
            yield connection
        finally:
            await connection.close()

    def event(self, **more: Any) -> Event:
        fields: dict[str, Any] = {
            "id": ids.next(NOW), "tenant": "t", "user": "u", "slot": SLOT, "type": "x", "category": None,
            "priority": 1, "content": '"type":"x"', "created_ms": NOW,
        }  # fmt: skip
        return Event(**(fields | more))

    async def append(self, *events: Event, due_ms: int | None = None, keys: bool = False) -> list[int]:
        """Append events of the one user; with `due_ms` each with an outbox row, whose ids are returned."""
        stream, last = self.user.stream_id, len(events) - 1
        numbers = await self.store.draw_delivery_ids(len(events)) if due_ms is not None else []
        outbox = [
            OutboxRow(number, e.id, stream, SLOT, False, due_ms or 0)
            for number, e in zip(numbers, events, strict=False)
        ]
        rows = [AppendRow(e, stream, last - n) for n, e in enumerate(events)]
        since_ms = NOW - 86_400_000
        await self.store.append(
            self.term, {stream: len(events)}, rows, outbox, NOW, events if keys else (), since_ms
        )
        return numbers

    async def state(self) -> str:
        """Everything in the tables that a shard writes, as text."""
        tables = (
            "streams", "notifications", "deliveries", "delivery_attempts", "devices", "preferences",
            "idempotency_keys", "revoked_tokens",
        )  # fmt: skip
        rows = {t: await self.db.fetchval(f"select json_agg(x)::text from {t} x") for t in tables}
        return json.dumps(rows, sort_keys=True)


def target(token: str = "new") -> PushTarget:
    return PushTarget("tablet", "fcm", "token", token, "app", "production", NOW)


WRITES: dict[str, Callable[[Kit, Event, int], Awaitable[Any]]] = {
    "append": lambda kit, e, d: kit.append(kit.event(), due_ms=NOW),
    "append with a key": lambda kit, e, d: kit.append(
        kit.event(idempotency_key="k2", body_hash=b"h"), keys=True
    ),
    "read": lambda kit, e, d: kit.store.change(kit.term, "read", [(kit.user.stream_id, [e.id])], NOW),
    "seen": lambda kit, e, d: kit.store.change(kit.term, "seen", [(kit.user.stream_id, [e.id])], NOW),
    "archive": lambda kit, e, d: kit.store.change(
        kit.term, "archive", [(kit.user.stream_id, [e.id])], NOW + 1
    ),
    "dismiss": lambda kit, e, d: kit.store.change(kit.term, "dismiss", [(kit.user.stream_id, [e.id])], NOW),
    "click": lambda kit, e, d: kit.store.change(kit.term, "click", [(kit.user.stream_id, [e.id])], NOW),
    "read_all": lambda kit, e, d: kit.store.read_all(kit.term, [(kit.user.stream_id, 99)], NOW),
    "acknowledge": lambda kit, e, d: kit.store.acknowledge(
        kit.term, [SignalRow(kit.user.stream_id, e.id, "silent")], NOW
    ),
    "load_users": lambda kit, e, d: kit.store.load_users(kit.term, [(UserKey("t", "new"), 1, "e2")]),
    "record_outcomes": lambda kit, e, d: kit.store.record_outcomes(
        kit.term,
        [AttemptRow(d, 1, "phone", "fcm", "sent", "m", 200, "", NOW, 1.0)],
        [SettleRow(d, 0, "sent", NOW, None)],
        [(KEY, "phone", "tok")],
        [(KEY, "phone", "tok")],
        NOW,
    ),
    "release": lambda kit, e, d: kit.store.release(kit.term, [ReleaseRow(d, 1, NOW, "waits")], NOW),
    "merge": lambda kit, e, d: kit.store.merge(
        kit.term, [CarrierRow(d, 1, kit.user.stream_id, SLOT, "push", [(d + 1, 1)])], NOW
    ),
    "replay": lambda kit, e, d: kit.store.replay(kit.term, [ReplayRow(d, "t", SLOT, NOW)], NOW),
    "put_target": lambda kit, e, d: kit.store.put_target(
        kit.term, "t", "u", target("tok"), "android", None, NOW
    ),
    "delete_target": lambda kit, e, d: kit.store.delete_target(kit.term, "t", "u", "phone"),
    "put_preferences": lambda kit, e, d: kit.store.put_preferences(kit.term, "t", "u", "{}", NOW),
    "change_preferences": lambda kit, e, d: kit.store.change_preferences(
        kit.term, "t", "u", lambda known: known | {"global": False}, NOW
    ),
    "log_out": lambda kit, e, d: kit.store.log_out(
        kit.term, kit.user.stream_id, UserKey("t", "u"), "phone", b"i" * 16, NOW
    ),
    "set_invisible": lambda kit, e, d: kit.store.set_invisible(kit.term, kit.user.stream_id, NOW),
    "revoke_tokens": lambda kit, e, d: kit.store.revoke_tokens(kit.term, kit.user.stream_id, NOW),
}
SILENT: dict[str, Callable[[Kit, Event, int], Awaitable[Any]]] = {
    # A push that is not claimed and a time that is not kept need no error: the owner does both.
    "claim_due": lambda kit, e, d: kit.store.claim_due(kit.term, [SLOT], NOW + 1, 10, NOW + 9),
    "save_last_seen": lambda kit, e, d: kit.store.save_last_seen(kit.term, [(kit.user.stream_id, NOW)]),
}


async def prepared(kit: Kit) -> tuple[Event, int]:
    """A notification with a due push, and a push target."""
    event = kit.event(idempotency_key="k1", body_hash=b"h")
    (delivery,) = await kit.append(event, due_ms=NOW, keys=True)
    phone = PushTarget("phone", "fcm", "token", "tok", "app", "production", NOW)
    await kit.store.put_target(kit.term, "t", "u", phone, "android", None, NOW)
    return event, delivery


@pytest.mark.parametrize("name", [*WRITES, *SILENT])
async def test_an_old_term_writes_nothing(postgres_dsn: str, name: str) -> None:
    """Every write of a shard whose term is over is refused, and no row of any table has changed (G9)."""
    async with Kit(postgres_dsn) as kit:
        event, delivery = await prepared(kit)
        if name == "merge":
            assert await kit.append(kit.event(), due_ms=NOW) == [delivery + 1]
        if name in ("release", "replay", "merge"):
            await kit.store.claim_due(kit.term, [SLOT], NOW + 1, 10, NOW + 100)
        if name == "replay":
            dead = SettleRow(delivery, 1, "dead", NOW, "gave up")
            await kit.store.record_outcomes(kit.term, [], [dead], [], [], NOW)
        await kit.bump()
        before = await kit.state()
        if name in WRITES:
            with pytest.raises(FencedError):
                await WRITES[name](kit, event, delivery)
        else:
            assert not await SILENT[name](kit, event, delivery)
        assert await kit.state() == before
        # The same call is a write under the right term: the test would notice a call that never writes.
        kit.term += 1
        await (WRITES | SILENT)[name](kit, event, delivery)
        assert await kit.state() != before


def test_every_write_of_the_store_is_in_the_list() -> None:
    """A method that takes the term is fenced, so it is tested above."""
    methods = {
        name
        for part in (ShardStore, Outbox, UserDocuments)
        for name, value in vars(part).items()
        if not name.startswith("_") and "term" in getattr(value, "__annotations__", {})
    }
    tested = {name.split(" ")[0] for name in [*WRITES, *SILENT]} - {
        "read",
        "seen",
        "archive",
        "dismiss",
        "click",
    }
    assert methods == tested | {"change"}


async def test_taking_slots_away_waits_for_a_transaction_in_flight(postgres_dsn: str) -> None:
    """The bump returns only after the write that began before it: the new owner reads everything."""
    async with Kit(postgres_dsn) as kit, kit.other() as blocker:
        block = blocker.transaction()
        await block.start()
        await blocker.execute("select 1 from streams for update")
        write = asyncio.create_task(kit.append(kit.event()))
        await eventually(
            lambda: kit.db.fetchval(
                "select count(*) from pg_stat_activity"
                " where wait_event_type = 'Lock' and query like '%shard.append%'"
            )
        )
        async with kit.other() as taker:
            bump = asyncio.create_task(
                taker.fetchval("update shards set term = term + 1 where shard = 'shard-a' returning term")
            )
            await eventually(
                lambda: kit.db.fetchval(
                    "select count(*) from pg_stat_activity"
                    " where wait_event_type = 'Lock' and query like 'update shards%'"
                )
            )
            assert not bump.done()
            await block.rollback()
            await write
            assert await bump == 2
        assert await kit.db.fetchval("select count(*) from notifications") == 1
        with pytest.raises(FencedError):
            await kit.append(kit.event())


async def test_an_erased_stream_is_left_out(postgres_dsn: str) -> None:
    """A stream deleted since it was loaded gets nothing; the rest of the batch is stored."""
    async with Kit(postgres_dsn) as kit:
        (other,) = await kit.store.load_users(kit.term, [(UserKey("t", "v"), 7, "e2")])
        await kit.db.execute("delete from streams where user_id = 'u'")
        rows = [AppendRow(kit.event(), kit.user.stream_id), AppendRow(kit.event(user="v"), other.stream_id)]
        outbox = [OutboxRow(1, rows[0].event.id, kit.user.stream_id, SLOT, False, NOW)]
        counts = {kit.user.stream_id: 1, other.stream_id: 1}
        heads = await kit.store.append(kit.term, counts, rows, outbox, NOW)
        assert heads == {other.stream_id: (1, 1, 1)}
        assert await kit.db.fetchval("select count(*) from notifications") == 1
        assert await kit.db.fetchval("select count(*) from deliveries") == 0


async def test_a_batch_numbers_a_stream_without_gap(postgres_dsn: str) -> None:
    """seq, rev and position follow the order of the batch; unread counts them."""
    async with Kit(postgres_dsn) as kit:
        events = [kit.event() for _ in range(5)]
        await kit.append(*events[:2])
        await kit.append(*events[2:])
        rows = await kit.store.notifications_after(kit.user.stream_id, 0, 10)
        assert [(r.id, r.seq, r.rev, r.position) for r in rows] == [
            (e.id, n, n, n) for n, e in enumerate(events, 1)
        ]
        assert await kit.db.fetchval("select unread from streams") == 5


async def test_a_key_is_taken_over_after_its_life(postgres_dsn: str) -> None:
    """Within its life a key stands for the first event; after it, for the next one."""
    async with Kit(postgres_dsn) as kit:
        first = kit.event(idempotency_key="k", body_hash=b"1")
        await kit.append(first, keys=True)
        second = kit.event(idempotency_key="k", body_hash=b"2")
        with pytest.raises(KeysTakenError):
            await kit.append(second, keys=True)
        assert await kit.db.fetchval("select seq from streams") == 1, "nothing was written, no seq is lost"
        found = await kit.store.find_keys([("t", "k"), ("t", "other"), ("x", "k")], NOW - 86_400_000)
        assert {key: (s.body_hash, s.notification, s.seq) for key, s in found.items()} == {
            ("t", "k"): (b"1", first.id, 1)
        }
        await kit.db.execute("update idempotency_keys set created_at = created_at - interval '25 hours'")
        assert await kit.store.find_keys([("t", "k")], NOW - 86_400_000) == {}
        await kit.append(second, keys=True)
        found = await kit.store.find_keys([("t", "k")], NOW - 86_400_000)
        assert found["t", "k"].notification == second.id
        await kit.store.prune_keys(NOW + 1)
        assert await kit.db.fetchval("select count(*) from idempotency_keys") == 0


async def test_a_row_that_commits_late_is_still_claimed(postgres_dsn: str) -> None:
    """Drawn first and due first, committed last: polling `id > cursor` would lose it (T6)."""
    async with Kit(postgres_dsn) as kit, kit.other() as late:
        early_id, later_id = await kit.store.draw_delivery_ids(2)
        event = kit.event()
        await kit.append(event)
        insert = (
            "insert into deliveries"
            " (id, notification_id, stream_id, slot, channel, due_at, created_at, updated_at)"
            " values ($1, $2, $3, $4, 'push', to_timestamp($5), now(), now())"
        )
        raw = str(await kit.db.fetchval("select id from notifications"))
        slow = late.transaction()
        await slow.start()
        await late.execute(insert, early_id, raw, kit.user.stream_id, SLOT, NOW / 1000 - 60)
        await kit.db.execute(insert, later_id, raw, kit.user.stream_id, SLOT, NOW / 1000 - 1)

        async def claim() -> list[int]:
            rows = await kit.store.claim_due(kit.term, [SLOT], NOW, 10, NOW + 30_000)
            return [r.delivery for r in rows]

        assert await claim() == [later_id]
        assert await claim() == []
        await slow.commit()
        assert await claim() == [early_id]
        assert await claim() == [], "claimed under a lease"


async def test_a_lapsed_lease_is_due_again(postgres_dsn: str) -> None:
    """A claimed row without outcome comes back with the next attempt; rows of other slots never do."""
    async with Kit(postgres_dsn) as kit:
        event, delivery = await prepared(kit)
        other = [(SLOT + 1) % 1024]
        assert await kit.store.claim_due(kit.term, other, NOW + 1, 10, NOW + 100) == []
        (first,) = await kit.store.claim_due(kit.term, [SLOT], NOW + 1, 10, NOW + 100)
        assert (first.delivery, first.attempt, first.key, first.notification) == (delivery, 1, KEY, event.id)
        assert await kit.store.claim_due(kit.term, [SLOT], NOW + 99, 10, NOW + 200) == []
        (again,) = await kit.store.claim_due(kit.term, [SLOT], NOW + 100, 10, NOW + 200)
        assert again.attempt == 2
        late = SettleRow(delivery, 1, "sent", NOW, None)
        await kit.store.record_outcomes(kit.term, [], [late], [], [], NOW)
        assert await kit.db.fetchval("select state from deliveries") == "sending", (
            "an old try settles nothing"
        )
        await kit.store.record_outcomes(
            kit.term, [], [SettleRow(delivery, 2, "sent", NOW, None)], [], [], NOW
        )
        assert await kit.db.fetchval("select state from deliveries") == "sent"


async def chained(kit: Kit, event: Event, *channels: str, chain: str, step: int = 0) -> list[int]:
    """An event with one claimed row per channel; their ids."""
    numbers = await kit.store.draw_delivery_ids(len(channels))
    rows = [
        OutboxRow(
            number,
            event.id,
            kit.user.stream_id,
            SLOT,
            True,
            NOW + 100,
            channel=channel,
            chain=chain,
            step=step,
        )
        for number, channel in zip(numbers, channels, strict=True)
    ]
    stream = kit.user.stream_id
    await kit.store.append(kit.term, {stream: 1}, [AppendRow(event, stream)], rows, NOW)
    return numbers


async def rows_of(kit: Kit) -> list[tuple[Any, ...]]:
    """(channel, state, reason, chain, step) of every row."""
    rows = await kit.db.fetch("select channel, state, reason, chain, step from deliveries order by id")
    return [tuple(row) for row in rows]


async def test_a_channel_without_success_plans_the_next_in_the_same_transaction(postgres_dsn: str) -> None:
    """Ended with a chain: cancelled, saying what follows; the last one is dead; expiry ends all."""
    async with Kit(postgres_dsn) as kit:
        event = kit.event()
        (number,) = await chained(kit, event, "apns", chain="fcm,push")
        dead = SettleRow(number, 1, "dead", NOW, "invalid_target: Unregistered")
        assert await kit.store.record_outcomes(kit.term, [], [dead], [], [], NOW) == 1
        assert await kit.store.record_outcomes(kit.term, [], [dead], [], [], NOW) == 0, "settled already"
        reason = "invalid_target: Unregistered; falls back to fcm"
        assert await rows_of(kit) == [
            ("apns", "cancelled", reason, "fcm,push", 0),
            ("fcm", "planned", None, "push", 1),
        ]
        (second,) = await kit.store.claim_due(kit.term, [SLOT], NOW + 1, 10, NOW + 100)
        assert (second.channel, second.chain, second.step, second.attempt) == ("fcm", "push", 1, 1)
        none = SettleRow(second.delivery, 1, "cancelled", NOW, "no fcm target")
        assert await kit.store.record_outcomes(kit.term, [], [none], [], [], NOW) == 1
        (third,) = await kit.store.claim_due(kit.term, [SLOT], NOW + 1, 10, NOW + 100)
        last = SettleRow(third.delivery, 1, "dead", NOW, "gave up")
        assert await kit.store.record_outcomes(kit.term, [], [last], [], [], NOW) == 0
        assert (await rows_of(kit))[1:] == [
            ("fcm", "cancelled", "no fcm target; falls back to push", "push", 1),
            ("push", "dead", "gave up", "", 2),
        ]
        late = kit.event()
        (number,) = await chained(kit, late, "apns", chain="fcm")
        expired = SettleRow(number, 1, "dead", NOW, "expired", onward=False)
        assert await kit.store.record_outcomes(kit.term, [], [expired], [], [], NOW) == 0
        assert (await rows_of(kit))[3:] == [("apns", "dead", "expired", "fcm", 0)]


@pytest.mark.parametrize("together", [True, False])
async def test_channels_of_one_step_fall_back_once_when_the_last_of_them_failed(
    postgres_dsn: str, together: bool
) -> None:
    """Two tried at the same time: nothing follows while one may succeed, one row when both have failed."""
    async with Kit(postgres_dsn) as kit:
        first, second = await chained(kit, kit.event(), "apns", "fcm", chain="push")
        rows = [SettleRow(number, 1, "dead", NOW, "x") for number in (first, second)]
        if together:
            assert await kit.store.record_outcomes(kit.term, [], rows, [], [], NOW) == 1
        else:
            assert await kit.store.record_outcomes(kit.term, [], rows[:1], [], [], NOW) == 0
            assert await kit.store.record_outcomes(kit.term, [], rows[1:], [], [], NOW) == 1
        assert [row[:2] for row in await rows_of(kit)] == [
            ("apns", "cancelled"),
            ("fcm", "cancelled"),
            ("push", "planned"),
        ]
        ok, bad = await chained(kit, kit.event(), "apns", "fcm", chain="push")
        sent = [SettleRow(ok, 1, "sent", NOW, None), SettleRow(bad, 1, "dead", NOW, "x")]
        assert await kit.store.record_outcomes(kit.term, [], sent, [], [], NOW) == 0


@pytest.mark.parametrize("newest_first", [True, False])
async def test_the_chain_of_what_was_planned_last_goes_on(postgres_dsn: str, newest_first: bool) -> None:
    """Of a fallback of the first event and the push of what was merged since, ending together, the push."""
    async with Kit(postgres_dsn) as kit:
        numbers = await chained(kit, kit.event(), "apns", "fcm", chain="sms")
        older, newer = numbers if newest_first else numbers[::-1]
        change = "update deliveries set created_at = to_timestamp($2), step = $3, chain = $4 where id = $1"
        await kit.db.execute(change, older, NOW / 1000 - 60, 1, "sms")
        await kit.db.execute(change, newer, NOW / 1000 - 30, 0, "email,sms")
        rows = [SettleRow(number, 1, "dead", NOW, "x") for number in numbers]
        assert await kit.store.record_outcomes(kit.term, [], rows, [], [], NOW) == 1
        assert (await rows_of(kit))[2:] == [("email", "planned", None, "sms", 1)]


@pytest.mark.parametrize("op", ["acknowledge", "dismiss", "archive"])
async def test_nothing_follows_for_what_the_user_has_or_put_away(postgres_dsn: str, op: str) -> None:
    """The row was on its way when a device dealt with the notification: its failure starts nothing."""
    async with Kit(postgres_dsn) as kit:
        event = kit.event()
        (number,) = await chained(kit, event, "apns", chain="fcm")
        await WRITES[op](kit, event, number)
        dead = SettleRow(number, 1, "dead", NOW, "x")
        assert await kit.store.record_outcomes(kit.term, [], [dead], [], [], NOW) == 0
        assert await rows_of(kit) == [("apns", "cancelled", "x", "fcm", 0)]


async def test_a_released_row_has_not_used_up_a_try(postgres_dsn: str) -> None:
    """Handed back: planned again under the same number of tries; what was claimed since or settled stays."""
    async with Kit(postgres_dsn) as kit:
        _, delivery = await prepared(kit)
        (claimed,) = await kit.store.claim_due(kit.term, [SLOT], NOW + 1, 10, NOW + 100)
        back = ReleaseRow(delivery, claimed.attempt, NOW + 50, "waits: fcm full")
        assert await kit.store.release(kit.term, [back], NOW + 2) == 1
        row = await kit.db.fetchrow("select state, attempts, reason from deliveries")
        assert row is not None
        assert tuple(row) == ("planned", 0, "waits: fcm full")
        assert await kit.store.release(kit.term, [back], NOW + 3) == 0, "it is not claimed"
        assert await kit.store.claim_due(kit.term, [SLOT], NOW + 49, 10, NOW + 200) == []
        (again,) = await kit.store.claim_due(kit.term, [SLOT], NOW + 50, 10, NOW + 200)
        assert again.attempt == 1
        (third,) = await kit.store.claim_due(kit.term, [SLOT], NOW + 200, 10, NOW + 300)
        assert third.attempt == 2, "the lease ended"
        assert await kit.store.release(kit.term, [back], NOW + 201) == 0, "of an earlier claim"
        await kit.store.record_outcomes(
            kit.term, [], [SettleRow(delivery, 2, "sent", NOW, None)], [], [], NOW
        )
        assert await kit.store.release(kit.term, [ReleaseRow(delivery, 2, NOW, "x")], NOW) == 0
        assert await kit.db.fetchval("select state from deliveries") == "sent"


@pytest.mark.parametrize("op", ["read", "seen", "archive", "dismiss", "click", "read_all", "acknowledge"])
async def test_whoever_deals_with_it_cancels_its_push(postgres_dsn: str, op: str) -> None:
    """Read, seen, archived, dismissed, clicked or acknowledged on a device: the waiting push is cancelled."""
    async with Kit(postgres_dsn) as kit:
        event, _ = await prepared(kit)
        if op in WRITES:
            await WRITES[op](kit, event, 0)
        row = await kit.db.fetchrow("select state, reason from deliveries")
        assert row is not None
        assert row["state"] == "cancelled"
        assert row["reason"]


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *[n for child in plan.get("Plans", []) for n in nodes(child)]]


async def explain(db: asyncpg.Connection, sql: str, *args: Any) -> list[dict[str, Any]]:
    """Nodes of the plan of a statement, which is really run and rolled back."""
    transaction = db.transaction()
    await transaction.start()
    try:
        text = await db.fetchval(f"explain (analyze, format json) {sql}", *args)
    finally:
        await transaction.rollback()
    return nodes(json.loads(text)[0]["Plan"])


async def test_claiming_what_is_due_reads_no_whole_table(postgres_dsn: str) -> None:
    """30,000 outbox rows, most of them done: the claim goes through the index of what is still to do."""
    async with Kit(postgres_dsn) as kit:
        await kit.db.execute(
            "insert into deliveries"
            " (notification_id, stream_id, slot, channel, state, due_at, created_at, updated_at)"
            " select gen_random_uuid(), 1, n % 1024, 'push',"
            " case when n % 20 = 0 then 'planned' else 'sent' end,"
            " to_timestamp($1) + n * interval '1 ms', now(), now() from generate_series(1, 30000) n",
            NOW / 1000,
        )
        await kit.db.execute("analyze deliveries")
        sql = load_queries("shard")
        slots = list(range(0, 1024, 2))
        claim = await explain(
            kit.db, sql["claim_due"], "shard-a", kit.term, slots, NOW / 1000 + 3600, 500, NOW / 1000 + 3630
        )
        scans = [n for n in claim if n.get("Relation Name") == "deliveries"]
        assert scans
        assert not [n for n in scans if n["Node Type"] == "Seq Scan"], [n["Node Type"] for n in scans]
        assert "deliveries_due" in {n.get("Index Name") for n in claim}


async def test_a_look_up_by_id_touches_one_partition(postgres_dsn: str) -> None:
    """The month is in the UUIDv7, so the planner needs no other partition."""
    async with Kit(postgres_dsn) as kit:
        await ensure_partitions(kit.db, NOW)
        event = kit.event()
        await kit.append(event)
        wanted = str(await kit.db.fetchval("select id from notifications"))
        plan = await explain(kit.db, f"select seq from notifications where id = '{wanted}'")
        touched = {n["Relation Name"] for n in plan if "Relation Name" in n}
        assert touched == {f"notifications_{month_bounds(NOW, 0)[0]}"}


async def test_partitions_are_made_once_and_take_their_rows_from_the_default(postgres_dsn: str) -> None:
    """A row of a month without partition is accepted, and moved when the month is made; once."""
    async with Kit(postgres_dsn) as kit:
        far = NOW + 400 * 86_400_000
        event = kit.event(id=ids.next(far))
        await kit.append(event)
        assert await kit.db.fetchval("select count(*) from notifications_default") == 1
        made = await ensure_partitions(kit.db, far)
        suffix = month_bounds(far, 0)[0]
        assert f"notifications_{suffix}" in made
        assert len(made) == 5
        assert await kit.db.fetchval("select count(*) from notifications_default") == 0
        assert await kit.db.fetchval(f"select count(*) from notifications_{suffix}") == 1
        assert (await kit.store.find_ids([event.id]))[event.id] == (1, kit.user.stream_id)
        assert await ensure_partitions(kit.db, far) == []


def test_month_bounds_meet() -> None:
    """The end of a month is the begin of the next, over the turn of a year too."""
    december = 1_796_000_000_000  # 2026-11-29; offset 1 is December
    for offset in range(-14, 14):
        assert month_bounds(december, offset)[2] == month_bounds(december, offset + 1)[1]
    assert month_bounds(december, 1)[0] == "2026_12"
    assert month_bounds(december, 2)[0] == "2027_01"


async def test_a_try_of_an_erased_user_is_not_kept(postgres_dsn: str) -> None:
    """What a provider answers after the row of the push is gone leaves no trace of the device."""
    async with Kit(postgres_dsn) as kit:
        await kit.append(kit.event(), due_ms=NOW)
        delivery = await kit.db.fetchval("delete from deliveries returning id")
        tried = AttemptRow(delivery, 1, "phone", "fcm", "sent", "m", 200, "", NOW, 1.0)
        settled = SettleRow(delivery, 1, "sent", NOW, None)
        await kit.store.record_outcomes(kit.term, [tried], [settled], [], [], NOW)
        assert await kit.db.fetchval("select count(*) from delivery_attempts") == 0
