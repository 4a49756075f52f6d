"""The session actor's state machine: one per connected user, without clock, socket or database.

A session takes messages (attach, detach, frames, deliveries, state changes, loaded pages, ticks) and
returns effects for its shell to carry out, in order. It is *live* while it has an attachment; it outlives
the last one by a grace period, so that presence does not flap.

Order: every attachment receives notifications in strictly increasing `seq`. An attachment is in one of
three phases:

- waiting: attached, WELCOME written, nothing else until its first frame or `resume_wait_s`;
- replaying: pages of what it missed are on their way, paced by the socket; live frames stay in the log;
- live: what happens is written at once.

Whoever becomes live goes through `_advance`, which compares the attachment's cursor with the head of the
stream: what lies between comes from the log (the bounded recent window) if it reaches back far enough,
else from the store, page by page, until the cursor is the head. So there is no moment at which a frame
could fall between replay and live delivery (guarantees G3, G5).

Positions: `(seq, rev)` says that the client has every notification up to `seq`, and of those every change
up to `rev`. Within one rev only the last frame carries it, earlier ones carry the rev before, so that a
connection that is cut anywhere resumes without a gap. The store may be ahead of the session (a commit whose
writer has not told us yet): a notification beyond the head waits for its `deliver`; a state that is newer
than the head is shown as it is, for states only grow and the frame that follows repeats it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from carillon import server_frames
from carillon.attachment import Attachment, DeviceMemory, Phase, ReplayStart
from carillon.attention import (
    ACTIVE_STATES,
    AWAY,
    DONE,
    KEEP,
    SEEN,
    Attention,
    combined,
    device_attention,
)
from carillon.change_frames import change_frames
from carillon.clock import rfc3339
from carillon.effects import (
    Close,
    Effect,
    LoadChanges,
    LoadNotifications,
    PresenceChanged,
    PushSignal,
    Send,
    Wake,
)
from carillon.notification import NotificationRow, filed_away, fresh_json, notification_json, user_json_of
from carillon.push_watch import PushWatch, Waiting
from carillon.recent import LogEntry, Recent
from carillon.session_acks import Acknowledging
from carillon.session_limits import Head, SessionLimits


class Session(Acknowledging):
    """One connected user.

    Args:
        user: the user id.
        head: position of the stream as loaded from the store.
        limits: see `SessionLimits`.
    """

    __slots__ = (
        "_away_deadline", "_began_rev", "_began_seq", "_devices", "_limits", "_pruned", "_pushes",
        "_status", "_unacked", "attachments", "epoch", "grace_deadline", "last_seen_ms", "recent", "rev",
        "seq", "unread", "user_json",
    )  # fmt: skip

    def __init__(self, user: str, head: Head, limits: SessionLimits) -> None:
        self.user_json = user_json_of(user)
        self.epoch, self.seq, self.rev, self.unread = head[:4]
        self.attachments: list[Attachment] = []
        self.grace_deadline = 0.0
        self.last_seen_ms: int | None = None
        self._limits = limits
        self.recent = Recent(limits.recent_window, head.rev)
        self._pruned = head[4:]  # as of then: what was pruned since shows when it is read
        self._unacked: dict[int, bytes] = {}  # seq -> id, in seq order per insertion
        self._status = "offline"
        self._pushes: PushWatch | None = None
        self._began_seq = head.seq  # ids of later ones were all told
        self._began_rev = head.rev  # so were later updates
        self._devices: DeviceMemory | None = None  # of those that come back by HTTP
        self._away_deadline = 0.0  # monotonic; the last active device is gone, it may be back until then

    # -- connections ----------------------------------------------------------------------------------

    @property
    def live(self) -> bool:
        """True while a connection is attached: delivering is the presence check."""
        return bool(self.attachments)

    def attach(
        self,
        peer: Any,
        conn: int,
        device: str,
        session_id: str,
        now: float,
        now_ms: int,
        *,
        position: tuple[str, int, int | None] | None = None,
        reattach: bool = False,
        ready: bool = False,
        legacy: bool = False,
        attention: str | None = None,
        viewing: str | None = None,
        began_seq: int | None = None,
        acked_seq: int = 0,
        acked_rev: int = 0,
        poll: bool = False,
    ) -> tuple[Attachment, list[Effect]]:
        """Add a connection.

        Args:
            now: monotonic seconds. now_ms: wall milliseconds.
            position: (epoch, lastSeq, lastRev or None) from the URL, or what the gateway wrote so far.
            reattach: the socket was attached before: no WELCOME, replay from `position`.
            ready: with reattach, True if it had left the waiting phase.
            attention, viewing: what it told with its last VISIBILITY; None: it never did.
            began_seq, acked_seq: with reattach, what it acknowledged cumulatively: surely in the store up to
                began_seq, perhaps lost with the attachment before up to acked_seq. Otherwise not None if
                the position acknowledges what it covers.
            acked_rev: with reattach, the newest revision that it told it shows; 0: it told none.
            poll: what the device told of attention holds for its next poll, too.

        Returns:
            The attachment and the effects, WELCOME first unless reattach.
        """
        effects: list[Effect] = []
        self.recent.expire(now_ms)
        attachment = Attachment(self, peer, conn, device, session_id, now_ms)
        attachment.legacy = legacy
        attachment.poll = poll
        if poll and attention is None and self._devices is not None:
            attention, viewing = self._devices.told.get(device, (None, None))
        attachment.cursor_seq = attachment.acked_seq = self.seq
        attachment.cursor_rev = attachment.acked_rev = self.rev
        if attention is not None:
            attachment.attention, attachment.viewing, attachment.reported = attention, viewing, True
        self.attachments.append(attachment)
        self.grace_deadline = 0.0
        if self.at_hand():
            self._away_deadline = 0.0
        if len(self.attachments) > self._limits.max_connections:
            oldest = self.attachments[0]
            effects.append(Close(oldest, 4004, "too many connections of this user: the oldest goes"))
            effects += self.detach(oldest, False, now, now_ms)
        if reattach:
            attachment.first_frame_seen = ready
            if position is not None and self._take_position(attachment, *position):
                if began_seq is not None:
                    self._acknowledged_before(attachment, began_seq, acked_seq, acked_rev, effects)
                if ready:
                    self._advance(attachment, effects)
                else:
                    attachment.wait_deadline = now + self._limits.resume_wait_s
            else:
                # The stream is another one than this socket was fed from: only a new WELCOME can say so.
                effects.append(self._welcome(attachment, False, now_ms))
                if ready:
                    self._advance(attachment, effects)
                else:
                    attachment.wait_deadline = now + self._limits.resume_wait_s
        elif position is not None:
            effects += self._resume(attachment, *position, now_ms, None if began_seq is None else now)
        else:
            effects.append(self._welcome(attachment, None, now_ms))
            attachment.wait_deadline = now + self._limits.resume_wait_s
        self._presence(effects, now_ms)
        return attachment, effects

    def detach(self, attachment: Attachment, clean: bool, now: float, now_ms: int) -> list[Effect]:
        """Remove a connection (idempotent). The last one starts the grace period."""
        if attachment not in self.attachments:
            return []
        self.attachments.remove(attachment)
        if attachment.poll and attachment.reported:
            self._memory().tell(attachment.device, attachment.attention, attachment.viewing)
        self.last_seen_ms = now_ms
        effects: list[Effect] = []
        grace = self._limits.clean_close_grace_s if clean else self._limits.grace_s
        if self._pushes and not self._away_deadline and not self.at_hand() and self._pushes.held():
            self._away_deadline = now + grace
            effects.append(Wake())
        if not self.attachments:
            self.grace_deadline = now + grace
        else:
            self._presence(effects, now_ms)
        return effects

    def ready(self, attachment: Attachment) -> list[Effect]:
        """The first client frame came and was not RESUME: live frames flow, no backlog."""
        effects: list[Effect] = []
        attachment.first_frame_seen = True
        if attachment.phase is Phase.WAITING and attachment in self.attachments:
            self._advance(attachment, effects)
        return effects

    def resume(
        self,
        attachment: Attachment,
        epoch: str,
        last_seq: int,
        last_rev: int | None,
        now: float,
        now_ms: int,
    ) -> list[Effect]:
        """RESUME came. Only as the first frame: later it is too late (4213), the client reconnects."""
        if attachment not in self.attachments:
            return []
        if attachment.phase is not Phase.WAITING or attachment.first_frame_seen:
            refused = server_frames.error(
                "resume_too_late", "expected RESUME as the first frame, within the resume wait", True
            )
            effects: list[Effect] = [Send((attachment,), refused), Close(attachment, 4213, "resume_too_late")]
            return effects + self.detach(attachment, False, now, now_ms)
        return self._resume(attachment, epoch, last_seq, last_rev, now_ms)

    def tick(self, now: float, now_ms: int) -> list[Effect]:
        """Let time pass: resume waits end, grace ends (status offline)."""
        effects: list[Effect] = []
        self.recent.expire(now_ms)
        for attachment in self.attachments:
            if attachment.phase is Phase.WAITING and attachment.wait_deadline <= now:
                attachment.first_frame_seen = True
                self._advance(attachment, effects)
        if self._pushes:
            if 0.0 < self._away_deadline <= now:
                self._away_deadline = 0.0
                self._look_away(effects, now)
            if self._pushes.next_due <= now:
                dropped, kept = self._pushes.take_due(now, self.at_hand())
                if dropped:
                    effects.append(PushSignal(tuple(dropped), DONE))
                if kept:
                    effects.append(PushSignal(tuple(kept), KEEP))
        self._presence(effects, now_ms, now)
        return effects

    def next_deadline(self) -> float | None:
        """Monotonic time of the next `tick` that does something, or None."""
        waits = [a.wait_deadline for a in self.attachments if a.phase is Phase.WAITING]
        if not self.attachments and self._status != "offline":
            waits.append(self.grace_deadline)
        if self._pushes:
            if self._away_deadline:
                waits.append(self._away_deadline)
            if self._pushes.next_due < float("inf"):
                waits.append(self._pushes.next_due)
        return min(waits, default=None)

    def ended(self, now: float) -> bool:
        """True once nobody is attached and grace is over: the shell may drop the session."""
        return not self.attachments and now >= self.grace_deadline

    # -- what happens to the user -----------------------------------------------------------------------

    def deliver(
        self,
        notification_id: bytes,
        seq: int,
        rev: int,
        unread: int,
        content: str,
        *,
        silent: bool = False,
        expires_ms: int | None = None,
    ) -> list[Effect]:
        """A notification was committed: write it to every live attachment, keep it for the others.

        Args:
            silent: clients are to show it without a sound.

        Raises:
            ValueError: the position does not follow the head (a gap in `seq`, or in `rev`: a change that this
                session was not told of). The shell calls `heal`.
        """
        if seq != self.seq + 1 or rev != self.rev + 1:
            raise ValueError(
                f"expected seq {self.seq + 1} and rev {self.rev + 1}, got seq {seq} and rev {rev}"
            )
        frame = server_frames.new_notification(
            fresh_json(notification_id, seq, rev, self.user_json, content), silent
        )
        self.seq, self.unread = seq, unread
        self._remember(seq, notification_id)
        return self._emit(LogEntry(rev, seq, frame, False, notification_id, expires_ms))

    def pass_over(self, seq: int, rev: int, unread: int) -> list[Effect]:
        """A notification was committed that the user wants nowhere in the app: nothing is written.

        Raises:
            ValueError: as `deliver`.
        """
        if seq != self.seq + 1 or rev != self.rev + 1:
            raise ValueError(
                f"expected seq {self.seq + 1} and rev {self.rev + 1}, got seq {seq} and rev {rev}"
            )
        self.seq, self.rev, self.unread = seq, rev, unread
        for attachment in self.attachments:
            if attachment.phase is Phase.LIVE:
                attachment.cursor_seq, attachment.cursor_rev = seq, rev
        return []

    def state_changed(
        self, rev: int, unread: int, frames: Sequence[bytes], *, update: bool = False
    ) -> list[Effect]:
        """A durable change was committed: write its frames to every live attachment.

        Args:
            frames: the last one carries `rev`, those before it the rev before.

        A rev that does not follow the head (a change whose commit this session was not told of) heals: the
        attachments read on from the store.
        """
        if rev != self.rev + 1:
            return self.heal(Head(self.epoch, self.seq, rev, unread))
        self.unread = unread
        effects: list[Effect] = []
        if not frames:  # nothing to show, but every cursor at the head stays at the head
            self.rev = rev
            for attachment in self.attachments:
                if attachment.phase is Phase.LIVE:
                    attachment.cursor_rev = rev
        for index, frame in enumerate(frames):
            told = rev if index == len(frames) - 1 else rev - 1
            effects += self._emit(LogEntry(rev, 0, frame, update), told)
        return effects

    def updated(self, row: NotificationRow, unread: int, *, silent: bool = False) -> list[Effect]:
        """A notification was changed in place (edited, merged) and committed: NOTIFICATION_UPDATED.

        Args:
            row: as it is now; its `rev` is that of the change.
            silent: as in `deliver`.
        """
        if row.rev != self.rev + 1:
            return self.heal(Head(self.epoch, self.seq, row.rev, unread))
        self.unread = unread
        frame = server_frames.notification_updated(notification_json(row, self.user_json), silent)
        return self._emit(LogEntry(row.rev, 0, frame, True, row.id, row.expires_ms))

    def counted(self, unread: int, *, told: bool = False) -> list[Effect]:
        """The count is another one although nothing changed: something unread has expired. UNREAD_COUNT.

        Args:
            told: a frame told of a change that devices count otherwise: tell the count even if it is known.
        """
        if unread == self.unread and not told:
            return []
        self.unread = unread
        for attachment in self.attachments:
            attachment.count_due = attachment.phase is not Phase.LIVE
        to = tuple(a for a in self.attachments if a.phase is Phase.LIVE)
        return [Send(to, server_frames.unread_count(unread, self.rev), 0, self.rev)] if to else []

    def withdrawn(self, ids: Collection[bytes]) -> None:
        """These were retracted: nobody is shown them again, nor are their pushes awaited."""
        self.recent.withdraw(ids)
        self.dealt_with(ids)

    def heal(self, head: Head) -> list[Effect]:
        """The stream moved without this session (another writer): everybody replays from the store."""
        effects: list[Effect] = []
        self.epoch, self.seq, self.rev, self.unread = head[:4]
        self._pruned = head[4:]
        self.recent.clear(head.rev)
        self._began_seq, self._began_rev = head.seq, head.rev
        for attachment in self.attachments:
            if attachment.phase is Phase.LIVE:
                self._advance(attachment, effects)
        return effects

    def visibility_from(
        self, device: str, state: str, viewing: str | None, now: float, now_ms: int
    ) -> tuple[list[Attachment], list[Effect]] | None:
        """VISIBILITY that came by another way than a connection.

        Returns:
            The device's attachments (none between two polls) and the effects; None if it is not connected.
        """
        effects: list[Effect] = []
        mine = [a for a in self.attachments if a.device == device]
        for attachment in mine:
            effects += self.visibility(attachment, state, viewing, now, now_ms)
        if mine:
            return mine, effects
        if self._devices is None or device not in self._devices.told:
            return None
        self._devices.tell(device, state, viewing)
        return [], effects

    def visibility(
        self, attachment: Attachment, state: str, viewing: str | None, now: float, now_ms: int
    ) -> list[Effect]:
        """VISIBILITY of one connection."""
        effects: list[Effect] = []
        if attachment not in self.attachments:
            return effects
        if state != attachment.attention:
            attachment.attention = state
            attachment.attention_since_ms = now_ms
        attachment.viewing = viewing
        attachment.reported = True
        if state in ACTIVE_STATES:
            self._away_deadline = 0.0
        else:
            self._look_away(effects, now)
        self._presence(effects, now_ms)
        return effects

    # -- attention and waiting pushes -------------------------------------------------------------------

    def at_hand(self) -> bool:
        """True while a device that tells its visibility says that it is focused or visible."""
        return any(a.reported and a.attention in ACTIVE_STATES for a in self.attachments)

    def attention(self, now_ms: int, window_ms: int) -> Attention:
        """How closely the user looks, VIEWING apart (see `viewed`)."""
        attachments = self.attachments
        if len(attachments) == 1:
            a = attachments[0]
            return device_attention(a.attention, a.reported, a.owes_since_ms, now_ms, window_ms)
        return combined(
            [
                device_attention(a.attention, a.reported, a.owes_since_ms, now_ms, window_ms)
                for a in attachments
            ]
        )

    def viewed(self) -> list[str]:
        """The items ("targetType:targetId") that focused devices show now."""
        attachments = self.attachments
        if len(attachments) == 1 and attachments[0].viewing is None:
            return []
        return [a.viewing for a in attachments if a.viewing is not None and a.attention == "focused"]

    def push_planned(
        self,
        notification_id: bytes,
        seq: int,
        gate: str | None,
        due_ms: int,
        hold_until_ms: int | None,
        now: float,
        now_ms: int,
        rev: int = 0,
    ) -> list[Effect]:
        """A push of a notification was committed and waits; call it after `deliver`, or `updated`.

        Args:
            rev: of the update that it tells; 0: it tells a new notification.
        """
        for attachment in self.attachments:
            if not attachment.owes_since_ms and attachment.phase is Phase.LIVE:
                attachment.owes_since_ms = now_ms
        pushes = self._pushes
        if pushes is None:
            pushes = self._pushes = PushWatch()
        due = pushes.next_due if gate == SEEN else 0.0  # of the others the outbox knows when
        hold_until = 0.0 if hold_until_ms is None else now + (hold_until_ms - now_ms) / 1000
        waiting = Waiting(seq, gate, now + (due_ms - now_ms) / 1000, hold_until, rev)
        pushes.add(notification_id, waiting)
        return [Wake()] if gate == SEEN and pushes.next_due < due else []

    def dealt_with(self, ids: Iterable[bytes], upto_seq: int = 0) -> None:
        """Read, dismissed, ... was committed: the pushes of these wait no more."""
        if self._pushes:
            self._pushes.forget(ids, upto_seq)

    def _look_away(self, effects: list[Effect], now: float) -> None:
        """Unless some device still is active, what was held for it is due now."""
        if not self._pushes or self.at_hand():
            return
        held = self._pushes.held()
        if held:
            self._pushes.signalled(held, AWAY, now)
            effects.append(PushSignal(tuple(held), AWAY))

    # -- replay -----------------------------------------------------------------------------------------

    def drained(self, attachment: Attachment) -> list[Effect]:
        """The socket took the last page: go on."""
        effects: list[Effect] = []
        if attachment.replay is None or attachment.loading is not None:
            return effects
        if attachment in self.attachments:
            self._load(attachment, effects)
        return effects

    def notifications_loaded(
        self,
        attachment: Attachment,
        rows: Sequence[NotificationRow],
        request: LoadNotifications,
        now_ms: int,
    ) -> list[Effect]:
        """Answer to LoadNotifications. Expired rows, and those the user wants nowhere in the app, move the
        cursor without a frame; of retracted ones only that is told: the client may have read them from the
        feed."""
        effects: list[Effect] = []
        replay = attachment.replay
        if replay is None or attachment.loading is not request or attachment not in self.attachments:
            return effects
        attachment.loading = None
        full = len(rows) >= request.limit and rows[-1].seq <= self.seq
        # Beyond the head: committed, but `deliver` has yet to tell. Shown now it would be written twice.
        rows = [row for row in rows if row.seq <= self.seq]
        last = rows[-1].seq if rows else attachment.cursor_seq
        # Numbers have no gaps: a hole, or rows missing at the end, were pruned.
        if last - attachment.cursor_seq != len(rows) or (not full and last < request.head_seq):
            return self._lost(attachment, now_ms)
        shown = [
            row
            for row in rows
            if (row.expires_ms is None or row.expires_ms > now_ms)
            and (row.archived_ms is None or not filed_away(row))
        ]
        for row in shown:
            if row.retracted_ms is not None:
                frame = server_frames.notification_state("RETRACTED", row.id, attachment.cursor_rev)
            else:
                frame = server_frames.new_notification(notification_json(row, self.user_json))
                if row.delivered_ms is None:
                    self._remember(row.seq, row.id)
            # While notifications are replayed the position's rev stands still: a change with a lower rev
            # than a notification already written is still to come, after all notifications.
            page_end = full and row is shown[-1]
            effects.append(Send((attachment,), frame, row.seq, 0, True, page_end))
        if rows:
            attachment.cursor_seq = rows[-1].seq
        if full:
            if not shown:
                self._load(attachment, effects)
            return effects  # else the next page follows when the socket has drained
        attachment.cursor_seq = max(attachment.cursor_seq, request.head_seq)
        attachment.replay = replay._replace(in_changes=True)
        self._load(attachment, effects)
        return effects

    def changes_loaded(
        self,
        attachment: Attachment,
        rows: Sequence[NotificationRow] | None,
        request: LoadChanges,
        now_ms: int,
    ) -> list[Effect]:
        """Answer to LoadChanges. None: some of what was asked for is pruned."""
        effects: list[Effect] = []
        replay = attachment.replay
        if replay is None or attachment.loading is not request or attachment not in self.attachments:
            return effects
        attachment.loading = None
        if rows is None:
            return self._lost(attachment, now_ms)
        full = len(rows) >= request.limit
        if full and rows[0].rev == rows[-1].rev:
            # One change of more rows than a page (read-all): read all of it at once.
            attachment.loading = request._replace(limit=request.limit * 8)
            return [attachment.loading]
        # Rows beyond the cursor were appended since this replay read notifications: they are still to come,
        # with their state, and telling a change of what the client does not have would lose it.
        known = [row for row in rows if row.seq <= attachment.cursor_seq]
        more = full and bool(known) and known[-1].rev == rows[-1].rev
        frames = change_frames(known, self.user_json, request.after_rev, now_ms, more=more)
        for index, (rev, frame, update) in enumerate(frames):
            page_end = full and index == len(frames) - 1
            effects.append(Send((attachment,), frame, 0, rev, True, page_end, update))
        if full:
            # The last rev may go on on the next page: ask for it again.
            attachment.cursor_rev = max(attachment.cursor_rev, rows[-1].rev - 1)
            if not frames:
                self._load(attachment, effects)
            return effects
        attachment.cursor_rev = max(attachment.cursor_rev, request.head_rev)
        attachment.replay = None
        self._advance(attachment, effects)
        return effects

    # -- inside -----------------------------------------------------------------------------------------

    def status(self) -> str:
        """active | idle | offline, from attachments, what they say of attention, and grace."""
        return self._status

    def _present_status(self, now: float | None) -> str:
        if self.attachments:
            seen = any(a.attention in ("focused", "visible") for a in self.attachments)
            return "active" if seen else "idle"
        if now is not None and now >= self.grace_deadline:
            return "offline"
        return self._status  # grace: as it was

    def _presence(self, effects: list[Effect], now_ms: int, now: float | None = None) -> None:
        status = self._present_status(now)
        if status != self._status:
            self._status = status
            if status == "offline":
                self.last_seen_ms = self.last_seen_ms or now_ms
            effects.append(PresenceChanged(status))

    def _welcome(self, attachment: Attachment, recovered: bool | None, now_ms: int) -> Send:
        frame = server_frames.welcome(
            session_id=attachment.session_id,
            device_id=attachment.device,
            epoch=self.epoch,
            last_seq=self.seq,
            rev=self.rev,
            unread_count=self.unread,
            heartbeat_ms=self._limits.heartbeat_ms,
            recovered=recovered,
            server_time=rfc3339(now_ms),
        )
        return Send((attachment,), frame, attachment.cursor_seq, attachment.cursor_rev, epoch=self.epoch)

    def _lost(self, attachment: Attachment, now_ms: int) -> list[Effect]:
        """Something between a replay's position and the head was pruned: a WELCOME says so, at the head."""
        attachment.replay = None
        attachment.cursor_seq = attachment.acked_seq = self.seq
        attachment.cursor_rev = attachment.acked_rev = self.rev
        effects: list[Effect] = [self._welcome(attachment, False, now_ms)]
        self._advance(attachment, effects)
        return effects

    def _take_position(self, attachment: Attachment, epoch: str, last_seq: int, last_rev: int | None) -> bool:
        """Set the cursor to a client's position; False if nothing can be replayed from there."""
        if epoch != self.epoch or last_seq > self.seq or last_seq < 0:
            return False
        attachment.cursor_seq = attachment.acked_seq = last_seq
        attachment.cursor_rev = self.rev if last_rev is None else max(0, min(last_rev, self.rev))
        attachment.acked_rev = attachment.cursor_rev
        seq, rev = self._pruned
        there = last_seq >= seq and attachment.cursor_rev >= rev
        attachment.positioned = there and last_rev is not None
        if there or self._in_log(attachment):
            return True  # nothing of it is gone, or not from here
        attachment.cursor_seq = attachment.acked_seq = self.seq
        attachment.cursor_rev = attachment.acked_rev = self.rev
        return False

    def _resume(
        self,
        attachment: Attachment,
        epoch: str,
        last_seq: int,
        last_rev: int | None,
        now_ms: int,
        acknowledged_at: float | None = None,
    ) -> list[Effect]:
        self.recent.expire(now_ms)
        attachment.cursor_seq = attachment.acked_seq = self.seq
        attachment.cursor_rev = attachment.acked_rev = self.rev
        recovered = self._take_position(attachment, epoch, last_seq, last_rev)
        attachment.first_frame_seen = True
        effects: list[Effect] = [self._welcome(attachment, recovered, now_ms)]
        if recovered and acknowledged_at is not None:
            rev = None if last_rev is None else attachment.cursor_rev
            self._position_acknowledges(attachment, last_seq, rev)
            effects += self.acknowledge(attachment, last_seq, (), acknowledged_at, now_ms, rev)
        self._advance(attachment, effects)
        return effects

    def _emit(self, entry: LogEntry, told: int | None = None) -> list[Effect]:
        """Log and write one frame; `told` is the rev a connection has with it, if not the entry's."""
        self.rev = entry.rev
        self.recent.add(entry)
        to: list[Attachment] = []
        for attachment in self.attachments:
            if attachment.phase is Phase.LIVE:
                if entry.seq:
                    attachment.cursor_seq = entry.seq
                attachment.cursor_rev = entry.rev
                to.append(attachment)
        if not to:
            return []
        rev = entry.rev if told is None else told
        return [Send(tuple(to), entry.frame, entry.seq, rev, False, False, entry.update)]

    def _advance(self, attachment: Attachment, effects: list[Effect]) -> None:
        """Bring an attachment from its cursor towards the head, and to LIVE once it is there."""
        attachment.wait_deadline = 0.0
        attachment.loading = None
        whole = self._in_log(attachment)
        if whole and attachment.positioned:
            # It may be from the middle of a replay from the store, which tells each row once, at the rev of
            # its last change: of a row that changed again since, the log has that last change alone.
            missed = self.recent.missed(attachment.cursor_seq, attachment.cursor_rev)
            whole = all(entry.seq for entry in missed)
        attachment.positioned = False
        if not whole:
            attachment.phase = Phase.REPLAYING
            attachment.replay = ReplayStart(attachment.cursor_seq, self.rev, False)
            self._load(attachment, effects)
            return
        missed = self.recent.missed(attachment.cursor_seq, attachment.cursor_rev)
        for index, entry in enumerate(missed):
            # As in a replay from the store: the position's rev moves only with the last frame.
            rev = self.rev if index == len(missed) - 1 else 0
            effects.append(Send((attachment,), entry.frame, entry.seq, rev, True, False, entry.update))
        attachment.cursor_seq, attachment.cursor_rev = self.seq, self.rev
        attachment.phase = Phase.LIVE
        if attachment.count_due:
            attachment.count_due = False
            frame = server_frames.unread_count(self.unread, self.rev)
            effects.append(Send((attachment,), frame, 0, self.rev, True))

    def _load(self, attachment: Attachment, effects: list[Effect]) -> None:
        """Ask for the next page of a replay from the store."""
        replay, limit = attachment.replay, self._limits.replay_page
        assert replay is not None
        if replay.in_changes:
            attachment.loading = LoadChanges(
                attachment, attachment.cursor_rev, replay.seq, replay.head_rev, limit, self.rev
            )
        else:
            attachment.loading = LoadNotifications(attachment, attachment.cursor_seq, limit, self.seq)
        effects.append(attachment.loading)

    def _in_log(self, attachment: Attachment) -> bool:
        """Whether the recent window holds everything after an attachment's cursor."""
        return attachment.cursor_rev >= self.recent.since and attachment.cursor_seq >= self.recent.oldest_seq(
            self.seq
        )
