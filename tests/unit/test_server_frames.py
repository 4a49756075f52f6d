from __future__ import annotations

import json
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carillon import server_frames as frames

ID = bytes(range(16))
ID_TEXT = "00010203-0405-0607-0809-0a0b0c0d0e0f"
WHEN = "2023-11-14T22:13:20.123Z"

text = st.text(st.characters(exclude_categories=["Cs"]))
ref = st.one_of(st.integers(-(2**53) + 1, 2**53 - 1), text)

EXAMPLES: list[tuple[bytes, dict[str, Any]]] = [
    (
        frames.welcome("s1", "d1", "e1", 7, 9, 2, 25_000, None, WHEN),
        {
            "type": "WELCOME", "sessionId": "s1", "deviceId": "d1", "epoch": "e1", "lastSeq": 7, "rev": 9,
            "unreadCount": 2, "heartbeatMs": 25_000, "recovered": None, "serverTime": WHEN,
        },
    ),
    (frames.new_notification('{"id":"x"}'), {"type": "NEW_NOTIFICATION", "notification": {"id": "x"}}),
    (
        frames.notification_updated('{"id":"x"}'),
        {"type": "NOTIFICATION_UPDATED", "notification": {"id": "x"}},
    ),
    (
        frames.notifications_read([ID, ID], WHEN, 4),
        {"type": "NOTIFICATIONS_READ", "notificationIds": [ID_TEXT, ID_TEXT], "readAt": WHEN, "rev": 4},
    ),
    (
        frames.all_notifications_read(WHEN, 12, 4),
        {"type": "ALL_NOTIFICATIONS_READ", "readAt": WHEN, "upToSeq": 12, "rev": 4},
    ),
    (
        frames.notifications_seen([ID], 4),
        {"type": "NOTIFICATIONS_SEEN", "notificationIds": [ID_TEXT], "rev": 4},
    ),
    *(
        (
            frames.notification_state(kind, ID, 5),
            {"type": f"NOTIFICATION_{kind}", "notificationId": ID_TEXT, "rev": 5},
        )
        for kind in frames.STATE_KINDS
    ),
    (frames.unread_count(3, 8), {"type": "UNREAD_COUNT", "count": 3, "rev": 8}),
    (
        frames.presence("ü", "offline", None),
        {"type": "PRESENCE", "userId": "ü", "status": "offline", "lastSeenAt": None},
    ),
    (
        frames.presence("u", "idle", WHEN),
        {"type": "PRESENCE", "userId": "u", "status": "idle", "lastSeenAt": WHEN},
    ),
    (frames.ok("a"), {"type": "OK", "id": "a"}),
    (frames.pong(), {"type": "PONG"}),
    (frames.pong(3), {"type": "PONG", "id": 3}),
    (
        frames.error("invalid", "no", False),
        {"type": "ERROR", "code": "invalid", "message": "no", "temporary": False},
    ),
    (
        frames.error("busy", "yes", True, 4),
        {"type": "ERROR", "code": "busy", "message": "yes", "temporary": True, "id": 4},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("frame", "members"), EXAMPLES, ids=[e[1]["type"] for e in EXAMPLES])
def test_a_frame_is_compact_json_with_type_first(frame: bytes, members: dict[str, Any]) -> None:
    """Every frame has exactly the members of the protocol, in order, without white space."""
    assert frame.decode() == json.dumps(members, separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize(("frame", "members"), EXAMPLES, ids=[e[1]["type"] for e in EXAMPLES])
def test_the_msgpack_form_has_the_same_members_in_the_same_order(
    frame: bytes, members: dict[str, Any]
) -> None:
    """`transcode` keeps members and order; `type` stays first."""
    decoded = msgpack.unpackb(frames.transcode(frame))
    assert list(decoded.items()) == list(members.items())


@settings(deadline=None)
@given(ref=ref, code=text, message=text, temporary=st.booleans())
def test_any_text_survives_in_an_error(ref: str | int, code: str, message: str, temporary: bool) -> None:
    """Whatever is in `id`, code and message, the frame stays valid JSON and says the same."""
    members = {"type": "ERROR", "code": code, "message": message, "temporary": temporary, "id": ref}
    assert json.loads(frames.error(code, message, temporary, ref)) == members
    assert json.loads(frames.ok(ref)) == {"type": "OK", "id": ref}


def test_an_update_becomes_a_new_notification_for_a_legacy_client() -> None:
    """Only the type changes, and only that of NOTIFICATION_UPDATED."""
    updated = frames.notification_updated('{"id":"NOTIFICATION_UPDATED"}')
    assert frames.as_new_notification(updated) == frames.new_notification('{"id":"NOTIFICATION_UPDATED"}')
    assert frames.as_new_notification(frames.PONG) == frames.PONG


def test_an_unknown_state_is_refused() -> None:
    """A misspelled state never reaches a client."""
    with pytest.raises(ValueError, match="expected one of ARCHIVED"):
        frames.notification_state("READ", ID, 1)
