"""A gateway and a shard together, real sockets and PostgreSQL: peers that fall silent or do not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from websockets.asyncio.client import connect

from actors.gateway import Gateway
from carillon.ids import slot_of
from carillon.messages import DevicePut, PresenceQuery
from tests.actors.fakes import actor_config
from tests.actors.gateway_kit import TENANT, frame_of, read_keys, token
from tests.actors.shard_kit import Kit, make_event
from tests.chaos.proxy import NetworkFault, Proxy
from tests.support import eventually

HEARTBEAT_S, PONG_S, GRACE_S = 0.3, 1.0, 0.3
BUFFER = 100_000
USER = "ann"


@contextlib.asynccontextmanager
async def gateway_of(kit: Kit, **limits: Any) -> AsyncIterator[Gateway]:
    """A gateway that joined the kit's coordinator."""
    settings = kit.settings.with_values(gateway={"port": 0, **limits})
    config = actor_config("gateway", "gateway-2", kit.coordinator, settings=settings)
    gateway = Gateway(config, read_keys=read_keys)
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop()


def port_of(gateway: Gateway) -> int:
    return int(gateway.url.rsplit(":", 1)[1].split("/")[0])


def event(title: str = "t", size: int = 0) -> Any:
    return make_event(USER, TENANT, title + "x" * size)


async def status_of(kit: Kit) -> str:
    """What GET /v1/presence would tell."""
    query = PresenceQuery(TENANT, [USER])
    return (await kit.router.link.request(query)).users[0].status


async def test_a_peer_that_falls_silent_is_offline_in_time_and_gets_its_push(postgres_dsn: str) -> None:
    """T7: a half-open socket costs at most heartbeat, pong timeout and grace; the push comes by itself."""
    async with (
        Kit(postgres_dsn, ack_window_s=0.4, grace_s=GRACE_S) as kit,
        gateway_of(kit, heartbeat_s=HEARTBEAT_S, pong_timeout_s=PONG_S) as gateway,
    ):
        slot = slot_of(TENANT, USER)
        await kit.router.link.request(
            DevicePut(TENANT, USER, slot, "phone", "android", "fcm", "token", "tok", "app")
        )
        network = Proxy("network", lambda: [("127.0.0.1", port_of(gateway))], random.Random(1))
        await network.start()
        client = await connect(
            f"ws://127.0.0.1:{network.port}/ws?token={token(USER)}", compression=None, ping_interval=None
        )
        try:
            assert (await frame_of(client))["type"] == "WELCOME"
            await client.send('{"type":"VISIBILITY","state":"focused"}')
            await eventually(lambda: _is(kit, "active"))
            await asyncio.sleep(3 * HEARTBEAT_S + PONG_S)
            assert await status_of(kit) == "active", "who answers pings stays, however long it says nothing"
            network.inject(NetworkFault.PARTITION)
            began = time.monotonic()
            silent = event("into the void")
            (outcome,) = await kit.publish(silent)
            assert outcome.status == "delivered", "nobody can know yet that the socket is dead"
            await eventually(lambda: _is(kit, "offline"))
            took_s = time.monotonic() - began
            assert took_s < HEARTBEAT_S + PONG_S + GRACE_S + 10, "TCP alone would take minutes"
            counters = (await gateway.status())["counters"]
            assert counters['gateway_closes{code="4212"}'] == 1
            await eventually(lambda: kit.router.jobs, what="the push")
            assert [job.notification for job in kit.router.jobs] == [silent.id]
        finally:
            await network.close()
            with contextlib.suppress(Exception):
                await client.close()


async def _is(kit: Kit, status: str) -> bool:
    return await status_of(kit) == status


async def test_a_slow_reader_is_cut_off_and_gets_everything_on_resume(postgres_dsn: str) -> None:
    """T8: unsent frames stay bounded, then 4208; a resume from what was read brings the rest, in order."""
    async with (
        Kit(postgres_dsn, recent_window=20, replay_page=20) as kit,
        gateway_of(kit, max_buffer_bytes=BUFFER, low_buffer_bytes=20_000, close_timeout_s=30.0) as gateway,
    ):
        url = f"ws://127.0.0.1:{port_of(gateway)}/ws?deviceId=slow&token={token(USER)}"
        # A window of 64 KiB at the client: what it leaves unread soon waits at the gateway.
        narrow = socket.socket()
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        narrow.setblocking(False)
        await asyncio.get_running_loop().sock_connect(narrow, ("127.0.0.1", port_of(gateway)))
        # Without a bound of its own the client library would read ahead for us.
        client = await connect(url, sock=narrow, compression=None, ping_interval=None, max_queue=1)
        welcome = await frame_of(client)
        await client.send('{"type":"VISIBILITY","state":"focused"}')
        published: list[str] = []
        most = 0
        while 'gateway_closes{code="4208"}' not in gateway.stats.counters:
            outcomes = await kit.publish(*(event(str(n), 5000) for n in range(4)))
            published += [f"{outcome.seq}" for outcome in outcomes]
            most = max([most, *(unsent(conn) for conn in gateway._sockets)])
            assert len(published) < 2000, "a reader that does not read was never cut off"
        assert most <= BUFFER + 4 * 6000, "what waits for one slow reader is not bounded"
        published += [f"{outcome.seq}" for outcome in await kit.publish(event("after"), event("the end"))]
        seqs: list[int] = []
        with contextlib.suppress(Exception):  # what was buffered, then the close
            while True:
                frame = json.loads(await asyncio.wait_for(client.recv(), 30))
                if frame["type"] == "NEW_NOTIFICATION":
                    seqs.append(frame["notification"]["seq"])
        assert client.close_code == 4208
        assert seqs == list(range(1, len(seqs) + 1))
        assert len(seqs) < len(published), "nothing was held back: this proves nothing"
        async with connect(
            f"{url}&epoch={welcome['epoch']}&lastSeq={seqs[-1]}", compression=None, ping_interval=None
        ) as again:
            assert (await frame_of(again))["recovered"] is True
            while len(seqs) < len(published):
                frame = await frame_of(again)
                if frame["type"] == "NEW_NOTIFICATION":
                    seqs.append(frame["notification"]["seq"])
        assert seqs == list(range(1, len(published) + 1))


def unsent(conn: Any) -> int:
    transport = conn._transport
    return 0 if transport is None else transport.get_write_buffer_size()


@pytest.mark.parametrize("sockets", [60])
async def test_drained_sockets_are_spread_over_the_time(postgres_dsn: str, sockets: int) -> None:
    """G11: each closes with 4201 within `drain_s`, not in one burst; what came meanwhile is resumed."""
    async with Kit(postgres_dsn) as kit, gateway_of(kit, drain_s=1.0) as gateway:
        closes: list[float] = []
        left: list[tuple[str, int]] = []

        async def device(number: int) -> None:
            url = f"ws://127.0.0.1:{port_of(gateway)}/ws?deviceId=d{number}&token={token(f'u{number}')}"
            async with connect(url, compression=None, ping_interval=None) as client:
                epoch = (await frame_of(client))["epoch"]
                ready.release()
                with contextlib.suppress(Exception):
                    while True:
                        await client.recv()
                closes.append(time.monotonic())
                assert client.close_code == 4201
                left.append((epoch, number))

        ready = asyncio.Semaphore(0)
        devices = [asyncio.create_task(device(number)) for number in range(sockets)]
        for _ in devices:
            await ready.acquire()
        began = time.monotonic()
        await gateway.drain()
        await asyncio.gather(*devices)
        offsets = sorted(at - began for at in closes)
        # Each has a slice of the time for itself: none closes before it, however late a slow machine is.
        early = [(at, offset) for at, offset in enumerate(offsets) if offset < at / sockets - 0.01]
        assert early == [], "a burst"
        assert offsets[-1] < 1.0 + 30
        await gateway.drain()  # again: nothing is left to do
        (outcome,) = await kit.publish(make_event("u0", TENANT))
        async with gateway_of_successor(kit) as successor:
            epoch = next(epoch for epoch, number in left if number == 0)
            url = f"ws://127.0.0.1:{port_of(successor)}/ws?epoch={epoch}&lastSeq=0&token={token('u0')}"
            async with connect(url, compression=None, ping_interval=None) as client:
                assert (await frame_of(client))["recovered"] is True
                assert (await frame_of(client))["notification"]["seq"] == outcome.seq


@contextlib.asynccontextmanager
async def gateway_of_successor(kit: Kit) -> AsyncIterator[Gateway]:
    """Another gateway beside the drained one."""
    settings = kit.settings.with_values(gateway={"port": 0})
    config = actor_config("gateway", "gateway-3", kit.coordinator, settings=settings)
    gateway = Gateway(config, read_keys=read_keys)
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop()
