"""What is archived of a user, for the export of everything kept of it.

The ingress reads the same root as the coordinator's job: a folder that both see, or a bucket.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Any, Final

import asyncpg
import msgspec

from carillon.archive import Archived, Part, read_line
from carillon.clock import rfc3339
from carillon.decision import unpack
from carillon.errors import ArchiveError, UnavailableError
from carillon.explain import told
from carillon.kept_push import exported
from carillon.merge_begun import unpack as read_opening
from carillon.merging import OPENED
from carillon.settings import Settings
from stores.archive_files import ArchiveFiles
from stores.archiver import root_of
from stores.postgres.archive import ArchiveStore
from stores.postgres.pool import acquired

_PIECE: Final = 200
_encode: Final = msgspec.json.Encoder().encode
_OURS: Final = frozenset(
    {"stream_id", "slot", "content", "decision", "kept", "merging", "merge_slot", "merge_slot_2"}
)
"""Columns that say nothing of the user, or are told in another form."""


class ArchiveExport:
    """Reads archives for exports.

    Args:
        pool: not owned.
        acquire_timeout_s: longest wait for a free connection; none is held while files are read.
    """

    def __init__(self, pool: asyncpg.Pool, settings: Settings, acquire_timeout_s: float) -> None:
        self._pool = pool
        self._settings = settings
        self._timeout_s = acquire_timeout_s

    async def lines(self, tenant: str, user: str) -> AsyncGenerator[list[str]]:
        """Pieces of the export, each a list of lines `{"kind": "archivedNotification", ...}`.

        Nothing of a user whose erasure the archive has yet to carry out. Raises StoreUnavailableError, and
        UnavailableError if a part cannot be read here.
        """
        parts = await self._parts(tenant, user)
        files = ArchiveFiles(root_of(self._settings)) if parts else None
        seen: set[uuid.UUID] = set()
        read: set[uuid.UUID] = set()
        while parts:
            assert files is not None
            part = parts.pop()
            try:
                found = await asyncio.to_thread(_of_user, files, part, user)
            except ArchiveError as exc:
                # Parts are merged and written anew while we read: what it held is in others then.
                parts = [one for one in await self._parts(tenant, user) if one.part not in read]
                if any(one.part == part.part for one in parts):
                    raise UnavailableError(f"what is archived cannot be read here: {exc}") from exc
                continue
            read.add(part.part)
            fresh = [one for one in found if one.id not in seen]
            seen.update(one.id for one in fresh)
            for at in range(0, len(fresh), _PIECE):
                yield [_line(one) for one in fresh[at : at + _PIECE]]

    async def _parts(self, tenant: str, user: str) -> list[Part]:
        async with acquired(self._pool, self._timeout_s) as connection:
            store = ArchiveStore(connection)
            if any((of, whose) == (tenant, user) for of, whose, _ in await store.erasures()):
                return []
            return [one for one in await store.parts(tenant, user=user) if one.may_hold(user)][::-1]


def _of_user(files: ArchiveFiles, part: Part, user: str) -> list[Archived]:
    return [read_line(line.raw) for line in files.read(part) if line.user == user]


def _line(found: Archived) -> str:
    decision = found.notification.get("decision")
    merged = found.merged
    if "merging" in found.notification and all(one["event_id"] != str(found.id) for one in merged):
        merged = [_opened(found), *merged]
    document = {
        "kind": "archivedNotification",
        "notification": found.content() | _camel(found.notification),
        "deliveries": [_camel(one) for one in found.deliveries] or _kept(found.notification),
        "rules": [] if decision is None else told(unpack(decision)),
        "amendments": [_camel(one) for one in found.amendments],
        "mergedEvents": [_camel(one) for one in merged],
        "variant": None if found.exposure is None else _camel(found.exposure),
    }
    return _encode(document).decode()


def _opened(found: Archived) -> dict[str, Any]:
    """The event that began it, as the row would say that there is once something is merged into it."""
    opening = read_opening(found.notification["merging"])
    row = {
        "event_id": str(found.id), "notification_id": str(found.id), "at": rfc3339(opening.at_ms),
        "status": OPENED, "how": opening.how, "source": opening.source,
    }  # fmt: skip
    return row if opening.actor is None else row | {"actor": opening.actor}


def _kept(row: dict[str, Any]) -> list[dict[str, Any]]:
    if row.get("kept") is None:
        return []
    delivered = row.get("delivered_at")
    return exported(row["kept"], _ms(row["created_at"]), None if delivered is None else _ms(delivered))


def _ms(time: str) -> int:
    return round(msgspec.convert(time, datetime).timestamp() * 1000)


def _camel(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the API names and writes things."""
    out: dict[str, Any] = {}
    for name, value in row.items():
        if name in _OURS:
            continue
        first, *others = name.split("_")
        if name == "tries":
            value = [_camel(one) for one in value]
        elif isinstance(value, str) and (name == "at" or name.endswith("_at")):
            value = rfc3339(_ms(value))
        out[first + "".join(word.capitalize() for word in others)] = value
    return out
