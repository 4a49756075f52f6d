"""Presence as others see it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from carillon.client_frames import BadFrameError, parse_text
from carillon.ids import UserKey
from carillon.messages import ClientMode, DevicePresence
from carillon.presence import as_seen, devices_of, mirror_key, mirror_value
from carillon.session import Head, Session, SessionLimits


@pytest.mark.parametrize(
    ("last_ms", "invisible_ms", "seen"),
    [
        (9_000, None, ("active", 9_000)),
        (9_000, 5_000, ("offline", 5_000)),  # was there when it hid, and is since
        (3_000, 5_000, ("offline", 3_000)),  # hid while it was away
        (None, 5_000, ("offline", 5_000)),
        (None, None, ("active", None)),
    ],
)
def test_who_hides_was_last_seen_when_it_hid(
    last_ms: int | None, invisible_ms: int | None, seen: tuple[str, int | None]
) -> None:
    """Nothing that an invisible user does moves what others see."""
    assert as_seen("active", last_ms, invisible_ms) == seen


def test_the_best_connection_of_a_device_counts() -> None:
    """Connections of a device are one; focused > visible > idle > hidden, and since when it is so."""
    session = Session("u", Head("e", 0, 0, 0), SessionLimits())
    now = 0
    for conn, (device, state) in enumerate(
        [("laptop", "hidden"), ("phone", "idle"), ("laptop", "visible"), ("laptop", "visible")]
    ):
        now += 10
        session.attach(None, conn, device, f"s{conn}", now / 1000, now, attention=state)
    assert devices_of(session.attachments) == [
        DevicePresence("laptop", "visible", 30, 3), DevicePresence("phone", "idle", 20, 1),
    ]  # fmt: skip
    assert devices_of([]) == []


def test_the_mirrors_format() -> None:
    """What docs/how-to/show-presence.md promises to other systems."""
    assert mirror_key(*UserKey("acme", "a:b")) == "carillon:presence:acme:a:b"
    assert json.loads(mirror_value("idle", 1_700_000_000_123)) == {
        "status": "idle", "lastSeenAt": "2023-11-14T22:13:20.123Z",
    }  # fmt: skip
    assert json.loads(mirror_value("offline", None)) == {"status": "offline", "lastSeenAt": None}


def test_set_presence_takes_the_modes_there_are() -> None:
    """SET_PRESENCE names a mode; anything else says what was expected."""
    assert parse_text(b'{"type":"SET_PRESENCE","mode":"invisible","id":1}', 7) == ClientMode(
        7, "invisible", 1
    )
    wrong: list[Any] = [None, "away", 1, ["auto"], {}]
    for mode in wrong:
        frame = json.dumps({"type": "SET_PRESENCE", "mode": mode}).encode()
        with pytest.raises(BadFrameError, match="expected mode to be one of auto, invisible"):
            parse_text(frame, 7)
