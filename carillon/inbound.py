"""Webhooks that come in: whether one is from whom it says, and the rules of a source. Pure.

Signatures are HMAC-SHA256 over the raw body, with the schemes that senders use: Standard Webhooks
(standardwebhooks.com), Stripe's, and GitHub's. Those with a time are refused outside of a tolerance, so
that a
recorded request cannot be sent again next week; within it, and for GitHub's, which has no time, the id of the
delivery is the idempotency key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from carillon.errors import UnauthenticatedError
from carillon.event_rules import Text, is_array, is_object, text_error, tree_errors
from carillon.problems import DocumentError, FieldError, shown

SCHEMES: Final = ("standard", "stripe", "github")
MAX_DOCUMENT_BYTES: Final = 32 * 1024
MAX_TEXTS: Final = 200
MIN_SECRET: Final = 16
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGITS: Final = re.compile(r"[0-9]{1,12}")
_HEADERS: Final[dict[str, tuple[bytes, ...]]] = {
    "standard": (b"webhook-id", b"webhook-timestamp", b"webhook-signature"),
    "stripe": (b"stripe-signature",),
    "github": (b"x-github-delivery", b"x-hub-signature-256"),
}


class SourceError(DocumentError):
    """A source that breaks rules. Args (positional): the errors, in the order found."""


def check_name(name: str) -> str:
    """The name of a source, if it can be one. Raises SourceError."""
    if not _NAME.fullmatch(name):
        expected = "1-64 of A-Z a-z 0-9 . _ -, the first a letter or digit"
        raise SourceError([FieldError("name", expected, shown(name))])
    return name


def validate(document: Any) -> None:
    """Check a source: `scheme`, `event` (the mapping), `when`, `description`.

    Raises:
        SourceError: it breaks a rule; `errors` names each.
    """
    if not is_object(document):
        raise SourceError([FieldError("", "an object", shown(document))])
    errors = tree_errors(document)
    for name, value in document.items() if not errors else ():
        if name == "scheme":
            if value not in SCHEMES:
                errors.append(FieldError(name, "|".join(SCHEMES), shown(value)))
        elif name == "event":
            if not is_object(value) or not value:
                errors.append(FieldError(name, "an event, its texts as templates", shown(value)))
        elif name in ("when", "description"):
            error = text_error(name, value, Text(0, 1000, control=True))
            errors.extend([] if error is None else [error])
        else:
            errors.append(FieldError(shown(name), "a member of a source", "an unknown field"))
    if "event" not in document:
        errors.append(FieldError("event", "an event, its texts as templates", "nothing"))
    if not errors and len(msgspec.json.encode(document)) > MAX_DOCUMENT_BYTES:
        errors.append(FieldError("", f"at most {MAX_DOCUMENT_BYTES} bytes", "more"))
    if not errors and sum(1 for _ in texts_of(document["event"])) > MAX_TEXTS:
        errors.append(FieldError("event", f"at most {MAX_TEXTS} texts", "more"))
    if errors:
        raise SourceError(errors[:20])


def check_secret(secret: Any) -> str:
    """A secret to verify with. Raises SourceError."""
    error = text_error("secret", secret, Text(MIN_SECRET, 500))
    if error is not None:
        raise SourceError([error._replace(got=f"{len(str(secret))} characters")])
    return secret


def texts_of(value: Any, path: str = "event") -> Iterator[tuple[str, str]]:
    """Every text of a mapping that has something to fill in, with its path."""
    if isinstance(value, str):
        if "{" in value:
            yield path, value
    elif is_object(value):
        for name, item in value.items():
            yield from texts_of(item, f"{path}/{name}")
    elif is_array(value):
        for index, item in enumerate(value):
            yield from texts_of(item, f"{path}/{index}")


def filled(value: Any, made: Mapping[str, Any], path: str = "event") -> Any:
    """The mapping with its texts replaced by what became of them; members that became null are left out."""
    if isinstance(value, str):
        return made.get(path, value)
    if is_object(value):
        items = {name: filled(item, made, f"{path}/{name}") for name, item in value.items()}
        return {name: item for name, item in items.items() if item is not None}
    if is_array(value):
        return [filled(item, made, f"{path}/{index}") for index, item in enumerate(value)]
    return value


# -- signatures ---------------------------------------------------------------------------------------


def verify(
    scheme: str,
    secrets: Sequence[str],
    headers: Mapping[bytes, bytes],
    body: bytes,
    now_ms: int,
    tolerance_s: float,
) -> str:
    """The id of a delivery that is from whom it says.

    Args:
        secrets: any of them may have signed (a rotation overlaps).
        headers: by lower-case name.
        now_ms, tolerance_s: a signed time further away is refused.

    Raises:
        UnauthenticatedError: it is not signed by one of the secrets, or too old, or from the future.
    """
    values: list[str] = []
    for name in _HEADERS[scheme]:
        raw = headers.get(name)
        if raw is None:
            raise UnauthenticatedError(f"the header {name.decode()} is missing")
        values.append(raw.decode("latin-1"))
    if scheme == "standard":
        delivery, at_text, told = values
        signatures = [part[3:] for part in told.split(" ") if part.startswith("v1,")]
        signed = f"{delivery}.{at_text}.".encode("latin-1") + body
        wanted = [_base64(_digest(_standard_key(secret), signed)) for secret in secrets]
    elif scheme == "stripe":
        pairs = [part.strip().partition("=") for part in values[0].split(",")]
        at_text = next((value for name, _, value in pairs if name == "t"), "")
        signatures = [value for name, _, value in pairs if name == "v1"]
        signed = at_text.encode("latin-1") + b"." + body
        wanted = [_digest(secret.encode(), signed).hex() for secret in secrets]
        delivery = _delivery(body) or hashlib.sha256(signed).hexdigest()
    else:
        delivery, told = values
        at_text = None
        signatures = [told.removeprefix("sha256=")] if told.startswith("sha256=") else []
        wanted = [_digest(secret.encode(), body).hex() for secret in secrets]
    matched = False
    for signature in signatures[:10]:
        for want in wanted:  # every one, in constant time each
            matched |= hmac.compare_digest(signature.encode("latin-1"), want.encode())
    if not matched:
        raise UnauthenticatedError("the signature is not that of this body and secret")
    if at_text is not None:
        if not _DIGITS.fullmatch(at_text):
            raise UnauthenticatedError("the time of the signature is no number")
        away_s = abs(now_ms / 1000 - int(at_text))
        if away_s > tolerance_s:
            raise UnauthenticatedError(
                f"the signature is {away_s:.0f} s old or ahead, more than {tolerance_s:g} s"
            )
    return delivery


def sign_standard(secret: str, delivery: str, at_s: int, body: bytes) -> str:
    """The `webhook-signature` of Standard Webhooks."""
    return "v1," + _base64(_digest(_standard_key(secret), f"{delivery}.{at_s}.".encode() + body))


def _digest(key: bytes, signed: bytes) -> bytes:
    return hmac.new(key, signed, hashlib.sha256).digest()


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _standard_key(secret: str) -> bytes:
    """`whsec_` and base64, as Standard Webhooks has it; anything else is the key as it stands."""
    if secret.startswith("whsec_"):
        try:
            return base64.b64decode(secret[6:], validate=True)
        except (binascii.Error, ValueError):
            pass
    return secret.encode()


def _delivery(body: bytes) -> str | None:
    """The id of a Stripe event: the same over its deliveries, unlike what is signed."""
    try:
        document = msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    found = document.get("id") if is_object(document) else None
    return found if isinstance(found, str) and found else None


def delivery_key(source: str, delivery: str) -> str:
    """The idempotency key of a delivery."""
    return f"inbound.{source}.{hashlib.sha256(delivery.encode('utf-8', 'replace')).hexdigest()[:32]}"
