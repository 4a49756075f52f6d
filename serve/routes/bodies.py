"""What several routes read from a request: ids, lists, devices, pages."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from carillon.clock import rfc3339
from carillon.errors import NotFoundError
from carillon.event_rules import Text, text_error, tree_errors
from carillon.events import ProblemError, refused
from carillon.ids import parse_uuid
from carillon.messages import DevicePut
from carillon.problems import FieldError, problem, shown
from serve.http import Request
from serve.services import Services

MAX_LIST: Final = 1000
_ID: Final = Text(1, 128)


def wrong(errors: list[FieldError], code: str = "invalid") -> ProblemError:
    """The error of a refused request, of which the first of `errors` is told in words."""
    first = errors[0]
    return refused(f"expected {first.path} to be {first.expected}, got {first.got}", errors, code)


def valid_id(name: str, value: Any) -> str:
    """A user or device id.

    Raises:
        ProblemError: it is not 1-128 characters without control characters (422).
    """
    error = text_error(name, value, _ID)
    if error is None and tree_errors(value):
        error = FieldError(name, "no lone surrogate", shown(value))
    if error is not None:
        raise refused(f"expected {name} to be {error.expected}, got {error.got}", [error])
    return value


def path_id(request: Request, name: str) -> str:
    """An id of the path. Raises ProblemError (422)."""
    return valid_id(name, request.params[name])


def known_query(request: Request, *names: str) -> Mapping[str, str]:
    """The query parameters. Raises ProblemError (422): another one than these is there."""
    query = request.query()
    unknown = [name for name in query if name not in names]
    if unknown:
        expected = f"one of {', '.join(names)}"
        raise refused(
            f"unknown parameter {shown(unknown[0])}",
            [FieldError(shown(unknown[0]), expected, "an unknown one")],
        )
    return query


def known_state(query: Mapping[str, str], states: Collection[str]) -> str | None:
    """The parameter `state`. Raises ProblemError (422): it is none of these."""
    state = query.get("state")
    if state is not None and state not in states:
        raise wrong([FieldError("state", "|".join(states), shown(state))])
    return state


def id_cursor(query: Mapping[str, str]) -> bytes | None:
    """The parameter `cursor` of a list whose pages end with an id. Raises ProblemError (422)."""
    text = query.get("cursor")
    if not text:
        return None
    raw = parse_uuid(text)
    if raw is None:
        raise wrong([FieldError("cursor", "nextCursor of a page before", shown(text))])
    return raw


async def no_notification(services: Services, request: Request, raw: bytes) -> NotFoundError:
    """What to answer about a notification that is not in the tables: perhaps it is archived."""
    month = await services.feed.archived(request.tenant, raw)
    expected, got = "the id of a notification", request.params["id"]
    if month is None:
        return NotFoundError("there is no such notification", "id", expected, got)
    return NotFoundError(
        f"there is no such notification here; what was read of {month} is archived to files, from which an "
        "operator can restore it",
        "id", expected, got, "archived",
    )  # fmt: skip


def path_notification(request: Request) -> bytes:
    """The notification id of the path. Raises NotFoundError: what is no UUID is no notification."""
    raw = parse_uuid(request.params["id"])
    if raw is None:
        raise NotFoundError(
            "there is no such notification", "id", "the id of a notification", request.params["id"][:80]
        )
    return raw


def id_list(document: dict[str, Any], name: str) -> list[str]:
    """A list of at most 1,000 ids.

    Raises:
        ProblemError: it is missing, too long, or holds something else than text (422).
    """
    value = document.get(name)
    if not isinstance(value, list):
        raise refused(
            f"expected {name} to be an array of ids", [FieldError(name, "an array of ids", shown(value))]
        )
    if len(value) > MAX_LIST:
        got = f"{len(value)} ids"
        raise refused(
            f"expected {name} to hold at most {MAX_LIST} ids",
            [FieldError(name, f"at most {MAX_LIST} ids", got)],
        )
    for index, one in enumerate(value):
        if not isinstance(one, str):
            raise refused(
                f"expected {name}/{index} to be text", [FieldError(f"{name}/{index}", "text", shown(one))]
            )
    return value


def notification_ids(document: dict[str, Any]) -> list[bytes]:
    """`notificationIds` as raw ids, each once; what is no id of a notification is ignored."""
    raw = (parse_uuid(text) for text in id_list(document, "notificationIds"))
    return list(dict.fromkeys(one for one in raw if one is not None))


def attempt_json(one: dict[str, Any]) -> dict[str, Any]:
    """One try of a delivery at one target."""
    return {
        "attempt": one["attempt"],
        "deviceId": one["device_id"],
        "provider": one["provider"],
        "outcome": one["outcome"],
        "providerId": one["provider_id"] or None,
        "status": one["status"],
        "error": one["error"] or None,
        "startedAt": rfc3339(one["started_ms"]),
        "durationMs": round(one["duration_ms"], 1),
    }


PLATFORMS: Final = ("ios", "android", "web")
PROVIDERS: Final = ("fcm", "apns")
ENVIRONMENTS: Final = ("production", "sandbox")
_DEVICE_MEMBERS: Final = (
    "platform", "provider", "token", "fid", "subscription", "appId", "environment", "locale",
)  # fmt: skip


def device_put(document: dict[str, Any], tenant: str, user: str, slot: int, device: str) -> DevicePut:
    """A push target as the message to its owner.

    Raises:
        ProblemError: it breaks a rule (422), or asks for Web Push (422 not_supported).
    """
    errors = tree_errors(document)
    for name in document:
        if name not in _DEVICE_MEMBERS:
            errors.append(FieldError(shown(name), f"one of {', '.join(_DEVICE_MEMBERS)}", "an unknown field"))
    given = {name: value for name, value in document.items() if value is not None}
    if given.get("provider") == "webpush" or "subscription" in given:
        raise ProblemError(
            problem(
                "not_supported",
                "Web Push is not supported yet",
                [
                    FieldError(
                        "provider", "fcm or apns: webpush is not supported yet", shown(given.get("provider"))
                    )
                ],
            )
        )
    for name, allowed in (("platform", PLATFORMS), ("provider", PROVIDERS)):
        if given.get(name) not in allowed:
            errors.append(FieldError(name, "|".join(allowed), shown(given.get(name))))
    environment = given.get("environment", "production")
    if environment not in ENVIRONMENTS:
        errors.append(FieldError("environment", "|".join(ENVIRONMENTS), shown(environment)))
    kinds = [name for name in ("token", "fid") if name in given]
    if len(kinds) != 1:
        errors.append(FieldError("token", "one of token and fid", " and ".join(kinds) or "neither"))
    elif kinds == ["fid"] and given.get("provider") == "apns":
        errors.append(FieldError("fid", "token: apns knows no installation ids", "fid"))
    for name, rule in (
        ("token", Text(1, 4096)),
        ("fid", Text(1, 4096)),
        ("appId", Text(0, 255)),
        ("locale", Text(1, 35)),
    ):
        error = text_error(name, given[name], rule) if name in given else None
        if error is not None:
            errors.append(error)
    if errors:
        first = errors[0]
        raise refused(
            f"expected {first.path or 'the device'} to be {first.expected}, got {first.got}", errors
        )
    return DevicePut(
        tenant,
        user,
        slot,
        device,
        given["platform"],
        given["provider"],
        kinds[0],
        given[kinds[0]],
        given.get("appId", ""),
        environment,
        given.get("locale"),
    )
