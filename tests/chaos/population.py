"""Who lives in the system under test: users by habit, with devices and push targets. Drawn from the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.plant import TENANT


@dataclass(frozen=True)
class Habit:
    """How the devices of a user behave."""

    ack: str = "now"
    """now, late (after the acknowledgement window, sometimes) or never (deaf)."""
    leaves: bool = False
    """Drops its connection again and again, in every way there is, and comes back."""
    attention: str = "visible"
    """What its devices tell: visible, hidden, or wander: another state now and then."""
    ghost: bool = False
    """At the end of the run it vanishes without a word: half-open for good."""
    streams: bool = False
    """Its devices use event streams instead of WebSockets."""
    slow: bool = False
    """Reads slowly."""
    reads: float = 0.0
    """Share of what it receives that it marks read."""


@dataclass
class Person:
    """A user."""

    user: str
    habit: Habit
    devices: list[str] = field(default_factory=list)
    """Devices that connect."""
    targets: list[tuple[str, str, str]] = field(default_factory=list)
    """(provider, target, device id) of push targets."""


def people(rng: random.Random, scale: int = 1) -> list[Person]:
    """The users of a run; `scale` times each kind."""
    found: list[Person] = []

    def add(kind: str, count: int, habit: Habit, devices: int, push: str) -> None:
        for index in range(count * scale):
            # Random names: CRC-32 may put a short run of numbers into one half of the slots.
            name = f"{kind}-{rng.randrange(16**8):08x}"
            person = Person(name, habit)
            person.devices = [f"{name}-d{number}" for number in range(devices)]
            kinds = {"both": ["fcm", "apns"], "one": [("fcm", "apns")[index % 2]], "none": []}[push]
            for provider in kinds:
                token = f"{rng.randrange(16**64):064x}"
                person.targets.append((provider, token, f"{name}-{provider}"))
            found.append(person)

    add("steady", 5, Habit(reads=0.05), 1, "one")
    add("two", 3, Habit(reads=0.05), 2, "one")
    add("quiet", 2, Habit(), 1, "none")
    add("late", 2, Habit(ack="late"), 1, "one")
    add("deaf", 2, Habit(ack="never"), 1, "one")
    add("hidden", 1, Habit(attention="hidden"), 1, "one")
    add("wander", 2, Habit(attention="wander", reads=0.05), 1, "one")
    add("slow", 1, Habit(slow=True), 1, "none")
    add("ghost", 1, Habit(ghost=True), 1, "one")
    add("leaver", 4, Habit(leaves=True, reads=0.02), 1, "one")
    add("stream", 3, Habit(streams=True), 1, "one")
    add("restless", 1, Habit(streams=True, leaves=True), 1, "one")
    add("away", 4, Habit(), 0, "one")
    add("away2", 1, Habit(), 0, "both")
    add("feed", 2, Habit(), 0, "none")
    return found


def target_body(provider: str, token: str) -> dict[str, Any]:
    """The body of PUT /v1/users/{userId}/devices/{deviceId}."""
    platform = {"fcm": "android", "apns": "ios"}[provider]
    return {"platform": platform, "provider": provider, "token": token}


def claims(user: str, now_s: float) -> dict[str, Any]:
    """Claims of a client token."""
    return {"sub": user, "tenant": TENANT, "exp": int(now_s) + 7200}
