"""Acknowledgements that name a revision, against what the store knows of later updates."""

from __future__ import annotations

import pytest

from actors.attached import AckMemory
from actors.shard_acks import combine
from carillon.attention import ACTIVE, RECEIVED, SILENT, STALE
from carillon.ids import slot_of
from carillon.messages import ClientAck, DeviceAck
from stores.postgres.shard_rows import SignalRow
from tests.actors.shard_kit import Kit
from tests.actors.test_merging import like, phone
from tests.support import eventually


async def pushes(kit: Kit) -> list[str]:
    return [row[0] for row in await kit.db.fetch("select state from deliveries order by id")]


async def delivered(kit: Kit) -> bool:
    return bool(await kit.db.fetchval("select delivered_at is not null from notifications"))


def by_http(*ids: bytes, rev: int | None) -> DeviceAck:
    return DeviceAck("t", "u", slot_of("t", "u"), "tablet", None, list(ids), rev)


async def test_http_of_before_the_update(postgres_dsn: str) -> None:
    """POST /api/ack of an id with the rev before an update leaves the update's push waiting; the rev of the
    update ends it."""
    async with Kit(postgres_dsn, ack_window_s=600.0, merge={"renotify_s": 0.0}) as kit:
        await kit.router.link.request(phone())
        await kit.gateway.attach_ready(1)
        first = like("a")
        await kit.publish(first)
        await kit.publish(like("b"))
        await restart(kit)
        await kit.router.link.request(by_http(first.id, rev=1))
        await eventually(lambda: delivered(kit))
        assert (await pushes(kit))[-1] == "planned"
        await kit.router.link.request(by_http(first.id, rev=2))

        async def ended() -> bool:
            return set(await pushes(kit)) == {"cancelled"}

        await eventually(ended)


async def test_socket_of_before_the_update(postgres_dsn: str) -> None:
    """So does an ACK by id on a socket whose shard was started again since the update."""
    async with Kit(postgres_dsn, ack_window_s=600.0, merge={"renotify_s": 0.0}) as kit:
        await kit.router.link.request(phone())
        await kit.gateway.attach_ready(1)
        first = like("a")
        await kit.publish(first)
        await kit.publish(like("b"))
        epoch = await kit.db.fetchval("select epoch from streams")
        await restart(kit)
        gateway = await kit.dial("shard-a", "gateway-1")
        gateway.attach(
            1, epoch=epoch, last_seq=1, last_rev=2, reattach=True, ready=True, began_seq=0, acked_seq=0
        )
        gateway.link.send_nowait(ClientAck(1, None, [first.id], None, 1))
        await eventually(lambda: delivered(kit))
        assert (await pushes(kit))[-1] == "planned"


@pytest.mark.parametrize(("acked_rev", "state"), [(0, "planned"), (1, "planned"), (2, "cancelled")])
async def test_a_reattach_acknowledges_what_was_told(postgres_dsn: str, acked_rev: int, state: str) -> None:
    """What a gateway tells again covers the updates that its client named, not those it was written."""
    async with Kit(postgres_dsn, ack_window_s=600.0, merge={"renotify_s": 0.0}) as kit:
        await kit.router.link.request(phone())
        await kit.gateway.attach_ready(1)
        await kit.publish(like("a"))
        await kit.publish(like("b"))
        epoch = await kit.db.fetchval("select epoch from streams")
        await restart(kit)
        gateway = await kit.dial("shard-a", "gateway-1")
        gateway.attach(
            1, epoch=epoch, last_seq=1, last_rev=2, reattach=True, ready=True, began_seq=0, acked_seq=1,
            acked_rev=acked_rev,
        )  # fmt: skip
        await eventually(lambda: delivered(kit))
        assert (await pushes(kit))[-1] == state


def test_what_a_gateway_remembers() -> None:
    """The newest rev that was told beside a seq, also with one that was told before."""
    acks = AckMemory(3, 0.0)
    assert acks.rev == 0
    for seq, rev in ((4, None), (4, 9), (5, 8), (6, None)):
        acks.reached(seq, 1.0, 5.0, rev)
    assert (acks.seq, acks.rev) == (6, 9)


async def restart(kit: Kit) -> None:
    await kit.shard.stop()
    kit.shards.remove(kit.shard)
    kit.shard = await kit.start_shard("shard-a", spread=False)
    await eventually(lambda: len(kit.shard._slots) == 1024)
    kit.router = await kit.dial("shard-a", "router-1")


def row(signal: str, device: str = "", rev: int | None = None) -> SignalRow:
    return SignalRow(1, b"n", signal, device, rev)


@pytest.mark.parametrize(
    ("known", "later", "both"),
    [
        (row(SILENT, rev=1), row(SILENT, rev=4), row(SILENT, rev=4)),
        (row(SILENT, rev=4), row(SILENT), row(SILENT)),
        (row(ACTIVE, "a", 4), row(ACTIVE, "a", 3), row(ACTIVE, "a", 4)),
        (row(ACTIVE, "a", 4), row(ACTIVE, "b", 3), row(ACTIVE, "a\nb", 3)),
        (row(ACTIVE, "a"), row(ACTIVE, "b", 3), row(ACTIVE, "a\nb", 3)),
        (row(RECEIVED, rev=9), row(SILENT, rev=3), row(SILENT, rev=3)),
        (row(SILENT, rev=3), row(RECEIVED, rev=9), row(SILENT, rev=3)),
        (row(STALE), row(ACTIVE, "a", 2), row(ACTIVE, "a", 2)),
        (row(ACTIVE, "a", 2), row(STALE), row(ACTIVE, "a", 2)),
        (row(ACTIVE, "a", 2), row(ACTIVE, "a\nb", 2), row(ACTIVE, "a\nb", 2)),
    ],
)
def test_two_before_they_are_written(known: SignalRow, later: SignalRow, both: SignalRow) -> None:
    """Of two acknowledgements in one statement no more is covered than either told."""
    combine(known, later)
    assert known == both
