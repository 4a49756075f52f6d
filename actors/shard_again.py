"""Pushes whose time has come are decided again: held, cancelled, told together, or sent.

Between a row's planning and its due time preferences change, quiet hours begin, users come. What was held is
not simply released: of each user one push speaks for all that was missed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from actors.shard_digests import Digests, collecting, spend
from actors.shard_policies import NO_RULES, Policies
from actors.shard_users import UserCache, read_preferences
from carillon.again import ACTIVE, CANCEL, HOLD, TAKES_OVER, Held, decide_again, merge
from carillon.attention import DEFERRED, WITHDRAWN, Attention
from carillon.decision import Verdict, weigh
from carillon.digest import EXPIRED, FLUSHED, FLUSHED_BY_USER
from carillon.endings import closed
from carillon.external import EXTERNAL
from carillon.metrics import Stats
from carillon.presentation import AS_EVER, SILENT, OfPush, of_push
from carillon.settings import ShardSettings
from carillon.switches import Preferences
from stores.postgres.shard_rows import CarrierRow, Claimed, ReleaseRow, SettleRow
from stores.postgres.shard_store import ShardStore


class DecidedAgain:
    """Looks through claimed rows before they are sent.

    Args:
        term: the shard's present term.
        hold: takes rows that are held on.
        cancel: writes rows that are not sent; what follows in their chains may.
    """

    def __init__(
        self,
        store: ShardStore,
        users: UserCache,
        policies: Policies,
        stats: Stats,
        settings: ShardSettings,
        digests: Digests,
        *,
        term: Callable[[], int],
        hold: Callable[[list[ReleaseRow]], None],
        cancel: Callable[[list[SettleRow], int], Awaitable[None]],
    ) -> None:
        self._store = store
        self._users = users
        self._policies = policies
        self._stats = stats
        self._window_ms = round(settings.ack_window_s * 1000)
        self._digests = digests
        self._term = term
        self._hold = hold
        self._cancel = cancel

    async def look_through(self, claimed: Iterable[Claimed], now_ms: int) -> list[Claimed]:
        """Hold, cancel or merge what rules no longer let go as planned; returns what is left to send."""
        claimed = list(claimed)
        await self._policies.ensure({row.key.tenant for row in claimed})
        beyond: set[tuple[int, bytes]] = set()
        if collecting(claimed):
            beyond = await self._digests.complete(claimed, now_ms)
        rest: list[Claimed] = []
        back: list[ReleaseRow] = []
        ended: list[SettleRow] = []
        free: dict[int, tuple[Claimed, Verdict]] = {}
        collected: dict[int, tuple[Claimed, Verdict]] = {}
        for row in claimed:
            held = row.gate == DEFERRED
            speaks = row.collected() or row.carrier == row.delivery
            if speaks and row.expires_ms is not None and row.expires_ms <= now_ms:
                expired = SettleRow(row.delivery, row.attempt, "cancelled", now_ms, EXPIRED, onward=False)
                expired.next = True
                ended.append(expired)
                continue
            verdict = self._verdict(row, held, now_ms)
            if verdict is None:
                rest.append(row)
                continue
            wanted_now = row.reason in (FLUSHED, FLUSHED_BY_USER)
            if row.reason == FLUSHED_BY_USER:
                verdict = verdict._replace(until_ms=None)
            again = decide_again(
                verdict,
                row.channel,
                row.gate,
                present=not wanted_now and self._present(row, now_ms),
                acknowledged=row.acknowledged,
            )
            if again.action == HOLD:
                reason = again.reason or ""
                back.append(ReleaseRow(row.delivery, row.attempt, again.until_ms, reason, held=True))
            elif again.action == CANCEL:
                onward = again.reason != ACTIVE
                settled = SettleRow(
                    row.delivery,
                    row.attempt,
                    "cancelled",
                    now_ms,
                    closed(again.reason or "", again.rule),
                    onward=onward,
                )
                settled.next = True
                ended.append(settled)
            elif row.collected():
                collected[row.delivery] = row, verdict
            elif held and (row.attempt == 1 or row.reason == TAKES_OVER) and row.digest is None:
                free[row.delivery] = row, verdict
            else:
                rest.append(row)
        if back:
            self._stats.count("pushes_held", len(back))
            self._hold(back)
        if ended:
            await self._cancel(ended, now_ms)
        if collected:
            for row, verdict in await self._digests.tell(collected, now_ms, beyond):
                spend(self._users.get(row.key), verdict, now_ms)
                rest.append(row)
        if free:
            rest += await self._tell_together(free, now_ms)
        return rest

    def _verdict(self, row: Claimed, held: bool, now_ms: int) -> Verdict | None:
        """What the rules of now say; None: there are none, or the row is beyond them."""
        over = row.expires_ms is not None and row.expires_ms <= now_ms
        if over or row.sent_to or row.channel not in EXTERNAL or row.gate == WITHDRAWN:
            return None
        user = self._users.get(row.key)
        mine = self._preferences(row)
        rules = self._policies.of(row.key.tenant).rules
        if mine is None and rules is None and not held:
            return None
        if mine is None:
            mine = self._local(row)
        spent = user.spent if held and user is not None else None
        return weigh(row.type, row.category, row.priority, mine, rules or NO_RULES, now_ms, spent, again=True)

    def _preferences(self, row: Claimed) -> Preferences | None:
        user = self._users.get(row.key)
        if user is not None:
            return user.preferences
        return None if row.preferences is None else read_preferences(row.preferences, row.zone)

    def _local(self, row: Claimed) -> Preferences | None:
        """What stands for the document of a user who has none."""
        user = self._users.get(row.key)
        if user is not None:
            return user.local
        return None if row.zone is None else read_preferences("{}", row.zone)

    def presented(self, row: Claimed) -> OfPush:
        """How a row's push is to be shown."""
        mine, rules = self._preferences(row), self._policies.of(row.key.tenant).rules
        if mine is None and rules is None:
            return AS_EVER
        return of_push(
            SILENT if mine is None else mine.push, SILENT if rules is None else rules.defaults.push
        )

    def _present(self, row: Claimed, now_ms: int) -> bool:
        user = self._users.get(row.key)
        session = None if user is None else user.session
        if session is None or not session.live:
            return False
        return session.attention(now_ms, self._window_ms) >= Attention.VISIBLE

    async def _tell_together(self, free: dict[int, tuple[Claimed, Verdict]], now_ms: int) -> list[Claimed]:
        """Of each user and channel one push for all that was held."""
        together = merge(Held(d, row.seq, (row.key, row.channel)) for d, (row, _) in free.items())
        carriers: list[Claimed] = []
        rows: list[CarrierRow] = []
        for delivery, others in together.items():
            row, verdict = free[delivery]
            carriers.append(row)
            claimed = [(other, free[other][0].attempt) for other in others]
            rows.append(CarrierRow(delivery, row.attempt, row.stream_id, row.slot, row.channel, claimed))
            spend(self._users.get(row.key), verdict, now_ms)
        merged = await self._store.merge(self._term(), rows, now_ms)
        several = [row for row in carriers if row.delivery in merged]
        for row in several:
            row.merged, row.carrier = merged[row.delivery], row.delivery
        await self._digests.show(several)
        return carriers
