"""What is told to the providers: payloads within their limits, ids that stay the same."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.messages import PushJob
from carillon.settings import PushSettings
from channels.apns import apns_payload
from channels.fcm import fcm_message
from channels.ports import (
    MARKER,
    PAYLOAD_LIMIT,
    collapse_id,
    cut,
    json_size,
    provider_configured,
    retry_after_s,
    stable_id,
)
from tests.push_kit import job_of, target_of

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
LONG = st.builds(lambda text, times: (text * times)[:4096], TEXT.filter(bool), st.integers(1, 4096))


def test_an_apns_payload_carries_what_the_app_needs() -> None:
    """notificationId, seq, type and link are beside `aps`; the badge is the unread count."""
    document = json.loads(apns_payload(job_of(7, badge=5)))
    assert document == {
        "aps": {"alert": {"title": "Title", "body": "Body"}, "sound": "default", "badge": 5},
        "notificationId": str(uuid.UUID(int=7)),
        "seq": 7,
        "type": "comment",
        "link": "https://example.com/42",
    }


def test_a_push_of_low_priority_makes_no_sound() -> None:
    """Low priority shows and stays quiet."""
    assert "sound" not in json.loads(apns_payload(job_of(priority=0)))["aps"]


def test_sound_and_badge_are_the_users_choice() -> None:
    """A name of a sound, no sound, no badge: told to both providers."""
    named = json.loads(apns_payload(job_of(sound="bell")))["aps"]
    assert named["sound"] == "bell"
    bare = json.loads(apns_payload(job_of(sound="", badge=-1)))["aps"]
    assert set(bare) == {"alert"}
    message = fcm_message(job_of(sound="bell"), target_of("abc"), now_ms=1_000, ttl_s=3600.0)
    assert (message.android.notification.sound, message.apns.payload.aps.sound) == ("bell", "bell")
    message = fcm_message(job_of(sound="", badge=-1), target_of("abc"), now_ms=1_000, ttl_s=3600.0)
    assert message.android.notification.sound is message.apns.payload.aps.sound is None
    assert message.android.notification.notification_count is message.apns.payload.aps.badge is None


def fcm_json(job: PushJob, **target: str) -> dict[str, Any]:
    """A message as FCM is sent it."""
    message = fcm_message(job, target_of("abc", **target), 1_000, 3600.0, "carillon")
    return json.loads(str(message))


def test_a_push_that_is_not_to_vibrate_says_so_to_fcm() -> None:
    """A pattern that is still, a channel of the app's that is, and a word for whoever shows it itself."""
    still = fcm_json(job_of(vibration=False))
    shown = still["android"]["notification"]
    assert (shown["vibrate_timings"], shown["default_vibrate_timings"]) == (["0s", "0s"], False)
    assert shown["channel_id"] == "carillon_no_vibration"
    assert still["data"]["vibration"] == "false"
    assert "webpush" not in still


def test_a_push_that_is_to_vibrate_vibrates_as_the_phone_does() -> None:
    """The phone's own pattern; of low priority it stays still; nothing is added if nobody said a word."""
    shown = fcm_json(job_of(vibration=True))["android"]["notification"]
    assert shown["default_vibrate_timings"] is True
    assert not {"vibrate_timings", "channel_id"} & shown.keys()
    quiet = fcm_json(job_of(vibration=True, priority=0))["android"]["notification"]
    assert not {"vibrate_timings", "default_vibrate_timings"} & quiet.keys()
    plain = fcm_json(job_of())["android"]["notification"]
    assert not {"vibrate_timings", "default_vibrate_timings", "channel_id"} & plain.keys()


@pytest.mark.parametrize(
    ("sound", "vibration", "channel"),
    [
        ("", None, "carillon_no_sound"),
        ("", True, "carillon_no_sound"),
        ("", False, "carillon_no_sound_no_vibration"),
        ("bell", False, "carillon_no_vibration"),
        ("bell", True, None),
    ],
)
def test_what_is_off_names_a_notification_channel_of_android(
    sound: str, vibration: bool | None, channel: str | None
) -> None:
    """From Android 8 on the channel decides: what the user switched off has one of its own."""
    job = job_of(sound=sound, vibration=vibration)
    assert fcm_json(job)["android"]["notification"].get("channel_id") == channel
    without = fcm_message(job, target_of("abc"), now_ms=1_000, ttl_s=3600.0)
    assert without.android.notification.channel_id is None


def test_a_browser_is_told_in_its_own_words() -> None:
    """`silent` for what makes no sound (browsers refuse a pattern beside it), else a still pattern."""
    web = {"platform": "web"}
    assert fcm_json(job_of(vibration=False), **web)["webpush"]["notification"] == {"vibrate": [0]}
    assert fcm_json(job_of(sound="", vibration=False), **web)["webpush"]["notification"] == {"silent": True}
    assert "webpush" not in fcm_json(job_of(), **web)


@pytest.mark.parametrize(("sound", "vibration"), [("default", None), ("bell", True), ("", False)])
def test_a_push_of_low_priority_is_still_whatever_the_user_chose(sound: str, vibration: bool | None) -> None:
    """It names Android's channel without both, and is silent in a browser: nothing else keeps them quiet."""
    job = job_of(priority=0, sound=sound, vibration=vibration)
    shown = fcm_json(job)["android"]["notification"]
    assert shown["channel_id"] == "carillon_no_sound_no_vibration"
    assert "sound" not in shown
    assert fcm_json(job, platform="web")["webpush"]["notification"] == {"silent": True}


def test_apns_is_told_of_vibration_for_the_app_alone() -> None:
    """`aps` has no member for it; beside it an app that shows the push itself finds the user's wish."""
    assert json.loads(apns_payload(job_of(vibration=False)))["vibration"] is False
    assert "vibration" not in json.loads(apns_payload(job_of(vibration=True)))
    assert json_size(json.loads(apns_payload(job_of(vibration=False, body="x" * 5000)))) <= PAYLOAD_LIMIT


def test_an_fcm_message_carries_notification_and_data() -> None:
    """Data values are strings; ttl ends when the notification expires."""
    message = fcm_message(job_of(7, expires_ms=61_000), target_of("abc"), now_ms=1_000, ttl_s=3600.0)
    assert message.token == "abc"
    assert message.fid is None
    assert message.data == {
        "notificationId": str(uuid.UUID(int=7)),
        "seq": "7",
        "type": "comment",
        "link": "https://example.com/42",
    }
    assert (message.notification.title, message.notification.body) == ("Title", "Body")
    assert message.android.ttl.total_seconds() == 60
    assert message.android.priority == "high"
    assert message.android.collapse_key == "key-7"
    assert message.android.notification.tag == "key-7"


def test_an_installation_id_is_sent_as_fid() -> None:
    """The kind of a target decides the member it is sent in."""
    message = fcm_message(job_of(), target_of("abc", token_kind="fid"), 0, 60.0)
    assert (message.fid, message.token) == ("abc", None)


def test_a_notification_without_collapse_key_takes_no_collapse_slot_of_fcm() -> None:
    """FCM keeps four collapse keys per device: one per notification would drop the fifth while offline."""
    job = job_of(7, collapse_key=str(uuid.UUID(int=7)))
    message = fcm_message(job, target_of(), 0, 60.0)
    assert message.android.collapse_key is None
    assert message.android.notification.tag == str(uuid.UUID(int=7))


@given(title=LONG, body=st.none() | LONG, link=st.none() | LONG)
def test_every_payload_fits_the_providers_limit(title: str, body: str | None, link: str | None) -> None:
    """Whatever the texts, both payloads are at most 4,096 bytes and keep the id."""
    job = job_of(1, title=title, body=body, link=link)
    payload = apns_payload(job)
    assert len(payload) <= PAYLOAD_LIMIT
    assert json.loads(payload)["notificationId"] == str(uuid.UUID(int=1))
    message = fcm_message(job, target_of(), 0, 60.0)
    shown = {"title": message.notification.title}
    if message.notification.body:
        shown["body"] = message.notification.body
    assert json_size({"notification": shown, "data": message.data}) <= PAYLOAD_LIMIT


def test_a_long_body_is_cut_with_a_marker_as_late_as_possible() -> None:
    """The cut text ends with the marker and one character more would not have fitted."""
    payload = apns_payload(job_of(body="ä" * 4096))
    body = json.loads(payload)["aps"]["alert"]["body"]
    assert body.endswith("ä" + MARKER)
    assert PAYLOAD_LIMIT - 2 < len(payload) <= PAYLOAD_LIMIT


def test_a_body_that_fits_is_not_touched() -> None:
    """No marker without need."""
    assert json.loads(apns_payload(job_of(body="x" * 3000)))["aps"]["alert"]["body"] == "x" * 3000


def test_a_link_too_long_for_any_payload_goes_before_the_title() -> None:
    """The app gets the link by notificationId."""
    document = json.loads(apns_payload(job_of(link="https://example.com/" + "x" * 5000)))
    assert "link" not in document
    assert document["aps"]["alert"] == {"title": "Title", "body": "Body"}


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        ("hello", 5, "hello"),
        ("hello world", 8, "hello w…"),
        ("hello world", 7, "hello…"),  # no space before the marker
        ("ae\u0301bc", 3, "a…"),  # the accent does not lose its letter
        ("a👩\u200d👩\u200d👧b", 4, "a👩…"),  # no joiner is left hanging
        ("👍", 1, "👍"),
    ],
)
def test_a_cut_leaves_whole_characters(text: str, length: int, expected: str) -> None:
    """Combined characters are kept or dropped as one."""
    assert cut(text, length) == expected


def test_an_id_is_stable_over_tries_and_differs_per_device() -> None:
    """A repeated try has the same apns-id; another device or delivery another one."""
    first, second = target_of("a"), target_of("b")
    assert stable_id(job_of(1), first) == stable_id(job_of(1, attempt=4), first)
    assert stable_id(job_of(1), first) != stable_id(job_of(1), second)
    assert stable_id(job_of(1), first) != stable_id(job_of(2), first)


@given(TEXT.filter(bool))
def test_a_collapse_id_always_fits_a_header(key: str) -> None:
    """At most 64 bytes of printable ASCII, and the same for the same key."""
    made = collapse_id(key)
    assert 0 < len(made.encode()) <= 64
    assert made.isascii()
    assert made.isprintable()
    assert made == collapse_id(key)


def test_a_collapse_key_of_64_bytes_is_itself_and_a_longer_one_is_hashed() -> None:
    """The boundary; two long keys with a common beginning do not collide."""
    assert collapse_id("k" * 64) == "k" * 64
    assert collapse_id("k" * 64 + "1") != collapse_id("k" * 64 + "2")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0.0),
        ("", 0.0),
        ("7", 7.0),
        (" 7 ", 7.0),
        ("-1", 0.0),
        ("soon", 0.0),
        ("99999999999999999999", 86_400.0),
        ("Tue, 14 Nov 2023 22:13:30 GMT", 10.0),
        ("Tue, 14 Nov 2023 22:13:10 GMT", 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float) -> None:
    """RFC 9110 10.2.3; nonsense means nothing was asked for."""
    assert retry_after_s(value, now_ms=1_700_000_000_000) == seconds


def test_a_provider_without_credentials_is_not_configured() -> None:
    """A pool is started only for a provider that can be asked."""
    assert not provider_configured(PushSettings(), "fcm")
    assert not provider_configured(PushSettings(), "apns")
    assert not provider_configured(PushSettings(apns_key_file="k.p8", apns_key_id="A"), "apns")
    assert not provider_configured(PushSettings(fcm_credentials="a.json"), "webpush")
    assert provider_configured(PushSettings(fcm_credentials="a.json"), "fcm")
    assert provider_configured(PushSettings(apns_key_file="k", apns_key_id="A", apns_team_id="T"), "apns")


def test_a_withdrawal_is_silent() -> None:
    """Nothing to show: FCM data only, APNs background of priority 5; the ids are all the app gets."""
    identifier = str(uuid.UUID(int=7))
    document = json.loads(apns_payload(job_of(7, withdraw=True)))
    assert document == {
        "aps": {"content-available": 1}, "type": "WITHDRAW", "notificationIds": [identifier],
    }  # fmt: skip
    message = fcm_message(job_of(7, withdraw=True), target_of("abc"), now_ms=1_000, ttl_s=3600.0)
    assert (message.token, message.notification, message.android.notification) == ("abc", None, None)
    assert message.data == {"type": "WITHDRAW", "notificationIds": json.dumps([identifier])}
    assert message.apns.headers == {
        "apns-collapse-id": "key-7", "apns-priority": "5", "apns-push-type": "background",
    }  # fmt: skip
    assert message.apns.payload.aps.content_available is True
