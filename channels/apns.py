"""Apple Push Notification service, over a client of our own on HTTP/2 (docs/adr/0006-apns-client.md).

Source: Apple, "Sending notification requests to APNs" and "Handling notification responses from APNs".
"""

from __future__ import annotations

import asyncio
import logging
import urllib.parse
from pathlib import Path
from typing import Any, Final

import jwt
import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

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
    secret_header,
)
from channels.ports import (
    collapse_id,
    cut,
    fit,
    json_size,
    of_digest,
    retry_after_s,
    stable_id,
    withdrawal,
)

log = logging.getLogger(__name__)

HOSTS: Final = {"production": "api.push.apple.com", "sandbox": "api.sandbox.push.apple.com"}

_DISABLE: Final = frozenset({"BadDeviceToken", "DeviceTokenNotForTopic"})
"""The target cannot work with what we are configured for (wrong environment or app). Disabled, not deleted: a
wrong setting of ours must not erase valid targets."""
_RETRY: Final = frozenset(
    {
        "TooManyRequests", "TooManyProviderTokenUpdates", "ExpiredProviderToken", "InvalidProviderToken",
        "MissingProviderToken", "BadCertificate", "BadCertificateEnvironment", "IdleTimeout",
    }
)  # fmt: skip
"""Beside every 5xx: reasons that are about the moment or about our credentials, not about this push."""


class ProviderToken:
    """The JWT that authenticates us, one for all connections of this process.

    Apple refuses tokens older than an hour and more than one new token within 20 minutes.

    Args:
        key_file: .p8 file.
        refresh_s: age at which a new token is made.
    """

    def __init__(self, key_file: Path, key_id: str, team_id: str, refresh_s: float, clock: Clock) -> None:
        try:
            key = serialization.load_pem_private_key(key_file.read_bytes(), None)
        except OSError as exc:
            raise SettingsError(f"cannot read push.apns_key_file {key_file}: {exc.strerror}") from exc
        except (ValueError, TypeError) as exc:
            raise SettingsError(f"expected push.apns_key_file {key_file} to be a .p8 key: {exc}") from exc
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise SettingsError(f"expected push.apns_key_file {key_file} to hold an EC key")
        self._key = key
        self._key_id = key_id
        self._team_id = team_id
        self._refresh_s = refresh_s
        self._clock = clock
        self._header = ""
        self._made_at = 0.0
        self.made = 0
        """Tokens made so far."""

    def header(self) -> str:
        """Value of the authorization header."""
        now = self._clock.monotonic()
        if not self._header or now - self._made_at >= self._refresh_s:
            self._make(now)
        return self._header

    def refused(self, header: str, min_age_s: float) -> bool:
        """APNs called `header` expired. Make a new token unless that was done already or just now.

        Returns:
            True if another token is there to try with.
        """
        now = self._clock.monotonic()
        if header == self._header:
            if now - self._made_at < min_age_s:
                return False  # Apple would refuse a second new token; the clock of this machine may be wrong
            self._make(now)
        return True

    def _make(self, now: float) -> None:
        claims = {"iss": self._team_id, "iat": self._clock.now_ms() // 1000}
        token = jwt.encode(claims, self._key, algorithm="ES256", headers={"kid": self._key_id})
        self._header = f"bearer {token}"
        self._made_at = now
        self.made += 1


def apns_payload(job: PushJob) -> bytes:
    """The JSON body of a push, at most 4,096 bytes: texts that do not fit are cut."""
    if job.withdraw:
        return msgspec.json.encode({"aps": {"content-available": 1}, **withdrawal(job)})

    def document(title: str, body: str | None, link: str | None) -> dict[str, Any]:
        alert: dict[str, str] = {"title": title}
        if body:
            alert["body"] = body
        aps: dict[str, Any] = {"alert": alert}
        if job.sound and job.priority >= 1:
            aps["sound"] = job.sound
        if job.badge >= 0:
            aps["badge"] = job.badge
        made: dict[str, Any] = {
            "aps": aps,
            "notificationId": uuid_text(job.notification),
            "seq": job.seq,
            "type": job.type,
        }
        if link is not None:
            made["link"] = link
        if job.vibration is False:
            made["vibration"] = False  # iOS has no such member: for an app that shows it itself
        return made | of_digest(job)

    texts = fit(cut(job.title, 255), job.body, job.link, lambda *texts: json_size(document(*texts)))
    return msgspec.json.encode(document(*texts))


class ApnsChannel:
    """Sends to APNs.

    Args:
        settings: credentials, override of the host, deadline, number of connections.
        clock: of tokens and results.
        limits: of the connections; None derives them from the settings.
    """

    provider = "apns"

    def __init__(
        self, settings: PushSettings, clock: Clock | None = None, limits: Http2Limits | None = None
    ) -> None:
        self.settings = settings
        self._clock = clock or SystemClock()
        self._limits = limits or Http2Limits(
            connections=settings.apns_connections, connect_timeout_s=min(5.0, settings.timeout_s)
        )
        self._pools: dict[str, Http2Pool] = {}
        self._token: ProviderToken | None = None

    async def open(self) -> None:
        """See `PushChannel.open`. Connections are dialled by the first pushes."""
        settings = self.settings
        self._token = ProviderToken(
            Path(settings.apns_key_file),
            settings.apns_key_id,
            settings.apns_team_id,
            settings.apns_token_refresh_s,
            self._clock,
        )
        if settings.apns_url:
            url = urllib.parse.urlsplit(settings.apns_url)
            if url.scheme != "https" or not url.hostname:
                raise SettingsError(
                    f"expected push.apns_url to be https://host:port, got {settings.apns_url!r}"
                )
            override = Http2Pool(
                url.hostname, url.port or 443, client_tls(settings.apns_ca_file), self._limits
            )
            self._pools = dict.fromkeys(HOSTS, override)
        else:
            tls = client_tls(settings.apns_ca_file)
            self._pools = {name: Http2Pool(host, 443, tls, self._limits) for name, host in HOSTS.items()}

    def authority(self, environment: str) -> str:
        """Host (and port) that targets of an environment are sent to."""
        return (self._pools.get(environment) or self._pools["production"]).authority

    def app_of(self, target: PushTarget) -> str:
        """See `PushChannel.app_of`: the topic in its environment."""
        return f"{target.app_id or self.settings.apns_topic}/{target.environment}"

    async def close(self) -> None:
        """See `PushChannel.close`."""
        for pool in set(self._pools.values()):
            await pool.close()

    async def send(self, jobs: list[PushJob]) -> list[list[PushResult]]:
        """See `PushChannel.send`."""
        tries = [
            self._send_one(job, target, payload)
            for job, payload in ((job, apns_payload(job)) for job in jobs)
            for target in job.targets
        ]
        results = iter([await tries[0]] if len(tries) == 1 else await asyncio.gather(*tries))
        return [[next(results) for _ in job.targets] for job in jobs]

    async def _send_one(self, job: PushJob, target: PushTarget, payload: bytes) -> PushResult:
        clock = self._clock
        started_ms, started = clock.now_ms(), clock.monotonic()
        apns_id = str(stable_id(job, target))
        result = PushResult(target.device, "failed", apns_id, started_ms=started_ms)
        if job.expires_ms is not None and job.expires_ms <= started_ms:
            result.outcome, result.error = "dead", "expired"
            return result
        try:
            await self._try(job, target, payload, result)
        except AnswerTimeoutError:
            result.outcome, result.error = "unknown", "timeout"
        except UnknownResultError as exc:
            result.outcome, result.error = "unknown", str(exc)[:200]
        except NotProcessedError as exc:
            result.outcome, result.error = "failed", str(exc)[:200]
        result.duration_ms = (clock.monotonic() - started) * 1000
        return result

    async def _try(self, job: PushJob, target: PushTarget, payload: bytes, result: PushResult) -> None:
        assert self._token is not None, "open() comes first"
        pool = self._pools.get(target.environment) or self._pools["production"]
        timeout_s = self.settings.timeout_s
        token = self._token.header()
        answer = await pool.request(self._headers(job, target, pool, token, result), payload, timeout_s)
        expired = answer.status == 403 and _reason(answer)[0] == "ExpiredProviderToken"
        if expired and self._token.refused(token, self.settings.apns_token_min_age_s):
            # Refused before it was looked at, so a second try cannot duplicate.
            headers = self._headers(job, target, pool, self._token.header(), result)
            answer = await pool.request(headers, payload, timeout_s)
        self._judge(answer, target, result)

    def _headers(
        self, job: PushJob, target: PushTarget, pool: Http2Pool, token: str, result: PushResult
    ) -> list[Header]:
        expires_ms = job.expires_ms
        if expires_ms is None:
            expires_ms = self._clock.now_ms() + round(self.settings.ttl_s * 1000)
        return [
            (":method", "POST"),
            (":scheme", "https"),
            (":authority", pool.authority),
            secret_header(":path", f"/3/device/{urllib.parse.quote(target.token, safe='')}"),
            ("authorization", token),
            ("apns-push-type", "background" if job.withdraw else "alert"),
            ("apns-topic", target.app_id or self.settings.apns_topic),
            ("apns-priority", "10" if job.priority >= 1 and not job.withdraw else "5"),
            ("apns-expiration", str(expires_ms // 1000)),
            secret_header("apns-id", result.provider_id),
            secret_header("apns-collapse-id", collapse_id(job.collapse_key)),
        ]

    def _judge(self, answer: Http2Answer, target: PushTarget, result: PushResult) -> None:
        """Turn an answer into an outcome (docs/reference: the table of reasons)."""
        result.status = answer.status
        result.provider_id = answer.headers.get("apns-id", result.provider_id)
        if answer.status == 200:
            result.outcome = "sent"
            return
        reason, timestamp = _reason(answer)
        result.error = reason or f"HTTP {answer.status}"
        result.retry_after_s = retry_after_s(answer.headers.get("retry-after"), self._clock.now_ms())
        if answer.status == 410:
            # The token was invalid at `timestamp`. One registered after that is valid again.
            stale = timestamp is None or timestamp >= target.registered_ms
            result.outcome = "invalid_target" if stale else "dead"
        elif reason in _DISABLE:
            result.outcome = "disabled_target"
        elif reason in _RETRY or answer.status >= 500 or answer.status == 429:
            result.outcome = "failed"
        else:
            result.outcome = "dead"


def _reason(answer: Http2Answer) -> tuple[str, int | None]:
    """(reason, timestamp in ms) of an error body; ("", None) if there is none to read."""
    try:
        document = msgspec.json.decode(answer.body)
        reason, timestamp = document.get("reason"), document.get("timestamp")
    except (msgspec.DecodeError, AttributeError):
        return "", None
    return (
        reason[:64] if isinstance(reason, str) else "",
        int(timestamp) if isinstance(timestamp, int | float) else None,
    )
