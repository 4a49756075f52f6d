"""The FCM channel, through firebase-admin, against a server that speaks FCM's protocol."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from carillon.clock import ManualClock, SystemClock
from carillon.errors import SettingsError
from carillon.settings import PushSettings
from carillon.testing.provider_server import Behaviour, Script
from channels.fcm import FcmChannel
from channels.http2 import Http2Limits
from tests.push_kit import fcm, folder, job_of, script, send_one, target_of
from tests.support import eventually


@pytest.mark.parametrize(
    ("behaviour", "outcome", "status", "error"),
    [
        ({"error": "UNREGISTERED"}, "invalid_target", 404, "UNREGISTERED"),
        ({"error": "UNREGISTERED", "plain": True}, "failed", 404, "NOT_FOUND"),
        ({"error": "INVALID_ARGUMENT"}, "dead", 400, "INVALID_ARGUMENT"),
        ({"error": "SENDER_ID_MISMATCH"}, "disabled_target", 403, "SENDER_ID_MISMATCH"),
        ({"error": "PERMISSION_DENIED"}, "failed", 403, "PERMISSION_DENIED"),
        ({"error": "QUOTA_EXCEEDED"}, "failed", 429, "QUOTA_EXCEEDED"),
        ({"error": "UNAVAILABLE"}, "failed", 503, "UNAVAILABLE"),
        ({"error": "INTERNAL"}, "failed", 500, "INTERNAL"),
        ({"error": "THIRD_PARTY_AUTH_ERROR"}, "failed", 401, "THIRD_PARTY_AUTH_ERROR"),
        ({"status": 502}, "unknown", 502, "HTTP 502"),
        ({"status": 418}, "dead", 418, "HTTP 418"),
    ],
)
async def test_each_error_of_fcm_has_its_outcome(
    behaviour: dict[str, object], outcome: str, status: int, error: str
) -> None:
    """Every row of the table, asked once: the library's own retries are off."""
    async with fcm() as (server, channel):
        script(server, "token-1", **behaviour)
        result = await send_one(channel, job_of())
        assert (result.outcome, result.status, result.error) == (outcome, status, error)
        assert server.requests == 1


async def test_an_accepted_push_is_sent() -> None:
    """What the provider received is what the job said; the result carries its message id."""
    async with fcm() as (server, channel):
        result = await send_one(channel, job_of(7))
        assert (result.outcome, result.status, result.device) == ("sent", 200, "device-of-token-7")
        assert result.provider_id.startswith("projects/carillon-demo/messages/")
        assert result.duration_ms > 0
        (push,) = server.pushes
        assert push.target == "token-7"
        assert push.payload["notification"] == {"title": "Title", "body": "Body"}
        assert push.payload["data"]["seq"] == "7"
        assert push.payload["android"]["priority"] == "high"
        assert push.payload["apns"]["payload"]["aps"]["badge"] == 3
        assert push.collapse_key == "key-7"


async def test_what_a_user_switched_off_reaches_the_provider() -> None:
    """No sound, no vibration: FCM is sent both, as the settings name the app's channels."""
    async with fcm(fcm_android_channels="app") as (server, channel):
        assert (await send_one(channel, job_of(7, sound="", vibration=False))).outcome == "sent"
        (push,) = server.pushes
        shown = push.payload["android"]["notification"]
        assert shown["vibrate_timings"] == ["0s", "0s"]
        assert shown["channel_id"] == "app_no_sound_no_vibration"
        assert push.payload["data"]["vibration"] == "false"
        assert "sound" not in shown


async def test_a_push_of_low_priority_reaches_the_provider_as_a_still_one() -> None:
    """Android 8 and browsers make a noise of whatever does not say that it wants none."""
    async with fcm(fcm_android_channels="app") as (server, channel):
        targets = [target_of("phone"), target_of("page", platform="web")]
        (results,) = await channel.send([job_of(7, priority=0, targets=targets)])
        assert [result.outcome for result in results] == ["sent"] * 2
        pushes = {push.target: push.payload for push in server.pushes}
        assert pushes["phone"]["android"]["notification"]["channel_id"] == "app_no_sound_no_vibration"
        assert "webpush" not in pushes["phone"]
        assert pushes["page"]["webpush"]["notification"] == {"silent": True}


async def test_fids_and_tokens_go_in_one_call() -> None:
    """Results come back per job and target, in order, whatever kind they are."""
    async with fcm() as (server, channel):
        script(server, "b", error="UNREGISTERED")
        jobs = [
            job_of(1, targets=[target_of("a", token_kind="fid"), target_of("b"), target_of("c")]),
            job_of(2, tokens=("d",)),
        ]
        results = await channel.send(jobs)
        assert [[r.outcome for r in row] for row in results] == [["sent", "invalid_target", "sent"], ["sent"]]
        assert [r.device for r in results[0]] == ["device-of-a", "device-of-b", "device-of-c"]
        assert {push.target for push in server.pushes} == {"a", "c", "d"}
        assert next(push for push in server.pushes if push.target == "a").payload["fid"] == "a"


async def test_more_targets_than_one_call_takes() -> None:
    """1,201 targets travel in three calls of at most 500."""
    async with fcm() as (server, channel):
        (results,) = await channel.send([job_of(1, tokens=tuple(f"t{i}" for i in range(1201)))])
        assert [r.outcome for r in results] == ["sent"] * 1201
        assert server.count == 1201


async def test_a_message_that_firebase_refuses_harms_only_itself() -> None:
    """The library raises for a whole call; the culprit is found and is dead."""
    async with fcm() as (server, channel):
        bad = target_of("")
        results = await channel.send([job_of(1), job_of(2, targets=[bad]), job_of(3)])
        assert [row[0].outcome for row in results] == ["sent", "dead", "sent"]
        assert "INVALID_ARGUMENT" in results[1][0].error
        assert server.count == 2


@pytest.mark.parametrize("value", ["17", None])
async def test_retry_after_is_passed_through(value: str | None) -> None:
    """The outbox obeys it; without the header nothing is invented."""
    async with fcm() as (server, channel):
        script(server, "token-1", error="QUOTA_EXCEEDED", retry_after=value)
        assert (await send_one(channel, job_of())).retry_after_s == float(value or 0)


async def test_an_answer_later_than_the_timeout_is_unknown() -> None:
    """The provider took it, we cannot know; the connection serves on and the late answer disturbs nobody."""
    async with fcm(timeout_s=1.5) as (server, channel):
        script(server, "token-1", delay_s=2.0)
        result = await send_one(channel, job_of(1))
        assert (result.outcome, result.error, result.status) == ("unknown", "timeout", 0)
        assert server.count == 1
        assert (await send_one(channel, job_of(2))).outcome == "sent"
        await asyncio.sleep(0.8)  # the late answer arrives meanwhile
        assert (await send_one(channel, job_of(3))).outcome == "sent"
        assert server.server is not None
        assert server.server.connections_made == 1


async def test_a_try_after_a_late_answer_replaces_what_is_shown() -> None:
    """Taken, answered too late, tried again: tag and apns-collapse-id are the same, so a device shows one."""
    async with fcm(timeout_s=1.5) as (server, channel):
        await send_one(channel, job_of(9))
        script(server, "token-1", delay_s=2.0, times=1)
        late = await send_one(channel, job_of(1))
        again = await send_one(channel, job_of(1, attempt=2))
        assert (late.outcome, again.outcome) == ("unknown", "sent")
        _, first, second = (push.payload for push in server.pushes)
        assert first["android"]["notification"]["tag"] == second["android"]["notification"]["tag"] == "key-1"
        assert first["apns"]["headers"] == second["apns"]["headers"]
        assert first["data"]["notificationId"] == second["data"]["notificationId"]


async def test_five_thousand_unregistered_tokens_in_a_row() -> None:
    """Every one is told apart from a failure, on one connection whose windows never run dry."""
    async with fcm(limits=Http2Limits(connections=1), timeout_s=30.0) as (server, channel):
        server.script(Script(shares=[Behaviour(error="UNREGISTERED", share=1.0)]))
        results = await channel.send([job_of(n) for n in range(1, 5001)])
        assert {(row[0].outcome, row[0].error) for row in results} == {("invalid_target", "UNREGISTERED")}
        assert server.requests == 5000
        assert server.server is not None
        assert server.server.connections_made == 1


async def test_a_stalled_window_fails_after_the_timeout_and_recovers() -> None:
    """A body that flow control never let out was not processed; the next push uses another connection."""
    async with fcm(limits=Http2Limits(connections=1, redial_min_s=0.01), timeout_s=1.5) as (server, channel):
        await send_one(channel, job_of(1))
        server.script(Script(stall=True))
        assert server.server is not None
        (connection,) = server.server.connections
        await eventually(lambda: connection.stream_window == 0)
        result = await send_one(channel, job_of(2))
        assert (result.outcome, result.status) == ("failed", 0)
        assert "flow control" in result.error
        assert server.count == 1
        server.script(Script(stall=False))
        assert (await send_one(channel, job_of(3))).outcome == "sent"
        assert server.server.connections_made == 2


async def test_goaway_under_load_loses_and_duplicates_nothing() -> None:
    """A hundred in flight: what is before the GOAWAY is answered, the rest goes over another connection."""
    async with fcm(limits=Http2Limits(connections=1, redial_min_s=0.01)) as (server, channel):
        await send_one(channel, job_of(1000))
        script(server, "token-50", fault="goaway", times=1)
        server.script(Script(delay_s=0.05))
        results = await channel.send([job_of(n) for n in range(1, 101)])
        assert {row[0].outcome for row in results} == {"sent"}
        received = [push.target for push in server.pushes]
        assert sorted(received) == sorted(f"token-{n}" for n in [*range(1, 101), 1000])


async def test_a_reset_stream_is_unknown_and_a_refused_one_is_tried_again() -> None:
    """RST_STREAM REFUSED_STREAM says that nothing was processed; any other code says nothing."""
    async with fcm() as (server, channel):
        script(server, "token-1", fault="reset")
        script(server, "token-2", fault="refuse", times=2)
        assert (await send_one(channel, job_of(1))).outcome == "unknown"
        assert (await send_one(channel, job_of(2))).outcome == "sent"
        assert server.requests == 4


async def test_a_lost_connection_is_unknown() -> None:
    """And the next push opens a new one."""
    async with fcm() as (server, channel):
        script(server, "token-1", fault="disconnect")
        assert (await send_one(channel, job_of(1))).outcome == "unknown"
        assert (await send_one(channel, job_of(2))).outcome == "sent"


async def test_goaway_moves_what_was_not_processed() -> None:
    """A stream that GOAWAY names as not processed goes over a new connection, without a duplicate."""
    async with fcm() as (server, channel):
        script(server, "token-1", fault="goaway", times=1)
        assert (await send_one(channel, job_of(1))).outcome == "sent"
        assert server.count == 1
        assert server.server is not None
        assert server.server.connections_made == 2


async def test_a_provider_that_cannot_be_reached_is_failed() -> None:
    """Nothing was sent, so trying again cannot duplicate."""
    async with fcm() as (server, channel):
        assert (await send_one(channel, job_of(1))).outcome == "sent"
        assert server.server is not None
        await server.server.close()

        async def failed() -> bool:
            # The very first may still go out on the connection that is just being lost: unknown.
            result = await send_one(channel, job_of(2))
            return (result.outcome, result.status) == ("failed", 0)

        await eventually(failed)
        assert server.count == 1


async def test_one_access_token_serves_all_and_is_fetched_once() -> None:
    """A hundred first pushes wait for one request to the token endpoint."""
    async with fcm() as (server, channel):
        results = await channel.send([job_of(n) for n in range(1, 101)])
        assert {row[0].outcome for row in results} == {"sent"}
        assert server.tokens_issued == 1


async def test_a_revoked_access_token_is_replaced_and_the_push_sent() -> None:
    """401 fetches another token, once for all that were refused."""
    async with fcm() as (server, channel):
        await send_one(channel, job_of(1))
        server.script(Script(revoke_tokens=True))
        results = await channel.send([job_of(n) for n in range(2, 30)])
        assert {row[0].outcome for row in results} == {"sent"}
        assert server.tokens_issued == 2


async def test_no_good_apns_key_at_fcm_fetches_no_new_token() -> None:
    """THIRD_PARTY_AUTH_ERROR is a 401 too, but not about our token."""
    async with fcm() as (server, channel):
        script(server, "token-1", error="THIRD_PARTY_AUTH_ERROR")
        await send_one(channel, job_of(1))
        await send_one(channel, job_of(1))
        assert server.tokens_issued == 1


async def test_an_account_that_google_refuses_fails_without_sending() -> None:
    """The token endpoint rejects the signature: outcome failed, error OAUTH, the loop is not blocked."""
    async with fcm() as (server, _):
        other = FcmChannel(
            PushSettings(
                fcm_url="https://127.0.0.1:1",
                fcm_credentials=str(_account_with_another_key(server.token_uri)),
                timeout_s=20.0,
            )
        )
        await other.open()
        result = await send_one(other, job_of())
        await other.close()
        assert (result.outcome, result.error) == ("failed", "OAUTH")
        assert server.requests == 0


def _account_with_another_key(token_uri: str) -> Path:
    from carillon.testing.provider_credentials import write_service_account

    path = folder() / "another" / "account.json"
    write_service_account(path, token_uri)
    return path


async def test_cancelling_one_send_leaves_the_others_alone() -> None:
    """Fifty in flight on one connection, every second one cancelled: the rest arrives, nothing twice."""
    async with fcm(limits=Http2Limits(connections=1)) as (server, channel):
        await send_one(channel, job_of(1000))
        server.script(Script(delay_s=0.2))
        tasks = [asyncio.create_task(send_one(channel, job_of(n))) for n in range(1, 51)]
        await eventually(lambda: server.requests == 51)
        for task in tasks[::2]:
            task.cancel()
        kept = await asyncio.gather(*tasks[1::2])
        assert [result.outcome for result in kept] == ["sent"] * 25
        assert server.server is not None
        assert server.server.connections_made == 1
        assert server.requests == 51


async def test_an_expired_notification_is_not_sent() -> None:
    """It is dropped, visibly."""
    async with fcm() as (server, channel):
        result = await send_one(channel, job_of(expires_ms=1))
        assert (result.outcome, result.error) == ("dead", "expired")
        assert server.requests == 0


async def test_a_random_share_of_errors() -> None:
    """The script of the demo: some fail, the others are sent, and the sums agree."""
    async with fcm() as (server, channel):
        server.script(Script(shares=[Behaviour(error="UNAVAILABLE", share=0.3)], seed=7))
        results = await channel.send([job_of(n) for n in range(1, 201)])
        sent = sum(row[0].outcome == "sent" for row in results)
        assert 100 < sent < 180
        assert sent == server.count
        assert server.rejected == {"UNAVAILABLE": 200 - sent}


async def test_two_channels_in_one_process_do_not_meet() -> None:
    """Each has its own server, project and token; no module state is shared."""
    async with fcm() as (server, channel), fcm() as (other_server, other):
        await asyncio.gather(send_one(channel, job_of(1)), send_one(other, job_of(2)))
        assert [push.target for push in server.pushes] == ["token-1"]
        assert [push.target for push in other_server.pushes] == ["token-2"]


@pytest.mark.parametrize(
    "content", [None, "{}", "not json", json.dumps({"type": "service_account", "project_id": "x"})]
)
async def test_unusable_credentials_are_told_at_start(content: str | None, tmp_path: Path) -> None:
    """Never at the first push."""
    path = tmp_path / "account.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match="fcm_credentials"):
        await FcmChannel(PushSettings(fcm_credentials=str(path)), SystemClock()).open()


async def test_durations_and_start_are_of_the_injected_clock() -> None:
    """Time comes through the clock only."""
    clock = ManualClock(round(time.time() * 1000))
    async with fcm(clock=clock) as (_, channel):
        result = await send_one(channel, job_of())
        assert (result.outcome, result.started_ms, result.duration_ms) == ("sent", clock.now_ms(), 0.0)
