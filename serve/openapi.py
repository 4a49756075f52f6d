"""OpenAPI 3.1, from the route table."""

from __future__ import annotations

import functools
import re
from typing import Any, Final

import msgspec

from serve.routes import all_routes
from serve.routing import CLIENT, OPEN, SERVICE, Query, Route
from serve.schemas import COMPONENTS, ref

_TITLES: Final = {
    400: "Not readable: not JSON, not UTF-8",
    401: "No credentials, or none that verify",
    403: "The API key lacks the scope",
    404: "Unknown or foreign id",
    409: "The first request with this idempotency key is still running; see Retry-After",
    412: "Another version than the one named is the present one",
    413: "The body is too long",
    422: "A rule is broken (`errors` names each), or it is not supported yet",
    429: "Too many requests at once; see Retry-After",
    503: "Temporarily unavailable, nothing was acknowledged; see Retry-After",
}
_TAGS: Final = {
    "Events": "For services: send.",
    "Users": "For services: what belongs to a user.",
    "Segments": "For services: users by what is known of them.",
    "Topics": "For services: who subscribes to what.",
    "Presence": "For services: who is there.",
    "Dead letters": "For services: what could not be delivered, and again.",
    "Client": "For a user's own devices.",
    "Operations": "Health and documentation.",
    "Demo": "The demo page; demo mode only.",
}
_PROBLEM: Final = {"application/problem+json": {"schema": ref("Problem")}}
_RETRY_AFTER: Final = {
    "Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds."}
}


def openapi_document() -> dict[str, Any]:
    """The document."""
    paths: dict[str, dict[str, Any]] = {}
    for route in all_routes():
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Carillon",
            "version": "1",
            "description": "A presence-aware notification gateway. Errors are problem documents (RFC 9457).",
        },
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": COMPONENTS,
            "securitySchemes": {
                "apiKey": {"type": "http", "scheme": "bearer", "description": "An API key (crl_...)."},
                "clientToken": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "HS256 over the tenant's client secret, with sub, tenant and exp.",
                },
            },
        },
    }


@functools.cache
def openapi_json() -> bytes:
    """The document as JSON; it never changes while the process lives."""
    return msgspec.json.encode(openapi_document())


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _operation_id(route),
        "summary": route.summary,
        "tags": [route.tag],
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": _path_schema(name, route.path)}
            for name in re.findall(r"{(\w+)}", route.path)
        ]
        + [_parameter(one, "query") for one in route.query]
        + [_parameter(one, "header") for one in route.headers],
        "responses": _responses(route),
    }
    words = [route.doc] if route.doc else []
    if route.door == SERVICE:
        operation["security"] = [{"apiKey": []}]
        words.append(f"Scope: `{route.scope}`.")
    elif route.door == CLIENT:
        operation["security"] = [{"clientToken": []}]
    if words:
        operation["description"] = " ".join(words)
    if route.body is not None:
        content: dict[str, Any] = {"schema": route.body}
        if route.body_example is not None:
            content["example"] = route.body_example
        operation["requestBody"] = {
            "required": route.body_required,
            "content": {"application/json": content},
        }
    return operation


def _path_schema(name: str, path: str) -> dict[str, Any]:
    if name == "id" and path.startswith("/v1/dead-letters/"):
        return {"type": "string", "pattern": "^[0-9]{1,19}$"}
    if name == "id":
        return {"type": "string", "format": "uuid"}
    return {"type": "string", "minLength": 1, "maxLength": 128}


def _parameter(one: Query, place: str) -> dict[str, Any]:
    return {"name": one.name, "in": place, "required": False, "schema": one.schema, "description": one.doc}


def _responses(route: Route) -> dict[str, Any]:
    good: dict[str, Any] = {"description": route.summary}
    if route.answer is not None:
        content: dict[str, Any] = {"schema": route.answer}
        if route.answer_example is not None:
            content["example"] = route.answer_example
        good["content"] = {"application/json": content}
    else:
        good["content"] = {route.answer_type: {"schema": {"type": "string"}}}
    statuses = set(route.problems)
    if route.door != OPEN:
        statuses |= {400, 401, 503}
    if route.door == SERVICE:
        statuses.add(403)
    responses: dict[str, Any] = {str(route.status): good}
    for status, (meaning, schema) in route.other_answers.items():
        responses[str(status)] = {
            "description": meaning,
            "content": {"application/json": {"schema": schema}},
        }
    for status in sorted(statuses):
        told: dict[str, Any] = {"description": _TITLES[status], "content": _PROBLEM}
        if status in (409, 429, 503):
            told["headers"] = _RETRY_AFTER
        responses[str(status)] = told
    return responses


def _operation_id(route: Route) -> str:
    words = re.findall(r"\w+", route.path.replace("{", "by_").replace(".", "_").replace("-", "_"))
    return "_".join([route.method.lower(), *words])
