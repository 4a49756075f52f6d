"""The plain-HTTP control port of a local provider: loopback only, small requests."""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import Callable
from typing import Any, Final

import msgspec

_MAX_BODY: Final = 8 * 1024 * 1024
_REASONS: Final = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed"}

Route = Callable[[dict[str, str], bytes], tuple[int, Any]]
"""Takes the query and the body, gives the status and a JSON-able document."""


class ControlPort:
    """Serves `routes`, keyed by method and path ("GET /received"), over HTTP/1.1."""

    def __init__(self, routes: dict[str, Route]) -> None:
        self._routes = routes
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Listen; returns the bound port."""
        self._server = await asyncio.start_server(self._connection, host, port)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening and close open connections."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._writers):
                writer.close()
            await self._server.wait_closed()
            self._server = None

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, ValueError):
            pass  # a client that hangs up or sends no HTTP concerns nobody
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ", 2)
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        length = int(headers.get("content-length", "0"))
        if not 0 <= length <= _MAX_BODY:
            raise ValueError("body too long")
        body = await reader.readexactly(length) if length else b""
        parts = urllib.parse.urlsplit(target)
        query = dict(urllib.parse.parse_qsl(parts.query))
        route = self._routes.get(f"{method} {parts.path}")
        if route is None:
            status, document = 404, {"error": f"no such route: {method} {parts.path}"}
        else:
            try:
                status, document = route(query, body)
            except (msgspec.DecodeError, ValueError, TypeError, KeyError) as exc:
                status, document = 400, {"error": f"{type(exc).__name__}: {exc}"}
        data = msgspec.json.encode(document)
        keep = headers.get("connection", "").lower() != "close"
        writer.write(
            f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(data)}\r\nconnection: {'keep-alive' if keep else 'close'}\r\n\r\n".encode()
            + data
        )
        await writer.drain()
        return keep
