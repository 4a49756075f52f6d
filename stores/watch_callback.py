"""Asks a tenant's URL whom a user may watch. Signed, bounded, and never followed elsewhere.

The request and how to check its signature are documented in docs/how-to/show-presence.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Sequence
from typing import Final

import httpx
import msgspec

from carillon.clock import Clock
from carillon.errors import UnavailableError
from carillon.settings import PresenceSettings

log = logging.getLogger(__name__)

MAX_BYTES: Final = 1024 * 1024
"""Longest answer that is read."""
SIGNATURE: Final = "Carillon-Signature"


class _Answer(msgspec.Struct):
    userIds: list[str]


_decode: Final = msgspec.json.Decoder(_Answer).decode


def signature(secret: str, at_s: int, body: bytes) -> str:
    """The header's value: `t=<unix seconds>,v1=<hex HMAC-SHA256 of "<t>." and the body>`."""
    mac = hmac.new(secret.encode(), b"%d." % at_s + body, hashlib.sha256).hexdigest()
    return f"t={at_s},v1={mac}"


class WatchCallback:
    """A client of tenants' URLs."""

    def __init__(self, settings: PresenceSettings, clock: Clock) -> None:
        self._timeout_s = settings.callback_timeout_s
        self._most = settings.callback_at_once
        self._clock = clock
        self._http: httpx.AsyncClient | None = None

    async def ask(self, url: str, secret: str, tenant: str, watcher: str, users: Sequence[str]) -> set[str]:
        """Those of `users` whom `watcher` may watch.

        Raises:
            UnavailableError: no proper answer in time.
        """
        document = {"tenant": tenant, "watcher": watcher, "userIds": users}
        body = msgspec.json.encode(document)
        headers = {
            "content-type": "application/json",
            "accept": "application/json",
            SIGNATURE: signature(secret, self._clock.now_ms() // 1000, body),
        }
        try:
            # Over connecting, waiting and reading together; httpx' own timeouts are for each step.
            async with asyncio.timeout(self._timeout_s):
                answer = await self._post(url, body, headers)
            allowed = set(_decode(answer).userIds)
        except (httpx.HTTPError, OSError, TimeoutError, ValueError, msgspec.MsgspecError) as exc:
            reason = f"{type(exc).__name__}: {exc}"
            log.warning("no answer from the presence URL of tenant %s: %s", tenant, reason)
            raise UnavailableError("it cannot be found out now whom you may watch") from exc
        return allowed.intersection(users)

    async def _post(self, url: str, body: bytes, headers: dict[str, str]) -> bytes:
        if self._http is None:
            # Redirects could lead anywhere, and the environment's proxies are not ours.
            limits = httpx.Limits(max_connections=self._most)
            self._http = httpx.AsyncClient(
                follow_redirects=False, trust_env=False, timeout=self._timeout_s, limits=limits
            )
        read = bytearray()
        async with self._http.stream("POST", url, content=body, headers=headers) as answer:
            if answer.status_code != 200:
                raise ValueError(f"status {answer.status_code}")
            async for part in answer.aiter_bytes():
                read += part
                if len(read) > MAX_BYTES:
                    raise ValueError(f"longer than {MAX_BYTES} bytes")
        return bytes(read)

    async def close(self) -> None:
        """Close connections."""
        if self._http is not None:
            http, self._http = self._http, None
            await http.aclose()
