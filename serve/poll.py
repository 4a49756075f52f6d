"""`GET /api/sync?waitS=`: a long poll is an attachment of its user's session for as long as it waits.

The session only wakes it; what it answers is read from Postgres, as without waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from actors.attached import Phase
from actors.gateway_handshake import Encoding
from carillon.client_frames import ClientVisibility
from carillon.errors import BusyError, CarillonError, UnauthenticatedError, UnavailableError
from carillon.tokens import ClientIdentity
from serve.connections import Connection, Connections
from stores.postgres.feed import SyncPage

_decode: Final = msgspec.json.Decoder().decode


class Poll(Connection):
    """One long poll.

    Args:
        epoch: None is not compared.
        since, rev: position of the client; rev None: changes are not asked for.
    """

    __slots__ = ("_connections", "_epoch", "_rev", "_since", "_woken", "failure")

    def __init__(self, connections: Connections, epoch: str | None, since: int, rev: int | None) -> None:
        super().__init__(connections)
        self._connections = connections
        self._epoch, self._since, self._rev = epoch, since, rev
        self._woken: asyncio.Future[None] = connections.loop.create_future()
        self.encoding = Encoding.PLAIN
        self.poll = True
        self.failure: CarillonError | None = None
        """Why it ended, where the client is to know."""

    async def woken(self) -> None:
        """Return once there may be something new, or it was ended."""
        await self._woken
        if self.phase is Phase.OPEN:
            self._woken = self._connections.loop.create_future()

    def passed(self, page: SyncPage) -> bool:
        """Whether a page tells anything: a withdrawn notification leaves nothing but a position."""
        if not page.recovered or page.last_seq != self._since:
            return True
        return self._rev is not None and page.rev != self._rev

    def _wake(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)

    def write_live(self, framed: bytes) -> None:
        """See `Attached.write_live`: a frame is here to wake."""
        if not self.welcomed or framed.startswith(b'{"type":"WELCOME"'):
            head = _decode(framed)
            behind = head["lastSeq"] != self._since or (self._rev is not None and head["rev"] != self._rev)
            if behind or (self._epoch is not None and head["epoch"] != self._epoch):
                self._wake()
        elif self.seq > self._since or (self._rev is not None and (self.rev or 0) > self._rev):
            self._wake()

    def write_replay(self, framed: bytes, page_end: bool) -> None:
        """See `Attached.write_replay`: what follows is read from Postgres."""
        self.write_live(framed)

    def close(self, code: int, reason: str) -> None:
        """See `Attached.close`."""
        if self.phase is not Phase.OPEN:
            return
        self._connections.count_close(code)
        if code == 4001:
            self.failure = UnauthenticatedError(reason)
        elif code == 4004:
            self.failure = BusyError(reason)
        elif code in (4202, 4213):
            self.failure = UnavailableError(reason)
        self.end()

    def end(self) -> None:
        """It waits no longer. Idempotent."""
        if self.phase is Phase.OPEN:
            self.phase = Phase.GONE
            self._connections.ended(self)
            self._connections.gone(self)
            self._wake()

    def look(self, now: float) -> None:
        """The sweep found `due` to have passed."""
        if now >= self.expires_at:
            self.close(4101, "the token has expired")
        elif self.lost(now):
            self.close(4202, "no shard could be reached")
        else:
            self.reschedule()


async def wait_and_sync(
    connections: Connections,
    who: ClientIdentity,
    device: str | None,
    told: ClientVisibility | None,
    poll: Poll,
    position: tuple[str, int, int | None] | None,
    wait_s: float,
    read: Callable[[], Awaitable[SyncPage]],
) -> SyncPage:
    """Answer as soon as something happened after the position, or with what there is after `wait_s`.

    Raises:
        CarillonError: the user's sessions were revoked, or the poll could not be held.

    Cancellation: detaches at once.
    """
    connections.check_room()
    connections.admit(poll, who, device, position, told)
    try:
        async with asyncio.timeout(wait_s):
            while poll.phase is Phase.OPEN:
                await poll.woken()
                if poll.phase is Phase.OPEN:
                    page = await read()
                    if page.notifications or page.changes or poll.passed(page):
                        return page
    except TimeoutError:
        pass
    finally:
        poll.end()
    if poll.failure is not None:
        raise poll.failure
    return await read()
