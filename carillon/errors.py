"""Every error Carillon raises, in one tree.

CarillonError
├── SettingsError            a setting is missing, malformed or contradicts another
├── InvalidInputError        the caller sent something that the protocol does not allow (HTTP 4xx)
│   ├── NotFoundError
│   ├── UnauthenticatedError
│   │   └── TokenExpiredError
│   ├── NotPermittedError
│   ├── RetractedError       the notification was retracted
│   ├── ExpiredError         the notification has expired
│   └── VersionError         another version is the present one
├── IdempotencyConflictError same key, another body
├── InProgressError          same key, the first request still runs
├── UnavailableError         temporary: try again later, nothing was acknowledged
│   ├── BusyError            a bounded queue is full
│   ├── NotOwnerError        the slot lives elsewhere now (internal: the router refreshes its map)
│   ├── FencedError          this shard's term is over (internal)
│   └── StoreUnavailableError
├── LinkError
│   ├── LinkHandshakeError   version, secret or frame of the handshake is wrong
│   ├── LinkClosedError      the peer went away; requests in flight may or may not have run
│   ├── LinkTimeoutError     no answer before the deadline; the request may or may not have run
│   ├── LinkFrameError       a frame broke the framing rules
│   └── RemoteError          the peer answered with an error
├── ArchiveError             a part of the archive is missing, damaged, or cannot be written
└── ClusterError             bring-up, placement or an embedded service failed

Fields are positional and stay in `args`: Ray rebuilds an exception as `cls(*args)`, and keyword-only
fields raise `UnserializableException` at the caller (docs/reference/errors.md).
"""

from __future__ import annotations


class CarillonError(Exception):
    """Base of all errors raised on purpose."""

    code: str = "internal"
    """Stable machine-readable name, used in problem documents, ERROR frames and link errors."""

    temporary: bool = False
    """True if the same request may succeed later without a change."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else self.code


class SettingsError(CarillonError):
    """A setting is missing, malformed or contradicts another. Raised at start, never later."""

    code = "settings"


class InvalidInputError(CarillonError):
    """The caller sent something the protocol does not allow.

    Args (positional): message, path (JSON pointer-like, e.g. "events/3/title"), expected, got, code.
    """

    code = "invalid"

    def __init__(
        self, message: str, path: str = "", expected: str = "", got: str = "", code: str | None = None
    ) -> None:
        super().__init__(message, path, expected, got, code)
        self.path = path
        self.expected = expected
        self.got = got
        if code is not None:
            self.code = code


class NotFoundError(InvalidInputError):
    """The id in the path is unknown to this tenant or user."""

    code = "not_found"


class UnauthenticatedError(InvalidInputError):
    """No credentials, or credentials that do not verify."""

    code = "unauthenticated"


class TokenExpiredError(UnauthenticatedError):
    """A token that verifies but whose `exp` has passed: get a new one."""

    code = "token_expired"


class NotPermittedError(InvalidInputError):
    """Valid credentials that do not allow this."""

    code = "not_permitted"


class RetractedError(InvalidInputError):
    """The notification was retracted: there is nothing to change any more."""

    code = "retracted"


class ExpiredError(InvalidInputError):
    """The notification has expired."""

    code = "expired"


class VersionError(InvalidInputError):
    """Another version than the caller's is the present one."""

    code = "version_conflict"


class IdempotencyConflictError(CarillonError):
    """The idempotency key was used within 24 h with another body."""

    code = "idempotency_conflict"


class InProgressError(CarillonError):
    """The first request with this idempotency key is still running."""

    code = "in_progress"
    temporary = True


class UnavailableError(CarillonError):
    """Temporarily out of service; nothing was acknowledged. Args: message, retry_after_s."""

    code = "unavailable"
    temporary = True

    def __init__(self, message: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s


class BusyError(UnavailableError):
    """A bounded queue is full: the caller slows down."""

    code = "busy"


class NotOwnerError(UnavailableError):
    """The slot is not (or no longer) this shard's. Internal: the router refreshes its map and retries."""

    code = "moved"


class FencedError(UnavailableError):
    """This shard's term is over: another owner may exist. Internal."""

    code = "fenced"


class StoreUnavailableError(UnavailableError):
    """PostgreSQL or Redis does not answer."""

    code = "store_unavailable"


class LinkError(CarillonError):
    """Base of the data plane's errors."""

    code = "link"
    temporary = True


class LinkHandshakeError(LinkError):
    """The peer speaks another version, does not know the cluster secret, or sent no valid handshake."""

    code = "link_handshake"


class LinkClosedError(LinkError):
    """The peer is gone. A request in flight may or may not have run."""

    code = "link_closed"


class LinkTimeoutError(LinkError):
    """No answer before the deadline. The request may or may not have run."""

    code = "link_timeout"


class LinkFrameError(LinkError):
    """A frame is longer than the limit or is not a message of this protocol."""

    code = "link_frame"


class RemoteError(LinkError):
    """The peer answered a request with an error. Args: code, message, temporary, retry_after_s."""

    def __init__(
        self, code: str, message: str = "", temporary: bool = False, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(code, message, temporary, retry_after_s)
        self.code = code
        self.message = message
        self.temporary = temporary
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class ArchiveError(CarillonError):
    """A part of the archive is missing, damaged or not what its manifest says, or cannot be written."""

    code = "archive"


class ClusterError(CarillonError):
    """Bring-up, placement or an embedded service failed; the sentence says what to do."""

    code = "cluster"
