"""What a session is given: its limits, and where its stream stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What a session needs of the settings. Times in seconds."""

    recent_window: int = 50
    grace_s: float = 5.0
    clean_close_grace_s: float = 0.5
    resume_wait_s: float = 0.5
    replay_page: int = 200
    max_connections: int = 20
    heartbeat_ms: int = 25_000
    remembered_devices: int = 64


class Head(NamedTuple):
    """Position of a stream as committed."""

    epoch: str
    seq: int
    rev: int
    unread: int
    pruned_seq: int = 0
    """Notifications up to here may be gone: who has seen both missed nothing."""
    pruned_rev: int = 0
    """Changes up to here may be gone."""
