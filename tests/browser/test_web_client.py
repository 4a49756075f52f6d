"""The web client in Node against the real system: what it is sent, what it changes, what it missed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from benchmarks.target import ROOT, Target
from tests.browser.web import build_package, find_node

pytestmark = pytest.mark.timeout(600)  # the first test waits for the system to start


class NodeClient:
    """One client in a process of its own; `shown` is its last snapshot."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.shown: dict[str, Any] = {}
        self.said: list[dict[str, Any]] = []
        self._changed = asyncio.Event()
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            document = json.loads(line)
            if "state" in document:
                self.shown = document
            else:
                self.said.append(document)
            self._changed.set()

    async def until(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait for a line after which it is true."""
        try:
            async with asyncio.timeout(60):
                while not is_so():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"not within 60 s: {what}; {self.shown}, {self.said}") from None

    def do(self, what: str, title: str | None = None) -> None:
        """Call a method of the client."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, "title": title}).encode() + b"\n")

    async def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(30):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._reader


@contextlib.asynccontextmanager
async def node_client(system: Target, user: str, transport: str) -> AsyncIterator[NodeClient]:
    process = await asyncio.create_subprocess_exec(
        *(find_node(), str(ROOT / "tests/browser/real_client.mjs")),
        *(system.ws_url, system.direct_url, system.token(user), user, transport),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    client = NodeClient(process)
    try:
        yield client
    finally:
        await client.end()


async def send(system: Target, user: str, title: str) -> None:
    async with httpx.AsyncClient(base_url=system.direct_url, trust_env=False, timeout=60) as http:
        event = {"userId": user, "type": "test", "title": title}
        headers = {"Authorization": f"Bearer {system.api_key}"}
        answer = await http.post("/v1/events", json=event, headers=headers)
        assert answer.status_code == 202, answer.text


@pytest.mark.parametrize("transport", ["websocket", "sse", "poll"])
async def test_feed_changes_resume_and_roll_back(system: Target, transport: str) -> None:
    """The feed, what comes, changes on both devices, what was missed offline; a refused change is undone."""
    await build_package()
    user = f"web-{transport}"
    await send(system, user, "one")
    async with (
        node_client(system, user, transport) as first,
        node_client(system, user, "websocket") as second,
    ):
        for client in (first, second):
            await client.until(
                lambda client=client: client.shown.get("loaded") and client.shown["state"] == "open", "open"
            )
        await send(system, user, "two")
        told = [{"notification": "two"}]  # a line of its own, behind the snapshot's or before it
        for client in (first, second):
            await client.until(lambda client=client: client.shown["unreadCount"] == 2, "two unread")
            await client.until(lambda client=client: client.said == told, "two is told, once")
        first.do("read", "two")
        first.do("click", "one")
        expected = [["two", True, False], ["one", True, True]]
        for client in (first, second):
            await client.until(
                lambda client=client: (
                    client.shown["items"] == expected
                    and client.shown["unreadCount"] == 0
                    and not client.shown["pending"]
                ),
                "both read in both",
            )
        first.do("disconnect")
        await first.until(lambda: first.shown["state"] == "idle", "offline")
        await send(system, user, "three")
        first.do("archive", "one")  # waits for the connection
        await second.until(lambda: second.shown["unreadCount"] == 1, "three")
        second.do("readAll")
        await second.until(lambda: {"done": "readAll"} in second.said, "all read")
        first.do("connect")
        expected = [["three", True, False], ["two", True, False]]
        for client in (first, second):
            await client.until(lambda client=client: client.shown["items"] == expected, "the same in both")
            await client.until(lambda client=client: client.shown["unreadCount"] == 0, "nothing unread")
        assert [line for line in first.said if "notification" in line][-1] == {"notification": "three"}
        first.do("archive", "00000000-0000-7000-8000-000000000000")
        await first.until(lambda: {"failed": "not_found"} in first.said, "a refusal")
        await first.until(lambda: not first.shown["pending"], "nothing pending")
        assert first.shown["items"] == expected
