"""The ASGI app: one object behind two doors.

`POST /v1/events` takes a short cut around the route table, and on the own door (serve/door.py) one around
ASGI too; all ways end in the same functions. Every answer, errors included, goes through one place, which
adds X-Request-Id and CORS.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import Any, Final

from carillon.api_keys import allows
from carillon.clock import Clock
from carillon.errors import CarillonError
from carillon.events import ProblemError
from carillon.problems import Problem, problem, problem_of
from serve.http import (
    BEHIND_SERVE,
    STREAM_PATH,
    ClientGoneError,
    Header,
    LateResponse,
    Request,
    Response,
    Scope,
    StreamedResponse,
    clean_request_id,
    path_segments,
    problem_response,
    read_body,
)
from serve.limits import admit
from serve.routes import all_routes
from serve.routes.events import publish
from serve.routing import CLIENT, OPEN, SERVICE, Router
from serve.services import Services
from serve.stream import STREAM_HEADERS, Opening, open_stream
from stores.postgres.tenants import ApiKeyRecord

log = logging.getLogger(__name__)

HOT_PATH: Final = "/v1/events"
EVENTS_SCOPE: Final = "events:write"
"""What an API key needs for the hot route (the same as in the route table)."""
_CORS_METHODS: Final = b"GET, POST, PUT, PATCH, DELETE"
_CORS_HEADERS: Final = b"Authorization, Content-Type, If-Match, Last-Event-ID, X-Request-Id"
_CORS_EXPOSED: Final = b"ETag, X-Request-Id, Retry-After, Idempotent-Replayed"


class ServeDoor:
    """The app as Serve's route calls it."""

    def __init__(self, app: IngressApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """ASGI."""
        scope[BEHIND_SERVE] = True
        await self._app(scope, receive, send)


class IngressApp:
    """The app.

    Args:
        services: what handlers work with.

    Memory: at most `ingress.max_in_flight` requests are worked on at once, `ingress.tenant_in_flight` of one
    tenant; one more is answered 503 with Retry-After before its body is read.
    """

    def __init__(self, services: Services) -> None:
        self.services = services
        self._clock: Clock = services.clock
        self._router = Router(all_routes())
        settings = services.settings.ingress
        self._timeout_s = settings.request_timeout_s
        self._max_in_flight = settings.max_in_flight
        self._limit = settings.max_request_bytes
        self._origins = {origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()}
        self._id_prefix = os.urandom(6).hex().encode()
        self._next_id = 0

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await _other(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])  # at C speed; of a header sent twice the last
        try:
            response = await self._response(scope, headers, receive)
        except ClientGoneError:
            return
        await send({"type": "http.response.start", "status": response.status, "headers": response.headers})
        if type(response) is StreamedResponse:
            await self._send_parts(response, scope, receive, send)
            return
        await send({"type": "http.response.body", "body": response.body})

    async def _send_parts(self, response: StreamedResponse, scope: Scope, receive: Any, send: Any) -> None:
        """Send what is made while it is sent, until the caller hangs up."""
        gone = asyncio.ensure_future(_hung_up(receive))
        self.services.in_flight += 1
        if response.tenant:
            self.services.shares.again(response.tenant)
        try:
            if scope["method"] != "HEAD":
                async with contextlib.aclosing(response.parts) as parts:
                    async for part in parts:
                        if gone.done():
                            return
                        await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.services.in_flight -= 1
            if response.tenant:
                self.services.shares.leave(response.tenant)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)

    async def hot(self, headers: dict[bytes, bytes], body: bytes) -> Response:
        """`POST /v1/events` whose body is here and within the limit; the answer has all its headers."""
        services = self.services
        started = self._clock.monotonic()
        request_id = self._request_id(headers)
        services.in_flight += 1
        try:
            if services.in_flight > self._max_in_flight:
                response = self._busy(request_id)
            else:
                known = self._known_key(headers)
                if known is None:
                    authorization = headers.get(b"authorization")
                    known = await services.auth.service(authorization, EVENTS_SCOPE)
                key, deadline = headers.get(b"idempotency-key"), started + self._timeout_s
                services.shares.enter(known.tenant)
                try:
                    response = await publish(
                        services, body, key, known.tenant, deadline, request_id, known.limits
                    )
                finally:
                    services.shares.leave(known.tenant)
        except Exception as exc:
            response = _failed(exc, request_id, "POST", HOT_PATH)
        finally:
            services.in_flight -= 1
        return self._finished(response, request_id, started)

    async def _response(self, scope: Scope, headers: dict[bytes, bytes], receive: Any) -> Response:
        """The answer with all its headers. Raises ClientGoneError: there is nobody to answer."""
        services = self.services
        started = self._clock.monotonic()
        request_id = self._request_id(headers)
        services.in_flight += 1
        try:
            if services.in_flight > self._max_in_flight and not _exempt(scope["path"]):
                response = self._busy(request_id)
            elif (
                scope["path"] == HOT_PATH
                and scope["method"] == "POST"
                and not scope["query_string"]
                and (known := self._known_key(headers)) is not None
            ):
                key, deadline = headers.get(b"idempotency-key"), started + self._timeout_s
                services.shares.enter(known.tenant)
                try:
                    body = await read_body(receive, headers, self._limit)
                    response = await publish(
                        services, body, key, known.tenant, deadline, request_id, known.limits
                    )
                finally:
                    services.shares.leave(known.tenant)
            else:
                response = await self._dispatch(scope, headers, receive, request_id, started)
        except ClientGoneError:
            raise
        except Exception as exc:
            response = _failed(exc, request_id, scope["method"], scope["path"])
        finally:
            services.in_flight -= 1
        if type(response) is LateResponse:
            started += response.waited_s
        self._finished(response, None if BEHIND_SERVE in scope else request_id, started)
        origin = headers.get(b"origin")
        if origin is not None and scope["path"].startswith("/api/"):
            self._cors(response.headers, origin)
        return response

    async def stream(
        self, headers: dict[bytes, bytes], query: bytes
    ) -> tuple[Response, None] | tuple[list[Header], Opening]:
        """`GET /api/stream`: the answer that refuses it, or the headers of the one that begins it."""
        started = self._clock.monotonic()
        request_id = self._request_id(headers)
        origin = headers.get(b"origin")
        try:
            request = Request({"query_string": query}, headers, None, {}, request_id, 0.0, 0)
            opening = await open_stream(self.services, headers, request.query())
        except Exception as exc:
            response = self._finished(_failed(exc, request_id, "GET", STREAM_PATH), request_id, started)
            if origin is not None:
                self._cors(response.headers, origin)
            return response, None
        out = [*STREAM_HEADERS, (b"x-request-id", request_id)]
        if origin is not None:
            self._cors(out, origin)
        return out, opening

    def _request_id(self, headers: dict[bytes, bytes]) -> bytes:
        """The caller's id of the request, or one of ours."""
        request_id = clean_request_id(headers.get(b"x-request-id"))
        if request_id is None:
            self._next_id += 1
            request_id = b"%s-%x" % (self._id_prefix, self._next_id)
        return request_id

    def knows(self, headers: dict[bytes, bytes]) -> bool:
        """Whether the caller's API key is known to be good, without asking anybody."""
        return self._known_key(headers) is not None

    def _known_key(self, headers: dict[bytes, bytes]) -> ApiKeyRecord | None:
        """The key if it is cached and may send events; None means: ask the slow way, which says why not."""
        auth = self.services.auth
        known = auth.known_key(headers.get(b"authorization"))
        if known is None or not allows(known.scopes, EVENTS_SCOPE):
            return None
        auth.used(known)
        return known

    def _busy(self, request_id: bytes) -> Response:
        told = problem("unavailable", f"more than {self._max_in_flight} requests at once")
        return problem_response(told, request_id)

    def _finished(self, response: Response, request_id: bytes | None, started: float) -> Response:
        out = response.headers
        out.append((b"content-type", response.content_type))
        if type(response) is not StreamedResponse:
            out.append((b"content-length", b"%d" % len(response.body)))
        if request_id is not None:
            out.append((b"x-request-id", request_id))
        self.services.stats.observe_ms("ingress_request_ms", (self._clock.monotonic() - started) * 1000)
        return response

    async def _dispatch(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Any, request_id: bytes, started: float
    ) -> Response:
        method: str = scope["method"]
        found = self._router.find(method, path_segments(scope))
        if isinstance(found, Problem):
            if method == "OPTIONS" and found.status == 405 and scope["path"].startswith("/api/"):
                return Response(b"", 204)  # a preflight: what is allowed is in the CORS headers
            return problem_response(found, request_id)
        route, params = found
        request = Request(scope, headers, receive, params, request_id, started + self._timeout_s, self._limit)
        authorization = headers.get(b"authorization")
        services = self.services
        if route.door == SERVICE:
            caller = request.caller = await services.auth.service(authorization, route.scope)
            request.tenant = caller.tenant
            if caller.rate_per_s is not None and not route.counts:
                await admit(services, caller.limits[:1], 1)  # the key's own: the tenant's is about events
        elif route.door == CLIENT:
            who = await services.auth.client(authorization)
            request.tenant, request.user, request.identity = who.tenant, who.user, who
        else:
            assert route.door == OPEN
            return await route.handler(services, request)
        services.shares.enter(request.tenant)
        try:
            response = await route.handler(services, request)
        finally:
            services.shares.leave(request.tenant)
        if type(response) is StreamedResponse:
            response.tenant = request.tenant  # counted again while it is sent
        return response

    def _cors(self, headers: list[Header], origin: bytes) -> None:
        """CORS for /api. Tokens are not ambient, so any origin may ask unless the settings name some; there
        are no credentials, so `*` suffices."""
        if self._origins:
            headers.append((b"vary", b"Origin"))
            if origin.decode("latin-1") not in self._origins:
                return
            headers.append((b"access-control-allow-origin", origin))
        else:
            headers.append((b"access-control-allow-origin", b"*"))
        headers.append((b"access-control-allow-methods", _CORS_METHODS))
        headers.append((b"access-control-allow-headers", _CORS_HEADERS))
        headers.append((b"access-control-expose-headers", _CORS_EXPOSED))
        headers.append((b"access-control-max-age", b"600"))


def _failed(exc: Exception, request_id: bytes, method: str, path: str) -> Response:
    """What a handler raised, as an answer."""
    if isinstance(exc, ProblemError):
        return problem_response(exc.problem, request_id)
    if isinstance(exc, CarillonError):
        return problem_response(problem_of(exc), request_id)
    log.error("request %s (%s %s) failed", request_id.decode(), method, path, exc_info=exc)
    return problem_response(problem("internal"), request_id)


async def _hung_up(receive: Any) -> None:
    """Return once the caller has; for requests whose body nobody reads (any more)."""
    while (await receive())["type"] == "http.request":
        pass


def _exempt(path: str) -> bool:
    """Operators see what is going on even when the house is full."""
    return path in ("/healthz", "/readyz", "/metrics")


async def _other(scope: Scope, receive: Any, send: Any) -> None:
    """Lifespan (nothing to do: the replica starts and stops the services) and WebSockets (refused)."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            else:
                await send({"type": "lifespan.shutdown.complete"})
                return
    elif scope["type"] == "websocket":
        # Sockets live at the gateways (docs/reference/websocket.md): refused before the handshake, HTTP 403.
        await receive()
        await send({"type": "websocket.close", "code": 1000})
