"""What a service does to notifications it sent: edits, retracts, cancels them."""

from __future__ import annotations

import uuid
from typing import Any, Final

import msgspec

from carillon.clock import rfc3339
from carillon.edits import MEMBERS, VERSION, Patch, former_members, read_if_match, read_patch
from carillon.errors import NotFoundError
from carillon.events import ProblemError
from carillon.ids import slot_of
from carillon.messages import Amend, Amended
from carillon.notification import notification_json, user_json_of
from carillon.problems import DocumentError, problem
from serve.audit import audited
from serve.http import Header, Request, Response, json_response
from serve.routes.bodies import no_notification, path_notification
from serve.routing import SERVICE, Query, Route
from serve.schemas import COMPONENTS, INSTANT, UUID, WHOLE, obj, ref
from serve.services import Services
from stores.postgres.feed import Act, Found


def etag(version: int) -> Header:
    """A version as a header."""
    return b"etag", b'"%d"' % version


def if_match(request: Request) -> int | None:
    """The version that the request's If-Match names; None: it names none.

    Raises:
        DocumentError: it is no version.
    """
    match = request.header(b"if-match")
    return None if match is None else read_if_match(match.decode("utf-8", "replace"))


def act_json(act: Act) -> dict[str, Any]:
    """One act as it is told."""
    told: dict[str, Any] = {"act": act.act, "at": rfc3339(act.at_ms), "by": act.actor}
    if act.version is not None:
        told["version"] = act.version
    if act.former is not None:
        told["former"] = former_members(act.former)
    return told


def history(found: Found) -> dict[str, Any]:
    """What became of a notification by its service, for the answers that tell of one."""
    retracted_ms, cancelled_ms = found.row.retracted_ms, found.cancelled_ms
    return {
        "version": found.version,
        "retractedAt": None if retracted_ms is None else rfc3339(retracted_ms),
        "cancelledAt": None if cancelled_ms is None else rfc3339(cancelled_ms),
        "changes": [act_json(act) for act in found.acts],
    }


async def _amend(services: Services, request: Request, raw: bytes, op: str, patch: Patch | None) -> Amended:
    """Have the owner of the user do it. Raises NotFoundError: the tenant has no such notification."""
    user = await services.feed.owner(request.tenant, raw)
    if user is None:
        raise await no_notification(services, request, raw)
    actor = "key:unknown" if request.caller is None else f"key:{request.caller.key_id}"
    message = Amend(
        request.tenant, user, slot_of(request.tenant, user), op, raw, uuid.uuid4().bytes, actor,
        "" if patch is None else patch.members, None if patch is None else patch.version,
    )  # fmt: skip
    answer = await services.backend.request(message, request.deadline)
    assert isinstance(answer, Amended)
    return answer


async def _cancel_schedule(services: Services, request: Request, raw: bytes) -> int | None:
    """An event that is to be sent later is answered with the id of its schedule.

    Returns:
        When that was cancelled, now or before; None: there is none that can be.
    """
    now_ms = services.clock.now_ms()
    if await services.schedules.cancel(request.tenant, raw, now_ms):
        await audited(services, request, "schedule.cancel", request.params["id"])
        return now_ms
    known = await services.schedules.get(request.tenant, raw)
    return known.updated_ms if known is not None and known.state == "cancelled" else None


async def post_cancel(services: Services, request: Request) -> Response:
    """POST /v1/notifications/{id}/cancel."""
    raw = path_notification(request)
    await request.json_object(())
    try:
        answer = await _amend(services, request, raw, "cancel", None)
    except NotFoundError:
        at_ms = await _cancel_schedule(services, request, raw)
        if at_ms is None:
            raise
        answer = Amended(1, None, at_ms, 1)
    cancelled_ms, retracted_ms = answer.cancelled_ms, answer.retracted_ms
    return json_response(
        {
            "id": request.params["id"],
            "cancelledAt": None if cancelled_ms is None else rfc3339(cancelled_ms),
            "retractedAt": None if retracted_ms is None else rfc3339(retracted_ms),
            "stopped": answer.stopped,
        }
    )


async def post_retract(services: Services, request: Request) -> Response:
    """POST /v1/notifications/{id}/retract."""
    raw = path_notification(request)
    await request.json_object(())
    answer = await _amend(services, request, raw, "retract", None)
    assert answer.retracted_ms is not None
    return json_response({"id": request.params["id"], "retractedAt": rfc3339(answer.retracted_ms)})


async def patch_notification(services: Services, request: Request) -> Response:
    """PATCH /v1/notifications/{id}."""
    raw = path_notification(request)
    document = await request.json_object()
    try:
        patch = read_patch(document)
        version = if_match(request)
        if version is not None:
            patch = patch._replace(version=version)
    except DocumentError as exc:
        raise ProblemError(problem("invalid", str(exc), exc.errors)) from None
    answer = await _amend(services, request, raw, "edit", patch)
    found = await services.feed.notification(request.tenant, raw)
    if found is None:
        raise await no_notification(services, request, raw)
    shown = notification_json(found.row, user_json_of(found.user))
    return json_response(
        {"notification": msgspec.Raw(shown.encode()), "version": answer.version},
        headers=(etag(answer.version),),
    )


_WHEN: Final = {"anyOf": [INSTANT, {"type": "null"}]}
HISTORY: Final[dict[str, Any]] = {
    "version": {**WHOLE, "description": "Of the content: 1 as it was sent, one more with each edit."},
    "retractedAt": _WHEN,
    "cancelledAt": _WHEN,
    "changes": {
        "type": "array",
        "items": obj(
            {
                "act": {"enum": ["edit", "retract", "cancel"]},
                "at": INSTANT,
                "by": {"type": "string", "description": "The API key: `key:<key id>`."},
                "version": WHOLE,
                "former": {"type": "object", "description": "What an edit replaced, as it was before."},
            },
            ["act", "at", "by"],
        ),
    },
}
"""Schema of `history`."""

_SCOPE = "events:write"
_TAG = "Events"
_EDITABLE: Final = {
    name: schema for name, schema in COMPONENTS["Event"]["properties"].items() if name in MEMBERS
}
_ID: Final = "0198c0de-7000-7000-8000-000000000001"

ROUTES: Final = (
    Route(
        "PATCH", "/v1/notifications/{id}", patch_notification, SERVICE, "Edit a notification", scope=_SCOPE,
        doc=(
            "Members that are not named stay; null takes one away. Devices that are connected show it at "
            "once, pushes that wait carry it, and what phones show is replaced without a sound. A retracted "
            "(`retracted`) or expired (`expired`) one is 409."
        ),
        headers=(
            Query("If-Match", {"type": "string"}, "The ETag of the version that is edited; else 412."),
        ),
        body=obj({**_EDITABLE, VERSION: {"type": "integer", "minimum": 1}}),
        body_required=False, body_example={"title": "Grace replied to you", "body": "I was wrong."},
        answer=obj({"notification": ref("Notification"), "version": WHOLE}, ["notification", "version"]),
        problems=(400, 404, 409, 412, 413, 422), tag=_TAG,
    ),
    Route(
        "POST", "/v1/notifications/{id}/retract", post_retract, SERVICE, "Retract a notification",
        scope=_SCOPE,
        doc=(
            "It leaves feed, search, count and connected devices, pushes that wait are stopped, and phones "
            "that show it are told to take it back. For good; again: the same answer."
        ),
        body=obj({}), body_required=False,
        answer=obj({"id": UUID, "retractedAt": INSTANT}, ["id", "retractedAt"]),
        answer_example={"id": _ID, "retractedAt": "2026-01-01T00:00:07.120Z"},
        problems=(400, 404, 413, 422), tag=_TAG,
    ),
    Route(
        "POST", "/v1/notifications/{id}/cancel", post_cancel, SERVICE, "Stop what is pending",
        scope=_SCOPE,
        doc=(
            "Pushes that wait, are held or would be tried again are stopped, and no fallback follows. What "
            "was shown stays, in the feed too. Also takes the id of an event that is to be sent later. "
            "Again: the same answer."
        ),
        body=obj({}), body_required=False,
        answer=obj(
            {
                "id": UUID,
                "cancelledAt": _WHEN,
                "retractedAt": _WHEN,
                "stopped": {**WHOLE, "description": "Pushes that will not be sent."},
            },
            ["id", "cancelledAt", "retractedAt", "stopped"],
        ),
        answer_example={
            "id": _ID, "cancelledAt": "2026-01-01T00:00:07.120Z", "retractedAt": None, "stopped": 1,
        },
        problems=(400, 404, 413, 422), tag=_TAG,
    ),
)  # fmt: skip
