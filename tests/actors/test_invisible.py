"""Invisible users: offline for everybody else, as reachable as ever, and it lasts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from carillon.errors import RemoteError
from carillon.ids import UserKey, slot_of
from carillon.messages import PresenceMode, PresenceQuery, UserPresence
from tests.actors.gateway_kit import TENANT
from tests.actors.presence_kit import World
from tests.actors.shard_kit import make_event
from tests.support import eventually


async def query(world: World, user: str) -> UserPresence:
    return (await world.kit.router.link.request(PresenceQuery(TENANT, [user]))).users[0]


async def test_an_invisible_user_looks_offline_and_is_still_served(postgres_dsn: str) -> None:
    """Watchers see offline; what the user does then, they do not; notifications still arrive."""
    async with World(postgres_dsn) as world:
        ann, bob = await world.come("ann"), await world.come("bob")
        await ann.watch("bob")
        await ann.sees("bob", "active")
        assert (await bob.answer("SET_PRESENCE", mode="invisible"))["type"] == "OK"
        hidden = await ann.sees("bob", "active", "offline")
        second = await world.come("bob", device="phone")
        await bob.answer("VISIBILITY", state="idle")
        await second.answer("VISIBILITY", state="focused")
        (outcome,) = await world.kit.publish(make_event("bob", TENANT))
        assert outcome.status == "delivered"
        await second.close()

        async def alone() -> Any:
            found = await query(world, "bob")
            return found if [d.device for d in found.devices] == ["d"] else None

        found = await eventually(alone)
        assert (found.status, found.invisible) == ("offline", True)
        assert ann.told("bob") == ["active", "offline"]
        assert (await bob.answer("SET_PRESENCE", mode="auto"))["type"] == "OK"
        await ann.sees("bob", "active", "offline", "idle")
        assert hidden["lastSeenAt"] is not None


async def test_being_invisible_outlives_sockets_and_shards(postgres_dsn: str) -> None:
    """It is kept in Postgres, with the moment it began: later comings and goings do not move "last seen"."""
    async with World(postgres_dsn) as world:
        ann, bob = await world.come("ann"), await world.come("bob")
        await bob.answer("SET_PRESENCE", mode="invisible")
        since_ms = (await query(world, "bob")).last_seen_ms
        await bob.close()
        await eventually(
            lambda: world.kit.db.fetchval("select last_seen_at from streams where user_id = 'bob'")
        )
        world.kit.shard._users.forget(UserKey(TENANT, "bob"))
        found = await query(world, "bob")
        assert (found.status, found.last_seen_ms, found.invisible) == ("offline", since_ms, True)
        await ann.watch("bob")
        await ann.sees("bob", "offline")
        again = await world.come("bob")
        await again.answer("SET_PRESENCE", mode="invisible")  # once more: it stays as it began
        found = await query(world, "bob")
        assert (found.status, found.last_seen_ms, len(found.devices)) == ("offline", since_ms, 1)
        await asyncio.sleep(0.1)  # ten times the coalescing time
        assert ann.told("bob") == ["offline"]


async def test_a_service_can_set_it_for_a_user_who_is_not_there(postgres_dsn: str) -> None:
    """The request works without a connection; another mode is refused and changes nothing."""
    async with World(postgres_dsn) as world:
        slot = slot_of(TENANT, "bob")
        await world.kit.router.link.request(PresenceMode(TENANT, "bob", slot, "invisible"))
        assert (await query(world, "bob")).invisible
        with pytest.raises(RemoteError) as refused:
            await world.kit.router.link.request(PresenceMode(TENANT, "bob", slot, "away"))
        assert refused.value.code == "invalid"
        assert (await query(world, "bob")).invisible
        bob = await world.come("bob")
        assert (await bob.answer("SET_PRESENCE", mode="away"))["code"] == "invalid"
        assert (await bob.answer("SET_PRESENCE"))["code"] == "invalid"
        assert (await query(world, "bob")).status == "offline"
