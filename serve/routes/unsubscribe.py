"""Unsubscribing with one click: links for mails and pages, made by services, followed without a login."""

from __future__ import annotations

import html
from typing import Any, Final

from carillon import unsubscribe
from carillon.errors import InvalidInputError, NotFoundError, UnauthenticatedError
from carillon.event_rules import TEXTS, text_error
from carillon.ids import slot_of
from carillon.messages import Unsubscribe
from carillon.preferences import CHANNELS
from carillon.problems import shown
from carillon.unsubscribe import SECTIONS, Unsubscription
from serve.http import Request, Response, json_response
from serve.routes.bodies import valid_id
from serve.routing import OPEN, SERVICE, Route
from serve.schemas import USER_ID, nullable, obj, text
from serve.services import Services

_PAGE: Final = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="robots" content="noindex"><meta name="referrer" content="no-referrer"><title>Unsubscribe</title>
<style>body{font:1.1rem system-ui;max-width:32rem;margin:15vh auto;padding:0 1rem}
button{font:inherit;padding:.5em 1em}</style>
%s</html>"""
_ASK: Final = """<h1>Unsubscribe</h1><p>You will get no more of <b>%s</b>.</p>
<form method="post"><input type="hidden" name="List-Unsubscribe" value="One-Click">
<button>Unsubscribe</button></form>"""
_DONE: Final = "<h1>Done</h1><p>You get no more of <b>%s</b>. The preferences bring it back.</p>"


async def post_link(services: Services, request: Request) -> Response:
    """POST /v1/unsubscribe-links."""
    document = await request.json_object(("userId", "category", "type", "channel", "baseUrl"))
    user = valid_id("userId", document.get("userId"))
    named = [name for name in SECTIONS if document.get(name) is not None]
    if len(named) > 1:
        raise InvalidInputError("expected category or type, got both", "type", "category or type", "both")
    section = named[0] if named else ""
    if section:
        wrong = text_error(section, document[section], TEXTS[section])
        if wrong is not None:
            raise InvalidInputError(f"expected {section} to be {wrong.expected}, got {wrong.got}", *wrong)
    channel = document.get("channel")
    if channel is not None and channel not in CHANNELS:
        raise InvalidInputError(
            f"expected a channel, got {shown(channel)}", "channel", ", ".join(CHANNELS), shown(channel)
        )
    base = document.get("baseUrl") or ""
    if (
        not isinstance(base, str)
        or (base and not base.startswith(("https://", "http://")))
        or len(base) > 512
    ):
        raise InvalidInputError(
            f"expected baseUrl to be a URL, got {shown(base)}", "baseUrl", "an https URL", shown(base)
        )
    record = await services.auth.tenant(request.tenant)
    if record is None:
        raise UnauthenticatedError("the tenant of the API key is gone")
    what = Unsubscription(request.tenant, user, section, document[section] if section else "", channel or "")
    url = f"{base.rstrip('/')}/unsubscribe/{unsubscribe.mint(what, record.client_secret)}"
    return json_response(
        {
            "url": url,
            "headers": {
                "List-Unsubscribe": f"<{url}>",
                "List-Unsubscribe-Post": "List-Unsubscribe=One-Click",
            },
        },
        201,
    )


async def _verified(services: Services, request: Request) -> Unsubscription:
    token = request.params["token"]
    record = await services.auth.tenant(unsubscribe.claimed_tenant(token))
    if record is None:
        raise NotFoundError("this link is not known", "token", "the token of an unsubscribe link", "another")
    return unsubscribe.verify(token, record.secrets(services.clock.now_ms()))


def _page(body: str, what: Unsubscription) -> Response:
    name = what.name or "all notifications"
    if what.channel:
        name += f" by {what.channel}"
    page = _PAGE % (body % html.escape(name))
    headers = ((b"cache-control", b"no-store"), (b"referrer-policy", b"no-referrer"))
    return Response(page.encode(), content_type=b"text/html; charset=utf-8", headers=headers)


async def get_page(services: Services, request: Request) -> Response:
    """GET /unsubscribe/{token}: asks. It changes nothing, for mail scanners follow links."""
    return _page(_ASK, await _verified(services, request))


async def post_page(services: Services, request: Request) -> Response:
    """POST /unsubscribe/{token}: switches off, whatever the body (RFC 8058 §3.2)."""
    what = await _verified(services, request)
    await request.body()
    slot = slot_of(what.tenant, what.user)
    await services.backend.request(
        Unsubscribe(what.tenant, what.user, slot, what.section, what.name, what.channel), request.deadline
    )
    return _page(_DONE, what)


_BODY: Final[dict[str, Any]] = obj(
    {
        "userId": USER_ID,
        **nullable(
            {
                "category": text(1, 64),
                "type": text(1, 64),
                "channel": {"enum": list(CHANNELS)},
                "baseUrl": {"type": "string", "maxLength": 512, "pattern": "^https?://"},
            }
        ),
    },
    ["userId"],
)
_TAG: Final = "Preferences"
_EXAMPLE_URL: Final = "https://notify.example.com/unsubscribe/WyJhY21lIi..."

ROUTES: Final = (
    Route(
        "POST", "/v1/unsubscribe-links", post_link, SERVICE, "Make an unsubscribe link", scope="users:write",
        doc="For a category or a type, or all; for one channel of it, or all. The headers are for a mail.",
        body=_BODY, body_example={"userId": "ada", "category": "marketing", "channel": "email"}, status=201,
        answer=obj(
            {"url": {"type": "string"}, "headers": {"type": "object"}}, ["url", "headers"]
        ),
        answer_example={
            "url": _EXAMPLE_URL,
            "headers": {
                "List-Unsubscribe": f"<{_EXAMPLE_URL}>",
                "List-Unsubscribe-Post": "List-Unsubscribe=One-Click",
            },
        },
        problems=(400, 413, 422), tag=_TAG,
    ),
    Route(
        "GET", "/unsubscribe/{token}", get_page, OPEN, "Ask whether to unsubscribe", answer_type="text/html",
        doc="Changes nothing.", problems=(404, 503), tag=_TAG,
    ),
    Route(
        "POST", "/unsubscribe/{token}", post_page, OPEN, "Unsubscribe with one click",
        doc="RFC 8058: no login, no redirect; the same again changes nothing.", answer_type="text/html",
        problems=(404, 413, 503), tag=_TAG,
    ),
)  # fmt: skip
