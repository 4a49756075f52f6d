"""Users whose last write is doubtful: none goes on before its stream was read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from actors.shard_kept import KeptPushes
from actors.shard_suspects import Suspects
from actors.shard_users import User
from carillon.clock import ManualClock
from carillon.errors import StoreUnavailableError
from carillon.ids import UserKey
from carillon.metrics import Stats
from carillon.settings import ShardSettings
from stores.postgres.shard_rows import UserRecord
from stores.postgres.shard_store import ShardStore


def _record(name: str, stream_id: int) -> UserRecord:
    return UserRecord(UserKey("demo", name), stream_id, "e", 0, 0, 0, 0, None, None, [])


class Streams:
    """A store that knows where streams stand, and lets something happen while it reads them."""

    def __init__(self, records: Sequence[UserRecord]) -> None:
        self.records = {record.key: record for record in records}
        self.meanwhile: Callable[[], None] = lambda: None
        self.down = False

    async def load_users(self, term: int, keys: Sequence[tuple[UserKey, int, str]]) -> list[UserRecord]:
        """As `ShardStore.load_users`, of streams that exist."""
        self.meanwhile()
        await asyncio.sleep(0)
        if self.down:
            raise StoreUnavailableError("not now")
        return [self.records[key] for key, _, _ in keys]


def _suspects(streams: Streams) -> Suspects:
    store = cast("ShardStore", streams)

    def nothing(*_: Any) -> None:
        pass

    kept = KeptPushes(store, ManualClock(), Stats(), ShardSettings(), term=lambda: 1, owns=lambda _: True)
    return Suspects(
        store, kept, term=lambda: 1, owns=lambda _: True, run=nothing, expires=nothing, erased=nothing
    )


def test_looks_at_who_becomes_a_suspect_while_it_looks_at_others() -> None:
    """A user that is doubted while streams are read, its own or another's, is read after that."""
    ann, bob = _record("ann", 1), _record("bob", 2)
    streams = Streams([ann, bob])
    suspects = _suspects(streams)
    users = [User(ann, 0), User(bob, 0)]
    suspects.add(users[:1])
    streams.meanwhile = lambda: suspects.add(users)
    asyncio.run(suspects.heal())
    assert len(suspects) == 2
    streams.meanwhile = lambda: None
    streams.records = {record.key: replace(record, seq=3, rev=4) for record in (ann, bob)}
    asyncio.run(suspects.heal())
    assert not suspects
    assert [(user.seq, user.rev) for user in users] == [(3, 4), (3, 4)]


def test_a_user_that_was_loaded_anew_meanwhile_stays_the_suspect() -> None:
    """The look failed: the one that is doubted now is looked at next, not the one that is forgotten."""
    ann = _record("ann", 1)
    streams = Streams([ann])
    suspects = _suspects(streams)
    former, present = User(ann, 0), User(ann, 0)
    suspects.add([former])
    streams.meanwhile = lambda: suspects.add([present])
    streams.down = True
    asyncio.run(suspects.heal())
    streams.meanwhile, streams.down = lambda: None, False
    streams.records = {ann.key: replace(ann, seq=3, rev=4)}
    asyncio.run(suspects.heal())
    assert (present.seq, present.rev) == (3, 4)


def test_who_could_not_be_read_stays() -> None:
    """Without an answer of the store nobody is above suspicion."""
    ann = _record("ann", 1)
    streams = Streams([ann])
    suspects = _suspects(streams)
    suspects.add([User(ann, 0), None])
    streams.down = True
    asyncio.run(suspects.heal())
    assert len(suspects) == 1
    streams.down = False
    asyncio.run(suspects.heal())
    assert not suspects
