"""A circuit breaker: stops asking a provider that is down, and asks again, carefully.

Why not a library: docs/adr/0010-provider-protection.md.
"""

from __future__ import annotations

from typing import Final

from carillon.clock import Clock

_LONGEST_OPEN_S: Final = 60.0


class Breaker:
    """Closed: all may pass. Open: none, for a while. Half open: one probe at a time, whose result decides.

    Every request that goes out carries a ticket, the number of the phase it was admitted in. A result from an
    earlier phase says nothing about the present one: a success that was under way when the breaker opened
    does not close it, and of many that fail together only one opens it.

    Args:
        failures: failures in a row that open it.
        open_s: first pause, in seconds; each further one in a row is twice as long, up to 60 s.
        clock: measures the pause.
    """

    def __init__(self, failures: int, open_s: float, clock: Clock) -> None:
        self._limit = failures
        self._open_s = open_s
        self._clock = clock
        self._failures = 0
        self._pauses = 0
        self._phase = 0
        self._reopen_at: float | None = None  # None: closed
        self._probing = False

    @property
    def state(self) -> str:
        """closed | open | half_open."""
        if self._reopen_at is None:
            return "closed"
        return "half_open" if self._clock.monotonic() >= self._reopen_at else "open"

    def current(self, ticket: int) -> bool:
        """Whether a ticket is of the present phase."""
        return ticket == self._phase

    def wait_s(self) -> float:
        """Seconds until a probe may go; 0.0 if one may or the breaker is closed."""
        return 0.0 if self._reopen_at is None else max(0.0, self._reopen_at - self._clock.monotonic())

    def allows(self) -> bool:
        """Whether a request may pass now. In half-open state only while no probe is under way."""
        state = self.state
        return state == "closed" or (state == "half_open" and not self._probing)

    def started(self) -> int:
        """A request that `allows` let pass goes out. Returns its ticket, to be given back with its result."""
        if self._reopen_at is not None:
            self._probing = True
        return self._phase

    def succeeded(self, ticket: int) -> bool:
        """The provider answered as a working provider does. Returns True if this closed the breaker."""
        if ticket != self._phase:
            return False
        closed = self._reopen_at is not None
        if closed:
            self._phase += 1
        self._failures = self._pauses = 0
        self._reopen_at = None
        self._probing = False
        return closed

    def failed(self, ticket: int) -> bool:
        """The provider failed. Returns True if this opened the breaker."""
        if ticket != self._phase:
            return False
        self._failures += 1
        if self._reopen_at is None and self._failures < self._limit:
            return False
        return self.trip(ticket)

    def trip(self, ticket: int) -> bool:
        """Open it at once. Returns False if the ticket is of an earlier phase."""
        if ticket != self._phase:
            return False
        pause_s = min(self._open_s * 2 ** min(self._pauses, 16), max(_LONGEST_OPEN_S, self._open_s))
        self._pauses += 1
        self._phase += 1
        self._reopen_at = self._clock.monotonic() + pause_s
        self._probing = False
        return True

    def inconclusive(self, ticket: int) -> None:
        """The request ended without telling anything: if it was the probe, the next one may go."""
        if ticket == self._phase:
            self._probing = False
