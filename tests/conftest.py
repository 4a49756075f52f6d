"""Fixtures of all suites: real servers, a database per test, a local Ray."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import pytest
import pytest_asyncio
import redis
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent

# Before anything imports ray: it reads these once.
os.environ.update(
    {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_AUTH_MODE": "disabled",  # nodes of a test cluster share a machine, not a token file
        "RAY_DISABLE_METRICS_COLLECTION": "1",
        "PYTHONPATH": str(ROOT),  # workers import our packages from the root, as everywhere
    }
)
# Settings of the person's shell must not steer tests.
for _name in [name for name in os.environ if name.startswith("CARILLON_")]:
    del os.environ[_name]

# No example has a deadline, none is drawn too slowly: that would say more of the machine than of the code.
hypothesis_settings.register_profile("carillon", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("carillon")

from cluster.embedded import EmbeddedPostgres, EmbeddedValkey  # noqa: E402
from tests.support import settle  # noqa: E402


@pytest.fixture
async def settled_loop() -> AsyncIterator[None]:
    """Ended last of a test's fixtures: sockets whose other ends were closed a moment ago see it."""
    yield
    await settle()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test with a loop of its own gets `settled_loop`, before all other fixtures.

    Otherwise a loaded machine ends the loop first, and the sockets' ResourceWarning fails whichever test runs
    when they are collected.
    """
    for item in items:
        if isinstance(item, pytest.Function) and pytest_asyncio.is_async_test(item):
            marker = item.get_closest_marker("asyncio")
            own = marker is None or marker.kwargs.get("loop_scope", "function") == "function"
            if own and settled_loop.__name__ not in item.fixturenames:
                item.fixturenames.insert(0, settled_loop.__name__)


def run_apart(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in a thread with a loop of its own, out of the way of the test's loop."""
    result: list[T] = []
    error: list[BaseException] = []

    def body() -> None:
        try:
            result.append(asyncio.run(work()))
        except BaseException as exc:
            error.append(exc)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if error:
        raise error[0]
    return result[0]


def _sql(dsn: str, *statements: str) -> None:
    async def work() -> None:
        connection = await asyncpg.connect(dsn)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    run_apart(work)


@pytest.fixture(scope="session")
def service_folder() -> Iterator[Path]:
    """A folder that PostgreSQL's unprivileged user can enter (pytest's own is closed), removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="carillon-test-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server(service_folder: Path) -> Iterator[EmbeddedPostgres]:
    """One PostgreSQL for the whole run, without fsync; its database `template` is migrated."""
    from stores.postgres.migrate import migrate

    with EmbeddedPostgres(service_folder / "postgres", fast=True) as server:
        _sql(server.dsn, "create database template")
        run_apart(lambda: migrate(server.dsn_of("template")))
        yield server


class Databases:
    """Copies of `template`. One is made ahead while a test runs: making one takes as long as many a test."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self._server = server
        self._worker = ThreadPoolExecutor(1, "databases")
        self._next = self._worker.submit(self._create)
        self._drops: list[Future[None]] = []

    def _create(self) -> str:
        name = f"test_{uuid.uuid4().hex[:12]}"
        _sql(self._server.dsn, f"create database {name} template template strategy wal_log")
        return name

    def take(self) -> str:
        """Name of a fresh one."""
        ready, self._next = self._next, self._worker.submit(self._create)
        return ready.result()

    def drop(self, name: str) -> None:
        """Drop one, with whatever still uses it; raises what went wrong with those before."""
        self._drops.append(self._worker.submit(_sql, self._server.dsn, f"drop database {name} with (force)"))
        while self._drops and self._drops[0].done():
            self._drops.pop(0).result()

    def close(self) -> None:
        """Wait for what is under way."""
        self._worker.shutdown()
        for drop in self._drops:
            drop.result()
        self._next.result()


@pytest.fixture(scope="session")
def databases(postgres_server: EmbeddedPostgres) -> Iterator[Databases]:
    """Fresh, migrated databases."""
    supply = Databases(postgres_server)
    yield supply
    supply.close()


@pytest.fixture
def postgres_dsn(postgres_server: EmbeddedPostgres, databases: Databases) -> Iterator[str]:
    """A fresh, migrated database; dropped after the test, with whatever still uses it."""
    name = databases.take()
    yield postgres_server.dsn_of(name)
    databases.drop(name)


@pytest.fixture(scope="session")
def valkey_server(service_folder: Path) -> Iterator[EmbeddedValkey]:
    """One Valkey for the whole run, nothing on disk."""
    with EmbeddedValkey(service_folder / "valkey", fast=True) as server:
        yield server


@pytest.fixture
def redis_url(valkey_server: EmbeddedValkey) -> str:
    """URL of an empty Valkey."""
    client = redis.Redis.from_url(valkey_server.url)
    try:
        client.flushall()
    finally:
        client.close()
    return valkey_server.url


@pytest.fixture(scope="session")
def ray_local() -> Iterator[str]:
    """A local Ray of this test run; the value is its namespace."""
    import ray

    namespace = f"test-{uuid.uuid4().hex[:8]}"
    ray.init(
        address="local",  # never a cluster that somebody else runs on this machine
        num_cpus=8,  # logical: tests place more actors than the machine has cores
        namespace=namespace,
        include_dashboard=False,
        object_store_memory=80_000_000,
        log_to_driver=False,
        logging_level="WARNING",
    )
    yield namespace
    ray.shutdown()
