"""What becomes of an outbox row after a try: pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from carillon.messages import PushResult

RETRYABLE = frozenset(("failed", "unknown"))


@dataclass(frozen=True, slots=True)
class Settled:
    """New state of the row. `due_ms` is meaningful for failed and unknown: the next try."""

    state: str
    due_ms: int
    reason: str | None
    onward: bool = True
    """False: no other channel can do better (it expired), so the chain ends here too."""


def backoff_s(attempt: int, base_s: float, jitter: Callable[[], float]) -> float:
    """Wait after try number `attempt` (1 = the first): base, 2, 4, 8, ... times base, with full jitter.

    Args:
        jitter: uniform in [0, 1). The wait is at least half of the step, so that a retry never follows
            at once.
    """
    step = base_s * 2 ** (attempt - 1)
    return step * (0.5 + jitter() / 2)


def without_target(channel: str, step: int, chain: str) -> tuple[str, str]:
    """(state, reason) of a row whose channel has no target of the user left, and to whom nothing was sent.

    The last channel of a chain is a dead letter: whoever named a fallback wants to know that it failed.
    """
    last = step > 0 and not chain
    return "dead" if last else "cancelled", f"no {channel} target"


class OnPlatform(Protocol):
    """A device, as far as it counts here."""

    @property
    def device(self) -> str:
        """Its id."""
        ...

    @property
    def platform(self) -> str:
        """ios | android | web; empty: not told."""
        ...


T = TypeVar("T", bound=OnPlatform)


def for_platforms(targets: Iterable[T], gets: Callable[[str], bool]) -> tuple[list[T], list[T]]:
    """The targets that get pushes of a type, and those that are left out.

    Args:
        gets: whether a platform does (`carillon.policy.Policy.gets`).
    """
    mine: list[T] = []
    others: list[T] = []
    for target in targets:
        (mine if gets(target.platform) else others).append(target)
    return mine, others


LEFT_OUT = "left out: "
"""Begins what a row's reason says of devices that do not get pushes of its type."""
_MOST_TOLD = 400


def named(targets: Iterable[OnPlatform]) -> str:
    """Devices in a sentence."""
    return ", ".join(f"{one.device} ({one.platform})" for one in targets)


def left_out_told(targets: Iterable[OnPlatform]) -> str:
    """That the tenant's rule for the type left these out, as a reason says it."""
    return LEFT_OUT + named(targets)[:_MOST_TOLD]


class Pauses:
    """When rows that no pool took are due again, per provider.

    The pause doubles for as long as the provider takes nothing, is jittered, and bounded. The rows of a
    backlog come back one by one, so that they are not all claimed and handed back again at every pause.

    Args:
        first_s, longest_s: bounds of the pause.
        per_s: rows that come back in a second.
    """

    def __init__(self, first_s: float, longest_s: float, per_s: float) -> None:
        self._first_s = first_s
        self._longest_s = max(first_s, longest_s)
        self._gap_ms = 1000 / per_s
        self._steps: dict[str, tuple[float, float]] = {}  # provider -> (step in s, until when it is kept)
        self._free_ms: dict[str, float] = {}  # provider -> when the next row may come back

    def due_ms(self, provider: str, count: int, now_ms: int, jitter: Callable[[], float]) -> list[int]:
        """Due times of `count` rows that are handed back now, ascending."""
        step_s, until_ms = self._steps.get(provider, (0.0, 0.0))
        if now_ms >= until_ms:
            step_s = min(2 * step_s, self._longest_s) if step_s else self._first_s
            self._steps[provider] = (step_s, now_ms + step_s * 1000)
        first = now_ms + 1000 * step_s * (0.5 + jitter() / 2)
        start = max(first, self._free_ms.get(provider, 0.0))
        self._free_ms[provider] = start + count * self._gap_ms
        return [math.ceil(start + index * self._gap_ms) for index in range(count)]

    def took(self, provider: str) -> None:
        """The provider takes pushes: the next pause is the first again."""
        self._steps.pop(provider, None)


def settle(
    results: Sequence[PushResult],
    attempt: int,
    *,
    max_attempts: int,
    base_s: float,
    now_ms: int,
    expires_ms: int | None,
    jitter: Callable[[], float],
    left: tuple[int, str] | None = None,
    sent_before: bool = False,
) -> Settled:
    """The row's state after all targets of a try have answered.

    Args:
        sent_before: an earlier try reached a target.
        left: (due time, reason) if some targets were not tried, as no pool took their job: they are what
            keeps the row alive, whatever the number of tries.

    One target that may yet be reached keeps the row alive; a retry leaves out those that were sent. Without
    such a target the row is sent if any target was, else dead with the provider's reason.
    """
    again = [r for r in results if r.outcome in RETRYABLE]
    sent = sent_before or any(r.outcome == "sent" for r in results)
    if left is not None or (again and attempt < max_attempts):
        due_ms = 0 if left is None else left[0]
        if again:
            asked_s = max(r.retry_after_s for r in again)
            # Beyond the last step (only with `left`) the pause grows no more.
            pause_s = backoff_s(min(attempt, max_attempts), base_s, jitter)
            due_ms = max(due_ms, now_ms + round(1000 * max(asked_s, pause_s)))
        if expires_ms is None or due_ms < expires_ms:
            state = "unknown" if any(r.outcome == "unknown" for r in again) else "failed"
            return Settled(state, due_ms, (again[0].error or None) if left is None else left[1])
        if not sent:
            return Settled("dead", now_ms, "expired before the next try", onward=False)
    if sent:
        return Settled("sent", now_ms, None)
    if not results:
        return Settled("cancelled", now_ms, "no push target")
    last = results[-1]
    reason = f"{last.outcome}: {last.error or last.status}"
    if again:
        reason = f"gave up after {attempt} tries: {again[0].error or again[0].outcome}"
    return Settled("dead", now_ms, reason)
