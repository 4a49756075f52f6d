"""Decided again at the end of what held it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from carillon import endings, explain
from carillon.again import Again, Held, decide_again, merge
from carillon.attention import DEFERRED, SEEN
from carillon.decision import Verdict
from carillon.switches import Fired


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


RULES = st.builds(
    Fired,
    st.sampled_from(sorted(name for name, text in explain.RULES.items() if "{until}" not in text)),
    st.sampled_from(["user", "tenant", "event"]),
    st.none() | st.text(min_size=1, max_size=64).filter(str.isprintable),
    st.just(("push",)),
    st.just(0),
)


@given(RULES, st.sampled_from(["preferences", "rate_limit", "forced_off"]))
def test_what_closed_it_is_told_again_by_the_same_rule(rule: Fired, reason: str) -> None:
    """The rule that closes a push when its time comes stands in its row; read back it says the same."""
    verdict_ = Verdict(frozenset({"push"}), {"push": rule}, 1, None, False, (), (), reason)
    again = decide_again(verdict_, "fcm", DEFERRED, present=True, acknowledged=True)
    assert (again.action, again.reason, again.rule) == ("cancel", reason, rule)
    found = endings.ending("fcm", "cancelled", endings.closed(reason, again.rule))
    assert found is not None
    assert (found["rule"], found["source"], found["about"]) == (rule.rule, rule.source, rule.about)
    assert explain.words(rule._replace(channels=("fcm",), until_ms=None)) in found["words"]


def test_a_limit_that_closes_it_is_the_rule() -> None:
    """Without a switch the rule that fired last did it; what holds it on is told; presence is no rule."""
    limit = Fired("rate_limit", "tenant", None, (), 9)
    full = Verdict(frozenset({"push"}), {}, 1, None, False, (limit,), (), "rate_limit")
    here = {"present": True, "acknowledged": True}
    assert decide_again(full, "push", DEFERRED, **here) == Again("cancel", "rate_limit", 0, limit)
    quiet = Fired("quiet_hours", "user", None, (), 9)
    ended = endings.ending("push", "cancelled", endings.closed("rate_limit", limit))
    assert ended is not None
    assert ended["words"].endswith("The limit of the user over all types is used up.")
    held = Verdict(frozenset(), {}, 1, 9, True, (quiet,), (), "quiet_hours")
    assert decide_again(held, "push", DEFERRED, **here) == Again("hold", "quiet_hours", 9, quiet)
    assert decide_again(verdict(), "push", DEFERRED, **here).rule is None


@given(st.sampled_from(sorted(endings.ENDINGS)), st.sampled_from(["cancelled", "dead"]))
def test_every_ending_has_words(reason: str, state: str) -> None:
    """A sentence for each; none for what is open, was sent, or failed at the provider."""
    found = endings.ending("push", state, reason)
    assert found is not None
    assert found["words"].endswith(".")
    for other in ("planned", "sending", "sent", "failed", "unknown"):
        assert endings.ending("push", other, reason) is None
    assert endings.ending("push", state, None) is None
    assert endings.ending("push", state, "failed: 500") is None
