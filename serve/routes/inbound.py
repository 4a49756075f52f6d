"""Webhooks in: what others send becomes an event, and the sources they send to."""

from __future__ import annotations

import re
import secrets
from typing import Any, Final

import msgspec

from carillon import inbound
from carillon.clock import rfc3339
from carillon.errors import NotFoundError
from carillon.events import ProblemError, read_json
from carillon.problems import FieldError, problem, shown
from carillon.templates import failed
from serve.audit import audited
from serve.http import Request, Response, json_response
from serve.limits import tenant_limits
from serve.routes.events import publish
from serve.routing import OPEN, SERVICE, Route
from serve.schemas import INSTANT, obj, ref, text
from serve.services import Services
from stores.postgres.inbound import SourceRecord

_ID: Final = re.compile(r"in_[0-9a-f]{24}")
_WHOLE: Final = re.compile(r"\s*\{\{(?P<expression>(?:(?!\{\{|\}\}).)*)\}\}\s*", re.DOTALL)
_encode = msgspec.json.Encoder().encode


def whole_expression(source: str) -> str | None:
    """The expression of a text that is nothing else: its value is taken as it is."""
    match = _WHOLE.fullmatch(source)
    return None if match is None else match["expression"]


def _unknown(name: str) -> NotFoundError:
    return NotFoundError("there is no such source", "source", "a source", shown(name))


async def receive(services: Services, request: Request) -> Response:
    """POST /v1/inbound/{source}."""
    settings = services.settings.inbound
    name = request.params["source"]
    source = await services.inbound.source(name) if _ID.fullmatch(name) else None
    if source is None:
        raise _unknown(name)
    body = await request.body()
    if len(body) > settings.max_body_bytes:
        raise ProblemError(problem("too_large", f"a webhook is at most {settings.max_body_bytes} bytes"))
    now_ms = services.clock.now_ms()
    scheme = source.document.get("scheme", "standard")
    delivery = inbound.verify(
        scheme, source.secrets(now_ms), request.headers, body, now_ms, settings.tolerance_s
    )
    document = read_json(body)
    event = await mapped(services, source, document, delivery, request.deadline)
    if event is None:
        return json_response({"status": "ignored"})
    key = inbound.delivery_key(source.id, delivery).encode()
    limits = await tenant_limits(services, source.tenant)
    return await publish(
        services, _encode(event), key, source.tenant, request.deadline, request.request_id, limits
    )


async def mapped(services: Services, source: SourceRecord, body: Any, delivery: str, deadline: float) -> Any:
    """The event that a source makes of a body; None if its `when` says that it is not wanted.

    Raises:
        ProblemError: `template_failed` (422): a text could not be filled in.
    """
    mapping = source.document["event"]
    texts = list(inbound.texts_of(mapping))
    when = source.document.get("when") or ""
    if when:
        texts.append(("when", f"{{{{ {whole_expression(when) or when} }}}}"))
    params = {"body": body, "id": delivery, "source": source.name}
    answers = await services.templates.renderer.values(
        [(path, whole_expression(text_), text_) for path, text_ in texts], params, deadline
    )
    made: dict[str, Any] = {}
    # `when` is asked first: what is not wanted need not have what the texts look for.
    for (path, _), answer in reversed(list(zip(texts, answers, strict=True))):
        if "error" in answer:
            raise ProblemError(failed(answer["error"], path))
        made[path] = answer["ok"]
        if path == "when" and not answer["ok"]:
            return None
    return inbound.filled(mapping, made)


# -- sources ------------------------------------------------------------------------------------------


def source_json(source: SourceRecord, secret: str | None = None) -> dict[str, Any]:
    """A source as it is told; its secret only when it was made or replaced."""
    told = {
        "name": source.name,
        "path": f"/v1/inbound/{source.id}",
        "createdAt": rfc3339(source.created_ms),
        **source.document,
    }
    return told if secret is None else {**told, "secret": secret}


async def put_source(services: Services, request: Request) -> Response:
    """PUT /v1/sources/{name}."""
    body = await request.json_object()
    now_ms = services.clock.now_ms()
    try:
        name = inbound.check_name(request.params["name"])
        document = {k: v for k, v in body.items() if k != "secret" and v is not None}
        inbound.validate(document)
        given = body.get("secret")
        secret = f"whsec_{secrets.token_urlsafe(32)}" if given is None else inbound.check_secret(given)
        texts = list(inbound.texts_of(document["event"]))
        if document.get("when"):
            expression = whole_expression(document["when"]) or document["when"]
            texts.append(("when", f"{{{{ {expression} }}}}"))
        answers = await services.templates.renderer.check(texts, request.deadline) if texts else []
        errors = []
        for (path, _), answer in zip(texts, answers, strict=True):
            names = set(answer.get("names", ())) - {"body", "id", "source"}
            if "error" in answer:
                errors.append(FieldError(path, "a template", answer["error"]))
            elif names:
                errors.append(FieldError(path, "body, id or source", ", ".join(sorted(names))[:80]))
        if errors:
            raise inbound.SourceError(errors)
    except inbound.SourceError as exc:
        raise ProblemError(problem("invalid", str(exc), exc.errors)) from None
    until_ms = now_ms + round(services.settings.inbound.secret_overlap_s * 1000)
    _, made = await services.inbound.put(
        request.tenant, name, document, f"in_{secrets.token_hex(12)}", secret, given is not None, until_ms
    )
    await audited(services, request, "source.put", name)
    (record,) = await services.inbound.sources(request.tenant, name) or [None]
    if record is None:
        raise _unknown(name)
    return json_response(source_json(record, secret if made or given is not None else None))


async def get_source(services: Services, request: Request) -> Response:
    """GET /v1/sources/{name}."""
    name = request.params["name"]
    found = await services.inbound.sources(request.tenant, name) if "\0" not in name else []
    if not found:
        raise _unknown(name)
    return json_response(source_json(found[0]))


async def list_sources(services: Services, request: Request) -> Response:
    """GET /v1/sources."""
    return json_response(
        {"sources": [source_json(s) for s in await services.inbound.sources(request.tenant)]}
    )


async def delete_source(services: Services, request: Request) -> Response:
    """DELETE /v1/sources/{name}."""
    name = request.params["name"]
    if "\0" in name or await services.inbound.delete(request.tenant, name) is None:
        raise _unknown(name)
    await audited(services, request, "source.delete", name)
    return json_response({"success": True})


_MEMBERS: Final = {
    "scheme": {"enum": list(inbound.SCHEMES), "description": "How it is signed; standard if absent."},
    "event": {"type": "object", "minProperties": 1, "description": "The event; texts are templates."},
    "when": {**text(0, 1000, control=True), "description": "An expression; false: ignored."},
    "description": text(0, 1000, control=True),
}
_SOURCE: Final = obj(
    {
        "name": {"type": "string"}, "path": {"type": "string"}, "createdAt": INSTANT,
        "secret": {"type": "string"}, **_MEMBERS,
    },
    ["name", "path", "createdAt", "event"],
)  # fmt: skip
_EXAMPLE: Final = {
    "scheme": "stripe",
    "secret": "whsec_from_the_sender",
    "when": "body.type == 'invoice.paid'",
    "event": {
        "userId": "{{ body.data.object.metadata.user }}",
        "type": "invoice.paid",
        "title": "Invoice {{ body.data.object.number }} is paid",
    },
}
_TAG: Final = "Webhooks in"
_SCOPE: Final = "sources:write"

ROUTES: Final = (
    Route(
        "POST", "/v1/inbound/{source}", receive, OPEN, "A webhook comes in",
        doc="Signed as its source says; the signature is the login. The id of the delivery is the "
        "idempotency key. Answered after the commit, as POST /v1/events, or 200 `ignored`.",
        body={"type": "object"}, status=202, answer={"anyOf": [ref("EventResult"), ref("EventResults")]},
        problems=(400, 401, 404, 409, 413, 422, 429, 503), tag=_TAG,
    ),
    Route(
        "GET", "/v1/sources", list_sources, SERVICE, "List sources", scope=_SCOPE, doc="By name.",
        answer=obj({"sources": {"type": "array", "items": _SOURCE}}, ["sources"]), tag=_TAG,
    ),
    Route(
        "PUT", "/v1/sources/{name}", put_source, SERVICE, "Make or change a source", scope=_SCOPE,
        doc="The secret is made unless given, and told only then. A replaced one is taken for another "
        "`inbound.secret_overlap_s`.",
        body=obj({**_MEMBERS, "secret": text(inbound.MIN_SECRET, 500)}, ["event"]), body_example=_EXAMPLE,
        answer=_SOURCE, problems=(400, 413, 422, 429), tag=_TAG,
    ),
    Route(
        "GET", "/v1/sources/{name}", get_source, SERVICE, "Read a source", scope=_SCOPE, answer=_SOURCE,
        problems=(404,), tag=_TAG,
    ),
    Route(
        "DELETE", "/v1/sources/{name}", delete_source, SERVICE, "Delete a source", scope=_SCOPE,
        answer=obj({"success": {"const": True}}, ["success"]), problems=(404,), tag=_TAG,
    ),
)  # fmt: skip
