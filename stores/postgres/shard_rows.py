"""What goes into and comes out of a shard's store: rows to write, records as read, what may be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from carillon.errors import InvalidInputError
from carillon.ids import UserKey
from carillon.merge_begun import Begun
from carillon.messages import Event, Outcome, PushTarget
from carillon.notification import NotificationRow
from stores.postgres.named import load_queries


def _ms(column: str) -> str:
    return f"(extract(epoch from n.{column}) * 1000)::bigint"


ROW: Final = "n.id, n.seq, n.rev, n.position, n.content, " + ", ".join(
    _ms(name)
    for name in (
        "delivered_at", "seen_at", "read_at", "clicked_at", "dismissed_at", "archived_at", "retracted_at",
        "updated_at", "expires_at",
    )
)  # fmt: skip
"""Columns of `row_of`, of a table named n."""


def with_rows(file: str) -> dict[str, str]:
    """The queries of `queries/<file>.sql` by name, with `ROW` where they say %(row)s."""
    return {name: text.replace("%(row)s", ROW) for name, text in load_queries(file).items()}


def row_of(record: Any) -> NotificationRow:
    """A NotificationRow of a record selected with `ROW`."""
    raw, *rest = record
    return NotificationRow(raw.bytes, *rest)


@dataclass(slots=True)
class UserRecord:
    """A user's stream and push targets as loaded."""

    key: UserKey
    stream_id: int
    epoch: str
    seq: int
    rev: int
    unread: int
    """As the stream's row counts; expired rows included."""
    expired: int
    """How many of `unread` had expired when loaded: they are not shown."""
    last_seen_ms: int | None
    valid_from_ms: int | None
    """Tokens issued before are revoked."""
    revoked: list[bytes]
    """Tokens that were logged out."""
    targets: list[PushTarget] = field(default_factory=list)
    preferences: str | None = None
    """The preferences document, None if the user stored none."""
    invisible_since_ms: int | None = None
    """Since when the user wants to be seen as offline; None: it does not."""
    zone: str | None = None
    """Time zone of the user's profile."""
    next_expiry_ms: int | None = None
    """When the next unread row expires; None: none will."""
    pruned_seq: int = 0
    """Notifications up to here may be gone from the tables (retention)."""
    pruned_rev: int = 0
    """Changes up to here may be gone."""


@dataclass(slots=True)
class AppendRow:
    """One notification to append. `back` counts from the last of its stream in the batch (0 = last)."""

    event: Event
    stream_id: int
    back: int = 0
    decision: str | None = None
    """The rules that fired (carillon.decision.pack)."""
    archived: bool = False
    """The user wants nothing of it in the app: filed away from the first, and not counted as unread."""
    priority: int | None = None
    """With the user's override; None: the event's."""
    receipt: int | None = None
    """How the user was reached (carillon.explain.receipt_of)."""
    begun: Begun | None = None
    """The windows of merging that it begins and that have no rows of their own."""
    kept: str | None = None
    """Its push, if that is no row of the outbox yet (carillon/kept_push.py)."""


@dataclass(slots=True)
class OutboxRow:
    """One outbox row to append with its notification."""

    id: int
    notification: bytes
    stream_id: int
    slot: int
    claimed: bool
    """True: born "sending" under a lease that ends at `due_ms`; False: "planned", due at `due_ms`."""
    due_ms: int
    gate: str | None = None
    """What an acknowledgement does to it (carillon/attention.py)."""
    hold_until_ms: int | None = None
    reason: str | None = None
    channel: str = "push"
    chain: str = ""
    """Channels that follow, joined by commas."""
    step: int = 0
    digest: bytes | None = None
    """The digest it waits in."""


class MergedInto(NamedTuple):
    """What became of an event that is no notification of its own."""

    notification: bytes
    stream_id: int
    status: str
    """merged | duplicate."""
    seq: int
    """Of the notification."""

    def outcome(self) -> Outcome:
        """The answer to the event."""
        return Outcome(self.notification, self.seq, self.status)


@dataclass(slots=True)
class StoredKey:
    """What an idempotency key stands for."""

    body_hash: bytes
    notification: bytes
    seq: int | None
    """None if the notification itself is gone (pruned)."""
    merged: MergedInto | None = None
    """The event was merged: what it became part of."""


@dataclass(slots=True)
class ChangeDone:
    """What a change did to one stream."""

    rev: int
    unread: int
    ids: list[bytes]
    changed: int
    withdrawn: int = 0
    """Pushes that are to be taken back from phones, and such as take over from one that ended: due now."""


@dataclass(slots=True)
class ToldItem:
    """One of the newest items of a digest that is told."""

    notification: bytes
    type: str
    content: str
    """"" for all but the newest."""
    expires_ms: int | None
    shown_on: Sequence[str] = ()
    """Devices that have shown the socket copy."""


@dataclass(slots=True)
class Claimed:
    """A claimed outbox row with all a push needs."""

    delivery: int
    attempt: int
    slot: int
    key: UserKey
    unread: int
    notification: bytes
    seq: int
    type: str
    priority: int
    content: str
    expires_ms: int | None
    sent_to: list[str]
    gate: str | None = None
    acknowledged: bool = False
    """Some device has it."""
    hold_until_ms: int = 0
    shown_on: Sequence[str] = ()
    """Devices that have shown the socket copy."""
    channel: str = "push"
    chain: str = ""
    step: int = 0
    since_ms: int = 0
    """When the row was planned, or last replayed."""
    base_attempt: int = 0
    """Tries before that: they no longer count."""
    reached: Sequence[str] = ()
    """Of a withdrawal: devices that got what it takes back."""
    category: str | None = None
    merged: int = 1
    """For how many notifications it speaks, itself included."""
    preferences: str | None = None
    """The user's document."""
    stream_id: int = 0
    ended: str = "seen"
    """With gate WITHDRAWN why nobody wants it any more: seen, retracted or cancelled."""
    zone: str | None = None
    """Time zone of the user's profile."""
    reason: str | None = None
    carrier: int | None = None
    """The row that told it with others, in its digest or after it was held; None: it waits there still."""
    digest: bytes | None = None
    told: Sequence[ToldItem] = ()
    """Of the row that speaks for several: the newest of them, newest first."""
    words: tuple[str, str | None, str | None] | None = None
    """Title, body and link of a push for several; None: our own for what was held."""

    def collected(self) -> bool:
        """Whether it waits in a digest that was not told yet."""
        return (
            self.digest is not None and self.carrier is None and self.channel not in ("withdraw", "replace")
        )


def claimed_of(r: Any) -> Claimed:
    """A row of the statement `claimed`."""
    return Claimed(
        r["id"], r["attempts"], r["slot"], UserKey(r["tenant"], r["user_id"]), r["unread"],
        r["notification_id"].bytes, r["seq"], r["type"], r["priority"], r["content"], r["expires_ms"],
        r["sent_to"], r["gate"], r["acknowledged"], r["hold_until_ms"] or 0, r["shown_on"], r["channel"],
        r["chain"], r["step"], r["since_ms"], r["base_attempt"], r["reached"], r["category"], r["merged"],
        r["preferences"], r["stream_id"], r["ended"], r["zone"], r["reason"], r["carrier"],
        None if r["digest"] is None else r["digest"].bytes,
    )  # fmt: skip


@dataclass(slots=True)
class SignalRow:
    """What devices tell of one notification."""

    stream_id: int
    notification: bytes
    signal: str
    """See carillon/attention.py."""
    shown_on: str = ""
    """Devices that have shown it, separated by line feeds."""
    rev: int | None = None
    """Updates after it are not covered; None: all are."""


@dataclass(slots=True)
class AttemptRow:
    """One try at one target, for the history."""

    delivery: int
    attempt: int
    device: str
    provider: str
    outcome: str
    provider_id: str
    status: int
    error: str
    started_ms: int
    duration_ms: float


@dataclass(slots=True)
class SettleRow:
    """New state of a claimed outbox row."""

    delivery: int
    attempt: int
    state: str
    due_ms: int
    reason: str | None
    onward: bool = True
    """Without success the next channel of the row's chain follows."""
    next: bool = False
    """What it spoke for, if it did, is decided again: the reason it ends is its own."""


@dataclass(slots=True)
class ReleaseRow:
    """A claimed outbox row that nobody tried: planned again, due at `due_ms`."""

    delivery: int
    attempt: int
    due_ms: int
    reason: str
    held: bool = False
    """Rules hold it until then (gate DEFERRED)."""


@dataclass(slots=True)
class CarrierRow:
    """A claimed outbox row that speaks for others of its user and channel."""

    delivery: int
    attempt: int
    stream_id: int
    slot: int
    channel: str
    others: list[tuple[int, int]]
    """Claimed rows (id, attempt) it speaks for."""


@dataclass(slots=True)
class ReplayRow:
    """A dead letter to try again, as asked for at `asked_ms`."""

    delivery: int
    tenant: str
    slot: int
    asked_ms: int


class PoisonError(InvalidInputError):
    """PostgreSQL refused the data itself (SQLSTATE class 22 or 23): never retry as it is."""

    code = "poison"


class StreamsErasedError(Exception):
    """Streams of the batch were erased since their users were loaded; nothing was written.

    Attributes:
        streams: their ids.
    """

    def __init__(self, streams: set[int]) -> None:
        super().__init__(streams)
        self.streams = streams


class KeysTakenError(Exception):
    """An idempotency key of the batch stands for something already; nothing was written."""
