"""Rate limits at the doors: whose they are, and what a tenant's document of limits says.

A key's limit is the tenant's own business (which of its services may send how much), a tenant's is the
operator's (how much of the system the tenant may use): both hold. The document is kept as `limits` in
`tenants.settings`; what it leaves out is not limited. Urgent events count against a tenant's limit and pass
it; what becomes of the others beyond it is `overflow`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from carillon.errors import InvalidInputError

MEMBER: Final = "limits"
"""Name of the document in `tenants.settings`."""
MAX_RATE: Final = 1e7
KEY: Final = "key"
TENANT: Final = "tenant"

REJECT: Final = "reject"
FEED: Final = "feed"
DIGEST: Final = "digest"
OVERFLOWS: Final = (REJECT, FEED, DIGEST)
"""What becomes of events beyond a tenant's rate: refused, in the feed alone, told together."""
COLLECT_S: Final = 60.0
"""How long a digest of them collects, unless the operator says otherwise."""
MAX_COLLECT_S: Final = 7 * 86_400

URGENT_WORDS: Final = frozenset(("urgent", "critical"))
"""`priority` of events that are kept as JSON and pass a tenant's limit."""

ALONE: Final = -1
"""`Event.over`: in the feed alone."""
PASSES: Final = -2
"""`Event.over`: beyond the rate, but urgent where what is not urgent is refused."""


class RateLimit(NamedTuple):
    """So many events a second, with a burst, over all doors.

    Attributes:
        bucket: names it among all limits of the cluster.
        rate_per_s: events per second.
        burst: events at once after a rest.
        of: `key` or `tenant`.
        tenant: whose.
        overflow: of OVERFLOWS, what becomes of events beyond it; of a key always REJECT.
        collect_ms: with DIGEST, for how long the digest collects.
    """

    bucket: str
    rate_per_s: float
    burst: int
    of: str
    tenant: str
    overflow: str = REJECT
    collect_ms: int = 0

    @property
    def over(self) -> int:
        """`Event.over` of what exceeds it."""
        return PASSES if self.overflow == REJECT else ALONE if self.overflow == FEED else self.collect_ms

    def told(self) -> str:
        """Whose limit it is, for the one who met it."""
        whose = "this API key" if self.of == KEY else f"tenant {self.tenant}, all its keys together,"
        return f"{whose} may send {self.rate_per_s:g} a second, {self.burst} at once"


def check_rate(rate_per_s: float | None, burst: int | None) -> tuple[float | None, int | None]:
    """A rate and a burst as they are kept; no burst means one of a second. None: there is no limit.

    Raises:
        InvalidInputError: nothing could ever pass, or it is beyond reason.
    """
    if rate_per_s is None:
        return None, None
    if not 0.01 <= rate_per_s <= MAX_RATE:
        raise InvalidInputError(
            f"expected a rate of 0.01 to 10,000,000 events per second, got {rate_per_s}",
            "ratePerS", "0.01 to 1e7", str(rate_per_s),
        )  # fmt: skip
    burst = max(1, math.ceil(rate_per_s)) if burst is None else burst
    if not 1 <= burst <= MAX_RATE:
        raise InvalidInputError(
            f"expected a burst of 1 to 10,000,000 events, got {burst}", "burst", "1 to 1e7", str(burst)
        )
    return rate_per_s, burst


def check_overflow(overflow: str | None, collect_s: float | None) -> None:
    """Check what an operator wants done with what exceeds a rate; None: left as it is.

    Raises:
        InvalidInputError: it is no such thing.
    """
    if overflow is not None and overflow not in OVERFLOWS:
        wanted = "|".join(OVERFLOWS)
        raise InvalidInputError(
            f"expected overflow to be {wanted}, got {overflow!r}", "overflow", wanted, overflow
        )
    if collect_s is not None and not 1 <= collect_s <= MAX_COLLECT_S:
        raise InvalidInputError(
            f"expected a digest to collect for 1 to {MAX_COLLECT_S} s, got {collect_s:g}",
            "collectS", f"1 to {MAX_COLLECT_S}", f"{collect_s:g}",
        )  # fmt: skip


def key_limit(tenant: str, key_id: str, rate_per_s: float | None, burst: int) -> tuple[RateLimit, ...]:
    """The limit of an API key; empty if it has none."""
    if rate_per_s is None:
        return ()
    return (RateLimit(key_id, rate_per_s, burst, KEY, tenant),)


def tenant_limit(tenant: str, document: Mapping[str, Any] | None) -> tuple[RateLimit, ...]:
    """The rate limit in a tenant's document of limits; empty if it has none."""
    rate = document.get("ratePerS") if document else None
    if rate is None:
        return ()
    assert document is not None
    collect_ms = round(document.get("collectS", COLLECT_S) * 1000)
    overflow = document.get("overflow", REJECT)
    # The colon keeps it apart from ids of keys, which have none.
    return (RateLimit(f"tenant:{tenant}", rate, document["burst"], TENANT, tenant, overflow, collect_ms),)
