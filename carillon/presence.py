"""Presence as others see it: pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from carillon.attention import LEVELS
from carillon.clock import rfc3339
from carillon.messages import DevicePresence

if TYPE_CHECKING:
    from carillon.attachment import Attachment

MODES: Final = ("auto", "invisible")
"""How a user wants to be seen: as it is, or as offline."""


def as_seen(status: str, last_seen_ms: int | None, invisible_since_ms: int | None) -> tuple[str, int | None]:
    """Status and last seen (ms) as others may know them.

    Who is invisible looks offline since it became so; what it does later changes nothing of that.
    """
    if invisible_since_ms is None:
        return status, last_seen_ms
    return "offline", invisible_since_ms if last_seen_ms is None else min(last_seen_ms, invisible_since_ms)


def mirror_key(tenant: str, user: str) -> str:
    """The key of a user in Redis. No tenant has a colon in its name, so it is unambiguous."""
    return f"carillon:presence:{tenant}:{user}"


def mirror_value(status: str, last_seen_ms: int | None) -> bytes:
    """The value of such a key: compact JSON."""
    seen = "null" if last_seen_ms is None else f'"{rfc3339(last_seen_ms)}"'
    return f'{{"status":"{status}","lastSeenAt":{seen}}}'.encode()


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
