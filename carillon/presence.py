"""Presence as others see it: pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from carillon.attention import LEVELS
from carillon.messages import DevicePresence
from carillon.session import Attachment

ACTIVE: Final = "active"
IDLE: Final = "idle"
OFFLINE: Final = "offline"


def devices_of(attachments: Iterable[Attachment]) -> list[DevicePresence]:
    """The devices behind connections, in the order they came; of a device's connections the best counts.

    `since_ms` is when the best attention began; of equally good ones the earliest counts.
    """
    found: dict[str, DevicePresence] = {}
    for attachment in attachments:
        known = found.get(attachment.device)
        if known is None:
            found[attachment.device] = DevicePresence(
                attachment.device, attachment.attention, attachment.attention_since_ms
            )
            continue
        known.connections += 1
        level = LEVELS[attachment.attention] - LEVELS[known.attention]
        if level > 0:
            known.attention, known.since_ms = attachment.attention, attachment.attention_since_ms
        elif level == 0:
            known.since_ms = min(known.since_ms, attachment.attention_since_ms)
    return list(found.values())
