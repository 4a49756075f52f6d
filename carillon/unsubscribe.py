"""One-click unsubscribe: links that switch one thing off for one user, without a login (RFC 8058).

A token names tenant, user and what to switch off, with a MAC under the tenant's client secret. It has no end:
mail stays in mailboxes for years, and all it can do is switch off. A secret that was rotated verifies for as
long as it does for client tokens.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import msgspec

from carillon.errors import NotFoundError
from carillon.event_rules import is_object
from carillon.preferences import CHANNELS
from carillon.switches import part

SECTIONS: Final = {"category": "categories", "type": "types"}
"""What a token may name, and the member of the preferences document it is in."""
MAX_CHARS: Final = 1024
_MAC_BYTES: Final = 16
_PURPOSE: Final = b"carillon unsubscribe v1\0"


class Unsubscription(NamedTuple):
    """What a link switches off.

    Attributes:
        section: category | type | "" (everything).
        name: of the category or type; "" with "".
        channel: only this channel of it; "" for all.
    """

    tenant: str
    user: str
    section: str
    name: str
    channel: str


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(tuple[str, str, str, str, str]).decode


def mint(what: Unsubscription, secret: str) -> str:
    """The token of a link, for one segment of a path."""
    payload = _encode(what)
    return f"{_text(payload)}.{_text(_mac(payload, secret))}"


def claimed_tenant(token: str) -> str:
    """The tenant a token names, NOT verified: good for nothing but finding the secret.

    Raises:
        NotFoundError: it is no token.
    """
    return _read(token)[0].tenant


def verify(token: str, secrets: Iterable[str]) -> Unsubscription:
    """What a token switches off.

    Raises:
        NotFoundError: it is no token, or none of the secrets made it.
    """
    what, payload, mac = _read(token)
    if not any(hmac.compare_digest(mac, _mac(payload, secret)) for secret in secrets):
        raise _unknown()
    return what


def _mac(payload: bytes, secret: str) -> bytes:
    return hmac.new(secret.encode(), _PURPOSE + payload, hashlib.sha256).digest()[:_MAC_BYTES]


def _read(token: str) -> tuple[Unsubscription, bytes, bytes]:
    if len(token) > MAX_CHARS:
        raise _unknown()
    head, _, tail = token.partition(".")
    try:
        payload, mac = _bytes(head), _bytes(tail)
        what = Unsubscription(*_decode(payload))
    except (binascii.Error, msgspec.DecodeError, ValueError):
        raise _unknown() from None
    return what, payload, mac


def _unknown() -> NotFoundError:
    return NotFoundError(
        "this link is not known", "token", "the token of an unsubscribe link", "another text"
    )


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def switch_off(document: dict[str, Any], what: Unsubscription) -> dict[str, Any]:
    """A preferences document with one thing switched off, and all else as it was. Idempotent."""
    if not what.section:
        if not what.channel:
            return document | {"global": False}
        return document | {"channels": _closed(part(document, "channels"), what.channel)}
    member = SECTIONS[what.section]
    entries = part(document, member)
    entry: Any = entries.get(what.name, True)
    if not what.channel:
        entry = {**entry, "enabled": False} if is_object(entry) else False
    elif entry is not False:
        old: dict[str, Any] = {} if entry is True else entry
        # The names of channels may stand beside `channels`, which wins.
        beside = {name: word for name, word in old.items() if name in CHANNELS}
        rest = {name: word for name, word in old.items() if name not in CHANNELS}
        entry = rest | {"channels": beside | part(old, "channels") | {what.channel: False}}
    return document | {member: entries | {what.name: entry}}


def _closed(channels: dict[str, Any], channel: str) -> dict[str, Any]:
    word: Any = channels.get(channel, True)
    return channels | {channel: {**word, "enabled": False} if is_object(word) else False}
