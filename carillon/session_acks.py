"""What devices acknowledge, as one user's session takes it: by `seq`, by id, by the revision that is shown.

What is acknowledged ends, or holds, the pushes that wait for it. A session knows those that it was told of;
what another one was told is a range, which the shell looks up. An acknowledgement that names a revision
covers the updates up to it, and none after it: their pushes are still wanted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, cast

from carillon.attachment import Attachment, DeviceMemory
from carillon.attention import ACTIVE, RECEIVED, STALE, signal_of
from carillon.effects import Acknowledged, AcknowledgedRange, Effect, Wake
from carillon.push_watch import PushWatch
from carillon.session_limits import SessionLimits

if TYPE_CHECKING:
    from carillon.session import Session

MAX_UNACKED: Final = 1000
"""Unacknowledged deliveries a session remembers; older ones are acknowledged by id through the store."""


class Acknowledging:
    """The part of a `Session` that is about acknowledgements."""

    __slots__ = ()

    attachments: list[Attachment]
    seq: int
    rev: int
    _limits: SessionLimits
    _unacked: dict[int, bytes]
    _pushes: PushWatch | None
    _began_seq: int
    _began_rev: int
    _devices: DeviceMemory | None

    def acknowledge(
        self,
        attachment: Attachment,
        seq: int | None,
        ids: Iterable[bytes],
        now: float,
        now_ms: int,
        rev: int | None = None,
    ) -> list[Effect]:
        """ACK of one connection: cumulative `seq` (bounded by what it was sent) and single ids.

        Args:
            rev: the newest that this device shows of any notification: what was updated after it is not
                covered. With `seq` it is cumulative, too, for updates. None: not told; all is as it is now.
        """
        effects: list[Effect] = []
        signal = signal_of(attachment.attention, attachment.reported)
        hits: list[int] = []
        acked: dict[bytes, None] = {}
        reached = 0
        if seq is not None:
            reached = min(seq, attachment.cursor_seq)
            if reached > attachment.acked_seq:
                since, attachment.acked_seq = attachment.acked_seq, reached
                hits = [s for s in self._unacked if since < s <= reached]
                acked = {self._unacked[s]: None for s in hits}
                if self._pushes:
                    acked |= dict.fromkeys(self._pushes.between(since, reached))
                if since < attachment.written_before:
                    upto = min(reached, attachment.written_before)
                    effects.append(self._range(attachment, since, upto, rev))
            if rev is not None:
                acked |= self._updates(attachment, min(rev, attachment.cursor_rev), effects)
        wanted = set(ids)
        if wanted:  # the store ignores ids of others and those acknowledged before
            named = [s for s, raw in self._unacked.items() if raw in wanted]
            reached = max(named, default=reached)
            hits += named
            acked |= dict.fromkeys(wanted)
        if attachment.owes_since_ms:  # it acknowledges: what it still owes is owed since now
            attachment.owes_since_ms = 0 if reached >= attachment.cursor_seq else now_ms
        if rev is not None and acked and self._pushes:  # of what this session does not know, the store does
            newer = self._pushes.newer(acked, rev)
            if newer:
                effects.append(Acknowledged(tuple(newer), STALE))
                acked = {raw: None for raw in acked if raw not in newer}
        if not acked:
            return effects
        if signal != RECEIVED:  # else another device has yet to show it
            for s in hits:
                self._unacked.pop(s, None)
        shown_on = attachment.device if signal == ACTIVE else ""
        effects.append(Acknowledged(tuple(acked), signal, shown_on, rev))
        if self._pushes:
            due = self._pushes.next_due
            self._pushes.signalled(acked, signal, now)
            if self._pushes.next_due < due:
                effects.append(Wake())
        return effects

    def _updates(self, attachment: Attachment, reached: int, effects: list[Effect]) -> dict[bytes, None]:
        """Updates up to a revision are acknowledged: those with a push known here; the rest is a range."""
        since = attachment.acked_rev
        if reached <= since:
            return {}
        attachment.acked_rev = reached
        if since < attachment.updated_before:
            upto = min(reached, attachment.updated_before)
            effects.append(self._range(attachment, since, upto)._replace(by_rev=True))
        return dict.fromkeys(self._pushes.updates(since, reached)) if self._pushes else {}

    def acknowledge_from(
        self,
        device: str | None,
        seq: int | None,
        ids: Iterable[bytes],
        now: float,
        now_ms: int,
        rev: int | None = None,
    ) -> tuple[list[Attachment], list[Effect]]:
        """An acknowledgement that came by another way than a connection.

        Args:
            device: None or one without a connection: some device of the user, of which nothing more is known.
            rev: as in `acknowledge`.

        Returns:
            The device's attachments, and the effects.
        """
        ids = list(ids)
        effects: list[Effect] = []
        mine = [a for a in self.attachments if a.device == device]
        for attachment in mine:
            effects += self.acknowledge(attachment, seq, ids, now, now_ms, rev)
        if not mine:
            nobody = Attachment(cast("Session", self), None, 0, device or "", "", now_ms)
            nobody.cursor_seq, nobody.cursor_rev = self.seq, self.rev
            if seq is not None:
                told = None if rev is None else min(rev, self.rev)
                self._position_acknowledges(nobody, min(seq, self.seq), told)
            effects += self.acknowledge(nobody, seq, ids, now, now_ms, rev)
        return mine, effects

    def _remember(self, seq: int, notification_id: bytes) -> None:
        unacked = self._unacked
        if len(unacked) >= MAX_UNACKED:
            del unacked[next(iter(unacked))]
        unacked[seq] = notification_id

    def _acknowledged_before(
        self, attachment: Attachment, began_seq: int, acked_seq: int, acked_rev: int, effects: list[Effect]
    ) -> None:
        """What this connection was written, and acknowledged, at the attachment before."""
        attachment.written_before = attachment.cursor_seq
        attachment.acked_seq = max(0, min(acked_seq, attachment.cursor_seq))
        attachment.updated_before = attachment.cursor_rev
        attachment.acked_rev = max(0, attachment.cursor_rev - MAX_UNACKED)  # which of them, it says itself
        if began_seq < attachment.acked_seq:
            # It may have been told to a shard that died before it wrote that down. What was written since
            # it may not show yet. If it told no revision, all updates of the range are newer than its begin.
            rev = min(acked_rev, attachment.cursor_rev)
            effects.append(self._range(attachment, began_seq, attachment.acked_seq, rev))

    def _position_acknowledges(self, attachment: Attachment, seq: int, rev: int | None) -> None:
        """What a position covers its device has: prepares `acknowledge` of it. How much of that is new only
        this session knows; of what was before it, as much as fits a page is told again."""
        known, known_rev = self._memory().acknowledged(attachment.device, seq, rev or 0)
        attachment.acked_seq = max(known, seq - MAX_UNACKED, 0)
        attachment.written_before = min(seq, self._began_seq)
        if rev is not None:
            attachment.acked_rev = max(known_rev, rev - MAX_UNACKED, 0)
            attachment.updated_before = min(rev, self._began_rev)

    def _memory(self) -> DeviceMemory:
        if self._devices is None:
            self._devices = DeviceMemory(self._limits.remembered_devices)
        return self._devices

    def _range(
        self, attachment: Attachment, after_seq: int, upto_seq: int, rev: int | None = None
    ) -> AcknowledgedRange:
        signal = signal_of(attachment.attention, attachment.reported)
        device = attachment.device if signal == ACTIVE else ""
        return AcknowledgedRange(after_seq, upto_seq, signal, device, rev)
