"""schemathesis against /openapi.json: what the document says is what the server does."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cluster.embedded import EmbeddedPostgres
from serve.routes import all_routes
from serve.routing import CLIENT, SERVICE
from tests.integration.ingress_world import World, store_notifications

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60")) // 12
"""Per operation and mode: a short run over every route; `make fuzz` has more."""


@pytest.fixture(scope="module")
def server(postgres_server: EmbeddedPostgres) -> Iterator[World]:
    """A replica on a loop of its own thread: schemathesis calls it from this one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    async def start() -> World:
        admin = await asyncpg.connect(postgres_server.dsn)
        await admin.execute("create database test_http_schema template template strategy wal_log")
        await admin.close()
        dsn = postgres_server.dsn_of("test_http_schema")
        # No shard is there: a long poll waits for nothing but its time.
        made = await World(dsn, ingress={"demo": True, "demo_tenant": "acme", "max_wait_s": 0.1}).start()
        await store_notifications(dsn, "acme", "ada", 30)
        return made

    async def stop(made: World) -> None:
        await made.stop()
        admin = await asyncpg.connect(postgres_server.dsn)
        await admin.execute("drop database test_http_schema with (force)")
        await admin.close()

    made = run(start())
    yield made
    run(stop(made))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.parametrize("route", all_routes(), ids=lambda route: f"{route.method} {route.path}")
def test_route_does_what_its_description_says(server: World, route: Any) -> None:
    """Generated requests, good and bad, get only the statuses, headers and documents that are described."""
    with requests.Session() as session:
        document = session.get(f"{server.ingress.url}/openapi.json", timeout=10).json()
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=server.ingress.url)
        # Query members that nobody knows are passed over everywhere: they are no fault to be refused.
        schema.config.generation.allow_extra_parameters = False
        operation = schema[route.path][route.method]
        headers = {SERVICE: server.service, CLIENT: server.client}.get(route.door, dict)()
        # A stream that is let in has no end; what it sends is tested in test_streams.py.
        modes = [GenerationMode.POSITIVE] if route.path != "/api/stream" else []
        if route.body is not None or route.query:
            modes.append(GenerationMode.NEGATIVE)
        for mode in modes:
            # A bad item of a batch is refused inside of a 202.
            strict = mode is GenerationMode.NEGATIVE and route.path != "/v1/events"
            checks = CHECKS + ([negative_data_rejection] if strict else [])
            run(operation, mode, checks, headers, session)


def run(operation: Any, mode: GenerationMode, checks: list[Any], headers: Any, session: Any) -> None:
    """Send a few generated requests and check the answers."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=EXAMPLES <= 5,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def inner(case: Any) -> None:
        response = case.call(headers=headers, session=session)
        case.validate_response(response, checks=checks)

    inner()
