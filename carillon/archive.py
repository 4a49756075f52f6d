"""The archive's format: what a line holds, what a manifest says, what a search finds. Pure.

One line of JSON for each notification: `{"user", "notification", "deliveries", "amendments", "exposure",
"merged"}`, where `notification` is the row as Postgres shows it (columns that are null left out), each
delivery has its `tries`, `exposure` is its part in an experiment, `merged` are the events in it. Lines are
compressed with Zstandard and lie in `tenant={tenant}/month={YYYY-MM}/part-{id}.ndjson.zst`, each part with a
`.manifest.json` beside it.
"""

from __future__ import annotations

import re
import unicodedata
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import msgspec

from carillon.errors import ArchiveError
from carillon.ids import uuid7_ms
from carillon.retention import Month, parse_month

VERSION: Final = 1
"""Of the format, in every manifest."""
DATA: Final = ".ndjson.zst"
MANIFEST: Final = ".manifest.json"
_WORDS: Final = re.compile(r"\w+")


def folder_of(tenant: str, month: Month) -> str:
    """Where the parts of a tenant's month lie, below the root. Whatever the tenant is called, it is one
    name."""
    return f"tenant={quote(tenant, safe='')}/month={month}"


def part_path(tenant: str, month: Month, part: uuid.UUID) -> str:
    """Path of a part without its endings."""
    return f"{folder_of(tenant, month)}/part-{part}"


class Part(NamedTuple):
    """What is known of a part: its manifest, and its row in `archive_parts`."""

    part: uuid.UUID
    tenant: str
    month: Month
    rows: int
    file_bytes: int
    raw_bytes: int
    """Without compression."""
    sha256: str
    """Of the file, in hexadecimal digits."""
    first_id: uuid.UUID
    last_id: uuid.UUID
    first_user: str
    last_user: str
    created_ms: int

    @property
    def path(self) -> str:
        """Of its file, below the root, without endings."""
        return part_path(self.tenant, self.month, self.part)

    def may_hold(self, user: str) -> bool:
        """Whether a user's notifications can be in it, by its users' range."""
        return self.first_user <= user <= self.last_user


def manifest(part: Part) -> bytes:
    """The manifest of a part."""
    told = part._asdict() | {
        "version": VERSION,
        "part": str(part.part),
        "month": str(part.month),
        "first_id": str(part.first_id),
        "last_id": str(part.last_id),
    }
    return msgspec.json.format(msgspec.json.encode(told), indent=2) + b"\n"


def read_manifest(raw: bytes) -> Part:
    """The part that a manifest describes.

    Raises:
        ArchiveError: it is none, or of a newer version.
    """
    try:
        told = msgspec.json.decode(raw)
        version = told.pop("version")
        if version != VERSION:
            raise ArchiveError(f"expected a manifest of version {VERSION}, got {version!r}")
        told["month"] = parse_month(told["month"])
        for name in ("part", "first_id", "last_id"):
            told[name] = uuid.UUID(told[name])
        return Part(**told)
    except (ValueError, TypeError, KeyError, AttributeError, msgspec.DecodeError) as exc:
        raise ArchiveError(f"a manifest cannot be read: {exc}") from exc


class Line(NamedTuple):
    """One archived notification, with the text it came from."""

    id: uuid.UUID
    user: str
    raw: bytes
    """The line without its end."""


def join_lines(lines: Iterable[Line]) -> bytes:
    """The lines as they are compressed: by user and id, each with its end."""
    ordered = sorted(lines, key=lambda line: (line.user, line.id.int))
    return b"".join(line.raw + b"\n" for line in ordered)


class _Head(msgspec.Struct):
    id: uuid.UUID


class _Whose(msgspec.Struct):
    user: str
    notification: _Head


_whose: Final = msgspec.json.Decoder(_Whose)


def split_lines(raw: bytes) -> list[Line]:
    """The lines of a part's text.

    Raises:
        ArchiveError: it ends within a line, or one is no archived notification.
    """
    if raw and not raw.endswith(b"\n"):
        raise ArchiveError("the last line is cut")
    lines: list[Line] = []
    for number, line in enumerate(raw.split(b"\n")[:-1], 1):
        try:
            told = _whose.decode(line)
        except msgspec.DecodeError as exc:
            raise ArchiveError(f"line {number} is no archived notification: {exc}") from exc
        lines.append(Line(told.notification.id, told.user, line))
    return lines


class Archived(NamedTuple):
    """One archived notification, read."""

    user: str
    notification: dict[str, Any]
    deliveries: list[dict[str, Any]]
    amendments: list[dict[str, Any]]
    exposure: dict[str, Any] | None
    merged: list[dict[str, Any]]
    """Events that are part of it; empty in archives of before there were any."""

    @property
    def id(self) -> uuid.UUID:
        """Its id."""
        return uuid.UUID(self.notification["id"])

    def content(self) -> dict[str, Any]:
        """What was sent: title, body and the rest."""
        return msgspec.json.decode("{" + self.notification["content"] + "}")


def read_line(raw: bytes) -> Archived:
    """A line as data."""
    told = msgspec.json.decode(raw)
    return Archived(
        told["user"], told["notification"], told["deliveries"], told["amendments"], told.get("exposure"),
        told.get("merged", []),
    )  # fmt: skip


def words_of(text: str) -> list[str]:
    """A text as lower-case words, compatibility forms told as one."""
    return _WORDS.findall(unicodedata.normalize("NFKC", text).lower())


def text_matches(asked: Sequence[str], text: str) -> bool:
    """Whether each word asked for begins a word of the text; in scripts without blanks, is in it."""
    words = words_of(text)
    return all(
        any(word.startswith(one) or (not one.isascii() and one in word) for word in words) for one in asked
    )


@dataclass(frozen=True)
class Search:
    """What is looked for in an archive; None: whatever.

    Attributes:
        text: each word of it begins a word of title or body, in any case.
        since_ms, until_ms: of when it was created; `until_ms` exclusive.
    """

    user: str | None = None
    id: uuid.UUID | None = None
    type: str | None = None
    text: str | None = None
    since_ms: int | None = None
    until_ms: int | None = None

    def may_hold(self, part: Part) -> bool:
        """Whether a part can hold something of it, by what its manifest says."""
        if self.user is not None and not part.may_hold(self.user):
            return False
        # An id may be older than its notification (one that was scheduled), never younger.
        if self.until_ms is not None and part.month.start_ms >= self.until_ms:
            return False
        return self.id is None or part.first_id.int <= self.id.int <= part.last_id.int

    def matches_head(self, line: Line) -> bool:
        """What a line's id and user say already."""
        if (self.user is not None and line.user != self.user) or (self.id is not None and line.id != self.id):
            return False
        return self.until_ms is None or uuid7_ms(line.id.bytes) < self.until_ms

    def matches(self, found: Archived) -> bool:
        """Whether it is looked for."""
        if self.type is not None and found.notification["type"] != self.type:
            return False
        if self.since_ms is not None or self.until_ms is not None:
            at = created_ms(found)
            if (self.since_ms is not None and at < self.since_ms) or (
                self.until_ms is not None and at >= self.until_ms
            ):
                return False
        if self.text is None:
            return True
        content = found.content()
        return text_matches(words_of(self.text), f"{content.get('title') or ''} {content.get('body') or ''}")


def created_ms(found: Archived) -> int:
    """When it was created."""
    at = msgspec.convert(found.notification["created_at"], datetime)
    return round(at.timestamp() * 1000)


def describe(
    part: uuid.UUID, tenant: str, month: Month, lines: Sequence[Line], raw: bytes, created_ms: int
) -> Part:
    """The part of some lines, before it is compressed."""
    ids = [line.id for line in lines]
    users = [line.user for line in lines]
    return Part(
        part,
        tenant,
        month,
        len(lines),
        0,
        len(raw),
        "",
        min(ids),
        max(ids),
        min(users),
        max(users),
        created_ms,
    )
