"""The environment that Ray's processes need, and why.

Ray and Serve read these once, when they are imported or started: they must be in the environment of the
head, of every node and of every driver, before anything else happens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
"""The repository's root, which is the import root everywhere."""

SERVE_SWITCHES: Final = {
    # Serve's default proxy is a Python process: 290 requests/s. HAProxy straight to the replicas: 7,800.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    # Three misses of 5 s and Serve kills the proxy that is still starting on a busy machine.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
}
"""Must be the same on every node (ray_cluster.yaml sets them, too)."""

PRIORITY: Final = {
    # Ray gives its workers niceness 15, meant for batch jobs beside a person's desktop: on a busy machine our
    # actors would then wait for PostgreSQL, HAProxy and whatever else runs there.
    "RAY_worker_niceness": "0",
}
"""Must be in the environment of every node (ray_cluster.yaml sets it, too)."""

START: Final = {
    # An empty value is as good as none. Where it is set otherwise, each process that starts in a dead one's
    # place would compile every module of ours anew, while its users wait.
    "PYTHONDONTWRITEBYTECODE": "",
}
"""What makes a new process start sooner."""

PRELOAD: Final = {"RAY_preload_python_modules": "actors.ray_preload"}
"""Has a node's spare processes import our modules before they are needed (`cluster.spare_process`;
ray_cluster.yaml sets it, too)."""

QUIET: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Nothing collects these here; Carillon's own figures are at /metrics.
    "RAY_enable_metrics_collection": "0",
    "RAY_DISABLE_METRICS_COLLECTION": "1",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    # Our actors come by name, each with a process of its own: idle workers would only cost memory.
    "RAY_prestart_worker_first_driver": "0",
    # Serve's controller looks ten times a second by default, which is most of an idle system's CPU time.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # A replica that HAProxy has stopped sending to would wait 30 s before it may end.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
"""What an idle system would pay for without using it."""


def client_environment(token_file: Path | str | None, loopback: bool) -> dict[str, str]:
    """Variables of any process that talks to the local Ray.

    Args:
        token_file: file of the cluster's token; None leaves the caller's authentication as it is.
        loopback: the whole cluster is on 127.0.0.1.
    """
    values = {**QUIET, **SERVE_SWITCHES, **PRIORITY, **START, "PYTHONPATH": str(ROOT)}
    if token_file is not None:
        # Whoever reaches the GCS can run code as us: loopback alone keeps no other user of the machine out.
        values |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
    if loopback:
        # Ray turns 127.0.0.1 into the machine's outward address, where a head on loopback does not listen.
        # This switch, made for desktops whose firewalls ask, keeps it as it is.
        values["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return values


def head_environment(
    token_file: Path | str,
    loopback: bool,
    short_folder: Path,
    ports: tuple[int, int, int, int],
    *,
    spare: bool = False,
) -> dict[str, str]:
    """Variables of the head that `up` starts; its workers inherit them.

    Args:
        token_file: file of the cluster's token.
        loopback: the whole cluster is on 127.0.0.1.
        short_folder: for HAProxy's files, of which Serve otherwise has one set per machine.
        ports: four free ones, likewise: for HAProxy's metrics and statistics, and for the Python proxy that
            Serve keeps for when no replica answers (HTTP and gRPC). Serve opens that one's so that others
            may share it (SO_REUSEPORT): of two systems with the same one each would get some of the other's
            requests.
        spare: the nodes keep spare processes.
    """
    haproxy = short_folder / "h"
    preload = PRELOAD if spare else {}
    return (
        client_environment(token_file, loopback)
        | preload
        | {
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[0]),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[1]),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[2]),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports[3]),
        }
    )
