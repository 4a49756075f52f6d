"""The hot route, `POST /v1/events`, in four frameworks: same key check, same parser, same answer.

The backend is a stand-in that answers after one turn of the event loop. Used by benchmarks/asgi/measure.py:
`uvicorn benchmarks.asgi.apps:<name>`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from carillon.clock import SystemClock
from carillon.events import EventParser, ProblemError
from carillon.ids import Uuid7Source, uuid_text
from carillon.messages import Event, Outcome
from carillon.problems import CONTENT_TYPE, problem_json

KEY = b"Bearer crl_0123456789ab_" + b"0" * 48
_parser = EventParser(Uuid7Source())
_clock = SystemClock()


async def _publish(event: Event) -> Outcome:
    future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, Outcome(event.id, 1, "stored", ["in_app"]))
    return await future


async def _answer(key: bytes | None, body: bytes) -> tuple[int, bytes]:
    if key != KEY:
        return 401, b"{}"
    try:
        event = _parser.parse(body, "bench", _clock.now_ms()).events[0]
    except ProblemError as exc:
        return exc.problem.status, problem_json(exc.problem)
    done = await _publish(event)
    return 202, b'{"id":"%s","seq":%d,"status":"%s","channels":["in_app"]}' % (
        uuid_text(done.id).encode(),
        done.seq,
        done.status.encode(),
    )


async def raw(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """ASGI without a framework."""
    key = request_id = None
    for name, value in scope["headers"]:
        if name == b"authorization":
            key = value
        elif name == b"x-request-id":
            request_id = value
    message = await receive()
    body = message.get("body", b"")
    while message.get("more_body"):
        message = await receive()
        body += message.get("body", b"")
    status, text = await _answer(key, body)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(text))]
    if request_id:
        headers.append((b"x-request-id", request_id))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def starlette_app() -> Any:
    """Starlette with one route."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def events(request: Request) -> Response:
        key = request.headers.get("authorization", "").encode()
        status, text = await _answer(key, await request.body())
        headers = {"x-request-id": request.headers.get("x-request-id", "-")}
        return Response(text, status, headers, CONTENT_TYPE if status >= 400 else "application/json")

    return Starlette(routes=[Route("/v1/events", events, methods=["POST"])])


def raw_before_starlette() -> Any:
    """The raw route in front, Starlette behind it for everything else."""
    behind = starlette_app()

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/v1/events" and scope["method"] == "POST":
            await raw(scope, receive, send)
        else:
            await behind(scope, receive, send)

    return app


def fastapi_app() -> Any:
    """FastAPI with the body taken raw (its own validation would come on top)."""
    from fastapi import FastAPI, Request, Response

    api = FastAPI()

    async def events(request: Any) -> Any:
        key = request.headers.get("authorization", "").encode()
        status, text = await _answer(key, await request.body())
        headers = {"x-request-id": request.headers.get("x-request-id", "-")}
        return Response(text, status, headers, CONTENT_TYPE if status >= 400 else "application/json")

    # FastAPI reads the annotations; as strings they would name imports of this function.
    events.__annotations__ = {"request": Request}
    api.post("/v1/events")(events)
    return api


def litestar_app() -> Any:
    """Litestar with the body taken raw."""
    from litestar import Litestar, Request, Response, post

    async def events(request: Any) -> Any:
        key = request.headers.get("authorization", "").encode()
        status, text = await _answer(key, await request.body())
        headers = {"x-request-id": request.headers.get("x-request-id", "-")}
        return Response(text, status_code=status, headers=headers, media_type="application/json")

    events.__annotations__ = {"request": Request, "return": Response}
    return Litestar(route_handlers=[post("/v1/events")(events)], openapi_config=None)


def ingress_app() -> Any:
    """The real app (serve/app.py) with a stand-in for keys and cluster."""
    from carillon.metrics import Stats
    from carillon.settings import Settings
    from serve.app import IngressApp
    from serve.services import Services
    from stores.postgres.tenants import ApiKeyRecord

    record = ApiKeyRecord("0123456789ab", "bench", frozenset({"events:write"}), False)

    class Keys:
        def known_key(self, header: bytes | None) -> ApiKeyRecord | None:
            return record if header == KEY else None

        def used(self, key: ApiKeyRecord) -> None:
            pass

    class Cluster:
        async def publish(self, events: list[Event], deadline: float) -> list[Outcome]:
            return [await _publish(event) for event in events]

    nothing: Any = None  # what the route does not touch
    stand_ins: Any = Keys(), Cluster()
    services = Services(
        settings=Settings(), clock=_clock, stats=Stats(), parser=_parser, auth=stand_ins[0], feed=nothing,
        tenants=nothing, backend=stand_ins[1], tickets=nothing, limits=nothing, templates=nothing,
        schedules=nothing, inbound=nothing, dead_letters=nothing, feeds=nothing, search=nothing,
        users=nothing, exporter=nothing, topics=nothing, segments=nothing,
        audiences=nothing,
    )  # fmt: skip
    return IngressApp(services)
