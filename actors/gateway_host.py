"""What a connection knows of its gateway, and the phases of its life."""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING, Protocol

from actors.gateway_handshake import Handshake
from carillon.client_frames import Auth, ClientFrame
from carillon.settings import GatewaySettings

if TYPE_CHECKING:
    from actors.gateway_connection import Connection


class Phase(enum.IntEnum):
    """Where a connection stands; it only moves forward."""

    HANDSHAKE = 0
    AUTH = 1
    """WebSocket open, no token yet."""
    VERIFY = 2
    """The tenant's secret is being read."""
    OPEN = 3
    CLOSING = 4
    GONE = 5


class Shards(Protocol):
    """Where frames of clients go (`actors.gateway_owners.Owners`)."""

    def frame_received(self, conn: Connection, frame: ClientFrame) -> None:
        """A well-formed frame came from an authenticated client."""
        ...

    def drained(self, conn: Connection) -> None:
        """There is room for the next page of a replay."""
        ...


class Host(Protocol):
    """What a connection needs of its gateway (`actors.gateway.Gateway`)."""

    limits: GatewaySettings
    origins: frozenset[str]
    loop: asyncio.AbstractEventLoop
    tick_s: float

    @property
    def owners(self) -> Shards:
        """Where frames go."""
        ...

    def opened(self, conn: Connection) -> bool:
        """The socket is there; False refuses it at once."""
        ...

    def healthy(self) -> bool:
        """What GET /healthz tells."""
        ...

    def upgraded(self, conn: Connection, shaken: Handshake) -> None:
        """The handshake is over; `conn.phase` is AUTH."""
        ...

    def authenticate(self, conn: Connection, auth: Auth) -> None:
        """Verify a token now or later."""
        ...

    def ended(self, conn: Connection) -> None:
        """The WebSocket is no longer open; once per connection that reached AUTH."""
        ...

    def gone(self, conn: Connection) -> None:
        """The socket is gone."""
        ...

    def count_close(self, code: int) -> None:
        """A connection was closed by us with `code`."""
        ...
