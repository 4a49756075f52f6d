"""Changes told to a client that was away: from changed rows to the frames that bring it up to date."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from carillon import server_frames
from carillon.clock import rfc3339
from carillon.notification import NotificationRow, filed_away, gone, notification_json


def change_frames(
    rows: Sequence[NotificationRow], user_json: str, after_rev: int, now_ms: int, *, more: bool
) -> list[tuple[int, bytes, bool]]:
    """Frames that bring a client from `after_rev` to the state of changed rows.

    Args:
        rows: changed rows by ascending rev.
        now_ms: what has expired by then is told as retracted: the client may know another expiry, or none.
        more: the last rev may have more rows than these.

    Returns:
        (rev, frame, is_update) by ascending rev. Of the frames of one rev only the last carries it, and with
        `more` not even that: whoever stops in between asks for that rev again instead of missing its rest.
        States only grow, so repeating one is harmless.
    """
    frames: list[tuple[int, bytes, bool]] = []
    at = 0
    while at < len(rows):
        end, rev = at, rows[at].rev
        while end < len(rows) and rows[end].rev == rev:
            end += 1
        makers = _group_frames(rows[at:end], user_json, now_ms)
        for index, (make, update) in enumerate(makers):
            unfinished = index < len(makers) - 1 or (more and end == len(rows))
            told = max(after_rev, rev - 1) if unfinished else rev
            frames.append((told, make(told), update))
        at = end
    return frames


def _group_frames(
    group: Sequence[NotificationRow], user_json: str, now_ms: int
) -> list[tuple[Callable[[int], bytes], bool]]:
    """What to tell of rows that changed with one rev: (frame of the rev it carries, is_update)."""
    frames: list[tuple[Callable[[int], bytes], bool]] = []
    kept = [r for r in group if not gone(r, now_ms)]
    read: dict[int, list[bytes]] = {}
    for r in kept:
        if r.updated_ms is not None and not filed_away(r):
            updated = server_frames.notification_updated(notification_json(r, user_json))
            frames.append((partial(_as_it_is, updated), True))
        if r.read_ms is not None:
            read.setdefault(r.read_ms, []).append(r.id)
    frames += [
        (partial(server_frames.notifications_read, ids, rfc3339(ms)), False) for ms, ids in read.items()
    ]
    seen = [r.id for r in kept if r.seen_ms is not None and r.read_ms is None]
    if seen:
        frames.append((partial(server_frames.notifications_seen, seen), False))
    for r in group:
        states = {
            "CLICKED": r.clicked_ms, "DISMISSED": r.dismissed_ms, "ARCHIVED": r.archived_ms,
        } if not gone(r, now_ms) else {"RETRACTED": r.rev}  # fmt: skip
        frames += [
            (partial(server_frames.notification_state, kind, r.id), False)
            for kind, at in states.items()
            if at is not None
        ]
    return frames


def _as_it_is(frame: bytes, rev: int) -> bytes:
    """A whole notification carries its own rev, which no client takes for its position."""
    return frame
