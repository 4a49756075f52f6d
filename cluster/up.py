"""`up`: everything on this machine, in the foreground, until a signal.

The supervisor imports neither Ray nor Serve. It starts servers and waits on them, lets the operator talk to
Ray, restarts PostgreSQL, Valkey and the local providers if they end, and on the way out ends what is left of
its process tree, whoever started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Awaitable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from carillon.clock import SystemClock
from carillon.errors import ClusterError
from carillon.settings import Settings
from cluster.children import LineChild
from cluster.demo import DEMO_TENANT, DEMO_USERS, DemoTenant, ensure_demo_tenant, register_demo_devices
from cluster.embedded import EmbeddedPostgres, EmbeddedValkey
from cluster.processes import (
    become_subreaper,
    descendants,
    end_processes,
    free_port,
    reap_zombies,
    require_free_port,
)
from cluster.ray_env import ROOT, client_environment, head_environment
from cluster.run_folder import RunFolder, this_process

_CLOCK = SystemClock()
_HEAD_TRIES = 3
"""Ray gives a node 30 s to start, not to be changed: too few where disk and cores are cold and busy."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class UpOptions:
    """What the command line of `up` says beyond the settings."""

    demo: bool = True
    """Local FCM and APNs, the tenant `demo` and its users."""
    timeout_s: float = 180.0
    """Longest wait for the whole system to be ready."""
    quiet: bool = False
    """No progress lines."""


class Console:
    """Progress lines with durations."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._began = _CLOCK.monotonic()

    def say(self, text: str) -> None:
        """One line with the seconds since the start."""
        if not self._quiet:
            self.put(f"[{_CLOCK.monotonic() - self._began:6.1f} s] {text}")

    @staticmethod
    def put(text: str) -> None:
        """One line; a reader that went away is no reason to stop."""
        with contextlib.suppress(OSError, ValueError):
            print(text, flush=True)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Say how long the block took once it is through."""
        began = _CLOCK.monotonic()
        yield
        self.say(f"{name} ({_CLOCK.monotonic() - began:.1f} s)")


class System:
    """The whole system of one machine.

    Args:
        folder: `.carillon/`, already taken.
        settings: as configured; empty DSNs mean embedded servers.
        options: see `UpOptions`.
        console: where progress goes.
    """

    def __init__(self, folder: RunFolder, settings: Settings, options: UpOptions, console: Console) -> None:
        self.folder = folder
        self.settings = settings
        self.options = options
        self.console = console
        self.secret = folder.secret(settings.cluster.secret).decode()
        self.postgres: EmbeddedPostgres | None = None
        self.valkey: EmbeddedValkey | None = None
        self.head: LineChild | None = None
        self.providers: dict[str, LineChild] = {}
        self.ready_lines: dict[str, dict[str, Any]] = {}
        self.deployed = False
        self.address = ""
        self.status: dict[str, Any] = {}
        self.demo: DemoTenant | None = None
        self._operator: LineChild | None = None

    @property
    def _loopback(self) -> bool:
        return self.settings.cluster.bind_host in _LOOPBACK

    # -- start ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything; return once the whole path answers. Raises ClusterError."""
        # Before the ports are looked at: what an earlier run left may still hold them.
        became = self.folder.end_leftovers()
        if became:
            self.console.say(f"ended {len(became)} processes that an earlier run left")
        self._check_ports()
        short = self.folder.fresh_short_folder()
        token = self.folder.ray_token_file()
        self._operator_env = os.environ | client_environment(token, self._loopback)
        self._start_operator()  # it imports Ray while the servers start
        steps: list[Awaitable[Any]] = [self._start_stores(), self._start_head(short, token)]
        if self.options.demo:
            steps += [self._start_provider("fcm"), self._start_provider("apns")]
        await _all(steps)
        if self.options.demo:
            from carillon.testing.provider_credentials import write_demo_credentials

            values = write_demo_credentials(
                self.folder.path / "credentials", self.ready_lines["fcm"], self.ready_lines["apns"]
            )
            self.settings = self.settings.with_values(
                push=values,
                ingress={
                    # These routes hand out tokens without a login: beyond loopback only on request.
                    "demo": self.settings.ingress.demo or self._loopback,
                    "demo_tenant": DEMO_TENANT,
                    "demo_users": ",".join(DEMO_USERS),
                    "demo_fcm_received_url": self.ready_lines["fcm"]["receivedUrl"],
                    "demo_apns_received_url": self.ready_lines["apns"]["receivedUrl"],
                },
            )
        self._record()
        await self._deploy()
        with self.console.step("both HTTP doors answer"):
            await _all([self._ready(self.http_url), self._ready(self.direct_url)])
        if self.demo is not None:
            await asyncio.to_thread(register_demo_devices, self.direct_url, self.demo.api_key)
        self._record()
        self.folder.write_run(self._run_facts())
        self.folder.write_dev(self.dev_facts())

    def _check_ports(self) -> None:
        ingress, gateway = self.settings.ingress, self.settings.gateway
        host = self.settings.cluster.bind_host
        for port, purpose, option in (
            (ingress.port, "HTTP (Serve's route)", "--http-port or CARILLON_INGRESS_PORT"),
            (ingress.direct_port, "HTTP (the direct door)", "--direct-port or CARILLON_INGRESS_DIRECT_PORT"),
            (gateway.port, "WebSockets", "--ws-port or CARILLON_GATEWAY_PORT"),
        ):
            require_free_port(port, purpose, f"free it or choose another with {option}", host)

    async def _start_stores(self) -> None:
        await _all([self._start_postgres(), self._start_valkey()])
        from stores.postgres.migrate import migrate

        with self.console.step("migrations are applied"):
            await migrate(self.settings.postgres.dsn)
        if self.options.demo:
            self.demo = await ensure_demo_tenant(self.settings.postgres, self.folder)

    async def _start_postgres(self) -> None:
        if self.settings.postgres.dsn:
            self.console.say("PostgreSQL is the one of CARILLON_POSTGRES_DSN")
            return
        with self.console.step("PostgreSQL answers"):
            self.postgres = EmbeddedPostgres(
                self.folder.path / "postgres", port=self.settings.postgres.embedded_port
            )
            await self.postgres.start_async()
            self.settings = self.settings.with_values(postgres={"dsn": self.postgres.dsn})

    async def _start_valkey(self) -> None:
        if self.settings.redis.url:
            self.console.say("Redis is the one of CARILLON_REDIS_URL")
            return
        with self.console.step("Valkey answers"):
            self.valkey = EmbeddedValkey(self.folder.path / "valkey", port=self.settings.redis.embedded_port)
            await self.valkey.start_async()
            self.settings = self.settings.with_values(redis={"url": self.valkey.url})

    async def _start_head(self, short: Path, token: Path) -> None:
        with self.console.step("Ray is up"):
            command = [sys.executable, "-m", "cluster.ray_head", "--temp-dir", str(short / "r")]
            if not self._loopback:
                command += ["--host", self.settings.cluster.advertise_host or outward_address()]
            host = "0.0.0.0"  # where HAProxy binds its own
            ports = free_port(host), free_port(host), free_port(host), free_port(host)
            environment = head_environment(
                token, self._loopback, short, ports, spare=self.settings.cluster.spare_process
            )
            (short / "h").mkdir(exist_ok=True)
            for attempt in range(1, _HEAD_TRIES + 1):
                self.head = LineChild(
                    "Ray", command, self.folder.log_folder / "ray_head.log", os.environ | environment
                )
                try:
                    ready = await self.head.line(self.options.timeout_s)
                    break
                except ClusterError as exc:
                    await asyncio.to_thread(self.head.stop)
                    if attempt == _HEAD_TRIES:
                        raise
                    self.console.say(f"{exc}; trying again")
            else:
                raise AssertionError("unreachable: the last attempt breaks or raises")
            self.address = ready["address"]
            link = self.folder.path / "ray-logs"
            link.unlink(missing_ok=True)
            link.symlink_to(Path(ready["session"]) / "logs")

    async def _start_provider(self, name: str, ports: tuple[int, int] = (0, 0)) -> None:
        command = [sys.executable, "-m", f"carillon.testing.{name}_server"]
        command += ["--dir", str(self.folder.path / name), "--exit-with-parent"]
        command += ["--port", str(ports[0]), "--control-port", str(ports[1])]
        child = LineChild(
            f"the local {name.upper()}",
            command,
            self.folder.log_folder / f"{name}.log",
            os.environ | {"PYTHONPATH": str(ROOT)},
        )
        self.providers[name] = child
        self.ready_lines[name] = await child.line(60.0)

    def _start_operator(self) -> None:
        self._operator = LineChild(
            "the deployment",
            [sys.executable, "-m", "cluster.operator"],
            self.folder.log_folder / "operator.log",
            self._operator_env,
            talks=True,
        )

    async def _order(self, document: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Have the operator do something; progress goes to the console."""
        assert self._operator is not None
        operator = self._operator
        try:
            operator.send({"address": self.address, "namespace": self.settings.cluster.namespace, **document})
            deadline = _CLOCK.monotonic() + timeout_s
            while True:
                line = await operator.line(max(0.1, deadline - _CLOCK.monotonic()))
                if "progress" in line:
                    self.console.say(f"  {line['progress']}")
                elif "error" in line:
                    raise ClusterError(str(line["error"]))
                else:
                    return line["result"]
        finally:
            self._operator = None
            await asyncio.to_thread(operator.stop, 1.0)

    async def _deploy(self) -> None:
        self.settings = replace(
            self.settings, cluster=replace(self.settings.cluster, runtime_dir=str(self.folder.path))
        )
        self.folder.write_run(self._run_facts())
        with self.console.step("actors and ingress are deployed"):
            self.deployed = True
            self.status = await self._order(
                {
                    "action": "deploy",
                    "settings": msgspec.to_builtins(self.settings),
                    "secret": self.secret,
                    "timeoutS": self.options.timeout_s,
                },
                self.options.timeout_s + 30.0,
            )

    async def _ready(self, url: str) -> None:
        deadline = _CLOCK.monotonic() + 60.0
        while True:
            problem = await asyncio.to_thread(_probe, f"{url}/readyz")
            if problem is None:
                return
            if _CLOCK.monotonic() > deadline:
                raise ClusterError(f"{url}/readyz is not ready after 60 s: {problem}")
            await asyncio.sleep(0.1)

    # -- facts ------------------------------------------------------------------------------------------

    @property
    def http_url(self) -> str:
        """Serve's route."""
        return f"http://{self._dialled}:{self.settings.ingress.port}"

    @property
    def direct_url(self) -> str:
        """An ingress replica's own door."""
        return self._public("ingress") or f"http://{self._dialled}:{self.settings.ingress.direct_port}"

    @property
    def ws_url(self) -> str:
        """A gateway's WebSocket endpoint."""
        url = self._public("gateway") or f"ws://{self._dialled}:{self.settings.gateway.port}"
        return url if url.endswith("/ws") else f"{url.rstrip('/')}/ws"

    @property
    def _dialled(self) -> str:
        host = self.settings.cluster.bind_host
        return "127.0.0.1" if host in ("0.0.0.0", "::") else host

    def _public(self, kind: str) -> str:
        for member in self.status.get("members", []):
            if member["kind"] == kind and member["public"]:
                return str(member["public"]).rstrip("/")
        return ""

    def _run_facts(self) -> dict[str, Any]:
        us = this_process()
        return {
            "pid": us.pid,
            "started": us.started,
            "rayAddress": self.address,
            "namespace": self.settings.cluster.namespace,
            "loopback": self._loopback,
        }

    def dev_facts(self) -> dict[str, Any]:
        """What tools need to use the system (`dev.json`)."""
        fcm, apns = self.ready_lines.get("fcm", {}), self.ready_lines.get("apns", {})
        return {
            "httpUrl": self.http_url,
            "directUrl": self.direct_url,
            "wsUrl": self.ws_url,
            "apiKey": self.demo.api_key if self.demo else None,
            "tenant": DEMO_TENANT if self.demo else None,
            "clientSecret": self.demo.client_secret if self.demo else None,
            "postgresDsn": self.settings.postgres.dsn,
            "redisUrl": self.settings.redis.url,
            "fcmUrl": fcm.get("url"),
            "apnsUrl": apns.get("url"),
            "fcmReceivedUrl": fcm.get("receivedUrl"),
            "apnsReceivedUrl": apns.get("receivedUrl"),
            "demoUrl": f"{self.http_url}/demo" if self.demo else None,
        }

    # -- run --------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Run until Ray ends (ClusterError). Restarts the other servers; writes down our processes."""
        for second in itertools.count():
            await asyncio.sleep(1.0)
            assert self.head is not None
            if self.head.ended():
                raise ClusterError(f"Ray ended unexpectedly; its logs are in {self.folder.path}/ray-logs")
            for server in (self.postgres, self.valkey):
                if server is not None and server.pid is None:
                    self.console.say(f"{server.title} ended; starting it again")
                    try:
                        await server.restart_async()
                    except ClusterError as exc:
                        self.console.say(f"{exc}; trying again")
            for name, child in list(self.providers.items()):
                if child.ended():
                    self.console.say(f"{child.title} ended; starting it again")
                    child.stop()
                    ready = self.ready_lines[name]
                    try:
                        await self._start_provider(name, (_port(ready["url"]), _port(ready["controlUrl"])))
                    except ClusterError as exc:
                        self.console.say(f"{exc}; trying again")
            if second % 5 == 0:  # a walk through /proc is most of what an idle supervisor costs
                self._record()

    def _record(self) -> None:
        own = [info.id for info in descendants(os.getpid())]
        self.folder.record(own)
        self._reap()

    def _reap(self) -> None:
        reap_zombies(self._known())

    def _known(self) -> list[int]:
        children = [self.head, self._operator, *self.providers.values()]
        known = [child.pid for child in children if child is not None]
        return known + [
            server.child.pid for server in (self.postgres, self.valkey) if server is not None and server.child
        ]

    # -- stop -------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Stop what was started, in reverse; end what is left of our process tree."""
        self.folder.dev_file.unlink(missing_ok=True)
        if self._operator is not None:
            await asyncio.to_thread(self._operator.stop, 1.0)
            self._operator = None
        if self.deployed and self.head is not None and not self.head.ended():
            with self.console.step("connections are drained, actors have stopped"):
                try:
                    self._start_operator()
                    await self._order({"action": "undeploy", "timeoutS": 20.0}, 40.0)
                except ClusterError as exc:
                    self.console.say(f"going on without a clean end of the actors: {exc}")
        if self.head is not None:
            with self.console.step("Ray has ended"):
                await asyncio.to_thread(self.head.stop)
        for child in self.providers.values():
            await asyncio.to_thread(child.stop)
        # Whatever still runs of Ray's may use the stores: it goes before they do.
        servers = [server.pid for server in (self.postgres, self.valkey) if server is not None and server.pid]
        keep = {pid for server in servers for pid in (server, *(i.id.pid for i in descendants(server)))}
        rest = [info.id for info in descendants(os.getpid()) if info.id.pid not in keep]
        await asyncio.to_thread(end_processes, rest, 2.0)
        with self.console.step("PostgreSQL and Valkey have ended"):
            for server in (self.valkey, self.postgres):
                if server is not None:
                    await server.stop_async()
        await asyncio.to_thread(end_processes, [info.id for info in descendants(os.getpid())], 2.0)
        self.folder.clear()

    def force(self) -> None:
        """SIGKILL everything of ours, now."""
        self.folder.dev_file.unlink(missing_ok=True)
        for _ in range(20):  # until no new ones appear
            left = [info.id for info in descendants(os.getpid())]
            if not left:
                break
            end_processes(left, 0.0, 2.0)
            reap_zombies()


async def run_up(folder: RunFolder, settings: Settings, options: UpOptions) -> int:
    """Run the whole system until SIGINT or SIGTERM; returns the exit status (0 after a signal).

    A second signal while stopping ends everything by force and returns 1.
    """
    console = Console(options.quiet)
    loop = asyncio.get_running_loop()
    stopping, forced = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if stopping.is_set():
            forced.set()
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    with contextlib.suppress(ValueError, OSError):
        loop.add_signal_handler(signal.SIGHUP, on_signal)  # the terminal went away
    folder.take()
    become_subreaper()
    system = System(folder, settings, options, console)
    failed: ClusterError | None = None
    try:
        folder.write_run(system._run_facts())

        async def life() -> None:
            await system.start()
            _print_table(console, system)
            await system.watch()

        failed = await _until(life(), stopping)
        stopping.set()
        if failed is None:
            console.put("")
            console.say("stopping (Ctrl-C again ends everything at once)")
        else:
            print(f"carillon: {failed}", file=sys.stderr, flush=True)
        await _until(system.stop(), forced)
        if forced.is_set():
            console.say("ending everything at once")
            await asyncio.to_thread(system.force)
            return 1
        console.say("stopped")
        return 1 if failed is not None else 0
    finally:
        if descendants(os.getpid()):
            system.force()
        folder.clear()
        folder.release()


async def _until(work: Awaitable[None], event: asyncio.Event) -> ClusterError | None:
    """Run `work` until it ends or `event` is set, then cancel it. A ClusterError is returned."""
    task = asyncio.ensure_future(work)
    waiter = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiter.cancel()
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled() and (error := task.exception()) is not None:
        if isinstance(error, ClusterError):
            return error
        return _as_cluster_error(error)
    return None


def _as_cluster_error(error: BaseException) -> ClusterError:
    from carillon.errors import CarillonError

    if isinstance(error, CarillonError):
        return ClusterError(str(error))
    import traceback

    traceback.print_exception(error)
    return ClusterError(f"{type(error).__name__}: {error}")


async def _all(steps: list[Awaitable[Any]]) -> None:
    """Run steps side by side; the first failure cancels the others and is raised as it is."""
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _probe(url: str) -> str | None:
    """None if GET `url` answers 200, else what it answered."""
    try:
        with urllib.request.urlopen(url, timeout=5.0) as answer:  # noqa: S310  our own http:// address
            return None if answer.status == 200 else f"status {answer.status}"
    except urllib.error.HTTPError as exc:
        body = exc.read(500).decode(errors="replace")
        return f"status {exc.code}: {body}"
    except OSError as exc:
        return str(exc)


def _port(url: str) -> int:
    return int(url.rsplit(":", 1)[1].split("/", 1)[0])


def outward_address() -> str:
    """This machine's address as others see it. Sends nothing."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _print_table(console: Console, system: System) -> None:
    facts: Mapping[str, Any] = system.dev_facts()
    members = system.status.get("members", [])
    counts: dict[str, int] = {}
    for member in members:
        counts[member["kind"]] = counts.get(member["kind"], 0) + 1
    actors = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in sorted(counts.items()))
    rows: list[tuple[str, Any]] = [
        ("HTTP", f"{facts['httpUrl']}   (direct door: {facts['directUrl']})"),
        ("WebSocket", facts["wsUrl"]),
        ("API docs", f"{facts['httpUrl']}/docs"),
    ]
    if system.demo is not None:
        rows += [
            ("demo", facts["demoUrl"]),
            ("tenant", f"{facts['tenant']}   (users alice, bob, carol)"),
            # For the person who watches; what is not a terminal is a log, which is no place for it.
            ("API key", facts["apiKey"] if sys.stdout.isatty() else "see the file for tools"),
            ("pushes", f"{facts['fcmReceivedUrl']}   {facts['apnsReceivedUrl']}"),
        ]
    rows += [
        ("actors", actors),
        ("data", str(system.folder.path)),
        ("for tools", str(system.folder.dev_file)),
    ]
    console.put("")
    console.put("Carillon is ready.")
    for name, value in rows:
        console.put(f"  {name:<10} {value}")
    console.put("Ctrl-C stops it.")
