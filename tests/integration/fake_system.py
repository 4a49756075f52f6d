"""A system in one process that answers events and delivers them, and can be told to do it wrong.

It knows what the benchmarks need of protocol.md and nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jwt
import websockets.asyncio.server as ws_server
from websockets.exceptions import ConnectionClosed

from benchmarks.target import Target
from carillon.clock import rfc3339

SECRET = "a secret of at least thirty-two bytes"


@dataclass
class Faults:
    """What goes wrong with every so-manieth delivery (0: never)."""

    lose: int = 0
    duplicate: int = 0
    swap: int = 0
    forget: int = 0
    """Answered and delivered, but absent from the feed."""
    refuse: int = 0
    no_push: int = 0
    ghost: int = 0
    """Users told to be there who may not be."""
    hide_read: int = 0
    """Not told to other devices."""
    early: int = 0
    """Scheduled events that are sent at once."""


@dataclass
class FakeSystem:
    """`async with FakeSystem() as fake:` listens on free ports; `fake.target` tells where."""

    faults: Faults = field(default_factory=Faults)
    acknowledged: dict[str, int] = field(default_factory=dict)
    push_devices: dict[str, str] = field(default_factory=dict)
    pushes: list[dict[str, Any]] = field(default_factory=list)

    async def __aenter__(self) -> FakeSystem:
        self._sockets: dict[str, set[ws_server.ServerConnection]] = defaultdict(set)
        self._seqs: dict[str, int] = defaultdict(int)
        self._feeds: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._held: dict[str, str] = {}
        self._ids = itertools.count(1)
        self._deliveries = 0
        self._requests = 0
        self._asked = 0
        self._reads = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._http = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._ws = await ws_server.serve(
            self._socket, "127.0.0.1", 0, compression=None, subprotocols=["carillon.v1.json"]
        )
        http = f"http://127.0.0.1:{self._http.sockets[0].getsockname()[1]}"
        port = next(iter(self._ws.sockets)).getsockname()[1]
        self.target = Target(
            tenant="demo",
            api_key="key",
            client_secret=SECRET,
            direct_url=http,
            serve_url=http,
            ws_url=f"ws://127.0.0.1:{port}/ws",
            fcm_received_url=f"{http}/received",
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._http.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._ws.close()
        await self._ws.wait_closed()

    # WebSocket

    async def _socket(self, socket: ws_server.ServerConnection) -> None:
        assert socket.request is not None
        token = socket.request.headers["Authorization"].removeprefix("Bearer ")
        user = jwt.decode(token, SECRET, algorithms=["HS256"])["sub"]
        await socket.send(json.dumps({"type": "WELCOME", "epoch": "e1", "lastSeq": self._seqs[user]}))
        self._sockets[user].add(socket)
        try:
            async for message in socket:
                frame = json.loads(message)
                if frame["type"] == "ACK":
                    self.acknowledged[user] = max(self.acknowledged.get(user, 0), frame["seq"])
                elif frame["type"] == "MARK_READ":
                    self._read(user, frame["notificationIds"])
        except ConnectionClosed:
            pass
        finally:
            self._sockets[user].discard(socket)

    def _deliver(self, user: str, note: dict[str, Any]) -> None:
        frame = json.dumps({"type": "NEW_NOTIFICATION", "notification": note}, separators=(",", ":"))
        self._deliveries += 1
        faults, number = self.faults, self._deliveries
        frames = [frame]
        if faults.lose and number % faults.lose == 0:
            frames = []
        if faults.duplicate and number % faults.duplicate == 0:
            frames = [frame, frame]
        if faults.swap and number % faults.swap == 0:
            self._held[user] = frame  # goes out after the user's next one
            return
        frames += [held] if (held := self._held.pop(user, "")) else []
        ws_server.broadcast(self._sockets[user], frames[0]) if frames else None
        for extra in frames[1:]:
            ws_server.broadcast(self._sockets[user], extra)
        if not self._sockets[user] and user in self.push_devices:
            self._push(user, note["id"])

    def _read(self, user: str, ids: list[str]) -> None:
        self._reads += 1
        if not (self.faults.hide_read and self._reads % self.faults.hide_read == 0):
            frame = {"type": "NOTIFICATIONS_READ", "notificationIds": ids, "rev": self._reads}
            ws_server.broadcast(self._sockets[user], json.dumps(frame, separators=(",", ":")))

    def _push(self, user: str, notification: str) -> None:
        if self.faults.no_push and len(self.pushes) % self.faults.no_push == self.faults.no_push - 1:
            self.faults.no_push = 0  # once
            return
        self.pushes.append(
            {
                "target": self.push_devices[user],
                "notificationId": notification,
                "receivedAt": rfc3339(time.time_ns() // 1_000_000),
            }
        )

    # HTTP

    def _event(self, event: dict[str, Any]) -> dict[str, Any]:
        if "scheduleAt" in event:
            return self._schedule(event)
        user = event["userId"]
        self._seqs[user] += 1
        number = next(self._ids)
        note = {"id": f"0190a000-0000-7000-8000-{number:012d}", "seq": self._seqs[user], "userId": user}
        if not (self.faults.forget and number % self.faults.forget == 0):
            self._feeds[user].append(note)
        self._deliver(user, note)
        return {"id": note["id"], "seq": note["seq"], "status": "delivered"}

    def _schedule(self, event: dict[str, Any]) -> dict[str, Any]:
        number = next(self._ids)
        note = {"id": f"0190a000-0000-7000-8000-{number:012d}", "seq": 0, "userId": event["userId"]}
        wait_s = datetime.fromisoformat(event["scheduleAt"]).timestamp() - time.time()
        early = self.faults.early and number % self.faults.early == 0
        asyncio.get_running_loop().call_later(0 if early else wait_s + 0.01, self._fire, note)
        return {"id": note["id"], "seq": 0, "status": "deferred", "channels": []}

    def _fire(self, note: dict[str, Any]) -> None:
        self._seqs[note["userId"]] += 1
        note["seq"] = self._seqs[note["userId"]]
        self._feeds[note["userId"]].append(note)
        self._deliver(note["userId"], note)

    def _answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        if path == "/api/notifications/read":
            user = jwt.decode(token, SECRET, algorithms=["HS256"])["sub"]
            self._read(user, json.loads(body)["notificationIds"])
            return 200, {"success": True}
        if path.startswith("/healthz"):
            return 200, {"status": "ok"}
        if path.startswith("/received"):
            limit = int(path.partition("limit=")[2])
            return 200, {"count": len(self.pushes), "pushes": self.pushes[-limit:] if limit else []}
        if method == "PUT":
            self.push_devices[path.split("/")[3]] = json.loads(body)["token"]
            return 200, {}
        if method == "GET":
            return 200, {"notifications": self._feeds[path.split("/")[3]], "nextCursor": None}
        if path.startswith("/v1/presence/query"):
            return 200, {"users": [self._presence(user) for user in json.loads(body)["userIds"]]}
        self._requests += 1
        if self.faults.refuse and self._requests % self.faults.refuse == 0:
            return 503, {"code": "unavailable"}
        document = json.loads(body)
        if isinstance(document, list):
            return 202, {"results": [self._event(event) for event in document]}
        return 202, self._event(document)

    def _presence(self, user: str) -> dict[str, str]:
        self._asked += 1
        ghost = bool(self.faults.ghost) and self._asked % self.faults.ghost == 0
        return {"userId": user, "status": "active" if self._sockets[user] or ghost else "offline"}

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    head = (await reader.readuntil(b"\r\n\r\n")).decode()
                    mark = head.find("Content-Length: ")
                    length = int(head[mark + 16 : head.index("\r\n", mark)]) if mark >= 0 else 0
                    body = await reader.readexactly(length) if length else b""
                    method, path, _ = head.split(" ", 2)
                    token = head.partition("Authorization: Bearer ")[2].partition("\r\n")[0]
                    status, document = self._answer(method, path, body, token)
                    data = json.dumps(document, separators=(",", ":")).encode()
                    writer.write(
                        f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
                    )
        finally:
            self._tasks.discard(task)
            writer.close()
