"""Devices of one user on real transports, a real shard and PostgreSQL: equal at every rest, badges right."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import json
import os
import uuid
from random import Random
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.fuzz.schema import check_server_frame
from tests.integration.transports_world import Stream, Transports
from tests.support import eventually

SEEDS = range(1, 1 + max(3, int(os.environ.get("FUZZ_EXAMPLES", "60")) // 20))
ROUNDS = 6
STEPS = 14
STATES = ("read", "seen", "archived", "dismissed", "clicked")
HISTORY = """
create table counted (rev bigint primary key, seq bigint, unread int);
create function note_count() returns trigger language plpgsql as $$
begin
  insert into counted values (new.rev, new.seq, new.unread)
    on conflict (rev) do update set unread = excluded.unread;
  return new;
end $$;
create trigger note_count after insert or update of rev on streams
  for each row execute function note_count();
"""
"""PostgreSQL itself writes down what the count was at every rev."""


class Notes:
    """What a device shows, by the rules of docs/how-to/write-a-client.md."""

    def __init__(self) -> None:
        self.states: dict[str, set[str]] = {}
        self.titles: dict[str, str] = {}
        self.seqs: dict[str, int] = {}
        self.stamps: list[tuple[int, int]] = []
        """(rev, count) as it was told."""

    @property
    def badge(self) -> int:
        return sum(not states & {"read", "archived", "dismissed"} for states in self.states.values())

    def put(self, one: dict[str, Any]) -> None:
        self.seqs[one["id"]] = one["seq"]
        self.titles[one["id"]] = one["title"]
        self.states.setdefault(one["id"], set()).update(name for name in STATES if one.get(name))

    def change(self, frame: dict[str, Any]) -> None:
        kind = check_server_frame(frame)
        if kind == "NOTIFICATION_UPDATED":
            if frame["notification"]["id"] in self.states:
                self.put(frame["notification"])
            return
        if kind == "NOTIFICATION_RETRACTED":
            self.states.pop(frame["notificationId"], None)
            self.titles.pop(frame["notificationId"], None)
            return
        if kind == "ALL_NOTIFICATIONS_READ":
            for key, states in self.states.items():
                if self.seqs[key] <= frame["upToSeq"] and not states & {"archived", "dismissed"}:
                    states.update(("read", "seen"))
            return
        more = {
            "NOTIFICATIONS_READ": ("read", "seen"),
            "NOTIFICATIONS_SEEN": ("seen",),
            "NOTIFICATION_CLICKED": ("clicked", "read", "seen"),
            "NOTIFICATION_ARCHIVED": ("archived",),
            "NOTIFICATION_DISMISSED": ("dismissed",),
        }[kind]
        for key in frame.get("notificationIds") or [frame["notificationId"]]:
            if key in self.states:
                self.states[key].update(more)


class Device:
    """One that comes and goes: a WebSocket (position in the URL or as RESUME), or an event stream."""

    def __init__(self, world: Transports, name: str, how: str) -> None:
        self.world, self.name, self.how = world, name, how
        self.notes = Notes()
        self.position: tuple[str, int, int] | None = None
        self.asked = False
        self.socket: ClientConnection | None = None
        self.stream: Stream | None = None
        self.answered: set[int] = set()
        self.sent = 0  # frames of this connection that are to be answered
        self.live_at: int | None = None
        """Rev up to which it shows exactly what was; None while it catches up."""
        self.wrong: list[str] = []
        self.left_out: set[int] = set()
        """Seqs that it was never told: only what was retracted meanwhile."""
        self.task: asyncio.Task[None] | None = None

    async def come(self) -> None:
        self.live_at = None
        self.asked = self.position is not None
        query: dict[str, Any] = {"deviceId": self.name}
        if self.position is not None and self.how != "resume":
            query |= dict(zip(("epoch", "lastSeq", "lastRev"), self.position, strict=True))
        if self.how == "stream":
            self.stream = await self.world.stream(**query)
            assert self.stream.status == 200
        else:
            fields = "&".join(f"{name}={value}" for name, value in query.items())
            self.socket = await connect(
                f"{self.world.gateway_actor.url}?{fields}", additional_headers=self.world.auth(),
                subprotocols=["carillon.v1.json"], proxy=None,  # type: ignore[list-item]
            )  # fmt: skip
            if self.position is not None and self.how == "resume":
                epoch, seq, rev = self.position
                await self.socket.send(
                    json.dumps({"type": "RESUME", "epoch": epoch, "lastSeq": seq, "lastRev": rev})
                )
            else:
                await self.socket.send('{"type":"PING"}')
        self.task = asyncio.create_task(self._listen())

    @property
    def there(self) -> bool:
        return self.task is not None

    async def leave(self, *, clean: bool = True) -> None:
        if self.socket is not None:
            if clean:
                await self.socket.close()
            else:
                self.socket.transport.abort()
        if self.stream is not None:
            await self.stream.close()
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        self.socket = self.stream = self.task = None
        self.sent, self.answered = 0, set()

    async def say(self, **frame: Any) -> None:
        """Send a frame that is to be answered."""
        if self.socket is None:
            return
        self.sent += 1
        with contextlib.suppress(ConnectionClosed):
            await self.socket.send(json.dumps(frame | {"id": self.sent}))

    async def _listen(self) -> None:
        if self.stream is not None:
            while (event := await self.stream.event(60.0)) is not None:
                self.take(event.frame)
        elif self.socket is not None:
            with contextlib.suppress(ConnectionClosed):
                async for message in self.socket:
                    self.take(json.loads(message))

    def take(self, frame: dict[str, Any]) -> None:
        kind = check_server_frame(frame)
        if kind == "WELCOME":
            self.notes.stamps.append((frame["rev"], frame["unreadCount"]))
            if frame["recovered"] is None and self.asked:
                return  # the answer is still to come
            if frame["recovered"] is False:
                self.wrong.append(f"{self.name} could not resume")
            if frame["recovered"] is None:
                self.position = (frame["epoch"], frame["lastSeq"], frame["rev"])
            self.asked = False
            return
        if kind in ("OK", "ERROR"):
            self.answered.add(frame.get("id", 0))
            if kind == "ERROR" and frame["code"] != "not_found":
                self.wrong.append(f"{self.name}: {frame}")
            return
        if kind == "PONG":
            return
        assert self.position is not None
        epoch, seq, rev = self.position
        if kind == "NEW_NOTIFICATION":
            one = frame["notification"]
            if one["seq"] <= seq:
                self.wrong.append(f"{self.name}: seq {one['seq']} after {seq}")
            self.left_out.update(range(seq + 1, one["seq"]))
            self.notes.put(one)
            at = one["rev"]
            self.position = (epoch, one["seq"], rev)
        elif kind == "NOTIFICATION_UPDATED":
            self.notes.change(frame)
            at = frame["notification"]["rev"]
        else:
            self.notes.change(frame)
            at = frame["rev"]
            self.position = (epoch, seq, max(rev, at))
        if self.live_at is not None and at > self.live_at:
            self.live_at = at
            self.notes.stamps.append((at, self.notes.badge))


class Paper:
    """A device that only asks GET /api/sync."""

    def __init__(self, world: Transports) -> None:
        self.world = world
        self.notes = Notes()
        self.position: tuple[str, int, int] | None = None

    async def ask(self, limit: int) -> None:
        while True:
            query = f"limit={limit}&rev=0&since=0"
            if self.position is not None:
                query = "limit={}&epoch={}&since={}&rev={}".format(limit, *self.position)
            answer = (await self.world.call("GET", f"/api/sync?{query}")).json()
            assert answer["recovered"] is True
            for one in answer["notifications"]:
                self.notes.put(one)
            for frame in answer["changes"]:
                self.notes.change(frame)
            if answer["epoch"]:
                self.position = (answer["epoch"], answer["lastSeq"], answer["rev"])
            if not answer["more"]:
                self.notes.stamps.append((answer["rev"], answer["unreadCount"]))
                return


async def titles(world: Transports) -> dict[str, str]:
    """Titles by id, from PostgreSQL."""
    rows = await world.db.fetch("select id, content from notifications where retracted_at is null")
    return {str(row["id"]): json.loads(f"{{{row['content']}}}")["title"] for row in rows}


async def truth(world: Transports) -> tuple[dict[str, set[str]], int, int]:
    """States by id, rev and unread, from PostgreSQL."""
    rows = await world.db.fetch(
        "select id, read_at, seen_at, archived_at, dismissed_at, clicked_at from notifications"
        " where retracted_at is null"
    )
    states = {str(row["id"]): {name for name in STATES if row[f"{name}_at"] is not None} for row in rows}
    head = await world.db.fetchrow("select rev, unread from streams")
    return states, *((0, 0) if head is None else tuple(head))


async def stamps_are_true(world: Transports, stamps: list[tuple[int, int]]) -> None:
    """What was told as the count of a rev is what PostgreSQL had there."""
    rows = [tuple(row) for row in await world.db.fetch("select rev, seq, unread from counted order by rev")]
    revs = [row[0] for row in rows]
    for rev, count in stamps:
        if rev == 0:
            assert count == 0
            continue
        at_rev, _, unread = rows[bisect.bisect_left(revs, rev)]
        # A batch of new notifications is one update: each of them is one more unread.
        assert count == unread - (at_rev - rev), f"told {count} at rev {rev}, PostgreSQL had {rows}"


@pytest.mark.parametrize("seed", SEEDS)
async def test_devices_stay_in_step(postgres_dsn: str, seed: int) -> None:
    """Any order of reads, archives, edits, retractions, news, log-ins and losses ends with equal devices and
    true counts."""
    dice = Random(seed)
    shard = {"recent_window": dice.choice((0, 2, 50)), "replay_page": dice.choice((2, 3, 200))}
    async with Transports(postgres_dsn, shard={**shard, "resume_wait_s": 60.0, "grace_s": 0.2}) as world:
        await world.db.execute(HISTORY)
        devices = [Device(world, f"d{n}", how) for n, how in enumerate(("url", "resume", "stream", "url"))]
        paper = Paper(world)
        for device in devices:
            await device.come()
            await eventually(lambda d=device: d.position is not None, what="WELCOME")
        try:
            for _ in range(ROUNDS):
                http: list[asyncio.Task[Any]] = []
                for _ in range(STEPS):
                    await step(world, dice, devices, http)
                    await asyncio.sleep(dice.choice((0, 0, 0.001, 0.01)))
                if dice.random() < 0.4:
                    for device in devices:
                        device.live_at = (
                            None  # what its socket missed comes as after a resume, without a word
                        )
                    await world.lose_shard()
                for task in http:
                    answer = await task
                    gone = answer.status_code == 409 and answer.json()["code"] == "retracted"
                    assert gone or answer.status_code in (200, 202, 404)
                await rest(world, devices, paper, dice)
        finally:
            for device in devices:
                await device.leave()


async def step(world: Transports, dice: Random, devices: list[Device], http: list[asyncio.Task[Any]]) -> None:
    """Something happens."""
    device = dice.choice(devices)
    known = sorted({key for one in devices for key in one.notes.states}) or [str(uuid.uuid4())]
    some = [*dice.sample(known, min(len(known), dice.choice((1, 1, 2, 4)))), str(uuid.uuid4())]
    kind = dice.randrange(14)
    by_socket = dice.random() < 0.6
    if kind < 3:
        events = [{"userId": "ann", "type": "t", "title": "n"} for _ in range(dice.choice((1, 1, 3)))]
        headers = {"Authorization": f"Bearer {world.key}"}
        http.append(asyncio.create_task(world.http.post("/v1/events", json=events, headers=headers)))
    elif kind < 7:
        name, frame = dice.choice((("read", "MARK_READ"), ("seen", "MARK_SEEN")))
        if by_socket:
            await device.say(type=frame, notificationIds=some)
        else:
            body = {"notificationIds": some}
            http.append(asyncio.create_task(world.call("POST", f"/api/notifications/{name}", json=body)))
    elif kind < 9:
        name = dice.choice(("archive", "dismiss", "click"))
        if by_socket:
            await device.say(type=name.upper(), notificationId=some[0])
        else:
            http.append(asyncio.create_task(world.call("POST", f"/api/notifications/{some[0]}/{name}")))
    elif kind == 9:
        body = dice.choice(({}, {"upToSeq": dice.randrange(12)}))
        if by_socket:
            await device.say(type="MARK_ALL_READ", **body)
        else:
            http.append(asyncio.create_task(world.call("POST", "/api/notifications/read-all", json=body)))
    elif kind >= 12:
        headers = {"Authorization": f"Bearer {world.key}"}
        if dice.random() < 0.3:
            act = world.http.post(f"/v1/notifications/{some[0]}/retract", headers=headers)
        else:
            patch = {"title": f"edited {dice.randrange(1000)}"}
            act = world.http.patch(f"/v1/notifications/{some[0]}", json=patch, headers=headers)
        http.append(asyncio.create_task(act))
    elif device.there:
        await device.leave(clean=dice.random() < 0.5)
    else:
        await device.come()


async def rest(world: Transports, devices: list[Device], paper: Paper, dice: Random) -> None:
    """Everybody comes back and hears everything: then all are equal, and every count ever told was true."""
    for device in devices:
        if device.task is not None and device.task.done():
            await device.leave()
        if not device.there:
            await device.come()
        await eventually(
            lambda d=device: len(d.answered) >= d.sent or (d.task is not None and d.task.done()),
            what=f"answers to {device.name}",
        )

    async def in_step() -> bool:
        states, _, _ = await truth(world)
        shown = await titles(world)
        return all(d.notes.states == states and d.notes.titles == shown for d in devices)

    await eventually(in_step, what="all devices in step")
    await paper.ask(dice.choice((1, 2, 200)))
    states, rev, unread = await truth(world)
    gone = await world.db.fetch("select seq from notifications where retracted_at is not null")
    for device in devices:
        assert device.wrong == []
        assert device.left_out <= {row["seq"] for row in gone}
        assert device.notes.states == states
        assert device.notes.badge == unread
        device.live_at = rev
    assert paper.notes.states == states
    assert paper.notes.titles == await titles(world)
    assert paper.notes.badge == unread
    assert (await world.call("GET", "/api/notifications/unread-count")).json() == {
        "count": unread,
        "rev": rev,
    }
    feed = (await world.call("GET", "/api/notifications?limit=100")).json()["notifications"]
    put_away = {key for key, told in states.items() if told & {"archived", "dismissed"}}
    assert {one["id"]: _shown(one) for one in feed} == {k: s for k, s in states.items() if k not in put_away}
    for notes in [paper.notes, *(device.notes for device in devices)]:
        await stamps_are_true(world, notes.stamps)


def _shown(one: dict[str, Any]) -> set[str]:
    return {name for name in STATES if one.get(name)}
