"""What would become of an event, as its shard foretells it; nothing is done.

The decision is the writer's own (`Planner`), of a planner beside it: a time to come may be asked for, and
what the writer remembers of this millisecond stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from actors.shard_entries import Entry, answered
from actors.shard_merges import Merges
from actors.shard_planning import Planner, digest_of
from actors.shard_repeats import Repeats
from actors.shard_users import User
from carillon import forecast
from carillon.attention import Attention
from carillon.clock import Clock, rfc3339
from carillon.digest import key_of
from carillon.explain import of_plan, read_receipt
from carillon.external import EXTERNAL
from carillon.ids import UserKey, uuid_text
from carillon.merging import OPENED
from carillon.messages import Event, PlanReply
from carillon.outbox import for_platforms
from carillon.plan import Plan, Reach
from carillon.policy import TenantPolicy
from carillon.settings import ShardSettings
from carillon.switches import Fired
from stores.postgres.shard_store import ShardStore


class Previews:
    """Foretells for users of one shard.

    Args:
        reach, policy: as of `Planner`.
    """

    def __init__(
        self,
        store: ShardStore,
        clock: Clock,
        settings: ShardSettings,
        merges: Merges,
        repeats: Repeats,
        *,
        reach: Callable[[User], tuple[Reach, int]],
        policy: Callable[[str], TenantPolicy],
    ) -> None:
        self._store = store
        self._clock = clock
        self._merges = merges
        self._repeats = repeats
        self._policy = policy
        self._planner = _Foreseer(clock, settings, merges, reach=reach, policy=policy)

    async def stranger(self, key: UserKey, slot: int) -> User | None:
        """A user without a stream, to plan for and to forget; None: there is a stream.

        Raises:
            StoreUnavailableError: it cannot be read.
        """
        record = await self._store.stranger(key)
        return None if record is None else User(record, slot)

    async def of(self, user: User, event: Event, at_ms: int = 0) -> PlanReply:
        """What would become of an event that is sent now, or at a time to come.

        Raises:
            StoreUnavailableError: what it would be compared with cannot be read.
        """
        if at_ms > self._clock.now_ms():
            then = await self._planned(user, event, at_ms)
            return PlanReply(_text(forecast.later(event.user, at_ms, then)))
        if event.idempotency_key is not None:
            known = await self._repeats.foretold(user, event)
            if known is not None and known.status == "failed":
                return PlanReply("{}", known)
            if known is not None:
                return PlanReply(_text(forecast.replayed(event.user, known)), replayed=True)
        return PlanReply(_text(await self._planned(user, event, self._clock.now_ms())))

    async def _planned(self, user: User, event: Event, now_ms: int) -> dict[str, Any]:
        entry = Entry(event, answered)
        entry.user = user
        found = self._planner.plan(entry, now_ms)
        expired = event.expires_ms is not None and event.expires_ms <= now_ms
        reach, attention, _ = read_receipt(entry.receipt)
        rules = of_plan(
            found, event.channels, event.fallback, event.priority, reach, attention, user.providers,
            expires_ms=event.expires_ms, now_ms=now_ms,
        )  # fmt: skip
        merge: dict[str, Any] | None = None
        if self._merges.asked([event]):
            merge = await self._merges.preview(user, event, found.archived, now_ms)
        devices: dict[str, Any] | None = None
        if found.push_due_ms is not None and not expired:
            devices, more = await self._devices(user, event, found)
            rules += more
        status = "stored" if expired else None
        if merge is not None and merge["status"] != OPENED:
            status = merge["status"]
        return forecast.planned(
            event.user, found, rules,
            expired=expired, digest=_digest_told(user.key, event, found), merge=merge, devices=devices,
            status=status,
        )  # fmt: skip

    async def _devices(
        self, user: User, event: Event, found: Plan
    ) -> tuple[dict[str, Any] | None, list[Fired]]:
        """Which of the user's devices get pushes of the type; looked at only if the tenant names some."""
        policy = self._policy(event.tenant).of(event.type)
        if not policy.platforms:
            return None, []
        names = forecast.outside(found.channels)
        targets = (await self._store.load_targets([user.key]))[user.key]
        mine = [
            target for target in targets if any(EXTERNAL[name].reaches(target.provider) for name in names)
        ]
        reached, others = for_platforms(mine, policy.gets)
        return (
            {
                "platforms": sorted(policy.platforms),
                "reached": [target.device for target in reached],
                "leftOut": [{"deviceId": t.device, "platform": t.platform} for t in others],
            },
            forecast.device_rules(policy.platforms, reached, others, names),
        )


class _Foreseer(Planner):
    """Plans for a time that may be to come: where the user is and looks is taken as it is now."""

    def __init__(
        self,
        clock: Clock,
        settings: ShardSettings,
        merges: Merges,
        *,
        reach: Callable[[User], tuple[Reach, int]],
        policy: Callable[[str], TenantPolicy],
    ) -> None:
        def then(user: User) -> tuple[Reach, int]:
            found, grace_end_ms = reach(user)
            if found is Reach.GRACE and grace_end_ms <= self._at_ms:
                return Reach.OFFLINE, 0
            return found, grace_end_ms

        super().__init__(clock, settings, merges, reach=then, policy=policy)
        self._at_ms = 0

    def plan(self, entry: Entry, now_ms: int, *, spend: bool = False) -> Plan:
        self._at_ms = now_ms
        return super().plan(entry, now_ms, spend=False)

    def _attention(self, user: User, event: Event, now_ms: int) -> Attention:
        return super()._attention(user, event, self._clock.now_ms())


def _digest_told(user: UserKey, event: Event, found: Plan) -> dict[str, Any] | None:
    """The digest that a plan collects in, for an answer."""
    if found.digest is None or found.push_due_ms is None:
        return None
    return {
        "digestId": uuid_text(digest_of(user, event, found)),
        "category": key_of(user, event.category, found.digest, 0).category,
        "frequency": found.digest,
        "dueAt": rfc3339(found.push_due_ms),
    }


def _text(document: dict[str, Any]) -> str:
    return msgspec.json.encode(document).decode()
