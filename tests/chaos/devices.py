"""Devices: they connect, acknowledge or not, leave and come back, and follow the rules of websocket.md."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from typing import Any

import jwt
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from tests.chaos.history import History
from tests.chaos.plant import Plant
from tests.chaos.population import Habit, claims

_numbers = itertools.count(1)


def connection_number() -> int:
    """A new one for every connection of every device."""
    return next(_numbers)


STOP_CODES = range(4001, 4100)
"""Close codes after which a client does not come back."""


class Device:
    """One device of a user.

    Args:
        plant: where to connect.
        history: what it sees goes there.
        rng: its own; its choices do not depend on the speed of others.
        timeout_s: without any frame from the server for so long (pings count) it gives a connection up.
    """

    def __init__(
        self, plant: Plant, history: History, user: str, name: str, habit: Habit, rng: random.Random,
        timeout_s: float,
    ) -> None:  # fmt: skip
        self.user = user
        self.name = name
        self.habit = habit
        self.connected = False
        self.received: dict[str, float] = {}
        """First receipt by notification id, seconds of the run."""
        self.labels: dict[str, float] = {}
        """The same by title: known before the publisher knows the id."""
        self.settling = False
        """True once the run ends: nobody leaves any more."""
        self.gone = False
        """A ghost that has vanished for good."""
        self.stopped: int | None = None
        """The close code that told it to stop."""
        self._plant = plant
        self._history = history
        self._rng = rng
        self._timeout_s = timeout_s
        self._epoch = ""
        self._seq = self._rev = 0
        self._conn = self._noted = 0
        self._answered = True
        self._late: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Live until cancelled."""
        wait_s = 0.1
        try:
            while True:
                if await self._connection():
                    wait_s = 0.1
                if self.stopped is not None:
                    return
                await asyncio.sleep(self._rng.uniform(0, wait_s))
                wait_s = min(2.0, wait_s * 2)
        finally:
            for task in self._late:
                task.cancel()

    def _closed(self, code: int, by: str) -> None:
        """Note the end of the present connection, once."""
        if self._noted != self._conn:
            self._noted = self._conn
            self._history.add("closed", conn=self._conn, code=code, by=by)

    async def _connection(self) -> bool:
        """One connection, from dialling to its end; True if it got a WELCOME."""
        self._conn = connection_number()
        position = [self._epoch, self._seq, self._rev] if self._epoch else None
        self._answered = position is None
        how = "none" if position is None else self._rng.choice(["url", "frame"])
        token = jwt.encode(claims(self.user, time.time()), self._plant.client_secret, algorithm="HS256")
        url = f"{self._plant.ws_url}?token={token}&deviceId={self.name}"
        if position is not None and how == "url":
            url += f"&epoch={self._epoch}&lastSeq={self._seq}&lastRev={self._rev}"
        self._history.add(
            "dial", conn=self._conn, user=self.user, device=self.name, position=position, how=how
        )
        welcomed = False
        by, code = "lost", 1006
        try:
            async with connect(
                url, open_timeout=5, close_timeout=0.5, compression=None, ping_interval=self._timeout_s / 2,
                ping_timeout=self._timeout_s / 2, subprotocols=["carillon.v1.json"],  # type: ignore[list-item]
            ) as socket:  # fmt: skip
                first = json.loads(await asyncio.wait_for(socket.recv(), 15))
                self._frame(first)
                welcomed = first["type"] == "WELCOME"
                if how == "frame":
                    await self._send(
                        socket, type="RESUME", epoch=self._epoch, lastSeq=position[1], lastRev=position[2]
                    )  # type: ignore[index]
                if how == "none" or self.habit.attention != "visible":
                    await self._send(socket, type="VISIBILITY", state=self._attention())
                self.connected = True
                by = await self._live(socket)
                code = 1000
        except ConnectionClosed as exc:
            code = exc.rcvd.code if exc.rcvd is not None else 1006
            by = "server" if exc.rcvd is not None else "lost"
        except (OSError, TimeoutError, WebSocketException, EOFError):
            pass
        finally:
            self.connected = False
            self._closed(code, by)
        if code in STOP_CODES:
            self.stopped = code
        return welcomed

    async def _live(self, socket: ClientConnection) -> str:
        """Receive until the connection ends or the habit says to leave; returns who ended it."""
        if self.habit.ghost:
            receiving = asyncio.ensure_future(self._receive(socket))
            try:
                while not receiving.done() and not self.settling:
                    await asyncio.wait({receiving}, timeout=0.2)
                if receiving.done():
                    receiving.result()
            finally:
                receiving.cancel()
                await asyncio.gather(receiving, return_exceptions=True)
            self.gone = True
            await self._vanish(socket, float("inf"))
        if not self.habit.leaves:
            await self._receive(socket)
        stay_s = self._rng.choice([0.05, 0.3, 2.0, 6.0]) * self._rng.uniform(0.5, 1.5)
        receiving = asyncio.ensure_future(self._receive(socket))
        try:
            done, _ = await asyncio.wait({receiving}, timeout=stay_s)
            while not done and self.settling:
                done, _ = await asyncio.wait({receiving}, timeout=1.0)
            if done:
                receiving.result()
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
        how = self._rng.choice(["normal", "away", "cut", "cut", "vanish"])
        if how == "vanish" and not self.settling:
            await self._vanish(socket, 1.5 * self._rng.random() * (self._timeout_s + 10.0))
        elif how in ("cut", "vanish"):
            socket.transport.abort()
        else:
            await socket.close(1000 if how == "normal" else 1001)
        return "client"

    async def _vanish(self, socket: ClientConnection, for_s: float) -> None:
        """Be gone without a word: the connection stays, nothing is read, no ping is answered."""
        socket.transport.pause_reading()  # type: ignore[attr-defined]
        if socket.keepalive_task is not None:
            socket.keepalive_task.cancel()  # it would close, which is a word
        self.connected = False
        self._closed(1006, "vanished")
        deadline = time.monotonic() + for_s
        while time.monotonic() < deadline and (self.gone or not self.settling):
            await asyncio.sleep(0.2)
        socket.transport.abort()

    async def _receive(self, socket: ClientConnection) -> None:
        while True:
            frame = json.loads(await socket.recv())
            self._frame(frame)
            if frame["type"] == "NEW_NOTIFICATION":
                await self._react(socket, frame["notification"])
                if self.habit.slow:
                    await asyncio.sleep(self._rng.uniform(0, 0.1))

    def _frame(self, frame: dict[str, Any]) -> None:
        """Note a frame and keep the position, by the rules of websocket.md."""
        kind = frame["type"]
        if kind == "NEW_NOTIFICATION":
            note = frame["notification"]
            record = self._history.add(
                "receive", conn=self._conn, id=note["id"], seq=note["seq"], rev=note["rev"], read=note["read"]
            )
            self.received.setdefault(note["id"], record["t"])
            self.labels.setdefault(note["title"], record["t"])
            if self._answered:
                self._seq = note["seq"]
        elif kind == "WELCOME":
            self._history.add(
                "welcome", conn=self._conn, recovered=frame["recovered"], epoch=frame["epoch"],
                lastSeq=frame["lastSeq"], rev=frame["rev"],
            )  # fmt: skip
            # A position stays as it is until it is answered, whatever comes before (the server may have
            # gone live by itself: then RESUME is too late, and the next connection asks again).
            self._answered = self._answered or frame["recovered"] is not None
            if not self._epoch or frame["recovered"] is False:
                self._epoch, self._seq, self._rev = frame["epoch"], frame["lastSeq"], frame["rev"]
        elif "rev" in frame:
            ids = frame.get("notificationIds") or [frame.get("notificationId")]
            self._history.add(
                "state", conn=self._conn, kind=kind, ids=ids, upto=frame.get("upToSeq", 0), rev=frame["rev"]
            )
            if self._answered:
                self._rev = frame["rev"]
        elif kind == "ERROR":
            self._history.add("error", conn=self._conn, code=frame["code"], message=frame["message"])

    async def _react(self, socket: ClientConnection, note: dict[str, Any]) -> None:
        """Acknowledge and read as the habit has it."""
        if self.habit.ack == "now":
            await self._acknowledge(socket, note)
        elif self.habit.ack == "late" and self._rng.random() < 0.8:
            delay_s = self._plant.settings.shard.ack_window_s * self._rng.choice([0.3, 0.95, 1.5])
            task = asyncio.ensure_future(self._acknowledge_later(socket, note, self._conn, delay_s))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
        if self.habit.attention == "wander" and self._rng.random() < 0.3:
            await self._send(socket, type="VISIBILITY", state=self._attention())
        if self._rng.random() < self.habit.reads:
            began = self._history.now()
            await self._send(socket, type="MARK_READ", notificationIds=[note["id"]])
            # Not known to have taken effect: the frame's OK is not waited for.
            self._history.add(
                "read", user=self.user, ids=[note["id"]], via="frame", ok=False, start=began,
                end=self._history.now(),
            )  # fmt: skip

    def _attention(self) -> str:
        if self.habit.attention == "wander":
            return self._rng.choice(["focused", "visible", "hidden", "idle"])
        return self.habit.attention

    async def _acknowledge(self, socket: ClientConnection, note: dict[str, Any]) -> None:
        # Noted first: it may take effect although sending fails.
        if self._rng.random() < 0.5:
            self._history.add("ack", conn=self._conn, seq=note["seq"])
            await self._send(socket, type="ACK", seq=note["seq"])
        else:
            self._history.add("ack", conn=self._conn, ids=[note["id"]])
            await self._send(socket, type="ACK", notificationId=note["id"])

    async def _acknowledge_later(
        self, socket: ClientConnection, note: dict[str, Any], conn: int, delay_s: float
    ) -> None:
        await asyncio.sleep(delay_s)
        if conn != self._conn or not self.connected:
            return
        self._history.add("ack", conn=conn, ids=[note["id"]])
        with contextlib.suppress(OSError, WebSocketException):
            await self._send(socket, type="ACK", notificationId=note["id"])

    @staticmethod
    async def _send(socket: ClientConnection, **frame: Any) -> None:
        await socket.send(json.dumps(frame))
