"""What a session wants done: its shell carries these out, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from carillon.attention import SILENT

if TYPE_CHECKING:
    from carillon.attachment import Attachment


class Send(NamedTuple):
    """Write one frame to some attachments, in order with all other Sends."""

    to: tuple[Attachment, ...]
    frame: bytes
    seq: int = 0
    rev: int = 0
    replay: bool = False
    page_end: bool = False
    update: bool = False
    epoch: str = ""


class LoadNotifications(NamedTuple):
    """Read rows with seq > after_seq, by seq, at most `limit`; answer with `notifications_loaded`."""

    to: Attachment
    after_seq: int
    limit: int
    head_seq: int
    """The head when asked: everything up to here is in the store."""


class LoadChanges(NamedTuple):
    """Read changed rows with rev > after_rev and (seq <= upto_seq or rev > or_after_rev), by rev, at most
    `limit`; answer with `changes_loaded`."""

    to: Attachment
    after_rev: int
    upto_seq: int
    or_after_rev: int
    limit: int
    head_rev: int
    """The head when asked."""


class Close(NamedTuple):
    """Close a connection with a code of protocol.md. The attachment is gone already."""

    to: Attachment
    code: int
    reason: str


class Acknowledged(NamedTuple):
    """A device has these notifications: set deliveredAt, and tell their pushes."""

    ids: tuple[bytes, ...]
    signal: str = SILENT
    """What that tells (carillon/attention.py)."""
    device: str = ""
    """With ACTIVE: the device, which has shown them."""
    rev: int | None = None
    """The device has their updates up to here; None: not told, then as they are."""


class AcknowledgedRange(NamedTuple):
    """The same for all of the stream's notifications with after_seq < seq <= upto_seq, whose ids this session
    does not know: another one wrote them."""

    after_seq: int
    upto_seq: int
    signal: str
    device: str
    rev: int | None = None
    """The device has their updates up to here; None: not told, then as they are."""
    by_rev: bool = False
    """True: not the notifications, but the updates with after_seq < rev <= upto_seq."""


class PushSignal(NamedTuple):
    """Attention has changed what is to become of waiting pushes: AWAY, DONE or KEEP."""

    ids: tuple[bytes, ...]
    signal: str


class Wake(NamedTuple):
    """`next_deadline` may be earlier than it was."""


class PresenceChanged(NamedTuple):
    """The user's status became another one."""

    status: str


Effect = (
    Send | LoadNotifications | LoadChanges | Close | Acknowledged | AcknowledgedRange | PushSignal | Wake
    | PresenceChanged
)  # fmt: skip
