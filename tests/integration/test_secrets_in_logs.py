"""Whatever happens, at whatever level: no key, token, ticket, password or push token is written to a log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import traceback
from collections.abc import Iterator
from random import Random
from typing import Any
from urllib.parse import urlsplit

import pytest
from websockets.asyncio.client import connect

from serve.routes import all_routes
from tests.fuzz.attacks import Facts, forged
from tests.integration.test_every_door import url_of
from tests.integration.transports_world import Transports
from tests.support import eventually

PUSH_TOKEN = "push-token-of-a-phone-7f3a9c"
REDIS_PASSWORD = "redis-password-5d1e8b"
OURS_AS_CLIENT = ("httpx", "httpcore", "hpack", "websockets.client", "asyncio", "aiohttp")
"""Loggers of the test's own clients, which may say what they like."""


class Everything(logging.Handler):
    """All that is logged, tracebacks and arguments included."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(OURS_AS_CLIENT):
            return
        text = f"{record.name} {record.getMessage()} {record.args!r}"
        if record.exc_info:
            text += "".join(traceback.format_exception(*record.exc_info))
        self.lines.append(text)


@pytest.fixture
def logs() -> Iterator[Everything]:
    """As after `logging.basicConfig(level=DEBUG)`: loggers that the code quiets for good stay quiet."""
    handler = Everything()
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler
    root.removeHandler(handler)
    root.setLevel(before)


async def test_no_secret_is_logged(
    postgres_dsn: str, logs: Everything, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every route and both transports with good, bad and broken credentials, and a defect: in no log."""
    redis = {"url": f"redis://:{REDIS_PASSWORD}@127.0.0.1:1", "timeout_s": 0.1}
    async with Transports(postgres_dsn, redis=redis) as world:
        secrets = {
            "API key": world.key,
            "client secret": world.tenant.client_secret,
            "cluster secret": world.coordinator.secret.decode(),
            "push token": PUSH_TOKEN,
            "Redis password": REDIS_PASSWORD,
            "Postgres password": urlsplit(postgres_dsn).password,
        }
        good, late = world.token(), world.token(ttl_s=-60)
        tokens = [good, late, good[:-3] + "AAA"]
        tokens += [forged(Random(n), Facts(good, "ann", [], "s" * 40)) for n in range(12)]
        tokens = [text for text in tokens if text.isascii() and text.isprintable() and len(text) > 20]
        ticket = (await world.call("POST", "/api/tickets")).json()["ticket"]
        secrets |= {"ticket": ticket} | {f"token {n}": token for n, token in enumerate(tokens)}
        device = {"platform": "android", "provider": "fcm", "token": PUSH_TOKEN, "appId": "app"}

        async def ask(method: str, path: str, login: str, body: Any) -> None:
            headers = {"Authorization": f"Bearer {login}"}
            with contextlib.suppress(Exception):  # a stream does not end
                await world.http.request(method, path, headers=headers, json=body, timeout=1.0)

        for route in all_routes():
            body = device if "devices" in route.path else route.body_example
            for login in (world.key, good, late, tokens[2]):
                if route.path != "/api/stream" or login != good:
                    await ask(route.method, url_of(route), login, body)
        for path in ("/api/stream", "/api/notifications", "/nowhere", f"/{PUSH_TOKEN}"):
            for token in (late, tokens[2], ticket):
                await ask("GET", f"{path}?token={token}&ticket={token}", token, None)
        # Bodies that break a rule, with what must not be told.
        for broken in (
            {**device, "platform": PUSH_TOKEN},
            {**device, "nope": good},
            {"token": world.key},
            [good],
        ):
            await ask("PUT", "/v1/users/ann/devices/phone", world.key, broken)
        headers = {"Authorization": f"Bearer {world.key}"}
        for content in (f'{{"token": "{PUSH_TOKEN}"', f'"{good}"', f"\xff{good}"):
            await world.http.put(
                "/v1/users/ann/devices/x", content=content.encode("latin-1"), headers=headers
            )
        # A defect inside of a request that carries them.
        monkeypatch.setattr(world.ingress.app.services.backend, "request", _defect)  # type: ignore[union-attr]
        answer = await world.call("PUT", f"/api/devices/phone?token={good}", json=device)
        assert answer.status_code == 500
        monkeypatch.undo()
        # Trying every route made the user invisible: visible it is mirrored, which fails here and is logged.
        assert (await world.call("PUT", "/api/presence", json={"mode": "auto"})).status_code == 200

        async def socket(query: str, *frames: Any, auth: str | None = None) -> None:
            more = {"Authorization": f"Bearer {auth}"} if auth else None
            with contextlib.suppress(Exception):
                async with connect(
                    f"{world.gateway_actor.url}?{query}", additional_headers=more, proxy=None
                ) as client:
                    for frame in frames:
                        await client.send(frame if isinstance(frame, str | bytes) else json.dumps(frame))
                    async with asyncio.timeout(0.3):
                        async for _ in client:
                            pass

        for token in tokens:
            await socket(f"token={token}", {"type": "PING"})
        for query in (f"ticket={ticket}", f"ticket={ticket}", "ticket=tkt_x"):
            await socket(query)
        await socket("", {"type": "AUTH", "token": good}, {"type": "AUTH", "token": late, "id": 1})
        await socket("", {"type": "AUTH", "token": good}, {"type": "AUTH", "token": [good]}, f"AUTH {good}")
        await socket("", {"type": "AUTH", "token": late})
        await socket("", {"type": "AUTH", "token": good * 30}, {"type": "PING"})
        await socket("", b"\xff" + good.encode())
        await socket(f"deviceId={'x' * 200}&epoch={good}", auth=good)
        await world.send("private words", channels=["in_app"])
        await eventually(lambda: any("failed" in line for line in logs.lines), what="the defect's log line")

    out, err = capfd.readouterr()
    said = "\n".join([*logs.lines, out, err])
    assert any("a defect" in line for line in logs.lines), "something is logged at all"
    for name, secret in secrets.items():
        assert secret, name
        assert secret not in said, f"{name} is in: {_around(said, secret)}"
    for token in tokens:
        signature = token.rsplit(".", 1)[-1]
        assert len(signature) < 20 or signature not in said, _around(said, signature)
    assert "private words" not in said, "what users are told is nobody else's business"


async def _defect(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a defect")


def _around(said: str, what: str) -> str:
    at = said.index(what)
    return said[max(0, at - 300) : at + 200]
