"""Events from a Redis stream: services write to it, the replicas read it as one consumer group.

An entry is acknowledged only after its event was committed. What cannot become an event is set aside in
`<stream>.dead` with the reason; what fails for a while is tried again before more is read. An entry of a
replica that died is taken over by another. The id of the entry is the idempotency key: an entry that is read
twice is sent once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping
from typing import Any, Final

import redis.asyncio as aioredis
from redis.exceptions import RedisError, ResponseError

from carillon.api_keys import check_tenant_name
from carillon.errors import CarillonError, InvalidInputError, UnavailableError
from carillon.events import ProblemError
from carillon.problems import Problem, problem_of
from serve.limits import tenant_limits
from serve.routes.events import publish
from serve.services import Services

log = logging.getLogger(__name__)

_DEAD_LENGTH: Final = 100_000
_CLOSE_S: Final = 1.0


class PoisonEntryError(Exception):
    """An entry that can never become an event."""


class StreamIn:
    """The consumer of one replica; nothing without `inbound.stream` and Redis."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._settings = services.settings.inbound
        self._stream = self._settings.stream
        self._name = f"ingress-{os.urandom(6).hex()}"
        self._closing = False
        self._tenants: set[str] = set()
        self._redis: Any = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin reading."""
        redis = self._services.settings.redis
        if not self._stream or not redis.url:
            return
        self._redis = aioredis.Redis.from_url(
            redis.url,
            socket_connect_timeout=redis.timeout_s,
            socket_timeout=redis.timeout_s + self._settings.stream_block_s,
            decode_responses=False,
        )
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop reading; what was not acknowledged is read by others, or again."""
        self._closing = True
        while self._task is not None and not self._task.done():
            # Again if need be: redis-py 8.1 loses some cancellations (seen: 9 of 150 while it reads).
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_CLOSE_S)
        if self._redis is not None:
            with contextlib.suppress(RedisError, TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await self._redis.aclose()

    async def _run(self) -> None:
        pause_s = self._settings.stream_retry_s
        grouped = False
        while not self._closing:
            try:
                if not grouped:
                    await self._make_group()
                    grouped = True
                await self._handle(await self._taken_over())
                await self._handle(await self._fresh())
                pause_s = self._settings.stream_retry_s
                continue
            except ResponseError as exc:
                # The stream is gone with its group: Redis lost its data, or somebody deleted it.
                grouped = False
                log.info("the stream %s is set up again: %s", self._stream, exc)
            except RedisError as exc:
                log.info("the stream %s waits for Redis: %s", self._stream, exc)
            except Exception:
                log.exception("reading the stream %s failed", self._stream)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 5.0)

    async def _make_group(self) -> None:
        try:
            await self._redis.xgroup_create(self._stream, self._settings.stream_group, id="0", mkstream=True)
        except ResponseError as exc:
            if "BUSYGROUP" not in str(exc):
                raise

    async def _taken_over(self) -> list[Any]:
        """Entries that somebody read long ago and did not acknowledge."""
        idle_ms = round(self._settings.stream_claim_s * 1000)
        answer = await self._redis.xautoclaim(
            self._stream, self._settings.stream_group, self._name, min_idle_time=idle_ms,
            count=self._settings.stream_batch,
        )  # fmt: skip
        return [entry for entry in answer[1] if entry[1]]

    async def _fresh(self) -> list[Any]:
        answer = await self._redis.xreadgroup(
            self._settings.stream_group, self._name, {self._stream: ">"}, count=self._settings.stream_batch,
            block=max(1, round(self._settings.stream_block_s * 1000)),
        )  # fmt: skip
        return answer[0][1] if answer else []

    async def _handle(self, entries: list[Any]) -> None:
        """All of them, whatever becomes of one; the first failure is raised then."""
        work = (self._one(entry_id, fields) for entry_id, fields in entries)
        for failure in await asyncio.gather(*work, return_exceptions=True):
            if failure is not None:
                raise failure

    async def _one(self, entry_id: bytes, fields: Mapping[bytes, bytes]) -> None:
        """Publish an entry and acknowledge it, however long it takes."""
        pause_s = self._settings.stream_retry_s
        while True:
            try:
                await self._publish(entry_id, fields)
                await self._redis.xack(self._stream, self._settings.stream_group, entry_id)
                self._services.stats.count("stream_entries")
                return
            except PoisonEntryError as exc:
                await self._set_aside(entry_id, fields, str(exc))
                return
            except CarillonError as exc:
                log.info("entry %s waits: %s", entry_id.decode(), exc)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 5.0)

    async def _publish(self, entry_id: bytes, fields: Mapping[bytes, bytes]) -> None:
        """Raises PoisonEntryError: never; another CarillonError: not now."""
        tenant = fields.get(b"tenant", b"").decode("utf-8", "replace") or self._settings.stream_tenant
        body = fields.get(b"event")
        if body is None:
            raise PoisonEntryError("expected a field event with the JSON of an event")
        services = self._services
        deadline = services.clock.monotonic() + services.settings.ingress.request_timeout_s
        if tenant not in self._tenants:
            try:
                check_tenant_name(tenant)
            except InvalidInputError as exc:
                raise PoisonEntryError(str(exc)) from None
            if await services.tenants.tenant(tenant) is None:
                raise PoisonEntryError(f"there is no tenant {tenant!r}")
            self._tenants.add(tenant)
        if len(body) > services.settings.ingress.max_request_bytes:
            raise PoisonEntryError("the event is larger than a request may be")
        key = b"stream." + self._stream.encode()[:100] + b"." + entry_id
        try:
            limits = await tenant_limits(services, tenant)
            answer = await publish(services, body, key, tenant, deadline, b"stream-" + entry_id, limits)
        except CarillonError as exc:
            told: Problem = exc.problem if isinstance(exc, ProblemError) else problem_of(exc)
            if told.temporary:
                raise
            raise PoisonEntryError(f"{told.code}: {told.detail}") from None
        if answer.status in (409, 429, 503):
            raise UnavailableError(answer.body.decode("utf-8", "replace")[:300])
        if answer.status != 202 or b'"error":' in answer.body:
            reason = answer.body.decode("utf-8", "replace")
            if b'"temporary":true' in answer.body:
                raise UnavailableError(reason[:300])  # what was stored is found by its key
            raise PoisonEntryError(reason[:2000])

    async def _set_aside(self, entry_id: bytes, fields: Mapping[bytes, bytes], reason: str) -> None:
        """Move an entry to the dead ones: both or none."""
        log.warning("entry %s of %s is set aside: %s", entry_id.decode(), self._stream, reason[:200])
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.xadd(
                f"{self._stream}.dead", {**fields, b"entry": entry_id, b"reason": reason.encode()},
                maxlen=_DEAD_LENGTH, approximate=True,
            )  # fmt: skip
            pipe.xack(self._stream, self._settings.stream_group, entry_id)
            await pipe.execute()
        self._services.stats.count("stream_entries_set_aside")
