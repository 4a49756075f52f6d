"""How many requests of one tenant are worked on at once: who sends too many leaves room for others."""

from __future__ import annotations

from carillon.events import ProblemError
from carillon.problems import problem


class TenantShares:
    """Counts requests by tenant.

    Args:
        most: of one tenant (`ingress.tenant_in_flight`).
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._inside: dict[str, int] = {}

    def enter(self, tenant: str) -> None:
        """A request of a tenant is begun. Raises ProblemError (503, Retry-After): there are too many."""
        inside = self._inside.get(tenant, 0)
        if inside >= self._most:
            raise ProblemError(
                problem("unavailable", f"more than {self._most} requests of this tenant at once")
            )
        self._inside[tenant] = inside + 1

    def leave(self, tenant: str) -> None:
        """It is done, or waits without being worked on."""
        left = self._inside[tenant] - 1
        if left:
            self._inside[tenant] = left
        else:
            del self._inside[tenant]

    def again(self, tenant: str) -> None:
        """One that waited is gone on with, however many there are."""
        self._inside[tenant] = self._inside.get(tenant, 0) + 1
