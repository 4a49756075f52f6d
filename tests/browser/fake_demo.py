"""The routes and frames that the demo page uses, in one process, with a connection that can be cut."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from carillon.clock import rfc3339
from carillon.inheritance import complete, patched
from carillon.preferences import validate

STATIC = Path(__file__).resolve().parents[2] / "serve/static"
USERS = ("ana", "ben", "chloe")


class FakeDemo:
    """`async with FakeDemo() as fake:` serves the page at `fake.url`."""

    def __init__(self) -> None:
        self.notes: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.sockets: dict[str, set[WebSocket]] = defaultdict(set)
        self.rev: dict[str, int] = defaultdict(int)
        self.log: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
        self.frames: list[tuple[str, dict[str, Any]]] = []
        self.positions: list[dict[str, str]] = []
        self.pushes: list[dict[str, Any]] = []
        self.epoch = "e1"
        self.token = "t1"
        self.refusing = False
        self.tells_presence = True
        self.deaf = False
        self.preferences: dict[str, dict[str, Any]] = {}
        """What was stored, by user."""
        self.defaults: dict[str, Any] = {}
        """Those of the tenant."""
        self.preference_problem = ""
        """If set, a change of preferences answers it."""
        self.presentation: dict[str, dict[str, Any]] = {}
        """PRESENTATION, by user."""
        self.files: dict[str, Path] = {}
        """Served as /demo/NAME, beside those of serve/static."""

    async def __aenter__(self) -> FakeDemo:
        app = Starlette(
            routes=[
                Route("/demo", lambda request: FileResponse(STATIC / "demo.html")),
                Route("/demo/config.json", self._config),
                Route("/demo/send", self._send, methods=["POST"]),
                Route("/demo/explain", self._explain, methods=["POST"]),
                Route("/demo/received", self._received),
                Route("/demo/{name}", self._static),
                Route("/api/notifications", self._feed),
                Route("/api/notifications/unread-count", self._count),
                Route("/api/notifications/preferences", self._preferences, methods=["GET", "PATCH"]),
                WebSocketRoute("/ws", self._socket),
            ]
        )
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/demo"
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_level="error", ws="websockets-sansio", lifespan="off")
        )
        self._task = asyncio.get_running_loop().create_task(self._server.serve([listener]))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.cut(1001)
        self._server.should_exit = True
        self._server.force_exit = True
        await self._task

    async def cut(self, code: int) -> None:
        """Close every socket."""
        for socket_ in [socket_ for group in self.sockets.values() for socket_ in group]:
            with suppress(WebSocketDisconnect):  # it may have gone this moment
                await socket_.close(code)

    def unread(self, user: str) -> int:
        """Unread notifications."""
        return sum(not note["read"] for note in self.notes[user])

    async def notify(self, user: str, title: str, **more: Any) -> dict[str, Any]:
        """Append a notification and deliver it."""
        self.rev[user] += 1
        number = len(self.notes[user]) + 1
        note = {
            "id": f"{user}-{number}",
            "seq": number,
            "rev": self.rev[user],
            "userId": user,
            "type": "demo",
            "title": title,
            "body": None,
            "priority": "normal",
            "read": False,
            "seen": False,
            "archived": False,
            "createdAt": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()),
            **more,
        }
        self.notes[user].append(note)
        await self._tell(user, {"type": "NEW_NOTIFICATION", "notification": note})
        if not self.sockets[user]:
            self.pushes.append(
                {
                    "target": f"demo-{user}-phone",
                    "notificationId": note["id"],
                    "receivedAt": rfc3339(time.time_ns() // 1_000_000),
                    "payload": {"notification": {"title": title, "body": more.get("body") or ""}},
                }
            )
        return note

    async def present(self, user: str, **presentation: Any) -> None:
        """How the user wants notifications to be shown: told to every socket, and behind each WELCOME."""
        plain = {"sound": True, "vibration": True, "durationMs": None, "autoDismiss": None}
        self.presentation[user] = {"type": "PRESENTATION"} | plain | presentation
        await self._tell(user, self.presentation[user])

    async def _tell(self, user: str, frame: dict[str, Any]) -> None:
        for socket_ in list(self.sockets[user]):
            await socket_.send_text(json.dumps(frame))

    async def change(self, user: str, frame: dict[str, Any]) -> None:
        """A state change: a new revision, told to every socket and kept for resume."""
        self.rev[user] += 1
        frame = {**frame, "rev": self.rev[user]}
        self.log[user].append((self.rev[user], frame))
        await self._tell(user, frame)

    def _user(self, request: Request) -> str:
        return request.headers["authorization"].split(":")[1]

    async def _static(self, request: Request) -> FileResponse:
        name = request.path_params["name"]
        return FileResponse(self.files.get(name, STATIC / name))

    async def _config(self, request: Request) -> JSONResponse:
        users = [{"userId": user, "token": f"{self.token}:{user}"} for user in USERS]
        policy = {"whenAway": "push_after", "whenAwayDelayS": 30, "holdS": 60, "types": {}}
        return JSONResponse(
            {"wsUrl": f"ws://127.0.0.1:{self.port}/ws", "tenant": "demo", "users": users,
             "policy": policy, "graceS": 5.0}
        )  # fmt: skip

    async def _send(self, request: Request) -> JSONResponse:
        event = await request.json()
        note = await self.notify(
            event["userId"], event["title"], body=event["body"], priority=event["priority"]
        )
        status = "delivered" if self.sockets[event["userId"]] else "queued"
        return JSONResponse({"id": note["id"], "seq": note["seq"], "status": status}, 202)

    async def _received(self, request: Request) -> JSONResponse:
        fcm = {"count": len(self.pushes), "pushes": self.pushes}
        return JSONResponse({"fcm": fcm, "apns": {"count": 0, "pushes": []}})

    async def _feed(self, request: Request) -> JSONResponse:
        notes = [note for note in reversed(self.notes[self._user(request)]) if not note["archived"]]
        return JSONResponse({"notifications": notes, "nextCursor": None})

    async def _preferences(self, request: Request) -> JSONResponse:
        user = self._user(request)
        if request.method == "PATCH":
            if self.preference_problem:
                return JSONResponse({"detail": self.preference_problem}, 422)
            document = patched(self.preferences.get(user, {}), await request.json())
            validate(document)
            self.preferences[user] = document
        return JSONResponse(complete(self.preferences.get(user, {}), self.defaults))

    async def _explain(self, request: Request) -> JSONResponse:
        event = await request.json()
        words = f"{event['userId']} is connected"
        return JSONResponse({"status": "delivered", "rules": [{"rule": "live", "words": words}]})

    async def _count(self, request: Request) -> JSONResponse:
        user = self._user(request)
        return JSONResponse({"count": self.unread(user), "rev": self.rev[user]})

    def _welcome(self, user: str, recovered: bool | None) -> str:
        return json.dumps(
            {"type": "WELCOME", "epoch": self.epoch, "lastSeq": len(self.notes[user]), "rev": self.rev[user],
             "unreadCount": self.unread(user), "heartbeatMs": 25000, "recovered": recovered}
        )  # fmt: skip

    async def _socket(self, socket_: WebSocket) -> None:
        await socket_.accept("carillon.v1.json")
        auth = json.loads(await socket_.receive_text())
        assert auth["type"] == "AUTH"
        version, user = auth["token"].split(":")
        if self.refusing:
            await socket_.close(4213)
            return
        if version != self.token:
            await socket_.close(4101)
            return
        position = dict(socket_.query_params)
        self.positions.append(position)
        if position:
            recovered = position["epoch"] == self.epoch
            await socket_.send_text(self._welcome(user, recovered))
            if recovered:
                await self._replay(user, socket_, position)
        else:
            await socket_.send_text(self._welcome(user, None))
        if user in self.presentation:
            await socket_.send_text(json.dumps(self.presentation[user]))
        try:
            while True:
                frame = json.loads(await socket_.receive_text())
                self.frames.append((user, frame))
                self.sockets[user].add(socket_)  # live from the first frame on
                await self._frame(user, socket_, frame)
                if "id" in frame and frame["type"] != "WATCH_PRESENCE":
                    await socket_.send_text(json.dumps({"type": "OK", "id": frame["id"]}))
        except (WebSocketDisconnect, RuntimeError):
            pass
        finally:
            self.sockets[user].discard(socket_)

    async def _replay(self, user: str, socket_: WebSocket, position: dict[str, str]) -> None:
        for note in self.notes[user][int(position["lastSeq"]) :]:
            await socket_.send_text(json.dumps({"type": "NEW_NOTIFICATION", "notification": note}))
        for rev, change in self.log[user]:
            if rev > int(position["lastRev"]):
                await socket_.send_text(json.dumps(change))

    async def _frame(self, user: str, socket_: WebSocket, frame: dict[str, Any]) -> None:
        kind = frame["type"]
        if kind == "MARK_READ":
            for note in self.notes[user]:
                note["read"] = note["read"] or note["id"] in frame["notificationIds"]
            await self.change(
                user,
                {"type": "NOTIFICATIONS_READ", "notificationIds": frame["notificationIds"], "readAt": ""},
            )
        elif kind == "MARK_SEEN":
            for note in self.notes[user]:
                note["seen"] = note["seen"] or note["id"] in frame["notificationIds"]
            await self.change(
                user, {"type": "NOTIFICATIONS_SEEN", "notificationIds": frame["notificationIds"]}
            )
        elif kind == "MARK_ALL_READ":
            for note in self.notes[user]:
                note["read"] = True
            await self.change(
                user, {"type": "ALL_NOTIFICATIONS_READ", "readAt": "", "upToSeq": frame["upToSeq"]}
            )
        elif kind == "ARCHIVE":
            for note in self.notes[user]:
                note["archived"] = note["archived"] or note["id"] == frame["notificationId"]
                note["read"] = note["read"] or note["archived"]
            await self.change(
                user, {"type": "NOTIFICATION_ARCHIVED", "notificationId": frame["notificationId"]}
            )
        elif kind == "WATCH_PRESENCE" and not self.tells_presence:
            refusal = {"type": "ERROR", "code": "not_supported", "message": "no", "temporary": False}
            await socket_.send_text(json.dumps(refusal | {"id": frame["id"]}))
        elif kind == "WATCH_PRESENCE":
            for other in frame["userIds"]:
                status = "active" if self.sockets[other] else "offline"
                await socket_.send_text(json.dumps({"type": "PRESENCE", "userId": other, "status": status}))
        elif kind == "PING" and not self.deaf:
            await socket_.send_text('{"type":"PONG"}')
