"""External channels: what leaves the system. The one registry, and the choice among them: pure.

An event names channels that are tried at the same time, and channels to fall back to, one after the other,
when those before ended without success. `Choice` says where to begin; the outbox rows carry the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, get_args

IN_APP: Final = "in_app"
PUSH: Final = "push"

ExternalName = Literal["push", "fcm", "apns"]
ChannelName = Literal["in_app", "push", "fcm", "apns"]
"""What an event may name; types of the request decoder."""

PUSH_PROVIDERS: Final = frozenset(("fcm", "apns"))


@dataclass(frozen=True, slots=True)
class External:
    """One external channel.

    Attributes:
        providers: a push channel reaches the user's targets at these providers.
    """

    name: str
    providers: frozenset[str]

    def reaches(self, provider: str) -> bool:
        """Whether a target at `provider` is one of this channel's."""
        return provider in self.providers


EXTERNAL: Final[dict[str, External]] = {
    one.name: one
    for one in (
        External(PUSH, PUSH_PROVIDERS),
        External("fcm", frozenset(("fcm",))),
        External("apns", frozenset(("apns",))),
    )
}
"""Every external channel by its name."""

CHANNELS: Final = (IN_APP, *EXTERNAL)
assert get_args(ChannelName) == CHANNELS
assert get_args(ExternalName) == tuple(EXTERNAL)


class Choice(NamedTuple):
    """Where a notification begins outside.

    Attributes:
        channels: tried at the same time; empty: nothing leaves the system.
        chain: what follows, one after the other, when all of `channels` ended without success.
        step: 0 if `channels` are those the event asked for, n for its n-th fallback.
    """

    channels: tuple[str, ...]
    chain: tuple[str, ...]
    step: int


NOTHING: Final = Choice((), (), 0)


def choose(asked: Sequence[str] | None, fallback: Sequence[str] | None, providers: Collection[str]) -> Choice:
    """The first channels of an event that have a target.

    With a fallback but no target for any of its channels the whole chain is planned all the same: its end
    is a dead letter that somebody sees.

    Args:
        asked: channels of the event; None is the default, push.
        fallback: what to try then.
        providers: push providers at which the user has a target.
    """
    return _chosen(
        None if asked is None else tuple(asked), tuple(fallback) if fallback else (), frozenset(providers)
    )


@functools.lru_cache(maxsize=1024)
def _chosen(asked: tuple[str, ...] | None, fallback: tuple[str, ...], providers: frozenset[str]) -> Choice:
    """`choose`: most events ask for the same few channels, of users who have the same few providers."""
    first = (PUSH,) if asked is None else _minimal([name for name in asked if name in EXTERNAL])
    steps = [first]
    known = {*first, *(asked or ())}
    for name in fallback:
        if name not in known:
            known.add(name)
            steps.append((name,))
    for index, step in enumerate(steps):
        live = tuple(name for name in step if not EXTERNAL[name].providers.isdisjoint(providers))
        if live:
            return _begin(steps, index, live)
    if not fallback:
        return NOTHING
    index = 0 if first else 1
    return _begin(steps, index, steps[index])


def _begin(steps: Sequence[tuple[str, ...]], index: int, channels: tuple[str, ...]) -> Choice:
    return Choice(channels, tuple(name for step in steps[index + 1 :] for name in step), index)


def _minimal(names: Sequence[str]) -> tuple[str, ...]:
    """Without those that another one covers: nobody gets the same push twice for naming push and fcm."""
    return tuple(
        name
        for name in dict.fromkeys(names)
        if not any(EXTERNAL[name].providers < EXTERNAL[other].providers for other in names)
    )
