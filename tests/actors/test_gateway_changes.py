"""Changes on their way to a shard that is lost: told to the next one, answered once."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from actors.attached import ChangeMemory
from carillon import server_frames
from carillon.messages import ClientChange, Write
from tests.actors.gateway_kit import ID, Start, frame_of, running
from tests.support import eventually

RAW = bytes.fromhex(ID.replace("-", ""))


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    async with running() as starter:
        yield starter


async def test_the_next_shard_is_told_again(start: Start) -> None:
    """What was answered is not repeated; what was not is, in order; read-all up to what the client had."""
    kit = await start(shards=2)
    old, new = kit.shards
    client = await kit.client()
    first = await old.attached()
    await frame_of(client)
    old.notify(1)
    await frame_of(client)
    await client.send(json.dumps({"type": "MARK_READ", "notificationIds": [ID], "id": "done"}))
    await old.got(ClientChange)
    old.write(Write([first.conn], server_frames.ok("done")))
    assert await frame_of(client) == {"type": "OK", "id": "done"}
    await client.send(json.dumps({"type": "ARCHIVE", "notificationId": ID, "id": 7}))
    await client.send(json.dumps({"type": "MARK_ALL_READ", "id": 8}))
    await client.send(json.dumps({"type": "MARK_SEEN", "notificationIds": [ID]}))
    await old.got(ClientChange, 4)
    kit.give(new)
    await old.shard.stop()
    again = await new.attached()
    await new.got(ClientChange, 3)
    assert new.received(ClientChange) == [
        ClientChange(again.conn, "archive", [RAW], ref=7),
        ClientChange(again.conn, "read_all", up_to_seq=1, ref=8),
        ClientChange(again.conn, "seen", [RAW]),
    ]
    new.write(Write([again.conn], server_frames.error("not_found", "no such notification", False, 7)))
    assert (await frame_of(client))["id"] == 7
    (conn,) = kit.gateway._sockets
    await eventually(lambda: [c.ref for c in conn.changes.again(0.0, 1e9)] == [8, None])


def test_what_is_remembered_is_bounded() -> None:
    """The oldest goes. Without `id` a change is told again for a while, with `id` until it is answered."""
    memory = ChangeMemory()
    for number in range(6):
        memory.passed_on(ClientChange(1, "read", [RAW], ref=number), 0, 0.0, 10.0, 4)
    assert [change.ref for change in memory.again(100.0, 10.0)] == [2, 3, 4, 5]
    memory.answered(server_frames.ok(4))
    memory.answered(server_frames.error("busy", "later", True, 2))
    memory.answered(server_frames.error("busy", "later", True))
    memory.answered(server_frames.unread_count(1, 0))
    assert [change.ref for change in memory.again(100.0, 10.0)] == [3, 5]
    memory.passed_on(ClientChange(1, "seen", [RAW]), 0, 100.0, 10.0, 4)
    assert len(memory.again(109.0, 10.0)) == 3
    assert len(memory.again(111.0, 10.0)) == 2
