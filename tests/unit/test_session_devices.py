"""What a session knows of devices that come back by HTTP: acknowledged positions, attention between polls."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from carillon.attention import SILENT, STALE
from carillon.effects import Acknowledged, AcknowledgedRange
from carillon.session import Attachment, Effect, SessionLimits
from tests.unit.session_model import NOW_MS, id_of
from tests.unit.test_session import Kit

LIMITS = SessionLimits(recent_window=5, replay_page=3, max_connections=5, remembered_devices=2)


class Devices(Kit):
    """A session whose devices have names."""

    def __init__(self, earlier: int = 0) -> None:
        super().__init__(earlier, LIMITS)

    def come(
        self, device: str, seq: int | None = None, **more: Any
    ) -> tuple[Attachment, list[tuple[list[bytes] | tuple[int, int], str]]]:
        """A stream or poll of a device, with its position; and what that acknowledges."""
        attachment, effects = self._come(device, seq, more)
        return attachment, acks(effects)

    def come_all(self, device: str, seq: int) -> list[Effect]:
        """The same, and everything that follows from it."""
        return self._come(device, seq, {})[1]

    def _come(self, device: str, seq: int | None, more: dict[str, Any]) -> tuple[Attachment, list[Effect]]:
        self.conns += 1
        if seq is not None:
            more |= {"position": (self.store.epoch, seq, self.store.rev), "began_seq": seq}
        attachment, effects = self.session.attach(
            "ingress", self.conns, device, f"s{self.conns}", self.now, NOW_MS, **more
        )
        self.session.ready(attachment)
        return attachment, effects

    def leave(self, attachment: Attachment) -> None:
        self.session.detach(attachment, False, self.now, NOW_MS)


def acks(effects: list[Effect]) -> list[tuple[list[bytes] | tuple[int, int], str]]:
    """What was acknowledged, by ids or as a range (after, up to), and as what; ranges of updates apart."""
    found: list[tuple[list[bytes] | tuple[int, int], str]] = []
    for effect in effects:
        if isinstance(effect, Acknowledged):
            found.append((sorted(effect.ids), effect.signal))
        elif isinstance(effect, AcknowledgedRange) and not effect.by_rev:
            found.append(((effect.after_seq, effect.upto_seq), effect.signal))
    return found


def told(effects: list[tuple[list[bytes] | tuple[int, int], str]]) -> list[list[bytes] | tuple[int, int]]:
    return [what for what, _ in effects]


def test_position_acknowledges_what_it_covers() -> None:
    """Of what this session told, by id and once; of what was before it, as a range, and once."""
    kit = Devices(earlier=4)
    poll, found = kit.come("tablet", 4)
    assert told(found) == [(0, 4)]
    kit.publish(3)
    kit.leave(poll)
    poll, found = kit.come("tablet", 6)
    assert told(found) == [[id_of(5), id_of(6)]]
    kit.leave(poll)
    poll, found = kit.come("tablet", 6)
    assert found == []
    kit.leave(poll)
    assert told(kit.come("tablet", 7)[1]) == [[id_of(7)]]


def test_position_of_another_history_acknowledges_nothing() -> None:
    """Neither one beyond the head nor one of another epoch says what the device has."""
    kit = Devices(earlier=4)
    assert kit.come("tablet", 9)[1] == []
    position = ("another", 3, 3)
    assert kit.come("phone", position=position, began_seq=3)[1] == []


def test_position_of_a_socket_acknowledges_nothing() -> None:
    """A WebSocket says itself what it has shown."""
    kit = Devices(earlier=4)
    assert kit.come("laptop", position=(kit.store.epoch, 4, 4))[1] == []


def test_acknowledgement_of_a_device_is_its_connections() -> None:
    """POST /api/ack counts for every connection of the device, and never beyond what that was sent."""
    kit = Devices()
    one, _ = kit.come("tablet")
    kit.come("phone")
    kit.publish(3)
    mine, effects = kit.session.acknowledge_from("tablet", 99, [], kit.now, NOW_MS)
    assert mine == [one]
    assert told(acks(effects)) == [[id_of(1), id_of(2), id_of(3)]]
    assert one.acked_seq == 3
    assert kit.session.acknowledge_from("tablet", 3, [], kit.now, NOW_MS)[1] == []


def test_acknowledgement_without_a_connection() -> None:
    """A device that is not connected, or is not named, acknowledges too: once per device, or by id."""
    kit = Devices(earlier=2)
    kit.come("laptop")
    kit.publish(2)
    mine, effects = kit.session.acknowledge_from("phone", 3, [], kit.now, NOW_MS)
    assert mine == []
    assert sorted(told(acks(effects)), key=str) == [(0, 2), [id_of(3)]]
    assert acks(kit.session.acknowledge_from("phone", 3, [], kit.now, NOW_MS)[1]) == []
    [(ids, _)] = acks(kit.session.acknowledge_from(None, None, [id_of(4)], kit.now, NOW_MS)[1])
    assert ids == [id_of(4)]


def test_attention_lasts_from_poll_to_poll() -> None:
    """What a polling device told holds for its next poll; a new word replaces it, also between two polls."""
    kit = Devices()
    poll, _ = kit.come("phone", poll=True, attention="hidden")
    kit.leave(poll)
    poll, _ = kit.come("phone", poll=True)
    assert (poll.attention, poll.reported) == ("hidden", True)
    kit.leave(poll)
    assert kit.session.visibility_from("phone", "focused", "order:1", kit.now, NOW_MS) == ([], [])
    poll, _ = kit.come("phone", poll=True)
    assert (poll.attention, poll.viewing) == ("focused", "order:1")
    found = kit.session.visibility_from("phone", "idle", None, kit.now, NOW_MS)
    assert found is not None
    assert found[0] == [poll]
    assert poll.attention == "idle"


def test_attention_of_streams_ends_with_them() -> None:
    """A stream says where its user looks when it comes: what the one before told is not kept."""
    kit = Devices()
    stream, _ = kit.come("phone", attention="hidden")
    kit.leave(stream)
    assert kit.session.visibility_from("phone", "idle", None, kit.now, NOW_MS) is None
    stream, _ = kit.come("phone")
    assert (stream.attention, stream.reported) == ("visible", False)


def test_memory_of_devices_is_bounded() -> None:
    """The device not heard of for longest is forgotten: then it tells, and is told, once more."""
    kit = Devices(earlier=4)
    for device in ("a", "b", "a", "c"):
        poll, _ = kit.come(device, 4, poll=True, attention="hidden")
        kit.leave(poll)
    assert kit.come("a", 4)[1] == []
    assert kit.come("c", 4)[1] == []
    assert told(kit.come("b", 4)[1]) == [(0, 4)]
    assert kit.session.visibility_from("b", "idle", None, kit.now, NOW_MS) is not None, "it is connected"
    poll, _ = kit.come("b", poll=True)
    assert not poll.reported


# -- updates ------------------------------------------------------------------------------------------


class Updates(Devices):
    """A session whose notifications are updated, each with a push that waits."""

    def push(self, seq: int, rev: int = 0) -> None:
        self.session.push_planned(id_of(seq), seq, None, NOW_MS + 60_000, None, self.now, NOW_MS, rev)

    def add(self) -> None:
        self.publish()
        self.push(self.store.seq)

    def update(self, seq: int) -> int:
        """Something is merged into it; returns the revision."""
        self.change("edit", seq)
        self.push(seq, self.store.rev)
        return self.store.rev

    def told(
        self, attachment: Attachment, seq: int | None, rev: int | None, *ids: bytes
    ) -> dict[str, list[bytes]]:
        """What an acknowledgement says of which notifications, by signal."""
        effects = self.session.acknowledge(attachment, seq, ids, self.now, NOW_MS, rev)
        return {e.signal: sorted(e.ids) for e in effects if isinstance(e, Acknowledged)}


def test_a_revision_acknowledges_updates_up_to_it() -> None:
    """What was shown before an update is delivered, no more; once the update is shown its push ends."""
    kit = Updates()
    screen = kit.attach_live()
    kit.add()
    kit.add()
    rev = kit.update(1)
    assert kit.told(screen, 2, rev - 1) == {SILENT: [id_of(2)], STALE: [id_of(1)]}
    assert kit.told(screen, 2, rev) == {SILENT: [id_of(1)]}
    assert kit.told(screen, 2, rev) == {}
    later = kit.update(2)
    assert kit.told(screen, 2, rev) == {}
    assert kit.told(screen, None, rev, id_of(2)) == {STALE: [id_of(2)]}
    assert kit.told(screen, 2, later + 7) == {SILENT: [id_of(2)]}  # never beyond what was written


@given(
    st.lists(
        st.tuples(st.sampled_from(("new", "update", "ack")), st.integers(0, 9), st.integers(0, 30)),
        max_size=40,
    )
)
def test_the_push_of_an_update_ends_once_it_is_acknowledged_and_not_before(
    steps: list[tuple[str, int, int]],
) -> None:
    """Whatever comes in whatever order: a push waits as long as no acknowledgement covers what it tells."""
    kit = Updates()
    screen = kit.attach_live()
    tells: dict[bytes, tuple[int, int]] = {}  # of each push that waits: seq and rev
    for step, which, rev in steps:
        if step == "new":
            kit.add()
            tells[id_of(kit.store.seq)] = kit.store.seq, 0
        elif step == "update" and kit.store.seq:
            seq = 1 + which % kit.store.seq
            tells[id_of(seq)] = seq, kit.update(seq)
        elif step == "ack":
            seq = min(which, kit.store.seq)
            ended = kit.told(screen, seq, rev).get(SILENT, [])
            reached = min(rev, kit.store.rev)
            covered = {raw for raw, (s, r) in tells.items() if (0 < r <= reached or (not r and s <= seq))}
            assert covered <= set(ended)
            assert not {raw for raw in ended if raw in tells and tells[raw][1] > reached}
            for raw in ended:
                tells.pop(raw, None)


def test_a_position_acknowledges_updates_as_a_range_where_their_pushes_are_not_known() -> None:
    """What another session planned is looked up, once; a session that planned it itself names it."""
    kit = Updates(earlier=4)
    ranges = [e for e in kit.come_all("tablet", 4) if isinstance(e, AcknowledgedRange)]
    assert [(e.after_seq, e.upto_seq, e.by_rev, e.rev) for e in ranges] == [
        (0, 4, False, 4),
        (0, 4, True, None),
    ]
    rev = kit.update(2)
    effects = kit.come_all("tablet", 4)
    assert [e.ids for e in effects if isinstance(e, Acknowledged)] == [(id_of(2),)]
    assert not [e for e in effects if isinstance(e, AcknowledgedRange)]
    assert rev == kit.store.rev


def test_a_connection_that_moved_acknowledges_the_updates_it_was_sent_before() -> None:
    """The session that wrote them died: the first acknowledgement with a revision looks them up."""
    kit = Updates(earlier=3)
    attachment, _ = kit.attach(
        position=(kit.store.epoch, 3, 3), reattach=True, ready=True, began_seq=3, acked_seq=3
    )
    effects = kit.session.acknowledge(attachment, 3, (), kit.now, NOW_MS, 3)
    assert [(e.after_seq, e.upto_seq) for e in effects if isinstance(e, AcknowledgedRange) and e.by_rev] == [
        (0, 3)
    ]
    assert kit.session.acknowledge(attachment, 3, (), kit.now, NOW_MS, 3) == []
