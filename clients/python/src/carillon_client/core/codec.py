"""Between objects and bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from carillon_client.errors import InvalidRequestError
from carillon_client.models import Change, Event, Notification

encode_json: Final = msgspec.json.Encoder().encode
decode_json: Final = msgspec.json.Decoder().decode
encode_msgpack: Final = msgspec.msgpack.Encoder().encode
decode_msgpack: Final = msgspec.msgpack.Decoder().decode


def _json_text(frame: Any) -> str:
    return encode_json(frame).decode()


CODECS: Final[dict[str, tuple[Callable[[Any], str | bytes], Callable[[Any], Any]]]] = {
    "carillon.v1.json": (_json_text, decode_json),
    "carillon.v1.msgpack": (encode_msgpack, decode_msgpack),
}
"""By subprotocol: (object to message, message to object)."""

ABSENT_AS_NULL: Final = ("actions", "data")


def notification_of(raw: dict[str, Any]) -> Notification:
    """The typed form. Raises msgspec.ValidationError or AttributeError if it is not a notification."""
    known = {name: value for name, value in raw.items() if value is not None or name not in ABSENT_AS_NULL}
    return msgspec.convert({**known, "__raw__": raw}, Notification)


def event_members(event: Event | Mapping[str, Any]) -> dict[str, Any]:
    """The event's members by their wire names; a new dict, nulls left out.

    Raises:
        InvalidRequestError: it cannot be written as JSON at all. All other rules are the server's.
    """
    if isinstance(event, Event):
        members: dict[str, Any] = msgspec.to_builtins(event, builtin_types=())
        members |= members.pop("__more__", None) or {}
    elif isinstance(event, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  callers without a type checker
        members = dict(event)
    else:
        raise InvalidRequestError(0, "invalid", f"expected an Event or a mapping, got {type(event).__name__}")
    return {name: value for name, value in members.items() if value is not None}


def encode_members(members: Mapping[str, Any]) -> bytes:
    """Compact JSON. Raises InvalidRequestError for what JSON cannot say."""
    try:
        return encode_json(members)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise InvalidRequestError(0, "invalid", f"the event cannot be written as JSON: {exc}") from exc


def change_of(frame: dict[str, Any]) -> Change:
    """The change that a state frame tells. Raises as `notification_of` does if it tells none."""
    kind: str = frame["type"]
    if kind == "NOTIFICATION_UPDATED":
        notification = notification_of(frame["notification"])
        return Change(kind, (notification.id,), None, notification, frame)
    one = frame.get("notificationId")
    ids = msgspec.convert(frame.get("notificationIds", [] if one is None else [one]), tuple[str, ...])
    return Change(kind, ids, msgspec.convert(frame.get("rev"), int | None), None, frame)
