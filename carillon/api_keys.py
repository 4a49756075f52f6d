"""API keys: how one looks, how it is stored, what its scopes allow.

A key is `crl_<key id>_<secret>`. The key id is public (lists and logs show it); only the SHA-256 of the
whole key is kept. A plain hash suffices, unlike for passwords: the secret carries 192 random bits, so
there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from typing import Final

from carillon.errors import InvalidInputError

SCOPES: Final[dict[str, str]] = {
    "events:write": "send events (POST /v1/events)",
    "users:read": "read feeds, notifications, preferences and devices of users",
    "users:write": "change devices and preferences of users, revoke their sessions",
    "tokens:write": "mint client tokens (POST /v1/tokens): whoever can, can act as any user of the tenant",
    "presence:read": "read presence",
    "policy:write": "read and change the tenant's policy",
    "sources:write": "make, read and delete sources of webhooks",
    "templates:write": "read, change and preview templates",
    "admin": "everything above, and what later needs more",
}
"""What a key may do. docs/reference/http.md names the scope of each route."""

_KEY: Final = re.compile(r"crl_([0-9a-f]{12})_[0-9a-f]{48}")
_TENANT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def make_key() -> tuple[str, str]:
    """A new key: (key id, whole key). The whole key is shown once and not kept."""
    key_id = secrets.token_hex(6)
    return key_id, f"crl_{key_id}_{secrets.token_hex(24)}"


def hash_key(key: str) -> bytes:
    """What is stored of a key. Any text is allowed: an unknown key simply has an unknown hash."""
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def key_id_of(key: str) -> str | None:
    """The public part of a well-formed key, or None: saves the look-up of what cannot be one."""
    match = _KEY.fullmatch(key)
    return match[1] if match else None


def check_scopes(scopes: Iterable[str]) -> list[str]:
    """The scopes, sorted and without duplicates.

    Raises:
        InvalidInputError: a scope is unknown, or there is none.
    """
    wanted = sorted(set(scopes))
    for scope in wanted:
        if scope not in SCOPES:
            raise InvalidInputError(
                f"unknown scope {scope!r}; known: {', '.join(SCOPES)}", "scopes", ", ".join(SCOPES), scope
            )
    if not wanted:
        raise InvalidInputError("expected at least one scope", "scopes", ", ".join(SCOPES), "none")
    return wanted


def allows(scopes: Iterable[str], scope: str) -> bool:
    """Whether a key with `scopes` may do what `scope` names; `admin` may do everything."""
    return scope in scopes or "admin" in scopes


def check_tenant_name(name: str) -> str:
    """The name, if it can be one: 1-64 letters, digits, dots, dashes, underscores.

    Raises:
        InvalidInputError: it is not.
    """
    if not _TENANT.fullmatch(name):
        raise InvalidInputError(
            f"expected a tenant name of 1-64 letters, digits, '.', '_' or '-', got {name!r}",
            "tenant",
            "1-64 of A-Z a-z 0-9 . _ -, the first a letter or digit",
            name[:80],
        )
    return name
