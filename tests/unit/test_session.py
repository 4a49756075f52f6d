"""The session: readable claims. tests/unit/test_session_machine.py looks for what these do not think of."""

from __future__ import annotations

import json
from typing import Any

import pytest

from carillon import server_frames
from carillon.attention import AWAY
from carillon.change_frames import change_frames
from carillon.effects import Acknowledged
from carillon.ids import uuid_text
from carillon.notification import NotificationRow
from carillon.recent import LogEntry, Recent
from carillon.session import (
    Attachment,
    Close,
    Effect,
    Head,
    LoadChanges,
    LoadNotifications,
    Phase,
    PresenceChanged,
    PushSignal,
    Send,
    Session,
    SessionLimits,
)
from carillon.session_acks import MAX_UNACKED
from tests.unit.session_model import NOW_MS, USER_JSON, Changed, New, Store, id_of

LIMITS = SessionLimits(recent_window=5, replay_page=3, max_connections=3)


class Kit:
    """One session over a model store; whatever is committed is told at once."""

    def __init__(self, earlier: int = 0, limits: SessionLimits = LIMITS) -> None:
        self.store = Store()
        for _ in range(earlier):
            self.store.append()
        self.session = Session("u", self.store.head(), limits)
        self.now = 100.0
        self.conns = 0

    def attach(self, **more: Any) -> tuple[Attachment, list[Effect]]:
        self.conns += 1
        return self.session.attach(
            "gateway", self.conns, f"d{self.conns}", f"s{self.conns}", self.now, NOW_MS, **more
        )

    def attach_live(self) -> Attachment:
        attachment, _ = self.attach()
        self.session.ready(attachment)
        return attachment

    def publish(self, count: int = 1) -> list[Effect]:
        effects: list[Effect] = []
        for _ in range(count):
            effects += self.tell(self.store.append())
        return effects

    def tell(self, commit: New | Changed | None) -> list[Effect]:
        assert commit is not None
        if isinstance(commit, New):
            return self.session.deliver(commit.id, commit.seq, commit.rev, commit.unread, commit.content)
        return self.session.state_changed(commit.rev, commit.unread, commit.frames, update=commit.update)

    def change(self, op: str, *seqs: int) -> list[Effect]:
        return self.tell(self.store.change(op, list(seqs), upto=max(seqs)))

    def ack(self, attachment: Attachment, seq: int | None, *ids: bytes) -> list[Effect]:
        return self.session.acknowledge(attachment, seq, ids, self.now, NOW_MS)

    def look(self, attachment: Attachment, state: str, viewing: str | None = None) -> list[Effect]:
        return self.session.visibility(attachment, state, viewing, self.now, NOW_MS)

    def finish(self, effects: list[Effect], drain: bool = True) -> list[Send]:
        """Answer loads and take pages until nothing is asked any more; returns everything written."""
        sends: list[Send] = []
        todo = list(effects)
        while todo:
            effect = todo.pop(0)
            if isinstance(effect, Send):
                sends.append(effect)
                if effect.page_end and drain:
                    todo += self.session.drained(effect.to[0])
            elif isinstance(effect, LoadNotifications):
                rows = self.store.answer(effect)
                todo += self.session.notifications_loaded(effect.to, rows, effect, NOW_MS)
            elif isinstance(effect, LoadChanges):
                todo += self.session.changes_loaded(effect.to, self.store.answer(effect), effect, NOW_MS)
        return sends


def frames(effects: list[Any]) -> list[dict[str, Any]]:
    return [json.loads(e.frame) for e in effects if isinstance(e, Send)]


def seqs(effects: list[Any]) -> list[int]:
    return [f["notification"]["seq"] for f in frames(effects) if f["type"] == "NEW_NOTIFICATION"]


def kinds(effects: list[Any]) -> list[str]:
    return [f["type"] for f in frames(effects)]


def test_welcome_comes_first_and_tells_the_head() -> None:
    """WELCOME with epoch, lastSeq, rev and unread as committed; recovered is null without a position."""
    kit = Kit(earlier=2)
    _, effects = kit.attach()
    assert frames(effects)[0] == {
        "type": "WELCOME", "sessionId": "s1", "deviceId": "d1", "epoch": "e1", "lastSeq": 2, "rev": 2,
        "unreadCount": 2, "heartbeatMs": 25_000, "recovered": None,
        "serverTime": "2023-11-14T22:13:20.000Z",
    }  # fmt: skip
    assert [type(e) for e in effects] == [Send, PresenceChanged]
    assert (effects[0].seq, effects[0].rev, effects[0].epoch) == (2, 2, "e1")  # type: ignore[union-attr]


def test_notifications_wait_for_the_first_frame() -> None:
    """Between WELCOME and the first frame nothing is written; then what came meanwhile, then live."""
    kit = Kit(earlier=1)
    attachment, _ = kit.attach()
    assert kit.publish(2) == []
    assert seqs(kit.session.ready(attachment)) == [2, 3]
    assert seqs(kit.publish()) == [4]


def test_the_wait_ends_by_itself() -> None:
    """No frame within resume_wait_s: live frames flow."""
    kit = Kit()
    attachment, _ = kit.attach()
    assert kit.session.next_deadline() == kit.now + LIMITS.resume_wait_s
    kit.publish()
    assert kit.session.tick(kit.now + 0.4, NOW_MS) == []
    assert seqs(kit.session.tick(kit.now + 0.5, NOW_MS)) == [1]
    assert attachment.phase is Phase.LIVE
    assert kit.session.next_deadline() is None


def test_resume_from_memory() -> None:
    """New notifications that the recent window holds are written without asking the store."""
    kit = Kit(earlier=1)
    kit.publish(2)
    attachment, _ = kit.attach()
    effects = kit.session.resume(attachment, "e1", 1, 1, kit.now, NOW_MS)
    assert kinds(effects) == ["WELCOME", "NEW_NOTIFICATION", "NEW_NOTIFICATION"]
    assert frames(effects)[0]["recovered"] is True
    assert [e.rev for e in effects if isinstance(e, Send)] == [1, 0, 3], "rev moves with the last frame"
    assert kinds(kit.publish()) == ["NEW_NOTIFICATION"]


def test_changes_that_were_missed_are_read_from_the_store() -> None:
    """A position from the middle of a replay: an edit that a later read covers is told, not only the read."""
    kit = Kit(earlier=1)
    kit.change("edit", 1)
    kit.change("read", 1)
    _, effects = kit.attach(position=("e1", 1, 2))
    sent = kit.finish(effects)
    assert [f["type"] for f in frames(sent)] == ["WELCOME", "NOTIFICATION_UPDATED", "NOTIFICATIONS_READ"]
    assert sent[-1].rev == 3


def test_resume_from_the_store_is_paced_in_pages() -> None:
    """Beyond the window: pages of replay_page, the next one only when the socket has taken the last."""
    kit = Kit(earlier=8)
    _, effects = kit.attach(position=("e1", 1, 1))
    first = kit.finish(effects, drain=False)
    assert seqs(first) == [2, 3, 4]
    assert [s.page_end for s in first] == [False, False, False, True]
    assert kit.publish() == [], "live frames wait behind the replay"
    rest = kit.finish(kit.session.drained(first[-1].to[0]))
    assert seqs(rest) == [5, 6, 7, 8, 9]
    assert seqs(kit.publish()) == [10]


def test_changes_follow_the_notifications() -> None:
    """States of what the client has come after everything it does not have, in rev order."""
    kit = Kit(earlier=6)
    for op, seq in (("read", 2), ("archive", 1), ("click", 6)):
        kit.store.change(op, [seq])
    kit.session = Session("u", kit.store.head(), LIMITS)
    _, effects = kit.attach(position=("e1", 4, 6))
    sent = kit.finish(effects)
    assert kinds(sent) == [
        "WELCOME", "NEW_NOTIFICATION", "NEW_NOTIFICATION", "NOTIFICATIONS_READ", "NOTIFICATION_ARCHIVED",
    ]  # fmt: skip
    assert frames(sent)[2]["notification"]["clicked"] is True, "what is new comes with its state"
    assert [s.rev for s in sent] == [6, 0, 0, 7, 8]


def test_a_position_without_rev_is_not_told_old_changes_but_sees_states() -> None:
    """lastRev absent: changes of what the client has are left out; what it gets has its true state."""
    kit = Kit(earlier=1)
    kit.publish()
    kit.change("read", 1)
    kit.change("read", 2)
    _, effects = kit.attach(position=("e1", 1, None))
    sent = frames(kit.finish(effects))
    read = {i for f in sent if f["type"] == "NOTIFICATIONS_READ" for i in f["notificationIds"]}
    assert uuid_text(id_of(2)) in read


@pytest.mark.parametrize("position", [("other", 1, 1), ("e1", 3, 1), ("e1", -1, 1)])
def test_what_cannot_be_recovered_is_told(position: tuple[str, int, int]) -> None:
    """Another epoch or a seq beyond the head: recovered false and no backlog, never a silent gap."""
    kit = Kit(earlier=2)
    _, effects = kit.attach(position=position)
    assert [f["recovered"] for f in frames(effects)] == [False]
    assert seqs(kit.publish()) == [3]


def test_a_late_resume_is_refused() -> None:
    """After the first frame: ERROR resume_too_late, close 4213, and the connection is gone."""
    kit = Kit()
    attachment = kit.attach_live()
    effects = kit.session.resume(attachment, "e1", 0, 0, kit.now, NOW_MS)
    assert frames(effects)[0]["code"] == "resume_too_late"
    assert isinstance(effects[1], Close)
    assert effects[1].code == 4213
    assert not kit.session.live
    assert kit.session.resume(attachment, "e1", 0, 0, kit.now, NOW_MS) == []
    assert kit.publish() == []


def test_a_reattached_socket_goes_on_where_it_was() -> None:
    """No WELCOME: what lies between the last written position and the head, then live."""
    kit = Kit(earlier=4)
    _, effects = kit.attach(position=("e1", 2, 2), reattach=True, ready=True)
    assert kinds(kit.finish(effects)) == ["NEW_NOTIFICATION", "NEW_NOTIFICATION"]
    assert seqs(kit.publish()) == [5]


def test_a_reattached_socket_of_another_history_is_told() -> None:
    """A new WELCOME with recovered false; RESUME is still possible if none was sent yet."""
    kit = Kit(earlier=1)
    attachment, effects = kit.attach(position=("other", 9, 9), reattach=True, ready=False)
    assert frames(effects)[0]["recovered"] is False
    assert frames(kit.session.resume(attachment, "e1", 1, 1, kit.now, NOW_MS))[0]["recovered"] is True


def test_every_device_gets_every_frame_in_one_send() -> None:
    """A frame is encoded once and goes to all live connections, the sender's too."""
    kit = Kit(earlier=1)
    first, second = kit.attach_live(), kit.attach_live()
    (sent,) = kit.publish()
    assert isinstance(sent, Send)
    assert sent.to == (first, second)
    (told,) = kit.change("read", 1)
    assert isinstance(told, Send)
    assert told.to == (first, second)


def test_a_gap_is_an_error_and_heals_from_the_store() -> None:
    """A seq that does not follow raises; after `heal` what was missed comes before what is new."""
    kit = Kit()
    kit.attach_live()
    kit.publish()
    kit.store.append()  # by another writer
    with pytest.raises(ValueError, match="expected seq 2"):
        kit.publish()
    sent = kit.finish(kit.session.heal(kit.store.head()))
    assert seqs(sent) == [2, 3]
    assert seqs(kit.publish()) == [4]


def test_a_change_it_was_not_told_of_heals() -> None:
    """A rev that does not follow: the change in between is read from the store and told."""
    kit = Kit(earlier=2)
    kit.attach_live()
    kit.store.change("read", [1])  # committed, but the answer was lost
    sent = kit.finish(kit.change("archive", 2))
    assert kinds(sent) == ["NOTIFICATIONS_READ", "NOTIFICATION_ARCHIVED"]
    kit.store.change("read", [2])
    with pytest.raises(ValueError, match="rev"):
        kit.publish()


def test_a_row_beyond_the_head_waits_for_its_deliver() -> None:
    """The store shows a commit before its writer tells: written once, by `deliver`."""
    kit = Kit(earlier=4)
    _, effects = kit.attach(position=("e1", 2, 2))
    commit = kit.store.append()
    assert seqs(kit.finish(effects)) == [3, 4]
    assert seqs(kit.tell(commit)) == [5]


def test_a_change_of_what_is_still_to_come_is_not_told_before_it() -> None:
    """Appended and read while changes are replayed: NEW_NOTIFICATION first, its state after or within it."""
    kit = Kit(earlier=4)
    kit.store.change("read", [1])
    kit.session = Session("u", kit.store.head(), LIMITS)
    _, effects = kit.attach(position=("e1", 4, 4))
    load = next(e for e in effects if isinstance(e, LoadNotifications))
    (changes,) = kit.session.notifications_loaded(load.to, [], load, NOW_MS)
    kit.publish()
    kit.change("read", 5)
    sent = kit.finish([changes])
    told = [f.get("notificationIds") or f["notification"]["id"] for f in frames(sent)]
    new, fifth = uuid_text(id_of(5)), [uuid_text(id_of(5))]
    assert told == [[uuid_text(id_of(1))], new, fifth]


def test_frames_of_one_rev_can_be_cut_anywhere() -> None:
    """Of several frames with one rev only the last carries it: a cut in between asks for the rest again."""
    rows = [
        NotificationRow(id_of(1), 1, 9, 1, '"title":"a"', archived_ms=NOW_MS, read_ms=NOW_MS),
        NotificationRow(id_of(2), 2, 9, 2, '"title":"b"', dismissed_ms=NOW_MS),
    ]
    whole = change_frames(rows, USER_JSON, 5, NOW_MS, more=False)
    assert [rev for rev, _, _ in whole] == [8, 8, 9]
    assert [json.loads(frame)["rev"] for _, frame, _ in whole] == [8, 8, 9]
    assert [rev for rev, _, _ in change_frames(rows, USER_JSON, 5, NOW_MS, more=True)] == [8, 8, 8]


def test_a_read_all_of_more_rows_than_a_page_is_read_whole() -> None:
    """One rev of many rows cannot be cut into pages: it is asked for again with room."""
    kit = Kit(earlier=9)
    kit.store.change("read_all", [], upto=9)
    kit.session = Session("u", kit.store.head(), LIMITS)
    _, effects = kit.attach(position=("e1", 9, 9))
    sent = kit.finish(effects)
    assert [len(f["notificationIds"]) for f in frames(sent)[1:]] == [9]


def test_retracted_and_expired_are_not_shown() -> None:
    """Of a retracted notification only that is told; an expired one moves the cursor in silence."""
    kit = Kit()
    for expired in (False, True, False):
        kit.store.append(expired=expired)
    kit.store.change("retract", [1])
    kit.session = Session("u", kit.store.head(), LIMITS)
    _, effects = kit.attach(position=("e1", 0, 0))
    sent = kit.finish(effects)
    assert kinds(sent) == ["WELCOME", "NOTIFICATION_RETRACTED", "NEW_NOTIFICATION"]
    assert seqs(sent) == [3]


@pytest.mark.parametrize("later_ms", [NOW_MS + 5, None])
def test_the_window_shows_what_expires_later_than_it_said_first(later_ms: int | None) -> None:
    """An update put the end off, or took it away: at the first end nothing is gone, nor looked at again."""
    recent, raw = Recent(5, 0), bytes(16)
    recent.add(LogEntry(1, 1, b"new", False, raw, NOW_MS))
    recent.add(LogEntry(2, 0, b"later", True, raw, later_ms))
    recent.expire(NOW_MS)
    assert [entry.frame for entry in recent.missed(0, 0)] == [b"new", b"later"]
    assert recent.next_expiry_ms == later_ms
    if later_ms is not None:
        recent.expire(later_ms)
        assert b"RETRACTED" in recent.missed(1, 1)[0].frame
        assert recent.next_expiry_ms is None


def test_the_window_tells_what_expired_after_an_update_as_gone() -> None:
    """Whoever has an earlier version has to let it go; who has the last knows its time; nobody sees it."""
    recent, raw = Recent(5, 0), bytes(16)
    recent.add(LogEntry(1, 1, b"new", False, raw))
    recent.add(LogEntry(2, 0, b"expires", True, raw, NOW_MS))
    recent.add(LogEntry(3, 0, b"edited again", True, raw, NOW_MS))
    recent.add(LogEntry(4, 2, b"other", False, id_of(2)))
    recent.expire(NOW_MS - 1)
    assert [entry.frame for entry in recent.missed(1, 1)] == [b"other", b"expires", b"edited again"]
    recent.expire(NOW_MS)
    gone = server_frames.notification_state("RETRACTED", raw, 3)
    missed = recent.missed(1, 1)
    assert [(entry.frame, entry.update) for entry in missed] == [(b"other", False), (gone, False)]
    assert [entry.frame for entry in recent.missed(2, 3)] == []
    assert recent.next_expiry_ms is None


def test_answers_that_are_stale_change_nothing() -> None:
    """A second drain, an answer that came twice, or one for a detached connection: no frame."""
    kit = Kit(earlier=8)
    attachment, effects = kit.attach(position=("e1", 0, 0))
    load = next(e for e in effects if isinstance(e, LoadNotifications))
    rows = kit.store.answer(load)
    assert kit.session.drained(attachment) == [], "its page is on the way already"
    assert seqs(kit.session.notifications_loaded(attachment, rows, load, NOW_MS)) == [1, 2, 3]
    assert kit.session.notifications_loaded(attachment, rows, load, NOW_MS) == []
    (second,) = kit.session.drained(attachment)
    kit.session.detach(attachment, False, kit.now, NOW_MS)
    assert kit.finish([second]) == []
    assert kit.session.drained(attachment) == []
    assert kit.session.ready(attachment) == []


def test_an_acknowledgement_is_cumulative_for_its_connection() -> None:
    """ACK seq covers what this connection was sent, not what it never saw, and nothing twice."""
    kit = Kit()
    first = kit.attach_live()
    kit.publish(2)
    second = kit.attach_live()
    kit.publish(1)
    assert kit.ack(second, 3) == [Acknowledged((id_of(3),))]
    assert kit.ack(first, 99) == [Acknowledged((id_of(1), id_of(2)))]
    assert kit.ack(first, 99) == []
    assert kit.ack(first, None, id_of(7)) == [Acknowledged((id_of(7),))], "the store knows"


def test_memory_is_bounded() -> None:
    """The log keeps recent_window frames, the unacknowledged MAX_UNACKED ids, whatever happens."""
    kit = Kit()
    attachment = kit.attach_live()
    kit.publish(MAX_UNACKED + 50)
    assert len(kit.session.recent) == LIMITS.recent_window
    (acked,) = kit.ack(attachment, kit.store.seq)
    assert isinstance(acked, Acknowledged)
    assert acked.ids[0] == id_of(51)
    assert len(acked.ids) == MAX_UNACKED


def test_the_oldest_connection_goes() -> None:
    """One more than max_connections: the oldest is closed with 4004 and gets nothing any more."""
    kit = Kit()
    oldest = kit.attach_live()
    kit.attach_live()
    kit.attach_live()
    newest, effects = kit.attach()
    close = next(e for e in effects if isinstance(e, Close))
    assert (close.to, close.code) == (oldest, 4004)
    kit.session.ready(newest)
    (sent,) = kit.publish()
    assert isinstance(sent, Send)
    assert oldest not in sent.to
    assert len(sent.to) == 3


def test_what_was_held_for_the_oldest_connection_is_sent() -> None:
    """A push held since a focused device showed its item is due once that device had to go and grace ends."""
    kit = Kit()
    oldest = kit.attach_live()
    kit.look(oldest, "focused")
    kit.publish()
    kit.session.push_planned(id_of(1), 1, None, NOW_MS + 5000, NOW_MS + 60_000, kit.now, NOW_MS)
    kit.ack(oldest, 1)
    for _ in range(LIMITS.max_connections):
        kit.attach_live()
    due = kit.session.next_deadline()
    assert due is not None
    assert due <= kit.now + LIMITS.grace_s
    assert PushSignal((id_of(1),), AWAY) in kit.session.tick(due, NOW_MS)


def test_presence_follows_attention_and_grace() -> None:
    """active with a visible device, idle when all are hidden, kept through grace, then offline."""
    kit = Kit()
    attachment, effects = kit.attach()
    assert PresenceChanged("active") in effects
    assert kit.look(attachment, "hidden") == [PresenceChanged("idle")]
    assert kit.look(attachment, "hidden") == []
    assert kit.session.detach(attachment, False, kit.now, NOW_MS) == []
    assert kit.session.status() == "idle"
    assert kit.session.next_deadline() == kit.now + LIMITS.grace_s
    assert not kit.session.ended(kit.now)
    later = kit.now + LIMITS.grace_s
    assert kit.session.tick(later, NOW_MS) == [PresenceChanged("offline")]
    assert kit.session.ended(later)


def test_a_clean_close_has_a_short_grace_and_a_reload_does_not_flap() -> None:
    """1000: half a second; a connection that comes back within grace changes nothing."""
    kit = Kit()
    attachment, _ = kit.attach()
    kit.session.detach(attachment, True, kit.now, NOW_MS)
    assert kit.session.next_deadline() == kit.now + LIMITS.clean_close_grace_s
    _, effects = kit.attach()
    assert not [e for e in effects if isinstance(e, PresenceChanged)]
    assert kit.session.tick(kit.now + 99, NOW_MS) == []


def test_heads_are_values() -> None:
    """A session takes its position from the head it was loaded with."""
    session = Session("u", Head("e9", 4, 7, 2), LIMITS)
    assert (session.epoch, session.seq, session.rev, session.unread, session.live) == ("e9", 4, 7, 2, False)
