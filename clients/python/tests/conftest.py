"""Fixtures of the client's tests. They need nothing of the servers."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from client_kit import FakeServer
from hypothesis import HealthCheck, settings

for _name in [name for name in os.environ if name.startswith("CARILLON_") or name.lower().endswith("_proxy")]:
    del os.environ[_name]


# No example has a deadline, none is drawn too slowly: that would say more of the machine than of the code.
settings.register_profile("client", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("client")


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """A fake server in a thread of its own."""
    with FakeServer() as server:
        yield server
