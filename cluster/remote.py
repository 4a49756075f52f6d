"""Commands that talk to a running system: deploy onto a cluster, down, status, drain, restart."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

from carillon.clock import SystemClock
from carillon.errors import ClusterError
from carillon.settings import Settings
from cluster.processes import alive
from cluster.ray_env import client_environment
from cluster.run_folder import RunFolder

_CLOCK = SystemClock()


def _connect(options: argparse.Namespace, settings: Settings) -> str:
    """Join the Ray of --address, or of the run in the data folder; returns the namespace."""
    from cluster import operator

    if options.address:
        # The caller's RAY_AUTH_MODE and token are the cluster's business.
        os.environ.update(client_environment(None, loopback=False))
        operator.connect(options.address, settings.cluster.namespace)
        return settings.cluster.namespace
    folder = RunFolder(settings.cluster.runtime_dir)
    run = folder.run() if folder.running() else None
    if run is None:
        raise ClusterError(f"nothing runs in {folder.path}: start it with `make up`, or give --address")
    if not run.get("rayAddress"):
        raise ClusterError("the system is still starting; try again in a few seconds")
    os.environ.update(client_environment(folder.ray_token_file(), loopback=bool(run["loopback"])))
    operator.connect(run["rayAddress"], run["namespace"])
    return run["namespace"]


def deploy_to(address: str, settings: Settings, timeout_s: float) -> int:
    """`up --address`: migrate the database and deploy onto a Ray cluster that runs already."""
    missing = [
        name
        for name, value in (
            ("CARILLON_POSTGRES_DSN", settings.postgres.dsn),
            ("CARILLON_REDIS_URL", settings.redis.url),
            ("CARILLON_CLUSTER_SECRET", settings.cluster.secret),
        )
        if not value
    ]
    if missing:
        raise ClusterError(f"a cluster needs {', '.join(missing)}: it has no embedded servers")
    from cluster import operator
    from cluster.up import Console
    from stores.postgres.migrate import migrate

    console = Console()
    with console.step("migrations are applied"):
        asyncio.run(migrate(settings.postgres.dsn))
    os.environ.update(client_environment(None, loopback=False))
    operator.connect(address, settings.cluster.namespace)
    status = operator.deploy_all(settings, settings.cluster.secret.encode(), timeout_s, console.say)
    for member in status["members"]:
        if member["public"]:
            console.put(f"  {member['kind']:<8} {member['public']}")
    console.say(
        f"Carillon is deployed on {len(status['nodes'])} nodes; `down --address {address}` removes it"
    )
    return 0


def _down(options: argparse.Namespace, settings: Settings) -> int:
    if options.address:
        from cluster import operator

        namespace = _connect(options, settings)
        count = operator.undeploy_all(namespace, options.timeout, print)
        print(f"{count} actors removed" if count else f"nothing was deployed in the namespace {namespace!r}")
        return 0
    folder = RunFolder(settings.cluster.runtime_dir)
    process = folder.running()
    if process is None:
        print(f"nothing runs in {folder.path}")
        return 0
    os.kill(process.pid, signal.SIGTERM)
    deadline = _CLOCK.monotonic() + options.timeout
    while alive(process):
        if _CLOCK.monotonic() > deadline:
            raise ClusterError(f"process {process.pid} has not stopped within {options.timeout:g} s")
        time.sleep(0.05)
    print("stopped")
    return 0


def _drain(options: argparse.Namespace, settings: Settings) -> int:
    from cluster import operator
    from cluster.maintenance import drain_node
    from cluster.up import Console

    console = Console()
    control = operator.RayControl(_connect(options, settings))
    with _told_how_to_go_on():
        for wanted in options.node:
            if options.undo:
                node = control.return_to_node(wanted)
                console.say(f"node {node[:8]} is used again: its actors are being started")
            else:
                node = drain_node(control, wanted, options.timeout, console.say)
                console.say(f"node {node[:8]} is drained; `drain --undo {node[:8]}` uses it again")
    return 0


def _restart(options: argparse.Namespace, settings: Settings) -> int:
    from cluster import operator
    from cluster.maintenance import Journal, restart_actors
    from cluster.up import Console

    console = Console()
    control = operator.RayControl(_connect(options, settings))
    journal = Journal(RunFolder(settings.cluster.runtime_dir).path / "restart.json")
    if options.anew:
        journal.clear()
    with _told_how_to_go_on():
        count = restart_actors(control, options.actors or (), journal, options.timeout, console.say)
    console.say(f"{count} actors were replaced")
    return 0


@contextlib.contextmanager
def _told_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one ended", file=sys.stderr)
        raise


def _status(options: argparse.Namespace, settings: Settings) -> int:
    from cluster import operator

    namespace = _connect(options, settings)
    status = operator.coordinator_status(namespace)
    names = [member["name"] for member in status["members"] if member["kind"] != "ingress"]
    actors = operator.actor_statuses(namespace, names)
    if options.json:
        print(json.dumps({"coordinator": status, "actors": actors}, indent=1))
    else:
        print("\n".join(status_lines(status, actors)))
    return 0


def status_lines(status: dict[str, Any], actors: dict[str, dict[str, Any]]) -> list[str]:
    """The status as text: nodes, then one line per member, then totals."""
    nodes = {node["node"]: node for node in status["nodes"]}
    lines = [f"map version {status['version']}, PostgreSQL {status['postgres']}"]
    lines += [
        f"node {node['node'][:8]}  {node['host']}{'  (head)' if node['head'] else ''}"
        f"{'  (drained)' if node.get('draining') else ''}"
        for node in nodes.values()
    ]
    lines.append(f"{'actor':<28} {'node':<9} {'state':<9} {'slots':>5} {'sessions':>8} {'sockets':>8}  queue")
    totals = {"sessions": 0, "sockets": 0}
    for member in status["members"]:
        facts = actors.get(member["name"], {})
        state = "ok" if member["joined"] else "lost"
        if facts.get("error"):
            state = "silent"
        elif facts.get("draining"):
            state = "draining"
        sessions = facts.get("sessions") if member["kind"] == "shard" else None
        sockets = facts.get("connections") if member["kind"] == "gateway" else None
        totals["sessions"] += sessions or 0
        totals["sockets"] += sockets or 0
        queue = {"shard": facts.get("appendQueue"), "pool": facts.get("queued"), "router": facts.get("held")}
        shown = [
            member["slots"] if member["kind"] == "shard" else None,
            sessions,
            sockets,
            queue.get(member["kind"]),
        ]
        cells = ["" if value is None else str(value) for value in shown]
        lines.append(
            f"{member['name']:<28} {member['node'][:8]:<9} {state:<9} "
            f"{cells[0]:>5} {cells[1]:>8} {cells[2]:>8}  {cells[3]}".rstrip()
        )
        lines += [_app_line(app) for app in facts.get("apps", ())]
    lines += [
        f"refused or held up by rate limits: {count:.0f} events ({labels})"
        for labels, count in sorted(status.get("limited", {}).items())
    ]
    if status["missing"]:
        lines.append(f"missing: {', '.join(status['missing'])}")
    if status["ownerless"]:
        lines.append(f"slots without owner: {status['ownerless']}")
    lines.append(f"{totals['sessions']} live sessions, {totals['sockets']} sockets")
    return lines


def _app_line(app: dict[str, Any]) -> str:
    """One app of a push pool: its breaker, and what it has in flight."""
    state = app["state"] if not app["waitS"] else f"{app['state']} for {app['waitS']:.0f} s"
    return (
        f"  {app['app']}: breaker {state}, {app['inFlight']} in flight of {app['limit']}, "
        f"{app['queued']} waiting, usually {app['usualMs']:.0f} ms"
    )


HANDLERS: Final = {"down": _down, "status": _status, "drain": _drain, "restart": _restart}
"""By the name that cluster/cli.py uses."""
