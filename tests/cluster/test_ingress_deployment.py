"""The ingress under Ray Serve: two doors, one app."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import ray

from actors.config import COORDINATOR_NAME
from carillon.messages import Address
from tests.integration.ingress_world import World
from tests.support import eventually

with warnings.catch_warnings():
    # Ray Serve 2.60 declares its models in a way that pydantic 2 deprecates, when it is imported.
    warnings.simplefilter("ignore")
    from ray import serve as ray_serve

    from cluster.processes import free_port
    from serve.deployment import deploy_ingress, remove_ingress

EVENT = {"userId": "ada", "type": "t", "title": "Hello"}


@ray.remote(num_cpus=0)
class CoordinatorAddress:
    """Stands where replicas look for the coordinator, and names the test's own."""

    def __init__(self, host: str, port: int) -> None:
        self._address = {"host": host, "port": port}

    async def link_address(self) -> dict[str, Any]:
        return self._address


@pytest.fixture
async def world(postgres_dsn: str, ray_local: str) -> AsyncIterator[World]:
    made = World(
        postgres_dsn,
        ingress={
            "port": free_port(),
            "direct_port": free_port(),
            "replicas": 2,
            "max_in_flight": 64,
            "drain_s": 1.0,
        },
        cluster={"namespace": ray_local},
    )
    await made.start_cluster()
    address: Address = made.coordinator.address
    stand_in = CoordinatorAddress.options(name=COORDINATOR_NAME, namespace=ray_local).remote(
        address.host, address.port
    )
    yield made
    ray.kill(stand_in)
    await made.stop()


@pytest.mark.slow  # Serve takes its time to start, twice two replicas
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
async def test_two_doors(world: World) -> None:
    """Both doors answer the same; replicas share the direct port; removal leaves nothing behind."""
    ingress = world.settings.ingress
    await asyncio.to_thread(deploy_ingress, world.settings, world.coordinator.secret)
    try:
        members = [m for m in world.coordinator.joined.values() if m.kind == "ingress"]
        await asyncio.to_thread(deploy_ingress, world.settings, world.coordinator.secret)  # changes nothing
        assert members == [m for m in world.coordinator.joined.values() if m.kind == "ingress"]
        assert len(members) == 2
        assert {m.public for m in members} == {f"http://127.0.0.1:{ingress.direct_port}"}
        async with httpx.AsyncClient(trust_env=False, timeout=60.0) as http:
            for port in (ingress.port, ingress.direct_port):
                url = f"http://127.0.0.1:{port}"
                answer = await http.post(f"{url}/v1/events", json=EVENT, headers=world.service())
                assert answer.status_code == 202, answer.text
                assert list(answer.json()) == ["id", "seq", "status", "channels"]
                assert (await http.get(f"{url}/readyz")).status_code == 200
                answer = await http.get(f"{url}/v1/presence/a%2Fb", headers=world.service())
                assert answer.json()["userId"] == "a/b"
                answer = await http.post(f"{url}/v1/events", content=b"\xff", headers=world.service())
                assert answer.status_code == 400
                assert answer.headers["x-request-id"] == answer.json()["requestId"]
    finally:
        await asyncio.to_thread(remove_ingress)
    assert sorted(world.coordinator.left) == sorted(m.name for m in members)
    await eventually(lambda: not [m for m in world.coordinator.joined.values() if m.kind == "ingress"])
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{ingress.direct_port}/healthz", trust_env=False)
    await asyncio.to_thread(ray_serve.shutdown)
