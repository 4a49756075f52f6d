"""The promises of G1-G9 as checks of a world: what must hold at the end, once everything works again."""

from __future__ import annotations

import asyncio
from collections import Counter

from carillon.ids import slot_of, uuid_text
from tests.simulation.devices import Device
from tests.simulation.kept import waits
from tests.simulation.merging import check_merged, grown, told_by
from tests.simulation.store import CLAIMABLE, Delivery, Note
from tests.simulation.waiting import tomorrow
from tests.simulation.world import SETTINGS, TENANT, World
from tests.unit.session_model import STATES

MAX_ATTEMPTS = SETTINGS.push.max_attempts
TOLD_MS = 100
"""What expires is told within so long."""
REATTACHED_S = 3.0
"""So long after a failpoint every connection is attached again."""
MOVED_S = 1.0
"""So long after a slot has moved its connections are attached at its new owner."""
DEAD_PEER_S = 36.0
"""Pings find a dead peer within 33 s; grace follows."""


def settled(world: World) -> list[str]:
    """What is still on its way; empty when the world has come to rest."""
    left = []
    for device in world.devices:
        if not device.connected:
            left.append(f"{device.name} is not connected")
        elif device.view.last_seq < (upto := _last_visible(device)):
            left.append(f"{device.name} is at seq {device.view.last_seq} of {upto}")
    open_ = [d for d in world.db.deliveries.values() if d.state in CLAIMABLE and not tomorrow(world, d)]
    left += [f"push {d.id} is {d.state}, due {d.due_ms - world.clock.now_ms()} ms" for d in open_]
    left += [what for device in world.devices for what in device.undone()]
    left += [
        f"a push of {n.row.id.hex()[-6:]} is kept" for n in world.db.notes.values() if waits(world.db, n)
    ]
    now_ms = world.clock.now_ms()
    for note in world.db.notes.values():  # the count would change while it is looked at
        if note.counted and note.row.expires_ms is not None and note.row.expires_ms > now_ms:
            left.append(
                f"{note.stream.key.user} seq {note.row.seq} expires in {note.row.expires_ms - now_ms} ms"
            )
    unanswered = sum(entry.outcome is None and not entry.abandoned for entry in world.published)
    if unanswered:
        left.append(f"{unanswered} events have no outcome")
    return left[:5]


def _last_visible(device: Device) -> int:
    feed = device.view.store
    return next((row.seq for row in reversed(feed.rows) if not feed.hidden(row.seq)), 0)


async def check_end(world: World) -> None:
    """Judge a world at rest."""
    for what in world.db.wrong:
        world.violated(what)
    _durable(world)
    _idempotent(world)
    _streams(world)
    _views(world)
    _changes(world)
    check_merged(world)
    _pushes(world)
    await _fresh_look(world)


def _durable(world: World) -> None:
    """G1: what was acknowledged is there, once, as it was told."""
    for entry in world.published:
        if not entry.acknowledged:
            continue
        assert entry.outcome is not None
        note = world.db.notes.get(entry.outcome.id)
        who = f"{entry.event.user} {entry.event.id.hex()[-6:]}"
        if note is None:
            world.violated(f"G1: {who} was acknowledged and is not there")
        elif note.stream.key.user != entry.event.user and not entry.outcome.replayed:
            world.violated(f"G1: {who} is {note.stream.key.user}'s")
        elif entry.outcome.seq and note.row.seq != entry.outcome.seq:
            world.violated(f"G1: {who} was told seq {entry.outcome.seq}, has {note.row.seq}")
        elif entry.outcome.id != told_by(world, entry.event.id) and entry.event.idempotency_key is None:
            world.violated(f"G1: {who} was answered with another id")

    titles = Counter(note.event.content for note in world.db.notes.values())
    for content, count in titles.items():
        if count > 1:
            world.violated(f"G1: one event was stored {count} times: {content[:40]}")


def _idempotent(world: World) -> None:
    """G2: one key, one effect, one id."""
    by_key: dict[str, set[bytes]] = {}
    for entry in world.published:
        key = entry.event.idempotency_key
        if key is not None:
            by_key.setdefault(key, set()).add(entry.event.id)
    for key, ids in by_key.items():
        there = [raw for raw in ids if raw in world.db.notes or raw in world.db.merged]
        if len(there) > 1:
            world.violated(f"G2: key {key} made {len(there)} notifications")
    for entry in world.published:
        key = entry.event.idempotency_key
        if key is not None and entry.acknowledged:
            assert entry.outcome is not None
            if told_by(world, world.db.keys.get((TENANT, key), (b"", b"", 0))[1]) != entry.outcome.id:
                world.violated(f"G2: key {key} was answered with two ids")


def _streams(world: World) -> None:
    """G3: seq without gap, rev strictly increasing, unread as the rows say; one notification per event."""
    for stream in world.db.streams.values():
        seqs = [n.row.seq for n in stream.notes]
        if seqs != list(range(1, stream.seq + 1)):
            world.violated(f"G3: {stream.key.user} has seqs {seqs}, head {stream.seq}")
        if stream.unread != sum(n.counted for n in stream.notes):
            world.violated(f"G3: {stream.key.user} counts {stream.unread} unread")


def _views(world: World) -> None:
    """G4, G5: what every device shows is what the store has."""
    for device in world.devices:
        feed, notes = device.view.store, device.view.notes
        for row in feed.rows:
            shown = notes.get(uuid_text(row.id))
            if shown is None:
                if not feed.hidden(row.seq):
                    world.violated(f"G5: {device.name} does not show seq {row.seq}")
                continue
            if row.retracted_ms is not None:
                world.violated(f"G5: {device.name} shows seq {row.seq}, which was retracted")
                continue
            if row.expires_ms is None and f'"title":"{shown.title}"' not in row.content:
                world.violated(f"G5: {device.name} shows seq {row.seq} as {shown.title}: {row.content}")
            states = {name for name in STATES if getattr(row, f"{name}_ms") is not None}
            if shown.states != states:
                world.violated(f"G5: {device.name} shows seq {row.seq} as {shown.states}, it is {states}")
        if len(notes) > len(feed.rows):
            world.violated(f"G5: {device.name} shows {len(notes)} of {len(feed.rows)} notifications")


def _changes(world: World) -> None:
    """What a device asked for over a connection that lived on was done, or refused: once."""
    for device in world.devices:
        for what in device.undone():
            world.violated(what)
        for number, times in device.answered.items():
            if times > 1:
                world.violated(f"{device.name} was answered {times} times to {number}")


def _pushes(world: World) -> None:
    """G6, G7: every notification whose push was planned was pushed, or somebody has it, or it is dead."""
    acked: dict[str, set[bytes]] = {}
    for device in world.devices:
        acked.setdefault(device.user, set()).update(device.acked)
    received = world.provider.received
    for stream in world.db.streams.values():
        user = stream.key.user
        for note in stream.notes:
            who = f"{user} seq {note.row.seq}"
            every = world.db.of_note.get(note.row.id, [])
            planned = [delivery for delivery in every if delivery.channel not in ("withdraw", "replace")]
            reached = any(world.db.reached(delivery) for delivery in planned)
            if note.row.retracted_ms is not None and reached and all(d.channel != "withdraw" for d in every):
                world.violated(f"G7: {who} was retracted and is not taken back")
            asked = note.event.channels
            wants = asked is None or "push" in asked
            merged = note.row.id in grown(world)  # what was merged into it has pushes of its own
            if len({delivery.channel for delivery in planned}) < len(planned) and not merged:
                world.violated(f"G7: {who} has one channel twice")
            if not planned and note.kept is not None:
                if note.row.id not in acked.get(user, ()) and not stopped(note):
                    world.violated(f"G6: nobody has {who}, and its push was ended: {note.kept}")
                continue
            if not planned:
                has_phone = (TENANT, user, f"{user}-phone") in world.db.devices
                if wants and has_phone and user not in world.lost_targets and not stopped(note):
                    world.violated(f"G6: {who} has no push although the user has a phone")
                continue
            taken = [received.get((note.row.id, f"{user}-{name}"), 0) for name in ("phone", "pad")]
            for delivery in planned:
                wrong = _wrong_end(world, delivery, any(taken), note.row.id in acked.get(user, ()))
                if wrong:
                    world.violated(
                        f"{wrong}: {delivery.channel} of {who}, {delivery.state}: {delivery.reason}"
                    )
            if max(taken) > 1 and not world.faults and not merged:
                world.violated(f"G7: {who} was pushed {taken} times without any fault")


def stopped(note: Note) -> bool:
    """Its service wants no push of it any more."""
    return note.row.retracted_ms is not None or note.cancelled_ms is not None


def _wrong_end(world: World, delivery: Delivery, taken: bool, acked: bool) -> str:
    """Why a row must not have ended as it did; empty if it may."""
    note, reason = delivery.note, delivery.reason or ""
    user = note.stream.key.user
    # Of what grew, the event that was merged may have named the channels.
    excused = user in world.lost_targets or bool(note.event.fallback) or note.row.id in grown(world)
    if (stopped(note) and delivery.state != "sent") or tomorrow(world, delivery):
        return ""
    if delivery.carrier is not None and delivery.carrier != delivery.id:
        spoke = world.db.deliveries[delivery.carrier]
        why = spoke.reason or ""
        ended = spoke.state in ("sent", "dead") or why.startswith("no ") or "falls back to" in why
        return "" if ended or acked or user in world.read_all else "G6: nobody spoke for it"
    if reason == "removed" or (reason == "expired" and note.row.expires_ms is not None):
        return ""
    if delivery.state == "sent":
        return "" if taken else "G7: the provider never got it"
    if delivery.state == "dead":
        allowed = (
            note.row.expires_ms is not None
            or delivery.attempts - delivery.base_attempt >= MAX_ATTEMPTS
            or excused
        )
        return "" if allowed else f"G7: given up after {delivery.attempts} tries"
    if "falls back to" in reason:
        rows = world.db.of_note[note.row.id]
        # With one that was planned later, of what was merged since, that one's chain is gone on with.
        fell = [o for o in rows if "falls back to" in (o.reason or "")]
        last = max(fell, key=lambda o: (o.created_ms, o.step, o.id))
        follows = any(o.step > delivery.step for o in rows) or (
            last.created_ms > delivery.created_ms and any(o.step > last.step and o.id > last.id for o in rows)
        )
        return "" if follows else "G7: nothing follows"
    if reason == "superseded":  # by the push of what was merged into it, which is judged itself
        later = world.db.of_note[note.row.id]
        return (
            ""
            if any(o.channel == delivery.channel and o.id > delivery.id for o in later)
            else "G6: by nothing"
        )
    if reason.startswith("no "):
        return "" if excused else "G6: the user has a phone"
    if delivery.chain and any(other.state == "sent" for other in world.db.of_note[note.row.id]):
        return ""  # another channel of the same step succeeded
    # MARK_ALL_READ means what is committed when it is applied. Nothing follows what failed after it:
    # the user had it by then. (One that failed before falls back, and what follows is judged itself.)
    read_ms = note.row.read_ms
    while_read = bool(delivery.chain) and read_ms is not None and read_ms <= delivery.due_ms
    read = user in world.read_all and (reason == "read" or while_read)
    return "" if acked or read else "G6: nobody has it"


async def _unseen(world: World) -> list[str]:
    """Users who are connected and offline."""
    present = await world.presence()
    here = {device.user for device in world.devices if device.served}
    return [user for user, status in present.items() if status == "offline" and user in here]


def _attached_by(world: World, user: str) -> float:
    """When the connections of a user are attached where its slot is now."""
    return world.db.moved_at.get(slot_of(TENANT, user), 0.0) + MOVED_S


async def _fresh_look(world: World) -> None:
    """A new device sees the same head and the same count; presence tells who is there."""
    unseen = await _unseen(world)
    if world.at_try or world.wire or world.db.at_statement:
        # A failpoint may have gone off after everything had come to rest: gateways attach again.
        deadline = world.loop.now + REATTACHED_S
        while unseen and world.loop.now < deadline:
            await asyncio.sleep(0.25)
            unseen = await _unseen(world)
    # A query does not wait for sockets that are just being attached to a new owner, as presence.md says: of a
    # slot that moved a moment ago, and of no other, it may be asked again until that moment is over.
    while unseen and all(world.loop.now < _attached_by(world, user) for user in unseen):
        await asyncio.sleep(0.05)
        unseen = await _unseen(world)
    for user in unseen:
        world.violated(f"G8: {user} is connected and offline")
    looks = []
    for user in sorted({device.user for device in world.devices}):
        look = Device(world, user, 99)
        look.acks = "never"
        look.come()
        looks.append(look)
    await asyncio.sleep(3.0)
    now_ms = world.clock.now_ms()
    for look in looks:
        stream = world.db.streams.get(world.key(look.user))
        if not look.welcome or stream is None:
            world.violated(f"G5: {look.name} could not connect")
            continue
        ends = [n.row.expires_ms for n in stream.notes if n.counted and n.row.expires_ms is not None]
        counts = {stream.unread - sum(end <= at for end in ends) for at in (now_ms, now_ms - TOLD_MS)}
        seen = look.welcome
        if (seen["lastSeq"], seen["rev"]) != (stream.seq, stream.rev):
            world.violated(
                f"G5: {look.user} is welcomed at {seen['lastSeq']}/{seen['rev']}, "
                f"the store is at {stream.seq}/{stream.rev}"
            )
        if look.view.count not in counts:
            world.violated(f"G3: {look.user} is told {look.view.count} unread, has {counts}")
    for device in (*world.devices, *looks):
        device.leave(clean=False)
    # A connection whose end was lost on the way is found dead by its pings.
    deadline = world.loop.now + DEAD_PEER_S
    while (there := await _there(world)) and world.loop.now < deadline:
        await asyncio.sleep(1.5)
    for user in there:
        world.violated(f"G8: {user} has left {DEAD_PEER_S:.0f} s ago and is not offline")


async def _there(world: World) -> list[str]:
    return [user for user, status in (await world.presence()).items() if status != "offline"]


def summary(world: World) -> Counter[str]:
    """Figures of one run, to see that simulations do something."""
    states = Counter(f"push {d.state}" for d in world.db.deliveries.values())
    states["pushes kept to their end"] = sum(
        note.kept is not None and note.kept[0] != "[" for note in world.db.notes.values()
    )
    return states + Counter(
        {
            "events": len(world.published),
            "acknowledged": sum(e.acknowledged for e in world.published),
            "stored": len(world.db.notes),
            "frames": world.frames,
            "faults": world.faults,
            "unrecovered": world.unrecovered,
            "fenced": world.db.fenced,
            "moves": world.db.moves,
        }
    )
