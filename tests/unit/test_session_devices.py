"""What a session knows of devices that come back by HTTP: acknowledged positions, attention between polls."""

from __future__ import annotations

from typing import Any

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
        self.conns += 1
        if seq is not None:
            more |= {"position": (self.store.epoch, seq, self.store.rev), "began_seq": seq}
        attachment, effects = self.session.attach(
            "ingress", self.conns, device, f"s{self.conns}", self.now, NOW_MS, **more
        )
        self.session.ready(attachment)
        return attachment, acks(effects)

    def leave(self, attachment: Attachment) -> None:
        self.session.detach(attachment, False, self.now, NOW_MS)


def acks(effects: list[Effect]) -> list[tuple[list[bytes] | tuple[int, int], str]]:
    """What was acknowledged, by ids or as a range (after, up to), and as what."""
    found: list[tuple[list[bytes] | tuple[int, int], str]] = []
    for effect in effects:
        if isinstance(effect, Acknowledged):
            found.append((sorted(effect.ids), effect.signal))
        elif isinstance(effect, AcknowledgedRange):
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
