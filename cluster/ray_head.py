"""A Ray head node that is one process tree of ours: `python -m cluster.ray_head`.

`ray start --head` also starts an autoscaler monitor, a dashboard process and a client server on the fixed
port 10001, and offers no way to leave them out (Ray 2.60): 0.3 GB and two ports for nothing that Carillon
uses. This starts the same `Node` without them. The class is private to Ray; the version is pinned in
pyproject.toml, and tests/cluster/test_up.py runs it. Remove this module once `ray start` can leave them out.

Children share the fate of this process (Ray asks the kernel for it), and it ends with its parent.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Start the head, print one JSON line with its address, stay until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m cluster.ray_head", description=__doc__)
    parser.add_argument("--temp-dir", required=True, help="folder for sockets and logs; keep it short")
    parser.add_argument("--host", default="127.0.0.1", help="address of this node")
    parser.add_argument("--port", type=int, default=0, help="port of the GCS; 0 means any free one")
    parser.add_argument("--object-store-bytes", type=int, default=80_000_000, help="size of the object store")
    options = parser.parse_args(argv)

    # A handler, not a blocked signal with sigwait: the children would inherit the mask and ignore SIGTERM.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class Head(Node):
        def start_api_server(self, **_: Any) -> None:
            # No dashboard: `ray.init` asks for its URL and takes None.
            self._webui_url = None

    # Typed as Any: its annotations say str where it takes a bool.
    params: Any = RayParams
    node = Head(
        params(
            gcs_server_port=options.port,
            node_ip_address=options.host,
            temp_dir=options.temp_dir,
            object_store_memory=options.object_store_bytes,
            include_dashboard=False,
            include_log_monitor=False,  # it copies every worker's log to drivers; nobody reads them there
            no_monitor=True,
            dashboard_host="127.0.0.1",
            # Workers choose free ports instead of 10002-19999.
            min_worker_port=0,
            max_worker_port=0,
        ),
        head=True,
        shutdown_at_exit=False,
        spawn_reaper=True,  # on Linux no process: the kernel ends the children with us
    )
    print(json.dumps({"address": node.gcs_address, "session": node.get_session_dir_path()}), flush=True)
    while True:
        stopping, _, _ = select.select([reader], [], [], 1.0)
        if stopping:
            node.kill_all_processes(check_alive=False, allow_graceful=True)
            return 0
        dead = node.dead_processes()
        if dead:
            names = ", ".join(name for name, _ in dead)
            print(f"ray_head: {names} ended; see {node.get_logs_dir_path()}", file=sys.stderr, flush=True)
            node.kill_all_processes(check_alive=False, allow_graceful=False)
            return 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # Ray's threads are daemons of a kind that may hang at interpreter exit
