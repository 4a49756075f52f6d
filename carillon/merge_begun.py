"""What the own row of a notification says of the windows that it began: pure.

Most windows end as they began, with one event. Nothing is written of them but this text in the row of the
notification, and numbers by which an index finds it; a row of its own gets a window, and the event that
began it, once something is merged (docs/adr/0015-windows-without-rows.md).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

DAY_MS: Final = 86_400_000
"""No window is longer (`MAX_WINDOW_S` of carillon/event_rules.py, the settings of `merge`)."""
HASH_BITS: Final = 44
"""Of a key, in a slot."""
_HASH_MASK: Final = (1 << HASH_BITS) - 1
_HASH_DIGITS: Final = HASH_BITS // 4
_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(list[str | int | None]).decode


class Begun(NamedTuple):
    """What the row of a notification that began windows has beside others.

    Attributes:
        text: see `pack`.
        slot, second: of its first and its second window, where it is found by them.
    """

    text: str | None
    slot: int | None
    second: int | None = None


class Opening(NamedTuple):
    """How a notification began its windows.

    Attributes:
        source: event | tenant: who asked for it.
        at_ms: when they began.
        notified_ms: when the user was disturbed by it, or will be.
        actor: who is counted; None: nobody is.
        windows: keys and ends (ms); the last is of the way in which others are merged into it.
    """

    source: str
    at_ms: int
    notified_ms: int
    actor: str | None
    windows: tuple[tuple[str, int], ...]

    @property
    def how(self) -> str:
        """In which way others are merged into it, or dropped."""
        return self.windows[-1][0].partition(":")[0]

    def found_by(self, slots: tuple[int | None, ...]) -> list[tuple[str, int]]:
        """The windows that are its own still: others may have begun anew elsewhere."""
        return [(key, ends_ms) for key, ends_ms in self.windows if slot_of(key, ends_ms) in slots]


def pack(opening: Opening) -> str:
    """As text, JSON: who asked, when, how much later the user is told, the actor; keys, and lengths in ms."""
    source, at_ms, notified_ms, actor, windows = opening
    who = "null" if actor is None else _encode(actor).decode()
    keys = ",".join([f'"{key}",{ends_ms - at_ms}' for key, ends_ms in windows])
    return f'["{source}",{at_ms},{notified_ms - at_ms},{who},{keys}]'


def begun_by_one(
    source: str, at_ms: int, notified_ms: int, actor: str | None, key: str, number: int, window_ms: int
) -> Begun:
    """What a notification says that began one window; `number` is the window's."""
    who = "null" if actor is None else _encode(actor).decode()
    text = f'["{source}",{at_ms},{notified_ms - at_ms},{who},"{key}",{window_ms}]'
    return Begun(text, (at_ms + window_ms) // DAY_MS << HASH_BITS | number & _HASH_MASK)


def unpack(text: str) -> Opening:
    """What `pack` was given."""
    source, at_ms, later_ms, actor, *rest = _decode(text)
    assert isinstance(source, str)
    assert isinstance(at_ms, int)
    assert isinstance(later_ms, int)
    assert not isinstance(actor, int)
    windows = tuple((str(key), at_ms + int(ms or 0)) for key, ms in zip(rest[::2], rest[1::2], strict=True))
    return Opening(source, at_ms, at_ms + later_ms, actor, windows)


def hash_of(key: str) -> int:
    """A part of a key's digest: enough to tell the windows of one user apart, nearly always."""
    return int(key[-_HASH_DIGITS:], 16)


def number_of(stream: int, key: str) -> int:
    """A window of all windows as one number, which ends with its key's hash."""
    return stream << HASH_BITS | int(key[-_HASH_DIGITS:], 16)


def slot_of(key: str, ends_ms: int) -> int:
    """Where a window is found that ends then: its last day, then its hash."""
    return ends_ms // DAY_MS << HASH_BITS | hash_of(key)


def slots_at(key: str, now_ms: int) -> tuple[int, int]:
    """Where a window may be found that has not ended: it ends today or tomorrow."""
    today = now_ms // DAY_MS << HASH_BITS | hash_of(key)
    return today, today + (1 << HASH_BITS)


def open_slots(now_ms: int) -> tuple[int, int]:
    """The least and the greatest slot of windows that may not have ended."""
    today = now_ms // DAY_MS << HASH_BITS
    return today, today + (2 << HASH_BITS) - 1
