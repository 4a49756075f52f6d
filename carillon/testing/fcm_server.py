"""A local Firebase Cloud Messaging: HTTP v1 over TLS HTTP/2, with the OAuth token endpoint of its accounts.

Run it with `python -m carillon.testing.fcm_server --dir DIR`. It writes a CA and a service account into DIR
and prints `{"url", "controlUrl", "receivedUrl", "caFile", "tokenUri", "credentialsFile", "project"}`.
Errors are scripted (POST /script on the control port); see `carillon.testing.provider_server.Script`.
"""

from __future__ import annotations

import secrets
import sys
import urllib.parse
from pathlib import Path
from typing import Any, Final, cast

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric import rsa

from carillon.clock import Clock, rfc3339
from carillon.testing.control_port import ControlPort
from carillon.testing.http2_server import Answer, Http2Server, Request
from carillon.testing.provider_credentials import DEMO_PROJECT, server_tls, write_service_account
from carillon.testing.provider_server import Behaviour, LocalProvider, ReceivedPush, Script, main

ERRORS: Final = {
    "UNREGISTERED": 404,
    "NOT_FOUND": 404,
    "INVALID_ARGUMENT": 400,
    "SENDER_ID_MISMATCH": 403,
    "PERMISSION_DENIED": 403,
    "QUOTA_EXCEEDED": 429,
    "UNAVAILABLE": 503,
    "INTERNAL": 500,
    "THIRD_PARTY_AUTH_ERROR": 401,
    "UNAUTHENTICATED": 401,
}
_STATUS_NAMES: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}
_NO_DETAIL: Final = frozenset({"NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED"})
_GRANT: Final = "urn:ietf:params:oauth:grant-type:jwt-bearer"
_SCOPES: Final = (
    "https://www.googleapis.com/auth/firebase.messaging",
    "https://www.googleapis.com/auth/cloud-platform",
)
_GOOGLE_TOKEN_URI: Final = "https://oauth2.googleapis.com/token"  # noqa: S105  an address
"""google-auth names this audience whatever the account's token_uri is."""
_TOKEN_LIFETIME_S: Final = 3600
_PAYLOAD_LIMIT: Final = 4096
_JSON: Final[tuple[str, str]] = ("content-type", "application/json; charset=UTF-8")


class FcmServer(LocalProvider):
    """The server.

    Args:
        folder: certificates and the service account are written here.
        project: the only project it knows.
    """

    def __init__(self, folder: Path, project: str = DEMO_PROJECT, clock: Clock | None = None) -> None:
        super().__init__(clock)
        self.project = project
        self.tokens_issued = 0
        self._folder = folder
        self._path = f"/v1/projects/{project}/messages:send"
        self._tokens: dict[str, int] = {}  # access token -> expiry, ms since the epoch
        self._public_key: rsa.RSAPublicKey | None = None
        self.token_uri = ""
        self._messages = 0
        self._control: ControlPort | None = None
        self._decode = msgspec.json.Decoder().decode

    async def start(self, port: int = 0, control_port: int = 0) -> dict[str, Any]:
        """Listen; returns what the ready line says."""
        tls, ca_file = server_tls(self._folder, self.clock)
        self.server = Http2Server(self.handle, tls)
        self._control = ControlPort(self.routes() | {"POST /token": self._token})
        control = f"http://127.0.0.1:{await self._control.start(port=control_port)}"
        self.token_uri = f"{control}/token"
        account = self._folder / "service-account.json"
        self._public_key = write_service_account(account, self.token_uri, self.project)
        return {
            "url": f"https://127.0.0.1:{await self.server.start(port=port)}",
            "controlUrl": control,
            "receivedUrl": f"{control}/received",
            "caFile": str(ca_file),
            "tokenUri": self.token_uri,
            "credentialsFile": str(account),
            "project": self.project,
        }

    async def close(self) -> None:
        """Stop listening and drop all connections."""
        if self.server is not None:
            await self.server.close()
        if self._control is not None:
            await self._control.close()

    def errors(self) -> dict[str, int]:
        """See `LocalProvider.errors`."""
        return ERRORS

    def script(self, script: Script) -> None:
        """See `LocalProvider.script`; `revoke_tokens` is ours."""
        super().script(script)
        if script.revoke_tokens:
            self._tokens.clear()

    # -- OAuth (RFC 7523) ---------------------------------------------------------------------------

    def _token(self, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        form = dict(urllib.parse.parse_qsl(body.decode()))
        if form.get("grant_type") != _GRANT:
            return 400, {"error": "unsupported_grant_type"}
        assert self._public_key is not None
        try:
            claims = jwt.decode(
                form.get("assertion", ""),
                self._public_key,
                algorithms=["RS256"],
                audience=[self.token_uri, _GOOGLE_TOKEN_URI],
                options={"require": ["iss", "iat", "exp", "aud"]},
                leeway=10,
            )
        except jwt.PyJWTError as exc:
            return 400, {"error": "invalid_grant", "error_description": str(exc)}
        if not any(scope in str(claims.get("scope", "")) for scope in _SCOPES):
            return 400, {"error": "invalid_scope"}
        self.tokens_issued += 1
        token = f"local-{secrets.token_urlsafe(24)}"
        self._tokens[token] = self.clock.now_ms() + _TOKEN_LIFETIME_S * 1000
        return 200, {"access_token": token, "expires_in": _TOKEN_LIFETIME_S, "token_type": "Bearer"}

    # -- messages -----------------------------------------------------------------------------------

    def handle(self, request: Request) -> Answer:
        """Answer one HTTP/2 request."""
        self.requests += 1
        if request.method != "POST" or request.path != self._path:
            self.reject("NOT_FOUND")
            return error_answer(Behaviour(error="NOT_FOUND"), f"no such resource: {request.path}")
        expiry = self._tokens.get(request.headers.get("authorization", "").removeprefix("Bearer "), 0)
        if expiry <= self.clock.now_ms():
            self.reject("UNAUTHENTICATED")
            return error_answer(
                Behaviour(error="UNAUTHENTICATED"), "Request had invalid authentication credentials."
            )
        try:
            message = cast("dict[str, Any]", self._decode(request.body)["message"])
            target = message.get("token") or message.get("fid")
            if not isinstance(target, str) or ("token" in message) == ("fid" in message):
                raise ValueError("expected exactly one of token and fid")
            data: dict[str, Any] = message.get("data") or {}
            if not all(isinstance(value, str) for value in data.values()):
                raise ValueError("data values must be strings")
            visible: dict[str, Any] = {"notification": message.get("notification") or {}, "data": data}
            size = len(msgspec.json.encode(visible))
            if size > _PAYLOAD_LIMIT:
                raise ValueError(f"payload of {size} bytes exceeds {_PAYLOAD_LIMIT}")
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError, ValueError) as exc:
            self.reject("INVALID_ARGUMENT")
            return error_answer(Behaviour(error="INVALID_ARGUMENT"), str(exc))
        behaviour = self.behaviour(target)
        if behaviour is not None and (behaviour.error or behaviour.status >= 300 or behaviour.fault):
            self.reject(behaviour.error or behaviour.fault or str(behaviour.status))
            return self.finish(error_answer(behaviour, "scripted"), behaviour)
        self._messages += 1
        android: dict[str, Any] = message.get("android") or {}
        shown: dict[str, Any] = android.get("notification") or {}
        self.accept(
            ReceivedPush(
                target=target,
                notification_id=data.get("notificationId", ""),
                collapse_key=android.get("collapse_key") or shown.get("tag") or "",
                payload=message,
                headers={},
                connection=request.connection.number,
                received_at=rfc3339(self.clock.now_ms()),
            )
        )
        name = f"projects/{self.project}/messages/0:{self._messages:016d}"
        return self.finish(Answer(200, [_JSON], b'{"name":"%s"}' % name.encode()), behaviour)


def error_answer(behaviour: Behaviour, message: str) -> Answer:
    """FCM's error document for a behaviour."""
    status = behaviour.status or ERRORS.get(behaviour.error, 500)
    error: dict[str, Any] = {
        "code": status,
        "message": message,
        "status": _STATUS_NAMES.get(status, "UNKNOWN"),
    }
    if behaviour.error and behaviour.error not in _NO_DETAIL and not behaviour.plain:
        error["details"] = [
            {
                "@type": "type.googleapis.com/google.firebase.fcm.v1.FcmError",
                "errorCode": behaviour.error,
            }
        ]
    headers: list[tuple[str, str]] = [_JSON]
    if behaviour.retry_after is not None:
        headers.append(("retry-after", behaviour.retry_after))
    return Answer(status, headers, msgspec.json.encode({"error": error}))


if __name__ == "__main__":
    sys.exit(main("fcm_server", FcmServer, sys.argv[1:]))
