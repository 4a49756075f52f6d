"""Event streams and long polls: real HTTP to a real replica, a real shard behind it."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from carillon.testing.provider_credentials import server_tls
from tests.integration.transports_world import TENANT, Stream, Transports
from tests.support import eventually


def seqs(frames: list[dict[str, Any]]) -> list[int]:
    return [frame["notification"]["seq"] for frame in frames if frame["type"] == "NEW_NOTIFICATION"]


async def until(stream: Stream, kind: str) -> dict[str, Any]:
    """The next frame of that type."""
    while (frame := await stream.frame())["type"] != kind:
        pass
    return frame


async def test_frames_in_order_with_ids(postgres_dsn: str) -> None:
    """A stream greets, then tells every notification and state in order; each id is the position after it."""
    async with Transports(postgres_dsn) as world:
        stream = await world.stream(deviceId="tablet")
        assert stream.status == 200
        assert stream.response.headers["content-type"] == "text/event-stream"
        assert stream.response.headers["cache-control"] == "no-store"
        welcome = await stream.event()
        assert welcome is not None
        assert (welcome.frame["type"], welcome.frame["deviceId"]) == ("WELCOME", "tablet")
        assert welcome.frame["recovered"] is None
        epoch = welcome.frame["epoch"]
        assert welcome.id == f"{epoch}:0:0"
        assert 1000 <= stream.retry <= 3000
        ids = [(await world.send(f"n{n}"))["id"] for n in range(3)]
        for n in range(3):
            event = await stream.event()
            assert event is not None
            assert event.name == "message"
            assert event.frame["notification"]["title"] == f"n{n}"
            assert event.id == f"{epoch}:{n + 1}:{n + 1}"
        await world.call("POST", "/api/notifications/read", json={"notificationIds": ids[:2]})
        read = await stream.event()
        assert read is not None
        assert (read.frame["type"], read.id) == ("NOTIFICATIONS_READ", f"{epoch}:3:4")


async def test_resume_without_gap(postgres_dsn: str) -> None:
    """Each way to give a position replays what was missed, changes too, and goes on live."""
    async with Transports(postgres_dsn) as world:
        stream = await world.stream()
        await stream.frame()
        first = (await world.send("n1"))["id"]
        event = await stream.event()
        assert event is not None
        await stream.close()
        for n in range(2, 5):
            await world.send(f"n{n}")
        await world.call("POST", "/api/notifications/read", json={"notificationIds": [first]})
        epoch, seq, rev = event.id.rsplit(":", 2)  # type: ignore[union-attr]
        ways: list[dict[str, Any]] = [
            {"headers": {"Last-Event-ID": event.id}},
            {"lastEventId": event.id},
            {"epoch": epoch, "lastSeq": seq, "lastRev": rev},
            # A browser sets the header when it comes back, and the URL is still the first one.
            {"headers": {"Last-Event-ID": event.id}, "epoch": epoch, "lastSeq": 0, "lastRev": 0},
        ]
        resumed = []
        for way in ways:
            again = await world.stream(**way)
            resumed.append(again)
            frames = await again.frames(5)
            assert (frames[0]["type"], frames[0]["recovered"]) == ("WELCOME", True)
            assert seqs(frames) == [2, 3, 4]
            assert frames[4]["type"] == "NOTIFICATIONS_READ"
        await world.send("n5")
        for again in resumed:
            assert seqs([await again.frame()]) == [5]
        wrong = await world.stream(epoch="another", lastSeq=1, lastRev=1)
        assert (await wrong.frame())["recovered"] is False


async def test_long_replay_is_paged(postgres_dsn: str) -> None:
    """A stream that comes back after many pages gets each notification once, in order."""
    async with Transports(postgres_dsn, shard={"replay_page": 20, "recent_window": 5}) as world:
        await world.publish_now(150)
        epoch = await world.db.fetchval("select epoch from streams where user_id = 'ann'")
        stream = await world.stream(epoch=epoch, lastSeq=0, lastRev=0)
        frames = await stream.frames(151)
        assert seqs(frames) == list(range(1, 151))


async def test_survives_the_loss_of_its_shard(postgres_dsn: str) -> None:
    """A shard that dies under a stream costs neither the stream nor a frame nor the order."""
    async with Transports(postgres_dsn) as world:
        stream = await world.stream(deviceId="tablet")
        await stream.frame()
        await world.send("n1")
        assert seqs([await stream.frame()]) == [1]
        assert (
            await world.call("POST", "/api/visibility", json={"deviceId": "tablet", "state": "hidden"})
        ).status_code == 200
        for round_ in range(2):
            lost = asyncio.create_task(world.lose_shard())
            await world.send(f"n{round_ + 2}")
            await lost
            assert seqs([await stream.frame()]) == [round_ + 2]
        # Where the user looks was told to a shard that is gone: the replica told the next one.
        device = (await world.presence())["devices"][0]
        assert (device["deviceId"], device["attention"]) == ("tablet", "hidden")


async def test_moves_with_its_slot(postgres_dsn: str) -> None:
    """A slot that moves to another shard takes its streams along."""
    async with Transports(postgres_dsn) as world:
        stream = await world.stream()
        await stream.frame()
        other = await world.start_shard("shard-b")
        await eventually(lambda: other.connections() if hasattr(other, "connections") else True)
        await world.send("n1")
        await world.send("n2")
        assert seqs(await stream.frames(2)) == [1, 2]
        assert (await other.status())["connections"] == 1


@pytest.fixture
def tls(tmp_path: Path) -> dict[str, Any]:
    """For a world whose door speaks TLS."""
    server_tls(tmp_path)
    pem = str(tmp_path / "server.pem")
    trusting = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    return {"trusting": trusting, "ingress": {"tls_cert_file": pem, "tls_key_file": pem}}


async def test_over_tls(postgres_dsn: str, tls: dict[str, Any]) -> None:
    """Streams and polls work over TLS, up to their end."""
    async with Transports(postgres_dsn, **tls) as world:
        assert world.ingress.url.startswith("https://")
        stream = await world.stream()
        epoch = (await stream.frame())["epoch"]
        poll = asyncio.create_task(world.call("GET", f"/api/sync?epoch={epoch}&since=0&rev=0&waitS=30"))
        await eventually(lambda: len(world.ingress.connections) == 2)
        await world.send("n1")
        assert seqs([await stream.frame()]) == [1]
        assert [one["seq"] for one in (await poll).json()["notifications"]] == [1]
        await stream.close()
        await world.status_is("offline")
        short = await world.stream(login=False, token=world.token(ttl_s=1))
        assert await short.closed() == 4101


@pytest.mark.parametrize("way", ["plain", "tls"])
async def test_slow_reader_is_ended(postgres_dsn: str, way: str, tls: dict[str, Any]) -> None:
    """A client that does not read is ended once the bound of unsent bytes is reached, and is detached."""
    more = tls if way == "tls" else {}
    async with Transports(postgres_dsn, gateway={"max_buffer_bytes": 65_536}, **more) as world:
        stream = await world.stream()
        await stream.frame()
        await world.status_is("active")
        for _ in range(60):
            await world.publish_now(20, title="x" * 250 + "y" * 4000)
            closes = world.ingress.stats.counters.get('stream_closes{code="4208"}', 0)
            if closes:
                break
        assert closes == 1
        await world.status_is("offline")
        await eventually(lambda: len(world.ingress.connections) == 0, what="the socket is cut off")


async def test_credentials(postgres_dsn: str) -> None:
    """A token in header or URL, or a ticket once; anything else is a problem, and no stream."""
    async with Transports(postgres_dsn) as world:
        by_url = await world.stream(login=False, token=world.token())
        assert (await by_url.frame())["type"] == "WELCOME"
        ticket = (await world.call("POST", "/api/tickets")).json()["ticket"]
        by_ticket = await world.stream(login=False, ticket=ticket)
        assert (await by_ticket.frame())["type"] == "WELCOME"
        for query in ({"ticket": ticket}, {"ticket": "tkt_nonsense"}, {"token": "a.b.c"}, {}):
            refused = await world.stream(login=False, **query)
            assert refused.status == 401, query
            assert (await refused.problem())["code"] == "unauthenticated"
        expired = await world.stream(login=False, token=world.token(ttl_s=-60))
        assert (expired.status, (await expired.problem())["code"]) == (401, "token_expired")
        for query in (
            {"deviceId": ""}, {"lastSeq": "1"}, {"epoch": "e", "lastSeq": "x"}, {"state": "asleep"},
            {"lastEventId": "what"}, {"state": "visible", "viewing": "nothing"}, {"viewing": "order:1"},
        ):  # fmt: skip
            refused = await world.stream(**query)
            assert (refused.status, (await refused.problem())["code"]) == (422, "invalid"), query


async def test_ends_with_its_token(postgres_dsn: str) -> None:
    """A stream ends with 4101 when its token does, and with 4001 when the user's sessions are revoked."""
    async with Transports(postgres_dsn) as world:
        short = await world.stream(login=False, token=world.token(ttl_s=1))
        long = await world.stream("bob")
        assert await short.closed() == 4101
        await world.http.post(
            "/v1/users/bob/sessions/revoke", headers={"Authorization": f"Bearer {world.key}"}
        )
        assert await long.closed() == 4001
        assert short.ended
        assert long.ended


async def test_ends_with_the_log_out(postgres_dsn: str) -> None:
    """A log-out ends the streams and polls of its token and of its device, and no others."""
    async with Transports(postgres_dsn) as world:
        token = world.token()
        mine = {"Authorization": f"Bearer {token}"}
        same_token = await world.stream(login=False, token=token)
        same_device = await world.stream(deviceId="phone")
        other = await world.stream(deviceId="laptop")
        for stream in (same_token, same_device, other):
            await stream.frame()
        path = "/api/sync?since=0&rev=0&waitS=30&deviceId=phone"
        poll = asyncio.create_task(world.call("GET", path))
        await eventually(lambda: len(world.ingress.connections) == 4)
        answer = await world.http.post("/api/logout", json={"deviceId": "phone"}, headers=mine)
        assert answer.status_code == 200
        assert await same_token.closed() == 4001
        assert await same_device.closed() == 4001
        assert (await poll).status_code == 401
        again = await world.stream(login=False, token=token)
        assert (again.status, (await again.problem())["code"]) == (401, "unauthenticated")
        await world.send("n1")
        assert seqs([await other.frame()]) == [1]


async def test_life_is_bounded(postgres_dsn: str) -> None:
    """A stream ends after a while with 4212, for a frozen client would be present for ever; who comes back
    misses nothing and stays present."""
    async with Transports(postgres_dsn, ingress={"stream_life_s": 0.5}, shard={"grace_s": 60.0}) as world:
        stream = await world.stream(deviceId="tablet")
        welcome = await stream.event()
        assert welcome is not None
        assert await stream.closed() == 4212
        await eventually(lambda: len(world.ingress.connections) == 0)
        await world.send("n1")
        await world.status_is("active")
        again = await world.stream(deviceId="tablet", headers={"Last-Event-ID": welcome.id})
        assert seqs(await again.frames(2)) == [1]


async def test_heart_beat(postgres_dsn: str) -> None:
    """An idle stream gets comments, so that whoever stands between keeps it open."""
    async with Transports(postgres_dsn, gateway={"heartbeat_s": 0.1}) as world:
        stream = await world.stream()
        await stream.frame()
        reading = asyncio.create_task(stream.frame())
        await eventually(lambda: stream.beats >= 2)
        await world.send("n1")
        assert seqs([await reading]) == [1]


async def test_presence(postgres_dsn: str) -> None:
    """A stream makes its user active, idle when hidden, and offline a grace period after it went."""
    async with Transports(postgres_dsn) as world:
        assert (await world.presence())["status"] == "offline"
        refused = await world.call("POST", "/api/visibility", json={"deviceId": "tablet", "state": "idle"})
        assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
        stream = await world.stream(deviceId="tablet", state="focused", viewing="order:7")
        await stream.frame()
        shown = await world.presence()
        assert shown["status"] == "active"
        assert [(d["deviceId"], d["attention"]) for d in shown["devices"]] == [("tablet", "focused")]
        assert (
            await world.call("POST", "/api/visibility", json={"deviceId": "tablet", "state": "hidden"})
        ).json() == {"success": True}
        assert (await world.presence())["status"] == "idle"
        answer = await world.call("POST", "/api/visibility", json={"deviceId": "tablet", "state": "asleep"})
        assert answer.status_code == 422
        await stream.close()
        await world.status_is("offline")


async def test_limits(postgres_dsn: str) -> None:
    """The user's oldest connection goes when there are too many; a full replica takes no more."""
    sections = {"shard": {"max_connections_per_user": 2}, "ingress": {"max_streams": 3}}
    async with Transports(postgres_dsn, **sections) as world:
        first = await world.stream()
        await first.frame()
        socket = await world.socket()
        second = await world.stream()
        await second.frame()
        assert await first.closed() == 4004
        await eventually(lambda: len(world.ingress.connections) == 1)
        for user in ("bob", "cid"):
            assert (await (await world.stream(user)).frame())["type"] == "WELCOME"
        full = await world.stream("dan")
        assert (full.status, full.response.headers["retry-after"]) == (503, "1")
        poll = await world.call("GET", "/api/sync?since=0&waitS=5", "dan")
        assert poll.status_code == 503
        await socket.close()


async def test_drain(postgres_dsn: str) -> None:
    """A replica that stops ends its streams with 4201 and answers its polls."""
    async with Transports(postgres_dsn) as world:
        streams = [await world.stream(user) for user in ("ann", "bob")]
        for stream in streams:
            await stream.frame()
        poll = asyncio.create_task(world.call("GET", "/api/sync?since=0&rev=0&waitS=30", "cid"))
        await eventually(lambda: len(world.ingress.connections) == 3)
        stop = asyncio.create_task(world.ingress.stop())
        assert [await stream.closed() for stream in streams] == [4201, 4201]
        answer = (await poll).json()
        assert (answer["notifications"], answer["lastSeq"]) == ([], 0)
        await stop


async def test_behind_serve_there_is_none(postgres_dsn: str) -> None:
    """Serve's route answers where streams and long polls are."""
    from serve.app import ServeDoor

    async with Transports(postgres_dsn) as world:
        door = httpx.ASGITransport(ServeDoor(world.ingress.app))
        async with httpx.AsyncClient(transport=door, base_url="http://serve") as serve:
            for path in ("/api/stream", "/api/sync?since=0&waitS=5"):
                answer = await serve.get(path, headers=world.auth())
                assert answer.status_code == 404
                assert world.ingress.url in answer.json()["detail"]
            assert (await serve.get("/api/sync?since=0", headers=world.auth())).status_code == 200


async def test_cors(postgres_dsn: str) -> None:
    """A browser's page of another origin may open a stream, refused ones included."""
    async with Transports(postgres_dsn) as world:
        for login, status in ((True, 200), (False, 401)):
            stream = await world.stream(login=login, headers={"Origin": "https://app.example"})
            assert stream.status == status
            assert stream.response.headers["access-control-allow-origin"] == "*"
            assert "Last-Event-ID" in stream.response.headers["access-control-allow-headers"]


async def test_old_http_and_pipelining(postgres_dsn: str) -> None:
    """HTTP/1.0 gets the plain body; what is sent behind the request is not answered into the stream."""
    async with Transports(postgres_dsn) as world:
        host, port = world.ingress.url.removeprefix("http://").split(":")
        for version in ("1.0", "1.1"):
            reader, writer = await asyncio.open_connection(host, int(port))
            request = f"GET /api/stream?token={world.token()} HTTP/{version}\r\nHost: x\r\n\r\n"
            writer.write(request.encode() + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * (version == "1.1"))
            head = await reader.readuntil(b"\r\n\r\n")
            assert (b"transfer-encoding: chunked" in head) is (version == "1.1")
            got = await reader.readuntil(b'"serverTime"')
            assert b"retry: " in got
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            await world.send("behind")
            assert b"HTTP/1.1" not in await reader.readuntil(b'"title":"behind"')
            writer.close()
        await eventually(lambda: len(world.ingress.connections) == 0, what="gone as soon as the client is")


async def test_acknowledgement(postgres_dsn: str) -> None:
    """POST /api/ack, by ids or cumulative, and coming back with a position mark what a device has."""
    async with Transports(postgres_dsn) as world:

        async def delivered() -> list[int]:
            rows = await world.db.fetch(
                "select seq from notifications where delivered_at is not null order by seq"
            )
            return [row["seq"] for row in rows]

        async def is_delivered(*wanted: int) -> None:
            async def check() -> bool:
                return await delivered() == list(wanted)

            await eventually(check, what=f"delivered {wanted}")

        stream = await world.stream(deviceId="tablet")
        await stream.frame()
        ids = [(await world.send(f"n{n}"))["id"] for n in range(1, 8)]
        last = [await stream.event() for _ in range(7)][-1]
        answer = await world.call("POST", "/api/ack", json={"notificationIds": [ids[0], "no id"]})
        assert answer.json() == {"success": True}
        await is_delivered(1)
        await world.call("POST", "/api/ack", json={"notificationId": ids[2]})
        await is_delivered(1, 3)
        await world.call("POST", "/api/ack", json={"seq": 4, "deviceId": "tablet"})
        await is_delivered(1, 2, 3, 4)
        await stream.close()
        await world.status_is("offline")
        # The session is gone with the grace period: who was offline acknowledges, too.
        await world.call("POST", "/api/ack", json={"seq": 5, "deviceId": "phone"})
        await is_delivered(1, 2, 3, 4, 5)
        assert last is not None
        again = await world.stream(deviceId="tablet", headers={"Last-Event-ID": last.id or ""})
        await again.frame()
        await is_delivered(1, 2, 3, 4, 5, 6, 7)
        for wrong in ({}, {"seq": 1, "notificationIds": []}, {"seq": -1}, {"seq": 1, "deviceId": ""}):
            answer = await world.call("POST", "/api/ack", json=wrong)
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid"), wrong


async def test_poll_waits_for_news(postgres_dsn: str) -> None:
    """A long poll answers as soon as there is an event or a read, and acknowledges what it had."""
    async with Transports(postgres_dsn, shard={"grace_s": 60.0}) as world:
        await world.send("n0")
        page = (await world.call("GET", "/api/sync?since=0&rev=0")).json()
        waits = []
        for n in range(1, 6):
            path = f"/api/sync?epoch={page['epoch']}&since={page['lastSeq']}&rev={page['rev']}&waitS=30"
            poll = asyncio.create_task(world.call("GET", f"{path}&deviceId=phone"))
            await eventually(lambda: len(world.ingress.connections) == 1)
            await world.status_is("active")
            assert not poll.done()
            started = time.perf_counter()
            if n % 2:
                await world.send(f"n{n}")
            else:
                await world.call("POST", "/api/notifications/read-all")
            page = (await poll).json()
            waits.append(time.perf_counter() - started)
            if n % 2:
                assert [one["title"] for one in page["notifications"]] == [f"n{n}"]
            else:
                assert [change["type"] for change in page["changes"]] == ["NOTIFICATIONS_READ"]
        assert min(waits) < 10, "it waited for its time"
        await world.status_is("active")  # between two polls: grace
        unseen = await world.db.fetchval("select count(*) from notifications where delivered_at is null")
        assert unseen <= 2
        world.skip(61)
        await world.status_is("offline")


async def test_poll_ends(postgres_dsn: str) -> None:
    """A poll ends empty at its time, at once if it is behind, and leaves when its client does."""
    async with Transports(postgres_dsn, ingress={"max_wait_s": 0.2}) as world:
        started = time.perf_counter()
        page = (await world.call("GET", "/api/sync?since=0&rev=0&waitS=3000")).json()
        assert 0.2 <= time.perf_counter() - started < 30
        assert (page["notifications"], page["changes"], page["recovered"]) == ([], [], True)
    async with Transports(await _other(postgres_dsn)) as world:
        await world.send("n1")
        for query in ("since=0&rev=0", "since=0", "since=9&rev=9", "epoch=another&since=1&rev=1"):
            page = (await world.call("GET", f"/api/sync?{query}&waitS=30")).json()
            assert page["recovered"] is ("another" not in query and "9" not in query), query
        poll = asyncio.create_task(world.call("GET", "/api/sync?since=1&rev=1&waitS=30"))
        await eventually(lambda: len(world.ingress.connections) == 1)
        poll.cancel()
        await asyncio.gather(poll, return_exceptions=True)
        await eventually(lambda: len(world.ingress.connections) == 0)
        assert world.ingress.app.services.in_flight == 0
        poll = asyncio.create_task(world.call("GET", "/api/sync?since=1&rev=1&waitS=30"))
        await eventually(lambda: len(world.ingress.connections) == 1)
        await world.http.post(
            "/v1/users/ann/sessions/revoke", headers={"Authorization": f"Bearer {world.key}"}
        )
        answer = await poll
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")


async def _other(dsn: str) -> str:
    """The same database without the tenant of the first world."""
    import asyncpg

    connection = await asyncpg.connect(dsn)
    await connection.execute("delete from api_keys; delete from tenants")
    await connection.execute("truncate streams, notifications")
    await connection.close()
    return dsn


async def test_poll_survives_the_loss_of_its_shard(postgres_dsn: str) -> None:
    """A poll under way outlives its shard and is woken by the next one."""
    async with Transports(postgres_dsn) as world:
        await world.send("n1")
        page = (await world.call("GET", "/api/sync?since=0&rev=0")).json()
        path = f"/api/sync?epoch={page['epoch']}&since=1&rev=1&waitS=30"
        poll = asyncio.create_task(world.call("GET", path))
        await eventually(lambda: len(world.ingress.connections) == 1)
        await world.lose_shard()
        await world.send("n2")
        assert [one["seq"] for one in (await poll).json()["notifications"]] == [2]


async def test_attention_of_polls_lasts(postgres_dsn: str) -> None:
    """What a polling device told of attention holds from poll to poll, and may be told between two."""
    async with Transports(postgres_dsn, shard={"grace_s": 60.0}) as world:
        poll = asyncio.create_task(world.call("GET", "/api/sync?since=0&rev=0&waitS=30&deviceId=phone"))
        await world.status_is("active")
        told = {"deviceId": "phone", "state": "hidden"}
        assert (await world.call("POST", "/api/visibility", json=told)).status_code == 200
        await world.status_is("idle")
        await world.send("n1")
        await poll
        poll = asyncio.create_task(world.call("GET", "/api/sync?since=1&rev=1&waitS=30&deviceId=phone"))
        await eventually(lambda: len(world.ingress.connections) == 1)
        assert (await world.presence())["status"] == "idle"
        await world.send("n2")
        await poll
        told["state"] = "visible"
        assert (await world.call("POST", "/api/visibility", json=told)).status_code == 200
        poll = asyncio.create_task(world.call("GET", "/api/sync?since=2&rev=2&waitS=30&deviceId=phone"))
        await world.status_is("active")
        await world.send("n3")
        await poll


async def test_all_in_step(postgres_dsn: str) -> None:
    """A WebSocket, a stream and a poll of one user hear of each other's reads, in the same order."""
    async with Transports(postgres_dsn) as world:
        socket, stream = await world.socket(), await world.stream()
        await stream.frame()
        ids = [(await world.send(f"n{n}"))["id"] for n in range(4)]
        page = (await world.call("GET", "/api/sync?since=0&rev=0")).json()
        path = f"/api/sync?epoch={page['epoch']}&since=4&rev=4&waitS=30"
        poll = asyncio.create_task(world.call("GET", path))
        await eventually(lambda: len(world.ingress.connections) == 2)
        await socket.send(json.dumps({"type": "MARK_READ", "notificationIds": ids[:1]}))
        [change] = (await poll).json()["changes"]
        await world.call("POST", f"/api/notifications/{ids[1]}/archive")
        await socket.send('{"type":"MARK_ALL_READ"}')
        on_stream = await stream.frames(7)
        on_socket = [json.loads(await socket.recv()) for _ in range(7)]
        assert on_stream == on_socket
        assert [frame["type"] for frame in on_stream[4:]] == [
            "NOTIFICATIONS_READ", "NOTIFICATION_ARCHIVED", "ALL_NOTIFICATIONS_READ",
        ]  # fmt: skip
        assert change == on_stream[4]


@pytest.mark.parametrize("path", ["/api/stream/", "/api/streams", "/api/stream/x"])
async def test_other_paths(postgres_dsn: str, path: str) -> None:
    """What only begins like the stream's path is not the stream."""
    async with Transports(postgres_dsn) as world:
        assert (await world.call("GET", path)).status_code == 404
        assert (await world.call("POST", "/api/stream")).status_code == 405
        assert TENANT == "acme"
