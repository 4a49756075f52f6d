"""Digests: what may wait is collected per user and category, and told together when the user wants it. Pure.

A digest is no row of its own: the pushes that wait in it carry its id, which follows from whom it is for,
what about, how often and when it is due. So whoever plans the next one finds it without looking, and a second
digest for the same moment cannot come to be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from carillon.ids import UserKey

OVERFLOW: Final = "overflow"
"""Frequency of the digest of what exceeds a limit: one over all categories, due as soon as there is room."""
FLUSHED: Final = "flushed"
"""Reason: a service wants it now, whether the user looks or not. Preferences hold it as ever."""
FLUSHED_BY_USER: Final = "flushed by the user"
"""Reason: the user wants it now: neither quiet hours nor do-not-disturb nor limits hold it."""
REMOVED: Final = "removed"
"""Reason: taken out of its digest."""
EXPIRED: Final = "expired"


class Key(NamedTuple):
    """What makes a digest.

    Attributes:
        frequency: hourly, daily or weekly; OVERFLOW.
        due_ms: when it is sent.
    """

    user: UserKey
    category: str | None
    frequency: str
    due_ms: int


def digest_id(key: Key) -> bytes:
    """The id of a digest: a UUIDv8 (RFC 9562 §5.8) that whoever knows the key comes to."""
    category = b"-" if key.category is None else b"+" + key.category.encode()
    parts = (
        key.user.tenant.encode(),
        key.user.user.encode(),
        category,
        key.frequency.encode(),
        b"%d" % key.due_ms,
    )
    # Lengths first: no two keys are the same bytes.
    text = b"".join(b"%d:" % len(part) + part for part in parts)
    raw = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "big")
    raw = raw & ~(0xF << 76) & ~(0b11 << 62) | (0x8 << 76) | (0b10 << 62)
    return raw.to_bytes(16, "big")


def key_of(user: UserKey, category: str | None, frequency: str, due_ms: int) -> Key:
    """The digest that one event waits in."""
    return Key(user, None if frequency == OVERFLOW else category, frequency, due_ms)


class Item(NamedTuple):
    """A push that waited in a digest and may be told now."""

    delivery: int
    seq: int
    digest: Hashable
    """Which digest, and on which channel."""


class Told(NamedTuple):
    """One push for a digest.

    Attributes:
        carrier: the outbox row that is sent: of the newest item.
        items: outbox rows of all items that were looked at, the carrier's included, oldest first.
        more: how many it tells beyond them.
    """

    carrier: int
    items: tuple[int, ...]
    more: int = 0


def tell(items: Iterable[Item], dealt_with: Collection[int] = ()) -> list[Told]:
    """The pushes to send: one for each digest and channel of which anything is left.

    Args:
        dealt_with: outbox rows whose notification was read, archived, ... at the last moment.
    """
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        if item.delivery not in dealt_with:
            found.setdefault(item.digest, []).append(item)
    told: list[Told] = []
    for some in found.values():
        some.sort(key=lambda item: (item.seq, item.delivery))
        told.append(Told(some[-1].delivery, tuple(item.delivery for item in some)))
    return told


class Summary(NamedTuple):
    """What a digest's push says.

    Attributes:
        titles: of the newest items, newest first.
    """

    title: str
    body: str | None


def summary(count: int, titles: Sequence[str], body: str | None) -> Summary:
    """The words of a digest for which the tenant has none.

    Args:
        count: of items.
        titles: of the newest, newest first.
        body: of the newest; used if it is the only one.
    """
    newest = titles[0] if titles else ""
    if count == 1:
        return Summary(newest, body)
    left = count - len(titles)
    lines = [*titles, f"+{left}"] if left > 0 else titles
    return Summary(f"{count} new notifications", "\n".join(lines))


def params(count: int, category: str | None, titles: Sequence[str], types: Sequence[str]) -> dict[str, Any]:
    """What a tenant's template for digests is given."""
    return {
        "count": count,
        "category": category,
        "titles": list(titles),
        "types": list(dict.fromkeys(types)),
        "more": max(0, count - len(titles)),
    }


def latest_expiry(expiries: Iterable[int | None]) -> int | None:
    """Until when a push that speaks for these is worth sending: until the last of them expires."""
    latest = 0
    for expires_ms in expiries:
        if expires_ms is None:
            return None
        latest = max(latest, expires_ms)
    return latest or None
