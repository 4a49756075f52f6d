"""The thin layer between ASGI and the handlers: requests, responses, limits.

No framework (docs/adr/0005): the hot route spends less than a third of its time outside of validation this
way, and every answer, errors of the transport included, is ours.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import msgspec

from carillon.errors import CarillonError, InvalidInputError
from carillon.events import ProblemError, read_json, refused
from carillon.problems import CONTENT_TYPE, FieldError, Problem, problem_json, retry_after, shown
from carillon.tokens import ClientIdentity
from stores.postgres.tenants import ApiKeyRecord

Scope = dict[str, Any]
Header = tuple[bytes, bytes]

JSON: Final = b"application/json"
_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder().decode
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_PROBLEM: Final = CONTENT_TYPE.encode()


STREAM_PATH: Final = "/api/stream"
PATIENT: Final = "carillon.patient"
"""Key of the scope of requests whose handler watches the caller's patience itself: they may take long."""
BEHIND_SERVE: Final = "carillon.behind_serve"
"""Key of the scope of requests that came by Serve's route: Serve's own middleware adds X-Request-Id to the
answer (and one to the request if there is none); a second one would make "a, a" of it."""


class ClientGoneError(CarillonError):
    """The caller hung up before its body was here: nobody is left to answer."""

    code = "client_gone"


class Response:
    """An answer."""

    __slots__ = ("body", "content_type", "headers", "status")

    def __init__(
        self,
        body: bytes = b"",
        status: int = 200,
        content_type: bytes = JSON,
        headers: Sequence[Header] = (),
    ) -> None:
        self.body = body
        self.status = status
        self.content_type = content_type
        self.headers = list(headers)


class StreamedResponse(Response):
    """An answer that is made while it is sent; its length is not known.

    Args:
        parts: of the body, each sent when the caller took the one before. What it raises ends the connection:
            trouble belongs into the body.

    Attributes:
        tenant: whose request it answers; "" if nobody asked who it is.
    """

    __slots__ = ("parts", "tenant")

    def __init__(self, parts: AsyncGenerator[bytes], content_type: bytes = JSON) -> None:
        super().__init__(content_type=content_type)
        self.parts = parts
        self.tenant = ""


class LateResponse(Response):
    """An answer that was held back on purpose, for `waited_s` seconds."""

    __slots__ = ("waited_s",)
    waited_s: float


def json_response(document: Any, status: int = 200, headers: Sequence[Header] = ()) -> Response:
    """An answer of a JSON document."""
    return Response(_encode(document), status, JSON, headers)


def problem_response(told: Problem, request_id: bytes) -> Response:
    """An RFC 9457 answer, with Retry-After and whatever other headers the problem asks for."""
    headers = [(name.lower().encode(), value.encode()) for name, value in told.headers]
    wait = retry_after(told)
    if wait is not None:
        headers.append((b"retry-after", wait.encode()))
    if told.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return Response(problem_json(told, request_id.decode()), told.status, _PROBLEM, headers)


def clean_request_id(raw: bytes | None) -> bytes | None:
    """The caller's X-Request-Id if it is harmless in headers, logs and documents, else None."""
    return raw if raw is not None and _REQUEST_ID.fullmatch(raw) else None


async def read_body(receive: Any, headers: Mapping[bytes, bytes], limit: int) -> bytes:
    """The whole body.

    Raises:
        ProblemError: `too_large` (413), as soon as the length is known or passed.
        ClientGoneError: the caller hung up.
    """
    length = headers.get(b"content-length")
    if length is not None and length.isdigit() and int(length[:18]) > limit:
        raise _too_large(limit)
    message = await receive()
    if message["type"] != "http.request":
        raise ClientGoneError("the caller hung up")
    body: bytes = message.get("body", b"")
    if not message.get("more_body"):
        if len(body) > limit:
            raise _too_large(limit)
        return body
    parts, size = [body], len(body)
    while message.get("more_body"):
        if size > limit:
            raise _too_large(limit)
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGoneError("the caller hung up")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
    if size > limit:
        raise _too_large(limit)
    return b"".join(parts)


def _too_large(limit: int) -> ProblemError:
    return refused(f"a request body is at most {limit} bytes", code="too_large")


class Request:
    """A request as handlers see it.

    Attributes:
        params: path parameters, decoded.
        tenant: of the API key or token; "" on open routes.
        user: `sub` of the token; "" on routes for services.
        caller: the API key; None on routes for clients.
        identity: of the token; None on routes for services.
        deadline: monotonic time by which the answer is due.
    """

    __slots__ = (
        "_query",
        "_receive",
        "caller",
        "deadline",
        "headers",
        "identity",
        "limit",
        "params",
        "request_id",
        "scope",
        "tenant",
        "user",
    )

    def __init__(
        self,
        scope: Scope,
        headers: Mapping[bytes, bytes],
        receive: Any,
        params: dict[str, str],
        request_id: bytes,
        deadline: float,
        limit: int,
    ) -> None:
        self.scope = scope
        self.headers = headers
        self.params = params
        self.request_id = request_id
        self.deadline = deadline
        self.limit = limit
        self.tenant = ""
        self.user = ""
        self.caller: ApiKeyRecord | None = None
        self.identity: ClientIdentity | None = None
        self._receive = receive
        self._query: dict[str, str] | None = None

    def header(self, name: bytes) -> bytes | None:
        """The header of that lower-case name."""
        return self.headers.get(name)

    async def body(self) -> bytes:
        """The body, read once. Raises ProblemError (413)."""
        return await read_body(self._receive, self.headers, self.limit)

    async def pieces(self) -> AsyncGenerator[bytes]:
        """The body as it comes, without a bound. Raises ClientGoneError: the caller hung up."""
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGoneError("the caller hung up")
            yield message.get("body", b"")
            if not message.get("more_body"):
                return

    async def gone(self) -> None:
        """Return once the caller has hung up; for requests whose body nobody reads."""
        while (await self._receive())["type"] == "http.request":
            pass

    async def json(self) -> Any:
        """The body as JSON; empty equals `{}`. Raises ProblemError: 400, 413, 422 (nesting)."""
        body = await self.body()
        if not body:
            return {}
        try:
            return _decode(body)
        except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError):
            return read_json(body)  # says why, and reads what only looked wrong (an empty line)

    async def json_object(self, known: Sequence[str] | None = None) -> dict[str, Any]:
        """The body as a JSON object.

        Args:
            known: its members; another one is refused by name. None: others are ignored.

        Raises:
            ProblemError: 400, 413 or 422.
        """
        document = await self.json()
        if not isinstance(document, dict):
            raise refused("expected an object", [FieldError("", "an object", shown(document))])
        if known is not None:
            unknown = [name for name in document if name not in known]
            if unknown:
                expected = f"one of {', '.join(known)}" if known else "no members"
                errors = [FieldError(shown(name), expected, "an unknown field") for name in unknown[:10]]
                raise refused(f"unknown field {errors[0].path}", errors)
        return document

    def query(self) -> Mapping[str, str]:
        """The query parameters, decoded; the last of one given twice. Raises ProblemError (400)."""
        if self._query is None:
            self._query = {}
            for pair in self.scope["query_string"].split(b"&"):
                if pair:
                    name, _, value = pair.partition(b"=")
                    self._query[_unquoted(name.replace(b"+", b" "))] = _unquoted(value.replace(b"+", b" "))
        return self._query


def _unquoted(raw: bytes) -> str:
    try:
        return unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise refused("the URL is not UTF-8", code="malformed") from None


def path_segments(scope: Scope) -> list[str]:
    """The decoded segments of the path: an id may hold an encoded slash.

    Raises:
        ProblemError: 400 if one is not UTF-8.
    """
    raw = scope.get("raw_path")
    if raw is None:
        return scope["path"].split("/")[1:]
    prefix = scope.get("root_path", "").encode()
    if prefix and raw.startswith(prefix):
        raw = raw[len(prefix) :]
    return [_unquoted(part) for part in raw.split(b"?", 1)[0].split(b"/")[1:]]


def whole_number(query: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    """A query parameter that is a whole number.

    Raises:
        InvalidInputError: it is not, or lies outside of low..high.
    """
    text = query.get(name)
    if text is None:
        return default
    expected = f"a whole number from {low} to {high}"
    if not text.isascii() or not text.isdigit() or len(text) > 19 or not low <= int(text) <= high:
        raise InvalidInputError(
            f"expected {name} to be {expected}, got {shown(text)}", name, expected, shown(text)
        )
    return int(text)
