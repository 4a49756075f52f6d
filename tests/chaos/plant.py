"""The system under test: `python -m cluster up` with its databases behind a proxy and its providers here.

PostgreSQL and Valkey run beside `up`, so that a power loss can end everything and bring back the same data.
The local FCM and APNs run in this process: they are the outside world, which no power loss of ours ends, and
every push they accept goes into the history.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from subprocess import Popen
from typing import Any

from benchmarks.wire import Door, get_json
from carillon.api_keys import SCOPES
from carillon.settings import Settings, load_settings
from carillon.testing.apns_server import ApnsServer
from carillon.testing.fcm_server import FcmServer
from carillon.testing.provider_credentials import write_demo_credentials
from carillon.testing.provider_server import ReceivedPush
from cluster.embedded import EmbeddedPostgres, EmbeddedValkey
from cluster.processes import (
    ProcessId,
    alive,
    become_subreaper,
    command_of,
    descendants,
    end_processes,
    free_port,
    reap_zombies,
    spawn,
)
from cluster.ray_env import ROOT, client_environment
from cluster.run_folder import RunFolder
from stores.postgres.migrate import migrate
from stores.postgres.pool import open_pool
from stores.postgres.tenants import TenantStore
from tests.chaos.history import History
from tests.chaos.proxy import Backend, Proxy

TENANT = "chaos"
TITLES = {
    "shard": "ray::ShardActor",
    "gateway": "ray::GatewayActor",
    "router": "ray::RouterActor",
    "pool": "ray::PoolActor",
    "sender": "ray::RaySender",
    "coordinator": "ray::CoordinatorActor",
    "ingress": "ray::ServeReplica:carillon:ingress",
}
"""Process titles by kind of actor."""
START_S = 240.0


class Provider:
    """What the two local providers have in common here: pushes go into the history."""

    def __init__(self, name: str, server: FcmServer | ApnsServer, history: History) -> None:
        self.name = name
        self.server = server
        self._history = history
        self._accept = server.accept
        server.accept = self._note  # type: ignore[method-assign]

    def _note(self, push: ReceivedPush) -> None:
        self._accept(push)
        if push.notification_id:
            self._history.add("push", provider=self.name, target=push.target, id=push.notification_id)


class Plant:
    """Starts, breaks and restarts the system.

    Args:
        folder: for data and logs; PostgreSQL's unprivileged user must be able to enter it.
        history: pushes go there.
        rng: choices among victims and backends.
        timings: settings by variable, e.g. {"CARILLON_SHARD_GRACE_S": "1"}.
        shards: shard actors.
    """

    def __init__(
        self,
        folder: Path,
        history: History,
        rng: random.Random,
        timings: Mapping[str, str],
        shards: int = 2,
    ) -> None:
        self.folder = folder
        self.rng = rng
        self.shards = shards
        self.postgres = EmbeddedPostgres(folder / "postgres")
        self.valkey = EmbeddedValkey(folder / "valkey")
        self.database = Proxy("postgres", lambda: [("127.0.0.1", self.postgres.port)], rng)
        self.front = Proxy("clients", self._gateways, rng)
        self.providers: dict[str, Provider] = {}
        self.up: Popen[bytes] | None = None
        self.http_port, self.direct_port = free_port(), free_port()
        self._gateway_ports: dict[ProcessId, int] = {}
        self._gateways_at = float("-inf")
        self.worker: Popen[bytes] | None = None
        self.api_key = self.client_secret = ""
        self.settings: Settings = load_settings(dict(timings))
        self._timings = dict(timings)
        self._history = history
        self._environ: dict[str, str] = {}

    # -- addresses ----------------------------------------------------------------------------------------

    @property
    def direct_url(self) -> str:
        """The ingress replica's own door."""
        return f"http://127.0.0.1:{self.direct_port}"

    @property
    def http_url(self) -> str:
        """Serve's route."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def ws_url(self) -> str:
        """The gateway, through the proxy."""
        return f"ws://127.0.0.1:{self.front.port}/ws"

    @property
    def dsn(self) -> str:
        """PostgreSQL, not through the proxy: the checker's own way."""
        return self.postgres.dsn

    # -- life -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything; returns once the whole path answers."""
        become_subreaper()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o711)
        await asyncio.gather(self.postgres.start_async(), self.valkey.start_async())
        await migrate(self.postgres.dsn)
        await self.database.start()
        await self.front.start()
        fcm, apns = FcmServer(self.folder / "fcm"), ApnsServer(self.folder / "apns")
        for name in ("fcm", "apns"):
            (self.folder / name).mkdir(exist_ok=True)
        ready = [await fcm.start(), await apns.start()]
        self.providers = {
            "fcm": Provider("fcm", fcm, self._history),
            "apns": Provider("apns", apns, self._history),
        }
        push = write_demo_credentials(self.folder / "credentials", ready[0], ready[1])
        pool = await open_pool(self.settings.with_values(postgres={"dsn": self.dsn}).postgres, 1)
        try:
            store = TenantStore(pool)
            self.client_secret = (await store.create_tenant(TENANT)).client_secret
            self.api_key = await store.create_key(TENANT, "chaos", list(SCOPES))
        finally:
            await pool.close()
        direct = f":{self.postgres.port}/"
        self._environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("CARILLON_")},
            "CARILLON_PUSH_MIN_SENDERS": "2",  # so that senders are processes, too
            **self._timings,
            **{f"CARILLON_PUSH_{name.upper()}": str(value) for name, value in push.items()},
            "CARILLON_GATEWAY_PORT": "0",  # any free one for each: two nodes share this machine
            "CARILLON_POSTGRES_DSN": self.dsn.replace(direct, f":{self.database.port}/"),
            "CARILLON_REDIS_URL": self.valkey.url,
            "PYTHONPATH": str(ROOT),
        }
        await self.start_up()

    async def start_up(self) -> None:
        """Start `up` and wait until it is ready."""
        folder = self.folder / "up"
        folder.mkdir(exist_ok=True)
        dev = folder / "dev.json"
        dev.unlink(missing_ok=True)
        self.up = spawn(
            [
                *(sys.executable, "-m", "cluster", "up", "--no-demo", "--data-dir", str(folder)),
                *("--shards", str(self.shards), "--http-port", str(self.http_port)),
                *("--direct-port", str(self.direct_port)),
            ],
            env=self._environ,
            cwd=ROOT,
            log=self.folder / "up.log",
        )
        deadline = time.monotonic() + START_S
        while not dev.exists():
            if self.up.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"`up` did not start: {(self.folder / 'up.log').read_text()[-3000:]}")
            await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """End everything that was started."""
        if self.up is not None and self.up.poll() is None:
            self.up.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(self.up.wait), 60)
        await self.front.close()
        await self.database.close()
        for server in (self.postgres, self.valkey):
            await server.stop_async()
        for provider in self.providers.values():
            await provider.server.close()
        left = [info.id for info in descendants(os.getpid())]
        await asyncio.to_thread(end_processes, left, 2.0)
        reap_zombies()

    # -- victims --------------------------------------------------------------------------------------------

    def actors(self, kind: str) -> list[ProcessId]:
        """Living processes of a kind of actor, on every node."""
        title = TITLES[kind]
        found = [info.id for info in descendants(os.getpid())]
        return [process for process in found if command_of(process.pid).startswith(title)]

    def _gateways(self) -> list[Backend]:
        """Where gateways take clients: any free port each, for two nodes share this machine."""
        if time.monotonic() - self._gateways_at > 0.2:
            self._gateways_at = time.monotonic()
            known, self._gateway_ports = self._gateway_ports, {}
            for process in self.actors("gateway"):
                port = known.get(process) or _http_port(process.pid)
                if port is not None:
                    self._gateway_ports[process] = port
        return [("127.0.0.1", port) for port in self._gateway_ports.values()]

    # -- the second node ----------------------------------------------------------------------------------

    async def join_worker(self) -> bool:
        """Start a second Ray node; True once its shards and its gateway run."""
        folder = RunFolder(self.folder / "up")
        run = folder.run()
        assert run is not None
        shards, gateways = len(self.actors("shard")), len(self.actors("gateway"))
        self.worker = spawn(
            [sys.executable, "-m", "tests.chaos.worker_node", run["rayAddress"]],
            env=self._environ | client_environment(folder.ray_token_file(), True),
            cwd=ROOT,
            log=self.folder / "worker.log",
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            self._gateways()
            if len(self.actors("shard")) >= shards + self.shards and len(self._gateway_ports) > gateways:
                return True
            await asyncio.sleep(0.2)
        return False

    def kill_worker(self) -> int:
        """kill -9 of the second node: the raylet and everything under it; returns how many processes."""
        assert self.worker is not None
        family = [info.id.pid for info in descendants(self.worker.pid)]
        for pid in (self.worker.pid, *family):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.worker.wait()
        return len(family) + 1

    def victim(self, kind: str) -> ProcessId | None:
        """One of them, by the seed."""
        found = sorted(self.actors(kind), key=lambda process: process.pid)
        return self.rng.choice(found) if found else None

    async def wait_for_actors(self, kind: str, count: int, without: ProcessId, timeout_s: float = 90) -> bool:
        """Wait until `count` of a kind run that are not `without`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if len([p for p in self.actors(kind) if p != without]) >= count:
                return True
            await asyncio.sleep(0.25)
        return False

    async def kill_postgres(self) -> None:
        """SIGKILL of the postmaster; its children notice."""
        if self.postgres.pid is not None:
            os.kill(self.postgres.pid, signal.SIGKILL)

    async def power_loss(self) -> int:
        """SIGKILL of everything but this process; returns how many processes that were."""
        assert self.up is not None
        own = [info.id for info in descendants(os.getpid())]
        # The supervisors first: they would start again what is missing.
        os.kill(self.up.pid, signal.SIGKILL)
        for process in own:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while any(alive(info.id) for info in descendants(os.getpid())):
            for info in descendants(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(info.id.pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise RuntimeError("processes survived SIGKILL")
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self.up.wait)
        reap_zombies([child.pid for s in (self.postgres, self.valkey) if (child := s.child) is not None])
        return len(own)

    async def power_on(self) -> None:
        """Start everything again on the data that is there."""
        await asyncio.gather(self.postgres.restart_async(), self.valkey.restart_async())
        await self.start_up()

    async def ready(self) -> bool:
        """What GET /readyz of the direct door says."""
        try:
            await get_json(Door.of(self.direct_url), "/readyz")
        except (OSError, TimeoutError, ValueError):
            return False
        return True

    def facts(self) -> dict[str, Any]:
        """For the header of the history."""
        return json.loads(json.dumps({"shards": self.shards, "timings": self._timings}))


def _http_port(pid: int) -> int | None:
    """The port at which a process answers HTTP (links speak something else); None if there is none yet."""
    inodes: set[str] = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] != "0A" or f"socket:[{fields[9]}]" not in inodes:
            continue
        port = int(fields[1].rsplit(":", 1)[1], 16)
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), timeout=0.3) as probe,
        ):
            probe.settimeout(0.3)
            probe.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if probe.recv(5) == b"HTTP/":
                return port
    return None
