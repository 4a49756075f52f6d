"""What a session remembers of pushes that wait, against the plain statement of it: look at every row."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from carillon.attention import (
    ACKNOWLEDGED,
    ACTIVE,
    ANY,
    AWAY,
    DONE,
    HELD,
    KEEP,
    RECEIVED,
    SEEN,
    SILENT,
    at_due,
    on_signal,
)
from carillon.push_watch import MAX_WATCHED, SPARE, PushWatch, Waiting


@dataclass
class Plain:
    """All rows in a list, searched from end to end."""

    rows: dict[bytes, Waiting] = field(default_factory=dict)

    def signalled(self, ids: list[bytes], signal: str, now: float) -> None:
        for raw in [raw for raw in ids if raw in self.rows]:
            row = self.rows[raw]
            row.acknowledged |= signal in ACKNOWLEDGED
            done = on_signal(signal, "planned", row.gate, row.hold_until > now)
            if done in ("cancel", "due"):
                del self.rows[raw]
            elif done == "hold":
                row.gate, row.due = HELD, row.hold_until

    def take_due(self, now: float, active: bool) -> tuple[set[bytes], set[bytes]]:
        dropped, kept = set[bytes](), set[bytes]()
        for raw, row in list(self.rows.items()):
            if row.gate not in (SEEN, HELD) or row.due > now:
                continue
            verdict = at_due(
                row.gate, active=active, acknowledged=row.acknowledged, holdable=row.hold_until > now
            )
            if verdict == "hold":
                row.gate, row.due = HELD, row.hold_until
                kept.add(raw)
            else:
                del self.rows[raw]
                if verdict == "drop":
                    dropped.add(raw)
        return dropped, kept


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.sampled_from([None, ANY, SEEN]), st.integers(0, 9), st.integers(0, 30),
            st.booleans(),
        ),
        st.tuples(
            st.just("signal"), st.sampled_from([ACTIVE, AWAY, DONE, KEEP, RECEIVED, SILENT]),
            st.integers(0, 40), st.integers(0, 12),
        ),
        st.tuples(st.just("due"), st.integers(0, 12), st.booleans()),
        st.tuples(st.just("between"), st.integers(0, 40), st.integers(0, 40)),
        st.tuples(st.just("forget"), st.integers(0, 40)),
    ),
    max_size=60,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(STEPS)
def test_it_answers_as_a_look_at_every_row_does(steps: list[tuple]) -> None:
    """Whatever is added, told and forgotten: the same rows are due, and the same lie in a range."""
    watch, plain = PushWatch(), Plain()
    now, seq = 100.0, 0
    for kind, *what in steps:
        if kind == "add":
            gate, due, hold, backwards = what
            seq += 1
            number = max(1, seq - 3) if backwards else seq  # one that was healed comes late
            fields = (number, gate, now + due, now + hold if hold else 0.0)
            raw = seq.to_bytes(4, "big")
            watch.add(raw, Waiting(*fields))
            plain.rows[raw] = Waiting(*fields)
        elif kind == "signal":
            signal, first, count = what
            ids = [n.to_bytes(4, "big") for n in range(first, first + count)]
            watch.signalled(ids, signal, now)
            plain.signalled(ids, signal, now)
        elif kind == "due":
            later, active = what
            now += later
            waiting = [row.due for row in plain.rows.values() if row.gate in (SEEN, HELD)]
            assert watch.next_due <= min(waiting, default=float("inf"))
            dropped, kept = watch.take_due(now, active)
            assert (set(dropped), set(kept)) == plain.take_due(now, active)
            assert len(dropped) == len(set(dropped))
        elif kind == "between":
            after, upto = sorted(what)
            found = [raw for raw, row in plain.rows.items() if after < row.seq <= upto]
            assert watch.between(after, upto) == found
        else:
            (upto,) = what
            watch.forget([], upto)
            plain.rows = {raw: row for raw, row in plain.rows.items() if not 0 < row.seq <= upto}
        assert len(watch) == len(plain.rows)
        assert set(watch.held()) == {raw for raw, row in plain.rows.items() if row.gate == HELD}


def test_what_moved_on_does_not_pile_up() -> None:
    """A user who reads at once leaves no memory behind, however long the holds are."""
    watch = PushWatch()
    for number in range(10 * MAX_WATCHED):
        raw = number.to_bytes(4, "big")
        watch.add(raw, Waiting(number, None, 5.0, 1e9))
        watch.signalled([raw], ACTIVE, 0.0)
        watch.forget([raw])
    assert not watch
    assert len(watch._due) <= SPARE + 2
