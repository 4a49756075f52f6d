"""Clients: WebSocket devices that follow the rules given to client authors, and what they must see.

What a device shows is kept by `tests.unit.session_model.Client`, which asserts order and completeness frame
by frame: a seq that is repeated, out of order or left out fails there.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from carillon.ids import parse_uuid, uuid_text
from carillon.notification import NotificationRow
from tests.simulation.loop import Node
from tests.unit.session_model import Client

if TYPE_CHECKING:
    from tests.simulation.store import Database, StreamRow
    from tests.simulation.world import World

LOOKS = ("focused", "visible", "hidden", "idle")
WATCH_S = 6.0
"""A client looks so often whether its connection lives."""
ACKS = ("prompt", "by_seq", "slow", "never")
"""How a device acknowledges."""


class Feed:
    """A user's rows as the feed shows them: what `Client` reads beside its socket."""

    def __init__(self, db: Database, key: Any) -> None:
        self._db = db
        self._key = key
        self.epoch = ""
        self.pruned: frozenset[int] = frozenset()
        """Nothing is archived in a simulation."""

    @property
    def stream(self) -> StreamRow | None:
        """The user's stream, once there is one."""
        return self._db.streams.get(self._key)

    @property
    def seq(self) -> int:
        """Head."""
        return self.stream.seq if self.stream is not None else 0

    @property
    def rows(self) -> list[NotificationRow]:
        """By seq."""
        return [n.row for n in self.stream.notes] if self.stream is not None else []

    def hidden(self, seq: int) -> bool:
        """A replay may leave it out."""
        row = self.rows[seq - 1]
        return row.retracted_ms is not None or row.expires_ms is not None


class Device:
    """One device of a user: connects, shows, acknowledges, loses its connection, resumes."""

    def __init__(self, world: World, user: str, number: int) -> None:
        self.world = world
        self.user = user
        self.name = f"{user}-{number}"
        self.node = Node(self.name)
        self.view = Client(Feed(world.db, world.key(user)))  # type: ignore[arg-type]
        self.acks = "prompt"
        self.wanted = False  # it wants to be connected
        self.keeps_position = True
        self.tells = False  # it sends VISIBILITY
        self.resumes_by_url = True
        self.gateway = ""
        self._server: Node | None = None
        self.welcome: dict[str, Any] = {}
        self.acked: set[bytes] = set()
        """Notifications of which an acknowledgement or a change left this device."""
        self.asked: dict[int, tuple[_Socket, str, list[str]]] = {}
        """Changes that were sent and not refused, by the `id` of their frame."""
        self.answered: dict[int, int] = {}
        """How often each of them was answered."""
        self._asks = 0
        self._socket: _Socket | None = None
        self._retry: Any = None

    # -- what the scenario turns ------------------------------------------------------------------------

    def come(self) -> None:
        """Want to be connected."""
        self.wanted = True
        if self._socket is None and self._retry is None:
            self._again(0.0)

    def leave(self, *, clean: bool) -> None:
        """Go away: with a close frame, or without a word."""
        self.wanted = False
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        socket, self._socket = self._socket, None
        if socket is not None:
            self.world.say(self.name, "leaves" if clean else "is cut off")
            socket.end(clean=clean)

    def drop(self) -> None:
        """Lose the connection, come back."""
        socket, self._socket = self._socket, None
        if socket is not None:
            self.world.say(self.name, "loses its connection")
            socket.end(clean=False)
        if self.wanted:
            self._again(self.world.rng.uniform(0.0, 2.0))

    def stall(self, seconds: float) -> None:
        """Read nothing for a while."""
        socket = self._socket
        if socket is not None and socket.stream is not None:
            self.world.say(self.name, f"reads nothing for {seconds:.1f} s")
            socket.stream.pause_reading()
            self.world.loop.call_later(seconds, socket.stream.resume_reading, context=self.node.context)

    def send(self, frame: dict[str, Any]) -> None:
        """Send a frame, if connected and welcomed."""
        if self._socket is not None and self.welcome:
            self._socket.send(frame)

    @property
    def connected(self) -> bool:
        """Welcomed, with its position answered."""
        return self._socket is not None and bool(self.welcome) and not self.view.asked

    @property
    def served(self) -> bool:
        """Connected to a gateway that lives: one that went with its machine tells nobody."""
        return self.connected and self._server is not None and not self._server.dead

    # -- connecting -------------------------------------------------------------------------------------

    def _again(self, wait_s: float) -> None:
        self._retry = self.world.loop.call_later(wait_s, self._dial, context=self.node.context)

    def _dial(self) -> None:
        self._retry = None
        self.world.loop.create_task(self._connect(), context=self.node.context)

    async def _connect(self) -> None:
        world = self.world
        if not self.wanted or self._socket is not None:
            return
        found = world.pick_gateway()
        if found is None:
            self._again(0.5)
            return
        self.gateway, port = found
        self._server = world.nodes[self.gateway]
        socket = self._socket = _Socket(self)
        try:
            async with asyncio.timeout(5.0):
                socket.stream, _ = await world.loop.create_connection(lambda: socket, "127.0.0.1", port)
        except (OSError, TimeoutError):
            if self._socket is socket:
                self._socket = None
                self._again(world.rng.uniform(0.1, 1.5))
            return
        if self._socket is not socket:
            socket.end(clean=False)
            return
        view = self.view
        has = view.epoch is not None and self.keeps_position
        path = f"/ws?token={world.token(self.user)}&deviceId={self.name}"
        with_rev = has and world.rng.random() < 0.9
        by_url = self.resumes_by_url
        if has:
            epoch, seq, rev = view.position(with_rev)
            rev = view.last_rev
            if by_url:
                path += f"&epoch={epoch}&lastSeq={seq}" + ("" if rev is None else f"&lastRev={rev}")
        view.connected(has)
        self.welcome = {}
        socket.resume = None
        if has and not by_url:
            socket.resume = {"type": "RESUME", "epoch": view.epoch, "lastSeq": view.last_seq}
            if view.last_rev is not None:
                socket.resume["lastRev"] = view.last_rev
        self._watch(socket)
        world.say(self.name, f"connects to {self.gateway}, position {view.position()[1:] if has else None}")
        socket.open(path)

    def _watch(self, socket: _Socket) -> None:
        """A connection on which nothing comes, not even an answer to PING, is dead."""
        if socket.ended or self._socket is not socket:
            return
        quiet_s = self.world.loop.now - socket.heard_at
        if quiet_s > 2.5 * WATCH_S:
            self.drop()
            return
        if quiet_s > 0.9 * WATCH_S:
            self.send({"type": "PING"})
        self.world.loop.call_later(WATCH_S, self._watch, socket, context=self.node.context)

    def lost(self, socket: _Socket, code: int) -> None:
        """The socket is gone."""
        if self._socket is not socket:
            return
        self._socket = None
        self.world.say(self.name, f"is disconnected ({code})")
        if code == 4001:
            self.world.forget_token(self.user)
        self.world.closes[code] = self.world.closes.get(code, 0) + 1
        if self.wanted:
            self._again(self.world.rng.uniform(0.05, 1.5))

    # -- frames -----------------------------------------------------------------------------------------

    def take(self, raw: bytes) -> None:
        """One frame of the server."""
        frame = json.loads(raw)
        kind = frame["type"]
        world = self.world
        if world.tracing:
            shown = {k: v for k, v in frame.items() if k not in ("type", "notification", "serverTime")}
            if "notification" in frame:
                shown = {"seq": frame["notification"]["seq"], "rev": frame["notification"]["rev"]}
            world.say(self.name, f"<- {kind} {shown}")
        try:
            if kind not in ("OK", "PONG", "PRESENTATION"):
                self.view.handle(raw)
        except AssertionError as exc:
            world.violated(f"G3/G5: {self.name}: {exc}")
        if kind in ("OK", "ERROR") and "id" in frame:
            self.answered[frame["id"]] = self.answered.get(frame["id"], 0) + 1
            if kind == "ERROR":
                self.asked.pop(frame["id"], None)
        if kind == "WELCOME":
            first = not self.welcome
            self.welcome = frame
            if frame["recovered"] is False:
                world.unrecovered += 1
            if first and self._socket is not None:
                self._first_frame(self._socket)
        elif kind == "NEW_NOTIFICATION":
            world.frames += 1
            self._acknowledge(frame["notification"])
        elif kind == "NOTIFICATION_UPDATED":
            self._acknowledge(frame["notification"])

    def _first_frame(self, socket: _Socket) -> None:
        if socket.resume is not None:
            socket.send(socket.resume)
        elif self.world.rng.random() < 0.3:
            socket.send({"type": "PING"})
        if self.tells:
            self.look(self.world.rng.choice(LOOKS))

    def look(self, state: str) -> None:
        """Tell where the user looks."""
        if self.tells:
            self.send({"type": "VISIBILITY", "state": state})

    def _acknowledge(self, shown: dict[str, Any]) -> None:
        world, how = self.world, self.acks
        if how == "never":
            return
        wait_s = world.rng.uniform(0.0, 0.05) if how != "slow" else world.rng.uniform(1.0, 9.0)
        raw = parse_uuid(shown["id"])
        assert raw is not None
        if self._socket is not None:
            self._socket.shown_rev = max(self._socket.shown_rev, shown["rev"])
        world.loop.call_later(wait_s, self._ack, shown["seq"], raw, context=self.node.context)

    def _ack(self, seq: int, raw: bytes) -> None:
        if self._socket is None or not self.welcome or self._socket.ended:
            return
        if self.acks == "by_seq":
            self.acked |= {row.id for row in self.view.store.rows[:seq]}
            self._socket.send({"type": "ACK", "seq": seq, "rev": self._socket.shown_rev})
        else:
            self.acked.add(raw)
            self._socket.send({"type": "ACK", "notificationIds": [uuid_text(raw)]})

    def change(self, kind: str) -> None:
        """Change a notification that is shown."""
        notes = list(self.view.notes)
        if not notes or not self.connected:
            return
        rng = self.world.rng
        some = rng.sample(notes, min(len(notes), rng.choice((1, 1, 2, 5))))
        if kind == "MARK_ALL_READ":
            self.acked |= {raw for key in notes if (raw := parse_uuid(key))}
            self.world.read_all.add(self.user)
            self._ask({"type": kind}, [])
        elif kind in ("MARK_READ", "MARK_SEEN"):
            self.acked |= {raw for key in some if (raw := parse_uuid(key))}
            self._ask({"type": kind, "notificationIds": some}, some)
        else:
            self.acked.add(parse_uuid(some[0]) or b"")
            self._ask({"type": kind, "notificationId": some[0]}, some[:1])

    def _ask(self, frame: dict[str, Any], ids: list[str]) -> None:
        if self._socket is not None and self._socket.stream is not None and self.welcome:
            self._asks += 1
            self.asked[self._asks] = (self._socket, frame["type"], ids)
            self._socket.send(frame | {"id": self._asks})

    def undone(self) -> list[str]:
        """Changes that were sent over the connection that is still there, and neither made nor refused."""
        states = {uuid_text(row.id): row for row in self.view.store.rows}
        wrong = []
        for number, (socket, kind, ids) in self.asked.items():
            if socket is not self._socket or socket.ended:
                continue  # it does not know, and would ask again
            column = {"MARK_READ": "read", "MARK_SEEN": "seen", "ARCHIVE": "archived", "DISMISS": "dismissed",
                      "CLICK": "clicked"}.get(kind)  # fmt: skip
            left = [key for key in ids if column and getattr(states[key], f"{column}_ms") is None]
            if any(states[key].retracted_ms is None for key in left):
                wrong.append(f"a change is lost: {kind} {number} of {self.name}")
            elif number not in self.answered:
                wrong.append(f"a change is not answered: {kind} {number} of {self.name}")
        return wrong


class _Socket(asyncio.Protocol):
    """The client's end of one WebSocket (RFC 6455), as little of it as there has to be."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.stream: Any = None
        self.resume: dict[str, Any] | None = None
        self.ended = False
        self.shown_rev = 0
        self.heard_at = device.world.loop.now
        self._buffer = b""
        self._shaken = False
        self._code = 1006

    def open(self, path: str) -> None:
        self.stream.write(
            f"GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Protocol: carillon.v1.json\r\n\r\n".encode()
        )

    def send(self, frame: dict[str, Any]) -> None:
        data = json.dumps(frame, separators=(",", ":")).encode()
        if self.device.world.tracing:
            self.device.world.say(self.device.name, f"-> {data.decode()}")
        self._write(0x81, data)

    def _write(self, first: int, data: bytes) -> None:
        if not self.ended and self.stream is not None:
            size = len(data)
            head = (
                bytes((first, 0x80 | size)) if size < 126 else bytes((first, 0xFE)) + size.to_bytes(2, "big")
            )
            self.stream.write(head + bytes(4) + data)  # masked with zeros: valid, and the payload stays

    def end(self, *, clean: bool) -> None:
        if self.ended or self.stream is None:
            self.ended = True
            return
        if clean:
            self._write(0x88, (1000).to_bytes(2, "big"))
            self.ended = True
            self.stream.close()
        else:
            self.ended = True
            self.stream.abort()

    # -- asyncio ----------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        pass

    def resume_writing(self) -> None:
        pass

    def eof_received(self) -> None:
        pass

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self.device.lost(self, self._code)

    def data_received(self, data: bytes) -> None:
        if self.ended:
            return
        self.heard_at = self.device.world.loop.now
        data = self._buffer + data
        if not self._shaken:
            head, found, rest = data.partition(b"\r\n\r\n")
            if not found:
                self._buffer = data
                return
            if b" 101 " not in head[:16]:
                self.device.world.violated(f"handshake refused: {head[:80]!r}")
            self._shaken = True
            data = rest
        at = 0
        while len(data) - at >= 2:
            size = data[at + 1] & 0x7F
            start = at + 2
            if size == 126:
                if len(data) - at < 4:
                    break
                size = int.from_bytes(data[at + 2 : at + 4], "big")
                start = at + 4
            elif size == 127:
                size = int.from_bytes(data[at + 2 : at + 10], "big")
                start = at + 10
            if len(data) < start + size:
                break
            self._take(data[at] & 0x0F, data[start : start + size])
            at = start + size
            if self.ended:
                return
        self._buffer = data[at:]

    def _take(self, opcode: int, payload: bytes) -> None:
        if opcode == 1:
            self.device.take(payload)
        elif opcode == 9:
            self._write(0x8A, payload)
        elif opcode == 8:
            self._code = int.from_bytes(payload[:2], "big")
            self._write(0x88, payload[:2])
            self.stream.close()
