"""What verifies client tokens: a tenant's secrets, and the public keys of its JWK Set (RFC 7517).

A tenant signs with its client secret (HS256), or with keys of its own identity provider (RS256, ES256), whose
public halves Carillon reads from the tenant's JWKS. Rotation needs no pause: two secrets may be valid at once
(the former one until a time), and a JWKS names its keys by `kid`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, cast

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from carillon.errors import InvalidInputError

MAX_KEYS: Final = 64
"""Keys of a JWKS that are looked at."""
MIN_RSA_BITS: Final = 2048
"""RFC 7518 §3.3."""

NO_KEYS: Final[Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True)
class PublicKey:
    """A key of a JWKS: the only algorithm it verifies (RFC 8725 §3.1) and the key."""

    algorithm: str
    key: Any


@dataclass(frozen=True)
class TokenKeys:
    """What a tenant's tokens may be signed with.

    Attributes:
        secrets: HS256, the current one first; the former one while a rotation overlaps.
        public: by `kid`; "" is a key without one, usable for tokens without `kid`.
    """

    secrets: tuple[str, ...]
    public: Mapping[str, PublicKey] = field(default_factory=lambda: cast("Mapping[str, PublicKey]", NO_KEYS))


def parse_jwks(document: object) -> dict[str, PublicKey]:
    """The usable signature keys of a JWK Set: RSA of at least 2048 bits (RS256), EC P-256 (ES256).

    Others are left out, as RFC 7517 §5 asks: a provider may publish keys for other uses beside them.

    Raises:
        InvalidInputError: the document is no JWK Set.
    """
    if not isinstance(document, dict):
        raise InvalidInputError("expected a JWK Set: an object with an array `keys`", "jwks")
    entries = cast("dict[str, object]", document).get("keys")
    if not isinstance(entries, list):
        raise InvalidInputError("expected a JWK Set: an object with an array `keys`", "jwks")
    found: dict[str, PublicKey] = {}
    for entry in cast("list[object]", entries)[:MAX_KEYS]:
        if not isinstance(entry, dict):
            continue
        members = cast("dict[str, Any]", entry)
        key = _public_key(members)
        kid = members.get("kid", "")
        if key is not None and isinstance(kid, str):
            found.setdefault(kid, key)
    return found


def _public_key(members: dict[str, Any]) -> PublicKey | None:
    algorithm = {"RSA": "RS256", "EC": "ES256"}.get(str(members.get("kty")))
    if algorithm is None or members.get("use", "sig") != "sig" or members.get("alg", algorithm) != algorithm:
        return None
    if "d" in members:  # a private key that somebody published: whoever reads it can sign
        return None
    try:
        key = jwt.PyJWK(members, algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    if isinstance(key, RSAPublicKey):
        return PublicKey(algorithm, key) if key.key_size >= MIN_RSA_BITS else None
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return PublicKey(algorithm, key)
    return None
