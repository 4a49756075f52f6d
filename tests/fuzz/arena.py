"""A whole system in one process, somebody who must not notice anything, and attackers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
from collections import Counter
from random import Random
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.protocol import Protocol

from actors.gateway_connection import Connection
from carillon.clock import SystemClock
from carillon.session import Attachment, Session
from carillon.tokens import mint
from stores.postgres.pool import open_pool
from stores.postgres.tenants import TenantStore
from tests.fuzz.attacks import OPEN, REFUSED, Attack, Facts, make
from tests.fuzz.schema import check_server_frame
from tests.fuzz.wire import Reader, request
from tests.integration.client_world import ClientWorld
from tests.support import eventually

VICTIM = "victim"
LONGEST_S = 60.0
"""No attack outlives this: every timeout of the arena's gateway is shorter by far."""
POOLED_FILES = 8
"""Connections that the pools to PostgreSQL may open later than in the warm-up."""
SETTINGS: dict[str, dict[str, Any]] = {
    "gateway": {
        "handshake_timeout_s": 3.0, "auth_timeout_s": 3.0, "close_timeout_s": 0.5, "frames_per_s": 1e6,
        "user_frames_per_s": 1e6, "max_errors_per_minute": 1_000_000,
    },
    "shard": {"resume_wait_s": 60.0},  # a RESUME that is the first frame is never too late
}  # fmt: skip


class Finding(AssertionError):
    """Something that must not be."""


class Arena:
    """The system.

    Args:
        dsn: an empty, migrated database.
        workers: attackers at once.

    Attributes:
        done: attacks by name.
    """

    def __init__(self, dsn: str, workers: int = 8, **sections: dict[str, Any]) -> None:
        merged = {
            name: {**SETTINGS.get(name, {}), **sections.get(name, {})} for name in {*SETTINGS, *sections}
        }
        self.world = ClientWorld(dsn, **merged)
        self.workers = workers
        self.done: Counter[str] = Counter()
        self.codes: Counter[int | str | None] = Counter()
        self.bystander: ClientConnection = None  # type: ignore[assignment]
        self._records = _Records()
        self._failed: list[str] = []

    # -- the scene --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Arena:
        logging.getLogger().addHandler(self._records)
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: self._failed.append(f"{context.get('message')}: {context.get('exception')!r}")
        )
        await self.world.__aenter__()
        try:
            await self._set_up()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def _set_up(self) -> None:
        pool = await open_pool(self.world.settings.postgres, 1)
        tenants = TenantStore(pool)
        acme = await tenants.tenant("acme")
        evil = await tenants.create_tenant("evil")
        await pool.close()
        assert acme is not None
        now_ms = SystemClock().now_ms()
        self.victim_token = mint("acme", VICTIM, acme.client_secret, now_ms, 86_400)
        self._tokens = [
            mint("acme", f"mallory{n}", acme.client_secret, now_ms, 86_400) for n in range(self.workers)
        ]
        self.secret = acme.client_secret
        self.port = int(self.world.gateways[0].url.rsplit(":", 1)[1].split("/")[0])
        self.bystander = await self._client(self.victim_token)
        await self._bystander_frame()
        await self.bystander.send('{"type":"PING"}')  # live from here on
        await self._bystander_frame()
        self.victim_ids = await self.publish(VICTIM, 5)
        seen = [(await self._bystander_frame())["notification"]["id"] for _ in self.victim_ids]
        assert seen == self.victim_ids
        self.facts = [Facts(token, VICTIM, self.victim_ids, evil.client_secret) for token in self._tokens]
        self._expected = await self._victim_state()
        await self._warm_up()
        self._before = self._things()

    async def __aexit__(self, *exc: object) -> None:
        if self.bystander is not None:
            await self.bystander.close()
        await self.world.__aexit__(*exc)
        logging.getLogger().removeHandler(self._records)
        asyncio.get_running_loop().set_exception_handler(None)

    async def _client(self, token: str) -> ClientConnection:
        return await connect(
            f"ws://127.0.0.1:{self.port}/ws?token={token}", subprotocols=["carillon.v1.json"],  # type: ignore[list-item]
            compression=None, proxy=None, ping_interval=None, close_timeout=1,
        )  # fmt: skip

    async def publish(self, user: str, count: int) -> list[str]:
        """Send a user notifications; returns their ids."""
        async with httpx.AsyncClient(base_url=self.world.ingresses[0].url, trust_env=False) as http:
            answer = await http.post(
                "/v1/events",
                json=[{"userId": user, "type": "t", "title": f"private {n}"} for n in range(count)],
                headers={"Authorization": f"Bearer {self.world.key}"},
            )
        assert answer.status_code == 202, answer.text
        return [result["id"] for result in answer.json()["results"]]

    async def _bystander_frame(self) -> dict[str, Any]:
        async with asyncio.timeout(LONGEST_S):
            return json.loads(await self.bystander.recv())

    async def _victim_state(self) -> list[tuple[Any, ...]]:
        rows = await self.world.db.fetch(
            "select s.seq, s.rev, s.unread, n.seq, n.rev, n.read_at, n.seen_at, n.archived_at,"
            " n.dismissed_at, n.clicked_at, n.delivered_at"
            " from streams s join notifications n using (stream_id)"
            " where s.user_id = $1 order by n.seq",
            VICTIM,
        )
        return [tuple(row) for row in rows]

    async def _warm_up(self) -> None:
        """What is made once and kept (caches, pools, code) is there before anything is counted."""
        dice = Random(0)
        for _ in range(5):
            await asyncio.gather(*(self.attack(make(dice, facts), facts) for facts in self.facts))
        await self._quiet()

    # -- attacks ----------------------------------------------------------------------------------------

    async def run(self, seed: int, count: int) -> None:
        """Run attacks, `workers` at a time; then judge. Raises Finding."""
        dice = Random(seed)
        todo = iter([(n, dice.getrandbits(64)) for n in range(count)])

        async def work(facts: Facts) -> None:
            for number, own in todo:
                attack = make(Random(own), facts)
                try:
                    await self.attack(attack, facts)
                except AssertionError as exc:
                    raise Finding(
                        f"seed {seed}, attack {number} ({attack.name}): {exc}\n{attack.data[:2000]!r}"
                    ) from exc

        tasks = [asyncio.ensure_future(work(facts)) for facts in self.facts]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self.judge(f"seed {seed}")

    async def attack(self, attack: Attack, facts: Facts) -> None:
        """Run one attack and judge its answers. Raises AssertionError."""
        reader = Reader()
        heard = reader.heard
        source, sink = await asyncio.open_connection("127.0.0.1", self.port)
        spoken = asyncio.Event()
        listening = asyncio.ensure_future(_listen(source, reader))
        leaving = asyncio.ensure_future(_leave(sink, reader, spoken))
        try:
            async with asyncio.timeout(LONGEST_S):
                if attack.who == OPEN:
                    sink.write(
                        request(f"/ws?token={facts.token}", "Sec-WebSocket-Protocol: carillon.v1.json")
                    )
                    while not heard.messages and not listening.done():
                        await asyncio.sleep(0.001)
                for piece in attack.pieces():
                    sink.write(piece)
                    await asyncio.sleep(attack.slow_s)
                spoken.set()
                if attack.codes is not None or attack.waits:
                    await asyncio.shield(listening)
                else:
                    await asyncio.wait([listening], timeout=0.02)
        except TimeoutError:
            raise AssertionError(f"still open after {LONGEST_S} s: {heard}") from None
        except ConnectionError:
            pass  # cut off while it spoke
        finally:
            sink.transport.abort()
            for task in (listening, leaving):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                    await task
        self.done[attack.name.split(" ")[0] if attack.who == OPEN else attack.name] += 1
        self.codes[heard.code if heard.status == 101 else f"HTTP {heard.status}"] += 1
        _judge(attack, reader)

    # -- judging ----------------------------------------------------------------------------------------

    async def judge(self, who: str) -> None:
        """Nothing is left of the attackers, nothing was changed, nobody noticed. Raises Finding."""
        await self._quiet()
        await self.bystander.send('{"type":"PING","id":"there?"}')
        answer = await self._bystander_frame()
        if answer != {"type": "PONG", "id": "there?"}:
            raise Finding(f"{who}: the bystander got {answer}")
        state = await self._victim_state()
        if state != self._expected:
            raise Finding(f"{who}: the victim's rows changed from {self._expected} to {state}")
        if self._failed or self._records.said:
            raise Finding(f"{who}: {self._failed} {self._records.said}")
        # What is still ending (a task that writes when a user was last seen, say) is not left behind.
        try:
            await eventually(lambda: not self._grown())
        except AssertionError:
            raise Finding(f"{who}: left behind: {self._grown()}") from None

    def _grown(self) -> dict[str, tuple[int, int]]:
        """Of what there is more than before the first attack: how many then, how many now."""
        return {
            name: (self._before[name], n)
            for name, n in self._things().items()
            if n > self._before[name] + (POOLED_FILES if name == "files" else 0)
        }

    async def _quiet(self) -> None:
        gateway = self.world.gateways[0]
        sessions = self.world.shard._sessions
        await eventually(lambda: len(gateway._sockets) == 1, what="only the bystander's socket")
        await eventually(lambda: sessions.connections() == 1, what="only the bystander's attachment")
        await eventually(lambda: sessions.live == 1, what="only the bystander's session")
        await eventually(lambda: not gateway._redeeming and not gateway._keys._reads, what="no look-up")

    def _things(self) -> Counter[str]:
        gc.collect()
        kinds = (Connection, Session, Attachment, Protocol)
        things = Counter(type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, kinds))
        things["tasks"] = len(asyncio.all_tasks())
        things["files"] = len(os.listdir("/proc/self/fd"))
        return things


class _Records(logging.Handler):
    """What was logged as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(f"{record.name}: {record.getMessage()} {record.exc_info or ''}"[:500])


def rss_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _listen(source: asyncio.StreamReader, reader: Reader) -> None:
    """Hear until the server ends it."""
    try:
        while data := await source.read(65_536):
            reader.feed(data)
        reader.heard.ended = True
    except ConnectionResetError:
        reader.heard.ended = True  # it did not read all that was sent
    finally:
        reader.closed.set()


async def _leave(sink: asyncio.StreamWriter, reader: Reader, spoken: asyncio.Event) -> None:
    """Once everything was said and the server has closed, end our half, as a client should."""
    await spoken.wait()
    await reader.closed.wait()
    with contextlib.suppress(OSError):
        sink.write_eof()


def _judge(attack: Attack, reader: Reader) -> None:
    heard = reader.heard
    documents = [json.loads(message) for message in heard.messages]
    for message, document in zip(heard.messages, documents, strict=True):
        assert message.startswith(b'{"type":"'), str(message)
        check_server_frame(document)
    told = {document["type"] for document in documents}
    if attack.who == OPEN:
        assert documents, "no WELCOME"
        assert documents[0]["type"] == "WELCOME", str(documents[0])
        assert "private" not in str(documents), "the victim's notifications"
        assert VICTIM not in str([d for d in documents if d["type"] != "ERROR"]), str(documents)
        for_it = [d.get("id") for d in documents if d["type"] == "PONG"]
        if attack.codes is not None:
            assert for_it == attack.answers, f"PONG frames {for_it}, not {attack.answers}"
        if attack.exact:
            assert heard.pongs == attack.pongs, f"pongs {heard.pongs}, not {attack.pongs}"
    else:
        # Nobody who shows no token is told anything but what is wrong.
        assert told <= {"ERROR"}, str(told)
        if attack.status is not None:
            assert heard.status in attack.status, f"HTTP {heard.status}"
    if attack.codes is not None:
        if heard.status == 101:
            assert heard.code in attack.codes, f"closed with {heard.code}, not {sorted(attack.codes)}"
        else:
            assert heard.status in REFUSED, f"HTTP {heard.status}"
            assert len(attack.data) > 8000, f"HTTP {heard.status}"
    if attack.codes is not None or attack.waits:
        assert heard.ended, "the server did not end the connection"
