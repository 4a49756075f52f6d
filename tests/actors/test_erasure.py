"""Erasure at the shard: interrupted, raced by events, and never more than the one user."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest

from carillon.errors import RemoteError, StoreUnavailableError
from carillon.ids import slot_of
from carillon.messages import ProfilePut, UserErase
from stores.postgres.pool import open_pool
from stores.postgres.users import UserStore
from tests.actors.shard_kit import Kit, clock, make_event
from tests.actors.test_shard import device
from tests.support import eventually

SLOT = slot_of("t", "u")
ERASE = UserErase("t", "u", SLOT)


def profile(user: str = "u", tenant: str = "t") -> ProfilePut:
    document = '{"email":null,"phone":null,"locale":null,"timezone":null,"attributes":{}}'
    return ProfilePut(tenant, user, slot_of(tenant, user), document)


async def counts(kit: Kit) -> dict[str, int]:
    tables = ("streams", "profiles", "notifications", "deliveries", "devices", "idempotency_keys")
    return {name: await kit.db.fetchval(f"select count(*) from {name}") for name in tables}


async def fill(kit: Kit, count: int = 7) -> None:
    """Users "u" and "v" of "t" and "u" of "o" with the same."""
    await kit.router.link.request(device("u", "one"))
    await kit.router.link.request(device("v", "two"))
    for user, tenant in (("u", "t"), ("v", "t"), ("u", "o")):
        await kit.router.link.request(profile(user, tenant))
        for n in range(count):
            key = {"idempotency_key": f"{user}{n}", "body_hash": b"h" * 32}
            await kit.publish(make_event(user, tenant, **key))


async def test_what_was_interrupted_goes_on(postgres_dsn: str) -> None:
    """A shard that ended in the middle left rows without an owner: its successor deletes them, no others."""
    async with Kit(postgres_dsn, erase_sweep_s=0, erase_batch=2) as kit:
        await fill(kit)
        before = await counts(kit)
        await kit.shard.stop()
        pool = await open_pool(kit.settings.postgres, 1)
        try:
            store = UserStore(pool)
            now_ms = clock.now_ms()
            open_ = await store.erase("shard-a", 1, "t", "u", SLOT, now_ms, now_ms)
            assert open_ is not None
            (erasure,) = open_
            await store.purge_keys("shard-a", 1, erasure, 0)
            assert await store.purge("shard-a", 1, erasure, 2) == 2
        finally:
            await pool.close()
        kit.settings = kit.settings.with_values(shard={"erase_sweep_s": 0.05})
        await kit.start_shard("shard-a")
        await eventually(lambda: done(kit))
        after = await counts(kit)
        assert {name: before[name] - after[name] for name in before} == {
            "streams": 1, "profiles": 1, "notifications": 7, "deliveries": 7, "devices": 1,
            "idempotency_keys": 7,
        }  # fmt: skip
        left = await kit.db.fetch("select tenant, user_id from streams order by 1, 2")
        assert [tuple(row) for row in left] == [("o", "u"), ("t", "v")]


async def done(kit: Kit) -> bool:
    return await kit.db.fetchval("select count(*) from erasures where done_at is null") == 0


async def test_told_again(postgres_dsn: str) -> None:
    """The same request again, or at the same time, has one effect and the same answer; of nobody: 404."""
    async with Kit(postgres_dsn, erase_batch=1) as kit:
        await fill(kit, 3)
        await asyncio.gather(*(kit.router.link.request(ERASE) for _ in range(3)))
        await kit.router.link.request(ERASE)
        rows: list[Any] = await kit.db.fetch("select user_hash, done_at from erasures")
        assert [row["user_hash"] for row in rows] == [hashlib.sha256(b"u").digest()]
        assert rows[0]["done_at"] is not None
        with pytest.raises(RemoteError) as caught:
            await kit.router.link.request(UserErase("t", "nobody", slot_of("t", "nobody")))
        assert caught.value.code == "not_found"
        assert await kit.db.fetchval("select count(*) from streams") == 2


async def test_the_session_ends_and_the_next_one_is_anothers(postgres_dsn: str) -> None:
    """Sockets close with 4001 without grace; old tokens are refused; a new one finds an empty stream."""
    async with Kit(postgres_dsn, grace_s=60, clean_close_grace_s=60) as kit:
        welcome = await kit.gateway.attach_ready(1, token_issued_ms=clock.now_ms())
        await kit.publish(make_event())
        await kit.router.link.request(ERASE)
        await eventually(lambda: kit.gateway.closed.get(1, (0,))[0] == 4001)
        assert (await kit.shard.status())["sessions"] == 0
        kit.gateway.attach(2, token_issued_ms=clock.now_ms() - 60_000)
        await eventually(lambda: kit.gateway.closed.get(2, (0,))[0] == 4001)
        again = await kit.gateway.attach_ready(3, token_issued_ms=clock.now_ms() + 1000)
        assert again["epoch"] != welcome["epoch"]
        assert (again["lastSeq"], again["unreadCount"]) == (0, 0)
        await kit.publish(make_event())
        assert kit.gateway.seqs(1) == [1]
        await eventually(lambda: kit.gateway.seqs(3) == [1])


async def test_events_on_their_way(postgres_dsn: str) -> None:
    """Events that race an erasure are stored for the old user, or the new one, or refused: never half, and a
    key never stands for what is not there."""
    async with Kit(postgres_dsn, max_batch=4, erase_batch=3) as kit:
        await kit.publish(make_event())

        async def send(n: int) -> tuple[Any, Any]:
            key = {"idempotency_key": f"k{n}", "body_hash": b"h" * 32} if n % 2 else {}
            event = make_event(title=f"n{n}", **key)
            while True:
                (outcome,) = await kit.publish(event)
                if outcome.status != "failed":
                    return event, outcome
                assert outcome.code == "unavailable", outcome
                event.retry = True

        sent = [asyncio.ensure_future(send(n)) for n in range(60)]
        for _ in range(3):
            await asyncio.sleep(0.01)
            await kit.router.link.request(ERASE)
        outcomes = await asyncio.gather(*sent)
        stored = await kit.db.fetch(
            "select n.id, n.seq from notifications n join streams s using (stream_id)"
        )
        known = {row["id"].bytes: row["seq"] for row in stored}
        assert sorted(known.values()) == list(range(1, len(known) + 1))
        for event, outcome in outcomes:
            assert outcome.id == event.id
        assert await kit.db.fetchval("select count(*) from notifications") == len(known)
        dangling = await kit.db.fetch(
            "select k.key from idempotency_keys k left join notifications n on n.id = k.notification_id"
            " where n.id is null"
        )
        assert dangling == []


async def test_a_session_whose_user_is_gone_ends(postgres_dsn: str) -> None:
    """A stream that was erased unnoticed is noticed by the next event: no device waits at it in silence."""
    async with Kit(postgres_dsn, grace_s=60, clean_close_grace_s=60) as kit:
        await kit.gateway.attach_ready(1, token_issued_ms=clock.now_ms())
        pool = await open_pool(kit.settings.postgres, 1)
        try:
            now_ms = clock.now_ms()
            assert await UserStore(pool).erase("shard-a", 1, "t", "u", SLOT, now_ms, now_ms)
        finally:
            await pool.close()
        (outcome,) = await kit.publish(make_event())
        assert (outcome.status, outcome.code) == ("failed", "unavailable")
        await eventually(lambda: kit.gateway.closed.get(1, (0,))[0] == 4001)


async def test_an_erasure_whose_answer_is_lost(postgres_dsn: str) -> None:
    """It is looked whether the user is gone: its sockets close then, the next stream has another epoch."""
    async with Kit(postgres_dsn, grace_s=60, clean_close_grace_s=60) as kit:
        welcome = await kit.gateway.attach_ready(1, token_issued_ms=clock.now_ms())
        store = kit.shard._accounts._store
        erase = store.erase

        async def lost(*args: Any) -> None:
            await erase(*args)
            raise StoreUnavailableError("the answer was lost")

        store.erase = lost  # type: ignore[assignment]
        with pytest.raises(RemoteError) as caught:
            await kit.router.link.request(ERASE)
        assert caught.value.code == "store_unavailable"
        await eventually(lambda: kit.gateway.closed.get(1, (0,))[0] == 4001)
        assert await kit.db.fetchval("select epoch from streams where user_id = 'u'") != welcome["epoch"]
        assert (await kit.publish(make_event()))[0].seq == 1
