"""What goes in and what comes out.

Names are snake_case here and camelCase on the wire. Texts that a newer server may extend (status, priority)
are plain `str`; members that this version does not know are kept in `raw`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from carillon_client.errors import CarillonError


def _nothing() -> dict[str, Any]:
    return {}


class _Wire(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Base: camelCase on the wire, unknown members ignored."""


class Event(_Wire, frozen=True, omit_defaults=True):
    """One event. `None` means absent. docs/reference/http.md has the limits.

    A mapping with the wire's camelCase names is accepted wherever an `Event` is.
    """

    type: str
    title: str | None = None
    user_id: str | None = None
    body: str | None = None
    category: str | None = None
    priority: str | None = None
    """low, normal, high, urgent; absent is normal."""
    actor_id: str | None = None
    target_type: str | None = None
    target_id: str | None = None
    image_url: str | None = None
    icon: str | None = None
    link: str | None = None
    actions: list[dict[str, Any]] | None = None
    data: dict[str, Any] | None = None
    channels: list[str] | None = None
    collapse_key: str | None = None
    expires_at: str | None = None
    """RFC 3339 with offset."""
    campaign_id: str | None = None
    source_app: str | None = None
    idempotency_key: str | None = None
    """Absent: this library makes one."""
    more: dict[str, Any] | None = msgspec.field(name="__more__", default=None)
    """Members that this version does not know, by their wire names."""


@dataclass(frozen=True)
class Sent:
    """An event that was stored.

    Attributes:
        id: of the notification.
        seq: its number in the user's stream.
        status: delivered, queued, stored, deferred, merged, duplicate or suppressed.
        channels: where it goes.
        idempotency_key: what it was sent with.
        reason: why, if suppressed.
        user_id: the recipient, for an event to many.
        replayed: the server said that this had been stored by an earlier try; never True for a part of a
            batch.
    """

    id: str
    seq: int
    status: str
    channels: tuple[str, ...]
    idempotency_key: str
    reason: str | None = None
    user_id: str | None = None
    replayed: bool = False


@dataclass(frozen=True)
class NotSent:
    """An event that was not stored, or of which nobody knows (`error.maybe_sent`).

    Attributes:
        error: why.
        event: as it was given.
        idempotency_key: sending the same event with this key again never duplicates it (24 h).
        user_id: the recipient, for an event to many.
    """

    error: CarillonError
    event: Event | Mapping[str, Any]
    idempotency_key: str
    user_id: str | None = None


class SendReport:
    """One result per event (or per recipient), in the order given."""

    def __init__(self, results: Sequence[Sent | NotSent]) -> None:
        self.results = tuple(results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, index: int) -> Sent | NotSent:
        return self.results[index]

    def __iter__(self) -> Iterator[Sent | NotSent]:
        return iter(self.results)

    def __repr__(self) -> str:
        return f"<SendReport: {len(self.sent)} sent, {len(self.failed)} not>"

    @property
    def sent(self) -> list[Sent]:
        """What was stored."""
        return [one for one in self.results if isinstance(one, Sent)]

    @property
    def failed(self) -> list[NotSent]:
        """What was not."""
        return [one for one in self.results if isinstance(one, NotSent)]

    def raise_for_failures(self) -> None:
        """Raise the first failure's error, if any failed."""
        for one in self.results:
            if isinstance(one, NotSent):
                raise one.error


class Notification(_Wire, frozen=True):
    """A notification as its user sees it. Times are RFC 3339 text, None if it did not happen."""

    id: str
    seq: int
    rev: int = 0
    user_id: str = ""
    type: str = ""
    title: str | None = None
    body: str | None = None
    actor_id: str | None = None
    target_type: str | None = None
    target_id: str | None = None
    read: bool = False
    seen: bool = False
    archived: bool = False
    clicked: bool = False
    dismissed: bool = False
    priority: str = "normal"
    category: str | None = None
    actions: list[dict[str, Any]] = []
    data: dict[str, Any] = {}
    created_at: str = ""
    updated_at: str | None = None
    delivered_at: str | None = None
    seen_at: str | None = None
    read_at: str | None = None
    clicked_at: str | None = None
    dismissed_at: str | None = None
    archived_at: str | None = None
    expires_at: str | None = None
    image_url: str | None = None
    icon: str | None = None
    link: str | None = None
    count: int | None = None
    aggregation_key: str | None = None
    campaign_id: str | None = None
    source_app: str | None = None
    channels: list[str] | None = None
    raw: dict[str, Any] = msgspec.field(name="__raw__", default_factory=_nothing)
    """The object as it came, with members that this version does not know."""


class Presentation(_Wire, frozen=True):
    """How a user wants notifications to be shown in the app.

    Attributes:
        sound: False: none; a text names one of the app.
        duration_ms: so long on the screen; None: as the app has it.
        auto_dismiss: whether it leaves by itself; None: as the app has it.
    """

    sound: bool | str = True
    vibration: bool = True
    duration_ms: int | None = None
    auto_dismiss: bool | None = None


class Position(_Wire, frozen=True):
    """Where a subscriber is in its user's stream: "I have every notification up to `last_seq`, and of those
    every change up to `last_rev`". Store `str(position)`; `Position.parse` reads it back.
    """

    epoch: str
    last_seq: int
    last_rev: int | None = None

    def __str__(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read what `str` wrote. Raises ValueError."""
        return msgspec.json.decode(text, type=cls)


@dataclass(frozen=True)
class Change:
    """Something changed, on any device of the user.

    Attributes:
        kind: the frame's type, e.g. NOTIFICATIONS_READ, NOTIFICATION_UPDATED, UNREAD_COUNT, PRESENCE.
        notification_ids: what it is about; empty where the frame names none (ALL_NOTIFICATIONS_READ).
        rev: the change's number; None for what is not durable (PRESENCE) or carries its own (UPDATED).
        notification: the new form, of NOTIFICATION_UPDATED.
        raw: the whole frame.
    """

    kind: str
    notification_ids: tuple[str, ...]
    rev: int | None
    notification: Notification | None = None
    raw: dict[str, Any] = field(default_factory=_nothing, compare=False)


@dataclass(frozen=True)
class Reset:
    """The server could not replay everything after our position (`recovered: false`): read the feed.

    Attributes:
        position: where the subscription goes on.
        before: what was asked for.
    """

    position: Position
    before: Position | None


class PresenceDevice(_Wire, frozen=True):
    """One device of a user."""

    device_id: str
    attention: str
    since: str
    connections: int = 1


class Presence(_Wire, frozen=True):
    """Whether a user is there."""

    user_id: str
    status: str
    """active, idle or offline, as others may see it."""
    devices: list[PresenceDevice] = []
    last_seen_at: str | None = None
    invisible: bool = False


class Token(_Wire, frozen=True):
    """A client token."""

    token: str
    expires_at: str

    def __repr__(self) -> str:
        return f"Token(token=..., expires_at={self.expires_at!r})"


class Device(_Wire, frozen=True, omit_defaults=True):
    """A push target. `token` or, for fcm, `fid`."""

    platform: str
    """ios or android."""
    provider: str
    """fcm or apns."""
    token: str | None = None
    fid: str | None = None
    app_id: str | None = None
    environment: str | None = None
    locale: str | None = None
    device_id: str | None = None
    """Set in answers."""
    registered_at: str | None = None
    disabled_at: str | None = None
    disabled_reason: str | None = None


class FeedPage(_Wire, frozen=True):
    """One page of a feed, newest first."""

    notifications: list[Notification]
    next_cursor: str | None = None


class DeliveryTry(_Wire, frozen=True):
    """One try of a push."""

    attempt: int = 0
    device_id: str | None = None
    provider: str | None = None
    outcome: str = ""
    provider_id: str | None = None
    status: int | None = None
    error: str | None = None
    started_at: str = ""
    duration_ms: float = 0.0


class DeliveryRecord(_Wire, frozen=True):
    """One way that a notification took or takes."""

    channel: str
    state: str
    attempts: int = 0
    reason: str | None = None
    due_at: str | None = None
    created_at: str | None = None
    updated_at: str | None = None
    tries: list[DeliveryTry] = []


class Amendment(_Wire, frozen=True):
    """What a service did to a notification it had sent."""

    act: str
    """edit, retract or cancel."""
    at: str
    by: str
    """The API key: "key:<key id>"."""
    version: int | None = None
    """That an edit made."""
    former: dict[str, Any] | None = None
    """What an edit replaced, as it was before."""


class NotificationHistory(_Wire, frozen=True):
    """A notification and everything that was tried to deliver it."""

    notification: Notification
    delivery_state: str
    """SENT, DELIVERED, READ or RETRACTED."""
    deliveries: list[DeliveryRecord] = []
    version: int = 1
    """Of its content: one more with each edit."""
    retracted_at: str | None = None
    cancelled_at: str | None = None
    changes: list[Amendment] = []
    """What services did to it, in order."""


class Edited(_Wire, frozen=True):
    """A notification after an edit."""

    notification: Notification
    version: int


class Retracted(_Wire, frozen=True):
    """A notification that was withdrawn."""

    id: str
    retracted_at: str


class Cancelled(_Wire, frozen=True):
    """What a cancellation stopped."""

    id: str
    cancelled_at: str | None = None
    """None: it was retracted before."""
    retracted_at: str | None = None
    stopped: int = 0
    """Pushes that will not be sent."""


class BroadcastCounts(_Wire, frozen=True):
    """What became of a broadcast's users so far."""

    stored: int = 0
    """Notifications; of them the next four, the others are in the feed alone."""
    delivered: int = 0
    queued: int = 0
    deferred: int = 0
    suppressed: int = 0
    failed: int = 0
    """Users who could not be notified."""


class BroadcastUsers(_Wire, frozen=True):
    """How many of a broadcast's users have been looked after."""

    done: int
    total: int | None = None
    """About; None: not known yet."""


class Broadcast(_Wire, frozen=True):
    """One event to many users, and how far it is."""

    broadcast_id: str
    state: str
    """scheduled, running, paused, done, cancelled or failed."""
    audience: Any
    event: dict[str, Any]
    counts: BroadcastCounts
    users: BroadcastUsers
    reason: str | None = None
    """Why it failed."""
    rate_per_s: float | None = None
    remaining_s: float | None = None
    start_at: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    created_at: str | None = None

    @property
    def ended(self) -> bool:
        """Nothing more comes of it."""
        return self.state in ("done", "cancelled", "failed")


class BroadcastPage(_Wire, frozen=True):
    """One page of broadcasts, newest first."""

    broadcasts: list[Broadcast]
    next_cursor: str | None = None


class FailedLine(_Wire, frozen=True):
    """A line of an import that was not stored."""

    line: int
    error: dict[str, Any]
    """The problem: `code`, `detail`, `errors`, ..."""
    user_id: str | None = None
    """Which recipient, of a line with `userIds`."""


class ImportReport(_Wire, frozen=True):
    """What came of an import."""

    complete: bool
    """False: the server stopped reading behind `lines`."""
    lines: int
    events: int
    accepted: int
    replayed: int
    """Of those accepted: they were there already."""
    failed: int
    statuses: dict[str, int] = {}
    failures: list[FailedLine] = []
    """The first of them."""


class BroadcastFailure(_Wire, frozen=True):
    """A user whom a broadcast could not reach."""

    user_id: str
    code: str
    detail: str
    failed_at: str | None = None


class Profile(_Wire, frozen=True, omit_defaults=True):
    """What is known of a user beside notifications. Put, it replaces all that was there."""

    email: str | None = None
    phone: str | None = None
    """E.164."""
    locale: str | None = None
    timezone: str | None = None
    """An IANA name."""
    attributes: dict[str, Any] = {}
    user_id: str | None = None
    """This and the rest are told by the server."""
    created_at: str | None = None
    updated_at: str | None = None
    """None: the user is known by something else, and has no profile."""
    last_seen_at: str | None = None


class Subscription(_Wire, frozen=True):
    """A user who subscribes to a topic."""

    user_id: str
    since: str
    topic: str | None = None


class SubscriberPage(_Wire, frozen=True):
    """One page of a topic's subscribers."""

    subscribers: list[Subscription]
    next_cursor: str | None = None


class Subscribed(_Wire, frozen=True):
    """What became of a list of subscribers."""

    subscribed: int
    """How many were named."""
    added: int
    """Who did not subscribe before."""


class Segment(_Wire, frozen=True):
    """Users by a filter over what is known of them."""

    segment_id: str
    filter: dict[str, Any]
    description: str | None = None
    created_at: str | None = None
    updated_at: str | None = None


class SegmentPage(_Wire, frozen=True):
    """One page of segments, by id."""

    segments: list[Segment]
    next_cursor: str | None = None


class SegmentPreview(_Wire, frozen=True):
    """Who fits a segment now."""

    count: int
    exact: bool
    """False: an estimate."""
    of_users: int
    user_ids: list[str]
    """Some of them."""


class DigestItem(_Wire, frozen=True):
    """A notification that waits in a digest."""

    notification_id: str
    seq: int
    type: str
    title: str
    category: str | None = None
    channels: list[str] = []
    created_at: str | None = None


class Digest(_Wire, frozen=True):
    """What waits to be told together."""

    digest_id: str
    frequency: str
    due_at: str
    count: int
    items: list[DigestItem]
    """The newest of them, oldest first."""
    category: str | None = None


class FlushedDigest(_Wire, frozen=True):
    """A digest that was sent."""

    digest_id: str
    count: int
    """Of its items; 0: it was sent before."""
