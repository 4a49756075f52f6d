"""A history, sorted by what it is about: users, connections, notifications, pushes. Pure."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.history import Record


@dataclass
class Accepted:
    """An event that was answered with 202, and by which try."""

    id: str
    seq: int
    user: str
    label: str
    key: str | None
    channels: list[str]
    record: Record


@dataclass
class Connection:
    """One WebSocket connection, as its client saw it."""

    number: int
    user: str
    device: str
    dialled: Record
    events: list[Record] = field(default_factory=list)
    """welcome, receive, state, ack, in order."""
    closed: Record | None = None


@dataclass
class Fault:
    """A fault from its injection to the recovery."""

    number: int
    name: str
    detail: str
    start: float
    healed: float | None = None
    recovered: float | None = None

    @property
    def end(self) -> float:
        """When the system worked again as far as the run saw; infinity if it did not."""
        if self.recovered is not None:
            return self.recovered
        return float("inf")


class Facts:
    """What a history says.

    Args:
        records: the history, in order.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.run: Record = {"bounds": {}, "targets": {}, "seed": None, "wall0": 0.0}
        self.end = 0.0
        self.publishes: list[Record] = []
        self.conflicts: list[Record] = []
        self.accepted: list[Accepted] = []
        self.offered: dict[str, list[Record]] = collections.defaultdict(list)
        """Every try of a label."""
        self.connections: dict[int, Connection] = {}
        self.devices: dict[str, list[Connection]] = collections.defaultdict(list)
        """Connections of a device, in order."""
        self.standing: dict[str, Record] = {}
        self.reads: list[Record] = []
        self.feeds: list[Record] = []
        self.presences: list[Record] = []
        self.pushes: dict[str, list[Record]] = collections.defaultdict(list)
        self.faults: list[Fault] = []
        self.streams: dict[str, Record] = {}
        self.rows: dict[str, Record] = {}
        self.rows_of: dict[str, list[Record]] = collections.defaultdict(list)
        self.twice: list[Record] = []
        """Rows whose id another row has."""
        self.deliveries: dict[str, list[Record]] = collections.defaultdict(list)
        self.attempts: dict[int, list[Record]] = collections.defaultdict(list)
        self.acked: dict[str, float] = {}
        """id -> first time a device sent an acknowledgement of it."""
        self.read_asked: dict[str, float] = {}
        """id -> first time somebody asked for it to be read."""
        for record in records:
            self.end = max(self.end, record.get("end", record.get("t", 0.0)) or 0.0)
            handler = getattr(self, f"_{record['op']}", None)
            if handler is not None:
                handler(record)

    def bound(self, name: str, default: float) -> float:
        """A bound of the run, in seconds."""
        return float(self.run["bounds"].get(name, default))

    def has_push(self, user: str) -> bool:
        """Whether the user has a push target (registered before the load, for the whole run)."""
        return bool(self.run["targets"].get(user))

    # -- by op ------------------------------------------------------------------------------------------

    def _run(self, record: Record) -> None:
        self.run = record

    def _publish(self, record: Record) -> None:
        self.publishes.append(record)
        for index, (user, label, key) in enumerate(record["items"]):
            self.offered[label].append(record)
            results: list[Any] = record.get("results") or []
            if index < len(results) and results[index].get("id"):
                result = results[index]
                channels = result.get("channels") or []
                self.accepted.append(
                    Accepted(result["id"], result["seq"], user, label, key, channels, record)
                )

    def _conflict(self, record: Record) -> None:
        self.conflicts.append(record)

    def _dial(self, record: Record) -> None:
        connection = Connection(record["conn"], record["user"], record["device"], record)
        self.connections[record["conn"]] = connection
        self.devices[record["device"]].append(connection)

    def _on_connection(self, record: Record) -> None:
        self.connections[record["conn"]].events.append(record)

    _welcome = _receive = _state = _on_connection

    def _ack(self, record: Record) -> None:
        connection = self.connections[record["conn"]]
        connection.events.append(record)
        ids = record.get("ids")
        if ids is None:
            upto = record["seq"]
            ids = [e["id"] for e in connection.events if e["op"] == "receive" and e["seq"] <= upto]
        for one in ids:
            self.acked.setdefault(one, record["t"])

    def _closed(self, record: Record) -> None:
        self.connections[record["conn"]].closed = record

    def _read(self, record: Record) -> None:
        self.reads.append(record)
        for one in record["ids"]:
            self.read_asked.setdefault(one, record["start"])

    def _feed(self, record: Record) -> None:
        self.feeds.append(record)

    def _presence(self, record: Record) -> None:
        self.presences.append(record)

    def _push(self, record: Record) -> None:
        self.pushes[record["id"]].append(record)

    def _fault(self, record: Record) -> None:
        self.faults.append(Fault(record["number"], record["name"], record["detail"], record["t"]))

    def _healed(self, record: Record) -> None:
        self._fault_of(record).healed = record["t"]

    def _recovered(self, record: Record) -> None:
        self._fault_of(record).recovered = record["t"]

    def _fault_of(self, record: Record) -> Fault:
        return next(fault for fault in self.faults if fault.number == record["number"])

    def _device(self, record: Record) -> None:
        self.standing[record["device"]] = record

    def _stream(self, record: Record) -> None:
        self.streams[record["user"]] = record

    def _row(self, record: Record) -> None:
        if record["id"] in self.rows:
            self.twice.append(record)
        self.rows[record["id"]] = record
        self.rows_of[record["user"]].append(record)

    def _delivery(self, record: Record) -> None:
        if record["channel"] != "push":
            return
        self.deliveries[record["notification"]].append(record)

    def _attempt(self, record: Record) -> None:
        self.attempts[record["delivery"]].append(record)

    # -- derived ----------------------------------------------------------------------------------------

    def quiet_between(self, start: float, end: float) -> bool:
        """True if no fault was under way at any time in between."""
        return not any(fault.start < end and fault.end > start for fault in self.faults)

    def deadline(self, ready: float, bound_s: float) -> float:
        """`bound_s` after `ready`, or after the recovery from the last fault that fell into the wait."""
        deadline = ready + bound_s
        for fault in sorted(self.faults, key=lambda fault: fault.start):
            if fault.start <= deadline and fault.end > ready:
                deadline = max(deadline, fault.end + bound_s)
        return deadline
