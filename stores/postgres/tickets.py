"""One-time tickets: what a client that can only set a URL shows instead of its token.

A token in a URL ends up in logs and histories and is good for hours; a ticket there is good for one
connection within `ingress.ticket_ttl_s`.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Final

from carillon.tokens import ClientIdentity
from stores.postgres.named import load_queries
from stores.postgres.pool import Store, acquired

_TICKET: Final = re.compile(r"tkt_[A-Za-z0-9_-]{32}")


class TicketStore(Store):
    """Makes and redeems tickets."""

    _sql: Final = load_queries("tickets")

    async def make(self, who: ClientIdentity, now_ms: int, ttl_s: float) -> tuple[str, int]:
        """A ticket for a verified token: (ticket, end of it in ms). It never outlives its token."""
        ticket = "tkt_" + secrets.token_urlsafe(24)
        until_ms = min(now_ms + round(ttl_s * 1000), who.expires_ms)
        async with acquired(self._pool, self._timeout_s) as connection:
            await connection.execute(
                self._sql["make"],
                _hash(ticket),
                who.tenant,
                who.user,
                who.expires_ms,
                who.issued_ms,
                until_ms / 1000,
                now_ms / 1000,
                who.token_id,
            )
        return ticket, until_ms

    async def redeem(self, ticket: str, now_ms: int) -> ClientIdentity | None:
        """Whom a ticket stands for; None if it is unknown, used or too old. Works once."""
        if not _TICKET.fullmatch(ticket):
            return None
        async with acquired(self._pool, self._timeout_s) as connection:
            row = await connection.fetchrow(self._sql["redeem"], _hash(ticket), now_ms / 1000)
        if row is None or not row["valid"]:
            return None
        return ClientIdentity(*row[:5])


def _hash(ticket: str) -> bytes:
    return hashlib.sha256(ticket.encode()).digest()
