"""The demo page and what it needs. Everything but the page itself exists in demo mode only."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

import msgspec

from carillon import policy, tokens
from carillon.errors import NotFoundError, UnavailableError
from serve.http import Request, Response, json_response
from serve.limits import tenant_limits
from serve.routes.events import dry_run, publish
from serve.routing import OPEN, Route
from serve.schemas import USER_ID, nullable, obj, ref, text
from serve.services import Services

STATIC: Final = Path(__file__).parent.parent / "static"
TOKEN_TTL_S: Final = 3600.0


def _require_demo(services: Services) -> None:
    if not services.settings.ingress.demo:
        raise NotFoundError("demo mode is off (CARILLON_INGRESS_DEMO=true turns it on)")


async def _file(name: str, content_type: bytes) -> Response:
    try:
        content = await asyncio.to_thread((STATIC / name).read_bytes)
    except FileNotFoundError:
        raise NotFoundError("the demo page is not part of this installation") from None
    return Response(content, content_type=content_type)


async def page(services: Services, request: Request) -> Response:
    """GET /demo."""
    return await _file("demo.html", b"text/html; charset=utf-8")


async def client(services: Services, request: Request) -> Response:
    """GET /demo/carillon-client.js: the web client, as built from clients/web."""
    return await _file("carillon-client.js", b"text/javascript; charset=utf-8")


async def fallback(services: Services, request: Request) -> Response:
    """GET /demo/fallback.js: what the web client loads where WebSockets do not get through."""
    return await _file("fallback.js", b"text/javascript; charset=utf-8")


async def toasts(services: Services, request: Request) -> Response:
    """GET /demo/toasts.js: what the web client has for notifications that pop up."""
    return await _file("toasts.js", b"text/javascript; charset=utf-8")


async def preferences(services: Services, request: Request) -> Response:
    """GET /demo/preferences.js: the page's preferences panel."""
    return await _file("preferences.js", b"text/javascript; charset=utf-8")


async def config(services: Services, request: Request) -> Response:
    """GET /demo/config.json: where to connect, and fresh tokens of the demo users."""
    _require_demo(services)
    settings = services.settings.ingress
    record = await services.auth.tenant(settings.demo_tenant)
    if record is None:
        raise UnavailableError(f"the demo tenant {settings.demo_tenant!r} does not exist yet")
    now_ms = services.clock.now_ms()
    gateways = services.backend.gateways()
    shard = services.settings.shard
    stored = await services.tenants.policy(record.tenant)
    return json_response(
        {
            "wsUrl": gateways[0] if gateways else None,
            "tenant": record.tenant,
            "users": [
                {
                    "userId": user,
                    "token": tokens.mint(record.tenant, user, record.client_secret, now_ms, TOKEN_TTL_S),
                }
                for user in (name.strip() for name in settings.demo_users.split(","))
                if user
            ],
            "policy": policy.complete(stored, policy.cluster_default(shard)),
            "graceS": shard.grace_s,
            "fcmReceivedUrl": settings.demo_fcm_received_url or None,
            "apnsReceivedUrl": settings.demo_apns_received_url or None,
        }
    )


async def send(services: Services, request: Request) -> Response:
    """POST /demo/send: an event to one of the demo tenant's users."""
    tenant = services.settings.ingress.demo_tenant
    limits = await tenant_limits(services, tenant)
    body = await _event(services, request)
    return await publish(services, body, None, tenant, request.deadline, request.request_id, limits)


async def explain(services: Services, request: Request) -> Response:
    """POST /demo/explain: what would become of such an event; nothing is sent."""
    body = await _event(services, request)
    return await dry_run(
        services, body, None, services.settings.ingress.demo_tenant, request.deadline, request.request_id
    )


async def _event(services: Services, request: Request) -> bytes:
    """The event that the page's form means."""
    _require_demo(services)
    document = await request.json_object(("userId", "title", "body", "priority", "category"))
    return msgspec.json.encode({"type": "demo", **document})


async def received(services: Services, request: Request) -> Response:
    """GET /demo/received: what the local push servers received, fetched here to spare the page CORS."""
    _require_demo(services)
    settings = services.settings.ingress
    fcm, apns = await asyncio.gather(
        _fetch(settings.demo_fcm_received_url), _fetch(settings.demo_apns_received_url)
    )
    return json_response({"fcm": fcm, "apns": apns})


async def _fetch(url: str) -> Any:
    """The JSON at `url`, null if there is none."""
    if not url:
        return None
    import httpx  # 0.1 s to import, for the demo only

    try:
        async with httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
            answer = await client.get(url)
            return msgspec.Raw(answer.content) if answer.status_code == 200 else None
    except httpx.HTTPError:
        return None


_TAG = "Demo"
_FORM: Final = obj(
    {
        "userId": USER_ID,
        "title": text(1, 255, control=True),
        **nullable(
            {
                "body": {"type": "string", "maxLength": 1024},
                "priority": {"enum": ["low", "normal", "high", "urgent", "critical"]},
                "category": text(1, 64),
            }
        ),
    },
    ["userId", "title"],
)
_FORM_EXAMPLE: Final = {"userId": "ada", "title": "Hello", "body": "from the demo", "priority": "normal"}

ROUTES: Final = (
    Route("GET", "/demo", page, OPEN, "The demo page", answer_type="text/html", problems=(404,), tag=_TAG),
    Route(
        "GET", "/demo/carillon-client.js", client, OPEN, "The web client",
        answer_type="text/javascript", problems=(404,), tag=_TAG,
    ),
    Route(
        "GET", "/demo/fallback.js", fallback, OPEN, "Its transports without WebSockets",
        answer_type="text/javascript", problems=(404,), tag=_TAG,
    ),
    Route(
        "GET", "/demo/toasts.js", toasts, OPEN, "Its part for notifications that pop up",
        answer_type="text/javascript", problems=(404,), tag=_TAG,
    ),
    Route(
        "GET", "/demo/preferences.js", preferences, OPEN, "The page's preferences panel",
        answer_type="text/javascript", problems=(404,), tag=_TAG,
    ),
    Route(
        "GET", "/demo/config.json", config, OPEN, "Demo mode: where to connect, and tokens",
        answer=obj({}, strict=False), problems=(404, 503), tag=_TAG,
    ),
    Route(
        "POST", "/demo/send", send, OPEN, "Demo mode: an event to a demo user",
        body=_FORM,
        body_example=_FORM_EXAMPLE,
        status=202, answer=ref("EventResult"), problems=(400, 404, 413, 422, 429, 503), tag=_TAG,
    ),
    Route(
        "POST", "/demo/explain", explain, OPEN, "Demo mode: what would become of an event",
        body=_FORM, body_example=_FORM_EXAMPLE,
        answer=obj({}, strict=False), problems=(400, 404, 413, 422, 429, 503), tag=_TAG,
    ),
    Route(
        "GET", "/demo/received", received, OPEN, "Demo mode: what the local push servers received",
        answer=obj({}, strict=False), problems=(404,), tag=_TAG,
    ),
)  # fmt: skip
