"""Decided again at the end of what held it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from carillon.again import Again, Held, decide_again, merge
from carillon.attention import DEFERRED, SEEN
from carillon.decision import Verdict


def verdict(off: tuple[str, ...] = (), until_ms: int | None = None, reason: str | None = None) -> Verdict:
    return Verdict(frozenset(off), {}, 1, until_ms, False, (), (), reason)


def test_rules_come_before_presence() -> None:
    """Closed is cancelled, held is held on; who has it and looks needs no push; who does not know it does."""
    here = {"present": True, "acknowledged": True}
    away = {"present": False, "acknowledged": True}
    assert decide_again(verdict(("push",)), "fcm", DEFERRED, **here) == Again("cancel", "preferences")
    assert decide_again(verdict((), 7, "digest"), "push", DEFERRED, **here) == Again("hold", "digest", 7)
    assert decide_again(verdict(), "push", DEFERRED, **here) == Again("cancel", "active")
    assert decide_again(verdict(), "push", DEFERRED, **away).action == "send"
    assert decide_again(verdict(), "push", DEFERRED, present=True, acknowledged=False).action == "send"
    assert decide_again(verdict(), "push", SEEN, **here).action == "send", (
        "the session decides about that one"
    )


pushes = st.lists(st.tuples(st.integers(1, 9), st.sampled_from("abc")), max_size=20)


@given(pushes)
def test_a_merge_loses_nobody(found: list[tuple[int, str]]) -> None:
    """Each push is sent or spoken for, once, by the newest of the same user."""
    held = [Held(index, seq, user) for index, (seq, user) in enumerate(found)]
    together = merge(held)
    said = [d for carrier, others in together.items() for d in (carrier, *others)]
    assert sorted(said) == [push.delivery for push in held]
    assert len(together) == len({push.told_to for push in held})
    for carrier, others in together.items():
        for other in others:
            assert held[other].told_to == held[carrier].told_to
            assert held[other].seq <= held[carrier].seq
