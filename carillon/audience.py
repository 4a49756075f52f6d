"""Audiences: whom something for many is for. Pure; stores/postgres/audience.py walks them.

As JSON: `"all"`, `{"topic": "goal.alerts"}` or `{"segment": "vienna"}`; an object may name `platforms`
besides, then only users with a push target on one of them are meant (`{"all": true, "platforms": ["ios"]}`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from carillon.event_rules import Text, is_array, is_object, text_error
from carillon.problems import DocumentError, FieldError, shown

PLATFORMS: Final = ("ios", "android", "web")
"""Of push targets."""
ALL: Final = "all"
TOPIC: Final = "topic"
SEGMENT: Final = "segment"
KINDS: Final = (ALL, TOPIC, SEGMENT)

NAME: Final = Text(1, 128)
"""What names of topics and ids of segments look like."""


class AudienceError(DocumentError):
    """An audience that breaks rules. Args (positional): the errors, in the order found."""


@dataclass(frozen=True, slots=True)
class Audience:
    """Users of one tenant.

    Attributes:
        kind: `all` (everybody known), `topic` (its subscribers) or `segment` (whom its filter fits now).
        name: of the topic or segment, else empty.
        platforms: only users with a push target on one of them; empty: all, with or without one.
    """

    kind: str
    name: str = ""
    platforms: tuple[str, ...] = ()


EVERYBODY: Final = Audience(ALL)


def parse_audience(value: Any, path: str = "audience") -> Audience:
    """The audience that a JSON value means.

    Raises:
        AudienceError: it means none.
    """
    if value == ALL:
        return EVERYBODY
    wanted = 'all, {"topic": name} or {"segment": id}'
    if not is_object(value):
        raise AudienceError([FieldError(path, wanted, shown(value))])
    errors = [
        FieldError(f"{path}/{shown(name)}", f"one of {', '.join(KINDS)}, platforms", "an unknown field")
        for name in value
        if name not in KINDS and name != "platforms"
    ]
    given = [kind for kind in KINDS if value.get(kind) is not None]
    if len(given) != 1:
        errors.append(FieldError(path, wanted, " and ".join(given) or "none of them"))
    elif given == [ALL] and value[ALL] is not True:
        errors.append(FieldError(f"{path}/{ALL}", "true", shown(value[ALL])))
    elif given != [ALL]:
        wrong = text_error(f"{path}/{given[0]}", value[given[0]], NAME)
        if wrong is not None:
            errors.append(wrong)
    platforms = value.get("platforms")
    if platforms is not None:
        errors.extend(platform_errors(f"{path}/platforms", platforms))
    if errors:
        raise AudienceError(errors)
    name = "" if given[0] == ALL else value[given[0]]
    return Audience(given[0], name, tuple(sorted(set(platforms or ()))))


def platform_errors(path: str, value: Any) -> list[FieldError]:
    """What is wrong with a list of platforms."""
    if not is_array(value) or not 1 <= len(value) <= len(PLATFORMS):
        return [FieldError(path, f"1 to {len(PLATFORMS)} of {', '.join(PLATFORMS)}", shown(value))]
    return [
        FieldError(f"{path}/{index}", "|".join(PLATFORMS), shown(one))
        for index, one in enumerate(value)
        if one not in PLATFORMS
    ]


def audience_json(audience: Audience) -> Any:
    """An audience as JSON; `parse_audience` reads it back."""
    if audience == EVERYBODY:
        return ALL
    document: dict[str, Any] = {audience.kind: audience.name or True}
    if audience.platforms:
        document["platforms"] = list(audience.platforms)
    return document
