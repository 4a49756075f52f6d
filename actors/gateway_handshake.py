"""The opening handshake: one HTTP request head in, an answer and what it asks for out. No I/O.

Browsers hide the HTTP status of a failed upgrade and retry for ever, so whatever is wrong with a client's
credentials is told by a close code after the handshake; only what no browser sends is refused in HTTP.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Final
from urllib.parse import parse_qsl, unquote

from websockets.datastructures import Headers, MultipleValuesError
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from carillon.client_frames import MAX_INT, check_id
from carillon.errors import InvalidInputError

JSON_PROTOCOL: Final = "carillon.v1.json"
MSGPACK_PROTOCOL: Final = "carillon.v1.msgpack"
END_OF_HEAD: Final = b"\r\n\r\n"
MAX_QUERY_FIELDS: Final = 32

quiet = logging.getLogger("carillon.websocket")
"""For websockets' protocol objects: they log each opening and closing at INFO, and at DEBUG whole requests,
tokens included. Nothing of that is to be written, whatever the level of the others."""
quiet.setLevel(logging.WARNING)


class Encoding(enum.IntEnum):
    """How frames of a connection are written; also an index (`Owners._write`)."""

    LEGACY = 0
    """No subprotocol named: JSON, updates as NEW_NOTIFICATION."""
    JSON = 1
    MSGPACK = 2
    PLAIN = 3
    """The JSON of the frame and nothing around it: what is no WebSocket wraps it itself."""


_ENCODINGS: Final = {JSON_PROTOCOL: Encoding.JSON, MSGPACK_PROTOCOL: Encoding.MSGPACK}


class Handshake:
    """What came of a request head.

    Attributes:
        answer: bytes to write.
        accepted: True if the connection is a WebSocket now; False: close after writing `answer`.
        encoding: by subprotocol.
        token: from the Authorization header or `?token=`; None means AUTH must follow.
        ticket: of `?ticket=`.
        path_user: user named by /notifications/{userId}; None for the other paths.
        device: `?deviceId=`, if it is valid.
        position: (epoch, lastSeq, lastRev) of the URL, None if there is none or it is not valid.
        complaint: what is wrong with an optional parameter, told by an ERROR frame; None if nothing is.
    """

    __slots__ = (
        "accepted",
        "answer",
        "complaint",
        "device",
        "encoding",
        "path_user",
        "position",
        "ticket",
        "token",
    )

    def __init__(self, answer: bytes, accepted: bool) -> None:
        self.answer = answer
        self.accepted = accepted
        self.encoding = Encoding.LEGACY
        self.token: str | None = None
        self.ticket: str | None = None
        self.path_user: str | None = None
        self.device: str | None = None
        self.position: tuple[str, int, int | None] | None = None
        self.complaint: InvalidInputError | None = None


def shake_hands(head: bytes, origins: frozenset[str], healthy: bool) -> Handshake:
    """Answer a request head.

    Args:
        head: up to and including the empty line.
        origins: exact allow-list for a request that sends Origin; empty allows every one.
        healthy: what GET /healthz tells.
    """
    protocol = ServerProtocol(select_subprotocol=_select, max_size=0, logger=quiet)
    protocol.receive_data(head)
    events = protocol.events_received()
    if not events:  # malformed: the protocol has written its refusal, or wants to hang up
        return Handshake(b"".join(protocol.data_to_send()), False)
    request = events[0]
    assert isinstance(request, Request)
    path, _, query = request.path.partition("?")
    if path == "/healthz" and request.method in ("GET", "HEAD"):
        status = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
        return _plain(protocol, status, "ok\n" if healthy else "draining\n", request.method == "HEAD")
    try:
        path_user = _path_user(path)
        fields = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_FIELDS)
    except LookupError:
        return _plain(protocol, HTTPStatus.NOT_FOUND, "the WebSocket endpoint is /ws\n")
    except ValueError:
        return _plain(protocol, HTTPStatus.BAD_REQUEST, "expected a valid query string\n")
    try:
        origin = request.headers.get("Origin")
        authorization = request.headers.get("Authorization", "")
    except MultipleValuesError:
        return _plain(protocol, HTTPStatus.BAD_REQUEST, "expected one Origin and one Authorization header\n")
    if origin is not None and origins and origin not in origins:
        return _plain(protocol, HTTPStatus.FORBIDDEN, "this origin is not allowed\n")
    response = protocol.accept(request)
    protocol.send_response(response)
    shaken = Handshake(b"".join(protocol.data_to_send()), response.status_code == 101)
    if not shaken.accepted:
        return shaken
    if protocol.subprotocol is not None:
        shaken.encoding = _ENCODINGS[protocol.subprotocol]
    shaken.path_user = path_user
    _read_fields(shaken, dict(fields))
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() == "bearer":
        shaken.token = credentials.strip()
    return shaken


def _select(protocol: ServerProtocol, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    """The first offered one that we speak; none of them: go on without (a browser then hangs up itself)."""
    for name in offered:
        if name in _ENCODINGS:
            return name
    return None


def _plain(protocol: ServerProtocol, status: HTTPStatus, text: str, head_only: bool = False) -> Handshake:
    response = protocol.reject(status, text)
    headers: Headers = response.headers
    headers["Cache-Control"] = "no-store"
    if head_only:
        response.body = b""
    protocol.send_response(response)
    return Handshake(b"".join(protocol.data_to_send()), False)


def _path_user(path: str) -> str | None:
    """The user a path names; None for paths that name none.

    Raises:
        LookupError: no such endpoint.
        ValueError: the path is not valid UTF-8 once decoded.
    """
    if path in ("/ws", "/ws/notifications"):
        return None
    prefix, _, user = path.rpartition("/")
    if prefix != "/notifications" or not user:
        raise LookupError(path)
    return unquote(user, errors="strict")


def _read_fields(shaken: Handshake, fields: dict[str, str]) -> None:
    shaken.token = fields.get("token")
    shaken.ticket = fields.get("ticket")
    try:
        if "deviceId" in fields:
            shaken.device = check_id(fields["deviceId"], "deviceId")
        shaken.position = position_of(fields)
    except InvalidInputError as exc:
        shaken.complaint = exc


def position_of(fields: Mapping[str, str]) -> tuple[str, int, int | None] | None:
    """(epoch, lastSeq, lastRev or None) of the fields of a URL, None if there is none.

    Raises:
        InvalidInputError: it is not valid.
    """
    if not fields.keys() & {"epoch", "lastSeq", "lastRev"}:
        return None
    if "epoch" not in fields or "lastSeq" not in fields:
        raise InvalidInputError(
            "expected epoch and lastSeq together", "epoch", "epoch and lastSeq", "one of them"
        )
    rev = fields.get("lastRev")
    return (
        check_id(fields["epoch"], "epoch"),
        _count(fields["lastSeq"], "lastSeq"),
        None if rev is None else _count(rev, "lastRev"),
    )


def _count(text: str, path: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and int(text) <= MAX_INT):
        expected = f"an integer from 0 to {MAX_INT}"
        raise InvalidInputError(
            f"expected {path} to be {expected}, got {text[:40]!r}", path, expected, text[:40]
        )
    return int(text)


def frame_head(opcode: int, length: int) -> bytes:
    """First bytes of an unfragmented, unmasked frame (RFC 6455 §5.2)."""
    if length < 126:
        return bytes((0x80 | opcode, length))
    if length < 65_536:
        return bytes((0x80 | opcode, 126)) + length.to_bytes(2, "big")
    return bytes((0x80 | opcode, 127)) + length.to_bytes(8, "big")


def text_frame(payload: bytes) -> bytes:
    """A whole text message as it goes on the wire."""
    return frame_head(0x1, len(payload)) + payload


def binary_frame(payload: bytes) -> bytes:
    """A whole binary message as it goes on the wire."""
    return frame_head(0x2, len(payload)) + payload


PING_FRAME: Final = frame_head(0x9, 0)


def close_reason(text: str) -> str:
    """Cut to what a close frame carries: 123 bytes of UTF-8."""
    return text.encode()[:123].decode(errors="ignore")
