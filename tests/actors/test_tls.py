"""TLS on the gateway and on the ingress' own door."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidMessage

from carillon.errors import ClusterError, SettingsError
from carillon.settings import IngressSettings, Settings
from carillon.testing.provider_credentials import server_tls
from tests.actors.gateway_kit import frame_of, running, token
from tests.integration.ingress_world import World


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A certificate of 127.0.0.1 and its key."""
    folder: Path = tmp_path_factory.mktemp("tls")
    server_tls(folder)  # makes a CA and a leaf, whose file holds the key, too
    return {"tls_cert_file": str(folder / "server.pem"), "tls_key_file": str(folder / "server.pem")}


def trusting(files: dict[str, Any]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(Path(files["tls_cert_file"]).parent / "ca.pem"))


async def test_sockets(files: dict[str, Any]) -> None:
    """The gateway serves wss:// and tells so; who speaks plainly gets nothing."""
    async with running() as start:
        kit = await start(**files)
        assert kit.gateway.url.startswith("wss://")
        url = f"wss://127.0.0.1:{kit.port}/ws?token={token()}"
        client = await connect(url, ssl=trusting(files), proxy=None)
        assert (await frame_of(client))["type"] == "WELCOME"
        kit.shard.notify(1)
        assert (await frame_of(client))["type"] == "NEW_NOTIFICATION"
        await client.close()
        with pytest.raises((InvalidMessage, ConnectionError)):
            await connect(kit.url(token=token()), proxy=None, open_timeout=5)


async def test_the_own_door(postgres_dsn: str, files: dict[str, Any]) -> None:
    """The door serves https://, the short cut of events included."""
    world = await World(postgres_dsn, ingress=files).start()
    try:
        assert world.ingress.url.startswith("https://")
        async with httpx.AsyncClient(
            base_url=world.ingress.url, verify=trusting(files), trust_env=False
        ) as http:
            event = {"userId": "ada", "type": "t", "title": "x"}
            answer = await http.post("/v1/events", json=event, headers=world.service())
            assert answer.status_code == 202, answer.text
    finally:
        await world.stop()


async def test_unusable_files(tmp_path: Path, files: dict[str, Any]) -> None:
    """A missing or wrong file is named at the start; one without the other is refused as a setting."""
    (tmp_path / "cert.pem").write_text("nonsense")
    async with running() as start:
        with pytest.raises(ClusterError, match=r"gateway\.tls_cert_file .*cert\.pem"):
            await start(tls_cert_file=str(tmp_path / "cert.pem"), tls_key_file=files["tls_key_file"])
    with pytest.raises(SettingsError, match=r"ingress\.tls_cert_file and ingress\.tls_key_file"):
        Settings(ingress=IngressSettings(tls_cert_file="x"))
