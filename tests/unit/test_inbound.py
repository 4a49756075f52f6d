"""Signatures of webhooks, and the rules of sources."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carillon.errors import UnauthenticatedError
from carillon.inbound import (
    SourceError,
    check_secret,
    delivery_key,
    filled,
    sign_standard,
    texts_of,
    validate,
    verify,
)

NOW = 1_800_000_000_000
SECRETS = st.text(st.characters(codec="ascii", exclude_categories=("Cc",)), min_size=16, max_size=40)
BODIES = st.binary(max_size=200)


def headers(scheme: str, secret: str, body: bytes, at_s: int = NOW // 1000) -> dict[bytes, bytes]:
    """As the sender signs, written from its documentation."""
    if scheme == "standard":
        signature = sign_standard(secret, "msg_1", at_s, body).encode()
        return {b"webhook-id": b"msg_1", b"webhook-timestamp": b"%d" % at_s, b"webhook-signature": signature}
    if scheme == "stripe":
        signed = hmac.new(secret.encode(), b"%d." % at_s + body, hashlib.sha256).hexdigest()
        return {b"stripe-signature": f"t={at_s},v1={signed},v0=old".encode()}
    signed = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return {b"x-github-delivery": b"d-1", b"x-hub-signature-256": f"sha256={signed}".encode()}


SCHEMES = st.sampled_from(["standard", "stripe", "github"])


@given(SCHEMES, SECRETS, SECRETS, BODIES)
def test_who_knows_the_secret_is_let_in(scheme: str, secret: str, other: str, body: bytes) -> None:
    """The secret, or the former one while both are valid; nobody else."""
    told = headers(scheme, secret, body)
    assert verify(scheme, [secret], told, body, NOW, 300)
    assert verify(scheme, [other, secret], told, body, NOW, 300) == verify(
        scheme, [secret], told, body, NOW, 300
    )
    if other != secret:
        with pytest.raises(UnauthenticatedError):
            verify(scheme, [other], told, body, NOW, 300)


@given(SCHEMES, SECRETS, BODIES, BODIES, st.data())
def test_nothing_may_be_changed(
    scheme: str, secret: str, body: bytes, other: bytes, data: st.DataObject
) -> None:
    """Another body, a changed or missing header: refused, whatever it is."""
    told = headers(scheme, secret, body)
    if other != body:
        with pytest.raises(UnauthenticatedError):
            verify(scheme, [secret], told, other, NOW, 300)
    signed = [name for name in told if name != b"x-github-delivery"]  # GitHub does not sign the id
    name = data.draw(st.sampled_from(signed))
    with pytest.raises(UnauthenticatedError):
        verify(scheme, [secret], {k: v for k, v in told.items() if k != name}, body, NOW, 300)
    changed = data.draw(st.binary(max_size=100).filter(lambda raw: raw != told[name]))
    if scheme == "standard" or changed.strip() != told[name]:
        with pytest.raises(UnauthenticatedError):
            verify(scheme, [secret], {**told, name: changed}, body, NOW, 300)


@given(st.sampled_from(["standard", "stripe"]), st.integers(-2000, 2000), st.integers(1, 1000))
def test_a_recorded_webhook_grows_old(scheme: str, away_s: int, tolerance_s: int) -> None:
    """Signed within the tolerance, before or ahead: taken; else refused."""
    secret, body = "a secret of some length", b"{}"
    told = headers(scheme, secret, body, NOW // 1000 + away_s)
    if abs(away_s) <= tolerance_s:
        verify(scheme, [secret], told, body, NOW, tolerance_s)
    else:
        with pytest.raises(UnauthenticatedError):
            verify(scheme, [secret], told, body, NOW, tolerance_s)


def test_the_example_of_standard_webhooks() -> None:
    """The test vector of the specification's libraries."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    body = b'{"test": 2432232314}'
    assert sign_standard(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body) == (
        "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    )
    assert base64.b64decode(secret[6:])


def test_ids_of_deliveries() -> None:
    """Stripe's is that of its event, the same however often it is sent; others name theirs."""
    secret, body = "a secret of some length", b'{"id": "evt_1"}'
    for at_s in (NOW // 1000, NOW // 1000 - 60):
        assert verify("stripe", [secret], headers("stripe", secret, body, at_s), body, NOW, 300) == "evt_1"
    assert verify("github", [secret], headers("github", secret, body), body, NOW, 300) == "d-1"
    assert len(delivery_key("in_" + "0" * 24, "x" * 10_000)) <= 100


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab{} ", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xy", max_size=2), inner, max_size=3),
    max_leaves=10,
)


@given(JSON)
def test_a_mapping_is_filled_in_where_it_says(value: Any) -> None:
    """Texts with braces are replaced by place; everything else stays; null members go."""
    texts = dict(texts_of(value))
    assert all("{" in text for text in texts.values())
    assert len(texts) == json.dumps(value).count('"<') + sum(1 for _ in texts_of(value))
    same = filled(value, texts)
    again = filled(same, dict(texts_of(same)))
    assert same == again
    gone = filled({"a": "{{ x }}", "b": ["{{ x }}"], "c": 1}, {"event/a": None, "event/b/0": [1]})
    assert gone == {"b": [[1]], "c": 1}


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ([], ""),
        ({}, "event"),
        ({"event": {}}, "event"),
        ({"event": {"a": 1}, "scheme": "paypal"}, "scheme"),
        ({"event": {"a": 1}, "when": 5}, "when"),
        ({"event": {"a": 1}, "mapping": {}}, "mapping"),
        ({"event": {"a": ["{{ x }}"] * 201}}, "event"),
        ({"event": {"a": "x" * 40_000}}, ""),
    ],
)
def test_rules_of_sources(document: Any, path: str) -> None:
    """What breaks a rule is named."""
    with pytest.raises(SourceError) as caught:
        validate(document)
    assert caught.value.errors[0].path == path


def test_secrets_are_not_short_and_not_told() -> None:
    """A secret has 16 characters or more; an error does not repeat it."""
    assert check_secret("x" * 16) == "x" * 16
    with pytest.raises(SourceError) as caught:
        check_secret("short-one")
    assert "short-one" not in str(caught.value)
