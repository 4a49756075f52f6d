"""When a shard wakes for its sessions; on asyncio's loop and on uvloop."""

from __future__ import annotations

import logging

import pytest

from tests.actors.shard_kit import Kit, make_event
from tests.support import eventually


async def test_sessions_that_are_due_at_once(postgres_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """Many connections whose wait for RESUME is over as they come all go live, and a gateway that is lost
    takes all of them along."""
    async with Kit(postgres_dsn, resume_wait_s=0.0, grace_s=0.0, clean_close_grace_s=0.0) as kit:
        for conn in range(1, 20):
            kit.gateway.attach(conn, f"u{conn % 4}")
        for conn in range(1, 20):
            await kit.gateway.seen(conn, 1)
        for user in range(4):
            await kit.publish(make_event(f"u{user}"))
        for conn in range(1, 20):
            kinds = [frame["type"] for frame in await kit.gateway.seen(conn, 2)]
            assert kinds == ["WELCOME", "NEW_NOTIFICATION"]
        kit.gateway.link.close()
        await eventually(lambda: kit.shard._sessions.live == 0)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
