"""How many frames clients may send: one connection, and all connections of a user at one gateway.

Excess is not refused but left in the socket: whoever sent too much is read again when the debt is paid.
"""

from __future__ import annotations

from typing import Any


class FrameRate:
    """A token bucket that goes into debt. Times are those of the event loop, in seconds.

    Attributes:
        per_s: frames a second; also the burst.
        tokens: frames that may come now; negative is what is owed.
    """

    __slots__ = ("_at", "per_s", "tokens")

    def __init__(self, per_s: float) -> None:
        self.per_s = per_s
        self.tokens = per_s
        self._at = 0.0

    def spend(self, now: float) -> float:
        """One frame came: seconds until its debt is paid, 0.0 if there is none."""
        self.tokens = min(self.per_s, self.tokens + (now - self._at) * self.per_s) - 1.0
        self._at = now
        return 0.0 if self.tokens >= 0 else -self.tokens / self.per_s

    def owed_s(self, now: float) -> float:
        """Seconds until the debt is paid; less than half a frame is none."""
        owed = -(self.tokens + (now - self._at) * self.per_s)
        return owed / self.per_s if owed > 0.5 else 0.0


class UserRates:
    """The buckets that a user's connections share.

    Args:
        per_s: frames a second of all connections of a user.
    """

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._shared: dict[tuple[str, str], list[Any]] = {}  # bucket, connections

    def __len__(self) -> int:
        return len(self._shared)

    def join(self, tenant: str, user: str) -> FrameRate:
        """The bucket of a user, for one more connection."""
        shared = self._shared.setdefault((tenant, user), [FrameRate(self._per_s), 0])
        shared[1] += 1
        return shared[0]

    def leave(self, tenant: str, user: str) -> None:
        """A connection that joined has ended; the last one takes the bucket with it."""
        shared = self._shared[tenant, user]
        shared[1] -= 1
        if not shared[1]:
            del self._shared[tenant, user]
