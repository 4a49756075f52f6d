"""Every error of this library, in one tree.

CarillonError
  ProblemError              the server answered with a problem document (RFC 9457)
    AuthenticationError       401: no credentials, or none that verify
    PermissionDeniedError     403: the API key lacks the scope
    NotFoundError             404
    InvalidRequestError       400, 413, 422: correct the request; `errors` says where
      IdempotencyConflictError  the key was used with another body
    VersionConflictError      412: another version is the present one
    UnavailableError          409 in_progress, 429, 5xx: the same request may succeed later
  TransportError            no answer: connection refused, reset, timed out
  UnexpectedAnswerError     an answer that is not Carillon's
  GaveUpError               tries went on until the deadline; `last` is the last error
  QueueFullError            a bounded queue of this library is full
  ClosedError               used after it was closed
  SubscriptionError         the subscription ended and must not be tried again
    SubscriptionRefusedError  the server closed with a code that means: stop
    TokenExpiredError         the token expired and there is no way to get a new one
  OperationError            the server refused a frame (ERROR)
  OperationTimeoutError     no OK or ERROR in time
"""

from __future__ import annotations

from typing import NamedTuple


class FieldError(NamedTuple):
    """One member of a request that is not as the protocol wants it."""

    path: str
    """Where: "title", "data/items/3"; empty means the whole document."""
    expected: str
    got: str


class CarillonError(Exception):
    """Base of all errors of this library."""

    temporary: bool = False
    """True if the same request may succeed later without a change."""


class ProblemError(CarillonError):
    """The server answered with a problem document.

    Args (positional, kept in `args`):
        status: HTTP status.
        code: stable name, e.g. "invalid"; docs/reference/http.md lists them.
        detail: one sentence for people.
        temporary: the same request may succeed later.
        errors: which members were wrong.
        request_id: what the server's log calls this request.
        retry_after_s: seconds to wait before the next try; 0 if the server did not say.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str = "",
        temporary: bool = False,
        errors: tuple[FieldError, ...] = (),
        request_id: str = "",
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(status, code, detail, temporary, errors, request_id, retry_after_s)
        self.status = status
        self.code = code
        self.detail = detail
        self.temporary = temporary
        self.errors = errors
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        places = "; ".join(f"{e.path or 'document'}: expected {e.expected}, got {e.got}" for e in self.errors)
        shown = f"{self.status} {self.code}: {self.detail}"
        return f"{shown} ({places})" if places and places not in shown else shown


class AuthenticationError(ProblemError):
    """401: no credentials, or none that verify."""


class PermissionDeniedError(ProblemError):
    """403: the API key lacks the scope."""


class NotFoundError(ProblemError):
    """404: the id in the path is unknown to this tenant or user."""


class InvalidRequestError(ProblemError):
    """400, 413, 422: the request must be corrected. Status 0: refused by this library before sending."""


class IdempotencyConflictError(InvalidRequestError):
    """422: the idempotency key was used within 24 h with another body."""


class VersionConflictError(ProblemError):
    """412: another version than the one named is the present one."""


class UnavailableError(ProblemError):
    """409 in_progress, 429, 5xx: the same request may succeed later."""


class TransportError(CarillonError):
    """No answer.

    Args (positional):
        message: what happened.
        maybe_sent: False if the request certainly did not reach the server.
    """

    temporary = True

    def __init__(self, message: str, maybe_sent: bool = True) -> None:
        super().__init__(message, maybe_sent)
        self.message = message
        self.maybe_sent = maybe_sent

    def __str__(self) -> str:
        return self.message


class UnexpectedAnswerError(CarillonError):
    """An answer that Carillon does not give: a proxy's page, a cut body."""

    temporary = True


class GaveUpError(CarillonError):
    """Tries went on until the deadline (or their number was used up), or the next would lie beyond it.

    Args (positional):
        attempts: how often it was sent.
        last: the error of the last try; None if there was none.
        maybe_sent: whether an earlier try may have taken effect. The same idempotency key finds out.
    """

    temporary = True

    def __init__(self, attempts: int, last: CarillonError | None, maybe_sent: bool) -> None:
        super().__init__(attempts, last, maybe_sent)
        self.attempts = attempts
        self.last = last
        self.maybe_sent = maybe_sent

    def __str__(self) -> str:
        effect = "may have taken effect" if self.maybe_sent else "took no effect"
        return f"gave up after {self.attempts} tries, which {effect}; the last: {self.last or 'not begun'}"


class QueueFullError(CarillonError):
    """A bounded queue of this library is full."""

    temporary = True


class ClosedError(CarillonError):
    """Used after it was closed."""


class SubscriptionError(CarillonError):
    """The subscription ended and must not be tried again."""


class SubscriptionRefusedError(SubscriptionError):
    """The server closed with a code that means: stop.

    Args (positional):
        code: WebSocket close code (4001-4004), or the HTTP status of a refused handshake.
        reason: the server's text.
    """

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        meaning = {
            4001: "not authenticated, or revoked",
            4002: "not permitted",
            4003: "too many bad frames",
            4004: "too many connections of this user",
        }.get(self.code, "refused")
        return f"{self.code}: {self.reason or meaning}"


class TokenExpiredError(SubscriptionError):
    """The token expired and there is no way to get a new one: give a callable as `token`."""


class OperationError(CarillonError):
    """The server refused a frame.

    Args (positional): code, message and temporary of the ERROR frame.
    """

    def __init__(self, code: str, message: str = "", temporary: bool = False) -> None:
        super().__init__(code, message, temporary)
        self.code = code
        self.message = message
        self.temporary = temporary

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class OperationTimeoutError(CarillonError):
    """Neither OK nor ERROR came in time; the operation may or may not take effect. Repeating it is safe."""

    temporary = True
