"""Preferences of users: read, replaced, changed in part; for services and for the user's own devices."""

from __future__ import annotations

from typing import Any, Final

from carillon import preferences
from carillon.errors import BusyError, CarillonError, NotFoundError, VersionError
from carillon.events import ProblemError, refused
from carillon.ids import slot_of
from carillon.inheritance import complete, patched
from carillon.messages import Done, PreferencesPut
from carillon.problems import DocumentError, FieldError, problem, shown
from serve.http import Request, Response, json_response
from serve.routes.amend import etag, if_match
from serve.routing import Query
from serve.services import Services

VIEWS: Final = ("complete", "own")
VIEW: Final = Query(
    "view",
    {"enum": list(VIEWS)},
    "complete (default): with every member, by the tenant's defaults where the user says nothing. own: what "
    "the user said, no more.",
)
_PATCH_TRIES: Final = 5
"""Of a change in part that names no version, while others change the same document."""


async def get_preferences(services: Services, request: Request, tenant: str, user: str) -> Response:
    """The document with every member, or (`view=own`) what the user said."""
    view = _view(request)
    stored, version = await services.feed.preferences(tenant, user)
    return await _answer(services, tenant, view, stored, version)


async def put_preferences(services: Services, request: Request, tenant: str, user: str) -> Response:
    """Replace the document and tell it back."""
    view = _view(request)
    document = await request.json_object()
    version = await _put(services, request, tenant, user, document, _expected(request))
    return await _answer(services, tenant, view, document, version)


async def patch_preferences(services: Services, request: Request, tenant: str, user: str) -> Response:
    """Change a part of what the user said, and tell the document back.

    Without If-Match a change that another one overtook is made again, of what that one left.
    """
    view = _view(request)
    patch = await request.json_object()
    expected = _expected(request)
    for _ in range(_PATCH_TRIES):
        stored, version = await services.feed.preferences(tenant, user)
        if expected is not None and expected != version:
            raise VersionError(f"version {expected} of the preferences is not the present one", "If-Match")
        document = patched(stored, patch)
        try:
            version = await _put(services, request, tenant, user, document, version)
        except CarillonError as exc:
            if expected is None and exc.code == VersionError.code:
                continue
            raise
        return await _answer(services, tenant, view, document, version)
    raise BusyError("the preferences are changed by many at once")


async def _put(
    services: Services,
    request: Request,
    tenant: str,
    user: str,
    document: dict[str, Any],
    version: int | None,
) -> int:
    """Have the owner of the user store a document; returns its version."""
    try:
        text = preferences.validate(document)
    except DocumentError as exc:
        raise ProblemError(problem("invalid", str(exc), exc.errors)) from None
    done = await services.backend.request(
        PreferencesPut(tenant, user, slot_of(tenant, user), text, version), request.deadline
    )
    assert isinstance(done, Done)
    return done.count


async def _answer(
    services: Services, tenant: str, view: str, document: dict[str, Any], version: int
) -> Response:
    if view == "complete":
        document = complete(document, await _defaults(services, tenant))
    return json_response(document, headers=(etag(version),))


async def _defaults(services: Services, tenant: str) -> dict[str, Any]:
    """The tenant's defaults; {} if it has none."""
    try:
        return (await services.tenants.policy(tenant)).get("defaults", {})
    except NotFoundError:  # a token outlives its tenant
        return {}


def _expected(request: Request) -> int | None:
    try:
        return if_match(request)
    except DocumentError as exc:
        raise ProblemError(problem("invalid", str(exc), exc.errors)) from None


def _view(request: Request) -> str:
    view = request.query().get("view", "complete")
    if view not in VIEWS:
        expected = " or ".join(VIEWS)
        raise refused(
            f"expected view to be {expected}, got {shown(view)}", [FieldError("view", expected, shown(view))]
        )
    return view
