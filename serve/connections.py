"""The client connections of one ingress replica: event streams and long polls.

To the shards a replica is one more holder of connections beside the gateways, and works with the same
`Owners`: it attaches, attaches again at a lost shard's successor from the position written, and drops what an
earlier attachment is still sent.
"""

from __future__ import annotations

import asyncio
import base64
import os
import random
from collections.abc import Callable

from actors.attached import AckMemory, Attached
from actors.gateway_owners import Owners
from actors.member import Membership
from carillon.client_frames import ClientPing, ClientVisibility
from carillon.clock import Clock
from carillon.errors import UnavailableError
from carillon.ids import slot_of
from carillon.metrics import Stats
from carillon.settings import Settings
from carillon.tokens import ClientIdentity

Position = tuple[str, int, int | None]
"""(epoch, lastSeq, lastRev or None)."""


class Connection(Attached):
    """A stream or a poll."""

    __slots__ = ()

    def look(self, now: float) -> None:
        """The sweep found `due` to have passed."""
        raise NotImplementedError


class Connections:
    """Holds streams and polls (`actors.attached.Holder`).

    Args:
        membership: gives the map; not owned.
        stats: counts closes, and the connections there are.
    """

    def __init__(self, settings: Settings, membership: Membership, stats: Stats, clock: Clock) -> None:
        self.limits = settings.gateway
        self.loop = asyncio.get_running_loop()
        # How late a deadline may be noticed; heart-beats are set this much earlier.
        self.tick_s = min(0.25, self.limits.heartbeat_s / 10)
        self.owners = Owners(self, membership, stats)
        self._stats = stats
        self._clock = clock
        self.retry_s = settings.ingress.stream_retry_s
        self.life_s = settings.ingress.stream_life_s
        self._max = settings.ingress.max_streams
        self._skew_s = settings.ingress.clock_skew_s
        self._held: dict[Connection, None] = {}
        self._draining = False
        self._sweeper: asyncio.TimerHandle | None = None
        self._sweep()

    def __len__(self) -> int:
        return len(self._held)

    def check_room(self) -> None:
        """Raise UnavailableError if no more connections are taken."""
        if self._draining:
            raise UnavailableError("this replica is going away")
        if len(self._held) >= self._max:
            raise UnavailableError(f"this replica holds {self._max} streams and polls, and takes no more")

    def admit(
        self,
        conn: Connection,
        who: ClientIdentity,
        device: str | None,
        position: Position | None,
        told: ClientVisibility | None,
    ) -> None:
        """Attach a connection to its user's session.

        Args:
            device: None makes one up.
            position: replayed from, and acknowledged.
            told: where the user looks, if the client said.
        """
        now = self.loop.time()
        conn.tenant, conn.user = who.tenant, who.user
        conn.slot = slot_of(who.tenant, who.user)
        conn.issued_ms = who.issued_ms
        conn.token_id = who.token_id
        conn.device = device or random_id()
        conn.session_id = random_id()
        left_s = (who.expires_ms - self._clock.now_ms()) / 1000
        conn.expires_at = now + (left_s if left_s > 0 else left_s + self._skew_s)
        if position is not None:
            conn.epoch, conn.seq, conn.rev = position
            conn.acks = AckMemory(conn.seq, now)
        if told is not None:
            conn.attention, conn.viewing = told.state, told.viewing
        self._held[conn] = None
        self.owners.attach(conn)
        # A client of HTTP has said with its request whether it resumes: nothing more is to be waited for.
        self.owners.frame_received(conn, ClientPing())

    def ended(self, conn: Connection) -> None:
        """A connection is no longer open: the session learns it now. Idempotent."""
        self.owners.detach(conn)

    def gone(self, conn: Connection) -> None:
        """Nothing is left of a connection."""
        self._held.pop(conn, None)

    def count_close(self, code: int) -> None:
        """A connection was ended by us with `code`."""
        self._stats.count(f'stream_closes{{code="{code}"}}')

    def _sweep(self) -> None:
        now = self.loop.time()
        for conn in [conn for conn in self._held if conn.due <= now]:
            conn.look(now)
        self._stats.gauge("streams", len(self._held))
        self._sweeper = self.loop.call_later(self.tick_s, self._sweep)

    async def drain(self, over_s: float) -> None:
        """Take no more and end all with 4201, spread over `over_s` seconds in random order."""
        self._draining = True
        conns = list(self._held)
        random.shuffle(conns)
        started = self.loop.time()
        for at, conn in enumerate(conns):
            # Each at its own random moment of its own slice of time: neither a burst nor a beat.
            due = started + over_s * (at + random.random()) / len(conns)  # noqa: S311
            if due > self.loop.time():
                await asyncio.sleep(due - self.loop.time())
            conn.close(4201, "the server is going away")
        await self._until(lambda: not self._held, self.limits.close_timeout_s + 2 * self.tick_s)

    async def _until(self, done: Callable[[], bool], timeout_s: float) -> None:
        deadline = self.loop.time() + timeout_s
        while not done() and self.loop.time() < deadline:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """End everything at once, close the links to the shards."""
        self._draining = True
        for conn in list(self._held):
            conn.close(4201, "the server is going away")
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self.owners.close()


def random_id() -> str:
    """16 characters, 96 random bits."""
    return base64.urlsafe_b64encode(os.urandom(12)).decode()
