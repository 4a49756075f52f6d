"""A tenant's changed policy holds on all nodes when the change is answered: real doors, routers and processes
of shards, which would look by themselves in an hour only."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx
import pytest

from actors.router import Router
from carillon.ids import slot_of
from cluster.ray_env import ROOT
from serve.ingress import Ingress
from stores.postgres.pool import open_pool
from stores.postgres.tenants import TenantStore
from tests.actors.fakes import FakeCoordinator, actor_config, fast_settings
from tests.support import eventually

NODES = ("node-1", "node-2")
OFF = {"forced": {"types": {"t": False}}}
"""A policy under which nothing of the type "t" is shown."""


class TwoNodes:
    """On each of two nodes a shard in a process of its own, a router and a door; tenant "acme"."""

    def __init__(self, dsn: str, **sections: dict[str, Any]) -> None:
        base: dict[str, dict[str, Any]] = {
            "postgres": {"dsn": dsn, "pool_size": 2},
            "shard": {"policy_refresh_s": 3600.0},
            "ingress": {"policy_wait_s": 20.0, "request_timeout_s": 60.0},
        }
        for name, values in sections.items():
            base[name] = base.get(name, {}) | values
        self.dsn = dsn
        self.settings = fast_settings(**base)
        self.shards: dict[str, asyncio.subprocess.Process] = {}
        self.routers: list[Router] = []
        self.doors: list[Ingress] = []

    async def __aenter__(self) -> TwoNodes:
        self.coordinator = await FakeCoordinator.start(self.settings)
        pool = await open_pool(self.settings.postgres, 1)
        await TenantStore(pool).create_tenant("acme")
        key = await TenantStore(pool).create_key("acme", "all", ["admin"])
        await pool.close()
        db = await asyncpg.connect(self.dsn)
        await db.execute(
            "insert into shards (shard, term, node, incarnation)"
            " select 'shard-' || n, 1, n, 'x' from unnest($1::text[]) n", list(NODES),
        )  # fmt: skip
        await db.close()
        self.http = httpx.AsyncClient(
            trust_env=False, timeout=60.0, headers={"Authorization": f"Bearer {key}"}
        )
        for node in NODES:
            self.shards[node] = await self._shard(node)
        self.coordinator.spread()
        for node in NODES:
            self.routers.append(Router(self._config("router", node)))
            await self.routers[-1].start()
            self.doors.append(Ingress(self._config("ingress", node)))
            await self.doors[-1].start()
        owner = {slot: name.removeprefix("shard-") for slot, name in self.coordinator.owners.items()}
        users = [f"user-{n}" for n in range(200)]
        self.users = {n: [user for user in users if owner[slot_of("acme", user)] == n] for n in NODES}
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.http.aclose()
        for door in self.doors:
            await door.stop()
        for router in self.routers:
            await router.stop()
        for process in self.shards.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        await self.coordinator.stop()

    def _config(self, kind: str, node: str) -> Any:
        return actor_config(kind, f"{kind}-{node}", self.coordinator, settings=self.settings, node=node)

    async def _shard(self, node: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.actors.plain_shard"),
            cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(pickle.dumps(self._config("shard", node)))
        process.stdin.close()
        assert await asyncio.wait_for(process.stdout.readline(), 60) == b"ready\n"
        return process

    async def put(self, policy: Any, door: int = 0, **headers: str) -> httpx.Response:
        return await self.http.put(f"{self.doors[door].url}/v1/policy", json=policy, headers=headers)

    async def outcome(self, user: str, door: int) -> str:
        """What becomes of one more event of the user."""
        event = {"userId": user, "type": "t", "title": "Hello"}
        answer = await self.http.post(f"{self.doors[door].url}/v1/events", json=event)
        assert answer.status_code == 202, answer.text
        return answer.json()["status"]


@pytest.fixture
async def nodes(postgres_dsn: str) -> AsyncIterator[TwoNodes]:
    async with TwoNodes(postgres_dsn) as made:
        yield made


async def test_the_next_event_obeys_on_every_node(nodes: TwoNodes) -> None:
    """Put at one door, obeyed by the next event of every shard from every door, of users who were there and
    of users who were not; each change is one version, told as ETag."""
    for node in NODES:
        assert await nodes.outcome(nodes.users[node][0], 0) == "stored"
    for version in range(1, 9):
        answer = await nodes.put(OFF if version % 2 else {}, version % 2)
        assert (answer.status_code, answer.headers["etag"]) == (200, f'"{version}"'), answer.text
        wanted = "suppressed" if version % 2 else "stored"
        asked = [
            nodes.outcome(user, door)
            for node in NODES
            for user in (nodes.users[node][0], nodes.users[node][version])
            for door in (0, 1)
        ]
        assert await asyncio.gather(*asked) == [wanted] * 8, f"version {version}"


async def test_under_load_no_event_after_the_answer_is_decided_by_the_policy_before(nodes: TwoNodes) -> None:
    """While events flow and policies change: what is sent after a change was answered, and answered before
    the next one is sent, is decided by it."""
    done = False
    wanted, version = "stored", 0
    wrong: list[tuple[str, str]] = []
    judged = 0

    async def flow(user: str, door: int) -> None:
        nonlocal judged
        while not done:
            before, of = wanted, version
            status = await nodes.outcome(user, door)
            if before and (before, of) == (wanted, version):
                judged += 1
                if status != before:
                    wrong.append((status, before))

    flows = [
        asyncio.create_task(flow(user, door))
        for node in NODES
        for door, user in enumerate(nodes.users[node][:2])
    ]
    for version in range(1, 13):
        wanted = ""  # while it changes both are right
        assert (await nodes.put(OFF if version % 2 else {}, version % 2)).status_code == 200
        wanted = "suppressed" if version % 2 else "stored"
        enough = judged + 8
        await eventually(lambda enough=enough: judged >= enough or wrong, what="events between two changes")
    done = True
    await asyncio.gather(*flows)
    assert wrong == []


async def test_a_shard_that_does_not_answer_is_not_waited_for_long(postgres_dsn: str) -> None:
    """A stopped process: the change is stored, obeyed by the other shard at once, and answered 202, since it
    does not hold everywhere yet; it does when the process goes on."""
    quick = {"policy_wait_s": 0.3, "request_timeout_s": 60.0}
    async with TwoNodes(postgres_dsn, ingress=quick, shard={"policy_refresh_s": 0.5}) as nodes:
        there, away = (nodes.users[node][0] for node in NODES)
        for user in (there, away):
            assert await nodes.outcome(user, 0) == "stored"
        nodes.shards[NODES[1]].send_signal(signal.SIGSTOP)
        try:
            answer = await nodes.put(OFF)
            assert (answer.status_code, answer.json()["forced"]) == (202, OFF["forced"])
            assert await nodes.outcome(there, 1) == "suppressed"
        finally:
            nodes.shards[NODES[1]].send_signal(signal.SIGCONT)

        async def obeyed() -> bool:
            return await nodes.outcome(away, 0) == "suppressed"

        await eventually(obeyed, what="the shard that goes on")

        async def everywhere() -> bool:
            return (await nodes.put({})).status_code == 200

        await eventually(everywhere, what="an answer in time of the shard that goes on")
        assert await nodes.outcome(away, 1) == "stored"
