from __future__ import annotations

import base64
import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from carillon import tokens
from carillon.errors import TokenExpiredError, UnauthenticatedError
from carillon.tokens import ClientIdentity, TokenRules, claimed_tenant, mint, token_id, verify, verify_with

SECRET = "a secret of the tenant, ä, long enough"
NOW = 1_700_000_000_500
GOOD: dict[str, Any] = {"sub": "ann", "tenant": "acme", "exp": NOW // 1000 + 60}


def sign(claims: Any, secret: str = SECRET, algorithm: str = "HS256", **headers: Any) -> str:
    if isinstance(claims, dict):
        return jwt.encode(claims, secret.encode(), algorithm=algorithm, headers=headers or None)
    return jwt.api_jws.encode(claims, secret.encode(), algorithm=algorithm)


def without_signature(claims: dict[str, Any], algorithm: str) -> str:
    def part(value: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': algorithm, 'typ': 'JWT'})}.{part(claims)}."


def test_a_minted_token_verifies() -> None:
    """What `mint` makes, `verify` takes, with tenant, user, expiry and time of issue."""
    token = mint("acme", "ann", SECRET, NOW, 60)
    assert claimed_tenant(token) == "acme"
    assert verify(token, SECRET, NOW) == ClientIdentity(
        "acme", "ann", 1_700_000_061_000, NOW, token_id(token)
    )


@settings(deadline=None)
@given(
    user=st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=128),
    tenant=st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=128),
)
def test_any_name_survives(user: str, tenant: str) -> None:
    """Names of any script come back unchanged."""
    assert verify(mint(tenant, user, SECRET, NOW, 60), SECRET, NOW)[:2] == (tenant, user)


def test_a_token_of_another_maker_verifies() -> None:
    """sub, tenant and exp suffice; `aud` and `iss` are not looked at unless configured."""
    token = sign({**GOOD, "aud": "x", "iss": "y", "jti": 5})
    assert verify(token, SECRET, NOW)[:4] == ("acme", "ann", GOOD["exp"] * 1000, 0)


@pytest.mark.parametrize(
    "token",
    [
        pytest.param("", id="empty"),
        pytest.param("a.b.c", id="noise"),
        pytest.param("ä.b.c", id="not ascii"),
        pytest.param("x" * 9000, id="too long"),
        pytest.param(without_signature(GOOD, "none"), id="alg none"),
        pytest.param(without_signature(GOOD, "HS256"), id="empty signature"),
        pytest.param(sign(GOOD, "another secret of at least 32 bytes"), id="wrong secret"),
        pytest.param(sign(GOOD, SECRET * 2, "HS512"), id="HS512, wrong secret"),
        pytest.param(sign(GOOD, SECRET * 2, "HS384"), id="HS384"),
        pytest.param(sign(GOOD)[:-2], id="cut"),
        pytest.param(sign(GOOD, crit=["x"], x=1), id="unknown critical header"),
        pytest.param(sign(b"[1]"), id="payload is a list"),
        pytest.param(sign(b"\xff"), id="payload is not JSON"),
        pytest.param(sign(b'{"sub":"\\ud800","tenant":"acme","exp":9999999999}'), id="lone surrogate"),
        *(
            pytest.param(sign({**GOOD, **change}), id=str(change)[:40])
            for change in (
                {"tenant": ""}, {"tenant": None}, {"tenant": 5}, {"tenant": "a\nb"}, {"tenant": "x" * 129},
                {"sub": ""}, {"sub": None}, {"sub": "a\0b"}, {"sub": "x" * 129}, {"sub": "a\x85b"},
                {"exp": None}, {"exp": "soon"}, {"exp": True}, {"exp": -1}, {"exp": 1e30},
                {"nbf": NOW // 1000 + 60}, {"iat": NOW // 1000 + 60}, {"nbf": "x"}, {"iat": [1]},
            )
        ),
    ],
)  # fmt: skip
def test_anything_else_is_unauthenticated(token: str) -> None:
    """A token that is wrong in any way but its expiry raises UnauthenticatedError, nothing else."""
    with pytest.raises(UnauthenticatedError) as caught:
        verify_with(token, {"acme": SECRET}.get, NOW)
    assert type(caught.value) is UnauthenticatedError


def test_the_algorithm_is_never_taken_from_the_token() -> None:
    """A token signed with RSA is refused, whatever its key."""
    key = rsa.generate_private_key(65537, 2048)
    with pytest.raises(UnauthenticatedError, match="expected a token signed with HS256"):
        verify(jwt.encode(GOOD, key, algorithm="RS256"), SECRET, NOW)


def test_an_expired_token_is_told_apart() -> None:
    """Expiry (beyond the skew) is TokenExpiredError; an expired token with a bad signature is not."""
    token = mint("acme", "ann", SECRET, NOW, 10)
    exp_ms = 1_700_000_011_000
    assert verify(token, SECRET, exp_ms + 4999)
    with pytest.raises(TokenExpiredError):
        verify(token, SECRET, exp_ms + 5000)
    with pytest.raises(TokenExpiredError):
        verify(token, SECRET, exp_ms, TokenRules(skew_s=0))
    with pytest.raises(UnauthenticatedError) as caught:
        verify(token, "another secret of at least 32 bytes", exp_ms + 5000)
    assert not isinstance(caught.value, TokenExpiredError)


def test_nbf_and_iat_have_the_skew() -> None:
    """A clock a little behind does not refuse fresh tokens."""
    token = sign({**GOOD, "nbf": NOW / 1000 + 4, "iat": NOW / 1000 + 4})
    assert verify(token, SECRET, NOW)
    with pytest.raises(UnauthenticatedError, match="not valid yet"):
        verify(token, SECRET, NOW, TokenRules(skew_s=3))


def test_audience_and_issuer_when_configured() -> None:
    """`aud` may be one or a list; both must match once configured."""
    rules = TokenRules(audience="app", issuer="idp")
    for aud in ("app", ["other", "app"]):
        assert verify(sign({**GOOD, "aud": aud, "iss": "idp"}), SECRET, NOW, rules)
    for change in (
        {},
        {"aud": "other", "iss": "idp"},
        {"aud": "app"},
        {"aud": ["other"], "iss": "idp"},
        {"aud": {}},
    ):
        with pytest.raises(UnauthenticatedError, match=r"audience|issuer"):
            verify(sign({**GOOD, **change}), SECRET, NOW, rules)


def test_revoked_tokens() -> None:
    """Issued before the revocation, or nobody knows when: refused; after it, in the same second: valid."""
    token = mint("acme", "ann", SECRET, NOW, 60)
    assert verify(token, SECRET, NOW, tokens_valid_from_ms=NOW)
    with pytest.raises(UnauthenticatedError, match="revoked"):
        verify(token, SECRET, NOW, tokens_valid_from_ms=NOW + 1)
    with pytest.raises(UnauthenticatedError, match="revoked"):
        verify(sign(GOOD), SECRET, NOW, tokens_valid_from_ms=1)


def test_an_unknown_tenant_looks_like_a_wrong_signature() -> None:
    """Which tenants exist cannot be asked."""
    with pytest.raises(UnauthenticatedError) as unknown:
        verify_with(mint("nobody", "ann", SECRET, NOW, 60), {}.get, NOW)
    with pytest.raises(UnauthenticatedError) as wrong:
        verify_with(mint("acme", "ann", SECRET, NOW, 60), {"acme": "x" * 32}.get, NOW)
    assert str(unknown.value) == str(wrong.value)


def test_a_short_secret_is_refused() -> None:
    """HS256 needs 32 bytes, counted in UTF-8."""
    for short in ("", "x" * 31):
        with pytest.raises(UnauthenticatedError, match="at least 32 bytes"):
            mint("acme", "ann", short, NOW, 60)
        with pytest.raises(UnauthenticatedError, match="at least 32 bytes"):
            verify(sign(GOOD), short, NOW)
    assert mint("acme", "ann", "ä" * 16, NOW, 60)


@settings(deadline=None)
@given(text=st.text(max_size=200))
def test_noise_is_unauthenticated(text: str) -> None:
    """No text makes the verifier fail otherwise."""
    with pytest.raises(UnauthenticatedError):
        verify(text, SECRET, NOW)
    with pytest.raises(UnauthenticatedError):
        tokens.claimed_tenant(text)
