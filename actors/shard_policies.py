"""Policies of tenants, as a shard knows them: read with a tenant's first user, again when a change is told,
and beside the work in case it was not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from carillon.decision import no_rules
from carillon.errors import CarillonError
from carillon.policy import TenantPolicy, WatchRule, build, cluster_default
from carillon.settings import PresenceSettings, ShardSettings
from stores.gather import Gather
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)

NO_RULES = no_rules()
"""Of a tenant without any, whose user has preferences."""


class Policies:
    """A cache that is right once `read_again` returns, and within `shard.policy_refresh_s` in any case."""

    def __init__(self, store: ShardStore, settings: ShardSettings, presence: PresenceSettings) -> None:
        self._store = store
        self._settings = settings
        self._default = cluster_default(settings)
        self._watch = WatchRule(presence.watch)
        self._plain = TenantPolicy(self._default, {}, self._watch)
        self._known: dict[str, TenantPolicy] = {}
        self._reads = 0  # begun so far
        self._under_way: dict[int, frozenset[str]] = {}  # reads by their number: of which tenants
        self._taken: dict[str, int] = {}  # by tenant the number of the read whose answer holds
        self._told: Gather[str, bool] = Gather(self._read_told)
        self._task: asyncio.Task[None] | None = None
        self._changed: list[Callable[[str], None]] = []

    def on_change(self, changed: Callable[[str], None]) -> None:
        """Call `changed` with a tenant whose rules are others than before, or are read first."""
        self._changed.append(changed)

    def start(self) -> None:
        """Begin refreshing."""
        self._task = asyncio.get_running_loop().create_task(self._refresh_for_ever())

    async def close(self) -> None:
        """Stop refreshing."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._told.close()

    def of(self, tenant: str) -> TenantPolicy:
        """The policy of a tenant; the cluster's default for one that `ensure` was never asked for."""
        return self._known.get(tenant, self._plain)

    async def ensure(self, tenants: Iterable[str]) -> None:
        """Read the policies of those tenants that are not known yet. Raises StoreUnavailableError."""
        missing = [tenant for tenant in tenants if tenant not in self._known]
        if missing:
            await self._read(missing)

    async def read_again(self, tenant: str) -> bool:
        """Know what is committed by now of a tenant's policy, before this returns.

        Returns:
            Whether it was read: of a tenant of which nothing is known the first user will have it read.

        Raises:
            StoreUnavailableError: what was known stays.
        """
        if tenant not in self._known and not any(tenant in tenants for tenants in self._under_way.values()):
            return False
        return await self._told.get(tenant)

    async def _read_told(self, tenants: list[str]) -> list[bool]:
        await self._read(list(dict.fromkeys(tenants)))
        return [True] * len(tenants)

    async def _read(self, tenants: list[str]) -> None:
        self._reads = number = self._reads + 1
        self._under_way[number] = frozenset(tenants)
        try:
            found = await self._store.policies(tenants)
        finally:
            del self._under_way[number]
        for tenant in tenants:
            # One that began earlier may have looked before the change that a later one saw.
            if number < self._taken.get(tenant, 0):
                continue
            self._taken[tenant] = number
            new, known = build(found.get(tenant), self._default, self._watch), self._known.get(tenant)
            # What did not change stays the same object: users remember what they made of it.
            if known is None or known.text != new.text:
                self._known[tenant] = new
                ruled = known is not None and (known.rules is not None or new.rules is not None)
                # Read first: an earlier process may have died with other rules.
                if ruled or (known is None and new.rules is not None and new.rules.defaults.digests):
                    for changed in self._changed:
                        changed(tenant)

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.policy_refresh_s)
            if not self._known:
                continue
            try:
                await self._read(list(self._known))
            except CarillonError as exc:
                log.info("policies stay as they are: %s", exc)
            except Exception:
                log.exception("reading policies failed")
