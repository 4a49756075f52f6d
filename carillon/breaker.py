"""A circuit breaker: stops asking a provider that is down, and asks again, carefully."""

from __future__ import annotations

from typing import Final

from carillon.clock import Clock

_LONGEST_OPEN_S: Final = 60.0


class Breaker:
    """Closed: all may pass. Open: none, for a while. Half open: one probe, whose result decides.

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
        self._reopen_at: float | None = None  # None: closed
        self._probing = False

    @property
    def state(self) -> str:
        """closed | open | half_open."""
        if self._reopen_at is None:
            return "closed"
        return "half_open" if self._clock.monotonic() >= self._reopen_at else "open"

    def allows(self) -> bool:
        """Whether a request may pass now. In half-open state only until `started` was called once."""
        state = self.state
        return state == "closed" or (state == "half_open" and not self._probing)

    def started(self) -> None:
        """A request that `allows` let pass goes out."""
        if self._reopen_at is not None:
            self._probing = True

    def succeeded(self) -> None:
        """The provider answered as a working provider does: closes the breaker."""
        self._failures = self._pauses = 0
        self._reopen_at = None
        self._probing = False

    def failed(self) -> bool:
        """The provider failed. Returns True if this opened the breaker."""
        self._failures += 1
        if self._reopen_at is not None:
            if not self._probing:
                return False  # a straggler from before it opened
            return self.trip()
        return self.trip() if self._failures >= self._limit else False

    def trip(self) -> bool:
        """Open it at once. Returns False if it was open already and nothing was being probed."""
        if self._reopen_at is not None and not self._probing:
            return False
        pause_s = min(self._open_s * 2 ** min(self._pauses, 16), max(_LONGEST_OPEN_S, self._open_s))
        self._pauses += 1
        self._reopen_at = self._clock.monotonic() + pause_s
        self._probing = False
        return True

    def inconclusive(self) -> None:
        """The probe ended without telling anything: the next one may go."""
        self._probing = False
