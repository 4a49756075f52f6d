"""What the client's tests share: a fake server in a thread, for HTTP and WebSockets, that can be told to do
it wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import websockets.asyncio.server as ws_server
from websockets.exceptions import ConnectionClosed

T = TypeVar("T")
KEY = "crl_test_key"


async def eventually(check: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """Poll `check` until it returns something true."""
    deadline = time.monotonic() + timeout_s
    while not (last := check()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s; last: {last!r}"
        await asyncio.sleep(0.005)
    return last


def until(check: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """`eventually` without a loop."""
    deadline = time.monotonic() + timeout_s
    while not (last := check()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s; last: {last!r}"
        time.sleep(0.005)
    return last


class Store:
    """What a server keeps: one effect per idempotency key."""

    def __init__(self) -> None:
        self.by_key: dict[str, dict[str, Any]] = {}
        self.order: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> dict[str, Any]:
        """The result of one event."""
        key = event.pop("idempotencyKey")
        if not isinstance(event.get("title"), str):
            return {
                "error": problem(422, "invalid", errors=[{"path": "title", "expected": "text", "got": "?"}])
            }
        known = self.by_key.get(key)
        if known is not None:
            if known["event"] != event:
                return {"error": problem(422, "idempotency_conflict")}
            return known["result"]
        number = len(self.order) + 1
        result = {"id": f"id-{number}", "seq": number, "status": "stored", "channels": ["in_app"]}
        self.by_key[key] = {"event": event, "result": result}
        self.order.append(event)
        return result

    def answer(self, document: Any) -> tuple[int, Any]:
        """The answer to a body of POST /v1/events."""
        if isinstance(document, list):
            return 202, {"results": [self.put(dict(one)) for one in document]}
        if "userIds" in document:
            key, users = document["idempotencyKey"], document.pop("userIds")
            return 202, {
                "results": [
                    {
                        "userId": user,
                        **self.put({**document, "userId": user, "idempotencyKey": f"{key}#{user}"}),
                    }
                    for user in users
                ]
            }
        result = self.put(dict(document))
        return (result["error"]["status"], result["error"]) if "error" in result else (202, result)


def problem(status: int, code: str, **more: Any) -> dict[str, Any]:
    return {
        "type": f"urn:carillon:problem:{code}", "title": code, "status": status, "detail": code, "code": code,
        "temporary": status in (409, 429, 503), "requestId": "r1", "errors": [], **more,
    }  # fmt: skip


class FakeServer:
    """`with FakeServer() as fake:` an HTTP server and a WebSocket server on free ports, in a thread.

    Attributes:
        script: what to do with the next POST /v1/events, one entry each, then "ok":
            "ok"; (status, headers) without effect; "drop": reset before any effect; "lose": effect, reset;
            "hang": take effect, never answer; "garbage": take effect, answer no JSON; "cut": the same, half a
                body.
        requests: (method, path, headers, body) of every request.
        answers: by (method, path): (status, document) of everything else.
        sockets: what to do with each WebSocket, one entry each; the last one stays: a coroutine function of
            Socket.
    """

    def __init__(self) -> None:
        self.store = Store()
        self.script: list[Any] = []
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.answers: dict[tuple[str, str], tuple[int, Any]] = {}
        self.sockets: list[Callable[[Socket], Coroutine[Any, Any, None]]] = []
        self.opened: list[Socket] = []
        self.delay_s = 0.0
        self.in_flight = self.most_in_flight = 0
        self._ready = threading.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> FakeServer:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        http = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        ws = await ws_server.serve(
            self._socket, "127.0.0.1", 0, compression=None, ping_interval=None, close_timeout=0.2,
            subprotocols=["carillon.v1.json", "carillon.v1.msgpack"],  # type: ignore[list-item]
        )  # fmt: skip
        self.port = http.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.ws_url = f"ws://127.0.0.1:{next(iter(ws.sockets)).getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        http.close()
        ws.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await ws.wait_closed()

    # -- HTTP ---------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while await self._one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
        }
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        while headers.get("transfer-encoding") == "chunked":
            size = int(await reader.readuntil(b"\r\n"), 16)
            body += (await reader.readexactly(size + 2))[:size]
            if not size:
                break
        self.requests.append((method, path, headers, body))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            return await self._answer(writer, method, path, body)
        finally:
            self.in_flight -= 1

    async def _answer(self, writer: asyncio.StreamWriter, method: str, path: str, body: bytes) -> bool:
        if (method, path) in self.answers:
            status, document = self.answers[method, path]
            return await _write(writer, status, json.dumps(document).encode())
        if (method, path) != ("POST", "/v1/events"):
            return await _write(writer, 404, json.dumps(problem(404, "not_found")).encode())
        act = self.script.pop(0) if self.script else "ok"
        if act == "drop":
            return False
        if isinstance(act, tuple):
            status, more = act
            code = {
                409: "in_progress",
                429: "busy",
                413: "too_large",
                500: "internal",
                401: "unauthenticated",
            }
            document = problem(status, code.get(status, "unavailable"))
            return await _write(writer, status, json.dumps(document).encode(), more)
        status, document = self.store.answer(json.loads(body))
        if act == "lose":
            return False
        if act == "hang":
            await self._stop.wait()
            return False
        if act == "garbage":
            return await _write(writer, 200, b"<html>welcome</html>")
        text = json.dumps(document).encode()
        if act == "cut":
            writer.write(
                b"HTTP/1.1 202 Accepted\r\nContent-Length: %d\r\n\r\n" % len(text) + text[: len(text) // 2]
            )
            await writer.drain()
            return False
        return await _write(writer, status, text)

    # -- WebSocket ----------------------------------------------------------------------------------

    async def _socket(self, connection: ws_server.ServerConnection) -> None:
        socket = Socket(connection)
        self.opened.append(socket)
        act = self.sockets.pop(0) if len(self.sockets) > 1 else self.sockets[0]
        with contextlib.suppress(ConnectionClosed):
            await act(socket)


async def _write(
    writer: asyncio.StreamWriter, status: int, body: bytes, headers: dict[str, str] | None = None
) -> bool:
    more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    writer.write(f"HTTP/1.1 {status} x\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    return True


class Socket:
    """One WebSocket as the server sees it. Frames received are kept; PING is answered unless `deaf`."""

    def __init__(self, connection: ws_server.ServerConnection) -> None:
        self.connection = connection
        assert connection.request is not None
        self.path = connection.request.path
        self.headers = connection.request.headers
        self.binary = connection.subprotocol == "carillon.v1.msgpack"
        self.received: list[dict[str, Any]] = []
        self.deaf = False
        self.refuse: dict[str, dict[str, Any]] = {}

    async def send(self, frame: dict[str, Any]) -> None:
        if self.binary:
            import msgspec

            await self.connection.send(msgspec.msgpack.encode(frame))
        else:
            await self.connection.send(json.dumps(frame))

    async def welcome(
        self, seq: int = 0, rev: int = 0, recovered: bool | None = None, epoch: str = "e1"
    ) -> None:
        await self.send(
            {
                "type": "WELCOME", "sessionId": "s", "deviceId": "d", "epoch": epoch, "lastSeq": seq, "rev":
                    rev,
                "unreadCount": 0, "heartbeatMs": 25_000, "recovered": recovered, "serverTime": "x",
            }
        )  # fmt: skip

    async def notify(self, seq: int, epoch: str = "e1") -> None:
        await self.send({"type": "NEW_NOTIFICATION", "notification": note(seq, epoch)})

    async def read(self, until: str | None = None) -> None:
        """Receive for ever, or until a frame of this type; operations are answered with OK."""
        import msgspec

        async for message in self.connection:
            frame = msgspec.msgpack.decode(message) if isinstance(message, bytes) else json.loads(message)
            self.received.append(frame)
            kind = frame["type"]
            # Whoever said this may have left already: what else it said before is still to be read.
            with contextlib.suppress(ConnectionClosed):
                if kind == "PING":
                    if not self.deaf:
                        await self.send({"type": "PONG"})
                elif kind in self.refuse:
                    await self.send({"type": "ERROR", "id": frame["id"], **self.refuse[kind]})
                elif "id" in frame and not self.deaf:
                    await self.send({"type": "OK", "id": frame["id"]})
            if kind == until:
                return

    async def close(self, code: int, reason: str = "") -> None:
        await self.connection.close(code, reason)

    def reset(self) -> None:
        """Break the connection without a word."""
        self.connection.transport.abort()

    def acked(self) -> list[str]:
        return [id for frame in self.received if frame["type"] == "ACK" for id in frame["notificationIds"]]


def note(seq: int, epoch: str = "e1") -> dict[str, Any]:
    return {
        "id": f"{epoch}-{seq}", "seq": seq, "rev": seq, "userId": "ada", "type": "t", "title": f"n{seq}",
        "body": None,
        "read": False, "seen": False, "archived": False, "priority": "normal", "actions": [], "data": {},
        "createdAt": "2026-01-01T00:00:00.000Z", "addedLater": 1,
    }  # fmt: skip
