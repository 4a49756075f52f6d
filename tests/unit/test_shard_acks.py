"""What waits to be written of acknowledgements while Postgres is away."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from actors import shard_acks
from actors.shard_acks import Acknowledgements
from actors.shard_kept import KeptPushes
from carillon.attention import ACTIVE, AWAY, SILENT
from carillon.clock import ManualClock
from carillon.effects import Acknowledged, AcknowledgedRange, PushSignal
from carillon.errors import StoreUnavailableError
from carillon.metrics import Stats
from carillon.settings import ShardSettings
from stores.postgres.shard_rows import SignalRow

USER: Any = SimpleNamespace(stream_id=1)


class Store:
    """Keeps what was written; away it lets something happen meanwhile, and refuses."""

    def __init__(self) -> None:
        self.away = True
        self.meanwhile: list[Any] = []
        self.statements: list[list[SignalRow]] = []
        self.asked: list[tuple[int, int, int, bool]] = []

    def _answer(self) -> None:
        while self.meanwhile:
            self.meanwhile.pop(0)()
        if self.away:
            raise StoreUnavailableError("away")

    async def acknowledge(self, term: int, told: Sequence[SignalRow], now_ms: int) -> int:
        self._answer()
        self.statements.append(list(told))
        return len(told)

    async def ids_between(self, ranges: Sequence[tuple[int, int, int, bool]]) -> list[Any]:
        self._answer()
        self.asked += ranges
        return [(b"%d" % after, stream, upto, 0) for stream, after, upto, _ in ranges]


def made() -> tuple[Acknowledgements, Store]:
    store = Store()
    kept = KeptPushes(store, ManualClock(), Stats(), ShardSettings(), term=lambda: 1, owns=lambda _: True)  # type: ignore[arg-type]
    acks = Acknowledgements(
        store,
        kept,
        ManualClock(),
        Stats(),
        ShardSettings(),
        term=lambda: 1,
        fenced=lambda: None,  # type: ignore[arg-type]
    )
    acks.on_change(lambda ids: None, lambda: None)
    return acks, store


async def refused(acks: Acknowledgements) -> None:
    with pytest.raises(StoreUnavailableError):
        await acks.write()


async def test_a_failed_statement_loses_nothing_to_a_weaker_one() -> None:
    """What a device tells while a statement fails is merged with what it told before."""
    acks, store = made()
    acks.acknowledged(USER, Acknowledged((b"a", b"b"), SILENT, rev=7))
    store.meanwhile.append(lambda: acks.acknowledged(USER, Acknowledged((b"a",), ACTIVE, "phone", 7)))
    store.meanwhile.append(lambda: acks.signalled(USER, PushSignal((b"b",), AWAY)))
    store.meanwhile.append(lambda: acks.acknowledged(USER, Acknowledged((b"b",), ACTIVE, "phone", 7)))
    await refused(acks)
    store.away = False
    await acks.write()
    assert store.statements == [
        [SignalRow(1, b"a", SILENT, "phone", 7), SignalRow(1, b"b", SILENT, "phone", 7)],
        [SignalRow(1, b"b", AWAY)],
    ]


async def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of acknowledgements, signals and ranges only the newest wait, so many of each."""
    monkeypatch.setattr(shard_acks, "MAX_UNWRITTEN", 3)
    acks, store = made()
    for n in range(5):
        acks.acknowledged(USER, Acknowledged((b"%d" % n,)))
        acks.signalled(USER, PushSignal((b"%d" % n,), AWAY))
        acks.ranged(USER, AcknowledgedRange(n * 10, n * 10 + 10, SILENT, ""))
        await refused(acks)
    assert len(acks._told) == len(acks._after) == len(acks._ranges) == 3
    store.away = False
    await acks.write()
    assert [piece[1] for piece in store.asked] == [20, 30, 40]
    assert (len(acks._told), len(acks._after), len(acks._ranges)) == (0, 0, 0)


async def test_ranges_that_come_while_some_are_looked_up_wait() -> None:
    """Each range is looked up once that succeeds, also those that came meanwhile and those that failed."""
    acks, store = made()
    acks.ranged(USER, AcknowledgedRange(0, 10, SILENT, ""))
    store.meanwhile.append(lambda: acks.ranged(USER, AcknowledgedRange(10, 20, SILENT, "")))
    await refused(acks)
    store.away = False
    store.meanwhile.append(lambda: acks.ranged(USER, AcknowledgedRange(20, 30, SILENT, "")))
    await acks.write()
    assert [piece[1] for piece in store.asked] == [0, 10, 20]
    assert sorted(row.notification for rows in store.statements for row in rows) == [b"0", b"10", b"20"]
