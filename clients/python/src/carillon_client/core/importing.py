"""Importing a stream of events: what is sent, when it is sent again, and what came of it."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import msgspec

from carillon_client.core.problems import error_of_answer, retry_after_s, worth_retrying
from carillon_client.errors import CarillonError
from carillon_client.models import ImportReport

IMPORT_TRIES = 5
IMPORT_TIMEOUT_S = 120.0
"""Longest wait for the connection to take or give anything: the server reads as fast as it stores."""
IMPORT_HEADERS = {
    "Content-Type": "application/x-ndjson",
    # Behind Ray Serve's route the body would otherwise be read whole before the first event is stored.
    "X-Request-Disconnect-Disabled": "?1",
}
PART = 65_536
"""Bytes handed to the connection at a time."""


def parts(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines joined to pieces worth sending; each line ends with a line feed."""
    held: list[bytes] = []
    size = 0
    for line in lines:
        held.append(line if line.endswith(b"\n") else line + b"\n")
        size += len(held[-1])
        if size >= PART:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


def counted(pieces: Iterable[bytes], sent: Callable[[int], None] | None) -> Iterator[bytes]:
    """The pieces; `sent` is told of the bytes of those that were taken."""
    count = 0
    for piece in pieces:
        yield piece
        count += len(piece)
        if sent is not None:
            sent(count)


async def async_parts(lines: Iterable[bytes] | AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """As `parts`, of lines that may come asynchronously."""
    if not isinstance(lines, AsyncIterable):
        for piece in parts(lines):
            yield piece
        return
    held: list[bytes] = []
    size = 0
    async for line in lines:
        held.append(line if line.endswith(b"\n") else line + b"\n")
        size += len(held[-1])
        if size >= PART:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


async def async_counted(
    pieces: AsyncIterator[bytes], sent: Callable[[int], None] | None
) -> AsyncIterator[bytes]:
    """As `counted`."""
    count = 0
    async for piece in pieces:
        yield piece
        count += len(piece)
        if sent is not None:
            sent(count)


def report_of(
    status: int, headers: dict[str, str], body: bytes
) -> ImportReport | tuple[CarillonError, float]:
    """What an answer tells: the report, or the error and after how many seconds to send all of it again.

    Raises:
        CarillonError: no repetition will cure it.
    """
    if status == 200:
        document: Any = msgspec.json.decode(body)
        return msgspec.convert(document, ImportReport)
    error = error_of_answer(status, headers, body)
    if not worth_retrying(error):
        raise error
    return error, retry_after_s(headers.get("retry-after"))
