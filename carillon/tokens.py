"""Client tokens: JWT (RFC 7519, RFC 8725), signed with the tenant's client secret or a key of its JWKS.

HS256 over the UTF-8 bytes of the secret; RS256 or ES256 with a public key found by `kid`. The tenant is read
from the payload before anything is verified, only to find its keys: what is returned comes from the verified
payload. A token chooses among its tenant's keys, never how a key is used: each key has its one algorithm.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, cast

import jwt

from carillon.errors import TokenExpiredError, UnauthenticatedError
from carillon.token_keys import TokenKeys

ALGORITHM: Final = "HS256"
MIN_SECRET_BYTES: Final = 32
"""RFC 7518 §3.2: an HS256 key is at least as long as the hash."""
MAX_TOKEN_CHARS: Final = 8192
MAX_ID_CHARS: Final = 128

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Times are checked here, with the injected clock and one skew, not by PyJWT with the machine's.
_CHECKS_OFF: Final[Any] = {
    f"verify_{claim}": False for claim in ("exp", "nbf", "iat", "sub", "aud", "iss", "jti")
}
_VERIFIED: Final[Any] = {"verify_signature": True, **_CHECKS_OFF}
_UNVERIFIED: Final[Any] = {"verify_signature": False, **_CHECKS_OFF}


@dataclass(frozen=True)
class TokenRules:
    """What is asked of a token beyond its signature.

    Attributes:
        skew_s: tolerance for `exp`, `nbf` and `iat`, in seconds.
        audience: required `aud`; empty means `aud` is not looked at.
        issuer: required `iss`; empty means `iss` is not looked at.
    """

    skew_s: float = 5.0
    audience: str = ""
    issuer: str = ""


class ClientIdentity(NamedTuple):
    """Who a verified token speaks for."""

    tenant: str
    user: str
    expires_ms: int
    """`exp`, milliseconds since the epoch."""
    issued_ms: int
    """`iat`, milliseconds since the epoch; 0 if the token has none."""
    token_id: bytes = b""
    """What names the token among revoked ones: see `token_id`."""


def claimed_tenant(token: str) -> str:
    """The tenant a token names, NOT verified: good for nothing but finding the secret.

    Raises:
        UnauthenticatedError: it is not a JWT, or names no tenant.
    """
    return _name(_decode(token, "", verify=False), "tenant")


def unknown_key(token: str, keys: TokenKeys) -> bool:
    """Whether the token names a public key that is not among these: reading the JWKS anew may find it."""
    header = _header(token)
    return header.get("alg") in ("RS256", "ES256") and header.get("kid", "") not in keys.public


def token_id(token: str) -> bytes:
    """What names a token in a list of revoked ones: of the signed part, for signatures can be re-encoded."""
    return hashlib.sha256(token.rpartition(".")[0].encode("ascii", "replace")).digest()[:16]


def verify(
    token: str,
    keys: str | TokenKeys,
    now_ms: int,
    rules: TokenRules = TokenRules(),
    tokens_valid_from_ms: int | None = None,
) -> ClientIdentity:
    """Verify a token with its tenant's keys.

    Args:
        keys: of the tenant that `claimed_tenant` named; a text is its only secret.
        now_ms: wall time, milliseconds since the epoch.
        tokens_valid_from_ms: tokens issued before (or without `iat`) are revoked; None: none ever were.

    Raises:
        TokenExpiredError: everything but `exp` is right: a new token helps.
        UnauthenticatedError: anything else.
    """
    claims = _verified(token, TokenKeys((keys,)) if isinstance(keys, str) else keys)
    _check_aud_iss(claims, rules)
    skew_ms = rules.skew_s * 1000
    expires_ms = _time(claims, "exp")
    if expires_ms is None:
        raise UnauthenticatedError("expected the token to have exp, got none")
    for claim in ("nbf", "iat"):
        at_ms = _time(claims, claim)
        if at_ms is not None and at_ms > now_ms + skew_ms:
            raise UnauthenticatedError(f"the token's {claim} is in the future: it is not valid yet")
    identity = ClientIdentity(
        _name(claims, "tenant"),
        _name(claims, "sub"),
        expires_ms,
        _time(claims, "iat") or 0,
        token_id(token),
    )
    if tokens_valid_from_ms is not None and identity.issued_ms < tokens_valid_from_ms:
        raise UnauthenticatedError("the token was revoked")
    if now_ms >= expires_ms + skew_ms:
        raise TokenExpiredError("the token has expired")
    return identity


def verify_with(
    token: str, secret_of: Callable[[str], str | None], now_ms: int, rules: TokenRules = TokenRules()
) -> ClientIdentity:
    """`verify` with the secret that `secret_of(tenant)` knows.

    Raises:
        TokenExpiredError, UnauthenticatedError: see `verify`; an unknown tenant is the latter.
    """
    secret = secret_of(claimed_tenant(token))
    if secret is None:
        # The same sentence as for a wrong signature: which tenants exist is nobody's business.
        raise UnauthenticatedError("the token's signature does not verify")
    return verify(token, secret, now_ms, rules)


def mint(tenant: str, user: str, secret: str, now_ms: int, ttl_s: float) -> str:
    """Make a token.

    `iat` carries milliseconds (RFC 7519 §2 NumericDate allows fractions): a token made in the second of a
    revocation, after it, is valid.

    Raises:
        UnauthenticatedError: the secret is shorter than 32 bytes.
    """
    if len(secret.encode()) < MIN_SECRET_BYTES:
        raise UnauthenticatedError(f"expected a client secret of at least {MIN_SECRET_BYTES} bytes")
    claims = {"sub": user, "tenant": tenant, "iat": now_ms / 1000, "exp": math.ceil(now_ms / 1000 + ttl_s)}
    return jwt.encode(claims, secret.encode(), algorithm=ALGORITHM)


def _verified(token: str, keys: TokenKeys) -> Mapping[str, Any]:
    """The claims, if one of the keys signed them."""
    header = _header(token)
    algorithm = header.get("alg")
    if algorithm == ALGORITHM:
        for secret in keys.secrets[:-1]:
            try:
                return _decode(token, _long_enough(secret), verify=True)
            except UnauthenticatedError:
                continue  # the next one says why
        if keys.secrets:
            return _decode(token, _long_enough(keys.secrets[-1]), verify=True)
    elif algorithm in ("RS256", "ES256") and keys.public:
        kid = header.get("kid", "")
        key = keys.public.get(kid) if isinstance(kid, str) else None
        if key is None or key.algorithm != algorithm:
            raise UnauthenticatedError("the token's signature does not verify")
        return _decode(token, key.key, verify=True, algorithm=algorithm)
    expected = [ALGORITHM] * bool(keys.secrets) + ["RS256", "ES256"] * bool(keys.public)
    raise UnauthenticatedError(f"expected a token signed with {' or '.join(expected)}")


def _long_enough(secret: str) -> str:
    if len(secret.encode()) < MIN_SECRET_BYTES:
        raise UnauthenticatedError(f"expected a client secret of at least {MIN_SECRET_BYTES} bytes")
    return secret


def _header(token: str) -> Mapping[str, Any]:
    """The header, NOT verified. Raises UnauthenticatedError: it is no JWT."""
    if not 1 <= len(token) <= MAX_TOKEN_CHARS or not token.isascii():
        raise UnauthenticatedError("expected a JWT, got something else")
    try:
        return jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError, AttributeError):
        raise UnauthenticatedError("expected a JWT, got something else") from None


def _decode(token: str, key: Any, *, verify: bool, algorithm: str = ALGORITHM) -> Mapping[str, Any]:
    if not 1 <= len(token) <= MAX_TOKEN_CHARS or not token.isascii():
        raise UnauthenticatedError("expected a JWT, got something else")
    try:
        return jwt.decode(
            token,
            key.encode() if isinstance(key, str) else key,
            algorithms=[algorithm],
            options=_VERIFIED if verify else _UNVERIFIED,
        )
    except jwt.InvalidSignatureError:
        raise UnauthenticatedError("the token's signature does not verify") from None
    except jwt.InvalidAlgorithmError:
        raise UnauthenticatedError(f"expected a token signed with {algorithm}") from None
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError, AttributeError):
        # PyJWT lets some errors of odd payloads through; none of them may end a connection's task.
        raise UnauthenticatedError("expected a JWT, got something else") from None


def _check_aud_iss(claims: Mapping[str, Any], rules: TokenRules) -> None:
    if rules.audience:
        audience: object = claims.get("aud")
        if rules.audience not in (
            cast("list[object]", audience) if isinstance(audience, list) else [audience]
        ):
            raise UnauthenticatedError("the token is for another audience")
    if rules.issuer and claims.get("iss") != rules.issuer:
        raise UnauthenticatedError("the token comes from another issuer")


def _name(claims: Mapping[str, Any], claim: str) -> str:
    value: object = claims.get(claim)
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_ID_CHARS or _CONTROL.search(value):
        raise UnauthenticatedError(
            f"expected the token's {claim} to be 1-{MAX_ID_CHARS} characters without control characters"
        )
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate from a JSON escape
        raise UnauthenticatedError(f"expected the token's {claim} to be valid Unicode") from None
    return value


def _time(claims: Mapping[str, Any], claim: str) -> int | None:
    """A NumericDate as milliseconds, None if absent."""
    value: object = claims.get(claim)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e11:
        raise UnauthenticatedError(f"expected the token's {claim} to be seconds since the epoch")
    return round(value * 1000)
