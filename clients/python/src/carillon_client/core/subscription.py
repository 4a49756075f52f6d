"""The subscriber as a machine: frames in, items and frames out, over any number of connections.

The shell opens sockets and carries bytes. It calls `connecting`, then `receive` for every frame, `tick` when
`wake_at` comes, and `closed`; after each it sends `frames_to_send()` and hands out `take_items()`. The rules
of the position are those of docs/reference/websocket.md, "Position and resume".
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast

import msgspec

from carillon_client.core.closing import Duty, duty_of_close
from carillon_client.core.codec import change_of, notification_of
from carillon_client.core.ledger import Entry, Ledger, moved
from carillon_client.errors import (
    CarillonError,
    OperationError,
    OperationTimeoutError,
    QueueFullError,
    SubscriptionRefusedError,
    TokenExpiredError,
)
from carillon_client.models import Change, Notification, Position, Presentation, Reset

ACK_IDS: Final = 1000
"""Ids in one ACK."""
TOKEN_TRIES: Final = 3
"""New tokens in a row that the server calls expired at once before we stop."""

CHANGES: Final = frozenset(
    {
        "NOTIFICATION_UPDATED", "NOTIFICATIONS_READ", "ALL_NOTIFICATIONS_READ", "NOTIFICATIONS_SEEN",
        "NOTIFICATION_ARCHIVED", "NOTIFICATION_DISMISSED", "NOTIFICATION_CLICKED", "NOTIFICATION_RETRACTED",
        "UNREAD_COUNT", "PRESENCE",
    }
)  # fmt: skip


@dataclass(frozen=True)
class SubscriptionLimits:
    """Durations in seconds and bounds.

    Attributes:
        reconnect_first_s: pause before the first reconnect; doubles up to `reconnect_longest_s`, jittered
            down to half.
        reconnect_longest_s: bound of the doubling.
        welcome_timeout_s: a connection without WELCOME after so long is given up.
        heartbeat_s: silence after which the server is asked (PING); None: what WELCOME says in `heartbeatMs`.
        pong_timeout_s: a connection that stays silent so long after a PING is given up.
        operation_timeout_s: an operation without OK or ERROR fails after so long, reconnects included.
        max_operations: operations without an answer at the same time.
        remembered_ids: notifications that are known again if they come twice.
        ack_linger_s: how long an acknowledgement waits for others; far below the window (5 s) after which a
            push is sent for want of one.
        ack_repeat_s: acknowledgements written so short before the last sign of a connection that ended may be
            lost with it, and are told again on the next; 0: only those written after it.
    """

    reconnect_first_s: float = 1.0
    reconnect_longest_s: float = 30.0
    welcome_timeout_s: float = 15.0
    heartbeat_s: float | None = None
    pong_timeout_s: float = 10.0
    operation_timeout_s: float = 15.0
    max_operations: int = 1000
    remembered_ids: int = 10_000
    ack_linger_s: float = 0.25
    ack_repeat_s: float = 5.0


@dataclass(eq=False)
class Item:
    """Something for the application, in the order received."""

    value: Notification | Change | Reset
    entry: Entry


@dataclass(eq=False)
class Operation:
    """A frame that wants OK or ERROR.

    Attributes:
        outcome: None while open, True for OK, else the error.
    """

    frame: dict[str, Any]
    deadline: float
    repeat: bool = True
    """Whether to send it again on the next connection; every state change may be, states only grow."""
    outcome: bool | CarillonError | None = None
    on_end: Callable[[], None] | None = field(default=None, repr=False)

    def end(self, outcome: bool | CarillonError) -> None:
        """It is over."""
        self.outcome = outcome
        if self.on_end is not None:
            self.on_end()


class Subscription:
    """One user's stream over connections that come and go.

    Args:
        position: where to go on; None: from now.
        ack_on_receipt: acknowledge at once instead of when `done` is called.
        chance: gives numbers from 0 to 1.
    """

    def __init__(
        self,
        position: Position | None,
        limits: SubscriptionLimits,
        chance: Callable[[], float],
        ack_on_receipt: bool = False,
    ) -> None:
        self.limits = limits
        self.ledger = Ledger(position)
        self.welcome: dict[str, Any] | None = None
        """The last WELCOME."""
        self.presentation = Presentation()
        """How the user wants notifications to be shown."""
        self.failures = 0
        """Connections in a row that never got to a WELCOME."""
        self.connections = 0
        """WELCOMEs that began a connection."""
        self._received = position
        self._chance = chance
        self._ack_on_receipt = ack_on_receipt
        self._asked = False
        self._asked_position: Position | None = None
        self._live = False
        self._out: deque[dict[str, Any]] = deque()
        self._items: deque[Item] = deque()
        self._known: OrderedDict[str, Entry] = OrderedDict()
        self._acks: dict[str, int] = {}  # id -> the newest `rev` of it that is processed
        self._revs: OrderedDict[str, int] = OrderedDict()  # id -> the newest received
        self._newest = 0  # of all of them, on this connection
        self._ack_at: float | None = None
        self._told: deque[tuple[float, str, int]] = deque(
            maxlen=ACK_IDS
        )  # when, id, rev: what was written last
        self._operations: dict[int, Operation] = {}
        self._next_ref = 1
        self._visibility: dict[str, Any] | None = None
        self._watched: dict[str, dict[str, Any]] = {}
        self._heard_at = 0.0
        self._pinged_at: float | None = None
        self._token_refusals = 0
        self._opened_at: float | None = None

    # -- connections --------------------------------------------------------------------------------

    def connecting(self, now: float) -> dict[str, str]:
        """A connection begins; returns the position as query members of its URL."""
        self._out.clear()
        # What the last one was told at its end may never have arrived, and nothing would bring it again.
        since = self._heard_at - self.limits.ack_repeat_s
        for told_at, id, rev in self._told:
            if told_at >= since:
                self._acks[id] = max(rev, self._acks.get(id, 0))
        self._told.clear()
        if self._acks and self._ack_at is None:
            self._ack_at = now
        self._newest = 0
        self._live = False
        self._heard_at = now
        self._pinged_at = None
        self._asked_position = self._received
        self._asked = self._received is not None
        if self._received is None:
            return {}
        query = {"epoch": self._received.epoch, "lastSeq": str(self._received.last_seq)}
        if self._received.last_rev is not None:
            query["lastRev"] = str(self._received.last_rev)
        return query

    def opened(self, now: float) -> None:
        """The handshake is over: WELCOME is due."""
        self._opened_at = now

    def closed(self, code: int | None, reason: str = "", can_renew: bool = True) -> float:
        """The connection ended, or never came to be (code None). Returns seconds until the next.

        Args:
            can_renew: whether a new token can be had.

        Raises:
            SubscriptionRefusedError: the code means stop.
            TokenExpiredError: a new token is wanted and cannot be had, or new ones are called expired, too.
        """
        welcomed, self._live = self._live, False
        self._opened_at = None
        self._out.clear()
        for ref, operation in list(self._operations.items()):
            if not operation.repeat:
                del self._operations[ref]
                operation.end(OperationTimeoutError("the connection ended before the answer"))
        if welcomed:
            self.failures = self._token_refusals = 0
        duty = duty_of_close(code)
        if duty is Duty.STOP:
            assert code is not None
            raise SubscriptionRefusedError(code, reason)
        if duty is Duty.NEW_TOKEN:
            self._token_refusals += 1
            if not can_renew:
                raise TokenExpiredError(
                    "the token expired: give a callable as token, and it is asked for a new one"
                )
            if self._token_refusals > TOKEN_TRIES:
                raise TokenExpiredError(f"{TOKEN_TRIES} new tokens in a row were called expired")
            if self._token_refusals == 1:
                return 0.0
        self.failures += 1
        base = self.limits.reconnect_first_s * 2.0 ** min(self.failures - 1, 30)
        return min(self.limits.reconnect_longest_s, base) * (0.5 + 0.5 * self._chance())

    def stop(self, error: CarillonError) -> None:
        """Nothing follows: open operations fail with `error`."""
        operations, self._operations = self._operations, {}
        for operation in operations.values():
            operation.end(error)

    # -- frames in ----------------------------------------------------------------------------------

    def receive(self, frame: Any, now: float) -> None:
        """One frame of the present connection. Unknown types and malformed frames are passed over."""
        self._heard_at = now
        self._pinged_at = None
        if not isinstance(frame, dict):
            return
        frame = cast("dict[str, Any]", frame)
        kind: Any = frame.get("type")
        try:
            if kind == "WELCOME":
                self._welcome(frame)
            elif kind == "NEW_NOTIFICATION":
                self._notification(notification_of(frame["notification"]), now)
            elif kind in CHANGES:
                self._change(change_of(frame), now)
            elif kind == "PRESENTATION":
                self.presentation = msgspec.convert(frame, Presentation)
            elif kind in ("OK", "ERROR"):
                self._answer(frame)
        except (KeyError, TypeError, ValueError, AttributeError, msgspec.MsgspecError):
            # A frame of another version must not end the stream; the next one's position passes it.
            return

    def _welcome(self, frame: dict[str, Any]) -> None:
        recovered = frame["recovered"]
        members = {"epoch": frame["epoch"], "lastSeq": frame["lastSeq"], "lastRev": frame["rev"]}
        head = msgspec.convert(members, Position)
        self.welcome = frame
        first = not self._live
        self._live = True
        if first:
            self.presentation = Presentation()  # what is as ever is not told
        if recovered is None and self._asked:
            pass  # the answer to our position is still to come
        elif recovered is True:
            self._asked = False
            if self._received is not None and self._received.last_rev is None:
                self._received = moved(self._received, None, head.last_rev)
                self.ledger.add(Entry(rev=head.last_rev, done=True))
        else:
            # Without a position this is where we begin; with one, what lies between cannot be had from here.
            before, self._asked, self._received = self._asked_position, False, head
            entry = self.ledger.add(Entry(reset=head, done=before is None))
            if before is not None:
                self._items.append(Item(Reset(head, before), entry))
        if first:
            self.connections += 1
            self._out.append(
                {"type": "PING"}
            )  # the first frame: what waits for a RESUME need not wait longer
            self._out.extend(frame for frame in (self._visibility, *self._watched.values()) if frame)
            self._out.extend(operation.frame for operation in self._operations.values())

    def _showing(self, notification: Notification) -> None:
        """One was received: what is processed of it until its turn comes is not all there is of it."""
        self._newest = max(self._newest, notification.rev)
        self._revs[notification.id] = max(notification.rev, self._revs.pop(notification.id, 0))
        if len(self._revs) > self.limits.remembered_ids:
            self._revs.popitem(last=False)

    def _notification(self, notification: Notification, now: float) -> None:
        self._showing(notification)
        known = self._known.get(notification.id)
        if known is not None:
            self._known.move_to_end(notification.id)
            if known.done:
                self._ack(notification, now)  # its acknowledgement was lost, else it would not come again
        else:
            entry = Entry(seq=None if self._asked else notification.seq)
            self._known[notification.id] = entry
            if len(self._known) > self.limits.remembered_ids:
                self._known.popitem(last=False)
            self.ledger.add(entry)
            self._items.append(Item(notification, entry))
            if self._ack_on_receipt:
                self._ack(notification, now)
        if not self._asked and self._received is not None:
            if known is not None and notification.seq > self._received.last_seq:
                self.ledger.add(Entry(seq=notification.seq, done=True))
            self._received = moved(self._received, notification.seq, None)

    def _change(self, change: Change, now: float) -> None:
        entry = self.ledger.add(Entry(rev=None if self._asked else change.rev))
        self._items.append(Item(change, entry))
        if change.notification is not None:
            self._showing(change.notification)
            if self._ack_on_receipt:
                self._ack(change.notification, now)
        if not self._asked and self._received is not None:
            self._received = moved(self._received, None, change.rev)

    def _answer(self, frame: dict[str, Any]) -> None:
        operation = self._operations.pop(frame["id"], None)
        if operation is None:
            return
        if frame["type"] == "OK":
            operation.end(True)
        else:
            operation.end(
                OperationError(
                    str(frame.get("code", "")), str(frame.get("message", "")), frame.get("temporary") is True
                )
            )

    # -- what the application does ------------------------------------------------------------------

    def take_items(self) -> list[Item]:
        """What arrived since the last call, in order."""
        items, self._items = list(self._items), deque()
        return items

    def done(self, item: Item, now: float) -> None:
        """The application is through with an item.

        The position may pass it, a notification is acknowledged.
        """
        if not item.entry.done:
            self.ledger.done(item.entry)
            shown = _shown(item.value)
            if shown is not None and not self._ack_on_receipt:
                self._ack(shown, now)

    def _ack(self, shown: Notification, now: float) -> None:
        self._acks[shown.id] = max(shown.rev, self._acks.get(shown.id, 0))
        if self._ack_at is None:
            self._ack_at = now + self.limits.ack_linger_s

    def operate(self, frame: dict[str, Any], now: float, *, repeat: bool = True) -> Operation:
        """Send a frame that is answered by OK or ERROR, now or as soon as there is a connection.

        Raises:
            QueueFullError: `max_operations` are open.
        """
        if len(self._operations) >= self.limits.max_operations:
            raise QueueFullError(f"{self.limits.max_operations} operations are without an answer")
        ref, self._next_ref = self._next_ref, self._next_ref + 1
        operation = Operation({**frame, "id": ref}, now + self.limits.operation_timeout_s, repeat)
        self._operations[ref] = operation
        if self._live:
            self._out.append(operation.frame)
        return operation

    def set_visibility(self, frame: dict[str, Any]) -> None:
        """Remember what to say on every further connection."""
        self._visibility = frame

    def watch(self, name: str, frame: dict[str, Any] | None) -> None:
        """Remember (None: forget) a frame to send on every further connection."""
        self._watched.pop(name, None)
        if frame is not None:
            self._watched[name] = frame

    @property
    def operations(self) -> int:
        """Operations without an answer."""
        return len(self._operations)

    @property
    def received_seq(self) -> int | None:
        """The last `seq` received (or given as position); None before the first WELCOME."""
        return None if self._received is None else self._received.last_seq

    @property
    def live(self) -> bool:
        """Whether there is a connection that was welcomed."""
        return self._live

    # -- frames out, time ---------------------------------------------------------------------------

    def frames_to_send(self, now: float, flush: bool = False) -> list[dict[str, Any]]:
        """What to write now, in order. Acknowledgements wait `ack_linger_s` for company unless `flush`."""
        if not self._live:
            return []
        if self._acks and self._ack_at is not None and (flush or now >= self._ack_at):
            whole = [id for id, rev in self._acks.items() if rev >= self._revs.get(id, 0)]
            for start in range(0, len(whole), ACK_IDS):
                ids = whole[start : start + ACK_IDS]
                rev = max(self._newest, *(self._acks[id] for id in ids))
                self._out.append({"type": "ACK", "notificationIds": ids, "rev": rev})
            for id in self._acks.keys() - set(whole):  # an update of it was received and is not processed yet
                self._out.append({"type": "ACK", "notificationId": id, "rev": self._acks[id]})
            self._told.extend((now, id, rev) for id, rev in self._acks.items())
            self._acks.clear()
            self._ack_at = None
        frames, self._out = list(self._out), deque()
        return frames

    def wake_at(self) -> float | None:
        """When `tick` and `frames_to_send` are to be called at the latest; None: not by time."""
        times = [operation.deadline for operation in self._operations.values()]
        if self._live and self._ack_at is not None:
            times.append(self._ack_at)
        if self._pinged_at is not None:
            times.append(self._pinged_at + self.limits.pong_timeout_s)
        elif self._live:
            times.append(self._heard_at + self._heartbeat_s())
        elif self._opened_at is not None:
            times.append(self._opened_at + self.limits.welcome_timeout_s)
        return min(times, default=None)

    def tick(self, now: float, reading: bool = True) -> bool:
        """Time passed. Returns False if the connection is dead and is to be abandoned.

        Args:
            reading: False while the shell does not read because its queue is full: then silence says nothing.
        """
        for ref, operation in list(self._operations.items()):
            if operation.deadline <= now:
                del self._operations[ref]
                operation.end(OperationTimeoutError(f"no answer to {operation.frame['type']} in time"))
        if not reading:
            self._heard_at, self._pinged_at = now, None
            self._opened_at = None if self._opened_at is None else now
            return True
        if not self._live:
            return self._opened_at is None or now < self._opened_at + self.limits.welcome_timeout_s
        if self._pinged_at is not None:
            return now < self._pinged_at + self.limits.pong_timeout_s
        if now >= self._heard_at + self._heartbeat_s():
            self._pinged_at = now
            self._out.append({"type": "PING"})
        return True

    def _heartbeat_s(self) -> float:
        if self.limits.heartbeat_s is not None:
            return self.limits.heartbeat_s
        told = (self.welcome or {}).get("heartbeatMs")
        return max(1.0, told / 1000) if isinstance(told, int | float) else 25.0


def _shown(value: Notification | Change | Reset) -> Notification | None:
    """What an item shows: a notification, or the new form of one, which is acknowledged like a new one."""
    if isinstance(value, Change):
        return value.notification
    return value if isinstance(value, Notification) else None
