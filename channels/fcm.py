"""Firebase Cloud Messaging through firebase-admin, whose requests travel over our HTTP/2 connections.

firebase-admin builds and checks the messages, and turns FCM's errors into exceptions. Three things of it are
replaced, on the instance of its messaging service and nowhere else: the URL (there is no setting for a local
server), the transport (its own retries 500 and 503 by itself and ignores Retry-After; our outbox owns
retries) and the refresh of OAuth tokens (its own blocks the event loop).

Source: https://firebase.google.com/docs/reference/fcm/rest/v1/projects.messages and .../v1/ErrorCode.
"""

from __future__ import annotations

import asyncio
import datetime
import itertools
import logging
import ssl
import urllib.parse
from collections.abc import AsyncGenerator
from typing import Any, Final

import firebase_admin
import google.auth.credentials
import google.auth.exceptions
import google.auth.transport.requests
import httpx
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
    Http2Limits,
    Http2Pool,
    NotProcessedError,
    UnknownResultError,
    client_tls,
    secret_header,
)
from channels.ports import collapse_id, cut, fit, json_size, retry_after_s

log = logging.getLogger(__name__)

BATCH: Final = 500
"""Messages of one `send_each_async` call; more raise ValueError."""

_MAX_TTL_S: Final = 2_419_200  # 28 days, FCM's longest
_SKIPPED_HEADERS: Final = frozenset({"host", "connection", "transfer-encoding", "accept-encoding"})
_numbers: Final = itertools.count(1)


def fcm_message(job: PushJob, target: PushTarget, now_ms: int, ttl_s: float) -> messaging.Message:
    """The message for one target: a notification to show and the data that the app reads.

    The collapse key of an event is FCM's `collapse_key`: it replaces what waits for an offline device. An
    event without one gets none, because FCM keeps only four different keys per device and drops the rest.
    `tag` and apns-collapse-id, which replace what is *shown*, are always set: a repeated try shows once.
    """
    identifier = uuid_text(job.notification)

    def parts(title: str, body: str | None, link: str | None) -> tuple[dict[str, str], dict[str, str]]:
        shown = {"title": title}
        if body:
            shown["body"] = body
        data = {"notificationId": identifier, "seq": str(job.seq), "type": job.type}
        if link is not None:
            data["link"] = link
        return shown, data

    def size(*texts: Any) -> int:
        shown, data = parts(*texts)
        return json_size({"notification": shown, "data": data})

    shown, data = parts(*fit(cut(job.title, 255), job.body, job.link, size))
    left_s = float(_MAX_TTL_S)
    if job.expires_ms is not None:
        left_s = max((job.expires_ms - now_ms) / 1000, 0.0)
    urgent = job.priority >= 1
    badge = max(job.badge, 0)
    collapse = job.collapse_key if job.collapse_key != identifier else None
    message = messaging.Message(
        data=data,
        notification=messaging.Notification(title=shown["title"], body=shown.get("body")),
        android=messaging.AndroidConfig(
            collapse_key=collapse,
            priority="high" if urgent else "normal",
            ttl=datetime.timedelta(seconds=int(min(left_s, ttl_s, _MAX_TTL_S))),
            notification=messaging.AndroidNotification(tag=job.collapse_key, notification_count=badge),
        ),
        apns=messaging.APNSConfig(
            headers={
                "apns-collapse-id": collapse_id(job.collapse_key),
                "apns-priority": "10" if urgent else "5",
            },
            payload=messaging.APNSPayload(messaging.Aps(badge=badge, sound="default" if urgent else None)),
        ),
    )
    # Set afterwards: the constructor warns that tokens are deprecated, yet a device that registered with a
    # token has no Firebase installation id to offer.
    if target.token_kind == "fid":  # noqa: S105
        message.fid = target.token
    else:
        message.token = target.token
    return message


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
        self._transport: FcmTransport | None = None

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
        project = settings.fcm_project or credential.project_id
        base = settings.fcm_url or "https://fcm.googleapis.com"
        if urllib.parse.urlsplit(base).scheme != "https":
            raise SettingsError(f"expected push.fcm_url to be https://host:port, got {base!r}")
        options = {"projectId": project, "httpTimeout": settings.timeout_s}
        # A name of its own: several channels of one process (tests, later several projects) do not meet.
        app = firebase_admin.initialize_app(credential, options, name=f"carillon-{next(_numbers)}")
        self._transport = FcmTransport(client_tls(settings.fcm_ca_file), settings.timeout_s, self._limits)
        # firebase-admin 7.7 has no public hook; to be replaced once it takes an endpoint and a transport.
        service: Any = messaging._get_messaging_service(app)
        service._fcm_url = f"{base.rstrip('/')}/v1/projects/{project}/messages:send"
        await service._async_client.aclose()
        service._async_client._async_client = httpx.AsyncClient(
            transport=self._transport,
            auth=_OAuth(service._credential, settings.timeout_s),
            headers=dict(service._async_client._headers),
            timeout=settings.timeout_s,
            follow_redirects=False,
            trust_env=False,
        )
        self._app = app

    async def close(self) -> None:
        """See `PushChannel.close`."""
        app, self._app = self._app, None
        if self._transport is not None:
            await self._transport.aclose()
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
                pending.append((fcm_message(job, target, now_ms, self._settings.ttl_s), result))
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


class _OAuth(httpx.Auth):
    """Bearer tokens of a service account, fetched off the event loop, once for all that wait."""

    requires_response_body = True

    def __init__(self, credential: google.auth.credentials.Credentials, timeout_s: float) -> None:
        self._credential = credential
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        token = self._credential.token if self._credential.valid else await self._refresh(None)
        request.headers["authorization"] = f"Bearer {token}"
        response = yield request
        # 401 is also how FCM says that it has no good APNs key of ours: another token does not help then.
        if response.status_code == 401 and b"THIRD_PARTY_AUTH_ERROR" not in response.content:
            request.headers["authorization"] = f"Bearer {await self._refresh(token)}"
            yield request

    async def _refresh(self, stale: str | None) -> str:
        """A token other than `stale`."""
        async with self._lock:
            if not self._credential.valid or self._credential.token == stale:
                try:
                    async with asyncio.timeout(self._timeout_s):
                        await asyncio.to_thread(self._fetch)
                except (google.auth.exceptions.GoogleAuthError, TimeoutError) as exc:
                    log.error("no access token for FCM: %s", exc)
                    raise OAuthError(f"no access token: {exc}") from exc
            return str(self._credential.token)

    def _fetch(self) -> None:
        with requests.Session() as session:
            self._credential.refresh(google.auth.transport.requests.Request(session))


class FcmTransport(httpx.AsyncBaseTransport):
    """httpx over `Http2Pool`: tells apart what was not processed, and cancels one request alone."""

    def __init__(self, tls: ssl.SSLContext, timeout_s: float, limits: Http2Limits) -> None:
        self._tls = tls
        self._timeout_s = timeout_s
        self._limits = limits
        self._pools: dict[tuple[str, int], Http2Pool] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request. Raises ConnectError (not processed), ReadTimeout or ReadError (unknown)."""
        url = request.url
        place = (url.host, url.port or 443)
        pool = self._pools.get(place)
        if pool is None:
            pool = self._pools[place] = Http2Pool(*place, self._tls, self._limits)
        headers: list[Header] = [
            (":method", request.method),
            (":scheme", "https"),
            (":authority", pool.authority),
            (":path", url.raw_path.decode("ascii")),
        ]
        for name, value in request.headers.items():
            if name == "content-length":
                headers.append(secret_header(name, value))
            elif name not in _SKIPPED_HEADERS:
                headers.append((name, value))
        try:
            answer = await pool.request(headers, request.content, self._timeout_s)
        except NotProcessedError as exc:
            raise httpx.ConnectError(str(exc), request=request) from exc
        except AnswerTimeoutError as exc:
            raise httpx.ReadTimeout(str(exc), request=request) from exc
        except UnknownResultError as exc:
            raise httpx.ReadError(str(exc), request=request) from exc
        answer_headers = [pair for pair in answer.headers.items() if pair[0] != ":status"]
        return httpx.Response(answer.status, headers=answer_headers, content=answer.body, request=request)

    async def aclose(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            await pool.close()
