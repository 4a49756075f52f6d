"""Pushes that wait for an acknowledgement in their notification: what makes rows of the outbox of them."""

from __future__ import annotations

from typing import Any

import pytest

from carillon.ids import slot_of
from carillon.messages import Change, ClientAck, DevicePut
from tests.actors.shard_kit import AheadClock, Kit, make_event
from tests.support import eventually


def phone() -> DevicePut:
    return DevicePut("t", "u", slot_of("t", "u"), "phone", "android", "fcm", "token", "tok-phone", "app")


async def rows(kit: Kit) -> list[tuple[Any, ...]]:
    return [tuple(r) for r in await kit.db.fetch("select channel, state, reason from deliveries order by id")]


async def texts(kit: Kit) -> list[str]:
    return [r[0] for r in await kit.db.fetch("select left(kept, 1) from notifications order by seq")]


async def live(kit: Kit) -> None:
    """A user with a phone who is there; the shard may keep pushes."""
    await kit.router.link.request(phone())
    await kit.gateway.attach_ready(1)
    await eventually(lambda: kit.shard._kept._mark is not None, what="the mark")


async def test_an_acknowledged_push_never_is_a_row(postgres_dsn: str) -> None:
    """Stored with its notification, ended there; the outbox stays empty."""
    async with Kit(postgres_dsn, ack_window_s=60.0) as kit:
        await live(kit)
        await kit.publish(make_event(), make_event())
        assert await texts(kit) == ["[", "["]
        kit.gateway.link.send_nowait(ClientAck(1, seq=2))
        await eventually(lambda: len(kit.shard._kept) == 0, what="the acknowledgements")
        assert await texts(kit) == ["-", "-"]
        assert await rows(kit) == []
        assert await kit.db.fetchval("select count(delivered_at) from notifications") == 2


@pytest.mark.parametrize("op", ["read", "seen", "archive", "dismiss", "click", "read_all"])
async def test_a_change_makes_it_a_row_and_ends_it(postgres_dsn: str, op: str) -> None:
    """Whatever the user does in the application: the push is cancelled with that reason."""
    async with Kit(postgres_dsn, ack_window_s=60.0) as kit:
        await live(kit)
        event = make_event()
        await kit.publish(event)
        ids = [] if op == "read_all" else [event.id]
        await kit.router.link.request(Change("t", "u", slot_of("t", "u"), op, ids))
        reason = {"read_all": "read", "archive": "archived", "dismiss": "dismissed", "click": "clicked"}
        assert await rows(kit) == [("push", "cancelled", reason.get(op, op))]
        assert len(kit.shard._kept) == 0


async def test_marks_follow_what_waits(postgres_dsn: str) -> None:
    """The mark stays behind the oldest that waits, and moves on once that is over."""
    async with Kit(postgres_dsn, ack_window_s=60.0, kept_mark_s=0.05, sweep_s=0.05) as kit:
        await live(kit)
        event = make_event()
        await kit.publish(event)
        for _ in range(3):
            kit.shard._outbox.due_now()
            kit.shard._kept._marked_at = float("-inf")
            await kit.shard._kept.follow()
        mark = "select from_id from kept_marks"
        assert (await kit.db.fetchval(mark)).bytes < event.id
        kit.gateway.link.send_nowait(ClientAck(1, seq=1))

        async def moved() -> bool:
            return (await kit.db.fetchval(mark)).bytes > event.id

        await eventually(moved, what="the mark")


async def test_none_is_kept_if_none_may_be(postgres_dsn: str) -> None:
    """`max_kept_pushes` 0: each push is a row of the outbox from the first."""
    async with Kit(postgres_dsn, ack_window_s=60.0, max_kept_pushes=0) as kit:
        await kit.router.link.request(phone())
        await kit.gateway.attach_ready(1)
        await kit.publish(make_event())
        assert await rows(kit) == [("push", "planned", None)]
        assert await kit.db.fetchval("select kept from notifications") is None


async def test_what_is_held_for_long_gets_its_row(postgres_dsn: str) -> None:
    """A hold beyond `kept_s`: acknowledged by a device that is looked at, it moves to the outbox."""
    async with Kit(postgres_dsn, ack_window_s=60.0, hold_s=600.0, kept_s=100.0) as kit:
        await kit.router.link.request(phone())
        await kit.gateway.attach_ready(1, attention="focused")
        await eventually(lambda: kit.shard._kept._mark is not None, what="the mark")
        await kit.publish(make_event())
        assert await rows(kit) == []
        kit.gateway.link.send_nowait(ClientAck(1, seq=1))
        gate = "select gate from deliveries where state = 'planned'"

        async def held() -> bool:
            return await kit.db.fetchval(gate) == "held"

        await eventually(held, what="the row")
        assert len(kit.shard._kept) == 0


class SteppedClock(AheadClock):
    """A clock of which the time of day may be put back."""

    back_ms = 0

    def now_ms(self) -> int:
        return super().now_ms() - self.back_ms


async def states(kit: Kit) -> list[str]:
    return [state for _, state, _ in await rows(kit)]


async def test_what_nobody_acknowledges_is_due_at_once(postgres_dsn: str) -> None:
    """The end of the window is when the push leaves, not the next periodic look."""
    async with Kit(postgres_dsn, ack_window_s=0.2, sweep_s=3600.0) as kit:
        await live(kit)
        for nth in range(2):
            await kit.publish(make_event())
            assert len(kit.shard._kept) == 1

            async def claimed(many: int = nth + 1) -> bool:
                return await states(kit) == ["sending"] * many

            await eventually(claimed, what="the push")


async def test_what_was_planned_later_and_is_due_earlier_is_due_at_once(postgres_dsn: str) -> None:
    """The time of day may be put back: pushes of those moments wait for no periodic look either."""
    clock = SteppedClock()
    async with Kit(postgres_dsn, ack_window_s=0.4, sweep_s=3600.0, clock=clock) as kit:
        await live(kit)
        await kit.publish(make_event())
        clock.back_ms = 300
        await kit.publish(make_event())
        clock.back_ms = 0
        kit.gateway.link.send_nowait(ClientAck(1, seq=1))

        async def claimed() -> bool:
            return await states(kit) == ["sending"]

        await eventually(claimed, what="the push of the second")
