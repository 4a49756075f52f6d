"""What was merged into a notification, for the answers that tell of one."""

from __future__ import annotations

from typing import Any, Final

from carillon import merging
from carillon.event_rules import DEDUPES
from carillon.notification import decode_content
from serve.schemas import INSTANT, UUID, WHOLE, obj
from stores.postgres.feed import Found

_TEXT: Final = {"type": ["string", "null"]}
MERGED: Final[dict[str, Any]] = {
    "merged": {
        "anyOf": [
            {"type": "null"},
            obj(
                {
                    "count": {**WHOLE, "description": "Of the notification."},
                    "events": {**WHOLE, "description": "Merged into it, as far as still known."},
                    "duplicates": {**WHOLE, "description": "Dropped because of it."},
                    "newest": {
                        "type": "array",
                        "maxItems": 100,
                        "items": obj(
                            {
                                "id": {**UUID, "description": "That the event was minted with."},
                                "at": INSTANT,
                                "status": {"enum": [merging.OPENED, merging.MERGED, merging.DUPLICATE]},
                                "how": {"enum": [*DEDUPES, "aggregate"]},
                                "source": {"enum": ["event", "tenant"]},
                                "actorId": _TEXT,
                                "notice": _TEXT,
                                "words": {"type": "string"},
                            },
                            ["id", "at", "status", "how", "source", "actorId", "notice", "words"],
                        ),
                    },
                },
                ["count", "events", "duplicates", "newest"],
            ),
        ],
        "description": "null: nobody asked for merging, or that is no longer known.",
    }
}


def merged_json(found: Found) -> dict[str, Any]:
    """Which events are in a notification and why, the newest first."""
    log = found.merged
    if log is None:
        return {"merged": None}
    return {
        "merged": {
            "count": decode_content(found.row.content).get("count", 1),
            "events": log.merged,
            "duplicates": log.duplicates,
            "newest": [
                merging.note(e.event, e.at_ms, e.status, e.how, e.source, e.actor, e.notice)
                for e in log.events
            ],
        }
    }


def merged_words(found: Found) -> list[str]:
    """The same in a sentence or two: what the last of them was, and how many there are."""
    log = found.merged
    if log is None or log.merged + log.duplicates == 0:
        return []
    told: list[str] = []
    if log.merged:
        last = next((e for e in log.events if e.status == merging.MERGED), None)
        why = "" if last is None else " " + merging.words(last.status, last.how, last.source, last.notice)
        told.append(f"{_events(log.merged)} merged into it.{why}")
    if log.duplicates:
        told.append(f"{_events(log.duplicates)} dropped because it says the same.")
    return told


def _events(number: int) -> str:
    return "1 event was" if number == 1 else f"{number} events were"
