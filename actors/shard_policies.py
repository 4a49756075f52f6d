"""Policies of tenants, as a shard knows them: read with a tenant's first user, refreshed beside the work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from carillon.decision import no_rules
from carillon.errors import CarillonError
from carillon.policy import TenantPolicy, WatchRule, build, cluster_default
from carillon.settings import PresenceSettings, ShardSettings
from stores.postgres.shard_store import ShardStore

log = logging.getLogger(__name__)

NO_RULES = no_rules()
"""Of a tenant without any, whose user has preferences."""


class Policies:
    """A cache that is right within `shard.policy_refresh_s`, for one query in that time."""

    def __init__(self, store: ShardStore, settings: ShardSettings, presence: PresenceSettings) -> None:
        self._store = store
        self._settings = settings
        self._default = cluster_default(settings)
        self._watch = WatchRule(presence.watch)
        self._plain = TenantPolicy(self._default, {}, self._watch)
        self._known: dict[str, TenantPolicy] = {}
        self._task: asyncio.Task[None] | None = None
        self._changed: Callable[[str], None] = lambda tenant: None

    def on_change(self, changed: Callable[[str], None]) -> None:
        """Call `changed` with a tenant whose rules are others than before, or are read first."""
        self._changed = changed

    def start(self) -> None:
        """Begin refreshing."""
        self._task = asyncio.get_running_loop().create_task(self._refresh_for_ever())

    async def close(self) -> None:
        """Stop refreshing."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def of(self, tenant: str) -> TenantPolicy:
        """The policy of a tenant; the cluster's default for one that `ensure` was never asked for."""
        return self._known.get(tenant, self._plain)

    async def ensure(self, tenants: Iterable[str]) -> None:
        """Read the policies of those tenants that are not known yet. Raises StoreUnavailableError."""
        missing = [tenant for tenant in tenants if tenant not in self._known]
        if missing:
            await self._read(missing)

    async def _read(self, tenants: list[str]) -> None:
        found = await self._store.policies(tenants)
        for tenant in tenants:
            new, known = build(found.get(tenant), self._default, self._watch), self._known.get(tenant)
            # What did not change stays the same object: users remember what they made of it.
            if known is None or known.text != new.text:
                self._known[tenant] = new
                if known is not None and (known.rules is not None or new.rules is not None):
                    self._changed(tenant)
                elif known is None and new.rules is not None and new.rules.defaults.digests:
                    self._changed(tenant)  # an earlier process may have died with other rules

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
