"""Where a tenant's public keys may be read from.

Apart from `carillon.token_keys`, which needs a library of cryptography: who only checks a policy does not.
"""

from __future__ import annotations

import ipaddress
from typing import Final
from urllib.parse import urlsplit

from carillon.errors import InvalidInputError

MAX_URL_CHARS: Final = 2048


def check_jwks_url(url: str) -> str:
    """The URL, if keys may be read from there: https, or http on this machine.

    Raises:
        InvalidInputError: it may not.
    """
    expected = "an https:// URL (http:// only on the loopback)"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise InvalidInputError(f"expected {expected}", "jwksUrl", expected, url[:80]) from None
    good = len(url) <= MAX_URL_CHARS and url.isascii() and url.isprintable() and " " not in url
    plain = parts.scheme == "http" and _loopback(host)
    if not good or not host or (port == 0) or parts.username is not None or not (
        parts.scheme == "https" or plain
    ):  # fmt: skip
        raise InvalidInputError(f"expected {expected}, got {url[:80]!r}", "jwksUrl", expected, url[:80])
    return url


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
