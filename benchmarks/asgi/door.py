"""The real app behind the replica's own door (serve/door.py): `python -m benchmarks.asgi.door PORT`."""

from __future__ import annotations

import sys

import uvicorn

from benchmarks.asgi.apps import ingress_app
from serve.door import protocol_of


def main(port: int) -> None:
    """Serve until a signal."""
    app = ingress_app()
    uvicorn.run(
        app,
        port=port,
        http=protocol_of(app),
        loop="uvloop",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        date_header=False,
        proxy_headers=False,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
