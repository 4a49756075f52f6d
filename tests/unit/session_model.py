"""A small model of what stands around a session: the store, a gateway's tracking, a client.

The client follows the rules that docs/reference/websocket.md gives to client authors.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import Any

from carillon import server_frames
from carillon.clock import rfc3339
from carillon.ids import uuid_text
from carillon.notification import NotificationRow, fresh_json, notification_json, user_json_of
from carillon.session import Attachment, Head, LoadChanges, LoadNotifications, Send

NOW_MS = 1_700_000_000_000
USER_JSON = user_json_of("u")
STATES = ("read", "seen", "clicked", "dismissed", "archived")


def id_of(seq: int) -> bytes:
    """The id of the notification with this seq."""
    return seq.to_bytes(16, "big")


@dataclass
class New:
    """A commit the session is to be told of with `deliver`."""

    id: bytes
    seq: int
    rev: int
    unread: int
    content: str
    expired: bool
    """It had expired before it was committed: nobody is to see it."""


@dataclass
class Changed:
    """A commit the session is to be told of with `state_changed`."""

    seq: int
    rev: int
    unread: int
    frames: list[bytes]
    update: bool = False


class Store:
    """The rows of one stream, and the two queries of a replay (stores/postgres/queries/shard.sql)."""

    def __init__(self) -> None:
        self.epoch = "e1"
        self.seq = self.rev = 0
        self.rows: list[NotificationRow] = []
        self.changed: set[int] = set()
        self.pruned: set[int] = set()
        self.known_pruned = (0, 0)
        """What the stream's row said when it was last loaded: (pruned_seq, pruned_rev)."""
        self.time = 0
        self.inner: set[bytes] = set()
        """Frames that others of the same rev follow: no badge is to be judged by them."""
        self.badge_at: dict[int, int] = {0: 0}
        """By rev what a badge has to show there: the unread ones that can be seen."""

    @property
    def badge(self) -> int:
        """The unread ones that can be seen now."""
        return sum(
            r.read_ms is None and r.archived_ms is None and r.dismissed_ms is None
            for r in self.rows
            if not self.hidden(r.seq)
        )

    def head(self) -> Head:
        """Position as committed."""
        return Head(self.epoch, self.seq, self.rev, self.badge, *self.known_pruned)

    def pruned_to(self) -> tuple[int, int]:
        """(pruned_seq, pruned_rev) of the stream's row."""
        gone = [self.rows[seq - 1] for seq in self.pruned]
        revs = [row.rev for row in gone if row.seq in self.changed]
        return max([row.seq for row in gone], default=0), max(revs, default=0)

    def prune(self, seq: int) -> bool:
        """The row goes to the archive, if the user has dealt with it."""
        row = self.rows[seq - 1]
        if (row.read_ms or row.archived_ms or row.dismissed_ms or row.retracted_ms) is None:
            return False
        self.pruned.add(seq)
        return True

    def append(self, expired: bool = False) -> New:
        """Commit a notification."""
        self.seq += 1
        self.rev += 1
        row = NotificationRow(id_of(self.seq), self.seq, self.rev, self.rev, '"title":"v0"')
        row.expires_ms = NOW_MS - 1 if expired else None
        self.rows.append(row)
        self.badge_at[self.rev] = self.badge
        return New(row.id, row.seq, row.rev, self.badge, row.content, expired)

    def change(self, op: str, seqs: list[int], upto: int = 0) -> Changed | None:
        """Commit a change; None if it changes nothing."""
        self.time += 1
        at = NOW_MS + self.time
        column = {"read_all": "read", "click": "clicked", "dismiss": "dismissed", "archive": "archived"}.get(
            op, op
        )
        hit: list[NotificationRow] = []
        for row in self.rows:
            wanted = row.seq <= upto if op == "read_all" else row.seq in seqs
            if not wanted or row.retracted_ms is not None or row.seq in self.pruned:
                continue
            if op == "read_all" and (row.archived_ms is not None or row.dismissed_ms is not None):
                continue
            if op == "edit":
                row.updated_ms, row.content = at, f'"title":"v{self.time}"'
            elif op == "retract":
                row.retracted_ms = at
            elif getattr(row, f"{column}_ms") is not None:
                continue
            else:
                setattr(row, f"{column}_ms", at)
                if column in ("read", "clicked"):
                    row.seen_ms = row.seen_ms or at
                if column == "clicked":
                    row.read_ms = row.read_ms or at
            hit.append(row)
        if not hit:
            return None
        self.rev += 1
        for row in hit:
            row.rev = self.rev
            self.changed.add(row.seq)
        self.badge_at[self.rev] = self.badge
        frames = self._frames(op, hit, at, upto)
        self.inner.update(frames[:-1])
        return Changed(self.seq, self.rev, self.badge, frames, op == "edit")

    def _frames(self, op: str, hit: list[NotificationRow], at: int, upto: int) -> list[bytes]:
        ids = [row.id for row in hit]
        if op == "read_all":
            return [server_frames.all_notifications_read(rfc3339(at), upto, self.rev)]
        if op == "read":
            return [server_frames.notifications_read(ids, rfc3339(at), self.rev)]
        if op == "seen":
            return [server_frames.notifications_seen(ids, self.rev)]
        if op == "edit":
            return [server_frames.notification_updated(notification_json(row, USER_JSON)) for row in hit]
        kind = {"archive": "ARCHIVED", "dismiss": "DISMISSED", "click": "CLICKED", "retract": "RETRACTED"}[op]
        last = len(ids) - 1
        return [
            server_frames.notification_state(kind, raw, self.rev - (n < last)) for n, raw in enumerate(ids)
        ]

    def answer(self, request: LoadNotifications | LoadChanges) -> list[NotificationRow] | None:
        """What the query of a load reads now."""
        if isinstance(request, LoadNotifications):
            found = [r for r in self.rows if r.seq > request.after_seq and r.seq not in self.pruned]
        else:
            if self.pruned_to()[1] > request.after_rev:
                return None
            found = [
                r
                for r in self.rows
                if r.seq in self.changed
                and r.seq not in self.pruned
                and r.rev > request.after_rev
                and (r.seq <= request.upto_seq or r.rev > request.or_after_rev)
            ]
            found.sort(key=lambda r: (r.rev, r.seq))
        return [copy.copy(r) for r in found[: request.limit]]

    def hidden(self, seq: int) -> bool:
        """A replay may leave it out."""
        row = self.rows[seq - 1]
        return row.retracted_ms is not None or row.expires_ms is not None


def fresh_frame(commit: New) -> bytes:
    """The frame a live session writes for it."""
    return server_frames.new_notification(
        fresh_json(commit.id, commit.seq, commit.rev, USER_JSON, commit.content)
    )


@dataclass
class Note:
    """One notification as a client has it."""

    seq: int
    title: str
    states: set[str] = field(default_factory=set)


class Client:
    """A client that keeps its notifications and its position over connections."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.epoch: str | None = None
        self.last_seq = 0
        self.last_rev: int | None = None
        self.notes: dict[str, Note] = {}
        self.asked = False  # a position was sent and is not answered: the own one stands still
        self.shown_seq: int | None = None  # last seq of this connection, None before its WELCOME
        self.welcomes: list[Any] = []
        self.count: int | None = None
        """As WELCOME or UNREAD_COUNT told it last."""

    @property
    def badge(self) -> int:
        """How many it shows as unread."""
        return sum(not note.states & {"read", "archived", "dismissed"} for note in self.notes.values())

    def connected(self, with_position: bool) -> None:
        """A new connection begins."""
        self.asked = with_position
        self.shown_seq = None
        self.welcomes = []

    def position(self, with_rev: bool = True) -> tuple[str, int, int | None]:
        """What RESUME or the URL says."""
        assert self.epoch is not None
        if not with_rev:
            self.last_rev = None
        return self.epoch, self.last_seq, self.last_rev

    def handle(self, raw: bytes) -> None:
        """Take one frame."""
        frame = json.loads(raw)
        kind = frame["type"]
        if kind == "WELCOME":
            self._welcome(frame)
            return
        assert self.welcomes, f"{kind} before WELCOME"
        if kind == "ERROR":
            return
        if kind == "NEW_NOTIFICATION":
            self._new(frame["notification"])
        elif kind == "NOTIFICATION_UPDATED":
            shown = frame["notification"]
            if shown["id"] in self.notes:
                self._put(shown)
        else:
            self._state(kind, frame)
            if not self.asked:
                self.last_rev = max(self.last_rev or 0, frame["rev"])

    def _welcome(self, frame: dict[str, Any]) -> None:
        recovered = frame["recovered"]
        self.count = frame["unreadCount"]
        self.welcomes.append(recovered)
        if recovered is None and self.asked:
            self.shown_seq = frame["lastSeq"]  # the answer is still to come
            return
        self.asked = False
        if recovered is True:
            assert frame["epoch"] == self.epoch
            self.shown_seq = self.last_seq
            if self.last_rev is None:
                self.last_rev = frame["rev"]
                self._fetch(self.last_seq)  # it gave up the changes of what it has: reads the feed for them
            return
        self.epoch, self.last_seq, self.last_rev = frame["epoch"], frame["lastSeq"], frame["rev"]
        self.shown_seq = self.last_seq
        self.notes.clear()
        self._fetch(self.store.seq)

    def _fetch(self, upto_seq: int) -> None:
        for row in self.store.rows[:upto_seq]:
            if not self.store.hidden(row.seq) and row.seq not in self.store.pruned:
                self._put(json.loads(notification_json(row, USER_JSON)))
            else:
                self.notes.pop(uuid_text(row.id), None)

    def _new(self, shown: dict[str, Any]) -> None:
        seq, last = shown["seq"], self.shown_seq
        assert last is not None
        assert seq > last, f"seq {seq} after {last}"
        missed = [s for s in range(last + 1, seq) if not self.store.hidden(s)]
        assert not missed, f"seq {seq} after {last}: {missed} left out"
        self.shown_seq = seq
        self._put(shown)
        if not self.asked:
            self.last_seq = seq  # never the rev of a notification: changes with a lower one may follow

    def _put(self, shown: dict[str, Any]) -> None:
        note = self.notes.setdefault(shown["id"], Note(shown["seq"], shown["title"]))
        note.title = shown["title"]
        note.states |= {name for name in STATES if shown.get(name)}

    def _state(self, kind: str, frame: dict[str, Any]) -> None:
        if kind == "UNREAD_COUNT":
            self.count = frame["count"]
            return
        if kind == "ALL_NOTIFICATIONS_READ":
            for note in self.notes.values():
                if note.seq <= frame["upToSeq"] and not note.states & {"archived", "dismissed"}:
                    note.states |= {"read", "seen"}
            return
        ids = frame.get("notificationIds") or [frame["notificationId"]]
        for key in ids:
            if kind == "NOTIFICATION_RETRACTED":
                self.notes.pop(key, None)
            elif key in self.notes:
                self.notes[key].states |= {
                    "NOTIFICATIONS_READ": {"read", "seen"},
                    "NOTIFICATIONS_SEEN": {"seen"},
                    "NOTIFICATION_CLICKED": {"clicked", "read", "seen"},
                    "NOTIFICATION_DISMISSED": {"dismissed"},
                    "NOTIFICATION_ARCHIVED": {"archived"},
                }[kind]

    def check(self) -> None:
        """Everything there is to see is here, in the state of the store, and nothing that was withdrawn."""
        for row in self.store.rows:
            note = self.notes.get(uuid_text(row.id))
            if row.retracted_ms is not None:
                assert note is None, f"seq {row.seq} was withdrawn and is still shown"
                continue
            if (row.expires_ms is not None or row.seq in self.store.pruned) and note is None:
                continue
            assert note is not None, f"seq {row.seq} is missing"
            states = {name for name in STATES if getattr(row, f"{name}_ms") is not None}
            assert note.states == states, f"seq {row.seq}: {note.states} instead of {states}"
            assert f'"title":"{note.title}"' == row.content, f"seq {row.seq}: {note.title}"


class Wire:
    """One WebSocket as its gateway knows it (actors/gateway_owners.py), and the client behind it."""

    def __init__(self, number: int, client: Client) -> None:
        self.number = number
        self.client = client
        self.attachment: Attachment | None = None
        self.in_flight: list[Send] = []  # from the session to the gateway
        self.written: list[bytes] = []  # from the gateway to the client
        self.epoch: str | None = None
        self.seq = 0
        self.rev: int | None = None
        self.welcomed = False
        self.ready = False
        self.url: tuple[str, int, int | None] | None = None  # position in the URL, until WELCOME
        self.resume: tuple[str, int, int | None] | None = None  # passed on and not answered
        self.drain_due = False
        self.began_seq = self.acked_seq = 0
        self.live_at: int | None = (
            None  # rev up to which its client shows exactly what was; None: catching up
        )

    def gateway_takes(self) -> None:
        """The gateway writes the next frame and notes the position it carries."""
        send = self.in_flight.pop(0)
        self.written.append(send.frame)
        if send.page_end:
            self.drain_due = True
        if send.epoch:
            self.epoch, self.seq, self.rev = send.epoch, send.seq, send.rev
            self.began_seq = self.acked_seq = send.seq
            if self.welcomed:
                self.resume = None
            self.welcomed = True
        else:
            self.ready = True
            self.seq = send.seq or self.seq
            self.rev = send.rev or self.rev

    def client_takes(self) -> None:
        """The next frame reaches the client. Live ones leave a right badge behind, each."""
        raw = self.written.pop(0)
        self.client.handle(raw)
        if self.live_at is None or raw in self.client.store.inner:
            return
        frame = json.loads(raw)
        rev = frame.get("rev") or frame.get("notification", {}).get("rev", 0)
        if rev > self.live_at:
            shown, right = self.client.badge, self.client.store.badge_at[rev]
            assert shown == right, f"{frame['type']} brings the badge to {shown}, at rev {rev} it is {right}"
            self.live_at = rev
