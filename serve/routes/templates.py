"""Templates: texts of notifications per locale and channel, in versions."""

from __future__ import annotations

from typing import Any, Final

from carillon.clock import rfc3339
from carillon.errors import NotFoundError
from carillon.event_rules import is_object
from carillon.events import ProblemError, refused
from carillon.experiments import interval
from carillon.problems import FieldError, problem, shown
from carillon.templates import (
    CHANNELS,
    DEFAULT,
    MEMBERS,
    PARAM_TYPES,
    Rendered,
    Template,
    TemplateDocumentError,
    check_id,
    content_for,
    contents,
    parse_locale,
    parse_reference,
)
from serve.audit import audited
from serve.http import Request, Response, json_response, whole_number
from serve.routes.bodies import known_query, valid_id
from serve.routing import SERVICE, Query, Route, paging
from serve.schemas import INSTANT, USER_ID, nullable, obj, text
from serve.services import Services

MAX_LIMIT: Final = 100
DEFAULT_LIMIT: Final = 20
_LAST_VERSION: Final = 999_999_999


def template_json(template: Template) -> dict[str, Any]:
    """A template as it is told: its document, who and which it is."""
    return {
        "templateId": template.id,
        "version": template.version,
        "createdAt": rfc3339(template.created_ms),
        **template.document,
    }


def rendered_json(template: Template, rendered: Rendered) -> dict[str, Any]:
    """A preview."""
    return {
        "templateId": template.id,
        "version": template.version or None,
        "locale": rendered.locale,
        "variant": rendered.variant,
        **{name: rendered.members.get(name) for name in MEMBERS},
        "channels": rendered.channels,
    }


async def put_template(services: Services, request: Request) -> Response:
    """PUT /v1/templates/{templateId}."""
    template = check_id(request.params["templateId"])
    try:
        document = await services.templates.check(await request.json_object(), request.deadline)
    except TemplateDocumentError as exc:
        raise ProblemError(problem("invalid", str(exc), exc.errors)) from None
    caller = request.caller
    who = "key:unknown" if caller is None else f"key:{caller.key_id}"
    store = services.templates.store
    version = await store.put(request.tenant, template, document, who)
    services.templates.forget(request.tenant, template)
    await audited(services, request, "template.put", template, version=version)
    stored = await store.get(request.tenant, template, version)
    if stored is None:
        raise _unknown(template)  # deleted meanwhile
    return json_response(template_json(stored))


async def _found(services: Services, request: Request, version: int | None) -> Template:
    name = request.params["templateId"]
    reference = parse_reference(name)
    found = None
    if reference is not None and reference[1] is None:
        found = await services.templates.store.get(request.tenant, name, version)
    if found is None:
        raise _unknown(name)
    return found


def _unknown(name: str) -> NotFoundError:
    return NotFoundError("there is no such template", "templateId", "a template of this tenant", shown(name))


async def get_template(services: Services, request: Request) -> Response:
    """GET /v1/templates/{templateId}."""
    version = whole_number(known_query(request, "version"), "version", 0, 1, _LAST_VERSION) or None
    return json_response(template_json(await _found(services, request, version)))


async def get_versions(services: Services, request: Request) -> Response:
    """GET /v1/templates/{templateId}/versions."""
    await _found(services, request, None)
    rows = await services.templates.store.versions(request.tenant, request.params["templateId"])
    return json_response(
        {"versions": [{"version": v, "createdAt": rfc3339(at), "createdBy": who} for v, at, who in rows]}
    )


async def delete_template(services: Services, request: Request) -> Response:
    """DELETE /v1/templates/{templateId}."""
    template = request.params["templateId"]
    if parse_reference(template) is None or not await services.templates.store.delete(
        request.tenant, template
    ):
        raise _unknown(template)
    services.templates.forget(request.tenant, template)
    await audited(services, request, "template.delete", template)
    return json_response({"success": True})


async def list_templates(services: Services, request: Request) -> Response:
    """GET /v1/templates."""
    query = known_query(request, "limit", "cursor")
    limit = whole_number(query, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
    after = query.get("cursor") or None
    if after is not None and parse_reference(after) is None:
        raise refused(
            "expected cursor to be of a page before", [FieldError("cursor", "nextCursor", shown(after))]
        )
    found = await services.templates.store.page(request.tenant, after, limit)
    return json_response(
        {
            "templates": [
                {
                    "templateId": one.id,
                    "version": one.version,
                    "createdAt": rfc3339(one.created_ms),
                    "description": one.document.get("description", ""),
                    "locales": sorted({locale for _, texts in contents(one.document) for locale in texts}),
                }
                for one in found
            ],
            "nextCursor": found[-1].id if len(found) == limit else None,
        }
    )


async def get_results(services: Services, request: Request) -> Response:
    """GET /v1/templates/{templateId}/results."""
    version = whole_number(known_query(request, "version"), "version", 0, 1, _LAST_VERSION) or None
    template = await _found(services, request, version)
    rows = await services.templates.store.results(request.tenant, template.id, template.version)
    told: list[dict[str, Any]] = []
    for one in template.document.get("variants", ()):
        sent, *hits = rows.get(one["name"], (0, 0, 0, 0))
        entry: dict[str, Any] = {"variant": one["name"], "weight": one["weight"], "sent": sent}
        for name, count in zip(("delivered", "seen", "clicked"), hits, strict=True):
            low, high = interval(count, sent)
            rate = count / sent if sent else None
            entry[name] = {"count": count, "rate": rate, "low": low, "high": high}
        told.append(entry)
    return json_response({"templateId": template.id, "version": template.version, "variants": told})


_PREVIEW_MEMBERS: Final = ("params", "locale", "userId", "version", "document", "variant")


async def preview_template(services: Services, request: Request) -> Response:
    """POST /v1/templates/{templateId}/preview."""
    body = await request.json_object(_PREVIEW_MEMBERS)
    given = {name: value for name, value in body.items() if value is not None}
    templates = services.templates
    errors: list[FieldError] = []
    if not is_object(given.get("params", {})):
        errors.append(FieldError("params", "an object", shown(given["params"])))
    if "locale" in given and parse_locale(given["locale"]) is None:
        errors.append(FieldError("locale", "a locale such as pt or pt-BR", shown(given["locale"])))
    version = given.get("version")
    if version is not None and (type(version) is not int or not 1 <= version <= _LAST_VERSION):
        errors.append(FieldError("version", "a version, from 1", shown(version)))
    if "document" in given and version is not None:
        errors.append(FieldError("version", "absent with document", shown(version)))
    if errors:
        raise refused(f"expected {errors[0].path} to be {errors[0].expected}, got {errors[0].got}", errors)
    locale = given.get("locale")
    if "userId" in given and locale is None:
        user = valid_id("userId", given["userId"])
        locale = (await templates.store.locales(request.tenant, [user])).get(user)
    try:
        if "document" in given:
            document = await templates.check(given["document"], request.deadline)
            template = Template(check_id(request.params["templateId"]), 0, document)
        else:
            template = await _found(services, request, version)
        variant = given.get("variant")
        if "userId" in given and variant is None:
            variant = content_for(template, request.tenant, given["userId"])[0]
        rendered = await templates.render(
            template, locale, given.get("params", {}), request.deadline, variant
        )
    except TemplateDocumentError as exc:
        raise ProblemError(problem("invalid", str(exc), exc.errors)) from None
    return json_response(rendered_json(template, rendered))


_TEXTS: Final = {name: text(1, 16_384, control=True) for name in MEMBERS}
_LOCALE: Final = r"^(default|[a-z]{2,3}(-[A-Z][a-z]{3})?(-([A-Z]{2}|[0-9]{3}))?)$"
_CONTENT: Final = {
    "type": "object",
    "required": [DEFAULT],
    "maxProperties": 100,
    "propertyNames": {"pattern": _LOCALE},
    "additionalProperties": obj(
        {
            **_TEXTS,
            "channels": {
                "type": "object",
                "propertyNames": {"enum": list(CHANNELS)},
                "additionalProperties": obj(_TEXTS),
            },
        },
        ["title"],
    ),
}
_DOCUMENT: Final = {
    "locale": {"type": "string", "description": "Language of `default`; en if absent.", "examples": ["en"]},
    "escape": {"enum": ["html", "none"], "description": "HTML in feeds and sockets; html if absent."},
    "description": text(0, 1000, control=True),
    "params": {
        "type": "object",
        "maxProperties": 100,
        "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]{0,63}$"},
        "additionalProperties": obj(
            {"type": {"enum": list(PARAM_TYPES)}, "required": {"type": "boolean"}, "default": {}}
        ),
        "description": "Absent: those that the texts use, all of them required.",
    },
    "content": _CONTENT,
    "variants": {
        "type": "array",
        "minItems": 2,
        "maxItems": 10,
        "items": obj(
            {
                "name": text(1, 64),
                "weight": {"type": "integer", "minimum": 1, "maximum": 1000},
                "content": _CONTENT,
            },
            ["name", "weight", "content"],
        ),
        "description": "Instead of content: each user gets one of them, always the same.",
    },
}
_RATE: Final = obj(
    {
        "count": {"type": "integer"}, "rate": {"type": ["number", "null"]}, "low": {"type": "number"},
        "high": {"type": "number"},
    },
    ["count", "rate", "low", "high"],
)  # fmt: skip
_VERSION: Final = {"type": "integer", "minimum": 1, "maximum": _LAST_VERSION}
_STORED: Final = obj(
    {"templateId": {"type": "string"}, "version": _VERSION, "createdAt": INSTANT, **_DOCUMENT},
    ["templateId", "version", "createdAt", "params"],
)
_EXAMPLE: Final = {
    "params": {"who": {"type": "text"}, "count": {"type": "number", "default": 1}},
    "content": {
        "default": {
            "title": "{{ who }} wrote to you",
            "body": "{{ count|plural({'=0': 'Nothing new', 'one': '# message', 'other': '# messages'}) }}",
            "channels": {"push": {"title": "{{ who }}"}},
        },
        "pt": {"title": "{{ who }} escreveu para você"},
    },
}
_NULLABLE_TEXT: Final = {"type": ["string", "null"]}
_TAG: Final = "Templates"
_SCOPE: Final = "templates:write"

ROUTES: Final = (
    Route(
        "GET", "/v1/templates", list_templates, SERVICE, "List templates", scope=_SCOPE, doc="By id.",
        query=paging(DEFAULT_LIMIT, MAX_LIMIT),
        answer=obj(
            {
                "templates": {
                    "type": "array",
                    "items": obj(
                        {
                            "templateId": {"type": "string"}, "version": _VERSION, "createdAt": INSTANT,
                            "description": {"type": "string"},
                            "locales": {"type": "array", "items": {"type": "string"}},
                        },
                        ["templateId", "version", "createdAt", "description", "locales"],
                    ),
                },
                "nextCursor": _NULLABLE_TEXT,
            },
            ["templates", "nextCursor"],
        ),
        problems=(400, 422), tag=_TAG,
    ),
    Route(
        "PUT", "/v1/templates/{templateId}", put_template, SERVICE, "Store a template", scope=_SCOPE,
        doc="Makes a new version, which holds everywhere within `template.cache_s`; the same document again "
        "makes none. Texts are compiled first: what is wrong with one is told.",
        body={**obj(_DOCUMENT), "oneOf": [{"required": ["content"]}, {"required": ["variants"]}]},
        body_example=_EXAMPLE, answer=_STORED,
        answer_example={
            "templateId": "message", "version": 1, "createdAt": "2026-01-02T03:04:05.000Z", **_EXAMPLE
        },
        problems=(400, 413, 422, 429), tag=_TAG,
    ),
    Route(
        "GET", "/v1/templates/{templateId}", get_template, SERVICE, "Read a template", scope=_SCOPE,
        query=(Query("version", _VERSION, "Absent: the present one."),),
        answer=_STORED, problems=(400, 404, 422), tag=_TAG,
    ),
    Route(
        "DELETE", "/v1/templates/{templateId}", delete_template, SERVICE, "Delete a template", scope=_SCOPE,
        doc="All its versions. What was sent stays as it is.",
        answer=obj({"success": {"const": True}}, ["success"]), problems=(404,), tag=_TAG,
    ),
    Route(
        "GET", "/v1/templates/{templateId}/versions", get_versions, SERVICE, "Versions of a template",
        scope=_SCOPE, doc="Newest first.",
        answer=obj(
            {
                "versions": {
                    "type": "array",
                    "items": obj(
                        {"version": _VERSION, "createdAt": INSTANT, "createdBy": {"type": "string"}},
                        ["version", "createdAt", "createdBy"],
                    ),
                }
            },
            ["versions"],
        ),
        problems=(404,), tag=_TAG,
    ),
    Route(
        "GET", "/v1/templates/{templateId}/results", get_results, SERVICE, "Results of an experiment",
        scope=_SCOPE, doc="By variant of one version: how many were sent, and of those delivered, seen and "
        "clicked, with the interval that holds the true rate with 95 % confidence (Wilson).",
        query=(Query("version", _VERSION, "Absent: the present one."),),
        answer=obj(
            {
                "templateId": {"type": "string"}, "version": _VERSION,
                "variants": {
                    "type": "array",
                    "items": obj(
                        {
                            "variant": {"type": "string"}, "weight": {"type": "integer"},
                            "sent": {"type": "integer"},
                            **dict.fromkeys(("delivered", "seen", "clicked"), _RATE),
                        },
                        ["variant", "weight", "sent", "delivered", "seen", "clicked"],
                    ),
                },
            },
            ["templateId", "version", "variants"],
        ),
        problems=(400, 404, 422), tag=_TAG,
    ),
    Route(
        "POST", "/v1/templates/{templateId}/preview", preview_template, SERVICE, "Render without sending",
        scope=_SCOPE,
        doc="The stored template, or `document` before it is stored. `userId` chooses the user's language.",
        body=obj(
            nullable(
                {
                    "params": {"type": "object"}, "locale": text(2, 35), "userId": USER_ID,
                    "version": _VERSION, "variant": text(1, 64),
                    "document": obj(_DOCUMENT),
                }
            )
        ),
        body_example={"params": {"who": "Ada", "count": 2}, "locale": "pt-BR"},
        answer=obj(
            {
                "templateId": {"type": "string"}, "version": {"type": ["integer", "null"]},
                "locale": {"type": "string"}, "variant": _NULLABLE_TEXT,
                **dict.fromkeys(MEMBERS, _NULLABLE_TEXT),
                "channels": {"type": "object"},
            },
            ["templateId", "version", "locale", *MEMBERS, "channels"],
        ),
        answer_example={
            "templateId": "message", "version": 1, "locale": "pt", "title": "Ada escreveu para você",
            "body": None, "link": None, "imageUrl": None, "channels": {"push": {"title": "Ada"}},
        },
        problems=(400, 404, 413, 422, 429), tag=_TAG,
    ),
)  # fmt: skip
