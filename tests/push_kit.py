"""Jobs and running local providers for the tests of push channels."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from carillon.clock import Clock, SystemClock
from carillon.messages import PushJob, PushResult, PushTarget
from carillon.settings import PushSettings
from carillon.testing.apns_server import ApnsServer
from carillon.testing.fcm_server import FcmServer
from carillon.testing.provider_credentials import write_demo_credentials
from carillon.testing.provider_server import Behaviour, Script
from channels.apns import ApnsChannel
from channels.fcm import FcmChannel
from channels.http2 import Http2Limits

LIMITS = Http2Limits(connect_timeout_s=20.0, redial_min_s=0.01)


@functools.cache
def folder() -> Path:
    """One folder per test process: making keys and certificates takes longer than most tests."""
    path = tempfile.mkdtemp(prefix="carillon-push-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


def target_of(token: str = "token-1", provider: str = "fcm", **more: Any) -> PushTarget:
    """A device registered long ago."""
    values: dict[str, Any] = {
        "device": f"device-of-{token}",
        "provider": provider,
        "token_kind": "token",
        "token": token,
        "app_id": "",
        "environment": "production",
        "registered_ms": 1_000,
    }
    return PushTarget(**(values | more))


def job_of(number: int = 1, provider: str = "fcm", tokens: tuple[str, ...] = (), **more: Any) -> PushJob:
    """A job for one target, or for those named."""
    values: dict[str, Any] = {
        "delivery": number,
        "attempt": 1,
        "tenant": "acme",
        "user": "ada",
        "slot": number % 1024,
        "notification": number.to_bytes(16, "big"),
        "seq": number,
        "type": "comment",
        "title": "Title",
        "body": "Body",
        "link": "https://example.com/42",
        "collapse_key": f"key-{number}",
        "priority": 1,
        "badge": 3,
        "expires_ms": None,
        "targets": [target_of(token, provider) for token in tokens or (f"token-{number}",)],
        "provider": provider,
    }
    return PushJob(**(values | more))


@contextlib.asynccontextmanager
async def fcm(
    clock: Clock | None = None, limits: Http2Limits = LIMITS, **settings: Any
) -> AsyncIterator[tuple[FcmServer, FcmChannel]]:
    """A local FCM and a channel to it."""
    server = FcmServer(folder() / "fcm", clock=clock)
    ready = await server.start()
    values = write_demo_credentials(folder() / "settings", ready, None)
    channel = FcmChannel(PushSettings(**(values | {"timeout_s": 30.0} | settings)), clock, limits)
    await channel.open()
    try:
        yield server, channel
    finally:
        await channel.close()
        await server.close()


@contextlib.asynccontextmanager
async def apns(
    clock: Clock | None = None, limits: Http2Limits = LIMITS, **settings: Any
) -> AsyncIterator[tuple[ApnsServer, ApnsChannel]]:
    """A local APNs and a channel to it."""
    server = ApnsServer(folder() / "apns", clock=clock)
    ready = await server.start()
    values: dict[str, Any] = write_demo_credentials(folder() / "settings", None, ready)
    push = PushSettings(**(values | {"timeout_s": 30.0} | settings))
    channel = ApnsChannel(push, clock or SystemClock(), limits)
    await channel.open()
    try:
        yield server, channel
    finally:
        await channel.close()
        await server.close()


async def send_one(channel: FcmChannel | ApnsChannel, job: PushJob) -> PushResult:
    """Send a job with one target."""
    ((result,),) = await channel.send([job])
    return result


def script(server: FcmServer | ApnsServer, token: str, **behaviour: Any) -> None:
    """Set how the server answers pushes to a token."""
    server.script(Script(targets={token: Behaviour(**behaviour)}))


def with_limits(**changes: Any) -> Http2Limits:
    """The limits of these tests with some replaced."""
    return dataclasses.replace(LIMITS, **changes)
