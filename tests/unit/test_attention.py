"""Attention: what devices say, and what acknowledgements do to pushes that wait."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from carillon.attention import (
    ACKNOWLEDGED,
    ACTIVE,
    ALWAYS,
    ANY,
    AWAY,
    DONE,
    HELD,
    KEEP,
    RECEIVED,
    SEEN,
    SILENT,
    STALE,
    Attention,
    at_due,
    combined,
    device_attention,
    on_signal,
    signal_of,
)

GATES = (None, ANY, SEEN, HELD, ALWAYS)
STATES = ("planned", "failed", "unknown", "sending", "sent", "dead", "cancelled")
SIGNALS = (SILENT, ACTIVE, RECEIVED, STALE, AWAY, DONE, KEEP)
device = st.tuples(
    st.sampled_from(("focused", "visible", "idle", "hidden")), st.booleans(), st.integers(0, 20_000)
)


@given(st.lists(device, max_size=4))
def test_the_best_device_counts_and_unknown_never_silences(devices: list[tuple[str, bool, int]]) -> None:
    """A device that never tells counts as visible while it acknowledges; deaf ones do not count at all."""
    now, window = 30_000, 5000
    found = combined(
        [
            device_attention(state if told else "visible", told, owes and now - owes, now, window)
            for state, told, owes in devices
        ]
    )
    if not devices:
        assert found is Attention.OFFLINE
        return
    told = {state for state, reported, _ in devices if reported}
    alive = any(not reported and owes <= window for _, reported, owes in devices)
    if told & {"focused"}:
        assert found is Attention.FOCUSED
    elif "visible" in told or alive:
        assert found is Attention.VISIBLE
    elif told:
        assert found is (Attention.IDLE if "idle" in told else Attention.HIDDEN)
    else:
        assert found is Attention.UNKNOWN


@given(st.sampled_from(SIGNALS), st.sampled_from(STATES), st.sampled_from(GATES), st.booleans())
def test_what_an_acknowledgement_stops(signal: str, state: str, gate: str | None, holdable: bool) -> None:
    """Sent ones stay as they are, ALWAYS goes whoever acknowledges, and hidden devices have shown nothing."""
    done = on_signal(signal, state, gate, holdable)
    if state in ("sent", "dead", "cancelled"):
        assert done == "none"
    if state == "sending" or gate == ALWAYS:
        assert done in ("none", "show")
    if gate == SEEN and signal in ACKNOWLEDGED:
        assert done in ("none", "show"), "only what the user does stops it"
    if signal == RECEIVED:
        assert (done == "cancel") == (gate == ANY and state in ("planned", "failed", "unknown"))
    if done == "hold":
        assert state == "planned"
        assert holdable or signal == KEEP
    if signal == ACTIVE and state == "planned" and gate is None:
        assert done == ("hold" if holdable else "cancel")
    if signal == SILENT and state == "planned" and gate in (None, ANY, HELD):
        assert done == "cancel", "as before there was attention"


@given(st.sampled_from(GATES), st.booleans(), st.booleans(), st.booleans())
def test_a_push_whose_time_has_come_goes_unless_an_active_user_has_it(
    gate: str | None, active: bool, acknowledged: bool, holdable: bool
) -> None:
    """Fail open: who is not known to be active gets the push."""
    verdict = at_due(gate, active=active, acknowledged=acknowledged, holdable=holdable)
    if not active or gate not in (HELD, SEEN):
        assert verdict == "send"
    if gate == SEEN and not acknowledged:
        assert verdict == "send"
    assert (verdict == "hold") <= holdable


def test_devices_tell_by_their_acknowledgement() -> None:
    """Focused and visible devices have shown it, hidden and idle ones received it, others say nothing."""
    assert [signal_of(s, True) for s in ("focused", "visible", "idle", "hidden")] == [
        ACTIVE, ACTIVE, RECEIVED, RECEIVED,
    ]  # fmt: skip
    assert signal_of("visible", False) == SILENT
