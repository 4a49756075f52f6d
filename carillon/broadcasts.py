"""Broadcasts: one event to many users, slot by slot, behind the single events. Pure.

A broadcast walks its audience slot by slot, each in the order of its users; what each page made and where the
page ended are written together, so that whoever goes on does so exactly there. The id of each notification
follows from broadcast and user: what is stored can be asked for, whoever stored it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from carillon.audience import Audience, AudienceError, audience_json, parse_audience
from carillon.event_rules import MAX_ITEMS, TEXTS, is_array, is_object, text_error, tree_errors
from carillon.ids import SLOTS, slot_of
from carillon.problems import FieldError, shown

SCHEDULED: Final = "scheduled"
RUNNING: Final = "running"
PAUSED: Final = "paused"
DONE: Final = "done"
CANCELLED: Final = "cancelled"
FAILED: Final = "failed"
STATES: Final = (SCHEDULED, RUNNING, PAUSED, DONE, CANCELLED, FAILED)
ENDED: Final = frozenset((DONE, CANCELLED, FAILED))

PAUSE: Final = "pause"
RESUME: Final = "resume"
CANCEL: Final = "cancel"
ACTIONS: Final[dict[str, tuple[str, frozenset[str]]]] = {
    PAUSE: (PAUSED, frozenset((SCHEDULED, RUNNING))),
    RESUME: (RUNNING, frozenset((PAUSED,))),
    CANCEL: (CANCELLED, frozenset((SCHEDULED, RUNNING, PAUSED))),
}
"""Action -> (the state it leads to, the states it starts from)."""


def after(state: str, action: str, started: bool) -> str | None:
    """The state after an action; None: the broadcast has ended otherwise.

    Args:
        started: it has been running before. What never ran waits for its time again when it is resumed.

    Idempotency: an action whose effect is there already leaves the state as it is.
    """
    goal, sources = ACTIONS[action]
    if state in sources:
        return SCHEDULED if goal == RUNNING and not started else goal
    if state == goal or (action == RESUME and state == SCHEDULED):
        return state
    return None


# -- whom it is for ---------------------------------------------------------------------------------------


class Recipients(NamedTuple):
    """Whom a broadcast is for: an audience, or users by name.

    Attributes:
        audience: None with a list.
        users: the list, each user once; empty with an audience.
    """

    audience: Audience | None
    users: tuple[str, ...] = ()

    def json(self) -> Any:
        """As JSON; `parse_recipients` reads it back."""
        return {"userIds": list(self.users)} if self.audience is None else audience_json(self.audience)


def parse_recipients(value: Any) -> Recipients:
    """Whom the `audience` of a broadcast means: all, a topic, a segment, or a list of users.

    Raises:
        AudienceError: it means nobody.
    """
    if is_object(value) and "userIds" in value:
        others = [FieldError(f"audience/{shown(n)}", "absent beside userIds", "present") for n in value]
        if len(others) > 1:
            raise AudienceError([one for one in others if one.path != "audience/userIds"])
        return Recipients(None, _users(value["userIds"], "audience/userIds"))
    if is_array(value):
        return Recipients(None, _users(value, "audience"))
    return Recipients(parse_audience(value))


def _users(value: Any, path: str) -> tuple[str, ...]:
    if not is_array(value) or not 1 <= len(value) <= MAX_ITEMS:
        got = f"{len(value)} users" if is_array(value) else shown(value)
        raise AudienceError([FieldError(path, f"an array of 1 to {MAX_ITEMS} user ids", got)])
    errors = [
        error
        for index, user in enumerate(value)
        if (error := text_error(f"{path}/{index}", user, TEXTS["userId"])) is not None
    ]
    errors += tree_errors(value, path)
    if errors:
        raise AudienceError(errors[:10])
    return tuple(dict.fromkeys(value))


def members(
    tenant: str, users: Sequence[str], slots: Sequence[tuple[int, str]], limit: int
) -> list[SlotUser]:
    """The page of a list: its users in `slots`, as `stores.postgres.broadcasts` pages through an audience."""
    by_slot: dict[int, list[str]] = {}
    for user in users:
        by_slot.setdefault(slot_of(tenant, user), []).append(user)
    found: list[SlotUser] = []
    for slot, last in slots:
        found += [SlotUser(slot, user) for user in sorted(by_slot.get(slot, ())) if user > last]
        if len(found) >= limit:
            break
    return found[:limit]


# -- ids --------------------------------------------------------------------------------------------------


class NotificationIds:
    """The ids of a broadcast's notifications: UUIDv7 of the moment it began, of the broadcast, of the user.

    62 bits are a hash of the user: that two of ten million users share an id happens once in 90,000
    broadcasts, and the second of them is told among the failures.
    """

    def __init__(self, broadcast: bytes, started_ms: int) -> None:
        self.started_ms = started_ms
        self._hash = hashlib.blake2b(broadcast, digest_size=8)
        part = int.from_bytes(broadcast[6:8]) & 0xFFF
        self._head = (started_ms << 80) | (0x7 << 76) | (part << 64) | (0b10 << 62)

    def of(self, user: str) -> bytes:
        """The id of the notification for one user."""
        digest = self._hash.copy()
        digest.update(user.encode())
        rest = int.from_bytes(digest.digest()) & 0x3FFF_FFFF_FFFF_FFFF
        return (self._head | rest).to_bytes(16)

    def bounds(self) -> tuple[bytes, bytes]:
        """The least and the greatest id there may be."""
        return self._head.to_bytes(16), (self._head | 0x3FFF_FFFF_FFFF_FFFF).to_bytes(16)


# -- walking ----------------------------------------------------------------------------------------------


class SlotUser(NamedTuple):
    """One user of a page."""

    slot: int
    user: str


class Mark(NamedTuple):
    """How far a slot has come."""

    slot: int
    last: str
    """The last user that was looked after, "" for none."""
    done: bool


def walked(
    pending: Sequence[tuple[int, str]], page: Sequence[SlotUser], limit: int
) -> tuple[list[Mark], list[tuple[int, str]]]:
    """What a page means for the slots it was asked of.

    Args:
        pending: the slots asked for, in that order, each with its last user before.
        page: the users found, in the order of `pending` and within a slot in the order of users.
        limit: of the page: a full one may end within a slot.

    Returns:
        Marks of the slots that moved on, and what is pending then.

    Raises:
        ValueError: the page is not in order. To go on would leave users out.
    """
    last: dict[int, str] = {}
    at = 0
    for slot, user in page:
        while pending[at][0] != slot:
            at += 1
            if at == len(pending):
                raise ValueError(f"a page of a broadcast is not in order: slot {slot} came late")
        last[slot] = user
    if len(page) < limit:
        return [Mark(slot, last.get(slot, before), True) for slot, before in pending], []
    marks = [Mark(slot, last.get(slot, before), True) for slot, before in pending[:at]]
    slot = pending[at][0]
    marks.append(Mark(slot, last[slot], False))
    return marks, [(slot, last[slot]), *pending[at + 1 :]]


# -- progress ---------------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """What became of users so far."""

    stored: int = 0
    """Notifications stored; each has one of the next four outcomes, or stays in the feed."""
    delivered: int = 0
    queued: int = 0
    deferred: int = 0
    suppressed: int = 0
    failed: int = 0

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def counted(statuses: Sequence[str], failed: int = 0) -> Counts:
    """The counts of notifications with these routing outcomes."""
    return Counts(
        len(statuses),
        statuses.count("delivered"),
        statuses.count("queued"),
        statuses.count("deferred"),
        statuses.count("suppressed"),
        failed,
    )


class Progress(NamedTuple):
    """How far a broadcast is.

    Attributes:
        done: users looked after.
        total: users there are, about; never less than `done`. None: not known yet.
        rate_per_s: users a second while it ran; None before the first.
        remaining_s: what is left at that rate; None: not known. 0 once it has ended.
    """

    done: int
    total: int | None
    rate_per_s: float | None
    remaining_s: float | None


def progress(state: str, counts: Counts, total: int | None, ran_ms: int) -> Progress:
    """The progress from what is kept.

    Args:
        total: the estimate.
        ran_ms: how long it has been running, pauses left out.
    """
    done = counts.stored + counts.failed
    known = done if state == DONE else None if total is None else max(total, done)
    rate = done * 1000 / ran_ms if ran_ms > 0 and done else None
    if state in ENDED:
        return Progress(done, known, rate, 0.0)
    if known is None or rate is None:
        return Progress(done, known, rate, None)
    return Progress(done, known, rate, (known - done) / rate)


SAMPLED_SLOTS: Final = 16
EXACT_BELOW: Final = 2000
"""So many users in the sampled slots are counted on: with more, all slots hold about as many."""


def estimated(sampled: int) -> int:
    """About how many users there are, from those in `SAMPLED_SLOTS` slots: users are spread by a hash."""
    return sampled * SLOTS // SAMPLED_SLOTS


# -- the lane ---------------------------------------------------------------------------------------------


def next_size(size: int, took_ms: float, target_ms: float, low: int, high: int) -> int:
    """How many users the next chunk holds, so that it takes about `target_ms`.

    It grows by a half at most and shrinks by a half at most: one slow commit says little.
    """
    wanted = size * target_ms / took_ms if took_ms > 0 else high
    return round(min(max(min(max(wanted, size / 2), size * 1.5 + 1), low), high))


def pause_ms(took_ms: float, share: float) -> float:
    """How long the lane rests after a chunk, to have no more than its share of the time.

    Args:
        share: 0 < share <= 1; 1 is no rest.
    """
    return took_ms * (1 - share) / share


def lane_turn(queued: int, waited_ms: float, most_ms: float) -> bool:
    """Whether the lane may write now: nothing single waits, or it has waited long enough."""
    return queued == 0 or waited_ms >= most_ms
