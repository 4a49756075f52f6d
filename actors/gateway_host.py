"""What a WebSocket knows of its gateway."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from actors.attached import Holder
from actors.gateway_handshake import Handshake
from carillon.client_frames import Auth

if TYPE_CHECKING:
    from actors.gateway_connection import Connection


class Host(Holder, Protocol):
    """What a connection needs of its gateway (`actors.gateway.Gateway`)."""

    origins: frozenset[str]
    tick_s: float

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
