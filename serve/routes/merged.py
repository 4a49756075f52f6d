"""What was merged into a notification, for the answers that tell of one."""

from __future__ import annotations

from typing import Any, Final

from carillon import merge_windows, merging
from carillon.event_rules import DEDUPES
from carillon.merge_rules import merge_rules
from carillon.notification import decode_content
from serve.schemas import INSTANT, UUID, WHOLE, obj
from serve.services import Services
from stores.postgres.feed import Found

_TEXT: Final = {"type": ["string", "null"]}
_SECONDS: Final = {"type": ["number", "null"]}
_WINDOW: Final[dict[str, Any]] = {
    "how": {"enum": [*DEDUPES, "aggregate"]},
    "source": {"enum": ["event", "tenant", None], "description": "Who asked for it."},
    "windowS": _SECONDS,
    "endsAt": INSTANT,
    "open": {"type": "boolean"},
    "closedBy": {"enum": [*merge_windows.CLOSED, None], "description": "What ended it."},
    "events": {**WHOLE, "description": "In the notification, the first included."},
    "count": {**WHOLE, "description": "As the notification says."},
    "notifiedAt": {**INSTANT, "description": "When the user was last disturbed by it, or will be."},
    "renotifyS": _SECONDS,
    "renotifyAt": {
        "anyOf": [INSTANT, {"type": "null"}],
        "description": "From then on what is merged may disturb again.",
    },
    "words": {"type": "string"},
}
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
                    "windows": {
                        "type": "array",
                        "description": "By which it takes in others, while they are known.",
                        "items": obj(_WINDOW, list(_WINDOW)),
                    },
                },
                ["count", "events", "duplicates", "newest", "windows"],
            ),
        ],
        "description": "null: nobody asked for merging, or that is no longer known.",
    }
}


def merged_json(found: Found, windows: list[dict[str, Any]]) -> dict[str, Any]:
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
            "windows": windows,
        }
    }


async def merge_windows_of(services: Services, tenant: str, found: Found) -> list[dict[str, Any]]:
    """The windows by which a notification takes in others. Raises StoreUnavailableError."""
    if found.merged is None or not found.merged.windows:
        return []
    rules = merge_rules(await services.tenants.policy(tenant)) or {}
    rule = rules.get(decode_content(found.row.content).get("type") or "")
    now_ms = services.clock.now_ms()
    cancelled = found.cancelled_ms is not None
    return [
        merge_windows.told(window, found.row, rule, services.settings.merge, now_ms, cancelled=cancelled)
        for window in found.merged.windows
    ]


def merged_words(found: Found, windows: list[dict[str, Any]]) -> list[str]:
    """The same in a few sentences: what the last of them was, how many there are, and what the windows do."""
    log = found.merged
    if log is None:
        return []
    told: list[str] = []
    if log.merged:
        last = next((e for e in log.events if e.status == merging.MERGED), None)
        why = "" if last is None else " " + merging.words(last.status, last.how, last.source, last.notice)
        told.append(f"{_events(log.merged)} merged into it.{why}")
    if log.duplicates:
        told.append(f"{_events(log.duplicates)} dropped because it says the same.")
    return told + [window["words"] for window in windows]


def _events(number: int) -> str:
    return "1 event was" if number == 1 else f"{number} events were"
