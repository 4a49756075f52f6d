"""Devices that were away while what they missed moved to the archive."""

from __future__ import annotations

from pathlib import Path

import pytest

from carillon.clock import ManualClock
from carillon.ids import slot_of
from carillon.messages import Change, ClientReady, ClientResume
from stores.archiver import Archiver
from tests.actors.shard_kit import Kit, clock, make_event
from tests.support import eventually

MONTHS_LATER_MS = 150 * 86_400_000


async def archive(kit: Kit, folder: Path) -> int:
    """A run in five months' time; returns how many notifications went."""
    settings = kit.settings.with_values(archive={"root": str(folder), "pause_s": 0.0})
    archiver = await Archiver.open(settings, ManualClock(clock.now_ms() + MONTHS_LATER_MS))
    try:
        return (await archiver.run()).archived
    finally:
        await archiver.close()


async def change(kit: Kit, op: str, *ids: bytes) -> None:
    await kit.router.link.request(Change("t", "u", slot_of("t", "u"), op, list(ids)))


@pytest.mark.parametrize("restarted", [False, True], ids=["the session knows nothing of it", "a new session"])
async def test_only_who_missed_something_is_told(postgres_dsn: str, tmp_path: Path, restarted: bool) -> None:
    """recovered is false exactly for positions before which a notification or a change is gone, also if the
    session was loaded before; others resume whole. Nobody is left behind: what comes then reaches all."""
    async with Kit(postgres_dsn, recent_window=1) as kit:
        welcome = await kit.gateway.attach_ready(1)
        events = [make_event() for _ in range(6)]
        await kit.publish(*events)  # seq 1 to 6, rev 1 to 6
        await change(kit, "read", events[1].id, events[2].id)  # rev 7
        await change(kit, "seen", events[5].id)  # rev 8
        await change(kit, "seen", events[4].id)  # rev 9
        await kit.db.execute("update deliveries set state = 'cancelled'")
        assert await archive(kit, tmp_path) == 2
        if restarted:
            await kit.shard.stop()
            kit.shard = await kit.start_shard("shard-a")
            kit.gateway = await kit.dial("shard-a", "gateway-2")
            kit.router = await kit.dial("shard-a", "router-2")
        wanted = {
            (6, 8): True, (6, 7): True, (3, 7): True,  # what is gone they have, with its last change
            (6, 6): False,  # the change that read them is gone
            (2, 9): False, (1, 9): False, (0, 0): False,  # notifications are gone
        }  # fmt: skip
        for conn, ((seq, rev), recovered) in enumerate(wanted.items(), 10):
            kit.gateway.attach(conn, epoch=welcome["epoch"], last_seq=seq, last_rev=rev)

            def told(conn: int = conn) -> list[bool]:
                return [f["recovered"] for f in kit.gateway.frames.get(conn, []) if f["type"] == "WELCOME"]

            await eventually(lambda told=told, recovered=recovered: told() and told()[-1] is recovered)
            if recovered:
                await eventually(
                    lambda conn=conn, seq=seq: kit.gateway.seqs(conn) == list(range(seq + 1, 7)),
                    what=str((seq, rev)),
                )
            else:
                assert kit.gateway.seqs(conn) == []
            assert not restarted or told() == [recovered], "who is loaded anew knows at once"
        await kit.publish(make_event("u"))
        for conn, recovered in zip(range(10, 20), wanted.values(), strict=False):
            await eventually(lambda conn=conn: kit.gateway.seqs(conn)[-1:] == [7])
            kinds = [f["recovered"] for f in kit.gateway.frames[conn] if f["type"] == "WELCOME"]
            assert kinds[-1] is recovered


async def test_a_resume_frame_is_told_as_well(postgres_dsn: str, tmp_path: Path) -> None:
    """The same for a position that comes as a frame, and for a socket whose attachment was lost."""
    async with Kit(postgres_dsn, recent_window=1, resume_wait_s=60.0) as kit:
        welcome = await kit.gateway.attach_ready(1)
        events = [make_event() for _ in range(3)]
        await kit.publish(*events)
        await change(kit, "dismiss", events[0].id)
        await kit.db.execute("update deliveries set state = 'cancelled'")
        assert await archive(kit, tmp_path) == 1
        await change(kit, "seen", events[2].id)
        kit.gateway.attach(2)
        await kit.gateway.seen(2, 1)
        kit.gateway.link.send_nowait(ClientResume(2, welcome["epoch"], 0, 0))
        await eventually(lambda: kit.gateway.frames[2][-1].get("recovered") is False)
        kit.gateway.attach(3, epoch=welcome["epoch"], last_seq=0, last_rev=0, reattach=True, ready=True)
        kit.gateway.link.send_nowait(ClientReady(3))
        await eventually(lambda: kit.gateway.frames.get(3, [{}])[-1].get("recovered") is False)
        await kit.publish(make_event())
        for conn in (2, 3):
            await eventually(lambda conn=conn: kit.gateway.seqs(conn) == [4])
