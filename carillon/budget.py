"""How often a user may be disturbed: limits of a tenant, and what a user has had of them. Pure.

A limit counts moments in a window that slides: never more than `count` in any `window_ms`. What a user has
had is kept in the memory of the shard that owns the user; a new owner begins anew.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, NamedTuple

MAX_COUNT: Final = 1000
MAX_WINDOW_S: Final = 7 * 86_400
COLLECT_S: Final = 10.0
"""Shortest life of a digest of what exceeds limits, unless the tenant says otherwise."""
ALL: Final = ""
"""Name of the limit over all types: the attention budget."""


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `count` in any `window_ms`."""

    count: int
    window_ms: int


class Limits(NamedTuple):
    """What a tenant configured.

    Attributes:
        user: over all types and channels of a user; None: not limited.
        types: per user and type.
        overflow: digest (told together as soon as there is room) or feed (in the feed alone).
        collect_ms: a digest of what exceeds limits collects for so long at least.
    """

    user: Limit | None
    types: dict[str, Limit]
    overflow: str
    collect_ms: int = round(COLLECT_S * 1000)


class Spent:
    """The moments at which one user was disturbed, by limit.

    Attributes:
        digest_ms: when the digest of what exceeds the limits is due.
    """

    __slots__ = ("_moments", "digest_ms")

    def __init__(self) -> None:
        self._moments: dict[str, deque[int]] = {}
        self.digest_ms = 0

    def overflow_ms(self, free_ms: int, limit: Limit, now_ms: int, collect_ms: int) -> int:
        """When the digest that takes what exceeds `limit` now is due: the open one, or a new one."""
        if self.digest_ms > now_ms:
            return self.digest_ms
        # What comes a second later than the end of the window finds it still open.
        return max(free_ms, now_ms + min(collect_ms, limit.window_ms))

    def free_ms(self, name: str, limit: Limit, now_ms: int) -> int:
        """When the limit lets another one pass: `now_ms` or later."""
        moments = self._moments.get(name)
        if moments is None or len(moments) < limit.count:
            return now_ms
        # Only those that the limit of today looks at: it may have been larger.
        return max(now_ms, moments[-limit.count] + limit.window_ms)

    def spend(self, name: str, limit: Limit, now_ms: int) -> None:
        """One passes."""
        moments = self._moments.get(name)
        if moments is None or moments.maxlen != limit.count:
            moments = self._moments[name] = deque(moments or (), maxlen=limit.count)
        moments.append(now_ms)
