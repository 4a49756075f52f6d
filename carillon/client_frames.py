"""Frames that clients send: bytes in, messages for the shard out, every check of the protocol between.

The parser knows form only: whether a notification id exists or belongs to the user is the shard's matter.
Unknown members of a frame are ignored, so that newer clients can talk to older servers; unknown types are
refused, because a client that asks for something must not believe that it happened.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeGuard, cast

import msgspec

from carillon.errors import InvalidInputError
from carillon.ids import parse_uuid
from carillon.messages import (
    ClientAck,
    ClientChange,
    ClientMode,
    ClientResume,
    ClientTopic,
    ClientVisibility,
    ClientWatch,
)
from carillon.presence import MODES

MAX_ITEMS: Final = 1000
"""Ids in one frame."""
MAX_ID_CHARS: Final = 128
"""User ids, device ids, action ids, epochs and the `id` of a frame."""
MAX_TOKEN_CHARS: Final = 8192
MAX_VIEWING_CHARS: Final = 300
MAX_DEPTH: Final = 32
MAX_INT: Final = 2**53 - 1
"""Beyond it JavaScript cannot tell integers apart."""

VISIBILITY_STATES: Final = ("focused", "visible", "hidden", "idle")

_from_json: Final = msgspec.json.Decoder().decode
_from_msgpack: Final = msgspec.msgpack.Decoder().decode

# JSON without any of these cannot hold NUL, a lone surrogate or a large number: no need to walk it.
_SUSPECT: Final = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])|\d{16}")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")

Ref = str | int | None


class Auth(NamedTuple):
    """AUTH: the token of a connection that brought none in its request."""

    token: str
    device: str | None = None
    ref: Ref = None


class ClientPing(NamedTuple):
    """PING."""

    ref: Ref = None


ClientFrame = (
    Auth | ClientPing | ClientAck | ClientChange | ClientResume | ClientVisibility | ClientWatch | ClientMode
    | ClientTopic
)  # fmt: skip


class BadFrameError(InvalidInputError):
    """A client frame broke the protocol; the connection stays.

    Args (positional): those of InvalidInputError, then `ref`, the frame's `id` if that at least was valid.
    """

    def __init__(
        self,
        message: str,
        path: str = "",
        expected: str = "",
        got: str = "",
        code: str | None = None,
        ref: Ref = None,
    ) -> None:
        super().__init__(message, path, expected, got, code)
        self.args = (message, path, expected, got, code, ref)
        self.ref = ref


def parse_text(data: bytes | bytearray, conn: int) -> ClientFrame:
    """Parse a JSON frame (UTF-8).

    Args:
        conn: number of the connection, copied into the message.

    Raises:
        BadFrameError: it says what was expected, with code `invalid` or `unknown_type`.
    """
    try:
        frame = _from_json(data)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise BadFrameError(f"expected a JSON object: {exc}", expected="a JSON object") from None
    if data.count(b"{") + data.count(b"[") > MAX_DEPTH or _SUSPECT.search(data):
        _check(frame)
    return _build(frame, conn)


def parse_binary(data: bytes | bytearray, conn: int) -> ClientFrame:
    """Parse a MessagePack frame; see `parse_text`."""
    try:
        frame = _from_msgpack(data)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, OverflowError) as exc:
        raise BadFrameError(f"expected a MessagePack map: {exc}", expected="a MessagePack map") from None
    _check(frame)
    return _build(frame, conn)


def check_id(value: object, path: str) -> str:
    """A device or user id: text of 1-128 characters without control characters. Raises InvalidInputError."""
    return _string(value, path, MAX_ID_CHARS)


# -- form ---------------------------------------------------------------------------------------------


def _too_deep() -> BadFrameError:
    wanted = f"nesting of at most {MAX_DEPTH} levels"
    return BadFrameError(f"expected {wanted}, got a deeper one", expected=wanted, got="deeper")


def _check(frame: object) -> None:
    """`_check_values`; its error names the frame it is about, so that nobody waits for an answer in vain."""
    try:
        _check_values(frame)
    except BadFrameError as exc:
        if isinstance(frame, dict):
            ref = cast("Members", frame).get("id")
            if _valid_ref(ref) and (not isinstance(ref, str) or _sendable(ref)):
                exc.ref = ref
                exc.args = (*exc.args[:5], ref)
        raise


def _check_values(frame: object) -> None:
    """Refuse what cannot be stored or compared, wherever it is: even ignored members may reach a log."""
    todo: list[tuple[object, int]] = [(frame, 1)]
    while todo:
        value, depth = todo.pop()
        if value is None or isinstance(value, bool):
            continue
        if isinstance(value, str):
            _check_text(value)
        elif isinstance(value, int):
            if not -MAX_INT <= value <= MAX_INT:
                raise _wrong("", f"integers within +-{MAX_INT}", value)
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise _wrong("", "finite numbers", value)
        elif isinstance(value, list | dict):
            if depth > MAX_DEPTH:
                raise _too_deep()
            if isinstance(value, list):
                todo += [(item, depth + 1) for item in cast("list[object]", value)]
            else:
                for name, item in cast("dict[object, object]", value).items():
                    if not isinstance(name, str):
                        raise _wrong("", "member names that are strings", name)
                    _check_text(name)
                    todo.append((item, depth + 1))
        else:  # MessagePack's bytes, timestamps and extensions
            raise _wrong("", "values that JSON has, too", value)


def _check_text(value: str) -> None:
    if "\0" in value:
        raise BadFrameError("expected text without NUL, got NUL", expected="text without NUL", got="NUL")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadFrameError(
                "expected valid Unicode, got a lone surrogate",
                expected="valid Unicode",
                got="a lone surrogate",
            ) from None


def _show(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool | int | float):
        return str(value) if abs(value) < 1e30 else "a huge number"
    if isinstance(value, str):
        return repr(value) if len(value) <= 40 else f"text of {len(value)} characters"
    if isinstance(value, list):
        return f"a list of {len(cast('list[object]', value))}"
    if isinstance(value, dict):
        return "an object"
    return "bytes" if isinstance(value, bytes) else type(value).__name__


def _wrong(path: str, expected: str, got: object) -> BadFrameError:
    shown = _show(got)
    where = f"{path} to be " if path else ""
    return BadFrameError(f"expected {where}{expected}, got {shown}", path, expected, shown)


def _string(value: object, path: str, most: int) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= most or _CONTROL.search(value):
        raise _wrong(path, f"text of 1-{most} characters without control characters", value)
    return value


def _count(value: object, path: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_INT:
        raise _wrong(path, f"an integer from 0 to {MAX_INT}", value)
    return value


def _id(value: object, path: str) -> bytes:
    raw = parse_uuid(value) if isinstance(value, str) else None
    if raw is None:
        raise _wrong(path, "a notification id (UUID)", value)
    return raw


def _ids(value: object, path: str) -> list[bytes]:
    if not isinstance(value, list):
        raise _wrong(path, f"a list of 1-{MAX_ITEMS} notification ids", value)
    items = cast("list[object]", value)
    if not 1 <= len(items) <= MAX_ITEMS:
        raise _wrong(path, f"a list of 1-{MAX_ITEMS} notification ids", items)
    return [_id(item, f"{path}/{at}") for at, item in enumerate(items)]


# -- frames -------------------------------------------------------------------------------------------

Members = dict[str, Any]


def _auth(frame: Members, conn: int, ref: Ref) -> Auth:
    device = frame.get("deviceId")
    return Auth(
        _string(frame.get("token"), "token", MAX_TOKEN_CHARS),
        None if device is None else check_id(device, "deviceId"),
        ref,
    )


def _ping(frame: Members, conn: int, ref: Ref) -> ClientPing:
    return ClientPing(ref)


def _resume(frame: Members, conn: int, ref: Ref) -> ClientResume:
    rev = frame.get("lastRev")
    return ClientResume(
        conn,
        _string(frame.get("epoch"), "epoch", MAX_ID_CHARS),
        _count(frame.get("lastSeq"), "lastSeq"),
        None if rev is None else _count(rev, "lastRev"),
        ref,
    )


def _ack(frame: Members, conn: int, ref: Ref) -> ClientAck:
    given = [name for name in ("notificationId", "notificationIds", "seq") if frame.get(name) is not None]
    if len(given) != 1:
        shown = " and ".join(given) or "none of them"
        wanted = "one of notificationId, notificationIds and seq"
        raise BadFrameError(f"expected {wanted}, got {shown}", "", wanted, shown)
    name = given[0]
    told = frame.get("rev")
    rev = None if told is None else _count(told, "rev")
    if name == "seq":
        return ClientAck(conn, _count(frame[name], name), [], ref, rev)
    ids = [_id(frame[name], name)] if name == "notificationId" else _ids(frame[name], name)
    return ClientAck(conn, None, ids, ref, rev)


def _change_many(op: str) -> Callable[[Members, int, Ref], ClientChange]:
    def build(frame: Members, conn: int, ref: Ref) -> ClientChange:
        return ClientChange(conn, op, _ids(frame.get("notificationIds"), "notificationIds"), ref=ref)

    return build


def _change_one(op: str) -> Callable[[Members, int, Ref], ClientChange]:
    def build(frame: Members, conn: int, ref: Ref) -> ClientChange:
        return ClientChange(conn, op, [_id(frame.get("notificationId"), "notificationId")], ref=ref)

    return build


def _read_all(frame: Members, conn: int, ref: Ref) -> ClientChange:
    upto = frame.get("upToSeq")
    return ClientChange(
        conn, "read_all", up_to_seq=None if upto is None else _count(upto, "upToSeq"), ref=ref
    )


def _click(frame: Members, conn: int, ref: Ref) -> ClientChange:
    change = _change_one("click")(frame, conn, ref)
    action = frame.get("actionId")
    if action is not None:
        change.action_id = _string(action, "actionId", MAX_ID_CHARS)
    return change


def _visibility(frame: Members, conn: int, ref: Ref) -> ClientVisibility:
    state = frame.get("state")
    if not isinstance(state, str) or state not in VISIBILITY_STATES:
        raise _wrong("state", f"one of {', '.join(VISIBILITY_STATES)}", state)
    viewing = frame.get("viewing")
    if viewing is not None:
        kind, colon, target = _string(viewing, "viewing", MAX_VIEWING_CHARS).partition(":")
        if not (kind and colon and target):
            raise _wrong("viewing", '"targetType:targetId"', viewing)
    return ClientVisibility(conn, state, viewing, ref)


def visibility(fields: Mapping[str, object]) -> ClientVisibility:
    """`state` and `viewing` where they come by HTTP. Raises InvalidInputError."""
    return _visibility(dict(fields), 0, None)


def _watch(frame: Members, conn: int, ref: Ref) -> ClientWatch:
    users: object = frame.get("userIds")
    # An empty list is meant: watch nobody any more.
    if not isinstance(users, list) or len(cast("list[object]", users)) > MAX_ITEMS:
        raise _wrong("userIds", f"a list of at most {MAX_ITEMS} user ids", cast("object", users))
    items = cast("list[object]", users)
    return ClientWatch(conn, [check_id(item, f"userIds/{at}") for at, item in enumerate(items)], ref)


def _mode(frame: Members, conn: int, ref: Ref) -> ClientMode:
    mode = frame.get("mode")
    if not isinstance(mode, str) or mode not in MODES:
        raise _wrong("mode", f"one of {', '.join(MODES)}", mode)
    return ClientMode(conn, mode, ref)


def _topic(subscribe: bool) -> Callable[[Members, int, Ref], ClientTopic]:
    def build(frame: Members, conn: int, ref: Ref) -> ClientTopic:
        return ClientTopic(conn, _string(frame.get("topic"), "topic", MAX_ID_CHARS), subscribe, ref)

    return build


_BUILDERS: Final[dict[str, Callable[[Members, int, Ref], ClientFrame]]] = {
    "AUTH": _auth,
    "PING": _ping,
    "RESUME": _resume,
    "ACK": _ack,
    "MARK_READ": _change_many("read"),
    "MARK_SEEN": _change_many("seen"),
    "MARK_ALL_READ": _read_all,
    "ARCHIVE": _change_one("archive"),
    "DISMISS": _change_one("dismiss"),
    "CLICK": _click,
    "VISIBILITY": _visibility,
    "WATCH_PRESENCE": _watch,
    "SET_PRESENCE": _mode,
    "SUBSCRIBE": _topic(subscribe=True),
    "UNSUBSCRIBE": _topic(subscribe=False),
}

TYPES: Final = tuple(_BUILDERS)
"""Every type a client may send."""


def _valid_ref(ref: object) -> TypeGuard[str | int]:
    if isinstance(ref, str):
        return len(ref) <= MAX_ID_CHARS
    return type(ref) is int and -MAX_INT <= ref <= MAX_INT


def _sendable(text: str) -> bool:
    """Whether an answer can say it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _build(frame: object, conn: int) -> ClientFrame:
    if not isinstance(frame, dict):
        raise _wrong("", "an object", frame)
    members = cast("Members", frame)
    ref = members.get("id")
    if ref is not None and not _valid_ref(ref):
        raise _wrong("id", f"text of at most {MAX_ID_CHARS} characters or an integer", ref)
    kind = members.get("type")
    build = _BUILDERS.get(kind) if isinstance(kind, str) else None
    try:
        if build is None:
            error = _wrong("type", f"one of {', '.join(TYPES)}", kind)
            raise BadFrameError(error.args[0], "type", error.expected, error.got, "unknown_type")
        return build(members, conn, ref)
    except BadFrameError as exc:
        exc.ref = ref
        exc.args = (*exc.args[:5], ref)
        raise
