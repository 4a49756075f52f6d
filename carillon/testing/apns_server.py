"""A local Apple Push Notification service: POST /3/device/{token} over TLS HTTP/2 with provider tokens.

Run it with `python -m carillon.testing.apns_server --dir DIR`. It writes a CA and a .p8 key into DIR and
prints `{"url", "controlUrl", "receivedUrl", "caFile", "keyFile", "keyId", "teamId", "topic"}`.
Reasons and faults are scripted (POST /script on the control port); see
`carillon.testing.provider_server.Script`.
"""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from typing import Any, Final, cast

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from carillon.clock import Clock, rfc3339
from carillon.testing.control_port import ControlPort
from carillon.testing.http2_server import Answer, Http2Server, Request
from carillon.testing.provider_credentials import (
    DEMO_KEY_ID,
    DEMO_TEAM_ID,
    DEMO_TOPIC,
    server_tls,
    write_apns_key,
)
from carillon.testing.provider_server import Behaviour, LocalProvider, ReceivedPush, main

REASONS: Final = {
    "BadCollapseId": 400,
    "BadDeviceToken": 400,
    "BadExpirationDate": 400,
    "BadMessageId": 400,
    "BadPriority": 400,
    "BadTopic": 400,
    "DeviceTokenNotForTopic": 400,
    "DuplicateHeaders": 400,
    "IdleTimeout": 400,
    "InvalidPushType": 400,
    "MissingDeviceToken": 400,
    "MissingTopic": 400,
    "PayloadEmpty": 400,
    "TopicDisallowed": 400,
    "BadCertificate": 403,
    "BadCertificateEnvironment": 403,
    "ExpiredProviderToken": 403,
    "Forbidden": 403,
    "InvalidProviderToken": 403,
    "MissingProviderToken": 403,
    "BadPath": 404,
    "MethodNotAllowed": 405,
    "ExpiredToken": 410,
    "Unregistered": 410,
    "PayloadTooLarge": 413,
    "TooManyProviderTokenUpdates": 429,
    "TooManyRequests": 429,
    "InternalServerError": 500,
    "ServiceUnavailable": 503,
    "Shutdown": 503,
}
_PAYLOAD_LIMIT: Final = 4096
_TOKEN_MAX_AGE_S: Final = 3600
_TOKEN_MIN_INTERVAL_S: Final = 1200
_PRIORITIES: Final = frozenset({"1", "5", "10"})
_PUSH_TYPES: Final = frozenset(
    {"alert", "background", "location", "voip", "complication", "fileprovider", "mdm", "liveactivity"}
)


class ApnsServer(LocalProvider):
    """The server.

    Args:
        folder: certificates and the signing key are written here.
        any_topic: True takes any non-empty apns-topic, as a demo needs; False only `DEMO_TOPIC`.
    """

    def __init__(self, folder: Path, clock: Clock | None = None, *, any_topic: bool = True) -> None:
        super().__init__(clock)
        self.tokens_seen: dict[str, int] = {}
        """Provider tokens that verified -> their `iat` (seconds since the epoch)."""
        self.error_padding = 0
        """Extra bytes in every error body."""
        self.port = 0
        self._folder = folder
        self._any_topic = any_topic
        self._public_key: ec.EllipticCurvePublicKey | None = None
        self._control: ControlPort | None = None
        self._decode = msgspec.json.Decoder().decode

    async def start(self, port: int = 0, control_port: int = 0) -> dict[str, Any]:
        """Listen; returns what the ready line says."""
        tls, ca_file = server_tls(self._folder, self.clock)
        key_file = self._folder / "apns-key.p8"
        self._public_key = write_apns_key(key_file)
        self.server = Http2Server(self.handle, tls)
        self._control = ControlPort(self.routes())
        control = f"http://127.0.0.1:{await self._control.start(port=control_port)}"
        self.port = await self.server.start(port=port)
        return {
            "url": f"https://127.0.0.1:{self.port}",
            "controlUrl": control,
            "receivedUrl": f"{control}/received",
            "caFile": str(ca_file),
            "keyFile": str(key_file),
            "keyId": DEMO_KEY_ID,
            "teamId": DEMO_TEAM_ID,
            "topic": DEMO_TOPIC,
        }

    async def close(self) -> None:
        """Stop listening and drop all connections."""
        if self.server is not None:
            await self.server.close()
        if self._control is not None:
            await self._control.close()

    def errors(self) -> dict[str, int]:
        """See `LocalProvider.errors`."""
        return REASONS

    def handle(self, request: Request) -> Answer:
        """Answer one HTTP/2 request."""
        self.requests += 1
        headers = request.headers
        apns_id = headers.get("apns-id") or str(uuid.uuid4()).upper()
        payload = self._payload(request.body)
        reason = self._refuse(request, payload) or self._refuse_token(request)
        target = request.path.removeprefix("/3/device/")
        if reason:
            self.reject(reason)
            return self._error(Behaviour(error=reason), apns_id)
        behaviour = self.behaviour(target)
        if behaviour is not None and (behaviour.error or behaviour.status >= 300 or behaviour.fault):
            self.reject(behaviour.error or behaviour.fault or str(behaviour.status))
            return self.finish(self._error(behaviour, apns_id), behaviour)
        assert payload is not None
        self.accept(
            ReceivedPush(
                target=target,
                notification_id=payload.get("notificationId", ""),
                collapse_key=headers.get("apns-collapse-id", ""),
                payload=payload,
                headers={name: value for name, value in headers.items() if name.startswith("apns-")},
                connection=request.connection.number,
                received_at=rfc3339(self.clock.now_ms()),
            )
        )
        return self.finish(Answer(200, [("apns-id", apns_id)]), behaviour)

    def _payload(self, body: bytes) -> dict[str, Any] | None:
        try:
            payload = self._decode(body)
        except msgspec.DecodeError:
            return None
        return cast("dict[str, Any]", payload) if isinstance(payload, dict) else None

    def _refuse(self, request: Request, payload: dict[str, Any] | None) -> str:
        """The reason to refuse a request for what it is, or ""."""
        headers = request.headers
        if request.method != "POST":
            return "MethodNotAllowed"
        if not request.path.startswith("/3/device/"):
            return "BadPath"
        if request.path == "/3/device/":
            return "MissingDeviceToken"
        topic = headers.get("apns-topic", "")
        if not topic:
            return "MissingTopic"
        if not self._any_topic and topic != DEMO_TOPIC:
            return "BadTopic"
        if len(headers.get("apns-collapse-id", "").encode()) > 64:
            return "BadCollapseId"
        if headers.get("apns-priority", "10") not in _PRIORITIES:
            return "BadPriority"
        if headers.get("apns-push-type", "alert") not in _PUSH_TYPES:
            return "InvalidPushType"
        if not headers.get("apns-expiration", "0").isdigit():
            return "BadExpirationDate"
        if "apns-id" in headers:
            try:
                uuid.UUID(headers["apns-id"])
            except ValueError:
                return "BadMessageId"
        if len(request.body) > _PAYLOAD_LIMIT:
            return "PayloadTooLarge"
        return "" if payload is not None and "aps" in payload else "PayloadEmpty"

    def _refuse_token(self, request: Request) -> str:
        """The reason to refuse the provider token, or ""."""
        header = request.headers.get("authorization", "")
        if not header.lower().startswith("bearer "):
            return "MissingProviderToken"
        token = header[7:]
        now_s = self.clock.now_ms() // 1000
        issued_s = self.tokens_seen.get(token)
        if issued_s is None:
            assert self._public_key is not None
            try:
                claims = jwt.decode(
                    token,
                    self._public_key,
                    algorithms=["ES256"],
                    options={"require": ["iss", "iat"], "verify_iat": False},
                )
                key_id = jwt.get_unverified_header(token).get("kid")
            except jwt.PyJWTError:
                return "InvalidProviderToken"
            if claims["iss"] != DEMO_TEAM_ID or key_id != DEMO_KEY_ID:
                return "InvalidProviderToken"
            issued_s = int(claims["iat"])
            self.tokens_seen[token] = issued_s
        if not now_s - _TOKEN_MAX_AGE_S <= issued_s <= now_s + 60:
            return "ExpiredProviderToken"
        # Apple: no more than one new token in 20 minutes on a connection.
        known = request.connection.note
        if known is None or known[0] != token:
            if known is not None and self.enforce_token_updates and now_s - known[1] < _TOKEN_MIN_INTERVAL_S:
                return "TooManyProviderTokenUpdates"
            request.connection.note = (token, now_s)
        return ""

    def _error(self, behaviour: Behaviour, apns_id: str) -> Answer:
        status = behaviour.status or REASONS.get(behaviour.error, 500)
        body: dict[str, Any] = {"reason": behaviour.error}
        if self.error_padding:
            body["padding"] = "x" * self.error_padding
        if status == 410:
            body["timestamp"] = self.clock.now_ms() if behaviour.timestamp is None else behaviour.timestamp
        headers = [("apns-id", apns_id), ("content-type", "application/json")]
        if behaviour.retry_after is not None:
            headers.append(("retry-after", behaviour.retry_after))
        return Answer(status, headers, msgspec.json.encode(body) if behaviour.error else b"")


if __name__ == "__main__":
    sys.exit(main("apns_server", ApnsServer, sys.argv[1:]))
