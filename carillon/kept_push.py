"""Pushes kept with their notification: planned, and no rows of the outbox yet (docs/adr/0016-kept-pushes.md).

Most pushes of users who are there are ended by an acknowledgement within a second. Such a push is written as
a short text into its notification, by the statement that stores it, and moves to the outbox only when
something else than an acknowledgement comes: its time, a change by user or service, another shard.

The text is JSON: [channels, due ms, hold ms or null, gate or null, reason or null, chain, step, [devices]].
A mark before it says that it is over: "-" by an acknowledgement, "~" since its user was active at its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import msgspec

from carillon.attention import ALWAYS, DONE, HELD, on_signal
from carillon.clock import rfc3339

ACKNOWLEDGED_MARK: Final = "-"
ACTIVE_MARK: Final = "~"

_Fields = tuple[list[str], int, int | None, str | None, str | None, str, int, list[str]]

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(_Fields).decode


@dataclass(slots=True)
class KeptPush:
    """What waits for one notification. It stands where a row of the outbox does that nobody has claimed.

    Attributes:
        channels: the external ones of its step, one row each in the outbox.
        due_ms, hold_until_ms, gate, reason, chain, step: as in a row of the outbox.
        shown_on: devices that have shown it; they get no push of it.
        acknowledged: deliveredAt is set.
        written: its text as it was planned; None: not known.
    """

    notification: bytes
    stream_id: int
    slot: int
    channels: Sequence[str]
    due_ms: int
    hold_until_ms: int | None = None
    gate: str | None = None
    reason: str | None = None
    chain: str = ""
    step: int = 0
    shown_on: Sequence[str] = ()
    acknowledged: bool = False
    written: str | None = None
    claimed: ClassVar[bool] = False

    def text(self) -> str:
        """As its notification keeps it while it waits."""
        if self.written is not None:
            return self.written
        fields = (
            self.channels, self.due_ms, self.hold_until_ms, self.gate, self.reason, self.chain, self.step,
            self.shown_on,
        )  # fmt: skip
        return _encode(fields).decode()

    def follow(self, signal: str, shown_on: str, now_ms: int) -> tuple[str, str]:
        """What a signal does to it (`carillon.attention.on_signal`); idempotent.

        Args:
            shown_on: devices that have shown it, separated by line feeds.

        Returns:
            (end | write | keep, its text after that). "write": it is due now, and goes to the outbox.
        """
        holdable = self.hold_until_ms is not None and self.hold_until_ms > now_ms
        done = on_signal(signal, "planned", self.gate, holdable)
        if done == "none":
            return "keep", self.text()
        if done == "cancel":
            return "end", (ACTIVE_MARK if signal == DONE else ACKNOWLEDGED_MARK) + self.text()
        self.written = None
        if shown_on:
            self.shown_on = list(dict.fromkeys([*self.shown_on, *shown_on.split("\n")]))
        if done == "due":
            self.gate, self.due_ms = ALWAYS, now_ms
            return "write", self.text()
        if done == "hold":
            assert self.hold_until_ms is not None
            self.gate, self.due_ms = HELD, self.hold_until_ms
        return "keep", self.text()


def history(text: str, created_ms: int, delivered_ms: int | None) -> list[dict[str, Any]]:
    """What a kept text tells, as rows of the outbox tell it: no tries, and nothing that is not known.

    Args:
        created_ms, delivered_ms: of its notification.
    """
    mark = text[:1]
    ended = mark in (ACKNOWLEDGED_MARK, ACTIVE_MARK)
    channels, due_ms, hold_ms, _, reason, chain, step, _ = _decode(text[1:] if ended else text)
    updated_ms = delivered_ms
    if mark == ACKNOWLEDGED_MARK:
        reason = "acknowledged"
    elif mark == ACTIVE_MARK:
        reason, updated_ms = reason or "active", hold_ms
    return [
        {
            "channel": channel, "state": "cancelled" if ended else "planned", "attempts": 0,
            "reason": reason, "due_ms": due_ms, "created_ms": created_ms,
            "updated_ms": created_ms if updated_ms is None else updated_ms,
            "chain": chain, "step": step, "digest": None, "carrier": None, "tries": [],
        }
        for channel in channels
    ]  # fmt: skip


def exported(text: str, created_ms: int, delivered_ms: int | None) -> list[dict[str, Any]]:
    """The same as an export tells rows of the outbox."""
    return [
        {name: row[name] for name in ("channel", "state", "attempts", "reason")}
        | {
            "dueAt": rfc3339(row["due_ms"]),
            "createdAt": rfc3339(row["created_ms"]),
            "updatedAt": rfc3339(row["updated_ms"]),
            "tries": [],
        }
        for row in history(text, created_ms, delivered_ms)
    ]
