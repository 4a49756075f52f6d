"""A shard in-process with hand-driven gateway, router and pool links."""

from __future__ import annotations

import json
from typing import Any

import asyncpg

from actors.link import Link, dial
from actors.shard import Shard
from carillon.clock import SystemClock
from carillon.ids import Uuid7Source, slot_of
from carillon.messages import (
    Attach,
    AttachRefused,
    ClientReady,
    CloseSocket,
    Deliver,
    Event,
    Member,
    Outcome,
    Publish,
    Push,
)
from carillon.notification import encode_content
from tests.actors.fakes import SECRET, FakeCoordinator, actor_config, fast_settings
from tests.support import eventually

ids = Uuid7Source()
clock = SystemClock()


def make_event(user: str = "u", tenant: str = "t", title: str = "hello", **more: Any) -> Event:
    """An event as the ingress mints it."""
    now = clock.now_ms()
    content = encode_content({"type": "test", "title": title, "createdAt": "2026-01-01T00:00:00.000Z"})
    fields: dict[str, Any] = {
        "id": ids.next(now), "tenant": tenant, "user": user, "slot": slot_of(tenant, user), "type": "test",
        "category": None, "priority": 1, "content": content, "created_ms": now,
    }  # fmt: skip
    return Event(**(fields | more))


class AheadClock(SystemClock):
    """The system's clock, which a test may put ahead: what takes long is over when the test says so."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def now_ms(self) -> int:
        return super().now_ms() + round(self._ahead_s * 1000)

    def monotonic(self) -> float:
        return super().monotonic() + self._ahead_s

    def advance(self, seconds: float) -> None:
        self._ahead_s += seconds


class HandGateway:
    """A gateway's end of a link: records what the shard writes, per connection."""

    def __init__(self) -> None:
        self.frames: dict[int, list[dict[str, Any]]] = {}
        self.writes: dict[int, list[Any]] = {}
        self.closed: dict[int, tuple[int, str]] = {}
        self.refused: list[int] = []
        self.jobs: list[Any] = []
        self.link: Link

    def link_opened(self, link: Link) -> None:
        self.link = link

    def link_closed(self, link: Link) -> None:
        pass

    def receive(self, link: Link, message: Any, request: int) -> None:
        if type(message) is Deliver:
            for write in message.writes:
                for conn in write.conns:
                    self.frames.setdefault(conn, []).append(json.loads(write.frame))
                    self.writes.setdefault(conn, []).append(write)
        elif type(message) is CloseSocket:
            for conn in message.conns:
                self.closed[conn] = (message.code, message.reason)
        elif type(message) is AttachRefused:
            self.refused += message.conns
        elif type(message) is Push:
            self.jobs += message.jobs

    def read_finished(self, link: Link) -> None:
        pass

    def attach(self, conn: int, user: str = "u", tenant: str = "t", **more: Any) -> None:
        more = {"device": f"d{conn}", "session_id": f"s{conn}"} | more
        self.link.send_nowait(Attach(conn, tenant, user, slot_of(tenant, user), **more))

    async def attach_ready(self, conn: int, user: str = "u", **more: Any) -> dict[str, Any]:
        """Attach and go live; returns WELCOME."""
        self.attach(conn, user, **more)
        await self.seen(conn, 1)
        self.link.send_nowait(ClientReady(conn))
        return self.frames[conn][0]

    async def seen(self, conn: int, count: int) -> list[dict[str, Any]]:
        await eventually(lambda: len(self.frames.get(conn, [])) >= count, what=f"{count} frames for {conn}")
        return self.frames[conn]

    def seqs(self, conn: int) -> list[int]:
        frames = self.frames.get(conn, [])
        return [f["notification"]["seq"] for f in frames if f["type"] == "NEW_NOTIFICATION"]


class Kit:
    """Everything around one shard.

    Attributes:
        clock: of all its shards; see `skip`.
    """

    def __init__(
        self,
        dsn: str,
        *,
        push: dict[str, Any] | None = None,
        presence: dict[str, Any] | None = None,
        redis: dict[str, Any] | None = None,
        clock: AheadClock | None = None,
        merge: dict[str, Any] | None = None,
        **shard: Any,
    ) -> None:
        self.dsn = dsn
        values = {"ack_flush_s": 0.01, "sweep_s": 0.1, "resume_wait_s": 0.3, "grace_s": 0.3}
        values["clean_close_grace_s"] = 0.05
        self.settings = fast_settings(
            postgres={"dsn": dsn},
            shard=values | shard,
            push=push or {},
            presence=presence or {},
            redis=redis or {},
            merge=merge or {},
        )
        self.clock = clock or AheadClock()
        self.shards: list[Shard] = []
        self.links: list[Link] = []

    async def __aenter__(self) -> Kit:
        self.coordinator = await FakeCoordinator.start(self.settings)
        self.db = await asyncpg.connect(self.dsn)
        self.shard = await self.start_shard("shard-a")
        self.gateway = await self.dial("shard-a", "gateway-1")
        self.router = await self.dial("shard-a", "router-1")
        self.coordinator.add(Member("router", "router-1", "local", "x", self.coordinator.address))
        return self

    async def __aexit__(self, *exc: object) -> None:
        for link in self.links:
            link.close()
        for shard in self.shards:
            await shard.stop()
        await self.db.close()
        await self.coordinator.stop()

    async def start_shard(self, name: str, spread: bool = True) -> Shard:
        """Start (or restart) a shard under a new term, owning everything."""
        term = await self.new_term(name)
        self.coordinator._terms[name] = term
        shard = Shard(actor_config("shard", name, self.coordinator, settings=self.settings), self.clock)
        await shard.start()
        self.shards.append(shard)
        if spread:
            self.coordinator.set_owner(range(1024), name)
            await eventually(lambda: len(shard._slots) == 1024)
            if self.settings.shard.max_kept_pushes:
                await eventually(lambda: shard._kept._mark is not None, what="the mark of kept pushes")
        return shard

    def skip(self, seconds: float) -> None:
        """Let time pass for the shards: windows no slow machine can miss end when a test says so."""
        self.clock.advance(seconds)
        for shard in self.shards:
            if not shard._stopped:
                timer = shard._sessions._timer
                if timer is not None:
                    timer.cancel()
                shard._sessions.tick()
                shard._outbox.due_now()

    async def new_term(self, name: str) -> int:
        """Bump a shard's term in Postgres."""
        return await self.db.fetchval(
            "insert into shards (shard, term, node, incarnation) values ($1, 1, 'local', 'x')"
            " on conflict (shard) do update set term = shards.term + 1 returning term",
            name,
        )

    async def dial(self, shard: str, name: str) -> HandGateway:
        """A link to a shard."""
        hand = HandGateway()
        member = self.coordinator.joined[shard]
        link = await dial(member.address, hand, self.settings.link, name, SECRET)
        self.links.append(link)
        return hand

    async def publish(self, *events: Event) -> list[Outcome]:
        """Publish over the router's link."""
        return (await self.router.link.request(Publish(list(events)))).outcomes
