"""Sending events: batches, retries of what failed for a while, one result for every event.

Every event carries its own idempotency key from before its first try, so any part of a batch may be sent
again in any company: what was stored is answered with the same id, what was not is stored now (guarantee G2).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from carillon_client.core.codec import decode_json, encode_members, event_members
from carillon_client.core.exchange import Request, Response, RetryPolicy, Step, Wait
from carillon_client.core.problems import error_of_answer, error_of_document, may_have_run, worth_retrying
from carillon_client.errors import (
    CarillonError,
    GaveUpError,
    InvalidRequestError,
    ProblemError,
    TransportError,
    UnexpectedAnswerError,
)
from carillon_client.models import Event, NotSent, Sent

PATH: Final = "/v1/events"
MAX_KEY_CHARS: Final = 255


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of one request; the server's are the defaults (protocol.md, "Limits").

    Attributes:
        max_items: events, or recipients of one event.
        max_bytes: of the body.
    """

    max_items: int = 1000
    max_bytes: int = 8 * 1024 * 1024

    def __post_init__(self) -> None:
        if not 1 <= self.max_items <= 1000:
            raise ValueError(f"expected max_items to be from 1 to 1000, got {self.max_items!r}")
        if self.max_bytes < 1024:
            raise ValueError(f"expected max_bytes to be at least 1024, got {self.max_bytes!r}")


@dataclass(eq=False)
class Item:
    """One event on its way, or one recipient of an event to many.

    Attributes:
        event: as the caller gave it.
        key: its idempotency key.
        user: the recipient; "" if the event names none (the server says what it thinks of that).
        body: its JSON, key included; shared by the recipients of one event.
        deadline: monotonic seconds; no try begins later.
        result: set once, when it is over.
    """

    event: Event | Mapping[str, Any]
    key: str
    user: str
    body: bytes
    deadline: float
    attempts: int = 0
    last: CarillonError | None = None
    maybe_sent: bool = False
    to_many: bool = False
    result: Sent | NotSent | None = None

    def fail(self, error: CarillonError) -> None:
        """It is over, without success."""
        self.result = NotSent(error, self.event, self.key, self.user if self.to_many else None)

    def give_up(self) -> None:
        """No time or tries left."""
        self.fail(GaveUpError(self.attempts, self.last, self.maybe_sent))


def item_of(event: Event | Mapping[str, Any], deadline: float, new_key: Callable[[], str]) -> Item:
    """Prepare one event.

    Raises:
        InvalidRequestError: it cannot be sent in this way at all.
    """
    members = event_members(event)
    if "userIds" in members:
        raise InvalidRequestError(0, "invalid", "an event with userIds goes through send_to")
    key = _key_of(members, new_key)
    user = members.get("userId")
    return Item(event, key, user if isinstance(user, str) else "", encode_members(members), deadline)


def failed_item(event: Any, error: CarillonError) -> Item:
    """An event that could not even be prepared, with its result."""
    key = event.idempotency_key if isinstance(event, Event) else None
    item = Item(event, key or "", "", b"", 0.0)
    item.fail(error)
    return item


def items_to_many(
    users: Iterable[str], event: Event | Mapping[str, Any], deadline: float, new_key: Callable[[], str]
) -> list[Item]:
    """Prepare one event for many recipients; a recipient named twice counts once.

    Raises:
        InvalidRequestError: the event names recipients itself, or is not JSON.
    """
    members = event_members(event)
    if "userId" in members or "userIds" in members:
        raise InvalidRequestError(0, "invalid", "the event of send_to must not name recipients itself")
    key = _key_of(members, new_key)
    body = encode_members(members)
    return [Item(event, key, user, body, deadline, to_many=True) for user in dict.fromkeys(users)]


def _key_of(members: dict[str, Any], new_key: Callable[[], str]) -> str:
    key = members.get("idempotencyKey")
    if key is None:
        key = members["idempotencyKey"] = new_key()
    if not isinstance(key, str) or not 1 <= len(key) <= MAX_KEY_CHARS:
        raise InvalidRequestError(
            0, "invalid", f"expected idempotencyKey to be text of 1-{MAX_KEY_CHARS} characters"
        )
    return key


def batches(items: Sequence[Item], limits: BatchLimits) -> Iterator[list[Item]]:
    """Split in order, each part within the limits; items that have a result are left out."""
    part: list[Item] = []
    size = 2
    for item in items:
        if item.result is not None:
            continue
        cost = item_bytes(item)
        if part and (len(part) >= limits.max_items or size + cost > limits.max_bytes):
            yield part
            part, size = [], 2
        if not part and item.to_many:
            size += len(item.body)
        part.append(item)
        size += cost
    if part:
        yield part


def item_bytes(item: Item) -> int:
    """What the item adds to a body."""
    return (6 * len(item.user) + 3) if item.to_many else len(item.body) + 1


class _Shape(Protocol):
    def body(self, items: Sequence[Item]) -> bytes: ...

    def results(self, document: Any, items: Sequence[Item]) -> list[dict[str, Any]]: ...


class _Batch:
    """An array of events; a single one goes as itself."""

    def body(self, items: Sequence[Item]) -> bytes:
        return items[0].body if len(items) == 1 else b"[" + b",".join(item.body for item in items) + b"]"

    def results(self, document: Any, items: Sequence[Item]) -> list[dict[str, Any]]:
        found = [document] if len(items) == 1 else document["results"]
        if len(found) != len(items):
            raise ValueError(f"expected {len(items)} results, got {len(found)}")
        return found


class _ToMany:
    """One event with `userIds`; its results are found by their `userId`."""

    def body(self, items: Sequence[Item]) -> bytes:
        users = msgspec.json.encode([item.user for item in items])
        return items[0].body[:-1] + b',"userIds":' + users + b"}"

    def results(self, document: Any, items: Sequence[Item]) -> list[dict[str, Any]]:
        by_user = {one["userId"]: one for one in document["results"]}
        return [by_user[item.user] for item in items]


@dataclass
class _Group:
    """Items that travel together. `attempts` counts the tries of this company, for the back-off."""

    items: list[Item]
    attempts: int = 0
    not_before: float = field(default=float("-inf"))


class Delivery:
    """Drives a batch until every item has a result.

    Args:
        items: all `to_many` of one event, or none; within the limits of one request (`batches`).
        chance: gives numbers from 0 to 1.
    """

    def __init__(self, items: Sequence[Item], policy: RetryPolicy, chance: Callable[[], float]) -> None:
        self.items = list(items)
        self._policy = policy
        self._chance = chance
        self._shape: _Shape = _ToMany() if items and items[0].to_many else _Batch()
        self._groups = deque([_Group(list(items))])

    def next(self, now: float) -> Step | None:
        """What to do now; None: every item has a result."""
        while self._groups:
            group = self._groups[0]
            begin = max(now, group.not_before)
            for item in group.items:
                if item.deadline <= begin:
                    item.give_up()
            group.items = [item for item in group.items if item.result is None]
            if not group.items:
                self._groups.popleft()
                continue
            if group.not_before > now:
                return Wait(group.not_before - now)
            group.attempts += 1
            for item in group.items:
                item.attempts += 1
            left_s = max(item.deadline for item in group.items) - now
            timeout_s = min(self._policy.attempt_timeout_s, left_s)
            return Request("POST", PATH, self._shape.body(group.items), timeout_s)
        return None

    def answered(self, now: float, response: Response) -> None:
        """The server answered the request of the last step."""
        group = self._groups.popleft()
        if 200 <= response.status < 300:
            replayed = response.headers.get("idempotent-replayed") == "true"
            try:
                results = self._shape.results(decode_json(response.body), group.items)
                told = [_result(one, item, replayed) for one, item in zip(results, group.items, strict=True)]
            except (msgspec.MsgspecError, KeyError, TypeError, ValueError, AttributeError) as exc:
                self._again(now, group, UnexpectedAnswerError(f"the answer is not as expected: {exc!r}"))
                return
            self._settle(now, group, told)
            return
        error = error_of_answer(response.status, response.headers, response.body)
        if response.status == 413 and len(group.items) > 1:
            # Smaller than we were told: a proxy's bound, or `ingress.max_request_bytes`.
            half = len(group.items) // 2
            self._groups.appendleft(_Group(group.items[half:]))
            self._groups.appendleft(_Group(group.items[:half]))
            return
        self._again(now, group, error)

    def failed(self, now: float, error: TransportError) -> None:
        """Nothing came back for the request of the last step."""
        self._again(now, self._groups.popleft(), error)

    def _settle(self, now: float, group: _Group, told: list[Sent | CarillonError]) -> None:
        again: list[Item] = []
        for item, one in zip(group.items, told, strict=True):
            if isinstance(one, Sent):
                item.result = one
                continue
            item.last = one
            item.maybe_sent = item.maybe_sent or may_have_run(one)
            if worth_retrying(one):
                again.append(item)
            else:
                item.fail(one)
        self._later(now, _Group(again, group.attempts), 1.0)

    def _again(self, now: float, group: _Group, error: CarillonError) -> None:
        for item in group.items:
            item.last = error
            item.maybe_sent = item.maybe_sent or may_have_run(error)
            if not worth_retrying(error):
                item.fail(error)
        group.items = [item for item in group.items if item.result is None]
        self._later(now, group, error.retry_after_s if isinstance(error, ProblemError) else 0.0)

    def _later(self, now: float, group: _Group, retry_after_s: float) -> None:
        if not group.items:
            return
        if group.attempts == self._policy.max_attempts:
            for item in group.items:
                item.give_up()
            return
        group.not_before = now + self._policy.pause_s(group.attempts, retry_after_s, self._chance())
        # To the front: what was given first is sent first.
        self._groups.appendleft(group)


def _result(one: dict[str, Any], item: Item, replayed: bool) -> Sent | CarillonError:
    if "error" in one:
        return error_of_document(one["error"])
    return Sent(
        str(one["id"]),
        int(one["seq"]),
        str(one["status"]),
        tuple(one.get("channels") or ()),
        item.key,
        one.get("reason"),
        item.user if item.to_many else None,
        replayed,
    )
