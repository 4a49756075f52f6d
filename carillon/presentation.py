"""How a notification presents itself to its user: what documents say of sound, badge, vibration, time on the
screen, and which word counts. Pure.

Of one document the word on the channel counts before the one on everything; the user's document counts before
the tenant's defaults, member by member.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeVar

T = TypeVar("T")


class Words(NamedTuple):
    """What one document says of one channel; None: nothing.

    Attributes:
        sound: "" none, "default", or the name of a sound.
    """

    sound: str | None = None
    badge: bool | None = None
    vibration: bool | None = None
    duration_ms: int | None = None
    auto_dismiss: bool | None = None


SILENT: Final = Words()
"""A document that says nothing."""


class OfPush(NamedTuple):
    """How a push is to be shown.

    Attributes:
        sound: "" none, "default", or the name of a sound of the app.
        vibration: None if nobody says: as the app has it.
    """

    sound: str = "default"
    badge: bool = True
    vibration: bool | None = None


AS_EVER: Final = OfPush()
"""A push of whose presentation nobody says anything."""


class OfApp(NamedTuple):
    """How a notification is to be shown in the app.

    Attributes:
        sound: as in `OfPush`.
        duration_ms, auto_dismiss: None if nobody says: as the app has it.
    """

    sound: str = "default"
    vibration: bool = True
    duration_ms: int | None = None
    auto_dismiss: bool | None = None


AS_THE_APP: Final = OfApp()
"""Of whom nobody says anything."""


def words(document: Mapping[str, Any], channel: str) -> Words:
    """What a valid document says of a channel."""
    channels: Mapping[str, Any] = document.get("channels") or {}
    of_channel: Any = channels.get(channel)
    near: Mapping[str, Any] = {} if of_channel is None or isinstance(of_channel, bool) else of_channel
    if not near and not document.keys() & _EVERYWHERE:
        return SILENT
    sound = near["sound"] if "sound" in near else document.get("sound")
    return Words(
        ("default" if sound else "") if isinstance(sound, bool) else sound,
        near.get("badge", document.get("badge")),
        near.get("vibration", document.get("vibration")),
        near.get("durationMs"),
        near.get("autoDismiss"),
    )


_EVERYWHERE: Final = frozenset(("sound", "badge", "vibration"))


def of_push(user: Words, defaults: Words) -> OfPush:
    """How a push is to be shown, by what the user's and the tenant's document say of pushes."""
    return OfPush(
        _first(user.sound, defaults.sound, "default"),
        _first(user.badge, defaults.badge, True),
        user.vibration if user.vibration is not None else defaults.vibration,
    )


def of_app(user: Words, defaults: Words) -> OfApp:
    """How a notification is to be shown in the app, by what both documents say of `in_app`."""
    return OfApp(
        _first(user.sound, defaults.sound, "default"),
        _first(user.vibration, defaults.vibration, True),
        user.duration_ms if user.duration_ms is not None else defaults.duration_ms,
        user.auto_dismiss if user.auto_dismiss is not None else defaults.auto_dismiss,
    )


def _first(of_user: T | None, of_tenant: T | None, default: T) -> T:
    return of_user if of_user is not None else of_tenant if of_tenant is not None else default
