"""A gateway, its shard and its database under attack: nothing crashes, leaks or lets anyone in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors import gateway
from carillon.tokens import ClientIdentity, claimed_tenant
from cluster.embedded import EmbeddedPostgres
from tests.fuzz import arena as arena_module
from tests.fuzz.apart import LoopApart
from tests.fuzz.arena import Arena, Finding
from tests.fuzz.dialogue import converse
from tests.fuzz.frames import OWN, documents, json_values

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
"""Dialogues of each encoding; `make fuzz` has more."""


async def test_attacks_on_the_gateway(postgres_dsn: str) -> None:
    """Broken frames, forged tokens and broken handshakes end as RFC 6455 says, and leave nothing."""
    async with Arena(postgres_dsn) as arena:
        await arena.run(1, 400)


async def test_an_open_door_is_found(postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attacks are real ones: a gateway that looks at no signature is found out."""

    def believe(token: str, *_: Any) -> ClientIdentity:
        return ClientIdentity(claimed_tenant(token), "victim", 4_000_000_000_000, 0)

    monkeypatch.setattr(arena_module, "LONGEST_S", 8.0)
    async with Arena(postgres_dsn) as arena:
        monkeypatch.setattr(gateway, "verify", believe)
        with pytest.raises(Finding):
            await arena.run(1, 400)


async def test_a_forgotten_limit_is_found(postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that takes messages of any length is found out."""
    monkeypatch.setattr(arena_module, "LONGEST_S", 8.0)
    async with Arena(postgres_dsn) as arena:
        object.__setattr__(arena.world.gateways[0].limits, "max_message_bytes", 2**30)
        with pytest.raises(Finding, match=r"length|too long"):
            await arena.run(1, 400)


# -- frames -----------------------------------------------------------------------------------------------


class Talk:
    """An arena on a loop apart, with notifications of the talking user."""

    def __init__(self, dsn: str, apart: LoopApart) -> None:
        self.arena = Arena(dsn, workers=1)
        self.apart = apart

    async def start(self) -> None:
        await self.arena.__aenter__()
        found = await self.arena.publish("mallory0", 3)
        self.ids = dict(zip(OWN, found, strict=True))

    async def stop(self) -> None:
        await self.arena.__aexit__()


@pytest.fixture(scope="module")
def talk(postgres_server: EmbeddedPostgres) -> Iterator[Talk]:
    import asyncpg

    async def sql(statement: str) -> None:
        admin = await asyncpg.connect(postgres_server.dsn)
        await admin.execute(statement)
        await admin.close()

    with LoopApart() as apart:
        apart.run(sql("create database test_fuzz_frames template template strategy wal_log"))
        made = Talk(postgres_server.dsn_of("test_fuzz_frames"), apart)
        apart.run(made.start())
        yield made
        apart.run(made.stop())
        apart.run(sql("drop database test_fuzz_frames with (force)"))


@pytest.mark.parametrize("packed", [False, True], ids=["json", "msgpack"])
def test_every_frame_is_answered(talk: Talk, packed: bool) -> None:
    """Whatever a client says, right, nearly right or wild, each `id` is echoed once, and nothing breaks."""

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES <= 60,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(st.one_of(documents(), documents(), json_values), min_size=1, max_size=12))
    def inner(sent: list[Any]) -> None:
        talk.apart.run(converse(talk.arena, sent, packed, talk.ids))

    inner()
    talk.apart.run(talk.arena.judge("frames"))
