"""Watching presence across shards and gateways: who sees what, and what survives moves and losses."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from carillon.errors import RemoteError
from carillon.ids import UserKey, slot_of
from carillon.messages import PresenceQuery, PresenceWatch
from tests.actors.gateway_kit import TENANT
from tests.actors.presence_kit import World
from tests.support import eventually


def watched_at(world: World, shard: int = 0) -> set[str]:
    return {key.user for key in world.kit.shards[shard]._presence._watchers}


async def test_a_watcher_sees_coming_looking_away_and_leaving(postgres_dsn: str) -> None:
    """PRESENCE comes at once with the state that is, then with each change, over shards and gateways."""
    async with World(postgres_dsn, gateways=2) as world:
        await world.kit.start_shard("shard-b", spread=False)
        world.give("bob", "shard-b")
        ann = await world.come("ann")
        assert (await ann.watch("bob"))["type"] == "OK"
        first = await ann.sees("bob", "offline")
        assert first["lastSeenAt"] is None
        bob = await world.come("bob", 1)
        await ann.sees("bob", "offline", "active")
        await bob.send("VISIBILITY", state="hidden")
        await ann.sees("bob", "offline", "active", "idle")
        await bob.send("VISIBILITY", state="focused")
        await ann.sees("bob", "offline", "active", "idle", "active")
        await bob.close()
        last = await ann.sees("bob", "offline", "active", "idle", "active", "offline")
        assert last["lastSeenAt"] is not None
        assert watched_at(world, 1) == {"bob"}
        assert watched_at(world, 0) == set()


async def test_last_seen_is_kept_in_postgres(postgres_dsn: str) -> None:
    """Who watches a user that nobody has in memory learns when it was last seen."""
    async with World(postgres_dsn) as world:
        bob = await world.come("bob")
        await bob.close()
        await eventually(
            lambda: world.kit.db.fetchval("select last_seen_at from streams where user_id = 'bob'")
        )
        world.kit.shard._users.forget(UserKey(TENANT, "bob"))
        ann = await world.come("ann")
        await ann.watch("bob", "nobody")
        assert (await ann.sees("bob", "offline"))["lastSeenAt"] is not None
        assert (await ann.sees("nobody", "offline"))["lastSeenAt"] is None
        assert await world.kit.db.fetchval("select count(*) from streams where user_id = 'nobody'") == 0


async def test_messagepack_watchers_get_the_same(postgres_dsn: str) -> None:
    """A watcher on MessagePack and one on JSON are told the same of one user."""
    async with World(postgres_dsn) as world:
        watchers = [await world.come("ann", msgpack=True), await world.come("cat")]
        for watcher in watchers:
            await watcher.watch("bob")
            await watcher.sees("bob", "offline")
        await world.come("bob")
        seen = [await watcher.sees("bob", "offline", "active") for watcher in watchers]
        assert seen[0] == seen[1]


async def test_a_gateway_watches_a_user_once_and_only_while_somebody_does(postgres_dsn: str) -> None:
    """Ten watchers are one subscription; another list, an empty one and a lost socket end it."""
    async with World(postgres_dsn) as world:
        watchers = [await world.come(f"w{n}") for n in range(4)]
        for watcher in watchers:
            await watcher.watch("bob", "cat", "bob")
        await eventually(lambda: watched_at(world) == {"bob", "cat"})
        watches = world.gateways[0].owners.watches
        assert watches.count == 8
        await watchers[0].watch()
        await watchers[1].close()
        watchers[2].socket.transport.abort()
        await watchers[3].watch("cat", "dan")
        await eventually(lambda: watched_at(world) == {"cat", "dan"})
        assert watches.count == 2
        await watchers[3].close()
        await eventually(lambda: not watched_at(world))
        await eventually(lambda: (watches.count, watches._watched, bool(watches)) == (0, {}, False))
        assert not world.kit.shard._presence._watched


async def test_the_list_is_answered_with_what_is_known(postgres_dsn: str) -> None:
    """Who asks for the same users again gets their state again; others on the gateway hear nothing."""
    async with World(postgres_dsn) as world:
        ann, cat = await world.come("ann"), await world.come("cat")
        await ann.watch("bob")
        await ann.sees("bob", "offline")
        await cat.watch("bob")
        await cat.sees("bob", "offline")
        await ann.watch("bob")
        await ann.sees("bob", "offline", "offline")
        assert cat.told("bob") == ["offline"]


async def test_a_reload_does_not_flap(postgres_dsn: str) -> None:
    """A socket lost and back within grace is no change for watchers; after it the user is offline."""
    async with World(postgres_dsn, grace_s=60.0) as world:
        ann, bob = await world.come("ann"), await world.come("bob")
        await ann.watch("bob")
        await ann.sees("bob", "active")
        await bob.close(1001)
        again = await world.come("bob")
        world.kit.skip(61)
        await again.answer("VISIBILITY", state="hidden")  # told behind a status that flapped
        await ann.sees("bob", "active", "idle")
        await again.close(1001)
        await eventually(lambda: world.kit.shard._sessions.connections() == 1)
        world.kit.skip(61)
        await ann.sees("bob", "active", "idle", "offline")


async def test_quick_changes_are_told_as_one(postgres_dsn: str) -> None:
    """What changes and changes back within the coalescing time reaches nobody."""
    async with World(postgres_dsn, presence={"coalesce_s": 60.0}) as world:

        def time_is_over() -> None:
            presence = world.kit.shard._presence
            assert presence._timer is not None, "nothing waits to be told"
            presence._timer.cancel()
            presence._tell_changed()

        ann, bob = await world.come("ann"), await world.come("bob")
        await ann.watch("bob")
        await ann.sees("bob", "active")
        for state in ("hidden", "focused") * 10 + ("idle",):
            await bob.answer("VISIBILITY", state=state)
        time_is_over()
        await ann.sees("bob", "active", "idle")
        for state in ("focused", "idle"):
            await bob.answer("VISIBILITY", state=state)
        time_is_over()
        await bob.answer("VISIBILITY", state="focused")
        time_is_over()
        await ann.sees("bob", "active", "idle", "active")


async def test_a_moved_slot_is_watched_at_its_new_owner(postgres_dsn: str) -> None:
    """When the watched user's slot moves nobody is shown offline, and changes come from the new owner."""
    async with World(postgres_dsn, gateways=2, grace_s=60.0) as world:
        shard_b = await world.kit.start_shard("shard-b", spread=False)
        ann, bob = await world.come("ann"), await world.come("bob", 1)
        await ann.watch("bob")
        await ann.sees("bob", "active")
        world.give("bob", "shard-b")
        await eventually(lambda: watched_at(world, 1) == {"bob"} and not watched_at(world, 0))
        await eventually(lambda: shard_b._sessions.live == 1)
        await bob.send("VISIBILITY", state="hidden")
        await ann.sees("bob", "active", "idle")
        world.give("bob", "shard-a")
        world.give("bob", "shard-b")
        world.give("bob", "shard-a")
        await eventually(lambda: watched_at(world, 0) == {"bob"} and not watched_at(world, 1))
        await bob.send("VISIBILITY", state="focused")
        await ann.sees("bob", "active", "idle", "active")


async def test_the_watchers_own_move_changes_nothing(postgres_dsn: str) -> None:
    """The watcher's slot moves: its watches stay, for they are the gateway's."""
    async with World(postgres_dsn) as world:
        await world.kit.start_shard("shard-b", spread=False)
        ann, bob = await world.come("ann"), await world.come("bob")
        await ann.watch("bob")
        await ann.sees("bob", "active")
        world.give("ann", "shard-b")
        await bob.send("VISIBILITY", state="idle")
        await ann.sees("bob", "active", "idle")


async def test_a_restarted_shard_shows_nobody_offline(postgres_dsn: str) -> None:
    """The shard of the watched is replaced: watched again, no flap, and later changes arrive."""
    async with World(postgres_dsn, grace_s=60.0) as world:
        world.kit.skip(61)  # the shard knows by now who is not there
        ann, bob = await world.come("ann"), await world.come("bob")
        await ann.watch("bob", "cat")
        await ann.sees("bob", "active")
        await ann.sees("cat", "offline")
        await world.kit.shards[0].stop()
        world.kit.coordinator.forget("shard-a")
        await world.kit.start_shard("shard-a")
        await eventually(lambda: watched_at(world, 1) == {"bob", "cat"}, what="watched again")
        await bob.answer("VISIBILITY", state="hidden")
        await ann.sees("bob", "active", "idle")
        await world.come("cat")
        await ann.sees("cat", "offline", "active")


async def test_an_answer_lost_with_its_shard_is_asked_for_again(postgres_dsn: str) -> None:
    """WATCH_PRESENCE sent while the watcher's shard is away takes effect at its successor."""
    async with World(postgres_dsn) as world:
        await world.kit.start_shard("shard-b", spread=False)
        world.give("bob", "shard-b")
        ann = await world.come("ann")
        world.kit.shard._watch.ask = world.kit.shard._sessions._watch = lambda *_: None  # never answers
        await ann.send("WATCH_PRESENCE", userIds=["bob"], id="w")
        await eventually(lambda: bool(world.gateways[0].owners.watches))
        world.give("ann", "shard-b")
        await eventually(lambda: [f for f in ann.frames if f.get("id") == "w"], what="OK")
        await ann.sees("bob", "offline")


async def test_nobody_may_watch_unless_the_policy_says_so(postgres_dsn: str) -> None:
    """The default is nobody: ERROR not_permitted; an empty list is fine; nothing is watched anywhere."""
    async with World(postgres_dsn, policy={}) as world:
        ann = await world.come("ann")
        refused = await ann.watch("bob")
        assert (refused["type"], refused["code"], refused["temporary"]) == ("ERROR", "not_permitted", False)
        assert (await ann.watch())["type"] == "OK"
        assert not watched_at(world)
        await world.come("bob")
        assert ann.told("bob") == []


async def test_a_withdrawn_permission_ends_the_watch(postgres_dsn: str) -> None:
    """Whether one still may watch is asked again: a tenant that turns watching off ends it everywhere."""
    async with World(postgres_dsn, presence={"recheck_s": 0.2}) as world:
        ann, bob = await world.come("ann"), await world.come("bob")
        await ann.watch("bob")
        await ann.sees("bob", "active")
        await world.set_policy({"presence": {"watch": "nobody"}})
        ended = await eventually(lambda: [f for f in ann.frames if f["type"] == "ERROR"])
        assert ended[0]["code"] == "not_permitted"
        await eventually(lambda: not watched_at(world))
        await bob.answer("VISIBILITY", state="idle")
        assert ann.told("bob") == ["active"]


async def test_bounds_are_told(postgres_dsn: str) -> None:
    """Too many users for a connection is invalid, for the gateway busy; what was watched before stays."""
    async with World(postgres_dsn, presence={"max_per_connection": 3, "max_per_gateway": 4}) as world:
        ann, cat = await world.come("ann"), await world.come("cat")
        assert (await ann.watch("a", "b", "c", "d"))["code"] == "invalid"
        assert (await ann.watch("a", "b", "c", "a"))["type"] == "OK"
        full = await cat.watch("x", "y")
        assert (full["code"], full["temporary"]) == ("busy", True)
        await eventually(lambda: watched_at(world) == {"a", "b", "c"})
        assert (await cat.watch("x"))["type"] == "OK"
        assert (await ann.watch("a", "b"))["type"] == "OK"


async def test_tenants_never_see_each_other(postgres_dsn: str) -> None:
    """The same user id in another tenant is another user (T11)."""
    async with World(postgres_dsn) as world:
        ann = await world.come("ann")
        await ann.watch("bob")
        await ann.sees("bob", "offline")
        await world.kit.gateway.attach_ready(1, "bob", tenant="other")
        await asyncio.sleep(0.2)  # twenty times the coalescing time
        assert ann.told("bob") == ["offline"]


async def test_a_shard_that_is_not_the_owner_says_so(postgres_dsn: str) -> None:
    """Watching and asking at another shard than the owner is answered with moved, never with offline."""
    async with World(postgres_dsn) as world:
        world.give("bob", None)
        await eventually(lambda: not world.kit.shard._owns(slot_of(TENANT, "bob")))
        link = world.kit.gateway.link
        told: list[Any] = []
        world.kit.gateway.receive = lambda link, message, request: told.append(message)  # type: ignore[method-assign]
        link.send_nowait(PresenceWatch(TENANT, ["bob"]))
        await eventually(lambda: told)
        assert (told[0].users, told[0].moved) == ([], ["bob"])
        with pytest.raises(RemoteError) as refused:
            await link.request(PresenceQuery(TENANT, ["bob"]))
        assert refused.value.code == "moved"


async def test_a_device_with_several_connections_is_one_device(postgres_dsn: str) -> None:
    """Tabs of one browser are one device with the best attention and a count; others stand beside it."""
    async with World(postgres_dsn) as world:
        first = await world.come("bob", device="laptop")
        second = await world.come("bob", device="laptop")
        await world.come("bob", device="phone")
        await first.answer("VISIBILITY", state="hidden")
        await second.answer("VISIBILITY", state="focused")
        reply = await world.kit.router.link.request(PresenceQuery(TENANT, ["bob", "nobody"]))
        bob, nobody = reply.users
        assert [(d.device, d.attention, d.connections) for d in bob.devices] == [
            ("laptop", "focused", 2), ("phone", "visible", 1),
        ]  # fmt: skip
        assert (bob.status, nobody.status, nobody.devices) == ("active", "offline", [])
