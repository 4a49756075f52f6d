"""Seeded simulations of a whole cluster: many runs, and proof that they find what is broken."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from actors import (
    attached,
    gateway_owners,
    router,
    shard_acks,
    shard_planning,
    shard_sessions,
    shard_suspects,
    shard_writer,
)
from carillon import session
from carillon.effects import AcknowledgedRange
from carillon.errors import StoreUnavailableError
from carillon.plan import Plan
from tests.simulation.scenario import simulate
from tests.simulation.world import World

SEEDS = 120
"""Simulations of the unit test; `make simulate` runs thousands."""
MOST = 150
"""A broken core is found within so many seeds."""


@pytest.fixture(autouse=True)
def _without_collector() -> Iterator[None]:
    """Simulations make garbage by the heap; collecting it all the time doubles their cost."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()


def test_promises_hold_under_faults() -> None:
    """No simulation breaks a promise; a seed that fails is named with how to repeat it."""
    for seed in range(1, SEEDS + 1):
        violations = simulate(seed).violations
        repeat = f"python -m tests.simulation --seed {seed} --trace"
        assert not violations, "\n".join([repeat, *violations])


@pytest.mark.parametrize("seed", [3, 17, 42])
def test_a_seed_decides_everything(seed: int) -> None:
    """The same seed gives the same run, to the last frame."""
    first, second = simulate(seed, tracing=True), simulate(seed, tracing=True)
    assert len(first.trace) > 100
    assert first.trace == second.trace


def _found(promise: str, change: Callable[[World], None] | None = None) -> None:
    for seed in range(1, MOST + 1):
        if any(promise in what for what in simulate(seed, change=change).violations):
            return
    pytest.fail(f"{MOST} simulations of a broken core saw nothing of {promise}")


def test_finds_a_missing_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that takes writes of an old term lets a stale owner write."""

    def unfenced(world: World) -> None:
        world.db.fences = False

    _found("G9", unfenced)


def test_finds_a_frame_left_out_of_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay that skips a missed notification leaves a gap."""
    advance = session.Session._advance

    def forgetful(self: Any, attachment: Any, effects: list[Any]) -> None:
        before = len(effects)
        advance(self, attachment, effects)
        sends = [e for e in effects[before:] if isinstance(e, session.Send) and e.seq]
        if len(sends) > 1:
            effects.remove(sends[0])

    monkeypatch.setattr(session.Session, "_advance", forgetful)
    _found("G3/G5")


def many_changes(world: World) -> None:
    """Devices read, archive, ... more than is sent."""
    world.publish_share = 0.3


def test_changes_are_made_once() -> None:
    """Nothing that a device changes is lost or answered twice, whichever process dies with it."""
    for seed in range(1, 41):
        violations = simulate(seed, change=many_changes).violations
        assert not violations, "\n".join([f"seed {seed} with many changes", *violations])


def test_finds_a_lost_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that forgets what it passed on loses reads with the shard they were sent to."""
    monkeypatch.setattr(attached.ChangeMemory, "again", lambda *_: [])
    _found("a change is lost", many_changes)


def test_finds_a_forgotten_outbox_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event of a live user without an outbox row is never pushed."""
    decide = shard_planning.plan

    def forgetful(*args: Any, **more: Any) -> Plan:
        decided = decide(*args, **more)
        return Plan(decided.status, decided.channels) if decided.status == "delivered" else decided

    monkeypatch.setattr(shard_planning, "plan", forgetful)
    _found("G6")


def test_finds_an_answer_before_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that takes a failed commit for done acknowledges what is not there."""
    fail = shard_writer.Writer._fail

    def hopeful(self: Any, entry: Any, error: Any) -> None:
        if isinstance(error, StoreUnavailableError):
            self._done(entry, shard_writer.Outcome(entry.event.id, 0, "stored"))
        else:
            fail(self, entry, error)

    monkeypatch.setattr(shard_writer.Writer, "_fail", hopeful)
    _found("G1")


def test_finds_a_retry_under_a_new_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that is tried again after a lost answer must keep its id, else it is stored twice."""
    hold = router.Router._hold_all

    def renaming(self: Any, lane: Any, events: Any, places: Any, **more: Any) -> None:
        for event in events:
            event.id = event.id[:8] + bytes(reversed(event.id[8:]))
        hold(self, lane, events, places, **more)

    monkeypatch.setattr(router.Router, "_hold_all", renaming)
    _found("stored 2 times")


def test_finds_sessions_that_outlive_their_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that keeps users of slots it gave away goes on from positions that are not true any more."""
    monkeypatch.setattr(shard_sessions.Sessions, "forget_slots", lambda self, gone: None)
    monkeypatch.setattr("actors.shard_users.UserCache.forget_slots", lambda self, lost: [])
    _found("")


def test_finds_a_lease_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claimed push whose outcome is lost has to come back."""
    from tests.simulation import store

    monkeypatch.setattr(store, "CLAIMABLE", store.PENDING)
    _found("not within")


def test_finds_a_gap_that_is_not_healed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a commit whose answer was lost the devices must read on from the store."""

    async def careless(self: Any) -> None:
        self._users.clear()

    monkeypatch.setattr(shard_suspects.Suspects, "heal", careless)
    monkeypatch.setattr(session.Session, "heal", lambda self, head: [])
    _found("")


def test_finds_frames_of_an_earlier_attachment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that takes frames of an attachment it has given up repeats or reorders."""
    attach = gateway_owners.Owners.attach

    def one_number(self: Any, conn: Any) -> None:
        attach(self, conn)
        if conn.number:
            self._attached[conn.number] = conn
            self._next_number = conn.number

    monkeypatch.setattr(gateway_owners.Owners, "attach", one_number)
    _found("")


def test_finds_acknowledgements_that_cancel_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """An acknowledgement of one notification must not stand for another."""
    acknowledged = shard_acks.Acknowledgements.acknowledged

    def generous(self: Any, user: Any, effect: Any) -> None:
        acknowledged(self, user, effect)
        self.ranged(user, AcknowledgedRange(0, user.seq, effect.signal, effect.device))

    monkeypatch.setattr(shard_acks.Acknowledgements, "acknowledged", generous)
    _found("G6")


def test_finds_a_shard_that_answers_for_what_it_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fenced is not stored."""
    done = shard_writer.Writer._done

    def lying(self: Any, entry: Any, outcome: Any) -> None:
        if outcome.status == "moved":
            outcome.status = "stored"
        done(self, entry, outcome)

    monkeypatch.setattr(shard_writer.Writer, "_done", lying)
    _found("G1")
