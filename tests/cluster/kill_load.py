"""Who uses the system while its actors are killed: services that try again, devices that resume, a phone."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import random
import time
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any

import jwt
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from benchmarks.wire import Door, HttpConnection, get_json, http_request
from carillon.ids import SLOTS, slot_of
from cluster.demo import DEMO_TENANT

RATE = 100
"""Events per second that are offered."""
NAMES = [f"kill-{number:05}" for number in range(0, 99_999, 37)]
ONLINE = [
    # CRC-32 may put all of a short run of numbers into one half of the slots, so on one shard: ten of each.
    *islice((user for user in NAMES if slot_of(DEMO_TENANT, user) < SLOTS // 2), 10),
    *islice((user for user in NAMES if slot_of(DEMO_TENANT, user) >= SLOTS // 2), 10),
]
TWO_DEVICES = frozenset(ONLINE[::5])
PHONE = "kill-phone"
"""A user without a socket, with an FCM target."""
PHONE_TOKEN = "kill-phone-token"
MAX_OPEN = 400
"""Events that wait for their answer at once: enough that those of a killed shard hold up no others."""
RETRIED = frozenset({409, 429, 503})
"""Answers that promise nothing and ask for another try."""


# ---------------------------------------------------------------------------------------------------
# Devices


@dataclass
class Connection:
    """What one WebSocket connection received, in order of arrival."""

    receipts: list[tuple[float, str, int]] = field(default_factory=list)
    """(monotonic seconds, notification id, seq)."""


class DeviceClient:
    """One device: acknowledges, reconnects with back-off, resumes with epoch, lastSeq and lastRev."""

    def __init__(self, dev: dict[str, Any], user: str, name: str) -> None:
        self.user = user
        self.name = name
        self.connections: list[Connection] = []
        self.seen: dict[str, float] = {}
        """First receipt by notification id."""
        self.broken: list[str] = []
        """Promises that were broken towards this device."""
        self.connected = False
        self._dev = dev
        self._epoch = ""
        self._seq = self._rev = 0

    async def run(self) -> None:
        """Stay connected until cancelled."""
        claims = {"sub": self.user, "tenant": self._dev["tenant"], "exp": int(time.time()) + 3600}
        token = jwt.encode(claims, self._dev["clientSecret"], algorithm="HS256")
        url = f"{self._dev['wsUrl']}?token={token}&deviceId={self.name}"
        wait_s = 0.1
        while True:
            try:
                async with connect(url, open_timeout=10, close_timeout=1, compression=None) as socket:
                    welcome = json.loads(await asyncio.wait_for(socket.recv(), 15))
                    assert welcome["type"] == "WELCOME", welcome
                    await self._introduce(socket)
                    self._epoch = self._epoch or welcome["epoch"]
                    self.connected, wait_s = True, 0.1
                    await self._receive(socket)
            except (OSError, TimeoutError, WebSocketException):
                pass  # the position is kept; the next connection resumes there
            self.connected = False
            await asyncio.sleep(random.uniform(0, wait_s))
            wait_s = min(1.0, wait_s * 2)

    async def _introduce(self, socket: Any) -> None:
        """The first frame: the position if there is one, else any other."""
        if self._epoch:
            frame = {"type": "RESUME", "epoch": self._epoch, "lastSeq": self._seq, "lastRev": self._rev}
        else:
            frame = {"type": "VISIBILITY", "state": "focused"}
        await socket.send(json.dumps(frame))

    async def _receive(self, socket: Any) -> None:
        connection = Connection()
        self.connections.append(connection)
        async for message in socket:
            frame = json.loads(message)
            if frame["type"] == "NEW_NOTIFICATION":
                note = frame["notification"]
                at = time.monotonic()
                connection.receipts.append((at, note["id"], note["seq"]))
                self.seen.setdefault(note["id"], at)
                self._seq = max(self._seq, note["seq"])
                self._rev = max(self._rev, note["rev"])
                await socket.send(json.dumps({"type": "ACK", "seq": note["seq"]}))
            elif frame["type"] == "WELCOME":
                if frame["recovered"] is not True:
                    self.broken.append(f"a resume was answered recovered: {frame['recovered']}")
            elif frame["type"] == "ERROR" or frame["type"] == "NOTIFICATION_UPDATED":
                self.broken.append(f"unexpected frame {message[:200]}")


# ---------------------------------------------------------------------------------------------------
# Load


@dataclass
class Accepted:
    """An event that was answered with 202."""

    user: str
    number: int
    seq: int
    began: float
    """Monotonic seconds of the first try."""
    answered: float
    """Seconds since the epoch of the answer."""


class Load:
    """Offers events at a fixed rate; each is tried again under its key until it is accepted."""

    def __init__(self, dev: dict[str, Any]) -> None:
        self.accepted: dict[str, Accepted] = {}
        self.offered = 0
        self.retries: collections.Counter[str] = collections.Counter()
        self.broken: list[str] = []
        self._dev = dev
        self._door = Door.of(dev["directUrl"])
        self._idle: list[HttpConnection] = []
        self._open = 0
        self._stopping = False

    async def run(self) -> None:
        """Until `stop`, and then until every event that was offered has its answer."""
        async with asyncio.TaskGroup() as group:
            began = time.monotonic()
            due = 0
            while not self._stopping:
                wanted = int((time.monotonic() - began) * RATE)
                while due < wanted:
                    due += 1
                    if self._open < MAX_OPEN:  # what cannot be offered during a pause is not made up for
                        self._open += 1
                        group.create_task(self._deliver(self.offered))
                        self.offered += 1
                await asyncio.sleep(0.01)
        for connection in self._idle:
            connection.close()

    def stop(self) -> None:
        """Offer nothing more."""
        self._stopping = True

    async def _deliver(self, number: int) -> None:
        connection = self._idle.pop() if self._idle else HttpConnection(self._door)
        try:
            await self._send(connection, number)
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        self._open -= 1

    async def _send(self, connection: HttpConnection, number: int) -> None:
        users = [*ONLINE, PHONE]
        user = users[number % len(users)]
        body = json.dumps({"userId": user, "type": "t", "title": str(number)}).encode()
        request = http_request(self._door, "POST", "/v1/events", body, self._dev["apiKey"])
        request = request.replace(b"\r\n", b"\r\nIdempotency-Key: kill-%d\r\n" % number, 1)
        began = time.monotonic()
        wait_s = 0.05
        while True:
            try:
                response = await connection.request(request)
            except (OSError, TimeoutError) as exc:
                self.retries[type(exc).__name__] += 1
            else:
                if response.status == 202:
                    answer = response.json()
                    if answer["id"] in self.accepted:
                        self.broken.append(f"the id {answer['id']} was answered to two events")
                    self.accepted[answer["id"]] = Accepted(user, number, answer["seq"], began, time.time())
                    return
                self.retries[str(response.status)] += 1
                if response.status not in RETRIED:
                    self.broken.append(f"event {number}: {response.status} {response.body[:300]!r}")
                    if response.status < 500:
                        return
            await asyncio.sleep(random.uniform(wait_s / 2, wait_s))
            wait_s = min(1.0, wait_s * 2)


class Phone:
    """Watches what the local FCM received for the user without a socket."""

    def __init__(self, dev: dict[str, Any]) -> None:
        self.receipts: list[tuple[float, str]] = []
        """(seconds since the epoch, notification id), in order of arrival."""
        self._door = Door.of(dev["fcmReceivedUrl"])

    async def run(self) -> None:
        """Look four times a second until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(0.25)

    async def look(self) -> None:
        """Ask once."""
        with contextlib.suppress(OSError):
            pushes = (await get_json(self._door, f"?target={PHONE_TOKEN}"))["pushes"]
            self.receipts = [
                (datetime.fromisoformat(push["receivedAt"]).timestamp(), push["notificationId"])
                for push in pushes
            ]

    def ids(self) -> set[str]:
        """Notifications that were pushed."""
        return {notification for _, notification in self.receipts}
