"""The real system for the browser: one for the session, on ports and in a folder of its own."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.target import OwnSystem, Target
from tests.browser.chromium import find_chromium


@pytest.fixture(scope="session")
def system() -> Iterator[Target]:
    """`python -m cluster up`, ready, and stopped at the end of the session."""
    if find_chromium() is None:
        pytest.skip("no Chromium in PATH: apt-get install chromium")
    # Short: a Unix socket's path has 107 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="cb-"))
    own = OwnSystem(folder)
    try:
        yield asyncio.run(own.start())
    finally:
        own.stop()
        shutil.rmtree(folder, ignore_errors=True)
