"""What happens in one simulation: traffic, faults, healing and the verdict, all drawn from the seed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

from carillon.messages import Event
from tests.simulation import merging, waiting
from tests.simulation.checks import check_end, settled
from tests.simulation.devices import ACKS, LOOKS, Device
from tests.simulation.world import TENANT, World

USERS = ("ann", "bob", "cat", "dan")
ACTIVE_S = 6.0
"""Traffic and faults take this long."""
HEAL_S = 150.0
"""So long after the last fault everything must be as it should."""


def simulate(seed: int, *, tracing: bool = False, change: Callable[[World], None] | None = None) -> World:
    """Run one simulation. `change` may break the world before it starts (mutation tests)."""
    world = World(seed, tracing=tracing)
    if change is not None:
        change(world)
    world.run(scenario)
    return world


async def scenario(world: World) -> None:
    """Bring up, disturb, heal, judge."""
    rng = world.rng
    await bring_up(world)
    faults = draw_faults(world)
    jobs = [asyncio.ensure_future(traffic(world))]
    jobs += [asyncio.ensure_future(at(world, when, fault)) for when, fault in faults]
    await asyncio.gather(*jobs)
    await asyncio.sleep(rng.uniform(0.0, 2.0))
    heal(world)
    await judge(world)


async def bring_up(world: World) -> None:
    """A cluster that serves."""
    rng = world.rng
    pads = rng.random() < 0.4
    for user in USERS[: rng.choice((1, 2, 3, 4))]:
        for number in range(rng.choice((1, 1, 2))):
            device = Device(world, user, number)
            device.acks = rng.choice(ACKS)
            device.resumes_by_url = rng.random() < 0.6
            device.tells = rng.random() < 0.5
            device.keeps_position = rng.random() < 0.95
            world.devices.append(device)
        if rng.random() < 0.75:
            world.give_phone(user)
        if pads and rng.random() < 0.5:
            world.give_pad(user)
    away = rng.choice((None, "in_app", "both", "push_after"))
    world.db.policies[TENANT] = None if away is None else {"whenAway": away, "holdS": rng.choice((0, 6))}
    users = sorted({device.user for device in world.devices})
    world.add("coordinator", "coordinator")
    await asyncio.sleep(0.05)
    for index in range(rng.choice((1, 2, 2, 3))):
        world.add("shard", f"shard-{'abc'[index]}")
    for index in range(rng.choice((1, 2))):
        world.add("gateway", f"gateway-{index + 1}")
    world.add("router", "router-1")
    world.add("pool", "pool-fcm")
    if pads:
        world.add("pool", "pool-apns")
    world.add("ingress", "ingress-1")
    await asyncio.sleep(1.0)
    waiting.begin(world, TENANT, users)
    for device in world.devices:
        if rng.random() < 0.7:
            device.come()
    await asyncio.sleep(rng.uniform(0.0, 0.5))


# -- traffic --------------------------------------------------------------------------------------------


async def traffic(world: World) -> None:
    """Producers and people."""
    rng = world.rng
    end = world.loop.now + ACTIVE_S
    users = sorted({device.user for device in world.devices})
    pace_s = rng.choice((0.05, 0.2, 0.6))
    while world.loop.now < end:
        await asyncio.sleep(rng.expovariate(1 / pace_s))
        waiting.step(world, TENANT, users)
        what = rng.random()
        if what < world.publish_share:
            publish(world, users)
        elif what < 0.7:
            rng.choice(world.devices).change(
                rng.choice(
                    ("MARK_READ", "MARK_READ", "MARK_SEEN", "MARK_ALL_READ", "ARCHIVE", "DISMISS", "CLICK")
                )
            )
        elif what < 0.8:
            device = rng.choice(world.devices)
            if device.wanted:
                device.leave(clean=rng.random() < 0.5)
            else:
                device.come()
        elif what < 0.88:
            rng.choice(world.devices).drop()
        elif what < 0.91:
            rng.choice(world.devices).acks = rng.choice(ACKS)
        elif what < 0.93:
            rng.choice(world.devices).stall(rng.uniform(0.2, 4.0))
        elif what < 0.955:
            rng.choice(world.devices).look(rng.choice(LOOKS))
        elif what < 0.97:
            world.amend(rng.choice(users))
        else:
            user = rng.choice(users)
            request = rng.random()
            if request < 0.12:
                world.revoke(user)
            elif request < 0.15:
                world.log_out(user)
            elif request < 0.2:
                world.ask_presence(user, f"stranger-{rng.randrange(99)}")
            elif request < 0.25:
                world.replay()
            elif request < 0.3:
                world.prefer(user)
            elif request < 0.45:
                world.change(user, "archive", bytes(16))
            elif request < 0.55:
                world.lose_phone(user)
            elif request < 0.85:
                world.register(user, f"token-{rng.choice(users)}-{rng.randrange(2)}")
            else:
                world.unregister(user)


def publish(world: World, users: list[str]) -> None:
    """One request: one or several events, some with a key, an end, or channels."""
    rng = world.rng
    dice = world.merging
    events: list[Event] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6, 12))):
        more: dict[str, Any] = {}
        if rng.random() < 0.15:
            more["idempotency_key"] = f"k{rng.randrange(6)}"
            more["body_hash"] = hashlib.sha256(bytes([rng.choice((1, 1, 1, 2))])).digest()
        if rng.random() < 0.1:
            more["expires_ms"] = world.clock.now_ms() + rng.choice((500, 2000, 8000))
        if rng.random() < 0.05:
            more["priority"] = 3
        asked = rng.random()
        if asked < 0.1:
            more["channels"] = ["in_app"]
        elif asked < 0.2:
            more["channels"] = ["push"]
        elif asked < 0.4:
            more["channels"] = rng.choice((["fcm"], ["apns"], ["in_app"], ["in_app", "fcm"], ["fcm", "apns"]))
            more["fallback"] = rng.choice((["apns"], ["fcm"], ["push"], ["apns", "push"]))
        if dice is not None and "expires_ms" not in more:  # a client's model shows nothing that can expire
            more |= merging.ask(dice)
        events.append(world.make_event(rng.choice(users), **more))
    world.publish(events)


# -- faults ---------------------------------------------------------------------------------------------


async def at(world: World, when: float, fault: Callable[[World], Any]) -> None:
    """Run one fault at its time."""
    await asyncio.sleep(when)
    world.faults += 1
    await fault(world)


def draw_faults(world: World) -> list[tuple[float, Callable[[World], Any]]]:
    """How much goes wrong, what and when."""
    rng = world.rng
    count = rng.choice((0, 1, 1, 2, 2, 3, 4, 6))
    return [(rng.uniform(0.0, ACTIVE_S), rng.choice(FAULTS)) for _ in range(count)]


async def kill(world: World) -> None:
    """SIGKILL of one process; it is started again, soon or after its lease."""
    rng = world.rng
    name = rng.choice([n for n in world.kinds if world.kinds[n] != "ingress"])
    if world.nodes[name].dead:
        return
    world.kill(name, silent=rng.random() < 0.2)
    await asyncio.sleep(rng.choice((0.0, 0.2, 1.0, 4.0)))
    if world.nodes[name].dead:
        world.start(name)


async def kill_shard(world: World) -> None:
    """SIGKILL of a shard."""
    rng = world.rng
    name = rng.choice(world.named("shard"))
    if world.nodes[name].dead:
        return
    world.kill(name, silent=rng.random() < 0.2)
    await asyncio.sleep(rng.choice((0.0, 0.2, 1.0, 4.0)))
    if world.nodes[name].dead:
        world.start(name)


async def kill_all(world: World) -> None:
    """The power fails."""
    names = [n for n in world.kinds if world.kinds[n] != "ingress"]
    for name in names:
        world.kill(name)
    world.db.down = True
    await asyncio.sleep(world.rng.uniform(0.1, 2.0))
    world.db.down = False
    for name in names:
        if world.nodes[name].dead:
            world.start(name)


async def stop_and_continue(world: World) -> None:
    """SIGSTOP, and SIGCONT when its lease may be over."""
    name = world.rng.choice([n for n in world.kinds if world.kinds[n] != "ingress"])
    world.freeze(name)
    await asyncio.sleep(world.rng.uniform(0.1, 6.0))
    world.thaw(name)


async def stop_shard(world: World) -> None:
    """SIGSTOP and SIGCONT of a shard: a stale owner that goes on where it was."""
    name = world.rng.choice(world.named("shard"))
    world.freeze(name)
    await asyncio.sleep(world.rng.choice((0.5, 3.0, 5.0, 9.0)))
    world.thaw(name)


async def drain_shard(world: World) -> None:
    """A shard gives its slots away and comes again."""
    name = world.rng.choice(world.named("shard"))
    if not world.nodes[name].runs or len(world.named("shard")) < 2:
        return
    world.drain(name)
    await asyncio.sleep(world.rng.uniform(0.5, 3.0))
    world.kill(name)
    world.start(name)


async def add_shard(world: World) -> None:
    """One more shard: slots move to it."""
    name = f"shard-{len(world.kinds)}"
    world.add("shard", name)


async def cut(world: World) -> None:
    """Connections between two processes break."""
    one, other = _pair(world)
    world.say("network", f"{one} - {other}: broken")
    world.network.cut_links(one, other)


async def part(world: World) -> None:
    """Nothing passes between two processes for a while, in one direction or both, and nobody is told."""
    rng, net = world.rng, world.network
    one, other = _pair(world)
    both = rng.random() < 0.6
    world.say("network", f"{one} - {other}: silent{'' if both else ' one way'}")
    net.half_open(one, other, both=both)
    if both:
        net.parted.add(frozenset((one, other)))
        await asyncio.sleep(rng.uniform(0.5, 6.0))
        net.parted.discard(frozenset((one, other)))
        net.cut_links(one, other)


async def stale_owner(world: World) -> None:
    """A shard loses its slots and does not hear of it; others hear late and go on sending to it."""
    rng, net = world.rng, world.network
    shard = rng.choice(world.named("shard"))
    world.say("network", f"{shard} - coordinator: silent; its maps are late")
    pair = frozenset((shard, "coordinator"))
    late = [frozenset((name, "coordinator")) for name in world.kinds if name not in pair]
    net.half_open(shard, "coordinator", both=True)
    net.parted.add(pair)
    for way in late:
        net.slow[way] = rng.uniform(0.0, 1.5)
    await asyncio.sleep(rng.uniform(3.0, 7.0))
    net.parted.discard(pair)
    for way in late:
        net.slow.pop(way, None)
    net.cut_links(shard, "coordinator")


async def slow(world: World) -> None:
    """A slow way between two processes."""
    one, other = _pair(world)
    pair = frozenset((one, other))
    world.say("network", f"{one} - {other}: slow")
    world.network.slow[pair] = world.rng.uniform(0.05, 1.0)
    await asyncio.sleep(world.rng.uniform(0.5, 4.0))
    world.network.slow.pop(pair, None)


def _pair(world: World) -> tuple[str, str]:
    pairs = sorted({tuple(sorted((s.node.name, s.peer.node.name))) for s in world.network.streams})
    return world.rng.choice(pairs) if pairs else ("shard-a", "router-1")  # type: ignore[return-value]


async def store_away(world: World) -> None:
    """PostgreSQL restarts."""
    world.say("postgres", "is away")
    world.db.down = True
    await asyncio.sleep(world.rng.uniform(0.1, 3.0))
    world.db.down = False
    world.say("postgres", "is back")


async def lost_answers(world: World) -> None:
    """Commits whose answers are lost."""
    world.say("postgres", "loses answers")
    world.db.lose_answers = world.rng.choice((0.1, 0.4))
    await asyncio.sleep(world.rng.uniform(0.2, 2.0))
    world.db.lose_answers = 0.0


async def slow_store(world: World) -> None:
    """Statements take long, in any order."""
    world.say("postgres", "is slow")
    world.db.slow_s = world.rng.choice((0.02, 0.2, 1.0))
    await asyncio.sleep(world.rng.uniform(0.5, 3.0))
    world.db.slow_s = 0.0


async def provider_trouble(world: World) -> None:
    """The push provider is down, slow or silent."""
    world.provider.mood = world.rng.choice(("failing", "silent", "slow"))
    world.say("provider", f"is {world.provider.mood}")
    await asyncio.sleep(world.rng.uniform(0.5, 5.0))
    world.provider.mood = "well"


async def suspend(world: World) -> None:
    """The whole machine stands still, then time has jumped."""
    jump_s = world.rng.choice((1.0, 5.0, 30.0))
    world.say("time", f"jumps by {jump_s} s")
    world.loop.now += jump_s


FAULTS = (
    kill, kill, kill_shard, kill_shard, kill_all, stop_and_continue, stop_shard, stop_shard, drain_shard,
    add_shard, stale_owner, stale_owner, cut, cut, part, part, slow, store_away, lost_answers, lost_answers,
    slow_store, provider_trouble, suspend,
)  # fmt: skip


def heal(world: World) -> None:
    """Everything works again; everybody comes back."""
    world.say("scenario", "heals")
    world.db.down = False
    world.db.lose_answers = world.db.slow_s = 0.0
    world.provider.mood = "well"
    world.network.parted.clear()
    world.network.slow.clear()
    for name in world.kinds:
        node = world.nodes[name]
        if node.dead:
            world.start(name)
        elif node.frozen:
            world.thaw(name)
    for device in world.devices:
        device.come()
    waiting.end(world)


async def judge(world: World) -> None:
    """Wait until everything is as it should, and look."""
    deadline = world.loop.now + HEAL_S
    left: list[str] = ["?"]
    while left and world.loop.now < deadline:
        await asyncio.sleep(1.0)
        left = settled(world)
    for what in left:
        world.violated(f"not within {HEAL_S:.0f} s of healing: {what}")
    if not left:
        await asyncio.sleep(0.5)
        await check_end(world)
