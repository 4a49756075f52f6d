"""Fixtures of the client's tests. They need nothing of the servers."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from client_kit import FakeServer

for _name in [name for name in os.environ if name.startswith("CARILLON_") or name.lower().endswith("_proxy")]:
    del os.environ[_name]


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """A fake server in a thread of its own."""
    with FakeServer() as server:
        yield server
