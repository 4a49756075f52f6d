"""What a push channel is, and what every push channel needs."""

from __future__ import annotations

import hashlib
import unicodedata
import uuid
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, Final, Protocol

import msgspec

from carillon.clock import Clock
from carillon.errors import SettingsError
from carillon.ids import uuid_text
from carillon.messages import PushJob, PushResult, PushTarget
from carillon.settings import PushSettings

PAYLOAD_LIMIT: Final = 4096
"""Bytes of JSON that FCM and APNs take for what an app gets to see."""

COLLAPSE_ID_LIMIT: Final = 64
"""Bytes of an apns-collapse-id."""

MARKER: Final = "…"
"""Ends a text that was cut; the app fetches the rest by notificationId."""

AUTH_ERRORS: Final = frozenset(
    {
        "THIRD_PARTY_AUTH_ERROR", "UNAUTHENTICATED", "PERMISSION_DENIED", "OAUTH",
        "InvalidProviderToken", "ExpiredProviderToken", "MissingProviderToken", "BadCertificate",
        "BadCertificateEnvironment", "TooManyProviderTokenUpdates",
    }
)  # fmt: skip
"""Errors that say: the provider refuses *us*. Every other push would fail likewise, so the breaker opens."""


class PushChannel(Protocol):
    """One push provider.

    Delivery: one try per call; retries with a delay are the outbox's. A try that certainly never reached
    the provider may be repeated inside the deadline.
    """

    provider: str

    async def open(self) -> None:
        """Read credentials and get ready. Raises SettingsError for credentials that cannot work."""
        ...

    def app_of(self, target: PushTarget) -> str:
        """What a target shares credentials and fate with at the provider; known once the channel is open."""
        ...

    async def send(self, jobs: list[PushJob]) -> list[list[PushResult]]:
        """Try every target of every job once.

        Returns:
            Per job, in order, one result per target, in order. Failures are results, never exceptions.

        Cancellation: gives up the tries of this call; other calls are not touched.
        """
        ...

    async def close(self) -> None:
        """Close connections; sends in flight end as unknown."""
        ...


def provider_configured(settings: PushSettings, provider: str) -> bool:
    """Whether there are credentials for `provider`; without them its pool is not started."""
    if provider == "fcm":
        return bool(settings.fcm_credentials)
    if provider == "apns":
        return bool(settings.apns_key_file and settings.apns_key_id and settings.apns_team_id)
    return False


def make_channel(provider: str, settings: PushSettings, clock: Clock) -> PushChannel:
    """The channel of a provider. Raises SettingsError for a provider that is not known."""
    # Imported here: firebase-admin takes half a second to load, and an APNs sender has no use for it.
    if provider == "fcm":
        from channels.fcm import FcmChannel

        return FcmChannel(settings, clock)
    if provider == "apns":
        from channels.apns import ApnsChannel

        return ApnsChannel(settings, clock)
    raise SettingsError(f"expected push provider to be fcm or apns, got {provider!r}")


def stable_id(job: PushJob, target: PushTarget) -> uuid.UUID:
    """The same id for every try of one delivery to one device: providers and devices drop repeats by it."""
    return uuid.uuid5(_NAMESPACE, f"{job.delivery}/{job.notification.hex()}/{target.device}")


_NAMESPACE: Final = uuid.UUID("6f0e4d52-6a5b-5c1e-9d3c-0b1f5a9e7c21")


def collapse_id(key: str) -> str:
    """apns-collapse-id for a collapse key: itself if APNs can take it, else a hash that stays the same."""
    if len(key.encode()) <= COLLAPSE_ID_LIMIT and key.isascii() and key.isprintable():
        return key
    return hashlib.sha256(key.encode()).hexdigest()


def retry_after_s(value: str | None, now_ms: int) -> float:
    """Seconds of a Retry-After header (RFC 9110 10.2.3: seconds or a date); 0.0 if absent or malformed."""
    if not value:
        return 0.0
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(min(int(value[:9]), 86_400))
    try:
        at = parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(at.timestamp() - now_ms / 1000, 0.0), 86_400.0)


def withdrawal(job: PushJob) -> dict[str, Any]:
    """What a silent push tells the app: take these off the screen."""
    ids = job.notifications if job.digest else [job.notification]
    return {"type": "WITHDRAW", "notificationIds": [uuid_text(raw) for raw in ids]}


def of_digest(job: PushJob) -> dict[str, Any]:
    """What the push of a digest tells the app beside its texts; {} for any other push."""
    if not job.digest:
        return {}
    return {
        "digestId": uuid_text(job.digest),
        "count": job.count,
        "notificationIds": [uuid_text(raw) for raw in job.notifications],
    }


def json_size(document: Any) -> int:
    """Bytes of a document as compact UTF-8 JSON."""
    return len(msgspec.json.encode(document))


def cut(text: str, length: int) -> str:
    """`text` cut to at most `length` characters, the marker included; combined characters stay whole.

    A cut that would leave a character's accents, joiners or variation selectors behind moves to before it.
    """
    if len(text) <= length:
        return text
    keep = max(length - 1, 0)
    while keep > 0 and _joins(text[keep]):
        keep -= 1
    while keep > 0 and (text[keep - 1] == "\u200d" or text[keep - 1].isspace()):
        keep -= 1
    return text[:keep] + MARKER


def _joins(character: str) -> bool:
    return character == "\u200d" or unicodedata.category(character) in ("Mn", "Me", "Mc")


def fit(
    title: str, body: str | None, link: str | None, size_of: Callable[[str, str | None, str | None], int]
) -> tuple[str, str | None, str | None]:
    """Make texts fit the provider's limit: the body is cut first, then the link goes, then the title is cut.

    Args:
        size_of: bytes of the payload with these texts.
    """
    if size_of(title, body, link) <= PAYLOAD_LIMIT:
        return title, body, link
    if link is not None and size_of(title, MARKER if body else None, link) > PAYLOAD_LIMIT:
        link = None
    if body:
        body = _longest(body, lambda text: size_of(title, text, link) <= PAYLOAD_LIMIT)
    if size_of(title, body, link) > PAYLOAD_LIMIT:
        title = _longest(title, lambda text: size_of(text, body, link) <= PAYLOAD_LIMIT)
    return title, body, link


def _longest(text: str, fits: Callable[[str], bool]) -> str:
    """The longest cut of `text` that fits (binary search: sizes grow with the length)."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(cut(text, middle)):
            low = middle
        else:
            high = middle - 1
    return cut(text, low)
