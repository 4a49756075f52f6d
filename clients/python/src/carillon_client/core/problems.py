"""From an answer to a typed error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import msgspec

from carillon_client.core.codec import decode_json
from carillon_client.errors import (
    AuthenticationError,
    CarillonError,
    FieldError,
    GaveUpError,
    IdempotencyConflictError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    ProblemError,
    TransportError,
    UnavailableError,
    UnexpectedAnswerError,
    VersionConflictError,
)

RETRY_AFTER_MAX_S = 3600.0
"""A longer Retry-After than this is taken for this."""

_BY_STATUS: dict[int, type[ProblemError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    412: VersionConflictError,
    413: InvalidRequestError,
    422: InvalidRequestError,
    429: UnavailableError,
}


def retry_after_s(value: str | None) -> float:
    """Seconds of a Retry-After header; 0 if absent or a date (Carillon sends whole seconds)."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), RETRY_AFTER_MAX_S) if math.isfinite(seconds) else 0.0


def error_of_document(
    document: Mapping[str, Any], status: int | None = None, wait_s: float = 0.0
) -> ProblemError:
    """The typed error of a problem document; whatever is missing or odd in it is replaced, never raised."""
    told = document.get("status")
    status = status if status is not None else told if isinstance(told, int) else 500
    code = str(document.get("code") or f"http_{status}")
    errors: list[FieldError] = []
    places = document.get("errors")
    for one in cast("list[Any]", places) if isinstance(places, list) else []:
        if isinstance(one, dict):
            place = cast("dict[str, Any]", one)
            errors.append(FieldError(*(str(place.get(name, "")) for name in FieldError._fields)))
    temporary = document.get("temporary")
    if not isinstance(temporary, bool):
        temporary = status in (408, 425, 429) or status >= 500
    kind = _BY_STATUS.get(status, ProblemError)
    if code == "idempotency_conflict":
        kind = IdempotencyConflictError
    elif status >= 500 or temporary:
        kind = UnavailableError
    return kind(
        status,
        code,
        str(document.get("detail") or document.get("title") or ""),
        temporary,
        tuple(errors),
        str(document.get("requestId") or ""),
        wait_s,
    )


def error_of_answer(status: int, headers: Mapping[str, str], body: bytes) -> CarillonError:
    """The error of an answer that is not a success. `headers` have lower-case names."""
    document: Any = None
    if body:
        try:
            document = decode_json(body)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            document = None
    wait_s = retry_after_s(headers.get("retry-after"))
    if isinstance(document, dict) and "code" in document:
        return error_of_document(cast("dict[str, Any]", document), status, wait_s)
    if status < 400:
        return UnexpectedAnswerError(f"HTTP {status} is no answer of Carillon's; is the URL right?")
    text = body[:200].decode("utf-8", "replace").strip()
    return error_of_document({"detail": f"HTTP {status} without a problem document: {text}"}, status, wait_s)


def worth_retrying(error: CarillonError) -> bool:
    """Whether the same request, with the same idempotency key, may succeed later.

    500 counts: with a key a repetition is safe, and what failed may have been one process.
    """
    if isinstance(error, ProblemError):
        return error.temporary or error.status >= 500 or error.status in (408, 425, 429)
    return isinstance(error, TransportError | UnexpectedAnswerError)


def may_have_run(error: CarillonError) -> bool:
    """Whether a request that ended so may have taken effect."""
    if isinstance(error, TransportError):
        return error.maybe_sent
    if isinstance(error, ProblemError):
        return error.status >= 500 or error.code == "in_progress"
    return isinstance(error, UnexpectedAnswerError | GaveUpError)
