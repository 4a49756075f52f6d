"""The APNs channel against a server that speaks Apple's protocol."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from carillon.clock import ManualClock, SystemClock
from carillon.errors import SettingsError
from carillon.settings import PushSettings
from carillon.testing.provider_server import Behaviour, Script
from channels.apns import ApnsChannel
from tests.push_kit import apns, job_of, script, send_one, target_of, with_limits
from tests.support import eventually

ONE = with_limits(connections=1)


@pytest.mark.parametrize(
    ("reason", "outcome", "status"),
    [
        ("BadCollapseId", "dead", 400),
        ("BadDeviceToken", "disabled_target", 400),
        ("BadExpirationDate", "dead", 400),
        ("BadMessageId", "dead", 400),
        ("BadPriority", "dead", 400),
        ("BadTopic", "dead", 400),
        ("DeviceTokenNotForTopic", "disabled_target", 400),
        ("DuplicateHeaders", "dead", 400),
        ("IdleTimeout", "failed", 400),
        ("InvalidPushType", "dead", 400),
        ("MissingDeviceToken", "dead", 400),
        ("MissingTopic", "dead", 400),
        ("PayloadEmpty", "dead", 400),
        ("TopicDisallowed", "dead", 400),
        ("BadCertificate", "failed", 403),
        ("BadCertificateEnvironment", "failed", 403),
        ("ExpiredProviderToken", "failed", 403),
        ("Forbidden", "dead", 403),
        ("InvalidProviderToken", "failed", 403),
        ("MissingProviderToken", "failed", 403),
        ("BadPath", "dead", 404),
        ("MethodNotAllowed", "dead", 405),
        ("ExpiredToken", "invalid_target", 410),
        ("Unregistered", "invalid_target", 410),
        ("PayloadTooLarge", "dead", 413),
        ("TooManyProviderTokenUpdates", "failed", 429),
        ("TooManyRequests", "failed", 429),
        ("InternalServerError", "failed", 500),
        ("ServiceUnavailable", "failed", 503),
        ("Shutdown", "failed", 503),
    ],
)
async def test_each_reason_of_apns_has_its_outcome(reason: str, outcome: str, status: int) -> None:
    """Every row of the table, asked once."""
    async with apns() as (server, channel):
        script(server, "token-1", error=reason)
        result = await send_one(channel, job_of(provider="apns"))
        assert (result.outcome, result.status, result.error) == (outcome, status, reason)
        assert server.requests == 1


async def test_an_accepted_push_is_sent() -> None:
    """Payload and headers are what Apple documents."""
    clock = ManualClock(round(time.time() * 1000))
    async with apns(clock=clock, ttl_s=600.0) as (server, channel):
        job = job_of(7, "apns", targets=[target_of("abc", "apns", app_id="com.example.app")])
        result = await send_one(channel, job)
        assert (result.outcome, result.status) == ("sent", 200)
        (push,) = server.pushes
        assert push.target == "abc"
        assert push.notification_id == "00000000-0000-0000-0000-000000000007"
        assert push.headers == {
            "apns-id": result.provider_id,
            "apns-collapse-id": "key-7",
            "apns-push-type": "alert",
            "apns-priority": "10",
            "apns-topic": "com.example.app",
            "apns-expiration": str(clock.now_ms() // 1000 + 600),
        }


async def test_priority_expiry_and_default_topic() -> None:
    """Low priority is 5; the notification's own expiry wins; no appId means the default topic."""
    async with apns() as (server, channel):
        expires_ms = SystemClock().now_ms() + 60_000
        await send_one(channel, job_of(1, "apns", priority=0, expires_ms=expires_ms))
        (push,) = server.pushes
        assert push.headers["apns-priority"] == "5"
        assert push.headers["apns-expiration"] == str(expires_ms // 1000)
        assert push.headers["apns-topic"] == "dev.carillon.demo"


async def test_the_same_apns_id_and_collapse_id_over_tries() -> None:
    """A second try of an unknown outcome can be recognised."""
    async with apns() as (server, channel):
        key = "a key of an event that is longer than APNs allows, " * 3
        for attempt in (1, 2):
            await send_one(channel, job_of(1, "apns", attempt=attempt, collapse_key=key))
        first, second = server.pushes
        assert first.headers["apns-id"] == second.headers["apns-id"]
        assert first.collapse_key == second.collapse_key
        assert len(first.collapse_key) == 64


@pytest.mark.parametrize(
    ("registered_ms", "outcome"), [(999, "invalid_target"), (1000, "invalid_target"), (1001, "dead")]
)
async def test_410_deletes_only_what_was_registered_before_its_timestamp(
    registered_ms: int, outcome: str
) -> None:
    """A token registered again after it had become invalid is kept."""
    async with apns() as (server, channel):
        script(server, "a", error="Unregistered", timestamp=1000)
        target = target_of("a", "apns", registered_ms=registered_ms)
        assert (await send_one(channel, job_of(1, "apns", targets=[target]))).outcome == outcome


async def test_retry_after_is_passed_through() -> None:
    """The outbox obeys it."""
    async with apns() as (server, channel):
        script(server, "token-1", error="TooManyRequests", retry_after="9")
        assert (await send_one(channel, job_of(provider="apns"))).retry_after_s == 9.0


async def test_an_answer_later_than_the_timeout_is_unknown_and_sent_once() -> None:
    """No second send behind our back; the connection serves on."""
    async with apns(timeout_s=1.0) as (server, channel):
        script(server, "token-1", delay_s=1.5)
        result = await send_one(channel, job_of(1, "apns"))
        assert (result.outcome, result.error) == ("unknown", "timeout")
        await asyncio.sleep(0.8)  # the late answer arrives meanwhile
        assert (await send_one(channel, job_of(2, "apns"))).outcome == "sent"
        assert server.requests == 2
        assert server.server is not None
        assert server.server.connections_made == 1


async def test_a_try_after_a_late_answer_is_recognisable() -> None:
    """Taken, answered too late, tried again: Apple and the device see the same apns-id and collapse id."""
    async with apns(timeout_s=1.0) as (server, channel):
        script(server, "token-1", delay_s=1.5, times=1)
        late = await send_one(channel, job_of(1, "apns"))
        again = await send_one(channel, job_of(1, "apns", attempt=2))
        assert (late.outcome, again.outcome) == ("unknown", "sent")
        first, second = server.pushes
        assert first.headers["apns-id"] == second.headers["apns-id"] == late.provider_id == again.provider_id
        assert first.collapse_key == second.collapse_key == "key-1"


async def test_a_silent_provider_is_unknown() -> None:
    """No answer, ever."""
    async with apns(timeout_s=0.2) as (server, channel):
        script(server, "token-1", fault="silent")
        assert (await send_one(channel, job_of(1, "apns"))).outcome == "unknown"


async def test_rst_stream_ends_one_push_only() -> None:
    """Its neighbours on the connection are answered."""
    async with apns(limits=ONE) as (server, channel):
        server.script(Script(delay_s=0.05))
        script(server, "token-5", fault="reset")
        results = await channel.send([job_of(n, "apns") for n in range(1, 11)])
        outcomes = [row[0].outcome for row in results]
        assert outcomes == ["sent"] * 4 + ["unknown"] + ["sent"] * 5
        assert "reset" in results[4][0].error
        assert server.server is not None
        assert server.server.connections_made == 1


async def test_a_refused_stream_is_tried_again_a_bounded_number_of_times() -> None:
    """REFUSED_STREAM: not processed. Three more tries, then failed."""
    async with apns() as (server, channel):
        script(server, "token-1", fault="refuse", times=3)
        script(server, "token-2", fault="refuse")
        assert (await send_one(channel, job_of(1, "apns"))).outcome == "sent"
        result = await send_one(channel, job_of(2, "apns"))
        assert result.outcome == "failed"
        assert server.requests == 8


async def test_goaway_under_load_loses_and_duplicates_nothing() -> None:
    """Streams before the GOAWAY are answered on the old connection, later ones go over a new one."""
    async with apns(limits=ONE) as (server, channel):
        script(server, "token-100", fault="goaway", times=1)
        server.script(Script(delay_s=0.05))
        results = await channel.send([job_of(n, "apns") for n in range(1, 201)])
        assert {row[0].outcome for row in results} == {"sent"}
        received = [push.target for push in server.pushes]
        assert sorted(received) == sorted(f"token-{n}" for n in range(1, 201))
        assert {push.connection for push in server.pushes} == {1, 2}
        assert server.server is not None
        assert server.server.connections_made == 2


async def test_a_graceful_goaway_between_pushes_costs_nothing() -> None:
    """Ten of them in a row: ten connections, no failure."""
    async with apns(limits=ONE) as (server, channel):
        for n in range(1, 11):
            assert (await send_one(channel, job_of(n, "apns"))).outcome == "sent"
            server.script(Script(goaway=True))
        assert server.count == server.requests == 10
        assert server.server is not None
        await eventually(lambda: not server.server.connections)


async def test_a_dropped_connection_makes_all_in_flight_unknown() -> None:
    """Nobody can tell what the provider did with them."""
    async with apns(limits=ONE) as (server, channel):
        server.script(Script(delay_s=5.0))
        sends = asyncio.create_task(channel.send([job_of(n, "apns") for n in range(1, 21)]))
        await eventually(lambda: server.requests == 20)
        server.script(Script(disconnect=True, delay_s=0.0))
        assert {row[0].outcome for row in await sends} == {"unknown"}
        assert (await send_one(channel, job_of(30, "apns"))).outcome == "sent"


async def test_a_stalled_window_fails_after_the_timeout_and_recovers() -> None:
    """A body that flow control never let out was not processed: failed, and the connection is replaced."""
    async with apns(limits=ONE, timeout_s=1.0) as (server, channel):
        await send_one(channel, job_of(1, "apns"))
        server.script(Script(stall=True))
        assert server.server is not None
        (connection,) = server.server.connections
        await eventually(lambda: connection.stream_window == 0)
        result = await send_one(channel, job_of(2, "apns"))
        assert result.outcome == "failed"
        assert "flow control" in result.error
        assert server.requests == 1
        server.script(Script(stall=False))
        assert (await send_one(channel, job_of(3, "apns"))).outcome == "sent"
        assert server.server.connections_made == 2


async def test_pushes_wait_for_a_window_that_opens_in_time() -> None:
    """A short stall is waited out; every body arrives whole and once."""
    async with apns(limits=ONE) as (server, channel):
        await send_one(channel, job_of(1, "apns"))
        assert server.server is not None
        (connection,) = server.server.connections
        server.script(Script(stall=True))
        await eventually(lambda: connection.stream_window == 0)
        sends = asyncio.create_task(channel.send([job_of(n, "apns", body="x" * 2000) for n in range(2, 52)]))
        await eventually(lambda: connection.last_stream > 50)
        assert server.requests == 1
        server.script(Script(stall=False))
        assert {row[0].outcome for row in await sends} == {"sent"}
        assert server.count == 51
        assert server.server.connections_made == 1


async def test_five_thousand_error_answers_on_one_connection() -> None:
    """Received DATA is acknowledged: the windows never run dry."""
    async with apns(limits=ONE, timeout_s=20.0) as (server, channel):
        server.script(Script(shares=[Behaviour(error="Unregistered", share=1.0)]))
        results = await channel.send([job_of(n, "apns") for n in range(1, 5001)])
        assert {(row[0].outcome, row[0].status) for row in results} == {("invalid_target", 410)}
        assert server.requests == 5000
        assert server.server is not None
        assert server.server.connections_made == 1


async def test_large_error_bodies_do_not_exhaust_the_connections_window() -> None:
    """The same by bytes: more than our whole connection window of bodies comes back."""
    async with apns(limits=ONE) as (server, channel):
        server.error_padding = 30_000
        for n in range(1, 301):
            script(server, f"token-{n}", error="Unregistered")
        results = await channel.send([job_of(n, "apns") for n in range(1, 301)])
        assert {row[0].outcome for row in results} == {"invalid_target"}


async def test_one_provider_token_for_all_connections() -> None:
    """Four connections, one JWT: Apple refuses frequent new ones."""
    limits = with_limits(connections=4, streams_before_next=5)
    async with apns(limits=limits) as (server, channel):
        server.script(Script(delay_s=0.05, enforce_token_updates=True))
        for _ in range(4):
            results = await channel.send([job_of(n, "apns") for n in range(1, 101)])
            assert {row[0].outcome for row in results} == {"sent"}
        assert server.server is not None
        assert server.server.connections_made == 4
        assert len(server.tokens_seen) == 1


async def test_the_provider_token_is_refreshed_every_fifty_minutes() -> None:
    """Not before, and in time: Apple takes none older than an hour."""
    clock = ManualClock(round(time.time() * 1000))
    async with apns(clock=clock) as (server, channel):
        server.script(Script(enforce_token_updates=True))
        for minute in range(0, 155, 5):
            assert (await send_one(channel, job_of(minute + 1, "apns"))).outcome == "sent", minute
            clock.advance(300)
        assert len(server.tokens_seen) == 4  # at 0, 50, 100 and 150 minutes


async def test_a_token_that_apns_calls_expired_is_replaced_once() -> None:
    """The push is repeated with a new token, unless the last one is so young that Apple would refuse it."""
    clock = ManualClock(round(time.time() * 1000))
    async with apns(clock=clock) as (server, channel):
        await send_one(channel, job_of(1, "apns"))
        script(server, "token-2", error="ExpiredProviderToken", times=1)
        assert (await send_one(channel, job_of(2, "apns"))).outcome == "failed"
        clock.advance(1300)
        script(server, "token-3", error="ExpiredProviderToken", times=1)
        assert (await send_one(channel, job_of(3, "apns"))).outcome == "sent"
        assert len(server.tokens_seen) == 2


async def test_cancelling_one_send_leaves_the_others_alone() -> None:
    """Every second of fifty is cancelled: the rest arrives on the same connection, nothing twice."""
    async with apns(limits=ONE) as (server, channel):
        server.script(Script(delay_s=0.2))
        tasks = [asyncio.create_task(send_one(channel, job_of(n, "apns"))) for n in range(1, 51)]
        await eventually(lambda: server.requests == 50)
        for task in tasks[::2]:
            task.cancel()
        kept = await asyncio.gather(*tasks[1::2])
        assert [result.outcome for result in kept] == ["sent"] * 25
        assert server.requests == 50
        assert server.server is not None
        assert server.server.connections_made == 1


async def test_cancelling_sends_that_wait_for_a_free_stream() -> None:
    """They leave the queue; those behind them move up."""
    async with apns(limits=with_limits(connections=1, max_streams=5)) as (server, channel):
        server.script(Script(delay_s=0.1))
        tasks = [asyncio.create_task(send_one(channel, job_of(n, "apns"))) for n in range(1, 21)]
        await eventually(lambda: server.requests == 5)
        for task in tasks[5:15]:
            task.cancel()
        kept = await asyncio.gather(*tasks[:5], *tasks[15:])
        assert [result.outcome for result in kept] == ["sent"] * 10
        assert server.requests == 10


async def test_the_servers_limit_of_streams_is_kept() -> None:
    """Apple starts at a few: never more at once than it allows, and all arrive."""
    async with apns(limits=ONE) as (server, channel):
        server.script(Script(max_streams=3, delay_s=0.01))
        results = await channel.send([job_of(n, "apns") for n in range(1, 61)])
        assert {row[0].outcome for row in results} == {"sent"}
        assert server.server is not None
        assert server.server.most_open == 3


async def test_a_half_open_connection_is_found_by_ping_and_replaced() -> None:
    """The peer vanished without a word: silence ends the connection, pushes in flight are unknown."""
    limits = with_limits(connections=1, ping_interval_s=0.1, ping_timeout_s=0.5)
    async with apns(limits=limits) as (server, channel):
        await send_one(channel, job_of(1, "apns"))
        assert server.server is not None
        (connection,) = server.server.connections
        connection.deaf = True
        result = await send_one(channel, job_of(2, "apns"))
        assert result.outcome == "unknown"
        assert "ping" in result.error
        assert (await send_one(channel, job_of(3, "apns"))).outcome == "sent"


async def test_an_idle_connection_stays_open() -> None:
    """Pings are answered, so the next push needs no new handshake."""
    limits = with_limits(connections=1, ping_interval_s=0.05, ping_timeout_s=10.0)
    async with apns(limits=limits) as (server, channel):
        await send_one(channel, job_of(1, "apns"))
        await asyncio.sleep(0.4)
        await send_one(channel, job_of(2, "apns"))
        assert server.server is not None
        assert server.server.connections_made == 1


async def test_a_provider_that_cannot_be_reached_is_failed_soon_and_found_again() -> None:
    """Nothing was sent; once it is back, pushes go."""
    async with apns() as (server, channel):
        await send_one(channel, job_of(1, "apns"))
        assert server.server is not None
        port = server.port
        await server.server.close()
        await eventually(
            lambda: not any(pool._connections for pool in channel._pools.values()), what="the end is seen"
        )
        began = time.monotonic()
        results = await channel.send([job_of(n, "apns") for n in range(2, 12)])
        assert {row[0].outcome for row in results} == {"failed"}
        assert time.monotonic() - began < 20, "it waited for its time-out"
        await server.server.start(port=port)

        async def works() -> bool:
            return (await send_one(channel, job_of(20, "apns"))).outcome == "sent"

        await eventually(works)


async def test_a_certificate_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """Without the CA file nothing is sent."""
    async with apns() as (server, channel):
        other = ApnsChannel(
            PushSettings(
                apns_url=f"https://127.0.0.1:{server.port}",
                apns_key_file=channel.settings.apns_key_file,
                apns_key_id="CARILLON01",
                apns_team_id="CARILLON00",
                timeout_s=20.0,
            )
        )
        await other.open()
        result = await send_one(other, job_of(1, "apns"))
        await other.close()
        assert result.outcome == "failed"
        assert "certificate" in result.error.lower()
        assert server.requests == 0


async def test_sandbox_and_production_are_different_hosts() -> None:
    """By the device's environment, unless the host is overridden."""
    async with apns() as (_, channel):
        settings = PushSettings(
            apns_key_file=channel.settings.apns_key_file, apns_key_id="A", apns_team_id="T"
        )
        real = ApnsChannel(settings)
        await real.open()
        assert real.authority("production") == "api.push.apple.com"
        assert real.authority("sandbox") == "api.sandbox.push.apple.com"
        assert channel.authority("sandbox") == channel.authority("production")
        await real.close()


async def test_an_expired_notification_is_not_sent() -> None:
    """It is dropped, visibly."""
    async with apns() as (server, channel):
        result = await send_one(channel, job_of(1, "apns", expires_ms=1))
        assert (result.outcome, result.error) == ("dead", "expired")
        assert server.requests == 0


async def test_a_token_with_odd_characters_stays_one_path_segment() -> None:
    """A made-up token must not reach another path of the provider."""
    async with apns() as (server, channel):
        await send_one(channel, job_of(1, "apns", tokens=("../x?y#z",)))
        (push,) = server.pushes
        assert push.target == "..%2Fx%3Fy%23z"


@pytest.mark.parametrize("content", [None, "nonsense"])
async def test_unusable_credentials_are_told_at_start(content: str | None, tmp_path: Path) -> None:
    """Never at the first push."""
    path = tmp_path / "key.p8"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match="apns_key_file"):
        await ApnsChannel(PushSettings(apns_key_file=str(path))).open()
