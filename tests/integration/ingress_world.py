"""An ingress replica with everything real but the cluster behind its link: a router by script."""

from __future__ import annotations

import json
import uuid
from typing import Any

import asyncpg
import httpx

from actors.link import Link
from actors.member import Membership
from carillon import tokens
from carillon.clock import SystemClock, rfc3339
from carillon.ids import Uuid7Source, slot_of
from carillon.messages import (
    ChangeResult,
    Done,
    Outcome,
    Outcomes,
    PlanQuery,
    PlanReply,
    PolicyHeld,
    PolicyRead,
    PresenceQuery,
    PresenceReply,
    Publish,
    UserPresence,
)
from carillon.metrics import Stats
from carillon.notification import encode_content
from serve.auth import TimedCache
from serve.ingress import Ingress
from stores.postgres.pool import open_pool
from stores.postgres.tenants import TenantStore
from tests.actors.fakes import FakeCoordinator, FakeShard, actor_config, fast_settings
from tests.support import eventually


class FakeRouter:
    """Answers as a router does, and remembers.

    Attributes:
        outcome: makes the outcome of an event; default: stored, seq counting up.
        answer: replaces everything: called with (link, message, request); True if it handled the message.
        events: every event published, tries included.
        received: all other messages.
        changed: what a Change answers as `changed`.
        devices: how many devices a DeviceDelete finds.
        missing: shards that have not heard of a changed policy.
    """

    def __init__(self, coordinator: FakeCoordinator, name: str = "router-local") -> None:
        self.membership = Membership(actor_config("router", name, coordinator), self, stats=Stats())
        self.links: list[Link] = []
        self.forget()

    def forget(self) -> None:
        """As new, links aside."""
        self.outcome: Any = None
        self.answer: Any = None
        self.events: list[Any] = []
        self.received: list[Any] = []
        self.changed = 1
        self.devices = 1
        self.missing: list[str] = []
        self._seq = 0

    def link_opened(self, link: Link) -> None:
        self.links.append(link)

    def link_closed(self, link: Link) -> None:
        self.links.remove(link)

    def receive(self, link: Link, message: Any, request: int) -> None:
        if self.answer is not None and self.answer(link, message, request):
            return
        if type(message) is Publish:
            self.events.extend(message.events)
            link.reply_nowait(request, Outcomes([self._outcome(event) for event in message.events]))
            return
        self.received.append(message)
        kind = type(message).__name__
        if type(message) is PresenceQuery:
            link.reply_nowait(
                request, PresenceReply([UserPresence(user, "offline") for user in message.users])
            )
        elif type(message) is PlanQuery:
            plan = {
                "userId": message.user,
                "status": "stored",
                "channels": ["in_app"],
                "rules": [],
                "words": "",
            }
            link.reply_nowait(request, PlanReply(json.dumps(plan)))
        elif type(message) is PolicyRead:
            link.reply_nowait(request, PolicyHeld(1, self.missing))
        elif kind == "Change":
            link.reply_nowait(request, ChangeResult(self.changed, 7, 0))
        else:
            link.reply_nowait(request, Done(self.devices if kind == "DeviceDelete" else 1))

    def _outcome(self, event: Any) -> Outcome:
        if self.outcome is not None:
            return self.outcome(event)
        self._seq += 1
        return Outcome(event.id, self._seq, "stored", ["in_app"])

    def read_finished(self, link: Link) -> None:
        pass


class World:
    """The replica, its cluster and two tenants ("acme", "other") with keys."""

    def __init__(self, dsn: str, **sections: dict[str, Any]) -> None:
        self.dsn = dsn
        sections["postgres"] = {"dsn": dsn, "pool_size": 2, **sections.get("postgres", {})}
        sections["ingress"] = {"direct_port": 0, "auth_cache_s": 0.2, **sections.get("ingress", {})}
        self.settings = fast_settings(**sections)
        self.clock = SystemClock()
        self.ingress: Any = None

    async def start(self) -> World:
        """Everything, the replica included."""
        await self.start_cluster()
        self.ingress = Ingress(actor_config("ingress", "ingress-a", self.coordinator, settings=self.settings))
        await self.ingress.start()
        self.http = httpx.AsyncClient(base_url=self.ingress.url, trust_env=False, timeout=15.0)
        return self

    async def start_cluster(self) -> None:
        """Everything but the replica."""
        self.coordinator = await FakeCoordinator.start(self.settings)
        self.router = FakeRouter(self.coordinator)
        await self.router.membership.start()
        self.shard = await FakeShard.start(self.coordinator, "shard-a")
        self.gateway = Membership(
            actor_config("gateway", "gateway-a", self.coordinator),
            self.router,
            stats=Stats(),
            public="ws://127.0.0.1:1/ws",
        )
        await self.gateway.start()
        self.coordinator.spread()
        self.pool = await open_pool(self.settings.postgres, 2)
        self.tenants = TenantStore(self.pool)
        self.acme = await self.tenants.create_tenant("acme")
        self.other = await self.tenants.create_tenant("other")
        self.key = await self.tenants.create_key("acme", "all", ["admin"])
        self.other_key = await self.tenants.create_key("other", "all", ["admin"])

    async def reset(self) -> None:
        """As after `start`: empty tables but for tenants and keys, a router that forgot."""
        await self.pool.execute(
            "truncate streams, notifications, deliveries, delivery_attempts, devices, preferences"
        )
        self.router.forget()
        for cache in vars(self.ingress.app.services.auth).values():
            if isinstance(cache, TimedCache):
                cache.clear()

    async def stop(self) -> None:
        if self.ingress is not None:
            await self.http.aclose()
            await self.ingress.stop()
            inside = self.ingress.app.services.shares._inside
            await eventually(lambda: not inside, what="no request is counted any more")
        await self.pool.close()
        await self.gateway.close()
        await self.shard.stop()
        await self.router.membership.close()
        await self.coordinator.stop()

    def service(self, key: str | None = None) -> dict[str, str]:
        """Headers of a service."""
        return {"Authorization": f"Bearer {key or self.key}"}

    def client(self, user: str = "ada", tenant: Any = None, **claims: Any) -> dict[str, str]:
        """Headers of a user's device."""
        record = tenant or self.acme
        token = tokens.mint(
            record.tenant, user, record.client_secret, self.clock.now_ms(), claims.get("ttl_s", 600)
        )
        return {"Authorization": f"Bearer {token}"}

    async def event(self, body: Any, **more: Any) -> httpx.Response:
        """POST /v1/events."""
        headers = self.service() | more.pop("headers", {})
        if isinstance(body, bytes):
            return await self.http.post("/v1/events", content=body, headers=headers, **more)
        return await self.http.post("/v1/events", json=body, headers=headers, **more)


async def store_notifications(
    dsn: str, tenant: str, user: str, count: int, *, content: Any = None, now_ms: int | None = None
) -> list[bytes]:
    """Put `count` notifications of a user straight into Postgres; returns their ids, oldest first."""
    now_ms = SystemClock().now_ms() if now_ms is None else now_ms
    source = Uuid7Source()
    connection = await asyncpg.connect(dsn)
    try:
        stream, seq = await connection.fetchrow(
            "insert into streams as s (tenant, user_id, slot, epoch, seq, rev, unread)"
            " values ($1, $2, $3, 'e1', $4::int, $4::int, $4::int) on conflict (tenant, user_id) do update"
            " set seq = s.seq + $4::int, rev = s.rev + $4::int, unread = s.unread + $4::int"
            " returning stream_id, seq",
            tenant,
            user,
            slot_of(tenant, user),
            count,
        )
        ids = [source.next(now_ms) for _ in range(count)]
        rows = []
        for index, raw in enumerate(ids):
            number = seq - count + index + 1
            members = {"type": "t", "title": f"n{number}", "createdAt": rfc3339(now_ms)}
            members |= content(number) if content else {}
            rows.append(
                (
                    uuid.UUID(bytes=raw), stream, number, number, number, 1, members["type"],
                    members.get("category"), encode_content(members),
                )
            )  # fmt: skip
        await connection.executemany(
            "insert into notifications (id, stream_id, seq, rev, position, priority, type, category, content,"
            " created_at) values ($1, $2, $3, $4, $5, $6, $7, $8, $9, now())",
            rows,
        )
        return ids
    finally:
        await connection.close()
