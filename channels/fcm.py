"""Firebase Cloud Messaging through firebase-admin, whose requests travel over our HTTP/2 connections.

firebase-admin builds and checks the messages, and turns FCM's errors into exceptions. Two things of it are
replaced, on the instance of its messaging service and nowhere else: the URL (there is no setting for a local
server) and the HTTP client. Its own retries 500 and 503 by itself and ignores Retry-After while our outbox
owns retries, refreshes OAuth tokens on the event loop, and takes several times the CPU
(docs/adr/0006-apns-client.md).

Source: https://firebase.google.com/docs/reference/fcm/rest/v1/projects.messages and .../v1/ErrorCode.
"""

from __future__ import annotations

import asyncio
import datetime
import itertools
import logging
import urllib.parse
from typing import Any, Final

import firebase_admin
import google.auth.credentials
import google.auth.exceptions
import google.auth.transport.requests
import httpx
import msgspec
import requests
from firebase_admin import credentials, exceptions, messaging

from carillon.clock import Clock, SystemClock
from carillon.errors import SettingsError
from carillon.ids import uuid_text
from carillon.messages import PushJob, PushResult, PushTarget
from carillon.settings import PushSettings
from channels.http2 import (
    AnswerTimeoutError,
    Header,
    Http2Answer,
    Http2Limits,
    Http2Pool,
    NotProcessedError,
    UnknownResultError,
    client_tls,
)
from channels.ports import collapse_id, cut, fit, json_size, of_digest, retry_after_s, withdrawal

log = logging.getLogger(__name__)

BATCH: Final = 500
"""Messages of one `send_each_async` call; more raise ValueError."""

_MAX_TTL_S: Final = 2_419_200  # 28 days, FCM's longest
_numbers: Final = itertools.count(1)


def fcm_message(
    job: PushJob, target: PushTarget, now_ms: int, ttl_s: float, android_channels: str = ""
) -> messaging.Message:
    """The message for one target: a notification to show and the data that the app reads.

    The collapse key of an event is FCM's `collapse_key`: it replaces what waits for an offline device. An
    event without one gets none, because FCM keeps only four different keys per device and drops the rest.
    `tag` and apns-collapse-id, which replace what is *shown*, are always set: a repeated try shows once.

    Args:
        android_channels: see `push.fcm_android_channels`; "": none is named.
    """
    if job.withdraw:
        return _withdraw_message(job, target)
    identifier = uuid_text(job.notification)

    def parts(title: str, body: str | None, link: str | None) -> tuple[dict[str, str], dict[str, str]]:
        shown = {"title": title}
        if body:
            shown["body"] = body
        data = {"notificationId": identifier, "seq": str(job.seq), "type": job.type}
        if link is not None:
            data["link"] = link
        if job.vibration is False:
            data["vibration"] = "false"  # for whoever shows it itself: a foreground app, a service worker
        for name, value in of_digest(job).items():
            data[name] = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        return shown, data

    def size(*texts: Any) -> int:
        shown, data = parts(*texts)
        return json_size({"notification": shown, "data": data})

    shown, data = parts(*fit(cut(job.title, 255), job.body, job.link, size))
    left_s = float(_MAX_TTL_S)
    if job.expires_ms is not None:
        left_s = max((job.expires_ms - now_ms) / 1000, 0.0)
    urgent = job.priority >= 1
    badge = job.badge if job.badge >= 0 else None
    sound = job.sound if urgent and job.sound else None
    vibration = job.vibration if urgent else False
    message = messaging.Message(
        data=data,
        notification=messaging.Notification(title=shown["title"], body=shown.get("body")),
        android=messaging.AndroidConfig(
            collapse_key=_collapse_key(job),
            priority="high" if urgent else "normal",
            ttl=datetime.timedelta(seconds=int(min(left_s, ttl_s, _MAX_TTL_S))),
            notification=messaging.AndroidNotification(
                tag=job.collapse_key,
                notification_count=badge,
                sound=None if sound == "default" else sound,  # the app's notification channel has one
                channel_id=_android_channel(sound, vibration, android_channels),
                default_vibrate_timings=job.vibration if urgent or job.vibration is False else None,
                vibrate_timings_millis=_STILL if job.vibration is False else None,
            ),
        ),
        apns=messaging.APNSConfig(
            headers={
                "apns-collapse-id": collapse_id(job.collapse_key),
                "apns-priority": "10" if urgent else "5",
            },
            payload=messaging.APNSPayload(messaging.Aps(badge=badge, sound=sound)),
        ),
        webpush=_webpush(sound, vibration) if target.platform == "web" else None,
    )
    return _addressed(message, target)


def _addressed(message: messaging.Message, target: PushTarget) -> messaging.Message:
    # Set afterwards: the constructor warns that tokens are deprecated, yet a device that registered with a
    # token has no Firebase installation id to offer.
    if target.token_kind == "fid":  # noqa: S105
        message.fid = target.token
    else:
        message.token = target.token
    return message


_STILL: Final = [0, 0]
"""A pattern that does not vibrate. Android's library takes none of a single value; without any, a phone that
is switched to vibration vibrates in the place of the sound."""


def _android_channel(sound: str | None, vibration: bool | None, prefix: str) -> str | None:
    """The notification channel of what is to be without a sound or vibration; None: the app's own.

    From Android 8 on that decides, and nothing else in the message. A channel that the app did not create
    counts for nothing: FCM then takes the app's own.
    """
    quiet = [
        f"no_{name}"
        for name, is_off in (("sound", sound is None), ("vibration", vibration is False))
        if is_off
    ]
    return "_".join([prefix, *quiet]) if prefix and quiet else None


def _webpush(sound: str | None, vibration: bool | None) -> messaging.WebpushConfig | None:
    """How a browser is to show it. What is silent must not name a vibration (Notifications API, "silent")."""
    if sound is None:
        return messaging.WebpushConfig(notification=messaging.WebpushNotification(silent=True))
    if vibration is False:
        return messaging.WebpushConfig(notification=messaging.WebpushNotification(vibrate=[0]))
    return None


def _collapse_key(job: PushJob) -> str | None:
    return job.collapse_key if job.collapse_key != uuid_text(job.notification) else None


def _withdraw_message(job: PushJob, target: PushTarget) -> messaging.Message:
    """Data only, so that nothing is shown; values are text, so the ids are JSON in a text."""
    told = withdrawal(job)
    return _addressed(
        messaging.Message(
            data={
                "type": told["type"],
                "notificationIds": msgspec.json.encode(told["notificationIds"]).decode(),
            },
            android=messaging.AndroidConfig(collapse_key=_collapse_key(job), priority="normal"),
            apns=messaging.APNSConfig(
                headers={
                    "apns-collapse-id": collapse_id(job.collapse_key),
                    "apns-priority": "5",
                    "apns-push-type": "background",
                },
                payload=messaging.APNSPayload(messaging.Aps(content_available=True)),
            ),
        ),
        target,
    )


class FcmChannel:
    """Sends to FCM.

    Args:
        settings: service account, override of the host, deadline.
        clock: of results.
        limits: of the connections; None is the default.
    """

    provider = "fcm"

    def __init__(
        self, settings: PushSettings, clock: Clock | None = None, limits: Http2Limits | None = None
    ) -> None:
        self._settings = settings
        self._clock = clock or SystemClock()
        self._limits = limits or Http2Limits(connect_timeout_s=min(5.0, settings.timeout_s))
        self._app: firebase_admin.App | None = None
        self._client: FcmClient | None = None
        self._project = settings.fcm_project

    async def open(self) -> None:
        """See `PushChannel.open`. Connections are dialled by the first pushes."""
        settings = self._settings
        path = settings.fcm_credentials
        try:
            credential = credentials.Certificate(path)
        except OSError as exc:
            raise SettingsError(f"cannot read push.fcm_credentials {path}: {exc.strerror}") from exc
        except ValueError as exc:
            raise SettingsError(
                f"expected push.fcm_credentials {path} to be a service account: {exc}"
            ) from exc
        project = self._project = settings.fcm_project or str(credential.project_id)
        base = settings.fcm_url or "https://fcm.googleapis.com"
        if urllib.parse.urlsplit(base).scheme != "https":
            raise SettingsError(f"expected push.fcm_url to be https://host:port, got {base!r}")
        options = {"projectId": project, "httpTimeout": settings.timeout_s}
        # A name of its own: several channels of one process (tests, later several projects) do not meet.
        app = firebase_admin.initialize_app(credential, options, name=f"carillon-{next(_numbers)}")
        # firebase-admin 7.7 has no public hook; to be replaced once it takes an endpoint and a client.
        service: Any = messaging._get_messaging_service(app)
        service._fcm_url = f"{base.rstrip('/')}/v1/projects/{project}/messages:send"
        await service._async_client.aclose()
        url = urllib.parse.urlsplit(base)
        pool = Http2Pool(url.hostname or "", url.port or 443, client_tls(settings.fcm_ca_file), self._limits)
        tokens = AccessTokens(service._credential, settings.timeout_s)
        self._client = service._async_client = FcmClient(pool, tokens, settings.timeout_s)
        self._app = app

    def app_of(self, target: PushTarget) -> str:
        """See `PushChannel.app_of`: the project, one per channel."""
        return self._project

    async def close(self) -> None:
        """See `PushChannel.close`."""
        app, self._app = self._app, None
        if self._client is not None:
            await self._client.aclose()
        if app is not None:
            # In a thread, because it runs an event loop of its own.
            await asyncio.to_thread(firebase_admin.delete_app, app)

    async def send(self, jobs: list[PushJob]) -> list[list[PushResult]]:
        """See `PushChannel.send`."""
        results = [
            [PushResult(target.device, "failed", started_ms=self._clock.now_ms()) for target in job.targets]
            for job in jobs
        ]
        pending: list[tuple[messaging.Message, PushResult]] = []
        now_ms = self._clock.now_ms()
        for job, row in zip(jobs, results, strict=True):
            if job.expires_ms is not None and job.expires_ms <= now_ms:
                for result in row:
                    result.outcome, result.error = "dead", "expired"
                continue
            for target, result in zip(job.targets, row, strict=True):
                settings = self._settings
                message = fcm_message(job, target, now_ms, settings.ttl_s, settings.fcm_android_channels)
                pending.append((message, result))
        await asyncio.gather(
            *(self._send_batch(pending[at : at + BATCH]) for at in range(0, len(pending), BATCH))
        )
        return results

    async def _send_batch(self, batch: list[tuple[messaging.Message, PushResult]]) -> None:
        assert self._app is not None, "open() comes first"
        started = self._clock.monotonic()
        try:
            answer = await messaging.send_each_async([m for m, _ in batch], dry_run=False, app=self._app)
        except ValueError as exc:
            # firebase-admin refuses a message before it sends any: find the culprit, spare the others.
            if len(batch) > 1:
                await asyncio.gather(*(self._send_batch([pair]) for pair in batch))
            else:
                batch[0][1].outcome, batch[0][1].error = "dead", f"INVALID_ARGUMENT: {exc}"[:200]
            return
        except exceptions.FirebaseError as exc:
            for _, result in batch:
                result.outcome, result.error = "unknown", f"{exc.code}: {exc}"[:200]
            return
        duration_ms = (self._clock.monotonic() - started) * 1000
        for (_, result), response in zip(batch, answer.responses, strict=True):
            result.duration_ms = duration_ms
            if response.exception is None:
                result.outcome, result.status = "sent", 200
                result.provider_id = response.message_id or ""
            else:
                self._judge(response.exception, result)

    def _judge(self, exc: Exception, result: PushResult) -> None:
        """Turn an exception of firebase-admin into an outcome."""
        response: httpx.Response | None = getattr(exc, "http_response", None)
        if response is None:
            cause = getattr(exc, "cause", None)
            if isinstance(cause, OAuthError):
                result.outcome, result.error = "failed", "OAUTH"
            elif isinstance(cause, httpx.ConnectError):
                result.outcome, result.error = "failed", str(cause)[:200]
            elif isinstance(cause, httpx.TimeoutException):
                result.outcome, result.error = "unknown", "timeout"
            else:
                result.outcome, result.error = "unknown", str(cause or exc)[:200]
            return
        result.status = response.status_code
        result.retry_after_s = retry_after_s(response.headers.get("retry-after"), self._clock.now_ms())
        for kind, error, outcome in _OUTCOMES:
            if isinstance(exc, kind):
                result.error, result.outcome = error, outcome
                return
        result.error = f"HTTP {response.status_code}"
        result.outcome = "unknown" if response.status_code >= 500 else "dead"


_OUTCOMES: Final[tuple[tuple[type[Exception], str, str], ...]] = (
    # The first five are subclasses of those below: their order matters.
    (messaging.UnregisteredError, "UNREGISTERED", "invalid_target"),
    (messaging.SenderIdMismatchError, "SENDER_ID_MISMATCH", "disabled_target"),
    (messaging.QuotaExceededError, "QUOTA_EXCEEDED", "failed"),
    (messaging.ThirdPartyAuthError, "THIRD_PARTY_AUTH_ERROR", "failed"),
    (exceptions.InvalidArgumentError, "INVALID_ARGUMENT", "dead"),
    # 404 without FcmError: the project or the URL is wrong, which says nothing about the target.
    (exceptions.NotFoundError, "NOT_FOUND", "failed"),
    (exceptions.ResourceExhaustedError, "RESOURCE_EXHAUSTED", "failed"),
    (exceptions.UnauthenticatedError, "UNAUTHENTICATED", "failed"),
    (exceptions.PermissionDeniedError, "PERMISSION_DENIED", "failed"),
    (exceptions.UnavailableError, "UNAVAILABLE", "failed"),
    (exceptions.InternalError, "INTERNAL", "failed"),
)


class OAuthError(httpx.ConnectError):
    """No access token could be had, so the message was not sent."""


class AccessTokens:
    """Access tokens of a service account, fetched off the event loop, once for all that wait."""

    def __init__(self, credential: google.auth.credentials.Credentials, timeout_s: float) -> None:
        self._credential = credential
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()

    async def get(self, stale: str = "") -> str:
        """A token other than `stale`. Raises OAuthError."""
        if self._fresh(stale):
            return str(self._credential.token)
        async with self._lock:
            if not self._fresh(stale):
                try:
                    async with asyncio.timeout(self._timeout_s):
                        await asyncio.to_thread(self._fetch)
                except (google.auth.exceptions.GoogleAuthError, TimeoutError) as exc:
                    log.error("no access token for FCM: %s", exc)
                    raise OAuthError(f"no access token: {exc}") from exc
            return str(self._credential.token)

    def _fresh(self, stale: str) -> bool:
        return bool(self._credential.valid) and self._credential.token != stale

    def _fetch(self) -> None:
        with requests.Session() as session:
            self._credential.refresh(google.auth.transport.requests.Request(session))


class FcmClient:
    """Stands in for firebase-admin's `HttpxAsyncClient`: the same two methods over `Http2Pool`.

    Errors are httpx's own, which firebase-admin turns into its exceptions: ConnectError for what was not
    processed, ReadTimeout and ReadError for what may have been.
    """

    def __init__(self, pool: Http2Pool, tokens: AccessTokens, timeout_s: float) -> None:
        self._pool = pool
        self._tokens = tokens
        self._timeout_s = timeout_s

    async def request(self, method: str, url: str, *, headers: dict[str, str], json: Any) -> Any:
        """Send one message. Raises httpx.HTTPStatusError for an answer that is no success."""
        path = urllib.parse.urlsplit(url).path
        body = msgspec.json.encode(json)
        token = await self._tokens.get()
        answer = await self._try(path, headers, token, body)
        # 401 is also how FCM says that it has no good APNs key of ours: another token does not help then.
        if answer.status == 401 and b"THIRD_PARTY_AUTH_ERROR" not in answer.body:
            answer = await self._try(path, headers, await self._tokens.get(stale=token), body)
        if answer.status == 200:
            return answer
        answer_headers = [pair for pair in answer.headers.items() if pair[0] != ":status"]
        response = httpx.Response(
            answer.status, headers=answer_headers, content=answer.body, request=httpx.Request(method, url)
        )
        return response.raise_for_status()

    async def _try(self, path: str, headers: dict[str, str], token: str, body: bytes) -> Http2Answer:
        sent: list[Header] = [
            (":method", "POST"),
            (":scheme", "https"),
            (":authority", self._pool.authority),
            (":path", path),
            ("authorization", f"Bearer {token}"),
            ("content-type", "application/json"),
            *((name.lower(), value) for name, value in headers.items()),
        ]
        try:
            return await self._pool.request(sent, body, self._timeout_s)
        except NotProcessedError as exc:
            raise httpx.ConnectError(str(exc)) from exc
        except AnswerTimeoutError as exc:
            raise httpx.ReadTimeout(str(exc)) from exc
        except UnknownResultError as exc:
            raise httpx.ReadError(str(exc)) from exc

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.close()
