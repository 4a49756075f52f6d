"""A second Ray node on this machine: `python -m tests.chaos.worker_node ADDRESS`.

As `cluster/ray_head.py` does for the head: the raylet and its workers end with this process. It is what the
fault kill-node lets join, work, and lose.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any


def main(address: str) -> None:
    """Join the Ray cluster at `address`, print one line, stay until killed."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    params: Any = RayParams
    node = Node(
        params(
            gcs_address=address,
            redis_address=None,
            node_ip_address="127.0.0.1",
            object_store_memory=80_000_000,
            include_log_monitor=False,
            min_worker_port=0,
            max_worker_port=0,
        ),
        head=False,
        shutdown_at_exit=False,
        spawn_reaper=True,
    )
    print(node.unique_id, flush=True)
    while not node.dead_processes():
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
