"""Operations: health, readiness, metrics, the API's own description. No login."""

from __future__ import annotations

import asyncio
from typing import Final

from carillon.errors import CarillonError
from carillon.metrics import render_prometheus
from carillon.problems import FieldError, problem
from serve.asyncapi import asyncapi_json
from serve.docs_page import DOCS_HTML
from serve.http import Request, Response, json_response, problem_response
from serve.routing import OPEN, Route
from serve.schemas import obj
from serve.services import Services


async def healthz(services: Services, request: Request) -> Response:
    """GET /healthz: this process answers."""
    return json_response({"status": "ok", "cluster": services.cluster_tag})


async def readyz(services: Services, request: Request) -> Response:
    """GET /readyz: 200 only if the whole path works."""
    timeout_s = services.settings.ingress.ready_timeout_s
    wrong: dict[str, str] = {}

    async def store() -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await services.feed.ping()
        except (CarillonError, TimeoutError) as exc:
            wrong["postgres"] = str(exc) or f"no answer within {timeout_s} s"

    async def cluster() -> None:
        try:
            async with asyncio.timeout(timeout_s):
                wrong.update(await services.backend.checks(timeout_s))
        except (CarillonError, TimeoutError) as exc:
            wrong["cluster"] = str(exc) or f"no answer within {timeout_s} s"

    await asyncio.gather(store(), cluster())
    if services.draining:
        wrong["ingress"] = "this replica is stopping"
    if wrong:
        told = problem(
            "unavailable",
            "; ".join(f"{name}: {why}" for name, why in wrong.items()),
            [FieldError(name, "working", why) for name, why in wrong.items()],
        )
        return problem_response(told, request.request_id)
    return json_response({"status": "ready"})


async def metrics(services: Services, request: Request) -> Response:
    """GET /metrics: the whole cluster in Prometheus' text format."""
    reply = await services.backend.stats_reply(services.settings.ingress.ready_timeout_s)
    return Response(
        render_prometheus(reply).encode(), content_type=b"text/plain; version=0.0.4; charset=utf-8"
    )


async def openapi(services: Services, request: Request) -> Response:
    """GET /openapi.json."""
    from serve.openapi import openapi_json  # it reads the table this module is part of

    return Response(openapi_json())


async def asyncapi(services: Services, request: Request) -> Response:
    """GET /asyncapi.json."""
    return Response(asyncapi_json())


async def docs(services: Services, request: Request) -> Response:
    """GET /docs: a page that shows /openapi.json, without anything from elsewhere."""
    return Response(DOCS_HTML, content_type=b"text/html; charset=utf-8")


_TAG = "Operations"
_STATUS: Final = {"type": "string"}

ROUTES: Final = (
    Route(
        "GET", "/healthz", healthz, OPEN, "Does this process answer?",
        answer=obj({"status": _STATUS, "cluster": _STATUS}, ["status"]), answer_example={"status": "ok"},
        tag=_TAG,
    ),
    Route(
        "GET", "/readyz", readyz, OPEN, "Does the whole path work?",
        doc="Postgres answers, a router is linked, every slot has an owner that answers, a gateway is there.",
        answer=obj({"status": _STATUS}, ["status"]), answer_example={"status": "ready"}, problems=(503,),
        tag=_TAG,
    ),
    Route(
        "GET", "/metrics", metrics, OPEN, "Metrics of the cluster (Prometheus)", answer_type="text/plain",
        tag=_TAG,
    ),
    Route(
        "GET", "/openapi.json", openapi, OPEN, "This description", answer=obj({}, strict=False), tag=_TAG,
    ),
    Route(
        "GET", "/asyncapi.json", asyncapi, OPEN, "The frames of WebSocket and event stream (AsyncAPI 3.0)",
        answer=obj({}, strict=False), tag=_TAG,
    ),
    Route("GET", "/docs", docs, OPEN, "This description, to read", answer_type="text/html", tag=_TAG),
)  # fmt: skip
