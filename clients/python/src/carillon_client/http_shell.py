"""What the two publishers share of httpx: options, errors, headers."""

from __future__ import annotations

from typing import Any

import httpx

from carillon_client.core.exchange import Request, Response
from carillon_client.errors import TransportError

USER_AGENT = "carillon-client-python/0.1"


def client_options(
    url: str, key: str, attempt_timeout_s: float, max_connections: int, trust_env: bool
) -> dict[str, Any]:
    """Arguments of httpx.Client and httpx.AsyncClient.

    Raises:
        ValueError: the URL or the key cannot be one.
    """
    parsed = httpx.URL(url)
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"expected url to be like http://host:8000, got {url!r}")
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError("expected key to be an API key like crl_..._...")  # never shown: it may be a secret
    return {
        "base_url": parsed,
        "headers": {
            "Authorization": f"Bearer {key}",
            "Content-Type": "application/json",
            "Accept": "application/json",
            "User-Agent": USER_AGENT,
        },
        "timeout": attempt_timeout_s,
        "limits": httpx.Limits(
            max_connections=max_connections, max_keepalive_connections=max_connections, keepalive_expiry=30.0
        ),
        "trust_env": trust_env,
        "follow_redirects": False,
    }


def arguments_of(request: Request) -> dict[str, Any]:
    """Arguments of `client.request`."""
    return {
        "method": request.method,
        "url": request.path,
        "content": request.body,
        "params": request.query or None,
        "timeout": request.timeout_s,
    }


def response_of(answer: httpx.Response) -> Response:
    """What the machines read."""
    return Response(answer.status_code, {k.lower(): v for k, v in answer.headers.items()}, answer.content)


def transport_error(error: httpx.RequestError) -> TransportError:
    """Whether it may have reached the server decides what a caller may conclude."""
    unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    return TransportError(f"{type(error).__name__}: {error}".removesuffix(": "), maybe_sent=not unsent)
