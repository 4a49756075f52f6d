"""RFC 9457 problem documents: every error answer of the HTTP API.

One table maps an error's stable `code` to its HTTP status; the document repeats what the caller can act on:
`temporary` (try again unchanged, after Retry-After), `errors` (which member was wrong, what was expected).
docs/reference/http.md lists the codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import msgspec

from carillon.errors import CarillonError, InvalidInputError, RemoteError, UnavailableError

CONTENT_TYPE: Final = "application/problem+json"

_encode: Final = msgspec.json.Encoder().encode


class FieldError(NamedTuple):
    """One member of a request that is not as the protocol wants it."""

    path: str
    """Where: "title", "data/items/3", "2/title" in a batch; empty means the whole document."""
    expected: str
    got: str


class DocumentError(InvalidInputError):
    """A document that breaks rules. Args (positional): the errors, in the order found."""

    def __init__(self, errors: list[FieldError]) -> None:
        first = errors[0]
        where = f"{first.path} to be " if first.path else ""
        self.message = f"expected {where}{first.expected}, got {first.got}"
        super().__init__(self.message, *first)
        self.args = (errors,)
        self.errors = errors

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Problem:
    """One error, ready to be answered."""

    status: int
    code: str
    title: str
    detail: str = ""
    temporary: bool = False
    errors: Sequence[FieldError] = ()
    retry_after_s: float = 0.0
    """> 0: sent as Retry-After, rounded up to whole seconds."""
    headers: Sequence[tuple[str, str]] = field(default=())
    """More response headers, e.g. Allow."""


_TABLE: Final[dict[str, tuple[int, str]]] = {
    "malformed": (400, "The request is not readable"),
    "unauthenticated": (401, "Not authenticated"),
    "token_expired": (401, "The token has expired"),
    "not_permitted": (403, "Not permitted"),
    "not_found": (404, "Not found"),
    "archived": (404, "Archived to files"),
    "method_not_allowed": (405, "Method not allowed"),
    "in_progress": (409, "The first request with this idempotency key is still running"),
    "exists": (409, "It exists already"),
    "retracted": (409, "It was retracted"),
    "expired": (409, "It has expired"),
    "version_conflict": (412, "Another version is the present one"),
    "ended": (409, "It has ended"),
    "too_large": (413, "The request is too large"),
    "invalid": (422, "The request is not valid"),
    "not_supported": (422, "Not supported"),
    "template_failed": (422, "The template could not be rendered"),
    "idempotency_conflict": (422, "The idempotency key was used with another body"),
    "busy": (429, "Too many requests at once"),
    "rate_limited": (429, "Too many requests"),
    "too_many": (429, "Too many at once"),
    "internal": (500, "Internal error"),
    "unavailable": (503, "Temporarily unavailable"),
    "store_unavailable": (503, "Temporarily unavailable"),
    "moved": (503, "Temporarily unavailable"),
    "fenced": (503, "Temporarily unavailable"),
    "link": (503, "Temporarily unavailable"),
    "link_closed": (503, "Temporarily unavailable"),
    "link_timeout": (503, "Temporarily unavailable"),
}
"""Status and title by code."""

CODES: Final = tuple(_TABLE)
"""All codes of problem documents."""

_TEMPORARY: Final = frozenset(code for code, (status, _) in _TABLE.items() if status in (409, 429, 503)) - {
    "exists", "retracted", "expired", "ended",
}  # fmt: skip


def problem(
    code: str,
    detail: str = "",
    errors: Sequence[FieldError] = (),
    retry_after_s: float = 0.0,
    headers: Sequence[tuple[str, str]] = (),
) -> Problem:
    """The problem of a code. Unknown codes are answered as 422 (what a shard newer than us refused).

    Args:
        retry_after_s: seconds until a retry makes sense; temporary problems get at least 1.
    """
    status, title = _TABLE.get(code, (422, "The request is not valid"))
    temporary = code in _TEMPORARY
    wait_s = max(retry_after_s, 1.0) if temporary else 0.0
    return Problem(status, code, title, detail, temporary, errors, wait_s, headers)


def problem_of(error: BaseException) -> Problem:
    """The problem that tells the caller about an exception.

    Anything not raised on purpose is 500 without its text: it may carry what the caller must not see.
    """
    if isinstance(error, InvalidInputError):
        told = [FieldError(error.path, error.expected, error.got)] if error.path or error.expected else []
        return problem(error.code, str(error), told)
    if isinstance(error, UnavailableError):
        return problem(error.code, str(error), retry_after_s=error.retry_after_s)
    if isinstance(error, RemoteError):
        if error.code not in _TABLE and error.temporary:
            return problem("unavailable", error.message, retry_after_s=error.retry_after_s)
        if error.code == "internal":
            return problem("internal")
        return problem(error.code, error.message, retry_after_s=error.retry_after_s)
    if isinstance(error, CarillonError):
        code = error.code if error.code in _TABLE else ("unavailable" if error.temporary else "internal")
        return problem(code, str(error) if code != "internal" else "")
    return problem("internal")


def problem_document(told: Problem, request_id: str = "") -> dict[str, Any]:
    """The members of the document, `type` first."""
    return {
        "type": f"urn:carillon:problem:{told.code}",
        "title": told.title,
        "status": told.status,
        "detail": told.detail or told.title,
        "code": told.code,
        "temporary": told.temporary,
        "requestId": request_id,
        "errors": [{"path": e.path, "expected": e.expected, "got": e.got} for e in told.errors],
    }


def problem_json(told: Problem, request_id: str = "") -> bytes:
    """The document as JSON."""
    return _encode(problem_document(told, request_id))


def retry_after(told: Problem) -> str | None:
    """The value of Retry-After (whole seconds, at least 1), or None if a retry is no use."""
    return str(max(1, math.ceil(told.retry_after_s))) if told.retry_after_s > 0 else None


def shown(value: Any, limit: int = 80) -> str:
    """How a refused value is told back: short, and always encodable (lone surrogates replaced)."""
    if isinstance(value, str):
        text = value if len(value) <= limit else f"{value[: limit - 1]}…"
        return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\u0000")
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of many digits"
    return str(value)[:limit]
