"""What a close code asks of the client (docs/reference/websocket.md, "Close codes")."""

from __future__ import annotations

from enum import Enum


class Duty(Enum):
    """What to do after a close."""

    STOP = "stop"
    NEW_TOKEN = "new token"  # noqa: S105  a name, not a secret
    RECONNECT = "reconnect"


def duty_of_close(code: int | None) -> Duty:
    """By range, so that codes of newer servers are obeyed too: 40xx stop, 41xx new token, all others
    reconnect.

    Args:
        code: None or 1006 if the connection broke without a close frame.
    """
    if code is not None and 4000 <= code <= 4099:
        return Duty.STOP
    if code is not None and 4100 <= code <= 4199:
        return Duty.NEW_TOKEN
    return Duty.RECONNECT


def duty_of_status(status: int) -> Duty:
    """What an HTTP answer other than 101 asks for: 408, 429 and 5xx pass, other refusals do not."""
    return Duty.RECONNECT if status >= 500 or status in (408, 425, 429) else Duty.STOP
